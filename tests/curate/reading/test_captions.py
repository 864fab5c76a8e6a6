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
        ({"json": b"[1]"}, "not a JSON object"),
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


@pytest.mark.parametrize(
    ("members", "field", "captions"),
    [
        ({"caption": b"one"}, "", ("one",)),
        ({"cap": b"one", "json": b'{"caption": "two"}'}, "", ("one",)),
        ({"cap": b"two", "TXT": b"one"}, "", ("one",)),
        ({"json": b'{"text": "one"}'}, "", ("one",)),
        ({"json": b'{"caption": null, "prompt": "one"}'}, "", ("one",)),
        ({"json": b'{"caption": "", "text": "two"}'}, "", ()),
        ({"json": b'{"caption": ["one", 2, "three", "one"]}'}, "", ("one", "three")),
        ({"json": b'{"captions": ["one", "two"]}'}, "", ("one", "two")),
        ({"json": b'{"caption": [], "captions": "one"}'}, "", ("one",)),
        ({"txt": b"two", "json": b'{"alt": "one", "caption": "three"}'}, "alt", ("one",)),
        ({"json": b'{"alt": ["one", "two"]}'}, "alt", ("one", "two")),
        ({"txt": b"one", "json": b'{"caption": "three"}'}, "alt", ("one",)),
        ({"txt": b"one", "json": b'{"text": ["two", "one"]}'}, "", ("one", "two")),
        ({"txt": b"one", "json": b'{"text": ["two", "three"]}'}, "", ("one",)),
    ],
)
def test_captions_stand_where_the_fields_tools_put_them(members, field, captions):
    sample = Sample("s.tar", "a", {"jpg": IMAGE, **members}, caption_field=field)
    assert (sample.captions, sample.caption_problem) == (captions, None)


def test_a_field_that_is_named_is_not_replaced_by_another():
    sample = Sample("s.tar", "a", {"jpg": IMAGE, "json": b'{"caption": "one"}'}, caption_field="alt")
    assert sample.caption is None and "no string 'alt'" in sample.caption_problem


@pytest.mark.parametrize(
    ("json_member", "captions"),
    [
        (b'{"afresh": {"captions": ["two", "one", 3]}}', ("one", "two")),
        (b'{"afresh": {"captions": null}}', ("one",)),
        (b'{"afresh": {"captions": "abc"}}', ("one", "abc")),
        (b'{"afresh": {"captions": {"a": 1}}}', ("one",)),
        (b'{"afresh": null}', ("one",)),
        (b'{"afresh": [1]}', ("one",)),
        (b"[" * 200_000 + b"]" * 200_000, ("one",)),
        (b'{"afresh": ' + b"[" * 200_000, ("one",)),
        (b"[]", ("one",)),
        (b'{"n": ' + b"9" * 100_000 + b"}", ("one",)),
        (b"\xff\xfe\xfa", ("one",)),
        (b"", ("one",)),
    ],
)
def test_pooled_captions_are_texts_of_a_list_whatever_stands_there(json_member, captions):
    assert Sample("s.tar", "a", {"jpg": IMAGE, "txt": b"one", "json": json_member}).captions == captions


def test_pooled_captions_beside_a_json_that_is_no_object_count_too():
    members = {"jpg": IMAGE, "txt": b"one", "json": b"[1]", "afresh.json": b'{"captions": ["two"], "duplicates": 1}'}
    sample = Sample("s.tar", "a", members)
    assert sample.captions == ("one", "two") and sample.account["duplicates"] == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_caption_is_read_by_its_byte_order_mark(encoding):
    sample = Sample("s.tar", "a", {"jpg": IMAGE, "txt": "ein Bär\u2028im Wald\n".encode(encoding)})
    assert (sample.caption, sample.caption_problem) == ("ein Bär\u2028im Wald", None)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("un café".encode("cp1252"), "byte 6 is 0xe9: convert it to UTF-8"),
        ("猫と犬".encode("shift_jis"), "convert it to UTF-8"),
        ("words".encode("utf-16-le"), "full of NUL bytes, as UTF-16 without its mark"),
    ],
)
def test_a_caption_in_another_encoding_says_what_to_do(data, reason):
    sample = Sample("s.tar", "a", {"jpg": IMAGE, "txt": data})
    assert sample.caption is None and sample.caption_problem.startswith("caption is not UTF-8: ")
    assert reason in sample.caption_problem and sample.caption_problem.isprintable()
