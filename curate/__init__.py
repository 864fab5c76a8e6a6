"""Curation of captioned image sets: finds copies, drops them, and keeps an account of every sample."""

from afresh import __version__ as __version__
