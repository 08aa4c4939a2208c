"""Manufactures multi-turn, multi-image dialogues that make vision-language models safer in conversation."""
