"""Generate and score sequences, with the same code for the evaluation batch E and the update batch U.

The draws of a sequence are a pure function of (seed, purpose, sequence id, position), so they do not depend on batch
size, order, shard or worker. ℓ is the log-probability of a token and h its entropy, in nats.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from entropy_core.errors import PromptError
from entropy_core.numerics import philox, ragged
from entropy_core.numerics.philox import Purpose
from entropy_core.numerics.proposal import Proposal
from entropy_core.policy.model import Policy
from entropy_core.policy.scorer import TeacherForcedRows
from entropy_core.policy.spec import PolicySpec, policy_of
from entropy_core.sequences.batch import (
    BatchedSequences,
    DiagnosticsResults,
    LogprobResults,
    require_finite,
    teacher_forced_rows,
)
from entropy_core.sequences.decoding import Decode, DecodingRequest, Progress, decode

if TYPE_CHECKING:
    from entropy_core.execution import Execution


@dataclass(frozen=True)
class GenerationConfig:
    """Sampling settings, and batch sizes, which do not change the result; a proposal is for E only.

    Without `decode`, we decode ourselves.
    """

    temperature: float
    max_new_tokens: int
    gen_batch_size: int = 512
    tf_batch_size: int = 256
    tf_batch_tokens: int = 65_536
    stop_strings: tuple[str, ...] = ()
    proposal: Proposal | None = None
    decode: Decode | None = None


class SequenceProcessor:
    """Generates and scores sequences with one policy.

    Args:
        policy: the policy.
        config: temperature, stopping rules, and batch sizes.
        progress: called with (finished sequences, total sequences).
    """

    def __init__(self, policy: Policy, config: GenerationConfig, progress: Progress | None = None) -> None:
        self.policy, self.config = policy, config
        self.progress = progress or (lambda done, total: None)

    def require_vocabulary(self, pool: Sequence[Sequence[int]]) -> None:
        """Refuse token ids that the policy has no embedding for.

        Args:
            pool: token ids of the prompts.

        Raises:
            PromptError: a token id is too large; names the prompt.
        """
        vocabulary = self.policy.model.get_input_embeddings().weight.shape[0]
        for i, ids in enumerate(pool):
            if max(ids) >= vocabulary:
                raise PromptError(
                    f"prompt {i} contains token id {max(ids)}, and the policy has only {vocabulary} embeddings",
                    cause="the tokenizer belongs to another model",
                    fix="save the tokenizer of this model into the checkpoint directory",
                )

    def generate_with_replacement_sampling(
        self, pool: Sequence[Sequence[int]], total_sequences: int, seed: int, first: int = 0
    ) -> BatchedSequences:
        """Generate an E batch of i.i.d. pairs of prompt and response; sequence i answers prompt ⌊u_i·M⌋.

        Args:
            pool: token ids of the M prompts.
            total_sequences: number of sequences; a batch of 8,192 starts with the 4,096 of the same seed.
            seed: seed of the batch.
            first: id of the first sequence.

        Returns:
            The sequences `first`, …, `first + total_sequences − 1`.
        """
        stop = first + total_sequences
        drawn = philox.draw_with_replacement(seed, Purpose.E_PROMPT, torch.arange(stop), len(pool))
        return self._generate(
            pool, torch.arange(first, stop), drawn[first:], _draws(drawn)[first:], seed, Purpose.E_TOKEN
        )

    def generate_distinct(
        self,
        pool: Sequence[Sequence[int]],
        total_sequences: int,
        G: int,
        seed: int,
        purpose: Literal["E", "U"],
        first: int = 0,
    ) -> BatchedSequences:
        """Generate G responses per prompt; sequence i answers prompt ⌊i/G⌋ of a permutation of the pool.

        Args:
            pool: token ids of the M prompts.
            total_sequences: number of sequences.
            G: responses per prompt.
            seed: seed of the batch.
            purpose: E or U; the two are independent at the same seed.
            first: id of the first sequence.

        Returns:
            The sequences `first`, …, `first + total_sequences − 1`.
        """
        prompt_purpose, token_purpose = (
            (Purpose.E_PROMPT, Purpose.E_TOKEN) if purpose == "E" else (Purpose.U_PROMPT, Purpose.U_TOKEN)
        )
        order = philox.permutation(seed, prompt_purpose, len(pool))
        ids_N = torch.arange(first, first + total_sequences)
        return self._generate(pool, ids_N, order[ids_N // G], ids_N % G, seed, token_purpose)

    def generate_with_logprobs(
        self, prompts: Sequence[Sequence[int]], G: int, seed: int
    ) -> tuple[BatchedSequences, LogprobResults, DiagnosticsResults]:
        """Generate and score G responses to each of the given prompts, in their order.

        Args:
            prompts: token ids of the prompts.
            G: responses per prompt.
            seed: seed of the batch.

        Returns:
            Sequences, per-token results, per-sequence diagnostics.
        """
        ids_N = torch.arange(len(prompts) * G)
        sequences = self._generate(prompts, ids_N, ids_N // G, ids_N % G, seed, Purpose.U_TOKEN)
        return sequences, *self.score(sequences)

    def score(self, sequences: BatchedSequences) -> tuple[LogprobResults, DiagnosticsResults]:
        """Compute ℓ and h of every response token by teacher forcing.

        Args:
            sequences: the sequences to score.

        Returns:
            Per-token results and per-sequence diagnostics, on the CPU.

        Raises:
            NonFiniteError: a value is NaN or infinite; names the sequence.
        """
        logprobs_K, entropies_K = self.map_tokens(
            sequences, lambda rows: self.policy.statistics(rows, self.config.temperature)
        )
        offsets_N1 = sequences.response_offsets_N1
        surprisal_N = torch.zeros(len(sequences), dtype=torch.float64).scatter_reduce_(
            0, ragged.sequence_index(offsets_N1), -logprobs_K.double(), "amax", include_self=False
        )
        diagnostics = DiagnosticsResults(
            ragged.sequence_sum(logprobs_K, offsets_N1), ragged.sequence_sum(entropies_K, offsets_N1), surprisal_N
        )
        return LogprobResults(logprobs_K, entropies_K, offsets_N1), diagnostics

    def map_tokens(
        self,
        sequences: BatchedSequences,
        function: Callable[[TeacherForcedRows], Sequence[Tensor]],
    ) -> list[Tensor]:
        """Apply a per-token function to every micro-batch and return the results flat, in sequence order.

        Args:
            sequences: the sequences to process.
            function: maps a micro-batch to tensors with one value per token.

        Returns:
            One CPU tensor [K] per tensor that `function` returns, in the order of `sequences`.

        Raises:
            NonFiniteError: a value is NaN or infinite; names the sequence.
        """
        # results stay on the device until the last micro-batch, because fetching each of them would stall a GPU
        done = [(token_index_K, function(rows)) for token_index_K, rows in self.micro_batches(sequences)]
        if not done:
            return []
        indices, parts = zip(*done, strict=True)
        order_K, flat = torch.cat(indices), []
        for column in zip(*parts, strict=True):
            mixed_K = torch.cat(column).cpu()
            flat.append(torch.empty_like(mixed_K).index_copy_(0, order_K, mixed_K))
        for whole_K in flat:
            require_finite(whole_K, sequences)
        return flat

    def micro_batches(self, sequences: BatchedSequences) -> Iterator[tuple[Tensor, TeacherForcedRows]]:
        """Split sequences into micro-batches of similar length, longest first.

        A micro-batch has at most `tf_batch_size` sequences, and at most `tf_batch_tokens` tokens with the padding, so
        that one of long answers takes no more memory than one of short answers; but one sequence at least.

        Args:
            sequences: the sequences to split.

        Yields:
            The flat indices of the micro-batch's tokens, and the micro-batch on the policy's device.
        """
        prompt_lengths_N = ragged.lengths(sequences.prompt_offsets_N1)
        whole_lengths_N = prompt_lengths_N + sequences.lengths_N
        order_N, done = torch.argsort(whole_lengths_N, descending=True, stable=True), 0
        while done < len(order_N):
            longest = max(int(whole_lengths_N[order_N[done]]), 1)
            size = min(self.config.tf_batch_size, max(self.config.tf_batch_tokens // longest, 1))
            chosen_B = order_N[done : done + size]
            yield teacher_forced_rows(sequences, chosen_B, self.policy.device)
            done += len(chosen_B)
            self.progress(done, len(sequences))

    def _generate(
        self,
        pool: Sequence[Sequence[int]],
        sequence_ids_N: Tensor,
        prompt_ids_N: Tensor,
        draws_N: Tensor,
        seed: int,
        purpose: Purpose,
    ) -> BatchedSequences:
        prompts = [pool[i] for i in prompt_ids_N.tolist()]
        how = self.config
        request = DecodingRequest(
            *(prompts, sequence_ids_N, seed, purpose),
            *(how.temperature, how.max_new_tokens, how.stop_strings, how.proposal),
        )
        responses = (how.decode or decode)(self.policy, request, how.gen_batch_size, self.progress)
        tokens = [response.tokens for response in responses]
        log_q_K = None
        if how.proposal is not None:
            pairs = [pair for response in responses for pair in response.logprobs]
            policy_K, broad_K = torch.tensor(pairs, dtype=torch.float64).view(-1, 2).unbind(1)
            log_q_K = how.proposal.logprobs(policy_K, broad_K, _offsets(tokens))
        return BatchedSequences(
            sequence_ids_N=sequence_ids_N,
            prompt_ids_N=prompt_ids_N,
            draws_N=draws_N,
            prompt_tokens=_flat(prompts),
            prompt_offsets_N1=_offsets(prompts),
            response_tokens_K=_flat(tokens),
            response_offsets_N1=_offsets(tokens),
            finish_reasons=tuple(response.finish_reason for response in responses),
            proposal_logprobs_K=log_q_K,
        )


def _draws(drawn_N: Tensor) -> Tensor:
    """Count the earlier occurrences of each entry: [3, 5, 3] → [0, 0, 1]."""
    order_N = torch.argsort(drawn_N, stable=True)
    ordered_N = drawn_N[order_N]
    first_N = torch.searchsorted(ordered_N, ordered_N)
    result_N = torch.empty_like(drawn_N)
    result_N[order_N] = torch.arange(len(drawn_N)) - first_N
    return result_N


def _flat(lists: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([token for tokens in lists for token in tokens], dtype=torch.long)


def _offsets(lists: Sequence[Sequence[int]]) -> Tensor:
    return ragged.offsets_from_lengths(torch.tensor([len(tokens) for tokens in lists], dtype=torch.long))


def processor_of(
    spec: PolicySpec,
    execution: "Execution",
    max_new_tokens: int = 0,
    stop_strings: Sequence[str] = (),
    proposal: Proposal | None = None,
    decode: Decode | None = None,
) -> SequenceProcessor:
    """Load a policy and return a processor that samples and scores sequences with it.

    Args:
        spec: the policy to load.
        execution: device, batch sizes, and paths of files.
        max_new_tokens: maximum response length; used only for generation.
        stop_strings: strings that end a response, in addition to EOS; used only for generation.
        proposal: law that draws responses in place of the policy; used only for generation.
        decode: what decodes, if not we ourselves; used only for generation.

    Returns:
        The processor.
    """
    batch_sizes = execution.gen_batch_size, execution.tf_batch_size, execution.tf_batch_tokens
    config = GenerationConfig(spec.temperature, max_new_tokens, *batch_sizes, tuple(stop_strings), proposal, decode)
    return SequenceProcessor(policy_of(spec, execution), config, execution.progress)
