"""YAML 1.2's plain types: what is written is what is meant, or a text."""

import math
from typing import Any

import pytest

from entropy_core.config import plain_yaml
from entropy_core.errors import ConfigError


def read(tmp_path, text: str, **how: bool) -> Any:
    path = tmp_path / "values.yaml"
    path.write_text(text, encoding="utf-8")
    values, repeated = plain_yaml.read(path, **how)
    assert repeated == []
    return values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("-7", -7),
        ("+7", 7),
        ("1e-4", 1e-4),
        ("8E3", 8000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-0.0", -0.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        *((text, text) for text in ("1:30", "1:30.5", "010", "0o10", "0x1f", "0b1", "1_000", "00.5", "1e", ".", "-")),
        *((text, text) for text in ("yes", "no", "on", "Off", "y", "2026-01-31", "12:30:45", "=", "<<", "1.2.3", "e5")),
    ],
)
def test_a_plain_value_is_what_it_looks_like(tmp_path, text, value):
    found = read(tmp_path, f"a: {text}\n" if text != "-" else "a: '-'\n")["a"]
    assert found == value and type(found) is type(value)


def test_not_a_number_is_none(tmp_path):
    assert math.isnan(read(tmp_path, "a: .nan")["a"])


@pytest.mark.parametrize(
    "value",
    [
        *(
            "1e4",
            "010",
            "0x10",
            "yes",
            "no",
            "on",
            "1:30",
            "~",
            "null",
            "",
            "true",
            "2026-01-31",
            "1_0",
            ".5",
            "=",
            "<<",
        ),
        *("=", "<<", "a: b", "- a", "# a", "'", '"', "ä\n b", " a ", "{a}", "[a]", "&a", "*a", "!a", "%a", "@a", "`a"),
        *(0, -3, 10**30, 1e-5, 1e22, 0.1, 1 / 3, -0.0, math.inf, True, False, None),
    ],
)
def test_what_is_written_is_read_back(tmp_path, value):
    found = read(tmp_path, plain_yaml.dump({"a": value, "b": [value, {"c": value}]}))
    assert found == {"a": value, "b": [value, {"c": value}]} and type(found["a"]) is type(value)


def test_every_key_that_is_there_twice_is_named(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("a: 1\nb:\n  c: 1\n  d: {e: 1, e: 2}\n  c: 2\n\na: 3\nf: [{g: 1, g: 1}]\nc: 1\ne: 1\na: 4\n")
    _, repeated = plain_yaml.read(path)
    assert repeated == [
        "e: is there twice, in line 4",
        "c: is there twice, in lines 3 and 5",
        "a: is there twice, in lines 1 and 7",
        "g: is there twice, in line 8",
        "a: is there twice, in lines 7 and 11",
    ]


def test_an_old_file_is_read_as_it_was_written(tmp_path):
    old = read(tmp_path, "a: no\nb: 010\nc: 8e-7\nd: 0x10\n", old=True)
    assert old == {"a": False, "b": 8, "c": "8e-7", "d": 16}
    path = tmp_path / "twice.yaml"
    path.write_text("a: 1\na: 2\n")
    assert plain_yaml.read(path, old=True)[1] == ["a: is there twice, in lines 1 and 2"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1\nb: 2\n", r"in line 2, column 2: expected"),
        ("\ta: 1", "in line 1, column 1: found character"),
        ("a: !!python/object/apply:os.getcwd []", "in line 1, column 4: could not determine a constructor"),
        ("a: 1\n---\nb: 2\n", "in line 2, column 1: but found another document"),
        ("{[1]: 2}", "in line 1, column 2: found unhashable key"),
        ("a: *b", "in line 1, column 4: found undefined alias"),
        ("[" * 20_000, "recursion"),
        ("a: " + "9" * 5000, "digits"),
        ("a: \x00", "special characters are not allowed"),
    ],
)
def test_what_is_not_yaml_is_said_on_one_line(tmp_path, text, said):
    path = tmp_path / "values.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"{path} is not valid YAML.*{said}") as raised:
        plain_yaml.read(path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_an_alias_is_what_it_names(tmp_path):
    assert read(tmp_path, "a: &x [1, 2]\nb: *x\n") == {"a": [1, 2], "b": [1, 2]}
