"""Code that the record of a run names: a store may come from anywhere, and nothing that is in it is executed.

A record names the reward and the loss of its sweep, and a command that goes on from it calls them. Those are files of
the user's. A file in the store would have come with the store, in an archive for example.
"""

from pathlib import Path

from entropy_core.config.schema import ProbeConfig
from entropy_core.errors import ConfigError
from entropy_core.losses import token_weights
from entropy_core.losses.functions import source_file as file_of_loss
from entropy_core.losses.interventions import own_interventions
from entropy_core.rewards.functions import source_file as file_of_reward


def require_no_stored_code(config: ProbeConfig, root: Path) -> None:
    """Refuse the configuration of a recorded run that has its functions in the store; none of them is executed.

    Args:
        config: as it was recorded.
        root: of the store.

    Raises:
        ConfigError: it names such a function, or one that there is not.
    """
    files = [file_of_loss(config.update.loss), *map(file_of_reward, config.update.rewards)]
    files += map(token_weights.source_file, own_interventions(config.interventions))
    for file in files:
        if file is not None and file.resolve().is_relative_to(root.resolve()):
            raise ConfigError(
                f"the record of the run names code in the store, {file}, which is not executed",
                cause="the store came from somebody else, or your file lies in it",
                fix="read the file; if it is yours, move it out of the store and run the sweep again",
            )
