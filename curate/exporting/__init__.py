"""What a curation kept, as other tools read it."""
