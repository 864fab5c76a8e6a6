"""Afresh: the ground floor that curation and training stand on, and what a library's user asks for first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afresh.lazy import handed_on

if TYPE_CHECKING:
    from curate.duplicates import find_duplicates

__all__ = [
    "find_duplicates",
]
__version__ = "0.1.0"

__getattr__ = handed_on(__name__, {"find_duplicates": "/curate.duplicates"})
