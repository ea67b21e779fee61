"""Load the policy from the directory of a checkpoint."""

import logging
from collections.abc import Hashable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from entropy_core.checkpoints.adapters import fill_adapter, insert_adapter
from entropy_core.checkpoints.content import stored_tensors
from entropy_core.checkpoints.model_config import GENERATION, check_generation_config, check_model_config
from entropy_core.checkpoints.quantised_base import dense_weights, quantised_by
from entropy_core.checkpoints.tokenizer import load_tokenizer, tokenizer_directory
from entropy_core.errors import CheckpointError, one_line, shortage
from entropy_core.numerics.vectors import blocks_of
from entropy_core.policy.layer_split import devices_for, split_layers
from entropy_core.policy.model import Policy

if TYPE_CHECKING:
    from entropy_core.store.artifact import Artifact

log = logging.getLogger("entropy_probe.policy")


def resolve_device(device: str) -> torch.device:
    """Return the torch device; `auto` selects CUDA if available, else the CPU."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def use_full_precision() -> None:
    """Compute float32 products in full precision: no TF32 on a GPU, no bfloat16 in oneDNN.

    Both are process-wide settings that a library or a user's reward may have changed since the last stage. TF32 alone
    causes errors of 0.001 in a log-probability, which is more than a step changes it.
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
    devices: int = 1,
    step: "Artifact | None" = None,
) -> Policy:
    """Load a checkpoint's model and tokenizer from a local directory; the last loaded policy is cached.

    Args:
        directory: directory of the model or of the adapter.
        weights_digest: content digest of the files, including those of an adapter's base; part of the cache key, so
            that a changed directory is loaded again.
        dtype: `float32` or `float64`.
        attn_implementation: of forward mode: `blockwise` or `eager`.
        device: `cpu`, `cuda`, or `auto`.
        base: directory of the base model of an adapter; None for a full model.
        files: stamps of the files, from `sources.stamps`; part of the cache key, so that a policy loaded while files
            were replaced and restored is not used again.
        devices: number of devices that share its layers.
        step: artifact of rehearsal-step, whose steps since the checkpoint are taken; None: none.

    Returns:
        The policy, in evaluation mode.

    Raises:
        CheckpointError: transformers cannot load the model, the adapter does not fit it, or its layers cannot be split.
    """
    if base is None and (directory / "adapter_config.json").exists():
        fact = f"{directory} contains an adapter, and a whole model is needed"
        raise CheckpointError(fact, fix="give the directory of its base model, or of the merged model")
    home = base or directory
    check_model_config(home)
    try:
        settings: dict[str, Any] = {
            "dtype": getattr(torch, dtype),
            "attn_implementation": "eager",
            "experts_implementation": "eager",  # grouped products have no forward-mode derivative
            "trust_remote_code": False,
        }
        if base is not None and quantised_by(base):
            model = _dequantised(base, settings)
        else:
            model = AutoModelForCausalLM.from_pretrained(home, local_files_only=True, **settings)
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
    first = resolve_device(device)
    if devices == 1:
        model.to(first)
    else:
        split_layers(model, devices_for(first, devices))
    policy = Policy(model, tokenizer, blockwise=attn_implementation == "blockwise")
    if step is not None:
        _take(policy, step)
    return policy


def _take(policy: Policy, step: "Artifact") -> None:
    """Move the parameters from θ to θ + η·D, computed in float64 and rounded to their dtype."""
    direction, eta = step.vector("direction"), step.summary["learning_rate"]
    for name, parameter in policy.named_parameters().items():
        theta = parameter.detach().reshape(-1)
        moved = torch.empty_like(theta)
        for block in blocks_of({name: theta}):
            by = direction.block(block).to(theta.device).double()
            moved[block.start : block.stop] = theta[block.start : block.stop].double() + eta * by
        parameter.data = moved.view(parameter.shape)


def _dequantised(home: Path, settings: dict[str, Any]) -> PreTrainedModel:
    """A quantised model with dense weights."""
    config = AutoConfig.from_pretrained(home, local_files_only=True, trust_remote_code=False)
    del config.quantization_config
    with torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **settings)
    places = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    with torch.no_grad():
        for name, weight in dense_weights(home, stored_tensors(home)):
            if name in places:
                places[name].copy_(weight)
    if (home / GENERATION).exists():
        model.generation_config = GenerationConfig.from_pretrained(home, local_files_only=True)
    return model
