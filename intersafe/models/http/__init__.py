"""Models behind an HTTP endpoint: retries, rate limits, replicas, and the clients for chat, images and embeddings."""
