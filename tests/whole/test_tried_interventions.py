"""Interventions of a sweep: what the screen and the exact step say.

The oracle of the screen is the step of the optimizer taken again by hand, with the denominators of the run; that of the
prediction is the step of the optimizer with the changed gradient, `adamw.NextStep` by parameter.
"""

import pytest
import torch
from pipeline_fixtures import Probe, make_gpt2, probe, skip_figures, values, whole, write_reward

from entropy_core.checkpoints.optimizer_step import OptimizerStep
from entropy_core.errors import LossError
from entropy_core.losses import taken_steps
from entropy_core.losses.changed import AS_IT_IS, changed_by, excess_of, read_sensitivities
from entropy_core.losses.interventions import (
    InterventionSpec,
    asked_for,
)
from entropy_core.numerics import ragged, vectors
from entropy_core.numerics.block_estimates import Blocks
from entropy_core.numerics.halves import KINDS
from entropy_core.numerics.vectors import in_blocks, times
from entropy_core.policy.model import Coefficients
from entropy_core.policy.spec import policy_of
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.processor import processor_of
from entropy_core.sequences.token_sensitivities import token_sensitivities
from entropy_core.stages import predict
from entropy_core.store.artifact import Writer
from entropy_core.store.columns import read_tokens

TRIED = [
    {"loss": "dapo"},
    {"loss": "reinforce"},
    {"scale_rewards": "none"},
    {"entropy_coef": 0.05},
    {"top_entropy_quantile": 0.5},
    "positives_only",
    {"random": 0.3},
    {"drop_top_covariance": 0.1},
    {"drop_costliest": 0.1},
    {"entropy_advantage": 0.4},
    {"log_prob_advantage": 0.1},
    "dynamic_sampling",
    {"lr": 0.5},
    {"weight_decay": 0.0},
    {"beta1": 0.5},
    {"beta2": 0.5},
    {"max_grad_norm": 0.01},
]
OWN = """
def weights(batch):
    return 1.0 - (batch.logprobs_K.exp() > 0.05).double()


def broken(batch):
    return batch.logprobs_K[:-1]
"""


@pytest.fixture(scope="module")
def tried(tmp_path_factory) -> Probe:
    """A sweep over one checkpoint in float64, with every kind of intervention and one of the user's own."""
    home = tmp_path_factory.mktemp("interventions")
    make_gpt2(home / "run" / "checkpoint-3")
    (home / "own.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        return probe(
            values(
                home / "run",
                home / "artifacts",
                batch_config={"E_total_sequences": 32, "B_U": 8, "G": 4},
                update={"reward": write_reward(home), "max_grad_norm": 0.5},
                interventions=[*TRIED, f"{home / 'own.py'}:weights"],
                lab={"measure": "best 2"},
            )
        )


def oracle(tried: Probe, spec: InterventionSpec) -> tuple[dict, dict, dict]:
    """⟨∇, v'⟩ by kind: with the denominators and the clip factor of the run, and by the optimizer's own next step."""
    run = tried.run
    inputs = run.inputs("predict")
    policy = policy_of(inputs["policy"], run.execution)
    processor = processor_of(inputs["policy"], run.execution)
    update, checkpoint = inputs["update"], inputs["checkpoint"]
    table, excess_K = excess_of(inputs["scores_u"], inputs["discriminators_u"])
    (changed,) = changed_by([spec], run.execution, update, table, excess_K, inputs["sensitivities"])
    gradient, start = policy.new_accumulator(), 0
    for artifact in inputs["sequences_u"]:
        shard = read_sequences(artifact)
        stop = start + len(shard.response_tokens_K)
        for index_K, rows in processor.micro_batches(shard):
            weights = Coefficients(*(values_K[start:stop][index_K] for values_K in changed.coefficients))
            policy.add_gradients(rows, [weights], 1.0, [gradient])
        start = stop
    parameters = policy.named_parameters()
    norm = sum(float((g**2).sum()) for g in gradient.values()) ** 0.5
    largest = changed.altered.max_grad_norm
    clip = min(1.0, (0.5 if largest is None else largest) / (norm + 1e-6))
    exact = whole(
        OptimizerStep(checkpoint, run.execution, parameters, in_blocks(gradient), clip, changed.altered).part(
            "direction"
        ),
        parameters,
    )
    old = in_blocks(update.vector("gradient"))
    step = OptimizerStep(checkpoint, run.execution, parameters, old, update.summary["clip_factor"])
    parts = {name: whole(step.part(name), parameters) for name in ("momentum", "decay")}
    ones = in_blocks({name: torch.ones_like(parameter) for name, parameter in parameters.items()})
    parts["preconditioner"] = whole(step.applied("preconditioned", ones), parameters)
    factor = update.summary["clip_factor"]
    frozen = {
        name: factor * parts["preconditioner"][name] * g + parts["momentum"][name] + parts["decay"][name]
        for name, g in gradient.items()
    }
    gradient_of_e = run.inputs("half-sensitivities")["gradient"]
    covectors = {
        f"{kind}_{half}": whole(
            {b: gradient_of_e.vector(f"{kind}_{half}").block(b).double() for b in in_blocks(parameters)},
            parameters,
        )
        for kind in KINDS
        for half in (0, 1)
    }

    def dots(v):
        return {name: sum(float((w[of] * v[of]).sum()) for of in v) for name, w in covectors.items()}

    return dots(frozen), dots(exact), covectors


def test_the_screen_is_exact_for_frozen_denominators(tried):
    """On each half of E."""
    (artifact,) = tried.run.artifacts("screen")
    products = artifact.tensors("screen.safetensors")["product"]
    labels = [entry["label"] for entry in artifact.summary["interventions"]]
    assert labels[0] == "as it is" and len(labels) == len(TRIED) + 2
    for item in (None, {"loss": "dapo"}, {"entropy_coef": 0.05}, {"drop_costliest": 0.1}, {"entropy_advantage": 0.4}):
        spec = AS_IT_IS
        if item:
            ((name, value),) = asked_for(item)
            spec = InterventionSpec(name=name, value=value, seed=42)
        frozen, _, _ = oracle(tried, spec)
        for k, kind in enumerate(KINDS):
            for half in (0, 1):
                found = float(products[labels.index(spec.label), k, half])
                assert found == pytest.approx(frozen[f"{kind}_{half}"], rel=1e-10)


def test_a_prediction_beside_others_is_the_one_alone(tried, monkeypatch, tmp_path):
    """Those of `published` are together, the other named ones too; and a function of the user's is alone."""
    monkeypatch.setattr(vectors, "GRADIENT_BYTES", 0)  # room for one at a time
    monkeypatch.setattr(predict, "STEP_BYTES", 0)
    monkeypatch.setattr(predict, "FEWEST_STEPS", 1)
    asked = [inputs for name, inputs, _ in tried.run.asked if name == "predict"]
    assert [len(inputs["interventions"]) for inputs in asked] == [9, 9, 1]
    for inputs, artifact in zip(asked, tried.run.artifacts("predict"), strict=True):
        alone = predict.predict(Writer(tmp_path), tried.run.execution, **inputs)
        assert alone["blocks"] == artifact.summary["blocks"]
        for label, prediction in artifact.summary["predictions"].items():
            of_this = alone["predictions"][label]
            for name, together in (prediction | prediction["products"]).items():
                if name != "products":
                    assert (of_this | of_this["products"])[name] == pytest.approx(together, rel=1e-9), (label, name)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_what_changes_nothing_is_the_run_as_it_is_bit_for_bit(tried, tmp_path):
    """Whatever it is tried beside: else the difference of two roundings would be tested against itself."""
    found = []
    for inputs in (inputs for name, inputs, _ in tried.run.asked if name == "predict"):
        same = [InterventionSpec(name="weighted_positives", value=1.0), *inputs["interventions"]]
        found.append(predict.predict(Writer(tmp_path), tried.run.execution, **inputs | {"interventions": same}))
    as_it_is = next(of["predictions"] for of in found if "as it is" in of["predictions"])["as it is"]
    assert [of["predictions"]["weighted_positives: 1"] == as_it_is for of in found] == [True] * 3


def test_a_gradient_that_is_a_combination_of_others_has_no_pass_of_its_own(tried, monkeypatch, tmp_path):
    passes = []
    add = taken_steps.add_loss_gradients
    monkeypatch.setattr(
        taken_steps, "add_loss_gradients", lambda into, *rest: (passes.append(len(into)), add(into, *rest))
    )
    for inputs in (inputs for name, inputs, _ in tried.run.asked if name == "predict"):
        predict.predict(Writer(tmp_path), tried.run.execution, **inputs)
    assert passes == [5, 7, 1]  # of 9, 9 and 1


def test_responses_to_a_prompt_are_in_one_block(tried, tmp_path):
    inputs = [inputs for name, inputs, _ in tried.run.asked if name == "predict"][-1]
    found = predict.predict(Writer(tmp_path), tried.run.execution, **inputs | {"responses_per_prompt": 2})
    shards = [read_tokens([shard], "entropies") for shard in inputs["scores"]]
    of_each = [ragged.sequence_sum(shard["entropies"].double(), shard.offsets_N1) for shard in shards]
    lengths_N = torch.cat([ragged.lengths(shard.offsets_N1) for shard in shards])
    pairs_2B = torch.stack([torch.cat(of_each).view(16, 2).sum(1), lengths_N.view(16, 2).sum(1)])
    H_B = torch.tensor([block["H_tok"] for block in found["blocks"]]).double()
    torch.testing.assert_close(H_B, pairs_2B[0] / pairs_2B[1])


def test_the_prediction_is_the_step_of_the_optimizer(tried):
    """On every half of E, which is a mean of blocks."""
    artifacts = tried.run.artifacts("predict")
    predictions = {
        label: prediction for artifact in artifacts for label, prediction in artifact.summary["predictions"].items()
    }
    assert len(predictions) == len(TRIED) + 2
    sizes_B = Blocks.from_summaries(artifacts[0].summary["blocks"]).sequences_B
    assert sizes_B.tolist() == [2] * 16
    for item in (
        None,
        {"loss": "reinforce"},
        {"beta2": 0.5},
        {"max_grad_norm": 0.01},
        {"lr": 0.5},
        {"weight_decay": 0.0},
    ):
        spec = AS_IT_IS
        if item:
            ((name, value),) = asked_for(item)
            spec = InterventionSpec(name=name, value=value, seed=42)
        _, exact, _ = oracle(tried, spec)
        for kind, product_B in predictions[spec.label]["products"].items():
            for half in (0, 1):
                mean = sum(product_B[half::2]) / 8
                assert mean == pytest.approx(exact[f"{kind}_{half}"], rel=1e-10)
            assert len(set(product_B)) == 16


def test_the_run_as_it_is_agrees_with_the_sweep(tried):
    rows = tried.result.report.table("interventions.parquet").to_pylist()
    assert not any(value != value for row in rows for value in row.values())
    for of in tried.rows:
        if of["eta_over_lr"] != 1 or of["estimator"] != "per_decision":
            continue
        same = [r for r in rows if r["intervention"] == "as it is" and r["normalization"] == of["normalization"]]
        assert {r["level"] for r in same} == {"screen", "predict", "measure"}
        for row in same:
            if row["level"] == "measure":
                assert row["delta_h"] == pytest.approx(of["delta_h"], rel=1e-12)
            else:
                assert row["delta_h1"] == pytest.approx(of["inner_product"], rel=1e-9)
    halved = [r for r in rows if r["intervention"] == "lr: 0.5" and r["level"] == "predict"]
    run = [r for r in rows if r["intervention"] == "as it is" and r["level"] == "predict"]
    assert [r["delta_h1"] for r in halved] == [pytest.approx(r["delta_h1"] / 2) for r in run]


def test_an_intervention_of_the_users_own_is_keyed_by_its_file_and_checked(tried, tmp_path):
    rows = tried.result.report.table("interventions.parquet").to_pylist()
    own = next(r for r in rows if r["intervention"] == "weights" and r["level"] == "screen")
    assert own["difference"] != 0
    spec = next(s for s in tried.run.inputs("screen")["interventions"] if s.name == "weights")
    assert spec.source and "/" not in spec.name
    (tmp_path / "own.py").write_text(OWN)
    make_gpt2(tmp_path / "run" / "checkpoint-3")
    config = values(tmp_path / "run", tmp_path / "a", interventions=[f"{tmp_path / 'own.py'}:broken"])
    with pytest.raises(LossError, match=r"broken.*returned \[15\]"):
        probe(config)


def test_the_sensitivities_on_the_second_half_are_those_of_its_gradient(tried):
    """They are what the first half leaves of all of E, and forward mode along the second half gives the same."""
    (of_halves,) = tried.run.artifacts("half-sensitivities")
    inputs = tried.run.inputs("half-sensitivities")
    processor, update = processor_of(inputs["policy"], tried.run.execution), inputs["update"]
    parameters, clip = processor.policy.named_parameters(), update.summary["clip_factor"]
    blocks = in_blocks(parameters)

    def stored(artifact, name):
        return {block: artifact.vector(name).block(block).double() for block in blocks}

    step = OptimizerStep(inputs["checkpoint"], tried.run.execution, parameters, stored(update, "gradient"), clip)
    shards = [read_sequences(shard) for shard in inputs["sequences"]]
    for kind, pairs in read_sensitivities(of_halves).items():
        for half, pair in enumerate(pairs):
            covector = step.applied("preconditioned", stored(inputs["gradient"], f"{kind}_{half}"))
            expected = token_sensitivities(processor, shards, times(clip, covector))
            for found_K, expected_K in zip(pair, expected, strict=True):
                torch.testing.assert_close(found_K, expected_K, rtol=1e-9, atol=1e-12)
