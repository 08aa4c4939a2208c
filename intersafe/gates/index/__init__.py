"""The near-duplicate index: banded MinHash signatures in scratch files."""
