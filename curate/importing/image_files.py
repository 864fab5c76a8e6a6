"""Image files as samples without an import: those of a folder, those of a list of paths, and images in memory."""

from __future__ import annotations

import io
import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from afresh.errors import UsageError, of_the_machine, reason
from curate.config import ImportConfig
from curate.importing.folders import Folder
from curate.importing.layouts import IMAGE_SUFFIXES
from curate.importing.members import sample_members
from curate.importing.rows import Content, RowError, filesystem_of, opened, printable, read_image
from curate.importing.sidecars import read_beside
from curate.reading.samples import BadSample, Sample

if TYPE_CHECKING:
    from PIL.Image import Image

UNREADABLE = "unreadable_image"


class ImageFile(NamedTuple):
    """An image file below a folder.

    Attributes:
        name: its path there.
        text: of the ``.txt`` beside it, None where there is none.
        table: of the ``.json`` beside it, likewise.
        caption: given with it, instead of what stands beside it.
        problem: why it cannot be read, where that is known from the listing.
        surely: whether it is to be reported where it is no image; other files are passed over.
    """

    name: str
    text: str | None = None
    table: str | None = None
    caption: str | None = None
    problem: str | None = None
    surely: bool = True


@dataclass(frozen=True)
class ImageFiles:
    """Image files as samples without a shard, whose keys are ``folder/name``; read as often as it is iterated.

    Formats that shards do not carry (GIF, BMP, TIFF, AVIF) become PNG, as by ``curate import --convert true``.

    Args:
        folder: a local folder or URL; empty where the names are whole paths or URLs.
        files: in this order.
        max_pixels: images with more pixels are not converted.
    """

    folder: str
    files: tuple[ImageFile, ...]
    max_pixels: int

    def __iter__(self) -> Iterator[Sample | BadSample]:
        config = ImportConfig(convert=True, max_pixels=self.max_pixels)
        for file in self.files:
            key = printable(posixpath.join(self.folder, file.name))
            try:
                yield Sample("", key, sample_members(key, self._content(file, config), config)[0])
            except RowError as error:
                if file.surely or not str(error).startswith("not an image"):
                    yield BadSample("", key, str(error), UNREADABLE)

    def _content(self, file: ImageFile, config: ImportConfig) -> Content:
        if file.problem is not None:
            raise RowError(file.problem)
        filesystem, root = filesystem_of(self.folder or file.name)
        with opened(filesystem, posixpath.join(root, file.name) if self.folder else root) as opened_file:
            image = read_image(opened_file)
        if file.caption is not None:
            return Content(image, file.caption.encode("utf-8", "replace"), None, {})
        caption, problem, fields = read_beside(filesystem, root, file.text, file.table, config.caption_field)
        return Content(image, caption, problem, fields)


def files_of(folder: str) -> list[ImageFile]:
    """The image files of a folder, local or at a URL, at any depth, sorted by path; captions stand beside them.

    Hidden files are passed over, and so are others that are no images, by their suffix and their first bytes.

    Raises:
        UsageError: it is no folder, or holds nothing.
    """
    found = Folder(folder, ImportConfig(src=[folder]), metadata=False)
    files = [
        ImageFile(name, *found.beside(name), surely=name.lower().endswith(IMAGE_SUFFIXES)) for name in found.images
    ]
    return files + [ImageFile(entry.name, problem=entry.problem) for entry in found.problems]


@dataclass(frozen=True)
class Given:
    """Images in memory, and paths among them, as samples; iterated once if ``images`` can be.

    Keys are the paths, and for images in memory their number, from 0.
    """

    images: Iterable[Image | str | os.PathLike[str]]
    captions: Sequence[str | None] | None
    max_pixels: int

    def __iter__(self) -> Iterator[Sample | BadSample]:
        number = -1
        for number, image in enumerate(self.images):
            if self.captions is not None and number >= len(self.captions):
                raise UsageError(f"captions: there are {len(self.captions)} of them, and more images")
            caption = None if self.captions is None else self.captions[number]
            if isinstance(image, (str, os.PathLike)):
                yield from ImageFiles("", (ImageFile(os.fspath(image), caption=caption),), self.max_pixels)
            else:
                yield self._in_memory(number, image, caption)
        if self.captions is not None and number + 1 < len(self.captions):
            raise UsageError(f"captions: there are {len(self.captions)} of them, and {number + 1} images")

    def _in_memory(self, number: int, image: Image, caption: str | None) -> Sample | BadSample:
        text = {} if caption is None else {"txt": caption.encode("utf-8", "replace")}
        try:
            return Sample("", str(number), {"png": _png(number, image), **text})
        except (OSError, ValueError) as error:  # of an image that was opened and not yet read
            if of_the_machine(error) and not isinstance(error, FileNotFoundError):
                raise
            return BadSample("", str(number), f"image cannot be decoded: {reason(error)}", UNREADABLE)


def _png(number: int, image: Image) -> bytes:
    """The pixels of an image as they would be seen in its file."""
    from PIL import Image as images

    from curate.reading.images import as_seen
    if not isinstance(image, images.Image):
        raise UsageError(f"item {number} is a {type(image).__name__}: expected PIL images or paths of image files")
    buffer = io.BytesIO()
    as_seen(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
