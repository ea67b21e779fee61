"""Files from outside the store that are written while stages read them: every number kept is that of its key."""

import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from pipeline_fixtures import make_run, probe, skip_figures, values, write_reward

from entropy_core.errors import CheckpointError, ConfigError, ProbeError
from entropy_core.execution import Execution
from entropy_core.files.digests import file_digest
from entropy_core.files.sources import stamps
from entropy_core.policy.pretrained import load_policy
from entropy_core.policy.spec import PolicySpec
from entropy_core.store.store import Stage, Store

REPLACEMENTS = 25
OF_EACH_FILE = 50
POOL = "".join(f'{{"prompt": "{n}+{n}=", "answer": "{n}"}}\n' for n in range(1, 9))


@pytest.fixture(autouse=True)
def _without_figures(monkeypatch):
    skip_figures(monkeypatch)


@pytest.fixture(scope="module")
def variants(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Of every file that a stage reads, two: those of checkpoint-3, and others of the same size."""
    folder = tmp_path_factory.mktemp("variants")
    run = make_run(folder / "run")
    found = {
        name: (run / "checkpoint-3" / name, run / "checkpoint-5" / name)
        for name in ("optimizer.pt", "model.safetensors")
    }
    for name, one, other in [
        ("reward.py", Path(write_reward(folder).rpartition(":")[0]).read_text(), ("01234", "56789")),
        ("pool.jsonl", POOL, ("1+1", "1+2")),
        ("generation_config.json", (run / "checkpoint-3" / "generation_config.json").read_text(), ("1", "2")),
        ("config.json", (run / "checkpoint-3" / "config.json").read_text(), ("1e-06", "1e-02")),
        ("trainer_state.json", (run / "checkpoint-3" / "trainer_state.json").read_text(), (": 3", ": 4")),
        (
            "tokenizer.json",
            (run / "checkpoint-3" / "tokenizer.json").read_text(),
            ('"0": 2', '"1": 2', '"1": 3', '"0": 3'),
        ),
        ("tokenizer_config.json", (run / "checkpoint-3" / "tokenizer_config.json").read_text(), ("left", "right")),
    ]:
        paths = folder / f"one-{name}", folder / f"other-{name}"
        paths[0].write_text(one)
        assert other[0] in one
        exchanged = dict(zip(other[::2], other[1::2], strict=True))  # all at once: two tokens never have the same id
        paths[1].write_text(
            re.sub("|".join(map(re.escape, exchanged)), lambda found, new=exchanged: new[found[0]], one)
        )
        assert paths[0].read_text() != paths[1].read_text()
        found[name] = paths
    return found


class Sweeps:
    """Sweeps of one checkpoint, whose files can be replaced."""

    def __init__(self, folder: Path, variants: dict[str, tuple[Path, Path]]) -> None:
        self.folder, self.variants = folder, variants
        origin = variants["optimizer.pt"][0].parent
        shutil.copytree(origin, folder / "checkpoint-3")
        for name in ("reward.py", "pool.jsonl"):
            shutil.copyfile(variants[name][0], folder / name)

    def path(self, name: str) -> Path:
        return self.folder / name if name in ("reward.py", "pool.jsonl") else self.folder / "checkpoint-3" / name

    def settings(self, store: str) -> dict[str, Any]:
        return values(
            self.folder,
            self.folder / store,
            checkpoints=[str(self.folder / "checkpoint-3")],
            batch_config={"dataset_name": str(self.folder / "pool.jsonl")},
            update={"reward": f"{self.folder / 'reward.py'}:share_of_low_digits"},
        )

    def put(self, name: str, variant: int, how: str = "in place") -> None:
        """Write a file anew in its place, or put another one there."""
        path, source = self.path(name), self.variants[name][variant]
        if how == "in place":
            with path.open("r+b") as file:
                file.write(source.read_bytes())
                file.truncate()
        else:
            shutil.copyfile(source, path.with_name(".new"))
            os.utime(path.with_name(".new"), ns=(0, 0))
            path.with_name(".new").replace(path)


def contents(store: Path) -> dict[tuple[str, str], str]:
    return {(artifact.stage, artifact.key): artifact.digest for artifact in Store(store).ls()}


@pytest.fixture
def sweeps(tmp_path, variants) -> Sweeps:
    return Sweeps(tmp_path, variants)


NAMES = ("optimizer.pt", "model.safetensors", "reward.py", "pool.jsonl", "generation_config.json")


def test_replacements_at_random_moments_leave_no_wrong_number(sweeps):
    """Against sweeps of every combination of the files, undisturbed: what is under one key is the same."""
    expected: dict[tuple[str, str], str] = {}
    for choice in product((0, 1), repeat=len(NAMES)):
        if sum(choice) <= 1 or choice in ((1, 1, 0, 0, 0), (0, 1, 0, 0, 1)):
            for name, variant in zip(NAMES, choice, strict=True):
                sweeps.put(name, variant)
            probe(sweeps.settings("undisturbed"))
    expected = contents(sweeps.folder / "undisturbed")
    for name in NAMES:
        sweeps.put(name, 0)

    replaced, refused = disturbed(sweeps, NAMES, expected, random.Random(3), REPLACEMENTS)
    assert refused and replaced == REPLACEMENTS  # how often depends on the speed of the machine
    final = probe(sweeps.settings("disturbed"))
    assert final.rows and contents(sweeps.folder / "disturbed").items() <= expected.items()


def disturbed(
    sweeps: Sweeps, names: Sequence[str], expected: dict[tuple[str, str], str], chance: random.Random, times: int
) -> tuple[int, int]:
    """Sweep again and again while files are replaced and put back; how often that was done, and refused to go on."""
    done, replaced, refused = threading.Event(), [], 0

    def disturb() -> None:
        while len(replaced) < times:
            time.sleep(chance.uniform(0.0, 0.25))
            name, how = chance.choice(names), chance.choice(("in place", "another file"))
            sweeps.put(name, 1, how)
            time.sleep(chance.choice((0.0, 0.01, 0.05, 0.2)))
            sweeps.put(name, 0, chance.choice(("in place", "another file")))
            replaced.append(name)
        done.set()

    disturber = threading.Thread(target=disturb)
    disturber.start()
    try:
        while not done.is_set():
            shutil.rmtree(sweeps.folder / "disturbed" / "variance", ignore_errors=True)
            try:
                probe(sweeps.settings("disturbed"))
            except ProbeError:
                refused += 1
            found = contents(sweeps.folder / "disturbed")
            assert {key: found[key] for key in found.keys() & expected} == {
                key: expected[key] for key in found.keys() & expected
            }
            if chance.random() < 0.3:
                shutil.rmtree(sweeps.folder / "disturbed", ignore_errors=True)
    finally:
        disturber.join()
    return len(replaced), refused


@pytest.mark.chaos
@pytest.mark.attack("a file that a stage reads is replaced, and put back, at a random moment of a sweep: each of nine")
@pytest.mark.parametrize(
    "name", [*NAMES, "config.json", "tokenizer.json", "tokenizer_config.json", "trainer_state.json"]
)
def test_fifty_replacements_of_each_file_leave_no_wrong_number(sweeps, name, record_property):
    for variant in (1, 0):
        sweeps.put(name, variant)
        probe(sweeps.settings("undisturbed"))
    expected = contents(sweeps.folder / "undisturbed")
    replaced, _ = disturbed(sweeps, [name], expected, random.Random(name), OF_EACH_FILE)
    final, undisturbed = probe(sweeps.settings("disturbed")), probe(sweeps.settings("undisturbed"))
    assert final.rows == undisturbed.rows
    record_property("tries", replaced)


@contextmanager
def during(monkeypatch, where: str, before: Callable[[], None], after: Callable[[], None]) -> Iterator[None]:
    """Do something right before and right after a stage reads something."""
    module, _, name = where.rpartition(".")
    real = getattr(__import__(module, fromlist=[name]), name)

    def disturbed(*arguments, **keywords):
        before()
        try:
            return real(*arguments, **keywords)
        finally:
            after()

    with monkeypatch.context() as patch:
        patch.setattr(where, disturbed)
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, variants) -> tuple[list[dict[str, Any]], dict[tuple[str, str], str]]:
    """The rows of a sweep that nobody disturbs, and what it leaves in its store."""
    sweeps = Sweeps(tmp_path_factory.mktemp("undisturbed"), variants)
    load_policy.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        return probe(sweeps.settings("artifacts")).rows, contents(sweeps.folder / "artifacts")


READING = {
    "optimizer.pt": ("load-checkpoint", "entropy_core.stages.load_checkpoint.read_checkpoint", CheckpointError),
    "model.safetensors": ("sample-e-batch", "entropy_core.policy.spec.load_policy", CheckpointError),
    "generation_config.json": ("sample-e-batch", "entropy_core.policy.spec.load_policy", CheckpointError),
    "pool.jsonl": ("load-prompts", "entropy_core.stages.load_prompts.load_pool", ConfigError),
    "reward.py": ("reward-u-batch", "entropy_core.stages.reward.compute_rewards", ConfigError),
}


@pytest.mark.parametrize(("name", "how"), [*zip(READING, ["in place", "another file"] * 3, strict=False)])
def test_a_file_that_is_put_back_after_it_was_read_is_noticed(sweeps, undisturbed, monkeypatch, name, how):
    """The worst moment: other content exactly while it is read, and the old one before anybody looks again."""
    stage, where, kind = READING[name]
    load_policy.cache_clear()
    noticed = pytest.raises(kind, match=f"changed while {stage} read them, so nothing of it is kept")
    with noticed, during(monkeypatch, where, lambda: sweeps.put(name, 1, how), lambda: sweeps.put(name, 0, how)):
        probe(sweeps.settings("artifacts"))
    assert not list((sweeps.folder / "artifacts" / stage).iterdir())
    done = probe(sweeps.settings("artifacts"))  # in the same process, which has loaded the policy of other files
    rows, stored = undisturbed
    assert done.rows == rows
    assert contents(sweeps.folder / "artifacts") == stored


@pytest.mark.parametrize("how", ["in place", "another file"])
def test_a_file_that_is_another_one_only_while_a_sweep_is_checked_is_noticed(sweeps, undisturbed, monkeypatch, how):
    """The notes would say of the optimizer what holds for another one: no stage reads it again for them."""
    noticed = pytest.raises(CheckpointError, match="checkpoint-3 changed while it was checked")
    put = [partial(sweeps.put, "optimizer.pt", variant, how) for variant in (1, 0)]
    with noticed, during(monkeypatch, "entropy_core.pipeline.usable.read_checkpoint", *put):
        probe(sweeps.settings("artifacts"))
    assert not (sweeps.folder / "artifacts").exists() or not contents(sweeps.folder / "artifacts")
    assert probe(sweeps.settings("artifacts")).rows == undisturbed[0]


def test_a_name_of_a_file_that_is_deleted_while_a_sweep_is_checked_is_no_change(sweeps, undisturbed, monkeypatch):
    """As when a trainer deletes a checkpoint that is held by links."""
    held, other = sweeps.path("optimizer.pt"), sweeps.folder / "name-of-the-trainer"
    os.link(held, other)
    before = held.stat().st_ctime_ns
    with during(monkeypatch, "entropy_core.pipeline.usable.read_checkpoint", lambda: None, partial(other.unlink, True)):
        assert probe(sweeps.settings("artifacts")).rows == undisturbed[0]
    assert held.stat().st_ctime_ns > before


@pytest.mark.parametrize("name", READING)
def test_a_file_that_stays_another_one_is_noticed(sweeps, monkeypatch, name):
    stage, where, kind = READING[name]
    load_policy.cache_clear()
    noticed = pytest.raises(kind, match="changed after the sweep had begun")
    with noticed, during(monkeypatch, where, lambda: sweeps.put(name, 1), lambda: None):
        probe(sweeps.settings("artifacts"))
    assert not list((sweeps.folder / "artifacts" / stage).iterdir())


def read(out, execution, *, upstream):
    return {"text": next(iter(execution.paths.values())).read_text()}


def name_a_file(out, execution, *, digest):
    return {"file": digest}


def test_files_that_the_summary_of_an_input_names_count_too(tmp_path):
    """Such as the optimizer's file, which load-checkpoint leaves where it is."""
    path = tmp_path / "file"
    path.write_text("one")
    digest = file_digest(path)
    store, execution = Store(tmp_path / "store"), Execution(paths={digest: path})
    named = store.run(Stage("name", name_a_file), execution, {"digest": digest})
    path.write_text("two")
    with pytest.raises(ConfigError, match="changed after the sweep had begun"):
        store.run(Stage("read", read), execution, {"upstream": named})
    path.write_text("one")
    assert store.run(Stage("read", read), execution, {"upstream": named}).summary == {"text": "one"}


def test_a_file_is_looked_after_wherever_its_digest_is_among_the_inputs(tmp_path):
    """Also in a model, such as the policy of a stage or its loss."""
    path = tmp_path / "reward.py"
    path.write_text("def reward(): ...\n")
    digest = file_digest(path)
    policy = PolicySpec(weights="w", base=digest, dtype="float32", attn_implementation="eager", temperature=1.0)
    for inputs in (digest, [digest], {"a": {"b": [digest]}}, {"policy": policy}, {"policies": [policy]}):
        assert list(stamps(inputs, {digest: path})) == [path]
    assert stamps({"policy": policy.model_copy(update={"base": ""})}, {digest: path}) == {}
