"""The options of `entropy-probe watch`, which load nothing."""

import argparse
from pathlib import Path
from typing import NamedTuple

from entropy_core.errors import ConfigError

PLACES = ("tensorboard", "wandb", "trackio", "prefect")
"""That can be told of each checkpoint; see `reporters`."""


class Asked(NamedTuple):
    """What the command line asks for.

    Attributes:
        run: the run directory.
        config: a YAML file, whose `checkpoints` do not count; None: what the run's own files say.
        artifacts: the store, where `config` is None.
        keep: keep what is held after its sweep.
        until_step: end after a checkpoint of this step or a later one; 0: when the training is over.
        every: seconds between looks at the run directory.
        report_to: some of `PLACES`.
    """

    run: Path
    config: Path | None = None
    artifacts: Path = Path("artifacts")
    keep: bool = False
    until_step: int = 0
    every: float = 1.0
    report_to: tuple[str, ...] = ()


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add them to the parser of the command; `--artifacts` is one that other commands have, too."""
    parser.add_argument("run_directory", type=Path, metavar="RUN_DIR", help="where the trainer saves checkpoint-*")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a YAML file (default: what the run's files say)")
    parser.add_argument("--keep", action="store_true", help="keep what is held, also once it is probed")
    parser.add_argument("--until-step", type=int, default=0, metavar="N", help="end after a checkpoint of step N")
    parser.add_argument("--every", type=float, default=1.0, metavar="S", help="seconds between two looks (default: 1)")
    parser.add_argument("--report-to", nargs="+", default=[], choices=PLACES, help="tell these of each checkpoint, too")


def asked(options: argparse.Namespace) -> Asked:
    """What was given.

    Raises:
        ConfigError: the store is said twice, or a number is not above 0.
    """
    if options.config and options.artifacts:
        raise ConfigError("--artifacts is given beside --config", fix="set execution.artifacts in the configuration")
    if not 0 < options.every <= 3600 or options.until_step < 0:
        raise ConfigError(
            f"--every is {options.every}, and --until-step {options.until_step}",
            fix="give seconds above 0, and a step",
        )
    return Asked(
        run=options.run_directory,
        config=options.config,
        artifacts=options.artifacts or Asked._field_defaults["artifacts"],
        keep=options.keep,
        until_step=options.until_step,
        every=options.every,
        report_to=tuple(options.report_to),
    )
