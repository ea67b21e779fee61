"""The floors of the house: imports go downwards only, and each heavy library has its own door.

Imports are read from the syntax trees, those inside functions and `if TYPE_CHECKING:` included, so nothing hides.
"""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from entropy_core.code.identity import code_of
from entropy_core.code.reached import GIVEN
from entropy_core.pipeline.catalogue import STAGES
from entropy_core.store.store import Stage

ROOT = Path(__file__).parents[1]
PACKAGES = ("entropy_core", "flows", "tasks")
LONGEST = 450


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imported(name: str) -> Iterator[str]:
    """Dotted names that a module imports; an attribute of a module counts as the module."""
    path = FILES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dotted = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(dotted, package) if node.level else dotted
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base


IMPORTS = {name: set(imported(name)) for name in FILES}
OURS = {name: {other for other in found if other.partition(".")[0] in PACKAGES} for name, found in IMPORTS.items()}
FOREIGN = {
    name: {other for other in found if other.partition(".")[0] not in {*PACKAGES, *sys.stdlib_module_names}}
    for name, found in IMPORTS.items()
}

FLOORS = ("errors", "numerics", "core", "stages", "tasks", "flows")


def floor(name: str) -> int:
    if name == "entropy_core.errors":
        return FLOORS.index("errors")
    for prefix, its_floor in (("entropy_core.numerics", "numerics"), ("entropy_core.stages", "stages")):
        if name == prefix or name.startswith(f"{prefix}."):
            return FLOORS.index(its_floor)
    return FLOORS.index({"entropy_core": "core"}.get(name.partition(".")[0], name.partition(".")[0]))


def importers(*libraries: str) -> set[str]:
    """The modules that import one of these, or a submodule of one."""
    return {
        name
        for name, found in FOREIGN.items()
        if any(other == library or other.startswith(f"{library}.") for other in found for library in libraries)
    }


def core(*names: str) -> set[str]:
    return {f"entropy_core.{name}" for name in names}


def test_every_floor_was_read():
    assert {floor(name) for name in FILES} == set(range(len(FLOORS)))
    assert {"entropy_core.policy", "entropy_core.stages.variance", "flows.entropy_probe", "tasks.stages"} <= set(FILES)
    assert "entropy_core.numerics.ragged" in OURS["entropy_core.estimates.evaluation"]
    assert (
        "transformers.trainer_pt_utils" in FOREIGN["entropy_core.checkpoints.architecture"]
    )  # imported inside a function
    assert "entropy_core.execution" in OURS["entropy_core.stages.rescore"]  # for the type checker only


def test_imports_go_downwards():
    upwards = [(name, other) for name, found in OURS.items() for other in found if floor(other) > floor(name)]
    assert upwards == []


def test_no_import_goes_round_in_a_circle():
    """Within a floor, too: somebody who reads a module never has to have read it before."""
    below: dict[str, set[str]] = {}

    def visit(name: str, above: tuple[str, ...]) -> set[str]:
        assert name not in above, " → ".join((*above[above.index(name) :], name))
        if name not in below:
            below[name] = set()
            for other in OURS[name] - {name.rpartition(".")[0]}:
                below[name] |= {other} | visit(other, (*above, name))
        return below[name]

    for name in FILES:
        visit(name, ())


def test_the_numerics_know_torch_and_nothing_else():
    numerics = [name for name in FILES if floor(name) == FLOORS.index("numerics")]
    assert len(numerics) > 5
    for name in numerics:
        assert all(other.startswith("entropy_core.numerics") for other in OURS[name]), name
        assert {other.partition(".")[0] for other in FOREIGN[name]} <= {"torch"}, name


def test_the_errors_know_nothing():
    assert OURS["entropy_core.errors"] == FOREIGN["entropy_core.errors"] == set()


def test_each_library_has_its_own_door():
    of_the_model = core("policy", "pretrained", "scorer", "decoding", "tokenizer", "architecture")
    assert importers("transformers") == of_the_model | core("demo", "smollm2", "training_run")
    assert importers("psutil") == core("decoding") | {"flows.door"}
    assert importers("peft") == core("adapters", "smollm2")
    assert importers("trl") == core("training_run")
    assert importers("tokenizers") == core("demo")
    assert importers("datasets") == core("hub_datasets", "training_run")
    assert importers("huggingface_hub") == core("hub_datasets", "training_run")
    assert importers("reasoning_gym") == core("reasoning_tasks")
    assert importers("math_verify") == core("math_answers")
    assert importers("matplotlib") == core("figures", "tokens_in_text")
    assert importers("arviz_stats", "numpy") == core("pareto")
    assert importers("scipy") == core("estimates", "diagnostics")
    assert importers("safetensors") == core("artifact", "checkpoint_content")
    assert importers("pyarrow.parquet") == core("artifact", "manifest", "prompt_files") | {"flows.results"}
    assert importers("yaml") == core("plain_yaml")
    assert importers("prefect") == {name for name in importers("prefect") if floor(name) >= FLOORS.index("tasks")}
    assert importers("prefect") >= {"flows.entropy_probe", "tasks.stages", "tasks.artifact_cache"}


def test_nothing_is_imported_that_is_not_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [one for name in ("trl", "math", "reasoning-gym") for one in project["optional-dependencies"][name]]
    declared = [re.match(r"[\w-]+", one)[0] for one in project["dependencies"] + extras]
    known = {"yaml" if name == "pyyaml" else name.replace("-", "_") for name in declared}
    used = {other.partition(".")[0] for found in FOREIGN.values() for other in found}
    come_along = {"numpy", "tokenizers", "huggingface_hub", "uvicorn", "starlette"}  # scipy, transformers, Prefect
    assert used - known <= come_along


def reached(stage: Stage) -> set[str]:
    """The modules of which a stage reaches anything."""
    return {name.partition(":")[0] for name in code_of(stage.function).definitions}


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage.name in ("variance", "report")])
def test_the_statistics_reach_no_policy(stage):
    assert f"entropy_core.stages.{stage.name}" in reached(stage)
    assert not reached(stage) & core("policy", "sequence_processor", "checkpoints", "stages.sequences", "arithmetic")
    assert not {
        other
        for name in reached(stage)
        for other in FOREIGN[name]
        if other.partition(".")[0] in {"transformers", "prefect"}
    }


def test_what_handles_no_sequence_does_not_reach_the_policy():
    """So that an edit of the policy leaves the loaded checkpoints, the prompts and the rewards where they are."""
    without = {stage.name for stage in STAGES if "entropy_core.policy" not in reached(stage)}
    assert without == {"load-checkpoint", "load-prompts", "reward-u-batch", "variance", "report"}


def test_no_stage_reaches_what_it_has_no_use_for():
    """The store and the sources that it looks after, and what comes before or after a stage in a sweep."""
    no_use = core("store", "manifest", "sources", "code_identity", "config", "execution")
    no_use |= core("stages.pipeline", "stages.measure", "stages.preflight", "stages.memory")
    assert not {stage.name: found for stage in STAGES if (found := reached(stage) & no_use)}
    sampling = reached(next(stage for stage in STAGES if stage.name == "sample-e-batch"))
    assert not sampling & core("numerics.direct_derivatives", "numerics.uncertainty", "stages.derivatives")
    backward = reached(next(stage for stage in STAGES if stage.name == "entropy-gradient"))
    assert not backward & core("estimates", "evaluation", "numerics.bootstrap", "stages.variance")


def test_what_the_store_gives_to_a_stage_is_where_the_digest_looks_for_it():
    for name in GIVEN:
        module, _, attribute = name.partition(":")
        assert getattr(importlib.import_module(module), attribute).__module__ == module


def test_what_a_process_loads():
    """The statistics load no model library, and all of the core no orchestration; in a process of its own."""
    script = """
import sys
def loaded(): print(*sorted({name.partition(".")[0] for name in sys.modules}))
import entropy_core.stages.variance, entropy_core.stages.report
loaded()
import entropy_core.pipeline.sweep, entropy_core.demo
loaded()
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    statistics, core_modules = (set(line.split()) for line in result.stdout.splitlines())
    assert "torch" in statistics and "matplotlib" not in statistics  # which is loaded to draw
    assert not statistics & {"transformers", "tokenizers", "prefect", "flows", "tasks"}
    assert {"torch", "transformers"} <= core_modules
    assert not core_modules & {"prefect", "flows", "tasks", "trl", "datasets", "math_verify", "reasoning_gym"}


def test_no_file_is_too_long_to_read():
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}
