"""Settings of the filter, and of ``train verdicts``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Calibration:
    """How the filter finds its thresholds by itself, from samples that are known to be unique.

    Args:
        steps: optimizer steps in which magnitudes are gathered and nothing is left out; 0 takes as many as give each
            threshold 40 magnitudes, and at least 50.
        quantile: of their magnitudes that becomes the threshold: one minus the share of unique samples left out. null
            takes the preset's, 0.8, or 0.9 where a policy is named.
        release: with ``evidence: window``, the quantile below which what was left out counts again.
        per_band: one threshold for each timestep band of 100; else one for all.
        window: steps after which an older magnitude counts by a factor e less; the threshold then follows the model to
            the end of the run. null takes twice ``steps``; 0 fixes the threshold after them.
        unique: folder of a curation of the shards that are trained on; its ledger tells which samples have no near
            copy. Empty takes all samples, which is right for shards that curation wrote.
    """

    steps: int = 0
    quantile: float | None = None
    release: float = 0.5
    per_band: bool = True
    window: int | None = None
    unique: str = ""


PRESETS = {
    "recommended": ("noisy_steps", "caption", "window"),
    "paper": ("every_step", "sample", "visit"),
    "none": ("off", "sample", "visit"),
}
"""What each of the filter's presets stands for: ``policy``, ``verdict_of`` and ``evidence``."""


@dataclass
class FilterConfig:
    """Which samples of a batch are left out because the model retrieves them from their caption.

    A preset is all that most runs need; who names a policy sets each of the others, too.

    Args:
        policy: ``off``; ``every_step`` judges each sample at each visit (Wen et al.); ``noisy_steps`` only where the
            timestep is at least ``min_timestep``; ``one_in_k`` at one of its visits in ``k``; ``noisy_one_in_k`` where
            both hold. Visits without a caption are never judged, nor left out. null takes the preset's.
        threshold: smallest text-conditional noise magnitude that is left out. null finds it in the run
            (``calibrate``), as it depends on the model, the set and the latents' size; else one number; or ten, one for
            each timestep band of 100, null where nothing is judged; or ``auto``, those that ``train detect
            --calibrate`` left in the model's folder; or a file of its or of a run's (``filter.json``).
        form: ``l2`` is the papers' scale (grows with the latent's size), ``rms`` is independent of it.
        min_timestep: of the noisy policies, in [0, 1000). null takes the one that a fifth of the run's visits reach:
            800 where timesteps are uniform, of flow matching by its density and shift.
        k: of the policies one_in_k.
        expires: how many further visits a sample's last verdict stands for, where they are not judged themselves; 0
            leaves a sample out at the very visit only.
        verdict_of: whose last verdict stands in: the ``sample``'s own, or the latest one of any sample under the same
            ``caption``, whose visits it then holds for: copies that stand under one caption are judged by each other,
            as the magnitude is the caption's more than the image's. null is the preset's; ``sample`` beside a policy.
        evidence: what a verdict rests on: the magnitude of that ``visit`` alone; or those of all visits in the
            ``window`` of ``calibrate``, which it needs, each ranked among the unique samples', older ones counting
            less: visits of the sample, or of all samples under its caption (``verdict_of``). null takes the preset's;
            ``visit`` beside a policy.
        calibrate: how the thresholds are found in the run itself, where ``threshold`` is null.
        warmup_steps: steps before the filter starts.
        most_dropped: share of the visits from which on the run says that too many are left out, and what to change.
        preset: ``recommended`` is what docs/filter.md measures as the best: noisy_steps, by caption, over a window;
            ``paper`` is Wen et al.'s every_step, by visits; ``none`` trains without a filter.
    """

    policy: Literal["off", "every_step", "noisy_steps", "one_in_k", "noisy_one_in_k"] | None = None
    threshold: float | list[float | None] | str | None = None
    form: Literal["l2", "rms"] = "l2"
    min_timestep: int | None = None
    k: int = 5
    expires: int = 8
    verdict_of: Literal["sample", "caption"] | None = None
    evidence: Literal["visit", "window"] | None = None
    calibrate: Calibration = field(default_factory=Calibration)
    warmup_steps: int = 0
    most_dropped: float = 0.3
    preset: Literal["recommended", "paper", "none"] = "recommended"

    def settled(self) -> FilterConfig:
        """The same with nothing left to the preset."""
        # Whoever names a policy means the plain form of the others.
        chosen: Any = (self.policy, "sample", "visit") if self.policy else PRESETS[self.preset]
        calibrate = self.calibrate
        if calibrate.quantile is None:
            calibrate = replace(calibrate, quantile=0.9 if self.policy else 0.8)
        verdict_of, evidence = self.verdict_of or chosen[1], self.evidence or chosen[2]
        return replace(self, policy=chosen[0], verdict_of=verdict_of, evidence=evidence, calibrate=calibrate)


@dataclass
class VerdictsConfig:
    """Which samples of a run are listed as always left out.

    Args:
        run: folder of a finished ``train finetune`` with a filter.
        out: list to write, a line ``shard<TAB>key`` each; ``curate dedup --exclude`` and ``train finetune --exclude``
            read it.
        min_judged: a sample must have been judged at least so often.
        min_share: share of these verdicts that must have been against it.
    """

    run: str = ""
    out: str = ""
    min_judged: int = 3
    min_share: float = 1.0
