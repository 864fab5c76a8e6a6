"""Thresholds of the magnitude: by timestep band, at a wanted false-positive rate, and as a file beside a model.

``train detect --calibrate`` writes them from prompts known not to be memorized, a training run whose filter calibrates
itself from samples known to be unique; the filter reads either, the sampler the model's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from afresh.errors import UsageError

if TYPE_CHECKING:
    import torch

    from train.memorization.signals.magnitude import Form

BANDS = 10
"""Timestep bands of equal width that magnitudes are told apart by: of 1,000 timesteps [0, 100), [100, 200), …"""
FILE = "memorization.json"
"""Where a model's folder keeps its thresholds."""


def timestep_band(t: torch.Tensor, timesteps: int = 1000) -> torch.Tensor:
    """The band ``[n]`` int64 in [0, BANDS) of each timestep ``[n]`` in [0, ``timesteps``)."""
    return (t * BANDS).div(timesteps, rounding_mode="floor").long().clamp(0, BANDS - 1)


def compared_space(predicts: str) -> str:
    """What the magnitude compares of a model that predicts in a space: velocities as they are, all else as ε."""
    return "velocity" if predicts == "velocity" else "epsilon"


def threshold_at_fpr(negatives: ArrayLike, fpr: float = 0.01) -> float:
    """The smallest threshold that at most a share ``fpr`` of the scores reaches, without interpolation.

    Args:
        negatives: ``[n]`` scores of what is known not to be memorized.
        fpr: in [0, 1).

    Raises:
        ValueError: there are no scores, or one is NaN.
    """
    scores = np.sort(np.asarray(negatives, np.float64))[::-1]
    if not len(scores) or np.isnan(scores).any():
        raise ValueError("a threshold needs scores, none of them NaN")
    # As in tpr_at_fpr: one more false positive than allowed would pass at this score.
    barrier = scores[int(np.floor(fpr * len(scores) + 1e-9))]
    return float(np.nextafter(np.float32(barrier), np.float32(np.inf)))


@dataclass(frozen=True)
class Thresholds:
    """What counts as memorized.

    Attributes:
        form: of the magnitude.
        by_band: ``[BANDS]`` smallest magnitude that does; None where nothing is judged.
        against: the negative prompt that they were found against; empty for the empty prompt.
        elements: numbers in the latents that they were found on; None where that is not known.
        space: what the magnitude compares, ``epsilon`` or ``velocity``; None of numbers that somebody gave, and of
            older files.
    """

    form: Form
    by_band: tuple[float | None, ...]
    against: str = ""
    elements: int | None = None
    space: str | None = None

    @classmethod
    def of(cls, value: float | Sequence[float | None], form: Form) -> Thresholds:
        """From one number, or from one a band.

        Raises:
            UsageError: there are not as many as bands, or one is not above 0.
        """
        values = [float(value)] * BANDS if isinstance(value, (int, float)) else list(value)
        if len(values) != BANDS:
            raise UsageError(f"threshold: expected one number, or {BANDS} (one a timestep band), got {len(values)}")
        for one in values:
            if one is not None and not one > 0:
                raise UsageError(f"threshold must be positive, not {one}")
        if all(one is None for one in values):
            raise UsageError("threshold: nothing would be judged, every band has null")
        return cls(form, tuple(None if one is None else float(one) for one in values))

    def unlike(self, against: str, elements: int | None = None, space: str | None = None) -> str:
        """Why magnitudes are not to be compared with these thresholds, in words; empty where they are.

        Args:
            against: the negative prompt that the magnitudes are against.
            elements: numbers in their latents, if known: the form l2 grows with them.
            space: what the model predicts, if known.
        """

        def named(prompt: str) -> str:
            return f"the negative prompt {prompt!r}" if prompt else "the empty prompt"

        if against != self.against:
            return f"they were found against {named(self.against)}, and magnitudes here are against {named(against)}"
        if None not in (space, self.space) and compared_space(str(space)) != self.space:
            return f"they were found on magnitudes of {self.space}, and here they are of {compared_space(str(space))}"
        if self.form == "l2" and None not in (elements, self.elements) and elements != self.elements:
            return f"they were found on latents of {self.elements} numbers, and here are {elements}: use the form rms"
        return ""

    def reached(self, m: float, form: Form, t: float, elements: int, timesteps: int = 1000) -> bool | None:
        """Whether a magnitude at timestep ``t`` counts as memorized; None where nothing is judged there.

        Args:
            m: of the magnitude.
            form: its form.
            t: in [0, ``timesteps``).
            elements: numbers in the latents.
            timesteps: of the model's schedule.
        """
        limit = self.at(t, timesteps)
        if limit is None:
            return None
        rms = elements**0.5
        return m * {"l2": 1.0, "rms": rms}[form] / {"l2": 1.0, "rms": rms}[self.form] >= limit

    def tensor(self) -> torch.Tensor:
        """``[BANDS]`` float32, infinite where nothing is judged."""
        import torch

        return torch.tensor([math.inf if one is None else one for one in self.by_band], dtype=torch.float32)

    def at(self, t: float, timesteps: int = 1000) -> float | None:
        """The threshold at timestep ``t`` in [0, ``timesteps``); None where nothing is judged."""
        import torch

        return self.by_band[int(timestep_band(torch.tensor([t]), timesteps))]


def read_thresholds(path: str | Path, against: str | None = "") -> Thresholds:
    """The thresholds of a file that ``train detect --calibrate`` or a training run wrote.

    Args:
        path: of the file.
        against: the negative prompt that magnitudes are to be compared against; None does not ask.

    Raises:
        UsageError: there is none, it is no such file, or it was found against another prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: there are no thresholds; `train detect --calibrate` makes them")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        form, by_band = content["form"], content["by_band"]
        if form not in ("l2", "rms") or not isinstance(by_band, list):
            raise ValueError(f"form {form!r}")
        bare = Thresholds.of(by_band, form)
        found = replace(bare, against=str(content.get("against", "")), elements=content.get("elements"))
        found = replace(found, space=content.get("space"))
    except (ValueError, KeyError, TypeError, UsageError) as error:
        raise UsageError(f"{path}: not a file of thresholds ({error})") from error
    if against is not None and (why := found.unlike(against)):
        raise UsageError(f"{path}: {why}")
    return found


def model_thresholds(model: str) -> Thresholds | None:
    """Those that ``train detect --calibrate`` left in a model's folder, whatever they were found against; None where
    there are none.

    Raises:
        UsageError: the file is no file of thresholds.
    """
    path = Path(model) / FILE
    return read_thresholds(path, against=None) if path.is_file() else None


def calibrate(
    magnitudes: NDArray[np.float32], timesteps: NDArray[np.int64], fpr: float, train_timesteps: int = 1000
) -> dict[str, Any]:
    """Thresholds from the trajectories of prompts known not to be memorized.

    Args:
        magnitudes: ``[prompts, seeds, steps]``, see :class:`train.memorization.scoring.Scores`.
        timesteps: ``[steps]``.
        fpr: share of false positives that is accepted.
        train_timesteps: how many timesteps the model's schedule has.

    Returns:
        ``threshold`` of a prompt's detection score (the mean over its steps and seeds), and ``by_band``, those of
        single magnitudes; None in bands that no step falls in.
    """
    import torch

    bands = timestep_band(torch.from_numpy(timesteps), train_timesteps).numpy()
    return {
        "threshold": threshold_at_fpr(magnitudes.mean(axis=2).mean(axis=1), fpr),
        "by_band": [
            threshold_at_fpr(magnitudes[:, :, bands == band].ravel(), fpr) if (bands == band).any() else None
            for band in range(BANDS)
        ],
    }

