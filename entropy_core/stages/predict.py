"""predict: what the exact step v' of the optimizer under an intervention does to the entropy, to first order."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from entropy_core.losses.changed import changed_by, excess_of
from entropy_core.losses.files import read_batch
from entropy_core.losses.interventions import InterventionSpec
from entropy_core.losses.taken_step import TakenStep
from entropy_core.losses.taken_steps import taken_steps
from entropy_core.numerics.functional import FUNCTIONALS
from entropy_core.numerics.halves import HALVES
from entropy_core.numerics.vectors import Block, blocks_of, in_blocks
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

STEP_BYTES = 2**32
"""What the steps may take on the disk that are held against the same gradients on E."""

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
    unless its gradient is a sum of multiples of others, and all together two over E. They share forward passes, as far
    as there is room. No v' and no ∇H is kept.

    Args:
        out: where v' is on the disk for a while; what is found is in the summary.
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
    _, run = read_batch(update, table)
    rewards = [reward_gradient.vector(f"reward_{half}") for half in HALVES] if reward_gradient else []
    e_batch = scored_batch(sequences, scores)
    of_e = _BlocksOfE(processor, e_batch, e_batch.ids_N // responses_per_prompt % blocks)

    parameters = processor.policy.named_parameters()
    room = max(FEWEST_STEPS, STEP_BYTES // (4 * max(sum(p.numel() for p in parameters.values()), 1)))
    found: list[dict[str, Any]] = []
    held: list[_Held] = []
    for steps in taken_steps(under, processor, shards, checkpoint, execution, update.summary["max_grad_norm"], run):
        held.append(_held(steps, processor.policy, rewards, out))
        del steps  # with their gradients, before the next ones
        if sum(len(group.results) for group in held) >= room:
            found += of_e.products(held)
            held.clear()
    found += of_e.products(held) if held else []
    predictions = {spec.label: prediction for spec, prediction in zip(interventions, found, strict=True)}
    return {"predictions": predictions, "blocks": of_e.summary()}


class _Held(NamedTuple):
    """Some steps v', block by block in an unlinked file, and the results of each."""

    file: "TensorFile"
    results: list[dict[str, Any]]


def _held(steps: Sequence[TakenStep], policy: Policy, rewards: "Sequence[TensorFile]", out: "Writer") -> _Held:
    """Compute some steps, with every block of ∇J read once for all of them."""
    shapes = {_name(block): (len(steps), block.stop - block.start) for block in blocks_of(policy.named_parameters())}
    rewards_HI = torch.zeros(len(rewards), len(steps), dtype=torch.float64)
    with out.vector("steps", shapes, torch.promote_types(policy.dtype, torch.float32)) as file:
        for pieces in zip(*(step.blocks() for step in steps), strict=True):
            block, steps_IW = pieces[0][0], torch.stack([v for _, v in pieces])
            for half, of_reward in enumerate(rewards):
                w = of_reward.block(block).to(steps_IW.device).double()
                rewards_HI[half] += (steps_IW * w).sum(1).cpu()
            file.write(Block(_name(block), 0, steps_IW.numel()), steps_IW)
        written = file.reopen_unlinked()
    results = [
        {"reward": reward_H, "gradient_norm": step.gradient_norm, "clip_factor": step.clip_factor}
        for reward_H, step in zip(rewards_HI.T.tolist(), steps, strict=True)
    ]
    return _Held(written, results)


def _name(block: Block) -> str:
    """Of a block in the file of the steps."""
    return f"{block.name}:{block.start}"


class _BlocksOfE(NamedTuple):
    """E with the number of the block that each sequence is in, int64 [N]."""

    processor: SequenceProcessor
    e_batch: ScoredBatch
    block_N: Tensor

    def products(self, held: Sequence[_Held]) -> list[dict[str, Any]]:
        """The results of each step, with ⟨∇, v'⟩ by kind and block."""
        results = [of_one for group in held for of_one in group.results]
        products: list[dict[str, list[float]]] = [{of.name: [] for of in FUNCTIONALS} for _ in results]
        parts = self.parts()
        gradients = functional_gradients(self.processor, self.e_batch, FUNCTIONALS, parts)
        for _ in parts:
            for functional in FUNCTIONALS:
                found = _dots(held, next(gradients))  # no name for it: the next accumulators are made when it is gone
                for of_step, product in zip(products, found, strict=True):
                    of_step[functional.name].append(product)
        return [{"products": of_step} | of_one for of_step, of_one in zip(products, results, strict=True)]

    def parts(self) -> list[Tensor]:
        """Which sequences are in each block, bool [N]."""
        return [self.block_N == number for number in self.block_N.unique()]

    def summary(self) -> list[dict[str, Any]]:
        """Size, entropy and length of each block."""
        found = []
        for mine_N in self.parts():
            S_N, T_N = self.e_batch.entropy_N[mine_N], self.e_batch.length_N[mine_N]
            H_tok = float(S_N.sum() / T_N.sum())
            found.append({"sequences": int(mine_N.sum()), "H_tok": H_tok, "mean_length": float(T_N.mean())})
        return found


def _dots(held: Sequence[_Held], gradient: Mapping[str, Tensor]) -> list[float]:
    """⟨∇, v'⟩ of every step."""
    totals = [torch.zeros(len(group.results), dtype=torch.float64) for group in held]
    for block, w in in_blocks(gradient).items():
        for total_I, group in zip(totals, held, strict=True):
            steps_IW = group.file[_name(block)].to(w.device).double()
            total_I += (steps_IW * w).sum(1).cpu()  # the same bits beside any other steps
    return torch.cat(totals).tolist()
