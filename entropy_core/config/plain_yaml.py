"""YAML with the plain types of YAML 1.2, in which nothing is read as something else.

PyYAML reads YAML 1.1: `1:30` is 90 there, `010` is 8, `no` is false, `1e-4` is a text, and of two equal keys the last
one wins. Here a number is written in decimal digits without leading zeros, `true` and `false` are the truth values,
and everything else is a text, which the configuration then refuses where it wants a number.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from entropy_core.errors import ConfigError, one_line

_PLAIN = (  # tag, what it looks like, with which characters it begins
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
)


class _OldLoader(yaml.SafeLoader):
    """YAML 1.1, as PyYAML reads it; notes every key that a mapping has twice."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.repeated: list[tuple[int, int, str]] = []  # second line, first line, key

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    self.repeated.append((line, lines[key.value], key.value))
                lines[key.value] = line
        return super().construct_mapping(node, deep)


class _Loader(_OldLoader):
    """The plain types above, and no others."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (filled below; PyYAML wants it so)


class _Dumper(yaml.SafeDumper):
    """Puts a text into quotes that YAML 1.1 or 1.2 would take for something else."""


for _tag, _pattern, _first in _PLAIN:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)


def read(path: Path | str, old: bool = False) -> tuple[Any, list[str]]:
    """Read a YAML file.

    Args:
        path: of the file.
        old: read it as YAML 1.1, as whoever wrote it did.

    Returns:
        Its content as plain values; and, for each key that a mapping has twice, a sentence without the full stop.

    Raises:
        ConfigError: the file is missing, or is not YAML.
    """
    try:
        loader = (_OldLoader if old else _Loader)(Path(path).read_text(encoding="utf-8"))
        try:
            values = loader.get_single_data()
            return values, [f"{key}: is there twice, {_lines(*lines)}" for *lines, key in sorted(loader.repeated)]
        finally:
            loader.dispose()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})", fix="give the path of a YAML file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = one_line(ValueError(getattr(error, "problem", None) or error))
        raise ConfigError(f"{path} is not valid YAML{where}: {problem}", fix="correct the file") from None


def _lines(second: int, first: int) -> str:
    return f"in line {first}" if first == second else f"in lines {first} and {second}"


def dump(values: Any) -> str:
    """Write plain values as YAML that `read` gives back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def scalar(text: str) -> str:
    """Write one text as it stands in a file, in quotes where it needs them."""
    return yaml.dump(text, Dumper=_Dumper, allow_unicode=True, width=10**6).removesuffix("\n").removesuffix("\n...")
