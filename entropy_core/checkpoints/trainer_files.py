"""What a trainer left in a checkpoint about itself, weights and optimizer aside."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entropy_core.checkpoints.content import read_json
from entropy_core.checkpoints.layout import Layout
from entropy_core.checkpoints.layouts.interface import understood
from entropy_core.checkpoints.layouts.places import open_state
from entropy_core.checkpoints.model_config import GENERATION
from entropy_core.checkpoints.training_args import ENTROPY_CONTROL, TRAINING_ARGUMENTS, read_training_arguments

_DROPOUT = re.compile(r"(dropout|dropout_rate|dropout_p|pdrop|drop_path_rate)$")
_QUANTISED = re.compile(r"(4|8)[-_]?bit|bnb|gptq|awq|int[48]\b|nf4|fp8", re.IGNORECASE)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class TrainerFiles:
    """What the files of one checkpoint say of its trainer.

    Attributes:
        kind: `GRPO` or `RLOO`; empty where nothing says it; else the name of the class of another trainer.
        arguments: the trainer's settings, by its names; empty without a `training_args.bin`.
        generation: the model's generation_config.json.
        entropy_control: where TRL's adaptive entropy bonus was.
        rewards: names of the rewards that the trainer logged.
        log: what it logged, an entry per logging step.
        dropout: rates above 0, by file and key.
        is_adapter: the checkpoint holds an adapter.
        has_reference: an adapter `ref` lies in the checkpoint.
        has_experts: the model is a mixture of experts.
        clipping: the norm of the clipping and what says it, where that is not the trainer's settings.
        quantised_base: the quantised model that the adapter names as its base, where it is computed with another one.
        step: how many steps it had made, as its own state says; None where nothing says it.
    """

    kind: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    entropy_control: Mapping[str, Any] = field(default_factory=dict)
    rewards: tuple[str, ...] = ()
    log: tuple[Mapping[str, Any], ...] = ()
    dropout: Mapping[str, float] = field(default_factory=dict)
    is_adapter: bool = False
    has_reference: bool = False
    has_experts: bool = False
    clipping: tuple[float, str] | None = None
    quantised_base: str = ""
    step: int | None = None

    @property
    def drops(self) -> bool:
        """Whether dropout was on in the trainer's step."""
        return bool(self.dropout) and not self.arguments.get("disable_dropout")


def read_trainer_files(layout: Layout) -> TrainerFiles:
    """Read what the files of a checkpoint say of its trainer.

    Args:
        layout: where its parts lie.

    Returns:
        What they say; nothing of a file that is not there.

    Raises:
        CheckpointError: a file is there and cannot be read.
    """
    directory = layout.directory
    kind = ""
    arguments: dict[str, Any] = {}
    if (path := directory / TRAINING_ARGUMENTS).exists():
        name, arguments = read_training_arguments(path)
        kind = _kind(arguments) or name.rpartition(".")[2]
    adapter = _read(layout.model / "adapter_config.json") if layout.base else {}
    config = _read(layout.architecture / "config.json")
    rates = {f"config.json: {key}": rate for key, rate in _rates(config)}
    rates |= {f"adapter_config.json: {key}": rate for key, rate in _rates(adapter)}
    state = _read(directory / "trainer_state.json")
    log, step = _logged(state), state.get("global_step")
    experts = [value for key, value in _entries(config) if key in _EXPERTS]
    return TrainerFiles(
        kind=kind,
        arguments=arguments,
        generation=_read(layout.architecture / GENERATION),
        entropy_control=_read(directory / ENTROPY_CONTROL),
        rewards=_logged_rewards(log),
        log=log,
        dropout=rates,
        is_adapter=layout.base is not None,
        has_reference=(layout.model / "ref" / "adapter_config.json").exists(),
        has_experts=any(isinstance(count, int) and count > 1 for count in experts),
        clipping=_clipping(layout),
        quantised_base="" if "quantization_config" in config else _quantised(adapter.get("base_model_name_or_path")),
        step=step if isinstance(step, int) else None,
    )


def _clipping(layout: Layout) -> tuple[float, str] | None:
    """Of a trainer whose shards say it."""
    if layout.optimizer is None or not layout.optimizer.is_dir():
        return None
    with understood(layout.optimizer):
        norm = open_state(layout.optimizer).max_grad_norm()
    return None if norm is None else (norm, f"the configuration in {layout.optimizer.name}")


def _kind(arguments: Mapping[str, Any]) -> str:
    """Which trainer has such settings, whatever its class is called: people extend these classes."""
    if "num_generations" not in arguments:
        return ""
    return "RLOO" if "normalize_advantages" in arguments else "GRPO" if "epsilon" in arguments else ""


def _quantised(name: Any) -> str:
    """The base that an adapter names, if it is quantised as its name or its own files say."""
    if not isinstance(name, str) or not name:
        return ""
    config = Path(name).expanduser() / "config.json"
    is_quantised = "quantization_config" in read_json(config) if config.is_file() else _QUANTISED.search(name)
    return name if is_quantised else ""


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _rates(config: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The dropout rates above 0; that of a head for classification is of another model."""
    for key, value in _entries(config):
        is_rate = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1
        if is_rate and _DROPOUT.search(key) and not key.startswith(("classifier", "summary")):
            yield key, float(value)


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    for key, value in config.items() if isinstance(config, dict) else ():
        yield key, value
        yield from _entries(value)


def _logged(state: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    log = state.get("log_history")
    return tuple(entry for entry in log if isinstance(entry, dict)) if isinstance(log, list) else ()


def _logged_rewards(log: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    found = [re.fullmatch(r"rewards/(.+)/mean", key) for entry in log[-1:] for key in entry]
    return tuple(match[1] for match in found if match)
