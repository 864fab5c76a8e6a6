"""Denoising loops with guidance: Stable Diffusion's, and pixel space's."""
