"""Recipe: the untrained sample model, a diffusers pipeline folder that ``train finetune`` then trains.

python -m train.sample_model.initialise --config configs/sample_model/initialise.yaml
"""

from __future__ import annotations

from dataclasses import dataclass, field

from train.sample_model.small import SmallModel


@dataclass
class InitialiseConfig:
    """Settings of the recipe.

    Args:
        out: pipeline folder to write.
        vae: the trained autoencoder's folder.
        model: sizes of the text encoder and the UNet.
    """

    out: str = "runs/sample_model/untrained"
    vae: str = "runs/sample_model/vae"
    model: SmallModel = field(default_factory=SmallModel)


def initialise(config: InitialiseConfig) -> None:
    """Learn the tokenizer from all captions, draw random weights, save."""
    from curate.sample_set import PARTS, load_part
    from train.sample_model.small import build_pipeline

    captions = [sample.caption for part in PARTS for sample in load_part(part) if sample.caption]
    pipe = build_pipeline(config.model, captions, config.vae)
    for part in ("unet", "text_encoder", "vae"):
        print(f"{part}: {sum(p.numel() for p in getattr(pipe, part).parameters()) / 1e6:.2f} M parameters")
    pipe.save_pretrained(config.out)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    initialise(auto_cli(InitialiseConfig, as_positional=False))

