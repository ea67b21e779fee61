"""Rows of interventions.parquet: what each intervention does to the change of the entropy, against the run as it is.

Every row is a difference of two steps on the same E and U, so what both share cancels. Its interval is for the mean
update: over E and over U. θ are the parameters of the checkpoint, v the step of the run and v' that under the
intervention, per unit of learning rate.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_core.estimates.distributions import t_quantile, t_tail
from entropy_core.numerics import block_estimates, half_samples, uncertainty
from entropy_core.numerics.block_estimates import Blocks, Error, FromBlocks, combined
from entropy_core.numerics.choices import Normalization
from entropy_core.numerics.halves import by_normalization, entropy_and_length, of_all
from entropy_core.numerics.multiple_tests import benjamini_hochberg, holm

Row = dict[str, Any]

NULL = "random"
"""What the label of a null intervention begins with: it changes nothing on average."""


class Screened(NamedTuple):
    """What the screen says of the interventions, the first of which is the run as it is.

    Args:
        labels: of the interventions.
        second_half: whether each is judged on the second half of E only.
        product_IKH: ⟨∇, v'⟩ by intervention, kind and half of E, float64; NaN where the screen cannot tell.
        gradient_IKH: the part of the gradient in it.
        clip_I: the clip factor that is in both.
        saturation_I: the factor of the part of the gradient once the momentum is saturated; NaN where there is none.
        kept_on_IKH: the same once momentum is that of the changed gradient.
        influence_IKHP: of each prompt of U on `product`, with ∇ of each half of E, float64.
        halves: number of sequences, entropy and length of both halves of E, as of entropy-gradient.
    """

    labels: Sequence[str]
    second_half: Sequence[bool]
    product_IKH: Tensor
    gradient_IKH: Tensor
    clip_I: Tensor
    saturation_I: Tensor
    kept_on_IKH: Tensor
    influence_IKHP: Tensor
    halves: Sequence[Mapping[str, Any]]

    def clipped(self, clip_I: Tensor) -> "Screened":
        """The same with other clip factors of the gradients."""
        factor_I11 = (clip_I / self.clip_I).view(-1, 1, 1)
        return self._replace(
            product_IKH=self.product_IKH + (factor_I11 - 1.0) * self.gradient_IKH,
            gradient_IKH=factor_I11 * self.gradient_IKH,
            clip_I=clip_I,
            kept_on_IKH=self.kept_on_IKH + (factor_I11 - 1.0) * self.saturation_I.view(-1, 1, 1) * self.gradient_IKH,
            influence_IKHP=factor_I11.unsqueeze(-1) * self.influence_IKHP,
        )

    def tells(self, i: int) -> bool:
        """Whether the screen can tell of an intervention."""
        return not bool(self.product_IKH[i].isnan().any())


class Predicted(NamedTuple):
    """⟨∇, v'⟩ of the exact step under some interventions, on blocks of E, the even ones of which are its first half.

    Args:
        along: by label, float64 [kinds, blocks].
        blocks: the blocks.
    """

    along: Mapping[str, Tensor]
    blocks: Blocks


class OverU(NamedTuple):
    """The error of a difference over U alone, and the E×U interaction as a standard error, which the one over E has."""

    error: Error
    interaction: float

    def times(self, factor: float) -> "OverU":
        """Return those of a multiple of the difference."""
        error = self.error._replace(standard_error=self.error.standard_error * factor)
        return OverU(error, self.interaction * factor)


class Settings(NamedTuple):
    """How rows are made.

    Args:
        eta: the learning rate.
        confidence_level: of intervals and verdicts.
        margin: share of |δH₁| of the run within which a difference is none that matters.
        informative: number of prompts of U whose responses have unequal rewards.
        fresh: the optimizer has made no step yet.
    """

    eta: float
    confidence_level: float
    margin: float
    informative: int
    fresh: bool


def screen_rows(screened: Screened, settings: Settings, normalization: Normalization) -> list[Row]:
    """One row for each intervention that the screen can tell of, the run as it is included.

    Two halves of E are too few for an error over E: there is no interval, and no verdict but *cannot tell*.
    """
    found = []
    for i, label in enumerate(screened.labels):
        if not screened.tells(i):
            continue
        value, difference, by_half = _on_halves(screened, screened.product_IKH, i, normalization)
        row = {"intervention": label, "level": "screen", "delta_h1": value * settings.eta, "delta_h": None}
        over_u = _over_u(screened, i, settings, normalization)
        row |= _paired(difference, Error(math.nan, 1.0), over_u, settings)
        row |= {f"difference_half_{half}": x * settings.eta for half, x in enumerate(by_half)}
        row |= {"p_half_1": None} | _kept_on(screened, i, settings, normalization)
        found.append(row)
    return found


def predict_rows(
    screened: Screened, predicted: Predicted, settings: Settings, normalization: Normalization
) -> list[Row]:
    """One row for each intervention whose exact step was taken.

    Args:
        screened: what the screen says, with the clip factors of the exact steps, for the error over U.
        predicted: what the exact steps say, the first of which is that of the run as it is.
        settings: how rows are made.
        normalization: per token or per sequence.

    Returns:
        The rows.
    """
    found = []
    run_KB = next(iter(predicted.along.values()))

    def on(along_KB: Tensor, chosen: slice) -> FromBlocks:
        return block_estimates.derivative(along_KB[:, chosen], predicted.blocks.part(chosen), normalization)

    for label, along_KB in predicted.along.items():
        i = screened.labels.index(label)
        by_half = [on(along_KB - run_KB, slice(half, None, 2)) for half in (0, 1)]
        judged = slice(1, None, 2) if screened.second_half[i] else slice(None)
        value, difference = on(along_KB, judged), on(along_KB - run_KB, judged)
        row = {"intervention": label, "level": "predict", "delta_h1": value.value * settings.eta, "delta_h": None}
        over_u = _over_u(screened, i, settings, normalization) if screened.tells(i) else None
        row |= _paired(difference.value, Error(*difference[1:]), over_u, settings)
        row |= {f"difference_half_{half}": x.value * settings.eta for half, x in enumerate(by_half)}
        row |= {"p_half_1": _p_value(by_half[1].value, Error(*by_half[1][1:]))}
        found.append(row | _kept_on(screened, i, settings, normalization))
    return found


def measure_rows(
    screened: Screened,
    measured: Mapping[str, tuple[float, float, Error]],
    settings: Settings,
    normalization: Normalization,
) -> list[Row]:
    """One row for each intervention whose step was measured on E.

    Args:
        screened: what the screen says, for the error over U.
        measured: by label ΔH, its difference from that of the run, and the error of the difference over E; nats.
        settings: how rows are made.
        normalization: per token or per sequence.

    Returns:
        The rows.
    """
    found = []
    for label, (delta_h, difference, over_e) in measured.items():
        i = screened.labels.index(label)
        per_unit = settings._replace(eta=1.0)
        over_u = _over_u(screened, i, settings, normalization) if screened.tells(i) else None
        scaled = None if over_u is None else over_u.times(settings.eta)
        row = {"intervention": label, "level": "measure", "delta_h1": None, "delta_h": delta_h}
        row |= _paired(difference, over_e, scaled, per_unit)
        row |= {"difference_half_0": None, "difference_half_1": None, "p_half_1": None}
        row |= {"kept_on_delta_h1": None, "kept_on_difference": None}
        found.append(row)
    return found


def with_verdicts(rows: Sequence[Row], run: str, base: float, settings: Settings) -> list[Row]:
    """Adjust the p-values of one level for their number, and say whether each intervention acts.

    Args:
        rows: of one level and normalisation, the run as it is among them.
        run: label of the run as it is.
        base: δH₁ of the run as it is, nats; the margin is a share of it.
        settings: how rows are made.

    Returns:
        The rows with `p_holm`, `p_bh`, `margin` and `verdict`, by falling difference.
    """
    tested = [row for row in rows if row["p_value"] is not None and row["intervention"] != run]
    p_values = [row["p_value"] for row in tested]
    adjusted = {id(row): pair for row, *pair in zip(tested, holm(p_values), benjamini_hochberg(p_values), strict=True)}
    margin = settings.margin * abs(base)
    found = []
    for row in rows:
        p_holm, p_bh = adjusted.get(id(row), (None, None))
        acts = _verdict(row, p_holm, margin, 1 - settings.confidence_level)
        verdict = "as it is" if row["intervention"] == run else acts
        found.append(row | {"p_holm": p_holm, "p_bh": p_bh, "margin": margin, "verdict": verdict})
    return sorted(found, key=lambda row: -row["difference"])


def _verdict(row: Row, p_holm: float | None, margin: float, alpha: float) -> str:
    """*does not act* if the interval of twice the level is within the margin, else *acts* if p is at most the level."""
    if row["se"] is None or p_holm is None:
        return "cannot tell"
    if row["se"] == 0.0:
        return "does not act" if row["difference"] == 0 else "acts"
    reach = t_quantile(1 - alpha, row["degrees_of_freedom"]) * row["se"]
    if abs(row["difference"]) + reach < margin:
        return "does not act"
    return "acts" if p_holm <= alpha else "cannot tell"


def _paired(difference: float, over_e: Error, over_u: OverU | None, settings: Settings) -> Row:
    """The columns of a difference and its errors; those per unit step are multiplied by η."""
    eta, is_known = settings.eta, math.isfinite(over_e.standard_error)
    row: Row = {"difference": difference * eta, "se_over_e": over_e.standard_error * eta if is_known else None}
    names = ("se_over_u", "se_interaction", "se", "degrees_of_freedom", "low", "high", "p_value", "detectable")
    row |= dict.fromkeys(names)
    if over_u is None:
        return row
    row |= {"se_over_u": over_u.error.standard_error * eta, "se_interaction": over_u.interaction * eta}
    if not is_known:
        return row
    both = combined([over_e, over_u.error])
    quantile = t_quantile(0.5 + settings.confidence_level / 2, both.degrees_of_freedom)
    error = both.standard_error * eta
    return row | {
        "se": error,
        "degrees_of_freedom": both.degrees_of_freedom,
        "low": row["difference"] - quantile * error,
        "high": row["difference"] + quantile * error,
        "p_value": _p_value(difference, both),
        "detectable": (quantile + uncertainty.POWER_QUANTILE) * error,
    }


def _p_value(value: float, error: Error) -> float | None:
    if not math.isfinite(error.standard_error):
        return None
    if error.standard_error == 0.0:
        return 1.0 if value == 0 else 0.0
    return 2 * t_tail(abs(value) / error.standard_error, error.degrees_of_freedom)


def _on_halves(
    screened: Screened, along_IKH: Tensor, i: int, normalization: Normalization
) -> tuple[float, float, list[float]]:
    """δH₁ under an intervention, its difference from the run, and that on each half of E, per unit step."""
    difference_KH = along_IKH[i] - along_IKH[0]
    by_half = [_on_half(difference_KH, screened.halves, half, normalization) for half in (0, 1)]
    if screened.second_half[i]:
        return _on_half(along_IKH[i], screened.halves, 1, normalization), by_half[1], by_half
    value, difference = (_on_all(x_KH, screened.halves, normalization) for x_KH in (along_IKH[i], difference_KH))
    return value, difference, by_half


def _kept_on(screened: Screened, i: int, settings: Settings, normalization: Normalization) -> Row:
    """The columns of the step that is kept on."""
    value, difference, _ = _on_halves(screened, screened.kept_on_IKH, i, normalization)
    columns = {"kept_on_delta_h1": value, "kept_on_difference": difference}
    return {name: None if math.isnan(x) else x * settings.eta for name, x in columns.items()}


def _over_u(screened: Screened, i: int, settings: Settings, normalization: Normalization) -> OverU | None:
    """The error over U of the difference, without what the error of ∇H adds to it; None where it is not valid."""
    if settings.fresh or settings.informative < half_samples.FEWEST:
        return None
    difference_KHP = screened.influence_IKHP[i] - screened.influence_IKHP[0]
    of_halves = [
        by_normalization(list(difference_KHP[:, half]), of_half["H_tok"], of_half["mean_length"])
        for half, of_half in enumerate(screened.halves)
    ]
    halves_2P = torch.stack([of_half[normalization] for of_half in of_halves])
    whole = [of_all(screened.halves, list(of_kind_HP)) for of_kind_HP in difference_KHP]
    whole_P = by_normalization(whole, *entropy_and_length(screened.halves))[normalization]
    standard_error = uncertainty.clustered_sum_standard_error(whole_P.unsqueeze(1))
    interaction = uncertainty.interaction_variance(whole_P, halves_2P)
    alone = max(standard_error**2 - interaction, 0.0) ** 0.5
    return OverU(Error(alone, float(len(whole_P) - 1)), interaction**0.5)


def _on_all(along_KH: Tensor, halves: Sequence[Mapping[str, Any]], normalization: Normalization) -> float:
    along = [of_all(halves, list(of_kind_H)) for of_kind_H in along_KH]
    return float(by_normalization(along, *entropy_and_length(halves))[normalization])


def _on_half(along_KH: Tensor, halves: Sequence[Mapping[str, Any]], half: int, normalization: Normalization) -> float:
    of_half = halves[half]
    along = list(along_KH[:, half])
    return float(by_normalization(along, of_half["H_tok"], of_half["mean_length"])[normalization])
