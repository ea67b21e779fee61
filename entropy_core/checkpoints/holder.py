"""Hold each checkpoint of a live run as soon as it is complete. Loads no library of the models: it has to be quick."""

from collections.abc import Callable, Mapping
from pathlib import Path

from entropy_core.checkpoints.complete import what_is_missing
from entropy_core.errors import one_line
from entropy_core.files.checkpoint import checkpoints_of_run, step_in_name
from entropy_core.files.holding import digest_of, held_in, hold, listing


class Holder:
    """Looks at a run directory.

    Args:
        run: the directory.
        held: folder for what is held.
        probed: which checkpoints need not be held: their names, each with the digest of its listing.
    """

    def __init__(self, run: Path, held: Path, probed: Callable[[], Mapping[str, str]]) -> None:
        self._run, self._held, self._probed = run, held, probed
        self._waits_for: dict[str, str] = {}  # of the checkpoints that are not complete, what is missing
        self._said: set[str] = set()

    def look(self) -> list[str]:
        """Hold each checkpoint that has become complete.

        Returns:
            A line for each that was held, or could not be, unless it was said before.
        """
        lines = []
        try:
            present = {path.name: path for path in checkpoints_of_run(self._run)}
        except FileNotFoundError:  # the whole run was deleted
            present = {}
        known = {path.name for path in held_in(self._held)} | self._probed().keys()
        for name in [name for name in self._waits_for if name not in present]:
            missing = self._waits_for.pop(name)
            if name not in known:
                lines.append(f"{name} is left out: it was deleted before it could be held ({missing})")
        for name, directory in present.items():
            try:
                lines += self._hold(name, directory)
            except FileNotFoundError as error:  # a rotation, or a second save: it is looked at again
                self._waits_for[name] = one_line(error)
            except OSError as error:
                lines.append(f"{name} cannot be held, and is tried again: {one_line(error)}")
        known |= {path.name for path in held_in(self._held)}
        latest = max((step_in_name(self._run / name) or 0 for name in known), default=0)
        for name, missing in self._waits_for.items():
            if (step_in_name(self._run / name) or 0) < latest:
                lines.append(f"{name} is left out as long as it is incomplete: {missing}")
        fresh = [line for line in lines if line not in self._said]
        self._said.update(fresh)
        return fresh

    def _hold(self, name: str, directory: Path) -> list[str]:
        listed = listing(directory)
        held = self._held / name
        if digest_of(listed) == self._probed().get(name) or (held.exists() and listed == listing(held)):
            self._waits_for.pop(name, None)
            return []
        if missing := what_is_missing(directory):
            self._waits_for[name] = missing
            return []
        linked = hold(directory, held, listed)
        self._waits_for.pop(name, None)
        how = "by links, at no cost while it is in the run directory" if linked else "as a copy"
        return [f"{name} is complete and held ({megabytes(sum(size for _, size, _ in listed))}, {how})"]


def megabytes(count: int) -> str:
    """A number of bytes for a reader."""
    return f"{count / 1e6:.3g} MB" if count < 1e9 else f"{count / 1e9:.3g} GB"
