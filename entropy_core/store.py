"""The store: what each stage computed, kept on disk under a key that says exactly what made it.

    root/<stage>/<key>/     data files, and manifest.json written last: a directory with a manifest is complete
    root/<stage>/.tmp-*     being written, or left by a process that died; never read
    root/.locks/            one lock per key, so that two processes never compute the same thing
    root/.quarantine/       artifacts that were found damaged, moved out of the way

A result is found again when the stage's code and its result-affecting inputs are the same; how it was executed (device,
micro-batches, runner) is recorded in the manifest and is no part of the key. Reading checks every file against the
manifest and never writes, so a store on read-only media serves for analysis.
"""

import errno
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import resource
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from pydantic import BaseModel

from entropy_core.code_identity import code_digest, module_digests
from entropy_core.errors import StoreError

if TYPE_CHECKING:  # loaded where they are used: looking an artifact up takes neither
    import pyarrow
    import torch

log = logging.getLogger("entropy_probe.store")

MANIFEST = "manifest.json"
_LIBRARIES = ("torch", "transformers", "pyarrow", "safetensors")
_TAGS = ({"float"}, {"artifact", "digest"})  # a dict of these names could be taken for what they stand for
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_SETTLED_NS = 2_000_000_000  # the coarsest clock of a common file system: a younger file could change unnoticed


@dataclass(frozen=True)
class Stage:
    """A step of the pipeline.

    Args:
        name: lower-case words joined by hyphens, such as "score-e-batch"; names the directory of its artifacts.
        function: called as `function(out: Writer, execution, **inputs)`; defined at the top level of a module. It
            writes files through `out` and returns its summary: a dict of JSON values that the inputs determine, hence
            no timings, which the manifest has anyway.
    """

    name: str
    function: Callable[..., dict]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.name):
            raise StoreError(f"{self.name!r} cannot name a stage", way_out="use lower-case words joined by hyphens")


@dataclass(frozen=True)
class Artifact:
    """What one run of a stage left in the store. Two artifacts are equal wherever their stores are.

    Args:
        stage: name of the stage.
        key: 32 hex digits, see `Store.key`.
        digest: SHA-256 of the content, see `content_digest`; what the keys of later stages are made of.
        root: the store's root directory.
    """

    stage: str
    key: str
    digest: str
    root: Path = field(compare=False)

    @property
    def directory(self) -> Path:
        """Where the files are."""
        return self.root / self.stage / self.key

    @property
    def manifest(self) -> dict[str, Any]:
        """The verified manifest; shared, so not to be changed. Raises StoreError as `path` does."""
        manifest, fault = _check_manifest(self.directory, self.stage, self.key)
        if not fault and manifest["digest"] != self.digest:
            fault = f"the store now has other content under this key (digest {manifest['digest'][:12]})"
        if fault:
            raise self._unsound(fault)
        return manifest

    @property
    def summary(self) -> dict[str, Any]:
        """What the stage's function returned. Raises StoreError as `path` does."""
        return self.manifest["summary"]

    def path(self, name: str) -> Path:
        """Locate one data file, verified.

        Args:
            name: the file's path relative to the artifact's directory.

        Returns:
            Its path.

        Raises:
            StoreError: the artifact has no such file, or the file or the manifest is missing or altered.
        """
        entry = self.manifest["files"].get(name)
        fault = _check_file(self.directory / name, entry) if entry else f"it has no file {name}"
        if fault:
            raise self._unsound(fault)
        return self.directory / name

    def tensors(self, name: str = "tensors.safetensors") -> "dict[str, torch.Tensor]":
        """Load the tensors of a safetensors file, onto the CPU. Raises StoreError as `path` does."""
        from safetensors.torch import load_file

        return load_file(self.path(name))

    def table(self, name: str) -> "pyarrow.Table":
        """Load a Parquet file. Raises StoreError as `path` does."""
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(self.path(name)).read()

    def json(self, name: str) -> Any:
        """Load a JSON file. Raises StoreError as `path` does."""
        return json.loads(self.path(name).read_bytes())

    def to_dict(self) -> dict[str, str]:
        """A small JSON-able reference, to be sent in place of the data; `from_dict` reads it."""
        return {"stage": self.stage, "key": self.key, "digest": self.digest}

    @classmethod
    def from_dict(cls, reference: Mapping[str, str], root: Path | str) -> "Artifact":
        """Make the artifact that `to_dict` described, in the store at `root`. Nothing is read until it is used."""
        return cls(reference["stage"], reference["key"], reference["digest"], Path(root).absolute())

    def _unsound(self, fault: str) -> StoreError:
        return StoreError(
            f"artifact {self.stage}/{self.key} in {self.root} cannot be used: {fault}",
            cause="a file was deleted, edited or damaged after it was written",
            way_out="run the sweep again: what is unsound is set aside and computed anew",
        )


class Writer:
    """Where a stage's function puts its files. They become visible all at once, when the function has returned."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, name: str) -> Path:
        """Say where to write a file of any kind; its directory is made.

        Args:
            name: path relative to the artifact, such as "figures/entropy.svg".

        Raises:
            StoreError: the name leads outside the artifact, or is the manifest's.
        """
        path = self._directory / name
        if (
            Path(name).is_absolute()
            or ".." in Path(name).parts
            or path in (self._directory, self._directory / MANIFEST)
        ):
            raise StoreError(f"{name!r} cannot name a data file", way_out=f"use a relative path other than {MANIFEST}")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def tensors(
        self,
        tensors: "Mapping[str, torch.Tensor]",
        name: str = "tensors.safetensors",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write tensors of any device and layout as a safetensors file.

        Args:
            tensors: name → tensor; views of one another are written one by one.
            name: the file's name.
            metadata: text to keep in the file's header.
        """
        from safetensors.torch import save_file

        path = self.path(name)
        path.touch()
        mode = path.stat().st_mode  # the library makes files that only their owner can read
        plain: dict[str, torch.Tensor] = {}
        storages = set()
        for key, tensor in tensors.items():
            plain[key] = tensor.detach().cpu().contiguous()
            storage = plain[key].untyped_storage().data_ptr()
            if storage in storages:  # the library refuses to write the same memory twice
                plain[key] = plain[key].clone()
            storages.add(storage)
        save_file(plain, path, dict(metadata) if metadata else None)
        path.chmod(mode)
        _sort_metadata(path)

    def table(self, table: "pyarrow.Table", name: str) -> None:
        """Write a table as a Parquet file."""
        import pyarrow.parquet

        pyarrow.parquet.write_table(table, self.path(name))

    def json(self, obj: Any, name: str) -> None:
        """Write JSON with sorted keys. Raises ValueError on a NaN or an infinity."""
        self.path(name).write_text(_pretty(obj), encoding="utf-8")


class Store:
    """Artifacts under one root directory, which is made when something is first written.

    Args:
        root: the directory; may be moved or copied as a whole, or be read-only as long as nothing must be computed.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).expanduser().absolute()

    def key(self, stage: Stage, inputs: Mapping[str, Any]) -> str:
        """Identify a result by what makes it: the stage's name, the code that it reaches, and its inputs.

        Args:
            stage: the stage.
            inputs: name → artifact (which counts by its content), pydantic model, or plain JSON value.

        Returns:
            The first 32 hex digits of the SHA-256 of the canonical JSON. 128 bits are enough: among a million million
            keys, the probability that any two agree is 1e-15; and directory names stay short.

        Raises:
            StoreError: an input has no exact JSON form; names it.
        """
        return _key(_recipe(stage, inputs))

    def find(self, stage_name: str, key: str) -> Artifact | None:
        """Look an artifact up and verify all of it. Files that did not change are hashed once per process.

        Args:
            stage_name: name of the stage.
            key: its key.

        Returns:
            The artifact, or None when there is none that is complete and sound. An unsound one is moved to
            `.quarantine` with a warning; where that cannot be done, the warning says so.

        Raises:
            OSError: a file is there but could not be read. It may well be sound, and is left alone.
        """
        artifact, fault = self._check(stage_name, key)
        if fault:
            try:
                with self._lock(stage_name, key, timeout=0):  # or else we might move away what another just repaired
                    artifact, fault = self._check(stage_name, key)
                    if fault:
                        self._quarantine(stage_name, key, fault)
            except (OSError, Timeout) as error:
                log.warning("%s/%s is unsound and left where it is: %s (%s)", stage_name, key, fault, error)
        return artifact

    def run(self, stage: Stage, execution: Any, inputs: Mapping[str, Any]) -> Artifact:
        """Return the result of a stage: from the store if it is there, else computed, once among all processes.

        Args:
            stage: the stage.
            execution: how to compute, passed to the stage's function; must not influence the result. What its
                `describe() -> dict` returns, if it has one, goes into the manifest.
            inputs: what to compute from; see `key`. Passed to the stage's function by name.

        Returns:
            The artifact, complete and verified.

        Raises:
            StoreError: an input has no exact JSON form, or the store cannot be written. Nothing becomes visible; nor
                does it when the stage's function raises, which passes through.
            OSError: as for `find`.
        """
        recipe = _recipe(stage, inputs)
        key = _key(recipe)
        artifact, _ = self._check(stage.name, key)
        if artifact is None:
            with self._writing(), self._lock(stage.name, key):
                artifact, fault = self._check(stage.name, key)  # another process may have computed it meanwhile
                if fault:
                    self._quarantine(stage.name, key, fault)
                if artifact is None:
                    return self._compute(stage, key, recipe, execution, inputs)
        log.debug("%s %s: reused", stage.name, key[:12])
        return artifact

    def ls(self) -> Iterator[Artifact]:
        """List the complete artifacts, by stage and key. Their manifests are verified, their data files are not."""
        for path in sorted(self.root.glob(f"[!.]*/[!.]*/{MANIFEST}")):
            stage, key = path.parts[-3:-1]
            manifest, fault = _check_manifest(path.parent, stage, key)
            if fault:
                log.warning("%s/%s is unsound: %s", stage, key, fault)
            else:
                yield Artifact(stage, key, manifest["digest"], self.root)

    def _check(self, stage_name: str, key: str) -> tuple[Artifact | None, str]:
        """The artifact if it is sound, and else what is wrong with it; neither when it is not there at all."""
        directory = self.root / stage_name / key
        if not directory.exists():
            return None, ""
        manifest, fault = _check_manifest(directory, stage_name, key)
        for name, entry in manifest.get("files", {}).items():
            fault = fault or _check_file(directory / name, entry)
        return (None, fault) if fault else (Artifact(stage_name, key, manifest["digest"], self.root), "")

    def _lock(self, stage_name: str, key: str, timeout: float = -1) -> FileLock:
        """The lock of one key, which the system frees if its holder dies; waits for ever unless told otherwise."""
        path = self.root / ".locks" / f"{stage_name}-{key}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path, timeout=timeout)

    def _quarantine(self, stage_name: str, key: str, fault: str) -> None:
        target = self.root / ".quarantine" / f"{stage_name}-{key}-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(self.root / stage_name / key, target)
        log.warning("%s/%s is unsound and will not be used: %s; moved to %s", stage_name, key, fault, target)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Explain the errors of a store that cannot be written; others pass through."""
        try:
            yield
        except Exception as error:
            code = getattr(error, "errno", None)
            ours = str(getattr(error, "filename", None) or "").startswith(str(self.root))
            refused = ours and isinstance(error, PermissionError | NotADirectoryError | FileExistsError)
            full = f"os error {errno.ENOSPC}" in str(error)  # how safetensors says it
            if not (code in _UNWRITABLE or refused or full):
                raise
            raise StoreError(
                f"the store at {self.root} cannot be written: {error}",
                cause="the disk or the quota is full, or the store is read-only",
                way_out="make room or choose another store, and run again: what is finished is reused",
            ) from error

    def _compute(self, stage: Stage, key: str, recipe: dict, execution: Any, inputs: Mapping[str, Any]) -> Artifact:
        """Run the function in a temporary sibling directory and make the result visible; the lock is held."""
        final = self.root / stage.name / key
        final.parent.mkdir(exist_ok=True)
        for stale in final.parent.glob(f".tmp-{key}-*"):  # of a process that died: the lock is ours
            shutil.rmtree(stale, ignore_errors=True)
        temporary = final.with_name(f".tmp-{key}-{os.getpid()}-{secrets.token_hex(4)}")
        temporary.mkdir()
        try:
            described = execution.describe() if hasattr(execution, "describe") else {}
            described = _as_json(described, "what execution.describe() returned")  # fail before the work, not after
            modules = module_digests(stage.function.__module__)
            started = time.monotonic()
            summary = stage.function(Writer(temporary), execution, **inputs)
            seconds = time.monotonic() - started
            if code_digest(stage.function) != recipe["code"]:
                raise StoreError(
                    f"the code of stage {stage.name} changed before all of it was loaded, so its result has no key",
                    cause="a module of the project was edited during the run",
                    way_out="run again",
                )
            manifest = {
                **recipe,
                "key": key,
                "modules": modules,
                "upstream": list(_upstream(inputs)),
                "summary": _as_json(summary, f"the summary of stage {stage.name}"),
                "execution": described,
                "versions": _versions(),
                "wall_seconds": seconds,
                "peak_rss_bytes": _peak_rss_bytes(),
                "created": datetime.now(UTC).isoformat(),
            }
            digest = _commit(temporary, final, manifest)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        log.info("%s %s: computed in %.1f s", stage.name, key[:12], seconds)
        return Artifact(stage.name, key, digest, self.root)


def canonical(value: Any, where: str = "inputs") -> Any:
    """Rewrite an input as JSON values from which it could be told apart from every other input.

    Args:
        value: None, bool, int, str, a finite float, an artifact; or a list, tuple, dict or pydantic model of these.
        where: dotted path of the value, for the error message.

    Returns:
        The same, with floats as {"float": repr} (1, 1.0 and True differ) and artifacts as their content digests.

    Raises:
        StoreError: the value, or one inside it, is anything else: a path, a set, a tensor, a NaN.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float and math.isfinite(value):
        return {"float": repr(value)}
    if isinstance(value, Artifact):
        return {"artifact": value.stage, "digest": value.digest}
    if isinstance(value, BaseModel):
        return canonical(value.model_dump(), where)  # not as JSON, which turns paths and sets into something else
    if type(value) in (list, tuple):
        return [canonical(item, f"{where}.{index}") for index, item in enumerate(value)]
    if type(value) is dict and all(type(name) is str for name in value) and set(value) not in _TAGS:
        return {name: canonical(item, f"{where}.{name}") for name, item in value.items()}
    raise _inexact(value, where)


def content_digest(files: Mapping[str, Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    """Identify an artifact by its data: the SHA-256 of the canonical JSON of its files' SHA-256 and its summary.

    Args:
        files: file name → its entry in the manifest.
        summary: what the stage's function returned.

    Returns:
        64 hex digits.
    """
    return _sha256({"files": {name: entry["sha256"] for name, entry in files.items()}, "summary": summary})


def _inexact(value: Any, where: str) -> StoreError:
    return StoreError(
        f"{where} = {value!r:.80} ({type(value).__name__}) has no exact JSON form, so no result can be keyed by it",
        cause="a path, a set, a tensor, an object or a number that is not finite was passed as a setting",
        way_out="pass plain values; what does not influence the result belongs to the execution settings",
    )


def _recipe(stage: Stage, inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {"stage": stage.name, "code": code_digest(stage.function), "inputs": canonical(dict(inputs))}


def _key(recipe: Mapping[str, Any]) -> str:
    return _sha256({name: recipe[name] for name in ("stage", "code", "inputs")})[:32]


def _sha256(document: Any) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _upstream(value: Any) -> Iterator[dict[str, str]]:
    """References to the artifacts among the inputs."""
    if isinstance(value, Artifact):
        yield value.to_dict()
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _upstream(item)


def _as_json(value: Any, what: str) -> dict[str, Any]:
    """The dict as it will be read back from the manifest."""
    try:
        plain = json.loads(_pretty(value))
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"{what} is not JSON: {error}", way_out="use plain, finite values; write data to files"
        ) from error
    if not isinstance(plain, dict):
        raise StoreError(f"{what} is {value!r:.80} and not a dict")
    return plain


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def _commit(temporary: Path, final: Path, manifest: dict[str, Any]) -> str:
    """Record every file in the manifest, bring all of it to the disk, and make it visible; returns the digest."""
    paths = sorted(temporary.rglob("*"))
    files = {path.relative_to(temporary).as_posix(): _describe(path) for path in paths if path.is_file()}
    digest = content_digest(files, manifest["summary"])
    (temporary / MANIFEST).write_text(_pretty({**manifest, "files": files, "digest": digest}), encoding="utf-8")
    for path in [*paths, temporary / MANIFEST, temporary]:
        _fsync(path)
    os.rename(temporary, final)
    _fsync(final.parent)
    _fsync(final.parent.parent)
    return digest


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _describe(path: Path) -> dict[str, Any]:
    """The manifest's entry for a file."""
    entry: dict[str, Any] = {"bytes": path.stat().st_size, "sha256": _once(_hash_file, path)}
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        entry["tensors"] = {name: {"dtype": of["dtype"], "shape": of["shape"]} for name, of in header.items()}
    elif path.suffix == ".parquet":
        import pyarrow.parquet

        metadata = pyarrow.parquet.read_metadata(path)
        entry["num_rows"] = metadata.num_rows
        entry["schema"] = metadata.schema.to_arrow_schema().to_string(show_schema_metadata=False)
    return entry


def _sort_metadata(path: Path) -> None:
    """Give a safetensors file the same bytes every time: the library writes its metadata in random order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if metadata := header.pop("__metadata__", None):
            header = {"__metadata__": dict(sorted(metadata.items())), **header}
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            if len(text) > length:
                raise StoreError(f"the metadata of {path.name} cannot be sorted", way_out="use plain characters")
            file.seek(8)
            file.write(text.ljust(length))


def _check_manifest(directory: Path, stage_name: str, key: str) -> tuple[dict[str, Any], str]:
    """The manifest, or else an empty dict and what is wrong."""
    try:
        manifest = _once(_read_manifest, directory / MANIFEST)
        if (manifest["stage"], manifest["key"]) != (stage_name, key):
            return {}, f"its manifest is that of {manifest['stage']}/{manifest['key']}"
        if _key(manifest) != key or content_digest(manifest["files"], manifest["summary"]) != manifest["digest"]:
            return {}, "its manifest was edited"
        return manifest, ""
    except (FileNotFoundError, NotADirectoryError):
        return {}, "it has no manifest"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return {}, f"its manifest cannot be understood: {error!r}"


def _check_file(path: Path, entry: Mapping[str, Any]) -> str:
    """What is wrong with a data file; empty if nothing."""
    try:
        size = path.stat().st_size
        if size != entry.get("bytes"):
            return f"{path.name} has {size} bytes instead of {entry.get('bytes')}"
        return "" if _once(_hash_file, path) == entry["sha256"] else f"{path.name} was altered: its SHA-256 is another"
    except (FileNotFoundError, NotADirectoryError):
        return f"{path.name} is missing"


_remembered: dict[tuple, Any] = {}


def _once(compute: Callable[[Path], Any], path: Path) -> Any:
    """compute(path), done once per process as long as the file does not change, wherever it is moved."""
    stat = path.stat()
    identity = (compute, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if identity not in _remembered:
        value = compute(path)
        if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) < _SETTLED_NS:
            return value
        _remembered[identity] = value
    return _remembered[identity]


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes())


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for library in (*_LIBRARIES, *({"prefect"} & sys.modules.keys())):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return versions


def _peak_rss_bytes() -> int:
    """The most memory that this process has held since it started; the system counts in KiB, but on macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
