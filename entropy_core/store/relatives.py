"""Artifacts that were made from the same inputs by other code, or with other releases of libraries."""

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from entropy_core.store.store import Store


class Relatives:
    """The artifacts of a store by stage and inputs; the store is gone through once, when it is first asked for one.

    Args:
        store: any store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def of(self, recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The manifests of all that a stage made from some inputs, the latest first.

        Args:
            recipe: see `store.recipe_of`.
        """
        return self._by_inputs.get(_without_code(recipe), [])

    @cached_property
    def _by_inputs(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for artifact in self._store.ls():
            found.setdefault(_without_code(artifact.manifest), []).append(artifact.manifest)
        for manifests in found.values():
            manifests.sort(key=lambda manifest: manifest["created"], reverse=True)
        return found


def _without_code(recipe: Mapping[str, Any]) -> str:
    return json.dumps([recipe[name] for name in ("format", "stage", "inputs")], sort_keys=True)
