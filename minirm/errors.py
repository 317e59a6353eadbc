"""Readable errors: one line that says what is wrong, where, what was expected, and what to do."""

import argparse
import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class InputError(ValueError):
    """The user's input is wrong. The message is one line: what is wrong, where, what was expected, what to do."""


@contextmanager
def refusing(what: str, kinds=Exception, advice: str = "") -> Iterator[None]:
    """Turn exceptions of these kinds into an InputError, `what (reason)advice`, and a full disk into a Stop."""
    try:
        yield
    except kinds as error:  # an OSError's own text names a path, perhaps a temporary one
        if disk_is_full(error):
            raise Stop(disk_full_line(error, what), 3) from None
        raise InputError(f"{what} ({getattr(error, 'strerror', None) or one_line(error)}){advice}") from None


def disk_is_full(error: BaseException | None) -> bool:
    """Whether this error or one of its causes means a full disk. Rust libraries say so only in their messages."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def disk_full_line(error: BaseException, what: str) -> str:
    place = f" ({error.filename})" if getattr(error, "filename", None) else ""
    return f"{what}{place}: no space left on the disk; free some space and run the same command again"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # argparse would print the whole usage
        raise InputError(message)


def one_line(error: Exception | str) -> str:
    """The text of an error in one printable line of at most 300 characters."""
    return printable(" ".join(str(error).split()) or type(error).__name__)[:300]


def printable(text: object) -> str:
    r"""Escape non-printable characters (\n, \x1b): text from outside becomes a line that cannot control a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def shown(value: Any) -> str:
    """A value's type and the beginning of its JSON, for messages about wrong values."""
    text = json.dumps(value, default=str)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


class Stop(Exception):
    """End the run: Stop(readable line, exit code).

    Exit codes: 0, nothing left to do; 3, a fault that recurs unless something changes; 128 + n, stopped by signal n.
    """
