"""A loss of the user: found by name, checked on a made-up batch, and never a gradient that it did not give."""

from dataclasses import replace

import pytest
import torch
from pipeline_fixtures import BONUS, call_here
from test_losses import batch_of

from entropy_core.config.read import parse_config
from entropy_core.errors import ConfigError, LossError, ProbeError
from entropy_core.isolation.process import Isolation
from entropy_core.losses import apart
from entropy_core.losses.functions import check_loss, coefficients_of, influences_of, load_loss, source_file
from entropy_core.numerics import losses, ragged
from entropy_core.numerics.loss_batch import LossBatch
from entropy_core.numerics.losses import LOSSES, TokenPair
from entropy_core.pipeline.settings import settle


@pytest.fixture
def file(tmp_path):
    """Write a file that defines `mine`; returns how a configuration names it."""

    def write(text: str) -> str:
        (tmp_path / "losses.py").write_text(text)
        return f"{tmp_path / 'losses.py'}:mine"

    return write


BACKWARD = """import torch
class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_K):
        return x_K.sum()
    @staticmethod
    def backward(ctx, *of):
        raise KeyError("no such thing")
    @classmethod
    def of(cls, batch):
        return cls.apply(batch.logprobs_K)
"""


def returning(value: str) -> str:
    return f"import torch\nfrom entropy_core.numerics import losses\ndef mine(batch):\n    return {value}\n"


def test_the_known_losses_need_no_check():
    for name, loss in LOSSES.items():
        assert load_loss(name) is loss and source_file(name) is None
        apart.check_loss(name, 0.3, 8)


@pytest.mark.parametrize(
    "value",
    [
        "losses.grpo(batch)",
        "losses.dapo(batch) - 0.01 * batch.mean(batch.sequence_sum(batch.entropies_K)) / batch.mean(batch.lengths_N)",
        "batch.mean(-batch.rewards_N * batch.sequence_sum(batch.logprobs_K))",
        "-batch.mean(batch.sequence_sum(batch.of_tokens(batch.advantages_N) * batch.logprobs_K).tanh())",
    ],
)
def test_a_loss_is_accepted_and_has_the_gradient_that_autograd_gives(file, value: str):
    name = file(returning(value))
    check_loss(name, 0.0, 8)
    batch = batch_of()
    found = coefficients_of(name, load_loss(name), batch)
    expected = losses.coefficients(eval(f"lambda batch: {value}", {"losses": losses, "torch": torch}), batch)
    assert all(map(torch.equal, found, expected)) and found.logprob_K.any()


def test_a_loss_with_a_bonus(file):
    name = file(BONUS)
    check_loss(name, 0.0, 1)
    found = coefficients_of(name, load_loss(name), batch_of())
    expected = losses.coefficients(losses.grpo, batch_of())
    torch.testing.assert_close(found.logprob_K, expected.logprob_K, rtol=1e-14, atol=0)
    lengths_K = batch_of().of_tokens(batch_of().lengths_N)
    torch.testing.assert_close(found.entropy_K, -0.01 / (12 * lengths_K), rtol=1e-13, atol=0)


def test_a_process_of_its_own_changes_no_bit(file):
    """Of sums that are long enough to be taken in several parts."""
    value = "batch.mean(batch.sequence_sum(batch.logprobs_K)) * batch.logprobs_K.sum().sin()"
    name, generator = file(returning(value)), torch.Generator().manual_seed(3)
    lengths_N = torch.randint(1, 100, (2048,), generator=generator)
    numbers_2K = torch.randn(2, int(lengths_N.sum()), generator=generator, dtype=torch.float64)
    rewards_PG = torch.randn(256, 8, generator=generator, dtype=torch.float64)
    offsets_N1 = ragged.offsets_from_lengths(lengths_N)
    batch = LossBatch.on_policy(*numbers_2K, offsets_N1, rewards_PG, rewards_PG, max_new_tokens=100)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        loss = load_loss(name)
        here = coefficients_of(name, loss, batch)
        pairs = [TokenPair(*numbers_2K), TokenPair(*numbers_2K.sin())]
        assert all(map(torch.equal, apart.token_coefficients(name, batch), here))
        found, expected = apart.influences(name, batch, pairs), influences_of(name, loss, batch, pairs)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, found, expected)) and not torch.equal(*found)


@pytest.mark.parametrize("fails", ["1 / 0", "losses.dapo(batch) / 0", "batch.logprobs_K", "Backward.of(batch)"])
def test_a_part_of_u_without_a_finite_gradient_is_told_from_the_others(file, monkeypatch, fails):
    if "Backward" not in fails:  # what that raises, its process makes an error of
        call_here(monkeypatch)
    name = file(f"{BACKWARD}\n{returning(f'losses.grpo(batch) if batch.rewards_N[0] else {fails}')}")
    other, one = batch_of(seed=1), batch_of()
    one = replace(one, rewards_N=one.rewards_N.clone())
    one.rewards_N[0] = 0.0
    found = apart.coefficients_of_each(name, [other, one, other])
    expected = losses.coefficients(losses.grpo, other)
    assert found[1] is None and all(map(torch.equal, found[0], expected)) and all(map(torch.equal, found[2], expected))
    with pytest.raises(LossError):
        apart.token_coefficients(name, one)


def test_a_part_of_u_whose_tokens_are_all_masked_has_a_gradient_where_nothing_is_divided_by_them():
    masked = replace(batch_of(), mask_K=torch.zeros_like(batch_of().mask_K))
    assert apart.coefficients_of_each("dapo", [masked, batch_of()])[0] is None
    assert apart.coefficients_of_each("dapo", [masked, batch_of()])[1] is not None
    (found,) = apart.coefficients_of_each("grpo", [masked])
    assert found is not None and not found.logprob_K.any()
    assert apart.coefficients_of_each("dapo", []) == apart.coefficients_of_each("mine.py:none", []) == []


def test_a_process_of_its_own_tells_what_is_wrong(file):
    with pytest.raises(LossError, match=r"raised ZeroDivisionError: division by zero at .*losses\.py:4"):
        apart.check_loss(file(returning("1 / 0")), 0.0, 8)
    with pytest.raises(ConfigError, match="makes no use of the reference"):
        apart.check_loss(file(returning("batch.mean(batch.sequence_sum(batch.logprobs_K))")), 0.1, 8)
    once = file(ONCE)
    with pytest.raises(LossError, match="cannot be differentiated twice"):
        apart.influences(once, batch_of(), [coefficients_of(once, load_loss(once), batch_of())])


def test_the_source_of_a_loss_is_its_file(file, tmp_path):
    assert source_file(file(BONUS)) == tmp_path / "losses.py"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (returning("1 / 0"), r"raised ZeroDivisionError: division by zero at .*losses\.py:4"),
        ("def mine(batch):\n    x = 1\n    return helper(batch)\n", r"NameError: .*helper.* at .*losses\.py:3"),
        ("def mine(batch, eps):\n    return eps\n", r"TypeError: .*eps.* at .*losses\.py:1"),
        (returning("batch.logprobs_K @ torch.ones(2)"), r"raised RuntimeError: .* at .*losses\.py:4"),
        (returning("batch.logprobs_K.mul_(2.0).sum()"), r"raised RuntimeError: .*in-place.* at .*losses\.py:4"),
        (returning("0.5"), r"returned float, not a tensor, in .*losses\.py:3"),
        (returning("None"), "returned NoneType, not a tensor"),
        (returning("batch.logprobs_K"), r"returned a tensor of shape \[16\], not a scalar"),
        (returning("losses.grpo(batch) * torch.nan"), "returned nan"),
        (returning("losses.grpo(batch) + torch.inf"), "returned inf"),
        (returning("batch.logprobs_K.detach().sum()"), "depends on neither log-probabilities nor entropies"),
        (returning("torch.tensor(batch.logprobs_K.sum().item())"), "depends on neither"),
        (returning("batch.mean(batch.sequence_sum(batch.entropies_K))"), "does not depend on the log-probabilities"),
        (returning("batch.mean(batch.sequence_sum((batch.logprobs_K - batch.old_logprobs_K).sqrt()))"), "not finite"),
        (returning("batch.mean(torch.rand(()) * batch.sequence_sum(batch.logprobs_K))"), "two gradients for one batch"),
        (returning("(batch.of_tokens(batch.advantages_N) * batch.logprobs_K).sum()"), "does not count a response"),
        (returning("batch.mean(batch.sequence_sum(batch.logprobs_K)) / len(batch.lengths_N)"), "does not count a resp"),
        (returning("losses.dapo(batch) * batch.lengths_N.mean()"), "does not count a response of weight 2 as two"),
    ],
)
def test_what_is_no_loss_is_refused_before_anything_runs(file, text: str, message: str):
    with pytest.raises(LossError, match=message) as raised:
        check_loss(file(text), 0.0, 8)
    assert "\n" not in str(raised.value) and "Fix: " in str(raised.value) and "losses.py" in str(raised.value)


ONCE = """import torch
class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad
def mine(batch):
    return batch.mean(Once.apply(batch.sequence_sum(batch.logprobs_K)))
"""


def test_a_loss_that_has_no_second_derivative_is_refused(file):
    with pytest.raises(LossError, match="cannot be differentiated twice"):
        check_loss(file(ONCE), 0.0, 8)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ppo", r"unknown loss 'ppo'.*use one of bnpo, .*rloo, package\.module:function"),
        ("no.such.module:loss", "cannot be imported .there is no module no"),
        ("/no/such/file.py:loss", "cannot be imported .there is no file /no/such/file.py"),
        ("math:pi", "'math:pi' has no source file"),
    ],
)
def test_a_loss_that_does_not_exist_is_refused(name: str, message: str):
    with pytest.raises(ConfigError, match=message):
        check_loss(name, 0.0, 8)


def test_a_kl_term_that_the_loss_leaves_out_is_refused(file):
    with pytest.raises(ConfigError, match=r"kl_beta is 0\.1, and loss .* makes no use of the reference.*losses\.kl"):
        check_loss(file(returning("batch.mean(batch.sequence_sum(batch.logprobs_K))")), 0.1, 8)
    check_loss(file(returning("batch.mean(batch.sequence_sum(batch.kl_beta * losses.kl(batch)))")), 0.1, 8)
    check_loss(file(returning("losses.grpo(batch)")), 0.1, 8)


def test_a_gradient_that_is_not_finite_names_the_response(file):
    name = file(returning("batch.mean(batch.sequence_sum(batch.logprobs_K) * (batch.advantages_N.abs() - 2).sqrt())"))
    batch = batch_of()
    with pytest.raises(LossError, match="returned nan"):
        coefficients_of(name, load_loss(name), batch)
    root = file(returning("batch.mean((batch.logprobs_K[:12] - batch.old_logprobs_K[:12]).abs().sqrt())"))
    with pytest.raises(LossError, match=r"not finite in 12 tokens, the first in response 0 \(advantage .*tokens\)"):
        coefficients_of(root, load_loss(root), batch)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"loss": "ppo"}, r"update\.loss.*unknown loss 'ppo'.*file\.py:function"),
        ({"loss": "mine.py:loss"}, "scale_rewards: it is auto.*this one is your own.*group"),
    ],
)
def test_the_configuration_says_what_goes_together(update, message: str):
    with pytest.raises(ProbeError, match=message):
        settle(parse_config({"checkpoints": ["somewhere"], "update": update}), {})
    assert settle(parse_config({"checkpoints": ["x"], "update": {"loss": "mine.py:loss", "scale_rewards": "none"}}), {})


def test_pairs_multiply_token_by_token():
    a, b = TokenPair(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])), TokenPair(*torch.tensor([[5.0, 6.0]] * 2))
    assert a.dot(b).tolist() == [20.0, 36.0]


def test_a_slow_loss_has_its_time_for_each_call(file):
    """As a loss that takes minutes on U, and is asked for its gradient on many parts of U, or along many directions."""
    name = file("import time\nfrom entropy_core.numerics.losses import grpo\n" + SLOW)
    batch, limits = batch_of(), Isolation(seconds=2.0)
    expected = losses.coefficients(LOSSES["grpo"], batch)
    for found in apart.coefficients_of_each(name, [batch] * 4, limits):
        assert found is not None and all(map(torch.equal, found, expected))
    pair = TokenPair(*torch.linspace(1, 40, 2 * len(batch.logprobs_K)).double().sin().view(2, -1))
    for influence_N in apart.influences(name, batch, [pair] * 4, limits):
        assert torch.equal(influence_N, losses.influence(LOSSES["grpo"], batch, pair))


SLOW = """def mine(batch):
    time.sleep(0.8)
    return grpo(batch)
"""


def test_a_loss_that_hangs_at_a_later_call_is_stopped(file):
    text = "calls = []\ndef mine(batch):\n    calls.append(0)\n    while len(calls) > 2: pass\n    return grpo(batch)\n"
    name = file("from entropy_core.numerics.losses import grpo\n" + text)
    with pytest.raises(LossError, match=r"took longer than 1 s and was stopped, in .*losses\.py:5"):
        apart.coefficients_of_each(name, [batch_of()] * 4, Isolation(seconds=1.0))
