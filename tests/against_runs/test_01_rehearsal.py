"""One step and a rehearsal of the demo policy, against TRL, which really trains on under every intervention."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from conftest import policy_of
from pipeline_fixtures import probe, skip_figures
from proofs import Proof
from scipy.stats import spearmanr

from entropy_core.config.read import load_config
from entropy_core.demo.run import build_tokenizer
from entropy_core.demo.training_run import ON_A_CPU, quiet
from entropy_core.prompts.arithmetic import exact_match, problems
from entropy_core.sequences.processor import GenerationConfig, SequenceProcessor

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.against_runs

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = "checkpoint-12"
P, G, STEPS, SEEDS, MAX_NEW_TOKENS = 64, 8, 6, 3, 32
MEASURED, OF_E, SEED_OF_E = (3, 6), 384, 7_000_000
OF_PREDICTION = 1024
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
    settings: Mapping[str, Any] = MappingProxyType({})
    group: Mapping[str, float] = MappingProxyType({})
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


WAYS = (
    Way("lr", 0.5, group={"lr": 0.5}),
    Way("lr", 2.0, group={"lr": 2.0}),
    Way("beta1", 0.0, group={"beta1": 0.0}),
    Way("beta2", 0.9, group={"beta2": 0.9}),
    Way("weight_decay", 20.0, group={"weight_decay": 20.0}),
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
AS_IT_IS = Way("as it is")
REHEARSED = (0, 1, 3, 4, 7)
"""Which of them are rehearsed, beside the run as it is."""


def on_e(model: Any, seed: int) -> float:
    """H of a policy in nats per token, on an E that it draws itself."""
    config = GenerationConfig(1.0, MAX_NEW_TOKENS, OF_E, OF_E)
    processor = SequenceProcessor(policy_of(model), config)
    pool = [build_tokenizer()(one["prompt"])["input_ids"] for one in problems("train", 512)]
    drawn = processor.generate_with_replacement_sampling(pool, OF_E, seed)
    return float(processor.score(drawn)[0].entropies_K.double().mean())


def trained(checkpoint: Path, home: Path, way: Way, seed: int, measured: Sequence[int]) -> dict[int, float]:
    """Train on from a checkpoint; H after some of the steps."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback

    found: dict[int, float] = {}

    class Trainer(trl.GRPOTrainer):  # type: ignore[misc, name-defined]
        def create_optimizer(self, *arguments: Any, **named: Any) -> Any:
            optimizer = super().create_optimizer(*arguments, **named)
            optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", weights_only=True))
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
                    found[state.global_step] = on_e(model, SEED_OF_E + seed)
                    model.train()

    settings: dict[str, Any] = {
        "per_device_train_batch_size": P * G,
        "steps_per_generation": 1,
        "num_generations": G,
        "max_completion_length": MAX_NEW_TOKENS,
        "max_steps": STEPS,
        "save_strategy": "no",
        "learning_rate": 2e-4,
        "weight_decay": 0.01,
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
    rows = [{name: one[name] for name in ("prompt", "answer")} for one in problems("train", 512)]
    with (
        torch.random.fork_rng(devices=[]),
        quiet(threads=1),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
        trainer = Trainer(
            AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
            exact_match,
            trl.GRPOConfig(output_dir=str(home), **settings | dict(way.settings)),
            train_dataset=Dataset.from_list(rows),
            processing_class=build_tokenizer(),
            callbacks=[Measure()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return found


class Runs:
    """TRL's runs, each made when it is first asked for: the two proofs may be in two processes."""

    def __init__(self, checkpoint: Path, home: Path) -> None:
        self.checkpoint, self.home = checkpoint, home
        self.made: dict[str, list[dict[int, float]]] = {}

    def __getitem__(self, way: Way) -> list[dict[int, float]]:
        """H after some steps, from each seed."""
        if way.label not in self.made:
            measured = MEASURED if way in (AS_IT_IS, *(WAYS[i] for i in REHEARSED)) else (STEPS,)
            of_seeds = [trained(self.checkpoint, self.home, way, seed, measured) for seed in range(SEEDS)]
            self.made[way.label] = of_seeds
        return self.made[way.label]


@pytest.fixture(scope="module")
def runs(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(demo_run / CHECKPOINT, tmp_path_factory.mktemp("runs"))


def swept(demo_run: Path, home: Path, ways: Sequence[Way], of_e: int, **lab: Any) -> list[dict[str, Any]]:
    """Rows of a sweep of the checkpoint: of rehearsal.parquet if it rehearses, else of interventions.parquet."""
    config = load_config(ROOT / "configs" / "demo.yaml").model_dump(mode="json")
    config |= {"checkpoints": [str(demo_run / CHECKPOINT)], "interventions": [way.entry for way in ways]}
    config |= {"price": False, "lab": {"measure": "none"} | lab}
    config["batch_config"] |= {"B_U": P, "G": G, "E_total_sequences": of_e}
    config["importance"] |= {"etas": [0, 1]}
    config["execution"] |= {"artifacts": str(home)}
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        report = probe(config).result.report
    rows = report.table("rehearsal.parquet" if "rehearse" in lab else "interventions.parquet").to_pylist()
    return [row for row in rows if row["normalization"] == "per_token"]


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def with_interval(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """The rank correlation, and its interval by resampling interventions."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(pairs), (RESAMPLED, len(pairs)), generator=generator).tolist()
    found = sorted(rank_correlation([pairs[i] for i in one]) for one in drawn)
    return rank_correlation(pairs), found[RESAMPLED // 40], found[-RESAMPLED // 40]


def changes(runs: Runs, way: Way) -> list[float]:
    """H after TRL's last step minus that of the run as it is from the same seed."""
    return [one[STEPS] - other[STEPS] for one, other in zip(runs[way], runs[AS_IT_IS], strict=True)]


def said(what: str, pairs: Sequence[tuple[float, float]]) -> str:
    return "Rank correlation of {} with TRL's runs: {:.2f} [{:.2f}, {:.2f}], of {} interventions.".format(
        what, *with_interval(pairs), len(pairs)
    )


def test_one_step_against_what_runs_do(record: Proof, demo_run: Path, runs: Runs, tmp_path: Path):
    record(
        "One step against a run",
        claim=f"From {CHECKPOINT} of the demo run TRL trains on for {STEPS} steps, on {P} prompts with {G} responses "
        f"each, as the run was and under each of {len(WAYS)} interventions, from {SEEDS} seeds. Its entropy then, "
        "minus that of the run as it was from the same seed, against the difference that a single step makes: as it is "
        f"predicted on as many prompts and an E of {OF_PREDICTION:,}.",
        limit="TRL ranks the interventions from one seed as from another, with a rank correlation of 0.7 on average; "
        "one step has no limit: it says what an intervention does first, and not where it leads",
        columns=("intervention", "one step", "kept on", f"{STEPS} steps of TRL", "lowest", "highest seed"),
    )
    rows = swept(demo_run, tmp_path, WAYS, OF_PREDICTION)
    predicted = {row["intervention"]: row for row in rows if row["level"] == "predict"}
    first, kept_on = [], []
    for way in WAYS:
        row, found = predicted[way.label], changes(runs, way)
        first.append((row["difference"], fmean(found)))
        kept = row["kept_on_difference"]
        kept_on += [] if kept is None else [(kept, fmean(found))]
        shown = [f"{one:+.5f}" for one in (fmean(found), min(found), max(found))]
        record.row(way.label, f"{row['difference']:+.5f}", "" if kept is None else f"{kept:+.5f}", *shown)
    record.note(said("one step", first))
    record.note(said("the step that is kept on, where the screen tells it,", kept_on))
    between = [
        rank_correlation([(changes(runs, way)[i], changes(runs, way)[j]) for way in WAYS])
        for i, j in combinations(range(SEEDS), 2)
    ]
    record.note(f"Of one seed of TRL with another: {fmean(between):.2f} on average.")
    assert fmean(between) >= 0.7


def test_a_rehearsal_against_what_runs_do(record: Proof, demo_run: Path, runs: Runs, tmp_path: Path):
    ways = [WAYS[i] for i in REHEARSED]
    record(
        "A rehearsal against a run",
        claim=f"The same {STEPS} steps are rehearsed from {SEEDS} seeds, as the run was and under {len(ways)} of the "
        "interventions. The band is that of one more run, `H_run_low` to `H_run_high`: from three seeds it has two "
        f"degrees of freedom, and is wide. H of each of TRL's {SEEDS} runs is measured on an E of {OF_E} of its own, "
        "and the differences are from the run as it is from the same seed.",
        limit="at least 90 % of TRL's runs are within the bands of 95 %, and the rank correlation of the rehearsed "
        "differences with TRL's is at least 0.7",
        columns=("intervention", "steps", "band", "H of TRL's runs", "within", "rehearsed difference", "TRL's"),
    )
    rehearse = {"steps": STEPS, "seeds": SEEDS, "interventions": "all", "every": MEASURED[0]}
    rows = swept(demo_run, tmp_path, ways, OF_E, rehearse=rehearse)
    together = {(row["intervention"], row["rehearsal_step"]): row for row in rows if row["replicate"] is None}
    inside, pairs = 0, []
    for way in (AS_IT_IS, *ways):
        for number in MEASURED:
            row, found = together[way.label, number], [of_seed[number] for of_seed in runs[way]]
            low, high = row["H_run_low"], row["H_run_high"]
            within = sum(low <= H <= high for H in found)
            inside += within
            differences = ["", ""]
            if way is not AS_IT_IS and number == STEPS:
                pairs.append((row["difference"], fmean(changes(runs, way))))
                differences = [f"{one:+.5f}" for one in pairs[-1]]
            shown = ", ".join(f"{H:.4f}" for H in found)
            record.row(way.label, number, f"{low:.4f} to {high:.4f}", shown, f"{within} of {SEEDS}", *differences)
    count = len(MEASURED) * (1 + len(ways)) * SEEDS
    record.note(f"Within: {inside} of {count}.")
    ranks = rank_correlation(pairs)
    record.note(
        f"Rank correlation of the rehearsed differences with TRL's: {ranks:.2f}, of {len(pairs)} interventions."
    )
    assert inside >= 0.9 * count
    assert ranks >= 0.7
