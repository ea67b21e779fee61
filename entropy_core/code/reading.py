"""What a piece of syntax reads from outside itself: names, attributes, and what it looks up by a computed name."""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Chain = tuple[str, ...]
"""A name and attributes of it: `torch.nn.Module` is ("torch", "nn", "Module")."""

_BY_NAME = {"getattr", "setattr", "hasattr", "delattr"}  # built-ins that take the name of an attribute
_ANY_NAME = {"attrgetter", "methodcaller"}
_ALL_OF_MODULE = {("globals",), ("eval",), ("exec",), ("__import__",), ("sys", "modules")}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class _Scope(NamedTuple):
    """What a function binds for itself, and what it declares to be its module's."""

    bound: set[str]
    declared: set[str]


@dataclass
class Read:
    """What a piece of syntax reads from outside itself.

    Attributes:
        chains: of names that are not local, with all attributes that are asked for.
        types: the same within annotations, quoted or not: classes of objects that may be given to it.
        attributes: those of everything else, such as of local variables and of what functions return.
        computed: what is asked for an attribute by a computed name: root of its chain, "" where it has none.
        references: node → the chain that it is, for those in `chains`.
        looks_up: it can get at anything in its module by a computed name, or run text.
        assigned_globals: names of the module that functions within it assign.
    """

    chains: set[Chain] = field(default_factory=set)
    types: set[Chain] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)
    computed: set[str] = field(default_factory=set)
    references: dict[ast.AST, Chain] = field(default_factory=dict)
    looks_up: bool = False
    assigned_globals: set[str] = field(default_factory=set)


def read(nodes: Iterable[ast.AST], imported: set[str]) -> Read:
    """Read syntax trees as Python's scopes have it; what is in doubt is taken for a name of the module.

    Args:
        nodes: to be read.
        imported: names that imports within them bind; they are noted although they are local.
    """
    visitor = _Visitor(imported)
    for node in nodes:
        visitor.visit(node)
    return visitor.found


class _Visitor(ast.NodeVisitor):
    def __init__(self, imported: set[str]) -> None:
        self.found = Read()
        self._imported = imported
        self._scopes: list[_Scope] = []

    def _is_local(self, name: str) -> bool:
        for scope in reversed(self._scopes):
            if name in scope.declared:
                return False
            if name in scope.bound:
                return name not in self._imported
        return False

    def _note(self, node: ast.AST, chain: Chain) -> None:
        if self._is_local(chain[0]):
            self.found.attributes |= set(chain[1:])
        else:
            self.found.chains.add(chain)
            self.found.references[node] = chain
        if chain in _ALL_OF_MODULE or chain[-1] == "import_module":
            self.found.looks_up = True
        if chain[-1] in _ANY_NAME:
            self.found.computed.add("")

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self._note(node, (node.id,))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        chain = chain_of(node)
        if chain:
            self._note(node, chain)
        else:
            self.found.attributes.add(node.attr)
            self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in _BY_NAME and len(node.args) > 1:
            of, name = node.args[:2]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                self.found.attributes.add(name.value)
            else:
                chain = chain_of(of)
                self.found.computed.add(chain[0] if chain and not self._is_local(chain[0]) else "")
        self.generic_visit(node)

    def visit_MatchClass(self, node: ast.MatchClass) -> None:
        self.found.attributes |= set(node.kwd_attrs)
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for decorator in node.decorator_list:
            self.visit(decorator)
        self._arguments(node.args)
        self._annotation(node.returns)
        self._within(node, node.body)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._arguments(node.args)
        self._within(node, [node.body])

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._annotation(node.annotation)
        self.visit(node.target)
        if node.value:
            self.visit(node.value)

    def _comprehension(self, node: Any) -> None:
        self.visit(node.generators[0].iter)  # which is evaluated outside
        targets = [part for generator in node.generators for part in ast.walk(generator.target)]
        self._scopes.append(_Scope(_stored(targets), set()))
        self.generic_visit(node)
        self._scopes.pop()

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension

    def _arguments(self, arguments: ast.arguments) -> None:
        for default in [*arguments.defaults, *filter(None, arguments.kw_defaults)]:
            self.visit(default)
        for argument in _parameters(arguments):
            self._annotation(argument.annotation)

    def _annotation(self, annotation: ast.expr | None) -> None:
        if annotation is None:
            return
        self.visit(annotation)
        self.found.types |= read([annotation], set()).chains
        for part in ast.walk(annotation):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                try:
                    quoted = ast.parse(part.value, mode="eval")
                except SyntaxError:
                    continue
                self.found.types |= read([quoted], set()).chains

    def _within(self, node: Any, body: list[Any]) -> None:
        own = list(_own(body))
        declared = {name for of in own if isinstance(of, ast.Global) for name in of.names}
        outer = {name for of in own if isinstance(of, ast.Nonlocal) for name in of.names}
        parameters = {argument.arg for argument in _parameters(node.args)}
        generics = {parameter.name for parameter in getattr(node, "type_params", ())}
        self.found.assigned_globals |= declared
        self._scopes.append(_Scope((parameters | generics | _stored(own)) - declared - outer, declared))
        for item in body:
            self.visit(item)
        self._scopes.pop()


def chain_of(node: ast.AST) -> Chain:
    """The chain that an expression is; empty where it is none."""
    attributes: list[str] = []
    while isinstance(node, ast.Attribute):
        attributes.append(node.attr)
        node = node.value
    return (node.id, *reversed(attributes)) if isinstance(node, ast.Name) else ()


def bound_names(statements: Iterable[ast.AST]) -> set[str]:
    """The names that statements bind where they stand, not within functions, classes and comprehensions."""
    return _stored(_own(statements))


def _stored(nodes: Iterable[ast.AST]) -> set[str]:
    found: set[str] = set()
    for node in nodes:
        match node:
            case ast.Name(ctx=ast.Store() | ast.Del()):
                found.add(node.id)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                found.add(node.name)
            case ast.Import() | ast.ImportFrom():
                found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
            case ast.ExceptHandler() | ast.MatchAs() | ast.MatchStar():
                found |= {node.name} if node.name else set()
            case ast.MatchMapping():
                found |= {node.rest} if node.rest else set()
    return found


def _own(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """The nodes of a function's own scope, in any order.

    Of functions, classes and comprehensions within it only what they bind.
    """
    ahead = list(nodes)
    while ahead:
        node = ahead.pop()
        yield node
        if isinstance(node, _FUNCTIONS):
            ahead += [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]
        elif isinstance(node, ast.ClassDef):
            ahead += [*node.decorator_list, *node.bases, *node.keywords]
        elif isinstance(node, _COMPREHENSIONS):  # `:=` binds a name outside
            ahead += [of.target for of in ast.walk(node) if isinstance(of, ast.NamedExpr)]
        elif not isinstance(node, ast.Lambda):
            ahead += children(node)


def children(node: ast.AST) -> list[ast.AST]:
    """The nodes right below a node. `ast.iter_child_nodes` takes twice as long, and there are a million of them."""
    found: list[ast.AST] = []
    for name in node._fields:
        value = getattr(node, name, None)
        if isinstance(value, list):
            found += [item for item in value if isinstance(item, ast.AST)]
        elif isinstance(value, ast.AST):
            found.append(value)
    return found


def _parameters(arguments: ast.arguments) -> list[ast.arg]:
    more = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *more]
