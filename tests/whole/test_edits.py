"""A table of edits to this project, and which stages they make run again: these, and no others.

Every edit is made as text in a copy of the project. A line is found by what it says, wherever it stands.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from entropy_core.code.identity import code_at, name_of, read_from
from entropy_core.pipeline.catalogue import STAGES

ROOT = Path(__file__).resolve().parents[2]

SAMPLE = {"sample-e-batch", "sample-u-batch"}
SCORE = {"score-e-batch", "score-u-batch", "score-u-reference"}
CHANGED_STEP = {"predict", "altered-step", "phase-step", "rehearsal-step"}
FORWARD_MODE = {
    *("calibrate", "first-order-e", "first-order-u", "path-integral", "half-sensitivities", "reward-shares-u"),
}
BACKWARD = {
    *("compute-update", "entropy-gradient", "half-steps-u", "dropout-u", "reward-gradient"),
    *CHANGED_STEP,
}
MOVED = {"importance", "path-integral", "phase-step", "calibrate", "first-order-e"}  # the last by central differences
POLICY = (
    SAMPLE
    | SCORE
    | FORWARD_MODE
    | BACKWARD
    | {"rescore-e-batch", "discriminate-u", "importance", "recorded-u-batch", "real-step"}
)
STATISTICS = {"variance", "price", "phase", "rehearsal", "agreement", "interventions", "post-mortem", "report"}
REWARD = {"reward-u-batch", "reward-e-batch"}
OF_THE_LOSS = {"compute-update", "first-order-u", "half-steps-u", "screen"} | CHANGED_STEP


class Project:
    """A copy of the project, whose files can be edited."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "entropy_core"
        shutil.copytree(ROOT / "entropy_core", self.folder, ignore=shutil.ignore_patterns("__pycache__"))

    def codes(self) -> dict[str, str]:
        find = read_from(self.folder.parent)
        digests = {name: code_at(name, find).digest for name in {name_of(stage.function) for stage in STAGES}}
        return {stage.name: digests[name_of(stage.function)] for stage in STAGES}

    def file_with(self, text: str) -> Path:
        [path] = [path for path in self.folder.rglob("*.py") if text in path.read_text()]
        return path

    def edit(self, old: str, new: str, everywhere: bool = False) -> None:
        paths = [path for path in self.folder.rglob("*.py") if old in path.read_text()]
        assert paths if everywhere else len(paths) == 1 and paths[0].read_text().count(old) == 1, (old, paths)
        for path in paths:
            path.write_text(path.read_text().replace(old, new))

    def take(self, first: str, last: str) -> str:
        """Cut the lines from one that begins so to one that begins so, both included."""
        path = self.file_with(f"\n{first}")
        lines = path.read_text().splitlines(keepends=True)
        start = next(i for i, line in enumerate(lines) if line.startswith(first))
        stop = next(i for i, line in enumerate(lines[start:], start) if line.startswith(last)) + 1
        path.write_text("".join(lines[:start] + lines[stop:]))
        return "".join(lines[start:stop])


def replaces(old: str, new: str, everywhere: bool = False) -> Callable[[Project], None]:
    return lambda project: project.edit(old, new, everywhere)


def adds(before: str, lines: str) -> Callable[[Project], None]:
    return lambda project: project.edit(before, f"{lines}\n\n\n{before}")


def moves_a_function(project: Project) -> None:
    """`position_sum` goes to a module of its own, and is imported from there."""
    cut = project.take("def position_sum(", "    return torch.zeros(longest")
    ragged = project.file_with("def sequence_index(")
    (ragged.parent / "by_position.py").write_text(
        f"import torch\nfrom torch import Tensor\n\nfrom .ragged import lengths, position_index\n\n\n{cut}"
    )
    project.edit("ragged.position_sum(", "by_position.position_sum(", everywhere=True)
    for path in project.folder.rglob("*.py"):
        if "by_position.position_sum(" in path.read_text():
            text = path.read_text()
            first = text.index("\nfrom entropy_core")
            path.write_text(f"{text[:first]}\nfrom entropy_core.numerics import by_position{text[first:]}")


def renames_a_module(project: Project) -> None:
    """`verdicts` becomes `judgements`."""
    path = project.file_with("MATERIAL_CURVATURE =")
    path.rename(path.with_name("judgements.py"))
    project.edit("uncertainty, verdicts\n", "uncertainty, judgements as verdicts\n", everywhere=True)
    project.edit("numerics.verdicts import", "numerics.judgements import", everywhere=True)


class Edit(NamedTuple):
    apply: Callable[[Project], None]
    stages: set[str]


EDITS = {
    # what the policy computes
    "a forward-mode rule": Edit(
        replaces("return y, (x.to(y.dtype) * dx).mul_(2)", "return y, 2 * x.to(y.dtype) * dx"), FORWARD_MODE
    ),
    "attention in blocks": Edit(replaces("do += product(weights, dv", "do = do + product(weights, dv"), FORWARD_MODE),
    "which masks are computed in blocks": Edit(
        replaces("if attention_mask is not None or q_offset", "if q_offset"), FORWARD_MODE
    ),
    "which kernel the other passes use": Edit(replaces("if group > 1 and query", "if query"), POLICY),
    "the derivative of the token statistics": Edit(
        replaces("    def _jvp_of_rows(", "    def _jvp_of_rows(*_): ...\n\n    def _jvp_of_rows("),
        POLICY,
    ),
    "a constant of the scorer": Edit(replaces("HEAD_TOLERANCE = 5e-6", "HEAD_TOLERANCE = 6e-6"), POLICY),
    "a default argument": Edit(replaces("head_chunk_rows: int = 4096", "head_chunk_rows: int = 2048"), POLICY),
    "a decorator": Edit(replaces("@lru_cache(maxsize=1)\ndef load_policy", "@lru_cache\ndef load_policy"), POLICY),
    "a method that one stage uses": Edit(
        replaces("torch.where(up, torch.inf, -torch.inf)", "torch.where(up, 1e30, -1e30)"),
        {"rescore-e-batch"},
    ),
    "how the policy is moved": Edit(replaces(".mul_(eta).add_(start)", ".mul_(eta * 1.0).add_(start)"), MOVED),
    "the recomputation of activations": Edit(
        replaces("preserve_rng_state=self.model.training", "preserve_rng_state=True"), BACKWARD
    ),
    # sampling
    "a detail of the sampler": Edit(replaces("REFILL = 16", "REFILL = 32"), SAMPLE),
    "the random numbers": Edit(replaces("_ROUNDS = 10", "_ROUNDS = 12"), SAMPLE),
    "a keyword of the sampler": Edit(
        replaces("total_sequences: int, seed: int, first: int = 0", "total_sequences: int, seed: int, first: int = 1"),
        SAMPLE,
    ),
    # the update
    "a loss": Edit(
        replaces("(policy_gradient(batch)) / batch.lengths_N", "(policy_gradient(batch)) * 1.0 / batch.lengths_N"),
        OF_THE_LOSS,
    ),
    "an annotation": Edit(
        replaces(
            "def clip_factor(gradient_norm: float, max_norm: float)",
            "def clip_factor(gradient_norm: float, max_norm: object)",
        ),
        OF_THE_LOSS | {"dropout-u"},
    ),
    "a reward": Edit(replaces("[float(c.strip() == str(a).strip())", "[1.0 * (c.strip() == str(a).strip())"), REWARD),
    # what is read
    "a reader of a layout": Edit(
        replaces('PROGRESS_FILES = ("trainer_state.json",', 'PROGRESS_FILES = ("state.json",'),
        {"load-checkpoint", "load-weights"},
    ),
    "how shards are cut": Edit(
        replaces("part = -(-size // ranks)", "part = -(-size // ranks) + 0"),
        {"load-checkpoint", "load-weights", "compute-update", "first-order-u", "half-steps-u", "dropout-u"}
        | {"half-sensitivities", "real-step", "reward-shares-u"}
        | CHANGED_STEP,
    ),
    "how adapters are filled": Edit(
        replaces(
            "    set_peft_model_state_dict(model, load_adapter(directory))",
            "    set_peft_model_state_dict(model, dict(load_adapter(directory)))",
        ),
        POLICY,
    ),
    "which columns of rollouts are read": Edit(
        replaces('("prompt_ids", "prompt_token_ids",', '("prompt_ids", "ids", "prompt_token_ids",'),
        {"recorded-u-batch"},
    ),
    "how prompts become tokens": Edit(
        replaces("add_special_tokens=add_special_tokens)[", "add_special_tokens=add_special_tokens, padding=False)["),
        {"load-prompts"},
    ),
    # statistics
    "a statistic": Edit(replaces("((C - 1) / C * ((without_C", "((C - 1) * ((without_C"), {"variance"}),
    "a type in a module of statistics": Edit(
        replaces('Estimator = Literal["per_decision",', 'Estimator = Literal["mean", "per_decision",'),
        {"variance", "price", "phase", "interventions", "post-mortem"},
    ),
    "the formula of a baseline": Edit(
        adds("def time_loo_baseline(", "def time_totals(*_): ..."),
        {"entropy-gradient", "reward-gradient", "predict"}
        | {"variance", "price", "phase", "interventions", "post-mortem"},
    ),
    "a limit of a verdict": Edit(
        replaces("MATERIAL_CURVATURE = ", "MATERIAL_CURVATURE = 2 * "), {"variance", "report"}
    ),
    "the schema of a table": Edit(
        replaces(
            "LINEARITY = pa.schema(\n    [\n", "LINEARITY = pa.schema(\n    [\n        field('n', WHOLE, '', ''),\n"
        ),
        STATISTICS,
    ),
    "a sentence of the report": Edit(replaces("## Where the change comes from", "## Where it comes from"), {"report"}),
    # what runs on import
    "a statement that runs on import": Edit(
        adds("def offsets_from_lengths(", "torch.set_flush_denormal(True)"),
        POLICY | STATISTICS | {"screen"},
    ),
    # what changes nothing
    "an unused error class": Edit(
        adds("class RewardError(", 'class AnotherError(ProbeError):\n    """Another."""'), set()
    ),
    "a new function that nobody calls": Edit(
        adds("def sequence_sum(values_K: Tensor, offsets_N1", "def unused(x):\n    return x"), set()
    ),
    "a new method that nobody calls": Edit(
        replaces("    def limit_logits(", "    def unused(self): ...\n\n    def limit_logits("), set()
    ),
    "an import that nobody uses": Edit(
        replaces(
            "import torch\nfrom torch import Tensor\nfrom torch.utils.weak",
            "import json\nimport torch\nfrom torch import Tensor\nfrom torch.utils.weak",
        ),
        set(),
    ),
    "a comment": Edit(replaces("REFILL = 16  # rows", "REFILL = 16  # all rows"), set()),
    "a docstring": Edit(
        replaces('"""Return the length of each sequence, int64 [N]."""', '"""How long the sequences are."""'), set()
    ),
    "the layout of a line": Edit(
        replaces("    return offsets_N1.diff()", "    return (\n        offsets_N1.diff()\n    )"), set()
    ),
    "a function that was moved": Edit(moves_a_function, set()),
    "a module that was renamed": Edit(renames_a_module, set()),
    "a default of the configuration": Edit(
        replaces("temperature: float = Field(1.0,", "temperature: float = Field(0.9,"), set()
    ),
    "how the store verifies a file": Edit(
        replaces('is missing"\n    except NotAFileError', 'is gone"\n    except NotAFileError'), set()
    ),
    "a check before the sweep": Edit(
        replaces("def _check_batches(", "def _unused(): ...\n\n\ndef _check_batches("), set()
    ),
    "how a process of the user's code ends": Edit(replaces("LEAVING = 1.0", "LEAVING = 2.0"), set()),
    "what is said of a process of the user's code": Edit(
        replaces("def plain_text(text: str)", "def unused(): ...\n\n\ndef plain_text(text: str)"), set()
    ),
    "what is asked of a user's loss": Edit(
        replaces("for part, t in p._asdict().items()}))", "for part, t in list(p._asdict().items())}))"),
        {"compute-update", "half-steps-u", "screen"} | CHANGED_STEP,
    ),
    "what is asked of a user's reward": Edit(
        replaces("json.dumps(_called(name, responses))", "json.dumps(list(_called(name, *arguments)))"),
        REWARD,
    ),
    "what shows the progress": Edit(
        replaces("def halved(self)", "def third(self): ...\n\n    def halved(self)"), set()
    ),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    return Project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def before(project) -> dict[str, str]:
    return project.codes()


def test_the_copy_has_the_codes_of_the_project(before):
    find = read_from(ROOT)
    assert before == {stage.name: code_at(name_of(stage.function), find).digest for stage in STAGES}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edit_runs_exactly_the_stages_that_it_can_change(project, before, edit):
    origin = {path: path.read_bytes() for path in project.folder.rglob("*.py")}
    try:
        edit.apply(project)
        assert {path: path.read_bytes() for path in project.folder.rglob("*.py")} != origin
        after = project.codes()
    finally:
        for path in set(project.folder.rglob("*.py")) - origin.keys():
            path.unlink()
        for path, content in origin.items():
            path.write_bytes(content)
    assert {stage for stage in before if before[stage] != after[stage]} == edit.stages
