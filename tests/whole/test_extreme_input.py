"""Rewards that fail, and extreme input: refused on one line, or a finite and right answer."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from bad_input_fixtures import (
    NAME,
    change_json,
    config_of,
    finite,
    forget_tokenizer,
    one_line,
    prompts,
    refused,
    write_function,
    write_pool,
)
from pipeline_fixtures import (
    parts_of,
    probe,
)

from entropy_core.demo.run import build_tokenizer
from entropy_core.errors import ConfigError, NonFiniteError, RewardError
from entropy_core.losses.apart import coefficients_of_each
from entropy_core.stages import half_steps_u
from entropy_core.store.store import Store

pytest_plugins = ["bad_input_fixtures"]


@pytest.fixture
def home(breakable) -> Path:
    return breakable


# --- rewards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ("raise ValueError('no such answer')", RewardError, "raised ValueError: no such answer"),
        ("return [0.0] * 3", RewardError, "returned 3 values for 2 responses"),
        ("return [float('nan')] * len(completions)", RewardError, "returned nan for sequence 0"),
        ("return None", RewardError, "returned NoneType"),
        ("return columns['gold']", RewardError, r"KeyError: 'gold'.*columns are \['answer', 'solution'\]"),
        ("return [", ConfigError, "SyntaxError"),
    ],
)
def test_a_reward_that_never_works(home, body, kind, message):
    write_function(home, body)
    refused(kind, message, config_of(home))


@pytest.mark.parametrize("name", ["exact", "no.such:reward", "math:fsum", "missing.py:reward"])
def test_a_reward_that_does_not_exist(home, name):
    refused(ConfigError, name, config_of(home, update={"reward": name}))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [{}[c] if c else 0.0 for c in completions]", "raised KeyError: "),
        ("return [0.0] * (1 if any(completions) else len(completions))", "returned 1 values for 4 responses"),
        ("return [1e308 if any(completions) else 0.0] * len(completions)", r"returned 1e\+308 .* of at most 1e\+30"),
        ("return [float('nan') if c else 0.0 for c in completions]", "returned nan for sequence"),
    ],
)
def test_a_reward_that_fails_on_responses_keeps_what_was_sampled(home, body, message):
    """It works on the empty response that it was tried on before."""
    write_function(home, body)
    with pytest.raises(RewardError, match=message) as raised:
        probe(config_of(home, batch_config={"G": 2}, generation={"temperature": 0.01} if "set" in body else {}))
    one_line(raised.value)
    kept = [artifact.stage for artifact in Store(home / "artifacts").ls()]
    assert "sample-u-batch" in kept and "reward-u-batch" not in kept

    write_function(home, "return [0.25 * len(c) for c in completions]")
    again = probe(config_of(home, generation={"temperature": 0.01} if "set" in body else {}))
    finite(again)
    assert not set(again.run.was_computed) & set(kept)


def test_a_reward_of_a_package(home, monkeypatch):
    """Named by module, it is found by module: it may import its neighbours."""
    package = home / "lab"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "scale.py").write_text("HALF = 0.5\n")
    (package / "lengths.py").write_text(
        "from .scale import HALF\ndef reward(completions, **_):\n    return [HALF * len(c) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(home)
    done = probe(config_of(home, update={"reward": "lab.lengths:reward"}))
    finite(done)
    (rewards,) = done.run.artifacts("reward-u-batch")
    sampled = [a.table("sequences.parquet") for a in done.run.artifacts("sample-u-batch")]
    texts = [text for table in sampled for text in table["response"].to_pylist()]
    assert rewards.table("rewards.parquet")["reward"].to_pylist() == [0.5 * len(text) for text in texts]


# --- extreme, but right ----------------------------------------------------------------------------------------------


def test_equal_rewards_leave_momentum_and_decay(home):
    """No advantage, no gradient: U says nothing, and the step is what the optimizer would take anyway."""
    write_function(home, "return [0.1] * len(completions)")
    done = probe(config_of(home, batch_config={"G": 3}))
    (update,) = done.run.artifacts("compute-update")
    v, (momentum, decay) = update.vector("direction"), map(parts_of(update, done.run).get, ("momentum", "decay"))
    assert all(torch.equal(v[name], momentum[name] + decay[name]) for name in v)
    assert any(t.abs().max() > 0 for t in decay.values())
    for row in finite(done):
        assert row["gradient_norm"] == row["se_over_u"] == 0.0
        assert row["equal_reward_fraction"] == row["clip_factor"] == 1.0
        if row["eta"]:
            assert row["delta_h1"] != 0 and row["se_given_u"] > 0
            assert row["interval_over_u"] == (
                "no valid interval over U: 0 prompts of U have unequal rewards, and it takes 8"
            )
            assert row["mean_update_low"] is row["next_update_high"] is row["delta_h_next_update_low"] is None


def test_a_split_of_u_is_left_out_where_the_loss_has_no_gradient_on_a_half(home, monkeypatch):
    def without_one(name, batches, isolation):
        found = coefficients_of_each(name, batches, isolation)
        return [None if i == 3 else pair for i, pair in enumerate(found)]

    sizes = {"batch_config": {"B_U": 4}}
    plain = probe(config_of(home, **sizes)).run.artifacts("half-steps-u")[0]
    monkeypatch.setattr(half_steps_u, "coefficients_of_each", without_one)
    found = probe(config_of(home, **sizes, execution={"artifacts": str(home / "others")})).run.artifacts(
        "half-steps-u"
    )[0]
    assert (plain.summary["splits"], found.summary["splits"]) == (3, 2)
    rows = plain.table("halves.parquet").to_pylist()
    assert found.table("halves.parquet").to_pylist() == [row for row in rows if row["split"] != 1]


@pytest.mark.parametrize("fails", ["raise ValueError('too few')", "return dr_grpo(batch) / 0"])
def test_a_loss_of_the_users_that_fails_on_every_half_leaves_the_rest_of_the_sweep(home, fails):
    """Where it is asked for an interval over U, the table says why there is none."""
    text = f"""from entropy_core.numerics.losses import dr_grpo
def loss(batch):
    if len(batch.rewards_N) == 16:
        {fails}
    return dr_grpo(batch)
"""
    (home / "half.py").write_text(text)
    write_function(home, "return [float(i % 2) for i in range(len(completions))]")
    update = {"loss": f"{home / 'half.py'}:loss", "scale_rewards": "none"}
    done = probe(config_of(home, batch_config={"B_U": 16}, update=update))
    assert done.run.artifacts("half-steps-u")[0].summary["splits"] == 0
    for row in finite(done):
        assert row["interval_over_u"].endswith("in every split of U the loss of one half has no finite gradient")


def test_two_sequences_and_two_prompts_are_enough(home):
    done = probe(config_of(home, batch_config={"E_total_sequences": 2}))
    for row in finite(done):
        assert (row["n_sequences"], row["n_prompts_u"]) == (2, 2)
        assert row["eta"] == 0 or row["this_update_low"] < row["delta_h1"] < row["this_update_high"]


def test_responses_of_one_token(home):
    """Nothing is to come after the first token, so both normalisations are the same, and all of δH₁ is local."""
    done = probe(config_of(home, generation={"max_new_tokens": 1}, batch_config={"E_total_sequences": 8}))
    rows = finite(done)
    assert {row["mean_length"] for row in rows} == {1.0}
    for row in rows:
        assert row["delta_h1"] == pytest.approx(row["delta_h1_local"], rel=1e-12)
        same = next(
            other
            for other in rows
            if other["normalization"] == "per_sequence"
            and (other["eta"], other["estimator"]) == (row["eta"], row["estimator"])
        )
        assert row["delta_h"] == pytest.approx(same["delta_h"], rel=1e-6, abs=1e-12)


def test_a_policy_that_never_ends(home):
    """Without an EOS every response is cut; the last token is scored like any other."""
    directory = home / "run" / NAME
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    forget_tokenizer(directory)
    tokenizer.save_pretrained(directory)
    for name in ("config.json", "generation_config.json"):
        change_json(directory / name, eos_token_id=None)
    done = probe(config_of(home))
    rows = finite(done)
    assert {row["truncated_fraction"] for row in rows} == {1.0}
    assert {row["mean_length"] for row in rows} == {4.0}
    for row in rows:  # equal lengths: the ratio is a mean
        if row["normalization"] == "per_token" and row["estimator"] == "per_decision" and row["eta"]:
            assert abs(row["paired_difference"]) < 0.5 * abs(row["delta_h1"])


@pytest.mark.parametrize("temperature", [0.001, 100.0])
def test_a_policy_that_is_certain_or_uniform(home, temperature):
    for row in finite(probe(config_of(home, generation={"temperature": temperature}))):
        assert 0 <= row["H"] <= math.log(17) * (4 if row["normalization"] == "per_sequence" else 1) + 1e-9


def test_a_step_far_too_large_measures_nothing_and_says_so(home):
    """Weights that overflow give null, never NaN or infinity; a policy that overflows is an error."""
    done = probe(config_of(home, batch_config={"E_total_sequences": 32}, importance={"etas": [0, 1, 1e3, 1e4, -1e4]}))
    for row in done.rows:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
        assert (row["verdict"] == "weights-unreliable") == (abs(row["eta_over_lr"]) > 2)
        assert (row["delta_h"] is None) == (row["minimum_detectable"] is None) == (abs(row["eta_over_lr"]) > 2e3)
        assert (row["ess"] == 0) == (row["delta_h"] is None)
    message = r"at the step size η = 2e\+297: .* token value.*smaller step sizes"  # the learning rate is 2e-3
    with pytest.raises(NonFiniteError, match=message) as raised:
        probe(config_of(home, importance={"etas": [0, 1e300]}))
    one_line(raised.value)


def test_one_prompt_cannot_be_the_only_cluster(home):
    two = write_pool(home, prompts("1+2=", "3+4="))
    one = {"E_sampling_mode": "distinct", "B_E_values": [1]}
    message = "there is one: a standard error needs two.*variance.cluster"
    refused(ConfigError, message, config_of(home, batch_config=two | one, variance={"cluster": "prompt"}))
    finite(probe(config_of(home, batch_config=two, variance={"cluster": "prompt"})))


def test_runs_of_the_same_name_are_told_apart(home):
    for place in ("a/run", "b/run"):
        shutil.copytree(home / "run" / NAME, home / place / NAME)
    done = probe(config_of(home, checkpoints=[str(home / "*" / "run" / NAME), str(home / "run" / NAME)]))
    names = list(dict.fromkeys(row["checkpoint"] for row in done.rows))
    assert names == [f"a/run/{NAME}", f"b/run/{NAME}", f"home/run/{NAME}"]
    assert done.run.was_computed["sample-e-batch"] == 1  # one content, three places
