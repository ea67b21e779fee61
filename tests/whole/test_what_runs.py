"""What runs when a stage is computed is in its key: traced, function by function, over sweeps of all kinds.

The other way round it need not hold: what is reached may not run.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from lora_fixtures import make_base, make_lora
from pipeline_fixtures import make_gpt2, make_run, skip_figures, values, write_reward, write_rollouts

import entropy_core
from entropy_core.code.identity import code_of
from entropy_core.code.reached import GIVEN
from entropy_core.config.read import parse_config
from entropy_core.pipeline.catalogue import STAGES
from entropy_core.pipeline.preflight import preflight
from entropy_core.pipeline.runner import Inputs, Runner, direct_runner
from entropy_core.pipeline.sweep import execution_for, sweep
from entropy_core.policy.pretrained import load_policy
from entropy_core.store.artifact import Artifact
from entropy_core.store.store import Stage, Store

PACKAGE = Path(entropy_core.__file__).parent


def definition_of(code: CodeType) -> str:
    """`module:name` of the function or method that some code is, or is within; empty for code of others."""
    path = Path(code.co_filename)
    if not path.is_relative_to(PACKAGE):
        return ""
    module = ".".join([PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
    name = code.co_qualname.partition(".<locals>")[0]
    return f"{module}:{statement_at(path, code.co_firstlineno) if name == '<lambda>' else name}"


@cache
def statement_at(path: Path, line: int) -> str:
    """The name that a module gives to what it assigns at a line."""
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if statement.lineno <= line <= (statement.end_lineno or 0):
            target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
            return ast.unparse(target)
    raise AssertionError(f"no statement at {path}:{line}")


class Trace:
    """Notes which functions of the package run within a stage's function.

    What the store gives to the stage is none of its code, nor is what that calls, nor the import of a module.
    """

    def __init__(self) -> None:
        self.ran: dict[str, set[str]] = defaultdict(set)
        self._names: dict[int, tuple[CodeType, str]] = {}  # by id, since hashing code takes longer than all the rest

    def within(self, stage: Stage, compute: Callable[[], Any]) -> Any:
        self._stage, self._inside = stage, False
        load_policy.cache_clear()
        sys.settrace(self._note)
        try:
            return compute()
        finally:
            sys.settrace(None)

    def _name(self, code: CodeType) -> str:
        if id(code) not in self._names:
            self._names[id(code)] = code, definition_of(code)
        return self._names[id(code)][1]

    def _note(self, frame: FrameType, event: str, _: Any) -> Callable[..., None] | None:
        if frame.f_code is self._stage.function.__code__:
            self._inside, frame.f_trace_lines = True, False
            self._note_within(frame)
            return self._leave
        if self._inside:  # most of what runs does not: the store digests, reads and writes
            self._note_within(frame)
        return None

    def _leave(self, frame: FrameType, event: str, _: Any) -> None:
        self._inside = event != "return"  # which an exception that passes through is, too

    def _note_within(self, frame: FrameType) -> None:
        name, ran = self._name(frame.f_code), self.ran[self._stage.name]
        if not name or name in ran or name.endswith(":<module>"):
            return
        above: FrameType | None = frame
        while above is not None:
            its_name = self._name(above.f_code)
            if its_name.endswith(":<module>") or {its_name, its_name.rpartition(".")[0]} & GIVEN:
                return
            if above.f_code is self._stage.function.__code__:
                ran.add(name)
                return
            above = above.f_back


def traced(trace: Trace, values: Mapping[str, Any]) -> None:
    config = parse_config(values)
    checkpoints = preflight(config)
    store = Store(config.store_root)
    run = direct_runner(store, execution_for(config, checkpoints, lambda done, total: None))

    def tracing(stage: Stage, inputs: Inputs, label: str) -> Artifact:
        return trace.within(stage, lambda: run(stage, inputs, label))

    sweep(config, checkpoints, store, Runner(tracing))


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Trace:
    folder = tmp_path_factory.mktemp("traced")
    run, gpt2 = make_run(folder / "run"), make_gpt2(folder / "gpt2" / "checkpoint-3")
    make_lora(folder / "lora" / "checkpoint-3", make_base(folder / "base"))
    make_lora(folder / "lora" / "checkpoint-4", folder / "base")
    make_lora(folder / "folder" / "checkpoint-3", folder / "base", "folder")
    prompts = folder / "pool.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{n}+{n}=", "answer": "{n}"}}\n' for n in range(1, 9)))
    trace = Trace()
    for number, (checkpoint, sections) in enumerate(
        [
            (
                run / "checkpoint-3",
                {
                    "importance": {"etas": [0, 0.5, 1], "estimators": ["per_decision", "snis"]},
                    "interventions": [{"loss": "dapo"}, {"entropy_advantage": 0.4}, "dynamic_sampling", {"beta1": 0.5}],
                    "lab": {"measure": "best 1", "rehearse": {"steps": 2, "seeds": 1, "interventions": "none"}},
                    "price": True,
                },
            ),
            (
                run / "checkpoint-5",
                {
                    "policy": {"derivative": "central_difference"},
                    "batch_config": {"E_sampling_mode": "distinct", "B_E_values": [4], "E_replicates": 2},
                    "importance": {"etas": [0, 1], "estimators": ["path_integral"]},
                    "update": {"loss": "dr_grpo", "kl_beta": 0.1, "reference": str(run / "checkpoint-3")},
                    "generation": {"stop_strings": ["1"]},
                    "variance": {"baseline": "ridge"},
                    "price": True,
                },
            ),
            (
                gpt2,
                {
                    "batch_config": {"dataset_name": str(prompts), "max_prompt_length": 20},
                    "update": {"reward": write_reward(folder), "scale_rewards": "none", "max_grad_norm": 0.1},
                    "variance": {"baseline": "time_loo_weighted", "cluster": "prompt"},
                },
            ),
            (
                folder / "lora" / "checkpoint-3",
                {
                    "policy": {"dtype": "float32"},
                    "batch_config": {"U": {"from": str(write_rollouts(folder / "4.jsonl", advantage=0.5))}},
                    "update": {"kl_beta": 0.1, "loss": "reinforce"},
                    "post_mortem": True,
                },
            ),
            (
                folder / "folder" / "checkpoint-3",
                {
                    "variance": {"baseline": "none"},
                    "update": {"reward": "exact_match", "phase": {"follow": True, "minibatches": 2}},
                },
            ),
        ]
    ):
        with pytest.MonkeyPatch.context() as patch:
            if number:  # what draws has been traced by then, and takes most of the time
                skip_figures(patch)
            home = folder / f"artifacts-{number}"
            traced(trace, values(folder / "run", home, checkpoints=[str(checkpoint)], **sections))
    return trace


def test_every_stage_was_traced(trace):
    assert set(trace.ran) == {stage.name for stage in STAGES} - {"load-weights"}  # of weights in shards alone
    assert all(len(names) > 3 for names in trace.ran.values())
    assert "entropy_core.policy.derivatives:token_derivatives" in trace.ran["first-order-e"]
    assert "entropy_core.numerics.direct_derivatives:DirectDerivatives.__torch_function__" in trace.ran["first-order-e"]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_what_ran_counts(trace, stage):
    counts = set(code_of(stage.function).definitions)
    within_class = {name for name in trace.ran[stage.name] if name.count(".", name.index(":")) > 1}
    assert {name for name in trace.ran[stage.name] - within_class if name not in counts} == set()
