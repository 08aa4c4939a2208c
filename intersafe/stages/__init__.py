"""The stages: each turns records into records; none knows the order in which they run."""
