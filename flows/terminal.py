"""What is printed is text, whatever it holds: a terminal obeys nothing that comes from a file.

Names of checkpoints, reasons, rows of tables: they come from runs and stores that may have been made anywhere. What
such a terminal would act on, and what it cannot encode, is shown as an escape sequence, as in `errors`.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO


def plain(text: str) -> str:
    """Escape what is not printable, but for line breaks and tabs."""
    return (
        text if text.isprintable() else "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    )


class PlainFormatter(logging.Formatter):
    """Of log lines that go to a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, as text."""
        return plain(super().format(record))


class _Plain:
    """A stream that is written to in text, and is another one otherwise."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(plain(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def plain_output() -> Iterator[None]:
    """Within the context, what is printed on standard output is `plain`."""
    with redirect_stdout(_Plain(sys.stdout)):
        yield
