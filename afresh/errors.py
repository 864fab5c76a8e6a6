"""Errors worth reading: what a job says when its user can mend something, in one line."""

from __future__ import annotations

import errno
import re

NOTHING_LEFT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of files or memory: the next file would fare no better


class UserError(Exception):
    """A failure that its user can mend; the message names the file, sample or option, and what to do.

    The commands print it as one line without a traceback and end with ``exit_code`` (1, or 2 for usage).
    """

    exit_code = 1


class UsageError(UserError):
    """Bad usage or configuration: found before any work is done."""

    exit_code = 2


# Control characters, line and paragraph ends, changes of the writing direction, lone surrogates.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """``text`` with escapes for what would steer a terminal, break a line, or cannot be encoded."""
    return UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], text)


def reason(error: BaseException, *, at_most: int = 300) -> str:
    """What an exception says, in one line, without its class and the path that it was about.

    Of a system's error that is its name; of others the message, whose lines are joined and cut at so many characters
    (some libraries write pages); of an error that says nothing its class.
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:at_most] or type(error).__name__


def of_the_machine(error: BaseException) -> bool:
    """Whether an error tells of the machine, which has no memory or refused a call, and not of what was being decoded.

    Pillow's own errors of malformed images are ``OSError`` too, without a number; so is its word for lacking memory.
    """
    if isinstance(error, OSError):
        return error.errno is not None or str(error).startswith("out of memory")
    return isinstance(error, MemoryError)


def one_line(error: BaseException) -> str:
    """An exception as a command ends with it; what the system refused is named by its path, a defect by its class."""
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([" → ".join(names), error.strerror]) if names else error.strerror
    text = " ".join(str(error).split())
    if not isinstance(error, (UserError, ValueError, TypeError)):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text or type(error).__name__
