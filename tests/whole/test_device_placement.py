"""A whole sweep on a device that is not the CPU: nothing is left on the wrong side, and the device seldom waits.

The device is the one of `shadow_device`, which needs no hardware. A GPU would round differently; this one does not, so
that what is computed on it is what the CPU computes.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama, policy_of, random_direction
from pipeline_fixtures import make_run, values
from shadow_device import Seen, Wait, shadow_device, watched

from benchmarks.device.models import write_checkpoint
from benchmarks.device.sweep import Difference, differences, swept
from entropy_core.config.read import parse_config
from entropy_core.pipeline.preflight import preflight
from entropy_core.pipeline.sweep import execution_for
from entropy_core.policy import moves, pretrained
from entropy_core.policy import spec as specs
from entropy_core.policy.model import Coefficients, Policy
from entropy_core.sequences import batch as batched_sequences
from entropy_core.sequences import decoding, derivatives
from entropy_core.sequences.processor import GenerationConfig, SequenceProcessor

ROWS, TOKENS = 8, 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


def differences_on(device: str, folder: Path, run: Path) -> list[Difference]:
    """A sweep with a KL term and every estimator of ΔH, there and on the CPU."""
    update = {"kl_beta": 0.1, "reference": str(run / "checkpoint-5")}
    batch = {"E_total_sequences": 8, "B_U": 4, "G": 4}
    return list(differences(folder, device, update=update, batch_config=batch, execution={"shard_size": 8}))


def test_a_sweep_on_a_device_is_that_of_the_cpu(run, tmp_path):
    with shadow_device(), watched() as seen:
        found = differences_on("shadow", tmp_path, run)
    assert seen.float64  # it was there
    of_policy = {"sample-e-batch", "score-e-batch", "compute-update", "entropy-gradient", "first-order-e", "importance"}
    assert of_policy <= {most.stage for most in found}
    assert [most for most in found if most.error > most.tolerance] == []


def forget_to_move(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    if what == "micro-batches":
        monkeypatch.setattr(batched_sequences, "to_device", lambda tensor, device: tensor)
    elif what == "tangents":
        monkeypatch.setattr(
            derivatives, "as_tangent", lambda direction, _: {name: v.float() for name, v in direction.items()}
        )
    elif what == "uniforms":
        plain = decoding.philox.inverse_cdf_tokens
        monkeypatch.setattr(decoding.philox, "inverse_cdf_tokens", lambda logits, u, tau: plain(logits, u.cpu(), tau))
    elif what == "masks":
        plain_logits = Policy.next_logits
        monkeypatch.setattr(
            Policy, "next_logits", lambda self, ids, mask, cache: plain_logits(self, ids, mask.cpu(), cache)
        )


@pytest.mark.parametrize("what", ["micro-batches", "tangents", "uniforms", "masks"])
def test_a_tensor_on_the_wrong_device_is_noticed(tmp_path, monkeypatch, what):
    checkpoint = write_checkpoint(tmp_path / "checkpoint-3")
    sizes = {"batch_config": {"E_total_sequences": 4, "B_U": 2, "G": 2}, "generation": {"max_new_tokens": 4}}
    small = {**sizes, "update": {"reward": "arithmetic"}}
    forget_to_move(monkeypatch, what)
    with shadow_device(), pytest.raises(Exception, match="same device"):
        swept(checkpoint, tmp_path, small, device="shadow")


def processor(device: torch.device) -> SequenceProcessor:
    model = llama(vocab_size=23, eos_token_id=22, max_position_embeddings=64).float()
    return SequenceProcessor(policy_of(model.to(device)), GenerationConfig(0.9, TOKENS, ROWS, ROWS))


def by_us(seen: Seen) -> dict[Wait, int]:
    """Waits that the package asks for itself; transformers looks at a mask once in a pass."""
    passes = ("Policy.next_logits", "Scorer.hidden", "Scorer.all_logits", "DirectDerivatives", "elsewhere")
    return {wait: count for wait, count in seen.waits.items() if not any(name in wait.where for name in passes)}


def test_a_step_of_decoding_reads_the_tokens_and_nothing_else(monkeypatch):
    passes: Counter[str] = Counter()
    with shadow_device() as device:
        of = processor(device)
        plain = of.policy.next_logits

        def counted(*arguments: Any) -> Any:
            passes["all"] += 1
            return plain(*arguments)

        monkeypatch.setattr(of.policy, "next_logits", counted)
        with watched() as seen:
            of.generate_with_replacement_sampling([[1, 2], [3], [4, 5, 6]], 3 * ROWS, 0)
    draws = passes["all"] - 1  # the first pass looks how large a cache is
    assert draws > 2 * TOKENS  # rows were refilled
    assert by_us(seen) == {Wait("read", "entropy_core/sequences/decoding.py:Decoding._draw"): draws}


def test_a_pass_over_sequences_is_read_when_it_is_over():
    """One read per column of the result, however many micro-batches there are; on the way there is none."""
    with shadow_device() as device:
        of = processor(device)
        sequences = of.generate_with_replacement_sampling([[1, 2], [3], [4, 5, 6]], 3 * ROWS, 0)
        v = {name: t.to(device).float() for name, t in random_direction(of.policy).items()}
        derivatives.forward_mode(of, sequences, v)  # the first time, it is found out which attention is used
        fetched = Wait("read", "entropy_core/sequences/processor.py:SequenceProcessor.map_tokens")
        with watched() as seen:
            of.score(sequences)
        assert by_us(seen) == {fetched: 2}
        with watched() as seen:
            derivatives.forward_mode(of, sequences, v)
        assert by_us(seen) == {fetched: 4}
        into = [of.policy.new_accumulator()]
        with watched() as seen:
            for index_K, rows in of.micro_batches(sequences):
                ones_K = torch.ones(len(index_K), dtype=torch.float64)
                of.policy.add_gradients(rows, [Coefficients(ones_K, ones_K)], 0.9, into)
        assert by_us(seen) == {}


def test_numbers_are_float64_where_they_are_drawn_summed_or_moved_and_nowhere_else():
    """On many GPUs float64 is 64 times slower, and twice the memory everywhere."""
    with shadow_device() as device, watched() as seen:
        of = processor(device)
        sequences = of.generate_with_replacement_sampling([[1, 2], [3]], 16, 0)
        of.score(sequences)
        direction = {name: torch.ones_like(p) for name, p in of.policy.named_parameters().items()}
        derivatives.forward_mode(of, sequences, direction)
        with moves.moved(of.policy, direction, 1e-3):
            of.score(sequences)
    places = {place.partition(":")[2].partition(".<locals>")[0] for place in seen.float64}
    assert places == {
        "_inverse_cdf_tokens",
        "inverse_cdf_tokens",
        "Decoding._next_uniforms",
        "Decoding._admit",
        "moved",
    }


def test_the_shadow_of_a_tensor_is_no_tensor_of_the_cpu():
    with shadow_device() as device:
        there = torch.arange(6.0).view(2, 3).to(device)
        assert there.device == device and not there.is_cpu
        there.t()[0] += 1  # a view shares the numbers
        assert there.cpu().tolist() == [[1, 1, 2], [4, 4, 5]]
        assert float((there * 2).sum()) == 34
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(2, 3)
        with watched() as seen:
            there[there > 1].sum().item()
        assert seen.waits == {Wait("size", "elsewhere"): 1, Wait("read", "elsewhere"): 1}


def test_a_stage_computes_in_full_precision_whatever_was_set_before(run, tmp_path):
    config = parse_config(values(run, tmp_path, checkpoints=[str(run / "checkpoint-3")], policy={"dtype": "float32"}))
    checkpoints = preflight(config)
    spec = specs.PolicySpec(
        weights=checkpoints[0].weights, dtype="float32", attn_implementation="eager", temperature=1.0
    )
    for _ in range(2):  # loaded, and found loaded
        torch.set_float32_matmul_precision("medium")
        specs.policy_of(spec, execution_for(config, checkpoints))
        assert torch.get_float32_matmul_precision() == "highest"
    pretrained.load_policy.cache_clear()
