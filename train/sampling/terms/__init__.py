"""Guidance terms, a file a method, and their names."""
