"""The copy detector's recipe: seeded edits, bounded attacks, losses that spare twins, exact resume."""

import pytest
import torch
import torch.nn.functional as F

from curate.embed.copy_detector import CopyDetector
from train.sample_model.copy_detector import training as recipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images(emoji) -> torch.Tensor:
    from curate.reading.images import stack_images

    return torch.from_numpy(stack_images([image for image, _ in emoji[:24]], 64))


def test_edits_are_seeded_stay_in_range_and_grow_with_strength(images):
    views = [recipe.edited(images, strength, seeded()) for strength in (0.0, 0.3, 1.0)]
    assert all(view.shape == images.shape and view.min() >= 0 and view.max() <= 1 for view in views)
    assert (recipe.edited(images, 1.0, seeded()) == views[2]).all()
    change = [(view - images).abs().mean() for view in views]
    assert change[0] < 0.01 < change[1] < change[2]


@pytest.mark.parametrize("coarse", [False, True])
def test_the_attack_lowers_similarity_within_its_bound(images, coarse):
    torch.manual_seed(0)
    model = CopyDetector().eval()
    with torch.no_grad():
        targets = model(images)
    changed = recipe.attacked(model, images, targets, bound=0.05, coarse=coarse, steps=3, generator=seeded())
    assert (changed - images).abs().max() <= 0.05 + 1e-6
    with torch.no_grad():
        noise = (images + 0.05 * torch.randn(images.shape, generator=seeded()).sign()).clamp(0, 1)
        assert (model(changed) * targets).sum(1).mean() < (model(noise) * targets).sum(1).mean()


def test_twins_are_neither_negatives_nor_neighbours():
    z = F.normalize(torch.randn(4, 8, generator=seeded()), dim=1)
    z[1] = z[0]
    alike = torch.eye(4, dtype=torch.bool)
    spared = alike.clone()
    spared[0, 1] = spared[1, 0] = True
    nothing = torch.empty(0, 8)
    assert recipe.info_nce(z, z, nothing, spared, 0.1) < recipe.info_nce(z, z, nothing, alike, 0.1)
    assert recipe.entropy(z, z, spared) < recipe.entropy(z, z, alike)


def test_images_alike_are_found_mirrored_and_without_colour(images):
    one = images[:1]
    others = torch.cat([one, one.flip(-1), one.mean(1, keepdim=True).expand_as(one), images[10:11]])
    assert recipe.pixels_alike(others, 0.92)[0].tolist() == [True, True, True, False]


def test_each_image_comes_once_an_epoch_beside_one_it_is_taken_for():
    memory = F.normalize(torch.randn(20, 6, generator=seeded()), dim=1)
    alike = torch.eye(20, dtype=torch.bool)
    alike[0, 1] = alike[1, 0] = True
    batches = recipe.hard_batches(memory, alike, 8, seeded())
    assert batches.shape == (5, 8)
    images, partners = batches[:, :4].flatten(), batches[:, 4:].flatten()
    assert sorted(images.tolist()) == list(range(20))
    assert not alike[images, partners].any()
    rank = (memory @ memory.T).masked_fill(alike, -2).argsort(dim=1, descending=True)
    assert all(p in rank[i, :4] for i, p in zip(images.tolist(), partners.tolist(), strict=True))


def test_a_run_that_was_cut_ends_as_one_that_was_not(images, tmp_path, monkeypatch):
    settings = {"steps": 8, "batch_size": 8, "warmup_steps": 2, "ramp": 0.4, "checkpoint_every": 2}
    whole = recipe.train(recipe.CopyDetectorConfig(work_dir=str(tmp_path / "whole"), **settings), images)

    config = recipe.CopyDetectorConfig(work_dir=str(tmp_path / "cut"), **settings)
    said = recipe.log.info

    def cut(message, *values):
        if message.startswith("step") and values[0] == 4:
            raise KeyboardInterrupt
        said(message, *values)

    with monkeypatch.context() as patch:
        patch.setattr(recipe.log, "info", cut)
        with pytest.raises(KeyboardInterrupt):
            recipe.train(config, images)
    assert torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["step"] == 2
    resumed = recipe.train(config, images)
    for name, value in whole.state_dict().items():
        assert (resumed.state_dict()[name] == value).all(), name
