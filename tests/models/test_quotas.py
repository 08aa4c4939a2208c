"""Requests and tokens a minute, in time that jumps, and what servers say about their limits in many dialects."""

import asyncio
import email.utils
import time
from collections.abc import Mapping, Sequence

import pytest

from intersafe.models.http.quotas import RateQuota
from intersafe.models.http.throttling import seconds_of, span_of, throttle_of
from tests.support.jumping_time import run

Sent = list[tuple[float, int]]
"""When each request went, and what it cost."""


def most_in_a_minute(sent: Sent) -> tuple[int, int]:
    """The most requests and the most tokens in any minute."""
    requests = tokens = 0
    for start, _ in sent:
        inside = [cost for at, cost in sent if start <= at < start + 60 - 1e-6]
        requests, tokens = max(requests, len(inside)), max(tokens, sum(inside))
    return requests, tokens


async def send(quota: RateQuota, costs: Sequence[int], estimate: int | None = None) -> Sent:
    """All requests at once, each with its cost; they are counted for that, or for the estimate and then corrected."""
    loop = asyncio.get_running_loop()
    sent: Sent = []

    async def one(cost: int) -> None:
        guess = cost if estimate is None else estimate
        counted = await quota.acquire(guess)
        sent.append((loop.time(), cost))
        await asyncio.sleep(2)
        quota.settle(counted, cost, guess)

    await asyncio.gather(*(one(cost) for cost in costs))
    return sent


@pytest.mark.parametrize("rpm", [1, 7, 60, 500, 3000])
def test_no_minute_holds_more_requests_than_allowed_and_nearly_all_of_them_are_used(rpm: int) -> None:
    sent = run(send(RateQuota(rpm, None), [0] * min(5 * rpm, 1500)))
    assert most_in_a_minute(sent)[0] <= rpm
    seconds = sent[-1][0] - sent[0][0]
    assert len(sent) >= 0.95 * rpm * seconds / 60


def test_the_start_is_smooth() -> None:
    sent = run(send(RateQuota(600, 60_000), [100] * 600))
    assert len([1 for at, _ in sent if at <= sent[0][0] + 1]) <= 20
    assert len([1 for at, _ in sent if at <= sent[0][0] + 30]) >= 280


def test_tokens_are_kept_to_by_estimate_and_the_first_come_goes_first() -> None:
    costs = [50 + 37 * i % 900 for i in range(300)]
    sent = run(send(RateQuota(None, 30_000), costs))
    assert [cost for _, cost in sent] == costs
    assert most_in_a_minute(sent)[1] <= 30_000 + max(costs)
    assert sum(costs) >= 0.9 * 500 * (sent[-1][0] - sent[0][0])


@pytest.mark.parametrize("factor", [0.2, 5])
def test_a_wrong_estimate_is_corrected_by_what_the_answers_say(factor: float) -> None:
    sent = run(send(RateQuota(None, 60_000), [1000] * 600, estimate=int(1000 * factor)))
    later = [(at, cost) for at, cost in sent if at > sent[0][0] + 60]
    assert most_in_a_minute(later)[1] <= 60_000 * 1.05
    assert sum(cost for _, cost in later) >= 0.9 * 1000 * (later[-1][0] - later[0][0])


def test_a_request_larger_than_the_quota_goes_alone_and_is_never_starved() -> None:
    async def main() -> list[int]:
        quota, order = RateQuota(None, 600), list[int]()

        async def one(cost: int) -> None:
            await quota.acquire(cost)
            order.append(cost)

        await asyncio.gather(*(one(cost) for cost in (5, 5, 1500, 5, 5)))
        return order

    assert run(main()) == [5, 5, 1500, 5, 5]


def test_a_caller_that_is_cancelled_in_the_queue_takes_nothing_and_stops_no_other() -> None:
    async def main() -> float:
        quota = RateQuota(60, None)
        await quota.acquire(0)
        began = asyncio.get_running_loop().time()
        tasks = [asyncio.create_task(quota.acquire(0)) for _ in range(10)]
        await asyncio.sleep(0.5)
        for task in tasks[:9]:
            task.cancel()
        await asyncio.wait(tasks)
        return asyncio.get_running_loop().time() - began

    assert run(main()) == pytest.approx(1)


def test_a_limit_that_the_server_names_is_taken_over_where_it_is_lower() -> None:
    async def main() -> tuple[list[bool], tuple[int, int]]:
        quota = RateQuota(100, None)
        news = [quota.narrow(*named) for named in ((200, None), (None, None), (None, 9000), (30, 9000), (30, 9000))]
        return news, most_in_a_minute(await send(quota, [10] * 90))

    news, (requests, _) = run(main())
    assert news == [False, False, True, True, False]
    assert 28 <= requests <= 30


# --- what a server says ----------------------------------------------------------------------------------------------

TPM = "Rate limit reached for m in organization o on tokens per min (TPM): Limit 30000, Used 28000, Requested 4000."


@pytest.mark.parametrize(
    ("text", "pause", "rpm", "tpm"),
    [
        (f"{TPM} Please try again in 4.2s. Visit https://example.org", 4.2, None, 30_000),
        ("Rate limit reached for m on requests per min (RPM): Limit 3, Used 3, Requested 1. Please try again in 20s.",
         20, 3, None),
        ("Rate limit reached for m on requests per min. Limit: 60 / min. Please try again in 1s.", 1, 60, None),
        ("Limits: tokens per minute (TPM), Limit 1,000,000", 0, None, 1_000_000),
        ("try again in 250ms", 0.25, None, None),
        ("Rate limited; please retry after 20 seconds.", 20, None, None),
        ("exceeded token rate limit of your current tier. Please retry after 6 seconds. Please go here", 6, None, None),
        ("on requests per day (RPD): Limit 200, Used 200, Requested 1. Please try again in 7m12s.", 432, None, None),
        ('{"error": {"code": 429, "details": [{"@type": "RetryInfo", "retryDelay": "34s"}]}}', 34, None, None),
        ("Please retry in 34.0743s.", 34.0743, None, None),
        ("Please try again in 1h0m0.5s", 3600, None, None),
        ("Try again after 2 minutes", 120, None, None),
        ("Too many requests, try again later", 0, None, None),
        ("Limit 0 on tokens per min (TPM): Limit 0, Used 0, Requested 5", 0, None, None),
        ("retry in a bit, after 5 o'clock; limit 7", 0, None, None),
        ("", 0, None, None),
    ],
)  # fmt: skip
def test_limits_named_only_in_the_body_are_understood(
    text: str, pause: float, rpm: int | None, tpm: int | None
) -> None:
    found = throttle_of({}, text)
    assert found.pause == pytest.approx(pause)
    assert (found.rpm, found.tpm, found.too_large) == (rpm, tpm, False)


def test_a_request_that_no_minute_has_room_for_is_told_from_one_that_may_wait() -> None:
    text = "Request too large for m on tokens per min (TPM): Limit 30000, Requested 45000. It must be reduced"
    assert throttle_of({}, text).too_large
    assert not throttle_of({}, TPM).too_large


@pytest.mark.parametrize(
    ("headers", "pause"),
    [
        ({"Retry-After": "7", "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "30s"}, 7),
        ({"retry-after-ms": "1500", "Retry-After": "2"}, 1.5),
        ({"retry-after-ms": "soon", "Retry-After": "2"}, 2),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1s"}, 1),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6m0s"}, 360),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "120ms"}, 0.12),
        ({"x-ratelimit-remaining-tokens": "5", "x-ratelimit-reset-tokens": "6m0s"}, 0),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "tomorrow"}, 0),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "99h"}, 3600),
        ({}, 0),
    ],
)
def test_headers_say_how_long(headers: Mapping[str, str], pause: float) -> None:
    assert throttle_of(headers, "").pause == pytest.approx(pause)
    if pause:
        assert throttle_of(headers, "try again in 55s").pause == pytest.approx(pause), "a header counts before the body"


@pytest.mark.parametrize("wrong_by", [0, -86_400, 86_400, 1e9])
def test_a_date_to_wait_for_is_held_against_the_servers_own_clock(wrong_by: float) -> None:
    theirs = time.time() + wrong_by
    until, now = (email.utils.formatdate(at, usegmt=True) for at in (theirs + 30, theirs))
    assert seconds_of(until, now) == 30
    assert throttle_of({"Retry-After": until, "Date": now}, "").pause == 30


def test_a_date_without_the_servers_clock_is_held_against_ours() -> None:
    until = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 90 < seconds_of(until) <= 100
    assert 90 < seconds_of(until, "nonsense") <= 100


@pytest.mark.parametrize("text", ["", "later", "-", "1 fortnight", "ms"])
def test_a_span_that_is_none_is_nothing(text: str) -> None:
    assert span_of(text) == 0
