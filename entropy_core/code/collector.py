"""When Python's garbage collector has to wait."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection(of_lasting: bool = False) -> Iterator[None]:
    """Context that makes many objects and leaves no garbage, such as an import or the tree of a module.

    The collector would go through all of them again and again: half of the time.

    Args:
        of_lasting: whether what an import leaves stays, so that no later collection goes through it.
    """
    was_on, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if of_lasting and len(sys.modules) > modules:
            gc.freeze()
        if was_on:
            gc.enable()
