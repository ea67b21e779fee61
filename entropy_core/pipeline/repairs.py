"""An artifact that turns out to be damaged when it is opened is set aside and computed anew, and the sweep goes on."""

import logging
from collections.abc import Callable
from typing import TypeVar

from entropy_core.errors import UnsoundError
from entropy_core.files.digests import file_digest
from entropy_core.store.store import Store

log = logging.getLogger("entropy_probe.store")

_Result = TypeVar("_Result")


def with_repairs(store: Store, work: Callable[[], _Result]) -> _Result:
    """Do something that asks the store for all that it needs; again from the start, when some of it was damaged.

    Args:
        store: where the artifacts are.
        work: to be done; what it finds in the store costs nothing the second time.

    Returns:
        What `work` does.

    Raises:
        UnsoundError: an artifact is damaged and cannot be set aside, or was damaged twice.
    """
    seen: set[tuple[str, str]] = set()
    while True:
        try:
            return work()
        except UnsoundError as error:
            name = error.stage, error.key
            if name in seen or store.find(*name, file_digest) is not None:
                raise
            seen.add(name)
            log.info("what was damaged is computed anew, and the rest is found: %s", error.fact)
