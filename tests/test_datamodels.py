"""The scores of tests/datamodels.py against what they are by definition."""

from dataclasses import replace

import pytest
import torch
from datamodels import (
    influence,
    known,
    measured,
    of_prompts,
    out_of_sample,
    random_halves,
    shares,
    spearman,
)
from oracle.scenarios import PLAIN, Ready
from scipy import stats

SMALL = replace(PLAIN, prompts=6, prompts_u=8, reward="binary", G=4)


@pytest.fixture(scope="module")
def ready() -> Ready:
    return Ready(SMALL)


def test_the_shares_and_the_step_on_a_half_are_those_of_the_step(ready: Ready):
    _, u_N = ready.draw()
    laboratory, step = ready.laboratory, ready.laboratory.step(ready.trainer, u_N)
    total = float(shares(ready, step, laboratory.dH_Q).sum())
    assert total == pytest.approx(float(laboratory.dH_Q @ step.parts.gradient), rel=1e-9)
    halves_MP = random_halves(ready, 3)
    assert (halves_MP.sum(1) == 4).all()
    everything = torch.ones(1, 8, dtype=torch.bool)
    (change,) = measured(ready, step, everything).tolist()
    after = laboratory.exact.exact_from(laboratory.exact.scores_at(step.v_Q, ready.learning_rate))
    assert change == pytest.approx(float(after.of("per_token")) - laboratory.H, rel=1e-9)
    # what a prompt does is what the step loses without it, to first order
    influence_P = of_prompts(step, influence(ready, step, laboratory.dH_Q))
    without_MP = ~torch.eye(8, dtype=torch.bool)
    lost_P = change - measured(ready, step, without_MP)
    assert spearman(influence_P, lost_P) > 0.9


def test_what_is_known_of_a_token(ready: Ready):
    _, u_N = ready.draw()
    step = ready.laboratory.step(ready.trainer, u_N)
    of_tokens = known(ready, step)
    logprobs_SV = ready.laboratory.exact.logprobs().detach()
    state = int(ready.laboratory.responses.state_K[step.pick_K][0])
    p, h = logprobs_SV[state].exp(), float(of_tokens.entropy_K[0])
    assert float(of_tokens.expected_K[0]) == pytest.approx(float((p * p * (h + p.log())).sum()))
    assert float(of_tokens.logprob_K[0]) == pytest.approx(float(p[of_tokens.class_K[0]].log()))
    assert set(of_tokens.pass_rate_K.tolist()) <= {0.0, 0.25, 0.5, 0.75, 1.0}


def test_rank_correlation_and_regression():
    generator = torch.Generator().manual_seed(0)
    a_M, noise_M = torch.randn(2, 40, generator=generator, dtype=torch.float64)
    tied_M = (a_M + noise_M).round()
    assert spearman(a_M, tied_M) == pytest.approx(stats.spearmanr(a_M, tied_M).statistic)
    fold_K = torch.arange(40) % 4
    assert out_of_sample({"a": a_M}, 3 * a_M + 1, fold_K) == pytest.approx(1.0)
    assert out_of_sample({"noise": noise_M}, a_M, fold_K) < 0.1
