"""The run directory: manifest, journal, outcomes, lock, budget, funnel."""
