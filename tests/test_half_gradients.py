"""Gradients of the loss on halves of U: from the whole gradient and one half where that is exact, and only there."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from pipeline_fixtures import Probe, make_gpt2, probe, skip_figures, values, write_reward

from entropy_core.numerics.functional import TokenPair
from entropy_core.numerics.half_gradients import multiple, rest
from entropy_core.numerics.vectors import in_blocks
from entropy_core.pipeline import catalogue
from entropy_core.sequences import loss_gradient
from entropy_core.stages import half_steps_u
from entropy_core.store.artifact import Artifact


def pair(*numbers: float) -> TokenPair:
    values_K = torch.tensor(numbers, dtype=torch.float64)
    return TokenPair(values_K, 0.1 * values_K.flip(0))


@pytest.mark.parametrize(
    ("of_half", "of_whole", "expected"),
    [
        (pair(2.0, -4.0, 0.0), pair(1.0, -2.0, 0.0), 2.0),
        (pair(2.0, -4.0, 1e-9), pair(1.0, -2.0, 0.0), None),
        (pair(2.0, -4.0, 1e-13), pair(1.0, -2.0, 0.0), 2.0),
        (pair(0.0, 0.0), pair(0.0, 0.0), 0.0),
        (pair(0.0, 0.0), pair(1.0, 0.0), 0.0),
        (pair(1.0, 0.0), pair(0.0, 0.0), None),
        (pair(1.0, 1.0)._replace(entropy_K=torch.zeros(2, dtype=torch.float64)), pair(1.0, 1.0), None),
    ],
)
def test_the_coefficients_of_a_half_are_a_multiple_or_not(of_half, of_whole, expected):
    found = multiple(of_half, of_whole)
    assert found == (None if expected is None else pytest.approx(expected, rel=1e-12))


def test_what_rounding_leaves_of_a_gradient_is_no_gradient():
    whole = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    part = whole.double() * (1 + 1e-7)
    part[500:] *= 0.5
    left = rest(in_blocks({"a": whole}), in_blocks({"a": part}), torch.float32)
    (found,) = left.values()
    assert torch.equal(found[:500], torch.zeros(500, dtype=torch.float64))
    torch.testing.assert_close(found[500:], whole[500:].double() - part[500:])
    (exact,) = rest(in_blocks({"a": whole}), in_blocks({"a": part}), torch.float64).values()
    assert bool((exact[:500] != 0).all())


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Probe:
    """In float64, where only the order of sums differs."""
    folder = tmp_path_factory.mktemp("halves")
    make_gpt2(folder / "run" / "checkpoint-3")
    asked = values(
        folder / "run",
        folder / "artifacts",
        batch_config={"B_U": 5, "G": 4},  # halves of unequal size
        update={"reward": write_reward(folder), "max_grad_norm": 1e-3},
    )
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        return probe(asked)


def steps_on_halves(swept: Probe, store: Path, **changes: object) -> tuple[Artifact, int, int]:
    """The artifact for a loss with these changes, the tokens of all passes, and those of U with a coefficient."""
    run, passed = swept.run, []
    into = type(run.store)(store)
    update_inputs = run.inputs("compute-update")
    loss = update_inputs["loss"].model_copy(update=changes)
    update = into.run(catalogue.COMPUTE_UPDATE, run.execution, update_inputs | {"loss": loss})
    counted = update.tensors("loss.safetensors", ("coefficient",))["coefficient"]

    def counting(into_gradient, processor, shards: Sequence, coefficients: TokenPair) -> None:
        passed.append(int((coefficients.logprob_K != 0).sum()))
        loss_gradient.add_loss_gradient(into_gradient, processor, shards, coefficients)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(half_steps_u, "add_loss_gradient", counting)
        inputs = run.inputs("half-steps-u") | {"update": update}
        return into.run(catalogue.HALF_STEPS_U, run.execution, inputs), sum(passed), int((counted != 0).sum())


@pytest.mark.parametrize(
    ("changes", "additive"),
    [
        ({}, True),
        ({"name": "dapo"}, True),
        ({"name": "dr_grpo", "scale_rewards": "batch"}, True),
        ({"name": "reinforce", "normalize_advantages": True}, False),
        ({"name": "bnpo", "micro_batch": 8}, False),
    ],
)
def test_both_halves_do_not_depend_on_which_of_them_is_computed(swept, tmp_path, monkeypatch, changes, additive):
    """Against both computed, and against the other one computed."""
    found, passed, counted = steps_on_halves(swept, tmp_path / "as it is", **changes)
    rows = found.table("halves.parquet").to_pylist()
    assert len(rows) == 6 and found.summary["splits"] == 3
    assert passed < 0.7 * 3 * counted if additive else passed >= 0.9 * 3 * counted

    plain = half_steps_u.multiple
    monkeypatch.setattr(half_steps_u, "multiple", lambda of_half, of_whole: None)
    alone, passed_alone, _ = steps_on_halves(swept, tmp_path / "each", **changes)
    assert passed_alone >= passed
    same(alone.table("halves.parquet").to_pylist(), rows)

    monkeypatch.setattr(half_steps_u, "multiple", plain)
    splits_RP = half_steps_u.balanced_halves(5)
    monkeypatch.setattr(half_steps_u, "balanced_halves", lambda prompts: ~splits_RP)
    other, _, _ = steps_on_halves(swept, tmp_path / "the other", **changes)
    swapped = other.table("halves.parquet").to_pylist()
    same([swapped[i ^ 1] for i in range(6)], rows)


def same(found: list[dict], expected: list[dict]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-9)
    assert {row["clip_factor"] for row in found} != {1.0}
