"""What goes wrong with the calls of one model: a log line for each incident, and a count for the role that met it.

Retries and throttling are logged as INFO. Replicas and outages are logged as WARNING. Those that the caller also tells
the user, by `Hooks.tell`, are marked as shown. The loggers are `intersafe.models.http` and
`intersafe.models.batch`. A model that several roles share counts an incident for the role whose call met it first;
faults of its batch API count for the role that opened the lane.
"""

import logging
from collections.abc import Callable

from intersafe.models.base import Hooks
from intersafe.run.incidents import SHOWN

LOGGER = logging.getLogger("intersafe.models.http")


class IncidentLog:
    """The log and the counts of one model; no key gets in, since every cause goes through `clean`."""

    def __init__(
        self, name: str, hooks: Hooks, clean: Callable[[str], str] = str, logger: logging.Logger = LOGGER
    ) -> None:
        """`name` is the model's identity. `clean` makes one printable line of a text, without the key."""
        self.name, self.hooks = name, hooks
        self._clean, self._logger = clean, logger

    def retried(self, role: str, url: str, tries: int, cause: object) -> None:
        """A call is sent again after `tries` failed tries, the last one for that cause."""
        self.hooks.incidents_of(role).retries += 1
        self._logger.info(
            "%s: %s at %s: try %d failed (%s); trying again", role, self.name, url, tries, self._clean(str(cause))
        )

    def asked_again(self, role: str, calls: int, cause: object) -> None:
        """Calls of a batch that got no answer go into a later one: one line for all of them."""
        self.hooks.incidents_of(role).retries += calls
        self._logger.info("%s: %s: %d calls are asked again (%s)", role, self.name, calls, self._clean(str(cause)))

    def throttled(self, role: str, url: str, cause: object) -> None:
        """The server answered that there are too many requests."""
        self.hooks.incidents_of(role).throttled += 1
        self._logger.info("%s: %s at %s throttles (%s)", role, self.name, url, self._clean(str(cause)))

    def taken_out(self, role: str, url: str, cause: object, *, shown: bool = False) -> None:
        """One of several replicas gets no calls for now."""
        self.hooks.incidents_of(role).replicas_out += 1
        self._warn(shown, "%s: %s: replica %s is taken out (%s)", role, self.name, url, self._clean(str(cause)))

    def brought_in(self, url: str, seconds: float, *, shown: bool = False) -> None:
        """That replica gets calls again."""
        self._warn(shown, "%s: replica %s is back after %.0f s", self.name, url, seconds)

    def outage_began(self, role: str, cause: object, *, shown: bool = False) -> None:
        """No replica answers: all calls wait."""
        self.hooks.incidents_of(role).outages += 1
        self._warn(shown, "%s: %s is away (%s); calls wait", role, self.name, self._clean(str(cause)))

    def outage_ended(self, seconds: float, *, shown: bool = False) -> None:
        """A replica answers again."""
        self._warn(shown, "%s is back after %.0f s", self.name, seconds)

    def _warn(self, shown: bool, text: str, *values: object) -> None:
        self._logger.warning(text, *values, extra=SHOWN if shown else None)
