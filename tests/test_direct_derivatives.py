"""The functions with forward-mode derivatives of their own: torch's values, to rounding, and in use."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import llama, policy_of, random_direction
from torch.func import jvp
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from entropy_core.numerics import direct_derivatives
from entropy_core.numerics.direct_derivatives import DirectDerivatives
from entropy_core.policy.derivatives import token_derivatives
from entropy_core.policy.scorer import TeacherForcedRows


def scores(lowest: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, dx = torch.randn(2, 3, 5, 5, dtype=torch.float64, generator=generator).unbind(0)
    return x.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), lowest), dx


@pytest.mark.parametrize(
    ("lowest", "dim"), [(-torch.inf, -1), (torch.finfo(torch.float64).min, -1), (-3.0, -1), (-3.0, 0)]
)
def test_value_and_derivative_of_softmax_are_those_of_torch(lowest: float, dim: int):
    x, dx = scores(lowest)
    expected = jvp(lambda x: functional.softmax(x, dim), (x,), (dx,))
    with DirectDerivatives():
        found = jvp(lambda x: functional.softmax(x, dim=dim), (x,), (dx,))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_the_arguments_of_softmax_are_those_of_torch():
    x, _ = scores(-3.0)
    with DirectDerivatives():
        widened, guessed = functional.softmax(x.float(), -1, dtype=torch.float64), functional.softmax(x[0])
    assert widened.dtype == torch.float64
    torch.testing.assert_close(widened, x.float().double().softmax(-1))
    torch.testing.assert_close(guessed, x[0].softmax(1))


def watched(function: Any) -> Any:
    """Within the context its rule is a mock that does what the rule does."""
    rule = direct_derivatives._RULES[function]
    return mock.patch.dict(direct_derivatives._RULES, {function: mock.Mock(wraps=rule)})


def test_the_attention_of_a_policy_goes_through_it():
    policy = policy_of(llama(), blockwise=False)
    input_ids_BL = torch.tensor([[1, 0, 2, 2]])
    where_K = torch.zeros(1, dtype=torch.long)
    rows = TeacherForcedRows(input_ids_BL, where_K, where_K + 2, input_ids_BL[:, 3])
    with watched(functional.softmax):
        token_derivatives(policy, rows, random_direction(policy), 1.0)
        called = direct_derivatives._RULES[functional.softmax]
    assert called.call_count == policy.model.config.num_hidden_layers


@pytest.mark.parametrize("moving", [["x"], ["weight"], ["bias"], ["x", "weight"], ["x", "weight", "bias"]])
def test_value_and_derivative_of_a_linear_layer_are_those_of_torch(moving: list[str]):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 3, 4), "weight": (5, 4), "bias": (5,)}
    values, tangents = (
        {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}
        for _ in range(2)
    )

    def layer(moved: dict[str, torch.Tensor]) -> torch.Tensor:
        of = values | moved
        return functional.linear(of["x"], of["weight"], of["bias"])

    primal, tangent = ({name: all_of[name] for name in moving} for all_of in (values, tangents))
    expected = jvp(layer, (primal,), (tangent,))
    with DirectDerivatives():
        found = jvp(layer, (primal,), (tangent,))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


OPERATIONS = {
    "x * y": lambda x, y: x * y,
    "torch.mul": torch.mul,
    "y from the left": lambda x, y: y * x,
    "of a number": lambda x, y: 3 * x + y * 2.0,
    "x + y": lambda x, y: x + y,
    "torch.add": lambda x, y: torch.add(x, torch.add(y, x, alpha=3)),
    "of a number and a sum": lambda x, y: (2 + x) + (y + 1.5),
    "with a constant": lambda x, y: (x + torch.ones(2, 3, 4)) * (torch.full((2, 3, 4), 3.0).double() + y),
    "x²": lambda x, y: x.pow(2) + torch.pow(y, 2) + y**2,
    "other powers": lambda x, y: x.pow(3) + (y**2 + 1) ** 0.5 + x ** torch.tensor(2),
    "of two dtypes": lambda x, y: x.float() * y,
}


@pytest.mark.parametrize("shape", [(2, 3, 4), (4,), (2, 1, 1)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_value_and_derivative_of_products_and_powers_are_those_of_torch(name: str, shape: tuple[int, ...]):
    generator = torch.Generator().manual_seed(0)
    primal, tangent = (
        tuple(torch.randn(of, dtype=torch.float64, generator=generator) for of in ((2, 3, 4), shape)) for _ in range(2)
    )
    expected = jvp(OPERATIONS[name], primal, tangent)
    with DirectDerivatives():
        found = jvp(OPERATIONS[name], primal, tangent)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("function", "operation"),
    [(torch.Tensor.mul, "x * y"), (torch.Tensor.add, "x + y"), (torch.pow, "x²"), (torch.Tensor.pow, "x²")],
)
def test_sums_products_and_squares_go_through_it(function: Any, operation: str):
    x, y = torch.randn(2, 3)
    with DirectDerivatives(), watched(function):
        jvp(OPERATIONS[operation], (x, y), (x, y))
        assert direct_derivatives._RULES[function].called


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_not_dual_is_left_to_torch(operation: str):
    x, y = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True).unbind(0)
    expected = OPERATIONS[operation](x, y)
    with DirectDerivatives():
        found = OPERATIONS[operation](x, y)
    assert torch.equal(found, expected)
    assert found.grad_fn.name() == expected.grad_fn.name()


def test_a_sum_does_not_share_its_tangent():
    """What is done to the sum in place must not reach the operand."""
    x, v = torch.randn(2, 3, dtype=torch.float64)

    def function(x: torch.Tensor) -> torch.Tensor:
        y = x + 1.0
        y.mul_(2.0)
        return x + 0.0

    with DirectDerivatives():
        assert torch.equal(jvp(function, (x,), (v,))[1], v)


def test_a_factor_that_is_constant_has_no_derivative():
    x, y = torch.randn(2, 3)
    for moving, constant in ((x, y), (y, x)):
        with DirectDerivatives():
            found = jvp(lambda moving, constant=constant: constant * moving, (moving,), (x,))
        torch.testing.assert_close(found, (constant * moving, constant * x))


@pytest.mark.parametrize("moving", ["x", "weight"])
def test_what_is_constant_costs_no_product(moving: str):
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    of = (lambda x: functional.linear(x, weight)) if moving == "x" else (lambda weight: functional.linear(x, weight))
    primal = x if moving == "x" else weight
    seen = []

    class Counting(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Counting(), DirectDerivatives():  # the rule's own operations are seen by the mode around it
        jvp(of, (primal,), (primal,))
    assert seen.count(functional.linear) == 2  # the value, and the term that moves


@pytest.mark.parametrize(
    "function",
    [
        lambda x: functional.softmax(x, 0),
        lambda x: functional.linear(x, x[None]),
        lambda x: x * x,
        lambda x: x**2,
    ],
    ids=["softmax", "linear", "mul", "pow"],
)
def test_a_second_level_of_forward_mode_is_that_of_torch(function: Callable[[torch.Tensor], torch.Tensor]):
    x, v = torch.randn(2, 4, dtype=torch.float64)

    def second() -> tuple[torch.Tensor, torch.Tensor]:
        return jvp(lambda x: jvp(function, (x,), (v,))[1], (x,), (v,))

    expected = second()
    with DirectDerivatives():
        torch.testing.assert_close(second(), expected, rtol=0, atol=1e-14)


def test_a_second_level_through_a_policy_is_refused():
    policy = policy_of(llama())
    rows = TeacherForcedRows(
        torch.tensor([[1, 2, 3]]), torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([2, 3])
    )
    v = random_direction(policy)

    def along(scale: torch.Tensor) -> torch.Tensor:
        return token_derivatives(policy, rows, {name: scale * tensor for name, tensor in v.items()}, 1.0).dlogprobs_K

    one = torch.ones((), dtype=policy.dtype)
    along(one)
    with pytest.raises(RuntimeError, match="Nested forward mode AD is not supported"):
        jvp(along, (one,), (one,))
