"""Final answers: found in the response, compared as mathematics, and never decided by a clock."""

import threading
import time

import pytest

from entropy_core.errors import ConfigError, RewardError
from entropy_core.rewards import math_answers
from entropy_core.rewards.functions import compute_rewards, library
from entropy_core.rewards.math_answers import answer_tag, boxed, gsm8k, last_boxed


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} and then \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{ x }", "x"),
        (r"\boxed{1", ""),
        (r"\boxed{}", ""),
        ("1}", ""),
        ("", ""),
    ],
)
def test_the_last_box_counts(text, found):
    assert last_boxed(text) == found


def test_equal_expressions_are_equal_answers():
    cases = [
        (r"\boxed{0.5}", r"Thus $x = \boxed{\frac{1}{2}}$.", 1.0),
        (r"\boxed{1/3}", r"\boxed{\frac{1}{2}}", 0.0),
        (r"first \boxed{7}, no, \boxed{\sqrt{18}}", r"\boxed{3\sqrt{2}}", 1.0),
        (r"\boxed{(1,2)}", r"\boxed{(1, 2)}", 1.0),
        (r"\boxed{1+x^2}", r"\boxed{x^2+1}", 1.0),
        (r"\boxed{Evelyn}", r"\boxed{\text{Evelyn}}", 1.0),
        (r"\boxed{1234}", r"1,234", 1.0),
        (r"\boxed{42}", "40 + 2 = 42\n#### 42", 1.0),
        (r"\boxed{\frac}", r"\boxed{2}", 0.0),  # what cannot be read is no right answer
        ("42", r"\boxed{42}", 0.0),
        ("", r"\boxed{42}", 0.0),
    ]
    completions, solution, expected = (list(column) for column in zip(*cases, strict=True))
    assert boxed(completions, solution=solution) == expected
    assert boxed(completions, answer=solution, solution=["?"] * len(cases)) == expected  # answer goes before solution


def test_the_last_tag_counts():
    cases = {
        "<think> 41? </think> <answer> 42 </answer>": 1.0,
        "<answer>41</answer> no: <answer>\n42.0\n</answer>": 1.0,
        r"<answer>\boxed{42}</answer>": 1.0,
        "<answer>$42$</answer>": 1.0,
        "<answer>42": 0.0,
        "<answer></answer>": 0.0,
        "42": 0.0,
    }
    assert answer_tag(list(cases), answer=["so\n#### 42"] * len(cases)) == list(cases.values())


def test_the_number_after_the_sharps():
    cases = {"so #### 1,234": 1.0, "#### $1234.": 1.0, "####1234.5": 0.0, "#### 1234 #### 5": 1.0, "1234": 0.0, "": 0.0}
    assert gsm8k(list(cases), answer=["They cost 1234.\n#### 1,234"] * len(cases)) == list(cases.values())
    assert gsm8k(["#### -3"], answer=["-3.0"]) == [1.0]


def test_in_a_thread():
    """Where the stages run, and where the library's own time limits cannot be set."""
    rewards: list[float] = []
    thread = threading.Thread(target=lambda: rewards.extend(boxed([r"\boxed{2}"], answer=["2.0"])))
    thread.start()
    thread.join()
    assert rewards == [1.0]


def test_what_is_not_decided_in_time_is_an_error_and_not_0(monkeypatch):
    monkeypatch.setattr(math_answers, "SECONDS", 2)
    completions = [r"\boxed{3}", r"\boxed{10^{10^{10}}}", r"\boxed{4}"]
    started = time.monotonic()
    with pytest.raises(
        RewardError, match=r"did not decide within 2 s whether '10.*' is '3', in sequence 1\."
    ) as raised:
        compute_rewards("boxed", ["?"] * 3, completions, {"answer": ["3"] * 3})
    assert time.monotonic() - started < 60
    assert "\n" not in str(raised.value)


def test_a_comparison_that_ends_in_another_way_is_an_error(monkeypatch):
    monkeypatch.setattr(math_answers, "SECONDS", "soon")
    with pytest.raises(RewardError, match=r"math-verify failed on '4': ValueError: invalid literal.*'soon'"):
        boxed([r"\boxed{4}"], answer=["3"])


@pytest.mark.parametrize("reward", ["boxed", "answer_tag"])
def test_a_pool_without_right_answers_is_refused(reward):
    with pytest.raises(RewardError, match="neither a column `answer` nor a column `solution`"):
        compute_rewards(reward, ["?"], [""], {"level": ["1"]})
    with pytest.raises(RewardError, match="the reference answer of sequence 1, None"):
        compute_rewards(reward, ["?", "??"], ["", ""], {"answer": ["1", None]})
    with pytest.raises(RewardError, match="the reference answer of sequence 0, 42"):
        compute_rewards(reward, ["?"], [""], {"answer": [42]})
    with pytest.raises(RewardError, match="the reference answer of sequence 0, 'forty-two'"):
        compute_rewards("gsm8k", ["?"], [""], {"answer": ["forty-two"]})


def test_without_the_library_it_says_what_to_install(monkeypatch):
    def missing(name: str) -> str:
        raise math_answers.importlib.metadata.PackageNotFoundError(name)

    assert library("boxed") == library("answer_tag") and library("boxed").startswith("math-verify 0.")
    assert library("gsm8k") == library("exact_match") == ""
    monkeypatch.setattr(math_answers.importlib.metadata, "version", missing)
    for reward in ("boxed", "answer_tag"):  # already on the empty responses that it is tried on
        with pytest.raises(ConfigError, match=r"need math-verify.*pip install -e '\.\[math\]'"):
            compute_rewards(reward, ["?"], [""], {"answer": ["1"]})
