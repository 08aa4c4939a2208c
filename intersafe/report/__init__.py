"""Reports: the figures of a run, counted from its files and set beside the published ones; never written into it."""
