"""A callback for the trainers of transformers and TRL, in whose run directory `entropy-probe watch` works.

    from entropy_core.training import ProbeCallback

    trainer = GRPOTrainer(...)
    trainer.add_callback(ProbeCallback(trainer))

It writes what a probe needs and no checkpoint records, and it brings what the probe has found into the trainer's log.
It is idle but for that: it does nothing in a step, lists one small folder when the trainer logs, and writes the token
ids of one batch when it saves. What goes wrong in it is a warning: no training ends because of the probe.
"""

import inspect
import io
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import TrainerCallback

from entropy_core.config import plain_yaml
from entropy_core.errors import one_line
from entropy_core.files.checkpoint import RUN_HINT
from entropy_core.files.run_folder import FOLDER, numbers_told, stop_file, write_whole

log = logging.getLogger("entropy_probe.training")

MOST_PROMPTS = 200_000
"""Rows of a dataset that is written beside the checkpoints; where a longer one is, you say in entropy-probe.yaml."""

LOGGED = ("H", "delta_h1", "delta_h", "step")
"""What a log entry has of a probed checkpoint, after `entropy_probe/`; the log history has its verdict, too."""

_OURS = "# Written by ProbeCallback, and again when a training begins; without this line it stays as it is.\n"
_PREFIX = "entropy_probe/"


def _harmless(hook: Callable[..., None]) -> Callable[..., None]:
    """Make a hook of the trainer do nothing outside the main process, and warn in place of raising."""

    @wraps(hook)
    def guarded(self: "ProbeCallback", args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.is_world_process_zero:
            try:
                hook(self, args, state, control, **more)
            except Exception as error:  # anything is better than an end of the training
                log.warning("%s of entropy-probe failed, and the training goes on: %s", hook.__name__, one_line(error))

    return guarded


class ProbeCallback(TrainerCallback):
    """Writes what a probe needs, and logs what it has found.

    In the run directory, `entropy-probe.yaml` gets the prompts (`entropy-probe/prompts.parquet`, the training dataset)
    and the rewards, and `entropy-probe/batches/checkpoint-N.parquet` the token ids and advantages of the batch before a
    save, as far as the trainer exposes them (those of the main process). All else is in the checkpoints.

    In the log, the first entry after a checkpoint was probed has `entropy_probe/H`, `entropy_probe/delta_h1`,
    `entropy_probe/delta_h`, and `entropy_probe/step`, the step of that checkpoint, for every tracker that the trainer
    reports to. The training saves and stops when somebody makes a file `entropy-probe/stop`, unless it has several
    processes.

    Args:
        trainer: to which the callback is added.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._known: set[str] = set()  # files of numbers that were logged

    @_harmless
    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write what no checkpoint records."""
        run = Path(args.output_dir)
        handler = self._trainer.callback_handler
        handler.callbacks.remove(self)
        handler.callbacks.insert(0, self)  # before those that report, which are given the same log entry
        stop_file(run).unlink(missing_ok=True)
        logged = {entry.get(f"{_PREFIX}step") for entry in state.log_history}
        earlier = numbers_told(run, set())
        self._known = {name for name, told in earlier if not state.global_step or told.get("step") in logged}
        _write_hint(run, getattr(self._trainer, "train_dataset", None), getattr(self._trainer, "reward_funcs", []))

    @_harmless
    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the last batch."""
        batches = getattr(self._trainer, "_buffered_inputs", None)
        if batches and all(
            isinstance(of, Mapping) and "completion_ids" in of and "tool_mask" not in of for of in batches
        ):
            path = Path(args.output_dir) / FOLDER / "batches" / f"checkpoint-{state.global_step}.parquet"
            write_whole(path, _parquet(_tokens(batches)))

    @_harmless
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Add the numbers of the earliest checkpoint that is not in the log yet."""
        run = Path(args.output_dir)
        fresh = sorted(numbers_told(run, self._known), key=lambda told: told[1].get("step", 0))
        if fresh:
            name, numbers = fresh[0]
            self._known.add(name)
            found = {_PREFIX + key: numbers[key] for key in LOGGED if isinstance(numbers.get(key), int | float)}
            logs.update(found)
            state.log_history[-1].update(found | {f"{_PREFIX}verdict": numbers.get("verdict")})
        if args.world_size == 1 and stop_file(run).exists():
            control.should_save = control.should_training_stop = True


def _write_hint(run: Path, dataset: Any, rewards: Sequence[Any]) -> None:
    """Say in the run directory which prompts and rewards the training has, unless somebody has said it already."""
    hint = run / RUN_HINT
    if hint.exists() and not hint.read_text(encoding="utf-8").startswith(_OURS):
        return
    known: dict[str, Any] = {}
    remarks = []
    if hasattr(dataset, "with_format") and hasattr(dataset, "num_rows") and dataset.num_rows <= MOST_PROMPTS:
        prompts = run / FOLDER / "prompts.parquet"
        content = _parquet(dataset.with_format("arrow")[:])
        if not prompts.exists() or prompts.read_bytes() != content:  # a probe may be reading it
            write_whole(prompts, content)
        known["batch_config"] = {"dataset_name": f"{FOLDER}/prompts.parquet"}
    else:
        remarks.append(f"# batch_config.dataset_name: a stream, or more than {MOST_PROMPTS} rows: say where it is\n")
    names = [_name_of(reward) for reward in rewards]
    if names and all(names):
        known["update"] = {"reward": names}
    elif names:
        called = ", ".join(getattr(reward, "__name__", type(reward).__name__) for reward in rewards)
        remarks.append(
            f"# update.reward: {called}: put each function into a module of its own, and name it as file.py:function\n"
        )
    for remark in remarks:
        log.warning("%s has to say what this trainer does not: %s", hint, remark.removeprefix("# ").rstrip())
    if known:
        write_whole(hint, (_OURS + "".join(remarks) + plain_yaml.dump(known)).encode())


def _name_of(reward: Any) -> str:
    """How a configuration names a reward function; empty for one that only this process has."""
    module, name = getattr(reward, "__module__", ""), getattr(reward, "__qualname__", "")
    home = sys.modules.get(module)
    if home is None or module == "__main__" or not name.isidentifier() or getattr(home, name, None) is not reward:
        return ""
    file = inspect.getsourcefile(home)
    return f"{module}:{name}" if "." in module or file is None else f"{Path(file).resolve()}:{name}"


def _tokens(batches: Sequence[Mapping[str, Any]]) -> pa.Table:
    """The sequences of a generation batch, in the order of the micro-batches: ids without padding, and advantages.

    Where the trainer has them, also the log-probabilities that its loss has ratios to, those of the law that drew the
    tokens, and those of the reference.
    """
    columns: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "advantage": []}
    of_tokens = {name: key for name, key in _logprobs_of(batches[0]).items() if all(key in batch for batch in batches)}
    columns |= {name: [] for name in of_tokens}
    for batch in batches:
        kept = {name: batch[f"{name}_mask"].bool() for name in ("prompt", "completion")}
        kept["completion"] |= ~kept["completion"].any(dim=1, keepdim=True)  # cut, and masked as a whole
        for name, mask in kept.items():
            columns[f"{name}_ids"] += _without_padding(batch[f"{name}_ids"], mask)
        for name, key in of_tokens.items():
            columns[name] += _without_padding(batch[key], kept["completion"])
        columns["advantage"] += batch["advantages"].tolist()
    ids, numbers = pa.list_(pa.int32()), pa.list_(pa.float64())
    types = {"prompt_ids": ids, "completion_ids": ids, "advantage": pa.float64()} | dict.fromkeys(of_tokens, numbers)
    return pa.table(columns, schema=pa.schema(list(types.items())))


def _logprobs_of(batch: Mapping[str, Any]) -> dict[str, str]:
    """What TRL calls the log-probabilities in a batch. With its correction, ratios are to those of the sampler."""
    corrected = "importance_sampling_ratio" in batch
    return {
        "old_logprobs": "sampling_per_token_logps" if corrected else "old_per_token_logps",
        "sampling_logprobs": "sampling_per_token_logps",
        "ref_logprobs": "ref_per_token_logps",
    }


def _without_padding(rows: Any, mask: Any) -> list[list[Any]]:
    pairs = zip(rows.tolist(), mask.tolist(), strict=True)
    return [[value for value, kept in zip(*pair, strict=True) if kept] for pair in pairs]


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()
