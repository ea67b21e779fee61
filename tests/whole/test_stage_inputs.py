"""What a stage takes: an artifact of another stage, a missing input or another type is refused before anything runs."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from pipeline_fixtures import Counting, gathered, make_run, probe, skip_figures, values, write_rollouts

from entropy_core.config.read import parse_config
from entropy_core.pipeline import catalogue
from entropy_core.pipeline.measure import Measurement
from entropy_core.pipeline.plan import plan
from entropy_core.pipeline.preflight import preflight
from entropy_core.pipeline.runner import Inputs, Runner, direct_runner
from entropy_core.pipeline.sweep import execution_for, sweep
from entropy_core.policy.spec import PolicySpec
from entropy_core.store.artifact import Artifact
from entropy_core.store.inputs import require_inputs
from entropy_core.store.store import Stage, Store


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    config = gathered(make_run(folder / "run") / "checkpoint-3") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.1}))
    return folder


def asked(home, store: str = "artifacts") -> dict[str, Any]:
    return values(
        home / "run",
        home / store,
        checkpoints=[str(home / "run" / "checkpoint-3")],
        policy={"derivative": "central_difference"},
        batch_config={"E_replicates": 2},
        update={"kl_beta": 0.1, "reference": str(home / "run" / "checkpoint-5")},
        importance={"etas": [0, 1], "estimators": ["per_decision", "path_integral"]},
        price=True,
        interventions=["positives_only"],
        lab={"measure": "best 1", "rehearse": {"steps": 1, "seeds": 1, "interventions": "none"}},
    )


@pytest.fixture(scope="module")
def swept(home) -> Counting:
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        done, recorded = probe(asked(home)).run, asked(home)
        rollouts = write_rollouts(home / "4.jsonl")
        recorded["batch_config"] = recorded["batch_config"] | {"U": {"from": str(rollouts)}}
        shutil.copytree(home / "run" / "checkpoint-5", home / "run" / "checkpoint-4")
        recorded["post_mortem"], recorded["lab"] = True, {"measure": "best 1"}
        recorded["update"] = recorded["update"] | {"phase": {"follow": True, "minibatches": 2}}
        done.asked += probe(recorded).run.asked
        return done


def with_strangers(value: Any) -> Iterator[Any]:
    """The same with one artifact after the other as if another stage had made it."""
    if isinstance(value, Artifact):
        yield replace(value, stage="another-stage")
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from (value | {name: other} for other in with_strangers(item))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from ([*value[:i], other, *value[i + 1 :]] for other in with_strangers(item))


@pytest.mark.parametrize("stage", catalogue.STAGES, ids=lambda stage: stage.name)
def test_a_stage_takes_what_it_is_given_in_a_sweep_and_nothing_else(swept, stage):
    inputs = swept.inputs(stage.name)
    require_inputs(stage, inputs)
    for name in inputs:
        with pytest.raises(TypeError, match=f"^{stage.name} is not given what it takes: {name}: Field required"):
            require_inputs(stage, {other: value for other, value in inputs.items() if other != name})
    with pytest.raises(TypeError, match="colour: Extra inputs are not permitted"):
        require_inputs(stage, inputs | {"colour": 1})
    strangers = list(with_strangers(inputs))
    assert len(strangers) > 0 or stage.name in ("load-checkpoint", "load-weights", "load-prompts")
    for others in strangers:
        with pytest.raises(TypeError, match="an artifact of another-stage, not of "):
            require_inputs(stage, others)


@pytest.mark.parametrize(
    ("stage", "changed", "message"),
    [
        (catalogue.SAMPLE_E, {"seed": "1"}, "seed: Input should be a valid integer"),
        (catalogue.SAMPLE_E, {"count": True}, "count: Input should be a valid integer"),
        (catalogue.SAMPLE_E, {"mode": "all"}, "mode: Input should be 'replacement' or 'distinct'"),
        (catalogue.SCORE_E, {"policy": {"weights": "a"}}, "policy.dtype: Field required"),
        (catalogue.IMPORTANCE, {"eta": "lr"}, "eta: Input should be a valid number"),
        (
            catalogue.VARIANCE,
            {"moved": [{"eta": 0.0, "eta_over_lr": 0.0, "shards": []}]},
            "moved.0.path: Field required",
        ),
        (catalogue.VARIANCE, {"baseline": "mean"}, "baseline: Input should be "),
    ],
)
def test_another_type_is_refused(swept, stage, changed, message):
    with pytest.raises(TypeError, match=message):
        require_inputs(stage, swept.inputs(stage.name) | changed)


def test_a_stage_that_is_wired_wrongly_is_found_when_the_sweep_is_planned(home, monkeypatch):
    """The scores of E in the place of those with other rounding errors: the same columns, and other numbers."""

    def scored(self: Measurement, e_batch: list[Artifact]) -> list[Artifact]:
        return self.stages.score(catalogue.SCORE_E, self.policy, e_batch)

    monkeypatch.setattr(Measurement, "_rescored", scored)
    config = parse_config(asked(home, "elsewhere"))
    with pytest.raises(TypeError, match=r"^variance is not given.*rescores.0: .*score-e-batch, not of rescore-e-batch"):
        plan(config, preflight(config), Store(config.store_root))
    assert not config.store_root.exists()


def test_a_policy_is_what_it_says_and_no_more():
    spec = PolicySpec(weights="a", dtype="float32", attn_implementation="eager", temperature=1.0)
    with pytest.raises(ValueError, match="frozen"):
        spec.temperature = 0.5
    for wrong in ({"temperature": 0.0}, {"dtype": "float16"}, {"attn_implementation": "sdpa"}, {"colour": 1}):
        with pytest.raises(ValueError, match="validation error"):
            PolicySpec(**(spec.model_dump() | wrong))


def test_a_runner_may_hand_shards_out_in_any_order(home, swept, monkeypatch):
    """A sweep is the same whichever shard is computed first; what depends on shards is asked for with `map`."""
    skip_figures(monkeypatch)

    handed_out = set()

    class Backwards(Runner):
        def map(self, stage: Stage, inputs: Sequence[Inputs], labels: Sequence[str]) -> list[Artifact]:
            handed_out.add(stage.name)
            done = {i: self(stage, inputs[i], labels[i]) for i in reversed(range(len(inputs)))}
            return [done[i] for i in range(len(inputs))]

    config = parse_config(asked(home, "backwards"))
    checkpoints = preflight(config)
    store = Store(config.store_root)
    runner = direct_runner(store, execution_for(config, checkpoints))
    result = sweep(config, checkpoints, store, Backwards(runner))
    assert result.report == swept.artifacts("report")[0]
    assert {"sample-e-batch", "score-e-batch", "first-order-e", "importance", "path-integral"} <= handed_out
