"""`entropy-probe watch`: probe each checkpoint of a run while it is trained, and keep those that its trainer deletes.

Another process looks at the run directory and holds what is complete; this one probes what is held, the oldest first,
and adds each to the recorded sweep of those before it. Killed at any time, the same command goes on where it was.
"""

import hashlib
import time
from pathlib import Path

from filelock import FileLock, Timeout

from entropy_core.checkpoints.holder import megabytes
from entropy_core.config import plain_yaml
from entropy_core.config.paths import Origin
from entropy_core.config.read import load_config, parse_config
from entropy_core.config.schema import ProbeConfig
from entropy_core.errors import CheckpointError, ConfigError, StoreError
from entropy_core.files.run_folder import write_whole
from entropy_core.pipeline.init import configuration_of
from entropy_core.pipeline.watched import Watched
from entropy_core.store import runs
from entropy_core.store.store import Store
from flows.direct import log_to_the_terminal, say
from flows.growing_sweep import GrowingSweep
from flows.holder import holding
from flows.reporters import open_reporters
from flows.results import print_results
from flows.watch_options import Asked


def watch(asked: Asked) -> int:
    """Probe the checkpoints of a run until its training is over.

    Args:
        asked: which run, and how.

    Returns:
        The exit status, 0.

    Raises:
        ProbeError: nothing can be probed as it was asked for. What is held stays, and so does what was finished.
    """
    log_to_the_terminal()
    run = asked.run.expanduser().resolve()
    if not run.is_dir():
        raise ConfigError(f"there is no directory {run}", fix="give the run directory, which the trainer makes first")
    root = load_config(asked.config, True, [str(run)]).store_root if asked.config else asked.artifacts
    folder = Store(root).root / "watch" / f"{run.name}-{hashlib.sha256(str(run).encode()).hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            return _watch(asked, run, folder)
    except Timeout:
        raise StoreError(f"{run} is being watched by another process already", fix="end that one first") from None


def _watch(asked: Asked, run: Path, folder: Path) -> int:
    reporters = open_reporters(asked.report_to, run)
    try:
        config = _configuration(asked, run, folder)
        watched = Watched(run, folder, config)
        later = str(watched.held if asked.keep else run)  # where a later sweep finds the checkpoints
        sweep = GrowingSweep(config.model_copy(update={"checkpoints": [later]}), watched, reporters)
        say(f"watches {run}; Ctrl-C ends it, and the same command goes on. Results go to {sweep.store.root}")
        _until_done(asked, watched, sweep)
    finally:
        for reporter in reporters:
            reporter.close()
    if watched.sweep:
        print_results(runs.folder(sweep.store.root, watched.sweep))
    if asked.keep:
        say(f"{megabytes(watched.bytes_held())} are kept in {watched.held}")
    for name, reason in watched.refused.items():
        say(f"{name} was left out: {reason}")
    return 0


def _until_done(asked: Asked, watched: Watched, sweep: GrowingSweep) -> None:
    for line in watched.look():
        say(line)
    with holding(watched.run, watched.held, watched.file, asked.every):
        while True:
            if not asked.keep:
                watched.release_probed()
            waiting = watched.waiting()
            if _is_done(asked, watched, waiting):
                return
            if not waiting:
                time.sleep(asked.every)
                continue
            if len(waiting) > 1:
                say(f"{len(waiting)} checkpoints wait; {megabytes(watched.bytes_held())} are held")
            try:
                sweep.add(waiting[0])
            except CheckpointError as error:
                watched.refuse(waiting[0], str(error))
                say(f"{waiting[0].name} is left out, and stays in {waiting[0]}: {error}")


def _is_done(asked: Asked, watched: Watched, waiting: list[Path]) -> bool:
    """Whether the last checkpoint that was asked for is done, or that of the training and nothing waits."""
    if asked.until_step:
        return watched.last_step >= asked.until_step
    if waiting or not watched.is_over():
        return False
    for line in watched.look():  # what was saved since the last time
        say(line)
    return not watched.waiting()


def _configuration(asked: Asked, run: Path, folder: Path) -> ProbeConfig:
    """The configuration that was given; or else the one that the first checkpoint and the run's own files make."""
    if asked.config is not None:
        return load_config(asked.config, True, [str(run)])
    said = ""
    while True:
        try:
            text = configuration_of(run, Path.cwd())
            break
        except CheckpointError as error:  # no checkpoint yet, or none that is complete
            if said != (said := str(error)):
                say(f"waits for a first checkpoint in {run} (now: {error.fact})")
            time.sleep(asked.every)
    write_whole(folder / "config.yaml", text.encode())
    values, _ = plain_yaml.read(folder / "config.yaml")
    values |= {"checkpoints": [str(run)], "execution": {"artifacts": str(asked.artifacts.absolute())}}
    return parse_config(values, f"what the files of {run} say ({folder / 'config.yaml'})", Origin(Path.cwd(), True))
