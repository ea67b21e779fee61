"""Configurations of the code before this one: `entropy-probe legacy old.yaml > new.yaml`.

Two generations of files are read, those around `probe_rework` and `importance_sampling`, and the later ones around
`true_delta_h` and `approx_delta_h`. What has a meaning here is carried over; what changed, was dropped or had to be
assumed is said, with the reason, in comments at the top of the new file and on stderr.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args

from entropy_core.config import plain_yaml
from entropy_core.config.legacy_keys import DROPPED, REWARD_OF, SAME
from entropy_core.config.paths import Origin
from entropy_core.config.read import parse_config
from entropy_core.errors import ConfigError
from entropy_core.numerics.advantages import Loss

Flat = dict[str, Any]


class Converter:
    """What is left of the old keys, the new ones, and what there is to say. `new` and `remarks` are the results."""

    def __init__(self, old: Flat) -> None:
        self.old, self.new = dict(old), Flat()
        self.remarks: list[str] = []

    def moved(self, key: str, to: str, value: Any = None, why: str = "") -> None:
        """Put an old key, or another value in its place, under a new name."""
        before = self.old.pop(key)
        value = before if value is None else value
        self.new[to] = value
        if key != to or value != before:
            self.remarks.append(
                f"changed   {_shown(key, before)} → {_shown(to, value)}" + (f"  ({why})" if why else "")
            )

    def assumed(self, key: str, value: Any, why: str) -> None:
        """Say what no old key said."""
        if key not in self.new:
            self.new[key] = value
            self.remarks.append(f"assumed   {_shown(key, value)}  ({why})")

    def dropped(self, key: str, why: str) -> None:
        """Leave an old key out."""
        self.remarks.append(f"dropped   {_shown(key, self.old.pop(key))}  ({why})")

    def first(self, *keys: str) -> str:
        """The first of these old keys that is there and says something, or an empty string."""
        return next((key for key in keys if self.old.get(key) not in (None, "", [])), "")


def convert(old: Mapping[str, Any], name: str, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """An old configuration in the new keys.

    Args:
        old: nested dictionaries as YAML gives them.
        name: of the new configuration.
        folder: that relative paths start at, as for the old code at the folder in which it was started. In the new
            configuration they are absolute.

    Returns:
        The new configuration, which `parse_config` takes, and a remark for each key that changed, was dropped or was
        assumed.

    Raises:
        ConfigError: it names no checkpoint, or has a value that cannot be carried over.
    """
    c = Converter(dict(_flat(old)))
    _checkpoint(c, Origin(folder))
    _batches(c)
    _law(c)
    _update(c)
    _estimators(c)
    for key in list(c.old):
        why = next(
            (why for pattern, why in DROPPED.items() if fnmatchcase(key, pattern)), "not a key that is known here"
        )
        c.dropped(key, why)
    new: dict[str, Any] = {"name": name}
    for key, value in c.new.items():
        section, _, last = key.rpartition(".")
        (new.setdefault(section, {}) if section else new)[last] = value
    parse_config(new, f"the new form of {name}")
    return new, c.remarks


def _checkpoint(c: Converter, origin: Origin) -> None:
    key = c.first("checkpoint.checkpoint_path")
    if not key:
        raise ConfigError(
            "the old configuration names no checkpoint",
            cause="its runner was told on the command line",
            fix="write the path to checkpoint.checkpoint_path and convert it again",
        )
    path = str(c.old[key])
    whole = path.removesuffix("/").removesuffix("/model")
    why = "a list; patterns are expanded" + ", and model/ is found" * (whole != path)
    c.moved(key, "checkpoints", [origin.locate(whole)], why)
    if (key := c.first("checkpoint.device_map")) and c.old[key] in ("auto", "cpu", "cuda"):
        c.moved(key, "execution.device")


def _batches(c: Converter) -> None:
    for key in SAME:
        if key in c.old:
            c.moved(key, key)
    both = c.old.get("batch_config.B")
    if key := c.first("batch_config.B_E", "batch_config.B_E_values", "batch_config.B"):
        asked = c.old[key] if isinstance(c.old[key], list) else [c.old[key]]
        why = "one sweep has one E; the largest, which the others are the beginning of" if len(asked) > 1 else ""
        c.moved(key, "batch_config.B_E_values", [max(asked, key=_number)], why)
        if "batch_config.B" in c.old:
            c.dropped("batch_config.B", "B_E and B_U say it already")
        c.assumed(
            "batch_config.E_sampling_mode",
            "distinct",
            "as it was, but with G responses to each prompt of E, too; `replacement` with E_total_sequences draws "
            "prompts anew for every response, and has the narrower intervals",
        )
    if (key := c.first("batch_config.B_U_values")) and "batch_config.B_U" not in c.new:
        asked = c.old[key] if isinstance(c.old[key], list) else [c.old[key]]
        c.moved(key, "batch_config.B_U", asked[0], "one sweep has one U")
    if both:
        c.assumed("batch_config.B_U", both, "there was one size for both batches")
    key = c.first("probe_rework.master_seed", "computation_options.master_seed")
    if key and (seed := c.old[key]) != "none":
        c.moved(key, "batch_config.E_batch_seed", why="and U_batch_seed: E and U draw from streams of their own")
        c.new["batch_config.U_batch_seed"] = seed
    if (key := c.first("batch_config.rollout_batch_size")) and "generation.gen_batch_size" not in c.new:
        sequences = _number(c.old[key]) * _number(c.new.get("batch_config.G", 8))
        c.moved(key, "generation.gen_batch_size", sequences, "counted in sequences, of which there were G to a prompt")
    if (key := c.first("memory_config.teacher_force_microbatch_size")) and "generation.tf_batch_size" not in c.new:
        c.moved(key, "generation.tf_batch_size")


def _law(c: Converter) -> None:
    for key, value, why in (
        (
            "generation.top_p",
            1.0,
            "the sampled and the scored distribution must be the same, that of the policy itself",
        ),
        ("generation.do_sample", True, "the entropy of a greedy policy is not estimated"),
    ):
        if key in c.new and c.new[key] != value:
            c.remarks.append(f"changed   {_shown(key, c.new[key])} → {value}  ({why})")
            c.new[key] = value
    if (key := c.first("precision.runtime_dtype")) and c.old[key] in ("float32", "float64"):
        c.moved(key, "policy.dtype")


def _update(c: Converter) -> None:
    key = c.first("true_delta_h.lr_override", "learning_rate")
    if key:
        c.moved(key, "update.learning_rate", _number(c.old[key]), "takes the place of the one in the checkpoint")
    key = c.first("probe_rework.weighting_mode", "computation_options.weighting_mode")
    if key and c.old[key] in get_args(Loss):
        c.moved(key, "update.loss")
    c.assumed("update.loss", "dr_grpo", "the old default; say what your trainer does")
    c.assumed("update.max_grad_norm", 1.0, "TRL's default; say what your trainer does")
    dataset = str(c.new.get("batch_config.dataset_name", "arithmetic"))
    c.assumed("update.reward", REWARD_OF.get(dataset, "exact_match"), "the reward went with the dataset")


def _estimators(c: Converter) -> None:
    sweep = c.old.get("estimator.eta_sweep", True)
    key = c.first(*(("estimator.eta_list", "estimator.single_eta")[:: 1 if sweep else -1]))
    if key:
        asked = c.old[key] if isinstance(c.old[key], list) else [c.old[key]]
        c.moved(key, "importance.etas", [0.0, *dict.fromkeys(map(_number, asked))], "with 0, which is exact")
        c.new["importance.eta_unit"] = "absolute"
    c.assumed("importance.etas", [0.0, 1.0], "no step; and one step of the learning rate, as the old code took")
    key = c.first("true_delta_h.is_mode", "importance.is_mode")
    if key and c.old[key] == "snis":
        c.moved(key, "importance.estimators", ["snis"])
    elif key:
        c.dropped(key, "clipped weights are biased; importance.estimators lists what there is")
    if c.old.get("importance_sampling.use_snis") is True:
        c.moved("importance_sampling.use_snis", "importance.estimators", ["snis"])
    key = c.first("approx_delta_h.normalize")
    if key and c.old[key] in ("per_token", "per_sequence"):
        c.moved(key, "variance.normalizations", [c.old[key]])
    elif key:
        c.dropped(key, "entropy is per token or per sequence; variance.normalizations has both")
    if key := c.first("approx_delta_h.baseline.kind", "estimator.baseline.mode"):
        kept = "none" if c.old[key] == "none" else "time_loo"
        why = "" if kept == c.old[key] else "from the other sequences, so that it does not bias the estimate"
        c.moved(key, "variance.baseline", kept, why)
    if key := c.first("approx_delta_h.simple_baseline.kind"):
        c.dropped(key, "it belonged to use_simple_entropy_for_x")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None or prefix:  # an empty section says nothing
            yield f"{prefix}{key}", value


def _number(value: Any) -> float | int:
    """The number that was meant: YAML 1.1 takes 8e-7 for a text."""
    try:
        return value if isinstance(value, int | float) else float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{value!r:.80} is not a number", fix="correct the old configuration") from None


def _shown(key: str, value: Any) -> str:
    return f"{key}: {str(value)!r:.80}" if isinstance(value, str) else f"{key}: {value!s:.80}"


def convert_file(path: Path) -> int:
    """Print an old configuration in the new keys, and on stderr what changed, was dropped or had to be assumed.

    Args:
        path: of the old file.

    Returns:
        The exit status.

    Raises:
        ConfigError: it is no old configuration, or cannot be converted.
    """
    old, repeated = plain_yaml.read(path, old=True)
    if repeated:
        raise ConfigError(f"{path}: {'; '.join(repeated)}", fix="remove what does not hold")
    if not isinstance(old, Mapping) or not all(isinstance(key, str) for key in old):
        raise ConfigError(f"{path} is no configuration: it is not a list of keys", fix="give an old YAML file")
    if "checkpoints" in old:
        raise ConfigError(f"{path} is a configuration of this version", fix="use it as it is")
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", path.stem) or "probe"
    new, remarks = convert(old, name, Path.cwd())
    print(*remarks, sep="\n", file=sys.stderr)
    print(f"# Converted from {path.name}. What changed, was dropped or had to be assumed:")
    print(*(f"#   {remark}" for remark in remarks), sep="\n")
    print(plain_yaml.dump(new), end="")
    return 0
