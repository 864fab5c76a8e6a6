"""Findings: what was tried, what became of it, and the table of them all."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from afresh.errors import one_line, reason
from afresh.summaries import format_summary

WORKS, DIFFERS, FAILS, ABSENT = "works", "differs", "fails", "not here"


@dataclass(frozen=True)
class Finding:
    """One thing that was tried.

    Attributes:
        part: of the check that it belongs to.
        what: was tried.
        result: works; differs (from the CPU's result, by more than its precision explains); fails; not here.
        detail: what was measured, or why not.
        seconds: that one go takes; None where time is not what counts.
    """

    part: str
    what: str
    result: str
    detail: str = ""
    seconds: float | None = None


class Absent(Exception):
    """What was to be tried is not here, which is no fault."""


def attempt(part: str, what: str, probe: Callable[[], Finding | str]) -> Finding:
    """A probe's finding; what it raises is one, too. A text is the detail of what works."""
    try:
        found = probe()
    except (Absent, ImportError) as error:
        return Finding(part, what, ABSENT, reason(error))
    except Exception as error:  # of any library: a check tells what fails, and goes on
        return Finding(part, what, FAILS, one_line(error))
    return found if isinstance(found, Finding) else Finding(part, what, WORKS, found)


def fastest(work: Callable[[], Any], wait: Callable[[], None], times: int = 3) -> float:
    """Seconds of the fastest of some goes, after one that warms up; ``wait`` returns when the device is done."""
    work()
    wait()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        wait()
        taken.append(time.perf_counter() - start)
    return min(taken)


class Findings(dict[str, Any]):
    """The job's summary: ``findings`` as rows, and ``config``, what to put into one."""

    def __init__(self, findings: Sequence[Finding], config: Mapping[str, Any]) -> None:
        super().__init__(findings=[asdict(one) for one in findings], config=dict(config))
        self.exit_code = int(any(one.result in (FAILS, DIFFERS) for one in findings))

    def view(self, *, colour: bool = False) -> str:
        """The table, and the lines of the config."""
        rows = [{**row, "seconds": _shown(row["seconds"])} for row in self["findings"]]
        return f"{format_summary({'findings': rows})}\n\nFor a config of train finetune:\n\n{self._yaml()}"

    def markdown(self) -> str:
        """The same as a page of Markdown."""
        lines = ["# What this machine can do", "", "| part | what | result | detail | seconds |", "|" + "---|" * 5]
        for row in self["findings"]:
            cells = [*(str(row[name]) for name in ("part", "what", "result", "detail")), _shown(row["seconds"])]
            lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
        return "\n".join([*lines, "", "```yaml", self._yaml(), "```", ""])

    def _yaml(self) -> str:
        return "\n".join(f"{name}: {json.dumps(value)}" for name, value in self["config"].items())


def _shown(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.3g}"
