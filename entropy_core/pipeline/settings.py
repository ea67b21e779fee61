"""The settings of a sweep: from the user, else from the files of the checkpoints' trainers, else our defaults.

set by you        a key in the configuration; it wins
read from FILE    a file of the checkpoints has it
assumed           neither has it, so it is our default
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel

from entropy_core.checkpoints.trainer_files import TrainerFiles
from entropy_core.config.phase import PhaseConfig
from entropy_core.config.read import parse_config
from entropy_core.config.schema import ProbeConfig
from entropy_core.config.trainer_differences import LEFT_OUT, Difference
from entropy_core.config.trainer_settings import Reading, readings
from entropy_core.errors import ConfigError, some_names
from entropy_core.losses.phase_interventions import asked_in_phase
from entropy_core.numerics.advantages import divided_by

OF_THE_TRAINING = (
    *("policy.base_model", "batch_config.B_U", "batch_config.G", "batch_config.dataset_name", "batch_config.split"),
    *("batch_config.prompt_column", "batch_config.add_special_tokens", "batch_config.apply_chat_template"),
    *("batch_config.system_prompt", "batch_config.chat_template_kwargs", "batch_config.max_prompt_length"),
    "generation.temperature",
    *("generation.max_new_tokens", "generation.stop_strings", "update.loss", "update.scale_rewards"),
    *("update.max_grad_norm", "update.learning_rate", "update.optimizer_state", "update.kl_beta", "update.kl_in"),
    *("update.use_bias_correction_kl", "update.reference", "update.importance_sampling_level"),
    *("update.top_entropy_quantile", "update.entropy_coef", "update.epsilon_high", "update.mask_truncated_completions"),
    *("update.micro_batch", "update.reward", "update.reward_weights", "update.multi_objective_aggregation"),
    *("update.reward_clip_range", "update.normalize_advantages"),
    *(f"update.phase.{name}" for name in PhaseConfig.model_fields),
)
"""Keys that describe the training, in the order of a configuration; the others are the user's own choice."""

Model = TypeVar("Model", bound=BaseModel)

_PATHS = ("policy.base_model", "batch_config.dataset_name", "update.loss", "update.reference", "update.reward")
_OF_SOME_RUNS = {
    f"update.{name}"
    for name in (
        *("kl_in", "use_bias_correction_kl", "importance_sampling_level", "top_entropy_quantile", "entropy_coef"),
        *("epsilon_high", "mask_truncated_completions", "micro_batch", "reward_clip_range", "normalize_advantages"),
        *("reward_weights", "multi_objective_aggregation"),
        *(f"phase.{name}" for name in PhaseConfig.model_fields),
    )
} | {"batch_config.chat_template_kwargs"}
"""Keys that are listed only if the user or a file sets them."""
SET, ASSUMED = "set by you", "assumed"


class Setting(NamedTuple):
    """One setting of the training.

    Attributes:
        key: such as `generation.temperature`.
        value: its value in a configuration.
        source: where it comes from, see above.
    """

    key: str
    value: Any
    source: str


@dataclass(frozen=True)
class Settled:
    """The settings of a sweep, and where they come from.

    Attributes:
        read: settings that the configuration leaves open and the checkpoints have, by key.
        settings: all settings of the training.
        warnings: contradictions, and features of the trainer that are left out; one sentence each.
        notes: differences that change nothing but rounding; one sentence each.
        left_out: settings of the trainer that are left out, as the user asked; otherwise they would be refused.
    """

    read: Mapping[str, Any]
    settings: tuple[Setting, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    left_out: tuple[str, ...]


def settle(config: ProbeConfig, files: Mapping[str, TrainerFiles]) -> Settled:
    """Compare the configuration with the files of the checkpoints.

    Args:
        config: what the user says.
        files: of each checkpoint, by its name.

    Returns:
        What is read, and what is to be said.

    Raises:
        ConfigError: the checkpoints disagree about what the user leaves open, the trainer did what is not modelled, or
            the settings do not fit together.
    """
    if unknown := [name for name in config.update.leave_out if name not in LEFT_OUT]:
        raise ConfigError(
            f"update.leave_out names {some_names(unknown)}, which is no setting of a trainer that can be left out",
            fix="take the names from the message that refuses them",
        )
    given = set_keys(config)
    of_each = {name: readings(of_one, config.update.phase.follow) for name, of_one in files.items()}
    said: dict[str, dict[str, Reading]] = {}  # by key, by checkpoint
    for name, (readings_of_one, _) in of_each.items():
        for reading in readings_of_one:
            said.setdefault(reading.key, {})[name] = reading
    found = _agreed(said, given)
    if config.batch_config.apply_chat_template:  # which writes the special tokens itself
        found.pop("batch_config.add_special_tokens", None)
    differences: dict[Difference, list[str]] = {}
    for name, (_, differ) in of_each.items():
        for difference in differ:
            differences.setdefault(difference, []).append(name)
    read = {key: reading.value for key, reading in found.items() if key not in given}
    settled = with_read(config, read)
    parse_config(settled.model_dump(mode="json"), "what the configuration and the checkpoints say")
    _check_combination(settled)
    _refuse(differences, given, config)
    warnings = [
        *_rewards(settled, files),
        *_contradictions(config, said, given, len(files)),
        *(_sentence(d, names, len(files)) for d, names in differences.items() if d.weight != "note"),
    ]
    if silent := [name for name, of_one in files.items() if found and not of_one.arguments]:
        warnings.append(f"{some_names(silent)}: nothing says how it was trained; taken to be as the others were.")
    notes = [_sentence(d, names, len(files)) for d, names in differences.items() if d.weight == "note"]
    left_out = [d.name for d in differences if d.weight == "refuse" and d.key not in given]
    table = _table(settled, found, given, files)
    return Settled(read, tuple(table), tuple(warnings), tuple(notes), tuple(dict.fromkeys(left_out)))


def with_read(config: ProbeConfig, read: Mapping[str, Any]) -> ProbeConfig:
    """The configuration with what was read in the place of what it leaves open.

    Args:
        config: as the user gave it, or with the same put in before.
        read: of `settle`.
    """
    return _updated(config, read)


def _updated(section: Model, values: Mapping[str, Any]) -> Model:
    """A section with some of its values replaced; keys of sections in it are dotted."""
    inner: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        name, _, rest = key.partition(".")
        inner.setdefault(name, {})[rest] = value
    return section.model_copy(
        update={name: of[""] if "" in of else _updated(getattr(section, name), of) for name, of in inner.items()}
    )


def set_keys(config: BaseModel, prefix: str = "") -> set[str]:
    """The keys that were given, with those of sections as `section.key`."""
    found = set()
    for name in config.model_fields_set:
        value = getattr(config, name)
        whole = prefix + name
        found |= set_keys(value, f"{whole}.") if isinstance(value, BaseModel) else {whole}
    return found


def value_of(config: ProbeConfig, key: str) -> Any:
    """The value of a key such as `generation.temperature`."""
    return attrgetter(key)(config)


def _agreed(said: Mapping[str, Mapping[str, Reading]], given: set[str]) -> dict[str, Reading]:
    """What the checkpoints say, by key; refuses what they disagree about and nobody settles."""
    differing = {
        key: by_name
        for key, by_name in said.items()
        if key not in given and len({_text(reading.value) for reading in by_name.values()}) > 1
    }
    if differing:
        lines = [
            f"{key}: " + ", ".join(f"{_text(reading.value)} ({name})" for name, reading in by_name.items())
            for key, by_name in differing.items()
        ]
        raise ConfigError(
            "the checkpoints were not all trained with the same settings"
            + (f": {lines[0]}" if len(lines) == 1 else ":\n  " + "\n  ".join(lines)),
            cause="a run that was resumed with other settings, or checkpoints of several runs",
            fix=f"probe them in sweeps of their own, or set {', '.join(differing)} for all of them",
        )
    return {key: next(iter(by_name.values())) for key, by_name in said.items()}


def _refuse(differences: Mapping[Difference, list[str]], given: set[str], config: ProbeConfig) -> None:
    """Refuse what the trainer did and the step here does not, unless the user knows of it."""
    refused = [
        difference
        for difference in differences
        if difference.weight == "refuse"
        and difference.key not in given
        and difference.name not in config.update.leave_out
    ]
    if not refused:
        return
    names = list(dict.fromkeys(difference.name for difference in refused))
    keys = list(dict.fromkeys(difference.key for difference in refused if difference.key))
    instead = f"set {', '.join(keys)}; or " if keys else ""
    lines = [difference.sentence for difference in refused]
    raise ConfigError(
        "the step here would not be the trainer's"
        + (f": {lines[0]}" if len(lines) == 1 else ":\n  " + "\n  ".join(lines)),
        fix=f"{instead}to go on without, say update.leave_out: [{', '.join(names)}]",
    )


def _sentence(difference: Difference, names: list[str], total: int) -> str:
    where = "" if len(names) == total else f" ({some_names(names)})"
    return f"{difference.sentence[0].upper()}{difference.sentence[1:]}{where}."


def _rewards(config: ProbeConfig, files: Mapping[str, TrainerFiles]) -> Iterator[str]:
    """Where the trainer logged more or fewer rewards than the user gives."""
    mine = len(config.update.rewards)
    for logged in dict.fromkeys(of_one.rewards for of_one in files.values()):
        if logged and len(logged) != mine:
            yield (
                f"The trainer logged {len(logged)} reward{'s' if len(logged) > 1 else ''} ({', '.join(logged)}), and "
                f"`update.reward` names {mine}: it has to list them in this order, or to be their weighted sum."
            )


def check_weights(config: ProbeConfig) -> None:
    """Refuse other numbers of rewards and of their weights. Raises ConfigError."""
    update = config.update
    if update.reward_weights and len(update.reward_weights) != len(update.rewards):
        raise ConfigError(
            f"update.reward names {len(update.rewards)} and update.reward_weights has {len(update.reward_weights)}",
            cause="the trainer had several rewards, and update.reward is to list all of them in its order",
            fix="list them; or set update.reward_weights: [] where your function is their weighted sum",
        )


def _contradictions(
    config: ProbeConfig, said: Mapping[str, Mapping[str, Reading]], given: set[str], total: int
) -> Iterator[str]:
    """Where the user says one thing and the trainer's files another."""
    for key in (key for key in said if key in given):
        mine = value_of(config, key)
        if key == "update.scale_rewards" and mine == "auto":
            mine = divided_by(config.update.loss, mine)
        others: dict[str, list[str]] = {}
        for name, reading in said[key].items():
            if reading.value != mine:
                others.setdefault(f"{_text(reading.value)} in {reading.source}", []).append(name)
        for other, names in others.items():
            where = "" if len(names) == total else f" of {some_names(names)}"
            yield f"`{key}` is {_text(mine)} in the configuration, and {other}{where}."


def _table(
    settled: ProbeConfig, found: Mapping[str, Reading], given: set[str], files: Mapping[str, TrainerFiles]
) -> Iterator[Setting]:
    for key in OF_THE_TRAINING:
        value, reading = value_of(settled, key), found.get(key)
        if key in _PATHS:  # the same wherever it lies
            value = [Path(one).name for one in value] if isinstance(value, list) else Path(value).name
        if key in given:
            same = reading is not None and value == reading.value
            yield Setting(key, value, f"{SET}, as {reading.source} says" if same and reading else SET)
        elif reading is not None:
            yield Setting(key, value, f"read from {reading.source}")
        elif key == "update.learning_rate":
            yield Setting(key, value, "read from optimizer.pt")
        elif key == "policy.base_model":
            if any(of_one.is_adapter for of_one in files.values()):
                yield Setting(key, value, "read from adapter_config.json")
        elif key == "update.reference" and any(of_one.has_reference for of_one in files.values()):
            if settled.update.kl_beta:
                yield Setting(key, "ref", "read from the checkpoints")
        elif key in _OF_SOME_RUNS:
            continue
        elif key != "update.optimizer_state" and (key != "update.reference" or settled.update.kl_beta):
            yield Setting(key, value, ASSUMED)


def _check_combination(config: ProbeConfig) -> None:
    """Refuse settings of the step that contradict each other."""
    update = config.update
    _check_phase(config)
    _check_rehearsal(config)
    if update.reference and not update.kl_beta:
        raise ConfigError(
            "update.reference: a reference policy has no part in a loss without a KL term",
            fix="Set kl_beta, or leave it out",
        )
    if update.multi_objective_aggregation != "sum_then_normalize" and update.loss in ("rloo", "reinforce"):
        raise ConfigError(
            f"update.multi_objective_aggregation: {update.loss} has no rewards that are normalised one by one",
            fix="leave it out, or take a loss of GRPO",
        )
    if update.scale_rewards == "auto" and ":" in update.loss:
        raise ConfigError(
            "update.scale_rewards: it is auto, which goes by how a loss was published, and this one is your own",
            fix="Set scale_rewards: group (advantages divided by the standard deviation of their group) or none",
        )


def _check_phase(config: ProbeConfig) -> None:
    """Refuse a rollout that cannot be cut into so many minibatches. Raises ConfigError."""
    batch, phase = config.batch_config, config.update.phase
    responses = batch.B_U * batch.G
    if phase.follow and responses % phase.minibatches:
        raise ConfigError(
            f"update.phase.minibatches is {phase.minibatches}, and U has {responses} responses "
            f"({batch.B_U} prompts × {batch.G})",
            cause="U is the whole rollout here, which is cut into minibatches of equal size",
            fix="set batch_config.B_U to the prompts of a rollout, or another number of minibatches",
        )
    with_kl = [name for name, value in map(asked_in_phase, phase.interventions) if name == "kl_beta" and value]
    if with_kl and not config.update.kl_beta:
        raise ConfigError(
            "update.phase.interventions has kl_beta, and the run has no reference policy",
            fix="set update.kl_beta and update.reference, or leave it out",
        )
    if phase.delta and phase.delta <= 1:
        raise ConfigError(
            f"update.phase.delta is {phase.delta:g}: a dual clip at or below 1 clips on-policy",
            fix="set it above 1, as trainers do (verl: clip_ratio_c = 3), or leave it out",
        )


def _check_rehearsal(config: ProbeConfig) -> None:
    """Refuse to rehearse steps that are not on fresh responses of their own. Raises ConfigError."""
    if config.lab.rehearse.steps and config.batch_config.U.source:
        raise ConfigError(
            "lab.rehearse takes steps on fresh responses, and batch_config.U.from is a recorded batch",
            fix="leave one of them out",
        )
    if config.lab.rehearse.steps and config.update.phase.steps > 1:
        raise ConfigError(
            "lab.rehearse takes one step on each rollout, and update.phase follows several",
            fix="leave one of them out",
        )


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
