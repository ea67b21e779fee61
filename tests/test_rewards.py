"""Rewards: found by name, given what TRL gives them, and never turned into a number that they did not return."""

import math
import sys

import pytest

from entropy_core.errors import ConfigError, ProbeError, RewardError
from entropy_core.prompts import arithmetic
from entropy_core.rewards.functions import REWARDS, compute_rewards, exact_match, load_reward, source_file

PROMPTS, COMPLETIONS = ["1+1=", "2+2="], ["2", " 5 "]
COLUMNS = {"answer": ["2", "4"], "level": [1, None]}


@pytest.fixture
def file(tmp_path):
    """Write a file that defines `reward`; returns how a configuration names it."""

    def write(body: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text(body)
        return f"{path}:reward"

    return write


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the user with a reward that imports its neighbour."""
    folder = tmp_path / "lab_rewards"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "scale.py").write_text("HALF = 0.5\n")
    (folder / "lengths.py").write_text(
        "from .scale import HALF\ndef reward(completions, **_):\n    return [HALF * len(c) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "lab_rewards.lengths:reward"
    for name in [name for name in sys.modules if name.partition(".")[0] == "lab_rewards"]:
        del sys.modules[name]


def returning(value: str) -> str:
    return f"def reward(prompts, completions, **columns):\n    return {value}\n"


def test_the_known_rewards():
    assert sorted(REWARDS) == ["answer_tag", "arithmetic", "boxed", "exact_match", "gsm8k", "reasoning_gym"]
    assert load_reward("arithmetic") is arithmetic.exact_match and load_reward("exact_match") is exact_match
    assert compute_rewards("exact_match", PROMPTS, ["2 ", "5"], COLUMNS) == [1.0, 0.0]
    assert compute_rewards("arithmetic", PROMPTS, ["110>2;2", "2"], COLUMNS) == [1.0, 0.0]
    assert source_file("exact_match") is None


def test_a_file_is_given_what_trl_gives(file):
    name = file(
        "def reward(prompts, completions, answer, level, **rest):\n"
        "    assert sorted(rest) == ['completion_ids', 'log_extra', 'log_metric', 'trainer_state']\n"
        "    assert isinstance(prompts, list) and isinstance(completions, list)\n"
        "    assert prompts == ['1+1=', '2+2='] and level == [1, None]\n"
        "    return [c.strip() == a and 1 or -0.5 for c, a in zip(completions, answer)]\n"
    )
    rewards = compute_rewards(name, PROMPTS, COMPLETIONS, COLUMNS)
    assert rewards == [1.0, -0.5]
    assert all(type(reward) is float for reward in rewards)


def test_the_source_of_a_reward_is_the_file_it_is_looked_up_in(file, package, tmp_path):
    assert source_file(file(returning("[0.0] * 2"))) == tmp_path / "mine.py"
    wrapped = (
        "import functools\nfrom math import fsum as helper\nreward = functools.partial(lambda x, **_: [x] * 2, 1.0)\n"
    )
    assert source_file(file(wrapped)) == tmp_path / "mine.py"
    assert (
        source_file(file("from entropy_core.rewards.functions import exact_match as reward\n")) == tmp_path / "mine.py"
    )
    assert source_file(file("raise SystemExit('loads a large model')\n")) == tmp_path / "mine.py"
    assert source_file(package) == tmp_path / "lab_rewards" / "lengths.py"


def test_a_function_of_a_package_can_be_named(package):
    assert compute_rewards(package, PROMPTS, COMPLETIONS, COLUMNS) == [0.5, 1.5]


def test_a_file_is_read_again_when_it_was_edited(file):
    assert compute_rewards(file(returning("[1.0, 2.0]")), PROMPTS, COMPLETIONS, {}) == [1.0, 2.0]
    assert compute_rewards(file(returning("[1.0, 2.25]")), PROMPTS, COMPLETIONS, {}) == [1.0, 2.25]


def test_a_file_may_define_classes_as_any_module_does(file):
    name = file(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Weight:\n    value: float = 0.25\n"
        "def reward(completions, **_):\n    return [Weight().value for _ in completions]\n"
    )
    assert compute_rewards(name, PROMPTS, COMPLETIONS, {}) == [0.25, 0.25]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact", r"unknown reward 'exact'.*use one of answer_tag, .*reasoning_gym, package\.module:function"),
        ("", "unknown reward"),
        ("no.such.module:reward", "cannot be imported .ModuleNotFoundError: No module named 'no'"),
        ("/no/such/file.py:reward", "cannot be imported .FileNotFoundError"),
        ("math:no_such_function", "cannot be imported .AttributeError"),
        (":reward", "cannot be imported"),
        ("math:", "cannot be imported|is not a function"),
        ("math:pi", "'math:pi' is not a function"),
    ],
)
def test_a_reward_that_does_not_exist_is_refused(name, message):
    with pytest.raises(ConfigError, match=message) as raised:
        load_reward(name)
    assert "\n" not in str(raised.value)
    with pytest.raises(ConfigError):
        source_file(name)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def reward(:\n", "SyntaxError"),
        ("import no_such_library\n", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("raise RuntimeError('no\\nGPU')\n", "RuntimeError: no GPU"),
        ("def other(): ...\n", "AttributeError"),
    ],
)
def test_a_file_that_cannot_be_imported_says_why_on_one_line(file, body, message):
    with pytest.raises(ConfigError, match=message) as raised:
        load_reward(file(body))
    assert "\n" not in str(raised.value)


def test_a_function_without_a_source_file_cannot_be_a_key():
    assert load_reward("math:fsum") is math.fsum
    with pytest.raises(ConfigError, match=r"'math:fsum' has no source file.*in a \.py file"):
        source_file("math:fsum")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[1.0]", "returned 1 values for 2 responses"),
        ("[1.0, 2.0, 3.0]", "returned 3 values"),
        ("[]", "returned 0 values"),
        ("None", "returned NoneType"),
        ("1.0", "returned float"),
        ("(r for r in [1.0, 2.0])", "returned generator"),
        ("'01'", "returned '0' for sequence 0"),
        ("[1.0, float('nan')]", r"returned nan for sequence 1, prompt '2\+2='.*TRL says with None"),
        ("[float('inf'), 1.0]", "returned inf for sequence 0"),
        ("[1.0, '1']", "returned '1' for sequence 1"),
        ("[1.0, 10**400]", "for sequence 1"),
        (
            "[1 / 0]",
            r"raised ZeroDivisionError: division by zero at .*mine\.py:2 on sequence 0, prompt '1\+1=', response '2'",
        ),
        (
            "[{'2': 1.0}[c] for c in completions]",
            r"KeyError: ' 5 ' at .*mine\.py:2 on sequence 1, prompt '2\+2=', response ' 5 '",
        ),
        ("[1.0] * 2 if len(prompts) < 2 else 1 / 0", "on 2 responses together, and not on either half of them"),
        ("columns['solution']", "raised KeyError: 'solution'.*the pool's columns are .'answer', 'level'."),
    ],
)
def test_whatever_is_no_list_of_finite_numbers_is_an_error(file, value, message):
    with pytest.raises(RewardError, match=message) as raised:
        compute_rewards(file(returning(value)), PROMPTS, COMPLETIONS, COLUMNS)
    assert "\n" not in str(raised.value)
    assert "Fix: " in str(raised.value)


def test_an_error_of_many_lines_is_told_on_one(file):
    body = "def reward(**_):\n    raise ValueError('first\\nsecond ' + 'x' * 5000)\n"
    with pytest.raises(RewardError, match="ValueError: first second x") as raised:
        compute_rewards(file(body), PROMPTS, COMPLETIONS, COLUMNS)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 1000


def test_a_pool_with_the_names_of_the_arguments_is_refused(file):
    with pytest.raises(ProbeError, match="completions"):
        compute_rewards(file(returning("[0.0, 0.0]")), PROMPTS, COMPLETIONS, {"completions": ["a", "b"]})


def test_the_inputs_are_copies(file):
    name = file("def reward(prompts, completions, **_):\n    completions.clear()\n    return [0.0, 0.0]\n")
    completions = list(COMPLETIONS)
    assert compute_rewards(name, PROMPTS, completions, {}) == [0.0, 0.0]
    assert completions == COMPLETIONS


def test_the_sequence_on_which_a_reward_raises_is_found(file, tmp_path):
    """By halving, with the columns that belong to it."""
    name = file(
        "def reward(prompts, completions, answer):\n"
        f"    print('.', end='', file=open({str(tmp_path / 'calls')!r}, 'a'))\n"
        "    return [1.0 / (c == a) for c, a in zip(completions, answer, strict=True)]\n"
    )
    texts = [str(i) for i in range(100)]
    wrong = [*texts[:77], "x", *texts[78:]]
    with pytest.raises(RewardError, match=r"ZeroDivisionError.* on sequence 77, prompt '77', response '77'"):
        compute_rewards(name, texts, texts, {"answer": wrong})
    assert 2 < len((tmp_path / "calls").read_text()) < 16


def test_true_is_1_and_false_is_0(file):
    assert compute_rewards(file(returning("[True, False]")), PROMPTS, COMPLETIONS, {}) == [1.0, 0.0]
    values = "[__import__('numpy').True_, __import__('torch').tensor(0.25)]"
    assert compute_rewards(file(returning(values)), PROMPTS, COMPLETIONS, {}) == [1.0, 0.25]


def test_a_file_in_the_home_folder(file, tmp_path, monkeypatch):
    file(returning("[0.5, 0.25]"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compute_rewards("~/mine.py:reward", PROMPTS, COMPLETIONS, {}) == [0.5, 0.25]
    assert source_file("~/mine.py:reward") == tmp_path / "mine.py"


@pytest.mark.parametrize("value", ["__import__('torch').tensor([1.0, 0.5])", "__import__('numpy').array([1.0, 0.5])"])
def test_arrays_and_tensors_of_numbers_are_lists_of_numbers(file, value):
    name = file(f"def reward(prompts, completions, **_):\n    return {value}\n")
    assert compute_rewards(name, ["a", "b"], ["c", "d"], {}) == [1.0, 0.5]
