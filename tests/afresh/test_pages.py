"""Pages: texts are escaped, curves are drawn, and an index links what lies below its folder."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from afresh.pages import facts, line_chart, picture, read_lines, title_of, write_index, write_page

NASTY = "<script>alert('x')</script> \x1b[31m \u202e \x00 & \"quoted\""


class Parts(HTMLParser):
    """Tags, attributes and text of a page, as a browser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_data(self, data):
        self.words += data


@pytest.fixture
def template(tmp_path) -> Path:
    path = tmp_path / "t.jinja"
    path.write_text(
        '{% extends "base" %}{% block title %}{{ name }}{% endblock %}'
        '{% block body %}<p title="{{ name }}">{{ name }}</p>{{ curve }}<img src="{{ image }}">{% endblock %}'
    )
    return path


def test_texts_are_escaped_and_nothing_is_loaded_from_elsewhere(tmp_path, template):
    image = picture(Image.new("RGB", (400, 200)))
    write_page(tmp_path / "page.html", template, name=NASTY, curve=line_chart([(0, 1.0)], NASTY), image=image)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Parts(text)
    assert "script" not in page.tags and "<script>alert('x')</script> \\x1b[31m \\u202e \\x00" in page.words
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", text)
    assert [link[:11] for link in page.links] == ["data:image/"]


def test_a_value_that_a_template_names_and_nobody_gave_is_an_error(tmp_path, template):
    import jinja2

    with pytest.raises(jinja2.UndefinedError):
        write_page(tmp_path / "page.html", template, name="x")
    assert not (tmp_path / "page.html").exists()


def test_a_curve_goes_through_its_points_and_breaks_where_there_is_none():
    chart = str(line_chart([(0, 0.0), (50, 2.0), (75, float("nan")), (100, 4.0)], "loss", width=200, height=100))
    lines = [re.findall(r"([\d.]+),([\d.]+)", line) for line in re.findall(r'points="([^"]*)"', chart)]
    assert [len(line) for line in lines] == [2, 2]  # a single point is drawn as a dot
    (left, low), (middle, higher) = lines[0]
    right, high = lines[1][0]
    assert float(left) < float(middle) < float(right) and float(low) > float(higher) > float(high)
    assert ">4</text>" in chart and ">100</text>" in chart
    assert "nothing to show" in line_chart([(0, float("nan"))], "loss")


def test_an_index_links_the_pages_below_its_folder(tmp_path):
    for name, title in {"b/report.html": "Two & <more>", "a run/report.html": "One", ".hidden/x.html": "no"}.items():
        (tmp_path / name).parent.mkdir()
        escaped = title.replace("&", "&amp;").replace("<", "&lt;")
        (tmp_path / name).write_text(f"<html><head><title>{escaped}</title></head></html>")
    (tmp_path / "b" / "bare.html").write_text("<p>no title</p>")
    assert write_index(tmp_path) == ["a run/report.html", "b/report.html"]
    assert write_index(tmp_path) == ["a run/report.html", "b/report.html"]  # not itself
    page = Parts((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert page.links == ["a%20run/report.html", "b/report.html"] and "Two & <more>" in page.words
    assert title_of(tmp_path / "b" / "report.html") == "Two & <more>"


def test_a_line_that_is_still_being_written_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_lines(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 2}]
    assert read_lines(tmp_path / "none.jsonl") == []


def test_facts_are_numbers_and_texts_alone():
    assert facts({"samples_seen": 12345, "loss": 0.123456, "rows": [1], "none": None, "out": "x"}) == [
        ("samples seen", "12,345"), ("loss", "0.1235"), ("out", "x")
    ]  # fmt: skip
