"""Embedders: unit rows, numpy and torch agree, copies near and other images apart."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from afresh.errors import UsageError, UserError
from curate.config import DedupConfig
from curate.embed.edits import EDITS, crop
from curate.embed.registry import load_embedder
from curate.reading.images import stack_images


@pytest.fixture(scope="module", params=["layout", "copy-detector"])
def embedder(request):
    return load_embedder(request.param)


@pytest.fixture(scope="module")
def images(emoji):
    return [image for image, _ in emoji]


def test_rows_are_unit_vectors_of_the_promised_shape(embedder, images):
    rows = embedder.embed(images, batch_size=10)
    assert rows.shape == (len(images), embedder.dim) and rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert embedder.embed([]).shape == (0, embedder.dim)
    np.testing.assert_allclose(embedder.embed(images[3:4])[0], rows[3], atol=1e-5)


def test_numpy_and_torch_agree(embedder, images):
    small = torch.from_numpy(stack_images(images, embedder.size))
    with torch.no_grad():
        assert np.abs(embedder.features(small).numpy() - embedder.embed(images)).max() < 1e-3
        # Large pictures, which each side brings to size by its own library.
        large = [image.resize((200, 150), Image.Resampling.LANCZOS) for image in images[:8]]
        pixels = torch.stack([torch.from_numpy(np.asarray(i, np.float32) / 255).permute(2, 0, 1) for i in large])
        features = embedder.features(pixels).numpy()
    assert features.dtype == np.float32
    assert ((features * embedder.embed(large)).sum(1) > 0.998).all()


def test_features_have_the_gradient_of_their_similarity(embedder, images):
    pixels = torch.from_numpy(stack_images(images[:2], embedder.size)).requires_grad_(True)
    target = torch.from_numpy(embedder.embed(images[10:12]))
    similarity = (embedder.features(pixels) * target).sum()
    (gradient,) = torch.autograd.grad(similarity, pixels)
    assert torch.isfinite(gradient).all() and gradient.norm() > 0
    step = gradient / gradient.norm() * 0.2
    with torch.no_grad():
        ahead, behind = ((embedder.features(pixels + s) * target).sum() for s in (step, -step))
    assert float(ahead - behind) == pytest.approx(float(2 * 0.2 * gradient.norm()), rel=0.15)


def test_plain_images_have_finite_features_and_gradients(embedder):
    pixels = torch.stack([torch.zeros(3, 64, 64), torch.ones(3, 64, 64)]).requires_grad_(True)
    features = embedder.features(pixels)
    (gradient,) = torch.autograd.grad(features.sum(), pixels)
    assert torch.isfinite(features).all() and torch.isfinite(gradient).all()


def test_layout_survives_what_storage_does_and_tells_images_apart(images):
    layout = load_embedder("layout")
    originals = layout.embed(images)
    for name in ("jpeg", "resize", "brightness", "contrast", "blur"):
        rng = np.random.default_rng(0)
        copies = layout.embed([EDITS[name](image, rng) for image in images])
        assert np.quantile((copies * originals).sum(1), 0.1) > 0.93, name
    rng = np.random.default_rng(0)
    cropped = layout.embed([crop(image, rng, 0.05) for image in images])
    assert np.median((cropped * originals).sum(1)) > 0.93
    cosine = originals @ originals.T
    others = cosine[~np.eye(len(images), dtype=bool)]
    assert others.max() < 0.995  # the first carried emoji are all faces
    white, black, red = (Image.new("RGB", (64, 64), colour) for colour in ("white", "black", "red"))
    plain = layout.embed([white, black, red])
    assert np.abs(plain @ plain.T - np.eye(3)).max() < 0.8


def test_layout_finds_edited_copies_at_the_default_threshold(images):
    """Hard and mild ones; in the mean, since a few images of one kind say little about a single edit."""
    layout, threshold = load_embedder("layout"), DedupConfig(shards=["x"]).threshold
    photographs = [made_photograph(seed) for seed in range(64)]
    for originals in (images, photographs):
        rows, found = layout.embed(originals), {}
        for name in EDITS:
            rng = np.random.default_rng(0)
            found[name] = ((layout.embed([EDITS[name](i, rng) for i in originals]) * rows).sum(1) > threshold).mean()
        hard = ("crop", "flip", "grayscale", "overlay", "border", "rotate")
        assert np.mean([found[name] for name in hard]) >= 0.75, found
        assert min(found[name] for name in ("jpeg", "resize", "brightness", "contrast", "blur")) >= 0.9, found
    cosine = rows @ rows.T
    assert cosine[~np.eye(len(rows), dtype=bool)].max() < threshold  # and no photograph is another one's copy


def made_photograph(seed: int) -> Image.Image:
    """Something of all scales, as photographs have it: noise in colours whose power falls with the frequency."""
    rng, image = np.random.default_rng(seed), np.zeros((96, 96, 3), np.float32)
    for cells in (3, 6, 12, 24, 48):
        noise = rng.standard_normal((cells, cells, 3)) + rng.standard_normal((cells, cells, 1))
        fields = [Image.fromarray(noise[..., k].astype(np.float32)).resize((96, 96), Image.BICUBIC) for k in range(3)]
        image += np.stack([np.asarray(field) for field in fields], -1) * (70 / cells**0.5)
    return Image.fromarray((128 + image).clip(0, 255).astype(np.uint8))


def test_layout_sees_no_mirror_and_no_frame_and_colour_less_than_light(images):
    layout = load_embedder("layout")
    originals = layout.embed(images)
    mirrored = layout.embed([ImageOps.mirror(image) for image in images])
    np.testing.assert_allclose(mirrored, originals, atol=2e-3)
    for width in (3, 5, 8):
        for colour in ("black", "white", "teal"):
            framed = layout.embed([ImageOps.expand(image, width, fill=colour) for image in images])
            assert np.quantile((framed * originals).sum(1), 0.2) > 0.9, (width, colour)
    # A line around the image only: what two sides do not share stays.
    half = Image.new("RGB", (64, 64), "white")
    half.paste("black", (0, 0, 64, 32))
    flag = Image.new("RGB", (64, 64), "white")
    flag.paste("black", (0, 0, 64, 20))
    assert (layout.embed([half]) * layout.embed([flag])).sum() < 0.95
    # The same shape: its grey copy is a copy, one whose colours are opposite is not.
    red, blue = Image.new("RGB", (64, 64), "white"), Image.new("RGB", (64, 64), "white")
    red.paste((220, 60, 60), (16, 8, 40, 56))
    blue.paste((40, 110, 220), (16, 8, 40, 56))
    rows = layout.embed([red, ImageOps.grayscale(red).convert("RGB"), blue])
    assert rows[0] @ rows[1] > 0.9 > rows[0] @ rows[2]


def test_unknown_names_are_refused_with_the_choices(tmp_path):
    with pytest.raises(UsageError, match="unknown embedder 'sscd'.*layout, copy-detector"):
        load_embedder("sscd")
    with pytest.raises(UsageError, match="no such embedder file"):
        load_embedder(str(tmp_path / "missing.pt"))
    (tmp_path / "broken.pt").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"broken\.pt cannot be used"):
        load_embedder(str(tmp_path / "broken.pt"))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_torchscript_file_is_an_embedder(tmp_path, images):
    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.mean(dim=(2, 3)) + 2.0

    path = str(tmp_path / "mean.torchscript")
    torch.jit.script(Mean()).save(path)
    embedder = load_embedder(path)
    assert (embedder.name, embedder.dim, embedder.size) == (path, 3, 288)
    rows = embedder.embed(images[:3])
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    resized = [image.resize((288, 288), Image.Resampling.BILINEAR) for image in images[:3]]
    expected = (stack_images(resized, 288).mean((2, 3)) - mean) / std + 2
    np.testing.assert_allclose(rows, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)


class Shape(torch.nn.Module):
    """Height and width of its input, a mark."""

    def forward(self, x):
        return torch.tensor([[float(x.shape[2]), float(x.shape[3]), 1.0]]).repeat(x.shape[0], 1)


class Square(torch.nn.Module):
    """Takes images of 64 × 64 only, as a vision transformer takes its own size only."""

    def forward(self, x):
        return x.reshape(-1, 3, 64 * 64).mean(dim=2) + 1.0


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("suffix", "height", "width"), [("", 288, 576), ("@320", 320, 320), ("@short64", 64, 128)])
def test_sscds_ways_to_prepare_an_image_are_chosen_by_suffix(suffix, height, width, tmp_path):
    path = str(tmp_path / "shape.pt")
    torch.jit.script(Shape()).save(path)
    embedder = load_embedder(path + suffix)
    assert (embedder.name, embedder.size) == (path + suffix, height)
    wide, tall = Image.new("RGB", (80, 40)), Image.new("RGB", (40, 80))
    rows = embedder.embed([wide, tall, wide])
    expected = np.array([[height, width, 1], [width, height, 1], [height, width, 1]], np.float32)
    np.testing.assert_allclose(rows, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(embedder.features(torch.zeros(1, 3, 40, 80))[0], rows[0], atol=1e-6)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_torchscript_file_that_takes_squares_only_says_so(tmp_path):
    path = str(tmp_path / "square.pt")
    torch.jit.script(Square()).save(path)
    with pytest.raises(UsageError, match=r"square\.pt takes squares only: name their side, as in .*square\.pt@64"):
        load_embedder(path + "@short64")
    assert load_embedder(path + "@64").embed([Image.new("RGB", (9, 5))]).shape == (1, 3)
    with pytest.raises(UserError, match=r"square\.pt cannot be used"):
        load_embedder(path + "@63")


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_digests_tell_other_weights_and_other_preprocessing(tmp_path):
    def digest(mark: float, suffix: str = "") -> str:
        model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2))
        torch.nn.init.constant_(model[2].weight, mark)
        torch.nn.init.constant_(model[2].bias, 0.0)
        torch.jit.script(model).save(tmp_path / "model.pt")
        return load_embedder(f"{tmp_path / 'model.pt'}{suffix}").digest

    assert digest(0.5) == digest(0.5) != digest(0.25)
    assert len({digest(0.5), digest(0.5, "@320"), digest(0.5, "@288")}) == 3
    assert load_embedder("layout").digest == "layout-2"  # "layout" was one that knew no mirror images
    assert load_embedder("copy-detector").digest == load_embedder("copy-detector").digest
