"""Where the rows of `entropy-probe watch` go beside the store, if asked: nothing is sent anywhere else.

Each place is an optional library, imported when it is asked for. A place is told of a checkpoint once it is recorded.
"""

import hashlib
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from entropy_core.errors import ConfigError
from entropy_core.files.run_folder import FOLDER

PREFIX = "entropy_probe/"


class Reporter(NamedTuple):
    """One place.

    Attributes:
        name: as the command line has it.
        tell: is given the numbers of a checkpoint, see `flows.numbers`.
        close: sends what is on its way.
    """

    name: str
    tell: Callable[[Mapping[str, Any]], None]
    close: Callable[[], None]


def open_reporters(names: Sequence[str], run: Path) -> list[Reporter]:
    """Open the places that results are to be reported to.

    Args:
        names: of `PLACES`.
        run: the run directory, after which the rows are named.

    Raises:
        ConfigError: a library is not installed, or does not know where to send to.
    """
    return [PLACES[name](run) for name in dict.fromkeys(names)]


def measured(numbers: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among the values, under the names that a chart shows."""
    real = {name: value for name, value in numbers.items() if isinstance(value, int | float)}
    return {PREFIX + name: float(value) for name, value in real.items() if name != "step"}


def _tensorboard(run: Path) -> Reporter:
    tensorboard = _library("torch.utils.tensorboard", "tensorboard", "pip install tensorboard")
    writer = tensorboard.SummaryWriter(log_dir=str(run / FOLDER / "tensorboard"))

    def tell(numbers: Mapping[str, Any]) -> None:
        for name, value in measured(numbers).items():
            writer.add_scalar(name, value, numbers["step"])
        writer.add_text(f"{PREFIX}verdict", str(numbers["verdict"]), numbers["step"])
        writer.flush()

    return Reporter("tensorboard", tell, writer.close)


def _wandb(run: Path) -> Reporter:
    wandb = _library("wandb", "wandb", "pip install wandb")
    project = os.environ.get("WANDB_PROJECT", "entropy-probe")
    at = wandb.init(project=project, name=f"{run.name}-entropy", id=_id(run), resume="allow")
    at.define_metric(f"{PREFIX}*", step_metric="train/global_step")

    def tell(numbers: Mapping[str, Any]) -> None:
        at.log({**measured(numbers), f"{PREFIX}verdict": numbers["verdict"], "train/global_step": numbers["step"]})

    return Reporter("wandb", tell, at.finish)


def _trackio(run: Path) -> Reporter:
    trackio = _library("trackio", "trackio", "pip install trackio")
    project = os.environ.get("TRACKIO_PROJECT", "entropy-probe")
    trackio.init(project=project, name=f"{run.name}-entropy-{_id(run)}", resume="allow")

    def tell(numbers: Mapping[str, Any]) -> None:
        trackio.log({**measured(numbers), f"{PREFIX}verdict": numbers["verdict"]}, step=numbers["step"])

    return Reporter("trackio", tell, trackio.finish)


def _prefect(run: Path) -> Reporter:
    if not os.environ.get("PREFECT_API_URL"):
        raise ConfigError(
            "--report-to prefect: PREFECT_API_URL is not set, so there is no server to send events to",
            fix="set it, and PREFECT_API_AUTH_STRING, as `entropy-probe ui` prints them",
        )
    from prefect.events.worker import EventsWorker

    from tasks.events import checkpoint_probed

    def tell(numbers: Mapping[str, Any]) -> None:
        checkpoint_probed(str(run), numbers)

    def close() -> None:
        EventsWorker.instance().drain()

    return Reporter("prefect", tell, close)


PLACES: dict[str, Callable[[Path], Reporter]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "prefect": _prefect,
}


def _library(module: str, name: str, install: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"--report-to {name}: {error.name or name} is not installed", fix=f"`{install}`, or leave {name} out"
        ) from None


def _id(run: Path) -> str:
    return hashlib.sha256(str(run).encode()).hexdigest()[:8]
