"""Networks as embedders: any torch module that gives an image one vector, and TorchScript files such as SSCD's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from afresh.errors import UsageError, UserError, reason
from curate.embed.preprocessing import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 24}  # pixels that a network sees at a time, whatever the batch size


class TorchEmbedder:
    """A torch module that takes images and gives one vector each.

    It goes to the GPU when it first embeds something: the process that starts a curation asks for its digest alone.

    Args:
        name: what the index records.
        model: ``[n, 3, h, w]`` float32, normalised pixels → ``[n, dim]``; frozen here.
        dim: length of the vectors.
        preprocessing: how images become pixels.
        settings: whatever else decides the vectors, JSON; for ``digest``.
        half: see :func:`curate.embed.load_embedder`.
    """

    accelerated = True

    def __init__(
        self,
        name: str,
        model: torch.nn.Module,
        *,
        dim: int,
        preprocessing: Preprocessing,
        settings: object = None,
        half: bool | None = None,
    ):
        self.name, self.dim, self.size = name, dim, preprocessing.side
        self.preprocessing = preprocessing
        self.model = model.eval()
        for parameter in model.parameters():  # scripted modules lack requires_grad_
            parameter.requires_grad_(False)
        self._settings, self._half = settings, half
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._there = False
        self._at_once = max(1, _AT_ONCE[self._device.type] // self.size**2)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the weights, the preprocessing and the settings."""
        return weights_digest(self.model, [repr(self.preprocessing), self._settings])

    def embed(self, images: Sequence[Image], batch_size: int = 256) -> NDArray[np.float32]:
        """See :class:`curate.embed.protocol.Embedder`. What a GPU's memory does not hold is tried again by halves.

        Raises:
            UserError: not even one image fits into the GPU's memory.
        """
        result = np.empty((len(images), self.dim), np.float32)
        start = 0
        while start < len(images):
            some = images[start : start + max(1, min(batch_size, self._at_once))]
            try:
                result[start : start + len(some)] = self._embedded(some)
            except torch.OutOfMemoryError as error:
                if len(some) == 1:
                    raise UserError(
                        f"{self.name}: the GPU's memory does not hold the network and one image: give it more room "
                        "(another gpu_share), or embed on the CPU (CUDA_VISIBLE_DEVICES=)"
                    ) from error
                self._at_once = len(some) // 2
                torch.cuda.empty_cache()
            else:
                start += len(some)
        return result

    @torch.inference_mode()
    def _embedded(self, images: Sequence[Image]) -> NDArray[np.float32]:
        """``[n, dim]``, of as many images as the network sees at a time."""
        self._go_to(self._device)
        result = np.empty((len(images), self.dim), np.float32)
        half = self._device.type == "cuda" if self._half is None else self._half
        for places, stack in self.preprocessing.stacks(images):
            pixels = torch.from_numpy(stack).to(self._device)
            vectors = self._vectors(pixels, half)
            if half and len(lost := (~vectors.isfinite().all(1)).nonzero().flatten()):  # beyond float16's range
                vectors[lost] = self._vectors(pixels[lost], half=False)
            result[np.array(places)] = vectors.cpu().numpy()
        return result

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        self._go_to(pixels.device)
        return self._vectors(self.preprocessing.resized(pixels), half=False)

    def _go_to(self, device: torch.device) -> None:
        if not self._there or device != self._device:
            with torch.inference_mode(False):  # gradients are to run through these weights
                self.model.to(device)
            self._device, self._there = device, True

    def _vectors(self, pixels: torch.Tensor, half: bool) -> torch.Tensor:
        """``[n, 3, h, w]`` in [0, 1], resized → float32 ``[n, dim]``, unit rows."""
        x = self.preprocessing.normalised(pixels)
        # Of its own, whatever precision a sampler runs in.
        with torch.autocast(self._device.type, dtype=torch.float16, enabled=half):
            vectors = self.model(x)
        with torch.autocast(self._device.type, enabled=False):
            return torch.nn.functional.normalize(vectors.float(), dim=1)


def weights_digest(model: torch.nn.Module, settings: object) -> str:
    """SHA-256 (hex) of a module's weights and buffers, and of settings (JSON)."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_torchscript(
    name: str, path: str, size: int, fit: Literal["squash", "shortest"], half: bool | None
) -> TorchEmbedder:
    """A TorchScript file as an embedder, of images as SSCD's README prepares them: bilinear, ImageNet's mean and
    deviation.

    Args:
        name: what the index records.
        path: of the file.
        size: see :class:`~curate.embed.preprocessing.Preprocessing`, like ``fit``.
        fit: of the image.
        half: see :func:`curate.embed.load_embedder`.

    Raises:
        UsageError: there is no such file, or it takes squares only and was asked for other shapes.
        UserError: it is no image embedder.
    """
    if not Path(path).expanduser().is_file():
        raise UsageError(f"no such embedder file: {path}")
    longer = size + 32 if fit == "shortest" else size
    preprocessing = Preprocessing(size, fit=fit, filter="bilinear", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    try:
        with open(Path(path).expanduser(), "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        model = torch.jit.load(str(Path(path).expanduser()), map_location="cpu").eval()
        with torch.inference_mode():
            answer = model(torch.zeros(1, 3, size, size))
    except Exception as error:
        raise UserError(f"{path} cannot be used as a TorchScript image embedder: {reason(error)}") from error
    if not isinstance(answer, torch.Tensor) or answer.ndim != 2 or len(answer) != 1:
        raise UserError(f"{path} is no image embedder: it does not answer one image with one vector")
    if longer > size:
        with torch.inference_mode():
            try:
                fits = model(torch.zeros(1, 3, size, longer)).shape == answer.shape
            except Exception:
                fits = False
        if not fits:
            raise UsageError(f"{path} takes squares only: name their side, as in {path}@{size}")
    settings = {"file": sha256}
    return TorchEmbedder(name, model, dim=answer.shape[1], preprocessing=preprocessing, settings=settings, half=half)
