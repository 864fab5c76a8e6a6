"""``train quickstart``: the whole story on the carried sample set."""
