"""What an exception says at the end of a message: one line, never empty, without the path that the message names."""

from __future__ import annotations

import errno

import pytest

from afresh.errors import reason


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("two\n  lines\tand tabs "), "two lines and tabs"),
        (RuntimeError(), "RuntimeError"),
        (KeyError("  "), "' '"),
        (RuntimeError(" \n"), "RuntimeError"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/a/file"), "No such file or directory"),
        (OSError("no number, as Pillow has it"), "no number, as Pillow has it"),
    ],
)
def test_a_reason_is_one_line_without_the_path(error, text):
    assert reason(error) == text


def test_a_very_long_reason_is_cut():
    said = reason(ValueError("x" * 100_000))
    assert len(said) < 1000
