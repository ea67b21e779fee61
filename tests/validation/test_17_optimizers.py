"""The next steps of SGD, Lion, Adafactor and Muon, and their derivatives, against the optimizers themselves."""

import pytest
import torch
from proofs import Proof, power
from test_optimizers import CASES, NOMINAL, gradient, states
from torch import Tensor

pytestmark = pytest.mark.validate

STEP, DERIVATIVE = 1e-12, 1e-7


def test_the_steps_of_other_optimizers(record: Proof) -> None:
    record(
        "Optimizers other than AdamW",
        claim="lr·v against the change that the optimizer itself makes of a wide matrix, a tall one, a vector and a "
        "tensor of three axes (Muon: of the matrices), in float64, relative to the change (or to θ/1000, where the "
        "change is less than that); and ⟨a, J·dg⟩ with Jᵀ·a against differences of the step at four points along 8 "
        "random dg. Lion's J is 0, as are its differences. Muon's step is compared with its own rounding to bfloat16, "
        "and `rounding` is what that changes of the step; its J is that of the exact step.",
        limit=f"step < {power(STEP)} of the change, derivative < {power(DERIVATIVE)} of the largest",
        columns=("optimizer", "step", "derivative", "rounding"),
    )
    missed = []
    for case, (_, _, make) in CASES.items():
        steps, derivatives, roundings = [0.0], [0.0], [0.0]
        for name, (theta, slot, group, optimizer) in states(case).items():
            g, before = gradient(name, 9), theta.detach().clone()

            def direction(
                g: Tensor, before: Tensor = before, slot: dict = slot, group: dict = group, make: object = make
            ) -> Tensor:
                return make(g, before, slot, group).direction  # type: ignore[operator, no-any-return]

            step = make(g, before, slot, group)
            generator = torch.Generator().manual_seed(0)
            found, differences = [], []
            for _ in range(8):
                dg, a = (torch.randn(g.shape, generator=generator, dtype=torch.float64) for _ in range(2))
                near, far = (direction(g + h * dg) - direction(g - h * dg) for h in (1e-5, 2e-5))
                change = (8 * near - far) / 12e-5
                found.append(float((step.pulled_back(a) * dg).sum()))
                differences.append(float((a * change).sum()))
            largest = max(map(abs, differences)) or 1.0
            derivatives.append(max(abs(x - y) for x, y in zip(found, differences, strict=True)) / largest)
            roundings.append(float((step.taken - step.direction).norm() / step.direction.norm()))
            taken = NOMINAL * step.taken
            theta.grad = g.clone()
            optimizer.step()
            change = theta.detach() - before
            size = torch.maximum(change.norm(), before.norm() / 1000)
            steps.append(float((taken - change).norm() / size))
        record.row(case, power(max(steps)), power(max(derivatives)), power(max(roundings)))
        missed += [case] * (max(steps) >= STEP or max(derivatives) >= DERIVATIVE)
    assert not missed, missed
