"""Curation of captioned image sets: finds copies, drops them, and keeps an account of every sample."""

__version__ = "0.1.0"
