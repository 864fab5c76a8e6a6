"""What a run says of itself: the sums of a step over micro-steps and processes, ``log.jsonl``, and the trackers."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from afresh.errors import UsageError
from afresh.files import full_disk_named, to_json, write_atomic
from afresh.progress import get_logger
from train.memorization.thresholds import BANDS, timestep_band

if TYPE_CHECKING:
    from accelerate import Accelerator


log = get_logger(__name__)
MEASURED = ("samples_per_second", "data_wait", "peak_memory_gib")
"""Keys of a line that depend on the machine; all others are the same in a run that was resumed."""


@dataclass(frozen=True)
class Totals:
    """Sums over a step's samples, on all processes."""

    kept: float
    """Samples with a weight above 0."""
    judged: float
    """Samples that the filter looked at."""
    dropped: float
    """Samples that the filter left out."""
    loss: float
    """Sum of the processes' losses, each ``Σ w ℓ / nominal batch``; what is not finite counts 0."""
    magnitude: float
    """Sum of the magnitudes that the filter looked at."""
    not_finite: float
    """Micro-batches whose loss was not finite."""
    asked: float
    """Above 0 if some process was asked to stop."""
    band_losses: list[float]
    """Sum of the losses before any weight, by timestep band."""
    band_counts: list[float]
    """Samples in those sums: the readable ones of finite loss."""


class Tally:
    """Adds up :class:`Totals` on the device; reading them is the one moment of a step when the processor waits.

    Args:
        device: where the losses are.
        timesteps: of the noise schedule; the bands divide them evenly.
    """

    SCALARS = 6

    def __init__(self, device: torch.device, timesteps: int) -> None:
        self.timesteps = timesteps
        self._scalars = torch.zeros(self.SCALARS, device=device)
        self._bands = torch.zeros(2, BANDS, device=device)

    def add(
        self,
        loss: Tensor,
        losses: Tensor,
        t: Tensor,
        readable: Tensor,
        weights: Tensor,
        kept: Tensor,
        magnitudes: Tensor,
    ) -> None:
        """Add one micro-batch.

        Args:
            loss: the micro-batch's loss, a scalar.
            losses: ``[n]`` of each sample, before any weight.
            t: ``[n]`` timesteps.
            readable: ``[n]`` bool, False where there is no image.
            weights: ``[n]`` what the samples count in ``loss``.
            kept: ``[n]`` the filter's part of that, 0 where it left the sample out.
            magnitudes: ``[n]``, NaN where not judged.
        """
        loss, losses = loss.detach(), losses.detach()
        finite = loss.isfinite()
        numbers = (
            (weights > 0).sum(),
            (~magnitudes.isnan()).sum(),
            (kept == 0).sum(),
            torch.where(finite, loss, 0.0),
            magnitudes.nansum(),
            ~finite,
        )
        self._scalars += torch.stack([number.float() for number in numbers])
        counted = readable & losses.isfinite()
        band = timestep_band(t, self.timesteps)
        self._bands[0].index_add_(0, band, torch.where(counted, losses, 0.0))
        self._bands[1].index_add_(0, band, counted.float())

    def exchange(self, accelerator: Accelerator, records: Tensor, asked: bool) -> tuple[Totals, Tensor]:
        """The sums over all processes, and all that they recorded: the one exchange of a step beside the gradients'.

        Args:
            accelerator: of the run.
            records: ``[micro-steps, n, columns]`` int32, on the device.
            asked: whether this process has been asked to stop.

        Returns:
            The sums; and all records ``[micro-steps · processes · n, columns]`` on the CPU, in the order of positions.
        """
        wish = torch.full_like(self._scalars[:1], float(asked))  # made where it is needed
        mine = torch.cat([self._scalars, wish, self._bands.flatten()])
        everyone = accelerator.gather(torch.cat([mine.view(torch.int32), records.flatten()])[None]).cpu()
        sums = everyone[:, : len(mine)].contiguous().view(torch.float32).sum(dim=0).tolist()
        of_all = everyone[:, len(mine) :].view(len(everyone), *records.shape)
        kept, judged, dropped, loss, magnitude, not_finite, stops = sums[: -2 * BANDS]
        bands = sums[-2 * BANDS : -BANDS], sums[-BANDS:]
        totals = Totals(kept, judged, dropped, loss, magnitude, not_finite, stops, *bands)
        return totals, of_all.transpose(0, 1).reshape(-1, records.shape[-1])


class Suspects:
    """The samples of one optimizer step and their losses, read only when something is not finite."""

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, Tensor]] = []

    def add(self, rows: Tensor, losses: Tensor) -> None:
        """Remember a micro-batch: ``rows [n]`` int64 and ``losses [n]``."""
        self._seen.append((rows, losses.detach()))

    def rows(self, accelerator: Accelerator) -> list[int]:
        """Rows whose own loss is not finite, or all of the step's where only the gradient is; of all processes.

        Every process calls this together.
        """
        from accelerate.utils import gather_object

        mine = [row for rows, losses in self._seen for row in rows[~losses.isfinite().cpu()].tolist()]
        everything = [row for rows, _ in self._seen for row in rows.tolist()]
        if accelerator.num_processes > 1:
            mine, everything = gather_object(mine), gather_object(everything)
        return sorted(set(mine or everything))


class LossBands:
    """The mean loss by timestep band since the last line of the log; part of the run's state."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self.losses, self.counts = [0.0] * BANDS, [0.0] * BANDS

    def add(self, totals: Totals) -> None:
        """Add one step."""
        self.losses = [a + b for a, b in zip(self.losses, totals.band_losses, strict=True)]
        self.counts = [a + b for a, b in zip(self.counts, totals.band_counts, strict=True)]

    def take(self) -> list[float | None]:
        """The means; starts anew."""
        means = self.means()
        self._restart()
        return means

    def means(self) -> list[float | None]:
        """The means, None for a band without samples."""
        return [loss / count if count else None for loss, count in zip(self.losses, self.counts, strict=True)]

    def state_dict(self) -> dict[str, list[float]]:
        """What a checkpoint stores."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Take over what :meth:`state_dict` gave."""
        vars(self).update(state)


class Meter:
    """Throughput, and the share of time that the loop waits for batches, since the last reading."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._began, self._waited, self._samples = time.monotonic(), 0.0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the call that gets the next batch."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    def add(self, samples: int) -> None:
        """Count samples, of all processes."""
        self._samples += samples

    def read(self) -> dict[str, float]:
        """``samples_per_second``, ``data_wait`` in [0, 1] and ``peak_memory_gib`` of this process; starts anew."""
        seconds = time.monotonic() - self._began
        numbers = {
            "samples_per_second": self._samples / seconds,
            "data_wait": self._waited / seconds,
            "peak_memory_gib": peak_memory() / 2**30,
        }
        self._restart()
        return numbers


def peak_memory() -> int:
    """Bytes: the most that tensors have taken on the GPU, or without one the process's largest resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def kept_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> list[str]:
    """The lines of a log of JSON whose rows are ``wanted``; one that a crash cut short or damaged is dropped."""
    kept = []
    for line in path.read_text("utf-8", errors="replace").splitlines(keepends=True) if path.is_file() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if line.endswith("\n") and wanted(json.loads(line)):
                kept.append(line)
    return kept


class RunLog:
    """``log.jsonl``, a line per logged step; lines of steps that a resumed run repeats are cut off first."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        kept = kept_lines(path, lambda line: line["step"] <= start)
        if not start and path.is_file() and path.stat().st_size:
            log.warning("%s: there is no checkpoint to go on from: the run begins anew, and so does its log", path)
        with write_atomic(path) as temporary:
            temporary.write_text("".join(kept), "utf-8")

    def add(self, line: dict[str, Any]) -> None:
        """Append one line. Raises ``UserError`` where the disk is full."""
        with full_disk_named(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(to_json(line)) + "\n")


def check_trackers(names: Sequence[str]) -> None:
    """See that every tracker can be had: Accelerate leaves out a missing one without a word.

    Raises:
        UsageError: there is no such tracker, or its package is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UsageError(f"trackers: unknown {name!r}: choose among {', '.join(map(str, LOGGER_TYPE_TO_CLASS))}")
        if name not in map(str, get_available_trackers()):
            raise UsageError(f"trackers: {name} is not installed: pip install {name}")


def flat_numbers(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line for trackers, which know no lists: ``loss_by_band/3`` for the fourth of a list."""
    flat: dict[str, float] = {}
    for name, value in line.items():
        many = dict(enumerate(value)) if isinstance(value, list) else None
        items = {name: value} if many is None else {f"{name}/{i}": item for i, item in many.items()}
        flat |= {key: item for key, item in items.items() if isinstance(item, (int, float)) and key != "step"}
    return flat

