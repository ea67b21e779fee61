"""Strategies for hostile files: valid content with a few places changed, text that is nearly right, and plain bytes."""

import copy
import io
import json
import math
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

TEXTS = [
    *("", " ", ".", "..", "~", "/", "//", "../x", "a/b", "a:b", "x.py:f", "*", "[", "{}", "%s", "$HOME", "latest"),
    *("true", "null", "nan", "1e5", "0x1", "010", "1:30", "=", "#", "'", '"', "\\", "|", "`", "<b>", "cpu", "cuda"),
    *(
        "\0",
        "\n",
        "\r",
        "\t",
        "\x1b[2J",
        "\x7f",
        "\x85",
        "\u2028",
        "\u202e",
        "\ufeff",
        "\ud800",
        "ﬁ",
        "𝟘",
        "é",
        "e\u0301",
    ),
    *("x" * 300, "x" * 5000, "checkpoint-3", "model.safetensors", "manifest.json", "0" * 32, "f" * 64, "2026-11-26"),
]
NUMBERS = [
    *(0, 1, -1, 2, 3, 7, 24, 255, 2**31, 2**53, 2**63, -(2**63), 2**64, 10**30, 10**400),
    *(0.0, -0.0, 0.5, 1.0, 1.5, 1e-320, 1e-9, 1e9, 1e300, -1e300, math.inf, -math.inf, math.nan),
]
PLAIN = [None, True, False, [], {}, [[]], [{}], [None], {"": ""}, {"a": {}}, [0, "0"], list(range(50))]

junk = st.one_of(
    st.sampled_from(TEXTS),
    st.sampled_from(NUMBERS),
    st.sampled_from(PLAIN).map(copy.deepcopy),  # which may be changed further
    st.text(max_size=20),
    st.integers(),
    st.floats(),
)
"""A value where another one is expected."""

NOISE = [
    *(b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"{", b"}", b"[", b"]", b'"', b",", b":", b"-", b"\t", b"NaN"),
    *(b"PK\x03\x04", b"PAR1", b"\x80\x04", b"&a [*a]", b"!!python/object:os.system x", b"<<: *x", b"---\n", b"\\ud800"),
    *(b"[" * 20_000, b'{"a":' * 20_000, b"9" * 5000, b"a: " * 200, b"x" * 70_000),
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a value of JSON with each of its keys or indices."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A value of JSON with one to three places changed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(value))
        if not found:
            return draw(junk)
        container, key = found[draw(st.integers(0, len(found) - 1))]
        match draw(st.sampled_from(["replace", "replace", "scale", "remove", "add", "exchange", "wrap", "rename"])):
            case "replace":
                container[key] = draw(junk)
            case "scale" if isinstance(container[key], int | float):
                container[key] = container[key] * draw(st.sampled_from([-1, 0, 2, 1000, 10**9, 0.5, 1e30]))
            case "scale" if isinstance(container[key], str):
                container[key] = draw(st.sampled_from([container[key] * 2, container[key][1:], container[key] + "\n"]))
            case "remove":
                del container[key]
            case "add" if isinstance(container, dict):
                container[draw(st.sampled_from(TEXTS))] = draw(junk)
            case "add":
                container.insert(key, draw(junk))
            case "exchange":
                other, at = found[draw(st.integers(0, len(found) - 1))]
                container[key] = copy.deepcopy(other[at])
            case "wrap":
                container[key] = draw(st.sampled_from([[container[key]], {"a": container[key]}, str(container[key])]))
            case "rename" if isinstance(container, dict):
                container[draw(st.sampled_from(TEXTS))] = container.pop(key)
    return value


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes that were cut, overwritten, doubled, or had something put in."""
    at = draw(st.integers(0, len(content)))
    to = draw(st.integers(at, min(len(content), at + 64)))
    noise = draw(st.one_of(st.sampled_from(NOISE), st.binary(max_size=8)))
    match draw(st.sampled_from(["cut", "put in", "overwrite", "double", "zero", "all"])):
        case "cut":
            return content[:at]
        case "put in":
            return content[:at] + noise + content[at:]
        case "overwrite":
            return content[:at] + noise + content[at + len(noise) :]
        case "double":
            return content[:to] + content[at:]
        case "zero":
            return content[:at] + bytes(to - at) + content[to:]
        case _:
            return noise


def json_bytes(value: Any) -> bytes:
    """As a program would write it that looks at nothing: NaN and lone surrogates included."""
    return json.dumps(value).encode()


def json_file(content: bytes) -> st.SearchStrategy[bytes]:
    """Of a file of JSON, what else it may hold."""
    return st.one_of(changed(json.loads(content)).map(json_bytes), damaged(content))


def archive(members: Sequence[tuple[str, bytes]]) -> bytes:
    """A tar archive of plain files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


@st.composite
def changed_archive(draw: st.DrawFn, members: Sequence[tuple[str, bytes]]) -> bytes:
    """An archive with members that are renamed, doubled, missing, linked, or hold something else."""
    found = list(members)
    for _ in range(draw(st.integers(1, 2))):
        index = draw(st.integers(0, len(found) - 1))
        name, content = found[index]
        match draw(st.sampled_from(["rename", "parent", "content", "remove", "double", "within", "json"])):
            case "rename":
                found[index] = draw(st.sampled_from(TEXTS)), content
            case "parent":
                head, _, tail = name.rpartition("/")
                found[index] = f"{head}/{draw(st.sampled_from(TEXTS))}/{tail}", content
            case "content":
                found[index] = name, draw(damaged(content[:5000]))
            case "remove" if len(found) > 1:
                del found[index]
            case "double":
                found.insert(draw(st.integers(0, len(found))), (name, content))
            case "within":
                found.insert(index, (f"{name}/{draw(st.sampled_from(TEXTS))}", content))
            case "json" if name.endswith(".json"):
                found[index] = name, json_bytes(draw(changed(json.loads(content))))
    try:
        return archive(found)
    except (ValueError, UnicodeError):  # names that no archive can have
        return archive([(name.encode(errors="replace").decode()[:90], content) for name, content in found])
