"""What is encoded once: latents and prompt embeddings, in memory or on disk."""
