"""The floors of the house: imports go downwards only, and each heavy library has its own door.

A room is a package of entropy_core, or a module that lies beside them; `tasks` and `flows` are the two rooms on top.
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
from entropy_core.pipeline.catalogue import STAGES as CATALOGUE

ROOT = Path(__file__).parents[1]
PACKAGES = ("entropy_core", "flows", "tasks")
LONGEST = 450

FLOORS = (
    "errors",
    "numerics",
    "files",
    "isolation",
    "execution",
    "code",
    "store",
    "checkpoints",
    "policy",
    "sequences",
    "prompts",
    "rewards",
    "losses",
    "estimates",
    "report",
    "stages",
    "config",  # above the stages: what a stage reads of it is an input, and so in its key
    "training",  # in the process of a trainer, which the pipeline is not
    "pipeline",
    "workers",
    "demo",
    "tasks",
    "flows",
    "commands",
)
"""From the bottom up. A room imports from those below it, so no two rooms can import each other."""


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imported(name: str, tree: ast.AST) -> Iterator[str]:
    """Dotted names that a part of a module imports; an attribute of a module counts as the module."""
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dotted = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(dotted, package) if node.level else dotted
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


IMPORTS = {name: set(imported(name, tree)) for name, tree in TREES.items()}
AT_RUN_TIME = {
    name: {other for node in tree.body if not is_for_types(node) for other in imported(name, node)}
    for name, tree in TREES.items()
}
OURS = {name: {other for other in found if other.partition(".")[0] in PACKAGES} for name, found in IMPORTS.items()}
FOREIGN = {
    name: {other for other in found if other.partition(".")[0] not in {*PACKAGES, *sys.stdlib_module_names}}
    for name, found in IMPORTS.items()
}


def room(name: str) -> str:
    """The room of a module; a command, which nobody imports, is above all of them."""
    package, *inside = name.split(".")
    if name.endswith(".__main__"):
        return "commands"
    return inside[0] if package == "entropy_core" and inside else package


def floor(name: str) -> int:
    return FLOORS.index(room(name))


def reached(name: str) -> set[str]:
    """What a module loads of ours when it is run, itself included: by what it imports, and by what that imports."""
    found: set[str] = set()
    ahead = [name]
    while ahead:
        name = ahead.pop()
        if name in FILES and name not in found:
            found.add(name)
            ahead += AT_RUN_TIME[name]
    return found


def importers(*libraries: str) -> set[str]:
    """The modules that import one of these, or a submodule of one."""
    return {
        name
        for name, found in FOREIGN.items()
        if any(other == library or other.startswith(f"{library}.") for other in found for library in libraries)
    }


def core(*names: str) -> set[str]:
    return {f"entropy_core.{name}" for name in names}


STAGES = {name for name in FILES if name.startswith("entropy_core.stages.")}


def test_everything_was_read():
    assert {room(name) for name in FILES if name != "entropy_core"} <= set(FLOORS)
    some = {"entropy_core.policy.model", "entropy_core.stages.variance", "flows.entropy_probe", "tasks.stages"}
    assert some <= set(FILES)
    assert "entropy_core.numerics.ragged" in OURS["entropy_core.estimates.evaluation"]
    architecture = FOREIGN["entropy_core.checkpoints.architecture"]
    assert "transformers.trainer_pt_utils" in architecture  # imported inside a function
    assert "entropy_core.execution" in OURS["entropy_core.stages.rescore"]  # for the type checker only
    assert "entropy_core.execution" not in reached("entropy_core.stages.rescore")


def test_imports_go_downwards():
    upwards = [
        f"{name} imports {other}"
        for name, found in OURS.items()
        for other in found - {"entropy_core"}
        if name != "entropy_core" and floor(other) > floor(name)
    ]
    assert upwards == []


def test_no_import_goes_round_in_a_circle():
    """Within a room, too: somebody who reads a module never has to have read it before."""
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


def test_a_package_is_its_docstring():
    """So that a module loads what it imports and nothing else of the room that it is in.

    The whole package also has names for a notebook, which load what they need when they are used.
    """
    for name, path in FILES.items():
        if name.startswith("entropy_core.") and path.name == "__init__.py":
            assert ast.get_docstring(TREES[name]) and len(TREES[name].body) == 1, name


def test_the_numerics_know_torch_and_nothing_else():
    numerics = [name for name in FILES if room(name) == "numerics"]
    assert len(numerics) > 5
    for name in numerics:
        assert all(other.startswith("entropy_core.numerics") for other in OURS[name]), name
        assert {other.partition(".")[0] for other in FOREIGN[name]} <= {"torch"}, name


def test_the_errors_know_nothing():
    assert OURS["entropy_core.errors"] == FOREIGN["entropy_core.errors"] == set()


def test_each_file_of_the_stages_is_one_stage():
    """A function of the file's name that is given where to write and how to compute; and the catalogue has it."""

    def stages_in(name: str) -> list[str]:
        functions = [node for node in TREES[name].body if isinstance(node, ast.FunctionDef)]
        return [f.name for f in functions if [a.arg for a in f.args.args] == ["out", "execution"]]

    assert {name: stages_in(name) for name in STAGES} == {name: [name.rpartition(".")[2]] for name in STAGES}
    listed = OURS["entropy_core.pipeline.catalogue"] | OURS["entropy_core.pipeline.final_stages"]
    assert listed & STAGES == STAGES
    assert not any(OURS[name] & STAGES for name in STAGES)


def test_each_library_has_its_own_door():
    of_the_model = core(
        "policy.attention",
        "policy.blockwise",
        "policy.layer_split",
        "policy.merged",
        "policy.model",
        "policy.pretrained",
        "policy.scorer",
        "sequences.cache",
        "sequences.decoding",
    )
    of_the_checkpoint = core("checkpoints.tokenizer", "checkpoints.architecture", "checkpoints.schedule") | core(
        "prompts.templates"
    )
    of_the_demo = core("demo.run", "demo.smollm2", "demo.training_run")
    of_a_trainer = core("training")
    assert importers("transformers") == of_the_model | of_the_checkpoint | of_the_demo | of_a_trainer
    assert importers("psutil") == core("sequences.decoding", "isolation.guard") | {"flows.door"}
    assert importers("peft") == core("checkpoints.adapters", "demo.smollm2")
    assert importers("trl") == core("demo.training_run")
    assert importers("tokenizers") == core("demo.run")
    assert importers("datasets") == core("prompts.hub_datasets", "demo.training_run")
    assert importers("huggingface_hub") == core("files.hub_cache", "prompts.hub_datasets", "demo.training_run")
    assert importers("reasoning_gym") == core("prompts.reasoning_tasks")
    assert importers("math_verify") == core("rewards.math_answers")
    assert importers("ray") == core("workers.ray_actors")
    assert importers("markdown_it") == core("report.html")
    drawing = ("comparison_figure", "curves", "drawing", "figures", "frontier", "glyphs", "ratios")
    drawing += ("rehearsal_figure", "tokens_in_text")
    assert importers("matplotlib") == core(*(f"report.{name}" for name in drawing))
    assert importers("scipy") == core("estimates.distributions")
    assert importers("safetensors") == core(
        "store.artifact", "checkpoints.content", "losses.apart", "losses.token_weights"
    )
    assert importers("pyarrow.parquet") == core(
        *("store.artifact", "store.data_files", "prompts.files", "prompts.rollout_files", "training")
    ) | {
        "entropy_core.pipeline.comparison",
        "entropy_core.report.provenance",
        "entropy_core.report.recorded_run",
        "flows.growing_sweep",
    }
    assert importers("yaml") == core("config.plain_yaml")
    assert importers("prefect") == {name for name in importers("prefect") if room(name) in ("tasks", "flows")}
    assert importers("prefect") >= {"flows.entropy_probe", "tasks.stages", "tasks.artifact_cache"}


def test_nothing_is_imported_that_is_not_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [one for name in ("trl", "math", "ray", "reasoning-gym") for one in project["optional-dependencies"][name]]
    declared = [re.match(r"[\w-]+", one)[0] for one in project["dependencies"] + extras]
    imported_as = {"pyyaml": "yaml", "markdown-it-py": "markdown_it"}
    known = {imported_as.get(name, name.replace("-", "_")) for name in declared}
    used = {other.partition(".")[0] for found in FOREIGN.values() for other in found}
    of_theirs = {"numpy", "tokenizers", "huggingface_hub", "sqlalchemy", "uvicorn", "starlette", "typing_extensions"}
    assert used - known <= of_theirs  # of scipy, transformers, Prefect and pydantic


@pytest.mark.parametrize(
    "stage", ["variance", "price", "phase", "rehearsal", "agreement", "interventions", "post_mortem", "report"]
)
def test_the_statistics_reach_no_policy(stage):
    modules = reached(f"entropy_core.stages.{stage}")
    assert {"entropy_core.estimates.tables", f"entropy_core.stages.{stage}"} <= modules
    assert {room(name) for name in modules} <= {"errors", "numerics", "files", "store", "estimates", "report", "stages"}
    assert not {
        other for name in modules for other in FOREIGN[name] if other.partition(".")[0] in {"transformers", "prefect"}
    }


def test_what_handles_no_sequence_does_not_reach_the_policy():
    """So that an edit of the policy leaves the loaded checkpoints, the prompts and the rewards where they are."""
    without = {name for name in STAGES if not any(room(other) == "policy" for other in reached(name))}
    names = (
        *("load_checkpoint", "load_weights", "load_prompts", "reward"),
        *("screen", "variance", "price", "phase", "rehearsal", "agreement", "interventions", "post_mortem", "report"),
    )
    assert without == {f"entropy_core.stages.{name}" for name in names}


FORWARD_MODE = core(
    "policy.blockwise",
    "policy.derivatives",
    "sequences.derivatives",
    "numerics.blockwise_attention",
    "numerics.direct_derivatives",
)
MOVES = core("policy.moves", "sequences.moves")
STATISTICS = core("numerics.uncertainty", "numerics.importance", "numerics.linearity")
OPTIMIZER = core("numerics.adamw", "checkpoints.optimizer_state")
POOLS = core("prompts.pools", "rewards.functions")


@pytest.mark.parametrize(
    ("stages", "beyond"),
    [
        ("sample score discriminate", FORWARD_MODE | MOVES | STATISTICS | OPTIMIZER | POOLS),
        ("rescore importance", FORWARD_MODE | STATISTICS | OPTIMIZER | POOLS),
        ("entropy_gradient", FORWARD_MODE | MOVES | STATISTICS | OPTIMIZER | POOLS),
        ("compute_update half_steps_u dropout_u", FORWARD_MODE | MOVES | STATISTICS | POOLS),
        ("calibrate first_order_e first_order_u path_integral", STATISTICS | POOLS),
        ("load_checkpoint load_weights", FORWARD_MODE | MOVES | STATISTICS | POOLS),
        ("load_prompts reward", FORWARD_MODE | MOVES | STATISTICS | OPTIMIZER),
    ],
)
def test_a_stage_reaches_no_idea_that_is_not_its_own(stages, beyond):
    assert beyond <= set(FILES)
    for stage in stages.split():
        assert reached(f"entropy_core.stages.{stage}") & beyond == set(), stage


def test_a_key_holds_no_room_that_a_stage_has_no_use_for():
    """Neither the store and the files that it looks after, nor what comes before or after a stage in a sweep.

    What is given to a stage is no part of its code: an artifact, and where to write.
    """
    for stage in CATALOGUE:
        modules = {name.partition(":")[0] for name in code_of(stage.function).definitions}
        around = {"execution", "isolation", "code", "config", "pipeline"}
        assert not {room(name) for name in modules} & around, stage.name
        assert not modules & core("store.store", "store.manifest", "files.sources", "files.digests"), stage.name


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
import entropy_core.pipeline.sweep, entropy_core.demo.run
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
