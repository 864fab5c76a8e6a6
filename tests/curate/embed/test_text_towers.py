"""Text towers of other libraries: their own vectors, and one clear line when not."""

import json

import numpy as np
import pytest
import torch
import transformers

from afresh.errors import UsageError, UserError
from curate.embed.registry import load_caption_embedder
from tests.curate.embed.made_models import WIDTHS, without

CAPTIONS = ["a red apple", "a green apple on a table", "", "grinning face, " * 30, "日本語", "\ud800"]


@pytest.mark.parametrize("name", ["clip", "siglip", "clip-text", "clip-text-bare"])
def test_a_text_tower_gives_the_librarys_own_vectors(name, models):
    embedder = load_caption_embedder(f"transformers:{models / name}")
    rows = embedder.embed(CAPTIONS)
    assert rows.dtype == np.float32 and rows.shape == (6, embedder.dim)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(embedder.embed(CAPTIONS[1:2])[0], rows[1], atol=1e-6)
    assert embedder.embed([]).shape == (0, embedder.dim)

    tokenizer = transformers.AutoTokenizer.from_pretrained(models / name)
    kind = json.loads((models / name / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, kind).from_pretrained(models / name).eval()
    tokens = tokenizer(CAPTIONS[:5], padding="max_length", truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        if name == "clip-text":
            official = model(**tokens).text_embeds
        elif name == "clip-text-bare":
            official = model(**tokens).pooler_output
        elif name == "clip":
            official = model.get_text_features(**tokens).pooler_output
        else:  # its own tokenizer has no mask
            official = model.get_text_features(input_ids=tokens.input_ids).pooler_output
    np.testing.assert_allclose(rows[:5], torch.nn.functional.normalize(official, dim=1).numpy(), atol=2e-6)


def test_a_text_tower_without_its_tokenizer_is_refused(models, tmp_path):
    files = [path.name for path in (models / "clip").iterdir()]
    tokenizers = [name for name in files if name in ("tokenizer.json", "vocab.json", "merges.txt")]
    folder = without(models / "clip", tmp_path / "folder", *tokenizers)
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        load_caption_embedder(str(folder))
    with pytest.raises(UserError, match="no text tower is known of a model of type 'dinov2'"):
        load_caption_embedder(str(models / "dinov2"))
    with pytest.raises(UsageError, match="unknown caption embedder 'bm25'.*ngrams"):
        load_caption_embedder("bm25")


def test_a_tokenizer_that_does_not_fit_is_refused(models, tmp_path):
    folder = without(models / "clip", tmp_path / "folder", "model.safetensors")
    config = transformers.CLIPConfig.from_pretrained(models / "clip")
    config.text_config.vocab_size = 40
    transformers.CLIPModel(config).save_pretrained(folder)
    with pytest.raises(UserError, match="does not embed a caption"):
        load_caption_embedder(str(folder))


def test_the_digest_of_a_text_tower_follows_its_tokenizer(models, tmp_path):
    folder = without(models / "clip", tmp_path / "folder")
    original = load_caption_embedder(str(models / "clip")).digest
    assert load_caption_embedder(str(folder)).digest == original
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("\n", "\n "))
    assert load_caption_embedder(str(folder)).digest != original


def test_a_sentence_encoder_gives_its_own_vectors(models, tmp_path, tiny_pipe):
    library = pytest.importorskip("sentence_transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(tiny_pipe.tokenizer), max_position_embeddings=32, **WIDTHS)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    tiny_pipe.tokenizer.save_pretrained(tmp_path / "bert")
    model = library.SentenceTransformer(str(tmp_path / "bert"), device="cpu")  # adds a mean over tokens
    model.max_seq_length = 20
    model.save(str(tmp_path / "sentences"))
    embedder = load_caption_embedder(f"sentence-transformers:{tmp_path / 'sentences'}")
    rows = embedder.embed(CAPTIONS)
    np.testing.assert_allclose(rows[:5], model.encode(CAPTIONS[:5], normalize_embeddings=True), atol=1e-5)
    np.testing.assert_allclose(embedder.embed(CAPTIONS[1:2])[0], rows[1], atol=1e-6)
    assert load_caption_embedder(str(tmp_path / "sentences")).digest == embedder.digest
    weights = next((tmp_path / "sentences").rglob("model.safetensors"))
    torch.save({}, weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle"):
        load_caption_embedder(str(tmp_path / "sentences"))
