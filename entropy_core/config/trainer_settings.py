"""Our settings as the files of a checkpoint say them."""

import json
from typing import Any, NamedTuple

from entropy_core.checkpoints.trainer_files import TrainerFiles
from entropy_core.checkpoints.training_args import TRAINING_ARGUMENTS
from entropy_core.config.trainer_differences import Difference, differences, place_in_rollout, shown
from entropy_core.config.trainer_fields import (
    LOSSES,
    OF_THE_PHASE,
    SETTINGS,
    SPECIAL_TOKENS_SINCE,
)


class Reading(NamedTuple):
    """A setting of ours that a file says.

    Attributes:
        key: ours, such as `generation.temperature`.
        value: of it.
        source: the file, and what in it says so.
    """

    key: str
    value: Any
    source: str


def readings(files: TrainerFiles, follows: bool = False) -> tuple[list[Reading], list[Difference]]:
    """What the files of a checkpoint say of our settings, and what they say that is not modelled.

    Args:
        files: of one checkpoint.
        follows: whether all steps on a rollout are taken, and not the first alone.

    Returns:
        Settings that are read, each key once; and differences.
    """
    read, differ = _Reader(files, follows).read()
    return read, [*differ, *differences(files, follows)]


class _Reader:
    """The settings that a `training_args.bin` says."""

    def __init__(self, files: TrainerFiles, follows: bool) -> None:
        self.files, self.arguments, self.follows = files, dict(files.arguments), follows
        self.found: list[Reading] = []
        self.differ: list[Difference] = []

    def read(self) -> tuple[list[Reading], list[Difference]]:
        if "max_grad_norm" in self.arguments:
            self._number("max_grad_norm", self.arguments["max_grad_norm"] or 0.0, float)
        elif self.files.clipping is not None:
            norm, source = self.files.clipping
            self.found.append(Reading(SETTINGS["max_grad_norm"], norm, source))
        if self.files.kind in ("GRPO", "RLOO"):
            self._number("temperature", self.arguments.get("temperature"), float)
            self._number("max_completion_length", self.arguments.get("max_completion_length"), int)
            self._number("num_generations", self.arguments.get("num_generations"), int)
            self._prompts_per_step()
            self._prompts_and_rewards()
            if self.files.kind == "GRPO":
                self._grpo()
            else:
                self._rloo()
            if self.follows:
                self._phase()
        return self.found, self.differ

    def _phase(self) -> None:
        """The steps on one rollout, and what acts on the later of them."""
        accumulated, iterations = self._count("gradient_accumulation_steps"), self._count("num_iterations")
        parts, drawn = self._parts(), self._count("steps_per_generation")
        if accumulated and (parts % accumulated or (iterations > 1 and 0 < drawn < accumulated)):
            what = f"the trainer cut a rollout into {drawn} batches and accumulated {accumulated}: steps on two of them"
            self.differ.append(Difference("steps_per_generation", what, "refuse", "update.phase.minibatches"))
        elif accumulated:
            self._say("update.phase.minibatches", parts // accumulated, "steps_per_generation")
        if iterations:
            self._say("update.phase.epochs", iterations, "num_iterations")
        for name in OF_THE_PHASE:
            value = self.arguments.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._say(f"update.phase.{name}", float(value), name)
        place = place_in_rollout(self.files)
        if place and place[0] > 1:
            what = (
                f"the next step of the trainer was number {place[0]} of {place[1]} on its rollout; here a new rollout "
            )
            self.differ.append(Difference("steps_per_generation", f"{what}begins with it", "warn"))
        if (loss := self.arguments.get("loss_type")) in ("sapo", "vespo"):
            what = f"the trainer had loss_type = {loss}, whose later steps on a rollout are not modelled"
            self.differ.append(Difference("loss_type", what, "refuse", "update.loss"))

    def _parts(self) -> int:
        """Batches that a rollout is cut into, and those of several rollouts where one step has that many."""
        drawn, accumulated = self._count("steps_per_generation"), self._count("gradient_accumulation_steps")
        return drawn if drawn and accumulated % drawn else max(drawn, accumulated)

    def _prompts_and_rewards(self) -> None:
        """How prompts become tokens, and rewards one number."""
        since = SPECIAL_TOKENS_SINCE[self.files.kind]
        with_it = since in self.arguments
        why = f"{self.files.kind} of a release {'with' if with_it else 'without'} {since}"
        self.found.append(Reading("batch_config.add_special_tokens", with_it, f"{TRAINING_ARGUMENTS} ({why})"))
        for name, kind, what in (
            ("chat_template_kwargs", dict, "the chat template was given what cannot be read"),
            ("reward_weights", list, "the weights of the rewards cannot be read"),
        ):
            value = self.arguments.get(name)
            if isinstance(value, str):  # as a command line has it
                value = _json(value)
            if isinstance(value, kind) and _is_json(value):
                weights = isinstance(value, list)
                self._say(SETTINGS[name], [float(weight) for weight in value] if weights else value, name)
            elif value is not None:
                self.differ.append(
                    Difference(name, f"the trainer had {name} = {shown(value)}: {what}", "refuse", SETTINGS[name])
                )
        if (how := self.arguments.get("multi_objective_aggregation")) in ("sum_then_normalize", "normalize_then_sum"):
            self._say("update.multi_objective_aggregation", how, "multi_objective_aggregation")
        elif how is not None:
            what = f"the trainer had multi_objective_aggregation = {shown(how)}, which is not modelled"
            self.differ.append(Difference("multi_objective_aggregation", what, "refuse", ""))

    def _number(self, name: str, value: Any, kind: type) -> None:
        if isinstance(value, int | float) and not isinstance(value, bool):
            self._say(SETTINGS[name], kind(value), name)

    def _prompts_per_step(self) -> None:
        """B_U: responses of one optimizer step over those to one prompt."""
        one, accumulated = (self._count(n) for n in ("per_device_train_batch_size", "gradient_accumulation_steps"))
        responses, devices = self._count("num_generations"), max(1, self._count("_n_gpu"))
        if not (one and accumulated and responses):
            return
        processes, how = self._processes(one)
        self.arguments["processes"] = processes * devices
        steps, word = (self._parts(), "of a rollout") if self.follows else (accumulated, "accumulated")
        total = one * devices * steps * processes
        said = f"{one * devices} responses × {steps} {word} × {how} / {responses} per prompt"
        if total % responses or total == responses:
            whole = "rollout" if self.follows else "step"
            fact = f"a {whole} of the trainer takes {total} responses, with {responses} to a prompt ({said})"
            few = "which is one prompt" if total == responses else "which is no whole number of prompts"
            self.differ.append(
                Difference("per_device_train_batch_size", f"{fact}: {few}", "refuse", "batch_config.B_U")
            )
        else:
            self._say("batch_config.B_U", total // responses, said)

    def _count(self, name: str) -> int:
        value = self.arguments.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0

    def _processes(self, one: int) -> tuple[int, str]:
        """How many processes trained, and how to say it."""
        state = self.arguments.get("distributed_state")
        count = state.get("num_processes") if isinstance(state, dict) else None
        if not isinstance(count, int) or count < 1:
            batch, steps = self._count("generation_batch_size"), self._count("steps_per_generation")
            count = batch // (one * steps) if batch and steps and batch % (one * steps) == 0 else 0
        if count:
            return count, f"{count} process{'es' if count > 1 else ''}"
        return 1, "1 process, which is assumed"

    def _grpo(self) -> None:
        name = self.arguments.get("loss_type", "grpo")  # of releases that had one loss
        loss = LOSSES.get(name) if isinstance(name, str) else None
        if loss is None:
            what = f"the trainer had loss_type = {shown(name)}: that loss is not modelled"
            self.differ.append(Difference("loss_type", what, "refuse", "update.loss"))
        else:
            same = "" if loss == name else f" = {name}, whose gradient is that of {loss} on-policy"
            self._say("update.loss", loss, f"loss_type{same}")
        scaled = self.arguments.get("scale_rewards", True)
        if scaled in (True, "group", "batch", False, "none"):
            named = {True: "group", False: "none"}.get(scaled, scaled)
            self._say("update.scale_rewards", named, "scale_rewards")
        else:
            what = f"the trainer had scale_rewards = {shown(scaled)}: advantages were divided otherwise"
            self.differ.append(Difference("scale_rewards", what, "refuse", "update.scale_rewards"))
        self._number("beta", self.arguments.get("beta"), float)
        self._flag("mask_truncated_completions")
        if self.arguments.get("beta"):
            self._flag("use_bias_correction_kl")
        if (level := self.arguments.get("importance_sampling_level")) in ("token", "sequence"):
            self._say("update.importance_sampling_level", level, "importance_sampling_level")
        if loss == "cispo":
            cap = self.arguments.get("epsilon_high")
            self._number("epsilon_high", self.arguments.get("epsilon") if cap is None else cap, float)
        self._of_high_entropy()

    def _of_high_entropy(self) -> None:
        """The entropy bonus, the quantile of the entropies, and the micro-batches over which they and BNPO average."""
        self._number("top_entropy_quantile", self.arguments.get("top_entropy_quantile"), float)
        coefficient = self.arguments.get("entropy_coef")
        if self.arguments.get("use_adaptive_entropy"):
            control = self.files.entropy_control
            coefficient = 0.0 if _waits(self.files) else control.get("entropy_coef", coefficient)
            self._number("use_adaptive_entropy", coefficient, float)
        else:
            self._number("entropy_coef", coefficient, float)
        quantile = self.arguments.get("top_entropy_quantile")
        of_quantile = isinstance(quantile, int | float) and quantile < 1
        one, processes = self._count("per_device_train_batch_size"), self.arguments.get("processes", 1)
        parts = self._count("gradient_accumulation_steps") * processes
        if one and parts > 1:
            size = one * max(1, self._count("_n_gpu"))
            self._say("update.micro_batch", size, "per_device_train_batch_size")
        if of_quantile and processes > 1:
            what = "the threshold of top_entropy_quantile was taken over all processes, and is that of one here"
            self.differ.append(Difference("top_entropy_quantile", what, "warn"))

    def _say(self, key: str, value: Any, name: str) -> None:
        self.found.append(Reading(key, value, f"{TRAINING_ARGUMENTS} ({name})"))

    def _flag(self, name: str) -> None:
        if isinstance(value := self.arguments.get(name), bool):
            self._say(SETTINGS[name], value, name)

    def _rloo(self) -> None:
        self._say("update.loss", "rloo", "RLOO")
        self._flag("normalize_advantages")
        if bounds := self.arguments.get("reward_clip_range"):
            self._say("update.reward_clip_range", [float(bound) for bound in bounds], "reward_clip_range")
        self._flag("mask_truncated_completions")
        if self.arguments.get("beta"):
            self._number("beta", self.arguments["beta"], float)
            self._say("update.kl_in", "reward", "RLOO")


def _waits(files: TrainerFiles) -> bool:
    """Whether the adaptive entropy bonus is out of the loss of the next step: above its target, or at 0."""
    control = files.entropy_control
    entropy, target = control.get("last_world_entropy"), files.arguments.get("entropy_target")
    if control.get("entropy_coef") == 0:
        return True
    return isinstance(entropy, int | float) and isinstance(target, int | float) and entropy > target


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _is_json(value: Any) -> bool:
    """Whether it is plain values through and through; an inert stand-in is not."""
    try:
        json.dumps(value, allow_nan=False)
        return not isinstance(value, list) or all(isinstance(n, int | float) and abs(n) < 1e9 for n in value)
    except (TypeError, ValueError, RecursionError):
        return False
