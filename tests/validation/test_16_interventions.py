"""Interventions that change nothing on average, on the demo policy: how often one is said to act."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pipeline_fixtures import Probe, probe
from proofs import Proof
from torch import Tensor

from entropy_core.checkpoints.optimizer_step import OptimizerStep
from entropy_core.config.read import load_config
from entropy_core.estimates import interventions as estimates
from entropy_core.estimates.interventions import Predicted, Row, Screened, Settings
from entropy_core.execution import Execution
from entropy_core.losses.changed import read_sensitivities
from entropy_core.losses.files import read_batch
from entropy_core.numerics import interventions, ragged
from entropy_core.numerics.block_estimates import Blocks
from entropy_core.numerics.functional import FUNCTIONALS, TokenPair
from entropy_core.numerics.interventions import Known
from entropy_core.numerics.vectors import in_blocks, times
from entropy_core.pipeline.lab import BLOCKS
from entropy_core.pipeline.runner import Inputs
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.functional_gradient import functional_gradients, scored_batch
from entropy_core.sequences.processor import processor_of
from entropy_core.sequences.token_sensitivities import token_sensitivities
from entropy_core.store.columns import read_tokens

pytestmark = pytest.mark.validate

ROOT = Path(__file__).resolve().parents[2]
FAMILIES, FAMILY = 10, 40


@pytest.fixture(scope="module")
def swept(demo_run: Path) -> Probe:
    """The demo sweep, in the store that `make sweep` uses, and the sensitivities of U on both halves of E."""
    config = load_config(ROOT / "configs" / "demo.yaml").model_dump(mode="json")
    asked = {"interventions": [{"random": 0.02}], "lab": {"predict": "none", "measure": "none"}}
    return probe(config | asked)


class OnBlocks(NamedTuple):
    """Sensitivities of the tokens of U by kind on each block of E, and what is said of the blocks."""

    of_u: dict[str, list[TokenPair]]
    said: list[dict[str, Any]]


def on_blocks(execution: Execution, of_u: Inputs, of_e: Inputs) -> OnBlocks:
    """By forward mode along P∘∇H of every block, from what half-sensitivities and entropy-gradient read."""
    processor, update = processor_of(of_u["policy"], execution), of_u["update"]
    parameters, clip = processor.policy.named_parameters(), update.summary["clip_factor"]
    gradient = {block: update.vector("gradient").block(block).double() for block in in_blocks(parameters)}
    step = OptimizerStep(of_u["checkpoint"], execution, parameters, gradient, clip)
    shards = [read_sequences(shard) for shard in of_u["sequences"]]
    e_batch = scored_batch(of_e["sequences"], of_e["scores"])
    block_N = e_batch.ids_N // of_e["responses_per_prompt"] % BLOCKS
    found = OnBlocks({functional.name: [] for functional in FUNCTIONALS}, [])
    for number in range(BLOCKS):
        mine_N = block_N == number
        H_N, length_N = e_batch.entropy_N[mine_N], e_batch.length_N[mine_N]
        size = {"sequences": int(mine_N.sum()), "mean_length": float(length_N.mean())}
        found.said.append(size | {"H_tok": float(H_N.sum() / length_N.sum())})
        covectors = functional_gradients(processor, e_batch, FUNCTIONALS, [mine_N])
        for functional, covector in zip(FUNCTIONALS, covectors, strict=True):
            along = times(clip, step.applied("preconditioned", in_blocks(covector)))
            found.of_u[functional.name].append(token_sensitivities(processor, shards, along))
    return found


def families(inputs: Inputs, on: OnBlocks, share: float, margin: float) -> list[list[Row]]:
    """Rows of families of random masks of U, whose steps have the denominators of the run."""
    sensitivities, update = inputs["sensitivities"], inputs["update"]
    batch, as_it_is = read_batch(update, read_tokens(inputs["scores_u"], "logprobs", "entropies"))
    index_K, prompts = ragged.sequence_index(batch.offsets_N1), update.summary["prompts"]
    in_halves = [pair for pairs in read_sensitivities(sensitivities).values() for pair in pairs]
    base = sum(float(as_it_is.dot(pair).sum()) for pair in on.of_u["entropy"]) / BLOCKS

    def found(pair: TokenPair) -> tuple[Tensor, Tensor]:
        product = torch.stack(
            [torch.stack([pair.dot(along).sum() for along in of_kind]) for of_kind in on.of_u.values()]
        )
        of_prompts = []
        for along in in_halves:
            of_N = torch.zeros(len(batch.advantages_N), dtype=torch.float64).index_add_(0, index_K, pair.dot(along))
            of_prompts.append(of_N.view(prompts, -1).sum(1))
        return product, torch.stack(of_prompts).view(2, 2, -1)

    settings = Settings(1.0, 0.95, margin, prompts, fresh=False)
    rows = []
    for family in range(FAMILIES):
        pairs = [as_it_is]
        for i in range(FAMILY):
            known = Known(batch, torch.zeros(0), torch.zeros(0), seed=1000 + FAMILY * family + i)
            weights_K = interventions.random(known, share)[0].weights_K
            pairs.append(TokenPair(*(weights_K * values_K for values_K in as_it_is)))
        products, influences = zip(*map(found, pairs), strict=True)
        ones_I, labels = torch.ones(len(pairs)).double(), ["as it is", *(f"random {i}" for i in range(FAMILY))]
        unused_IKH, halves = torch.zeros(len(pairs), 2, 2).double(), sensitivities.summary["halves"]
        screened = Screened(
            labels,
            [False] * len(pairs),
            *(unused_IKH, unused_IKH, ones_I, ones_I, unused_IKH),
            torch.stack(influences),
            halves,
        )
        predicted = Predicted(dict(zip(labels, products, strict=True)), Blocks.from_summaries(on.said))
        of_family = estimates.predict_rows(screened, predicted, settings, "per_token")
        rows.append(estimates.with_verdicts(of_family, "as it is", base, settings))
    return [[row for row in family if row["verdict"] != "as it is"] for family in rows]


def test_a_null_rarely_acts(record: Proof, swept: Probe):
    record(
        "Interventions that change nothing",
        claim="Random tokens of U lose their policy term and the others are scaled up, which changes nothing on "
        f"average: {FAMILIES} families of {FAMILY} masks per checkpoint of the demo run. Without a margin, `acts` goes "
        "by the p-value alone; p below 5 % is that of a single test.",
        limit="a null acts in at most 5 % at every checkpoint; of all families together at most 10 % have one that "
        "acts, where 5 % are to be expected at most",
        columns=("checkpoint", "tokens dropped", "p below 5 %", "acts", "families with one that acts"),
    )
    of_all = []
    stages = ("screen", "half-sensitivities", "entropy-gradient")
    asked = [[inputs for name, inputs, _ in swept.run.asked if name == stage] for stage in stages]
    for inputs, of_u, of_e, checkpoint in zip(*asked, swept.checkpoints, strict=True):
        on = on_blocks(swept.run.execution, of_u, of_e)
        for share in (0.02, 0.2):
            found = families(inputs, on, share, 1e-12)
            rows = [row for family in found for row in family]
            single = sum(row["p_value"] < 0.05 for row in rows) / len(rows)
            acting = [[row["verdict"] == "acts" for row in family] for family in found]
            acts = sum(map(sum, acting)) / len(rows)
            wrong = sum(map(any, acting)) / FAMILIES
            record.row(checkpoint.name, f"{share:.0%}", f"{single:.1%}", f"{acts:.2%}", f"{wrong:.0%}")
            of_all.append(wrong)
            assert acts <= 0.05
    assert sum(of_all) / len(of_all) <= 0.1
