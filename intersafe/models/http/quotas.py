"""What an account may send in a minute: requests and tokens, for all replicas of a model together."""

import asyncio

BURST = 1.0
"""Seconds of a quota that may be used at once; servers refuse a whole minute of it at the start."""

_WEIGHT = 1 / 32  # of the latest answer in the ratio of used to estimated tokens


class _Bucket:
    """A token bucket: it fills at `limit` a minute; its level may fall below 0, and the next caller waits."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = max(1.0, limit * BURST / 60)
        self._rate = (limit - self.size + 1) / 60  # with a full bucket at its start no minute holds more than `limit`
        self._level = self.size
        self._at = float("-inf")

    def seconds_until(self, amount: float) -> float:
        """Seconds until the amount is there, or the bucket is full."""
        now = asyncio.get_running_loop().time()
        self._level = min(self.size, self._level + (now - self._at) * self._rate)
        self._at = now
        missing = min(amount, self.size) - self._level
        return missing / self._rate if missing > 1e-9 else 0.0

    def take(self, amount: float) -> None:
        """Takes the amount; a negative one is given back."""
        self._level = min(self.size, self._level - amount)


class RateQuota:
    """Requests and tokens a minute, for all replicas of a model together; first come first served.

    Before a request its tokens are estimated, scaled by what earlier answers have used; its answer then corrects the
    count. A request larger than the quota waits for a full bucket and goes alone.
    """

    def __init__(self, rpm: int | None, tpm: int | None) -> None:
        """Requests and tokens a minute; None: no such limit."""
        self._requests = _Bucket(rpm) if rpm else None
        self._tokens = _Bucket(tpm) if tpm else None
        self._turn = asyncio.Lock()
        self.waiting = 0
        """Requests that it holds back."""
        self._ratio = 1.0
        self._settled = 0

    @property
    def is_bound(self) -> bool:
        """True if there is a limit at all."""
        return bool(self._requests or self._tokens)

    def narrow(self, rpm: int | None, tpm: int | None) -> bool:
        """Adopts limits that the server has named; True if one is lower than the one known."""
        lower = False
        if rpm and (self._requests is None or rpm < self._requests.limit):
            self._requests, lower = _Bucket(rpm), True
        if tpm and (self._tokens is None or tpm < self._tokens.limit):
            self._tokens, lower = _Bucket(tpm), True
        return lower

    async def acquire(self, estimate: int) -> float:
        """Waits until a request of about `estimate` tokens may go; returns the tokens that were counted for it."""
        self.waiting += 1
        try:
            async with self._turn:
                while True:
                    tokens = estimate * self._ratio
                    if (pause := self._pause(tokens)) <= 0:
                        break
                    await asyncio.sleep(pause)
                if self._requests:
                    self._requests.take(1)
                if self._tokens:
                    self._tokens.take(tokens)
                return tokens
        finally:
            self.waiting -= 1

    @property
    def limits(self) -> str:
        """The limits, as 60 requests and 100,000 tokens a minute."""
        named = ((self._requests, "requests"), (self._tokens, "tokens"))
        return " and ".join(f"{bucket.limit:,} {what}" for bucket, what in named if bucket) + " a minute"

    def is_exceeded_by(self, estimate: int) -> bool:
        """True if one request of about `estimate` tokens is more than a minute has."""
        return self._tokens is not None and estimate * self._ratio > self._tokens.limit

    def may_go(self, estimate: int) -> bool:
        """True if a request of about `estimate` tokens need not wait."""
        return not self.waiting and self._pause(estimate * self._ratio) <= 0

    def _pause(self, tokens: float) -> float:
        by_requests = self._requests.seconds_until(1) if self._requests else 0.0
        return max(by_requests, self._tokens.seconds_until(tokens) if self._tokens else 0.0)

    def give_back(self, counted: float) -> None:
        """Takes a count back: the request does not go yet."""
        if self._requests:
            self._requests.take(-1)
        if self._tokens:
            self._tokens.take(-counted)

    def settle(self, counted: float, used: int, estimate: int) -> None:
        """Corrects the tokens `counted` for a request by those that its answer `used`; 0 if it does not say."""
        if self._tokens:
            self._tokens.take(used - counted)
        if used and estimate:
            self._settled += 1
            self._ratio += (used / estimate - self._ratio) * max(_WEIGHT, 1 / self._settled)
