"""What the names in the modules of a project are bound to, from module to module."""

from collections.abc import Callable

from entropy_core.code.definitions import Alias, Definition, Module

Target = Definition | str
"""What a name is bound to; of what the project does not define, the dotted name."""
Bound = Target | Module


class Sources:
    """The modules of a project, each read when it is first asked for.

    Args:
        roots: its top-level packages.
        find: finds a module by its name; None for one that has no source.
    """

    def __init__(self, roots: frozenset[str], find: Callable[[str], Module | None]) -> None:
        self.read: dict[str, Module | None] = {}
        self._roots, self._find = roots, find

    def owns(self, name: str) -> bool:
        """Whether a dotted name is in the project."""
        return name.partition(".")[0] in self._roots

    def module(self, name: str) -> Module | None:
        """A module of the project; None for anything else."""
        if not self.owns(name):
            return None
        if name not in self.read:
            self.read[name] = self._find(name)
        return self.read[name]

    def inner(self, module: Module, name: str) -> Module | None:
        """A module of a package."""
        return self.module(f"{module.name}.{name}") if module.is_package else None

    def defines(self, dotted: str) -> bool:
        """Whether a dotted name is that of something in a module, so that it is no module."""
        package, _, name = dotted.rpartition(".")
        module = self.module(package)
        if module is None:
            return False
        return not module.is_package or any(isinstance(one, Definition) for one in module.bindings.get(name, ()))

    def lookup(self, module: Module, name: str, seen: frozenset[tuple[str, str]] = frozenset()) -> list[Bound]:
        """What a name in a module is bound to."""
        if (module.name, name) in seen:
            return []
        seen |= {(module.name, name)}
        found: list[Bound] = []
        for binding in module.bindings.get(name, ()):
            found += self.follow(binding, seen) if isinstance(binding, Alias) else [binding]
        if not found and (inner := self.inner(module, name)):
            found = [inner]
        for star in () if found else module.stars:
            source = self.module(star)
            found += self.lookup(source, name, seen) if source else [f"{star}.{name}"]
        if not found and "__getattr__" in module.bindings:
            found = self.lookup(module, "__getattr__", seen)
        return found

    def follow(self, alias: Alias, seen: frozenset[tuple[str, str]] = frozenset()) -> list[Bound]:
        """What an import binds its name to."""
        module = self.module(alias.module)
        if not alias.name:
            return [module or alias.module]
        found = self.lookup(module, alias.name, seen) if module else []
        if not found and module is None and (inner := self.module(f"{alias.module}.{alias.name}")):
            found = [inner]  # of a package without a file of its own
        return found or [f"{alias.module}.{alias.name}"]
