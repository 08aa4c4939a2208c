"""Storage: files written whole, JSONL files that heal, YAML, the bundled prompts, seeds and recipes."""
