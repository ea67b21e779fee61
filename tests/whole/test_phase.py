"""The steps on one rollout against the model itself, stepped by torch's own optimizer on the loss as TRL writes it."""

from typing import Any

import pytest
import torch
from pipeline_fixtures import Probe, make_gpt2, probe, skip_figures, trainer_groups, values, write_reward
from transformers import AutoModelForCausalLM

from entropy_core.config.phase import PhaseConfig
from entropy_core.losses.phase import PhaseSpec
from entropy_core.losses.phase_interventions import asked_in_phase, followed_names
from entropy_core.numerics.loss_batch import minibatch
from entropy_core.pipeline import catalogue
from entropy_core.sequences.files import read_sequences
from entropy_core.store.artifact import Artifact

P, G = 6, 4
KL_BETA, MAX_NORM = 0.3, 0.5
PHASE = PhaseSpec(minibatches=3, shuffle_seed=5, epsilon=0.02, epsilon_high=0.03, delta=1.05)
EPOCHS = 2


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    """The sweep of a policy in which float64 is float64, with a policy to stay close to."""
    folder = tmp_path_factory.mktemp("exact")
    make_gpt2(folder / "run" / "checkpoint-3")
    make_gpt2(folder / "reference", initializer_range=0.1)
    asked = values(
        folder / "run",
        folder / "artifacts",
        batch_config={"B_U": P, "G": G},
        update={
            "reward": write_reward(folder),
            "kl_beta": KL_BETA,
            "reference": str(folder / "reference"),
            "max_grad_norm": MAX_NORM,
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        return probe(asked)


def steps(exact: Probe, phase: PhaseSpec, count: int, **more: Any) -> list[Artifact]:
    """So many steps on the rollout, each after the last."""
    of_update = exact.run.inputs("compute-update")
    shared = {name: of_update[name] for name in ("policy", "checkpoint", "sequences")}
    shared |= {"update": exact.run.artifacts("compute-update")[0], "phase": phase}
    shared |= {"intervention": None, "rate": 1.0} | more
    found: list[Artifact] = []
    for number in range(count):
        asked = shared | {"number": number, "previous": found[-1] if found else None}
        found.append(exact.run.store.run(catalogue.PHASE_STEP, exact.run.execution, asked))
    return found


class Trainer:
    """GRPO with the clipped loss as TRL writes it, response by response."""

    def __init__(self, exact: Probe) -> None:
        directory = exact.checkpoints[0].directory
        self.model, self.reference = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
            for path in (directory, exact.config.update.reference)
        )
        self.optimizer = torch.optim.AdamW(trainer_groups(self.model))
        self.optimizer.load_state_dict(torch.load(directory / "optimizer.pt", weights_only=True))
        rewards = exact.run.artifacts("reward-u-batch")[0].table("rewards.parquet")["reward"].to_pylist()
        rewards_PG = torch.tensor(rewards, dtype=torch.float64).view(P, G)
        centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
        self.advantages_N = (centred_PG / (rewards_PG.std(1, keepdim=True) + 1e-4)).flatten()
        shards = [read_sequences(shard) for shard in exact.run.artifacts("sample-u-batch")]
        self.responses = [(shard.prompt(i), shard.response(i)) for shard in shards for i in range(len(shard))]
        self.old = [self.logprobs(self.model, i).detach() for i in range(P * G)]
        self.fixed = [self.logprobs(self.reference, i).detach() for i in range(P * G)]
        self.clipped = 0

    def logprobs(self, model: Any, i: int) -> torch.Tensor:
        prompt, response = self.responses[i]
        logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits, -1).gather(-1, response[:, None]).squeeze(-1)

    def loss(self, i: int, phase: PhaseSpec) -> torch.Tensor:
        logps, advantage = self.logprobs(self.model, i), self.advantages_N[i]
        ratio = torch.exp(logps - self.old[i])
        cut = ratio.clamp(1 - phase.epsilon, 1 + phase.epsilon_high)
        if phase.delta is not None:
            ratio = ratio.clamp(max=phase.delta)
        self.clipped += int((torch.min(ratio * advantage, cut * advantage) < ratio * advantage).sum())
        apart = self.fixed[i] - logps
        kl = apart.exp() - apart - 1
        return (-torch.min(ratio * advantage, cut * advantage) + KL_BETA * kl).mean()

    def step(self, chosen: list[int], phase: PhaseSpec) -> None:
        self.optimizer.zero_grad()
        torch.stack([self.loss(i, phase) for i in chosen]).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def test_the_weights_after_every_step_are_those_of_the_trainer(exact: Probe):
    trainer, phase = Trainer(exact), PHASE
    before, lr = trainer.weights(), exact.run.artifacts("load-checkpoint")[0].summary["learning_rate"]
    found = steps(exact, phase, EPOCHS * phase.minibatches)
    for number, step in enumerate(found):
        chosen_M, _ = minibatch(P * G, phase.minibatches, number % phase.minibatches, 0, phase.shuffle_seed)
        trainer.step(chosen_M.tolist(), phase)
        direction, now = step.vector("direction"), trainer.weights()
        for name, theta in before.items():
            torch.testing.assert_close(theta + lr * direction[name], now[name], rtol=1e-11, atol=1e-13)
        moments = {name: trainer.optimizer.state[p] for name, p in trainer.model.named_parameters()}
        for key in ("exp_avg", "exp_avg_sq"):
            for name, tensor in step.vector(key).items():
                torch.testing.assert_close(tensor, moments[name][key], rtol=1e-10, atol=1e-16)
    assert trainer.clipped > 10
    shares = {side: [step.summary[f"clip_{side}"] for step in found] for side in ("low", "high", "dual")}
    assert all(not of_side[0] and max(of_side) > 0 for of_side in shares.values())
    tokens, cut = found[-1].tensors("tokens.safetensors"), found[-1].table("clipped.parquet").to_pylist()
    counts = {side: sum(row["side"] == side for row in cut) / len(tokens["log_ratios"]) for side in shares}
    assert counts == pytest.approx({side: of_side[-1] for side, of_side in shares.items()})
    assert all((row["advantage"] > 0) == (row["side"] == "high") for row in cut)
    assert found[-1].summary["largest_ratio"] == pytest.approx(float(tokens["log_ratios"].exp().max()))


@pytest.mark.parametrize("seed", [None, 0, 7])
def test_a_single_minibatch_gives_v_bit_for_bit(exact: Probe, seed: int | None):
    (step,) = steps(exact, PHASE.model_copy(update={"minibatches": 1, "shuffle_seed": seed}), 1)
    (update,) = exact.run.artifacts("compute-update")
    direction, v = step.vector("direction"), update.vector("direction")
    assert list(direction) == list(v) and all(torch.equal(direction[name], v[name]) for name in v)
    assert step.summary["gradient_norm"] == update.summary["gradient_norm"]
    assert step.summary["approx_kl"] == 0 and step.summary["largest_ratio"] == 1


def test_minibatches_share_out_the_rollout():
    for seed, micro_batch in ((None, 0), (3, 2)):
        parts = [minibatch(12, 3, index, micro_batch, seed) for index in range(3)]
        assert sorted(torch.cat([chosen_M for chosen_M, _ in parts]).tolist()) == list(range(12))
        assert all(chosen_M.tolist() == sorted(chosen_M.tolist()) for chosen_M, _ in parts)
        sizes = [micro_batches_M.bincount().tolist() for _, micro_batches_M in parts]
        assert sizes == [[2, 2] if micro_batch else [4]] * 3
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    assert minibatch(12, 3, 1, 0, 3)[0].tolist() == sorted(order[4:8].tolist())


# --- the sweep -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def followed(exact: Probe) -> Probe:
    """The same sweep with its phase, and rewards on E."""
    asked = exact.config.as_given() | {"price": True}
    asked["update"] = asked["update"] | {"phase": {"follow": True, "minibatches": 3, "epochs": EPOCHS, "epsilon": 0.02}}
    asked["execution"] = asked["execution"] | {"keep_vectors": False}
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        return probe(asked)


def test_a_sweep_follows_the_phase(exact: Probe, followed: Probe):
    count = 3 * EPOCHS
    computed = followed.run.was_computed
    assert computed["phase-step"] == count and computed["phase"] == 1
    assert computed["importance"] == count * 2  # shards; those of the plain sweep are there
    assert not {"sample-u-batch", "first-order-u"} & set(computed)
    rows = followed.result.report.table("phase.parquet").to_pylist()
    per_token = [row for row in rows if row["normalization"] == "per_token"]
    assert [(row["phase_step"], row["epoch"], row["minibatch"]) for row in per_token] == [
        (n + 1, n // 3 + 1, n % 3 + 1) for n in range(count)
    ]
    assert sum(row["of_step"] for row in per_token) == pytest.approx(per_token[-1]["delta_h"], rel=1e-9)
    assert all(row["delta_h_low"] < row["delta_h"] < row["delta_h_high"] for row in per_token)
    assert all(row["delta_j_low"] < row["delta_j"] < row["delta_j_high"] for row in per_token)
    clipped = followed.result.report.table("clipped.parquet").to_pylist()
    assert len(clipped) > 0 and {row["phase_step"] for row in clipped} <= set(range(2, count + 1))
    page = (followed.result.run_directory / "report.md").read_text()
    assert "## The steps on one rollout" in page and "The tokens that are clipped most often" in page


def test_vectors_that_are_let_go_come_again_as_they_were(exact: Probe, followed: Probe):
    first, *_, last = followed.run.artifacts("phase-step")
    assert not any((step.directory / "vectors" / "direction.safetensors").exists() for step in (first, last))
    again = exact.run.store.run(catalogue.PHASE_STEP, exact.run.execution, followed.run.inputs("phase-step"))
    assert again == first


def test_e_is_measured_after_every_step_of_every_intervention():
    phase = PhaseConfig(follow=True, minibatches=4, epochs=2, interventions=["positives_only", "delta=2"])
    assert (phase.steps, phase.followed, PhaseConfig().followed) == (8, 24, 0)


def test_interventions_are_followed_from_the_rollout_on(exact: Probe):
    asked = exact.config.as_given()
    phase = {"follow": True, "minibatches": 3, "epsilon": 0.02}
    tried = [{"epsilon_high": 0.3}, "positives_only", {"lr": 0.5}, {"kl_beta": 0.0}]
    asked["update"] = asked["update"] | {"phase": phase | {"interventions": tried}}
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        found = probe(asked)
    rows = [r for r in found.result.report.table("phase.parquet").to_pylist() if r["normalization"] == "per_token"]
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["intervention"], []).append(row)
    assert list(by_name) == ["as it is", "epsilon_high: 0.3", "positives_only", "lr: 0.5", "kl_beta: 0"]
    of_run = by_name.pop("as it is")
    assert all(row["difference"] is None for row in of_run)
    for of_one in by_name.values():
        for row, other in zip(of_one, of_run, strict=True):
            assert row["difference"] == pytest.approx(row["delta_h"] - other["delta_h"], rel=1e-9, abs=1e-15)
    higher, half = by_name["epsilon_high: 0.3"], by_name["lr: 0.5"]
    assert higher[0]["delta_h"] == of_run[0]["delta_h"] and higher[-1]["clip_high"] < of_run[-1]["clip_high"]
    assert half[0]["step_norm"] == pytest.approx(0.5 * of_run[0]["step_norm"], rel=1e-9)
    page = (found.result.run_directory / "report.md").read_text()
    assert "What would change it, after all 3 steps" in page


@pytest.mark.parametrize("item", ["published", "my.py:weights", "dynamic_sampling", {"delta": 0.5}, {"loss": "sapo"}])
def test_what_cannot_be_followed_is_refused_by_name(item: Any):
    name = item if isinstance(item, str) else next(iter(item))
    with pytest.raises(ValueError, match=name):
        asked_in_phase(item)


def test_each_name_that_is_offered_can_be_asked_for():
    assert {"epsilon_high", "positives_only", "lr", "kl_beta"} <= set(followed_names())
    assert asked_in_phase("epsilon_high=0.28") == asked_in_phase({"epsilon_high": 0.28}) == ("epsilon_high", 0.28)


def test_a_changed_number_of_epochs_goes_on_from_the_last_step(followed: Probe):
    asked = followed.config.as_given()
    asked["update"] = asked["update"] | {"phase": asked["update"]["phase"] | {"epochs": EPOCHS + 1}}
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        longer = probe(asked)
    assert longer.run.was_computed["phase-step"] >= 3
    before = followed.result.report.table("phase.parquet").to_pylist()
    after = longer.result.report.table("phase.parquet").to_pylist()
    assert [row for row in after if row["phase_step"] <= 3 * EPOCHS] == before
