"""The memorization filter: which samples of a batch count, decided from the model's own predictions.

A sample whose text-conditional noise magnitude reaches the threshold is one that its caption alone retrieves (Wen et
al., ICLR 2024, §5: training-time mitigation). It keeps its place in the batch with weight 0, so that shapes stay
static and every rank runs the same passes; a kept sample weighs the same whatever else was dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from train.finetune.config import FilterConfig
from train.memorization.magnitude import magnitude

if TYPE_CHECKING:
    from train.finetune.diffusion import Diffusion

BANDS = 10
"""Timestep bands that magnitudes are reported by: [0, 100), [100, 200), …"""


def is_judged(timesteps: torch.Tensor, conditional: torch.Tensor, policy: FilterConfig, step: int) -> torch.Tensor:
    """Which samples the filter looks at, before any prediction is made.

    Args:
        timesteps: ``[n]`` int64 in [0, 1000).
        conditional: ``[n]`` bool, False where the caption was dropped for guidance training: such a sample has no
            condition to judge.
        policy: the filter's settings.
        step: optimizer step.

    Returns:
        ``[n]`` bool.
    """
    if policy.policy == "off" or step < policy.warmup_steps:
        return torch.zeros_like(conditional)
    if policy.policy == "noisy_steps":
        return conditional & (timesteps >= policy.min_timestep)
    return conditional


def filter_weights(
    eps_cond: torch.Tensor, eps_uncond: torch.Tensor, judged: torch.Tensor, policy: FilterConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of the samples in the loss, and the magnitudes they rest on.

    Args:
        eps_cond: ``[n, …]`` noise prediction under the sample's caption, in ε-space.
        eps_uncond: ``[n, …]`` noise prediction under the empty caption.
        judged: ``[n]`` bool from :func:`is_judged`.
        policy: the filter's settings.

    Returns:
        weights ``[n]`` float32, 0 where dropped and 1 elsewhere; magnitudes ``[n]`` float32, NaN where not judged.
    """
    m = magnitude(eps_cond, eps_uncond, form=policy.form)
    dropped = judged & (m >= policy.threshold)
    return (~dropped).float(), torch.where(judged, m, torch.full_like(m, float("nan")))


class MemorizationFilter:
    """The filter of one process of a run: weighs each batch, and keeps the record.

    Args:
        policy: the settings.
        diffusion: brings the model's output to ε-space.
        predict_unconditional: ``(x_t, t) →`` the model's output under the empty caption, without gradients; called
            only where something is judged by it.
        samples: how many samples the shard set has.
    """

    def __init__(
        self,
        policy: FilterConfig,
        diffusion: Diffusion,
        predict_unconditional: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        samples: int,
    ) -> None:
        self.policy, self.diffusion, self.predict_unconditional = policy, diffusion, predict_unconditional
        self.table = VerdictTable(samples)

    def weigh(
        self,
        output: torch.Tensor,
        x_t: torch.Tensor,
        t: torch.Tensor,
        rows: torch.Tensor,
        conditional: torch.Tensor,
        step: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Judge one batch and record the verdicts.

        Args:
            output: ``[n, c, h, w]`` float32, the model's output under the captions, detached.
            x_t: ``[n, c, h, w]`` what the model was given.
            t: ``[n]`` int64 timesteps.
            rows: ``[n]`` int64, which samples these are.
            conditional: ``[n]`` bool, False where there is nothing to judge: the caption was dropped for guidance
                training, or the sample counts nothing anyway.
            step: optimizer step.

        Returns:
            weights ``[n]`` float32, 0 where dropped and 1 elsewhere; magnitudes ``[n]`` float32, NaN where not judged.
        """
        if self.policy.policy == "off":
            kept = torch.ones(len(t), device=t.device)
            magnitudes = torch.full_like(kept, float("nan"))
        else:
            judged = is_judged(t, conditional, self.policy, step)
            eps_cond = self.diffusion.to_eps(output, x_t, t)
            eps_uncond = self.diffusion.to_eps(self.predict_unconditional(x_t, t), x_t, t)
            kept, magnitudes = filter_weights(eps_cond, eps_uncond, judged, self.policy)
        self.table.record(rows, t, kept, magnitudes)
        return kept, magnitudes

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores for this process."""
        return self.table.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.table.load_state_dict(state)

    def finish(self, path: Path, ids: Sequence[tuple[str, str]], states: Sequence[dict[str, Any]]) -> dict[str, int]:
        """Write the verdicts of all processes, and return what the summary says of them.

        Args:
            path: the Parquet file.
            ids: ``(shard, key)`` of each row.
            states: every process's :meth:`state_dict`.
        """
        whole = VerdictTable(len(ids))
        whole.load_state_dict({name: torch.stack([state[name] for state in states]).sum(0) for name in states[0]})
        whole.write(path, ids)
        return {
            "samples_seen": int(whole.seen.sum()),
            "judged": int(whole.judged_by_band.sum()),
            "dropped": int(whole.dropped.sum()),
            "samples_dropped_at_least_once": int((whole.dropped > 0).sum()),
        }


class VerdictTable:
    """What the filter saw and did, by sample id; written as Parquet at the end of a run.

    Columns: ``shard, key, seen`` (visits), ``judged``, ``dropped``, and per timestep band the number of judged visits
    and the sum of magnitudes (so that tables of several processes add up).
    """

    def __init__(self, size: int) -> None:
        self.seen = torch.zeros(size, dtype=torch.int64)
        self.dropped = torch.zeros(size, dtype=torch.int64)
        self.judged_by_band = torch.zeros(size, BANDS, dtype=torch.int64)
        self.magnitude_by_band = torch.zeros(size, BANDS, dtype=torch.float64)

    def record(
        self, rows: torch.Tensor, timesteps: torch.Tensor, weights: torch.Tensor, magnitudes: torch.Tensor
    ) -> None:
        """Add one batch; all arguments ``[n]``, on any device."""
        rows, timesteps, weights = rows.cpu(), timesteps.cpu(), weights.cpu()
        magnitudes = magnitudes.detach().double().cpu()
        judged = ~magnitudes.isnan()
        band = (timesteps * BANDS // 1000).clamp(0, BANDS - 1)
        one = torch.ones_like(rows)
        self.seen.index_put_((rows,), one, accumulate=True)
        self.dropped.index_put_((rows,), (judged & (weights == 0)).long(), accumulate=True)
        at = (rows[judged], band[judged])
        self.judged_by_band.index_put_(at, one[judged], accumulate=True)
        self.magnitude_by_band.index_put_(at, magnitudes[judged], accumulate=True)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors to store in a checkpoint."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        for name, value in state.items():
            getattr(self, name).copy_(value)

    def write(self, path: Path, ids: Sequence[tuple[str, str]]) -> None:
        """Write the table, one row a sample that was seen, in the order of the shards."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        from curate.console import write_atomic

        rows = self.seen.nonzero()[:, 0].tolist()
        mean = (self.magnitude_by_band / self.judged_by_band).tolist()  # 0 / 0 is NaN: no visit in that band
        table = pa.table(
            {
                "shard": [ids[row][0] for row in rows],
                "key": [ids[row][1] for row in rows],
                "seen": [int(self.seen[row]) for row in rows],
                "judged": [int(self.judged_by_band[row].sum()) for row in rows],
                "dropped": [int(self.dropped[row]) for row in rows],
                "magnitude_by_band": [
                    [None if value != value else value for value in mean[row]] for row in rows
                ],
            },
            schema=pa.schema(
                [
                    ("shard", pa.string()),
                    ("key", pa.string()),
                    ("seen", pa.int64()),
                    ("judged", pa.int64()),
                    ("dropped", pa.int64()),
                    ("magnitude_by_band", pa.list_(pa.float64())),
                ]
            ),
        )
        with write_atomic(path) as temporary:
            pq.write_table(table, temporary)
