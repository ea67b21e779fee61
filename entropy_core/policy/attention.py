"""The faster attention where no forward-mode derivative is asked for."""

from collections.abc import Iterator
from contextlib import contextmanager

from entropy_core.policy.model import Policy


def attention_without_derivative(policy: Policy) -> str:
    """`sdpa`, torch's fused kernel, where the architecture has it; else the policy's own.

    The kernel lacks a softcap in attention, so an architecture with one keeps its own.
    """
    config = policy.model.config.get_text_config()
    fused = policy.model._supports_sdpa and policy.model._can_set_attn_implementation()
    fused = fused and not getattr(config, "attn_logit_softcapping", None)
    return "sdpa" if fused else policy.model.config._attn_implementation


@contextmanager
def fused_attention(policy: Policy) -> Iterator[None]:
    """Within the context attention is `attention_without_derivative`."""
    own, asked = policy.model.config._attn_implementation, attention_without_derivative(policy)
    if asked == own:
        yield
        return
    policy.model.set_attn_implementation(asked)
    try:
        yield
    finally:
        policy.model.set_attn_implementation(own)
