"""What can go wrong, and what to do about it.

    ProbeError
    ├── ConfigError        the request is wrong: an unknown key, a value out of range, a pool too small
    ├── CheckpointError    a checkpoint directory cannot be probed as it is
    ├── PromptError        a dataset or a prompt file cannot be read
    ├── RewardError        a reward function raised, passed a limit, or returned no list of finite numbers
    ├── LossError          a loss function raised, passed a limit, or returned no scalar to differentiate
    ├── StoreError         an artifact is missing, or the store cannot be written
    │   └── UnsoundError   an artifact was found damaged when it was used
    ├── NonFiniteError     a NaN or an infinity appeared; names the sequence
    └── ShortageError      the process may open no more files
        └── MemoryShortageError    one sequence at a time is too much for the device, or a file for the address space

Every message says the fact, the likely cause, and the fix, on one line; a fact that is a list has a line for each
of its entries, set in by two spaces. Names and texts in it may come from anywhere: what a terminal would act on, and
what cannot be encoded, is shown as an escape sequence.
"""

import errno
import os
import re
from collections.abc import Iterable


class ProbeError(Exception):
    """An error a user can act on.

    Args:
        fact: what is wrong, with the names and numbers involved.
        cause: the likely cause; empty where the fact says it all.
        fix: what to do.
    """

    def __init__(self, fact: str, *, cause: str = "", fix: str = "") -> None:
        fact, cause, fix = self.fact, self.cause, self.fix = _visible(fact), _visible(cause), _visible(fix)
        parts = [fact.rstrip(".") + "."]
        if cause:
            parts.append(f"Likely cause: {cause.rstrip('.')}.")
        if fix:
            parts.append(f"Fix: {fix.rstrip('.')}.")
        super().__init__(("\n" if "\n" in fact else " ").join(parts))

    def __reduce__(self):  # keyword arguments must survive a process boundary
        return _rebuild, (type(self), self.fact, self.cause, self.fix), self.__dict__


def _visible(text: str) -> str:
    """Escape what is not printable, and cut long lines; only line breaks before the entries of a list are kept."""
    lines = [line if len(line) <= 2000 else line[:1999] + "…" for line in re.split(r"\n(?=  )", text)]
    return "\n".join("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines)


def _rebuild(kind: "type[ProbeError]", fact: str, cause: str, fix: str) -> ProbeError:
    return kind(fact, cause=cause, fix=fix)


class ConfigError(ProbeError):
    """The request is wrong."""


class CheckpointError(ProbeError):
    """A checkpoint directory cannot be probed as it is."""


class PromptError(ProbeError):
    """A dataset or a prompt file cannot be read."""


class RewardError(ProbeError):
    """A reward function failed, or returned something that is not a list of finite numbers."""


class LossError(ProbeError):
    """A loss function failed, or returned something that is not a finite scalar that can be differentiated."""


class StoreError(ProbeError):
    """An artifact is missing, or the store cannot be written."""


class UnsoundError(StoreError):
    """An artifact was found damaged when it was used; `stage` and `key`, set by whoever raises it, name it."""

    stage: str
    key: str


class NonFiniteError(ProbeError):
    """A NaN or an infinity appeared in a computation."""


class ShortageError(ProbeError):
    """The process ran out of something that it needs to read a file; the file may be sound."""


class MemoryShortageError(ShortageError):
    """A stage does not fit into memory, however small its micro-batches; or a file not into the address space."""


def shortage(error: BaseException) -> ShortageError | None:
    """Tell a shortage of memory or descriptors from a bad file, by the error that reading the file raised.

    Args:
        error: of the system, or of a library that quotes the system's message.

    Returns:
        The error to raise; None where the file may well be to blame.
    """
    said, code = one_line(error), getattr(error, "errno", None)
    no_descriptors = os.strerror(errno.EMFILE), os.strerror(errno.ENFILE)
    no_memory = os.strerror(errno.ENOMEM), "DefaultCPUAllocator", "std::bad_alloc"
    if code in (errno.EMFILE, errno.ENFILE) or any(map(str(error).__contains__, no_descriptors)):
        return ShortageError(
            f"no more files can be opened: {said}",
            cause="a low limit of open files, or many processes that have files open",
            fix="raise the limit (`ulimit -n 4096`), and run again",
        )
    if code == errno.ENOMEM or isinstance(error, MemoryError) or any(map(str(error).__contains__, no_memory)):
        return MemoryShortageError(
            f"there is no memory for a file: {said}",
            cause="a limit of memory or of address space (`ulimit -v`), or other processes that take it",
            fix="raise the limit or free memory, and run again",
        )
    return None


def is_failure(error: BaseException) -> bool:
    """Whether a library failed, be it by a panic in Rust, which is no Exception; or somebody ends the process."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def some_names(names: Iterable[str]) -> str:
    """The first 8 names, and how many more there are, for a message."""
    listed = [name if len(name) <= 200 else name[:199] + "…" for name in names]
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def one_line(error: BaseException) -> str:
    """A library's message on one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"
