"""The model of the page: opened once, used by one client at a time, and let go at the next evaluation when that client
asks for it.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from afresh.errors import UserError
from train.app.config import AppConfig
from train.denoising.network import network_of
from train.sampling.config import SampleConfig
from train.sampling.pipelines.session import Opened


class StoppedError(UserError):
    """The client asked for it."""


class Bench:
    """A model for many clients.

    Args:
        config: of the page.
    """

    def __init__(self, config: AppConfig) -> None:
        shared = {
            name: getattr(config, name)
            for name in ("model", "revision", "variant", "model_config", "lora", "scale", "dtype", "device")
        }
        self.sampling = SampleConfig(
            prompts="", out="", index=config.curated, steps=config.image_steps, batch_size=1, seeds=1, **shared
        )
        self.opened = Opened(self.sampling, [])
        self._alone = threading.Lock()
        self._asked: dict[str, set[threading.Event]] = defaultdict(set)
        self._registering = threading.Lock()
        self.waiting = 0
        """Clients that wait for the model or have it."""

    @contextmanager
    def alone(self, client: str) -> Iterator[Any]:
        """The pipeline, for nobody else while the block lasts.

        Args:
            client: who may :meth:`stop` it.

        Raises:
            StoppedError: within the block, at the next evaluation of the network after :meth:`stop`.
            UserError: the model cannot be opened.
        """
        stop = threading.Event()

        def look(*_: Any) -> None:
            if stop.is_set():
                raise StoppedError("stopped")

        with self._registering:
            self._asked[client].add(stop)
            self.waiting += 1
        try:
            with self._alone:
                look()
                pipe = self.opened.pipe
                handle = network_of(pipe).register_forward_pre_hook(look)
                try:
                    yield pipe
                finally:
                    handle.remove()
        finally:
            with self._registering:
                self.waiting -= 1
                self._asked[client].discard(stop)
                if not self._asked[client]:
                    del self._asked[client]

    def stop(self, client: str) -> int:
        """Stop what a client has asked for and what it waits for; how much that was."""
        with self._registering:
            asked = list(self._asked.get(client, ()))
        for event in asked:
            event.set()
        return len(asked)
