"""first-order-u: how much each U sequence and token moves the entropy."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor

from entropy_core.batched_sequences import BatchedSequences
from entropy_core.numerics import adamw, losses, ragged
from entropy_core.numerics.losses import TokenPair
from entropy_core.policy import Policy
from entropy_core.stages.derivatives import forward_mode
from entropy_core.stages.halves import HALVES, KINDS, by_normalization, entropy_and_length, of_all
from entropy_core.stages.loss import loss_of, read_batch, read_coefficients
from entropy_core.stages.sequences import Law, processor_of, read_sequences

if TYPE_CHECKING:
    from entropy_core.artifact import Artifact, Writer
    from entropy_core.execution import Execution


def first_order_u(
    out: "Writer",
    execution: "Execution",
    *,
    law: Law,
    sequences: "Sequence[Artifact]",
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
        update: artifact of compute-update.
        gradient: artifact of entropy-gradient.

    Returns:
        For both normalisations ⟨∇H, v⟩, its parts from momentum and decay, and by how much the shares miss the whole,
        relative to it; and the baseline of ∇H.
    """
    processor = processor_of(law, execution)
    files = ("jacobian", "preconditioner", "gradient", "direction", "momentum", "decay")
    jacobian, preconditioner, loss_gradient, *parts = (update.tensors(f"{file}.safetensors") for file in files)
    settings, batch, coefficients = update.summary, read_batch(update), read_coefficients(update)
    loss = loss_of(execution, settings["loss"], settings["loss_source"])
    shards = [read_sequences(shard) for shard in sequences]
    offsets_N1 = ragged.concatenate([shard.response_offsets_N1 for shard in shards])

    def along(covector: dict[str, Tensor]) -> TokenPair:
        """⟨covector, ∇ℓ_k⟩ and ⟨covector, ∇h_k⟩ of every token, float64 [K]."""
        scale = adamw.global_norm(covector) or 1.0  # a unit direction keeps the tangents in a good range
        unit = {name: t / scale for name, t in covector.items()}
        found = [forward_mode(processor, shard, unit)[2:] for shard in shards]
        return TokenPair(*(torch.cat(columns).double() * scale for columns in zip(*found, strict=True)))

    def influence(covector: dict[str, Tensor]) -> Tensor:
        """What each sequence does to ⟨covector, v⟩, float64 [N]."""
        pulled_back = adamw.pull_back(covector, jacobian, loss_gradient, settings["max_grad_norm"])
        return losses.influence(loss, batch, along(pulled_back))

    # everything is linear in ∇H: first along ∇H_seq and ∇L, then both normalisations from these
    halves = gradient.summary["halves"]
    influences_N, shares_K, inner_products = [], [], []
    for kind in KINDS:
        covectors = [_float64(gradient.tensors(f"{kind}_{half}.safetensors"), loss_gradient) for half in HALVES]
        influences_N.append([influence(covector) for covector in covectors])
        whole = {name: of_all(halves, [covector[name] for covector in covectors]) for name in loss_gradient}
        preconditioned = {name: preconditioner[name].double() * g for name, g in whole.items()}
        shares_K.append(coefficients.dot(along(preconditioned)))
        inner_products.append(torch.tensor([adamw.dot(whole, part) for part in parts], dtype=torch.float64))
    H_tok, mean_length = entropy_and_length(halves)
    of_all_N = by_normalization([of_all(halves, of_halves_N) for of_halves_N in influences_N], H_tok, mean_length)
    columns = {f"influence_{normalization}": influence_N for normalization, influence_N in of_all_N.items()}
    for half, of_half in enumerate(halves):
        along_half_N = [of_halves_N[half] for of_halves_N in influences_N]
        of_half_N = by_normalization(along_half_N, of_half["H_tok"], of_half["mean_length"])
        columns |= {f"influence_{normalization}_half_{half}": x_N for normalization, x_N in of_half_N.items()}

    of_sequences = update.table("sequences.parquet")
    of_tokens = _tokens(shards, offsets_N1, of_sequences, processor.policy)
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
    prompts = [processor.policy.tokenizer.decode(shard.prompt(i)) for shard in shards for i in range(len(shard))]
    out.table(of_tokens, "tokens.parquet")
    out.table(of_sequences.append_column("prompt", pa.array(prompts)), "sequences.parquet")
    return summary | {"baseline": gradient.summary["baseline"]}


def _float64(tensors: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    return {name: tensors[name].double() for name in names}


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
