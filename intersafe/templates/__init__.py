"""Prompt files: loading, the roles with their variables, refusal templates."""
