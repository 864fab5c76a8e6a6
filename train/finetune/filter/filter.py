"""The memorization filter: which samples of a batch count, decided from the model's own predictions.

A sample whose text-conditional noise magnitude reaches the threshold is one that its caption alone retrieves (Wen et
al., ICLR 2024, §5: training-time mitigation). It keeps its place in the batch with weight 0, so that shapes stay
static and every rank runs the same passes; a kept sample weighs the same whatever else was dropped.

The paper judges each sample at each visit, which takes one more forward pass over the whole batch. The other policies
judge some visits only, and take it over those rows; between them a sample's last verdict may stand in. A verdict rests
on one magnitude, or on all those in a window of steps (:mod:`train.finetune.filter.evidence`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from afresh.errors import UserError
from afresh.files import write_json
from afresh.progress import get_logger, is_main_process
from train.finetune.config import FilterConfig
from train.finetune.data.transfer import to_device
from train.finetune.filter.calibration import ENOUGH, MagnitudeQuantiles
from train.finetune.filter.evidence import Evidence
from train.finetune.filter.policies import caption_key, filter_weights, is_judged
from train.finetune.filter.share import DroppedShare, what_to_change
from train.finetune.filter.table import VerdictTable
from train.memorization.thresholds import BANDS, Thresholds, compared_space, timestep_band

if TYPE_CHECKING:
    from train.denoising.schedules import NoiseSchedule


log = get_logger(__name__)


class MemorizationFilter:
    """The filter of a run: weighs each batch, and keeps the record.

    All processes hold the same state: what each of them judged in a step goes through :meth:`records` to all, and
    into :meth:`absorb` in the order of positions. So a verdict is known wherever its sample is met next, and several
    processes decide as one with the same batches would.

    Args:
        policy: the settings, with a calibration's lengths in numbers (``settings.with_lengths``).
        schedule: brings the model's output to ε-space.
        predict_unconditional: ``(x_t, t, frames) →`` the model's output under the empty caption, without gradients;
            ``frames`` where :meth:`weigh` has them.
        samples: how many samples the shard set has.
        seed: of the run.
        thresholds: what is memorized; None if it is to be calibrated.
        reference: ``[samples]`` bool, those that calibration goes by; None for all.
        together: all processes call ``predict_unconditional`` in each micro-step, whether or not they judge something:
            a model whose weights are spread over the processes needs that.
    """

    def __init__(
        self,
        policy: FilterConfig,
        schedule: NoiseSchedule,
        predict_unconditional: Callable[..., Tensor],
        samples: int,
        seed: int,
        thresholds: Thresholds | None = None,
        reference: Tensor | None = None,
        together: bool = False,
    ) -> None:
        policy = policy.settled()
        self.policy, self.schedule, self.predict_unconditional = policy, schedule, predict_unconditional
        self.seed, self.together, self.reference = seed, together, reference
        self.table = VerdictTable(samples, judges=policy.policy != "off")
        # What its last verdict was against → for how many further visits that holds.
        self.against: dict[int, int] = {}
        self.quantiles: MagnitudeQuantiles | None = None
        self.thresholds = torch.full((BANDS,), torch.inf)
        self.watched = torch.ones(BANDS, dtype=torch.bool)  # bands in which anything is judged
        how, quantile = policy.calibrate, float(policy.calibrate.quantile or 0)
        if thresholds is not None:
            self.thresholds = thresholds.tensor()
            self.watched = self.thresholds.isfinite()
        elif policy.policy != "off":
            self.quantiles = MagnitudeQuantiles(quantile, how.per_band, how.window or 0)
        self.evidence = None
        if self.quantiles is not None and policy.evidence == "window" and how.window:
            self.evidence = Evidence(how.window, quantile, how.release)
        self.share = DroppedShare(policy.most_dropped)
        self._records: list[Tensor] = []

    # -------------------------------------------------------------------------------------------- in each micro-step

    def weigh(
        self,
        output: Tensor,
        x_t: Tensor,
        t: Tensor,
        rows: Tensor,
        captions: Sequence[str],
        captioned: Tensor,
        counted: Tensor,
        step: int,
        frames: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Judge one batch.

        Args:
            output: ``[n, c, h, w]`` float32, the model's output under the captions, detached.
            x_t: ``[n, c, h, w]`` what the model was given.
            t: ``[n]`` int64 timesteps, on the CPU.
            rows: ``[n]`` int64, which samples these are, on the CPU.
            captions: ``n`` texts.
            captioned: ``[n]`` bool, False where the caption was dropped for guidance training, on the CPU.
            counted: ``[n]`` bool, False where the sample counts nothing anyway, its image being unreadable.
            step: optimizer step.
            frames: ``[n, 6]`` sizes and crops of the images, for models that are told them
                (``train.finetune.data.images.ImageLoader.frame``).

        Returns:
            weights ``[n]`` float32, 0 where left out and 1 elsewhere; magnitudes ``[n]`` float32, NaN where not judged.
        """
        device = x_t.device
        keys = rows
        if self.policy.verdict_of == "caption":
            keys = torch.tensor([caption_key(text) for text in captions])
        kept = torch.ones(len(t), device=device)
        magnitudes = torch.full_like(kept, torch.nan)
        if self.policy.policy != "off":
            bands = timestep_band(t, self.schedule.timesteps)
            visits = self.table.seen[rows].long()
            judged = is_judged(t, captioned, rows, visits, self.policy, self.seed) & self.watched[bands]
            if step < self.policy.warmup_steps:
                judged[:] = False
            if self.against:
                stored = torch.tensor([key in self.against for key in keys.tolist()])
                kept = to_device((~(stored & captioned & ~judged)).float(), device)
            # Chosen on the CPU, where all that decides it is: the accelerator is not waited for.
            chosen = judged.nonzero()[:, 0]
            asked = chosen if len(chosen) or not self.together else torch.tensor([0])
            if len(asked):
                index = to_device(asked, device)
                x, times = x_t[index], to_device(t[asked], device)
                framed = () if frames is None else (frames[asked],)
                eps_uncond = self.schedule.prediction(self.predict_unconditional(x, times, *framed), x, times).compared
                if len(chosen):
                    eps_cond = self.schedule.prediction(output[index], x, times).compared
                    limits = to_device(self._limits(keys[chosen], bands[chosen], step), device)
                    kept[index], magnitudes[index] = filter_weights(eps_cond, eps_uncond, limits, self.policy.form)
                    magnitudes = torch.where(counted, magnitudes, torch.nan)
            kept = torch.where(counted, kept, 1.0)  # what counts nothing anyway is not the filter's doing
        left_out = (kept == 0).int()
        known = to_device(torch.stack([rows, t.long(), keys], dim=1).int(), device)
        seen = torch.stack([magnitudes.view(torch.int32), left_out], dim=1)
        self._records.append(torch.cat([known, seen], dim=1))
        return kept, magnitudes

    def _limits(self, keys: Tensor, bands: Tensor, step: int) -> Tensor:
        """The least magnitude with which each visit is left out: ``[n]`` float32, from ``keys`` and ``bands`` ``[n]``.

        It is the band's threshold or, where earlier visits count, what these leave to this one.
        """
        limits = self.thresholds[bands]
        if self.evidence is None or self.quantiles is None:
            return limits
        shares = torch.special.ndtr(self.evidence.needed(keys.tolist(), self.against, step))
        needed = self.quantiles.at(bands, shares)
        needed = torch.where(shares == 0, 0.0, torch.where(shares == 1, torch.inf, needed))
        return torch.where(limits.isfinite(), needed, limits)

    # ------------------------------------------------------------------------------------------------- in each step

    def records(self) -> Tensor:
        """What this process saw in a step, to be exchanged: ``[micro-steps, n, 5]`` int32, on the device.

        The columns are the sample's row, its timestep, what its verdict is kept under, the bits of the magnitude as
        float32 (NaN where it was not judged), and whether it was left out.
        """
        records, self._records = torch.stack(self._records), []
        return records

    def absorb(self, records: Tensor, step: int) -> None:
        """Take in what all processes saw in a step.

        Args:
            records: ``[samples of the step, 5]`` int32 on the CPU, see :meth:`records`, in the order of positions.
            step: optimizer step.

        Raises:
            UserError: calibration ends and no band has enough magnitudes.
        """
        rows, t, keys, bits, left_out = records.unbind(dim=1)
        rows, magnitudes = rows.long(), bits.contiguous().view(torch.float32)
        bands, judged = timestep_band(t.long(), self.schedule.timesteps), ~magnitudes.isnan()
        reached = torch.zeros_like(judged)  # by what was known before the step, as it was weighed
        at = judged.nonzero()[:, 0]
        reached[at] = magnitudes[at] >= self._limits(keys[at], bands[at], step)
        if self.policy.expires:
            self._remember(keys.tolist(), judged.tolist(), reached.tolist())
        self.table.record(rows, bands, magnitudes, reached, left_out.bool())
        if step >= self.policy.warmup_steps and self.thresholds.isfinite().any():
            self._watch_share(len(rows), int(left_out.sum()), step)
        if self.quantiles is not None and step >= self.policy.warmup_steps:
            unique = torch.ones_like(judged) if self.reference is None else self.reference[rows]
            used = judged & unique
            if self.evidence is not None:
                shares = self.quantiles.shares_below(bands[at], magnitudes[at])
                known = ~shares.isnan()
                at, scores = at[known], torch.special.ndtri(shares[known])
                self.evidence.add(keys[at].tolist(), scores, unique[at].tolist(), step)
            self._calibrate(bands[used], magnitudes[used], step)

    def _watch_share(self, visits: int, dropped: int, step: int) -> None:
        if self.share.add(visits, dropped) and is_main_process():  # all processes see the same
            log.warning(
                "step %d: the filter leaves out %.0f %% of the latest %.0f visits, more than filter.most_dropped "
                "(%.0f %%): %s",
                step + 1,
                100 * self.share.dropped / self.share.visits,
                self.share.visits,
                100 * self.share.most,
                what_to_change(self.policy),
            )

    def _remember(self, keys: list[int], judged: list[bool], reached: list[bool]) -> None:
        """Keep the verdicts of a step's visits, in the order of positions, and let older ones expire."""
        for key, looked_at, is_against in zip(keys, judged, reached, strict=True):
            if looked_at:
                self.against.pop(key, None)
                if is_against:
                    self.against[key] = self.policy.expires
            elif key in self.against:
                self.against[key] -= 1
                if not self.against[key]:
                    del self.against[key]

    def _calibrate(self, bands: Tensor, magnitudes: Tensor, step: int) -> None:
        """Take in magnitudes of samples that are known to be unique, and set the thresholds when it is time."""
        assert self.quantiles is not None
        how, done = self.policy.calibrate, step + 1 - self.policy.warmup_steps
        if done > how.steps and not how.window:
            return  # they stand
        self.quantiles.add(bands, magnitudes)
        if done < how.steps:
            return
        self.thresholds = self.quantiles.thresholds()
        if done == how.steps:
            if not self.thresholds.isfinite().any():
                raise UserError(
                    f"filter.calibrate: no timestep band has {ENOUGH} magnitudes of unique samples after {how.steps} "
                    f"steps (the most has {max(self.quantiles.sizes()):.0f}): raise filter.calibrate.steps, or set "
                    "filter.calibrate.per_band to false"
                )
            if not how.window:
                self.watched = self.thresholds.isfinite()
            shown = ", ".join("–" if one is None else f"{one:.3g}" for one in self.by_band())
            log.info("filter calibrated after step %d: %s by timestep band, %s", step + 1, shown, self.policy.form)

    # ----------------------------------------------------------------------------------------------------- its state

    def log_line(self) -> dict[str, Any]:
        """What a line of the log says beside the counts: the thresholds, where they come from the run itself."""
        return {} if self.quantiles is None else {"thresholds": self.by_band()}

    def by_band(self) -> list[float | None]:
        """The thresholds that hold now, one a band; None where nothing is left out."""
        return [one if one < torch.inf else None for one in self.thresholds.tolist()]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores."""
        state = {
            "table": self.table.state_dict(),
            "against": torch.tensor([*self.against.items()], dtype=torch.int64).view(-1, 2),
            "thresholds": self.thresholds,
            "watched": self.watched,
            "share": self.share.state_dict(),
        }
        if self.quantiles is not None:
            state["magnitudes"] = self.quantiles.counts
        if self.evidence is not None:
            state["evidence"] = self.evidence.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.table.load_state_dict(state["table"])
        self.against = dict(state["against"].tolist())
        self.thresholds, self.watched = state["thresholds"].clone(), state["watched"].clone()
        self.share.load_state_dict(state["share"])
        if self.quantiles is not None:
            self.quantiles.counts.copy_(state["magnitudes"])
        if self.evidence is not None:
            self.evidence.load_state_dict(state["evidence"])

    def finish(self, out: Path, ids: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """Write ``verdicts.parquet`` and ``filter.json``, and return what the summary says of them.

        Args:
            out: folder of the run.
            ids: ``(shard, key)`` of each row.
        """
        self.table.write(out / "verdicts.parquet", ids)
        seen, totals = int(self.table.seen.sum()), self.table.totals()
        summary: dict[str, Any] = {"samples_seen": seen, **totals}
        if self.policy.policy != "off":
            summary["dropped_share"] = round(totals["dropped"] / max(seen, 1), 3)
            space = compared_space(self.schedule.space)
            found: dict[str, Any] = {"form": self.policy.form, "space": space, "by_band": self.by_band()}
            if self.quantiles is not None:
                how = self.policy.calibrate
                found |= {"quantile": how.quantile, "magnitudes": self.quantiles.sizes(), "window": how.window}
            write_json(out / "filter.json", found)
            summary["thresholds"] = found["by_band"]
        return summary

