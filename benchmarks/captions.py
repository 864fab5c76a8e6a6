"""Near captions: hashed character n-grams and the join, beside MinHash with locality-sensitive hashing.

    python -m benchmarks.captions                          100,000 captions, both sides
    python -m benchmarks.captions --captions 1000000 --no_minhash

Captions are sentences of real words (those of the sample set's captions) in eight patterns; a tenth of them repeat
another one with a small edit: letter case and punctuation, a changed letter, a word more, or a word less. Recall is the
share of these planted pairs that a side finds; beside it stands how many pairs it finds at all. Ours takes a cosine of
0.9 as near. MinHash (``pip install datasketch``, no part of this project) takes sets of character trigrams, 128
permutations and a Jaccard similarity of 0.7, estimated by the signatures as its users do; it runs on one thread.
"""

from __future__ import annotations

import argparse
import re
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from afresh.cores import cpu_count
from curate.embed.ngrams import NgramEmbedder
from curate.neighbors.join import find_pairs
from curate.reading.captions import normalise_caption
from curate.stages.join import CAPTION_BLOCK, embedded_captions

PATTERNS = (
    "a {0} {1} beside the {2} {3}, {4}",
    "{0} and {1} with a {2} in front of {3} {4}",
    "photo of the {0} {1}: {2} {3} near {4}",
    "the {0} of a {1} under {2}, {3} and {4}",
    "{0} {1} {2} on {3}, drawn with {4}",
    "two {0} between {1} and {2}, {3} {4} behind",
    "close view of {0}, {1} {2} over {3} {4}",
    "a {0} that holds {1}, {2} {3} at {4}",
)


def make_captions(n: int, seed: int = 0) -> tuple[list[str], list[tuple[int, int]]]:
    """``n`` captions, and the pairs (original, edited copy) among them."""
    from curate.sample_set import load_part

    parts = ("pretrain", "finetune", "held_out")
    texts = " ".join(sample.caption or "" for part in parts for sample in load_part(part))
    words = sorted(set(re.findall(r"[a-z]{3,}", texts.lower())))
    rng, captions, planted = np.random.default_rng(seed), [], []
    for row in range(n):
        if row % 10 != 9:
            chosen = [words[i] for i in rng.integers(0, len(words), 5)]
            captions.append(PATTERNS[rng.integers(len(PATTERNS))].format(*chosen))
            continue
        source = row - int(rng.integers(1, 10))
        text, kind = captions[source], int(rng.integers(4))
        if kind == 0:
            text = text.capitalize().replace(",", " ,") + "!"
        elif kind == 1:
            place = int(rng.integers(len(text)))
            text = text[:place] + "e" + text[place + 1 :]
        elif kind == 2:
            text = f"{text} {words[rng.integers(len(words))]}"
        else:
            text = text.rsplit(" ", 1)[0]
        captions.append(text)
        planted.append((source, row))
    return captions, planted


def ours(captions: list[str], threads: int) -> set[tuple[int, int]]:
    """Near pairs of captions by cosine of n-grams; equal ones are told by normalisation."""
    number: dict[str, int] = {}
    first = [number.setdefault(normalise_caption(caption), row) for row, caption in enumerate(captions)]
    distinct = np.flatnonzero(np.array(first) == np.arange(len(captions)))
    with tempfile.TemporaryDirectory() as folder:
        texts = [captions[row] for row in distinct]
        blocks = (texts[start : start + CAPTION_BLOCK] for start in range(0, len(texts), CAPTION_BLOCK))
        embeddings = embedded_captions(NgramEmbedder(), blocks, Path(folder))
    pairs = find_pairs(embeddings, 0.9, crowd=100, threads=threads)
    near = set(zip(distinct[pairs.i].tolist(), distinct[pairs.j].tolist(), strict=True))
    return near | {(one, row) for row, one in enumerate(first) if one != row}


def minhash(captions: list[str]) -> set[tuple[int, int]]:
    """Near pairs by MinHash and LSH banding, verified on the signatures."""
    from datasketch import MinHash, MinHashLSH

    lsh, signatures, near = MinHashLSH(threshold=0.7, num_perm=128), [], set()
    for row, caption in enumerate(captions):
        text = normalise_caption(caption)
        signature = MinHash(num_perm=128)
        signature.update_batch([text[i : i + 3].encode() for i in range(max(1, len(text) - 2))])
        signatures.append(signature)
        for other in lsh.query(signature):
            if signature.jaccard(signatures[other]) >= 0.7:
                near.add((other, row))
        lsh.insert(row, signature)
    return near


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=cpu_count())
    parser.add_argument("--no_minhash", action="store_true", help="ours alone")
    arguments = parser.parse_args()
    captions, planted = make_captions(arguments.captions)
    sides = {"n-grams and the join": lambda: ours(captions, arguments.threads)}
    if not arguments.no_minhash:
        sides["MinHash and LSH"] = lambda: minhash(captions)
    print(f"{len(captions):,} captions, {len(planted):,} planted pairs, {arguments.threads} threads")
    seconds = []
    for name, find in sides.items():
        start = time.perf_counter()
        near = find()
        seconds.append(time.perf_counter() - start)
        recall = sum(pair in near for pair in planted) / len(planted)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(
            f"{name}: {seconds[-1]:.1f} s, recall of planted pairs {recall:.4f}, {len(near):,} pairs in all, "
            f"peak memory so far {peak:.2f} GB",
            flush=True,
        )
    if len(seconds) > 1:
        print(f"MinHash / ours: {seconds[1] / seconds[0]:.1f}")


if __name__ == "__main__":
    main()
