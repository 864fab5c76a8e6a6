"""What a run says of itself: the sums of a step over micro-steps and processes, and ``log.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


class Totals(NamedTuple):
    """Sums over a step's samples, on all processes."""

    kept: float
    """Samples with a weight above 0."""
    judged: float
    """Samples that the filter looked at."""
    dropped: float
    """Samples that the filter left out."""
    loss: float
    """Sum of the processes' losses, each ``Σ w ℓ / nominal batch``; what is not finite counts 0."""
    not_finite: float
    """Micro-batches whose loss was not finite."""
    asked: float
    """Above 0 if some process was asked to stop."""


class Tally:
    """Adds up :class:`Totals` on the device; reading them is the one moment of a step when the processor waits."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(Totals._fields), device=device)

    def add(self, loss: Tensor, weights: Tensor, kept: Tensor, magnitudes: Tensor, asked: bool) -> None:
        """Add one micro-batch.

        Args:
            loss: the micro-batch's loss, a scalar.
            weights: ``[n]`` of the samples in it.
            kept: ``[n]`` the filter's part of them, 0 where it left the sample out.
            magnitudes: ``[n]``, NaN where not judged.
            asked: whether this process has been asked to stop.
        """
        finite = loss.detach().isfinite()
        numbers = (
            (weights > 0).sum(),
            (~magnitudes.isnan()).sum(),
            (kept == 0).sum(),
            torch.where(finite, loss.detach(), 0.0),
            ~finite,
            torch.tensor(asked, device=loss.device),
        )
        self._sums += torch.stack([number.float() for number in numbers])

    def exchange(self, accelerator: Accelerator, records: Tensor) -> tuple[Totals, Tensor]:
        """The sums over all processes, and all that they recorded: the one exchange of a step beside the gradients'.

        Args:
            accelerator: of the run.
            records: ``[micro-steps, n, columns]`` int32, on the device.

        Returns:
            The sums; and all records ``[micro-steps · processes · n, columns]`` on the CPU, in the order of positions.
        """
        packed = torch.cat([self._sums.view(torch.int32), records.flatten()])
        everyone = accelerator.gather(packed[None]).cpu()
        sums = everyone[:, : len(self._sums)].contiguous().view(torch.float32).sum(dim=0)
        of_all = everyone[:, len(self._sums) :].view(len(everyone), *records.shape)
        return Totals(*sums.tolist()), of_all.transpose(0, 1).reshape(-1, records.shape[-1])


class RunLog:
    """``log.jsonl``, a line per logged step; lines of steps that a resumed run repeats are cut off first."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        kept = [line for line in self._lines() if json.loads(line)["step"] <= start]
        path.write_text("".join(kept))

    def _lines(self) -> Iterator[str]:
        if self.path.is_file():
            for line in self.path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    yield line

    def add(self, line: dict[str, Any]) -> None:
        """Append one line."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
