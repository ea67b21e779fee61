"""What of an artifact is of the size of the policy: whether it is there, how it goes, and how its absence is noticed.

    vectors/           the files; their digests are in the manifest, and count whether or not the files are there
    vectors.dropped    says that they went on purpose; without it, they are lost

Having an artifact takes none of them. So whoever looks one up does not look at them, and who opens them asks before.
"""

import logging
import os
from contextlib import suppress

from entropy_core.files.digests import file_digest
from entropy_core.store.artifact import Artifact
from entropy_core.store.data_files import DROPPED, VECTORS
from entropy_core.store.manifest import temporary_sibling
from entropy_core.store.store import Store

log = logging.getLogger("entropy_probe.store")


def present(artifact: Artifact) -> bool:
    """Whether the vectors of an artifact are there; they may still be damaged."""
    return (artifact.directory / VECTORS).exists() and not (artifact.directory / DROPPED).exists()


def drop(store: Store, artifact: Artifact) -> None:
    """Let the vectors of an artifact go, which stays sound without them.

    Args:
        store: where it is; where nothing can be deleted, they stay.
        artifact: any.
    """
    if not present(artifact):
        return
    try:
        with store.lock(artifact.stage, artifact.key), temporary_sibling(artifact.directory) as temporary:
            (artifact.directory / DROPPED).touch()
            os.rename(artifact.directory / VECTORS, temporary / VECTORS)
    except OSError as error:
        log.warning("the vectors of %s/%s stay where they are: %s", artifact.stage, artifact.key, error)


def require(store: Store, artifact: Artifact) -> bool:
    """Verify the vectors of an artifact; where they are gone or damaged, all of it goes, to be computed anew.

    Args:
        store: where it is.
        artifact: with vectors.

    Returns:
        Whether they can be read.
    """
    directory = artifact.directory
    with store.writing(), store.lock(artifact.stage, artifact.key):
        if present(artifact):
            found, fault = store.check(artifact.stage, artifact.key, file_digest)
            if fault:
                store.quarantine(artifact.stage, artifact.key, fault)
            return found == artifact
        with temporary_sibling(directory) as temporary, suppress(FileNotFoundError):
            os.rename(directory, temporary / artifact.key)
    return False
