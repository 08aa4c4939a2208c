"""The scripted models: deterministic stand-ins for demos and tests."""
