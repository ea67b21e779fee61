"""A rehearsal against the model itself, stepped by torch's own optimizer on the responses that the rehearsal drew."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import (
    Counting,
    Probe,
    call_here,
    make_gpt2,
    probe,
    skip_figures,
    trainer_groups,
    values,
    write_reward,
)
from transformers import AutoModelForCausalLM

from entropy_core.config.lab import RehearseConfig
from entropy_core.config.read import parse_config
from entropy_core.errors import ConfigError
from entropy_core.estimates.distributions import t_quantile
from entropy_core.estimates.rehearsal import Seeds, _floor_columns
from entropy_core.pipeline import catalogue
from entropy_core.pipeline.preflight import preflight
from entropy_core.pipeline.runner import Inputs, Runner
from entropy_core.pipeline.settings import settle
from entropy_core.pipeline.sweep import execution_for, sweep
from entropy_core.policy.spec import policy_of
from entropy_core.report import rehearsal as section
from entropy_core.sequences.files import read_sequences
from entropy_core.store.artifact import Artifact
from entropy_core.store.store import Stage, Store

P, G, STEPS, SEEDS, EVERY = 4, 4, 2, 2, 2
MAX_NORM = 0.5
TRIED = [{"random": 0.0}, {"random": 0.5}, {"lr": 0.5}, {"clip_discriminator": 1.0}, {"drop_costliest": 0.1}]
LABELS = ["as it is", "random 0 %", "random 50 %", "lr: 0.5", "clip_discriminator: 1"]


def asked(folder: Path, **rehearse: Any) -> dict[str, Any]:
    return values(
        folder / "run",
        folder / "artifacts",
        batch_config={"B_U": P, "G": G},
        update={"reward": f"{folder / 'reward.py'}:share_of_low_digits", "max_grad_norm": MAX_NORM},
        interventions=TRIED,
        lab={
            "measure": "none",
            "rehearse": {"steps": STEPS, "seeds": SEEDS, "interventions": "all", "every": EVERY} | rehearse,
        },
        execution={"shard_size": 16},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rehearsed")
    make_gpt2(folder / "run" / "checkpoint-3")
    write_reward(folder)
    return folder


@pytest.fixture(scope="module")
def rehearsed(folder: Path) -> Probe:
    """The sweep of a policy in which float64 is float64, with rehearsals."""
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        call_here(patch)
        return probe(asked(folder))


def again(folder: Path, **rehearse: Any) -> Probe:
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        call_here(patch)
        return probe(asked(folder, **rehearse))


def chain(probe: Probe, label: str, replicate: int) -> list[tuple[Inputs, Artifact]]:
    """The steps under one intervention from one of the seeds, with their inputs."""
    steps = [(i, a) for name, i, a in probe.run.asked if name == "rehearsal-step" and i["intervention"].label == label]
    return steps[STEPS * (replicate - 1) : STEPS * replicate]


def rows_of(probe: Probe, **where: Any) -> list[dict[str, Any]]:
    rows = probe.result.report.table("rehearsal.parquet").to_pylist()
    return [row for row in rows if all(row[name] == value for name, value in where.items())]


class Trainer:
    """GRPO, on-policy, response by response, with torch's own optimizer and clipping."""

    def __init__(self, rehearsed: Probe) -> None:
        directory = rehearsed.checkpoints[0].directory
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
        self.optimizer = torch.optim.AdamW(trainer_groups(self.model))
        self.optimizer.load_state_dict(torch.load(directory / "optimizer.pt", weights_only=True))

    def logits(self, batch: Any, i: int) -> torch.Tensor:
        prompt, response = batch.prompt(i), batch.response(i)
        return self.model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]

    def logprobs(self, batch: Any, i: int) -> torch.Tensor:
        logps = torch.log_softmax(self.logits(batch, i), -1)
        return logps.gather(-1, batch.response(i)[:, None]).squeeze(-1)

    def step(self, batch: Any, rewards: list[float]) -> None:
        rewards_PG = torch.tensor(rewards, dtype=torch.float64).view(P, G)
        centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
        advantages_N = (centred_PG / (rewards_PG.std(1, keepdim=True) + 1e-4)).flatten()
        self.optimizer.zero_grad()
        losses = []
        for i, advantage in enumerate(advantages_N):
            logps = self.logprobs(batch, i)
            losses.append(-(torch.exp(logps - logps.detach()) * advantage).mean())
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()


def batch_of(shards: list[Artifact]) -> Any:
    (shard,) = shards
    return read_sequences(shard)


@pytest.mark.parametrize("replicate", [1, 2])
def test_the_weights_after_every_step_are_those_of_a_trainer_on_the_same_responses(rehearsed: Probe, replicate: int):
    trainer, lr = Trainer(rehearsed), rehearsed.run.artifacts("load-checkpoint")[0].summary["learning_rate"]
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    drawn = []
    for inputs, step in chain(rehearsed, "as it is", replicate):
        batch = batch_of(inputs["sequences"])
        drawn.append(batch.prompt_ids_N.tolist())
        with torch.no_grad():  # the rehearsal scored them at the same weights
            logps_K = torch.cat([trainer.logprobs(batch, i) for i in range(P * G)])
        scored_K = inputs["scores"][0].tensors("tokens.safetensors")["logprobs"]
        torch.testing.assert_close(scored_K, logps_K, rtol=1e-9, atol=1e-11)
        trainer.step(batch, inputs["rewards"].table("rewards.parquet")["reward"].to_pylist())
        direction = step.vector("direction")
        for name, theta in trainer.model.named_parameters():
            torch.testing.assert_close(before[name] + lr * direction[name], theta.data, rtol=1e-10, atol=1e-12)
        moments = {name: trainer.optimizer.state[p] for name, p in trainer.model.named_parameters()}
        for key in ("exp_avg", "exp_avg_sq"):
            for name, tensor in step.vector(key).items():
                torch.testing.assert_close(tensor, moments[name][key], rtol=1e-9, atol=1e-16)
    assert len({tuple(prompts) for prompts in drawn}) == STEPS  # every step has prompts of its own
    (row,) = rows_of(
        rehearsed, intervention="as it is", replicate=replicate, rehearsal_step=STEPS, normalization="per_token"
    )
    after = [i for name, i, _ in rehearsed.run.asked if name == "score-e-batch" and i["policy"].step == step]
    on_e = batch_of([after[0]["sequences"]])
    with torch.no_grad():
        entropies = [torch.distributions.Categorical(logits=trainer.logits(on_e, i)).entropy() for i in range(16)]
    assert row["H"] == pytest.approx(float(torch.cat(entropies).mean()), rel=1e-10)


def test_the_first_step_is_that_of_the_sweep_bit_for_bit(rehearsed: Probe):
    """As it is, v of compute-update on the U of the sweep; under an intervention that of altered-step."""
    steps = {label: chain(rehearsed, label, 1)[0] for label in LABELS}
    (update,) = rehearsed.run.artifacts("compute-update")
    inputs, step = steps["as it is"]
    assert inputs["sequences"] == rehearsed.run.artifacts("sample-u-batch")[:1]
    expected = {"as it is": update.vector("direction")}
    for name, of, _ in rehearsed.run.asked:
        for spec in of["interventions"] if name == "predict" else ():
            if spec.label in LABELS[1:]:
                shared = ("policy", "scores_u", "discriminators_u", "checkpoint", "update", "sensitivities")
                altered = {key: of[key] for key in shared} | {"sequences": of["sequences_u"], "intervention": spec}
                one = rehearsed.run.store.run(catalogue.ALTERED_STEP, rehearsed.run.execution, altered)
                expected[spec.label] = one.vector("direction")
    assert set(expected) == set(LABELS)
    for label, v in expected.items():
        direction = steps[label][1].vector("direction")
        assert list(direction) == list(v) and all(torch.equal(direction[name], v[name]) for name in v), label
    assert step.summary["clip_factor"] == update.summary["clip_factor"] < 1
    halved = chain(rehearsed, "lr: 0.5", 1)[0][1].summary
    assert halved["step_norm"] == pytest.approx(0.5 * step.summary["step_norm"], rel=1e-12)


def test_the_policy_after_a_step_is_that_of_no_step_moved(rehearsed: Probe):
    inputs, step = chain(rehearsed, "as it is", 1)[-1]
    spec, lr = inputs["policy"], step.summary["learning_rate"]
    start = {n: p.detach().clone() for n, p in named(rehearsed, spec.model_copy(update={"step": None})).items()}
    after, direction = named(rehearsed, spec.model_copy(update={"step": step})), step.vector("direction")
    assert all(torch.equal(after[name], start[name] + lr * direction[name]) for name in start)
    unmoved = named(rehearsed, spec.model_copy(update={"step": None}))
    assert all(torch.equal(unmoved[name], start[name]) for name in start)


def named(probe: Probe, spec: Any) -> dict[str, torch.Tensor]:
    return dict(policy_of(spec, probe.run.execution).named_parameters())


def test_an_intervention_that_changes_nothing_differs_by_exactly_nothing(rehearsed: Probe):
    null, zero = rows_of(rehearsed, intervention="random 0 %"), ("difference", "difference_j", "difference_length")
    assert len(null) == 2 * (1 + SEEDS) * 2
    assert all(row[f"{name}{of}"] == 0.0 for row in null for name in zero for of in ("", "_se", "_low", "_high"))
    other = rows_of(rehearsed, intervention="random 50 %", rehearsal_step=STEPS, replicate=None)
    assert all(row["difference"] != 0.0 for row in other)
    seeds = [chain(rehearsed, "random 50 %", r)[k][0]["intervention"].seed for r in (1, 2) for k in range(STEPS)]
    assert len(set(seeds)) == SEEDS * STEPS  # at every step other tokens


def test_what_is_drawn_is_shared_by_all_chains_from_one_seed(rehearsed: Probe):
    for replicate in (1, 2):
        prompts = {
            tuple(tuple(batch_of(i["sequences"]).prompt_ids_N.tolist()) for i, _ in chain(rehearsed, of, replicate))
            for of in LABELS
        }
        assert len(prompts) == 1
    rows = rows_of(rehearsed, rehearsal_step=0, replicate=None, normalization="per_token")
    assert [row["intervention"] for row in rows] == LABELS  # without drop_costliest
    assert len({row["H"] for row in rows}) == 1


def test_the_rows_are_the_textbook_estimates_of_what_was_drawn(rehearsed: Probe):
    entries = rehearsed.run.inputs("rehearsal")["policies"]
    at = {(e["intervention"], e["replicate"], e["number"]): e for e in entries}
    assert len(at) == len(entries) == len(LABELS) * SEEDS * 2

    def columns(label: str, replicate: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        entry = at[label, replicate, STEPS]
        scores, rewards = entry["scores"][0].table("scores.parquet"), entry["rewards"][0].table("rewards.parquet")
        found = (scores["sum_entropy"], scores["length"], rewards["reward"])
        S_N, T_N, r_N = (torch.tensor(column.to_pylist(), dtype=torch.float64) for column in found)
        return S_N, T_N, r_N

    level, differences = 0.95, []
    for replicate in (1, 2):
        of_run, half = columns("as it is", replicate), columns("lr: 0.5", replicate)
        (row,) = rows_of(
            rehearsed, intervention="lr: 0.5", replicate=replicate, rehearsal_step=STEPS, normalization="per_sequence"
        )
        t = t_quantile(0.5 + level / 2, 15)
        for name, of, other in zip(("", "_length", "_j"), half, of_run, strict=True):
            x_N = of - other
            error = float(x_N.std()) / 4
            assert row[f"difference{name}"] == pytest.approx(float(x_N.mean()), abs=1e-13)
            assert row[f"difference{name}_se"] == pytest.approx(error, rel=1e-9)
            assert row[f"difference{name}_high"] == pytest.approx(float(x_N.mean()) + t * error, rel=1e-9)
        (per_token,) = rows_of(
            rehearsed, intervention="lr: 0.5", replicate=replicate, rehearsal_step=STEPS, normalization="per_token"
        )
        assert per_token["H"] == pytest.approx(float(half[0].sum() / half[1].sum()), rel=1e-12)
        differences.append(row["difference"])
    (together,) = rows_of(
        rehearsed, intervention="lr: 0.5", replicate=None, rehearsal_step=STEPS, normalization="per_sequence"
    )
    both = torch.tensor(differences, dtype=torch.float64)
    assert together["difference"] == pytest.approx(float(both.mean()), rel=1e-12)
    assert together["difference_se"] == pytest.approx(float(both.std()) / 2**0.5, rel=1e-9)


def test_the_band_is_for_one_more_seed():
    values = [1.0, 2.0, 4.0, 5.0]
    seeds = Seeds(values, [0.1] * 4, units=50)
    spread, t = torch.tensor(values, dtype=torch.float64).std().item(), t_quantile(0.975, 3)
    assert seeds.interval(0.95) == pytest.approx((3.0, spread / 2, 3 - t * spread / 2, 3 + t * spread / 2))
    assert seeds.of_a_run(0.95) == pytest.approx((3 - t * spread * 1.25**0.5, 3 + t * spread * 1.25**0.5))
    one, t = Seeds([1.0], [0.1], units=50), t_quantile(0.975, 49)
    assert one.interval(0.95) == pytest.approx((1.0, 0.1, 1 - 0.1 * t, 1 + 0.1 * t))
    assert one.of_a_run(0.95) == (None, None)


@pytest.mark.parametrize("band", ["H_run", "H"])
def test_a_floor_is_reached_when_the_value_and_the_ends_of_the_band_first_are_below_it(band: str):
    rows = [
        {"rehearsal_step": 2 * k, "H": 1.0 - 0.1 * k, "H_run_low": None, "H_run_high": None}
        | {f"{band}_low": 0.86 - 0.1 * k, f"{band}_high": 1.16 - 0.1 * k}
        for k in range(5)
    ]
    assert _floor_columns(rows, 0.75) == {"floor": 0.75, "floor_step": 6, "floor_low": 4, "floor_high": None}
    assert _floor_columns(rows, 0.3) == {"floor": 0.3, "floor_step": None, "floor_low": None, "floor_high": None}
    assert set(_floor_columns(rows, None).values()) == {None}
    shown = [section._reached(row) for row in (_floor_columns(rows, 0.75), _floor_columns(rows, 0.3))]
    assert shown == ["6 [4, later]", "not reached"]


def test_a_floor_or_another_level_computes_the_statistics_alone(rehearsed: Probe, folder: Path):
    H = rows_of(rehearsed, intervention="as it is", rehearsal_step=2, replicate=None, normalization="per_token")[0]["H"]
    found = again(folder, floor=H + 1e-9)
    assert found.run.was_computed == {"rehearsal": 1, "report": 1}
    rows = rows_of(found, intervention="as it is", replicate=None)
    assert {(row["normalization"], row["floor"], row["floor_step"]) for row in rows} == {
        ("per_token", H + 1e-9, 2),
        ("per_sequence", None, None),
    }
    page = (found.result.run_directory / "report.md").read_text()
    assert "## The rehearsal" in page and f"H below {H:g} at step" in page and "rehearsal.png" in page


def test_the_first_paragraph_says_where_the_steps_lead(rehearsed: Probe):
    rows = rows_of(rehearsed, normalization="per_token")
    start, end = (
        rows_of(rehearsed, normalization="per_token", replicate=None, rehearsal_step=n)[0] for n in (0, STEPS)
    )
    lead = f"2 real steps from checkpoint-3, rehearsed from 2 seeds, take the entropy from {start['H']:.4f} to "
    assert section.sentence(rows).startswith(f"{lead}{end['H']:.4f} [")
    assert lead in (rehearsed.result.run_directory / "report.md").read_text()
    surely = [row | {"difference": 0.004, "difference_low": 0.003, "difference_high": 0.005} for row in rows]
    assert section.sentence(surely).endswith("; under random 0 % it ends +0.004 [+0.003, +0.005] higher.")
    assert "under none of 4 interventions" in section.sentence([row | {"difference_low": -1.0} for row in rows])
    assert section.sentence([]) == ""


class Killed(Exception):
    pass


def test_more_steps_go_on_from_the_last_and_so_does_a_run_that_was_killed(
    rehearsed: Probe, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    call_here(monkeypatch)
    config = parse_config(asked(folder, steps=STEPS + 2, interventions="none", seeds=1))
    checkpoints, store = preflight(config), Store(config.store_root)
    run = Counting(store, execution_for(config, checkpoints))

    def killed(stage: Stage, inputs: Inputs, label: str) -> Artifact:
        if stage.name == "rehearsal-step" and f"step {STEPS + 2}/" in label:
            raise Killed
        return run(stage, inputs, label)

    with pytest.raises(Killed):
        sweep(config, checkpoints, store, Runner(killed))
    assert run.was_computed["rehearsal-step"] == 1
    found = again(folder, steps=STEPS + 2, interventions="none", seeds=1)
    assert found.run.was_computed == {
        **dict.fromkeys(("rehearsal-step", "sample-e-batch", "score-e-batch", "reward-e-batch"), 1),
        **dict.fromkeys(("rehearsal", "report"), 1),
    }
    assert [row["rehearsal_step"] for row in rows_of(found, replicate=1, normalization="per_token")] == [0, 2, 4]
    of_both = [rows_of(one, replicate=1, rehearsal_step=2, intervention="as it is") for one in (rehearsed, found)]
    assert of_both[0] == of_both[1]


def test_vectors_that_are_let_go_come_again_as_they_were(rehearsed: Probe, folder: Path):
    config = asked(folder, steps=2, interventions="none", seeds=1)
    config["execution"] |= {"keep_vectors": False, "artifacts": str(folder / "small")}
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        call_here(patch)
        small = probe(config)
    steps = small.run.artifacts("rehearsal-step")
    assert steps == [step for _, step in chain(rehearsed, "as it is", 1)][:2]
    assert not any((step.directory / "vectors" / "direction.safetensors").exists() for step in steps)


def test_the_learning_rates_are_those_asked_for_or_said_to_stay(rehearsed: Probe, folder: Path):
    (checkpoint,) = preflight(parse_config(asked(folder, steps=4, learning_rates=[1, 0.5])))
    assert checkpoint.rehearsed_rates == (1, 0.5, 0.5, 0.5) and not checkpoint.learning_rates
    (said,) = set(rehearsed.checkpoints[0].warnings) - set(checkpoint.warnings)
    assert said.startswith("The learning rate after checkpoint-3 stays what it is along the rehearsal: ")
    assert said in (rehearsed.result.run_directory / "report.md").read_text()
    alike, slower = rehearsed, again(folder, learning_rates=[1, 0.5], interventions="none", seeds=1)
    assert slower.run.was_computed["rehearsal-step"] == 1  # the first one is the same
    norms = [chain(probe, "as it is", 1)[1][1].summary["step_norm"] for probe in (alike, slower)]
    assert norms[1] == pytest.approx(norms[0] / 2, rel=1e-6)  # lr·decay is in it, too


def test_how_often_e_is_measured():
    assert RehearseConfig().measured == 0
    assert RehearseConfig(steps=5, every=2, seeds=3).measured == 3 * 4  # at 0, 2, 4 and 5


@pytest.mark.parametrize(
    ("sections", "what"),
    [
        ({"batch_config": {"U": {"from": "rollouts.jsonl"}}}, "batch_config.U.from is a recorded batch"),
        ({"update": {"phase": {"follow": True, "minibatches": 2}}}, "update.phase follows several"),
    ],
)
def test_steps_that_are_not_on_fresh_responses_are_refused(folder: Path, sections: dict[str, Any], what: str):
    config = asked(folder)
    for name, values_of in sections.items():
        config[name] = config[name] | values_of
    with pytest.raises(ConfigError, match=what):
        settle(parse_config(config), {})
