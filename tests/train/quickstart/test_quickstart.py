"""The quickstart at a small size on the carried models, and the carried sample model itself."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from afresh.errors import UsageError
from curate.config import DedupConfig
from curate.sample_set import PARTS, load_part, look_alikes
from train.denoising.opening.loading import sample_model_dir
from train.evaluation.config import LocalizeConfig
from train.finetune.config import FilterConfig, FinetuneConfig
from train.quickstart.config import MessConfig, QuickstartConfig
from train.quickstart.job import run_quickstart
from train.quickstart.mess import chosen_rows, plant_copies


def small(out: Path, **changes) -> QuickstartConfig:
    finetune = FinetuneConfig(
        model="", out="", shards=[], steps=3, batch_size=8, learning_rate=1e-4, cache_latents=True,
        mixed_precision="bf16", filter=FilterConfig("every_step", threshold=100.0),
    )  # fmt: skip
    values = {
        "mess": MessConfig(images=3, copies=6),
        "dedup": DedupConfig(image_embedder="copy-detector", threshold=0.8, workers=1),
        "finetune": finetune,
        "localize": LocalizeConfig(
            model="", prompts="", out="", criterion="magnitude", number=10, seeds=2, clean_captions=4
        ),
        "held_out_captions": 4,
        "seeds": 2,
        "steps": 2,
        "detect_held_out": 8,
        "detect_seeds": 1,
        "detect_steps": 1,
        "outcome_steps": 2,
        "columns": 3,
    }
    return QuickstartConfig(out=str(out), **values | changes)


def test_planted_copies_repeat_the_chosen_images_and_nothing_else():
    samples = load_part("finetune")[:50]
    raw, repeated = plant_copies(samples, MessConfig(images=4, copies=10, exact=0.5, other_caption=0.3))
    assert len(raw) == 50 + 4 * 9 and len(repeated) == 4
    assert len({key for key, _ in raw}) == len(raw)
    copies = [(key.split("-copy")[0], members) for key, members in raw if "-copy" in key]
    assert {key for key, _ in copies} == {samples[row].key for row in repeated}
    originals = {sample.key: sample for sample in samples}
    exact = sum(originals[key].image in members.values() for key, members in copies)
    assert 0 < exact < len(copies)
    captions = {members["txt"] != originals[key].members["txt"] for key, members in copies}
    assert captions == {True, False}
    assert plant_copies(samples, MessConfig(images=4, copies=10, exact=0.5, other_caption=0.3))[0] == raw


def test_choices_of_repeated_images_share_none_and_several_numbers_go_to_equal_shares():
    samples = load_part("finetune")
    chosen = [chosen_rows(samples, MessConfig(images=24, set=number)) for number in range(10)]
    assert all(len(set(rows)) == 24 for rows in chosen)
    assert len({row for rows in chosen for row in rows}) == 10 * 24
    assert not {samples[row].key for rows in chosen for row in rows} & look_alikes()
    raw, repeated = plant_copies(samples, MessConfig(images=4, copies=[3, 6], set=1))
    assert repeated == chosen_rows(samples, MessConfig(images=4, set=1))
    copies = Counter(key.split("-copy")[0] for key, _ in raw)
    assert [copies[samples[row].key] for row in repeated] == [3, 6, 3, 6]


@pytest.mark.timeout(600)
def test_quickstart_runs_whole_goes_on_where_it_was_and_gives_the_same_table(tmp_path):
    summary = run_quickstart(small(tmp_path / "one"))
    settings = [(row["model"], row["guidance"], row["prompts"]) for row in summary["rows"]]
    assert settings == [
        (model, guidance, prompts)
        for model, guidance in (
            ("raw", "none"), ("raw", "amg"), ("blocked", "none"), ("curated", "none"), ("filtered", "none"),
        )
        for prompts in ("repeated", "held_out")
    ]
    wanted = {
        "memorized_share", "copied_share", "similarity", "similarity_among_seeds", "alignment", "quality",
        "seconds_per_image",
    }  # fmt: skip
    assert all(wanted <= row.keys() for row in summary["rows"])
    assert summary["curate"]["samples"] == 300 + 3 * 5
    assert 0 <= summary["detect"]["auc"]["magnitude"] <= 1
    assert {"label_0_memorized", "label_1_not_memorized"} <= summary["detect"]["by_outcome"].keys()
    assert (tmp_path / "one" / "report.html").stat().st_size > 10_000
    assert json.loads((tmp_path / "one" / "summary.json").read_text())["rows"] == summary["rows"]
    assert set(summary["seconds"]) == {
        "plant", "curate", "finetune_raw", "finetune_curated", "finetune_filtered", "detect", "localize", "evaluate",
    }  # fmt: skip

    # A stage that is done is not repeated, one whose record is missing is, with the same result.
    model = tmp_path / "one" / "finetune_raw" / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    before = model.stat().st_mtime_ns
    (tmp_path / "one" / "stages" / "evaluate.json").unlink()
    again = run_quickstart(small(tmp_path / "one"))
    assert model.stat().st_mtime_ns == before
    for row in summary["rows"] + again["rows"]:
        row.pop("seconds_per_image")
    assert again["rows"] == summary["rows"]

    with pytest.raises(UsageError, match="seeds"):
        run_quickstart(small(tmp_path / "one", seeds=1))


def test_the_sample_model_is_a_small_pipeline_that_diffusers_alone_loads_and_draws_with(tmp_path):
    files = [path for path in sample_model_dir().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20_000_000
    code = (
        "import sys; from diffusers import StableDiffusionPipeline as P; import torch\n"
        f"p = P.from_pretrained({str(sample_model_dir())!r}, safety_checker=None, dtype=torch.float32)\n"
        "g = torch.Generator().manual_seed(0)\n"
        "p('red apple, food fruit', num_inference_steps=4, generator=g).images[0].save(sys.argv[1])\n"
        "assert any('down' in n and 'attn2.to_v' in n for n, _ in p.unet.named_modules())\n"
        "assert any('mid' in n and 'attn2.to_v' in n for n, _ in p.unet.named_modules())\n"
        "assert any('up' in n and 'attn2.to_v' in n for n, _ in p.unet.named_modules())\n"
        "assert p.scheduler.config.beta_schedule == 'scaled_linear'\n"
        "assert p.scheduler.config.prediction_type == 'epsilon'\n"
        "assert 'train' not in sys.modules and 'curate' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "apple.png")], check=True, cwd=tmp_path)
    from curate.reading.images import decode_image

    assert decode_image((tmp_path / "apple.png").read_bytes()).size == (64, 64)


def test_the_carried_shards_are_the_ones_the_split_was_made_for():
    from curate.sample_set import sample_set_dir

    split = json.loads((sample_set_dir() / "split.json").read_text())
    keys = sorted(key for part in PARTS for key in split[part])
    assert len(keys) == len(set(keys)) == 1906
    digest = hashlib.sha256("".join(sorted(s.key for p in PARTS for s in load_part(p))).encode()).hexdigest()
    assert digest == hashlib.sha256("".join(keys).encode()).hexdigest()
