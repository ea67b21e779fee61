"""first-order-u: how much each U sequence and token moves the entropy."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor

from entropy_core.batched_sequences import BatchedSequences
from entropy_core.numerics import adamw, ragged
from entropy_core.numerics.advantages import through_shared_length
from entropy_core.numerics.vectors import Block, Lazy, blocks_of, dot, global_norm
from entropy_core.optimizer_step import OptimizerStep
from entropy_core.policy import Policy
from entropy_core.stages.derivatives import forward_mode
from entropy_core.stages.halves import HALVES, KINDS, by_normalization, entropy_and_length, of_all
from entropy_core.stages.sequences import Law, processor_of, read_sequences, tangent_of

if TYPE_CHECKING:
    from entropy_core.artifact import Artifact, Writer
    from entropy_core.execution import Execution


def first_order_u(
    out: "Writer",
    execution: "Execution",
    *,
    law: Law,
    sequences: "Sequence[Artifact]",
    checkpoint: "Artifact",
    update: "Artifact",
    gradient: "Artifact",
) -> dict[str, Any]:
    """Influence and share of everything in U, by forward mode along Jᵀ∇H and along P∘∇H.

    J = ∂v/∂g is the derivative of the whole step, second moments and clipping included: u_j = ⟨Jᵀ∇H, g_j⟩, whose spread
    over prompts is the uncertainty of ∂_vH over U. P is the preconditioner with the denominators as they are:
    ⟨P∘∇H, g_j⟩ is the share of sequence j in ∂_vH, and the shares add up to it with those of momentum and decay.

    Args:
        out: `sequences.parquet` (per U sequence: `influence_…` u_j, the same for the ∇H of each half of E, and
            `share_…`), `tokens.parquet` (per U token: its text and `share_…`), each for both normalisations, in nats
            per unit step.
        execution: device and micro-batch.
        law: the policy.
        sequences: the shards of sample-u-batch.
        checkpoint: artifact of load-checkpoint, for J and P, which are computed anew from the stored gradient.
        update: artifact of compute-update.
        gradient: artifact of entropy-gradient.

    Returns:
        For both normalisations ⟨∇H, v⟩, its parts from momentum and decay, and by how much the shares miss the whole,
        relative to it; and the baseline of ∇H.
    """
    processor = processor_of(law, execution)
    policy = processor.policy
    loss, max_grad_norm, clip = (update.summary[name] for name in ("loss", "max_grad_norm", "clip_factor"))
    coefficients_K = update.tensors("coefficients.safetensors")["coefficients"]
    shards = [read_sequences(shard) for shard in sequences]
    offsets_N1 = ragged.concatenate([shard.response_offsets_N1 for shard in shards])

    # of the size of the policy: each is read or computed block by block, anew for every use
    blocks = blocks_of(policy.named_parameters())
    direction, loss_gradient = (_stored(update, name, blocks) for name in ("direction", "gradient"))
    step = OptimizerStep(checkpoint, execution, policy.named_parameters(), loss_gradient, clip)
    jacobian, preconditioner, *parts = map(step.part, ("jacobian", "preconditioner", "momentum", "decay"))

    def along(covector: Mapping[Block, Tensor]) -> Tensor:
        """⟨covector, gradient of each token's loss term⟩, float64 [K]."""
        scale = global_norm(covector) or 1.0  # a unit direction keeps the tangents in a good range
        unit = tangent_of(Lazy(blocks, lambda block: covector[block] / scale), policy)
        dlogprobs_K = torch.cat([forward_mode(processor, shard, unit).dlogprobs_K for shard in shards])
        return coefficients_K * dlogprobs_K.double() * scale

    def influence(covector: Mapping[Block, Tensor]) -> Tensor:
        """What each sequence does to ⟨covector, v⟩, float64 [N]."""
        terms_N = ragged.sequence_sum(
            along(adamw.pull_back(covector, jacobian, loss_gradient, max_grad_norm)), offsets_N1
        )
        return through_shared_length(terms_N, ragged.lengths(offsets_N1), loss)

    # everything is linear in ∇H: first along ∇H_seq and ∇L, then both normalisations from these
    halves = gradient.summary["halves"]
    influences_N, shares_K, inner_products = [], [], []
    for kind in KINDS:
        covectors = [_stored(gradient, f"{kind}_{half}", blocks) for half in HALVES]
        whole = _whole(halves, covectors)
        influences_N.append([influence(covector) for covector in covectors])
        shares_K.append(along(_product(preconditioner, whole, clip)))
        inner_products.append(torch.tensor([dot(whole, part) for part in (direction, *parts)], dtype=torch.float64))
    H_tok, mean_length = entropy_and_length(halves)
    of_all_N = by_normalization([of_all(halves, of_halves_N) for of_halves_N in influences_N], H_tok, mean_length)
    columns = {f"influence_{normalization}": influence_N for normalization, influence_N in of_all_N.items()}
    for half, of_half in enumerate(halves):
        along_half_N = [of_halves_N[half] for of_halves_N in influences_N]
        of_half_N = by_normalization(along_half_N, of_half["H_tok"], of_half["mean_length"])
        columns |= {f"influence_{normalization}_half_{half}": x_N for normalization, x_N in of_half_N.items()}

    of_sequences = update.table("sequences.parquet")
    of_tokens = _tokens(shards, offsets_N1, of_sequences, policy)
    summary: dict[str, Any] = {"inner_product": {}, "momentum": {}, "decay": {}, "closure": {}}
    products = by_normalization(inner_products, H_tok, mean_length)
    for normalization, share_K in by_normalization(shares_K, H_tok, mean_length).items():
        columns[f"share_{normalization}"] = ragged.sequence_sum(share_K, offsets_N1)
        of_tokens = of_tokens.append_column(f"share_{normalization}", pa.array(share_K.tolist()))
        inner_product, momentum, decay = products[normalization].tolist()
        missing = inner_product - momentum - decay - float(share_K.sum())
        closure = abs(missing / inner_product) if inner_product else 0.0
        for name, value in zip(summary, (inner_product, momentum, decay, closure), strict=True):
            summary[name][normalization] = value
    for name, column_N in columns.items():
        of_sequences = of_sequences.append_column(name, pa.array(column_N.tolist()))
    prompts = [policy.tokenizer.decode(shard.prompt(i)) for shard in shards for i in range(len(shard))]
    out.table(of_tokens, "tokens.parquet")
    out.table(of_sequences.append_column("prompt", pa.array(prompts)), "sequences.parquet")
    return summary | {"baseline": gradient.summary["baseline"]}


def _stored(artifact: "Artifact", name: str, blocks: Sequence[Block]) -> Lazy[Block]:
    """A vector of an artifact, float64."""
    file = artifact.vector(name)
    return Lazy(blocks, lambda block: file.block(block).double())


def _whole(halves: Sequence[Mapping[str, Any]], covectors: Sequence[Lazy[Block]]) -> Lazy[Block]:
    """The covector of all of E."""
    return Lazy(list(covectors[0]), lambda block: of_all(halves, [covector[block] for covector in covectors]))


def _product(diagonal: Lazy[Block], covector: Lazy[Block], factor: float) -> Lazy[Block]:
    return Lazy(list(diagonal), lambda block: factor * diagonal[block] * covector[block])


def _tokens(shards: Sequence[BatchedSequences], offsets_N1: Tensor, sequences: pa.Table, policy: Policy) -> pa.Table:
    """A row per U token: whose it is, where, and its text."""
    tokens_K = torch.cat([shard.response_tokens_K for shard in shards]).tolist()
    text_of = {token: policy.tokenizer.decode([token]) for token in set(tokens_K)}
    index_K = pa.array(ragged.sequence_index(offsets_N1).tolist())
    return pa.table(
        {name: sequences[name].take(index_K) for name in ("sequence_id", "prompt_id", "reward", "advantage")}
        | {
            "position": ragged.position_index(offsets_N1).tolist(),
            "token": tokens_K,
            "text": [text_of[token] for token in tokens_K],
        }
    )
