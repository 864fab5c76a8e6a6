"""The memorization filter in somebody else's training loop: one call a batch, which gives the weights of its losses.

What a run of ours tells its filter (rows of a shard set, steps, an exchange between the processes) is found out here
from what any loop has at hand: the model's output, what it was given, and the captions or their token ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from train.denoising.opening.checkpoints import check_scheduler
from train.denoising.schedules import NoiseSchedule
from train.finetune.config import FilterConfig
from train.finetune.filter.checks import check_filter, chosen_thresholds
from train.finetune.filter.filter import MemorizationFilter as RunFilter
from train.finetune.filter.settings import with_lengths

Texts = Sequence[Hashable] | Tensor


class MemorizationFilter:
    """Weighs the losses of a batch: 0 for samples that the model retrieves from their caption, 1 for all others.

    A step here is a call. Thresholds are found in the run, from the magnitudes that it meets, unless they are given;
    until they are known nothing is left out. In several processes all call it equally often, and decide as one.

    Args:
        scheduler: of diffusers, the one that noises the training latents; its betas and prediction type count.
        predict_unconditional: ``(x_t [m, c, h, w], t [m]) →`` the model's output under the empty caption, like ``x_t``.
            It is called without gradients and on the judged rows alone, and not on all processes equally often: give
            it the model without its data-parallel wrapper.
        empty: what stands for the empty caption in a batch: its text, or its token ids ``[length]``. Samples under it
            have no caption to be judged by.
        policy: ``every_step``, or one that judges some visits (:class:`train.finetune.config.FilterConfig`).
        model: folder that the threshold ``auto`` is read from.
        seed: of the visits that the policies ``one_in_k`` judge.
        settings: the other fields of that class: ``threshold``, ``evidence``, ``calibrate``, …

    Raises:
        UsageError: a setting is out of range.
        UserError: the scheduler is for flow matching.
    """

    def __init__(
        self,
        scheduler: Any,
        predict_unconditional: Callable[[Tensor, Tensor], Tensor],
        *,
        empty: str | Tensor = "",
        policy: str = "every_step",
        model: str = "",
        seed: int = 0,
        **settings: Any,
    ) -> None:
        self.policy = FilterConfig(policy=policy, **settings)  # type: ignore[arg-type]
        check_filter(self.policy, model)
        check_scheduler(scheduler, "scheduler")
        self.thresholds = chosen_thresholds(self.policy, model)
        self.schedule = NoiseSchedule(scheduler)
        self.predict_unconditional = predict_unconditional
        self.seed, self.steps = seed, 0
        self._empty = _keys(empty[None] if isinstance(empty, Tensor) else [empty])[0]
        self._rows: dict[int, int] = {}  # key of a caption → its row of the record
        self._batch = 0  # samples of a call on all processes, on average, that have captions
        self._run: RunFilter | None = None

    def __call__(self, output: Tensor, x_t: Tensor, t: Tensor, captions: Texts) -> Tensor:
        """Judge a batch.

        Args:
            output: ``[n, c, h, w]`` the model's output under the captions, any float dtype.
            x_t: ``[n, c, h, w]`` what the model was given.
            t: ``[n]`` int64 timesteps.
            captions: ``n`` texts, or their token ids ``[n, length]``; whatever tells captions apart and is equal in all
                processes.

        Returns:
            ``[n]`` float32 on the device of ``x_t``: what to multiply the losses of the samples with.

        Raises:
            ValueError: there are not as many captions as samples.
            UserError: calibration ends and no timestep band has enough magnitudes.
        """
        keys = _keys(captions)
        if len(keys) != len(x_t):
            raise ValueError(f"the batch has {len(x_t)} samples and {len(keys)} captions")
        everybodys = [key for some in _from_all(keys) for key in some]
        rows = self._numbered(everybodys)
        run = self._run or self._begin(sum(key != self._empty for key in everybodys))
        run.table.grow(len(self._rows))
        captioned = torch.tensor([key != self._empty for key in keys], dtype=torch.bool)
        kept, _ = run.weigh(
            output.detach().float(),
            x_t.detach(),
            t.long().cpu(),
            torch.tensor([rows[key] for key in keys]),
            [str(key) for key in keys],
            captioned,
            torch.ones(len(keys), dtype=torch.bool, device=x_t.device),
            self.steps,
        )
        records = _from_all(run.records().flatten(0, 1).cpu())
        run.absorb(torch.cat(records), self.steps)
        self.steps += 1
        return kept

    def report(self) -> dict[str, Any]:
        """What it did so far: ``seen``, ``judged`` and ``dropped`` visits of all processes, ``dropped_share``, and the
        ``thresholds``, one a timestep band, None where nothing is left out (yet).
        """
        if self._run is None:
            return {"seen": 0, "judged": 0, "dropped": 0, "dropped_share": 0.0, "thresholds": None}
        seen, totals = int(self._run.table.seen.sum()), self._run.table.totals()
        return {
            "seen": seen,
            "judged": totals["judged"],
            "dropped": totals["dropped"],
            "dropped_share": round(totals["dropped"] / max(seen, 1), 3),
            "thresholds": self._run.by_band(),
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores: tensors and numbers. ``accelerator.register_for_checkpointing`` asks for it."""
        run = {} if self._run is None else self._run.state_dict()
        rows = torch.tensor(list(self._rows.items()), dtype=torch.int64).view(-1, 2)
        return {"steps": self.steps, "batch": self._batch, "rows": rows, "run": run}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.steps, self._rows = state["steps"], dict(state["rows"].tolist())
        if state["run"]:
            self._begin(state["batch"]).load_state_dict(state["run"])

    def _begin(self, captioned: int) -> RunFilter:
        """The filter itself, once it is known how many captioned samples a call judges: a calibration's length."""
        self._batch = captioned
        policy = with_lengths(self.policy, max(captioned, 1))
        rows = len(self._rows)
        self._run = RunFilter(policy, self.schedule, self._unconditional, rows, self.seed, self.thresholds)
        return self._run

    @torch.no_grad()
    def _unconditional(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.predict_unconditional(x_t, t).float()

    def _numbered(self, keys: Sequence[int]) -> dict[int, int]:
        """The rows of captions; new ones are numbered as they come, in all processes alike."""
        for key in keys:
            self._rows.setdefault(key, len(self._rows))
        return self._rows


def _keys(captions: Texts) -> list[int]:
    """A number for each caption, the same in every process and on every machine."""
    if isinstance(captions, Tensor):
        captions = [row.tobytes() for row in captions.long().cpu().numpy()]
    data = (one if isinstance(one, bytes) else str(one).encode("utf-8", "replace") for one in captions)
    return [int.from_bytes(hashlib.blake2b(one, digest_size=8).digest(), "little", signed=True) for one in data]


def _from_all(mine: Any) -> list[Any]:
    """What each process has, in their order; batches may differ in size."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return [mine]
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, mine)
    return found
