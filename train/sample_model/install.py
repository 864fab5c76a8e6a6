"""Recipe: put the trained sample model where the project carries it, in half precision.

python -m train.sample_model.install runs/sample_model/pretrain/model
"""

from __future__ import annotations

import sys

import torch

from train.components import load_pipeline
from train.quickstart import sample_model_dir


def main(folder: str) -> None:
    pipe = load_pipeline(folder, dtype=torch.float16)
    pipe.save_pretrained(sample_model_dir())
    size = sum(path.stat().st_size for path in sample_model_dir().rglob("*") if path.is_file())
    print(f"{sample_model_dir()}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m train.sample_model.install FOLDER")
    main(sys.argv[1])
