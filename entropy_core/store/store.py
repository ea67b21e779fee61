"""The store: what each stage computed, kept on disk under a key that says exactly what made it.

    root/<stage>/<key>/     data files, and manifest.json written last: a directory with a manifest is complete
    root/<stage>/.tmp-*     being written, or left by a process that died; never read
    root/.locks/            one lock per key, so that two processes never compute the same thing
    root/.quarantine/       artifacts that were found damaged, moved out of the way; in root/<stage>/.quarantine-* where
                            the stage's folder is on another disk

A result is found again when the stage's code, the releases of the libraries that this names, and its result-affecting
inputs are the same; how it was executed (device, micro-batches, runner) is recorded in the manifest and is no part of
the key. Finding an artifact checks its manifest and the sizes of its files; what is in a file is checked when it is
opened (`Artifact.path`), and only then is it read. Reading never writes, so a store on read-only media serves for
analysis.

`entropy-probe store` lists, verifies, explains, adopts, prunes, exports and imports what is there.
"""

import errno
import logging
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from entropy_core.code.identity import code_of, name_of
from entropy_core.code.library_versions import compared
from entropy_core.errors import StoreError
from entropy_core.files.sources import Stamps, require_untouched
from entropy_core.store import locks
from entropy_core.store.artifact import Artifact, Writer, artifacts_in, canonical, upstream
from entropy_core.store.data_files import check_files
from entropy_core.store.manifest import (
    FORMAT,
    as_json,
    check_manifest,
    commit,
    may_name,
    peak_rss_bytes,
    recipe_key,
    temporary_sibling,
    versions,
)
from entropy_core.store.signature import SignatureError

log = logging.getLogger("entropy_probe.store")

Digest = Callable[[Path], str]

_FULL, _READ_ONLY = {errno.ENOSPC, errno.EDQUOT}, {errno.EROFS}


@dataclass(frozen=True)
class Stage:
    """A step of the pipeline.

    Args:
        name: lower-case words joined by hyphens, such as "score-e-batch"; names the directory of its artifacts.
        function: called as `function(out: Writer, execution, **inputs)`; defined at the top level of a module. It
            writes files through `out` and returns its summary: a dict of JSON values that the inputs determine, hence
            no timings, which the manifest has anyway.
        vectors: the inputs whose `VECTORS` the function opens; those of its policy come with them.
    """

    name: str
    function: Callable[..., dict]
    vectors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.name):
            raise StoreError(f"{self.name!r} cannot name a stage", fix="use lower-case words joined by hyphens")

    def opened(self, inputs: Mapping[str, Any]) -> list[Artifact]:
        """Return the artifacts among the inputs whose `VECTORS` the function opens."""
        return [one for name in (*self.vectors, "policy") if name in inputs for one in artifacts_in(inputs[name])]


class Store:
    """Artifacts under one root directory, which is made when something is first written.

    Args:
        root: the directory; may be moved or copied as a whole, or be read-only as long as nothing must be computed.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).expanduser().absolute()

    def key(self, stage: Stage, inputs: Mapping[str, Any]) -> str:
        """Identify a result by what makes it: the stage's name, the code that it reaches, its libraries and its inputs.

        Args:
            stage: the stage.
            inputs: name → artifact (which counts by its content), pydantic model, or plain JSON value.

        Returns:
            32 hex digits, see `manifest.recipe_key`.

        Raises:
            StoreError: an input has no exact JSON form; names it.
        """
        return recipe_key(recipe_of(stage, inputs))

    def find(self, stage_name: str, key: str, digest: Digest | None = None) -> Artifact | None:
        """Look an artifact up. No data file is read, unless `digest` says how.

        Args:
            stage_name: name of the stage.
            key: its key.
            digest: see `check`.

        Returns:
            The artifact, or None when there is none that is complete and, as far as this looks, sound. An unsound one
            is moved to `.quarantine` with a warning; where that cannot be done, the warning says so.

        Raises:
            OSError: a file is there but could not be read. It may well be sound, and is left alone.
        """
        artifact, fault = self.check(stage_name, key, digest)
        if fault:
            try:
                with self.lock(stage_name, key, wait=False):  # or else we might move away what another just repaired
                    artifact, fault = self.check(stage_name, key, digest)
                    if fault:
                        self.quarantine(stage_name, key, fault)
            except (OSError, StoreError) as error:
                log.warning("%s/%s is unsound and left where it is: %s (%s)", stage_name, key, fault, error)
        return artifact

    def run(self, stage: Stage, execution: Any, inputs: Mapping[str, Any]) -> Artifact:
        """Return the result of a stage: from the store if it is there, else computed, once among all processes.

        Args:
            stage: the stage.
            execution: how to compute, passed to the stage's function; must not influence the result. What its
                `describe() -> dict` returns, if it has one, goes into the manifest; its `stamps(inputs)`, if it has
                one, says which files outside the store these name, and the summaries of artifacts among them.
            inputs: what to compute from; see `key`. Passed to the stage's function by name.

        Returns:
            The artifact, complete; each of its files is verified when it is opened.

        Raises:
            StoreError: an input has no exact JSON form, or the store cannot be written. Nothing becomes visible; nor
                does it when the stage's function raises, which passes through.
            ProbeError: a file that the inputs name by its digest is not what it was, or was written while the stage
                read it.
            OSError: as for `find`.
        """
        recipe = recipe_of(stage, inputs)
        key = recipe_key(recipe)
        artifact, _ = self.check(stage.name, key)
        if artifact is None:
            with self.writing(), self.in_use(), self.lock(stage.name, key):
                artifact, fault = self.check(stage.name, key)  # another process may have computed it meanwhile
                if fault:
                    self.quarantine(stage.name, key, fault)
                if artifact is None:
                    return self._compute(stage, key, recipe, execution, inputs)
        log.debug("%s %s: reused", stage.name, key[:12])
        return artifact

    def ls(self) -> Iterator[Artifact]:
        """List the complete artifacts, by stage and key. Their manifests are verified, their data files are not."""
        for stage, key in self.names():
            try:
                manifest, fault = check_manifest(self.root / stage / key, stage, key)
            except SignatureError as error:
                log.warning("%s", error.fact)
                continue
            if fault:
                log.warning("%s/%s is unsound: %s", stage, key, fault)
            else:
                yield Artifact(stage, key, manifest["digest"], self.root)

    def names(self) -> list[tuple[str, str]]:
        """The stages and keys of all that takes the place of an artifact, sound or not; sorted."""
        found = (path.parts[-2:] for path in self.root.glob("[!.]*/*") if path.is_dir())
        return sorted((stage, key) for stage, key in found if re.fullmatch("[0-9a-f]{32}", key))

    def check(self, stage_name: str, key: str, digest: Digest | None = None) -> tuple[Artifact | None, str]:
        """The artifact if it is sound, and else what is wrong with it; neither when it is not there at all.

        Args:
            stage_name: name of the stage.
            key: its key.
            digest: what says the content of a data file; None: that its size is right is enough.

        Raises:
            SignatureError: it is not signed as it must be.
        """
        directory = self.root / stage_name / key
        if not may_name(stage_name, key) or not directory.exists():
            return None, ""
        manifest, fault = check_manifest(directory, stage_name, key)
        fault = fault or check_files(directory, manifest["files"], digest)
        return (None, fault) if fault else (Artifact(stage_name, key, manifest["digest"], self.root), "")

    def manifest(self, stage_name: str, key: str) -> dict[str, Any]:
        """What is known of an artifact; empty when it is not there, or its manifest is unsound or not signed."""
        with suppress(SignatureError):
            return check_manifest(self.root / stage_name / key, stage_name, key)[0]
        return {}

    def lock(self, stage_name: str, key: str, wait: bool = True) -> AbstractContextManager[None]:
        """Hold the lock of one key; see `locks.key_lock`."""
        return locks.key_lock(self.root / ".locks", stage_name, key, wait)

    def quarantine(self, stage_name: str, key: str, fault: str) -> None:
        """Move an unsound artifact out of the way, and say so; its lock is held."""
        name = f"{stage_name}-{key}-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
        target = self.root / ".quarantine" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(self.root / stage_name / key, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            target = self.root / stage_name / f".quarantine-{name}"  # the stage's folder is on another disk
            os.rename(self.root / stage_name / key, target)
        log.warning("%s/%s is unsound and will not be used: %s; moved to %s", stage_name, key, fault, target)

    def in_use(self, alone: bool = False) -> AbstractContextManager[None]:
        """Within the context this process relies on what is there; or nobody else does, so that it may be deleted.

        Args:
            alone: refuse if the store is in use by another process.

        Raises:
            StoreError: it is, or that cannot be told.
        """
        return (locks.alone if alone else locks.in_use)(self.root / ".locks")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Explain the errors of a store that cannot be written; others pass through."""
        try:
            yield
        except Exception as error:
            code = getattr(error, "errno", None)
            ours = str(getattr(error, "filename", None) or "").startswith(str(self.root))
            refused = ours and isinstance(error, PermissionError | NotADirectoryError | FileExistsError)
            full = code in _FULL or f"os error {errno.ENOSPC}" in str(error)  # how safetensors says it
            if not (full or code in _READ_ONLY or refused):
                raise
            raise StoreError(
                f"the store at {self.root} cannot be written: {error}",
                cause="the disk or the quota is full" if full else "the store is read-only for you",
                fix="make room or choose another store, and run again: what is finished is reused"
                if full
                else f"choose another store; `cp -rs --no-preserve=mode {shlex.quote(str(self.root))} NEW` makes one "
                "that reads what is finished from there",
            ) from error

    def _compute(self, stage: Stage, key: str, recipe: dict, execution: Any, inputs: Mapping[str, Any]) -> Artifact:
        """Run the function in a temporary sibling directory and make the result visible; the lock is held."""
        final = self.root / stage.name / key
        final.parent.mkdir(exist_ok=True)
        for stale in final.parent.glob(f".tmp-{key}-*"):  # of a process that died: the lock is ours
            shutil.rmtree(stale, ignore_errors=True)
        with temporary_sibling(final) as temporary:
            described = execution.describe() if hasattr(execution, "describe") else {}
            described = as_json(described, "what execution.describe() returned")  # fail before the work, not after
            look: Callable[[Any], Stamps] = getattr(execution, "stamps", lambda inputs: {})
            named = [recipe["inputs"], *(artifact.summary for artifact in artifacts_in(inputs))]
            before = look(named)
            started = time.monotonic()
            summary = stage.function(Writer(temporary), execution, **inputs)
            seconds = time.monotonic() - started
            if recipe_of(stage, inputs) != recipe:
                raise StoreError(
                    f"the code of stage {stage.name} changed before all of it was loaded, so its result has no key",
                    cause="a module of the project was edited, or a library was upgraded, during the run",
                    fix="run again",
                )
            require_untouched(before, look(named), stage.name)
            manifest = {
                **recipe,
                "key": key,
                "function": name_of(stage.function),
                "definitions": code_of(stage.function).definitions,
                "upstream": upstream(inputs),
                "summary": as_json(summary, f"the summary of stage {stage.name}"),
                "execution": described,
                "versions": versions(),
                "wall_seconds": seconds,
                "peak_rss_bytes": peak_rss_bytes(),
                "created": datetime.now(UTC).isoformat(),
            }
            digest = commit(temporary, final, manifest)
        log.info("%s %s: computed in %.1f s", stage.name, key[:12], seconds)
        return Artifact(stage.name, key, digest, self.root)


def recipe_of(stage: Stage, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a result, as its manifest says it; see `manifest.recipe_key`."""
    code = code_of(stage.function)
    return {
        "format": FORMAT,
        "stage": stage.name,
        "code": code.digest,
        "libraries": compared(code.libraries),
        "inputs": canonical(dict(inputs)),
    }
