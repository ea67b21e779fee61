"""Why two artifacts of one stage have different keys, and why a stage would run again.

A key is made of the stage's code, of the libraries that this names, and of its inputs. The manifest holds all of it: a
digest of every definition that the code reaches, the release of every library, and every input. Where an input is an
artifact, the reasons why that one differs are the reasons.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from entropy_core.code.identity import code_at, code_of, name_of
from entropy_core.code.library_versions import compared
from entropy_core.errors import StoreError
from entropy_core.store import runs
from entropy_core.store.artifact import upstream
from entropy_core.store.store import Stage, Store, recipe_of

Recipe = Mapping[str, Any]
"""What makes an artifact, as its manifest says it: `stage`, `function`, `code`, `definitions`, `libraries`, `inputs`,
`upstream`."""

_ABSENT = "–"
_CANDIDATES = 8  # whose upstream artifacts are compared, too, to tell which is the nearest


class Difference(NamedTuple):
    """One reason why two artifacts differ."""

    field: str  # "function", "definition MODULE:NAME", "library NAME", or the dotted path of an input
    before: str
    after: str
    stages: tuple[str, ...]  # that have it: the artifacts' own, or those that they depend on

    def __str__(self) -> str:
        return f"{self.field}: {self.before} → {self.after} ({', '.join(self.stages)})"


def recipe(stage: Stage, inputs: Mapping[str, Any]) -> Recipe:
    """What would make an artifact, as its manifest would say it."""
    return {
        **recipe_of(stage, inputs),
        "function": name_of(stage.function),
        "definitions": code_of(stage.function).definitions,
        "upstream": upstream(inputs),
    }


def of_this_code(made: Recipe) -> Recipe:
    """The recipe of an artifact, with the code and the libraries that are here now. Raises StoreError when its function
    is not."""
    code = code_at(made["function"])
    libraries = compared(code.libraries)
    return {**made, "code": code.digest, "definitions": code.definitions, "libraries": libraries}


def resolve(store: Store, text: str) -> runs.Name:
    """Find an artifact by its key, or the beginning of it, alone or as stage/key.

    Raises:
        StoreError: there is none, or more than one.
    """
    stage, _, key = text.rpartition("/")
    found = [name for name in store.names() if name[1].startswith(key) and stage in ("", name[0])] if key else []
    if len(found) == 1:
        return found[0]
    listed = f"{len(found)} artifacts: {', '.join('/'.join(name) for name in found[:4])}, …" if found else "no artifact"
    raise StoreError(f"{text!r} names {listed} in {store.root}", fix="`entropy-probe store ls` lists what is there")


def differences(store: Store, before: Recipe, after: Recipe) -> list[Difference]:
    """Why two artifacts differ.

    Args:
        store: where their upstream artifacts are looked up.
        before: of the one.
        after: of the other, of the same stage.

    Returns:
        The reasons, each once, those of upstream artifacts in the place of the inputs that these are. Empty when the
        recipes are the same.
    """
    found: dict[tuple[str, str, str], dict[str, None]] = {}
    for stage, *change in _changes(store, before, after, set()):
        found.setdefault((change[0], change[1], change[2]), {})[stage] = None
    return [Difference(*change, tuple(stages)) for change, stages in found.items()]


def _changes(store: Store, before: Recipe, after: Recipe, seen: set[tuple[str, str]]) -> Iterator[tuple[str, ...]]:
    """Stage, field, before and after of each difference, upstream ones included."""
    stage = before["stage"]
    if before["code"] != after["code"]:
        yield from ((stage, *change) for change in _code_changes(before, after))
    for library in sorted(before["libraries"].keys() | after["libraries"].keys()):
        x, y = (of["libraries"].get(library, _ABSENT) for of in (before, after))
        if x != y:
            yield stage, f"library {library}", x, y
    a, b = dict(_flat(before["inputs"])), dict(_flat(after["inputs"]))
    for field in dict.fromkeys([*a, *b]):
        x, y = a.get(field, _ABSENT), b.get(field, _ABSENT)
        if x == y:
            continue
        if isinstance(x, Mapping) and isinstance(y, Mapping) and x["artifact"] == y["artifact"]:
            pair = (x["digest"], y["digest"])
            if pair in seen:
                continue
            seen.add(pair)
            made, other = _manifest(store, before, x), _manifest(store, after, y)
            if made and other and (found := list(_changes(store, made, other, seen))):
                yield from found
                continue
        yield stage, field, _named(before, x), _named(after, y)


def _code_changes(before: Recipe, after: Recipe) -> Iterator[tuple[str, str, str]]:
    """Field, before and after of the definitions that are others; where one was only moved, it is none."""
    old, new = before["definitions"].items(), after["definitions"].items()
    gone, come = dict(old - new), dict(new - old)
    for name, digest in list(gone.items()):
        moved = [to for to, of in come.items() if of == digest and to.rpartition(":")[2] == name.rpartition(":")[2]]
        if moved and name not in come:
            del gone[name], come[moved[0]]
    for name in sorted(gone.keys() | come.keys()):
        yield f"definition {name}", _code(gone.get(name)), _code(come.get(name))
    if before["function"] != after["function"] and not gone and not come:
        yield "function", before["function"], after["function"]
    elif not gone and not come:
        yield (
            "code",
            _code(before["code"]),
            _code(after["code"]),
        )  # other imports between them


def nearest(store: Store, wanted: Recipe, key: str = "") -> tuple[runs.Name, list[Difference]] | None:
    """The artifact of the same stage that differs least from a recipe.

    Args:
        store: where to look.
        wanted: a recipe.
        key: of an artifact to leave out.

    Returns:
        Its name, and why it differs; None when the store has no other artifact of the stage.
    """
    candidates = []
    for name in store.names():
        if name[0] == wanted["stage"] and name[1] != key and (manifest := store.manifest(*name)):
            a, b = dict(_flat(manifest["inputs"])), dict(_flat(wanted["inputs"]))
            unequal = sum(a.get(field) != b.get(field) for field in a.keys() | b.keys())
            candidates.append((-unequal, manifest["code"] == wanted["code"], manifest["created"], name))
    closest = [candidate[-1] for candidate in sorted(candidates, reverse=True)[:_CANDIDATES]]
    found = [(name, differences(store, store.manifest(*name), wanted)) for name in closest]
    return min(found, key=lambda one: len(one[1]), default=None)


def _flat(value: Any, where: str = "inputs") -> Iterator[tuple[str, Any]]:
    """The leaves of canonical inputs; those that are artifacts stay as they are."""
    if isinstance(value, Mapping) and set(value) == {"float"}:
        yield where, value["float"]
    elif isinstance(value, Mapping) and set(value) == {"artifact", "digest"}:
        yield where, value
    elif isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _flat(item, f"{where}.{name}")
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _flat(item, f"{where}.{index}")
    else:
        yield where, repr(value)


def _code(digest: str | None) -> str:
    return f"code {digest[:12]}" if digest else "not reached"


def _name(of: Recipe, leaf: Mapping[str, str]) -> runs.Name | None:
    same = (one for one in of["upstream"] if (one["stage"], one["digest"]) == (leaf["artifact"], leaf["digest"]))
    return next(((one["stage"], one["key"]) for one in same), None)


def _manifest(store: Store, of: Recipe, leaf: Mapping[str, str]) -> dict[str, Any]:
    name = _name(of, leaf)
    return store.manifest(*name) if name else {}


def _named(of: Recipe, leaf: Any) -> str:
    if not isinstance(leaf, Mapping):
        return re.sub("'([0-9a-f]{12})[0-9a-f]{52}'", r"\1…", leaf)  # a digest
    return "/".join(_name(of, leaf) or (leaf["artifact"], f"content {leaf['digest'][:12]}"))
