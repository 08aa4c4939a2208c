"""Model servers that intersafe starts: which, on which GPUs, and how they are supervised."""
