"""H, J and the length along the real steps of a rehearsal, with the spread between seeds, and when a floor is reached.

Chains from one seed share the prompts and the draws of E, so a difference between two of them is paired response by
response. Chains from different seeds share nothing: the spread between seeds has the randomness of E, of every U and of
where the steps before have led.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from entropy_core.errors import StoreError
from entropy_core.estimates.distributions import t_quantile
from entropy_core.estimates.rehearsal_table import DIFFERENCES, QUANTITIES
from entropy_core.numerics import uncertainty
from entropy_core.numerics.choices import Normalization
from entropy_core.numerics.uncertainty import Estimate
from entropy_core.store.columns import as_numbers

if TYPE_CHECKING:
    from entropy_core.store.artifact import Artifact
    from entropy_core.store.inputs import RehearsedPolicy

Row = dict[str, Any]


class OnE(NamedTuple):
    """A policy on an E that it drew itself.

    Args:
        sequences: ids of the responses and of their prompts.
        clusters_N: int64 [N], the unit of each response; None: each is one.
        S_N: entropy of each response, nats, float64.
        T_N: length of each response, tokens, float64.
        r_N: reward of each response, float64; None if one has none.
    """

    sequences: list[tuple[int, int]]
    clusters_N: Tensor | None
    S_N: Tensor
    T_N: Tensor
    r_N: Tensor | None

    def estimates(self, normalization: Normalization) -> dict[str, Estimate]:
        """H, J (if it is known) and the length, by the names of `QUANTITIES`."""
        H, length = uncertainty.entropy(self.S_N, self.T_N, normalization), uncertainty.mean(self.T_N)
        of_reward = {} if self.r_N is None else {"J": uncertainty.mean(self.r_N)}
        return {"H": H, **of_reward, "length": length}


def read_e(entry: "RehearsedPolicy", units: Literal["sequence", "prompt"]) -> OnE:
    """Read what was measured of a policy.

    Args:
        entry: shards of score-e-batch, and of reward-e-batch.
        units: independent units of E.

    Raises:
        StoreError: the rewards are of other responses than the scores.
    """
    scores = _columns(entry["scores"], "scores.parquet", ("sequence_id", "prompt_id", "length", "sum_entropy"))
    rewards = _columns(entry["rewards"], "rewards.parquet", ("sequence_id", "reward"))
    if rewards["sequence_id"] != scores["sequence_id"]:
        raise _mixed("rewards of a rehearsal are of other responses than its scores")
    r_N, prompts_N = as_numbers(rewards["reward"]), torch.tensor(scores["prompt_id"])
    return OnE(
        list(zip(scores["sequence_id"], scores["prompt_id"], strict=True)),
        prompts_N if units == "prompt" else None,
        torch.tensor(scores["sum_entropy"], dtype=torch.float64),
        torch.tensor(scores["length"], dtype=torch.float64),
        None if r_N.isnan().any() else r_N,
    )


def _columns(shards: Sequence["Artifact"], file: str, names: Sequence[str]) -> dict[str, list[Any]]:
    tables = [shard.table(file) for shard in shards]
    return {name: [value for table in tables for value in table[name].to_pylist()] for name in names}


def _mixed(fact: str) -> StoreError:
    cause = "artifacts of two batches were mixed, or the store was edited"
    return StoreError(fact, cause=cause, fix="`entropy-probe store verify`, then run the sweep again")


class Seeds(NamedTuple):
    """A quantity from each of several seeds.

    Args:
        values: one for each seed.
        errors: standard error of each over its E.
        units: independent units of one E.
    """

    values: list[float]
    errors: list[float]
    units: int

    def interval(self, level: float) -> tuple[float, float, float, float]:
        """The mean, its standard error, and the ends of its interval: over E for a single seed, else between seeds."""
        count = len(self.values)
        value = sum(self.values) / count
        error = self._spread / count**0.5 if count > 1 else self.errors[0]
        half = self._quantile(level) * error
        return value, error, value - half, value + half

    def of_a_run(self, level: float) -> tuple[float | None, float | None]:
        """The ends of the band for one more seed: mean ± t·s·√(1 + 1/S); None for a single seed."""
        count = len(self.values)
        if count < 2:
            return None, None
        value, half = sum(self.values) / count, self._quantile(level) * self._spread * (1 + 1 / count) ** 0.5
        return value - half, value + half

    @property
    def _spread(self) -> float:
        return float(torch.tensor(self.values, dtype=torch.float64).std())

    def _quantile(self, level: float) -> float:
        count = len(self.values)
        return t_quantile(0.5 + level / 2, (count if count > 1 else self.units) - 1)


class Chain(NamedTuple):
    """What was measured along the steps under one intervention, from every seed.

    Args:
        name: of the intervention.
        on_e: by replicate and number of the step.
    """

    name: str
    on_e: dict[tuple[int, int], OnE]


def chains_of(entries: Sequence["RehearsedPolicy"], units: Literal["sequence", "prompt"]) -> list[Chain]:
    """Gather the measured policies by intervention, in the order in which they come; the first is the run as it is."""
    found: dict[str, Chain] = {}
    for entry in entries:
        chain = found.setdefault(entry["intervention"], Chain(entry["intervention"], {}))
        chain.on_e[entry["replicate"], entry["number"]] = read_e(entry, units)
    return list(found.values())


def rehearsal_rows(chain: Chain, of_run: Chain, normalization: Normalization, floor: float, level: float) -> list[Row]:
    """Compute the rows of one intervention.

    Args:
        chain: what was measured.
        of_run: the same of the run as it is.
        normalization: of the entropy.
        floor: nats per token; 0: none.
        level: confidence level.

    Returns:
        Rows of `rehearsal_table.REHEARSAL`: all seeds together, then each seed.

    Raises:
        StoreError: the two chains do not have the same prompts.
    """
    replicates = sorted({replicate for replicate, _ in chain.on_e})
    rows: list[Row] = []
    for chosen in [replicates, *([one] for one in replicates)]:
        of_seeds = [
            {
                "normalization": normalization,
                "intervention": chain.name,
                "replicate": None if chosen is replicates else chosen[0],
                "replicates": len(chosen),
                "rehearsal_step": number,
                "confidence_level": level,
            }
            | _step_columns(chain, of_run, [(replicate, number) for replicate in chosen], normalization, level)
            for number in sorted({number for _, number in chain.on_e})
        ]
        asked = floor if floor and normalization == "per_token" else None
        rows += [row | _floor_columns(of_seeds, asked) for row in of_seeds]
    return rows


def _step_columns(
    chain: Chain, of_run: Chain, places: Sequence[tuple[int, int]], normalization: Normalization, level: float
) -> Row:
    """H, J and the length after one step, and their differences from the run as it is."""
    found = [chain.on_e[place].estimates(normalization) for place in places]
    others = [_paired(of_run.on_e[place], chain.on_e[place]).estimates(normalization) for place in places]
    row: Row = {}
    for name in QUANTITIES:
        known = all(name in one for one in (*found, *others))
        values = [one[name] for one in found] if known else []
        row |= _with_interval(name, chain, places, values, level)
        ends = _seeds(chain, places, values).of_a_run(level) if values else (None, None)
        row |= dict(zip((f"{name}_run_low", f"{name}_run_high"), ends, strict=True))
        changes = [one[name].minus(other[name]) for one, other in zip(found, others, strict=True)] if known else []
        row |= _with_interval(DIFFERENCES[name], chain, places, [] if chain is of_run else changes, level)
    return row


def _paired(of_run: OnE, under: OnE) -> OnE:
    if of_run.sequences != under.sequences:
        raise _mixed("two chains of a rehearsal from one seed do not have the same prompts")
    return of_run


def _seeds(chain: Chain, places: Sequence[tuple[int, int]], values: Sequence[Estimate]) -> Seeds:
    clusters = [chain.on_e[place].clusters_N for place in places]
    errors = [uncertainty.standard_error(one.influence_N, of) for one, of in zip(values, clusters, strict=True)]
    return Seeds(
        [one.value for one in values], errors, len(uncertainty.cluster_sums(values[0].influence_N, clusters[0]))
    )


def _with_interval(
    name: str, chain: Chain, places: Sequence[tuple[int, int]], values: Sequence[Estimate], level: float
) -> Row:
    names = (name, f"{name}_se", f"{name}_low", f"{name}_high")
    if not values:
        return dict.fromkeys(names)
    return dict(zip(names, _seeds(chain, places, values).interval(level), strict=True))


def _floor_columns(rows: Sequence[Row], floor: float | None) -> Row:
    """When H, and the ends of its band, are first below the floor."""
    low, high = ("H_run_low", "H_run_high") if rows[0]["H_run_low"] is not None else ("H_low", "H_high")

    def first(name: str) -> int | None:
        return next((row["rehearsal_step"] for row in rows if floor is not None and row[name] < floor), None)

    return {"floor": floor, "floor_step": first("H"), "floor_low": first(low), "floor_high": first(high)}
