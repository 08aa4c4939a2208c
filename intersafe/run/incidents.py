"""Incidents: how often a role's calls were retried, throttled, or cut off by an outage."""

import msgspec


class Incidents(msgspec.Struct):
    """Counts of one role."""

    retries: int = 0
    """Calls that were sent again after a passing fault (5xx, time-out, unreadable body)."""
    throttled: int = 0
    """Answers 429, 503 or 529: the rate limiter slowed down."""
    outages: int = 0
    """Times that every replica was away."""
    replicas_out: int = 0
    """Times that one of several replicas was taken out."""
