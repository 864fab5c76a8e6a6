"""Memory of fine-tuning a Stable Diffusion 1.x: measured on the CPU, computed from that for GPUs.

    python -m benchmarks.stable_diffusion_memory [--pixels 512] [--folder FOLDER] [--json FILE]

Builds the networks of Stable Diffusion 1.x with random weights (UNet of 860 M parameters, VAE, CLIP ViT-L's text
encoder), trains a few steps through ``train finetune`` with gradient checkpointing in float32, the whole UNet and LoRA,
and reads the process's resident memory while the steps run. What weights, gradients and optimizer state take is known
from their number; the rest, above a process that has the libraries loaded, is activations and what allocators keep.
With the whole UNet that rest is small, since activations are gone by the time that all gradients are there: LoRA's
tells what activations take, one sample and a further one.

The table for GPUs is computed, not measured: bytes per parameter from what the trainer holds in which precision, and
activations from the measured ones, halved in half precision, as if they stood beside all gradients. It leaves out the
CUDA context and what the allocator fragments.

Needs 20 GB of disk, 16 GB of memory, and half an hour on two cores at 512 pixels.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

GB = 1e9
STEPS = 2  # the second one has gradients, optimizer state and activations side by side
RANK = 16
IMPORTS = "import torch, accelerate, train.finetune.loop; from diffusers import StableDiffusionPipeline"
RUNS = {  # name: (LoRA rank, samples in one forward pass)
    "full": (0, 1),
    "lora": (RANK, 1),
    "lora, batch 2": (RANK, 2),
}


def random_pipeline(pixels: int) -> StableDiffusionPipeline:
    """A pipeline of Stable Diffusion 1.x's architecture with random weights, float32."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from train.sample_model.small import train_tokenizer

    tokenizer = train_tokenizer(["a photograph of an astronaut riding a horse"], 600, 77)
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(sample_size=pixels // 8, cross_attention_dim=768, attention_head_dim=8),
        vae=AutoencoderKL(
            sample_size=512,
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                max_position_embeddings=77,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        ),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write_images(folder: Path) -> None:
    """A shard of eight carried samples; the trainer scales them up."""
    from curate.reading.writing import write_shard
    from curate.sample_set import load_part

    write_shard(str(folder / "000000.tar"), [(s.key, dict(s.members)) for s in load_part("finetune")[:8]])


def parameters(file: Path) -> int:
    """Numbers that a safetensors file holds, by its header."""
    with open(file, "rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    sizes = []
    for name, entry in header.items():
        if name != "__metadata__":
            size = 1
            for side in entry["shape"]:
                size *= side
            sizes.append(size)
    return sum(sizes)


def resident(pid: int | str, field: str = "VmRSS") -> float:
    """A field of ``/proc/PID/status`` in GB; 0 once the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / GB for line in lines if line.startswith(f"{field}:")), 0.0)


def available() -> float:
    """Memory that the machine can still give, in GB."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / GB for line in lines if line.startswith("MemAvailable:"))


def watch(command: list[str], log: Path) -> tuple[float, float]:
    """Run a training to its end.

    Args:
        command: of the run.
        log: its ``log.jsonl``.

    Returns:
        the highest resident memory between its first and its last step, and over the whole process, in GB.
    """
    process = subprocess.Popen(command)
    training = whole = 0.0
    while process.poll() is None:
        if available() < 1.5:
            process.kill()
            process.wait()
            sys.exit("stopped: less than 1.5 GB of memory was left on this machine")
        done = log.read_text().count("\n") if log.is_file() else 0
        if 1 <= done < STEPS:
            training = max(training, resident(process.pid))
        whole = max(whole, resident(process.pid, "VmHWM"))
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"the run failed with {process.returncode}: {' '.join(command)}")
    return training, whole


def measure(folder: Path, pixels: int) -> tuple[dict[str, int], list[dict]]:
    """Numbers of parameters by part, and a row for each run, in GB."""
    model, images = folder / "model", folder / "images"
    if not (model / "model_index.json").is_file():
        print("building the model…", flush=True)
        start = [sys.executable, "-m", "benchmarks.stable_diffusion_memory", f"--pixels={pixels}"]
        subprocess.run([*start, f"--build={model}"], check=True)
    write_images(images)
    sizes = {
        "UNet": parameters(model / "unet" / "diffusion_pytorch_model.safetensors"),
        "VAE": parameters(model / "vae" / "diffusion_pytorch_model.safetensors"),
        "text encoder": parameters(model / "text_encoder" / "model.safetensors"),
    }
    loaded = subprocess.run(
        [sys.executable, "-c", f"{IMPORTS}\nprint(open('/proc/self/status').read())"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    libraries = next(int(line.split()[1]) * 1024 / GB for line in loaded.splitlines() if line.startswith("VmRSS:"))
    rows = []
    for name, (rank, batch) in RUNS.items():
        out = folder / name.replace(", ", "-").replace(" ", "-")
        command = [sys.executable, "-m", "train", "finetune", f"--model={model}", f"--shards={images}", f"--out={out}"]
        command += [f"--steps={STEPS}", f"--batch_size={batch}", "--workers=0", "--checkpoint_every=0", "--log_every=1"]
        command += ["--gradient_checkpointing=true", f"--lora.rank={rank}"]
        command += ["--mixed_precision=no", "--filter.preset=none"]
        training, whole = watch(command, out / "log.jsonl")
        trained = sizes["UNet"]
        if rank:
            trained = sizes["adapters"] = parameters(out / "lora" / "pytorch_lora_weights.safetensors")
        row = {
            "run": name,
            "weights": 4 * (sizes["UNet"] + sizes["VAE"] + sizes["text encoder"] + (trained if rank else 0)) / GB,
            "gradients": 4 * trained / GB,
            "optimizer": 8 * trained / GB,
            "libraries": libraries,
        }
        row["rest"] = training - sum(v for k, v in row.items() if k != "run")
        row |= {"peak of the steps": training, "peak of the process": whole}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return sizes, rows


def computed(sizes: dict[str, int], first: float, further: float) -> list[dict]:
    """Memory of settings on a GPU, in GB: bytes a parameter by precision, activations from the measured ones.

    Args:
        sizes: numbers of parameters.
        first: activations of one sample in float32, with gradient checkpointing.
        further: those of each further sample.
    """
    unet, adapters = sizes["UNet"], sizes["adapters"]
    vae, text = sizes["VAE"], sizes["text encoder"]
    rows = []
    for method, precision, adam8, ema in (
        ("full", "float32", False, False),
        ("full", "mixed", False, False),
        ("full", "mixed", False, True),
        ("full", "mixed", True, False),
        ("LoRA", "float32", False, False),
        ("LoRA", "mixed", False, False),
    ):
        half = precision == "mixed"
        trained = unet if method == "full" else adapters
        if method == "full":
            # Autocast keeps half-precision copies of the weights that it has cast.
            weights = (6 if half else 4) * unet + 4 * (text + vae)
        else:
            weights = (2 if half else 4) * (unet + text) + 4 * (vae + adapters)
        row = {
            "method": method,
            "precision": precision,
            "optimizer": "8-bit Adam" if adam8 else "AdamW",
            "average": "yes" if ema else "no",
            "weights": weights / GB,
            "gradients": 4 * trained / GB,
            "state": (2 if adam8 else 8) * trained / GB,
            "EMA": (4 * trained if ema else 0) / GB,
        }
        fixed = sum(v for v in row.values() if isinstance(v, float))
        for batch in (1, 4, 8):
            row[f"batch {batch}"] = fixed + (first + (batch - 1) * further) * (0.5 if half else 1.0)
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """Rows as Markdown."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "|".join("---" for _ in rows[0]) + "|"]
    for row in rows:
        cells = [f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=512, help="side of the images")
    parser.add_argument("--folder", default="", help="where model and runs are kept; a temporary one by default")
    parser.add_argument("--json", default="", help="write the figures here")
    parser.add_argument("--build", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.build:
        random_pipeline(arguments.pixels).save_pretrained(arguments.build)
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        sizes, rows = measure(Path(arguments.folder or temporary), arguments.pixels)
    gpu = computed(sizes, rows[1]["rest"], rows[2]["rest"] - rows[1]["rest"])
    print("\nparameters:", ", ".join(f"{name} {n / 1e6:.1f} M" for name, n in sizes.items()))
    print(f"\nMeasured, in GB, float32 on the CPU, {arguments.pixels} pixels, gradient checkpointing:\n\n{table(rows)}")
    print(f"\nComputed for a GPU, in GB:\n\n{table(gpu)}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"parameters": sizes, "measured": rows, "computed": gpu}, indent=2))


if __name__ == "__main__":
    main()
