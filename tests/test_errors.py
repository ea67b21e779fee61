"""An error is one line, or a list, whatever the names in it are."""

import pickle

import pytest

from entropy_core.errors import CheckpointError, ConfigError, ProbeError, ShortageError, some_names


def test_fact_cause_and_fix_are_one_line():
    error = ConfigError("the fact.", cause="the cause", fix="the fix.")
    assert str(error) == "the fact. Likely cause: the cause. Fix: the fix."
    assert str(ProbeError("alone")) == "alone."


def test_a_list_has_a_line_for_each_entry():
    assert str(ConfigError("two errors:\n  one\n  two", fix="correct them")) == (
        "two errors:\n  one\n  two.\nFix: correct them."
    )


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\nb", r"a\nb"),
        ("\x1b[2Jx", r"\x1b[2Jx"),
        ("\ud800", r"\ud800"),
        ("\u202e", r"\u202e"),
        ("a\u2028b\0", r"a\u2028b\x00"),
        ("größer, 数 η", "größer, 数 η"),
    ],
)
def test_what_a_terminal_would_act_on_is_shown(name, shown):
    error = ConfigError(f"unknown key {name}", cause=name, fix=name)
    assert str(error) == f"unknown key {shown}. Likely cause: {shown}. Fix: {shown}."
    str(error).encode()


def test_names_are_cut_and_counted():
    assert some_names(map(str, range(10))) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
    assert len(some_names(["x" * 5000])) == 200
    assert len(str(ProbeError("x" * 50_000))) < 2010


def test_it_survives_a_process_boundary():
    for kind in (CheckpointError, ShortageError):
        error = kind("a\nb", cause="c", fix="d")
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind and str(again) == str(error)
