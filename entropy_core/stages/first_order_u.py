"""first-order-u: how much each U sequence and token moves the entropy."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor

from entropy_core.checkpoints.optimizer_step import OptimizerStep
from entropy_core.losses.apart import influences
from entropy_core.losses.files import name_of, read_batch
from entropy_core.numerics import ragged
from entropy_core.numerics.adamw import through_clipping
from entropy_core.numerics.functional import TokenPair
from entropy_core.numerics.halves import HALVES, KINDS, by_normalization, entropy_and_length, of_all
from entropy_core.numerics.vectors import Block, Lazy, blocks_of, dots, remembered, times
from entropy_core.policy.model import Policy
from entropy_core.policy.spec import PolicySpec
from entropy_core.policy.vectors import stored_vector
from entropy_core.sequences.batch import BatchedSequences, tokens_of
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.processor import processor_of
from entropy_core.sequences.token_sensitivities import token_sensitivities
from entropy_core.store.columns import TokenTable

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import Checkpoint, Gradient, SequencesOfU, Update


def first_order_u(
    out: "Writer",
    execution: "Execution",
    *,
    policy: PolicySpec,
    sequences: "Sequence[SequencesOfU]",
    checkpoint: "Checkpoint",
    update: "Update",
    gradient: "Gradient",
) -> dict[str, Any]:
    """How the entropy answers to every token of U, and what each token, response and prompt therefore did to it.

    The sensitivities of a token are ⟨w, ∇ℓ_k⟩ and ⟨w, ∇h_k⟩, whatever the loss makes of it, so that a token without an
    advantage has them too. They come by forward mode along two covectors w:

        Pᵀ∇H   P the preconditioner with the denominators as they are. With the coefficients c and d of the loss,
               c_k⟨w, ∇ℓ_k⟩ + d_k⟨w, ∇h_k⟩ is the share of token k in ∂_vH; the shares add up to it with those of
               momentum and decay. Any other weighting of the tokens is another such sum.
        Jᵀ∇H   J = ∂v/∂g, the derivative of the whole step, second moments and clipping included. From it comes the
               influence of each response, see `losses.influence`, whose spread over prompts is the uncertainty of ∂_vH
               over U.

    Args:
        out: `sensitivities.safetensors` (`preconditioned/KIND/…` along P∘∇ of all of E, `pulled_back/KIND/HALF/…` along
            Jᵀ∇ of each half, KIND the entropy or the length of a response; `…/logprob` of ℓ and `…/entropy` of h, [K],
            nats or tokens per unit step and unit of coefficient); `tokens.parquet` (per U token: its text, both
            coefficients, both sensitivities along P∘∇H, and `share_…`); `sequences.parquet` (per U sequence:
            `influence_…`, the same for the ∇H of each half of E, and `share_…`). Tables have both normalisations, in
            nats per unit step.
        execution: device and micro-batch.
        policy: whose sequences they are, and how it is computed.
        sequences: the shards of sample-u-batch.
        checkpoint: artifact of load-checkpoint, for J and P, which are computed anew from the stored gradient.
        update: artifact of compute-update.
        gradient: artifact of entropy-gradient.

    Returns:
        For both normalisations ⟨∇H, v⟩, its parts from momentum, decay and the rounding of the step, and by how much
        the shares miss the whole, relative to it; and the baseline of ∇H.
    """
    processor = processor_of(policy, execution)
    model = processor.policy
    settings, shards = update.summary, [read_sequences(shard) for shard in sequences]
    of_u = tokens_of(shards)
    offsets_N1, (batch, coefficients) = of_u.offsets_N1, read_batch(update, of_u)
    loss = name_of(execution, settings["loss"]["name"], settings["loss"]["source"])

    # of the size of the policy: each is read or computed block by block, anew for every use
    blocks = blocks_of(model.named_parameters())
    direction, loss_gradient = (
        remembered(stored_vector(update.vector(name), model)) for name in ("direction", "gradient")
    )
    step = OptimizerStep(checkpoint, execution, model.named_parameters(), loss_gradient, settings["clip_factor"])
    unrounded, *parts = map(step.part, ("direction", "momentum", "decay"))
    rounding = Lazy(blocks, lambda block: direction[block] - unrounded[block])

    # everything is linear in ∇H: first along ∇H_seq and ∇L, then both normalisations from these
    halves = gradient.summary["halves"]
    preconditioned: list[TokenPair] = []  # by kind
    pulled_back: list[list[TokenPair]] = []  # by kind and half
    inner_products = []
    norm, max_norm, clip = (settings[name] for name in ("gradient_norm", "max_grad_norm", "clip_factor"))
    for kind in KINDS:
        covectors = [remembered(stored_vector(gradient.vector(f"{kind}_{half}"), model)) for half in HALVES]
        whole, pulled = remembered(_whole(halves, covectors)), [step.applied("pulled_back", w) for w in covectors]
        along_parts = [(whole, part) for part in (direction, *parts, *([rounding] if settings["rounded"] else []))]
        through_clip = [(loss_gradient, w) for w in pulled] if clip < 1.0 else []
        products = dots(along_parts + through_clip)  # block by block, as all of them are of the same step
        along_clip = products[len(along_parts) :] or [0.0] * len(pulled)
        of_step = products[: len(along_parts)] + ([] if settings["rounded"] else [0.0])
        inner_products.append(torch.tensor(of_step, dtype=torch.float64))
        pulled_back.append(
            [
                token_sensitivities(processor, shards, through_clipping(w, loss_gradient, norm, along, max_norm))
                for w, along in zip(pulled, along_clip, strict=True)
            ]
        )
        preconditioned.append(
            token_sensitivities(processor, shards, times(clip, step.applied("preconditioned", whole)))
        )
    sensitivities = _named(preconditioned, pulled_back, getattr(torch, policy.dtype))
    TokenTable(of_u.sequences_N, offsets_N1, sensitivities).write(out, "sensitivities.safetensors")

    found_N = iter(influences(loss, batch, [pair for pairs in pulled_back for pair in pairs], execution.isolation))
    influences_N = [[next(found_N) for _ in of_halves] for of_halves in pulled_back]
    shares_K = [coefficients.dot(pair) for pair in preconditioned]
    H_tok, mean_length = entropy_and_length(halves)
    of_all_N = by_normalization([of_all(halves, of_halves_N) for of_halves_N in influences_N], H_tok, mean_length)
    columns = {f"influence_{normalization}": influence_N for normalization, influence_N in of_all_N.items()}
    for half, of_half in enumerate(halves):
        along_half_N = [of_halves_N[half] for of_halves_N in influences_N]
        of_half_N = by_normalization(along_half_N, of_half["H_tok"], of_half["mean_length"])
        columns |= {f"influence_{normalization}_half_{half}": x_N for normalization, x_N in of_half_N.items()}

    of_sequences = update.table("sequences.parquet")
    of_tokens = _tokens(shards, offsets_N1, of_sequences, model)
    per_token = {"coefficient": coefficients.logprob_K, "entropy_coefficient": coefficients.entropy_K}
    by_kind = [torch.stack(pair) for pair in preconditioned]
    for normalization, (of_logprob_K, of_entropy_K) in by_normalization(by_kind, H_tok, mean_length).items():
        per_token[f"sensitivity_{normalization}"] = of_logprob_K
        per_token[f"entropy_sensitivity_{normalization}"] = of_entropy_K
    summary: dict[str, Any] = {"inner_product": {}, "momentum": {}, "decay": {}, "rounding": {}, "closure": {}}
    of_parts = by_normalization(inner_products, H_tok, mean_length)
    for normalization, share_K in by_normalization(shares_K, H_tok, mean_length).items():
        columns[f"share_{normalization}"] = ragged.sequence_sum(share_K, offsets_N1)
        per_token[f"share_{normalization}"] = share_K
        inner_product, momentum, decay, rounding_of_v = of_parts[normalization].tolist()
        missing = inner_product - momentum - decay - rounding_of_v - float(share_K.sum())
        closure = abs(missing / inner_product) if inner_product else 0.0
        for name, value in zip(summary, (inner_product, momentum, decay, rounding_of_v, closure), strict=True):
            summary[name][normalization] = value
    for name, column_K in per_token.items():
        of_tokens = of_tokens.append_column(name, pa.array(column_K.tolist()))
    for name, column_N in columns.items():
        of_sequences = of_sequences.append_column(name, pa.array(column_N.tolist()))
    prompts = [model.tokenizer.decode(shard.prompt(i)) for shard in shards for i in range(len(shard))]
    out.table(of_tokens, "tokens.parquet")
    out.table(of_sequences.append_column("prompt", pa.array(prompts)), "sequences.parquet")
    return summary | {"baseline": gradient.summary["baseline"]}


def _whole(halves: Sequence[Mapping[str, Any]], covectors: Sequence[Lazy[Block]]) -> Lazy[Block]:
    """The covector of all of E."""
    return Lazy(list(covectors[0]), lambda block: of_all(halves, [covector[block] for covector in covectors]))


def _named(
    preconditioned: Sequence[TokenPair], pulled_back: Sequence[Sequence[TokenPair]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The sensitivities as tensors of a file, in the number format of the pass that they came from."""
    pairs = {f"preconditioned/{kind}": pair for kind, pair in zip(KINDS, preconditioned, strict=True)}
    for kind, of_halves in zip(KINDS, pulled_back, strict=True):
        pairs |= {f"pulled_back/{kind}/{half}": pair for half, pair in zip(HALVES, of_halves, strict=True)}
    return {
        f"{name}/{of}": values_K.to(dtype)
        for name, pair in pairs.items()
        for of, values_K in zip(("logprob", "entropy"), pair, strict=True)
    }


def _tokens(shards: Sequence[BatchedSequences], offsets_N1: Tensor, sequences: pa.Table, model: Policy) -> pa.Table:
    """A row per U token: whose it is, where, and its text."""
    tokens_K = torch.cat([shard.response_tokens_K for shard in shards]).tolist()
    text_of = {token: model.tokenizer.decode([token]) for token in set(tokens_K)}
    index_K = pa.array(ragged.sequence_index(offsets_N1).tolist())
    return pa.table(
        {name: sequences[name].take(index_K) for name in ("sequence_id", "prompt_id", "reward", "advantage")}
        | {
            "position": ragged.position_index(offsets_N1).tolist(),
            "token": tokens_K,
            "text": [text_of[token] for token in tokens_K],
        }
    )
