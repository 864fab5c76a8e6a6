"""The values that settings take where they say nothing themselves."""
