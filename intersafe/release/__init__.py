"""Release: a run becomes versioned shards with a card and a manifest, and a release becomes a version on the Hub."""
