"""What the runs that are made here have in common: TRL's trainer, and a directory that is made once.

make_once      a directory that appears whole or not at all, and is found again
say_the_rest   what its checkpoints do not record, for `entropy-probe init`
grpo           TRL's GRPO trainer, one optimizer step per batch of fresh responses
quiet          no progress bars while it runs
"""

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from filelock import FileLock

from entropy_core.errors import ProbeError, StoreError
from entropy_core.files.checkpoint import RUN_HINT

_LOGGED = ("step", "reward", "entropy", "frac_reward_zero_std", "completions/mean_length", "grad_norm")
_COLUMNS = ("step", "reward", "entropy", "zero_variance_groups", "mean_length", "grad_norm")  # our names of these

ON_A_CPU: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,  # trl's default is True
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "report_to": [],
}
"""Settings of a trainer that runs on a CPU and says nothing."""


def make_once(
    out: Path, what: str, manifest: str, own: str, identity: dict[str, Any], make: Callable[[Path], dict[str, Any]]
) -> Path:
    """Makes a directory at `out`, or finds it made; returns its absolute path.

    It appears whole or not at all: it is made in a sibling directory and renamed. What happens is printed.

    Args:
        out: where.
        what: it is, in a few words.
        manifest: name of the file that is written last: the identity, what `make` returned, and the size of each file.
        own: pattern of the names that such a directory has; one with any other belongs to somebody else.
        identity: `settings` and `versions`; a directory is reused only for equal ones.
        make: fills an empty directory.

    Raises:
        StoreError: `out` holds one made otherwise or something else, or cannot be written.
    """
    out = Path(os.path.abspath(out))
    place = out, what, manifest, own, identity
    if _is_complete(*place):
        print(f"{out} already holds this {what}: nothing to do")
        return out
    unfinished = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(out.with_name(f".{out.name}.lock")):
            if not _is_complete(*place):  # another process may have made it meanwhile
                try:
                    shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed process
                    unfinished.mkdir()
                    made = {**identity, **make(unfinished), "files": _sizes(unfinished)}
                    (unfinished / manifest).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
                    shutil.rmtree(out, ignore_errors=True)  # nothing, or an incomplete one
                    os.replace(unfinished, out)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise StoreError(
            f"{out} cannot be written: {error}",
            cause="a full disk, missing permissions, or a file in the way",
            fix="free that path or choose another one",
        ) from error
    print(f"{out} is ready")
    return out


def say_the_rest(run: Path, values: str) -> Path:
    """Write beside the checkpoints what they do not record, unless it is there; returns the run.

    Args:
        run: a directory of `make_once`, whose `own` has to allow `RUN_HINT`.
        values: a part of a configuration, as YAML.
    """
    if not (run / RUN_HINT).exists():
        (run / RUN_HINT).write_text(values, encoding="utf-8")
    return run


def versions(what: str, libraries: Sequence[str], fix: str) -> dict[str, str]:
    """Of Python and of the libraries that a run depends on.

    Raises:
        ProbeError: one is not installed.
    """
    try:
        found = {library: importlib.metadata.version(library) for library in libraries}
    except importlib.metadata.PackageNotFoundError as error:
        raise ProbeError(
            f"The {what} needs {error.name}, which is not installed",
            cause="entropy-probe was installed without the packages that make it",
            fix=fix,
        ) from None
    return {"python": ".".join(map(str, sys.version_info[:2])), **found}


def grpo(
    model: Any,
    tokenizer: Any,
    reward: Callable[..., list[float]],
    rows: list[dict[str, Any]],
    run: Path,
    peft_config: Any = None,
    **settings: Any,
) -> list[dict[str, float]]:
    """TRL's trainer, which saves its checkpoints as it always does; what each began with is printed.

    Args:
        model: the policy.
        tokenizer: its tokenizer.
        reward: with TRL's signature.
        rows: of the prompts: `prompt`, and the columns that the reward wants.
        run: where the checkpoints are saved.
        peft_config: of the adapter that is trained, if one is.
        settings: of TRL's `GRPOConfig`, beside those that are the same for all runs.

    Returns:
        Of each saved step what the trainer logged.
    """
    import huggingface_hub.constants
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=str(run),
        # one optimizer step per batch of fresh responses: nothing is off-policy, no ratio is ever clipped
        num_iterations=1,
        # the whole vocabulary, unscaled: the law that is sampled is the policy itself
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        loss_type="grpo",
        scale_rewards="group",
        beta=0.0,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        logging_steps=1,
        **ON_A_CPU,
        **settings,
    )
    with mock.patch.object(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True):  # trl reports each run
        trainer = GRPOTrainer(
            model,
            reward,
            config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    (run / "README.md").unlink(missing_ok=True)  # trl's model card
    log = trainer.state.log_history
    saved = range(config.save_steps, config.max_steps + 1, config.save_steps)
    found = [dict(zip(_COLUMNS, (log[step - 1][name] for name in _LOGGED), strict=True)) for step in saved]
    print("each row: the responses drawn for that step, before its update; the checkpoint is what came out of it")
    for row in found:
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    return found


@contextlib.contextmanager
def quiet(threads: int = 0) -> Iterator[None]:
    """No progress bars, and not the warnings that trl 1.16 causes by transformers' older names.

    Args:
        threads: of torch within the context; 0 leaves them.
    """
    import torch
    from transformers.utils import logging

    before, bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    torch.set_num_threads(threads or before)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", category=FutureWarning)
            yield
    finally:
        torch.set_num_threads(before)
        if bars:
            logging.enable_progress_bar()


def _sizes(run: Path) -> dict[str, int]:
    return {str(p.relative_to(run)): p.stat().st_size for p in sorted(run.rglob("*")) if p.is_file()}


def _is_complete(out: Path, what: str, manifest: str, own: str, identity: dict[str, Any]) -> bool:
    """Whether `out` is this run, whole; False too where there is nothing, or a run with a file missing or short.

    Raises StoreError for a run made otherwise and for what is no such run, so that neither is ever deleted.
    """
    if not out.exists():
        return False
    if not out.is_dir() or any(p.name != manifest and not re.fullmatch(own, p.name) for p in out.iterdir()):
        cause = "the path belongs to something else"
        raise StoreError(f"{out} exists and is no {what}", cause=cause, fix="choose another --out")
    try:
        made = json.loads((out / manifest).read_text(encoding="utf-8"))
        was = {**made["settings"], **made["versions"]}
        files = dict(made["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False  # the manifest is written last: without a sound one the run is incomplete
    now = {**identity["settings"], **identity["versions"]}
    if was != now:
        differing = (f"{k} {was.get(k)} and not {now.get(k)}" for k in {**now, **was} if was.get(k) != now.get(k))
        raise StoreError(
            f"{out} holds a {what} made with {', '.join(differing)}",
            cause="other settings, or a library upgraded since",
            fix="choose another --out, or delete that directory",
        )
    return files.items() <= _sizes(out).items()
