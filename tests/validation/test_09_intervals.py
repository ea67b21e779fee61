"""The three intervals of δH₁ and of ΔH, and the verdicts, as the rows of a sweep have them: how often they are right.

E and U are drawn anew in each replication. The step is that of AdamW with the setting's moments and clipping, ΔH is
measured at θ + ηv, and the exact ΔH of every step is a sum over all responses.
"""

from typing import Any, NamedTuple

import pytest
import torch
from conftest import World, gpt2, policy_of
from enumeration import Everything, enumerate_world, evaluation_batch, processor_of, token_gradients
from proofs import Proof, percent
from test_02_coverage import G, Trainer, halves_of_gradient
from torch import Tensor

from entropy_core.estimates import rows
from entropy_core.estimates.evaluation import EvaluationBatch
from entropy_core.estimates.measurement import Measured, Moved, MovedTokens, measured
from entropy_core.numerics import adamw, ragged
from entropy_core.numerics.adamw import AdamHyperparameters, AdamState
from entropy_core.numerics.half_samples import balanced_halves, half_steps
from entropy_core.numerics.halves import by_normalization, entropy_and_length, of_all
from entropy_core.numerics.token_statistics import TokenDerivatives
from entropy_core.numerics.weights import prefix_weights
from entropy_core.policy import moves

pytestmark = pytest.mark.validate

LEVEL, SEQUENCES = 0.95, 300
UPDATES = ("this_update", "mean_update", "next_update")


class Setting(NamedTuple):
    """Of the update, and how far the policy is moved along it."""

    label: str
    prompts: int = 64
    steps: int = 10_000
    beta2: float = 0.999
    clipped_to: float = 0.0  # of the mean norm of the gradient
    sparse: bool = False  # a reward that few responses get
    eta: float = 1e-4
    limited: bool = True  # whether the proof demands that the intervals cover


SETTINGS = (
    Setting("64 prompts"),
    Setting("64 prompts, 5 × η", eta=5e-4),
    Setting("64 prompts, 20 × η", eta=2e-3),
    Setting("16 prompts", prompts=16),
    Setting("8 prompts", prompts=8),
    Setting("clipped to its mean norm", clipped_to=1.0),
    Setting("clipped to half of it", clipped_to=0.5),
    Setting("16 prompts, clipped", prompts=16, clipped_to=0.5),
    Setting("step 11", steps=10),
    Setting("step 2", steps=1),
    Setting("no moments", steps=0),
    Setting("β₂ = 0.9", beta2=0.9, limited=False),
    Setting("rare reward", sparse=True),
    Setting("rare reward, clipped", sparse=True, clipped_to=0.5),
)


class Replication(NamedTuple):
    """A row of a sweep, and the exact change along its step: to first order, and at θ + ηv."""

    row: dict[str, Any]
    first_order: float
    change: float


class Sweeps:
    """Draws E and U, and makes a row of each pair as the stages do."""

    def __init__(self, everything: Everything, trainer: Trainer, setting: Setting, dH: Tensor) -> None:
        self.everything, self.trainer, self.setting, self.dH = everything, trainer, setting, dH
        norms = [float(self.prompt_gradients()[1].mean(0).norm()) for _ in range(100)]
        self.max_norm = setting.clipped_to * sum(norms) / len(norms)
        self.state = self._state()
        self.H, _ = self._exact(torch.zeros_like(dH), 0.0)

    def prompt_gradients(self) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """A drawn U, and the gradient of the loss on each of its prompts alone, [P, Q]."""
        drawn = self.trainer.draw(self.setting.prompts)
        coefficients_N, u_N = drawn
        terms_NQ = coefficients_N[:, None] * self.trainer.score_RQ[u_N]
        return drawn, self.setting.prompts * terms_NQ.view(self.setting.prompts, G, -1).sum(1)

    def _state(self) -> AdamState:
        """Moments after as many clipped steps at the same θ; beyond 100, what 100 tell of them."""
        beta2, steps = self.setting.beta2, self.setting.steps
        first, second = torch.zeros(2, len(self.dH), dtype=torch.float64)
        taken = min(steps, 100)
        for _ in range(taken):
            g = self.prompt_gradients()[1].mean(0)
            g = adamw.clip_factor(float(g.norm()), self.max_norm) * g
            first, second = 0.9 * first + 0.1 * g, beta2 * second + (1 - beta2) * g**2
        if steps > taken:
            second *= (1 - beta2**steps) / (1 - beta2**taken)
        return AdamState(steps, first, second)

    def step(self, g: Tensor) -> adamw.NextStep:
        clipped = adamw.clip_factor(float(g.norm()), self.max_norm) * g
        return adamw.NextStep(clipped, 0 * g, self.state, AdamHyperparameters(0.9, self.setting.beta2, 1e-8, 0.0))

    def _exact(self, v: Tensor, eta: float) -> tuple[float, MovedTokens]:
        """The entropy per token at θ + ηv, and ℓ and h of every response there."""
        everything, policy = self.everything, self.everything.world.policy
        shapes = {name: p.shape for name, p in policy.named_parameters().items()}
        parts = v.split([shape.numel() for shape in shapes.values()])
        direction = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        with moves.moved(policy, direction, eta):
            moved, _ = processor_of(everything.world).score(everything.sequences)
        weights = prefix_weights(everything.tokens.logprobs_K, moved.logprobs_K, everything.offsets_N1)
        law_N = everything.probability_N * weights.sequence_N
        S_N = ragged.sequence_sum(moved.entropies_K, everything.offsets_N1)
        entropy = float(law_N @ S_N / (law_N @ everything.sequences.lengths_N.double()))
        return entropy, MovedTokens(moved.logprobs_K, moved.entropies_K)

    def replicate(self) -> Replication:
        setting, everything, P = self.setting, self.everything, self.setting.prompts
        (coefficients_N, u_N), g_PQ = self.prompt_gradients()
        g = g_PQ.mean(0)
        parts = self.step(g)
        v = parts.direction

        e_N = torch.multinomial(everything.probability_N, SEQUENCES, replacement=True, generator=self.trainer.generator)
        pick_K, offsets_N1 = everything.tokens_of(e_N)
        along_v = TokenDerivatives(*everything.tokens[:2], *(g_KQ @ v for g_KQ in self.trainer.gradients))
        batch = evaluation_batch(TokenDerivatives(*(x_K[pick_K] for x_K in along_v)), offsets_N1, "time_loo")

        halves, along = halves_of_gradient(self.trainer, e_N)
        whole = by_normalization([of_all(halves, g_2Q) for g_2Q in along], *entropy_and_length(halves))["per_token"]
        of_halves = [
            by_normalization([x_2Q[i] for x_2Q in along], half["H_tok"], half["mean_length"])["per_token"]
            for i, half in enumerate(halves)
        ]

        def influence_PG(covector: Tensor) -> Tensor:
            w = adamw.pull_back({"all": covector}, {"all": parts.jacobian}, {"all": g}, self.max_norm)["all"]
            return (coefficients_N * (self.trainer.score_RQ @ w)[u_N]).view(P, G)

        first_RP = balanced_halves(P)
        values_R2 = torch.tensor(
            [[float(whole @ self.step(g_PQ[p].mean(0)).direction) for p in (row_P, ~row_P)] for row_P in first_RP]
        ).double()
        prompts_R2 = torch.stack([first_RP.sum(1), (~first_RP).sum(1)], 1)
        contributions = rows.Contributions(
            influence_PG(whole),
            torch.stack([influence_PG(half) for half in of_halves]),
            half_steps(float(whole @ v), values_R2, prompts_R2, fresh=setting.steps == 0),
            int((g_PQ.abs().sum(1) > 0).sum()),
        )
        derivative = rows.derivative_of(batch, "per_token", contributions)
        return self.row(batch, derivative, v, pick_K)

    def measured(self, batch: EvaluationBatch, v: Tensor, eta: float, pick_K: Tensor) -> tuple[float, Measured]:
        """The entropy at θ + ηv, and the terms of ΔH on E."""
        moved_H, tokens = self._exact(v, eta)
        of_e = MovedTokens(*(x_K[pick_K] for x_K in tokens[:2] if x_K is not None))
        return moved_H, measured(batch, Moved(eta, lambda: [of_e]), "per_decision")

    def row(self, batch: EvaluationBatch, derivative: rows.Derivative, v: Tensor, pick_K: Tensor) -> Replication:
        eta = self.setting.eta
        moved_H, terms = self.measured(batch, v, eta, pick_K)
        change = rows.change_of(batch, terms, eta, "per_decision", "per_token")
        row = rows.predict(derivative, eta, LEVEL)
        row |= rows.measure(batch, change, terms, derivative, eta, "per_decision", 0.0, LEVEL)
        return Replication(row, eta * float(self.dH @ v), moved_H - self.H)


def trainer_of(everything: Everything, gradients: Any, sparse: bool) -> Trainer:
    trainer = Trainer(everything, gradients)
    if sparse:  # a reward of 1 for an eighth of the responses
        law_R, chosen = everything.probability_N, torch.zeros(len(everything.probability_N), dtype=torch.float64)
        for i in torch.randperm(len(law_R), generator=trainer.generator).tolist():
            if float(law_R @ chosen) < 0.12 and law_R[i] < 0.08:
                chosen[i] = 1.0
        trainer.reward_R = chosen
    return trainer


def coverage(found: list[Replication]) -> dict[str, list[float]]:
    """Whether each interval that is given holds what it is for, by column."""
    mean = {name: sum(getattr(one, name) for one in found) / len(found) for name in ("first_order", "change")}
    held: dict[str, list[float]] = {}
    for this, following in zip(found, [*found[1:], found[0]], strict=True):  # the next U is that of another draw
        for prefix, name in (("", "first_order"), ("delta_h_", "change")):
            targets = (getattr(this, name), mean[name], getattr(following, name))
            for update, target in zip(UPDATES, targets, strict=True):
                low, high = (this.row[f"{prefix}{update}_{end}"] for end in ("low", "high"))
                if low is not None and (not prefix or this.row["weights_reliable"]):
                    held.setdefault(prefix + update, []).append(float(low <= target <= high))
    return held


def false_verdicts(found: list[Replication]) -> dict[str, float]:
    """Share of the rows that say something which is not so."""
    wrong = {"sign": 0, "linear": 0, "nonlinear": 0}
    for one in found:
        beyond = abs(one.change - one.first_order) > 0.05 * abs(one.first_order)
        sign = "positive" if one.change > 0 else "negative"
        wrong["sign"] += one.row["sign_this_update"] not in (sign, "unknown")
        wrong["linear"] += one.row["linearity"] == "linear" and beyond
        wrong["nonlinear"] += one.row["linearity"] == "nonlinear" and not beyond
    return {name: count / len(found) for name, count in wrong.items()}


REPLICATIONS = 200


def test_the_intervals_and_verdicts_of_a_row(record: Proof):
    record(
        "Intervals and verdicts of a row",
        claim=f"E ({SEQUENCES} sequences) and U are drawn anew in each of {REPLICATIONS} replications, and a row is "
        "made of each pair as by a sweep. `this`, `mean` and `next` are the shares of the intervals for this, the "
        "mean and the next update, among those given, that hold the exact δH₁ (first three) or ΔH (last three) of this "
        "step, its mean over U, and that of an independent U. `given` is the share of rows with an interval over U, "
        "and `false` the share with a false sign for this update, a false *linear*, and a false *nonlinear*.",
        limit="intervals for 95 % hold in at least 90 % (3 standard errors of 200 below 95 %), and false verdicts are "
        "at most 5 %; β₂ = 0.9 has no limit",
        columns=("setting", "given", *2 * ("this", "mean", "next"), "ESS/N", "curvature", "false"),
    )
    torch.manual_seed(0)
    world = World(policy_of(gpt2(vocabulary=3)), [[1], [0, 2, 1], [0, 0]], temperature=0.8, max_new_tokens=3)
    zero = {name: torch.zeros_like(p).detach() for name, p in world.policy.named_parameters().items()}
    everything = enumerate_world(world, zero)
    gradients = token_gradients(everything)
    exact = torch.autograd.grad(world.exact().H_tok, list(world.policy.named_parameters().values()))
    dH = torch.cat([g.flatten() for g in exact])
    right = []
    for setting in SETTINGS:
        sweeps = Sweeps(everything, trainer_of(everything, gradients, setting.sparse), setting, dH)
        found = [sweeps.replicate() for _ in range(REPLICATIONS)]
        held, wrong = coverage(found), false_verdicts(found)
        names = [prefix + update for prefix in ("", "delta_h_") for update in UPDATES]
        # a share of few is none
        shares = {name: sum(held[name]) / len(held[name]) for name in names if len(held.get(name, ())) >= 50}
        record.row(
            setting.label,
            percent(sum(one.row["interval_over_u"] == "valid" for one in found) / len(found)),
            *(percent(shares[name]) if name in shares else "–" for name in names),
            f"{sum(one.row['ess_fraction'] for one in found) / len(found):.2f}",
            percent(sorted(abs(one.change / one.first_order - 1) for one in found)[len(found) // 2]),
            ", ".join(map(percent, wrong.values())),
        )
        if setting.limited:
            right.append(all(share >= 0.9 for share in shares.values()))
        right.append(max(wrong.values()) <= 0.05)
    assert all(right)
