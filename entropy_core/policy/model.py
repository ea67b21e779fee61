"""The policy: a causal language model that can be sampled, scored and differentiated.

π_θ(a|s) = softmax(z_θ(s)/τ). θ are the trained parameters: all parameters of the model, or those of its LoRA adapter.
Other parameters are constants. `Scorer` computes values, gradients and forward-mode derivatives with the same code.
ℓ is the log-probability of a token and h its entropy, in nats.
"""

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from entropy_core.errors import CheckpointError
from entropy_core.numerics.token_statistics import TokenStatistics
from entropy_core.policy.attention import UNGROUPED, plain_attention
from entropy_core.policy.scorer import Scorer, TeacherForcedRows

BLOCK = 2**18  # numbers converted to float64 at a time

log = logging.getLogger("entropy_probe.policy")


class Coefficients(NamedTuple):
    """Coefficients c and d, each [K], of a scalar Σ_k (c_k·ℓ_k + d_k·h_k) to differentiate."""

    logprob_K: Tensor
    entropy_K: Tensor


def _add_to(total: Tensor, leaf: Tensor) -> None:
    """Add the gradient of a leaf to its accumulator and free it."""
    assert leaf.grad is not None  # the hook runs after accumulation
    for to, gradient in zip(total.view(-1).split(BLOCK), leaf.grad.reshape(-1).split(BLOCK), strict=True):
        to += gradient
    leaf.grad = None


def _require_not_compiled(model: nn.Module) -> None:
    """Refuse a model compiled with torch.compile, which silently drops the derivatives of `DirectDerivatives`."""
    if any(_is_compiled(module) for module in model.modules()):
        raise CheckpointError(
            f"{type(model).__name__} is compiled, and a compiled model loses its forward-mode derivatives",
            cause="torch.compile was called on the model or on a part of it",
            fix="pass the uncompiled model",
        )


def _is_compiled(module: nn.Module) -> bool:
    """Return whether `torch.compile(module)`, `module.compile()` or a compiled `forward` was used."""
    wrapped = type(module).__module__.startswith("torch._dynamo")  # importing torch._dynamo takes a second
    compiled_forward = hasattr(module.forward, "_torchdynamo_orig_callable")
    return wrapped or compiled_forward or module._compiled_call_impl is not None


class Policy:
    """A model in evaluation mode, with its tokenizer.

    Args:
        model: a causal language model; its parameters that require a gradient are θ.
        tokenizer: its tokenizer.
        head_chunk_rows: number of positions with logits in memory at a time.
        blockwise: whether forward mode may use blockwise attention; without it, it uses the model's own.

    Raises:
        CheckpointError: the model is compiled.

    All passes use torch's fused attention if the architecture supports it, except forward mode, see `policy.blockwise`.
    If `recompute_activations` is True, a backward pass stores only the inputs of the layers and recomputes the rest.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        head_chunk_rows: int = 4096,
        blockwise: bool = True,
    ) -> None:
        _require_not_compiled(model)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.scorer = Scorer(self.model, head_chunk_rows)
        fused = ("sdpa", UNGROUPED)  # which have no forward-mode derivative, and every model has an eager attention
        own = model.config._attn_implementation
        self.own_attention = "eager" if own in fused else own
        self.forward_mode_attention = None if blockwise else self.own_attention  # None: not found out yet
        model.set_attn_implementation(plain_attention(model))
        self.recompute_activations = False
        self.spare: dict[str, Tensor] = {}  # buffers of earlier moved parameters, for reuse
        if not self.scorer.head_is_known:
            log.warning("this model's logits differ from those of its output head; using full logits (more memory)")

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters θ by name; a tied parameter appears once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def device(self) -> torch.device:
        """Device of micro-batches and of what is computed of them; that of all parameters, unless layers are split."""
        return next(self.model.parameters()).device

    @cached_property
    def device_of(self) -> dict[str, torch.device]:
        """Device of each trained parameter by name; see `layer_split`."""
        return {name: parameter.device for name, parameter in self.named_parameters().items()}

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the parameters."""
        return next(self.model.parameters()).dtype

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end a response, sorted: those of the generation config and the tokenizer's, as TRL."""
        ids = getattr(self.model.generation_config, "eos_token_id", None)
        of_config = [ids] if isinstance(ids, int) else ids or []
        return tuple(sorted({*of_config, self.tokenizer.eos_token_id} - {None}))

    def limit_logits(self, megabytes: float) -> None:
        """Limit the memory of logits at a time; at least one position is always computed.

        Args:
            megabytes: limit in units of 2²⁰ bytes.
        """
        row = self.model.get_output_embeddings().weight.shape[0] * self.dtype.itemsize
        self.scorer.head_chunk_rows = max(1, int(megabytes * 2**20 / row))

    def statistics(self, rows: TeacherForcedRows, temperature: float) -> TokenStatistics:
        """Compute ℓ and h of every response token of a micro-batch.

        Args:
            rows: the micro-batch.
            temperature: sampling temperature τ.

        Returns:
            ℓ and h, each [K], in the policy's dtype and on its device.
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
        """Add ∇Σ_k (c_k·ℓ_k + d_k·h_k) to one accumulator per pair (c, d), with one forward pass for all pairs.

        Each parameter's gradient is added and freed as soon as it is known, so they are never all in memory at once.

        Args:
            rows: the micro-batch.
            coefficients: pairs (c, d), each float64 [K].
            temperature: sampling temperature τ.
            into: accumulators by parameter name, float64; parameters without an accumulator are not differentiated.

        Returns:
            ℓ and h of the forward pass, detached, each [K].
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
        """Return the trained parameters as autograd leaves, one for each place in which the model uses a parameter.

        With one shared leaf, the gradient of a tied parameter would only be complete after its last place.

        Args:
            names: names of the parameters to differentiate; others are constants.

        Returns:
            The leaves by place in the scorer, and the parameter name by place for the differentiated parameters.
        """
        parameters, leaves, differentiated = self.named_parameters(), {}, {}
        for place, name in self.places.items():
            leaves[place] = parameters[name].detach()
            if name in names:
                leaves[place].requires_grad_()
                differentiated[place] = name
        return leaves, differentiated

    @cached_property
    def places(self) -> dict[str, str]:
        """The name of the parameter in each place of the scorer that uses a trained one; a tied one has several."""
        name_of = {parameter: name for name, parameter in self.named_parameters().items()}
        uses = self.scorer.named_parameters(remove_duplicate=False)
        return {place: name_of[parameter] for place, parameter in uses if parameter in name_of}

    def new_accumulator(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Return float64 zeros for trained parameters, after freeing the spare buffers of moved parameters.

        Args:
            names: names of the parameters; None for all trained ones.
        """
        self.spare = {}
        return {
            name: torch.zeros(p.shape, dtype=torch.float64, device=p.device)
            for name, p in self.named_parameters().items()
            if names is None or name in names
        }

    @contextmanager
    def dropout(self, seed: int) -> Iterator[None]:
        """Context in which passes drop what the model's dropout rates say, as they do in a trainer.

        Args:
            seed: of the masks.
        """
        with torch.random.fork_rng(devices={p.device for p in self.model.parameters() if p.device.type == "cuda"}):
            torch.manual_seed(seed)
            self.model.train()
            try:
                yield
            finally:
                self.model.eval()

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        layers = [layer for layer in self.model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        for layer in layers:
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=self.model.training
            )
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward  # restores the method of the class

    def next_logits(self, input_ids_BL: Tensor, attention_mask_BL: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Compute the logits after the last position, with a key-value cache; prompts are padded on the left.

        Args:
            input_ids_BL: tokens that are not in the cache yet.
            attention_mask_BL: 1 for real tokens, over cached and new columns.
            cache: the cache that the previous call returned, or an empty one.

        Returns:
            Logits [B, V] and the cache.
        """
        position_ids = (attention_mask_BL.cumsum(-1) - 1).clamp_min(0)[:, -input_ids_BL.shape[1] :]
        model = self.model.base_model if self.scorer.head_is_known else self.model
        name = "cache_params" if "cache_params" in signature(model.forward).parameters else "past_key_values"
        output = model(
            input_ids=input_ids_BL,
            attention_mask=attention_mask_BL,
            position_ids=position_ids,
            use_cache=True,
            **{name: cache},
        )
        if not self.scorer.head_is_known:
            return output.logits[:, -1], output[name]
        return self.scorer.head(output.last_hidden_state[:, -1]), output[name]
