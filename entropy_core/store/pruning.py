"""What may go from a store: all that no recorded run needs, and what dead processes and damage left behind."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from entropy_core.errors import StoreError
from entropy_core.store import runs
from entropy_core.store.manifest import temporary_sibling
from entropy_core.store.store import Store


@dataclass(frozen=True)
class Waste:
    """A file or a folder that may go, and why."""

    path: Path
    why: str

    @property
    def bytes(self) -> int:
        """What it takes."""
        return sum(path.lstat().st_size for path in [self.path, *self.path.rglob("*")] if not path.is_dir())

    def delete(self) -> None:
        """Take it out of sight in one step, and then off the disk."""
        with temporary_sibling(self.path) as temporary:
            os.rename(self.path, temporary / self.path.name)


def needs(store: Store, run_ids: list[str]) -> dict[runs.Name, list[str]]:
    """Which runs need each artifact: those whose records name it, or something that was made from it."""
    found: dict[runs.Name, list[str]] = {}
    for run_id in run_ids:
        for name in runs.with_upstream(store, runs.named(store.root, run_id)):
            found.setdefault(name, []).append(run_id)
    return found


def waste(store: Store, keep_runs: int | None = None) -> list[Waste]:
    """Find what may go. A sweep that has not ended has no record: nobody may use the store meanwhile.

    Args:
        store: any store.
        keep_runs: how many runs to keep, the latest; None: all of them.

    Returns:
        The folders of the other runs, artifacts that no kept run needs, and leftovers.

    Raises:
        StoreError: what a run needs cannot be told, since its record or a manifest is damaged.
    """
    recorded = runs.recorded(store.root)
    kept = recorded if keep_runs is None else recorded[max(0, len(recorded) - keep_runs) :]
    _can_be_told(store, recorded)
    needed = needs(store, kept)
    for (stage, key), of in needed.items():
        if (store.root / stage / key).exists() and not store.manifest(stage, key):
            raise StoreError(
                f"what {stage}/{key} of the run {of[0]} was made from cannot be told: its manifest is unsound",
                fix="run that sweep again, which sets the artifact aside and computes it anew",
            )
    found = [Waste(runs.folder(store.root, run_id), "it is not kept") for run_id in recorded if run_id not in kept]
    unneeded = [store.root.joinpath(*name) for name in store.names() if name not in needed]
    found += [Waste(path, "no run needs it") for path in unneeded]
    return found + [Waste(path, why) for path, why in _leftovers(store.root)]


def _can_be_told(store: Store, recorded: list[str]) -> None:
    for run_id in sorted(set(runs.present(store.root)) - set(recorded)):
        try:
            runs.finished(store.root, run_id)
        except StoreError as error:
            fact = f"what the run {run_id} needs cannot be told: {error.fact}"
            raise StoreError(fact, cause=error.cause, fix=error.fix) from None


def _leftovers(root: Path) -> Iterator[tuple[Path, str]]:
    for pattern in (".tmp-*", "[!.]*/.tmp-*"):
        yield from ((path, "it was left by a process that died") for path in sorted(root.glob(pattern)))
    for pattern in (".quarantine/*", "[!.]*/.quarantine-*"):
        yield from ((path, "it was found damaged") for path in sorted(root.glob(pattern)))
