"""``train sample``: images for a file of prompts, their records and pictures."""
