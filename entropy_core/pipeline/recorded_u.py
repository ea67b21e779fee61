"""Recorded rollouts in place of a sampled U: which files belong to which checkpoint, checked before anything runs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from entropy_core.checkpoints.architecture import read_architecture
from entropy_core.checkpoints.layout import Layout
from entropy_core.checkpoints.tokenizer import load_tokenizer
from entropy_core.config.schema import ProbeConfig
from entropy_core.errors import ConfigError
from entropy_core.files.digests import file_digest
from entropy_core.losses.recorded import CLIPPED
from entropy_core.pipeline.settings import ASSUMED, Setting, Settled, set_keys, value_of
from entropy_core.pipeline.usable import UsableCheckpoint
from entropy_core.prompts.rollout_files import (
    NAMED_BY_STEP,
    NoRolloutsError,
    counts_from,
    files_of_step,
    read_rollouts,
)
from entropy_core.prompts.rollouts import Ends, Pool, as_batch, in_groups


class RecordedU(NamedTuple):
    """The rollouts of the step after a checkpoint.

    Args:
        files: by content digest.
        number: of the step, as the files count.
        says_its_step: whether a file's name or rows say of which step it is.
        prompts: how many groups there are.
        responses: to each prompt.
        columns: what was recorded of each response.
    """

    files: Mapping[str, Path]
    number: int
    says_its_step: bool
    prompts: int
    responses: int
    columns: frozenset[str]

    @property
    def name(self) -> str:
        """Of the file, or of the first of several."""
        return next(iter(self.files.values())).name

    def rewarded(self, config: ProbeConfig) -> bool:
        """Whether the recorded rewards are those that advantages are made of; else the functions are called."""
        return "reward" in self.columns and config.update.multi_objective_aggregation == "sum_then_normalize"

    def referenced(self, config: ProbeConfig) -> bool:
        """Whether the loss has a KL term whose reference log-probabilities were recorded."""
        return bool(config.update.kl_beta) and "ref_logprobs" in self.columns


def recorded_u(config: ProbeConfig, step: int) -> RecordedU:
    """Find and read the rollouts of the step after a checkpoint.

    Args:
        config: configuration of the sweep.
        step: of the checkpoint.

    Returns:
        What was recorded.

    Raises:
        NoRolloutsError: there are none of this step.
        ConfigError: their groups differ in size.
        PromptError: a file cannot be read.
    """
    asked = config.batch_config.U
    source = Path(asked.source)
    first = counts_from(source) if asked.first_step == "auto" else int(asked.first_step)
    files = files_of_step(source, step + first)
    rows = read_rollouts(files, step + first)
    groups = in_groups(rows, files[0].name)
    by_digest = {file_digest(file): file.resolve() for file in files}
    certain = source.is_dir() or "step" in rows[0] or bool(NAMED_BY_STEP.fullmatch(source.name))
    return RecordedU(by_digest, step + first, certain, len(groups), len(groups[0]), frozenset(rows[0]))


def with_sizes(config: ProbeConfig, settled: Settled, recorded: Mapping[str, RecordedU]) -> Settled:
    """Add the sizes of U, which the files have; a size that is set or was the trainer's has to be the same.

    Args:
        config: as the user gave it.
        settled: with what the checkpoints say.
        recorded: by name of the checkpoint; empty where U is sampled.

    Returns:
        The same with `batch_config.B_U` and `batch_config.G` as the files have them.

    Raises:
        ConfigError: the files have other sizes, or each has its own; or a file does not say its step, and there are
            several checkpoints.
    """
    given = set_keys(config)
    found: dict[str, int] = {}
    for name, of_one in recorded.items():
        for key, size in (("batch_config.B_U", of_one.prompts), ("batch_config.G", of_one.responses)):
            said = value_of(config, key) if key in given else settled.read.get(key, found.get(key, size))
            if said != size:
                whose = "is set to" if key in given else "is, by the files of the checkpoints,"
                raise ConfigError(
                    f"{of_one.name} has {of_one.prompts} prompts with {of_one.responses} responses each, and {key} "
                    f"{whose} {said} ({name})",
                    cause="the file of one of several processes, of a part of a step, or of several steps",
                    fix=f"give the whole step; or set {key}: {size}, if the step was taken on these alone",
                )
            found[key] = size
    stepless = [of_one for of_one in recorded.values() if not of_one.says_its_step]
    if len(stepless) > 1:
        raise ConfigError(
            f"{stepless[0].name} does not say of which step it is, and there are {len(recorded)} checkpoints",
            fix="probe the one whose next step it was, or give a folder with a file for each step",
        )
    source = f"read from {Path(config.batch_config.U.source).name}"
    table = tuple(
        Setting(one.key, found[one.key], source) if one.key in found and one.source == ASSUMED else one
        for one in settled.settings
    )
    return replace(settled, read={**settled.read, **found}, settings=table)


def recorded_of_each(
    config: ProbeConfig, usable: Sequence[UsableCheckpoint]
) -> tuple[list[UsableCheckpoint], dict[str, RecordedU], list[str]]:
    """The rollouts of each checkpoint.

    Args:
        config: configuration of the sweep.
        usable: checkpoints whose files are sound.

    Returns:
        The checkpoints that have rollouts, all of them where U is sampled; their rollouts, by name; and a sentence
        about each of the others.

    Raises:
        ConfigError: there are no rollouts for the only checkpoint, or for any, or the configuration says to refuse one
            without.
        PromptError: a file cannot be read.
    """
    if not config.batch_config.U.source:
        return list(usable), {}, []
    strict = config.execution.unusable_checkpoints == "refuse" or len(usable) == 1
    kept: list[UsableCheckpoint] = []
    found: dict[str, RecordedU] = {}
    without: list[str] = []
    for one in usable:
        try:
            found[one.name] = recorded_u(config, one.checkpoint.step)
        except NoRolloutsError as error:
            if strict or (one is usable[-1] and not found):
                raise
            without.append(f"{one.name} is left out: {error}")
        else:
            kept.append(one)
    return kept, found, without


def check_recorded(
    config: ProbeConfig, of_one: RecordedU, pool: tuple[Any, Sequence[Sequence[int]]], home: Path, layout: Layout
) -> tuple[str, ...]:
    """Make the batch as its stage will, so that what is wrong is said before anything runs.

    Args:
        config: configuration of the sweep, with what the checkpoints say.
        of_one: the rollouts of a checkpoint.
        pool: the prompts that U may have, and the token ids of each.
        home: directory of its tokenizer.
        layout: of the checkpoint.

    Returns:
        Warnings.

    Raises:
        ConfigError, PromptError: as `prompts.rollouts.as_batch`.
    """
    tokenizer, most = load_tokenizer(home), config.generation.max_new_tokens
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ends = Ends(eos, most, read_architecture(layout)[0].vocabulary)
    groups = in_groups(read_rollouts(list(of_one.files.values()), of_one.number), of_one.name)
    prompts, token_ids = pool
    made = as_batch(groups, Pool(prompts.table["prompt"].to_pylist(), token_ids), tokenizer, ends, of_one.name)
    if not made.retokenised:
        return ()
    return (
        f"{of_one.name} has texts without token ids. They were tokenised anew, and responses of fewer than {most} "
        "tokens ended with EOS: the tokens may differ from the trainer's, and then so does the step. Record token ids, "
        "as `ProbeCallback` does.",
    )


def remarks(
    of_one: RecordedU, batch: Mapping[str, Any], update: Mapping[str, Any], old_logprobs: str, micro_batch: int = 0
) -> tuple[list[str], list[str]]:
    """Say how U was recorded, and where it differs from what is computed of it.

    Args:
        of_one: the rollouts of a checkpoint.
        batch: summary of recorded-u-batch.
        update: summary of compute-update.
        old_logprobs: `batch_config.U.old_logprobs`.
        micro_batch: responses in a micro-batch, if the loss averages over each of them; else 0.

    Returns:
        Notes, and warnings.
    """
    if not batch.get("of_tokens"):
        ratios = "ratios of the loss are 1"
    else:
        ratios = f"ratios of the loss are to the {old_logprobs} log-probabilities"
    certain = "" if of_one.says_its_step else ", though nothing in it says so"
    advantages = "as recorded" if "advantage" in of_one.columns else "computed"
    notes = [
        f"U is the batch of step {of_one.number} as {of_one.name} has it{certain}: {of_one.prompts} prompts × "
        f"{of_one.responses} responses, advantages {advantages}; {ratios}."
    ]
    differing, warnings = update.get("differing", {}), []
    if differing.get("advantages"):
        warnings.append(
            f"{differing['advantages']} recorded advantages of {of_one.name} differ from those that `update` makes of "
            f"the rewards, by up to {differing['largest_difference']:.3g}; the recorded ones are used. Likely cause: "
            "another reward, other weights, or another scale_rewards."
        )
    if differing.get("clipped"):
        far = (
            f"The ratios of {differing['clipped']:.2%} of the tokens of {of_one.name} differ from 1 by more than "
            f"{CLIPPED:g} (|Δ log π| up to {differing['log_ratio']:.3g})"
        )
        if update.get("loss", {}).get("off_policy"):
            notes.append(f"{far}; they are clipped at the bounds of `update.phase`.")
        else:
            warnings.append(
                f"{far}: a trainer that clips them takes another step. With `update.phase.follow`, its bounds are kept."
            )
    if 0 < micro_batch < of_one.prompts * of_one.responses:
        warnings.append(
            f"The loss averages over micro-batches of {micro_batch} responses, and {of_one.name} does not say which "
            "response was in which: they are drawn anew, so that the step is not quite the trainer's."
        )
    if stopped := batch.get("stopped"):
        warnings.append(
            f"{stopped} responses of {of_one.name} end with neither EOS nor at the maximum length; they are taken as "
            "complete."
        )
    return notes, warnings
