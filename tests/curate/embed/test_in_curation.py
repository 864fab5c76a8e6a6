"""Curation and search on the towers of other libraries."""

import io
import json

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from curate.config import DedupConfig, SearchConfig
from curate.dedup import run_dedup
from curate.reading.writing import write_shard
from curate.search import run_search
from tests.curate.embed.made_models import without


def test_curation_and_search_run_on_towers_and_notice_other_weights(models, emoji, tmp_path):
    def webp(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "webp", lossless=True)
        return buffer.getvalue()

    samples = [(f"{i:03d}", {"webp": webp(image), "txt": caption.encode()}) for i, (image, caption) in enumerate(emoji)]
    write_shard(tmp_path / "in.tar", samples)
    model = without(models / "clip", tmp_path / "clip")
    config = DedupConfig(
        [str(tmp_path / "in.tar")],
        str(tmp_path / "out"),
        image_embedder=str(model),
        caption_embedder=str(model),
        threshold=0.9999,
        caption_threshold=0.9999,
        workers=1,
    )
    assert run_dedup(config)["samples"] == 64
    caches = {path.name for path in (tmp_path / "out" / "work").rglob("*.parquet")}
    index = json.loads((tmp_path / "out" / "index" / "index.json").read_text())
    assert index["embedder"] == str(model) and index["dim"] == 24

    found = run_search(SearchConfig(str(tmp_path / "out"), caption=emoji[5][1], caption_embedder=str(model), k=1))
    assert found["nearest"][0]["caption"] == emoji[5][1] and found["nearest"][0]["similarity"] > 0.999
    (tmp_path / "5.webp").write_bytes(samples[5][1]["webp"])
    found = run_search(SearchConfig(str(tmp_path / "out"), image=str(tmp_path / "5.webp"), k=1))
    assert found["nearest"][0]["key"] == "005"

    def caches_after(**changes: object) -> set[str]:
        run_dedup(DedupConfig(**{**vars(config), **changes}))
        return {path.name for path in (tmp_path / "out" / "work").rglob("*.parquet")}

    assert caches_after() == caches
    caches_after(caption_embedder="ngrams")
    known = caches_after()
    assert known >= caches  # the name alone: nothing else changed
    weights = load_file(model / "model.safetensors")
    weights["visual_projection.weight"] *= torch.linspace(0.5, 1.5, 24)[:, None]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert any(not name.startswith("pairs") for name in caches_after() - known)  # read anew
