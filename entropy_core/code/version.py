"""The version of this code, as a report says it: the release, and a digest of the sources."""

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


@cache
def code_version() -> str:
    """Return the release and the first 12 digits of a digest of the package's sources, which an edit changes."""
    try:
        release = version("entropy-probe")
    except PackageNotFoundError:  # a copy of the sources that is not installed
        release = "(not installed)"
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(PACKAGE).as_posix()}\0{len(content)}\0".encode() + content)
    return f"entropy-probe {release}, sources {digest.hexdigest()[:12]}"
