"""How a stage is executed: device, micro-batches, where files lie. Nothing here is part of a key or of a result."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from entropy_core.files.digests import without_ctime
from entropy_core.files.sources import Stamps, stamps
from entropy_core.isolation.process import Isolation


def _silent(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Execution:
    """Passed to every stage beside its inputs.

    Args:
        paths: content digest → the checkpoint directory, prompt file or reward file that has it.
        device: `auto`, `cpu` or `cuda`.
        devices_per_policy: devices that share the layers of a policy.
        gen_batch_size: sequences decoded together.
        tf_batch_size: sequences per teacher-forced pass, at most.
        tf_batch_tokens: tokens per teacher-forced pass, padding included, at most; but one sequence at least.
        head_chunk_megabytes: memory of the logits that exist at one time.
        recompute_activations: in a backward pass, rather than keep those within a layer.
        isolation: how functions of the user are called.
        vllm_python: interpreter of the environment that has vLLM; empty where it does not sample.
        vllm_memory: share of the device's memory that vLLM takes.
        progress: called with (done, total) as a stage advances.
        held: a folder whose files are hard links: another name of one of them may be deleted while a stage reads it,
            which sets the file's ctime.
        within_memory: stage name → the smaller settings with which it no longer ran out of memory; see `halved`.
    """

    paths: Mapping[str, Path] = field(default_factory=dict)
    device: str = "auto"
    devices_per_policy: int = 1
    gen_batch_size: int = 512
    tf_batch_size: int = 256
    tf_batch_tokens: int = 65_536
    head_chunk_megabytes: float = 64.0
    recompute_activations: bool = False
    isolation: Isolation = field(default_factory=Isolation)
    vllm_python: str = ""
    vllm_memory: float = 0.4
    progress: Callable[[int, int], None] = _silent
    held: Path | None = None
    within_memory: "dict[str, Execution]" = field(default_factory=dict, compare=False, repr=False)

    def halved(self) -> "Execution":
        """The same with half the sequences and tokens at a time, half the logits, and activations recomputed."""
        names = ("gen_batch_size", "tf_batch_size", "tf_batch_tokens")
        sizes = {name: max(1, getattr(self, name) // 2) for name in names}
        logits = self.head_chunk_megabytes / 2
        return replace(self, **sizes, head_chunk_megabytes=logits, recompute_activations=True)

    def stamps(self, inputs: Any) -> Stamps:
        """Make sure that the files that a stage's inputs name are what they were; see `sources.stamps`."""
        found = stamps(inputs, self.paths)
        if self.held is None:
            return found
        return {
            path: tuple(map(without_ctime, of)) if path.is_relative_to(self.held) else of for path, of in found.items()
        }

    def describe(self) -> dict[str, Any]:
        """What the manifest records."""
        return {
            "device": self.device,
            "devices_per_policy": self.devices_per_policy,
            "gen_batch_size": self.gen_batch_size,
            "tf_batch_size": self.tf_batch_size,
            "tf_batch_tokens": self.tf_batch_tokens,
            "head_chunk_megabytes": self.head_chunk_megabytes,
            "recompute_activations": self.recompute_activations,
        }
