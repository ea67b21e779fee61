"""Batches that are too small, or all the same: a right answer or a clear refusal, and never a NaN."""

import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from bad_input_fixtures import (
    NAME,
    change_json,
    config_of,
    finite,
    forget_tokenizer,
    prompts,
    write_function,
    write_pool,
)
from pipeline_fixtures import Probe, make_run, probe, skip_figures, write_reward
from proofs import Proof

from entropy_core.demo.run import build_tokenizer
from entropy_core.errors import ConfigError, NonFiniteError, ProbeError
from entropy_core.numerics import philox
from entropy_core.numerics.philox import Purpose

pytestmark = pytest.mark.validate


class Case(NamedTuple):
    """An input; and the error that refuses it, or what must be so in the answer and how to say it."""

    name: str
    prepare: Callable[[Path], dict[str, Any]]
    refusal: type[ProbeError] | None = None
    answer: str = ""
    holds: Callable[[Probe], bool] = lambda done: True


def zero_advantages(home: Path) -> dict[str, Any]:
    write_function(home, "return [0.1] * len(completions)")
    return {}


def never_ends(home: Path) -> dict[str, Any]:
    directory = home / "run" / NAME
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    forget_tokenizer(directory)
    tokenizer.save_pretrained(directory)
    for name in ("config.json", "generation_config.json"):
        change_json(directory / name, eos_token_id=None)
    return {}


def one_prompt_again_and_again(home: Path, **sections: Any) -> dict[str, Any]:
    """A pool of two prompts, and a seed with which E draws one of them every time."""
    drawn = (philox.draw_with_replacement(seed, Purpose.E_PROMPT, torch.arange(4), 2) for seed in count())
    seed = next(seed for seed, drawn_N in enumerate(drawn) if len(drawn_N.unique()) == 1)
    return {"batch_config": write_pool(home, prompts("1+2=", "3+4=")) | {"E_batch_seed": seed}} | sections


def only_momentum_and_decay(done: Probe) -> bool:
    return all(
        row["gradient_norm"] == row["se_over_u"] == 0
        and row["equal_reward_fraction"] == 1
        # relative to the parts, which may cancel
        and abs(row["delta_h1_momentum"] + row["delta_h1_decay"] - row["inner_product"])
        <= 1e-12 * (abs(row["delta_h1_momentum"]) + abs(row["delta_h1_decay"]))
        and (row["eta"] == 0 or row["delta_h1"] != 0)
        for row in done.rows
    )


def certain(done: Probe) -> bool:
    responses: dict[int, set[str]] = {}
    for stage in ("sample-e-batch", "sample-u-batch"):
        for artifact in done.run.artifacts(stage):
            table = artifact.table("sequences.parquet")
            for prompt, response in zip(table["prompt_id"].to_pylist(), table["response"].to_pylist(), strict=True):
                responses.setdefault(prompt, set()).add(response)
    return all(len(texts) == 1 for texts in responses.values()) and all(row["H"] < 1e-5 for row in done.rows)


def all_local_and_both_alike(done: Probe) -> bool:
    by_eta: dict[tuple, set[float]] = {}
    for row in done.rows:
        by_eta.setdefault((row["eta"], row["estimator"]), set()).add(row["delta_h1"])
    local = all(row["delta_h1"] == pytest.approx(row["delta_h1_local"], rel=1e-12) for row in done.rows)
    return local and all(max(both) == pytest.approx(min(both), rel=1e-12) for both in by_eta.values())


def one_prompt(done: Probe) -> bool:
    drawn = {
        p for a in done.run.artifacts("sample-e-batch") for p in a.table("sequences.parquet")["prompt_id"].to_pylist()
    }
    return len(drawn) == 1 and all(row["se_given_u"] > 0 for row in done.rows if row["eta"])


CASES = (
    Case("one E sequence", lambda home: {"batch_config": {"E_total_sequences": 1}}, ConfigError),
    Case("one prompt in U", lambda home: {"batch_config": {"B_U": 1}}, ConfigError),
    Case("one response to each prompt of U", lambda home: {"batch_config": {"G": 1}}, ConfigError),
    Case("a pool of one prompt", lambda home: {"batch_config": write_pool(home, prompts("1+2="))}, ConfigError),
    Case(
        "all advantages zero",
        zero_advantages,
        answer="δH₁ is that of momentum and weight decay; the standard error over U is 0, equal_reward_fraction 1",
        holds=only_momentum_and_decay,
    ),
    Case(
        "all responses to a prompt equal (τ = 1e-4)",
        lambda home: {"generation": {"temperature": 1e-4}, "batch_config": {"E_total_sequences": 8, "G": 4}},
        answer="H below 1e-5 nats, every number finite",
        holds=certain,
    ),
    Case(
        "responses of one token",
        lambda home: {"generation": {"max_new_tokens": 1}, "batch_config": {"E_total_sequences": 8}},
        answer="δH₁ is its local part, the same per token and per sequence",
        holds=all_local_and_both_alike,
    ),
    Case(
        "every response truncated",
        never_ends,
        answer="truncated_fraction 1, every length max_new_tokens",
        holds=lambda done: all(row["truncated_fraction"] == 1 and row["mean_length"] == 4 for row in done.rows),
    ),
    Case(
        "E of one prompt, drawn again and again",
        one_prompt_again_and_again,
        answer="the responses are the independent units; standard errors above 0",
        holds=one_prompt,
    ),
    Case(
        "the same, with prompts as the independent units",
        lambda home: one_prompt_again_and_again(home, variance={"cluster": "prompt"}),
        NonFiniteError,
    ),
)


def outcome(case: Case, home: Path) -> tuple[bool, str]:
    """Whether it is right, and what happens."""
    try:
        done = probe(config_of(home, **case.prepare(home)))
    except ProbeError as error:
        return type(error) is case.refusal, f"refused: {error}"
    try:
        finite(done)
    except AssertionError as error:
        return False, f"not finite: {error}"
    if case.refusal is not None or not case.holds(done):
        return False, f"answered, but not so: {case.answer or case.refusal}"
    return True, f"answered: {case.answer}"


def test_extreme_input(record: Proof, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    record(
        "Bad and extreme input",
        claim="Through the checks and the whole sweep, on a tiny checkpoint: a right answer or a clear refusal.",
        limit="as the table says, every number of an answer finite (a Pareto k of so few weights may be null)",
        columns=("input", "what happens"),
    )
    skip_figures(monkeypatch)
    make_run(tmp_path / "original" / "run")
    write_reward(tmp_path / "original")
    wrong = []
    for number, case in enumerate(CASES):
        home = shutil.copytree(tmp_path / "original", tmp_path / str(number))
        right, what = outcome(case, home)
        record.row(case.name, what.replace(str(home), "…"))
        wrong += [] if right else [case.name]
    assert not wrong, wrong
