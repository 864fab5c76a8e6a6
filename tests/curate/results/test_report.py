"""The report needs nothing but itself, shows captions as text, and stays small."""

from __future__ import annotations

import html.parser
import re

import numpy as np
import pyarrow as pa
import pytest

import curate.results.report_data
from curate.results.ledger import DROP_REASONS, SCHEMA
from curate.results.report_data import (
    CLOSE_CALLS_SHOWN,
    DROPPED_SHOWN,
    GROUPS_SHOWN,
    Pictures,
    around,
    close_calls,
    gallery,
    histogram,
    nearest_similarities,
    thumbnail,
)
from curate.results.report_page import REASONS, SHORT, render

HOSTILE = "<script>alert(1)</script> \"quoted\" & 'so on' {{ 7 * 7 }}"


def row(number: int, group: int | None, size: int | None, status: str = "kept", **fields) -> dict:
    named = {"shard": "s.tar", "key": f"k{number}", "row": number, "caption": f"caption {number}"}
    return {**named, "status": status, "group": group, "group_size": size, **fields}


def table_of(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def summary_of(table: pa.Table, **changes) -> dict:
    status = table["status"].to_pylist()
    counts = {name: status.count(name) for name in ("kept", "dropped", "unreadable")}
    settings = {
        "threshold": 0.9,
        "image_embedder": "layout",
        "prefer": ["resolution"],
        "max_per_caption": None,
    }
    base = {"samples": len(status), **counts, "groups": 1, "recall": 1.0, "reasons": {}, "settings": settings}
    return {**base, **changes}


def nothing_to_show() -> Pictures:
    return Pictures({"counts": [0] * 50, "images": 0}, [], {})


@pytest.fixture
def example(emoji) -> tuple[dict, pa.Table, Pictures]:
    import io

    buffer = io.BytesIO()
    emoji[0][0].save(buffer, "PNG")
    rows = [
        row(0, 0, 3, caption=HOSTILE),
        row(1, 0, 3, "dropped", reason="near_pair", image_similarity=0.93, kept_key="k0", caption=HOSTILE),
        row(2, 0, 3, "dropped", reason="exact_image", image_similarity=1.0, kept_key="k0"),
        row(3, 1, 1),
        row(4, None, None, "unreadable", reason=f"cannot be read {HOSTILE}", key=HOSTILE, caption=None),
    ]
    pictures = Pictures(
        histogram(np.array([0.2, 0.5, 0.95, 1.0, 1.001], dtype=np.float32)),
        [(0, 3, 0.88), (0, 1, 0.93)],
        {number: thumbnail(buffer.getvalue()) for number in range(3)},
    )
    table = table_of(rows)
    return summary_of(table, reasons={"near_pair": 1, "exact_image": 1}), table, pictures


class Tags(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.names.append(tag)
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_startendtag(self, tag, attributes):
        self.names.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_loads_nothing(example):
    text = render(*example)
    tags = Tags(text)
    assert tags.open == []
    assert not {"script", "link", "iframe", "object"} & set(tags.names)
    assert tags.links and all(link.startswith("data:image/webp;base64,") for link in tags.links)
    assert not re.search(r"https?://", text)


def test_captions_keys_and_reasons_are_shown_as_text(example):
    text = render(*example)
    assert "<script>alert" not in text
    assert text.count("&lt;script&gt;alert(1)") >= 4
    assert "{{ 7 * 7 }}" in text


def test_what_steers_a_readers_view_is_shown_and_not_done():
    steering = "a\x1b[2J\x00 \u202edesrever\x07\x9b"
    rows = [
        row(0, 0, 2, caption=steering, shard=steering, key=steering),
        row(1, 0, 2, "dropped", reason="exact_image", kept_key="k0", caption=steering),
        row(2, None, None, "unreadable", reason=f"cannot be read {steering}", key=steering, caption=None),
    ]
    table = table_of(rows)
    text = render(summary_of(table, reasons={"exact_image": 1}), table, Pictures(histogram(np.empty(0)), [], {}))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    assert r"\x1b[2J\x00" in text and r"\u202edesrever" in text


def test_the_recall_of_the_join_is_not_said_to_be_all_duplicates(example):
    text = render(*example)
    assert "of near pairs found" not in text and "recall of the search for pairs, not of copies" in text


def test_the_curve_of_thresholds_begins_at_zero(example):
    summary, table, pictures = example
    sweep = [
        {"threshold": threshold, "kept": kept, "dropped": 0, "groups": 0}
        for threshold, kept in ((0.85, 231), (0.9, 241), (0.95, 251))
    ]
    text = render({**summary, "sweep": sweep}, table, pictures)
    assert "Samples kept, from 0 to 251" in text
    (line,) = re.findall(r'<polyline points="([^"]+)"', text)
    heights = [330 - float(point.split(",")[1]) for point in line.split()]
    assert heights == pytest.approx([320 * kept / 251 for kept in (231, 241, 251)], abs=0.01)


def test_the_page_says_what_was_dropped_why_and_how_near(example):
    text = render(*example)
    for words in (
        "Near image and caption",
        "Identical image",
        "0.930 image + caption",
        "threshold 0.9",
        "0.880",
    ):
        assert words in text
    assert text == render(*example)


def test_every_reason_has_its_words():
    assert set(REASONS) == set(SHORT) == set(DROP_REASONS)


def test_a_set_where_nothing_happened_has_a_page():
    table = table_of([row(0, 0, 1)])
    text = render(summary_of(table, groups=0, recall=None), table, nothing_to_show())
    assert "Nothing was dropped" in text and "Every sample could be read" in text
    assert Tags(text).open == []


def test_the_gallery_shows_the_largest_groups_with_the_least_sure_copies_first():
    rows = [row(0, 7, 2), row(1, 7, 2, "dropped", reason="near_pair", image_similarity=0.95), row(2, 1, 1)]
    rows += [row(3, 2, 4, "dropped", reason="exact_image", image_similarity=1.0)]
    rows += [row(4, 2, 4, "dropped", reason="near_pair", image_similarity=0.97)]
    rows += [row(5, 2, 4), row(6, 2, 4, "dropped", reason="near_pair", image_similarity=0.91)]
    rows += [row(7, None, None, "unreadable", reason="broken")]
    assert gallery(table_of(rows)) == [[5, 6, 4, 3], [0, 1]]


def large_table(rows: int) -> pa.Table:
    """A fifth one group of copies, a fifth groups of ten, a fifth unreadable; text as long as it comes."""
    number = np.arange(rows)
    fifth = number * 5 // rows
    group = np.where(fifth == 0, 0, np.where(fifth == 1, number // 10 * 10, number))
    size = np.unique(group, return_inverse=True, return_counts=True)
    readable, dropped = fifth != 4, (fifth < 2) & (group != number)
    reasons = np.array(["exact_image", "near_pair", "near_pair", "r" * 1000], object)[np.where(dropped, number % 3, 3)]
    captions = [f"{'w' * 700}{k // 3}" if k % 50 else None for k in range(rows)]
    names = [f"{'s' * 200}{k}" for k in range(rows)]
    columns = {
        "shard": names,
        "key": names,
        "row": number,
        "status": np.where(readable, np.where(dropped, "dropped", "kept"), "unreadable").tolist(),
        "reason": pa.array(reasons, mask=readable & ~dropped),
        "kept_key": names,
        "image_similarity": pa.array(np.linspace(0.9, 1, rows), pa.float32(), mask=~dropped),
        "group": pa.array(group, mask=~readable),
        "group_size": pa.array(size[2][size[1]], mask=~readable),
        "caption": captions,
    }
    nothing = {name: pa.nulls(rows, kind) for name, kind in zip(SCHEMA.names, SCHEMA.types, strict=True)}
    return pa.table({**nothing, **columns}, schema=SCHEMA)


def test_the_page_is_as_small_for_many_samples_as_for_few():
    sizes = []
    for rows in (5000, 50_000):
        table = large_table(rows)
        groups = gallery(table)
        assert len(groups) == GROUPS_SHOWN and all(len(members) == 1 + DROPPED_SHOWN for members in groups)
        calls = [(k, k + 1, 0.8 + k / 500) for k in range(2 * CLOSE_CALLS_SHOWN)]
        shown = {row for members in groups for row in members} | {row for a, b, _ in calls for row in (a, b)}
        pictures = Pictures(histogram(np.linspace(0, 1, 2000)), calls, dict.fromkeys(shown, bytes(4000)))
        sweep = [{"threshold": 0.85 + k / 100, "kept": rows, "dropped": rows, "groups": rows} for k in range(11)]
        sizes.append(len(render(summary_of(table, groups=rows, sweep=sweep), table, pictures).encode()))
    assert sizes[1] < 2_000_000 and abs(sizes[1] - sizes[0]) < 5000


def test_captions_that_most_samples_share_come_first_with_how_many_stay():
    captions = [*["flag"] * 4, *["a cat"] * 3, *["a dog"] * 3, *["", None] * 3, "once", *["x" * 300] * 2]
    rows = [
        row(number, number, 1, "dropped" if number in (0, 5) else "kept", caption=caption)
        for number, caption in enumerate(captions)
    ]
    rows += [row(len(rows) + k, None, None, "unreadable", reason="r", caption="once") for k in range(9)]
    table = table_of(rows)
    page = render(summary_of(table), table, nothing_to_show())
    listed = re.findall(r'<tr><td>(.*?)</td><td class="num">(\d+)</td><td class="num">(\d+)</td></tr>', page)
    assert listed == [
        ('<span class="soft">(empty)</span>', "6", "6"),
        ("flag", "4", "3"),
        ("a cat", "3", "2"),
        ("a dog", "3", "3"),
        ("x" * 199 + "…", "2", "2"),
    ]


def test_nearest_similarities_are_those_of_exact_search():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 16))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    asked, nearest, similarity = nearest_similarities(rows, 50, seed=1, block=64)
    assert len(asked) == 50 and np.all(np.diff(asked) > 0)
    full = rows.astype(np.float32) @ rows.astype(np.float32).T
    np.fill_diagonal(full, -2)
    assert np.allclose(similarity, full[asked].max(axis=1), atol=1e-6)
    assert np.allclose(full[asked, nearest], similarity, atol=1e-6)
    assert len(nearest_similarities(rows[:20], 50, seed=1)[0]) == 20


def test_close_calls_are_random_pairs_next_to_the_threshold_on_both_sides():
    similarity = np.linspace(0.7, 1.0, 3001, dtype=np.float32)
    one, other = np.arange(3001), np.arange(3001) + 5000
    calls = close_calls(one, other, similarity, 0.9, seed=1)
    below, above = [c for c in calls if c[2] < 0.9], [c for c in calls if c[2] >= 0.9]
    assert len(below) == len(above) == CLOSE_CALLS_SHOWN
    assert min(c[2] for c in below) > 0.9 - 0.021 and max(c[2] for c in above) < 0.9 + 0.021
    assert [c[2] for c in calls] == sorted(c[2] for c in calls)
    assert all(b == a + 5000 and s == pytest.approx(float(similarity[a])) for a, b, s in calls)
    assert calls == close_calls(other, one, similarity, 0.9, seed=1) != close_calls(one, other, similarity, 0.9, seed=2)
    many = np.linspace(0.89, 0.91, 20_001, dtype=np.float32)  # where the nearest ones would all be at the threshold
    spread = [s for _, _, s in close_calls(np.arange(20_001), np.arange(20_001) + 30_000, many, 0.9)]
    assert spread[0] < 0.895 and spread[-1] > 0.905
    both = close_calls(np.array([1, 2]), np.array([2, 1]), np.array([0.95, 0.95], np.float32), 0.9)
    assert both == [(1, 2, pytest.approx(0.95))]
    assert close_calls(one[:0], other[:0], similarity[:0], 0.9) == []


def test_few_of_many_pairs_are_looked_at_for_the_close_calls(monkeypatch):
    monkeypatch.setattr(curate.results.report_data, "BLOCK", 700)
    rng = np.random.default_rng(0)
    for number, spread in ((0, 1), (300, 1), (30_000, 1), (30_000, 20)):
        similarity = (np.round(rng.uniform(-1, 1, number) * 500) / 5000 / spread + 0.9).astype(np.float32)
        one, other = rng.integers(0, 9000, (2, number))
        some = around(similarity, 0.9)
        assert spread > 1 or number < 3000 or len(some) < number / 4
        every = close_calls(one, other, similarity, 0.9, seed=3)
        assert every == close_calls(one[some], other[some], similarity[some], 0.9, seed=3)


def test_the_gallery_is_that_of_all_groups_sorted():
    rng = np.random.default_rng(0)
    for groups in (1, 5, 30, 200):
        group = rng.integers(0, groups, 400)
        sizes = np.bincount(group, minlength=groups)
        rows = [row(number, of, int(sizes[of])) for number, of in enumerate(group.tolist())]
        order = sorted((of for of in range(groups) if sizes[of] > 1), key=lambda of: (-sizes[of], of))
        expected = [np.flatnonzero(group == of)[:DROPPED_SHOWN].tolist() for of in order[:GROUPS_SHOWN]]
        assert gallery(table_of(rows)) == expected


def test_the_gallery_can_be_filtered_by_reason_without_a_script(example):
    text = render(*example)
    for name in ("near_pair", "exact_image"):
        assert f'id="show-{name}" checked' in text and f'data-reason="{name}"' in text
        assert f'main:has(#show-{name}:not(:checked)) figure[data-reason="{name}"]' in text
    assert "show-near_image" not in text


def test_a_histogram_counts_every_similarity_once():
    counts = histogram(np.array([-0.3, 0.0, 0.999, 1.0, 1.002], dtype=np.float32))
    assert counts["images"] == sum(counts["counts"]) == 5
    assert counts["counts"][0] == 2 and counts["counts"][-1] == 3
