"""The softmax whose forward-mode derivative is made from its value: torch's, to rounding, and in use."""

from unittest import mock

import pytest
import torch
from conftest import llama, policy_of, random_direction
from torch.func import jvp
from torch.nn import functional

from entropy_core.numerics import softmax
from entropy_core.numerics.softmax import DirectSoftmaxDerivative
from entropy_core.policy import TeacherForcedRows


def scores(lowest: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, dx = torch.randn(2, 3, 5, 5, dtype=torch.float64, generator=generator).unbind(0)
    return x.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), lowest), dx


@pytest.mark.parametrize(
    ("lowest", "dim"), [(-torch.inf, -1), (torch.finfo(torch.float64).min, -1), (-3.0, -1), (-3.0, 0)]
)
def test_value_and_derivative_are_those_of_torch(lowest: float, dim: int):
    x, dx = scores(lowest)
    expected = jvp(lambda x: functional.softmax(x, dim), (x,), (dx,))
    with DirectSoftmaxDerivative():
        found = jvp(lambda x: functional.softmax(x, dim=dim), (x,), (dx,))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_its_arguments_are_those_of_torch():
    x, _ = scores(-3.0)
    with DirectSoftmaxDerivative():
        widened, guessed = functional.softmax(x.float(), -1, dtype=torch.float64), functional.softmax(x[0])
    assert widened.dtype == torch.float64
    torch.testing.assert_close(widened, x.float().double().softmax(-1))
    torch.testing.assert_close(guessed, x[0].softmax(1))


def test_the_attention_of_a_policy_goes_through_it():
    policy = policy_of(llama())
    input_ids_BL = torch.tensor([[1, 0, 2, 2]])
    where_K = torch.zeros(1, dtype=torch.long)
    rows = TeacherForcedRows(input_ids_BL, where_K, where_K + 2, input_ids_BL[:, 3])
    with mock.patch.object(softmax._Softmax, "jvp", wraps=softmax._Softmax.jvp) as called:
        policy.derivatives(rows, random_direction(policy), 1.0)
    assert called.call_count == policy.model.config.num_hidden_layers
