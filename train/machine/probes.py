"""What the jobs compute, on the device and on the CPU: attention, a training step, an image, a search.

Tolerances are what the precision explains: float32 may differ by its rounding and, on GPUs, TF32's; the half precisions
have 8 (bf16) and 11 (fp16) bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from train.denoising.families.stable_diffusion import StableDiffusionDenoiser
from train.denoising.opening.loading import load_pipeline
from train.finetune.model.loss import sample_errors
from train.machine.findings import DIFFERS, WORKS, Absent, Finding, attempt, fastest

if TYPE_CHECKING:
    from curate.index.training_index import TrainingIndex

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
_NEAR = {torch.float32: 5e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of an attention's output, which is about 1
_COSINE = {"no": 0.9999, "bf16": 0.99, "fp16": 0.999}  # of a gradient with the CPU's
_FP16_SCALE = 1024.0
PROMPT = "grinning face, face smiling"


def wait(device: torch.device) -> None:
    """Return when the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# ------------------------------------------------------------------------------------------------------- attention


def attention(device: torch.device, large: bool) -> Iterator[Finding]:
    """Each kernel of torch's attention in each dtype, and xformers', forwards and backwards."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 8, 4096 if large else 256, 64)
    parts = [torch.randn(shape, generator=generator) for _ in range(3)]
    short = [part[:, :, :256].clone() for part in parts]
    q, k, v = (part.double() for part in short)
    reference = scaled_dot_product_attention(q, k, v).float()
    for dtype in DTYPES.values():
        for name, kernel in (*KERNELS.items(), ("xformers", None)):
            what = f"{name}, {str(dtype).removeprefix('torch.')}"
            yield attempt("attention", what, lambda: _attended(what, kernel, dtype, parts, short, reference, device))  # noqa: B023


def _attended(
    what: str,
    kernel: SDPBackend | None,
    dtype: torch.dtype,
    parts: list[Tensor],
    short: list[Tensor],
    reference: Tensor,
    device: torch.device,
) -> Finding:
    def attend(given: list[Tensor]) -> Tensor:
        if kernel is not None:
            with sdpa_kernel(kernel):
                q, k, v = given
                return scaled_dot_product_attention(q, k, v)
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(*(one.transpose(1, 2) for one in given)).transpose(1, 2)

    given = [part.to(device, dtype) for part in short]
    try:
        error = float((attend(given).float().cpu() - reference).abs().max())
    except (RuntimeError, NotImplementedError) as fault:
        raise Absent(f"no kernel for this device and dtype ({str(fault).splitlines()[0][:80]})") from fault
    given = [part.clone().to(device, dtype).requires_grad_() for part in parts]
    seconds = fastest(lambda: attend(given).sum().backward(), lambda: wait(device))
    result = WORKS if error < _NEAR[dtype] else DIFFERS
    return Finding("attention", what, result, f"off by {error:.1g} from float64 on the CPU", seconds)


# --------------------------------------------------------------------------------------------------- a training step


class Step:
    """A training step's forward and backward pass, with the same random numbers on every device.

    Args:
        model: pipeline folder, file or hub name.
        device: where it is taken.
        batch: samples of it.
    """

    def __init__(self, model: str, device: torch.device, batch: int) -> None:
        self.device = device
        self.denoiser = StableDiffusionDenoiser(load_pipeline(model, device=device))
        generator = torch.Generator().manual_seed(0)
        x_0, noise = (torch.randn((batch, *self.denoiser.shape), generator=generator) for _ in range(2))
        t = torch.randint(0, self.denoiser.schedule.timesteps, (batch,), generator=generator)
        schedule = self.denoiser.schedule
        self.x_t, self.target = (
            one.to(device) for one in (schedule.noised(x_0, noise, t), schedule.target(x_0, noise, t))
        )
        self.t = t.to(device)
        self.conditioning = self.denoiser.encode([PROMPT] * batch)

    def take(self, precision: str) -> tuple[float, Tensor]:
        """The loss, and the gradient of all the network's weights in one row, float32 on the device."""
        weights = [one for one in self.denoiser.network.parameters() if one.requires_grad]
        half: Any = contextlib.nullcontext()
        if precision != "no":
            half = torch.autocast(self.device.type, DTYPES[precision])
        with half:
            output = self.denoiser(self.x_t, self.t, self.conditioning).float()
        loss = sample_errors(output, self.target).mean()
        scale = _FP16_SCALE if precision == "fp16" else 1.0
        gradients = torch.autograd.grad(loss * scale, weights, allow_unused=True)
        return float(loss.detach()), torch.cat([one.flatten() for one in gradients if one is not None]) / scale


def training(model: str, device: torch.device, large: bool) -> Iterator[Finding]:
    """A step in each precision, compared with the CPU's in float32, and compiled."""
    batch = 8 if large else 4
    expected, gradient = Step(model, torch.device("cpu"), batch).take("no")
    step = Step(model, device, batch)
    for precision in DTYPES:
        yield attempt("training step", precision, lambda: _taken(step, precision, expected, gradient))  # noqa: B023
    yield attempt("training step", "compiled", lambda: _compiled(step, expected) if large else _compiled_block(device))


def _taken(step: Step, precision: str, expected: float, gradient: Tensor) -> Finding:
    if precision == "fp16" and step.device.type == "cpu":
        raise Absent("fp16 needs a GPU")
    loss, found = step.take(precision)
    cosine = float(torch.nn.functional.cosine_similarity(found.cpu().double(), gradient.double(), dim=0))
    off = abs(loss - expected) / expected
    seconds = fastest(lambda: step.take(precision), lambda: wait(step.device))
    agrees = cosine > _COSINE[precision] and off < 2e-2
    detail = f"loss off by {off:.1g} of itself, gradient's cosine with the CPU's {cosine:.5f}"
    return Finding("training step", precision, WORKS if agrees else DIFFERS, detail, seconds)


def _compiled(step: Step, expected: float) -> Finding:
    """The network compiled in place, so nothing may come after it that wants it as it was."""
    step.denoiser.network.compile()
    loss, _ = step.take("no")
    off = abs(loss - expected) / expected
    seconds = fastest(lambda: step.take("no"), lambda: wait(step.device))
    return Finding("training step", "compiled", WORKS if off < 1e-3 else DIFFERS, f"loss off by {off:.1g}", seconds)


def _compiled_block(device: torch.device) -> str:
    """Whether torch.compile works at all; a whole network takes a CPU many minutes."""
    block = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.GroupNorm(4, 8), torch.nn.SiLU()).to(device)
    x = torch.randn(1, 4, 16, 16, device=device)
    with torch.no_grad():
        off = float((torch.compile(block)(x) - block(x)).abs().max())
    if off > 1e-3:
        raise ValueError(f"a compiled block is off by {off:.1g}")
    return "a block of a network; with --gpu the whole of one, with its time"


# ------------------------------------------------------------------------------------------------ an image, a search


def made_index() -> tuple[TrainingIndex, Any]:
    """An index of carried images, and the embedder that made it."""
    from curate.embed import load_embedder
    from curate.index import TrainingIndex
    from curate.reading.images import decode_image
    from curate.sample_set import load_part

    samples = load_part("held_out")[:200]
    embedder = load_embedder("copy-detector")
    rows = embedder.embed([decode_image(one.image) for one in samples])
    n = len(samples)
    names = [one.caption for one in samples], [one.shard for one in samples], [one.key for one in samples]
    kept, group = np.ones(n, bool), np.arange(n)
    return TrainingIndex.build(rows, *names, kept, group, "copy-detector", embedder.digest), embedder


def drawing(model: str, device: torch.device) -> Iterator[Finding]:
    """An image under AMG from one seed, and the nearest rows of random vectors, on both devices."""
    index, embedder = made_index()
    yield attempt("sampling", "AMG, float32", lambda: _drawn(model, device, index, embedder))
    yield attempt("index", "search", lambda: _searched(index, device))


def _drawn(model: str, device: torch.device, index: TrainingIndex, embedder: Any) -> Finding:
    from train.sampling import AMG, GuidedStableDiffusion

    def draw(where: torch.device) -> np.ndarray:
        pipe: Any = GuidedStableDiffusion.from_pipe(load_pipeline(model, device=where))
        generator = torch.Generator().manual_seed(0)
        drawn = pipe(
            PROMPT, num_inference_steps=10, guidance_scale=4.0, generator=generator, output_type="np",
            guidance=[AMG(index, embedder)],
        )  # fmt: skip
        wait(where)
        return np.asarray(drawn.images)

    expected = draw(torch.device("cpu"))
    off = float(np.abs(draw(device) - expected).mean())
    seconds = fastest(lambda: draw(device), lambda: wait(device), times=1)
    detail = f"pixels off by {off:.1g} of white on average; 10 steps, with loading"
    return Finding("sampling", "AMG, float32", WORKS if off < 0.02 else DIFFERS, detail, seconds)


def _searched(index: TrainingIndex, device: torch.device) -> Finding:
    vectors = np.random.default_rng(0).standard_normal((64, index.dim)).astype(np.float32)
    index.hold("cpu")
    expected, rows = index.search(vectors, 5)
    index.hold(device)
    similarity, found = index.search(vectors, 5)
    off = float(np.abs(similarity - expected).max())
    seconds = fastest(lambda: index.search(vectors, 5), lambda: wait(device))
    same = (found == rows).mean()
    detail = f"{same:.1%} of the rows are the CPU's, similarities off by {off:.1g}"
    return Finding("index", "search", WORKS if off < 1e-4 and same > 0.99 else DIFFERS, detail, seconds)
