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
    └── MemoryShortageError    one sequence at a time is too much for the device

Every message says the fact, the likely cause, and the fix, on one line; a fact that is a list has a line for each
of its entries.
"""

from collections.abc import Iterable


class ProbeError(Exception):
    """An error a user can act on.

    Args:
        fact: what is so, with the names and numbers involved.
        cause: what usually leads to it; may be empty when the fact says it all.
        fix: what to do.
    """

    def __init__(self, fact: str, *, cause: str = "", fix: str = "") -> None:
        self.fact, self.cause, self.fix = fact, cause, fix
        parts = [fact.rstrip(".") + "."]
        if cause:
            parts.append(f"Likely cause: {cause.rstrip('.')}.")
        if fix:
            parts.append(f"Fix: {fix.rstrip('.')}.")
        super().__init__(("\n" if "\n" in fact else " ").join(parts))

    def __reduce__(self):  # keyword arguments must survive a process boundary
        return _rebuild, (type(self), self.fact, self.cause, self.fix), self.__dict__


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
    """An artifact was found damaged when it was used; whoever says so sets which one."""

    stage: str
    key: str


class NonFiniteError(ProbeError):
    """A NaN or an infinity appeared in a computation."""


class MemoryShortageError(ProbeError):
    """A stage does not fit into memory, however small its micro-batches."""


def some_names(names: Iterable[str]) -> str:
    """The first 8 names, and how many more there are, for a message."""
    listed = list(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def one_line(error: BaseException) -> str:
    """A library's message on one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"
