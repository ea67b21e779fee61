"""Which libraries can change a stage's numbers, and in which releases they are installed.

A release counts by its major and minor number: patches are for mistakes, and `+cpu` or `+cu128` says for which device
torch was built, which is an execution setting like the device itself.
"""

import importlib.metadata
import re
import sys
from collections.abc import Iterable
from functools import cache

ALWAYS = ("torch",)
"""Of every stage: what is computed and what is written passes through it."""
COMPARED: dict[str, tuple[str, ...]] = {
    "datasets": (),
    "numpy": (),
    "peft": (),
    "scipy": ("numpy",),
    "transformers": ("tokenizers", "jinja2", "safetensors"),
}
"""Libraries by the name that is imported, and those that do part of their work. What makes prompts or decides on
rewards (reasoning-gym, math-verify) is not here: where it is used, its exact version is an input of the stage."""


def compared(imported: Iterable[str]) -> dict[str, str]:
    """The releases that a stage's numbers depend on.

    Args:
        imported: top-level packages that its code names.

    Returns:
        Name of the library → major.minor, sorted; empty for one that is not installed.
    """
    named = {name for name in imported if name in COMPARED}
    return {name: release(name) for name in sorted({*ALWAYS, *named, *(of for one in named for of in COMPARED[one])})}


def release(library: str) -> str:
    """Major and minor number of the version that this process has loaded, else of the one that is installed."""
    version = getattr(sys.modules.get(library), "__version__", None) or _installed(library)
    found = re.match(r"\d+(\.\d+)?", str(version))
    return found[0] if found else str(version)


@cache
def _installed(library: str) -> str:
    try:
        return importlib.metadata.version(library.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return ""
