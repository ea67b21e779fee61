"""One of two checkpoints that are compared: its batches, what it estimates, and what tells whether they are shared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from entropy_core.estimates import measurement
from entropy_core.estimates.batches import evaluation_batch, moved_batch
from entropy_core.estimates.evaluation import EvaluationBatch
from entropy_core.estimates.rows import change_of
from entropy_core.estimates.selection import Row
from entropy_core.numerics import uncertainty
from entropy_core.numerics.choices import Estimator, Normalization
from entropy_core.numerics.functional import ENTROPY, LENGTH
from entropy_core.numerics.uncertainty import Estimate
from entropy_core.store.columns import read_tokens

if TYPE_CHECKING:
    from entropy_core.store.inputs import AtStepSize


@dataclass(frozen=True)
class Side:
    """One checkpoint of one run.

    Attributes:
        run: how the run, or the run directory in it, is called.
        checkpoint: name of the checkpoint.
        step: the trainer's global step.
        inputs: of the variance stage, without its settings.
        settings: of the variance stage.
        rows: of the result table, those of this checkpoint.
        pools: digests of the prompt pools of E and of U; an empty one is not known.
    """

    run: str
    checkpoint: str
    step: int
    inputs: Mapping[str, Any]
    settings: Mapping[str, Any]
    rows: Sequence[Row]
    pools: tuple[str, str]

    @cached_property
    def batch(self) -> EvaluationBatch:
        """E."""
        of_settings = self.settings["baseline"], self.settings["units"]
        return evaluation_batch(self.inputs["scores"], self.inputs["first_order_e"], *of_settings)[0]

    @cached_property
    def prompts_e(self) -> list[int]:
        """The prompt of each sequence of E."""
        tables = [shard.table("scores.parquet") for shard in self.inputs["scores"]]
        return [prompt for table in tables for prompt in table["prompt_id"].to_pylist()]

    @cached_property
    def prompts_u(self) -> list[int]:
        """The prompt of each sequence of U."""
        prompts: list[int] = self.inputs["first_order_u"].table("sequences.parquet")["prompt_id"].to_pylist()
        return prompts

    @property
    def scored(self) -> list[str]:
        """The digests of E's shards."""
        return [shard.digest for shard in self.inputs["scores"]]

    def row(self, normalization: Normalization, estimator: Estimator, multiple: float) -> Row:
        """The row of the result table at a step size."""
        wanted = (normalization, estimator, multiple)
        names = ("normalization", "estimator", "eta_over_lr")
        return next(row for row in self.rows if tuple(row[name] for name in names) == wanted)

    def entropy(self, normalization: Normalization) -> Estimate:
        """H."""
        S_N, T_N = (self.batch.columns[functional].total_N for functional in (ENTROPY, LENGTH))
        return uncertainty.entropy(S_N, T_N, normalization)

    def first_order(self, normalization: Normalization, multiple: float) -> Estimate:
        """δH₁."""
        eta = multiple * self.inputs["learning_rate"]
        return uncertainty.entropy_derivative(self.batch.columns, normalization).scaled(eta)

    def change(self, normalization: Normalization, estimator: Estimator, multiple: float) -> Estimate | None:
        """ΔH; None where its weights are not reliable."""
        if not self.row(normalization, estimator, multiple)["weights_reliable"]:
            return None
        entry = self._at(multiple)
        sequences = [read_tokens([shard]) for shard in self.inputs["scores"]]
        terms = measurement.measured(self.batch, moved_batch(entry, sequences), estimator)
        return change_of(self.batch, terms, entry["eta"], estimator, normalization)

    def moved_scores(self, multiple: float) -> list[str]:
        """The digests of what ΔH is measured from."""
        entry = self._at(multiple)
        return [shard.digest for shard in (*entry["shards"], *entry["path"])]

    def _at(self, multiple: float) -> "AtStepSize":
        entry: AtStepSize = next(one for one in self.inputs["moved"] if one["eta_over_lr"] == multiple)
        return entry
