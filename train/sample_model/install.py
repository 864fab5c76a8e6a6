"""Recipe: put the trained sample model where the project carries it, in half precision.

python -m train.sample_model.install runs/sample_model/anneal/model
"""

from __future__ import annotations

import json
import shutil
import sys

import torch

from train.denoising.opening.loading import load_pipeline, sample_model_dir
from train.denoising.opening.saving import save_pipeline


def main(folder: str) -> None:
    pipe = load_pipeline(folder, dtype=torch.float16)
    shutil.rmtree(sample_model_dir())
    save_pipeline(pipe, sample_model_dir())
    # Every release reads the vocabulary's two files; the third says the same in more room.
    (sample_model_dir() / "tokenizer" / "tokenizer.json").unlink()
    for config in sample_model_dir().rglob("*.json"):  # diffusers notes where a model was loaded from
        text = config.read_text(encoding="utf-8")
        if '"_name_or_path"' in text:
            kept = {name: value for name, value in json.loads(text).items() if name != "_name_or_path"}
            config.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in sample_model_dir().rglob("*") if path.is_file())
    print(f"{sample_model_dir()}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m train.sample_model.install FOLDER")
    main(sys.argv[1])

