"""Forward mode in bfloat16: what it computes in, what that costs, and that the cost is measured and said.

The oracle of the attention and of the rules is the same computation in float64; that of δH₁ is the estimator, written
out on the 64 sequences.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import gpt2, llama, policy_of, random_direction
from pipeline_fixtures import Probe, make_gpt2, probe, skip_figures, values, write_reward
from torch import Tensor
from torch.func import jvp
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.masking_utils import causal_mask_function

from entropy_core.errors import ConfigError
from entropy_core.numerics.blockwise_attention import attention
from entropy_core.numerics.direct_derivatives import DirectDerivatives
from entropy_core.numerics.quadrature import NODES, UP_TO_NODE
from entropy_core.policy.arithmetic import computing_in, computing_in_full
from entropy_core.policy.blockwise import VisibleKeys
from entropy_core.policy.derivatives import token_derivatives
from entropy_core.policy.scorer import TeacherForcedRows
from entropy_core.store.columns import read_tokens

CPU = torch.device("cpu")
BF16 = {"policy": {"dtype": "float32", "arithmetic": "bf16"}}
TAU = 0.8


class Products(TorchFunctionMode):
    """Notes the dtypes of what linear layers return, by the number of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, set[torch.dtype]] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is functional.linear:
            self.found.setdefault(result.shape[-1], set()).add(result.dtype)
        return result


def rows_of(model: PreTrainedModel) -> TeacherForcedRows:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    input_ids_BL = torch.randint(0, vocabulary, (3, 12), generator=torch.Generator().manual_seed(1))
    row_K, position_K = torch.arange(3).repeat_interleave(8), torch.arange(8).repeat(3) + 3
    return TeacherForcedRows(input_ids_BL, row_K, position_K, input_ids_BL[row_K, position_K + 1])


# --- the pass --------------------------------------------------------------------------------------------------------


def test_the_trunk_computes_in_bf16_and_the_head_in_float32():
    policy = policy_of(llama(vocab_size=11, eos_token_id=10, initializer_range=0.2).float())
    rows, v, found = rows_of(policy.model), random_direction(policy), {}
    for arithmetic in ("full", "bf16"):
        with Products() as products:
            found[arithmetic] = token_derivatives(policy, rows, v, TAU, arithmetic)
        vocabulary = policy.model.config.vocab_size
        trunk = {dtype for size, of in products.found.items() if size != vocabulary for dtype in of}
        assert products.found[vocabulary] == {torch.float32}
        assert trunk == {torch.bfloat16 if arithmetic == "bf16" else torch.float32}
    for full, cheap in zip(found["full"], found["bf16"], strict=True):
        assert full.dtype == cheap.dtype == torch.float32
        assert 1e-4 < float((cheap - full).norm() / full.norm()) < 0.1


def test_other_passes_of_the_same_policy_stay_exact():
    policy = policy_of(gpt2().float())
    rows, v = rows_of(policy.model), random_direction(policy)
    before = policy.statistics(rows, TAU)
    token_derivatives(policy, rows, v, TAU, "bf16")
    assert all(torch.equal(a, b) for a, b in zip(before, policy.statistics(rows, TAU), strict=True))


def test_tf32_is_for_the_trunk_and_is_taken_back():
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(KeyError), computing_in("tf32", CPU):
        assert torch.get_float32_matmul_precision() == "high"
        with computing_in_full(CPU):
            assert torch.get_float32_matmul_precision() == "highest"
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_attention_in_bf16_rounds_products_and_not_what_all_keys_share(shift: float):
    generator = torch.Generator().manual_seed(0)
    B, H, J, T, D = 2, 4, 2, 13, 6
    shapes = (B, H, T, D), (B, J, T, D), (B, J, T, D)
    primal, tangent = (tuple(torch.randn(of, generator=generator) for of in shapes) for _ in range(2))
    shared = shift * torch.randn(D, generator=generator)
    primal, tangent = ((q, k + shared, v) for q, k, v in (primal, tangent))
    visible = VisibleKeys(causal_mask_function, B, T, T, "cpu")

    def along(*dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        of, by = ([x.to(*dtype) for x in xs] for xs in (primal, tangent))
        return jvp(lambda q, k, v: attention(q, k, v, 0.3, visible), tuple(of), tuple(by))

    exact = along(torch.float64)
    with computing_in("bf16", CPU):
        found = along(torch.float32)
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == torch.float32
        assert 1e-4 < float((ours - theirs).norm() / theirs.norm()) < 1e-2


@pytest.mark.parametrize("moving", [["x"], ["weight"], ["bias"], ["x", "weight", "bias"]])
def test_a_linear_layer_under_autocast_is_that_of_autocast(moving: list[str]):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 3, 4), "weight": (5, 4), "bias": (5,)}
    of, along = ({name: torch.randn(s, generator=generator) for name, s in shapes.items()} for _ in range(2))

    def layer(moved: dict[str, Tensor]) -> Tensor:
        at = of | moved
        return functional.linear(at["x"], at["weight"], at["bias"])

    primal, tangent = ({name: all_of[name] for name in moving} for all_of in (of, along))
    exact = jvp(layer, (primal,), (tangent,))
    with computing_in("bf16", CPU), DirectDerivatives():
        found = jvp(layer, (primal,), (tangent,))
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert 0 < float((ours - theirs).abs().max()) < 2**-7 * float(theirs.abs().max()) + 1e-2


# --- a sweep ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("less-exact")
    make_gpt2(root / "run" / "checkpoint-3")
    write_reward(root)
    return root


def asked(folder: Path, **sections: Any) -> dict[str, Any]:
    own: dict[str, Any] = {
        "policy": {"dtype": "float32"},
        "batch_config": {"E_total_sequences": 24, "B_U": 8},
        "update": {"reward": f"{folder / 'reward.py'}:share_of_low_digits"},
        "importance": {"etas": [0, 1], "estimators": ["per_decision", "path_integral"]},
    }
    for name, section in sections.items():
        own[name] = own.get(name, {}) | section
    return values(folder / "run", folder / "artifacts", **own)


@pytest.fixture(scope="module")
def swept(folder: Path) -> Iterator[tuple[Probe, Probe]]:
    """The same in full precision and in bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        yield probe(asked(folder)), probe(asked(folder, **BF16))


def by_place(found: Probe) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["normalization"], row["estimator"]): row for row in found.rows if row["eta"]}


def test_only_what_subtracts_nothing_is_computed_again(swept: tuple[Probe, Probe]):
    shards = 3
    expected = {"calibrate": 1, "first-order-e": shards, "path-integral": shards, "variance": 1, "report": 1}
    assert swept[1].run.was_computed == expected


def test_the_error_is_measured_and_is_part_of_the_intervals(swept: tuple[Probe, Probe]):
    """On all of this E, which has fewer sequences than are compared: the error is the difference of the two sweeps."""
    full, cheap = map(by_place, swept)
    for place, row in cheap.items():
        exact = full[place]
        assert (exact["arithmetic"], row["arithmetic"]) == ("full", "bf16")
        assert exact["derivative_check"] is None and exact["derivative_error"] is None
        assert 1e-4 < row["derivative_check"] < 0.1
        assert row["derivative_error"] == pytest.approx(row["delta_h1"] - exact["delta_h1"], rel=1e-6, abs=1e-12)
        assert 0 < row["derivative_error_se"] < 5 * row["derivative_check"] * exact["se_given_u"]
        assert row["se_given_u"] == pytest.approx(exact["se_given_u"], rel=0.05)
        numerical = row["derivative_error"] ** 2 + row["derivative_error_se"] ** 2
        width, sampled = (
            (of["this_update_high"] - of["this_update_low"]) / 2 / of["se_given_u"] for of in (row, exact)
        )
        assert (width / sampled) ** 2 == pytest.approx(1 + numerical / row["se_given_u"] ** 2, rel=1e-9)
        if place[1] == "path_integral":
            assert row["noise_floor"] == pytest.approx(2 * numerical**0.5) and exact["noise_floor"] == 0
        else:
            assert row["delta_h"] == exact["delta_h"] and row["noise_floor"] == exact["noise_floor"]
            assert min(row["curvature_se"], row["paired_difference_se"]) > numerical**0.5


def test_the_error_by_hand(swept: tuple[Probe, Probe]):
    """Σ_k ḣ_k + (R_k − b_k)ℓ̇_k of every sequence, from the columns of both sweeps; b_k the mean of the others."""
    full, cheap = (read_tokens(of.run.artifacts("first-order-e"), "dlogprobs", "dentropies") for of in swept)
    scores = read_tokens(swept[0].run.artifacts("score-e-batch"), "entropies")
    dl_K, dh_K = (cheap[name].double() - full[name].double() for name in ("dlogprobs", "dentropies"))
    bounds = list(zip(full.offsets_N1[:-1].tolist(), full.offsets_N1[1:].tolist(), strict=True))
    returns = []
    for start, stop in bounds:
        h_T = scores["entropies"][start:stop].double()
        returns.append(h_T.flip(0).cumsum(0).flip(0) - h_T)
    terms = []
    for i, (start, stop) in enumerate(bounds):
        for k in range(stop - start):
            others = [float(r_T[k]) for j, r_T in enumerate(returns) if j != i and len(r_T) > k]
            baseline = sum(others) / len(others) if others else 0.0
            advantage = float(returns[i][k]) - baseline
            terms.append((i, float(dh_K[start + k]) + advantage * float(dl_K[start + k])))
    of_sequences = torch.zeros(len(bounds), dtype=torch.float64)
    for i, term in terms:
        of_sequences[i] += term
    row = by_place(swept[1])["per_sequence", "per_decision"]
    assert row["derivative_error"] == pytest.approx(row["eta"] * float(of_sequences.mean()), rel=1e-6)
    expected_se = row["eta"] * float(of_sequences.std()) / len(bounds) ** 0.5
    assert row["derivative_error_se"] == pytest.approx(expected_se, rel=1e-6)


def test_calibrate_keeps_the_errors_of_the_tokens(swept: tuple[Probe, Probe]):
    [calibration] = swept[1].run.artifacts("calibrate")
    errors = read_tokens([calibration], "dlogprobs", "dentropies")
    full, cheap = (read_tokens(of.run.artifacts("first-order-e"), "dlogprobs", "dentropies") for of in swept)
    relative = []
    for name in ("dlogprobs", "dentropies"):
        # bit for bit up to the micro-batches, which are of other sequences
        torch.testing.assert_close(errors[name], (cheap[name] - full[name]).double(), rtol=0.1, atol=1e-5)
        relative.append(float(errors[name].norm() / full[name].norm()))
    assert calibration.summary["difference"] == pytest.approx(max(relative), rel=1e-3)
    assert calibration.summary["half_width"] == 0.0 and calibration.summary["arithmetic"] == "bf16"


def test_the_path_in_bf16_starts_from_exact_scores(swept: tuple[Probe, Probe]):
    """Its weights are exp Σ(ℓ' − ℓ): here a difference of 1e-3 to 1e-2 would be rounding."""
    full, cheap = map(by_place, swept)
    for normalization in ("per_token", "per_sequence"):
        row, exact = cheap[normalization, "path_integral"], full[normalization, "path_integral"]
        assert abs(row["delta_h"] - exact["delta_h"]) < 2 * row["derivative_check"] * abs(exact["delta_h"])
    names = [f"logprobs_{j}" for j in range(len(NODES))]
    there, exactly = (read_tokens(of.run.artifacts("path-integral"), *names) for of in swept)
    start = read_tokens(swept[0].run.artifacts("score-e-batch"), "logprobs")["logprobs"]
    for name in names:
        moved_K, error_K = (exactly[name] - start).double(), there[name] - exactly[name].double()
        assert float(error_K.norm()) < 0.1 * float(moved_K.norm())


def test_weights_up_to_the_nodes_integrate_polynomials_of_degree_two():
    for weights, node in zip(UP_TO_NODE, NODES, strict=True):
        for degree in range(3):
            found = sum(w * s**degree for w, s in zip(weights, NODES, strict=True))
            assert found == pytest.approx(node ** (degree + 1) / (degree + 1), rel=1e-14)


def test_the_report_says_what_it_costs(swept: tuple[Probe, Probe]):
    full, cheap = (of.result.report.path("report.md").read_text(encoding="utf-8") for of in swept)
    assert "How exact the derivatives are" not in full
    row = next(row for row in swept[1].rows if row["eta"])
    assert f"| checkpoint-3 | derivatives in bf16 | {row['derivative_check']:.1e} |" in cheap
    assert "its derivatives along the step in bf16" in cheap
    error = (row["derivative_error"] ** 2 + row["derivative_error_se"] ** 2) ** 0.5
    assert ("which is not small against its standard error" in cheap) == (error > 0.25 * row["se_given_u"])


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"arithmetic": "tf32"}, r"policy\.arithmetic is tf32, and the policy runs on a CPU"),
        ({"arithmetic": "bf16", "derivative": "central_difference"}, "a central difference subtracts passes"),
        ({"arithmetic": "bf16", "dtype": "float64"}, "for weights in float32"),
        ({"dtype": "bfloat16"}, r"ΔH is the difference of two passes.*policy\.arithmetic: bf16"),
        ({"arithmetic": "fp8"}, r"policy\.arithmetic"),
    ],
)
def test_what_would_be_rounding_is_refused(folder: Path, policy: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        probe(asked(folder, policy=policy))
