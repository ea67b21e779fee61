"""predict: what the exact step v' of the optimizer under an intervention does to the entropy, to first order."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from entropy_core.losses.changed import changed_by, excess_of
from entropy_core.losses.interventions import InterventionSpec
from entropy_core.losses.taken_step import TakenStep, taken_steps
from entropy_core.numerics.functional import FUNCTIONALS
from entropy_core.numerics.halves import HALVES
from entropy_core.numerics.vectors import in_blocks
from entropy_core.policy.model import Policy
from entropy_core.policy.spec import PolicySpec
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.functional_gradient import ScoredBatch, functional_gradients, scored_batch
from entropy_core.sequences.processor import SequenceProcessor, processor_of

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import (
        Checkpoint,
        Discriminators,
        RewardGradient,
        ScoresOfE,
        ScoresOfU,
        Sensitivities,
        SequencesOfE,
        SequencesOfU,
        Update,
    )
    from entropy_core.store.tensor_file import TensorFile

STEP_BYTES = 2**30
"""What the steps may take that are held against the same gradients on E."""

FEWEST_STEPS = 4
"""Steps that are held however large they are: fewer would cost more backward passes over E than they are worth."""


def predict(
    out: "Writer",
    execution: "Execution",
    *,
    policy: PolicySpec,
    sequences: "Sequence[SequencesOfE]",
    scores: "Sequence[ScoresOfE]",
    sequences_u: "Sequence[SequencesOfU]",
    scores_u: "Sequence[ScoresOfU]",
    discriminators_u: "Discriminators",
    checkpoint: "Checkpoint",
    update: "Update",
    reward_gradient: "RewardGradient | None",
    sensitivities: "Sensitivities",
    interventions: Sequence[InterventionSpec],
    responses_per_prompt: int,
    blocks: int,
) -> dict[str, Any]:
    """Compute ⟨∇H, v'⟩ for some interventions, with ∇H of several independent blocks of E.

    The spread over the blocks is the error over E of what an intervention changes. Each costs a backward pass over U,
    and all together two over E. They share forward passes, as far as there is room. No v' and no ∇H is kept.

    Args:
        out: unused; what is found is in the summary.
        execution: device and micro-batch.
        policy: the policy that sampled E and U.
        sequences: shards of sample-e-batch.
        scores: shards of score-e-batch.
        sequences_u: shards of sample-u-batch.
        scores_u: shards of score-u-batch.
        discriminators_u: artifact of discriminate-u.
        checkpoint: artifact of load-checkpoint.
        update: artifact of compute-update, of which no vector is read.
        reward_gradient: artifact of reward-gradient; None: nothing is said of the expected reward.
        sensitivities: artifact of half-sensitivities, for what selects tokens by it.
        interventions: what is tried.
        responses_per_prompt: number of responses of E to a prompt, all in the same block.
        blocks: number of blocks; the even ones are the first half of E.

    Returns:
        `predictions`, by label of the intervention: `products`, ⟨∇, v'⟩ by kind, one for each block; `reward`, ⟨∇J, v'⟩
        for each half of E; norm of the gradient, and its clip factor. `blocks`: for each its number of sequences, H_tok
        and mean length.
    """
    processor = processor_of(policy, execution)
    shards = [read_sequences(shard) for shard in sequences_u]
    table, excess_K = excess_of(scores_u, discriminators_u)
    changes = changed_by(interventions, execution, update, table, excess_K, sensitivities)
    under = [(changed.coefficients, changed.altered) for changed in changes]
    rewards = [reward_gradient.vector(f"reward_{half}") for half in HALVES] if reward_gradient else []
    e_batch = scored_batch(sequences, scores)
    of_e = _BlocksOfE(processor, e_batch, e_batch.ids_N // responses_per_prompt % blocks)

    found: list[dict[str, Any]] = []
    held: list[_Held] = []
    for steps in taken_steps(under, processor, shards, checkpoint, execution, update.summary["max_grad_norm"]):
        held += _held(steps, processor.policy, rewards)
        if len(held) >= _room(processor.policy):
            found += of_e.products(held)
            held.clear()
    found += of_e.products(held) if held else []
    predictions = {spec.label: prediction for spec, prediction in zip(interventions, found, strict=True)}
    return {"predictions": predictions, "blocks": of_e.summary()}


class _Held(NamedTuple):
    """A step v' in memory, flat by parameter, and what is said of it."""

    direction: dict[str, Tensor]
    said: dict[str, Any]


def _room(policy: Policy) -> int:
    """How many steps are held at a time."""
    size = sum(parameter.numel() for parameter in policy.named_parameters().values()) * _dtype(policy).itemsize
    return max(FEWEST_STEPS, STEP_BYTES // max(size, 1))


def _dtype(policy: Policy) -> torch.dtype:
    """In which steps are held."""
    return torch.promote_types(policy.dtype, torch.float32)


def _held(steps: Sequence[TakenStep], policy: Policy, rewards: "Sequence[TensorFile]") -> list[_Held]:
    """Compute several steps, with every block of ∇J read once for all of them."""
    found = [
        _Held(
            {
                name: torch.empty(parameter.numel(), dtype=_dtype(policy), device=parameter.device)
                for name, parameter in policy.named_parameters().items()
            },
            {"reward": [0.0 for _ in rewards], "gradient_norm": step.gradient_norm, "clip_factor": step.clip_factor},
        )
        for step in steps
    ]
    for pieces in zip(*(step.blocks() for step in steps), strict=True):
        block, device = pieces[0][0], pieces[0][1].device
        of_halves = [file.block(block).to(device).double() for file in rewards]
        for held, (_, v) in zip(found, pieces, strict=True):
            held.direction[block.name][block.start : block.stop] = v
            for half, w in enumerate(of_halves):
                held.said["reward"][half] += float((v * w).sum())
    return found


class _BlocksOfE(NamedTuple):
    """E with the number of the block that each sequence is in, int64 [N]."""

    processor: SequenceProcessor
    e_batch: ScoredBatch
    block_N: Tensor

    def products(self, held: Sequence[_Held]) -> list[dict[str, Any]]:
        """What is said of each step, with ⟨∇, v'⟩ by kind and block."""
        products: list[dict[str, list[float]]] = [{of.name: [] for of in FUNCTIONALS} for _ in held]
        for number in self.block_N.unique().tolist():
            gradients = functional_gradients(self.processor, self.e_batch, FUNCTIONALS, self.block_N == number)
            for functional, gradient in zip(FUNCTIONALS, gradients, strict=True):
                for of_step, product in zip(products, _dots(held, gradient), strict=True):
                    of_step[functional.name].append(product)
        return [{"products": of_step} | one.said for of_step, one in zip(products, held, strict=True)]

    def summary(self) -> list[dict[str, Any]]:
        """Size, entropy and length of each block."""
        found = []
        for number in self.block_N.unique().tolist():
            mine_N = self.block_N == number
            S_N, T_N = self.e_batch.entropy_N[mine_N], self.e_batch.length_N[mine_N]
            H_tok = float(S_N.sum() / T_N.sum())
            found.append({"sequences": int(mine_N.sum()), "H_tok": H_tok, "mean_length": float(T_N.mean())})
        return found


def _dots(held: Sequence[_Held], gradient: dict[str, Tensor]) -> list[float]:
    """⟨∇, v'⟩ of every step."""
    totals = [0.0 for _ in held]
    for block, w in in_blocks(gradient).items():
        steps_IW = torch.stack([one.direction[block.name][block.start : block.stop] for one in held]).double()
        for i, product in enumerate((steps_IW * w).sum(1).tolist()):  # the same bits beside any others
            totals[i] += product
    return totals
