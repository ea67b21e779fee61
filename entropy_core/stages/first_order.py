"""first-order-e: ℓ̇ and ḣ of E along v. first-order-u: how much each U sequence moves the entropy."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor

from entropy_core.numerics import adamw, ragged
from entropy_core.numerics.advantages import through_shared_length
from entropy_core.policy import Policy, TeacherForcedRows
from entropy_core.sequence_processor import BatchedSequences
from entropy_core.stages.sequences import Law, as_tangent, processor_of, read_sequences

if TYPE_CHECKING:
    from entropy_core.artifact import Artifact, Writer
    from entropy_core.execution import Execution

NORMALIZATIONS = ("per_token", "per_sequence")


def first_order_e(
    out: "Writer", execution: "Execution", *, law: Law, sequences: "Artifact", update: "Artifact"
) -> dict[str, Any]:
    """Derivatives of ℓ and h along v for every token of one shard, by forward mode.

    Args:
        out: `tokens.safetensors`: dlogprobs and dentropies, the logprobs and entropies of the same pass, offsets;
            `sequences.parquet`: a row per sequence.
        execution: device and micro-batch.
        law: the policy.
        sequences: a shard of sample-e-batch.
        update: artifact of compute-update.

    Returns:
        Number of sequences.
    """
    processor = processor_of(law, execution)
    v = as_tangent(update.tensors("direction.safetensors"), processor.policy)
    batch = read_sequences(sequences)
    columns = processor.map_tokens(batch, lambda rows: processor.policy.derivatives(rows, v, law["temperature"]))
    names = ("logprobs", "entropies", "dlogprobs", "dentropies")
    offsets_N1 = batch.response_offsets_N1
    out.tensors(dict(zip(names, columns, strict=True)) | {"offsets": offsets_N1}, "tokens.safetensors")
    out.table(
        pa.table(
            {
                "sequence_id": batch.sequence_ids_N.tolist(),
                "sum_dlogprob": ragged.sequence_sum(columns[2], offsets_N1).tolist(),
                "sum_dentropy": ragged.sequence_sum(columns[3], offsets_N1).tolist(),
            }
        ),
        "sequences.parquet",
    )
    return {"sequences": len(batch)}


def first_order_u(
    out: "Writer",
    execution: "Execution",
    *,
    law: Law,
    sequences: "Sequence[Artifact]",
    update: "Artifact",
    gradient: "Artifact",
) -> dict[str, Any]:
    """How much each U token and sequence moves the entropy, by forward mode along Jᵀ∇H and along P∘∇H.

    J = ∂v/∂g is the derivative of the whole step, second moments and clipping included: u_j = ⟨Jᵀ∇H, g_j⟩, whose spread
    over prompts is the uncertainty of ∂_vH over U. P is the preconditioner with the denominators as they are:
    ⟨P∘∇H, g_j⟩ is the share of sequence j in ∂_vH, and the shares add up to it with those of momentum and decay.

    Args:
        out: `sequences.parquet` (per U sequence: `influence_…` u_j and `share_…`), `tokens.parquet` (per U token: its
            text and `share_…`), each for both normalisations, in nats per unit step.
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
    jacobian, preconditioner, loss_gradient, direction, momentum, decay = (
        update.tensors(f"{file}.safetensors")
        for file in ("jacobian", "preconditioner", "gradient", "direction", "momentum", "decay")
    )
    shards = [read_sequences(shard) for shard in sequences]
    offsets_N1 = ragged.concatenate([shard.response_offsets_N1 for shard in shards])
    of_sequences = update.table("sequences.parquet")
    coefficients_N = torch.tensor(of_sequences["coefficient"].to_pylist(), dtype=torch.float64)
    coefficients_K = torch.repeat_interleave(coefficients_N, ragged.lengths(offsets_N1))
    of_tokens = _tokens(shards, offsets_N1, of_sequences, processor.policy)

    def contributions(covector: dict[str, Tensor]) -> Tensor:
        """⟨covector, gradient of each token's loss term⟩, float64 [K]."""
        scale = adamw.global_norm(covector) or 1.0  # a unit direction keeps the tangents in a good range
        tangent = as_tangent({name: t / scale for name, t in covector.items()}, processor.policy)

        def along(rows: TeacherForcedRows) -> list[Tensor]:
            return [processor.policy.derivatives(rows, tangent, law["temperature"]).dlogprobs_K]

        dlogprobs_K = torch.cat([processor.map_tokens(shard, along)[0] for shard in shards])
        return coefficients_K * dlogprobs_K.double() * scale

    summary: dict[str, Any] = {"inner_product": {}, "momentum": {}, "decay": {}, "closure": {}}
    for normalization in NORMALIZATIONS:
        entropy_gradient = gradient.tensors(f"{normalization}.safetensors")
        entropy_gradient = {name: entropy_gradient[name] for name in direction}
        w = adamw.pull_back(entropy_gradient, jacobian, loss_gradient, update.summary["max_grad_norm"])
        influence_N = ragged.sequence_sum(contributions(w), offsets_N1)
        influence_N = through_shared_length(influence_N, ragged.lengths(offsets_N1), update.summary["loss"])
        share_K = contributions({name: preconditioner[name].double() * g for name, g in entropy_gradient.items()})
        for name, column in (("influence", influence_N), ("share", ragged.sequence_sum(share_K, offsets_N1))):
            of_sequences = of_sequences.append_column(f"{name}_{normalization}", pa.array(column.tolist()))
        of_tokens = of_tokens.append_column(f"share_{normalization}", pa.array(share_K.tolist()))
        whole = adamw.dot(entropy_gradient, direction)
        parts = {name: adamw.dot(entropy_gradient, part) for name, part in (("momentum", momentum), ("decay", decay))}
        missing = whole - sum(parts.values()) - float(share_K.sum())
        summary["inner_product"][normalization] = whole
        summary["momentum"][normalization], summary["decay"][normalization] = parts["momentum"], parts["decay"]
        summary["closure"][normalization] = abs(missing / whole) if whole else 0.0
    prompts = [processor.policy.tokenizer.decode(shard.prompt(i)) for shard in shards for i in range(len(shard))]
    of_sequences = of_sequences.append_column("prompt", pa.array(prompts))
    out.table(of_tokens, "tokens.parquet")
    out.table(of_sequences, "sequences.parquet")
    return summary | {"baseline": gradient.summary["baseline"]}


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
