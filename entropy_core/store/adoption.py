"""After an edit that changes nothing: recompute one artifact of each stage, and where it is equal, take over the rest.

What an edit or another release of a library has changed in the key of a stage counts as nothing once one of its
artifacts, computed anew, is equal to the old one bit by bit in all files. The others then get the new key: a new folder
with links to the old files, and a manifest that says from what they were taken over, and on what evidence.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from entropy_core.code.identity import code_of, name_of
from entropy_core.files.digests import file_digest
from entropy_core.store.artifact import Artifact, upstream
from entropy_core.store.data_files import DROPPED
from entropy_core.store.differing import first_difference
from entropy_core.store.manifest import commit, make_visible, recipe_key, temporary_sibling
from entropy_core.store.relatives import Relatives
from entropy_core.store.store import Stage, Store, recipe_of

_KEPT = ("summary", "execution", "versions", "wall_seconds", "peak_rss_bytes", "created")  # how the files came about


@dataclass
class Outcome:
    """What became of the artifacts of a stage.

    Attributes:
        found: they have the new key already.
        recomputed: one for each code and release that the others were made with.
        taken_over: they were equal, on the evidence of these.
        missing: there is no artifact of these inputs to be taken over.
        refused: where one that was recomputed first differs.
    """

    found: int = 0
    recomputed: int = 0
    taken_over: int = 0
    missing: int = 0
    refused: list[str] = field(default_factory=list)


class Adoption:
    """What runs the stages of a sweep in order to take over what is there; computes one artifact of each at most.

    Args:
        store: where the artifacts are.
        compute: computes an artifact in a given store.
        awaited: stands for an artifact of a stage that is not there.
    """

    def __init__(
        self,
        store: Store,
        compute: Callable[[Store, Stage, Mapping[str, Any]], Artifact],
        awaited: Callable[[str], Artifact],
    ) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self._store, self._compute, self._awaited = store, compute, awaited
        self._relatives = Relatives(store)
        self._evidence: dict[tuple[str, ...], Artifact | None] = {}

    def __call__(self, stage: Stage, inputs: dict[str, Any], label: str) -> Artifact:
        """The artifact under its new key, or what stands for it. Raises StoreError if the store cannot be written."""
        outcome = self.outcomes.setdefault(stage.name, Outcome())
        if not all(one["digest"] for one in upstream(inputs)):
            outcome.missing += 1
            return self._awaited(stage.name)
        recipe = recipe_of(stage, inputs)
        if found := self._store.find(stage.name, recipe_key(recipe)):
            outcome.found += 1
            return found
        for made in self._relatives.of(recipe):
            old, _ = self._store.check(stage.name, made["key"], file_digest)
            if old is not None:
                with self._store.writing():
                    return self._adopted(stage, inputs, recipe, old, outcome) or self._awaited(stage.name)
        outcome.missing += 1
        return self._awaited(stage.name)

    def _adopted(
        self, stage: Stage, inputs: dict[str, Any], recipe: dict[str, Any], old: Artifact, outcome: Outcome
    ) -> Artifact | None:
        """The old artifact under its new key; None where one like it came out otherwise."""
        case = (stage.name, old.manifest["code"], repr(old.manifest["libraries"]))
        if case not in self._evidence:
            again, difference = self._computed_again(stage, inputs, old)
            self._evidence[case] = again
            outcome.refused += [difference] if difference else []
            outcome.recomputed += not difference
            return again
        evidence = self._evidence[case]
        if evidence is None:
            return None
        outcome.taken_over += 1
        return self._taken_over(stage, inputs, recipe, old, evidence)

    def _computed_again(self, stage: Stage, inputs: dict[str, Any], old: Artifact) -> tuple[Artifact | None, str]:
        """The artifact, computed in a store of its own, and moved here if it is equal; else where it differs."""
        with temporary_sibling(self._store.root / "adopt") as temporary:
            again = self._compute(Store(temporary), stage, inputs)
            if again.digest != old.digest:
                return None, f"{old.stage}/{old.key}: {first_difference(old, again)}"
            with self._store.lock(again.stage, again.key):
                found, fault = self._store.check(again.stage, again.key)
                if fault:
                    self._store.quarantine(again.stage, again.key, fault)
                if found is None:
                    make_visible(again.directory, self._store.root / again.stage / again.key)
        return Artifact(again.stage, again.key, again.digest, self._store.root), ""

    def _taken_over(
        self, stage: Stage, inputs: dict[str, Any], recipe: dict[str, Any], old: Artifact, evidence: Artifact
    ) -> Artifact:
        key, made = recipe_key(recipe), old.manifest
        final = self._store.root / stage.name / key
        manifest = {
            **recipe,
            "key": key,
            "function": name_of(stage.function),
            "definitions": code_of(stage.function).definitions,
            "upstream": upstream(inputs),
            **{name: made[name] for name in _KEPT},
            "adopted": {"from": old.to_dict(), "evidence": evidence.key, "at": datetime.now(UTC).isoformat()},
        }
        with self._store.lock(stage.name, key), temporary_sibling(final) as temporary:
            if (found := self._store.check(stage.name, key)[0]) is not None:
                return found
            for name in [*made["files"], DROPPED]:
                if (old.directory / name).exists():
                    _link(old.directory / name, temporary / name)
            digest = commit(temporary, final, manifest, made["files"])
        return Artifact(stage.name, key, digest, self._store.root)


def _link(old: Path, new: Path) -> None:
    """The same file under another name; a copy, where the file system has no links."""
    new.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(old, new)
    except OSError:
        shutil.copyfile(old, new)
