"""Loading models: hub layout, variants, single files of the original layout; and what is refused, by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from afresh.errors import UserError
from curate.reading.images import decode_image
from curate.reading.writing import write_shard
from curate.sample_set import load_part
from train.denoising.families.stable_diffusion import encode_captions
from train.denoising.opening.checkpoints import check_scheduler, unsupported
from train.denoising.opening.loading import check_trainable, load_pipeline
from train.denoising.opening.original import save_single_file
from train.sample_model.small import tiny_pipeline

PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose networks have Stable Diffusion 1.x's blocks, a few channels wide."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(0)
    pipe = tiny_pipeline()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8, 16, 16),
        attention_head_dim=2,
        norm_num_groups=4,
        cross_attention_dim=pipe.text_encoder.config.hidden_size,
    )
    vae = AutoencoderKL(
        sample_size=64,
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=4,
    )
    pipe.register_modules(unet=unet, vae=vae)
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as one file in the layout of CompVis and Stability AI."""
    pipe = load_pipeline(str(model))
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_single_file(pipe, path)
    return path


@pytest.fixture(scope="module")
def configs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder without its weights."""
    folder = tmp_path_factory.mktemp("configs") / "model"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def same_weights(a, b) -> bool:
    states = [(getattr(a, part).state_dict(), getattr(b, part).state_dict()) for part in PARTS]
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in states)


def edited(folder: Path, target: Path, file: str, **changes: object) -> str:
    """A copy of a model folder with some keys of a JSON file changed."""
    shutil.copytree(folder, target)
    path = target / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(target)


# ------------------------------------------------------------------------------------------- single files


def test_a_single_file_and_a_folder_of_configs_give_the_same_model_offline(model, checkpoint, configs):
    from_file = load_pipeline(str(checkpoint), model_config=str(configs))
    folder = load_pipeline(str(model))
    assert same_weights(from_file, folder)
    assert from_file.tokenizer("a red apple").input_ids == folder.tokenizer("a red apple").input_ids
    assert from_file.scheduler.config.prediction_type == "epsilon"


def test_a_single_file_with_stable_diffusion_2s_text_encoder_and_projections_gives_the_same_model(model, tmp_path):
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    pipe = load_pipeline(str(model))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vocabulary = {"vocab_size": len(pipe.tokenizer), "max_position_embeddings": 16}
    pipe.text_encoder = CLIPTextModel(CLIPTextConfig(hidden_act="gelu", **sizes, **vocabulary))
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, use_linear_projection=True)
    pipe.save_pretrained(tmp_path / "folder")
    save_single_file(pipe, tmp_path / "one.safetensors")
    names = load_file(tmp_path / "one.safetensors")
    assert names["cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"].shape == (96, 32)
    assert same_weights(load_pipeline(str(tmp_path / "one.safetensors"), model_config=str(tmp_path / "folder")), pipe)


def test_the_output_folder_of_a_trainer_of_single_files_is_the_file_that_it_made(checkpoint, configs, tmp_path):
    (tmp_path / "dog.safetensors").symlink_to(checkpoint)
    (tmp_path / "dog-000001.safetensors").write_bytes(b"cut short")
    opened = load_pipeline(str(tmp_path), model_config=str(configs))
    assert same_weights(opened, load_pipeline(str(checkpoint), model_config=str(configs)))


def test_a_single_file_predicts_what_the_configs_scheduler_says(checkpoint, configs, tmp_path):
    config = edited(configs, tmp_path / "v", "scheduler/scheduler_config.json", prediction_type="v_prediction")
    pipe = load_pipeline(str(checkpoint), model_config=config)
    assert pipe.scheduler.config.prediction_type == "v_prediction"


def test_a_single_file_without_configs_says_what_to_give_when_offline(checkpoint):
    with pytest.raises(UserError, match=r"give --model_config, a diffusers folder of its architecture"):
        load_pipeline(str(checkpoint))


def test_configs_of_another_architecture_are_named(checkpoint, sample_model):
    with pytest.raises(UserError, match="sample_model of its architecture"):
        load_pipeline(str(checkpoint), model_config=str(sample_model))


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin"])
def test_pickles_are_refused_unread(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(UserError, match="pickles are never loaded"):
        load_pipeline(str(tmp_path / name))


def test_a_file_cut_short_and_one_that_is_not_there_are_told_apart(checkpoint, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(checkpoint.read_bytes()[:100_000])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_pipeline(str(tmp_path / "cut.safetensors"))
    with pytest.raises(UserError, match="no such model file"):
        load_pipeline(str(tmp_path / "none.safetensors"))


def test_a_checkpoint_that_lacks_a_part_names_it(checkpoint, configs, tmp_path):
    weights = {k: v for k, v in load_file(checkpoint).items() if not k.startswith("cond_stage_model")}
    save_file(weights, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match="lacks the text encoder"):
        load_pipeline(str(tmp_path / "half.safetensors"), model_config=str(configs))


@pytest.mark.parametrize(
    ("key", "shape", "kind"),
    [
        ("conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias", (4,), "xl_refiner"),
        ("model.diffusion_model.single_stream_modulation.lin.weight", (4,), "flux-2-dev"),
        ("model.diffusion_model.input_blocks.0.0.weight", (8, 9, 3, 3), "inpainting"),
    ],
)
def test_single_files_of_other_kinds_are_refused_by_kind(tmp_path, key, shape, kind):
    weights = {key: torch.zeros(shape), "model.diffusion_model.img_in.weight": torch.zeros(3)}
    save_file(weights, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=f"of the kind {kind}.*Stable Diffusion 1.x and 2.x"):
        load_pipeline(str(tmp_path / "m.safetensors"))


# ------------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("kind", ["KolorsPipeline", "AuraFlowPipeline", "StableCascadeDecoderPipeline"])
def test_folders_of_other_kinds_are_refused_by_kind(tmp_path, kind):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(UserError, match=f"of the kind {kind}; Stable Diffusion 1.x and 2.x"):
        load_pipeline(str(tmp_path))


def test_other_conditioning_is_refused_by_what_it_is():
    unet = dict(tiny_pipeline().unet.config)
    vae = {"latent_channels": 4}
    width = unet["cross_attention_dim"]
    assert unsupported(unet, vae, width) is None
    assert "takes 9 channels where latents have 4" in unsupported(unet | {"in_channels": 9}, vae, width)
    assert "gives 8 channels" in unsupported(unet | {"out_channels": 8}, vae, width)
    assert "addition_embed_type: text_time" in unsupported(unet | {"addition_embed_type": "text_time"}, vae, width)
    assert "num_class_embeds: 10" in unsupported(unet | {"num_class_embeds": 10}, vae, width)
    assert f"expects captions of width {width}" in unsupported(unet, vae, 7)


def test_an_inpainting_unet_is_refused_at_load(tmp_path):
    from diffusers import UNet2DConditionModel

    pipe = tiny_pipeline()
    config = {k: v for k, v in pipe.unet.config.items() if not k.startswith("_")}
    pipe.register_modules(unet=UNet2DConditionModel(**config | {"in_channels": 9}))
    pipe.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="takes 9 channels"):
        load_pipeline(str(tmp_path))


def test_variants_are_loaded_by_name_and_asked_for_where_there_is_nothing_else(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "fp16", variant="fp16")
    assert same_weights(load_pipeline(str(tmp_path / "fp16"), variant="fp16"), pipe)
    with pytest.raises(UserError, match="variant fp16 alone: give --variant"):
        load_pipeline(str(tmp_path / "fp16"))
    with pytest.raises(UserError, match=r"no weights of variant ema \(variants there: fp16\)"):
        load_pipeline(str(tmp_path / "fp16"), variant="ema")


def test_a_folder_of_pickles_is_refused(model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(UserError, match="unet has no safetensors weights but .*pickles are never loaded"):
        load_pipeline(str(folder))


def test_a_hub_name_offline_is_named_with_the_reason():
    with pytest.raises(UserError, match="nobody/no-such-model: cannot load the model: .*not fully cached"):
        load_pipeline("nobody/no-such-model")


# ------------------------------------------------------------------------------------------- v-prediction


def test_a_model_that_predicts_v_is_trained_on_v_and_stays_one(tmp_path):
    from train.finetune.caches.latents import encode_moments
    from train.finetune.config import FinetuneConfig
    from train.finetune.data.buckets import bring_to, crop_box
    from train.finetune.data.order import generator
    from train.finetune.loop import run_finetune

    torch.set_num_threads(1)
    tiny_pipeline().save_pretrained(tmp_path / "eps")
    model = edited(tmp_path / "eps", tmp_path / "v", "scheduler/scheduler_config.json", prediction_type="v_prediction")
    (sample,) = load_part("finetune")[:1]
    write_shard(str(tmp_path / "shards" / "000000.tar"), [(sample.key, dict(sample.members))])
    config = FinetuneConfig(
        model=model, out=str(tmp_path / "run"), shards=[str(tmp_path / "shards")], steps=1, batch_size=1, workers=0,
        caption_dropout=0.0, log_every=1, mixed_precision="no",
    )  # fmt: skip
    run_finetune(config)
    logged = json.loads((tmp_path / "run" / "log.jsonl").read_text())["loss"]

    # The same step by hand: the draws of position 0, x_t and v as Salimans & Ho define them.
    pipe = load_pipeline(model)
    image = decode_image(sample.image)
    pixels = torch.from_numpy(bring_to(image, (64, 64), crop_box(image.size, (64, 64), "center")))
    mean, logvar = encode_moments(pipe.vae, pixels[None]).chunk(2, dim=1)
    g = generator(0, "step", 0)
    posterior, noise = torch.randn(mean.shape[1:], generator=g), torch.randn(mean.shape[1:], generator=g)
    t = torch.randint(1000, (), generator=g)
    x_0 = (mean + (0.5 * logvar).exp() * posterior) * pipe.vae.config.scaling_factor
    alpha_bar = pipe.scheduler.alphas_cumprod[t]
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
    v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0
    with torch.no_grad():
        output = pipe.unet(x_t, t, encode_captions(pipe, [sample.caption])).sample
    assert logged == pytest.approx(float((output - v).square().mean()), rel=1e-4)
    assert logged != pytest.approx(float((output - noise).square().mean()), rel=1e-2)
    saved = load_pipeline(str(tmp_path / "run" / "model"))
    assert saved.scheduler.config.prediction_type == "v_prediction"
    assert type(saved.scheduler) is type(pipe.scheduler)  # the sampler that it came with


def test_models_that_predict_the_image_or_are_distilled_cannot_be_trained():
    from diffusers import DDIMScheduler

    pipe = tiny_pipeline()
    pipe.register_modules(scheduler=DDIMScheduler(prediction_type="sample"))
    with pytest.raises(UserError, match="it: a model that predicts 'sample'"):
        check_trainable(pipe, "it")
    pipe = tiny_pipeline()
    pipe.unet.register_to_config(time_cond_proj_dim=16)
    with pytest.raises(UserError, match="guidance scale as an input"):
        check_trainable(pipe, "it")


def test_a_flow_matching_scheduler_is_refused_in_a_line(sample_model, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder = tmp_path / "flow"
    shutil.copytree(sample_model, folder)
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="flow: FlowMatchEulerDiscreteScheduler has no noise schedule of betas"):
        load_pipeline(str(folder))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_steps_that_a_scheduler_cannot_take_are_told_before_the_first(steps):
    from diffusers import DDIMScheduler, PNDMScheduler

    with pytest.raises(UserError, match=f"PNDMScheduler cannot take {steps} steps .*: take another number"):
        check_scheduler(PNDMScheduler(), "model", steps)
    check_scheduler(DDIMScheduler(), "model", steps)
    check_scheduler(PNDMScheduler(), "model", 4)
    with pytest.raises(UserError, match="cannot take 2000 steps"):
        check_scheduler(DDIMScheduler(), "model", 2000)


@pytest.mark.parametrize(
    ("key", "shape", "said"),
    [
        (
            "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias",
            [9216],
            "Stable Diffusion 3 and 3.5",
        ),
        ("double_blocks.0.img_attn.norm.key_norm.scale", [128], "FLUX.1"),
    ],
)
def test_single_files_of_a_family_that_needs_a_folder_say_how_to_make_one(tmp_path, key, shape, said):
    path = tmp_path / "model.safetensors"
    weights = {key: torch.zeros(shape), "model.diffusion_model.pos_embed": torch.zeros(1, 36864, 8)}
    save_file(weights if "joint" in key else {key: weights[key]}, path)
    with pytest.raises(UserError, match="from_single_file.*save_pretrained") as refused:
        load_pipeline(str(path))
    assert f"a single file of {said}" in str(refused.value) and "\n" not in str(refused.value)
