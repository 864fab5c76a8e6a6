"""Explanations to look at: bars for a terminal, and a self-contained page with a strip of words for each prompt.

Both take what :func:`train.memorization.explaining.job.run_explain` returns; every text in it is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from afresh.errors import printable

BAR = 30
RED, SOFT, BOLD, PLAIN = "\x1b[31m", "\x1b[2m", "\x1b[1m", "\x1b[0m"
SPECIALS = {"begin": "begin token", "end": "end token", "padding": "padding, all of it"}
KINDS = {
    "removed": "without “{}”",
    "replaced": "another word for “{}”",
    "control": "without “{}”, the least significant word",
    "instead": "the changed prompt",
}


def terminal_view(row: Mapping[str, Any], *, colour: bool = False) -> str:
    """One explanation as lines: words with bars, the special tokens apart, then what changes do.

    Args:
        row: of ``explanations``.
        colour: use terminal codes.
    """

    def paint(code: str, text: str) -> str:
        return f"{code}{text}{PLAIN}" if colour else text

    first = set(row["change_first"][:3])
    words = [(printable(word["word"]), word["significance"], word["word"] in first) for word in row["words"]]
    specials = [(SPECIALS[kind], value, False) for kind, value in row["specials"].items()]
    width = max((len(name) for name, *_ in words + specials), default=0)
    largest = max((value for _, value, _ in words if value == value), default=0.0)
    lines = [paint(BOLD, printable(row["prompt"])), f"magnitude {row['magnitude']:.3g}; {verdict(row)}"]
    for name, value, strong in words:
        if value != value:
            lines.append(paint(SOFT, f"  {name:<{width}}  behind the model's token limit"))
            continue
        bar = _bar(value, largest)
        lines.append(f"  {name:<{width}}  {value:8.4f}  {paint(RED, bar) if strong else bar}".rstrip())
    lines += [paint(SOFT, f"  {name:<{width}}  {value:8.4f}") for name, value, _ in specials]
    changes = [(_changed(change), change) for change in _sorted(row["changes"])]
    if changes:
        lines.append("magnitude of changed prompts:")
    for name, change in changes:
        lines.append(f"  {change['magnitude']:8.3g} {_share(change, row):>6}  {name}: {printable(change['prompt'])}")
    return "\n".join(lines)


def verdict(row: Mapping[str, Any]) -> str:
    """Whether the prompt is memorized, in words."""
    if row.get("memorized") is None:
        return "whether it is memorized is not known: train detect --calibrate 0.01 finds this model's threshold"
    numbers = f"{row['first_magnitude']:.3g} at the first step, the model's threshold there is"
    numbers = f"{numbers} {row['first_threshold']:.3g}"
    return f"{'memorized' if row['memorized'] else 'not memorized'} ({numbers})"


def _bar(value: float, largest: float) -> str:
    return "█" * round(BAR * value / largest) if largest > 0 else ""


def _changed(change: Mapping[str, Any]) -> str:
    return KINDS[change["kind"]].format(printable(change["word"]))


def _share(change: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    return f"{100 * change['magnitude'] / row['magnitude']:.0f} %" if row["magnitude"] > 0 else "–"


def _sorted(changes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Kinds in the order in which they were tried, each from the lowest magnitude up."""
    kinds = list(dict.fromkeys(change["kind"] for change in changes))
    return sorted(changes, key=lambda change: (kinds.index(change["kind"]), change["magnitude"]))


STYLE = """
:root { --ink: #1d2228; --soft: #68717d; --line: #e3e6ea; --paper: #fff; --tint: 209, 54, 74;
  color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #9aa3ae; --line: #343a42; --paper: #16191d;
  --tint: 255, 107, 125; } }
body { margin: 0 auto; padding: 32px 24px 56px; max-width: 980px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } .soft { color: var(--soft); } p { max-width: 76ch; }
section { border-top: 1px solid var(--line); margin-top: 28px; padding-top: 20px; }
.strip { display: flex; flex-wrap: wrap; gap: 6px; font-size: 20px; }
.strip > span { padding: 4px 8px 3px; border-radius: 6px; background: rgba(var(--tint), var(--weight)); }
.strip small, .specials small { display: block; font-size: 11px; opacity: .8; text-align: center;
  font-variant-numeric: tabular-nums; }
.strip .unseen { text-decoration: line-through; color: var(--soft); }
.strip .point { padding: 4px 2px 3px; }
.specials { display: flex; flex-wrap: wrap; gap: 6px; margin-top: 8px; font-size: 13px; color: var(--soft); }
.specials > span { border: 1px solid var(--line); border-radius: 6px; padding: 3px 8px; }
table { border-collapse: collapse; margin-top: 14px; font-size: 14px; font-variant-numeric: tabular-nums; }
td { padding: 3px 14px 3px 0; vertical-align: top; } td.number { text-align: right; white-space: nowrap; }
td.bar { width: 130px; } td.bar i { display: block; height: 11px; margin-top: 5px; border-radius: 2px;
  background: rgba(var(--tint), .55); }
"""


def render(summary: Mapping[str, Any]) -> str:
    """The page as one string, which loads nothing from elsewhere."""
    rows = summary["explanations"]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>What memorization hangs on</title><style>{STYLE}</style></head><body>",
        "<h1>What memorization hangs on</h1>",
        f'<p class="soft">{_text(summary["model"])}, {summary["steps"]} of {summary["num_inference_steps"]} steps, '
        f"{summary['seeds']} seeds. The stronger the colour, the more the magnitude answers to a word’s embeddings: "
        "change these words first. Special tokens stand apart: they carry the sentence, and change with the words.</p>",
    ]
    for row in rows:
        parts += _section(row)
    parts.append("</body></html>\n")
    return "\n".join(parts)


def _section(row: Mapping[str, Any]) -> list[str]:
    seen = [word["significance"] for word in row["words"] if word["seen"]]
    largest = max(seen, default=0.0)
    parts = ["<section>", '<div class="strip">']
    for word in row["words"]:
        if not word["seen"]:
            parts.append(f'<span class="unseen" style="--weight: 0" title="not seen">{_text(word["word"])}</span>')
            continue
        value = word["significance"]
        weight = value / largest if largest > 0 else 0.0
        pieces = " + ".join(f"{token['token']} {token['significance']:.4f}" for token in word["tokens"])
        point = "" if any(character.isalnum() for character in word["word"]) else ' class="point"'
        parts.append(
            f'<span{point} style="--weight: {0.6 * weight:.3f}" title="{_text(pieces)}">{_text(word["word"])}'
            f"<small>{value:.3f}</small></span>"
        )
    parts += ["</div>", '<div class="specials">']
    parts += [f"<span>{SPECIALS[kind]}<small>{value:.3f}</small></span>" for kind, value in row["specials"].items()]
    parts += ["</div>", f'<p class="soft">{_text(verdict(row)[:1].upper() + verdict(row)[1:])}.</p>', "<table>"]
    lines = [("as it is", row["prompt"], row["magnitude"], "100 %")]
    lines += [(_changed(c), c["prompt"], c["magnitude"], _share(c, row)) for c in _sorted(row["changes"])]
    highest = max(magnitude for *_, magnitude, _ in lines) or 1.0
    for name, prompt, magnitude, share in lines:
        parts.append(
            f'<tr><td class="number">{magnitude:.3f}</td><td class="bar"><i style="width: '
            f'{100 * magnitude / highest:.1f}%"></i></td><td class="number">{share}</td><td>{_text(prompt)}</td>'
            f'<td class="soft">{_text(name)}</td></tr>'
        )
    return [*parts, "</table>", "</section>"]


def _text(value: object) -> str:
    return html.escape(printable(str(value)), quote=True)

