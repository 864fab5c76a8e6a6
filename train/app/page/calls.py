"""How the page calls what stands behind it: errors as one line, images as text, and a place in the queue."""

from __future__ import annotations

import functools
import html
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import gradio as gr
from PIL import Image

from afresh.errors import UserError, one_line, printable
from afresh.pages import picture
from afresh.progress import get_logger

log = get_logger(__name__)
Handler = TypeVar("Handler", bound=Callable[..., Any])
# One model: what needs it waits in one line, whoever asks.
MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
SET: dict[str, Any] = {"concurrency_id": "set", "concurrency_limit": 2, "api_visibility": "private"}


def as_error(error: Exception) -> gr.Error:
    """An exception as the page shows it: one line, escaped; a defect also leaves its traceback in the log."""
    if not isinstance(error, UserError):
        log.error("the page failed", exc_info=error)
    return gr.Error(html.escape(printable(one_line(error))[:500]), print_exception=False, duration=8)


def told(handler: Handler) -> Handler:
    """A handler whose exceptions are told to its client in one line."""
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def stream(*arguments: Any, **named: Any) -> Iterator[Any]:
            try:
                yield from handler(*arguments, **named)
            except Exception as error:
                raise as_error(error) from None

        return stream  # type: ignore[return-value]

    @functools.wraps(handler)
    def once(*arguments: Any, **named: Any) -> Any:
        try:
            return handler(*arguments, **named)
        except Exception as error:
            raise as_error(error) from None

    return once  # type: ignore[return-value]


def shown(image: Image.Image | None, largest: int = 256) -> str | None:
    """An image as a data URL, small ones enlarged; None of none."""
    if image is None:
        return None
    if max(image.size) * 2 <= largest:
        factor = largest // max(image.size)
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    return picture(image, largest)


def client(request: gr.Request | None) -> str:
    """Who asks: a tab of a browser."""
    return (request.session_hash or "somebody") if request is not None else "somebody"
