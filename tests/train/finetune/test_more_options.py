"""Masked loss, buckets that enlarge nothing, long captions, datasets, offloading: each changes what it should alone."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from afresh.errors import UsageError
from curate.reading.writing import write_shard
from curate.sample_set import load_part
from tests.train.finetune.runs import log_lines, same, settings, weights
from train.denoising.families.registry import denoiser_of
from train.denoising.families.stable_diffusion import tokenize
from train.denoising.opening.loading import load_pipeline
from train.finetune.batches.layout import image_sizes
from train.finetune.config import Augmentation, Buckets, FinetuneConfig, ValidationConfig
from train.finetune.data.buckets import fitting_bucket, sizes_without_enlarging
from train.finetune.data.images import ImageLoader
from train.finetune.data.scan import scan
from train.finetune.loop import run_finetune
from train.finetune.model.loss import sample_errors


def shard_of(folder: Path, images: list[Image.Image]) -> str:
    samples = []
    for number, image in enumerate(images):
        file = io.BytesIO()
        image.save(file, "PNG")
        samples.append((f"{number:03d}", {"png": file.getvalue(), "txt": f"face {number}".encode()}))
    folder.mkdir(parents=True)
    write_shard(str(folder / "000000.tar"), samples)
    return str(folder)


def half_clear(opaque: bool) -> list[Image.Image]:
    """Eight red squares, whose right half is white and, unless ``opaque``, transparent."""
    pixels = np.full((64, 64, 4), 255, dtype=np.uint8)
    pixels[:, :32, 1:3] = 0
    pixels[:, 32:, 3] = 255 if opaque else 0
    return [Image.fromarray(pixels)] * 8


# ------------------------------------------------------------------------------------------------- masked loss


def test_what_is_masked_has_no_error_and_no_gradient():
    output = torch.ones(2, 4, 2, 2, requires_grad=True)
    mask = torch.zeros(2, 1, 2, 2)
    mask[0, 0, 0, 0], mask[1, 0, 1, 1] = 1.0, 0.5
    errors = sample_errors(output, torch.zeros(2, 4, 2, 2), mask=mask)
    assert errors.tolist() == [0.25, 0.125]
    errors.sum().backward()
    assert torch.equal(output.grad != 0, (mask > 0).expand_as(output))


@pytest.mark.parametrize("cached", [False, True])
def test_the_loss_is_of_the_opaque_part_alone_where_asked_for(model, tmp_path, cached):
    found = {}
    for name, opaque, masked in (("plain", False, False), ("masked", False, True), ("opaque", True, True)):
        shards = shard_of(tmp_path / f"{name}-shards", half_clear(opaque))
        config = settings(model, shards, tmp_path / name, steps=1, masked_loss=masked, cache_latents=cached)
        run_finetune(config)
        found[name] = log_lines(tmp_path / name)[0]["loss"]
    assert found["opaque"] == pytest.approx(found["plain"], rel=1e-6)  # what is opaque counts as ever
    assert found["masked"] == pytest.approx(found["plain"] / 2, rel=0.3)


def test_a_mask_goes_where_its_image_goes(tmp_path):
    shards = shard_of(tmp_path / "shards", half_clear(False))
    how = Augmentation(flip=0.5, shift=0.2, colour=0.5)
    loader = ImageLoader(scan([shards], tmp_path / "samples.arrow"), [(32, 32)], "random", how, 3, masked=True)
    plain = ImageLoader(loader.shard_set, [(32, 32)], "random", how, 3)
    mirrored = 0
    for visit in range(12):
        image = loader.load(0, visit)
        assert image.shape == (4, 32, 32)
        np.testing.assert_array_equal(image[:3], plain.load(0, visit))
        red, mask = image[1].astype(int) < 100, image[3] > 127
        assert (red & ~mask).mean() < 0.1  # but for the border
        mirrored += mask[:, 24:].mean() > mask[:, :8].mean()
    assert 0 < mirrored < 12


# ------------------------------------------------------------------------------------------------------ buckets


def test_no_image_is_enlarged_where_that_is_asked_for_and_large_ones_keep_their_shape():
    config = FinetuneConfig("", "", [], resolution=512, buckets=Buckets(64, enlarge=False))
    sizes = image_sizes(config, 512, 8)
    assert sizes == sizes_without_enlarging(512, 64)
    rng = np.random.default_rng(0)
    width, height = rng.integers(64, 3000, (2, 300)).astype(np.int32)
    for w, h, bucket in zip(width, height, fitting_bucket(width, height, sizes), strict=True):
        wide, high = sizes[bucket]
        assert wide <= w and high <= h and wide * high <= 512**2
        others = [min(a / w, b / h) for a, b in sizes if a <= w and b <= h]
        assert min(wide / w, high / h) == max(others)
    chosen = fitting_bucket(np.array([1920, 600, 130, 40]), np.array([1080, 400, 70, 30]), sizes)
    assert [sizes[one] for one in chosen] == [(640, 384), (576, 384), (128, 64), (64, 64)]


def test_small_images_train_at_a_smaller_size(model, tmp_path):
    images = [Image.new("RGB", size, colour) for size in ((40, 40), (90, 90)) for colour in ("red", "blue")] * 2
    shards = shard_of(tmp_path / "shards", images)
    buckets = Buckets(16, enlarge=False)
    loader = ImageLoader(
        scan([shards], tmp_path / "samples.arrow"), sizes_without_enlarging(64, 16), "center", Augmentation(), 0,
        enlarge=False,
    )  # fmt: skip
    assert {loader.load(row, 0).shape for row in range(8)} == {(3, 32, 32), (3, 64, 64)}
    assert run_finetune(settings(model, shards, tmp_path / "run", steps=2, batch_size=2, buckets=buckets))["steps"] == 2


# ------------------------------------------------------------------------------------------------ long captions


def test_a_long_caption_fills_further_sequences_and_a_short_one_the_first_as_ever(model):
    pipe = load_pipeline(model)
    length = pipe.tokenizer.model_max_length
    text = " ".join(f"face {number}" for number in range(3 * length))
    ids = tokenize(pipe, [text, "red apple"], chunks=3)
    assert ids.shape == (2, 3 * length)
    words = pipe.tokenizer(text, add_special_tokens=False).input_ids
    parts = ids[0].reshape(3, length)
    assert (parts[:, 0] == pipe.tokenizer.bos_token_id).all() and (parts[:, -1] == pipe.tokenizer.eos_token_id).all()
    assert parts[:, 1:-1].flatten().tolist() == words[: 3 * (length - 2)]
    torch.testing.assert_close(ids[1, :length], tokenize(pipe, ["red apple"])[0])
    torch.testing.assert_close(ids[1, length : 2 * length], tokenize(pipe, [""])[0])
    denoiser = denoiser_of(pipe)
    plain = denoiser.encode([text, "red apple"]).embeds
    denoiser.chunks = 3
    long = denoiser.encode([text, "red apple"]).embeds
    assert long.shape[1] == 3 * length
    torch.testing.assert_close(long[:, :length], plain)
    with torch.no_grad():
        second = pipe.text_encoder(parts[1:2])[0][0]
    torch.testing.assert_close(long[0, length : 2 * length], second)


@pytest.mark.parametrize("cached", [False, True])
def test_what_stands_behind_the_first_sequence_is_trained_on_where_asked_for(model, tmp_path, cached):
    image = Image.new("RGB", (64, 64), "red")
    length = load_pipeline(model).tokenizer.model_max_length
    runs: dict[tuple[int, str], dict] = {}
    for end in ("apple", "face"):
        shards = shard_of(tmp_path / f"{end}-shards", [image] * 4)
        caption = " ".join(["face"] * length) + f" {end}"
        for path in Path(shards).glob("*.tar"):
            file = io.BytesIO()
            image.save(file, "PNG")
            write_shard(str(path), [(f"{n:03d}", {"png": file.getvalue(), "txt": caption.encode()}) for n in range(4)])
        for chunks in (1, 4):
            config = settings(
                model, shards, tmp_path / f"{end}-{chunks}", steps=1, caption_chunks=chunks, cache_text=cached,
                caption_dropout=0.0,
            )  # fmt: skip
            run_finetune(config)
            runs[chunks, end] = weights(tmp_path / f"{end}-{chunks}")
    assert same(runs[1, "apple"], runs[1, "face"])
    assert not same(runs[4, "apple"], runs[4, "face"])


# ----------------------------------------------------------------------------------------- datasets, offloading


def test_a_dataset_and_its_table_train_as_the_folder_they_were_made_of(model, tmp_path):
    import datasets

    images = [sample.image for sample in load_part("finetune")[:4]]
    rows = {"image": [{"bytes": one, "path": None} for one in images], "text": [f"face {n}" for n in range(4)]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "table.parquet")
    found = []
    for name, source in (("saved", f"dataset:{tmp_path / 'saved'}"), ("table", str(tmp_path / "table.parquet"))):
        run_finetune(settings(model, source, tmp_path / f"{name}-run", steps=1))
        found.append(weights(tmp_path / f"{name}-run"))
    assert same(*found)
    assert len(scan([str(tmp_path / "saved-run" / "imported" / "0")], tmp_path / "samples.arrow")) == 4


def test_what_is_cached_leaves_the_device_and_comes_back_for_validation_alone(model, shards, tmp_path, monkeypatch):
    moved: list[tuple[str, str]] = []
    to = torch.nn.Module.to

    def watched(self, *args, **kwargs):
        if args and self.__class__.__name__ in ("AutoencoderKL", "CLIPTextModel"):
            moved.append((self.__class__.__name__, str(args[0])))
        return to(self, *args, **kwargs)

    changes = {"cache_latents": True, "cache_text": True}
    run_finetune(settings(model, shards, tmp_path / "plain", **changes))
    monkeypatch.setattr(torch.nn.Module, "to", watched)
    drawn = ValidationConfig(every=4, prompts=["face"], steps=1)
    run_finetune(settings(model, shards, tmp_path / "away", offload=True, validation=drawn, **changes))
    assert moved[-4:] == [(kind, "cpu") for kind in ("AutoencoderKL", "CLIPTextModel")] * 2
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "away"))
    with pytest.raises(UsageError, match="offload needs cache_latents and cache_text"):
        run_finetune(settings(model, shards, tmp_path / "none", offload=True, cache_text=True))
