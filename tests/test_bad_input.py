"""Bad and extreme input: refused on one line before anything is sampled, or a finite and right answer."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import (
    LEARNING_RATE,
    Probe,
    make_gpt2,
    make_run,
    parts_of,
    probe,
    skip_figures,
    values,
    write_reward,
)
from safetensors.torch import load_file, save_file

from entropy_core.config.read import load_config, parse_config
from entropy_core.demo.run import build_tokenizer
from entropy_core.errors import CheckpointError, ConfigError, NonFiniteError, ProbeError, PromptError, RewardError
from entropy_core.losses.apart import coefficients_of_each
from entropy_core.pipeline.preflight import preflight
from entropy_core.stages import half_steps_u
from entropy_core.store.store import Store

NAME = "checkpoint-3"
BATCH = {"E_total_sequences": 4, "B_U": 2, "G": 2}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    make_run(folder / "run")
    write_reward(folder)
    return folder


@pytest.fixture
def home(original, tmp_path, monkeypatch) -> Path:
    """A run and a reward, to break."""
    skip_figures(monkeypatch)
    return shutil.copytree(original, tmp_path / "home")


def config_of(home: Path, **sections: Any) -> dict[str, Any]:
    own: dict[str, Any] = {
        "checkpoints": [str(home / "run" / NAME)],
        "batch_config": BATCH,
        "generation": {"max_new_tokens": 4},
        "update": {"reward": f"{home / 'reward.py'}:share_of_low_digits"},
    }
    for name, section in sections.items():
        own[name] = own[name] | section if isinstance(own.get(name), dict) and isinstance(section, dict) else section
    return values(home / "run", home / "artifacts", **own)


def one_line(error: ProbeError) -> None:
    """What the user sees says what is so and what to do, and is one line."""
    assert "\n" not in str(error)
    assert "Fix: " in str(error) or isinstance(error, ConfigError)
    assert str(error).endswith(".")


def refused(kind: type[ProbeError], message: str, config: dict[str, Any]) -> str:
    """The sweep is refused with this error, and before it has written anything."""
    with pytest.raises(ProbeError, match=message) as raised:
        probe(config)
    assert type(raised.value) is kind
    one_line(raised.value)
    assert not Path(config["execution"]["artifacts"]).exists()
    return str(raised.value)


def finite(done: Probe) -> list[dict[str, Any]]:
    """The rows, in which no number is missing, infinite or NaN; of so few weights no tail can be fitted.

    Of so few prompts there is no interval over U, and none is given.
    """
    for row in done.rows:
        assert row["interval_over_u"].startswith("no valid interval over U: ")
        for name, value in row.items():
            over_u = "mean_update" in name or "next_update" in name or name == "nonlinearity_over_u"
            assert value is None or not over_u or name.startswith(("sign", "nonlinearity")), name
            missing = value is None and name not in ("pareto_k", "sampler_pareto_k", "derivative_check") and not over_u
            assert not missing and (not isinstance(value, float) or math.isfinite(value)), (name, value)
    return done.rows


def write_pool(home: Path, lines: list[str]) -> dict[str, str]:
    (home / "pool.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return {"dataset_name": str(home / "pool.jsonl")}


def prompts(*texts: str) -> list[str]:
    return [json.dumps({"prompt": text}) for text in texts]


# --- checkpoints that cannot be probed -------------------------------------------------------------------------------


def change_optimizer(directory: Path, change: Callable[[dict], Any]) -> None:
    saved = torch.load(directory / "optimizer.pt", weights_only=True)
    change(saved)
    torch.save(saved, directory / "optimizer.pt")


def change_json(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def cut(path: Path, to: int) -> None:
    path.write_bytes(path.read_bytes()[:to])


def forget_tokenizer(directory: Path) -> None:
    for path in directory.glob("tokenizer*"):
        path.unlink()


def set_rates(saved: dict, rate: float) -> None:
    for group in saved["param_groups"]:
        group["lr"] = rate


BROKEN_CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no optimizer": (lambda d: (d / "optimizer.pt").unlink(), r"no optimizer\.pt.*save_only_model=False"),
    "optimizer cut off": (lambda d: cut(d / "optimizer.pt", 1000), r"optimizer\.pt is not a complete archive"),
    "learning rate 0": (
        lambda d: change_optimizer(d, lambda saved: set_rates(saved, 0.0)),
        "learning rate 0 in every param group.*set `learning_rate`",
    ),
    "weights cut off": (lambda d: cut(d / "model.safetensors", 5000), r"model\.safetensors cannot be opened"),
    "weights garbled": (
        lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 64 + (d / "model.safetensors").read_bytes()[64:]),
        r"model\.safetensors cannot be opened",
    ),
    "weights empty": (lambda d: cut(d / "model.safetensors", 0), r"model\.safetensors cannot be opened"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no weights"),
    "other config": (lambda d: change_json(d / "config.json", hidden_size=32), "other shapes than config.json says"),
    "config cut off": (lambda d: cut(d / "config.json", 40), r"config\.json is not readable JSON"),
    "no tokenizer": (forget_tokenizer, "no tokenizer that can be loaded.*save the tokenizer"),
    "no trainer state": (lambda d: (d / "trainer_state.json").unlink(), r"no trainer_state\.json"),
    "an adapter": (lambda d: (d / "adapter_config.json").write_text("{}"), "holds both an adapter"),
}


@pytest.mark.parametrize(("spoil", "message"), BROKEN_CHECKPOINTS.values(), ids=BROKEN_CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_probed(home, spoil, message):
    spoil(home / "run" / NAME)
    assert NAME in refused(CheckpointError, message, config_of(home))


def test_one_bad_checkpoint_of_several_is_left_out_and_said(home, monkeypatch):
    """Half-written, or removed by its trainer meanwhile; a sweep that is strict, or has nothing else, is refused."""
    (home / "run" / "checkpoint-5" / "optimizer.pt").unlink()
    for checkpoints in ([str(home / "run" / "checkpoint-*")], [str(home / "run")]):
        config = config_of(home, checkpoints=checkpoints)
        strict = config | {"execution": config["execution"] | {"unusable_checkpoints": "refuse"}}
        assert "checkpoint-5" in refused(CheckpointError, r"no optimizer\.pt", strict)
        (found,) = preflight(parse_config(config))
        (warning,) = found.warnings
        assert found.name == NAME and re.match(r"checkpoint-5 is left out: checkpoint-5 has no optimizer\.pt", warning)

    def removed(directory: Path, *_: Any) -> Any:
        raise FileNotFoundError(2, "No such file or directory", str(directory / "optimizer.pt"))

    monkeypatch.setattr("entropy_core.pipeline.usable.read_checkpoint", removed)
    with pytest.raises(CheckpointError, match="the trainer removed it"):
        preflight(parse_config(config))


def test_a_checkpoint_alone_is_refused(home):
    (home / "run" / NAME / "optimizer.pt").unlink()
    refused(CheckpointError, r"no optimizer\.pt", config_of(home))


def test_moments_that_are_nan_stop_the_sweep_before_anything_is_sampled(home):
    """They are read by the first stage, which is run for all checkpoints first."""
    change_optimizer(home / "run" / "checkpoint-5", lambda saved: saved["state"][0]["exp_avg"].fill_(math.nan))
    config = config_of(home, checkpoints=[str(home / "run" / "checkpoint-*")])
    with pytest.raises(CheckpointError, match=r"checkpoint-5/optimizer\.pt: moments are NaN.*an earlier") as raised:
        probe(config)
    one_line(raised.value)
    assert {stage for stage, _ in Store(config["execution"]["artifacts"]).names()} == {"load-checkpoint"}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("checkpoint-9*", "No directory matches .*checkpoint-9"),
        ("checkpoint-3/config.json", "No directory matches"),
        ("..", r"has no config\.json"),
    ],
)
def test_a_pattern_without_a_checkpoint(home, pattern, message):
    refused(CheckpointError, message, config_of(home, checkpoints=[str(home / "run" / pattern)]))


def test_a_saved_learning_rate_of_zero_is_that_of_the_step_before_for_that_checkpoint_alone(home):
    """The end of a linear schedule; the last rate above 0 that the trainer logged is the schedule's neighbour."""
    last = home / "run" / "checkpoint-5"
    change_optimizer(last, lambda saved: set_rates(saved, 0.0))
    log = [{"step": step, "learning_rate": 1e-3 * (5 - step), "loss": 0.0} for step in range(1, 6)]
    (last / "trainer_state.json").write_text(json.dumps({"global_step": 5, "log_history": log}))
    done = probe(config_of(home, checkpoints=[str(home / "run")]))
    assert {row["checkpoint"]: row["learning_rate"] for row in done.rows} == {NAME: LEARNING_RATE, last.name: 1e-3}
    said = "The saved learning rate is 0; the step has 0.001, that of step 4 in trainer_state.json."
    assert said in (done.result.run_directory / "report.md").read_text()
    assert said in done.checkpoints[1].assumptions and said not in done.checkpoints[0].assumptions


def test_a_learning_rate_that_is_given_takes_the_place_of_zero(home):
    """The schedule has ended; and with the rate that was saved before, everything is as it was."""
    before = finite(probe(config_of(home)))
    change_optimizer(home / "run" / NAME, lambda saved: set_rates(saved, 0.0))
    after = probe(config_of(home, update={"learning_rate": LEARNING_RATE}))
    assert [row["delta_h1"] for row in finite(after)] == [row["delta_h1"] for row in before]
    assert {row["learning_rate"] for row in after.rows} == {LEARNING_RATE}
    assert "Learning rate 0.002 in place of the saved 0" in (after.result.run_directory / "report.md").read_text()


def test_weights_with_a_nan_name_the_sequence(home):
    path = home / "run" / NAME / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"the logits of sequence \d+ are not finite at position \d+") as raised:
        probe(config_of(home))
    one_line(raised.value)


# --- pools -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "kind", "message"),
    [
        ({"dataset_name": "gsm9k"}, PromptError, "unknown dataset 'gsm9k'.*arithmetic, gsm8k"),
        ({"dataset_name": "/no/such/pool.jsonl"}, PromptError, "cannot be read"),
        ({"split": "validation"}, PromptError, "no split 'validation'.*train, test"),
        ({"U_split": "dev"}, PromptError, "no split 'dev'"),
        ({"prompt_column": "question"}, PromptError, "no string in column 'question'.*prompt_column"),
        ({"B_U": 513}, ConfigError, "B_U asks for 513 distinct prompts, but split 'train' has 512.*at most 512"),
        (
            {"E_sampling_mode": "distinct", "B_E_values": [600], "E_split": "test"},
            ConfigError,
            "B_E_values asks for 600 distinct prompts, but split 'test' has 512",
        ),
        ({"E_sampling_mode": "distinct", "B_E_values": [1]}, ConfigError, "there is one: a standard error needs two"),
        ({"E_total_sequences": 1}, ConfigError, "batch_config.E_total_sequences"),
        ({"B_V": 8}, ConfigError, "batch_config.B_V: unknown key"),
    ],
)
def test_a_batch_that_cannot_be_drawn(home, batch, kind, message):
    refused(kind, message, config_of(home, batch_config=batch))


@pytest.mark.parametrize(
    ("lines", "kind", "message"),
    [
        ([*prompts("1+2="), '{"prompt": "3+4="'], PromptError, r"pool\.jsonl:2 is not JSON"),
        (prompts("1+2=", "1+2="), PromptError, "repeat an earlier prompt"),
        (prompts("1+2=", "x+y="), PromptError, "tokenizer of .*checkpoint-3 cannot encode .*use a dataset that fits"),
        (prompts("1+2="), ConfigError, "B_U asks for 2 distinct prompts, but split 'train' has 1"),
        ([], PromptError, "has no prompts"),
    ],
    ids=["broken line", "copies", "other characters", "one prompt", "empty"],
)
def test_a_file_that_is_no_pool(home, lines, kind, message):
    refused(kind, message, config_of(home, batch_config=write_pool(home, lines)))


def test_the_sampling_settings_of_a_checkpoint_are_not_used(home):
    """They are for chatting: what is sampled is what is scored, the policy itself."""
    config = config_of(home, importance={"etas": [0]})
    before = probe(config)
    chatting = {"do_sample": True, "top_k": 1, "top_p": 0.5, "temperature": 0.1, "repetition_penalty": 2.0}
    change_json(home / "run" / NAME / "generation_config.json", **chatting)
    after = probe(config)
    for stage in ("sample-e-batch", "sample-u-batch"):
        assert after.run.computed[stage] == before.run.computed[stage] > 0  # the file could have mattered
        for a, b in zip(before.run.artifacts(stage), after.run.artifacts(stage), strict=True):
            assert a.digest == b.digest


def test_responses_that_the_policy_has_no_positions_for(home, tmp_path):
    directory = make_gpt2(tmp_path / "gpt2" / "checkpoint-3")
    config = {"checkpoints": [str(directory)], "batch_config": write_pool(home, prompts("1+2=", "300+400="))}
    message = "up to 8 tokens and max_new_tokens of 57 do not fit into the 64 positions.*at most 56"
    refused(ConfigError, message, config_of(home, **config, generation={"max_new_tokens": 57}))
    config["batch_config"] |= {"E_total_sequences": 2}
    finite(probe(config_of(home, **config, generation={"max_new_tokens": 56})))


# --- rewards ---------------------------------------------------------------------------------------------------------


def write_function(home: Path, body: str) -> None:
    write_reward(home, f"def share_of_low_digits(prompts, completions, **columns):\n    {body}\n")


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


# --- the configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"generation": {"top_p": 0.95}}, r"top_p: it is 0\.95.*Set top_p: 1\.0"),
        ({"importance": {"etas": [0, math.nan]}}, "importance.etas.1"),
        ({"importance": {"etas": []}}, "importance.etas"),
        ({"importance": {"etas": [0.3, 1, 0.3]}}, "listed twice"),
        ({"colour": "red"}, "colour: unknown key"),
        ({"update": {"optimizer": {"lr": 1}}}, "update.optimizer: unknown key"),
        ({"checkpoints": []}, "checkpoints: "),
    ],
)
def test_a_configuration_that_is_not_understood(home, sections, message):
    refused(ConfigError, message, config_of(home, **sections))


def test_a_file_that_is_no_configuration(home):
    (home / "probe.yaml").write_text("checkpoints: [")
    for path in ("probe.yaml", "missing.yaml"):
        with pytest.raises(ConfigError) as raised:
            preflight(load_config(home / path))
        one_line(raised.value)


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
