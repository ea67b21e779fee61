"""Every loss of TRL, by TRL's own code: its gradient in each token's ℓ and h, under every setting that changes it."""

from collections import defaultdict
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from entropy_core.numerics import losses, ragged
from entropy_core.numerics.advantages import group_advantages
from entropy_core.numerics.clipping import OffPolicy
from entropy_core.numerics.loss_batch import LossBatch, Objective

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
rloo_trainer = pytest.importorskip("trl.trainer.rloo_trainer")

P, G, LONGEST = 4, 4, 6
N, KL_BETA = P * G, 0.3
OURS = {"sapo": "grpo", "vespo": "dapo"}
"""Losses whose gradient on-policy is that of another."""


def batch_of(name: str, objective: Objective, micro_batches: int, truncated: bool) -> LossBatch:
    generator = torch.Generator().manual_seed(3)
    lengths_N = torch.randint(1, LONGEST + 1, (N,), generator=generator)
    rewards_PG = torch.randn(P, G, generator=generator, dtype=torch.float64)
    noise_3K = torch.randn(3, int(lengths_N.sum()), generator=generator, dtype=torch.float64)
    cut_N = torch.arange(N) % 3 == 0 if truncated else torch.zeros(N, dtype=torch.bool)
    return LossBatch.on_policy(
        -noise_3K[0].abs(),
        noise_3K[1].abs(),
        ragged.offsets_from_lengths(lengths_N),
        group_advantages(rewards_PG, name),
        rewards_PG,
        max_new_tokens=LONGEST,
        reference_logprobs_K=-noise_3K[2].abs() if objective.kl_beta else None,
        mask_K=torch.repeat_interleave(~cut_N, lengths_N).double(),
        micro_batches_N=torch.arange(N) * micro_batches // N,
        objective=objective,
    )


class Accelerator:
    """Of one process."""

    num_processes, sync_gradients = 1, True

    def gather(self, x: Tensor) -> Tensor:
        return x

    gather_for_metrics = gather

    def pad_across_processes(self, x: Tensor, **_: Any) -> Tensor:
        return x

    def reduce(self, x: Tensor, **_: Any) -> Tensor:
        return x


def padded(values_K: Tensor, batch: LossBatch) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(values_K.split(ragged.lengths(batch.offsets_N1).tolist()), batch_first=True)


def by_trl(
    trainer: type, loss_type: str, batch: LossBatch, delta: float | None = None, metrics: Any = None
) -> tuple[Tensor, Tensor]:
    """∂L/∂ℓ and ∂L/∂h of the tokens of all micro-batches, [N, L], from the trainer's own `_compute_loss`."""
    objective = batch.objective
    ends = [padded(x_K, batch).clone().requires_grad_() for x_K in (batch.logprobs_K, batch.entropies_K)]
    mask_NL, old_NL = padded(batch.mask_K, batch), padded(batch.old_logprobs_K, batch)
    micro_batches = int(batch.micro_batches_N.max()) + 1
    epsilon_high = 0.2 if objective.epsilon_high is None else objective.epsilon_high
    off_policy, minibatches = objective.off_policy, 1 if batch.rollout_length is None else 3
    epsilon, threshold = 0.2, None
    if off_policy:
        epsilon, threshold = off_policy.epsilon, off_policy.off_policy_mask_threshold
        epsilon_high = epsilon_high if loss_type == "cispo" else off_policy.epsilon_high
    args = SimpleNamespace(
        use_bias_correction_kl=objective.kl_correction,
        delta=off_policy.delta if off_policy else delta,
        steps_per_generation=micro_batches * minibatches,
        **{"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05},
        **{"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0},
    )
    self = SimpleNamespace(
        accelerator=Accelerator(),
        args=args,
        loss_type=loss_type,
        beta=objective.kl_beta,
        **{"epsilon_low": epsilon, "epsilon_high": epsilon_high, "off_policy_mask_threshold": threshold},
        **{"use_vllm": False, "aux_loss_enabled": False, "use_adaptive_entropy": False},
        importance_sampling_level=objective.importance_sampling_level,
        top_entropy_quantile=objective.top_entropy_quantile,
        entropy_coef=objective.entropy_coef,
        _entropy_bonus_enabled=objective.entropy_coef != 0.0,
        max_completion_length=LONGEST,
        current_gradient_accumulation_steps=micro_batches,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list) if metrics is None else metrics},
    )
    for name in ("get_high_entropy_mask", "get_gamma_weights"):
        if hasattr(trainer, name):
            setattr(self, name, getattr(trainer, name).__get__(self))
    for name in ("get_gamma_weights", "get_off_policy_mask"):  # static methods
        if hasattr(trainer, name):
            setattr(self, name, getattr(trainer, name))
    total = torch.zeros(())
    for micro_batch in range(micro_batches):
        rows_M = (batch.micro_batches_N == micro_batch).nonzero().squeeze(1)
        of_rows = [x_NL[rows_M] for x_NL in ends]
        self._get_per_token_logps_and_entropies = lambda *_, found=of_rows, **__: (*found, None)
        inputs = {
            "prompt_ids": torch.ones(len(rows_M), 1, dtype=torch.int64),
            "prompt_mask": torch.ones(len(rows_M), 1, dtype=torch.int64),
            "completion_ids": torch.ones(len(rows_M), mask_NL.shape[1], dtype=torch.int64),
            "completion_mask": mask_NL[rows_M].long(),
            "advantages": batch.advantages_N[rows_M],
            "num_items_in_batch": batch.mask_K.sum()
            if batch.rollout_length is None
            else torch.tensor(batch.rollout_length * batch.responses * minibatches),
            "old_logps": (old_NL * mask_NL)[rows_M].sum(1),
        }
        if off_policy:
            inputs["old_per_token_logps"] = old_NL[rows_M]
        if batch.reference_logprobs_K is not None:
            inputs["ref_per_token_logps"] = padded(batch.reference_logprobs_K, batch)[rows_M]
        value = trainer._compute_loss(self, None, inputs)
        total = total + (value if trainer is grpo_trainer.GRPOTrainer else value / micro_batches)
    return torch.autograd.grad(total, ends, materialize_grads=True)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "KL": {"kl_beta": KL_BETA},
    "KL with the correction": {"kl_beta": KL_BETA, "kl_correction": True},
    "of sequences": {"importance_sampling_level": "sequence"},
    "of sequences, KL with the correction": {
        "importance_sampling_level": "sequence",
        "kl_beta": KL_BETA,
        "kl_correction": True,
    },
    "high entropies": {"top_entropy_quantile": 0.3},
    "high entropies, KL": {"top_entropy_quantile": 0.3, "kl_beta": KL_BETA},
    "bonus": {"entropy_coef": 0.1},
    "bonus of high entropies": {"entropy_coef": 0.1, "top_entropy_quantile": 0.4},
    "a low cap": {"epsilon_high": 0.28},
}
TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")


@pytest.mark.parametrize(
    ("loss_type", "setting"),
    [(t, s) for t, s in product(TYPES, SETTINGS) if t != "vespo" or "sequences" not in s],  # which TRL refuses
)
def test_the_gradient_is_that_of_trl(loss_type: str, setting: str):
    for micro_batches, truncated in product((1, 4), (False, True)):
        name = OURS.get(loss_type, loss_type)
        objective = Objective(**({"epsilon_high": 5.0} if loss_type == "cispo" else {}) | SETTINGS[setting])
        batch = batch_of(name, objective, micro_batches, truncated)
        found = losses.coefficients(losses.LOSSES[name], batch)
        expected = by_trl(grpo_trainer.GRPOTrainer, loss_type, batch)
        for ours_K, theirs_NL in zip(found, expected, strict=True):
            torch.testing.assert_close(padded(ours_K, batch), theirs_NL, rtol=1e-10, atol=1e-14)
        assert found.logprob_K.abs().max() > 1e-3


def test_the_settings_change_the_gradient():
    """Each of them, for the losses that it can change."""
    plain = losses.coefficients(losses.LOSSES["grpo"], batch_of("grpo", Objective(), 1, False))
    for setting, values in SETTINGS.items():
        found = losses.coefficients(losses.LOSSES["grpo"], batch_of("grpo", Objective(**values), 1, False))
        same = torch.equal(found.logprob_K, plain.logprob_K) and torch.equal(found.entropy_K, plain.entropy_K)
        assert same is (setting in ("plain", "a low cap")) or setting == "of sequences"  # which is equal on-policy


def test_rloo_is_that_of_trl():
    for micro_batches, truncated in product((1, 4), (False, True)):
        batch = batch_of("rloo", Objective(), micro_batches, truncated)
        found = losses.coefficients(losses.rloo, batch)
        expected_NL, _ = by_trl(rloo_trainer.RLOOTrainer, "", batch)
        torch.testing.assert_close(padded(found.logprob_K, batch), expected_NL, rtol=1e-10, atol=1e-14)


def test_every_loss_type_is_in_the_table():
    """TRL raises for one that it does not know, and this test for one that it has and the table has not."""
    import inspect
    import re

    source = inspect.getsource(grpo_trainer.GRPOTrainer._compute_loss)
    named = set(re.findall(r'"(\w+)"', " ".join(re.findall(r"loss_type (?:==|in) (\[.*?\]|\"\w+\")", source))))
    assert named == set(TYPES)


RULES = {
    "clipped": OffPolicy(0.2, 0.2),
    "clip-higher": OffPolicy(0.1, 0.28),
    "dual clip": OffPolicy(0.2, 0.2, delta=1.5),
    "a dual clip below the upper bound": OffPolicy(0.2, 0.5, delta=1.3),
    "masked": OffPolicy(0.2, 0.2, off_policy_mask_threshold=0.02),
}


def off_policy_batch(name: str, objective: Objective, micro_batches: int, truncated: bool) -> LossBatch:
    """One minibatch of three, whose policy has moved away from that of the rollout."""
    batch = batch_of(name, objective, micro_batches, truncated)
    generator = torch.Generator().manual_seed(5)
    moved_K = 0.3 * torch.randn(len(batch.logprobs_K), generator=generator, dtype=torch.float64)
    return replace(batch, old_logprobs_K=batch.logprobs_K - moved_K, rollout_length=2.75)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("loss_type", [t for t in TYPES if t not in OURS] + ["rloo"])
def test_the_gradient_off_policy_is_that_of_trl(loss_type: str, rule: str):
    settings = [s for s in SETTINGS if s != "a low cap"] if loss_type != "rloo" else ["plain"]
    of_rloo = loss_type == "rloo"
    trainer = rloo_trainer.RLOOTrainer if of_rloo else grpo_trainer.GRPOTrainer
    off_policy = OffPolicy(RULES[rule].epsilon, RULES[rule].epsilon_high) if of_rloo else RULES[rule]
    for setting, (micro_batches, truncated) in product(settings, ((1, False), (4, True))):
        own = {"epsilon_high": 1.1} if loss_type == "cispo" else {}
        objective = Objective(**own | SETTINGS[setting], off_policy=off_policy)
        batch = off_policy_batch(loss_type, objective, micro_batches, truncated)
        found = losses.coefficients(losses.LOSSES[loss_type], batch)
        expected = by_trl(trainer, loss_type, batch)
        for ours_K, theirs_NL in zip(found, expected, strict=True):
            torch.testing.assert_close(padded(ours_K, batch), theirs_NL, rtol=1e-10, atol=1e-14)
        unclipped = losses.coefficients(
            losses.LOSSES[loss_type], replace(batch, objective=replace(objective, off_policy=None))
        )
        if setting == "plain" and loss_type != "cispo":  # whose cap is there on-policy, too
            known = losses.clipped_tokens(loss_type, batch)
            assert known is not None and known.any.any() and not found.logprob_K[known.any].any()
            assert not torch.equal(found.logprob_K, unclipped.logprob_K)


def test_what_is_clipped_is_what_trl_counts():
    for rule in ("clipped", "clip-higher"):
        batch = off_policy_batch("grpo", Objective(off_policy=RULES[rule]), 1, False)
        known = losses.clipped_tokens("grpo", batch)
        assert known is not None
        logged = defaultdict(list)
        by_trl(grpo_trainer.GRPOTrainer, "grpo", batch, metrics=logged)
        of_each = [logged[f"clip_ratio/{side}_mean"] for side in ("low", "high", "region")]
        shares = [float(mask_K.double().mean()) for mask_K in (known.low, known.high, known.any)]
        assert [share for (share,) in of_each] == pytest.approx(shares) and min(shares) > 0


@pytest.mark.parametrize("name", losses.LOSSES)
def test_a_rule_changes_no_bit_on_policy(name: str):
    for rule in RULES.values():
        objective = Objective(kl_beta=KL_BETA, epsilon_high=5.0)
        batch = batch_of(name, objective, 4, True)
        plain = losses.coefficients(losses.LOSSES[name], batch)
        found = losses.coefficients(losses.LOSSES[name], replace(batch, objective=replace(objective, off_policy=rule)))
        assert torch.equal(found.logprob_K, plain.logprob_K)


@pytest.mark.parametrize("delta", [None, 2.0])
def test_two_sided_clipping_above_one_does_nothing(delta: float | None):
    batch = batch_of("grpo", Objective(), 1, False)
    found = losses.coefficients(losses.grpo, batch)
    expected_NL, _ = by_trl(grpo_trainer.GRPOTrainer, "grpo", batch, delta)
    torch.testing.assert_close(padded(found.logprob_K, batch), expected_NL, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", [name for name in losses.LOSSES if name not in ("rloo", "reinforce")])
def test_influence_is_the_slope_in_the_weight_under_every_setting(name: str, setting: str):
    batch = batch_of(name, Objective(**SETTINGS[setting]), 4, truncated=True)
    generator, step = torch.Generator().manual_seed(4), 1e-5
    along = losses.TokenPair(*torch.randn(2, len(batch.logprobs_K), generator=generator, dtype=torch.float64))
    found_N = losses.influence(losses.LOSSES[name], batch, along)

    def derivative(weights_N: Tensor) -> float:
        return losses.coefficients(losses.LOSSES[name], replace(batch, weights_N=weights_N)).dot(along).sum().item()

    for i, unit_N in enumerate(step * torch.eye(N, dtype=torch.float64)):
        slope = (derivative(1 + unit_N) - derivative(1 - unit_N)) / (2 * step)
        assert found_N[i].item() == pytest.approx(slope, rel=1e-6, abs=1e-9)
