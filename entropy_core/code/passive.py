"""What is known of the functions and classes that project code calls, decorates with and derives from.

What is not listed is taken to do more than it returns; listing less costs work, and never a wrong number.
"""

_BUILTINS = (
    *("bool", "bytes", "classmethod", "dict", "enumerate", "float", "frozenset", "int", "len", "list", "object"),
    *("property", "range", "reversed", "set", "staticmethod", "str", "sum", "super", "tuple", "zip"),
)
_CLASSES = {  # base classes that call no method of a class but those between two underscores
    *("builtins.object", "builtins.BaseException", "builtins.Exception", "builtins.RuntimeError"),
    "builtins.ValueError",
    *("abc.ABC", "enum.Enum", "enum.IntEnum", "typing.Generic", "typing.NamedTuple", "typing.Protocol"),
    *("typing.TypedDict",),
}

CALLS_NO_METHOD = frozenset(_CLASSES)
"""Base classes that call no method of a class but those between two underscores."""
PASSIVE = frozenset(
    {
        *(f"builtins.{name}" for name in _BUILTINS),
        *_CLASSES,
        *("abc.abstractmethod", "ast.NodeTransformer", "ast.NodeVisitor", "collections.Counter"),
        *("contextlib.contextmanager", "contextvars.ContextVar", "dataclasses.dataclass", "dataclasses.field"),
        *("functools.cache", "functools.cached_property", "functools.lru_cache", "functools.partial"),
        *("functools.wraps", "itertools.count", "logging.getLogger", "pathlib.Path", "re.compile"),
        *("threading.Lock", "threading.local", "typing.TypeVar", "typing.overload"),
        *("pyarrow.field", "pyarrow.float64", "pyarrow.int64", "pyarrow.list_", "pyarrow.schema", "pyarrow.string"),
        *("pydantic.BaseModel", "pydantic.Field", "pydantic.field_validator", "pydantic.model_validator"),
        *("torch.autograd.Function", "torch.autograd.function.once_differentiable", "torch.nn.Module"),
        *("torch.no_grad", "torch.overrides.TorchFunctionMode", "transformers.cache_utils.DynamicLayer"),
    }
)
"""Calls, decorators and base classes that leave nothing behind but what they return."""
