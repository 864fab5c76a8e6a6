"""How many steps changed the weights, and how many did not."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass
class Counts:
    """How many optimizer steps changed the weights, how many were skipped, and how many just now in a row for a loss or
    gradient that is not finite.
    """

    updates: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0

    def add(self, moved: bool, bad: bool) -> None:
        """Count one step."""
        self.updates += moved
        self.skipped += not moved
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint stores."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over what :meth:`state_dict` gave."""
        vars(self).update(state)

