"""Model servers that intersafe starts: which ones, on which GPUs, and how it supervises them."""
