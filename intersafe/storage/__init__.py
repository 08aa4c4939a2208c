"""Storage: atomic writes, JSONL files, YAML, the bundled prompts, seeds and recipes, and the event loop."""
