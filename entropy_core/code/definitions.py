"""The definitions of a module, read from its source without running it.

A definition is a statement at the top level of a module, or a method of a class there: what can be reached, and
counted, by itself. For each of them this says which names it reads from outside itself, which attributes it asks
objects for, and what it imports. `reached` follows these from definition to definition.

What never runs is left out: comments, docstrings, `if TYPE_CHECKING:` blocks, and `if __name__ == "__main__":`.
"""

import ast
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from entropy_core.code.reading import Chain, Read, bound_names, chain_of, children, read

_NESTING = (ast.ClassDef, ast.If, ast.For, ast.While, ast.Try, ast.TryStar, ast.With, ast.Match)


class Alias(NamedTuple):
    """What an import binds a name to: a module, or a name in one."""

    module: str
    name: str = ""


@dataclass(eq=False)
class Definition:
    """A statement of a module, or a method.

    Attributes:
        module: dotted name of the module.
        name: what it defines, such as `moved`; of a statement that defines nothing, its text.
        nodes: its syntax trees, without what never runs; a class is without its methods.
        reads: what it reads from outside itself.
        aliases: names that imports within it bind.
        imports: modules that these run; some are names in modules.
        module_names: what its module binds.
        unused: modules that are imported, and not by name: for what importing them does.
        acts: it is neither a definition nor an assignment, so that it runs for what it does.
        calls: what it calls, or is decorated with, when the module is imported; () for what is no name.
        methods: of a class, by name.
        bases: of a class; () for one that is no name.
    """

    module: str
    name: str
    nodes: list[ast.stmt]
    reads: Read
    aliases: dict[str, list[Alias]]
    imports: set[str]
    module_names: Mapping[str, Any]
    unused: set[str] = field(default_factory=set)
    acts: bool = False
    calls: list[Chain] = field(default_factory=list)
    methods: "dict[str, Definition]" = field(default_factory=dict)
    bases: list[Chain] = field(default_factory=list)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of its syntax trees, with a number for each reference: what it leads to counts, and not its name."""
        return sha256(self._trees[0])

    @property
    def references(self) -> list[Chain]:
        """Its chains that begin with a name of its module or of an import, in the order of their numbers."""
        return self._trees[1]

    @cached_property
    def _trees(self) -> tuple[list[Any], list[Chain]]:
        numbers: dict[Chain, int] = {}

        def plain(node: Any) -> Any:  # `ast.dump` prints empty fields in some Python versions only
            if isinstance(node, list):
                return [plain(item) for item in node]
            if not isinstance(node, ast.AST):
                return ascii(node)
            kind = type(node).__name__
            if isinstance(node, ast.Import | ast.ImportFrom):
                return [kind]
            chain = self.reads.references.get(node)
            if chain and (chain[0] in self.aliases or chain[0] in self.module_names):
                return ["Reference", type(getattr(node, "ctx", None)).__name__, numbers.setdefault(chain, len(numbers))]
            fields = ((name, value) for name, value in ast.iter_fields(node) if value is not None and value != [])
            return [kind, {name: plain(value) for name, value in fields}]

        return [plain(node) for node in self.nodes], list(numbers)


class Module:
    """A module's definitions.

    Attributes:
        is_package: it may have modules within it.
        bindings: name → what it may be bound to, in the order of the statements.
        types: the same for imports that only a type checker runs.
        stars: modules whose names are all imported.
        imports: modules that importing this one runs; some are names in modules.
        unused: of these, those that nothing in it names.
        statements: every definition but methods.
    """

    def __init__(self, name: str, source: bytes, is_package: bool) -> None:
        self.name, self.is_package = name, is_package
        self._package = name if is_package else name.rpartition(".")[0]
        self.bindings: dict[str, list[Definition | Alias]] = {}
        self.types: dict[str, list[Alias]] = {}
        self.stars: list[str] = []
        self.statements: list[Definition] = []
        tree = ast.parse(source)
        for node in _every_statement(tree.body):
            if _only_for_types(node):
                _merge(self.types, self._aliases(_statements(node)))
        body = _Executed().visit(tree).body
        self.imports = self._imports(list(_at_import(body)))
        for names, aliases in self._aliases(list(_at_import(body)), stars=self.stars).items():
            self.bindings[names] = list(aliases)
        for statement in body:
            self._add(statement)
        parts = [part for one in self.statements for part in (one, *one.methods.values())]
        self.unused = _unused(_at_import(body), {chain for part in parts for chain in part.reads.chains})

    def _add(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.Import | ast.ImportFrom) or (
            isinstance(statement, ast.If)
            and ast.unparse(statement.test) == "__name__ == '__main__'"
            and not statement.orelse
        ):
            return
        names = sorted(bound_names([statement]))
        if isinstance(statement, ast.ClassDef):
            definition = self._class(statement)
        else:
            text = ", ".join(names) or f"`{' '.join(ast.unparse(statement).split()):.60}`"
            definition = self._definition(text, [statement])
        self.statements.append(definition)
        for name in names:
            self.bindings.setdefault(name, []).append(definition)
        for part in [definition, *definition.methods.values()]:
            for name in part.reads.assigned_globals:
                self.bindings.setdefault(name, []).append(part)

    def _definition(self, name: str, nodes: list[ast.stmt]) -> Definition:
        imports = [node for node in _every_statement(nodes) if isinstance(node, ast.Import | ast.ImportFrom)]
        aliases = self._aliases(imports)
        reads = read(nodes, set(aliases))
        definition = Definition(self.name, name, nodes, reads, aliases, self._imports(imports), self.bindings)
        definition.unused = _unused(imports, reads.chains)
        definition.acts = any(map(_acts, nodes))
        definition.calls = [chain for node in nodes for chain in _calls(node)]
        return definition

    def _class(self, node: ast.ClassDef) -> Definition:
        methods: dict[str, list[ast.stmt]] = {}
        for item in node.body:
            if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
                methods.setdefault(item.name, []).append(item)
        rest = [item for item in node.body if not isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
        fields = {name: getattr(node, name) for name in node._fields}
        definition = self._definition(node.name, [ast.ClassDef(**fields | {"body": rest})])
        definition.methods = {name: self._definition(f"{node.name}.{name}", of) for name, of in methods.items()}
        definition.bases = [chain_of(base.value if isinstance(base, ast.Subscript) else base) for base in node.bases]
        if node.keywords:  # a metaclass may do anything with it
            definition.bases.append(())
        return definition

    def _aliases(self, nodes: Iterable[ast.AST], stars: list[str] | None = None) -> dict[str, list[Alias]]:
        found: dict[str, list[Alias]] = {}
        for node in nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    whole, first = Alias(alias.name), alias.name.partition(".")[0]
                    found.setdefault(alias.asname or first, []).append(whole if alias.asname else Alias(first))
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if alias.name != "*":
                        found.setdefault(alias.asname or alias.name, []).append(Alias(self._base(node), alias.name))
                    elif stars is not None:
                        stars.append(self._base(node))
        return found

    def _imports(self, nodes: Iterable[ast.AST]) -> set[str]:
        found: set[str] = set()
        for node in nodes:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {self._base(node), *(f"{self._base(node)}.{alias.name}" for alias in node.names)}
        return found

    def _base(self, node: ast.ImportFrom) -> str:
        dotted = "." * node.level + (node.module or "")
        return importlib.util.resolve_name(dotted, self._package) if node.level else dotted


def _unused(nodes: Iterable[ast.AST], chains: set[Chain]) -> set[str]:
    """The modules whose imports bind nothing that a chain begins with."""
    begun = {chain[:length] for chain in chains for length in range(1, len(chain) + 1)}
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            bound = ((alias, (alias.asname,) if alias.asname else tuple(alias.name.split("."))) for alias in node.names)
            found |= {alias.name for alias, chain in bound if chain not in begun}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module for alias in node.names if (alias.asname or alias.name,) not in begun | {("*",)}}
    return found


def _merge(into: dict[str, list[Alias]], found: dict[str, list[Alias]]) -> None:
    for name, aliases in found.items():
        into.setdefault(name, []).extend(aliases)


def _acts(statement: ast.stmt) -> bool:
    """Whether a statement may do anything but call and bind names."""
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return False
        case ast.ClassDef():
            return any(map(_acts, statement.body))
        case ast.Assign():
            return not all(map(_is_name, statement.targets))
        case ast.AnnAssign():
            return not _is_name(statement.target)
        case ast.Expr():
            return not isinstance(statement.value, ast.Constant)
    return type(statement).__name__ not in ("TypeAlias", "Import", "ImportFrom", "Pass")


def _calls(node: ast.AST) -> Iterator[Chain]:
    """What is called or decorates when a statement runs; of functions, by decorators, defaults and annotations."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield from map(chain_of, (d for d in node.decorator_list if not isinstance(d, ast.Call) and not _harmless(d)))
    if isinstance(node, ast.Call) and not _harmless(node.func):
        yield chain_of(node.func)
    body = node.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) else []
    left_out = {id(part) for part in (body if isinstance(body, list) else [body])}
    for child in children(node):
        if id(child) not in left_out:
            yield from _calls(child)


def _harmless(called: ast.expr) -> bool:
    """A method of a literal, or a further part of a property."""
    of_literal = isinstance(called, ast.Attribute) and isinstance(called.value, ast.Constant)
    return of_literal or (isinstance(called, ast.Attribute) and called.attr in ("setter", "getter", "deleter"))


def _is_name(target: ast.expr) -> bool:
    inner = target.elts if isinstance(target, ast.Tuple | ast.List) else []
    return isinstance(target, ast.Name) or (bool(inner) and all(map(_is_name, inner)))


def _at_import(statements: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Every statement that importing a module runs: also those within others, but for functions."""
    for statement in statements:
        yield statement
        if isinstance(statement, _NESTING):
            yield from _at_import(_statements(statement))


def _every_statement(statements: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements and all those within them; no expression is looked into, since none has statements in it."""
    for statement in statements:
        yield statement
        yield from _every_statement(_statements(statement))


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    for child in children(node):
        if isinstance(child, ast.stmt):
            yield child
        elif isinstance(child, ast.ExceptHandler | ast.match_case):
            yield from _statements(child)


def _only_for_types(node: ast.AST) -> bool:
    test = getattr(node, "test", None) if isinstance(node, ast.If) else None
    return (test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)) == "TYPE_CHECKING"


class _Executed(ast.NodeTransformer):
    """Drops what never runs: strings that stand alone (docstrings), and what only a type checker reads."""

    def visit(self, node: ast.AST) -> Any:
        return node if isinstance(node, ast.expr) else super().visit(node)  # which has no statements in it

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        return node.orelse if _only_for_types(node) else node


def sha256(document: Any) -> str:
    """Of the JSON of a document."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
