"""`entropy-probe store`: what was computed, whether it is sound, why it would run again, and what may go.

A model library takes seconds to load, and only what goes through a sweep needs one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from entropy_core.errors import ConfigError, StoreError
from entropy_core.files.digests import read_digest
from entropy_core.store import archive, runs, signature, vectors
from entropy_core.store.adoption import Adoption
from entropy_core.store.data_files import VECTORS
from entropy_core.store.explain import differences, nearest, of_this_code, resolve
from entropy_core.store.manifest import sign
from entropy_core.store.pruning import needs, waste
from entropy_core.store.signature import SignatureError
from entropy_core.store.store import Store
from flows.listing import print_table, print_unusable, unusable

if TYPE_CHECKING:
    from entropy_core.config.schema import ProbeConfig


def ls(store: Store) -> int:
    """List the artifacts: stage, key, size, when, seconds, and the runs that need it."""
    needed = needs(store, runs.recorded(store.root))
    rows = []
    total = 0
    for artifact in store.ls():
        manifest = artifact.manifest
        kept = vectors.present(artifact)
        size = sum(of["bytes"] for name, of in manifest["files"].items() if kept or not name.startswith(VECTORS))
        total += size
        when = f"{manifest['created'][:16]}Z"
        of = ", ".join(needed.get((artifact.stage, artifact.key), ["–"]))
        rows.append((artifact.stage, artifact.key, in_words(size), when, f"{manifest['wall_seconds']:.1f}", of))
    print_table(("stage", "key", "size", "made", "seconds", "needed by"), rows)
    print_unusable(store.root)
    print(f"{len(rows)} artifacts, {in_words(total)}")
    return 0


def verify(store: Store) -> int:
    """Check every file against its manifest, and every run against what it needs; name what is unsound."""
    faults = []
    with store.in_use():  # nothing is pruned meanwhile, but a sweep may go on
        recorded = runs.recorded(store.root)  # before the artifacts: what these need is there by now
        names = store.names()
        for stage, key in names:
            if _fault(store, stage, key) and (fault := _fault(store, stage, key)):  # a sweep may just have let it go
                faults.append(f"{stage}/{key}: {fault}")
        for run_id in sorted(set(runs.present(store.root)) - set(recorded)):
            faults += unusable(store, run_id)
        for run_id in recorded:
            for stage, key in sorted(runs.named(store.root, run_id) - set(names)):
                faults.append(f"{stage}/{key}: it is missing, and the run {run_id} needs it")
    for fault in faults:
        print(fault)
    sound = "all sound" if not faults else f"{len(faults)} unsound; run the sweep again: they are computed anew"
    print(f"{len(names)} artifacts of {len(recorded)} recorded runs: {sound}")
    return 1 if faults else 0


def _fault(store: Store, stage: str, key: str) -> str:
    """What is wrong with an artifact, all of it read from the disk; or nothing."""
    try:
        return store.check(stage, key, read_digest)[1]
    except SignatureError as error:
        return error.fact


def _require_store(store: Store) -> None:
    """Refuse a folder in which a file of that name may be anything."""
    if not (store.root / ".locks").is_dir() and not runs.present(store.root):
        raise StoreError(f"there is no store in {store.root}", fix="give the folder of one: --artifacts")


def seal(store: Store) -> int:
    """Sign what is there with the key that is set, so that a store can be shared from now on."""
    if not signature.key():
        raise ConfigError(f"{signature.VARIABLE} is not set", fix="set it to a long random text, and keep it")
    _require_store(store)
    faults = []
    with store.in_use(), store.writing():
        names = store.names()
        for stage, key in names:
            with store.lock(stage, key):
                fault = sign(store.root / stage / key, stage, key) or store.check(stage, key, read_digest)[1]
                faults += [f"{stage}/{key}: {fault}"] if fault else []
        run_ids = runs.present(store.root)
        faults += [fault for run_id in run_ids if (fault := runs.sign(store, run_id))]
    for fault in faults:
        print(fault)
    left = f", {len(faults)} of them unsound" if faults else ""
    print(f"{len(names)} artifacts and {len(run_ids)} runs are signed with the key of {signature.VARIABLE}{left}")
    return 1 if faults else 0


def explain(store: Store, what: Sequence[str], of_config: bool) -> int:
    """Say why two artifacts have different keys, or why a stage would run again.

    Args:
        store: where the artifacts are.
        what: two keys, one key, or the path of a configuration.
        of_config: for a configuration, look into the store that it names.

    Returns:
        The exit status.

    Raises:
        ProbeError: there is no such artifact, or the configuration is wrong.
    """
    if len(what) > 2:
        raise ConfigError(f"explain was given {len(what)} things", fix="give one key, two keys or a configuration")
    if len(what) == 2:
        return explain_two(store, what[0], what[1])
    if Path(what[0]).suffix in (".yaml", ".yml", ".json"):
        from entropy_core.config.read import load_config

        config = load_config(what[0], must_exist=True)
        return explain_config(Store(config.store_root) if of_config else store, config)
    return explain_one(store, what[0])


def explain_two(store: Store, a: str, b: str) -> int:
    """Why two artifacts of a stage have different keys."""
    first, second = resolve(store, a), resolve(store, b)
    if first[0] != second[0]:
        raise StoreError(f"{'/'.join(first)} and {'/'.join(second)} are not of one stage")
    print(f"From {'/'.join(first)} to {'/'.join(second)}:")
    print_reasons(differences(store, _manifest(store, first), _manifest(store, second)))
    return 0


def explain_one(store: Store, a: str) -> int:
    """Which edits would make an artifact run again, and what the nearest other one differs in."""
    name = resolve(store, a)
    manifest = _manifest(store, name)
    edited: dict[str, list[str]] = {}
    for stage, key in sorted(runs.with_upstream(store, {name})):
        if made := store.manifest(stage, key):
            for difference in differences(store, made, of_this_code(made)):
                edited.setdefault(difference.field, []).append(f"{stage}/{key[:12]}")
    print(f"{'/'.join(name)} was made at {manifest['created'][:19]}Z in {manifest['wall_seconds']:.1f} s.")
    if not edited:
        print("The code that made it, and all that it was made from, is the code that is here.")
    for field, stages in edited.items():
        print(f"{field} is another one now, so these would run again: {', '.join(stages)}")
    if found := nearest(store, manifest, name[1]):
        print(f"From the nearest other one, {'/'.join(found[0])}, to this:")
        print_reasons(found[1])
    else:
        print("There is no other one of its stage.")
    return 0


def explain_config(store: Store, config: "ProbeConfig") -> int:
    """What a sweep would compute, and why."""
    from entropy_core.pipeline.plan import plan, summarize
    from entropy_core.pipeline.preflight import preflight

    print("\n".join(summarize(plan(config, preflight(config), store))))
    return 0


def adopt(store: Store, what: str) -> int:
    """After an edit that changes nothing: take over what a sweep has computed, on the evidence of one of each stage."""
    from entropy_core.config.read import load_config, parse_config
    from entropy_core.pipeline.memory import run_within_memory
    from entropy_core.pipeline.preflight import preflight
    from entropy_core.pipeline.stored_code import require_no_stored_code
    from entropy_core.pipeline.sweep import Promised, execution_for, go_through

    if Path(what).suffix in (".yaml", ".yml", ".json"):
        config = load_config(Path(what))
    else:
        path = runs.find(store.root, what) / runs.RECORD
        with runs.understood(path) as record:
            document = record["config"]
        config = parse_config(document, str(path))
        require_no_stored_code(config, store.root)
    checkpoints = preflight(config)
    execution = execution_for(config, checkpoints)
    adoption = Adoption(
        store,
        lambda trial, stage, inputs: run_within_memory(trial, stage, execution, inputs),
        lambda stage: Promised(stage, "", "", Path()),
    )
    with store.in_use():
        go_through(config, checkpoints, adoption)
    outcomes = adoption.outcomes
    rows = [
        (stage, *map(str, (of.found, of.recomputed, of.taken_over, of.missing)), "; ".join(of.refused))
        for stage, of in outcomes.items()
    ]
    print_table(("stage", "there", "recomputed", "taken over", "not there", "refused, since it differs"), rows)
    refused = sum(bool(of.refused) for of in outcomes.values())
    taken = sum(of.recomputed + of.taken_over for of in outcomes.values())
    left = f"{refused} stages are refused: their numbers changed, and a sweep computes them anew" if refused else ""
    print(f"{taken} artifacts have their new keys" + (f"; {left}" if left else ""))
    return 1 if refused else 0


def prune(store: Store, keep_runs: int | None, yes: bool) -> int:
    """List, or delete, what no run needs."""
    _require_store(store)
    with store.in_use(alone=True):
        found = waste(store, keep_runs)
        rows = [(str(each.path.relative_to(store.root)), in_words(each.bytes), each.why) for each in found]
        total = sum(each.bytes for each in found)
        print_table(("what may go", "size", "why"), rows)
        if yes:
            with store.writing():
                for each in found:
                    each.delete()
    done = "deleted" if yes else "may go; --yes deletes them. The work of a sweep that has not ended is among them"
    print(f"{len(found)} things, {in_words(total)}: {done if found else 'nothing to do'}")
    return 0


def export(store: Store, run_id: str, file: Path, everything: bool, vectors: bool) -> int:
    """Write one run into an archive."""
    names = archive.export(store, run_id, file, everything, vectors)
    print(f"{file}: {len(names)} artifacts, {in_words(file.stat().st_size)}")
    return 0


def load(store: Store, file: Path) -> int:
    """Bring an archive into the store."""
    names, run_ids = archive.load(store, file)
    print(f"{store.root}: {len(names)} artifacts of the run {', '.join(run_ids)}, all verified")
    return 0


def in_words(size: float) -> str:
    """A size in bytes as people read it."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def print_reasons(reasons: Sequence[object]) -> None:
    """One to a line."""
    for reason in reasons:
        print(f"    {reason}")
    if not reasons:
        print("    nothing differs")


def _manifest(store: Store, name: runs.Name) -> dict:
    if manifest := store.manifest(*name):
        return manifest
    raise StoreError(f"{'/'.join(name)} is unsound", fix="`entropy-probe store verify` says why")
