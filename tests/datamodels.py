"""What is said of the tokens of U, summed over half of its prompts, against the step that is really taken on that half.

This is the linear datamodeling score of the attribution literature (arXiv:2303.14186): the rank correlation over random
halves of U. The policies are those of `oracle`, whose entropy after a step is exact.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from oracle.replicas import Step
from oracle.scenarios import Ready
from torch import Tensor

from entropy_core.losses.apart import influences, token_coefficients
from entropy_core.numerics import ragged
from entropy_core.numerics.adamw import clip_factor
from entropy_core.numerics.functional import TokenPair
from entropy_core.numerics.halves import by_normalization, entropy_and_length, of_all


class Known(NamedTuple):
    """What is known of every token of U without any derivative, float64 [K] each; the class is its id."""

    advantage_K: Tensor
    logprob_K: Tensor
    entropy_K: Tensor
    position_K: Tensor
    pass_rate_K: Tensor
    class_K: Tensor
    expected_K: Tensor  # E_π[S*] at the token

    @property
    def published(self) -> dict[str, Tensor]:
        """The terms of published predictors of the entropy change, by their names, up to a factor, [K]."""
        a, l, h = self.advantage_K, self.logprob_K, self.entropy_K  # noqa: E741
        return {
            "−Cov(log π, A), arXiv:2505.22617": -(l - l.mean()) * (a - a.mean()),
            "−Cov(log π, π·A), arXiv:2505.22617": -(l - l.mean()) * (l.exp() * a - (l.exp() * a).mean()),
            "−A·(S* − E[S*]), arXiv:2602.03392": -a * (l.exp() * (h + l) - self.expected_K),
            "−Ω = −A·(1 − π)(log π + h), arXiv:2510.10150": -a * (1 - l.exp()) * (l + h),
        }


def known(ready: Ready, step: Step) -> Known:
    """What is known of the tokens of a U."""
    laboratory, trainer = ready.laboratory, ready.trainer
    batch = trainer.loss.batch(step.tokens, step.rewards_PG, step.truncated_N)
    logprobs_SV = laboratory.exact.logprobs().detach()
    h_S1 = -(logprobs_SV.exp() * logprobs_SV).sum(1, keepdim=True)
    expected_S = ((2 * logprobs_SV).exp() * (h_S1 + logprobs_SV)).sum(1)
    passed_N = step.rewards_PG.mean(1).repeat_interleave(trainer.G)
    return Known(
        batch.of_tokens(batch.advantages_N),
        step.tokens["logprobs"].double(),
        step.tokens["entropies"].double(),
        ragged.position_index(step.tokens.offsets_N1).double(),
        batch.of_tokens(passed_N),
        laboratory.responses.tokens_K[step.pick_K],
        expected_S[laboratory.responses.state_K[step.pick_K]],
    )


def entropy_gradient(ready: Ready, e_N: Tensor) -> Tensor:
    """∇H as a sweep estimates it from E, [Q]."""
    halves, covectors = ready.laboratory.gradient_of_e(e_N)
    kinds = [of_all(halves, list(of_halves)) for of_halves in covectors]
    return by_normalization(kinds, *entropy_and_length(halves))[ready.laboratory.normalization]


def sensitivities(ready: Ready, step: Step, along_Q: Tensor) -> TokenPair:
    """⟨w, ∇ℓ⟩ and ⟨w, ∇h⟩ of every token of U."""
    laboratory = ready.laboratory
    states_K = laboratory.responses.state_K[step.pick_K]
    return TokenPair((laboratory.logprob_KQ @ along_Q)[step.pick_K], (laboratory.entropy_SQ @ along_Q)[states_K])


def shares(ready: Ready, step: Step, dH_Q: Tensor) -> Tensor:
    """The shares of first-order-u, [K]."""
    clip = clip_factor(float(step.gradient_Q.norm()), ready.trainer.max_norm)
    return step.coefficients.dot(sensitivities(ready, step, clip * step.parts.preconditioned(dH_Q)))


def gradient_products(ready: Ready, step: Step, dH_Q: Tensor) -> Tensor:
    """−⟨∇H, ∇loss⟩ of every token, as plain gradient descent would have it, [K]."""
    return step.coefficients.dot(sensitivities(ready, step, -dH_Q))


def influence(ready: Ready, step: Step, dH_Q: Tensor) -> Tensor:
    """The influence of every response by the derivative of the step, clipping aside, [N]."""
    batch = ready.trainer.loss.batch(step.tokens, step.rewards_PG, step.truncated_N)
    along = sensitivities(ready, step, step.parts.pulled_back(dH_Q))
    (influence_N,) = influences(ready.trainer.loss.name, batch, [along])
    return influence_N


def random_halves(ready: Ready, count: int) -> Tensor:
    """Which prompts are in each of some halves of U, bool [M, P]."""
    P = ready.trainer.prompts
    order_MP = torch.rand(count, P, generator=ready.generator).argsort(1)
    return order_MP < P // 2


def measured(ready: Ready, step: Step, halves_MP: Tensor) -> Tensor:
    """ΔH of the step on each half, the whole of it anew: advantages, denominators, clipping, moments; exact, [M]."""
    laboratory, trainer, found = ready.laboratory, ready.trainer, []
    for half_P in halves_MP:
        chosen_N = half_P.repeat_interleave(trainer.G).nonzero().squeeze(1)
        pick_K, _ = laboratory.of_tokens(step.u_N[chosen_N])
        batch = trainer.loss.batch(step.tokens.select(chosen_N), step.rewards_PG[half_P], step.truncated_N[chosen_N])
        gradient_Q = laboratory.gradient(token_coefficients(trainer.loss.name, batch), pick_K)
        v_Q = laboratory.next_step(trainer, gradient_Q).direction
        after = laboratory.exact.exact_from(laboratory.exact.scores_at(v_Q, ready.learning_rate))
        found.append(float(after.of(laboratory.normalization)) - laboratory.H)
    return torch.tensor(found, dtype=torch.float64)


def of_prompts(step: Step, values: Tensor) -> Tensor:
    """Sums over the prompts of U of what is said of its tokens [K] or of its responses [N], [P]."""
    if len(values) != len(step.u_N):
        values = ragged.sequence_sum(values, step.tokens.offsets_N1)
    return values.view(len(step.rewards_PG), -1).sum(1)


def spearman(a_M: Tensor, b_M: Tensor) -> float:
    """Rank correlation; equal values have the mean of their ranks."""
    ranks = torch.stack([((x[:, None] > x).double() + 0.5 * (x[:, None] == x)).sum(1) for x in (a_M, b_M)])
    return float(torch.corrcoef(ranks)[0, 1])


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    values_C = torch.tensor(values, dtype=torch.float64)
    return float(values_C.mean()), float(values_C.std() / len(values) ** 0.5)


def out_of_sample(features: Mapping[str, Tensor], target_K: Tensor, fold_K: Tensor) -> float:
    """R² of a linear regression on tokens of prompts that it was not fitted on.

    Args:
        features: columns [K] or [K, F] each; a constant is added.
        target_K: what is regressed.
        fold_K: fold of each token.

    Returns:
        1 − Σ(y − ŷ)²/Σ(y − ȳ)², with ŷ and ȳ from the other folds.
    """
    columns = [torch.ones(len(target_K), 1).double()]
    columns += [x.double().reshape(len(target_K), -1) for x in features.values()]
    design_KF, left = torch.cat(columns, 1), [0.0, 0.0]
    for fold in fold_K.unique().tolist():
        mine_K = fold_K == fold
        design, target_J = design_KF[~mine_K], target_K[~mine_K]
        slopes_F = torch.linalg.lstsq(design, target_J[:, None], driver="gelsd").solution[:, 0]
        left[0] += float(((target_K[mine_K] - design_KF[mine_K] @ slopes_F) ** 2).sum())
        left[1] += float(((target_K[mine_K] - target_J.mean()) ** 2).sum())
    return 1 - left[0] / left[1]
