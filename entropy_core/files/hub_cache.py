"""Models and datasets in the hub cache of this machine, by their names; never the network."""

import re
from pathlib import Path
from typing import Literal

_NAME = re.compile(r"(?=.{1,96}$)[A-Za-z0-9][\w.-]*(/[\w.-]+)?")  # the hub takes no longer ones, nor a file system
_LONGEST_REVISION = 200


def cached_snapshot(name: str, kind: Literal["models", "datasets"], revision: str = "main") -> Path | None:
    """The snapshot of a repository in the hub cache.

    Args:
        name: on the hub, such as `owner/name`.
        kind: of repository.
        revision: a branch, a tag or a commit.

    Returns:
        The folder with its files; None where the cache does not have it.
    """
    from huggingface_hub import constants

    if not _NAME.fullmatch(name) or ".." in revision or len(revision) > _LONGEST_REVISION:
        return None
    folder = Path(constants.HF_HUB_CACHE) / f"{kind}--{name.replace('/', '--')}"
    found = folder / "snapshots" / commit_of(folder, revision)
    return found if found.is_dir() else None


def commit_of(folder: Path, revision: str = "main") -> str:
    """The commit that a revision is, in a repository's folder of the cache; the revision itself where it is one."""
    reference = folder / "refs" / revision
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
