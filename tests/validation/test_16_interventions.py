"""Interventions that change nothing on average, on the demo policy: how often one is said to act."""

from pathlib import Path

import pytest
import torch
from pipeline_fixtures import Probe, probe
from proofs import Proof
from torch import Tensor

from entropy_core.config.read import load_config
from entropy_core.estimates import interventions as estimates
from entropy_core.estimates.interventions import Row, Screened, Settings
from entropy_core.losses.changed import averaged, read_sensitivities
from entropy_core.losses.files import read_batch
from entropy_core.numerics import interventions, ragged
from entropy_core.numerics.block_estimates import Blocks
from entropy_core.numerics.functional import TokenPair
from entropy_core.numerics.interventions import Known
from entropy_core.pipeline.runner import Inputs
from entropy_core.store.columns import read_tokens

pytestmark = pytest.mark.validate

ROOT = Path(__file__).resolve().parents[2]
FAMILIES, FAMILY = 10, 40


@pytest.fixture(scope="module")
def swept(demo_run: Path) -> Probe:
    """The demo sweep, in the store that `make sweep` uses, and the sensitivities of U on the blocks of E."""
    config = load_config(ROOT / "configs" / "demo.yaml").model_dump(mode="json")
    asked = {"interventions": [{"random": 0.02}], "lab": {"predict": "none", "measure": "none"}}
    return probe(config | asked)


def families(inputs: Inputs, share: float, margin: float) -> list[list[Row]]:
    """Rows of families of random masks of U, at the level of the screen, from what the screen of a checkpoint reads."""
    sensitivities, update = inputs["sensitivities"], inputs["update"]
    batch, as_it_is = read_batch(update, read_tokens(inputs["scores_u"], "logprobs", "entropies"))
    of_u, blocks = read_sensitivities(sensitivities), sensitivities.summary["blocks"]
    index_K, prompts = ragged.sequence_index(batch.offsets_N1), update.summary["prompts"]
    in_halves = [averaged(blocks[half::2], pairs[half::2]) for pairs in of_u.values() for half in (0, 1)]
    base = sum(float(as_it_is.dot(pair).sum()) for pair in of_u["entropy"]) / len(blocks)

    def found(pair: TokenPair) -> tuple[Tensor, Tensor]:
        product = torch.stack([torch.stack([pair.dot(along).sum() for along in of_kind]) for of_kind in of_u.values()])
        of_prompts = []
        for along in in_halves:
            of_N = torch.zeros(len(batch.advantages_N), dtype=torch.float64).index_add_(0, index_K, pair.dot(along))
            of_prompts.append(of_N.view(prompts, -1).sum(1))
        return product, torch.stack(of_prompts).view(2, 2, -1)

    settings = Settings(1.0, 0.95, margin, prompts, fresh=False)
    columns = (torch.tensor([b[name] for b in blocks]).double() for name in ("sequences", "H_tok", "mean_length"))
    of_blocks = Blocks(*columns)
    rows = []
    for family in range(FAMILIES):
        pairs = [as_it_is]
        for i in range(FAMILY):
            known = Known(batch, torch.zeros(0), torch.zeros(0), seed=1000 + FAMILY * family + i)
            weights_K = interventions.random(known, share)[0].weights_K
            pairs.append(TokenPair(*(weights_K * values_K for values_K in as_it_is)))
        product, influence = (torch.stack(column) for column in zip(*map(found, pairs), strict=True))
        ones_I, labels = torch.ones(len(pairs)).double(), ["as it is", *(f"random {i}" for i in range(FAMILY))]
        halves = estimates.halves_of(blocks)
        screened = Screened(
            labels, [False] * len(pairs), product, product, ones_I, ones_I, product, influence, of_blocks, halves
        )
        of_family = estimates.screen_rows(screened, settings, "per_token")
        rows.append(estimates.with_verdicts(of_family, "as it is", base, settings)[:])
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
    for inputs, checkpoint in zip(
        (inputs for name, inputs, _ in swept.run.asked if name == "screen"), swept.checkpoints, strict=True
    ):
        for share in (0.02, 0.2):
            found = families(inputs, share, 1e-12)
            rows = [row for family in found for row in family]
            single = sum(row["p_value"] < 0.05 for row in rows) / len(rows)
            acting = [[row["verdict"] == "acts" for row in family] for family in found]
            acts = sum(map(sum, acting)) / len(rows)
            wrong = sum(map(any, acting)) / FAMILIES
            record.row(checkpoint.name, f"{share:.0%}", f"{single:.1%}", f"{acts:.2%}", f"{wrong:.0%}")
            of_all.append(wrong)
            assert acts <= 0.05
    assert sum(of_all) / len(of_all) <= 0.1
