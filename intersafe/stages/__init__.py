"""The stages of the method; none of them knows the order in which they run."""
