"""Files are written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from afresh import files


def test_write_atomic_leaves_the_old_file_and_no_remains_when_writing_fails(tmp_path):
    path = tmp_path / "new" / "ledger.json"
    files.write_json(path, {"b": 1, "a": Path("x")})
    assert path.read_text() == '{\n  "a": "x",\n  "b": 1\n}\n'
    with pytest.raises(RuntimeError), files.write_atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert os.listdir(path.parent) == ["ledger.json"] and json.loads(path.read_text()) == {"a": "x", "b": 1}


def test_two_writers_of_one_file_do_not_write_to_one_place(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in two containers, or two threads
    path = tmp_path / "file"
    with files.write_atomic(path) as one:
        one.write_bytes(b"1" * 1000)
        with files.write_atomic(path) as other:
            other.write_bytes(b"2" * 10)
        assert path.read_bytes() == b"2" * 10
    assert path.read_bytes() == b"1" * 1000 and os.listdir(tmp_path) == ["file"]
