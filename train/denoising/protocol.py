"""The denoiser's protocol: all that training, the filter, the signals, the neurons and the sampler ask of a model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from train.denoising.conditioning import Conditioning
    from train.denoising.predictions import Prediction
    from train.denoising.schedules import NoiseSchedule


class Denoiser(Protocol):
    """A family's model behind two notions: a conditioning, and a prediction in every space.

    Attributes:
        network: the module that denoises, for hooks and switches; nobody else calls it.
        schedule: of the model.
        shape: ``(c, h, w)`` of the latents that it draws by default.
        side: of the square that these are, in pixels.
        device: where its inputs are wanted, wherever its weights are kept.
        dtype: of its latents.
        gain: factor on what is differentiated through it.
    """

    network: Any
    schedule: NoiseSchedule

    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def side(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def gain(self) -> float: ...

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts → conditioning of as many images, without gradients; what is too long is cut."""

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """``x_T`` of seeds, ``[n, c, h, w]``: one noise on every device, in the network's dtype."""

    def __call__(self, x_t: Tensor, t: Any, conditioning: Conditioning) -> Tensor:
        """The network's own output for ``x_t [n, c, h, w]`` in its dtype; ``t`` is a number or ``[n]``."""

    def predict(self, x_t: Tensor, t: Any, conditioning: Conditioning) -> Prediction:
        """The same in float32, in every space."""

    def guided(self, cond: Prediction, uncond: Prediction, scale: float) -> Prediction:
        """What a trajectory follows: classifier-free guidance, or of a guidance-distilled model ``cond`` itself."""

    def frozen(self, *, checkpointing: bool = False) -> AbstractContextManager[None]:
        """Without gradients of the weights while the block runs; perhaps with gradient checkpointing."""

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """``[n, 3, H, W]`` in [0, 1] → ``x_0 [n, c, h, w]`` float32, the mean of the posterior."""

    @property
    def multiple(self) -> int:
        """Sides of images are multiples of it, in pixels."""

    @property
    def sequence(self) -> list[tuple[str, int]]:
        """The tokenizers whose tokens make the sequence, one after the other, and how many each has."""

    @property
    def frame(self) -> tuple[str, str] | None:
        """Text that is put before and after a prompt, which a language model is asked; None where there is none."""

    def draw(
        self, conditioning: Conditioning, x_T: Tensor, *, steps: int, guidance_scale: float
    ) -> list[Image]:
        """What the stock pipeline draws by DDIM from noise ``x_T`` under a conditioning."""
