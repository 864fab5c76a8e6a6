"""Captions come from txt or JSON, and one that cannot be read says why."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from curate.reading.captions import MAX_CAPTION_BYTES, MAX_JSON_BYTES, normalise_caption
from curate.reading.samples import Sample
from tests.curate.reading.made_shards import IMAGE, read, tar_bytes


def test_captions_come_from_txt_then_json(tmp_path):
    items = read(
        tmp_path,
        tar_bytes(
            ("a.jpg", IMAGE),
            ("a.txt", "\ufeff ein Bär \n".encode()),
            ("b.jpg", IMAGE),
            ("b.json", b'{"caption": "from json"}'),
            ("c.jpg", IMAGE),
            ("c.txt", b"txt wins"),
            ("c.json", b'{"caption": "not this"}'),
            ("d.jpg", IMAGE),
            ("d.txt", b""),
        ),
    )
    assert [item.caption for item in items] == ["ein Bär", "from json", "txt wins", ""]
    assert all(item.caption_problem is None for item in items)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({}, "neither a txt nor a json"),
        ({"txt": b"\xff\xfe\xfa"}, "not UTF-8"),
        ({"json": b"{"}, "not valid JSON"),
        ({"json": b"[1]"}, "no string 'caption'"),
        ({"json": b'{"caption": 3}'}, "no string 'caption'"),
    ],
)
def test_a_missing_caption_is_told_apart_by_its_reason(members, reason):
    sample = Sample("s.tar", "a", {"jpg": IMAGE, **members})
    assert sample.caption is None
    assert reason in sample.caption_problem


def test_an_empty_caption_is_a_caption_and_byte_order_marks_are_none_of_it():
    marked = {"json": "\ufeff".encode() + json.dumps({"caption": "words"}).encode()}
    for members, caption in (
        ({"txt": b""}, ""),
        ({"txt": b" \r\n"}, ""),
        ({"txt": "\ufeff".encode()}, ""),
        ({"json": b'{"caption": ""}'}, ""),
        (marked, "words"),
        ({"json": json.dumps({"caption": "words"}).encode("utf-16")}, "words"),
    ):
        sample = Sample("s.tar", "a", {"jpg": IMAGE, **members})
        assert (sample.caption, sample.caption_problem) == (caption, None)


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"caption": ' + b"[" * 90_000 + b"]" * 90_000 + b"}",
        b'{"n": ' + b"9" * 100_000 + b"}",
        b'{"caption": "cut',
        b"\xff\xfe\xfa",
        b"",
    ],
)
def test_a_hostile_json_ends_in_a_reason(data):
    sample = Sample("s.tar", "a", {"jpg": IMAGE, "json": data})
    assert sample.caption is None and "json" in sample.caption_problem


def test_a_json_or_caption_of_absurd_size_is_not_read(monkeypatch):
    huge = b'{"caption": "' + b"x" * MAX_JSON_BYTES + b'"}'
    tracemalloc.start()
    sample = Sample("s.tar", "a", {"jpg": IMAGE, "json": huge})
    assert sample.caption is None and f"more than {MAX_JSON_BYTES}" in sample.caption_problem
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    text = b"x" * (MAX_CAPTION_BYTES + 1)
    for members in ({"txt": text}, {"json": json.dumps({"caption": text.decode()}).encode()}):
        sample = Sample("s.tar", "a", {"jpg": IMAGE, **members})
        assert sample.caption is None and f"more than {MAX_CAPTION_BYTES}" in sample.caption_problem


def test_captions_are_normalised():
    assert normalise_caption("  Ｆull\twidth \n CAFE\u0301 straße ") == "full width caf\u00e9 strasse"
