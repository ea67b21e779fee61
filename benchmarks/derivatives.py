"""What the passes of the probe cost, in forward passes of the same model: `python benchmarks/derivatives.py`.

One random Llama, one micro-batch of responses; the passes take turns, and ratios are taken within a round.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from entropy_core.policy import Coefficients, Policy, TeacherForcedRows

SHAPES = {
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 688, "vocab_size": 8192},
    "smollm2-135m": {"hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "vocab_size": 49152},
}


def make_policy(shape: str) -> Policy:
    """A random Llama of one of the shapes, float32, eager attention."""
    torch.manual_seed(0)
    width = SHAPES[shape]["hidden_size"]
    config = LlamaConfig(**SHAPES[shape], num_attention_heads=width // 64, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return Policy(model, SimpleNamespace(eos_token_id=0), head_chunk_rows=1024)


def make_rows(policy: Policy, sequences: int, length: int) -> TeacherForcedRows:
    """A micro-batch of random prompts of 16 tokens with random responses."""
    ids_BL = torch.randint(0, policy.model.config.vocab_size, (sequences, 16 + length))
    row_K = torch.arange(sequences).repeat_interleave(length)
    position_K = torch.arange(15, 15 + length).repeat(sequences)
    return TeacherForcedRows(ids_BL, row_K, position_K, ids_BL[row_K, position_K + 1])


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=112)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    policy = make_policy(options.shape)
    rows = make_rows(policy, options.sequences, options.length)
    v = {name: torch.randn_like(p) for name, p in policy.named_parameters().items()}
    ones_K = torch.ones(len(rows.tokens_K), dtype=torch.float64)
    accumulators = [policy.new_accumulator() for _ in range(2)]

    def forward() -> object:
        with torch.no_grad():
            return policy.model(input_ids=rows.input_ids_BL, use_cache=False).logits

    passes: dict[str, Callable[[], object]] = {
        "forward with all logits": forward,
        "log-probabilities and entropies": lambda: policy.statistics(rows, 1.0),
        "their derivatives along v (forward mode)": lambda: policy.derivatives(rows, v, 1.0),
        "one gradient": lambda: policy.add_gradients(rows, [Coefficients(ones_K, ones_K)], 1.0, accumulators[:1]),
        "two gradients of one forward": lambda: policy.add_gradients(
            rows, [Coefficients(ones_K, ones_K)] * 2, 1.0, accumulators
        ),
    }
    for function in passes.values():
        function()
    ratios: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(options.rounds):
        base = seconds(forward)
        for name, function in passes.items():
            ratios[name].append(seconds(function) / base)
    print(
        f"{options.shape}, {options.sequences} x {options.length} tokens, {torch.get_num_threads()} threads, ", end=""
    )
    print(f"torch {torch.__version__}, median of {options.rounds} rounds")
    for name, values in ratios.items():
        print(f"{name:42} {statistics.median(values):5.2f} forwards   ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
