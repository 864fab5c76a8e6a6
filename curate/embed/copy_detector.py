"""The copy detector: a small convolutional image embedder whose gradient is worth following.

Trained by ``train/sample_model/copy_detector/training.py`` in the manner of SSCD (Pizzi et al., CVPR 2022, arXiv
2202.10261): contrastive over strong edits plus a differential-entropy term, so that the cosine of unrelated
images lies near 0 and that of copies above 0.5. It is built so that a sampler may descend its score: smooth
activations (SiLU), blurred before every loss of resolution (no aliasing), and a head that still sees where
things are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afresh.errors import UserError, reason
from afresh.files import write_atomic

WEIGHTS = Path(__file__).parents[1] / "assets" / "copy_detector.safetensors"


class CopyDetector(nn.Module):
    """Images → unit vectors.

    Args:
        widths: channels at a half, a quarter and an eighth of ``size``.
        dim: length of the embedding.
        size: side of the square that the network looks at, in pixels; a multiple of 32.
    """

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 128), dim: int = 128, size: int = 64):
        super().__init__()
        self.dim, self.size = dim, size
        half, quarter, eighth = widths
        self.conv1, self.norm1 = _conv(4 * 3, half), nn.BatchNorm2d(half)
        self.conv2, self.norm2 = _conv(half, quarter), nn.BatchNorm2d(quarter)
        self.conv3, self.norm3 = _conv(quarter, eighth), nn.BatchNorm2d(eighth)
        self.conv4, self.norm4 = _conv(eighth, eighth), nn.BatchNorm2d(eighth)
        self.conv5, self.norm5 = _conv(eighth, eighth), nn.BatchNorm2d(eighth)
        # Centred features: without it all embeddings start in one narrow cone and leave it only slowly.
        self.head_norm = nn.BatchNorm1d(eighth * 16, affine=False)
        self.head = nn.Linear(eighth * 16, dim)
        binomial = torch.tensor([0.25, 0.5, 0.25])
        self.blur: Tensor
        self.register_buffer("blur", torch.outer(binomial, binomial).expand(3, 1, 3, 3).clone(), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """``[n, 3, size, size]`` in [0, 1] → ``[n, dim]`` float32 unit rows; differentiable."""
        x = F.pad((0.5 - pixels) * 2, (1, 1, 1, 1), mode="replicate")
        x = F.pixel_unshuffle(F.conv2d(x, self.blur, groups=3), 2)
        x = F.silu(self.norm1(self.conv1(x)))
        x = F.silu(self.norm2(self.conv2(F.avg_pool2d(x, 2))))
        x = F.silu(self.norm3(self.conv3(F.avg_pool2d(x, 2))))
        h = F.silu(self.norm4(self.conv4(x)))
        x = F.silu(x + self.norm5(self.conv5(h)))
        x = F.adaptive_avg_pool2d(x, 4).flatten(1)
        return F.normalize(self.head(self.head_norm(x)).float(), dim=1)

    def save(self, path: str | Path = WEIGHTS) -> None:
        """Write the weights as float16 safetensors, whole or not at all."""
        from safetensors.torch import save

        state = {
            name: value.half() if value.is_floating_point() else value
            for name, value in self.state_dict().items()
            if not name.endswith("num_batches_tracked")
        }
        with write_atomic(Path(path)) as temporary:
            Path(temporary).write_bytes(save({name: value.contiguous() for name, value in state.items()}))

    @classmethod
    def load(cls, path: str | Path = WEIGHTS) -> Self:
        """The detector with the weights of a file (the carried ones by default), in evaluation mode.

        Raises:
            UserError: the file is missing or holds other weights.
        """
        from safetensors.torch import load_file

        model = cls()
        try:
            state = {name: value.float() for name, value in load_file(str(path)).items()}
            missing, unexpected = model.load_state_dict(state, strict=False)
        except Exception as error:
            raise UserError(f"copy detector {path} cannot be loaded: {reason(error)}") from error
        missing = [name for name in missing if not name.endswith("num_batches_tracked")]
        if missing or unexpected:
            raise UserError(f"{path} does not hold the copy detector's weights: {(missing or unexpected)[0]}")
        return model.eval()


def _conv(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)

