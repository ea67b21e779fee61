"""The checkpoints of a run that is being trained: each is held as soon as it is complete, and known once it is probed.

    FOLDER/held/checkpoint-N/    a checkpoint that waits for its sweep, or is kept; hard links to the trainer's files
    FOLDER/probed-ID.json        which ones were probed under the configuration ID, and the sweep that has them

The folder is all that is remembered, and each change of it is one rename, so that a process that was killed goes on
where it was: what is complete in `held` and was not probed as it is waits.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entropy_core.checkpoints.complete import training_is_over, what_is_missing
from entropy_core.config.schema import ProbeConfig
from entropy_core.errors import CheckpointError, one_line
from entropy_core.files.checkpoint import checkpoints_of_run, step_in_name
from entropy_core.files.holding import digest_of, held_in, hold, listing, release
from entropy_core.files.run_folder import write_whole
from entropy_core.pipeline.preflight import CheckpointToProbe
from entropy_core.pipeline.runner import Inputs


class Watched:
    """The checkpoints of one run under one configuration.

    Args:
        run: the run directory.
        folder: where this is remembered; of this process alone.
        config: a checkpoint counts as probed under this configuration only.
    """

    def __init__(self, run: Path, folder: Path, config: ProbeConfig) -> None:
        self.run, self.held = run, folder / "held"
        self._file = folder / f"probed-{_identity(config)}.json"
        remembered = json.loads(self._file.read_bytes()) if self._file.exists() else {}
        self.sweep: str = remembered.get("sweep", "")
        """Run id of the recorded sweep that has all of them."""
        self.superseded: str = remembered.get("superseded", "")
        """The one before it, which has nothing that it has not."""
        self.told: dict[str, list[str]] = remembered.get("told", {})
        """Of each place that results are reported to, which checkpoints it was told of."""
        self._probed: dict[str, str] = remembered.get("probed", {})
        self.refused: dict[str, str] = {}
        """The held checkpoints that cannot be probed, and why."""
        self._refused_as: dict[str, str] = {}  # what they were then
        self._waits_for: dict[str, str] = {}  # of the checkpoints that are not complete, what is missing
        self._said: set[str] = set()

    def look(self) -> list[str]:
        """Hold each checkpoint that has become complete.

        Returns:
            A line for each that was held, or could not be, unless it was said before.
        """
        lines = []
        present = {path.name: path for path in checkpoints_of_run(self.run)} if self.run.is_dir() else {}
        for name in [name for name in self._waits_for if name not in present]:
            missing = self._waits_for.pop(name)
            lines.append(f"{name} is left out: it was deleted before it could be held ({missing})")
        for name, directory in present.items():
            try:
                lines += self._hold(name, directory)
            except FileNotFoundError as error:  # a rotation, or a second save: it is looked at again
                self._waits_for[name] = one_line(error)
            except OSError as error:
                lines.append(f"{name} cannot be held, and is tried again: {one_line(error)}")
        latest = max((step_in_name(path) or 0 for path in self.waiting()), default=0)
        for name, missing in self._waits_for.items():
            if (step_in_name(self.run / name) or 0) < latest:
                lines.append(f"{name} is left out as long as it is incomplete: {missing}")
        fresh = [line for line in lines if line not in self._said]
        self._said.update(fresh)
        return fresh

    def _hold(self, name: str, directory: Path) -> list[str]:
        listed = listing(directory)
        held = self.held / name
        if digest_of(listed) == self._probed.get(name) or (held.exists() and listed == listing(held)):
            return []
        if missing := what_is_missing(directory):
            self._waits_for[name] = missing
            return []
        linked = hold(directory, held, listed)
        self._waits_for.pop(name, None)
        how = "by links, at no cost while it is in the run directory" if linked else "as a copy"
        return [f"{name} is complete and held ({megabytes(sum(size for _, size, _ in listed))}, {how})"]

    def waiting(self) -> list[Path]:
        """The held checkpoints that were neither probed nor refused as they are, by step."""

        def known(path: Path) -> bool:
            return digest_of(listing(path)) in (self._probed.get(path.name), self._refused_as.get(path.name))

        held = [path for path in held_in(self.held) if not known(path)]
        return sorted(held, key=lambda path: (step_in_name(path) or 0, path.name))

    def is_over(self) -> bool:
        """Whether the training has come to its end and its last checkpoint is complete; or its directory is gone."""
        if not self.run.is_dir():
            return True
        newest = max(checkpoints_of_run(self.run), key=lambda path: step_in_name(path) or 0, default=None)
        return newest is not None and not what_is_missing(newest) and training_is_over(newest)

    def probed(self, held: Path, sweep: str) -> None:
        """Remember that a held checkpoint is in a recorded sweep.

        Args:
            held: of `waiting`.
            sweep: run id of the sweep, which has all that the one before it had.
        """
        self._probed[held.name] = digest_of(listing(held))
        self.refused.pop(held.name, None)
        for names in self.told.values():
            names[:] = [name for name in names if name != held.name]
        if sweep != self.sweep:
            self.superseded, self.sweep = self.sweep, sweep
        self.remember()

    def refuse(self, held: Path, reason: str) -> None:
        """Leave a held checkpoint out. It stays, and waits again once it is another one, or in a later process."""
        self._refused_as[held.name], self.refused[held.name] = digest_of(listing(held)), reason

    def forget(self) -> None:
        """Begin anew: nothing counts as probed."""
        self.sweep, self.superseded = "", ""
        self._probed.clear()
        self.told.clear()
        self.remember()

    def remember(self) -> None:
        """Write down what a later process has to know."""
        known = {"sweep": self.sweep, "superseded": self.superseded, "told": self.told, "probed": self._probed}
        write_whole(self._file, json.dumps(known, indent=1).encode())

    def release_probed(self) -> None:
        """Delete what is held and was probed."""
        for path in held_in(self.held):
            if digest_of(listing(path)) == self._probed.get(path.name):
                release(path)

    @property
    def last_step(self) -> int:
        """Number of the latest checkpoint that was probed or refused; 0 where there is none."""
        return max((step_in_name(self.run / name) or 0 for name in [*self._probed, *self.refused]), default=0)

    def bytes_held(self) -> int:
        """Size of what is held. What is in the run directory still takes its space only once."""
        return sum(size for path in held_in(self.held) for _, size, _ in listing(path))


def require_same_settings(checkpoints: Sequence[CheckpointToProbe], earlier: Sequence[Inputs]) -> None:
    """Refuse to add a checkpoint to a sweep whose checkpoints were trained otherwise, as a sweep over both would.

    Args:
        checkpoints: those to add.
        earlier: what is recorded of the others.

    Raises:
        CheckpointError: a setting of the training differs; names it.
    """

    def plain(value: Any) -> str:
        return json.dumps(value, sort_keys=True)

    before: Mapping[str, Any] = {one["key"]: one["value"] for entry in earlier[-1:] for one in entry["settings"]}
    for checkpoint in checkpoints:
        for key, value, _ in checkpoint.settings:
            if key in before and plain(before[key]) != plain(value):
                raise CheckpointError(
                    f"{checkpoint.name} was trained with {key}: {value}, and {earlier[-1]['checkpoint']} before it "
                    f"with {before[key]}",
                    cause="the training went on with other settings",
                    fix=f"set {key} in the configuration, or watch with another store",
                )


def megabytes(count: int) -> str:
    """A number of bytes for a reader."""
    return f"{count / 1e6:.3g} MB" if count < 1e9 else f"{count / 1e9:.3g} GB"


def _identity(config: ProbeConfig) -> str:
    """What a result depends on, of a configuration of this run."""
    asked = config.model_dump(mode="json", exclude={"name", "checkpoints", "execution"})
    asked["shard_size"] = config.execution.shard_size
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
