"""Afresh: the ground floor that curation and training stand on."""

__version__ = "0.1.0"
