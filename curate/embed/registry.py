"""Embedders: images and captions → unit vectors whose inner product is a similarity.

Every image embedder keeps one protocol, :class:`Embedder`: ``embed`` for curation (PIL images, numpy out) and
``features`` for samplers (torch pixels, differentiable). ``load_embedder`` finds one by name:

- ``layout``: weight-free; where light, colour and edges lie. Survives storage, resizing, brightness, frames,
  mirroring, lost colour, mild crops.
- ``copy-detector``: the carried network (``curate/embed/copy_detector.py``); small images, edits of every kind.
- ``luminance``, ``edges``, ``chroma``: weight-free too; the pixels at low resolution, the views of an index
  (``curate/stages/views.py``).
- ``FILE.pt``, ``FILE.torchscript``: a TorchScript file such as SSCD's, at its official preprocessing, the shorter edge
  brought to 288 pixels; ``FILE.pt@320`` squashes images to squares of 320, SSCD's other official way, and
  ``FILE.pt@short224`` brings the shorter edge to 224 (``curate/embed/torch_embedder.py``).
- ``transformers:NAME``, ``timm:NAME``, ``open_clip:ARCH/PRETRAINED``: an image tower of another library, by its hub
  name or folder (``curate/embed/image_towers.py``), prepared as its own files say. A folder is recognised without the
  prefix.
- ``module:Class``: an embedder of one's own, or an installed package's by the name of its entry point in the group
  ``afresh.image_embedders``. Its ``name`` is set to the one that finds it again.

Captions have :class:`CaptionEmbedder` and ``load_caption_embedder``:

- ``ngrams``: weight-free; the same letters in the same order.
- ``transformers:NAME``: the text tower of a CLIP or SigLIP model; ``sentence-transformers:NAME``: a sentence encoder.
- ``module:Class``, or a name of the group ``afresh.caption_embedders``: one of one's own.

Neural embedders run on the GPU where there is one: ``embed`` in half precision there, ``features`` in float32.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from afresh import plugins
from afresh.errors import UsageError, UserError
from curate.embed.layout import LayoutEmbedder
from curate.embed.light import LightEmbedder
from curate.embed.ngrams import NgramEmbedder
from curate.embed.preprocessing import Preprocessing, read_json
from curate.embed.protocol import CaptionEmbedder, Embedder

EMBEDDERS = ("layout", "copy-detector", "luminance", "edges", "chroma")
CAPTION_EMBEDDERS = ("ngrams",)
# By prefix; the extra names what pip installs.
IMAGE_LIBRARIES = ("transformers", "timm", "open_clip")
CAPTION_LIBRARIES = ("transformers", "sentence-transformers")
_TORCHSCRIPT = re.compile(r"(?P<path>.+\.(?:pt|torchscript))(?:@(?P<short>short)?(?P<size>[0-9]+))?")


def load_embedder(name_or_path: str, *, half: bool | None = None) -> Embedder:
    """The embedder of that name (see the head of this module).

    Args:
        name_or_path: which one.
        half: whether ``embed`` of a neural one computes in float16; None does so on a GPU. Vectors are float32, and
            normalised in float32, either way.

    Raises:
        UsageError: no embedder has this name, no file this path; or its library is not installed.
        UserError: the file or folder is there and cannot be used.
    """
    if name_or_path == "layout":
        return LayoutEmbedder()
    if name_or_path in ("luminance", "edges", "chroma"):
        return LightEmbedder(name_or_path)
    if name_or_path == "copy-detector":
        from curate.embed.copy_detector import CopyDetector
        from curate.embed.torch_embedder import TorchEmbedder

        model = CopyDetector.load()
        preprocessing = Preprocessing(model.size)
        return TorchEmbedder("copy-detector", model, dim=model.dim, preprocessing=preprocessing, half=half)
    library, _, source = name_or_path.partition(":")
    if not (library in IMAGE_LIBRARIES and source):
        library, source = "", name_or_path
        if Path(source).expanduser().is_dir():
            library = _recognised(Path(source).expanduser(), captions=False)
    if library:
        from curate.embed.image_towers import load_image_tower

        return load_image_tower(library, source, name=name_or_path, half=half)
    if named := _TORCHSCRIPT.fullmatch(name_or_path):
        from curate.embed.torch_embedder import load_torchscript

        fit: Literal["squash", "shortest"] = "shortest" if named["short"] or not named["size"] else "squash"
        return load_torchscript(name_or_path, named["path"], int(named["size"] or 288), fit, half)
    needs = ("dim", "size", "digest", "embed")  # features, too, where a sampler follows it
    if (own := _own(plugins.IMAGE_EMBEDDERS, name_or_path, "embedder", needs, "Embedder")) is not None:
        return own
    known, libraries = _known(plugins.IMAGE_EMBEDDERS, EMBEDDERS, IMAGE_LIBRARIES)
    raise UsageError(
        f"unknown embedder {name_or_path!r}{_no_module(name_or_path)}: choose {known}, a TorchScript file (*.pt, "
        f"*.torchscript), a model by its library ({libraries}), or your own as module:Class"
    )


def _known(group: str, built_in: Sequence[str], libraries: Sequence[str]) -> tuple[str, str]:
    """What there is to choose, for a message: names, and names by library."""
    return ", ".join([*built_in, *plugins.names(group)]), ", ".join(f"{library}:NAME" for library in libraries)


def _no_module(name: str) -> str:
    module = plugins.missing_module(name)
    return f" (there is no module {module!r})" if module else ""


def _own(group: str, name: str, option: str, needs: tuple[str, ...], protocol: str) -> Any:
    """An embedder of one's own under the name that finds it again; None where there is none of this name."""
    if plugins.missing_module(name):  # of a library that is none of ours, perhaps: what there is to choose helps more
        return None
    own = plugins.make(group, name, option, needs, f"curate.embed.protocol.{protocol}")
    if own is not None:
        try:
            own.name = name
        except AttributeError as error:
            raise UsageError(f"{option} {name!r}: its attribute 'name' cannot be set: {error}") from error
    return own


def _recognised(folder: Path, *, captions: bool) -> str:
    """The library that a model folder is of, by the files in it.

    Raises:
        UserError: none of those that this project loads.
    """
    if captions and (folder / "modules.json").is_file():
        return "sentence-transformers"
    if not captions and (folder / "open_clip_config.json").is_file():
        return "open_clip"
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "model_type" in config:
        return "transformers"
    if not captions and "architecture" in config:
        return "timm"
    libraries = CAPTION_LIBRARIES if captions else IMAGE_LIBRARIES
    raise UserError(
        f"{folder} is no model folder of {', '.join(libraries)}: it has no config.json that tells its model_type"
    )


def load_caption_embedder(name_or_path: str, *, half: bool | None = None) -> CaptionEmbedder:
    """The caption embedder of that name (see the head of this module).

    Args:
        name_or_path: which one.
        half: as in :func:`load_embedder`.

    Raises:
        UsageError: none has this name; or its library is not installed.
        UserError: the folder is there and cannot be used.
    """
    if name_or_path == "ngrams":
        return NgramEmbedder()
    library, _, source = name_or_path.partition(":")
    if not (library in CAPTION_LIBRARIES and source):
        library, source = "", name_or_path
        if Path(source).expanduser().is_dir():
            library = _recognised(Path(source).expanduser(), captions=True)
    if library:
        from curate.embed.text_towers import load_text_tower

        return load_text_tower(library, source, name=name_or_path, half=half)
    needs = ("dim", "digest", "embed")
    own = _own(plugins.CAPTION_EMBEDDERS, name_or_path, "caption embedder", needs, "CaptionEmbedder")
    if own is not None:
        return own
    known, libraries = _known(plugins.CAPTION_EMBEDDERS, CAPTION_EMBEDDERS, CAPTION_LIBRARIES)
    raise UsageError(
        f"unknown caption embedder {name_or_path!r}{_no_module(name_or_path)}: choose {known}, a model by its library "
        f"({libraries}), or your own as module:Class"
    )
