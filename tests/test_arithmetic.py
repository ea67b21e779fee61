"""The demo's task: the same problems everywhere, right answers, disjoint splits."""

import hashlib
import json
import os
import subprocess
import sys

import pytest

from entropy_core.errors import PromptError
from entropy_core.prompts.arithmetic import CHARACTERS, MAX_SIZE, exact_match, extract_answer, problems

EVERY = [*problems("train", 3000), *problems("test", 1000)]


def test_prompts_are_distinct_and_the_splits_disjoint():
    assert len({p["prompt"] for p in EVERY}) == len(EVERY) == 4000


def test_a_smaller_set_is_the_beginning_of_a_larger_one():
    assert problems("train", 10) == problems("train", 3000)[:10]
    assert len(problems("test")) == 512


def test_two_processes_agree():
    script = (
        "import json; from entropy_core.prompts.arithmetic import problems; print(json.dumps(problems('train', 300)))"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert json.loads(outputs[0]) == problems("train", 300)


def test_the_problems_are_those_of_every_other_machine():
    # sha256 of the JSON of 300 training problems, taken when the task was written: a change makes demo runs differ
    digest = hashlib.sha256(json.dumps(problems("train", 300)).encode()).hexdigest()
    assert digest.startswith("9743dccddd613725")


@pytest.mark.parametrize("problem", EVERY[::40], ids=lambda p: p["prompt"])
def test_the_scratchpad_adds_up(problem):
    a, b = (int(n) for n in problem["prompt"].removesuffix("=").split("+"))
    assert problem["answer"] == str(a + b)
    assert extract_answer(problem["solution"]) == problem["answer"]

    carry, total = 0, 0
    for place, column in enumerate(problem["solution"].split(";")[0].split(",")):
        inputs, result = column.split(">")
        x, y, carried_in = map(int, inputs)
        assert carried_in == carry
        assert sorted((x, y)) == sorted((a // 10**place % 10, b // 10**place % 10))
        assert x + y + carried_in == int(result)
        carry, digit = divmod(int(result), 10)
        total += digit * 10**place
    assert total + carry * 10 ** (place + 1) == a + b


def test_solutions_have_16_to_25_characters():
    lengths = {len(p["solution"]) for p in EVERY}
    assert (min(lengths), max(lengths)) == (16, 25)


def test_the_vocabulary_is_complete_and_has_no_idle_character():
    used = {c for p in EVERY for c in p["prompt"] + p["solution"] + p["answer"]}
    assert used == set(CHARACTERS)
    assert len(set(CHARACTERS)) == len(CHARACTERS)


def test_both_orders_of_a_column_occur():
    seen = {
        p["solution"][:2] == p["prompt"].split("+")[0][-1] + p["prompt"].removesuffix("=")[-1]
        for p in EVERY
        if p["solution"][0] != p["solution"][1]
    }
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("response", "answer"),
    [("120>03;3", "3"), ("1;2;34 ", "34"), ("no answer", ""), ("", ""), (";", ""), ("12", "")],
)
def test_the_answer_follows_the_last_semicolon(response, answer):
    assert extract_answer(response) == answer


def test_the_reward_is_exact():
    right = EVERY[0]
    completions = [right["solution"], right["answer"], ";" + right["answer"], ";0" + right["answer"]]
    assert exact_match(completions, [right["answer"]] * 4, prompts=["ignored"] * 4) == [1.0, 0.0, 1.0, 0.0]


def test_an_unknown_split_is_refused():
    with pytest.raises(PromptError, match=r"no split 'validation'.*train, test"):
        problems("validation")


@pytest.mark.parametrize("size", [0, -1, MAX_SIZE + 1])
def test_a_size_out_of_range_is_refused(size):
    with pytest.raises(PromptError, match=f"asked for {size} problems"):
        problems("train", size)
