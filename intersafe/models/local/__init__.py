"""Models in this process: vLLM, transformers and diffusers."""
