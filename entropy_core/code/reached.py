"""The definitions that a function reaches, and one digest of them and of how they are tied together."""

import ast
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from entropy_core.code.bindings import Bound, Sources, Target
from entropy_core.code.definitions import Definition, Module, sha256
from entropy_core.code.passive import CALLS_NO_METHOD, PASSIVE
from entropy_core.code.reading import Chain

GIVEN = {
    "entropy_core.execution:Execution",
    "entropy_core.files.digests:file_digest",
    "entropy_core.isolation.process:Isolation",
    "entropy_core.store.artifact:Artifact",
    "entropy_core.store.artifact:Writer",
    "entropy_core.store.store:Stage",
    "entropy_core.store.tensor_file:TensorFile",
    "entropy_core.store.tensor_file:TensorWriter",
}
"""What is given to a stage, or made of it, and is no part of its code: where bytes lie, and what their SHA-256 is."""

Link = tuple[Target, Chain]
"""What a chain leads to, and the attributes of it that are asked for."""


@dataclass
class Reached:
    """What a function reaches.

    Attributes:
        roots: the function; more than one definition where it is defined more than once.
        definitions: each with what its chains lead to.
        effects: those of the definitions that run whether anybody names them or not.
        libraries: top-level packages from outside the project that the definitions name.
        unnamed: modules from outside that are imported, and named by nothing.
    """

    roots: list[Definition]
    definitions: dict[Definition, dict[str, list[Link]]] = field(default_factory=dict)
    effects: list[Definition] = field(default_factory=list)
    libraries: set[str] = field(default_factory=set)
    unnamed: set[str] = field(default_factory=set)

    def digests(self) -> dict[str, str]:
        """`module:name` → digest of each definition, sorted; the same name twice counts as one."""
        found: dict[str, list[str]] = {}
        for definition, links in self.definitions.items():
            named = {key: [(getattr(to, "name", to), rest) for to, rest in of] for key, of in links.items()}
            digest = sha256([definition.digest, named])
            found.setdefault(f"{definition.module}:{definition.name}", []).append(digest)
        return {name: of[0] if len(of) == 1 else sha256(sorted(of)) for name, of in sorted(found.items())}

    def digest(self) -> str:
        """SHA-256 of the definitions, each with the numbers of those that it leads to.

        They are numbered in the order in which they are met from the function on, so that neither the names of modules
        nor the order of what is in them make a difference.
        """
        numbers: dict[Definition, int] = {}
        for start in [*self.roots, *sorted(self.effects, key=lambda one: (one.digest, one.module))]:
            ahead = deque([start])
            while ahead:
                definition = ahead.popleft()
                if definition not in numbers:
                    numbers[definition] = len(numbers)
                    links = self.definitions[definition]
                    ahead.extend(to for key in sorted(links) for to, _ in links[key] if isinstance(to, Definition))
        rows: list[Any] = [sorted(self.unnamed)]
        for definition in numbers:
            links = self.definitions[definition]
            numbered = {
                key: [(to if isinstance(to, str) else numbers[to], rest) for to, rest in of]
                for key, of in links.items()
            }
            rows.append([definition.digest, numbered])
        return sha256(rows)


class _Walk:
    """Follows names until nothing new is reached."""

    def __init__(self, sources: Sources, roots: list[Definition]) -> None:
        self.sources = sources
        self.reached = Reached(roots)
        self.attributes: set[str] = set()  # asked of objects whose class is not known
        self.every_attribute = False
        self.imported: set[str] = set()  # modules that are run
        self.ahead: deque[Definition] = deque()

    def run(self) -> None:
        for root in self.reached.roots:
            self.imports(root.module)
            self.reach(root)
        while self.ahead or self.methods():
            while self.ahead:
                self.read(self.ahead.popleft())

    def reach(self, definition: Definition) -> bool:
        """Note a definition; whether it counts."""
        if _is_given(definition):
            return False
        if definition not in self.reached.definitions:
            self.reached.definitions[definition] = {}
            self.ahead.append(definition)
        return True

    def read(self, definition: Definition) -> None:
        links, reads = self.reached.definitions[definition], definition.reads
        self.import_unnamed(definition.unused)
        for name in sorted(definition.imports):
            if not self.sources.defines(name):
                self.imports(name)
        for number, chain in enumerate(definition.references):
            links[f"{number:06}"] = list(self.targets(definition, chain))
        for chain in sorted(reads.chains - set(definition.references) | reads.types):
            links[".".join(chain)] = list(self.targets(definition, chain))
        self.attributes |= reads.attributes
        module = self.sources.module(definition.module)
        assert module is not None
        if reads.looks_up:
            links["its module"] = [(to, ()) for to in self.whole(module)]
        for root in reads.computed:
            found = [to for to in self.bound(definition, (root,)) if isinstance(to, str)] if root else []
            self.every_attribute |= not found

    def bound(self, definition: Definition, chain: Chain) -> list[Bound]:
        """What the first name of a chain is bound to, where the definition stands."""
        module = self.sources.module(definition.module)
        assert module is not None
        aliases = list(definition.aliases.get(chain[0], ()))
        if chain in definition.reads.types:
            aliases += module.types.get(chain[0], ())
        found = [to for alias in aliases for to in self.sources.follow(alias)]
        if chain[0] in module.bindings or module.stars or module.is_package:  # else it is a built-in
            found += self.sources.lookup(module, chain[0])
        return found

    def targets(self, definition: Definition, chain: Chain) -> Iterator[Link]:
        """Reach what a chain leads to."""
        for to in self.bound(definition, chain):
            yield from self._within(to, chain[1:])

    def _within(self, to: Bound, attributes: Chain) -> Iterator[Link]:
        if isinstance(to, str):
            self.reached.libraries.add(to.partition(".")[0])
            yield to, attributes
        elif isinstance(to, Definition):
            self.attributes |= set(attributes)
            yield (to if self.reach(to) else f"given {to.name}"), attributes
        elif attributes and (found := self.sources.lookup(to, attributes[0])):
            for inner in found:
                yield from self._within(inner, attributes[1:])
        else:
            yield "", attributes
            if attributes[:1] not in (("__name__",), ("__doc__",), ("__file__",)):
                yield from ((definition, ()) for definition in self.whole(to))

    def whole(self, module: Module) -> Iterator[Definition]:
        """Reach everything in a module."""
        self.imports(module.name)
        for definition in sorted(module.statements, key=lambda one: (one.name, one.digest)):
            if self.reach(definition):
                yield definition

    def imports(self, name: str) -> None:
        """Note that a module is run, and with it its packages and all that it imports."""
        while name and name not in self.imported:
            self.imported.add(name)
            if module := self.sources.module(name):
                self.import_unnamed(module.unused)
                for other in sorted(module.imports):
                    if not self.sources.defines(other):
                        self.imports(other)
                for definition in module.statements:
                    if self.acts(definition):
                        self.reached.effects.append(definition)
                        self.reach(definition)
            name = name.rpartition(".")[0]

    def import_unnamed(self, names: set[str]) -> None:
        """Note modules from outside the project that nobody would import but for what that does."""
        foreign = {name for name in names if not self.sources.owns(name)}
        foreign = {name for name in foreign if name.partition(".")[0] not in sys.stdlib_module_names}
        self.reached.unnamed |= foreign
        self.reached.libraries |= {name.partition(".")[0] for name in foreign}

    def acts(self, definition: Definition) -> bool:
        """Whether a definition may do something when its module is imported, so that it counts without being named."""
        if definition.acts or not all(self.leaves_nothing(definition, chain) for chain in definition.calls):
            return True
        if any(self.registers(definition, base) for base in definition.bases):
            return True
        return any(map(self.acts, definition.methods.values()))

    def leaves_nothing(self, definition: Definition, called: Chain) -> bool:
        """Whether a call does nothing but return something: one that is known to, or that makes a record."""
        return all(
            of in PASSIVE if isinstance(of, str) else _is_given(of) or self.is_record(of)
            for of in self.named(definition, called)
        )

    def is_record(self, definition: Definition) -> bool:
        """Whether it is a class whose objects are made without code of the project."""
        made = any(isinstance(node, ast.ClassDef) for node in definition.nodes)
        by_hand = definition.methods.keys() & {"__init__", "__new__", "__post_init__", "__call__"}
        return (
            made
            and not by_hand
            and not definition.acts
            and all(
                of in CALLS_NO_METHOD if isinstance(of, str) else self.is_record(of)
                for base in definition.bases
                for of in self.named(definition, base)
            )
        )

    def registers(self, definition: Definition, base: Chain) -> bool:
        """Whether a base class may note that a class was derived from it."""
        return any(
            of not in PASSIVE
            if isinstance(of, str)
            else "__init_subclass__" in of.methods or any(self.registers(of, inner) for inner in of.bases)
            for of in self.named(definition, base)
        )

    def calls_back(self, definition: Definition, base: Chain) -> bool:
        """Whether a base class from outside the project may call methods of a class."""
        return any(
            of not in CALLS_NO_METHOD if isinstance(of, str) else any(self.calls_back(of, inner) for inner in of.bases)
            for of in self.named(definition, base)
        )

    def named(self, definition: Definition, chain: Chain) -> list[Target]:
        """What a chain names, without reaching it; "" for what cannot be told."""
        if not chain:
            return [""]
        found: list[Target] = []
        ahead = [(to, chain[1:]) for to in self.bound(definition, chain[:1])]
        for to, attributes in ahead:
            if isinstance(to, Module):
                ahead += [(one, attributes[1:]) for one in self.sources.lookup(to, attributes[0])] if attributes else []
            elif isinstance(to, str):
                found.append(".".join([to, *attributes]))
            else:
                found.append("" if attributes else to)
        return found or [".".join(["builtins", *chain])]

    def methods(self) -> bool:
        """Reach the methods that may be called by now; whether there was a new one."""
        found = False
        for definition, links in list(self.reached.definitions.items()):
            if not definition.methods:
                continue
            every = self.every_attribute or any(self.calls_back(definition, base) for base in definition.bases)
            for name, method in sorted(definition.methods.items()):
                hidden = name.startswith("_") and name.endswith("_")
                if every or hidden or name in self.attributes or self.acts(method):
                    key = f"def {name}"
                    found |= key not in links
                    links[key] = [(method, ())]
                    self.reach(method)
        return found


def _is_given(definition: Definition) -> bool:
    return f"{definition.module}:{definition.name}" in GIVEN


def walk(sources: Sources, module_name: str, function: str) -> Reached:
    """Find everything that counts for a function; nothing when the module does not define it."""
    module = sources.module(module_name)
    found = module.bindings.get(function, []) if module else []
    walk = _Walk(sources, [definition for definition in found if isinstance(definition, Definition)])
    walk.run()
    return walk.reached
