"""Sample with vLLM, in a process of an environment of its own; see `vllm_process`.

A process has one policy, loaded from a copy of its weights in bfloat16 that goes to the system's temporary folder. It
stays up for the next shard, and ends when its policy is dropped or this process ends.
"""

import json
import logging
import os
import signal
import subprocess
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from inspect import getsourcefile
from pathlib import Path
from typing import Any

import torch

from entropy_core.errors import ConfigError, NonFiniteError, ProbeError, one_line
from entropy_core.numerics import philox
from entropy_core.policy.merged import save_merged
from entropy_core.policy.model import Policy
from entropy_core.sequences.decoding import DecodingRequest, Progress, Response
from entropy_core.sequences.vllm_process import serve

log = logging.getLogger("entropy_probe.vllm")

DTYPE = "bfloat16"
_FIX = "make an environment of its own for vLLM, and set execution.vllm_python to its interpreter"
_LEFT = 5.0
"""Seconds in which a process ends whose standard input was closed."""


@cache
def vllm_version(python: str) -> str:
    """Ask an environment which vLLM it has.

    Args:
        python: its interpreter.

    Returns:
        Versions of vLLM and of its torch, such as `vllm 0.32.0, torch 2.13.0+cpu`.

    Raises:
        ConfigError: there is no such interpreter, or it has no vLLM.
    """
    if not python:
        raise ConfigError("generation.sampler is vllm, and execution.vllm_python is empty", fix=_FIX)
    command = [python, "-B", _script(), "--versions"]
    try:
        asked = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"execution.vllm_python, {python}, cannot be run: {one_line(error)}", fix=_FIX) from error
    if asked.returncode:
        said = (asked.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ConfigError(f"execution.vllm_python, {python}, has no vLLM: {said}", fix=_FIX)
    return asked.stdout.strip()


class VllmDecoding:
    """Decodes requests as `Decoding` does, with vLLM.

    Args:
        python: interpreter of the environment that has vLLM.
        memory: share of the device's memory that vLLM takes.
        versions: that it has to have, see `vllm_version`.
    """

    def __init__(self, python: str, memory: float, versions: str) -> None:
        self.python, self.memory, self.versions = python, memory, versions

    def __call__(self, policy: Policy, request: DecodingRequest, rows: int, progress: Progress) -> list[Response]:
        """Decode all prompts of a request with a proposal.

        Args:
            policy: the policy.
            request: prompts and sampling settings.
            rows: sequences decoded together, at most.
            progress: called with (finished sequences, total sequences).

        Returns:
            The responses, in the order of the prompts.

        Raises:
            ProbeError: vLLM is another release, cannot load the policy, or its process ended.
            NonFiniteError: a logit is NaN or infinite; names the sequence.
        """
        settings = {
            "dtype": DTYPE,
            "max_model_len": max(map(len, request.prompts)) + request.max_new_tokens,
            "max_num_seqs": rows,
            "gpu_memory_utilization": self.memory,
        }
        process = _process_of(policy, self.python, settings)
        if process.versions != self.versions:
            raise ProbeError(
                f"E was to be drawn by {self.versions}, and execution.vllm_python is {process.versions}",
                cause="that environment was upgraded since this sweep was planned",
                fix="run the sweep again",
            )
        found = process.ask(_message(policy, request), progress)
        rule, responses = request.stopping_rule(policy), []
        for sequence, (tokens, logprobs) in enumerate(found):
            end = rule.first_end(tokens)
            if end is None:
                raise ProbeError(
                    f"vLLM ended a response after {len(tokens)} tokens, without EOS and before the largest length",
                    cause="a release of vLLM that ends responses for reasons of its own",
                    fix="set generation.sampler: bf16",
                )
            length, reason = end
            if not torch.tensor(logprobs[:length], dtype=torch.float64).isfinite().all():
                raise NonFiniteError(
                    f"the logits of sequence {int(request.sequence_ids_N[sequence])} are not finite in vLLM",
                    cause="the weights contain a NaN, or are too large for bfloat16",
                    fix="set generation.sampler: exact",
                )
            responses.append(Response(tokens[:length], reason, logprobs[:length]))
        return responses


class _Process:
    """A process with one policy."""

    def __init__(self, policy: Policy, python: str, settings: dict[str, Any]) -> None:
        self.python, self.settings = python, settings
        self._folder = tempfile.TemporaryDirectory(prefix="entropy-probe-vllm-")
        folder = Path(self._folder.name)
        log.info("vLLM loads a copy of the policy in %s from %s", DTYPE, folder)
        save_merged(policy.model, folder / "model", getattr(torch, DTYPE))
        self._said = folder / "said"
        with self._said.open("w") as said:
            self._process = subprocess.Popen(
                [python, "-B", _script()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env=_environment(),
                start_new_session=True,  # a Ctrl-C is for us
            )
        self.end = weakref.finalize(self, _end, self._process, self._folder)
        self._tell({"philox": philox.__file__, "engine": settings | {"model": str(folder / "model")}})
        self.versions = self._hear()["ready"]
        log.info("%s is ready", self.versions)

    def serves(self, python: str, settings: Mapping[str, Any]) -> bool:
        """Whether it is up and answers requests of these settings; longer sequences than asked for are no harm."""
        longest = self.settings["max_model_len"] >= settings["max_model_len"]
        same = self.settings | {"max_model_len": 0} == dict(settings) | {"max_model_len": 0}
        return longest and same and python == self.python and self._process.poll() is None

    def ask(self, message: Mapping[str, Any], progress: Progress) -> list[tuple[list[int], list[list[float]]]]:
        """Return tokens and log-probabilities of each response."""
        path = Path(self._folder.name) / "request.json"
        path.write_text(json.dumps(message))
        self._tell({"request": str(path)})
        while "responses" not in (said := self._hear()):
            progress(min(said["done"], len(message["prompts"])), len(message["prompts"]))
        answer: list[tuple[list[int], list[list[float]]]] = json.loads(Path(said["responses"]).read_text())
        return answer

    def _tell(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended, which is found out by listening
            print(json.dumps(message), file=self._process.stdin, flush=True)

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            said: dict[str, Any] = json.loads(line)
            return said
        self._process.wait()
        lines = [line.strip() for line in self._said.read_text(errors="replace").splitlines() if line.strip()]
        for line in lines[-40:]:
            log.error("vLLM: %s", line)
        reasons = [line for line in lines if "Error" in line] or lines or ["it said nothing"]
        raise ProbeError(
            f"the process of vLLM ended ({self._process.returncode}): {reasons[-1]}",
            cause="vLLM does not know this architecture, or there is not enough memory on the device",
            fix="read what vLLM said above; set execution.vllm_memory, or generation.sampler: bf16",
        )


_processes: "weakref.WeakKeyDictionary[Policy, _Process]" = weakref.WeakKeyDictionary()


def _process_of(policy: Policy, python: str, settings: dict[str, Any]) -> _Process:
    """The process that has this policy; there is one at a time."""
    found = _processes.get(policy)
    if found is None or not found.serves(python, settings):
        for other in list(_processes.values()):
            other.end()
        _processes.clear()
        found = _processes[policy] = _Process(policy, python, settings)
    return found


def _end(process: "subprocess.Popen[str]", folder: "tempfile.TemporaryDirectory[str]") -> None:
    """End a process with all that it started, and delete its files."""
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(OSError):
            pipe.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_LEFT)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    folder.cleanup()


def _script() -> str:
    """The file of `vllm_process`."""
    file = getsourcefile(serve)
    assert file is not None
    return file


def _message(policy: Policy, request: DecodingRequest) -> dict[str, Any]:
    assert request.proposal is not None  # whose log-probabilities are recorded
    return {
        "prompts": [list(ids) for ids in request.prompts],
        "sequence_ids": request.sequence_ids_N.tolist(),
        "seed": request.seed,
        "purpose": int(request.purpose),
        "temperature_of": request.temperatures().tolist(),
        "temperatures": [request.temperature, request.proposal.temperature],
        "max_new_tokens": request.max_new_tokens,
        "eos": list(policy.eos_token_ids),
    }


def _environment() -> dict[str, str]:
    """Variables of that environment: none of this one's paths, no network, and everything in one process."""
    mine = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return mine | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": mine.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
    }
