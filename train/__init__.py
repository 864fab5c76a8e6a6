"""Fine-tuning of Stable Diffusion, sampling and evaluation, with memorization measured and held down."""

from afresh import __version__ as __version__
