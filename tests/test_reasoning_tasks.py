"""Tasks of reasoning-gym: the same problems for the same seed, and the library's own score of each answer."""

import ast
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from entropy_core.errors import ConfigError, PromptError, RewardError
from entropy_core.prompts import reasoning_tasks
from entropy_core.prompts.pools import library, load_pool, locate
from entropy_core.rewards.functions import compute_rewards

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a file that it does not close when it is imported
    gym = pytest.importorskip("reasoning_gym", reason="pip install -e '.[reasoning-gym]'")

NAME, OPTIONS = "reasoning_gym:chain_sum", {"size": 6, "seed": 7, "max_terms": 3}


def rewards_of(pool, answers: list[str]) -> list[float]:
    columns = {name: pool.table[name].to_pylist() for name in pool.table.column_names if name != "prompt"}
    return compute_rewards("reasoning_gym", pool.table["prompt"].to_pylist(), answers, columns)


def test_the_problems_are_those_of_the_library():
    pool = load_pool(NAME, "train", options=OPTIONS)
    problems = gym.create_dataset("chain_sum", **OPTIONS)
    assert pool.table["prompt"].to_pylist() == [problem["question"] for problem in problems]
    assert pool.table["answer"].to_pylist() == [problem["answer"] for problem in problems]
    assert [ast.literal_eval(text) for text in pool.table["entry"].to_pylist()] == list(problems)
    assert locate(NAME) is None
    assert library(NAME).startswith("reasoning-gym 0.") and library("arithmetic") == ""


def test_size_and_seed_have_defaults():
    table = load_pool(NAME, "train").table
    assert table.num_rows == len(
        {problem["question"] for problem in gym.create_dataset("chain_sum", size=512, seed=42)}
    )
    assert table.equals(load_pool(NAME, "train", options={"seed": 42, "size": 512}).table)
    assert not table.slice(0, 6).equals(load_pool(NAME, "train", options={"seed": 1, "size": 6}).table)


def test_another_process_makes_the_same_problems():
    pool = f"load_pool({NAME!r}, 'train', options={OPTIONS!r})"
    script = f"from entropy_core.prompts.pools import load_pool; print({pool}.table.to_pylist())"
    root = Path(__file__).parents[1]
    seed = {"PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True, env=seed
    )
    assert done.stdout == f"{load_pool(NAME, 'train', options=OPTIONS).table.to_pylist()}\n"


def test_the_score_is_the_librarys():
    pool = load_pool(NAME, "train", options=OPTIONS)
    right = pool.table["answer"].to_pylist()
    assert rewards_of(pool, [f"<think>…</think><answer> {a} </answer>" for a in right]) == [1.0] * 6
    assert rewards_of(pool, [f"<answer>{a}</answer> no: <answer>x</answer>" for a in right]) == [0.0] * 6
    problems = gym.create_dataset("chain_sum", **OPTIONS)
    given = [f"it is {a}, I think" for a in right]
    assert rewards_of(pool, [f"<answer>{text}</answer>" for text in given]) == [
        problems.score_answer(text, problem) for text, problem in zip(given, problems, strict=True)
    ]
    assert rewards_of(pool, right) == [problems.score_answer(None, problem) for problem in problems]  # no tag


@pytest.mark.parametrize(
    "task", ["rearc", "countdown", "mini_sudoku", "shortest_path", "word_sorting", "knights_knaves", "tower_of_hanoi"]
)
def test_what_a_scorer_compares_survives_the_table(task):
    """Grids of tuples, graphs, puzzles with many solutions."""
    pool = load_pool(f"reasoning_gym:{task}", "train", options={"size": 3, "seed": 11})
    problems = gym.create_dataset(task, size=3, seed=11)
    answers = [f"<answer>{problem['answer']}</answer>" for problem in problems]
    assert rewards_of(pool, answers) == [1.0] * pool.table.num_rows


def test_copies_are_left_out_and_counted():
    pool = load_pool("reasoning_gym:coin_flip", "train", options={"size": 40, "min_trials": 3, "max_trials": 4})
    assert pool.table.num_rows < 40 and len(set(pool.table["prompt"].to_pylist())) == pool.table.num_rows
    assert pool.notes == (
        f"{40 - pool.table.num_rows} of 40 prompts of reasoning_gym:coin_flip are duplicates and were removed",
    )


def test_a_scorer_that_raises_names_the_sequence():
    pool = load_pool("reasoning_gym:prime_factorization", "train", options={"size": 3})
    answers = [f"<answer>{a}</answer>" for a in pool.table["answer"].to_pylist()]
    with pytest.raises(RewardError, match=r"reward 'reasoning_gym' raised ValueError.* on sequence 1, prompt"):
        rewards_of(pool, [answers[0], "<answer>none</answer>", answers[2]])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("reasoning_gym:no_such_task", {}, "no task 'no_such_task'.*use one of .*chain_sum"),
        (NAME, {"terms": 3}, "cannot create 'chain_sum' with .*TypeError.*dataset_options"),
        (NAME, {"min_terms": 5, "max_terms": 2}, "cannot create 'chain_sum' with .*dataset_options"),
        (NAME, {"size": "many"}, "cannot create 'chain_sum' with|cannot be generated"),
    ],
)
def test_what_the_library_does_not_make(name, options, message):
    with pytest.raises((ConfigError, PromptError), match=message) as raised:
        load_pool(name, "train", options=options)
    assert "\n" not in str(raised.value)


def test_a_task_has_one_split():
    with pytest.raises(PromptError, match="is generated and has no split 'test'"):
        load_pool(NAME, "test")


def test_a_pool_of_another_kind_has_no_scorer():
    with pytest.raises(RewardError, match=r"TypeError.*'task'.*columns are .'answer'."):
        compute_rewards("reasoning_gym", ["?"], ["1"], {"answer": ["1"]})


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    reasoning_tasks._dataset.cache_clear()
    with pytest.raises(ConfigError, match=r"reasoning-gym cannot be imported.*pip install -e '\.\[reasoning-gym\]'"):
        load_pool(NAME, "train", options={"size": 5})
