"""The table of odd archives, pictures, captions and jsons: what each is, and which of its samples can be used.

Most rows are a sample called ``odd`` between two good ones, ``good`` and ``last``, made by :func:`sample`; rows about
archives are bytes. To add one, add a line: who reads shards is held to it (``test_agreement.py``).
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import struct
import tarfile
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from curate.reading.captions import MAX_CAPTION_BYTES, MAX_JSON_BYTES
from tests.curate.reading.made_images import chunk, encode, gradient, png
from tests.curate.reading.made_shards import special, tar_bytes

PICTURE = gradient()
JPEG, PNG = encode(PICTURE, "JPEG"), encode(PICTURE, "PNG")
WORDS = b"words that say something"
JPG, TXT = ("odd.jpg", JPEG), ("odd.txt", WORDS)
GOOD = (("good.jpg", JPEG), ("good.txt", WORDS))
LAST = (("last.png", PNG), ("last.txt", b"other words than these"))


@dataclass(frozen=True)
class Odd:
    """An archive, and the keys of the samples in it that can be used, each as often as it can."""

    data: bytes
    usable: tuple[str, ...]


def between(*members: tuple[str, bytes] | tarfile.TarInfo, usable: tuple[str, ...] = (), **options) -> Odd:
    """Members between two good samples; ``usable`` are the keys among them that can be used."""
    return Odd(tar_bytes(*GOOD, *members, *LAST, **options), ("good", *usable, "last"))


def sample(usable: bool = True, **members: bytes) -> Odd:
    """A sample by its extensions (``afresh__json`` is ``afresh.json``)."""
    named = [(f"odd.{ext.replace('__', '.')}", data) for ext, data in members.items()]
    return between(*named, usable=("odd",) if usable else ())


def captioned(usable: bool, **members: bytes) -> Odd:
    """A sample with a good picture and these members, one of which may hold its caption."""
    return sample(usable, jpg=JPEG, **members)


def pictured(usable: bool, ext: str, data: bytes) -> Odd:
    """A sample with a good caption and this picture."""
    return sample(usable, **{ext: data, "txt": WORDS})


def as_json(**fields: object) -> bytes:
    return json.dumps(fields).encode()


WHOLE = tar_bytes(*GOOD, *LAST)
CONTENT = len(tar_bytes(*GOOD, *LAST).rstrip(b"\0")) // 512 * 512 + 512  # up to the end-of-archive block
FIRST = CONTENT - sum(512 + -(-len(data) // 512) * 512 for _, data in LAST)


def damaged(at: int) -> bytes:
    return WHOLE[:at] + b"?" * 100 + WHOLE[at + 100 :]


def turned(ext: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(PICTURE, ext, exif=exif)


def sparse() -> tarfile.TarInfo:
    return special("odd.bin", tarfile.GNUTYPE_SPARSE)


LONG = (("ö" * 120 + ".jpg", JPEG), ("ö" * 120 + ".txt", WORDS))
STEERING = "\x1b[2J\u202eodd"
FOLDER = special("folder", tarfile.DIRTYPE)
ARCHIVES = {
    "empty file": Odd(b"", ()),
    "empty archive": Odd(tar_bytes(), ()),
    "zeros alone": Odd(bytes(100_000), ()),
    "only a folder": Odd(tar_bytes(FOLDER), ()),
    "no archive": Odd(b"plainly no archive" * 99, ()),
    "cut in a caption": Odd(WHOLE[: CONTENT - 500], ("good",)),
    "cut in a picture": Odd(WHOLE[: FIRST + 600], ("good",)),
    "cut in a header": Odd(WHOLE[: FIRST + 100], ("good",)),
    "cut between two members": Odd(WHOLE[: CONTENT - 1024], ("good",)),
    "cut between two samples": Odd(WHOLE[:FIRST], ("good",)),
    "without its end": Odd(WHOLE[:CONTENT], ("good", "last")),
    "one block at its end": Odd(WHOLE[: CONTENT + 512], ("good", "last")),
    "second half zeros": Odd(WHOLE[:FIRST] + bytes(40_000), ("good",)),
    "zeros behind its end": Odd(WHOLE + bytes(40_000), ("good", "last")),
    "a record of zeros behind its end": Odd(WHOLE + bytes(10_240), ("good", "last")),
    "joined by cat": Odd(WHOLE + tar_bytes(("x.jpg", JPEG), ("x.txt", WORDS)), ("good", "last")),
    "a broken header": Odd(damaged(FIRST), ("good",)),
    "a broken first header": Odd(damaged(0), ()),
    "gzip": Odd(gzip.compress(WHOLE), ("good", "last")),
    "bzip2": Odd(bz2.compress(WHOLE), ("good", "last")),
    "xz": Odd(lzma.compress(WHOLE), ("good", "last")),
    "gzip, its end cut": Odd(gzip.compress(WHOLE)[:-4], ("good", "last")),
    "gzip, its checksum another": Odd(gzip.compress(WHOLE)[:-8] + bytes(8), ("good", "last")),
    "ustar": between(format=tarfile.USTAR_FORMAT),
    "pax": between(
        ("ö" * 120 + ".jpg", JPEG), ("ö" * 120 + ".txt", WORDS), usable=("ö" * 120,), format=tarfile.PAX_FORMAT
    ),
    "gnu long names": between(
        ("n" * 150 + ".jpg", JPEG), ("n" * 150 + ".txt", WORDS), usable=("n" * 150,), format=tarfile.GNU_FORMAT
    ),
    "a global header": Odd(
        tar_bytes(*GOOD, *LAST, format=tarfile.PAX_FORMAT, pax_headers={"comment": "x"}), ("good", "last")
    ),
    "a name too long": between((f"{'n' * 5000}.jpg", JPEG)),
    "a name that is not UTF-8": between(("odd\udcff.jpg", JPEG), ("odd\udcff.txt", WORDS)),
    "an absolute name": between(("/etc/odd.jpg", JPEG)),
    "a name that leads outside": between(("../odd.jpg", JPEG)),
    "a drive": between(("C:\\odd.jpg", JPEG)),
    "a symbolic link": between(JPG, special("odd.txt", tarfile.SYMTYPE, "good.txt")),
    "a hard link": between(special("odd.jpg", tarfile.LNKTYPE, "good.jpg"), TXT),
    "a device": between(special("odd.jpg", tarfile.CHRTYPE), TXT),
    "a pipe": between(special("odd.jpg", tarfile.FIFOTYPE), TXT),
    "a sparse file": between(JPG, TXT, sparse()),
    "folders between": between(
        FOLDER, ("folder/odd.jpg", JPEG), FOLDER, ("folder/odd.txt", WORDS), usable=("folder/odd",)
    ),
    "a file without an extension": between(("README", b"?")),
    "one within a sample": between(JPG, ("README", b"?"), TXT, usable=("odd",)),
    "made on a Mac": between(("._odd.jpg", b"?"), JPG, ("._odd.txt", b"?"), TXT, usable=("odd",)),
    "zipped on a Mac before": between(("__MACOSX/odd.jpg", b"?"), JPG, (".DS_Store", b"?"), TXT, usable=("odd",)),
    "from Windows": between(JPG, ("Thumbs.db", b"?"), TXT, usable=("odd",)),
    "a key twice": between(JPG, TXT, JPG, TXT, usable=("odd",)),
    "members apart": between(
        JPG,
        TXT,
        ("x.jpg", JPEG),
        ("x.txt", WORDS),
        ("odd.json", b"{}"),
        usable=("odd", "x"),
    ),
    "one extension in two cases": between(JPG, TXT, ("odd.JPG", JPEG), usable=("odd",)),
    "capital letters": between(("odd.JPG", JPEG), ("odd.TXT", WORDS), usable=("odd",)),
    "a key in a folder": between(("a/b/odd.jpg", JPEG), ("a/b/odd.txt", WORDS), usable=("a/b/odd",)),
    "a folder with a dot": between(("a.b/odd.jpg", JPEG), ("a.b/odd.txt", WORDS), usable=("a.b/odd",)),
    "a key with spaces": between((" odd one.jpg", JPEG), (" odd one.txt", WORDS), usable=(" odd one",)),
    "a key that steers": between((f"{STEERING}.jpg", JPEG), (f"{STEERING}.txt", WORDS), usable=(STEERING,)),
    "a key with a line end": between(("o\ndd.jpg", JPEG), ("o\ndd.txt", WORDS), usable=("o\ndd",)),
    "a zip": Odd(b"PK\3\4" + bytes(600), ()),
    "a key that was cut at a dot": between(("22.5cm_a.jpg", JPEG), ("22.5cm_a.txt", WORDS)),
    "an absolute name within a sample": between(JPG, ("/etc/x", b"?"), TXT, usable=("odd",)),
    "a Mac's doubles alone": between(("._odd.jpg", JPEG), ("._odd.txt", WORDS)),
    "an extension with a dot": between(("odd.left.jpg", JPEG), TXT),
}

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
TEXT_OF_XMP = b"XML:com.adobe.xmp\0\0\0\0\0" + XMP
PROGRESSIVE = encode(PICTURE, "JPEG", progressive=True)
DEEP = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40))
WIDE = png(100_000, 100_000, 8, 0, b"")
ANIMATED = [PICTURE, PICTURE.rotate(90)]
PICTURES = {
    "jpeg, progressive": pictured(True, "jpg", PROGRESSIVE),
    "jpeg, grey": pictured(True, "jpg", encode(PICTURE.convert("L"), "JPEG")),
    "jpeg, cmyk": pictured(True, "jpg", encode(PICTURE.convert("CMYK"), "JPEG")),
    "jpeg, on its side": pictured(True, "jpg", turned("JPEG")),
    "jpeg, cut": pictured(False, "jpg", JPEG[: len(JPEG) // 2]),
    "jpeg, its head alone": pictured(False, "jpg", JPEG[:20]),
    "jpeg, without its end marker": pictured(True, "jpg", JPEG[:-2]),
    "jpeg, bytes behind its end": pictured(True, "jpg", JPEG + b"behind"),
    "jpeg, a thousand scans": pictured(
        False, "jpg", encode(PICTURE, "JPEG", progressive=True)[:-2] + b"\xff\xda" * 1000
    ),
    "jpeg, a broken profile": pictured(True, "jpg", encode(PICTURE, "JPEG", icc_profile=b"no profile")),
    "jpeg under png": pictured(True, "png", JPEG),
    "mpo": pictured(True, "jpg", encode(PICTURE, "MPO", save_all=True, append_images=[PICTURE])),
    "png, two colours": pictured(True, "png", encode(PICTURE.convert("1"), "PNG")),
    "png, a palette": pictured(True, "png", encode(PICTURE.convert("P"), "PNG", transparency=0)),
    "png, grey with alpha": pictured(True, "png", encode(PICTURE.convert("LA"), "PNG")),
    "png, alpha": pictured(True, "png", encode(PICTURE.convert("RGBA"), "PNG")),
    "png, 16 bits": pictured(True, "png", encode(DEEP, "PNG")),
    "png, 16 bits and a clear one": pictured(
        True, "png", png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 1000, 30000), (b"tRNS", struct.pack(">H", 1000)))
    ),
    "jpeg, progressive, without its end marker": pictured(True, "jpg", PROGRESSIVE[:-2]),
    "jpeg, progressive, without its last scan": pictured(False, "jpg", PROGRESSIVE[: PROGRESSIVE.rindex(b"\xff\xda")]),
    "jpeg, on its side by XMP": pictured(True, "jpg", encode(PICTURE, "JPEG", xmp=XMP)),
    "webp, on its side by XMP": pictured(True, "webp", encode(PICTURE, "WEBP", xmp=XMP)),
    "webp, on its side": pictured(True, "webp", turned("WEBP")),
    "png, on its side": pictured(True, "png", turned("PNG")),
    "png, on its side by XMP": pictured(True, "png", PNG[:33] + chunk(b"iTXt", TEXT_OF_XMP) + PNG[33:]),
    "png, on its side, said behind": pictured(True, "png", PNG[:-12] + chunk(b"iTXt", TEXT_OF_XMP) + PNG[-12:]),
    "png, a clear one of 16 greys": pictured(True, "png", png(2, 1, 4, 0, b"\0\x5a", (b"tRNS", b"\0\5"))),
    "png, a long profile": pictured(
        True, "png", PNG[:33] + chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(3_000_000))) + PNG[33:]
    ),
    "png, a broken text": pictured(True, "png", PNG[:33] + chunk(b"tEXt", b"a\0b")[:-1] + b"?" + PNG[33:]),
    "png, without its end": pictured(True, "png", PNG[:-12]),
    "jxl under jpg": pictured(False, "jpg", b"\xff\x0a" + bytes(600)),
    "jxl": sample(False, jxl=b"\xff\x0a" + bytes(600), txt=WORDS),
    "png, long text": pictured(True, "png", PNG[:33] + chunk(b"tEXt", b"note\0" + b"x" * 2_000_000) + PNG[33:]),
    "png, text that grows": pictured(
        True, "png", PNG[:33] + chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(80_000_000))) + PNG[33:]
    ),
    "png, cut": pictured(False, "png", PNG[: len(PNG) // 2]),
    "png, a checksum another": pictured(False, "png", PNG[:29] + b"????" + PNG[33:]),
    "png, animated": pictured(True, "png", encode(ANIMATED[0], "PNG", save_all=True, append_images=ANIMATED[1:])),
    "png, far too large": pictured(False, "png", WIDE),
    "png, no pixels": pictured(False, "png", png(0, 0, 8, 0, b"")),
    "png under jpg": pictured(True, "jpg", PNG),
    "webp": pictured(True, "webp", encode(PICTURE, "WEBP")),
    "webp, lossless": pictured(True, "webp", encode(PICTURE, "WEBP", lossless=True)),
    "webp, animated": pictured(True, "webp", encode(ANIMATED[0], "WEBP", save_all=True, append_images=ANIMATED[1:])),
    "webp, cut": pictured(False, "webp", encode(PICTURE, "WEBP")[:60]),
    "gif under jpg": pictured(True, "jpg", encode(PICTURE.convert("P"), "GIF")),
    "gif, animated": pictured(
        True, "png", encode(ANIMATED[0].convert("P"), "GIF", save_all=True, append_images=ANIMATED[1:])
    ),
    "bmp under png": pictured(True, "png", encode(PICTURE, "BMP")),
    "tiff under jpg": pictured(False, "jpg", encode(PICTURE, "TIFF")),
    "a page under jpg": pictured(False, "jpg", b"<!doctype html><html>404</html>"),
    "a drawing under png": pictured(False, "png", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "a pointer of Git LFS": pictured(
        False, "jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:0"
    ),
    "no bytes": pictured(False, "jpg", b""),
    "zeros": pictured(False, "jpg", bytes(5000)),
    "no picture": sample(False, txt=WORDS),
    "another extension": sample(False, gif=encode(PICTURE.convert("P"), "GIF"), txt=WORDS),
    "two pictures": sample(True, jpg=JPEG, png=PNG, txt=WORDS),
    "two pictures, the first broken": sample(False, jpg=b"?", png=PNG, txt=WORDS),
    "one pixel": pictured(True, "png", encode(Image.new("RGB", (1, 1)), "PNG")),
    "a line": pictured(True, "png", encode(Image.new("RGB", (4000, 1)), "PNG")),
}

CAPTIONS = {
    "empty": captioned(True, txt=b""),
    "white space": captioned(True, txt=b" \r\n\t"),
    "a byte order mark": captioned(True, txt="\ufeffwörds".encode()),
    "UTF-16": captioned(True, txt="wörds".encode("utf-16")),
    "UTF-16 without its mark": captioned(False, txt="words of many letters".encode("utf-16-le")),
    "a legacy code page": captioned(False, txt="wörds".encode("cp1252")),
    "ends of lines": captioned(True, txt=b"one\r\ntwo\rthree\xe2\x80\xa8four"),
    "NUL": captioned(True, txt=b"words of many letters\x00"),
    "what steers": captioned(True, txt="\x1b[2J\u202edesrever".encode()),
    "too long": captioned(False, txt=b"x" * (MAX_CAPTION_BYTES + 1)),
    "none, among others": captioned(False),
    "in .caption": captioned(True, caption=WORDS),
    "in .cap": captioned(True, cap=WORDS),
    "in another member": captioned(False, text=WORDS),
    "a txt that cannot be read, a json that can": captioned(False, txt=b"\xff", json=as_json(caption="words")),
}
JSONS = {
    "caption": captioned(True, json=as_json(caption="words")),
    "text": captioned(True, json=as_json(text="words")),
    "prompt": captioned(True, json=as_json(prompt="words")),
    "a list": captioned(True, json=as_json(captions=["one", "two"])),
    "a list without text": captioned(False, json=as_json(captions=[1, None])),
    "captions that is one": captioned(True, json=as_json(captions="abc")),
    "a number": captioned(False, json=as_json(caption=3)),
    "null": captioned(False, json=as_json(caption=None)),
    "empty": captioned(True, json=as_json(caption="")),
    "no object": captioned(False, json=b'["words"]'),
    "no JSON": captioned(False, json=b"{"),
    "no bytes": captioned(False, json=b""),
    "not UTF-8": captioned(False, json=b'{"caption": "\xff"}'),
    "UTF-16": captioned(True, json=json.dumps({"caption": "words"}).encode("utf-16")),
    "a byte order mark": captioned(True, json="\ufeff".encode() + as_json(caption="words")),
    "half of a pair": captioned(True, json=b'{"caption": "\\ud800 words"}'),
    "a field twice": captioned(True, json=b'{"caption": 1, "caption": "words"}'),
    "a list beside a txt": captioned(True, txt=b"one", json=as_json(text=["two", "one"])),
    "cap beside a json": captioned(True, cap=b"one", json=as_json(caption="two")),
    "no number": captioned(True, json=b'{"caption": "words", "n": NaN}'),
    "a number beyond all": captioned(True, json=b'{"caption": "words", "n": ' + b"9" * 400 + b"}"),
    "too many digits": captioned(False, json=b'{"caption": "words", "n": ' + b"9" * 5000 + b"}"),
    "too many brackets": captioned(False, json=b'{"caption": "words", "n": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "too many brackets beside a txt": captioned(True, txt=WORDS, json=b"[" * 200_000),
    "too large": captioned(False, json=b'{"caption": "words"' + b" " * MAX_JSON_BYTES + b"}"),
    "too large beside a txt": captioned(True, txt=WORDS, json=b" " * (MAX_JSON_BYTES + 1)),
    "an account of null": captioned(True, txt=WORDS, json=as_json(afresh=None)),
    "an account without captions": captioned(True, txt=WORDS, json=as_json(afresh={"captions": None})),
    "an account of one text": captioned(True, txt=WORDS, json=as_json(afresh={"captions": "abc", "duplicates": "x"})),
    "an account beside": captioned(True, txt=WORDS, json=b"[1]", afresh__json=as_json(captions=["x"], duplicates=1)),
}
ODD = {
    f"{kind}, {name}": odd
    for kind, rows in (("archive", ARCHIVES), ("picture", PICTURES), ("caption", CAPTIONS), ("json", JSONS))
    for name, odd in rows.items()
}
