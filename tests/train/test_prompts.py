"""Prompt files: the four formats say the same, and a wrong row is named."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from afresh.errors import UserError
from train.prompts import Prompt, read_prompts, write_prompts

PROMPTS = [
    Prompt("red apple, food fruit", 1, Path("apple.png"), 7),
    Prompt("grinning face", 0),
    Prompt("flag"),
]


def written(folder: Path, kind: str) -> Path:
    path = folder / f"prompts.{kind}"
    if kind == "jsonl":
        path.write_text(
            '{"caption": "red apple, food fruit", "label": 1, "image": "apple.png", "seed": 7}\n\n'
            '{"caption": "grinning face", "label": 0, "other": [1]}\n{"caption": "flag"}\n'
        )
    elif kind == "csv":
        path.write_text(
            'caption,label,image,seed\n"red apple, food fruit",1,apple.png,7\ngrinning face,0,,\nflag,,,\n'
        )
    else:
        rows = {
            "caption": [p.caption for p in PROMPTS],
            "label": [1, 0, None],
            "image": ["apple.png", None, None],
            "seed": [7, None, None],
        }
        parquet.write_table(pa.table(rows), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_tables_of_every_kind_say_the_same(tmp_path, kind):
    prompts = read_prompts(written(tmp_path, kind))
    assert [(p.caption, p.label, p.seed) for p in prompts] == [(p.caption, p.label, p.seed) for p in PROMPTS]
    assert [p.image for p in prompts] == [tmp_path / "apple.png", None, None]


def test_a_text_file_holds_one_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfred apple, food fruit\r\n\r\n  caf\xc3\xa9 \n")
    assert [p.caption for p in read_prompts(path)] == ["red apple, food fruit", "café"]


ODD = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"  # which str.splitlines takes for seven lines


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_lines_end_where_their_format_says_so(kind, encoding, end, tmp_path):
    lines = {"txt": [ODD, "two"], "csv": ["caption,label", f"{ODD},1", "two,0"]}
    lines["jsonl"] = [json.dumps({"caption": caption}, ensure_ascii=False) for caption in (ODD, "two")]
    path = tmp_path / f"p.{kind}"
    path.write_bytes("".join(line + end for line in lines[kind]).encode(encoding))
    assert [prompt.caption for prompt in read_prompts(path)] == [ODD, "two"]


def test_images_may_be_named_as_windows_writes_paths(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").touch()
    (tmp_path / "p.csv").write_text("caption,image\na,sub\\a.png\nb,gone\\b.png\n")
    assert [p.image for p in read_prompts(tmp_path / "p.csv")] == [tmp_path / "sub/a.png", tmp_path / "gone/b.png"]


def test_trailing_commas_lose_nothing(tmp_path):
    (tmp_path / "p.csv").write_text('caption,label,,\n"a, b",1,,\nc,0,,,,\n\n')
    assert [(p.caption, p.label) for p in read_prompts(tmp_path / "p.csv")] == [("a, b", 1), ("c", 0)]


def test_numbers_with_gaps_as_pandas_writes_them_are_read(tmp_path):
    parquet.write_table(
        pa.table({"caption": ["a", "b"], "label": [1.0, float("nan")]}), tmp_path / "p.parquet"
    )
    assert [p.label for p in read_prompts(tmp_path / "p.parquet")] == [1, None]
    (tmp_path / "p.csv").write_text("caption,label\na,1.0\nb,\n")
    assert [p.label for p in read_prompts(tmp_path / "p.csv")] == [1, None]


def test_what_is_written_is_read_back(tmp_path):
    inside, outside = tmp_path / "images" / "apple.png", tmp_path.parent / "elsewhere.png"
    prompts = [Prompt("„apple“", 1, inside, 3), Prompt("b", 0, outside), Prompt(ODD)]
    write_prompts(tmp_path / "p.jsonl", prompts)
    assert read_prompts(tmp_path / "p.jsonl") == prompts
    assert '"image": "images/apple.png"' in (tmp_path / "p.jsonl").read_text()


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("p.yaml", "a", "ends in one of"),
        ("p.txt", "\n\n", "holds no prompt"),
        ("p.txt", b"\xff\xfe", "not UTF-8"),
        ("p.csv", "prompt\na\n", "no column caption, only prompt"),
        ("p.csv", "caption,label\na,1\nb,yes\n", "row 2: label is 'yes', expected a whole number"),
        ("p.jsonl", '{"caption": "a"}\n{"caption": }\n', "line 2 is not JSON"),
        ("p.jsonl", '["a"]\n', "line 1 is not a JSON object"),
        ("p.jsonl", '{"caption": " "}\n', "row 1 has no caption"),
        ("p.jsonl", '{"prompt": "a", "seed": 1}\n', "row 1 has no caption, only prompt, seed: give .* that name"),
        ("p.jsonl", '{"caption": "a", "label": 2}\n', "expected 1 .memorized. or 0"),
        ("p.jsonl", '{"caption": "a", "seed": -1}\n', "seed is -1"),
        ("p.jsonl", '{"caption": "a", "image": 5}\n', "image is 5"),
        ("p.parquet", "not parquet", "not a readable Parquet file"),
        ("p.csv", "caption,label\na,1\na cat, on a mat,1\n", r"row 2 \(line 3\) has 3 values where the header has 2"),
        ("p.csv", "caption,label\na cat\non a mat,1\n", r"row 1 \(line 2\) has 1 values where"),
        ("p.csv", 'caption\n"a cat\na dog\na mouse\n', r"row 1 \(line 4\) cannot be read: unexpected end of data"),
        ("p.csv", "caption,seed,caption\na,1,b\n", "two columns are named 'caption'"),
        ("p.csv", "caption\na\n".encode("utf-16-le"), "NUL bytes, as UTF-16 without its mark"),
        ("p.txt", "un café".encode("cp1252"), "not UTF-8 text: byte 6 is 0xe9: convert it to UTF-8"),
        ("p.jsonl", "[" * 200_000, "line 1 is not JSON"),
    ],
)
def test_a_wrong_file_is_named_with_its_row(tmp_path, name, content, complaint):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=complaint) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such prompt file"):
        read_prompts(tmp_path / "none.txt")
