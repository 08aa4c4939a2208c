"""Reports: the figures of a run, counted from its files and compared with the published ones."""
