"""The folder of one guidance: which images are there, and which are to be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from afresh.errors import UserError, reason
from afresh.files import to_json
from afresh.progress import get_logger
from train.prompts import Prompt
from train.sampling.config import SampleConfig
from train.sampling.job import pictures, shares
from train.sampling.job.drawing import draw_images
from train.sampling.job.records import (
    SAMPLES,
    Task,
    batches,
    check_same,
    read_record,
    save_record,
    summarise,
    write_table,
)
from train.sampling.job.settings import settings_digest
from train.sampling.pipelines.session import Opened

log = get_logger(__name__)


@dataclass
class Folder:
    """The images of one guidance: what is there, and what is to be drawn."""

    config: SampleConfig
    settings: str
    tasks: list[Task]
    records: dict[Task, dict[str, Any]] = field(default_factory=dict)
    made: int = 0
    slowest: float = 0.0
    """Seconds that this process's longest batch took."""

    @classmethod
    def begin(cls, config: SampleConfig, prompts: Sequence[Prompt]) -> Folder:
        """See what the folder holds already.

        Raises:
            UserError: it cannot be written, or holds images of other settings.
        """
        tasks = [
            Task(number, prompt, (config.first_seed if prompt.seed is None else prompt.seed) + i)
            for number, prompt in enumerate(prompts)
            for i in range(config.seeds)
        ]
        folder = cls(config, settings_digest(config), tasks)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder.path}: cannot write there ({reason(error)}): choose another --out") from error
        folder._read(tasks)
        if folder.records:
            log.info(f"{folder.path}: {len(folder.records)} of {len(tasks)} images are there already")
        return folder

    @property
    def path(self) -> Path:
        """Of the folder."""
        return Path(self.config.out)

    @property
    def pending(self) -> list[Task]:
        """What is missing."""
        return [task for task in self.tasks if task not in self.records]

    def _read(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            record = read_record(self.path, task)
            if record is not None:
                check_same(self.path, task, record, self.settings)
                self.records[task] = record

    def draw(self, opened: Opened) -> None:
        """Draw what is missing of this process's share, until that is done or the processes are asked to stop."""
        before = len(self.pending)
        # Shares are of all images, not of those missing: another process may have begun to write by now.
        mine = [task for batch in shares.share(list(batches(self.config, self.tasks))) for task in batch]
        missing = [task for task in mine if task not in self.records]
        if missing:
            for task, image, record in draw_images(self.config, opened, missing):
                record = to_json(record | {"settings": self.settings})
                save_record(self.path, task, image, record)
                self.records[task] = record
                self.slowest = max(self.slowest, record["seconds"] * self.config.batch_size)
        self.made = before  # by all processes, once all are done

    def collect(self) -> None:
        """Wait for what the other processes draw.

        Raises:
            UserError: they have stopped writing.
        """

        def missing() -> int:
            self._read(self.pending)
            return len(self.pending)

        if shares.process()[1] > 1:
            shares.wait_for(missing, max(shares.PATIENCE, 10 * self.slowest))
        self.made -= len(self.pending)

    def rows(self) -> list[dict[str, Any]]:
        """The records, in order."""
        return [self.records[task] for task in self.tasks]

    def write(self) -> None:
        """The tables and the grid, from the records alone."""
        rows = self.rows()
        write_table(self.path / "samples.parquet", rows, SAMPLES)
        trace = [{"file": row["file"], **step} for row in rows for step in row["trace"]]
        write_table(self.path / "trace.parquet", trace)
        lines = [list(group) for _, group in groupby(self.tasks, key=lambda task: task.number)]
        grid = [(line[0].prompt.caption, [self.image(task) for task in line]) for line in lines]
        pictures.draw_grid(self.path / "grid.png", grid)

    def image(self, task: Task) -> Path | None:
        """The file of an image; None if it is withheld."""
        return None if self.records[task].get("withheld") else self.path / task.file

    def summary(self) -> dict[str, Any]:
        """See :func:`~train.sampling.job.job.run_sample`."""
        return {**summarise(self.rows()), "made": self.made, "out": str(self.path)}


