"""Run stages for one checkpoint, under its name, whole or shard by shard."""

from collections.abc import Sequence

from entropy_core.config.schema import ProbeConfig
from entropy_core.pipeline.runner import Inputs, Runner
from entropy_core.policy.spec import PolicySpec
from entropy_core.store.artifact import Artifact
from entropy_core.store.store import Stage


class StagesOf:
    """The runner of stages for one checkpoint.

    Args:
        name: of the checkpoint, with which every label begins.
        config: configuration of the sweep, which says how large a shard is and how responses end.
        run: runner of stages.
    """

    def __init__(self, name: str, config: ProbeConfig, run: Runner) -> None:
        self._name, self._config, self._run = name, config, run

    def once(self, what: Stage, inputs: Inputs, suffix: str = "") -> Artifact:
        """Run a stage that is not cut into shards."""
        return self._run(what, inputs, self._name + suffix)

    def each(self, what: Stage, inputs: Sequence[Inputs], suffixes: Sequence[str]) -> list[Artifact]:
        """Run a stage for several inputs."""
        return self._run.map(what, inputs, [self._name + suffix for suffix in suffixes])

    def over_shards(self, what: Stage, inputs: Sequence[Inputs], suffix: str = "") -> list[Artifact]:
        """Run a stage for the inputs of each shard."""
        return self.each(what, inputs, [f"{suffix} · shard {i}/{len(inputs)}" for i in range(1, len(inputs) + 1)])

    def sample(self, what: Stage, total: int, inputs: Inputs, suffix: str = "") -> list[Artifact]:
        """Sample `total` responses."""
        size = self._config.execution.shard_size
        shared = inputs | {
            "max_new_tokens": self._config.generation.max_new_tokens,
            "stop_strings": self._config.generation.stop_strings,
        }
        parts = [{"first": first, "count": min(size, total - first)} for first in range(0, total, size)]
        return self.over_shards(what, [shared | part for part in parts], suffix)

    def score(self, what: Stage, policy: PolicySpec, batches: Sequence[Artifact], suffix: str = "") -> list[Artifact]:
        """Score shards of responses with a policy."""
        return self.over_shards(what, [{"policy": policy, "sequences": sequences} for sequences in batches], suffix)
