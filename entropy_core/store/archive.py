"""One run as a single file, for another machine: a tar archive that is laid out as a store.

An archive may come from anywhere, so nothing in it is trusted: only plain files under names that a store has are read,
and nothing becomes visible before all of it is verified.
"""

import errno
import os
import re
import shutil
import tarfile
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath

from entropy_core.errors import StoreError
from entropy_core.files.digests import file_digest
from entropy_core.store import runs
from entropy_core.store.data_files import DROPPED, VECTORS, check_files
from entropy_core.store.manifest import MANIFEST, bring_to_disk, make_visible, temporary_sibling
from entropy_core.store.signature import SignatureError
from entropy_core.store.store import Store

_ARTIFACT = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*/[0-9a-f]{32}/[^/].*")
_RUN = re.compile(r"runs/[^./][^/]*/[^./][^/]*")


def export(store: Store, run_id: str, file: Path, everything: bool = False, vectors: bool = False) -> list[runs.Name]:
    """Write a run and the artifacts that its statistics need into an archive; what is packed is verified.

    Args:
        store: where the run is.
        run_id: of the run, or `latest`.
        file: the archive; appears when it is complete.
        everything: also what these artifacts were made from, so that the run can be extended elsewhere.
        vectors: also their files of the size of the policy, which are made anew where a stage needs them.

    Returns:
        The artifacts in it.

    Raises:
        StoreError: there is no such run, one of its artifacts is missing or unsound, or the file cannot be written.
    """
    directory = runs.find(store.root, run_id)
    wanted = runs.named(store.root, directory.name)
    upstream = runs.with_upstream(store, wanted)
    wanted = upstream if everything else wanted | {name for name in upstream if name[0] in ("variance", "agreement")}
    members = [member for name in sorted(wanted) for member in _members(store, name, directory, vectors)]
    members += [path for path in sorted(directory.rglob("*")) if path.is_file()]
    try:
        with temporary_sibling(file.absolute()) as temporary:  # a name of its own until it is complete
            with tarfile.open(temporary / file.name, "w", dereference=True) as archive:
                for path in members:
                    name = path.relative_to(store.root).as_posix()
                    if path.name == DROPPED:
                        archive.addfile(tarfile.TarInfo(name))
                    else:
                        archive.add(path, name, filter=_anonymous)
            (temporary / file.name).replace(file)
    except OSError as error:
        raise StoreError(f"{file} cannot be written: {error}", fix="choose another place") from None
    return sorted(wanted)


def _members(store: Store, name: runs.Name, run: Path, vectors: bool) -> list[Path]:
    """The files of an artifact, verified; without its `VECTORS`, unless these are there and asked for."""
    artifact, fault = store.check(*name)
    folder = store.root.joinpath(*name)
    files = artifact.manifest["files"] if artifact else {}
    without = not vectors or (folder / DROPPED).exists()
    packed = {file: entry for file, entry in files.items() if not (without and file.startswith(VECTORS))}
    fault = fault or check_files(folder, packed, file_digest)
    if artifact is None or fault:
        raise StoreError(
            f"the artifact {'/'.join(name)} of the run {run.name} is {fault or 'missing'}",
            cause="it was deleted or damaged, or the store was moved without it",
            fix=f"run the sweep of {run / 'config.yaml'} again",
        )
    return sorted(folder / file for file in [*packed, MANIFEST, *([DROPPED] if len(packed) < len(files) else [])])


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """The same content makes the same archive, whoever writes it."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def load(store: Store, file: Path) -> tuple[list[runs.Name], list[str]]:
    """Bring an archive into a store. What is there already and sound stays as it is.

    Args:
        store: may be empty.
        file: made by `export`.

    Returns:
        The artifacts and the ids of the runs that were in it.

    Raises:
        StoreError: the archive is damaged, incomplete or not of this kind, or the store cannot be written. No artifact
            of an archive that was refused is visible.
    """
    with store.writing(), store.in_use():
        store.root.mkdir(parents=True, exist_ok=True)
        with temporary_sibling(store.root / "import") as temporary:
            arrived = Store(temporary)
            _unpack(file, temporary)
            names, run_ids = arrived.names(), runs.present(temporary)
            _verify(file, arrived, store, names, run_ids)
            bring_to_disk(temporary.rglob("*"))  # of all at once: one by one, the disk would be waited for each time
            for stage, key in names:
                with store.lock(stage, key):
                    _, fault = found = store.check(stage, key, file_digest)
                    if fault:
                        store.quarantine(stage, key, fault)
                    if found[0] is None:
                        (store.root / stage).mkdir(exist_ok=True)
                        _move(temporary / stage / key, store.root / stage / key)
            bring_to_disk({store.root, *(store.root / stage for stage, _ in names)})
            known = runs.recorded(store.root)
            for run_id in run_ids:
                if run_id in known:
                    continue
                with runs.writing(store, run_id) as folder:
                    for path in runs.folder(temporary, run_id).iterdir():
                        path.replace(folder / path.name)
    return names, run_ids


def _move(source: Path, final: Path) -> None:
    """Give what is on the disk its name in one step."""
    try:
        os.rename(source, final)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with temporary_sibling(final) as sibling:  # the stage's folder is on another disk
            shutil.move(source, sibling / final.name)
            make_visible(sibling / final.name, final)


def _unpack(file: Path, into: Path) -> None:
    if not file.is_file():  # but a pipe, say, which would be waited for
        raise StoreError(f"there is no file {file}")
    run = ""
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                plain = str(path) == member.name and ".." not in path.parts and max(map(len, path.parts)) < 200
                full = member.isreg() and not member.issparse()  # holes would be unpacked as zeros, at full size
                if not (
                    full
                    and plain
                    and member.name.isprintable()
                    and (_ARTIFACT.fullmatch(str(path)) or _RUN.fullmatch(str(path)))
                ):
                    raise _refused(file, f"it has a member {member.name!r} that no store has")
                if path.parts[0] == "runs" and path.parts[1] != (run := run or path.parts[1]):
                    raise _refused(file, f"it has two runs, {run} and {path.parts[1]}")
                target = into / path
                target.parent.mkdir(parents=True, exist_ok=True)
                content = archive.extractfile(member)
                assert content is not None  # it is a regular file
                with content, target.open("xb") as out:
                    shutil.copyfileobj(content, out)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise _refused(file, f"it cannot be read: {error}") from None
    except (FileExistsError, NotADirectoryError) as error:
        raise _refused(file, f"two of its members have one name: {Path(error.filename).relative_to(into)}") from None


def _verify(file: Path, arrived: Store, store: Store, names: Iterable[runs.Name], run_ids: Collection[str]) -> None:
    for stage, key in names:
        try:
            artifact, fault = arrived.check(stage, key, file_digest)
        except SignatureError as error:
            raise _refused(file, error.fact.replace(f"{arrived.root}/", "")) from None
        if artifact is None:
            raise _refused(file, f"{stage}/{key} is unsound: {fault}")
        folder = artifact.directory
        inside = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        if extra := inside - {MANIFEST, DROPPED, *artifact.manifest["files"]}:
            raise _refused(file, f"{stage}/{key} has files that its manifest does not name: {', '.join(sorted(extra))}")
    present = set(names)
    if not run_ids:
        raise _refused(file, "there is no run in it")
    for run_id in sorted(set(run_ids) - set(runs.recorded(arrived.root))):
        try:
            runs.finished(arrived.root, run_id)
        except StoreError as error:
            raise _refused(file, error.fact.replace(f"{arrived.root}/", "")) from None
    for run_id in run_ids:
        for stage, key in sorted(runs.named(arrived.root, run_id) - present):
            if store.check(stage, key)[0] is None:
                raise _refused(file, f"the run {run_id} needs {stage}/{key}, which is neither in it nor in the store")


def _refused(file: Path, fault: str) -> StoreError:
    return StoreError(
        f"{file} is refused: {fault}",
        cause="it was cut short, altered, or not made by `entropy-probe store export`",
        fix="export the run again",
    )
