"""Latents → pixels: the decoder in float32, and its linear preview."""
