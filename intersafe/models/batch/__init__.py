"""Models behind a provider's batch API."""
