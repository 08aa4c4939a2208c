"""The recipe: its sections, how it is read, checked and overridden."""
