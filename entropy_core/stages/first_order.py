"""first-order-e: ℓ̇ and ḣ of E along v. first-order-u: how much each U sequence moves the entropy."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from entropy_core.numerics import adamw, ragged
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
    """Contribution u_j = ⟨Jᵀ∇H, g_j⟩ of each U sequence to ∂_vH, by forward mode along Jᵀ∇H.

    J = ∂v/∂g is the whole step's, second moments and clipping included. Σ_j u_j = ⟨Jᵀ∇H, g⟩, and the spread of the
    u_j over prompts is the uncertainty of ∂_vH over U.

    Args:
        out: `tokens.safetensors`: ℓ̇ along Jᵀ∇H for both normalisations, offsets; `sequences.parquet`: u_j.
        execution: device and micro-batch.
        law: the policy.
        sequences: the shards of sample-u-batch.
        update: artifact of compute-update.
        gradient: artifact of entropy-gradient.

    Returns:
        ⟨∇H, v⟩ for both normalisations, in nats per unit step, and the baseline of ∇H.
    """
    processor = processor_of(law, execution)
    jacobian = update.tensors("jacobian.safetensors")
    loss_gradient = update.tensors("gradient.safetensors")
    direction = update.tensors("direction.safetensors")
    table = update.table("sequences.parquet")
    coefficients_N = torch.tensor(table["coefficient"].to_pylist(), dtype=torch.float64)
    shards = [read_sequences(shard) for shard in sequences]
    files = {"offsets": ragged.concatenate([shard.response_offsets_N1 for shard in shards])}
    inner_products = {}
    for normalization in NORMALIZATIONS:
        entropy_gradient = gradient.tensors(f"{normalization}.safetensors")
        entropy_gradient = {name: entropy_gradient[name] for name in direction}
        inner_products[normalization] = adamw.dot(entropy_gradient, direction)
        w = adamw.pull_back(entropy_gradient, jacobian, loss_gradient, update.summary["max_grad_norm"])
        scale = adamw.global_norm(w)  # a unit direction keeps the tangents in a good range
        tangent = as_tangent({name: t / scale for name, t in w.items()} if scale else w, processor.policy)

        def along(rows: Any, tangent: dict[str, torch.Tensor] = tangent) -> list[torch.Tensor]:
            return [processor.policy.derivatives(rows, tangent, law["temperature"]).dlogprobs_K]

        dlogprobs_K = torch.cat([processor.map_tokens(shard, along)[0] for shard in shards]).double() * scale
        files[f"dlogprobs_{normalization}"] = dlogprobs_K
        contributions_N = coefficients_N * ragged.sequence_sum(dlogprobs_K, files["offsets"])
        table = table.append_column(f"contribution_{normalization}", pa.array(contributions_N.tolist()))
    out.tensors(files, "tokens.safetensors")
    out.table(table, "sequences.parquet")
    return {"inner_product": inner_products, "baseline": gradient.summary["baseline"]}
