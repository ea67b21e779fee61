"""Recover from damaged artifacts: quarantine them when they are opened, recompute them, and continue the sweep."""

import logging
from collections.abc import Callable
from typing import TypeVar

from entropy_core.errors import UnsoundError
from entropy_core.files.digests import file_digest
from entropy_core.store.store import Store

log = logging.getLogger("entropy_probe.store")

_Result = TypeVar("_Result")


def with_repairs(store: Store, work: Callable[[], _Result]) -> _Result:
    """Call `work`; if it opens a damaged artifact, quarantine the artifact and call `work` again.

    Args:
        store: the store of the artifacts.
        work: a function that gets all of its artifacts from the store, so that a repeated call reuses them.

    Returns:
        The return value of `work`.

    Raises:
        UnsoundError: a damaged artifact cannot be quarantined, or the same artifact was damaged twice.
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
