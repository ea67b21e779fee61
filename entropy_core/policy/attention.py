"""Switch to a faster attention kernel for passes that need no forward-mode derivative."""

from collections.abc import Iterator
from contextlib import contextmanager

from entropy_core.policy.model import Policy


def attention_without_derivative(policy: Policy) -> str:
    """Return `sdpa`, torch's fused kernel, if the architecture supports it, else the policy's own attention.

    The fused kernel has no attention softcap, so an architecture with a softcap keeps its own attention.
    """
    config = policy.model.config.get_text_config()
    fused = policy.model._supports_sdpa and policy.model._can_set_attn_implementation()
    fused = fused and not getattr(config, "attn_logit_softcapping", None)
    return "sdpa" if fused else policy.model.config._attn_implementation


@contextmanager
def fused_attention(policy: Policy) -> Iterator[None]:
    """Context in which the policy uses the attention that `attention_without_derivative` returns."""
    own, faster = policy.model.config._attn_implementation, attention_without_derivative(policy)
    if faster == own:
        yield
        return
    policy.model.set_attn_implementation(faster)
    try:
        yield
    finally:
        policy.model.set_attn_implementation(own)
