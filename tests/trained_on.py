"""TRL, which really trains on from a checkpoint under an intervention, and the entropy that it ends with."""

import hashlib
import inspect
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import metadata
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import pytest
import torch
from conftest import policy_of
from pipeline_fixtures import probe, skip_figures
from proofs import Proof
from scipy.stats import spearmanr

from entropy_core.config.read import load_config
from entropy_core.demo.training_run import ON_A_CPU, quiet
from entropy_core.sequences.processor import GenerationConfig, SequenceProcessor

SEED_OF_E = 7_000_000
RESAMPLED = 2000


class Way(NamedTuple):
    """What TRL is told to do otherwise.

    Args:
        name: of the intervention.
        value: of it.
        settings: of TRL's configuration.
        group: of the optimizer's parameter groups.
        positives: factor of positive advantages.
        negatives: factor of negative advantages.
    """

    name: str
    value: float | str | None = None
    settings: dict[str, Any] = {}  # noqa: RUF012 (is not changed)
    group: dict[str, float] = {}  # noqa: RUF012
    positives: float = 1.0
    negatives: float = 1.0

    @property
    def entry(self) -> Any:
        """Of the configuration."""
        return self.name if self.value is None else {self.name: self.value}

    @property
    def label(self) -> str:
        """In the tables."""
        text = f"{self.value:g}" if isinstance(self.value, float) else self.value
        return self.name if self.value is None else f"{self.name}: {text}"


AS_IT_IS = Way("as it is")
WAYS = (
    Way("lr", 0.5, group={"lr": 0.5}),
    Way("lr", 2.0, group={"lr": 2.0}),
    Way("beta1", 0.0, group={"beta1": 0.0}),
    Way("beta2", 0.9, group={"beta2": 0.9}),
    Way("max_grad_norm", 0.1, {"max_grad_norm": 0.1}),
    Way("entropy_coef", 0.03, {"entropy_coef": 0.03}),
    Way("entropy_coef", 0.1, {"entropy_coef": 0.1}),
    Way("entropy_coef", -0.1, {"entropy_coef": -0.1}),
    Way("scale_rewards", "none", {"scale_rewards": "none"}),
    Way("loss", "dr_grpo", {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    Way("top_entropy_quantile", 0.2, {"top_entropy_quantile": 0.2}),
    Way("positives_only", negatives=0.0),
    Way("negatives_only", positives=0.0),
    Way("weighted_positives", 0.1, positives=0.1),
)
"""What can be told to TRL as it is to a probe, whatever the run."""


class Started(NamedTuple):
    """What TRL's trainer is given."""

    model: Any
    tokenizer: Any
    rows: list[dict[str, Any]]
    reward: Callable[..., list[float]]


class Subject(NamedTuple):
    """A run that is trained on.

    Args:
        checkpoint: from which.
        start: loads it.
        settings: of TRL's configuration, as the run had them.
        steps: that are trained.
        measured: after which steps H is measured, for some of the ways.
        seeds: number of runs for each way.
        of_e: number of sequences of E on which H is measured.
    """

    checkpoint: Path
    start: Callable[[Path], Started]
    settings: dict[str, Any]
    steps: int
    measured: tuple[int, ...]
    seeds: int
    of_e: int

    def changes(self, runs: "Runs", way: Way) -> list[float]:
        """H after the last step minus that of the run as it is from the same seed."""
        pairs = zip(runs[way.label], runs[AS_IT_IS.label], strict=True)
        return [one[self.steps] - other[self.steps] for one, other in pairs]


def on_e(model: Any, started: Started, subject: Subject, seed: int) -> float:
    """H of a policy in nats per token, on an E that it draws itself."""
    config = GenerationConfig(1.0, subject.settings["max_completion_length"], subject.of_e, min(subject.of_e, 64))
    plain = getattr(model, "get_base_model", lambda: model)()  # without PEFT around it
    processor = SequenceProcessor(policy_of(plain), config)
    pool = [started.tokenizer(row["prompt"])["input_ids"] for row in started.rows]
    drawn = processor.generate_with_replacement_sampling(pool, subject.of_e, seed)
    return float(processor.score(drawn)[0].entropies_K.double().mean())


def trained(subject: Subject, home: Path, way: Way, seed: int, measured: Sequence[int]) -> dict[int, float]:
    """Train on from a checkpoint; H after some of the steps."""
    import trl
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback

    found: dict[int, float] = {}

    class Trainer(trl.GRPOTrainer):  # type: ignore[misc, name-defined]
        def create_optimizer(self, *arguments: Any, **named: Any) -> Any:
            optimizer = super().create_optimizer(*arguments, **named)
            optimizer.load_state_dict(torch.load(subject.checkpoint / "optimizer.pt", weights_only=True))
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] = group["lr"] * way.group.get("lr", 1.0)
                group["betas"] = tuple(way.group.get(f"beta{i}", old) for i, old in enumerate(group["betas"], start=1))
                if group["weight_decay"]:
                    group["weight_decay"] = way.group.get("weight_decay", group["weight_decay"])
            return optimizer

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            out = super()._generate_and_score_completions(inputs)
            advantages = out["advantages"]
            out["advantages"] = torch.where(advantages > 0, way.positives, way.negatives) * advantages
            return out

    class Measure(TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step in measured:
                with torch.random.fork_rng(devices=[]):
                    model.eval()
                    found[state.global_step] = on_e(model, started, subject, SEED_OF_E + seed)
                    model.train()

    settings: dict[str, Any] = {
        "max_steps": subject.steps,
        "save_strategy": "no",
        "loss_type": "grpo",
        "scale_rewards": "group",
        "beta": 0.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        **ON_A_CPU,
        "seed": 100 + seed,
    }
    with (
        torch.random.fork_rng(devices=[]),
        quiet(threads=1),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
        started = subject.start(subject.checkpoint)
        trainer = Trainer(
            started.model,
            started.reward,
            trl.GRPOConfig(output_dir=str(home), **settings | subject.settings | way.settings),
            train_dataset=Dataset.from_list(started.rows),
            processing_class=started.tokenizer,
            callbacks=[Measure()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return found


def _made_of(subject: Subject) -> str:
    """Digest of what made the numbers of a run: the checkpoint, the code here, and the releases of the libraries."""
    files = sorted(path for path in subject.checkpoint.iterdir() if path.suffix in (".safetensors", ".pt"))
    code = [inspect.getsource(one) for one in (trained, on_e, subject.start)]
    versions = [metadata.version(name) for name in ("torch", "transformers", "trl", "peft")]
    parts = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return hashlib.sha256(json.dumps([parts, code, versions, SEED_OF_E, ON_A_CPU]).encode()).hexdigest()


Runs = dict[str, list[dict[int, float]]]
"""H after some steps of TRL, from each seed, by label of the way."""


def train_on(subject: Subject, home: Path, ways: Sequence[Way], often: Sequence[Way], kept: Path | None = None) -> Runs:
    """Train on under every way, from every seed: a process of one thread on each core.

    Args:
        subject: the run.
        home: where TRL may write.
        ways: each way.
        often: those of them whose H is measured after every step of `subject.measured`; of the others after the last.
        kept: file of what was measured before, from which a run that was stopped goes on.

    Returns:
        What was measured.
    """
    known: dict[str, dict[str, float]] = json.loads(kept.read_text(encoding="utf-8")) if kept and kept.exists() else {}
    of_run = [_made_of(subject), dict(subject.settings), subject.steps, subject.of_e]

    def key(way: Way, seed: int) -> str:
        return json.dumps([*way, seed, measured(way), of_run])

    def measured(way: Way) -> tuple[int, ...]:
        return subject.measured if way in often else (subject.steps,)

    tasks = [(way, seed) for seed in range(subject.seeds) for way in ways if key(way, seed) not in known]
    failed: list[BaseException] = []
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        started = {
            pool.submit(trained, subject, home / str(i), way, seed, measured(way)): key(way, seed)
            for i, (way, seed) in enumerate(tasks)
        }
        for done in as_completed(started):
            if error := done.exception():
                failed.append(error)
                continue
            known[started[done]] = {str(step): H for step, H in done.result().items()}
            if kept:
                kept.with_suffix(".partial").write_text(json.dumps(known, indent=1), encoding="utf-8")
                kept.with_suffix(".partial").replace(kept)
    if failed:
        raise failed[0]
    found = {way.label: [known[key(way, seed)] for seed in range(subject.seeds)] for way in ways}
    return {label: [{int(step): H for step, H in one.items()} for one in of] for label, of in found.items()}


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's."""
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def with_interval(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """The rank correlation, and its interval by resampling interventions."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(pairs), (RESAMPLED, len(pairs)), generator=generator).tolist()
    found = sorted(rank_correlation([pairs[i] for i in one]) for one in drawn)
    return rank_correlation(pairs), found[RESAMPLED // 40], found[-RESAMPLED // 40]


def said(what: str, pairs: Sequence[tuple[float, float]]) -> str:
    """A sentence for the page."""
    return "Rank correlation of {} with TRL's runs: {:.2f} [{:.2f}, {:.2f}], of {} interventions.".format(
        what, *with_interval(pairs), len(pairs)
    )


def swept(
    config: Path, checkpoint: Path, home: Path, ways: Sequence[Way], batch: dict[str, int], **lab: Any
) -> list[dict[str, Any]]:
    """Rows of a sweep of one checkpoint: of rehearsal.parquet if it rehearses, else of interventions.parquet."""
    values = load_config(config).model_dump(mode="json")
    values |= {"checkpoints": [str(checkpoint)], "interventions": [way.entry for way in ways]}
    values |= {"price": False, "lab": {"measure": "none"} | lab}
    values["batch_config"] |= {"E_replicates": 1} | batch
    values["importance"] |= {"etas": [0, 1]}
    values["execution"] |= {"artifacts": str(home)}
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        report = probe(values).result.report
    rows = report.table("rehearsal.parquet" if "rehearse" in lab else "interventions.parquet").to_pylist()
    return [row for row in rows if row["normalization"] == "per_token"]


OF_ONE_STEP = ("intervention", "one step", "kept on", "steps of TRL", "lowest", "highest seed")


def show_one_step(
    record: Proof, rows: Sequence[dict[str, Any]], subject: Subject, runs: Runs, ways: Sequence[Way]
) -> float:
    """Record what a step does under every way beside what TRL's steps did, and their rank correlation.

    Args:
        record: has the columns of `OF_ONE_STEP`.
        rows: of interventions.parquet.
        subject: the run.
        runs: what TRL did.
        ways: each way.

    Returns:
        The rank correlation of one seed of TRL with another, on average.
    """
    predicted = {row["intervention"]: row for row in rows if row["level"] == "predict"}
    first, kept_on = [], []
    for way in ways:
        row, found = predicted[way.label], subject.changes(runs, way)
        first.append((row["difference"], fmean(found)))
        kept = row["kept_on_difference"]
        kept_on += [] if kept is None else [(kept, fmean(found))]
        shown = [f"{one:+.5f}" for one in (fmean(found), min(found), max(found))]
        record.row(way.label, f"{row['difference']:+.5f}", "" if kept is None else f"{kept:+.5f}", *shown)
    record.note(said("one step", first))
    record.note(said("the step that is kept on, where the screen tells it,", kept_on))
    of_seeds = list(zip(*(subject.changes(runs, way) for way in ways), strict=True))
    between = fmean(rank_correlation(list(zip(*pair, strict=True))) for pair in combinations(of_seeds, 2))
    record.note(f"Of one seed of TRL with another: {between:.2f} on average.")
    return between


OF_A_REHEARSAL = ("intervention", "steps", "band", "H of TRL's runs", "within", "rehearsed difference", "TRL's")


def show_rehearsal(
    record: Proof, rows: Sequence[dict[str, Any]], subject: Subject, runs: Runs, ways: Sequence[Way]
) -> tuple[float, list[tuple[float, float]]]:
    """Record the bands of a rehearsal beside H of TRL's runs.

    Args:
        record: has the columns of `OF_A_REHEARSAL`.
        rows: of rehearsal.parquet.
        subject: the run.
        runs: what TRL did.
        ways: each way that was rehearsed, beside the run as it is.

    Returns:
        The share of TRL's runs within the bands; and the last differences from the run as it is, rehearsed and TRL's.
    """
    together = {(row["intervention"], row["rehearsal_step"]): row for row in rows if row["replicate"] is None}
    inside, count, pairs = 0, 0, []
    for way in (AS_IT_IS, *ways):
        for number in subject.measured:
            row, found = together[way.label, number], [of_seed[number] for of_seed in runs[way.label]]
            low, high = row["H_run_low"], row["H_run_high"]
            within = sum(low <= H <= high for H in found)
            inside, count = inside + within, count + len(found)
            differences = ["", ""]
            if way is not AS_IT_IS and number == subject.steps:
                pairs.append((row["difference"], fmean(subject.changes(runs, way))))
                differences = [f"{one:+.5f}" for one in pairs[-1]]
            shown = ", ".join(f"{H:.4f}" for H in found)
            said_within = f"{within} of {len(found)}"
            record.row(way.label, number, f"{low:.4f} to {high:.4f}", shown, said_within, *differences)
    record.note(f"Within: {inside} of {count}.")
    return inside / count, pairs
