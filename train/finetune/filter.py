"""The memorization filter: which samples of a batch count, decided from the model's own predictions.

A sample whose text-conditional noise magnitude reaches the threshold is one that its caption alone retrieves (Wen et
al., ICLR 2024, §5: training-time mitigation). It keeps its place in the batch with weight 0, so that shapes stay
static and every rank runs the same passes; a kept sample weighs the same whatever else was dropped.

The paper judges each sample at each visit, which takes one more forward pass over the whole batch. The other policies
judge some visits only, and take it over those rows; between them a sample's last verdict may stand in. A verdict rests
on one magnitude, or on all those in a window of steps (:mod:`train.finetune.evidence`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curate.console import UsageError, UserError, get_logger, write_atomic, write_json
from train.finetune.calibration import ENOUGH, MagnitudeQuantiles, unique_samples
from train.finetune.config import FilterConfig
from train.finetune.evidence import Evidence
from train.memorization.magnitude import magnitude
from train.memorization.thresholds import BANDS, FILE, Thresholds, read_thresholds, timestep_band

if TYPE_CHECKING:
    from train.finetune.diffusion import Diffusion
    from train.finetune.scan import ShardSet

log = get_logger(__name__)


def in_turn(rows: Tensor, visits: Tensor, k: int, seed: int) -> Tensor:
    """Whether these visits are the ones in ``k`` at which their samples are judged: ``[n]`` bool.

    Every sample is judged at every k-th of its visits, and different samples at different ones, so that each batch
    holds about as many.

    Args:
        rows: ``[n]`` int64, which samples.
        visits: ``[n]`` int64, how often each was seen before.
        k: at least 1.
        seed: of the run.
    """
    # A multiplicative hash (Knuth): neighbouring rows, which curation often left beside their copies, differ.
    phase = ((rows + 1) * 2654435761 + seed * 40503) % 4294967296 // 65536
    return (visits + phase) % k == 0


def is_judged(
    t: Tensor, captioned: Tensor, rows: Tensor, visits: Tensor, policy: FilterConfig, seed: int
) -> Tensor:
    """Which samples of a batch the filter looks at, before any prediction is made.

    Args:
        t: ``[n]`` int64 timesteps.
        captioned: ``[n]`` bool, False where the caption was dropped for guidance training: such a sample has no
            condition to judge.
        rows: ``[n]`` int64, which samples these are.
        visits: ``[n]`` int64, how often each was seen before.
        policy: the filter's settings.
        seed: of the run.

    Returns:
        ``[n]`` bool.
    """
    judged = captioned.clone()
    if policy.policy == "off":
        judged[:] = False
    if policy.policy in ("noisy_steps", "noisy_one_in_k"):
        judged &= t >= policy.min_timestep
    if policy.policy in ("one_in_k", "noisy_one_in_k"):
        judged &= in_turn(rows, visits, policy.k, seed)
    return judged


def caption_key(caption: str) -> int:
    """A number in [0, 2³¹) that stands for a caption, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=4).digest(), "little") >> 1


def filter_weights(
    eps_cond: Tensor, eps_uncond: Tensor, thresholds: Tensor, form: str = "l2"
) -> tuple[Tensor, Tensor]:
    """Weights of judged samples in the loss, and the magnitudes they rest on.

    Args:
        eps_cond: ``[n, …]`` noise prediction under the sample's caption, in ε-space.
        eps_uncond: ``[n, …]`` noise prediction under the empty caption.
        thresholds: ``[n]`` smallest magnitude that is left out.
        form: of the magnitude, ``l2`` or ``rms``.

    Returns:
        weights ``[n]`` float32, 0 where dropped and 1 elsewhere; magnitudes ``[n]`` float32.
    """
    m = magnitude(eps_cond, eps_uncond, form=form)  # type: ignore[arg-type]
    return (m < thresholds).float(), m


class MemorizationFilter:
    """The filter of a run: weighs each batch, and keeps the record.

    All processes hold the same state: what each of them judged in a step goes through :meth:`records` to all, and
    into :meth:`absorb` in the order of positions. So a verdict is known wherever its sample is met next, and several
    processes decide as one with the same batches would.

    Args:
        policy: the settings.
        diffusion: brings the model's output to ε-space.
        predict_unconditional: ``(x_t, t) →`` the model's output under the empty caption, without gradients.
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
        diffusion: Diffusion,
        predict_unconditional: Callable[[Tensor, Tensor], Tensor],
        samples: int,
        seed: int,
        thresholds: Thresholds | None = None,
        reference: Tensor | None = None,
        together: bool = False,
    ) -> None:
        self.policy, self.diffusion, self.predict_unconditional = policy, diffusion, predict_unconditional
        self.seed, self.together, self.reference = seed, together, reference
        self.table = VerdictTable(samples, judges=policy.policy != "off")
        # What its last verdict was against → for how many further visits that holds.
        self.against: dict[int, int] = {}
        self.quantiles: MagnitudeQuantiles | None = None
        self.thresholds = torch.full((BANDS,), torch.inf)
        self.watched = torch.ones(BANDS, dtype=torch.bool)  # bands in which anything is judged
        how = policy.calibrate
        if thresholds is not None:
            self.thresholds = thresholds.tensor()
            self.watched = self.thresholds.isfinite()
        elif policy.policy != "off":
            self.quantiles = MagnitudeQuantiles(how.quantile, how.per_band, how.window)
        self.evidence = Evidence(how.window, how.quantile, how.release) if policy.evidence == "window" else None
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
            bands = timestep_band(t, self.diffusion.timesteps)
            visits = self.table.seen[rows].long()
            judged = is_judged(t, captioned, rows, visits, self.policy, self.seed) & self.watched[bands]
            if step < self.policy.warmup_steps:
                judged[:] = False
            if self.against:
                stored = torch.tensor([key in self.against for key in keys.tolist()])
                kept = (~(stored & captioned & ~judged)).float().to(device)
            # Chosen on the CPU, where all that decides it is: the accelerator is not waited for.
            chosen = judged.nonzero()[:, 0]
            asked = chosen if len(chosen) or not self.together else torch.tensor([0])
            if len(asked):
                index = asked.to(device)
                x, times = x_t[index], t[asked].to(device)
                eps_uncond = self.diffusion.to_eps(self.predict_unconditional(x, times), x, times)
                if len(chosen):
                    eps_cond = self.diffusion.to_eps(output[index], x, times)
                    limits = self._limits(keys[chosen], bands[chosen], step).to(device)
                    kept[index], magnitudes[index] = filter_weights(eps_cond, eps_uncond, limits, self.policy.form)
                    magnitudes = torch.where(counted, magnitudes, torch.nan)
            kept = torch.where(counted, kept, 1.0)  # what counts nothing anyway is not the filter's doing
        left_out = (kept == 0).int()
        known = torch.stack([rows, t, keys], dim=1).int().to(device)
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
        bands, judged = timestep_band(t.long(), self.diffusion.timesteps), ~magnitudes.isnan()
        reached = torch.zeros_like(judged)  # by what was known before the step, as it was weighed
        at = judged.nonzero()[:, 0]
        reached[at] = magnitudes[at] >= self._limits(keys[at], bands[at], step)
        if self.policy.expires:
            self._remember(keys.tolist(), judged.tolist(), reached.tolist())
        self.table.record(rows, bands, magnitudes, reached, left_out.bool())
        if self.quantiles is not None and step >= self.policy.warmup_steps:
            unique = torch.ones_like(judged) if self.reference is None else self.reference[rows]
            used = judged & unique
            if self.evidence is not None:
                shares = self.quantiles.shares_below(bands[at], magnitudes[at])
                known = ~shares.isnan()
                at, scores = at[known], torch.special.ndtri(shares[known])
                self.evidence.add(keys[at].tolist(), scores, unique[at].tolist(), step)
            self._calibrate(bands[used], magnitudes[used], step)

    def _remember(self, keys: list[int], judged: list[bool], reached: list[bool]) -> None:
        """Keep the verdicts of a step's visits, in the order of positions, and let older ones expire."""
        for key, is_judged, is_against in zip(keys, judged, reached, strict=True):
            if is_judged:
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
        summary: dict[str, Any] = {"samples_seen": int(self.table.seen.sum()), **self.table.totals()}
        if self.policy.policy != "off":
            found: dict[str, Any] = {"form": self.policy.form, "by_band": self.by_band()}
            if self.quantiles is not None:
                how = self.policy.calibrate
                found |= {"quantile": how.quantile, "magnitudes": self.quantiles.sizes(), "window": how.window}
            write_json(out / "filter.json", found)
            summary["thresholds"] = found["by_band"]
        return summary


def check_filter(policy: FilterConfig, model: str) -> None:
    """Raise :class:`UsageError` for settings out of range, and thresholds that cannot be found."""
    how = policy.calibrate
    for name, value, least in (
        ("min_timestep", policy.min_timestep, 0),
        ("k", policy.k, 1),
        ("expires", policy.expires, 0),
        ("warmup_steps", policy.warmup_steps, 0),
        ("calibrate.steps", how.steps, 0),
        ("calibrate.window", how.window, 0),
    ):
        if value < least:
            raise UsageError(f"filter.{name} must be {least} or more, not {value}")
    if policy.evidence == "window" and policy.policy != "off" and not (how.steps and how.window):
        raise UsageError("filter.evidence window needs filter.calibrate.steps and filter.calibrate.window")
    if policy.evidence == "window" and not 0 < how.release <= how.quantile:
        raise UsageError(f"filter.calibrate.release must lie in (0, quantile], not {how.release}")
    if not 0 < how.quantile < 1:
        raise UsageError(f"filter.calibrate.quantile must lie in (0, 1), not {how.quantile}")
    chosen_thresholds(policy, model)


def reference_samples(policy: FilterConfig, shard_set: ShardSet) -> Tensor | None:
    """``[samples]`` bool, those that the thresholds are calibrated by; None for all, or where nothing is calibrated."""
    how = policy.calibrate
    if policy.policy == "off" or not how.steps or not how.unique:
        return None
    return torch.from_numpy(unique_samples(how.unique, shard_set.urls, shard_set.ids))


def chosen_thresholds(policy: FilterConfig, model: str) -> Thresholds | None:
    """The thresholds that the settings name; None where they are to be calibrated, or nothing is judged.

    Args:
        policy: the filter's settings.
        model: that training starts from; ``auto`` looks in its folder.

    Raises:
        UsageError: there is no such file, its form is another one, or a number is out of range.
    """
    if policy.policy == "off" or policy.calibrate.steps:
        return None
    if not isinstance(policy.threshold, str):
        try:
            return Thresholds.of(policy.threshold, policy.form)
        except UsageError as error:
            raise UsageError(f"filter.{error}") from None
    path = Path(model) / FILE if policy.threshold == "auto" else Path(policy.threshold)
    thresholds = read_thresholds(path)
    if thresholds.form != policy.form:
        raise UsageError(f"{path} has thresholds of the form {thresholds.form}, but filter.form is {policy.form}")
    return thresholds


class VerdictTable:
    """What the filter saw and did, by sample id; written as Parquet at the end of a run.

    Eight bytes a sample, and about a hundred for each that was judged or left out: of a hundred million samples, a run
    judges a few.

    Args:
        size: samples.
        judges: False keeps the visits alone.
    """

    def __init__(self, size: int, judges: bool = True) -> None:
        self.seen = torch.zeros(size, dtype=torch.int32)
        # Where in the following a sample stands; -1 for one that was neither judged nor left out.
        self.place = torch.full((size if judges else 0,), -1, dtype=torch.int32)
        self.used = 0
        self.reached = torch.zeros(0, dtype=torch.int32)
        self.dropped = torch.zeros(0, dtype=torch.int32)
        self.judged_by_band = torch.zeros(0, BANDS, dtype=torch.int32)
        self.magnitude_by_band = torch.zeros(0, BANDS, dtype=torch.float32)  # sums

    def record(self, rows: Tensor, bands: Tensor, magnitudes: Tensor, reached: Tensor, dropped: Tensor) -> None:
        """Add some visits; all arguments ``[n]`` on the CPU, magnitudes NaN where not judged."""
        self.seen.index_put_((rows,), torch.ones_like(rows, dtype=torch.int32), accumulate=True)
        judged = ~magnitudes.isnan()
        some = (judged | dropped).nonzero()[:, 0]
        if not len(some):
            return
        at = self._places(rows[some])
        self.reached.index_put_((at,), reached[some].int(), accumulate=True)
        self.dropped.index_put_((at,), dropped[some].int(), accumulate=True)
        judged = judged[some]
        cells = (at[judged], bands[some][judged])
        self.judged_by_band.index_put_(cells, torch.ones_like(cells[0], dtype=torch.int32), accumulate=True)
        self.magnitude_by_band.index_put_(cells, magnitudes[some][judged], accumulate=True)

    def _places(self, rows: Tensor) -> Tensor:
        """Where samples ``[n]`` stand: ``[n]`` int64; new ones get a place."""
        new = rows[self.place[rows] < 0].unique()
        if self.used + len(new) > len(self.reached):
            self._reserve(max(self.used + len(new), 2 * len(self.reached), 1024))
        self.place[new] = torch.arange(self.used, self.used + len(new), dtype=torch.int32)
        self.used += len(new)
        return self.place[rows].long()

    def _reserve(self, places: int) -> None:
        """Make room."""
        for name in ("reached", "dropped", "judged_by_band", "magnitude_by_band"):
            old = getattr(self, name)
            longer = old.new_zeros(places, *old.shape[1:])
            longer[: self.used] = old[: self.used]
            setattr(self, name, longer)

    def totals(self) -> dict[str, int]:
        """Counts over all samples."""
        return {
            "judged": int(self.judged_by_band.sum()),
            "dropped": int(self.dropped.sum()),
            "samples_dropped_at_least_once": int((self.dropped > 0).sum()),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors to store in a checkpoint."""
        names = ("reached", "dropped", "judged_by_band", "magnitude_by_band")
        return {"seen": self.seen, "place": self.place, **{name: getattr(self, name)[: self.used] for name in names}}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        for name, value in state.items():
            setattr(self, name, value.clone())
        self.used = len(self.reached)

    def write(self, path: Path, ids: Sequence[tuple[str, str]]) -> None:
        """Write the table, one row a sample that was seen, in the order of the shards.

        Columns: ``shard``, ``key``; ``seen``, visits; ``judged``, those at which the filter looked at it; ``reached``,
        those of them at which it reached the threshold; ``dropped``, visits at which it was left out, by that visit's
        verdict or an earlier one; ``judged_by_band`` and the mean ``magnitude_by_band``, by timestep band (null where
        it was never judged).
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = self.seen.nonzero()[:, 0]
        n = len(rows)
        place = self.place[rows].long() if len(self.place) else torch.full((n,), -1)
        known, at = place >= 0, place[place >= 0]
        judged, sums = torch.zeros(n, BANDS, dtype=torch.int32), torch.zeros(n, BANDS)
        reached, dropped = torch.zeros(2, n, dtype=torch.int32)
        judged[known], sums[known] = self.judged_by_band[at], self.magnitude_by_band[at]
        reached[known], dropped[known] = self.reached[at], self.dropped[at]
        mean = pa.array((sums / judged).flatten().numpy(), pa.float32(), mask=(judged == 0).flatten().numpy())
        names = [ids[row] for row in rows.tolist()]
        table = pa.table(
            {
                "shard": pa.array([shard for shard, _ in names], pa.string()),
                "key": pa.array([key for _, key in names], pa.string()),
                "seen": self.seen[rows].numpy(),
                "judged": judged.sum(dim=1).int().numpy(),
                "reached": reached.numpy(),
                "dropped": dropped.numpy(),
                "judged_by_band": pa.FixedSizeListArray.from_arrays(pa.array(judged.flatten().numpy()), BANDS),
                "magnitude_by_band": pa.FixedSizeListArray.from_arrays(mean, BANDS),
            }
        )
        with write_atomic(path) as temporary:
            pq.write_table(table, temporary)
