"""Retry a stage that runs out of memory with halved micro-batches, on which no key and no result depends."""

import gc
import logging
from collections.abc import Mapping
from typing import Any

import torch

from entropy_core.errors import MemoryShortageError, one_line
from entropy_core.execution import Execution
from entropy_core.store.artifact import Artifact
from entropy_core.store.store import Stage, Store

log = logging.getLogger("entropy_probe.stages")

_SAID_BY_TORCH = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


def run_within_memory(store: Store, stage: Stage, execution: Any, inputs: Mapping[str, Any]) -> Artifact:
    """Run a stage like `Store.run`, and retry with halved micro-batches after running out of memory.

    Args:
        store: the store of the artifacts.
        stage: the stage to run.
        execution: an `Execution`, which records the batch sizes that fitted; for any other object nothing is retried.
        inputs: inputs of the stage.

    Returns:
        The artifact.

    Raises:
        MemoryShortageError: the stage runs out of memory even with single sequences.
        CheckpointError: the stage would be the first to use a policy, and a pass that the sweep needs fails with it.
    """
    if isinstance(execution, Execution):
        execution = execution.within_memory.get(stage.name, execution)
    while True:
        try:
            if isinstance(execution, Execution) and "policy" in inputs and stage.name != "score-u-reference":
                _rehearse_once(store, stage, execution, inputs)
            return store.run(stage, execution, inputs)
        except (MemoryError, RuntimeError) as error:  # torch's own error is a RuntimeError
            if not (isinstance(execution, Execution) and _is_shortage(error)):
                raise
            said = one_line(error)
        # outside the except block, the error and the frames that held tensors have been freed
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if max(execution.gen_batch_size, execution.tf_batch_size) == 1:
            raise MemoryShortageError(
                f"stage {stage.name} runs out of memory even with one sequence at a time: {said}",
                cause="another process uses the device, or the model and one sequence are too large for it",
                fix="free the device, or lower generation.max_new_tokens or execution.head_chunk_megabytes",
            )
        execution = execution.within_memory[stage.name] = execution.halved()
        log.warning(
            "%s ran out of memory (%s) and is run again with %d sequences generated and %d scored at a time",
            stage.name,
            said,
            execution.gen_batch_size,
            execution.tf_batch_size,
        )


def _rehearse_once(store: Store, stage: Stage, execution: Execution, inputs: Mapping[str, Any]) -> None:
    """Try all passes with the policy of a stage, if the stage is the first one with it that has to be computed."""
    from entropy_core.pipeline.rehearsal import is_rehearsed, rehearse  # the statistics do without these libraries
    from entropy_core.policy.spec import PolicySpec

    policy = inputs["policy"]
    if not isinstance(policy, PolicySpec) or is_rehearsed(policy):
        return
    if not store.manifest(stage.name, store.key(stage, inputs)):
        rehearse(policy, execution)


def _is_shortage(error: Exception) -> bool:
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(words in str(error) for words in _SAID_BY_TORCH)
