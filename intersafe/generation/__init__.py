"""Generation: jobs, the order of the stages, the scheduler, and the run that they fill."""
