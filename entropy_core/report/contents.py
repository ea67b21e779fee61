"""What a report is of, beside the rows of its tables: each part is empty where it was not asked for."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from entropy_core.estimates.selection import Row


class OfTraining(NamedTuple):
    """What is known of the training.

    Args:
        settings: its settings, each with its source.
        warnings: sentences for the top of the page.
        compared: rows of `agreement.parquet`; what disagrees is said before the warnings.
    """

    settings: Sequence[Mapping[str, Any]] = ()
    warnings: Sequence[str] = ()
    compared: Sequence[Row] = ()


class Tried(NamedTuple):
    """What interventions do.

    Args:
        rows: of `interventions.parquet`.
        skipped: by checkpoint those that could not be tried, and why.
    """

    rows: Sequence[Row] = ()
    skipped: Mapping[str, Sequence[Mapping[str, str]]] = MappingProxyType({})


class Prices(NamedTuple):
    """What the entropy costs in reward.

    Args:
        rows: of `price.parquet`.
        without_reward: how many responses of E have no reward; then there are no rows.
        bought: by checkpoint, what the tokens of U do that cost entropy and buy no reward.
    """

    rows: Sequence[Row] = ()
    without_reward: int = 0
    bought: Mapping[str, Mapping[str, float]] = MappingProxyType({})


class OnRollout(NamedTuple):
    """The steps on one rollout.

    Args:
        rows: of `phase.parquet`.
        clipped: rows of `clipped.parquet`.
    """

    rows: Sequence[Row] = ()
    clipped: Sequence[Row] = ()


class StepTaken(NamedTuple):
    """The step that the trainer took, in parts.

    Args:
        rows: of `post_mortem.parquet`.
        samplers: by checkpoint, how far the law that drew U is from the policy.
    """

    rows: Sequence[Row] = ()
    samplers: Mapping[str, Mapping[str, Any]] = MappingProxyType({})


OF_TRAINING, NONE_TRIED, NO_PRICES, NOT_FOLLOWED, NOT_DISSECTED = (
    OfTraining(),
    Tried(),
    Prices(),
    OnRollout(),
    StepTaken(),
)
