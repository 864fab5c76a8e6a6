"""The value neurons behind memorized prompts: found, blocked, written to files."""
