"""Protocols by name, and the published lists of memorized prompts that some of them take."""
