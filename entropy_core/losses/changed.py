"""What an intervention makes of the step on U: its terms, their coefficients, and the hyperparameters.

U is the update batch, K its number of tokens; a_k and b_k are sensitivities of the entropy to the coefficients of ∇ℓ_k
and ∇h_k.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from entropy_core.files.functions import in_file
from entropy_core.losses.apart import influences, token_coefficients
from entropy_core.losses.files import name_of, read_batch, read_with
from entropy_core.losses.interventions import InterventionSpec, altered, changed_spec, terms_of
from entropy_core.losses.spec import LossSpec
from entropy_core.losses.token_weights import token_weights
from entropy_core.numerics.altered_optimizer import Altered
from entropy_core.numerics.functional import TokenPair
from entropy_core.numerics.halves import HALVES, KINDS, by_normalization
from entropy_core.numerics.interventions import Known, Terms, add_up, policy_terms, weighted
from entropy_core.store.columns import TokenTable, read_tokens

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Artifact


AS_IT_IS = InterventionSpec(name="as it is")
"""The run without any intervention, which every other one is compared with."""


class Changed(NamedTuple):
    """A changed loss and optimizer.

    Args:
        loss: name of the loss, as `functions.load_loss` takes it.
        terms: of the changed loss.
        coefficients: c_k and d_k of the changed loss, each float64 [K].
        altered: the hyperparameters.
    """

    loss: str
    terms: Terms
    coefficients: TokenPair
    altered: Altered


def changed_by(
    interventions: Sequence[InterventionSpec],
    execution: "Execution",
    update: "Artifact",
    sequences: TokenTable,
    excess_K: Tensor,
    sensitivities: "Artifact",
) -> Iterator[Changed]:
    """Apply each of some interventions to the step of a run.

    Args:
        interventions: those that are applicable.
        execution: knows where files of the user are.
        update: artifact of compute-update.
        sequences: token table of the sequences of U.
        excess_K: S* − E_π[S*] of every token, nats.
        sensitivities: artifact of half-sensitivities.

    Yields:
        The changed loss and optimizer, in the order of the interventions.
    """
    _, as_it_is = read_batch(update, sequences)
    share_K = share_on_first_half(sensitivities, as_it_is)
    for intervention in interventions:
        spec = changed_spec(LossSpec(**update.summary["loss"]), intervention)
        (batch,) = read_with(update, sequences, [spec])
        yield changed_loss(intervention, execution, spec, Known(batch, excess_K, share_K, intervention.seed))


def changed_loss(intervention: InterventionSpec, execution: "Execution", spec: LossSpec, known: Known) -> Changed:
    """Apply an intervention to a batch as the loss sees it.

    Args:
        intervention: one that is applicable.
        execution: knows where files of the user are.
        spec: the loss, of `changed_spec`.
        known: the batch, and what the intervention may go by.

    Returns:
        The changed loss and optimizer.
    """
    if intervention.source:
        own = in_file(intervention.name, execution.paths[intervention.source])
        terms = policy_terms(known.batch, token_weights(own, known.batch, execution.isolation))
    else:
        terms = terms_of(intervention, known)
    loss = name_of(execution, spec.name, spec.source)
    of_each = [token_coefficients(loss, term.batch, execution.isolation) for term in terms]
    return Changed(loss, terms, add_up(terms, of_each), altered(intervention))


def influences_of(changed: Changed, pairs: Sequence[TokenPair], execution: "Execution") -> list[Tensor]:
    """The influence of each response on Σ_k (c_k a_k + d_k b_k) for several pairs of a_k and b_k, float64 [N] each."""
    of_pairs = [torch.zeros_like(changed.terms[0].batch.weights_N) for _ in pairs]
    for term in changed.terms:
        along = [weighted(term, pair) for pair in pairs]
        found = influences(changed.loss, term.batch, along, execution.isolation)
        of_pairs = [sum_N + term.batch.weights_N * one_N for sum_N, one_N in zip(of_pairs, found, strict=True)]
    return of_pairs


def excess_of(scores: "Sequence[Artifact]", discriminators: "Artifact") -> tuple[TokenTable, Tensor]:
    """The token table of U, and S* − E_π[S*] of every token, float64 [K], from score-u-batch and discriminate-u."""
    table = read_tokens(scores, "logprobs", "entropies").join(read_tokens([discriminators], "expected"))
    logprobs_K, entropies_K, expected_K = (table[name].double() for name in ("logprobs", "entropies", "expected"))
    return table, logprobs_K.exp() * (entropies_K + logprobs_K) - expected_K


def read_sensitivities(sensitivities: "Artifact") -> dict[str, list[TokenPair]]:
    """Sensitivities of every token of U by kind and half of E, float64 [K]."""
    names = [f"{kind}/{half}/{of}" for kind in KINDS for half in HALVES for of in ("logprob", "entropy")]
    table = read_tokens([sensitivities], *names, file="sensitivities.safetensors")

    def pair(kind: str, half: int) -> TokenPair:
        return TokenPair(*(table[f"{kind}/{half}/{of}"].double() for of in ("logprob", "entropy")))

    return {kind: [pair(kind, half) for half in HALVES] for kind in KINDS}


def share_on_first_half(sensitivities: "Artifact", coefficients: TokenPair) -> Tensor:
    """What every token of U does to H_tok by the first half of E, nats per unit step, float64 [K]."""
    first = sensitivities.summary["halves"][0]
    shares = [coefficients.dot(pairs[0]) for pairs in read_sensitivities(sensitivities).values()]
    return by_normalization(shares, first["H_tok"], first["mean_length"])["per_token"]
