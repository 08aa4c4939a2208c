"""The recipe: its sections, how it is read and overridden, and which settings contradict each other."""
