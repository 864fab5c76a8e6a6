"""Recipe: other drawings of the emoji to pretrain on, one shard a set.

A model that sees one image per caption learns the image; one that sees several learns the caption. Five freely licensed
sets draw the same characters. None is carried in the project; fetch and unpack their npm packages, then:

    npm pack @lobehub/fluent-emoji-3d @lobehub/fluent-emoji-flat @discordapp/twemoji @iconify-json/emojione \
        @iconify-json/fxemoji
    for package in *.tgz; do mkdir ${package%.tgz} && tar xzf $package -C ${package%.tgz}; done
    pip install resvg-py
    python -m train.sample_model.renditions lobehub-*/package/assets discordapp-*/package/dist/svg \
        iconify-*/package/icons.json runs/sample_model/renditions

Every caption of the carried set gets its other drawings, those of the fine-tuning and held-out parts too: the model is
to know what a thing is without ever having seen the carried drawing of it. A drawing that is the carried one in all but
name (16 × 16 pixels that correlate above 0.9: many flags) is left out.

Licences: both Fluent sets MIT (Microsoft), Twemoji CC BY 4.0 (Twitter and contributors), EmojiOne 2 CC BY 4.0
(Ranks.com), FxEmojis Apache 2.0 (Mozilla).
"""

from __future__ import annotations

import io
import json
import re
import sys
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import Image

from curate.reading.images import decode_image, stack_images
from curate.reading.samples import Sample
from curate.reading.writing import write_shard
from curate.sample_set import PARTS, load_part
from train.evaluation.judging.metrics import thumbnails

SIDE = 64
SAME = 0.9


def read_drawing(path: Path) -> Image.Image:
    """One drawing as RGBA, ``SIDE`` × ``SIDE``; vector files need the package resvg-py."""
    if path.suffix == ".svg":
        return _rendered(path.read_text(encoding="utf-8"))
    return Image.open(path).convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _rendered(svg: str) -> Image.Image:
    import resvg_py

    data = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE))
    return Image.open(io.BytesIO(data)).convert("RGBA")


def bare(code_points: str) -> str:
    """The file name without the variation selector, which sets spell in different ways."""
    return code_points.replace("-fe0f", "")


def words(text: str) -> str:
    """A name as lower-case ASCII words joined by hyphens, as icon sets spell theirs."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text.replace("'", "")).strip("-")


def names_of(sample: Sample) -> set[str]:
    """The names under which an icon set may hold the sample's character: its own, a keyword's, Unicode's, a flag's."""
    meta = json.loads(sample.members["json"])
    found = {words(meta["name"]), *(words(keyword) for keyword in meta["keywords"][:1])}
    points = [chr(int(point, 16)) for point in bare(sample.key).split("-")]
    if len(points) == 1:
        found.add(words(unicodedata.name(points[0], "")))
    if meta["name"].endswith(" flag"):
        country = words(meta["name"].removesuffix(" flag"))
        found |= {f"flag-for-{country}", f"flag-for-flag-{country}"}
    return found - {""}


def alike(drawing: Image.Image, other: Image.Image) -> float:
    """Correlation of the 16 × 16 pixels of two images."""
    one, two = thumbnails(stack_images([drawing, other], SIDE))
    return float(one @ two)


Drawings = dict[str, Callable[[], Image.Image]]


def folder_of_code_points(folder: Path, samples: list[Sample]) -> Drawings:
    """The drawings of a folder whose files are named by code points, by sample key."""
    files = {bare(path.stem): path for path in folder.iterdir() if path.suffix in (".svg", ".webp", ".png")}
    return {s.key: partial(read_drawing, files[bare(s.key)]) for s in samples if bare(s.key) in files}


def iconify_set(path: Path, samples: list[Sample]) -> Drawings:
    """The drawings of an Iconify package's ``icons.json``, whose icons are named by words, by sample key."""
    content = json.loads(path.read_text(encoding="utf-8"))
    icons = content["icons"]
    spelled = {name.replace("-", ""): name for name in icons}
    spelled |= {name.replace("-", ""): alias["parent"] for name, alias in content.get("aliases", {}).items()}

    def draw(name: str) -> Image.Image:
        icon = icons[name]
        width, height = (icon.get(side, content.get(side, 16)) for side in ("width", "height"))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        return _rendered(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>')

    found = {}
    for sample in samples:
        joined = (name.replace("-", "") for name in sorted(names_of(sample)))
        known = next((spelled[name] for name in joined if name in spelled), "")
        if known in icons:
            found[sample.key] = partial(draw, known)
    return found


def main(sources: list[str], out: str) -> None:
    samples = [sample for part in PARTS for sample in load_part(part)]
    carried = {sample.key: sample for sample in samples}
    Path(out).mkdir(parents=True, exist_ok=True)
    for number, source in enumerate(sources):
        path = Path(source)
        drawings = folder_of_code_points(path, samples) if path.is_dir() else iconify_set(path, samples)
        written, same = [], 0
        for key in sorted(drawings):
            page = Image.new("RGBA", (SIDE, SIDE), "white")
            drawing = drawings[key]()
            page.alpha_composite(drawing, ((SIDE - drawing.width) // 2, (SIDE - drawing.height) // 2))
            if alike(page.convert("RGB"), decode_image(carried[key].image)) > SAME:
                same += 1
                continue
            buffer = io.BytesIO()
            page.convert("RGB").save(buffer, "WEBP", lossless=True)
            written.append((key, {"txt": (carried[key].caption or "").encode(), "webp": buffer.getvalue()}))
        write_shard(str(Path(out) / f"{number:06d}.tar"), written)
        print(f"{source}: {len(written)} of {len(carried)} captions, {same} are the carried drawing", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python -m train.sample_model.renditions FOLDER_OR_ICONS_JSON… OUT")
    main(sys.argv[1:-1], sys.argv[-1])
