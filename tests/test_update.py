"""The step on U and what every part of U does to the entropy, against torch's own optimizer on the model itself."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import (
    BONUS,
    Probe,
    call_here,
    make_gpt2,
    parts_of,
    probe,
    skip_figures,
    trainer_groups,
    values,
    write_reward,
)
from transformers import AutoModelForCausalLM

from entropy_core.files.sources import content_digest
from entropy_core.losses.files import read_batch
from entropy_core.losses.spec import LossSpec
from entropy_core.numerics import losses
from entropy_core.numerics.advantages import divided_by
from entropy_core.numerics.half_samples import balanced_halves
from entropy_core.numerics.halves import HALVES, KINDS, by_normalization, entropy_and_length, of_all
from entropy_core.numerics.loss_batch import LossBatch, Objective
from entropy_core.pipeline import catalogue
from entropy_core.sequences.files import read_sequences
from entropy_core.store.artifact import Artifact
from entropy_core.store.columns import read_tokens

P, G = 8, 4
KL_BETA = 0.3


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> Probe:
    """The sweep of a policy in which float64 is float64, so that equal means equal; with a policy to stay close to."""
    folder = tmp_path_factory.mktemp("exact")
    (folder / "my_loss.py").write_text(BONUS)
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
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        return probe(asked)


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss of the user's own, whose process takes longer to start than all else here."""
    call_here(monkeypatch)


class Oracle:
    """The trainer's next step: the model as transformers loads it, the loss as it is written, torch's own AdamW."""

    def __init__(self, exact: Probe) -> None:
        self.directory = exact.checkpoints[0].directory
        self.model, self.reference = (
            AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
            for directory in (self.directory, exact.config.update.reference)
        )
        self.shapes = {name: p.shape for name, p in self.model.named_parameters()}
        rewards = exact.run.artifacts("reward-u-batch")[0].table("rewards.parquet")["reward"].to_pylist()
        self.rewards_PG = torch.tensor(rewards, dtype=torch.float64).view(P, G)
        shards = [read_sequences(shard) for shard in exact.run.artifacts("sample-u-batch")]
        responses = [(shard.prompt(i), shard.response(i)) for shard in shards for i in range(len(shard))]
        self.responses_PG = [responses[i : i + G] for i in range(0, len(responses), G)]
        self.tokens_P = torch.tensor([sum(len(r) for _, r in group) for group in self.responses_PG])

    def scored(self, model: Any, prompt: torch.Tensor, response: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each token of the response, and entropy of its step."""
        logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        logp = torch.log_softmax(logits, -1)
        return logp.gather(-1, response[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)

    @cache  # noqa: B019 (one oracle)
    def terms(self, loss: str, kl_beta: float = 0.0) -> torch.Tensor:
        """Gradient of Σ_i (1/Z_i) Σ_k (−A_i ℓ_ik + β kl_ik) over the responses to each prompt; Z is 1 for dapo.

        [P, parameters]; kl is TRL's estimate, written as TRL writes it. `mine` has −0.01·h beside it: see my_loss.py.
        """
        rows = []
        for r, group in zip(self.rewards_PG, self.responses_PG, strict=True):
            total = torch.zeros((), dtype=torch.float64)
            for i, (prompt, response) in enumerate(group):
                (logps, h), (fixed, _) = (
                    self.scored(model, prompt, response) for model in (self.model, self.reference)
                )
                kl = (torch.exp(fixed.detach() - logps) - (fixed.detach() - logps) - 1).sum()
                standardised = (r[i] - r.mean()) / (r.std() + 1e-4)
                advantage, Z = {
                    "grpo": (standardised, len(response)),
                    "mine": (standardised, len(response)),
                    "dapo": (standardised, 1),
                    "dr_grpo": (r[i] - r.mean(), 8),  # max_new_tokens
                    "rloo": (r[i] - (r.sum() - r[i]) / (G - 1), 1),
                    "reinforce": (r[i], 1),
                }[loss]
                bonus = 0.01 * h.sum() if loss == "mine" else 0.0
                total = total + (kl_beta * kl - advantage * logps.sum() - bonus) / Z
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(total, list(self.model.parameters()))]))
        return torch.stack(rows)

    def gradient(self, loss: str, weights_P: torch.Tensor, kl_beta: float = 0.0) -> torch.Tensor:
        """Of the loss in which prompt p counts ω_p times; all 1 for the loss itself."""
        size = weights_P @ self.tokens_P.double() if loss == "dapo" else P * G
        return weights_P @ self.terms(loss, kl_beta) / size

    def step(self, gradient: torch.Tensor, max_norm: float) -> torch.Tensor:
        """(θ_after − θ_before)/lr, all parameters in one vector."""
        model = copy.deepcopy(self.model)
        optimizer = torch.optim.AdamW(trainer_groups(model))
        optimizer.load_state_dict(torch.load(self.directory / "optimizer.pt", weights_only=True))
        parts = gradient.split([shape.numel() for shape in self.shapes.values()])
        for parameter, part in zip(model.parameters(), parts, strict=True):
            parameter.grad = part.view_as(parameter).clone()
        if max_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        optimizer.step()
        after = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        return (after - before) / optimizer.param_groups[0]["lr"]

    def vector(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Tensors by parameter name as such a vector."""
        assert sorted(tensors) == sorted(self.shapes)
        return torch.cat([tensors[name].flatten() for name in self.shapes])


@pytest.fixture(scope="module")
def oracle(exact) -> Oracle:
    return Oracle(exact)


def updated(exact: Probe, *, kl_beta: float = 0.0, **settings: Any) -> Artifact:
    """compute-update with other settings, on the same batches."""
    asked = exact.run.inputs("compute-update") | settings
    name = settings.get("loss", "grpo")
    asked["loss"] = LossSpec(
        name=name,
        source=content_digest(loss_file(exact)) if name == "mine" else "",
        scale_rewards="group" if name == "mine" else divided_by(name, "auto"),
        max_new_tokens=8,
        kl_beta=kl_beta,
    )
    if not kl_beta:
        asked["reference"] = []
    return exact.run.store.run(catalogue.COMPUTE_UPDATE, knowing_the_loss(exact), asked)


def first_order_u(exact: Probe, update: Artifact) -> Artifact:
    inputs = exact.run.inputs("first-order-u") | {"update": update}
    return exact.run.store.run(catalogue.FIRST_ORDER_U, knowing_the_loss(exact), inputs)


def loss_file(exact: Probe) -> Path:
    return Path(exact.config.update.reference).with_name("my_loss.py")


def knowing_the_loss(exact: Probe) -> Any:
    file, execution = loss_file(exact), exact.run.execution
    return replace(execution, paths={**execution.paths, content_digest(file): file})


def gradients(exact: Probe, oracle: Oracle) -> dict[str, torch.Tensor]:
    """∇H of all of E, for both normalisations."""
    artifact = exact.run.artifacts("entropy-gradient")[0]
    halves = artifact.summary["halves"]
    along = []
    for kind in KINDS:
        of_halves = [oracle.vector(artifact.vector(f"{kind}_{half}")) for half in HALVES]
        along.append(of_all(halves, of_halves))
    return by_normalization(along, *entropy_and_length(halves))


@pytest.mark.parametrize(
    ("loss", "kl_beta"),
    [
        ("grpo", 0.0),
        ("dr_grpo", 0.0),
        ("dapo", 0.0),
        ("rloo", 0.0),
        ("reinforce", 0.0),
        ("grpo", KL_BETA),
        ("dapo", 5.0),
        ("mine", 0.0),
        ("mine", KL_BETA),
    ],
)
@pytest.mark.parametrize("clipping", ["off", "inactive", "active"])
def test_v_is_the_step_that_torch_takes(exact, oracle, loss, kl_beta, clipping):
    gradient = oracle.gradient(loss, torch.ones(P, dtype=torch.float64), kl_beta)
    norm = float(gradient.norm())
    max_norm = {"off": 0.0, "inactive": 2 * norm, "active": norm / 3}[clipping]
    update = updated(exact, loss=loss, kl_beta=kl_beta, max_grad_norm=max_norm)

    expected = oracle.step(gradient, max_norm)
    v = oracle.vector(update.vector("direction"))
    assert v.dtype == torch.float64
    assert (v - expected).norm() <= 1e-12 * expected.norm()
    assert (oracle.vector(update.vector("gradient")) - gradient).norm() <= 1e-12 * norm
    parts = {name: oracle.vector(part) for name, part in parts_of(update, exact.run).items()}
    assert torch.equal(parts["direction"], v)
    momentum, decay = parts["momentum"], parts["decay"]
    of_gradient = parts["preconditioner"] * update.summary["clip_factor"] * gradient
    assert (momentum + decay + of_gradient - v).norm() <= 1e-12 * v.norm()
    assert float(of_gradient.norm()) > 0.01 * float(v.norm())  # the gradient matters to this test
    assert update.summary["gradient_norm"] == pytest.approx(norm, rel=1e-12)
    if kl_beta:
        without = oracle.gradient(loss, torch.ones(P, dtype=torch.float64))
        assert (gradient - without).norm() > 0.05 * norm
    if loss == "mine":  # the bonus matters to this test
        without = oracle.gradient("grpo", torch.ones(P, dtype=torch.float64), kl_beta)
        assert (gradient - without).norm() > 1e-4 * norm
    assert update.summary["clip_factor"] == pytest.approx(1 / 3 if clipping == "active" else 1.0, rel=1e-4)


@pytest.mark.parametrize("normalization", ["per_token", "per_sequence"])
@pytest.mark.parametrize(
    ("loss", "kl_beta", "clipping"),
    [
        ("grpo", KL_BETA, "off"),
        ("grpo", 0.0, "active"),
        ("dapo", 0.0, "active"),
        ("dapo", 5.0, "active"),
        ("mine", 0.0, "active"),
    ],
)
def test_the_influence_of_each_prompt(exact, oracle, normalization, loss, kl_beta, clipping):
    """By central differences of torch's step in its weight; the standard error by leaving prompts out one by one."""
    ones_P = torch.ones(P, dtype=torch.float64)
    max_norm = 0.0 if clipping == "off" else float(oracle.gradient(loss, ones_P, kl_beta).norm()) / 3
    update = updated(exact, loss=loss, kl_beta=kl_beta, max_grad_norm=max_norm)
    dH = gradients(exact, oracle)[normalization]
    table = first_order_u(exact, update).table("sequences.parquet")
    influence_P = torch.tensor(table[f"influence_{normalization}"].to_pylist(), dtype=torch.float64).view(P, G).sum(1)

    def derivative(weights_P: torch.Tensor, scale: float = 1.0) -> float:
        return float(dH @ oracle.step(scale * oracle.gradient(loss, weights_P, kl_beta), max_norm))

    eps, unit_PP = 1e-4, torch.eye(P, dtype=torch.float64)
    expected_P = [(derivative(ones_P + eps * e) - derivative(ones_P - eps * e)) / (2 * eps) for e in unit_PP]
    torch.testing.assert_close(influence_P, torch.tensor(expected_P, dtype=torch.float64), rtol=1e-5, atol=1e-9)

    linear = (P / (P - 1) * ((influence_P - influence_P.mean()) ** 2).sum()).sqrt()
    scale = 1.0 if loss == "dapo" else P / (P - 1)  # the loss on the other prompts is their mean
    left_out_P = torch.tensor([derivative(ones_P - e, scale) for e in unit_PP], dtype=torch.float64)
    jackknife = ((P - 1) / P * ((left_out_P - left_out_P.mean()) ** 2).sum()).sqrt()
    assert 0.7 < float(linear / jackknife) < 1.3
    if clipping == "off":  # what the sweep itself was asked for
        row = next(r for r in exact.rows if r["normalization"] == normalization and r["eta"] != 0)
        assert row["clip_factor"] == 1.0
        assert row["se_over_u_linearised"] == pytest.approx(float(linear) * row["eta"], rel=1e-9)


@pytest.mark.parametrize("clipping", ["off", "active"])
@pytest.mark.parametrize(("loss", "kl_beta"), [("grpo", 0.0), ("dapo", 0.0), ("mine", KL_BETA)])
def test_the_steps_on_halves_of_u(exact, oracle, loss, kl_beta, clipping):
    """Each is the step that torch takes on the prompts of the half alone."""
    norm = float(oracle.gradient(loss, torch.ones(P, dtype=torch.float64), kl_beta).norm())
    max_norm = 0.0 if clipping == "off" else norm / 3
    update = updated(exact, loss=loss, kl_beta=kl_beta, max_grad_norm=max_norm)
    inputs = exact.run.inputs("half-steps-u") | {"update": update}
    found = exact.run.store.run(catalogue.HALF_STEPS_U, knowing_the_loss(exact), inputs).table("halves.parquet")
    parts_P = [part_P for first_P in balanced_halves(P) for part_P in (first_P, ~first_P)]
    assert found["prompts"].to_pylist() == [int(part_P.sum()) for part_P in parts_P]
    assert found["split"].to_pylist() == [i // 2 for i in range(len(parts_P))]
    for normalization, dH in gradients(exact, oracle).items():
        expected = []
        for part_P in parts_P:
            scale = 1.0 if loss == "dapo" else P / int(part_P.sum())  # the loss on a half is its own mean
            gradient = scale * oracle.gradient(loss, part_P.double(), kl_beta)
            expected.append(float(dH @ oracle.step(gradient, max_norm)))
        assert found[f"inner_product_{normalization}"].to_pylist() == pytest.approx(expected, rel=1e-9)
    if clipping == "active":
        assert max(found["clip_factor"].to_pylist()) < 1


@pytest.mark.parametrize(("loss", "kl_beta"), [("grpo", 0.0), ("dapo", 0.0), ("grpo", KL_BETA), ("mine", KL_BETA)])
def test_the_shares_of_the_tokens_add_up(exact, oracle, loss, kl_beta):
    """With the denominators as they are, the step is a sum over U's tokens, the momentum and the decay."""
    norm = float(oracle.gradient(loss, torch.ones(P, dtype=torch.float64), kl_beta).norm())
    update = updated(exact, loss=loss, kl_beta=kl_beta, max_grad_norm=norm / 3)
    shares = first_order_u(exact, update)
    tokens, of_sequences = (shares.table(f"{name}.parquet") for name in ("tokens", "sequences"))
    preconditioner = update.summary["clip_factor"] * oracle.vector(parts_of(update, exact.run)["preconditioner"])
    size = float(oracle.tokens_P.sum()) if loss == "dapo" else P * G
    for normalization in ("per_token", "per_sequence"):
        dH = gradients(exact, oracle)[normalization]
        column = f"share_{normalization}"
        share_PG = torch.tensor(of_sequences[column].to_pylist(), dtype=torch.float64).view(P, G)
        expected_P = oracle.terms(loss, kl_beta) / size @ (preconditioner * dH)
        torch.testing.assert_close(share_PG.sum(1), expected_P, rtol=1e-8, atol=1e-14)
        share_K = torch.tensor(tokens[column].to_pylist(), dtype=torch.float64)
        owner_K = torch.tensor(tokens["sequence_id"].to_pylist())
        by_owner_N = torch.zeros(P * G, dtype=torch.float64).index_add_(0, owner_K, share_K)
        torch.testing.assert_close(by_owner_N.view(P, G), share_PG, rtol=1e-10, atol=1e-14)
        parts = [shares.summary[name][normalization] for name in ("momentum", "decay")]
        whole = float(dH @ oracle.vector(update.vector("direction")))
        assert float(share_K.sum()) + sum(parts) == pytest.approx(whole, rel=1e-8)
        assert shares.summary["closure"][normalization] <= 1e-8
    assert tokens.num_rows == int(oracle.tokens_P.sum())
    assert all(row["attribution_closure"] <= 1e-8 for row in exact.rows)


@pytest.fixture(scope="module")
def weighed(exact, oracle) -> tuple[Artifact, Artifact]:
    """A clipped step with an entropy bonus, and its first-order-u."""
    norm = float(oracle.gradient("mine", torch.ones(P, dtype=torch.float64), KL_BETA).norm())
    update = updated(exact, loss="mine", kl_beta=KL_BETA, max_grad_norm=norm / 3)
    return update, first_order_u(exact, update)


def column(artifact: Artifact, name: str, table: str = "tokens") -> torch.Tensor:
    return torch.tensor(artifact.table(f"{table}.parquet")[name].to_pylist(), dtype=torch.float64)


def clipped_preconditioner(exact: Probe, update: Artifact) -> dict[str, torch.Tensor]:
    """P, times the clip factor: what the gradient of the loss is multiplied by."""
    diagonal = parts_of(update, exact.run)["preconditioner"]
    return {name: update.summary["clip_factor"] * values for name, values in diagonal.items()}


@pytest.mark.parametrize("normalization", ["per_token", "per_sequence"])
def test_every_token_has_its_sensitivities(exact, oracle, weighed, normalization):
    """⟨P∘∇H, ∇ℓ_k⟩ and ⟨P∘∇H, ∇h_k⟩ by a backward pass for each; a share is their product with the coefficients."""
    update, of_u = weighed
    w = oracle.vector(clipped_preconditioner(exact, update)) * gradients(exact, oracle)[normalization]
    expected: tuple[list[float], list[float]] = ([], [])
    for group in oracle.responses_PG:
        for prompt, response in group:
            for values_K, of in zip(oracle.scored(oracle.model, prompt, response), expected, strict=True):
                for value in values_K:
                    found = torch.autograd.grad(value, list(oracle.model.parameters()), retain_graph=True)
                    of.append(float(torch.cat([g.flatten() for g in found]) @ w))
    share_K = torch.zeros(len(expected[0]), dtype=torch.float64)
    for prefix, of in zip(("", "entropy_"), expected, strict=True):
        found_K = column(of_u, f"{prefix}sensitivity_{normalization}")
        expected_K = torch.tensor(of, dtype=torch.float64)
        torch.testing.assert_close(found_K, expected_K, rtol=1e-8, atol=1e-10 * float(expected_K.abs().max()))
        share_K += column(of_u, f"{prefix}coefficient") * found_K
    torch.testing.assert_close(share_K, column(of_u, f"share_{normalization}"), rtol=1e-9, atol=1e-14)


def test_a_token_without_an_advantage_has_sensitivities_too(exact):
    of_u = first_order_u(exact, updated(exact, loss="reinforce"))
    nothing_K = column(of_u, "advantage") == 0
    assert 0 < int(nothing_K.sum()) < len(nothing_K)
    for normalization in ("per_token", "per_sequence"):
        assert not column(of_u, f"share_{normalization}")[nothing_K].any()
        assert column(of_u, f"sensitivity_{normalization}")[nothing_K].all()


def batch_of(update: Artifact, of_u: Artifact) -> LossBatch:
    batch, _ = read_batch(update, read_tokens([of_u], file="sensitivities.safetensors"))
    return batch


def test_another_weighting_of_the_tokens_is_a_dot_product(exact, oracle, weighed):
    """What DAPO's gradient would do through the same preconditioner, without a pass over the model."""
    update, of_u = weighed
    other = losses.coefficients(losses.dapo, replace(batch_of(update, of_u), objective=Objective()))
    preconditioner = oracle.vector(clipped_preconditioner(exact, update))
    gradient = oracle.gradient("dapo", torch.ones(P, dtype=torch.float64))
    for normalization, dH in gradients(exact, oracle).items():
        found = float((other.logprob_K * column(of_u, f"sensitivity_{normalization}")).sum())
        assert found == pytest.approx(float((preconditioner * dH) @ gradient), rel=1e-8)


def test_the_influences_can_be_made_from_the_sensitivities_again(weighed):
    """From the raw ones, through the whole step, of each half."""
    update, of_u = weighed
    raw = of_u.tensors("sensitivities.safetensors")

    def mine(batch: LossBatch) -> torch.Tensor:
        return losses.grpo(batch) - 0.01 * batch.mean(batch.sequence_sum(batch.entropies_K) / batch.lengths_N)

    for half in HALVES:
        pair = losses.TokenPair(*(raw[f"pulled_back/entropy/{half}/{of}"] for of in ("logprob", "entropy")))
        found_N = losses.influence(mine, batch_of(update, of_u), pair)
        expected_N = column(of_u, f"influence_per_sequence_half_{half}", "sequences")
        torch.testing.assert_close(found_N, expected_N, rtol=1e-9, atol=1e-14)
    halves = [f"pulled_back/{kind}/{half}" for kind in KINDS for half in HALVES]
    parts = halves + [f"preconditioned/{kind}" for kind in KINDS]
    names = {f"{part}/{of}" for part in parts for of in ("logprob", "entropy")}
    assert set(raw) == names | {"sequences", "offsets"}
    assert {len(raw[name]) for name in names} == {len(column(of_u, "position"))}


def test_the_gradient_of_all_of_e_is_that_of_its_halves(exact, oracle):
    """Against autograd on the model: E's own surrogate, with the leave-one-out baseline written as loops."""
    shards = [read_sequences(shard) for shard in exact.run.artifacts("sample-e-batch")]
    pairs = [(shard.prompt(i), shard.response(i)) for shard in shards for i in range(len(shard))]
    N = len(pairs)
    logps, entropies = [], []
    for prompt, response in pairs:
        logits = oracle.model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        logp = torch.log_softmax(logits, -1)
        logps.append(logp.gather(-1, response[:, None]).squeeze(-1))
        entropies.append(-(logp.exp() * logp).sum(-1))
    to_come = [h.detach().sum() - h.detach().cumsum(0) for h in entropies]
    S, T = sum(h.detach().sum() for h in entropies), sum(map(len, entropies))
    along_entropy, along_length = [], []
    for i in range(N):
        for k in range(len(logps[i])):
            others = [j for j in range(N) if j != i and k < len(logps[j])]
            mean_R = sum(to_come[j][k] for j in others) / max(len(others), 1)
            mean_T = sum(len(logps[j]) - k - 1 for j in others) / max(len(others), 1)
            along_entropy.append(entropies[i][k] + (to_come[i][k] - mean_R) * logps[i][k])
            along_length.append((len(logps[i]) - k - 1 - mean_T) * logps[i][k])
    parameters = list(oracle.model.parameters())
    of_entropy, of_length = (
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(torch.stack(terms).sum() / N, parameters, retain_graph=True)]
        )
        for terms in (along_entropy, along_length)
    )
    found = gradients(exact, oracle)
    L = T / N
    for normalization, expected in (("per_sequence", of_entropy), ("per_token", (of_entropy - S / T * of_length) / L)):
        assert (found[normalization] - expected).norm() <= 1e-10 * expected.norm()


def test_each_half_has_its_own_influences(exact):
    """Along the ∇H of every other sequence, of which the whole is the mean where ∇H is linear in the sequences."""
    artifact = exact.run.artifacts("first-order-u")[0]
    halves = exact.run.artifacts("entropy-gradient")[0].summary["halves"]
    assert [half["sequences"] for half in halves] == [8, 8]
    table = artifact.table("sequences.parquet")
    whole, *parts = (
        torch.tensor(table[f"influence_per_sequence{suffix}"].to_pylist(), dtype=torch.float64)
        for suffix in ("", "_half_0", "_half_1")
    )
    torch.testing.assert_close(sum(parts) / 2, whole, rtol=1e-10, atol=1e-14)
    assert (parts[0] - parts[1]).norm() > 0.1 * whole.norm()
    for row in exact.rows:
        assert row["se_interaction"] <= row["se_over_u"]
