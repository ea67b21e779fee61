"""When Python's garbage collector has to wait."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection(of_lasting: bool = False) -> Iterator[None]:
    """Context that makes many objects and leaves no garbage, such as an import or the tree of a module.

    The collector would go through all of them again and again: half of the time.

    Args:
        of_lasting: whether what is there at the end stays, so that no later collection goes through it.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if of_lasting:
            gc.freeze()
        if was_on:
            gc.enable()
