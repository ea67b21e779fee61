"""The policy: a causal language model that is sampled, scored and differentiated as one function.

π_θ(a|s) = softmax(z_θ(s)/τ). θ are the parameters that are trained: all of a model, or those of a LoRA adapter in it;
the others are constants. One code path, `Scorer`, gives values, gradients and forward-mode derivatives.
"""

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from entropy_core.errors import CheckpointError
from entropy_core.numerics.token_statistics import TokenStatistics
from entropy_core.policy.scorer import Scorer, TeacherForcedRows

BLOCK = 2**18  # numbers that are held in float64 at one time

log = logging.getLogger("entropy_probe.policy")


class Coefficients(NamedTuple):
    """Weights of each token's ℓ and h in a scalar Σ_k (logprob_k·ℓ_k + entropy_k·h_k) to differentiate, [K]."""

    logprob_K: Tensor
    entropy_K: Tensor


def _add_to(total: Tensor, leaf: Tensor) -> None:
    """Move the gradient of a leaf to its accumulator."""
    assert leaf.grad is not None  # which is why the hook was called
    for to, gradient in zip(total.view(-1).split(BLOCK), leaf.grad.reshape(-1).split(BLOCK), strict=True):
        to += gradient
    leaf.grad = None


def _require_not_compiled(model: nn.Module) -> None:
    """Refuse what torch.compile made: it drops the derivatives of `DirectDerivatives`, and says nothing."""
    if any(_is_compiled(module) for module in model.modules()):
        raise CheckpointError(
            f"{type(model).__name__} is compiled, and a compiled model loses its forward-mode derivatives",
            cause="torch.compile was called on it, or on a part of it",
            fix="pass the model as it was before torch.compile",
        )


def _is_compiled(module: nn.Module) -> bool:
    """By `torch.compile(module)`, by `module.compile()`, or by a compiled `forward`."""
    wrapped = type(module).__module__.startswith("torch._dynamo")  # whose import takes a second
    compiled_forward = hasattr(module.forward, "_torchdynamo_orig_callable")
    return wrapped or compiled_forward or module._compiled_call_impl is not None


class Policy:
    """A model in evaluation mode, with its tokenizer.

    Args:
        model: a causal language model; what requires a gradient in it is what is differentiated and moved.
        tokenizer: its tokenizer.
        head_chunk_rows: positions whose logits exist at one time.

    Raises:
        CheckpointError: the model is compiled.

    With `recompute_activations` a backward pass keeps only the inputs of the layers, and computes the rest again.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, head_chunk_rows: int = 4096) -> None:
        _require_not_compiled(model)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.scorer = Scorer(self.model, head_chunk_rows)
        self.recompute_activations = False
        self.spare: dict[str, Tensor] = {}  # where parameters were that took the place of θ
        if not self.scorer.head_is_known:
            log.warning("this model's logits are not those of its head; using full logits (more memory)")

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name; a tied one appears once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(self.model.parameters()).dtype

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a response, from the generation config, else from the tokenizer; sorted."""
        ids = getattr(self.model.generation_config, "eos_token_id", None)
        ids = self.tokenizer.eos_token_id if ids is None else ids
        return tuple(sorted([ids] if isinstance(ids, int) else ids or []))

    def limit_logits(self, megabytes: float) -> None:
        """From now on no more than these megabytes of logits exist at one time, but one position at least.

        Args:
            megabytes: of 2²⁰ bytes.
        """
        row = self.model.get_output_embeddings().weight.shape[0] * self.dtype.itemsize
        self.scorer.head_chunk_rows = max(1, int(megabytes * 2**20 / row))

    def statistics(self, rows: TeacherForcedRows, temperature: float) -> TokenStatistics:
        """ℓ and h of every response token of a micro-batch.

        Args:
            rows: the micro-batch.
            temperature: τ.

        Returns:
            Two tensors [K] of the policy's dtype, on its device.
        """
        with torch.no_grad():
            return self.scorer(rows, temperature)

    def add_gradients(
        self,
        rows: TeacherForcedRows,
        coefficients: Sequence[Coefficients],
        temperature: float,
        into: Sequence[dict[str, Tensor]],
    ) -> TokenStatistics:
        """Add ∇Σ_k (c_k·ℓ_k + d_k·h_k) to one accumulator per set of coefficients; one forward for all of them.

        Each parameter's gradient is added when it is known and forgotten then: they never exist all at one time.

        Args:
            rows: the micro-batch.
            coefficients: sets of (c, d), float64 [K].
            temperature: τ.
            into: accumulators by parameter name, float64; a parameter that is not named is not differentiated.

        Returns:
            ℓ and h of the forward pass, detached.
        """
        leaves, names = self._leaves(into[0].keys())
        with self._recomputing() if self.recompute_activations else nullcontext():
            statistics = functional_call(self.scorer, leaves, (rows, temperature), tie_weights=False)
        for index, (weights, gradients) in enumerate(zip(coefficients, into, strict=True)):
            terms = [w_K.to(self.device) * x_K.double() for w_K, x_K in zip(weights, statistics, strict=True)]
            scalar = torch.stack(terms).sum()
            hooks = [
                leaves[place].register_post_accumulate_grad_hook(partial(_add_to, gradients[name]))
                for place, name in names.items()
            ]
            scalar.backward(retain_graph=index + 1 < len(coefficients))
            for hook in hooks:
                hook.remove()
        return TokenStatistics(*(values_K.detach() for values_K in statistics))

    def _leaves(self, names: Collection[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The trained parameters as leaves of a graph, one for each place in the model that a parameter has.

        So a gradient is known as soon as its place is passed: that of a tied parameter would wait for the other place.

        Args:
            names: of the parameters that are differentiated; the others are constants.

        Returns:
            The leaves by their place in the scorer; and by place, the name of what is differentiated.
        """
        name_of = {parameter: name for name, parameter in self.named_parameters().items()}
        leaves, differentiated = {}, {}
        for place, parameter in self.scorer.named_parameters(remove_duplicate=False):
            if parameter in name_of:
                leaves[place] = parameter.detach()
                if name_of[parameter] in names:
                    leaves[place].requires_grad_()
                    differentiated[place] = name_of[parameter]
        return leaves, differentiated

    def new_accumulator(self) -> dict[str, Tensor]:
        """A float64 zero for every trained parameter; the memory that a move has left behind is given back for it."""
        self.spare = {}
        return {
            name: torch.zeros(p.shape, dtype=torch.float64, device=p.device)
            for name, p in self.named_parameters().items()
        }

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        layers = [layer for layer in self.model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward  # what its class says is in force again

    def next_logits(self, input_ids_BL: Tensor, attention_mask_BL: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits after the last position, with a key-value cache; prompts are padded on the left.

        Args:
            input_ids_BL: the tokens that the cache does not hold yet.
            attention_mask_BL: 1 for real tokens, over cache and input together.
            cache: what the previous call returned.

        Returns:
            Logits [B, V] and the cache.
        """
        position_ids = (attention_mask_BL.cumsum(-1) - 1).clamp_min(0)[:, -input_ids_BL.shape[1] :]
        arguments = {
            "input_ids": input_ids_BL,
            "attention_mask": attention_mask_BL,
            "position_ids": position_ids,
            "past_key_values": cache,
            "use_cache": True,
        }
        if not self.scorer.head_is_known:
            output = self.model(**arguments)
            return output.logits[:, -1], output.past_key_values
        output = self.model.base_model(**arguments)
        return self.scorer.head(output.last_hidden_state[:, -1]), output.past_key_values
