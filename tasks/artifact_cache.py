"""Prefect's cache, answered by the artifact store.

Prefect asks its result storage for a record under a task's cache key: a record means `Cached`, anything else means
run the task. Here the storage *is* the artifact store. Reading verifies the artifact and makes the record on the
spot; writing does nothing, because the stage has committed its artifact already. So there is no second copy of the
truth: an artifact that was deleted, cut short or altered is recomputed, a moved folder is still `Cached`, and so is
what was computed without Prefect.
"""

from typing import Any

from prefect.cache_policies import CacheKeyFnPolicy, CachePolicy
from prefect.context import TaskRunContext
from prefect.filesystems import WritableFileSystem
from prefect.results import ResultRecord, ResultRecordMetadata

from entropy_core.store.store import Stage, Store


class StoreStorage(WritableFileSystem):
    """A store, seen as Prefect's result storage: cache key `<stage>/<key>` in, verified artifact out.

    Args:
        store: where the artifacts are. Its root is known at run time only, so a task is given its storage per run.
    """

    _block_type_name = "Artifact store"
    store: Any  # a Store; blocks want their fields to have a JSON schema, and this one never leaves the process

    def read_path(self, path: str, **_: Any) -> bytes:  # type: ignore[override]
        """Find an artifact.

        Args:
            path: the cache key, `<stage>/<key>`.

        Returns:
            Prefect's record of it, in Prefect's format. It lives in memory only.

        Raises:
            LookupError: the store has no sound artifact under that key. Prefect takes it as a miss.
        """
        artifact = self.store.find(*path.split("/"))
        if artifact is None:
            raise LookupError(f"no artifact {path}")
        return ResultRecord(result=artifact, metadata=ResultRecordMetadata(storage_key=path)).serialize()

    def write_path(self, path: str, content: bytes, **_: Any) -> None:  # type: ignore[override]
        """Do nothing: the stage has committed its artifact, and failures are kept by Prefect's server."""

    def _resolve_path(self, path: str) -> None:
        """Keep cache keys as they are; they are not file names."""


def cache_policy(stage: Stage, store: Store) -> CachePolicy:
    """The store's key as Prefect's cache key.

    Args:
        stage: the stage that the task runs.
        store: where its artifacts are.

    Returns:
        A policy for a task with a parameter `inputs`. It needs no lock manager: the store's own lock makes the second
        of two writers wait and reuse.
    """

    def cache_key(_: TaskRunContext, parameters: dict[str, Any]) -> str:
        return f"{stage.name}/{store.key(stage, parameters['inputs'])}"

    return CacheKeyFnPolicy(cache_key_fn=cache_key)
