"""An artifact of the store: read by the stages that need it, written by the one that makes it, named among inputs."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from entropy_core.errors import StoreError, UnsoundError
from entropy_core.store.data_files import DROPPED, VECTORS, check_file
from entropy_core.store.manifest import MANIFEST, check_manifest, json_text, may_name_file

if TYPE_CHECKING:  # loaded where they are used: looking an artifact up takes neither
    import pyarrow
    import torch

    from entropy_core.store.tensor_file import TensorFile, TensorWriter

_TAGS = ({"float"}, {"artifact", "digest"})  # a dict of these names could be taken for what they stand for


class _Summary(dict[str, Any]):
    """A summary that explains what it does not have: a recorded run may have been made by another version."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        super().__init__(values)
        self._where = where

    def __missing__(self, name: str) -> Any:
        fact = f"{self._where} says nothing of {name}"
        raise StoreError(fact, cause="another version of this stage made it", fix="run the sweep again")


@dataclass(frozen=True)
class Artifact:
    """What one run of a stage left in the store. Two artifacts are equal wherever their stores are.

    Args:
        stage: name of the stage.
        key: 32 hex digits, see `Store.key`.
        digest: SHA-256 of the content, see `manifest.content_digest`; what the keys of later stages are made of.
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
        """The verified manifest; shared, so not to be changed. Raises UnsoundError as `path` does."""
        manifest, fault = check_manifest(self.directory, self.stage, self.key)
        if not fault and manifest["digest"] != self.digest:
            fault = f"the store now has other content under this key (digest {manifest['digest'][:12]})"
        if fault:
            raise self._unsound(fault)
        return manifest

    @property
    def summary(self) -> dict[str, Any]:
        """What the stage's function returned. Raises UnsoundError as `path` does; StoreError for a missing key."""
        return _Summary(self.manifest["summary"], f"artifact {self.stage}/{self.key} in {self.root}")

    def path(self, name: str) -> Path:
        """Locate one data file, verified: its content is read, unless it was before and the file has not changed.

        Args:
            name: the file's path relative to the artifact's directory.

        Returns:
            Its path.

        Raises:
            StoreError: the artifact has no such file.
            UnsoundError: the file or the manifest is missing or altered.
        """
        entry = self.manifest["files"].get(name)
        if entry is None:
            fact = f"artifact {self.stage}/{self.key} in {self.root} has no file {name}"
            raise StoreError(fact, cause="another version of this stage made it", fix="run the sweep again")
        if name.startswith(VECTORS) and (self.directory / DROPPED).exists():
            raise StoreError(
                f"{name} of artifact {self.stage}/{self.key} is not kept",
                cause="another sweep with execution.keep_vectors: false let it go meanwhile",
                fix="run the sweep again: what it needs of it is computed anew",
            )
        if fault := check_file(self.directory / name, entry):
            raise self._unsound(fault)
        return self.directory / name

    def tensors(
        self, name: str = "tensors.safetensors", only: Sequence[str] = (), optional: Sequence[str] = ()
    ) -> "dict[str, torch.Tensor]":
        """Load the tensors of a safetensors file onto the CPU, all or some.

        Args:
            name: of the file.
            only: which tensors to read; all of them where none is named.
            optional: further tensors, read if the file has them.

        Returns:
            Tensors by name.

        Raises:
            StoreError: the artifact has no such file, or the file no such tensor.
            UnsoundError: as `path` does.
        """
        from safetensors import safe_open

        with safe_open(self.path(name), framework="pt") as file:
            if missing := [one for one in only if one not in file.keys()]:  # noqa: SIM118 (no mapping)
                fact = f"{name} of artifact {self.stage}/{self.key} in {self.root} has no {', '.join(missing)}"
                raise StoreError(fact, cause="another version of this stage made it", fix="run the sweep again")
            found = [one for one in optional if one in file.keys()]  # noqa: SIM118 (no mapping)
            return {one: file.get_tensor(one) for one in (*only, *found) or file.keys()}

    def vector(self, name: str) -> "TensorFile":
        """Open a file of `VECTORS`, to be read a tensor or a block at a time. Raises StoreError as `path` does."""
        from entropy_core.store.tensor_file import TensorFile

        return TensorFile(self.path(f"{VECTORS}{name}.safetensors"))

    def table(self, name: str) -> "pyarrow.Table":
        """Load a Parquet file. Raises UnsoundError as `path` does."""
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(self.path(name)).read()

    def json(self, name: str) -> Any:
        """Load a JSON file. Raises UnsoundError as `path` does."""
        return json.loads(self.path(name).read_bytes())

    def to_dict(self) -> dict[str, str]:
        """A small JSON-able reference, to be sent in place of the data; `from_dict` reads it."""
        return {"stage": self.stage, "key": self.key, "digest": self.digest}

    @classmethod
    def from_dict(cls, reference: Mapping[str, str], root: Path | str) -> "Artifact":
        """Make the artifact that `to_dict` described, in the store at `root`. Nothing is read until it is used."""
        return cls(reference["stage"], reference["key"], reference["digest"], Path(root).absolute())

    def _unsound(self, fault: str) -> UnsoundError:
        error = UnsoundError(
            f"artifact {self.stage}/{self.key} in {self.root} cannot be used: {fault}",
            cause="a file was deleted, edited or damaged after it was written",
            fix="run the sweep again: what is unsound is set aside and computed anew",
        )
        error.stage, error.key = self.stage, self.key
        return error


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
        if not may_name_file(name):
            raise StoreError(f"{name!r} cannot name a data file", fix=f"use a relative path other than {MANIFEST}")
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

    def vector(self, name: str, shapes: "Mapping[str, tuple[int, ...]]", dtype: "torch.dtype") -> "TensorWriter":
        """Begin a file of `VECTORS`, to be filled a block at a time within a `with`.

        Args:
            name: without suffix.
            shapes: of the tensors, by parameter name.
            dtype: of all of them.
        """
        from entropy_core.store.tensor_file import TensorWriter

        return TensorWriter(self.path(f"{VECTORS}{name}.safetensors"), shapes, dtype)

    def table(self, table: "pyarrow.Table", name: str) -> None:
        """Write a table as a Parquet file."""
        import pyarrow.parquet

        pyarrow.parquet.write_table(table, self.path(name))

    def json(self, obj: Any, name: str) -> None:
        """Write JSON with sorted keys. Raises ValueError on a NaN or an infinity."""
        self.path(name).write_text(json_text(obj), encoding="utf-8")


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
        return canonical(dict(value), where)  # field by field: an artifact among them stays one
    if type(value) in (list, tuple):
        return [canonical(item, f"{where}.{index}") for index, item in enumerate(value)]
    if type(value) is dict and all(type(name) is str for name in value) and set(value) not in _TAGS:
        return {name: canonical(item, f"{where}.{name}") for name, item in value.items()}
    raise StoreError(
        f"{where} = {value!r:.80} ({type(value).__name__}) has no exact JSON form, so no result can be keyed by it",
        cause="a path, a set, a tensor, an object or a number that is not finite was passed as a setting",
        fix="pass plain values; what does not influence the result belongs to the execution settings",
    )


def artifacts_in(value: Any) -> Iterator[Artifact]:
    """Every artifact among the inputs of a stage, at any depth."""
    if isinstance(value, Artifact):
        yield value
    elif isinstance(value, BaseModel):
        yield from artifacts_in(dict(value))
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from artifacts_in(item)


def upstream(value: Any) -> list[dict[str, str]]:
    """References to the artifacts among the inputs of a stage; see `Artifact.to_dict`."""
    return [artifact.to_dict() for artifact in artifacts_in(value)]


def _sort_metadata(path: Path) -> None:
    """Give a safetensors file the same bytes every time: the library writes its metadata in random order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if metadata := header.pop("__metadata__", None):
            header = {"__metadata__": dict(sorted(metadata.items())), **header}
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            if len(text) > length:
                raise StoreError(f"the metadata of {path.name} cannot be sorted", fix="use plain characters")
            file.seek(8)
            file.write(text.ljust(length))
