"""Ray workers: many processes and machines grow the jobs of one run."""
