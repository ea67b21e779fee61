"""The policy of a checkpoint's directory."""

import logging
from collections.abc import Hashable
from functools import lru_cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from entropy_core.checkpoints.adapters import fill_adapter, insert_adapter
from entropy_core.checkpoints.model_config import check_generation_config, check_model_config
from entropy_core.checkpoints.tokenizer import load_tokenizer, tokenizer_directory
from entropy_core.errors import CheckpointError, one_line, shortage
from entropy_core.policy.model import Policy

log = logging.getLogger("entropy_probe.policy")


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def use_full_precision() -> None:
    """Compute float32 products in float32: neither TF32 on a GPU nor bfloat16 within oneDNN.

    Both are switches of the whole process, which a library or a reward may have set since the last stage. TF32 alone
    makes errors of 0.001 in a log-probability, where steps change it by less.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


@lru_cache(maxsize=1)
def load_policy(
    directory: Path,
    weights_digest: str,
    dtype: str,
    attn_implementation: str,
    device: str,
    base: Path | None = None,
    files: Hashable = None,
) -> Policy:
    """Load a checkpoint's model and tokenizer from a local directory; the last one is kept.

    Args:
        directory: of the model, or of the adapter.
        weights_digest: content digest of its files, so that a changed directory is never taken for the same policy; of
            an adapter, those of its base included.
        dtype: `float32` or `float64`.
        attn_implementation: `eager`.
        device: `cpu`, `cuda`, or `auto`.
        base: directory of the model under the adapter; None for a full model.
        files: which files are read, see `sources.stamps`: what was loaded while they were replaced, and put back, is
            not found again.

    Returns:
        The policy, in evaluation mode.

    Raises:
        CheckpointError: transformers cannot load it, or the adapter does not fit.
    """
    if base is None and (directory / "adapter_config.json").exists():
        fact = f"{directory} holds an adapter where a whole model is needed"
        raise CheckpointError(fact, fix="give the directory of its base, or of the merged model")
    home = base or directory
    check_model_config(home)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            home,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            local_files_only=True,
            trust_remote_code=False,
        )
        tokenizer = load_tokenizer(tokenizer_directory(directory, base))
    except CheckpointError:
        raise
    except Exception as error:  # models of all kinds raise errors of all kinds
        raise shortage(error) or CheckpointError(
            f"{directory} cannot be loaded as a causal language model: {one_line(error)}",
            cause="a file is missing or belongs to another model",
            fix="check that transformers' AutoModelForCausalLM.from_pretrained loads it",
        ) from error
    check_generation_config(home, model.get_input_embeddings().weight.shape[0])
    if base is not None:
        insert_adapter(model, directory)
        fill_adapter(model, directory)
    log.info("loaded the policy of %s (%s, weights %s)", directory, dtype, weights_digest[:12])
    return Policy(model.to(resolve_device(device)), tokenizer)
