"""How many workers there are for some GPUs."""

from entropy_core.config.schema import ExecutionConfig
from entropy_core.errors import ConfigError


def worker_count(config: ExecutionConfig, gpus: int) -> int:
    """Return the number of workers, each of which has its own GPUs.

    Args:
        config: how many workers, and how many GPUs for each.
        gpus: number of GPUs that there are.

    Raises:
        ConfigError: there are fewer.
    """
    each = config.devices_per_policy
    if max(1, config.worker_count) * each > gpus:
        asked = f"{max(1, config.worker_count)} workers have {each} GPUs each" if each > 1 else ""
        raise ConfigError(
            f"{asked or f'execution.worker_count is {config.worker_count}'}, and there are {gpus} GPUs for them",
            cause="each worker has GPUs of its own, as many as execution.devices_per_policy says",
            fix="set execution.worker_count to 0, for as many workers as there is room for",
        )
    return config.worker_count or gpus // each
