"""Rewards and losses that do what they should not: each ends, in a result or in one error, and nothing of it stays.

After each of them the process is what it was, no process is left, and the stage of a benign function that returns the
same values makes the same artifact, bit for bit.
"""

import gc
import os
import random
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import hostile_code
import psutil
import pyarrow as pa
import pytest
import torch
from hostile_code import EITHER, FINE, TIME
from test_losses import along, batch_of

from entropy_core.errors import ConfigError, LossError, ProbeError, RewardError
from entropy_core.execution import Execution
from entropy_core.files.digests import file_digest
from entropy_core.isolation.process import Isolation
from entropy_core.losses import apart
from entropy_core.numerics import losses
from entropy_core.rewards.spec import RewardSpec
from entropy_core.stages.reward import reward
from entropy_core.store.artifact import Artifact
from entropy_core.store.store import Stage, Store

RESPONSES = ["2", " 5 ", "seven"]
VALUES = [len(response) / 7 for response in RESPONSES]
LIMITS = Isolation(seconds=60.0, gigabytes=0.4)
"""For those that are to end by themselves, or by another limit: on a busy machine that takes its time."""
REWARDS = hostile_code.rewards()
SOME = [
    *("loops", "a power that takes hours, in C", "leaves with 0", "kills itself", "kills its parent", "exits"),
    *("a large array", "prints for ever", "garbage into the channel", "everything closed", "changes the environment"),
    *("changes a daemon", "changes a fork that comes back", "changes an exit that hangs", "returns a generator"),
    *("returns a number that is none", "returns a zero with a sign", "JSON, deeply"),
]
LIMITS_OF_LOSSES = Isolation(seconds=60.0, gigabytes=1.0)
SOME_LOSSES = ("leaves", "hangs when it is differentiated", "answers with a NaN", "changes torch")


def tables(out, execution, *, rows):
    out.table(pa.table({"sequence_id": [0, 1, 2], "prompt_id": [0, 1, 0], **rows}), "sequences.parquet")
    out.table(pa.table({"prompt": ["1+1=", "2+3="], "answer": ["2", "5"]}), "prompts.parquet")
    tokens, offsets = torch.arange(3), torch.arange(4)
    out.tensors({"response_tokens": tokens, "response_offsets": offsets}, "tokens.safetensors")
    return {}


class Rewarded:
    """The stage of a reward, on three responses."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, Store(folder / "store")
        rows = {"prompt": ["1+1=", "2+3=", "1+1="], "response": RESPONSES}
        self.given = self.store.run(Stage("tables", tables), Execution(), {"rows": rows})

    def of(self, text: str, limits: Isolation = LIMITS) -> Artifact:
        file = self.folder / "hostile.py"
        file.write_text(text, encoding="utf-8")
        digest = file_digest(file)
        execution = Execution(paths={digest: file}, isolation=limits)
        inputs = {"sequences": [self.given], "prompts": self.given, "weights": [], "trainer_state": ""}
        inputs |= {"rewards": [RewardSpec(name="reward", source=digest)], "responses_per_prompt": 3}
        inputs |= {"aggregation": "sum_then_normalize"}
        return self.store.run(Stage("reward-u-batch", reward), execution, inputs)

    def of_values(self, values: list[float]) -> Artifact:
        return self.of(f"def reward(**_):\n    return {values!r}\n")


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory) -> Rewarded:
    return Rewarded(tmp_path_factory.mktemp("hostile"))


def state() -> dict[str, Any]:
    """What a function that ran in this process could have changed for what runs later."""
    umask = os.umask(0)
    os.umask(umask)
    return {
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "umask": umask,
        "priority": os.nice(0),
        "handlers": [signal.getsignal(number) for number in range(1, 32)],
        "generators": (random.getstate(), torch.get_rng_state().tolist()),
        "torch": (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cuda.matmul.allow_tf32,
        ),
        "python": (list(sys.path), sys.getrecursionlimit(), gc.isenabled(), float, len, isinstance, sys.gettrace()),
        "descriptors": sorted(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else [],
        "threads": threading.active_count(),
    }


@contextmanager
def nothing_stays(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    """The process is what it was, and whatever was started is gone: found by a mark in its environment."""
    mark, before, files = uuid.uuid4().hex, state(), sorted(os.listdir(folder))
    began = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setenv("HOSTILE_MARK", mark)
        yield
    assert time.monotonic() - began < 60
    assert state() == before
    assert sorted(os.listdir(folder)) == files
    assert not with_mark(mark)


def with_mark(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get("HOSTILE_MARK") == mark:
                found.append(process)
    return found


def in_time(limits: Isolation, said: Any) -> Isolation:
    """One second for what is stopped after a second, or may be."""
    hangs = isinstance(said, str) and (TIME in said or said == EITHER)
    return replace(limits, seconds=1.0) if hangs else limits


def tried(rewarded: Rewarded, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    text, said = REWARDS[name]
    monkeypatch.chdir(rewarded.folder)
    (rewarded.folder / "hostile.py").touch()
    made, values = None, said if isinstance(said, list) else VALUES
    with nothing_stays(monkeypatch, rewarded.folder):
        (rewarded.folder / "hostile.py").touch()
        if said == FINE or isinstance(said, list):
            made = rewarded.of(text)
        elif said == EITHER:
            with suppress(RewardError, ConfigError):
                made = rewarded.of(text, in_time(LIMITS, said))
        else:
            with pytest.raises(ProbeError, match=said) as raised:
                rewarded.of(text, in_time(LIMITS, said))
            assert isinstance(raised.value, RewardError | ConfigError)
            assert "\n" not in str(raised.value) and "\x1b" not in str(raised.value) and len(str(raised.value)) < 3000
        (rewarded.folder / "hostile.py").touch()
    benign = rewarded.of_values(values)
    assert benign.table("rewards.parquet")["reward"].to_pylist() == values
    assert made is None or (made.digest == benign.digest and made.key != benign.key)


@pytest.mark.attack("a reward that hangs, ends or floods the process, or leaves something behind")
@pytest.mark.parametrize("name", SOME)
def test_a_hostile_reward(rewarded, monkeypatch, name):
    tried(rewarded, monkeypatch, name)


@pytest.mark.chaos
@pytest.mark.attack("a reward that hangs, ends or floods the process, or leaves something behind")
@pytest.mark.parametrize("name", [name for name in REWARDS if name not in SOME])
def test_every_other_hostile_reward(rewarded, monkeypatch, name):
    tried(rewarded, monkeypatch, name)


def test_there_are_enough_of_them():
    assert len(REWARDS) > 130 and set(SOME) <= REWARDS.keys()


@pytest.mark.attack("a loss that hangs, ends or floods the process, or answers with something else")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SOME_LOSSES else pytest.mark.chaos) for name in hostile_code.LOSSES]
)
def test_a_hostile_loss(tmp_path, monkeypatch, name):
    body, said = hostile_code.LOSSES[name]
    file, batch = tmp_path / "hostile.py", batch_of()
    file.write_text(hostile_code.loss(body), encoding="utf-8")
    expected = losses.coefficients(losses.grpo, batch)
    monkeypatch.chdir(tmp_path)
    with nothing_stays(monkeypatch, tmp_path):
        if said == FINE:
            found = apart.token_coefficients(f"{file}:mine", batch, LIMITS_OF_LOSSES)
            assert all(map(torch.equal, found, expected))
        else:
            with pytest.raises(LossError, match=said) as raised:
                apart.token_coefficients(f"{file}:mine", batch, in_time(LIMITS_OF_LOSSES, said))
            assert "\n" not in str(raised.value) and len(str(raised.value)) < 3000
    assert all(map(torch.equal, apart.token_coefficients("grpo", batch), expected))
    assert torch.equal(batch.weights_N, batch_of().weights_N)


@pytest.mark.chaos
@pytest.mark.attack("a loss that hangs, ends or floods the process, or answers with something else")
def test_influences_that_are_not_finite_are_refused(tmp_path):
    file, batch = tmp_path / "hostile.py", batch_of()
    file.write_text(hostile_code.loss(hostile_code.answering("real({'0': tensors['0'] * torch.inf})")))
    with pytest.raises(LossError, match=r"second derivative of loss .* is not finite"):
        apart.influences(f"{file}:mine", batch, [along()], LIMITS_OF_LOSSES)
