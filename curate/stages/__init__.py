"""The stages of a curation, in this order: read, join, decide, write, publish."""
