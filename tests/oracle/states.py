"""Every response of a tiny policy, as tables that are made once: a draw of E or U is then a choice of rows."""

from functools import cached_property
from itertools import product
from typing import NamedTuple

import torch
from conftest import policy_of
from torch import Tensor
from transformers import PreTrainedModel

from entropy_core.numerics import ragged, token_statistics
from entropy_core.numerics.choices import Normalization
from entropy_core.numerics.unseen import states
from entropy_core.policy import moves
from oracle.policies import in_float64


class Scores(NamedTuple):
    """ℓ and h of every token of every response, [K], in the number format of the policy."""

    logprobs_K: Tensor
    entropies_K: Tensor


class Exact(NamedTuple):
    """Entropy of a response, and its mean length."""

    H_seq: Tensor
    L: Tensor

    def of(self, normalization: Normalization) -> Tensor:
        """The entropy, per response or per token."""
        return self.H_seq if normalization == "per_sequence" else self.H_seq / self.L


class Responses:
    """All responses of a policy to some prompts: R responses with K tokens in all, from S states.

    A state is a prompt with the first tokens of a response; a row of a batch holds the states along one response.
    """

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int, temperature: float):
        self.policy = policy_of(model)
        self.prompts, self.temperature, self.max_new_tokens = prompts, temperature, max_new_tokens
        self.vocabulary = model.get_output_embeddings().weight.shape[0]
        eos = self.vocabulary - 1
        longest = max(map(len, prompts)) + max_new_tokens - 1
        plain = [token for token in range(self.vocabulary) if token != eos]
        number: dict[tuple[int, tuple[int, ...]], int] = {}  # of a state
        self.depths: list[int] = []
        rows, row_S, position_S = [], [], []
        self.rows_of_prompt: list[tuple[int, int]] = []
        for p, prompt in enumerate(prompts):
            first = len(rows)
            for continuation in product(plain, repeat=max_new_tokens - 1):
                for depth in range(max_new_tokens):
                    key = p, continuation[:depth]
                    if key not in number:
                        number[key] = len(number)
                        self.depths.append(depth)
                        row_S.append(len(rows))
                        position_S.append(len(prompt) + depth - 1)
                rows.append((prompt + list(continuation) + [eos] * longest)[:longest])
            self.rows_of_prompt.append((first, len(rows)))
        self.input_ids_BL = torch.tensor(rows)
        self.row_S, self.position_S = torch.tensor(row_S), torch.tensor(position_S)
        tokens, state_of, lengths, self.texts = [], [], [], list[tuple[int, tuple[int, ...]]]()
        for p in range(len(prompts)):
            for length in range(1, max_new_tokens + 1):
                ends = range(self.vocabulary) if length == max_new_tokens else [eos]
                for before in product(plain, repeat=length - 1):
                    for end in ends:
                        response = (*before, end)
                        tokens += response
                        state_of += [number[p, response[:k]] for k in range(length)]
                        lengths.append(length)
                        self.texts.append((p, response))
        self.tokens_K, self.state_K = torch.tensor(tokens), torch.tensor(state_of)
        self.lengths_R = torch.tensor(lengths)
        self.offsets_R1 = ragged.offsets_from_lengths(self.lengths_R)
        self.prompt_R = torch.tensor([p for p, _ in self.texts])
        self.truncated_R = torch.tensor([response[-1] != eos for _, response in self.texts])
        self.identities_K = states(self.prompt_R, self.tokens_K, self.offsets_R1)

    def logits(self, model: PreTrainedModel | None = None) -> Tensor:
        """Of every state, [S, V]."""
        model = model or self.policy.model
        with in_float64(self.policy.dtype):
            return model(input_ids=self.input_ids_BL, use_cache=False).logits[self.row_S, self.position_S]

    def logprobs(self) -> Tensor:
        """Of every token at every state, [S, V]; differentiable."""
        return torch.log_softmax(self.logits() / self.temperature, 1)

    def scores(self) -> Scores:
        """What the product's scorer makes of the logits."""
        with torch.no_grad():
            logits_KV = self.logits()[self.state_K]
            return Scores(*token_statistics.token_statistics(logits_KV, self.tokens_K, self.temperature))

    def law(self, logprobs_K: Tensor) -> Tensor:
        """The probability of every response, [R], with uniform prompts."""
        return ragged.sequence_sum(logprobs_K.double(), self.offsets_R1).exp() / len(self.prompts)

    def exact(self, logprobs_SV: Tensor | None = None) -> Exact:
        """H by Shannon's formula over responses, and L; differentiable."""
        logprobs_SV = self.logprobs() if logprobs_SV is None else logprobs_SV
        total_R = ragged.sequence_sum(logprobs_SV[self.state_K, self.tokens_K], self.offsets_R1)
        law_R = total_R.exp() / len(self.prompts)
        return Exact(-(law_R * total_R).sum(), (law_R * self.lengths_R).sum())

    def exact_from(self, scores: Scores) -> Exact:
        """The same from scores in float64."""
        total_R = ragged.sequence_sum(scores.logprobs_K, self.offsets_R1)
        law_R = total_R.exp() / len(self.prompts)
        return Exact(-(law_R * total_R).sum(), (law_R * self.lengths_R).sum())

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """θ by name."""
        return dict(self.policy.named_parameters())

    @cached_property
    def theta(self) -> Tensor:
        """θ laid end to end, float64 [Q]."""
        return torch.cat([p.detach().double().flatten() for p in self.parameters.values()])

    def direction(self, v_Q: Tensor) -> dict[str, Tensor]:
        """A vector as tensors of the shapes of the parameters."""
        shapes = {name: p.shape for name, p in self.parameters.items()}
        parts = v_Q.split([shape.numel() for shape in shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def scores_at(self, v_Q: Tensor, eta: float) -> Scores:
        """Scores at θ + ηv."""
        with moves.moved(self.policy, self.direction(v_Q), eta):
            return self.scores()

    def jittered(self, draw: int) -> Scores:
        """Scores with the rounding errors of a draw of rescore-e-batch."""
        with moves.jittered(self.policy, draw):
            return self.scores()

    def _flat(self, grads: tuple[Tensor | None, ...]) -> Tensor:
        parameters = self.parameters.values()
        filled = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)]
        return torch.cat([g.flatten() for g in filled])

    def gradients(self) -> tuple[Tensor, Tensor]:
        """∇ℓ of every token at every state, and ∇h of every state: [S, V, Q] and [S, Q]."""
        ends = list(self.parameters.values())
        of_states: list[Tensor] = []
        for first, last in self.rows_of_prompt:
            mine_S = ((self.row_S >= first) & (self.row_S < last)).nonzero().squeeze(1)
            with in_float64(self.policy.dtype):
                logits_BLV = self.policy.model(input_ids=self.input_ids_BL[first:last], use_cache=False).logits
            l_SV = torch.log_softmax(
                logits_BLV[self.row_S[mine_S] - first, self.position_S[mine_S]] / self.temperature, 1
            )
            of_states += [
                self._flat(torch.autograd.grad(one, ends, retain_graph=True, allow_unused=True))
                for one in l_SV.flatten()
            ]
        logprob_SVQ = torch.stack(of_states).view(len(self.row_S), self.vocabulary, -1)
        l_SV = self.logprobs().detach()
        entropy_SQ = torch.einsum("sv,svq->sq", -l_SV.exp() * (l_SV + 1), logprob_SVQ)
        return logprob_SVQ, entropy_SQ

    def derivatives(self, normalization: Normalization) -> tuple[Tensor, Tensor]:
        """∇H, [Q], and ∇²H, [Q, Q]."""
        ends, model = list(self.parameters.values()), self.policy.model
        fused = model.config._attn_implementation
        model.set_attn_implementation("eager")  # no fused attention can be differentiated twice
        H = self.exact().of(normalization)
        model.set_attn_implementation(fused)
        gradient_Q = self._flat(torch.autograd.grad(H, ends, create_graph=True, allow_unused=True))
        rows = [self._flat(torch.autograd.grad(one, ends, retain_graph=True, allow_unused=True)) for one in gradient_Q]
        return gradient_Q.detach(), torch.stack(rows)
