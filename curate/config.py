"""Settings of the curation jobs: plain dataclasses, read from YAML and the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

PREFERENCES = ("lossless", "resolution", "caption_length")
RULES = ("greedy", "components")
TRAINERS = ("imagefolder", "kohya", "simpletuner", "onetrainer", "ai-toolkit")


@dataclass
class ImportConfig:
    """Settings of ``curate import``.

    Args:
        src: a folder of images, or a zip file of one, a Hugging Face dataset (a local folder or a hub name), or parquet
            files; paths, globs, brace ranges or fsspec URLs. Only parquet files may be several.
        out: local folder or fsspec URL for the result: ``{:06d}.tar``, ``import.parquet`` with a row for every row of
            the source, ``summary.json``.
        kind: what the source is, where it should not be recognised by itself.
        caption_field: of the ``.json`` beside an image, the field with its caption, which then goes before a ``.txt``;
            empty takes the ``.txt`` (or ``.caption``, ``.cap``), else the first of the fields caption, text, prompt and
            captions that holds text.
        caption_lines: each line of a text file beside an image is a caption of its own, as several trainers have it:
            the first is the sample's caption, and all stand in ``captions`` of its json. Else the file is one caption.
        text_column: the column of captions, in tables and in a folder's metadata files; null for the only one of
            text, caption and prompt that there is, empty (``--text_column=``) for none.
        image_column: the column of images; null for the only one that looks like it.
        image_root: folder below which the paths of a table lie; null for the folder of the table. What leads out of
            it is skipped, so ``/`` admits any path.
        split: split of a dataset that has several, or of a folder with folders such as ``train`` and ``test``; ``all``
            takes all images of such a folder.
        subset: configuration of a dataset that has several.
        streaming: read a dataset of the hub as it arrives instead of downloading it first.
        convert: write GIF, BMP, TIFF and AVIF images as PNG, their pixels unchanged, instead of skipping them.
        max_pixels: images with more pixels are not converted.
        require_caption: skip images without a caption that can be read.
        samples_per_shard: samples a shard holds at most.
        shard_bytes: bytes a shard holds at most, unless a single sample has more.
        work_dir: with an ``out`` at a URL, local folder below which a shard lies until it is sent; null for
            ``afresh`` in the user's cache folder (``$XDG_CACHE_HOME``, ``~/.cache``).
    """

    src: list[str] = field(default_factory=list)
    out: str = ""
    kind: Literal["auto", "folder", "dataset", "parquet"] = "auto"
    caption_field: str = ""
    caption_lines: bool = False
    text_column: str | None = None
    image_column: str | None = None
    image_root: str | None = None
    split: str | None = None
    subset: str | None = None
    streaming: bool = False
    convert: bool = False
    max_pixels: int = 64_000_000
    require_caption: bool = False
    samples_per_shard: int = 1000
    shard_bytes: int = 256_000_000
    work_dir: str | None = None


@dataclass
class DedupConfig:
    """Settings of ``curate dedup``.

    Args:
        shards: tar shards: paths, folders, globs, brace ranges or fsspec URLs.
        out: local folder or fsspec URL for the result: ``shards/``, ``ledger.parquet``, ``index/``, ``report.html``,
            ``summary.json``; ``work/`` beside them is a cache that may be deleted.
        image_embedder: ``layout`` (needs no weights), ``copy-detector``, a TorchScript file such as SSCD's, or an image
            tower by its library and its hub name or folder: ``transformers:NAME`` (CLIP, SigLIP, DINOv2),
            ``timm:NAME``, ``open_clip:ARCH/PRETRAINED``. One of your own is ``module:Class``.
        caption_embedder: ``ngrams`` (needs no weights), ``transformers:NAME`` (CLIP's or SigLIP's text tower) or
            ``sentence-transformers:NAME``. Neural ones have scales of their own: choose ``caption_threshold`` by
            looking. One of your own is ``module:Class``.
        threshold: two images with at least this cosine similarity are near, in (0, 1].
        caption_threshold: two captions with at least this similarity are near, in (0, 1].
        min_caption_chars: captions with fewer characters are near only when equal (after normalisation).
        rule: ``greedy`` drops what is near a sample that is kept, so that chains swallow nothing;
            ``components`` keeps one sample of everything that is linked; a rule of your own is ``module:function``, or
            the name of an installed package's (docs/library.md).
        steps: filters before all else, each ``module:function`` of your own or an installed package's by name; each
            sees a sample and says whether it stays. What one leaves out is dropped, its reason ``filter:NAME``.
        against: folders or URLs of other curations: samples whose image, or a near one, stands in one of them are
            dropped (evaluation sets that must not be trained on; batches that were curated before).
        exclude: a list of samples that are dropped whatever else they are, a line ``shard<TAB>key`` each, as ``train
            verdicts`` writes of those that a run's filter left out; empty for none.
        keep: a list like ``exclude`` of samples that are kept whatever else is said of them, by the rule, by a filter,
            by ``max_per_caption`` or by ``against``; copies of them are dropped for them. Empty for none.
        keep_copies: how many near copies of an image may stay; 1 keeps one of each.
        prefer: which of several copies is kept: the first criterion decides, then the next, then input order.
            ``lossless`` prefers PNG, GIF, BMP and lossless WebP to what was compressed with loss (an enlarged
            JPEG copy has the higher resolution, and less to show); ``resolution`` more pixels;
            ``caption_length`` more characters; ``+FIELD`` a higher number in the field FIELD of the samples' ``json``,
            ``-FIELD`` a lower one, as in ``+aesthetic`` (samples without such a number come last).
        on_caption_differs: of images near under different captions, ``pool`` drops the copy and hands its
            caption to the sample that stays; ``keep`` keeps both.
        max_per_caption: how many samples with different images may share one caption; null for any number.
        caption_field: field of the samples' ``json`` that holds the caption, and goes before a ``txt``; empty takes
            ``txt`` (or ``caption``, ``cap``), else the first of the fields ``caption``, ``text``, ``prompt`` and
            ``captions`` that holds text.
        missing_caption: an image without a readable caption is left out as ``unreadable``, or curated by its
            image alone, with an ``empty`` caption; ``auto`` leaves it out, unless no sample of the set has a caption:
            then all are curated by their images alone.
        pixel_hash: whether ``exact_image`` compares the pixels of all images. Otherwise JPEGs of at least four
            times the embedder's size are decoded at a reduced scale, which makes reading nearly twice as fast,
            and compared by their coded data without metadata; copies that were coded anew without loss, or stored
            as another format, are then found as near ones.
        max_pixels: images with more pixels are refused before they are decoded.
        sweep: the summary and the report also say what other thresholds would do, from this much below ``threshold`` to
            this much above; pairs are found down to there. 0 leaves it out.
        write_dropped: write the dropped samples, too, to ``dropped/``, as they came.
        samples_per_shard: samples a written shard holds at most.
        batch_size: images embedded at a time.
        workers: processes; 1 works in this process, 0 takes the CPU cores at hand. The result is the same.
        gpu_share: of a GPU, what a process that embeds images takes where there are GPUs and the embedder is a network:
            1 puts one on each, 0.5 two. Each decodes on threads by its share of the cores.
        join: ``exact`` finds all near pairs; ``cells`` compares only rows of neighbouring k-means cells, for sets that
            are too large for it, and loses a little, which ``recall`` measures; ``auto`` is exact up to two million
            distinct images (and captions).
        join_memory: GB that the exact join may take beside the embeddings and what it finds, and that each task of the
            join within cells may take. With too little of it the embeddings are read several times. The result is the
            same.
        engine: where stages run: ``local`` is this machine's processes, ``ray`` the Ray cluster at ``RAY_ADDRESS``, or
            one that is started here, ``ray:ADDRESS`` that at ``HOST:PORT``, ``auto`` or ``ray://HOST:PORT`` (extra
            ``ray``); one of your own is ``module:Class``. The result is the same, and each goes on where another
            stopped.
        recall_sample: rows on which the recall of the join is measured against exact search.
        seed: of the samples on which recall and the report's histogram are measured.
        work_dir: with an ``out`` at a URL, local folder below which there are the caches (embeddings, a row of text a
            sample, pairs) and the files being written, each until it is sent; null for ``afresh`` in the user's cache
            folder (``$XDG_CACHE_HOME``, ``~/.cache``). A stopped run goes on with the same one.
    """

    shards: list[str] = field(default_factory=list)
    out: str = ""
    image_embedder: str = "layout"
    caption_embedder: str = "ngrams"
    threshold: float = 0.9
    caption_threshold: float = 0.9
    min_caption_chars: int = 12
    rule: str = "greedy"
    steps: list[str] = field(default_factory=list)
    against: list[str] = field(default_factory=list)
    exclude: str = ""
    keep: str = ""
    keep_copies: int = 1
    prefer: list[str] = field(default_factory=lambda: ["resolution", "caption_length"])
    on_caption_differs: Literal["pool", "keep"] = "pool"
    max_per_caption: int | None = None
    caption_field: str = ""
    missing_caption: Literal["auto", "unreadable", "empty"] = "auto"
    pixel_hash: bool = False
    max_pixels: int = 64_000_000
    sweep: float = 0.05
    write_dropped: bool = False
    samples_per_shard: int = 10_000
    batch_size: int = 256
    workers: int = 0
    gpu_share: float = 1.0
    join: Literal["auto", "exact", "cells"] = "auto"
    join_memory: float = 2.0
    engine: str = "local"
    recall_sample: int = 1000
    seed: int = 0
    work_dir: str | None = None


@dataclass
class CheckConfig:
    """Settings of ``curate check``.

    Args:
        shards: tar shards: paths, folders, globs, brace ranges or fsspec URLs.
        caption_field: field of the samples' ``json`` that holds the caption; empty for the usual places, as in
            ``curate dedup``.
        max_pixels: images with more pixels are refused before they are decoded.
        list_at_most: problems listed one by one; all are counted. null lists all.
        workers: processes; 1 works in this process, 0 takes the CPU cores at hand.
    """

    shards: list[str] = field(default_factory=list)
    caption_field: str = ""
    max_pixels: int = 64_000_000
    list_at_most: int | None = 1000
    workers: int = 0


@dataclass
class SearchConfig:
    """Settings of ``curate search``: give ``image`` or ``caption``.

    Args:
        out: folder that ``curate dedup`` wrote, or its URL.
        image: file of an image to search for.
        caption: text to search for among the captions.
        caption_embedder: what captions are compared by, as in ``curate dedup``; a neural one embeds all of them first.
        k: how many samples to show.
    """

    out: str = ""
    image: str | None = None
    caption: str | None = None
    caption_embedder: str = "ngrams"
    k: int = 10


@dataclass
class ReportConfig:
    """Settings of ``curate report``.

    Args:
        out: folder that ``curate dedup`` wrote, or its URL.
    """

    out: str = ""


@dataclass
class ExportConfig:
    """Settings of ``curate export``.

    Args:
        out: folder that ``curate dedup`` wrote, or its URL.
        dest: what to write, and must not exist yet: a folder, or with ``ids`` a file, which is replaced.
        format: ``dataset`` is a Hugging Face dataset as ``save_to_disk`` writes it; ``parquet`` a folder of parquet
            files, which ``load_dataset`` reads too; ``ids`` a sorted list of input samples, ``shard/key`` a line; or
            a folder of images and captions with what a trainer needs to be told of it: ``imagefolder`` (diffusers'
            scripts), ``kohya`` (sd-scripts), ``simpletuner``, ``onetrainer``, ``ai-toolkit`` (docs/trainers.md).
        status: which samples an id list names; the others hold those that were kept.
        file_bytes: image bytes a parquet file holds at most, unless a single image has more.
        repeats_field: field of the samples' ``json`` with how often an epoch shows their image, as ``curate import``
            reads it off folders called ``10_name``; a sample without it, or with less than 1, is seen once.
        concept: what the images show; trainers' folders are called ``10_CONCEPT``, and kohya's trainer takes it for the
            caption of images that have none.
    """

    out: str = ""
    dest: str = ""
    format: Literal[
        "dataset", "parquet", "ids", "imagefolder", "kohya", "simpletuner", "onetrainer", "ai-toolkit"
    ] = "dataset"
    status: Literal["kept", "dropped", "unreadable"] = "kept"
    file_bytes: int = 500_000_000
    repeats_field: str = "repeats"
    concept: str = "images"

