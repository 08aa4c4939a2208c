"""The doctor: asks every model of a recipe what it can do, and says how to fix what it cannot."""
