"""The policy: a causal language model that is sampled, scored and differentiated as one function.

π_θ(a|s) = softmax(z_θ(s)/τ). θ are the parameters that are trained: all of a model, or those of a LoRA adapter in it;
the others are constants. One code path, `Scorer`, gives values, gradients and forward-mode derivatives.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from entropy_core.errors import CheckpointError, one_line
from entropy_core.numerics import token_statistics
from entropy_core.numerics.direct_derivatives import DirectDerivatives
from entropy_core.numerics.token_statistics import TokenDerivatives, TokenStatistics
from entropy_core.scorer import Scorer, TeacherForcedRows

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


class Policy:
    """A model in evaluation mode, with its tokenizer.

    Args:
        model: a causal language model; what requires a gradient in it is what is differentiated and moved.
        tokenizer: its tokenizer.
        head_chunk_rows: positions whose logits exist at one time.

    With `recompute_activations` a backward pass keeps only the inputs of the layers, and computes the rest again.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, head_chunk_rows: int = 4096) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.scorer = Scorer(self.model, head_chunk_rows)
        self.recompute_activations = False
        self._place: dict[str, Tensor] = {}  # where parameters were that took the place of θ
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

    def expected_discriminators(self, rows: TeacherForcedRows, temperature: float) -> Tensor:
        """Σ_a π_a²(h + log π_a) of the step of every response token: see `token_statistics.expected_discriminator`.

        Args:
            rows: the micro-batch.
            temperature: τ.

        Returns:
            [K], of the policy's dtype, on its device.
        """
        scorer = self.scorer
        with torch.no_grad():
            if not scorer.head_is_known:
                return token_statistics.expected_discriminator(scorer.all_logits(rows), temperature)
            chunks = scorer.hidden(rows).split(scorer.head_chunk_rows)
            parts = [token_statistics.expected_discriminator(scorer.head(chunk), temperature) for chunk in chunks]
        return torch.cat(parts)

    def derivatives(
        self, rows: TeacherForcedRows, direction: Mapping[str, Tensor], temperature: float
    ) -> TokenDerivatives:
        """ℓ, h and their derivatives along `direction`, from one forward-mode pass.

        Args:
            rows: the micro-batch.
            direction: v by parameter name, of the policy's dtype and device.
            temperature: τ.

        Returns:
            `TokenDerivatives`, each [K].
        """
        parameters = self.named_parameters()
        primal = {f"model.{name}": parameters[name].detach() for name in direction}  # the others are constants
        tangent = {f"model.{name}": v for name, v in direction.items()}

        def statistics(parameters: dict[str, Tensor]) -> TokenStatistics:
            return functional_call(self.scorer, parameters, (rows, temperature))

        with torch.no_grad(), DirectDerivatives():
            try:
                values, derivatives = jvp(statistics, (primal,), (tangent,))[:2]
            except RuntimeError as error:
                if "forward AD" not in str(error) and "functorch" not in str(error):
                    raise
                raise CheckpointError(
                    f"{type(self.model).__name__} has no forward-mode derivative: {one_line(error)}",
                    cause="an operation that brings its own gradient, and no derivative in the forward direction",
                    way_out="probe an architecture that is made of torch's own operations; most are",
                ) from error
        return TokenDerivatives(*values, *derivatives)

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
        self._place = {}
        return {
            name: torch.zeros(p.shape, dtype=torch.float64, device=p.device)
            for name, p in self.named_parameters().items()
        }

    def moved(self, direction: Mapping[str, Tensor], eta: float) -> AbstractContextManager[None]:
        """Within the context the parameters are θ + η·v, computed in float64 and rounded; afterwards θ, bit for bit.

        Args:
            direction: v by parameter name; each tensor is asked for once.
            eta: η.
        """
        room = torch.empty(BLOCK, dtype=torch.float64, device=self.device)

        def displaced(name: str, theta: Tensor, to: Tensor) -> None:
            v = direction[name].to(theta.device).reshape(-1)
            for block, start, step in zip(to.split(BLOCK), theta.split(BLOCK), v.split(BLOCK), strict=True):
                block.copy_(room[: len(step)].copy_(step).mul_(eta).add_(start))

        return self._replaced(direction, displaced)

    def jittered(self, seed: int) -> AbstractContextManager[None]:
        """Within the context every parameter is the next number above or below it, at random; afterwards θ again.

        Nothing has changed but the rounding errors of everything that is computed; the frozen parameters, which take
        part in all of it, are moved as well.

        Args:
            seed: of the signs.
        """
        generator = torch.Generator().manual_seed(seed)

        def neighbour(_: str, theta: Tensor, to: Tensor) -> None:
            for block, start in zip(to.split(BLOCK), theta.split(BLOCK), strict=True):
                up = torch.randint(0, 2, start.shape, generator=generator, dtype=torch.bool).to(theta.device)
                torch.nextafter(start, torch.where(up, torch.inf, -torch.inf).to(start), out=block)

        return self._replaced(dict(self.model.named_parameters()), neighbour)

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

    @property
    def attention_without_derivative(self) -> str:
        """`sdpa`, torch's fused kernel, where the architecture has it; else the policy's own.

        The kernel lacks a softcap in attention, so an architecture with one keeps its own.
        """
        config = self.model.config.get_text_config()
        fused = self.model._supports_sdpa and self.model._can_set_attn_implementation()
        fused = fused and not getattr(config, "attn_logit_softcapping", None)
        return "sdpa" if fused else self.model.config._attn_implementation

    @contextmanager
    def fused_attention(self) -> Iterator[None]:
        """Within the context attention is `attention_without_derivative`."""
        own, asked = self.model.config._attn_implementation, self.attention_without_derivative
        if asked == own:
            yield
            return
        self.model.set_attn_implementation(asked)
        try:
            yield
        finally:
            self.model.set_attn_implementation(own)

    @contextmanager
    def _replaced(self, names: Iterable[str], fill: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
        """Within the context parameters have other values, in memory of their own.

        On a CPU that memory is kept for the next time: new memory takes several times what an update of it takes.

        Args:
            names: of the parameters.
            fill: given a name and θ, flat, writes the other values to where they belong.
        """
        place, self._place = self._place, {}  # one within this one takes memory of its own
        parameters = dict(self.model.named_parameters())
        own = {name: parameters[name].data for name in names}
        try:
            with torch.no_grad():
                for name, theta in own.items():
                    if name not in place:
                        place[name] = torch.empty_like(theta, memory_format=torch.contiguous_format)
                    fill(name, theta.reshape(-1), place[name].view(-1))
                    parameters[name].data = place[name]
            yield
        finally:
            for name, theta in own.items():
                parameters[name].data = theta
        if self.device.type == "cpu":
            self._place = place

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
