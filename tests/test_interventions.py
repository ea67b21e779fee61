"""Interventions: what each makes of the coefficients of U, and what is said of what it changes."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from entropy_core.config.read import parse_config
from entropy_core.errors import ConfigError
from entropy_core.estimates import interventions as estimates
from entropy_core.isolation.process import Isolation
from entropy_core.losses.interventions import (
    OPTIMIZER,
    SETTINGS,
    WEIGHTS,
    InterventionSpec,
    changed_spec,
    not_applicable,
)
from entropy_core.losses.spec import LossSpec
from entropy_core.losses.token_weights import token_weights
from entropy_core.numerics import interventions, losses, ragged
from entropy_core.numerics.adamw import AdamHyperparameters, AdamState, NextStep
from entropy_core.numerics.altered_optimizer import Altered, kept_on, step_factors
from entropy_core.numerics.block_estimates import Blocks, Error, combined, derivative
from entropy_core.numerics.functional import TokenPair
from entropy_core.numerics.interventions import Known, Term
from entropy_core.numerics.loss_batch import LossBatch, Objective
from entropy_core.pipeline.specs import intervention_specs, loss_spec

PAGE = Path(__file__).parents[1] / "docs" / "interventions.md"


def batch_of(objective: Objective | None = None, reference: bool = False) -> LossBatch:
    """Four prompts with three responses each, of one to five tokens."""
    lengths_N = torch.tensor([3, 1, 4, 2, 5, 2, 1, 3, 2, 4, 1, 2])
    count = int(lengths_N.sum())
    steps_K = torch.arange(1, count + 1, dtype=torch.float64)
    rewards_PG = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0], [1, 1, 0]], dtype=torch.float64)
    return LossBatch.on_policy(
        logprobs_K=-1.0 - steps_K.sin(),
        entropies_K=1.5 + steps_K.cos(),
        offsets_N1=ragged.offsets_from_lengths(lengths_N),
        advantages_PG=rewards_PG - rewards_PG.mean(1, keepdim=True),
        rewards_PG=rewards_PG,
        max_new_tokens=5,
        reference_logprobs_K=-1.2 - (2 * steps_K).sin() if reference else None,
        objective=objective,
    )


def known(batch: LossBatch) -> Known:
    steps_K = torch.arange(len(batch.logprobs_K), dtype=torch.float64)
    return Known(batch, steps_K.cos(), steps_K.sin(), seed=1)


def coefficients(terms, loss=losses.grpo) -> TokenPair:
    return interventions.term_coefficients(loss, terms)


@pytest.mark.parametrize("loss", losses.LOSSES.values(), ids=losses.LOSSES)
@pytest.mark.parametrize("reference", [False, True])
def test_a_factor_of_1_and_the_tokens_own_advantage_change_nothing(loss, reference):
    batch = batch_of(Objective(kl_beta=0.3 if reference else 0.0, entropy_coef=0.2), reference)
    as_it_is = losses.coefficients(loss, batch)
    for terms in (
        interventions.policy_terms(batch, torch.ones_like(batch.logprobs_K)),
        interventions.token_advantages(batch, batch.of_tokens(batch.advantages_N)),
    ):
        for found_K, expected_K in zip(coefficients(terms, loss), as_it_is, strict=True):
            torch.testing.assert_close(found_K, expected_K, rtol=1e-12, atol=1e-14)


def test_a_masked_token_keeps_its_kl_term_and_bonus():
    batch = batch_of(Objective(kl_beta=0.3, entropy_coef=0.2), reference=True)
    found = coefficients(interventions.policy_terms(batch, torch.zeros_like(batch.logprobs_K)))
    without = losses.coefficients(losses.grpo, batch.with_advantages(torch.zeros(4, 3)))
    torch.testing.assert_close(found.logprob_K, without.logprob_K)
    torch.testing.assert_close(found.entropy_K, without.entropy_K)
    assert without.logprob_K.any() and without.entropy_K.any()


def test_what_each_weighting_does_to_the_coefficients():
    batch = batch_of()
    as_it_is = losses.coefficients(losses.grpo, batch).logprob_K
    A_K = batch.of_tokens(batch.advantages_N)
    positives, negatives = (
        coefficients(f(known(batch))).logprob_K for f in (interventions.positives_only, interventions.negatives_only)
    )
    torch.testing.assert_close(positives, torch.where(A_K > 0, as_it_is, 0.0))
    torch.testing.assert_close(positives + negatives, as_it_is)
    w = coefficients(interventions.weighted_positives(known(batch), 0.1)).logprob_K
    torch.testing.assert_close(w, 0.1 * positives + negatives)

    cov_K = (batch.logprobs_K - batch.logprobs_K.mean()) * (A_K - A_K.mean())
    torch.testing.assert_close(interventions.covariances(batch), cov_K)
    dropped_K = coefficients(interventions.drop_top_covariance(known(batch), 0.1)).logprob_K == 0
    assert set(cov_K.topk(3).indices.tolist()) <= set(dropped_K.nonzero().flatten().tolist())
    clipped_K = interventions.clip_cov(known(batch), 2e-4, 0.2, 0.5)[0].weights_K
    assert int((clipped_K == 0).sum()) == 1 and 0.2 < float(cov_K[clipped_K == 0]) < 0.5

    first_K = interventions.drop_costliest(known(batch), 0.1)[0].weights_K
    assert set((first_K == 0).nonzero().flatten().tolist()) == set((-known(batch).share_K).topk(3).indices.tolist())
    random_K = interventions.random(known(batch), 0.5)[0].weights_K
    assert set(random_K.tolist()) == {0.0, 2.0}

    zeta = coefficients(interventions.log_prob_advantage(known(batch), 0.2)).logprob_K
    shape_K = -losses.coefficients(losses.grpo, batch.with_advantages(torch.ones(4, 3))).logprob_K
    torch.testing.assert_close(zeta, as_it_is + 0.2 * shape_K * batch.logprobs_K)
    shaped = coefficients(interventions.entropy_advantage(known(batch), 0.4)).logprob_K
    extra_K = torch.minimum(0.4 * batch.entropies_K, A_K.abs() / 2)
    torch.testing.assert_close(shaped, as_it_is - shape_K * extra_K)

    quantile = interventions.quantile_baseline(known(batch), 0.4)[0].batch.advantages_N.view(4, 3)
    assert quantile[1:3].abs().max() == 0 and (quantile[0] >= 0).all()


def test_prompts_that_are_left_out_are_as_if_never_drawn():
    batch = batch_of()
    for name in ("grpo", "dapo"):
        found = coefficients(interventions.dynamic_sampling(known(batch)), losses.LOSSES[name])
        kept_N = torch.tensor([0, 3]).repeat_interleave(3) == batch.prompts_N.view(-1, 6)[0][:6]
        parts = [torch.arange(0, 3), torch.arange(9, 12)]
        chosen_N = torch.cat(parts)
        pick_K = ragged.token_index(batch.offsets_N1, chosen_N)
        alone = LossBatch.on_policy(
            batch.logprobs_K[pick_K],
            batch.entropies_K[pick_K],
            ragged.offsets_from_lengths(ragged.lengths(batch.offsets_N1)[chosen_N]),
            batch.advantages_N[chosen_N].view(2, 3),
            batch.rewards_N[chosen_N].view(2, 3),
            max_new_tokens=5,
        )
        torch.testing.assert_close(found.logprob_K[pick_K], losses.coefficients(losses.LOSSES[name], alone).logprob_K)
        assert kept_N is not None
    nothing = interventions.pass_rate(known(batch), 2.0, 3.0)
    assert not coefficients(nothing, losses.dapo).logprob_K.any()


def test_the_influence_is_the_derivative_with_respect_to_the_weight_of_a_response():
    batch = batch_of(Objective(entropy_coef=0.1))
    along = TokenPair(*torch.linspace(1, 40, 2 * len(batch.logprobs_K)).double().sin().view(2, -1))
    for make in (interventions.positives_only, lambda k: interventions.random(k, 0.3), interventions.dynamic_sampling):
        terms = make(known(batch))
        found_N = interventions.term_influence(losses.dapo, terms, along)
        for i in (0, 4, 10):
            ends = []
            for sign in (1, -1):
                heavier_N = torch.ones(12, dtype=torch.float64)
                heavier_N[i] += sign * 1e-5
                weighted = tuple(
                    Term(replace(t.batch, weights_N=t.batch.weights_N * heavier_N), t.weights_K) for t in terms
                )
                ends.append(float(coefficients(weighted, losses.dapo).dot(along).sum()))
            assert float(found_N[i]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-9)


def test_factors_of_the_parts_of_a_step():
    state = AdamState(4, torch.tensor([0.3, -0.2]).double(), torch.tensor([0.5, 0.1]).double())
    gradient, parameter = torch.tensor([0.7, 0.4]).double(), torch.tensor([1.0, -2.0]).double()
    group = AdamHyperparameters(0.9, 0.99, 1e-8, 0.1)
    before = NextStep(gradient, parameter, state, group)
    for altered in (Altered(0.5), Altered(weight_decay=0.3), Altered(beta1=0.5), Altered(beta1=0.0)):
        after = NextStep(gradient, parameter, state, altered.of(group))
        factors = step_factors(altered, [(group, 5)])
        found = factors.gradient * before.gradient + factors.momentum * before.momentum + factors.decay * before.decay
        torch.testing.assert_close(found, after.direction, rtol=1e-12, atol=0)
    saturated = before.gradient * kept_on([(group, 5)])
    as_momentum = NextStep(gradient, parameter, state._replace(exp_avg=0 * gradient), group._replace(beta1=0.0))
    torch.testing.assert_close(saturated, as_momentum.gradient)
    assert step_factors(Altered(beta2=0.5), [(group, 5)]) is None
    assert kept_on([(group, 5), (group._replace(beta1=0.5), 5)]) is None


def test_blocks_give_the_mean_and_its_jackknife_error():
    generator = torch.Generator().manual_seed(0)
    along_KB = torch.randn(2, 8, dtype=torch.float64, generator=generator)
    blocks = Blocks(torch.full((8,), 4.0).double(), torch.full((8,), 0.5).double(), torch.full((8,), 10.0).double())
    seq = derivative(along_KB, blocks, "per_sequence")
    assert seq.value == pytest.approx(float(along_KB[0].mean()))
    assert seq.standard_error == pytest.approx(float(along_KB[0].std() / 8**0.5))
    tok = derivative(along_KB, blocks, "per_token")
    per_block_B = (along_KB[0] - 0.5 * along_KB[1]) / 10
    assert tok.value == pytest.approx(float(per_block_B.mean()))
    assert tok.standard_error == pytest.approx(float(per_block_B.std() / 8**0.5))
    assert combined([Error(3.0, 5.0), Error(4.0, 7.0)]).standard_error == pytest.approx(5.0)
    assert combined([Error(3.0, 5.0), Error(0.0, 1.0)]) == Error(3.0, pytest.approx(5.0))


def test_what_a_trainer_averages_over_micro_batches_it_does_under_an_intervention_too():
    asked = [{"entropy_coef": 0.1}, {"top_entropy_quantile": 0.2}, {"loss": "bnpo"}, {"loss": "dapo"}, "positives_only"]
    config = parse_config({"checkpoints": ["x"], "interventions": asked, "update": {"micro_batch": 16}})
    specs = intervention_specs(config)
    assert [spec.micro_batch for spec in specs] == [16, 16, 16, 0, 0]
    run = loss_spec(config)
    assert (run.micro_batch, run.seed) == (0, 0)  # of no effect on the step of the run
    assert [changed_spec(run, spec).micro_batch for spec in specs] == [16, 16, 16, 0, 0]
    assert {changed_spec(run, spec).seed for spec in specs[:3]} == {config.batch_config.U_batch_seed}


def test_what_cannot_be_tried_is_refused_or_said():
    spec = LossSpec(name="grpo", scale_rewards="group", max_new_tokens=8)
    assert "what the run does" in not_applicable(spec, InterventionSpec(name="loss", value="grpo"))
    assert "reference" in not_applicable(spec, InterventionSpec(name="kl_beta", value=0.1))
    for item, reason in (
        ({"entropy_bonus": 0.1}, "there is no intervention 'entropy_bonus'"),
        ({"random": 2.0}, "between 0 and 0.99"),
        ({"loss": "ppo"}, "loss is one of grpo"),
        ({"positives_only": 1}, "has no value"),
        ({"pass_rate": 0.2}, "a list of 2 numbers"),
        ({"lr": True}, "takes a number"),
    ):
        with pytest.raises(ConfigError, match=reason):
            parse_config({"checkpoints": ["x"], "interventions": [item]})


def screened(influence_IP: torch.Tensor) -> estimates.Screened:
    """Two kinds of which the second is 0, so that both normalisations are the first over a length of 1."""
    influence = torch.stack([influence_IP, torch.zeros_like(influence_IP)], 1)
    labels = ["as it is", *(f"i{i}" for i in range(1, len(influence)))]
    product = torch.zeros(len(labels), 2, 2).double()
    ones_I = torch.ones(len(labels)).double()
    halves = [{"sequences": 8, "H_tok": 1.0, "mean_length": 1.0}] * 2
    influence_IKHP = influence.unsqueeze(2).expand(-1, -1, 2, -1)
    return estimates.Screened(
        labels, [False] * len(labels), product, product, ones_I, ones_I, product, influence_IKHP, halves
    )


def predicted(of: estimates.Screened, differences_IB: torch.Tensor) -> estimates.Predicted:
    """The same of the exact steps."""
    ones_B = torch.ones(differences_IB.shape[1]).double()
    along = {
        label: torch.stack([of_one_B, torch.zeros_like(of_one_B)])
        for label, of_one_B in zip(of.labels, differences_IB, strict=True)
    }
    return estimates.Predicted(along, Blocks(ones_B, ones_B, ones_B))


def test_the_page_has_every_intervention_and_its_example_runs(tmp_path):
    page = PAGE.read_text(encoding="utf-8")
    for name in (*SETTINGS, *WEIGHTS, *OPTIMIZER, "random", *SETTINGS["loss"].names):
        assert re.search(rf"`{name}\b", page) or f"`{name}" in page, name
    for function, _ in WEIGHTS.values():
        for paper in re.findall(r"arXiv:[0-9.]+[0-9]", function.__doc__):
            assert paper in page, paper
    blocks = dict(re.findall(r"```(\w+)\n(.*?)```", page, re.DOTALL))
    parse_config({"checkpoints": ["x"], **yaml.safe_load(blocks["yaml"])})
    (tmp_path / "my_idea.py").write_text(blocks["python"])
    found_K = token_weights(f"{tmp_path / 'my_idea.py'}:weights", batch_of(), Isolation())
    assert set(found_K.tolist()) <= {0.5, 1.0}


def test_intervals_and_verdicts():
    generator = torch.Generator().manual_seed(3)
    base_B = torch.full((16,), -1.0).double()
    noise_IB = 0.001 * torch.randn(4, 16, generator=generator, dtype=torch.float64)
    shift_I1 = torch.tensor([[0.0], [0.5], [0.01], [0.2]]).double()
    influence_IP = torch.zeros(4, 20).double()
    influence_IP[3] = torch.linspace(-0.2, 0.2, 20).double()
    found = screened(influence_IP)
    exact = predicted(found, base_B + shift_I1 + noise_IB * (torch.arange(4) > 0).view(-1, 1))
    settings = estimates.Settings(1.0, 0.95, 0.1, 20, fresh=False)
    of_steps = estimates.predict_rows(found, exact, settings, "per_sequence")
    rows = estimates.with_verdicts(of_steps, "as it is", -1.0, settings)
    by_label = {row["intervention"]: row for row in rows}
    assert {name: row["verdict"] for name, row in by_label.items()} == {
        "as it is": "as it is",
        "i1": "acts",
        "i2": "does not act",
        "i3": "cannot tell",
    }
    assert [row["intervention"] for row in rows] == ["i1", "i3", "i2", "as it is"]
    assert by_label["i1"]["p_holm"] == pytest.approx(3 * by_label["i1"]["p_value"])
    for row in rows[:3]:
        assert row["low"] < row["difference"] < row["high"]
    for unknown in (
        estimates.predict_rows(found, exact, settings._replace(fresh=True), "per_sequence"),
        estimates.screen_rows(found, settings, "per_sequence"),  # two halves of E are too few for an error over it
    ):
        said = [row["verdict"] for row in estimates.with_verdicts(unknown, "as it is", -1.0, settings)]
        assert sorted(said) == ["as it is", *["cannot tell"] * 3]
        assert all(row["low"] is None and row["se"] is None for row in unknown)


def test_an_interval_covers_and_a_null_rarely_acts():
    """Differences whose error over E is that of 16 blocks and over U that of 32 prompts, both of known size."""
    generator = torch.Generator().manual_seed(1)
    settings = estimates.Settings(1.0, 0.95, 1e-9, 32, fresh=False)
    replications, inside, acts = 400, 0, 0
    for _ in range(replications):
        prompts_P = torch.randn(32, generator=generator, dtype=torch.float64) / 32
        blocks_B = 0.1 * torch.randn(16, generator=generator, dtype=torch.float64)
        difference_IB = torch.stack([torch.zeros(16).double(), prompts_P.sum() + blocks_B])
        influence_IP = torch.stack([torch.zeros(32).double(), prompts_P])
        found = screened(influence_IP)
        rows = estimates.predict_rows(found, predicted(found, difference_IB), settings, "per_sequence")
        row = next(r for r in estimates.with_verdicts(rows, "as it is", -1.0, settings) if r["intervention"] == "i1")
        inside += row["low"] <= 0 <= row["high"]
        acts += row["verdict"] == "acts"
    assert acts == replications - inside
    assert 0.92 <= inside / replications <= 0.98


def test_the_interaction_is_what_the_halves_of_e_do_not_share():
    generator = torch.Generator().manual_seed(4)
    shared_P, *own_2P = torch.randn(3, 32, generator=generator, dtype=torch.float64) / 32
    halves_2P = torch.stack([shared_P + own_P for own_P in own_2P])
    difference_IB = torch.stack([torch.zeros(16).double(), torch.linspace(-1, 1, 16).double()])
    influence_IKHP = torch.zeros(2, 2, 2, 32).double()
    influence_IKHP[1, 0] = halves_2P
    found = screened(torch.zeros(2, 32).double())._replace(influence_IKHP=influence_IKHP)
    settings = estimates.Settings(0.5, 0.95, 1e-9, 32, fresh=False)
    row = estimates.predict_rows(found, predicted(found, difference_IB), settings, "per_sequence")[1]
    both, covariance = 32 * halves_2P.mean(0).var(), 32 * halves_2P.cov()[0, 1]
    assert row["se_over_u"] ** 2 == pytest.approx(0.25 * float(covariance))
    assert row["se_interaction"] ** 2 == pytest.approx(0.25 * float(both - covariance)) and both > covariance
    error = estimates.Error(row["se_over_e"], 15.0)
    measured = {"as it is": (0.0, 0.0, error), "i1": (0.1, 0.1, error)}
    again = estimates.measure_rows(found, measured, settings, "per_sequence")
    assert again[1]["se_interaction"] == pytest.approx(row["se_interaction"])
