"""E drawn by vLLM in a process of its own: a stand-in that speaks the same protocol, and the real one if VLLM_PYTHON
names an environment that has it."""

import gc
import tempfile
from pathlib import Path

import psutil
import pytest
import torch
from conftest import World, llama, policy_of, random_direction
from enumeration import enumerate_world
from lora_fixtures import make_base, make_lora
from pipeline_fixtures import NAMES, make_run, probe, skip_figures, values
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from vllm_fixtures import REAL, plant, stand_in

from entropy_core.config.read import parse_config
from entropy_core.errors import ConfigError, NonFiniteError, ProbeError
from entropy_core.estimates.evaluation import EvaluationBatch
from entropy_core.estimates.measurement import Moved, MovedTokens, measured
from entropy_core.estimates.rows import change_of
from entropy_core.numerics import philox, uncertainty
from entropy_core.numerics.functional import ENTROPY, LENGTH
from entropy_core.numerics.philox import Purpose
from entropy_core.numerics.proposal import Proposal
from entropy_core.numerics.weights import prefix_weights
from entropy_core.pipeline.preflight import preflight
from entropy_core.policy.merged import save_merged
from entropy_core.policy.pretrained import load_policy
from entropy_core.sequences.batch import BatchedSequences
from entropy_core.sequences.processor import GenerationConfig, SequenceProcessor
from entropy_core.sequences.vllm_engine import VllmDecoding, vllm_version

TAU, LONGEST, COUNT = 0.8, 4, 60
SAME = Proposal(TAU, 0.0)


@pytest.fixture(scope="module")
def world() -> World:
    """A shape that vLLM has kernels for; what it draws from is this in bfloat16."""
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    model = llama(**shape, max_position_embeddings=64, initializer_range=0.3)
    return World(policy_of(model), [[1], [2, 0], [3, 1, 0, 2]], TAU, LONGEST)


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> str:
    return stand_in(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module", params=["stand-in", "real"])
def engine(request, python) -> str:
    """The interpreter of an environment with vLLM."""
    if request.param == "real" and not REAL:
        pytest.skip("VLLM_PYTHON names no environment with vLLM")
    return REAL if request.param == "real" else python


def drawn(
    world: World, python: str, count: int = COUNT, proposal: Proposal = SAME, seed: int = 3, rows: int = 7
) -> BatchedSequences:
    how = GenerationConfig(
        TAU, world.max_new_tokens, rows, proposal=proposal, decode=VllmDecoding(python, 0.1, vllm_version(python))
    )
    return SequenceProcessor(world.policy, how).generate_with_replacement_sampling(world.prompts, count, seed)


def processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if any("vllm_process" in part for part in child.cmdline())]


@pytest.fixture(scope="module")
def narrow(world: World, tmp_path_factory) -> PreTrainedModel:
    """The policy in bfloat16, as it is loaded there."""
    folder = tmp_path_factory.mktemp("narrow")
    save_merged(world.policy.model, folder, torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)


def logits_of(model: PreTrainedModel, found: BatchedSequences, i: int) -> Tensor:
    """Logits before each token of a response, one prefix at a time, as the stand-in computes them."""
    whole, start = torch.cat([found.prompt(i), found.response(i)]), len(found.prompt(i))
    with torch.no_grad():
        return torch.stack([model(input_ids=whole[None, :end]).logits[0, -1] for end in range(start, len(whole))])


@pytest.mark.parametrize("proposal", [SAME, Proposal(2.0, 0.5)], ids=["the policy", "a mixture"])
def test_the_draws_are_ours_and_what_is_recorded_is_the_law_that_was_drawn_from(world: World, narrow, python, proposal):
    found = drawn(world, python, proposal=proposal)
    broad_N = philox.uniforms(3, Purpose.E_COMPONENT, found.sequence_ids_N) < proposal.share
    assert float(broad_N.float().mean()) == pytest.approx(proposal.share, abs=0.2)
    policy_K, broad_K = [], []
    for i in range(len(found)):
        response, logits_LV = found.response(i), logits_of(narrow, found, i)
        positions = torch.arange(len(response))
        uniforms_L = philox.uniforms(3, Purpose.E_TOKEN, torch.tensor(i), positions)
        temperature = proposal.temperature if broad_N[i] else TAU
        assert torch.equal(philox.inverse_cdf_tokens(logits_LV, uniforms_L, temperature), response)
        policy_K.append(philox.token_logprobs(logits_LV, response, TAU))
        broad_K.append(philox.token_logprobs(logits_LV, response, proposal.temperature))
        ended = int(response[-1]) in world.policy.eos_token_ids
        assert found.finish_reasons[i] == ("eos" if ended else "length") and (ended or len(response) == LONGEST)
    expected_K = proposal.logprobs(torch.cat(policy_K), torch.cat(broad_K), found.response_offsets_N1)
    torch.testing.assert_close(found.proposal_logprobs_K, expected_K, rtol=0, atol=1e-12)


def test_entropy_and_its_changes_agree_with_their_exact_values(world: World, engine):
    """Over ten E batches: H, its derivative along a direction, and its change after a step."""
    everything, eta, size, seeds = enumerate_world(world, random_direction(world.policy)), 0.5, 120, 10
    exact = world.exact().H_tok.item()
    slope, change = world.derivative(lambda at: at.H_tok, everything.v), world.exact_at(everything.v, eta).H_tok.item()
    truth = exact, slope, change - exact
    sequences, (moved, _) = everything.sequences, everything.at(eta)
    place = {(int(sequences.prompt_ids_N[i]), *sequences.response(i).tolist()): i for i in range(len(sequences))}
    rows, weights, differences = [], [], []
    for seed in range(seeds):
        found = drawn(world, engine, size, seed=seed)
        chosen_N = torch.tensor(
            [place[int(found.prompt_ids_N[i]), *found.response(i).tolist()] for i in range(len(found))]
        )
        pick_K, offsets_N1 = everything.tokens_of(chosen_N)
        tokens = everything.subset(chosen_N).block._replace(proposal_logprobs_K=found.proposal_logprobs_K)
        batch = EvaluationBatch.of([lambda tokens=tokens: tokens], None, "time_loo")
        at = MovedTokens(moved.logprobs_K[pick_K], moved.entropies_K[pick_K])
        terms = measured(batch, Moved(eta, lambda at=at: [at]), "per_decision")
        estimates = (
            uncertainty.entropy(*(batch.columns[f].total_N for f in (ENTROPY, LENGTH)), "per_token"),
            uncertainty.entropy_derivative(batch.columns, "per_token"),
            change_of(batch, terms, eta, "per_decision", "per_token"),
        )
        rows.append([(each.value - of, batch.standard_error(each)) for each, of in zip(estimates, truth, strict=True)])
        scored_K = everything.tokens.logprobs_K[pick_K]
        assert found.proposal_logprobs_K is not None
        weights.append(prefix_weights(found.proposal_logprobs_K, scored_K, offsets_N1).sequence_N)
        differences.append((found.proposal_logprobs_K - scored_K).abs())
    errors_S32 = torch.tensor(rows, dtype=torch.float64)
    z_3 = errors_S32[..., 0].mean(0) / errors_S32[..., 1].square().mean(0).sqrt() * seeds**0.5
    assert z_3.abs().tolist() == pytest.approx([0.0] * 3, abs=4)
    weight_N = torch.cat(weights)
    assert float(weight_N.mean()) == pytest.approx(1.0, abs=4 * float(weight_N.std()) / len(weight_N) ** 0.5)
    assert 1e-4 < float(torch.cat(differences).mean()) < 0.1  # another law than the policy, and near it


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("not finite", NonFiniteError, r"logits of sequence \d+ are not finite in vLLM.*Fix: .*exact"),
        ("ends early", ProbeError, r"ended a response after 1 tokens"),
        ("other tokens", ProbeError, r"vLLM returned other tokens than the logits processor drew"),
        ("dies", ProbeError, r"the process of vLLM ended \(9\)"),
        ("unknown", ProbeError, r"ended \(1\): ValueError: Model architectures \['Strange'\] are not supported.*bf16"),
    ],
)
def test_what_goes_wrong_in_there_is_said_here(world: World, python, fault, kind, message):
    plant(Path(python).parent, fault)
    try:
        with pytest.raises(kind, match=message):
            drawn(world, python, 20)
    finally:
        plant(Path(python).parent, "")
    gc.collect()
    left = [child for child in processes() if child.status() != psutil.STATUS_ZOMBIE]
    assert len(left) == (fault in ("not finite", "ends early"))


def test_rows_of_the_batch_do_not_matter(world: World, python):
    few, many = drawn(world, python), drawn(world, python, rows=64)
    assert torch.equal(few.response_tokens_K, many.response_tokens_K)
    assert few.proposal_logprobs_K is not None and many.proposal_logprobs_K is not None
    torch.testing.assert_close(few.proposal_logprobs_K, many.proposal_logprobs_K, rtol=0, atol=1e-12)


def test_the_process_stays_for_the_next_shard_and_ends_with_its_policy(python):
    model = llama(max_position_embeddings=64)
    own = World(policy_of(model), [[1], [2, 0]], TAU, LONGEST)
    drawn(own, python, 4)
    (first,) = processes()
    folders = list(Path(tempfile.gettempdir()).glob("entropy-probe-vllm-*"))
    drawn(own, python, 4, seed=4)
    assert processes() == [first] and folders
    del own
    gc.collect()
    assert not first.is_running() and not any(folder.exists() for folder in folders)


ADAPTERS = {
    "none": None,
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "biases": {"bias": "all"},
    "a whole head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [2, 5]},
}


@pytest.mark.parametrize("lora", ADAPTERS.values(), ids=ADAPTERS)
def test_a_merged_model_has_the_logits_of_the_policy_and_leaves_it_alone(tmp_path, lora):
    base = make_base(tmp_path / "base", n_layer=3)
    home = base if lora is None else make_lora(tmp_path / "adapter", base, **lora)
    policy = load_policy(home, "", "float32", "eager", "cpu", None if lora is None else base)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = policy.model(ids).logits
        save_merged(policy.model, tmp_path / "merged", torch.float32)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, local_files_only=True)
        torch.testing.assert_close(plain(ids).logits, before, rtol=0, atol=1e-5)
        save_merged(policy.model, tmp_path / "narrow", torch.bfloat16)
        narrow = AutoModelForCausalLM.from_pretrained(
            tmp_path / "narrow", dtype=torch.bfloat16, local_files_only=True
        ).state_dict()
        assert all(torch.equal(narrow[name], weight.bfloat16()) for name, weight in plain.state_dict().items())
        assert torch.equal(policy.model(ids).logits, before)
    if lora is not None:
        untouched = AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
        assert float((untouched(ids).logits - before).detach().abs().max()) > 1e-3


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("vllm") / "run")


def config_of(run: Path, store: Path, python: str, **execution: object) -> dict[str, object]:
    generation = {"sampler": "vllm", "stop_strings": ["0"]}
    checkpoints = [str(run / NAMES[0])]
    execution = {"vllm_python": python, "shard_size": 16} | execution
    return values(run, store, checkpoints=checkpoints, generation=generation, execution=execution)


def test_a_sweep_draws_e_with_it_and_u_from_the_policy(run, tmp_path, python, monkeypatch):
    skip_figures(monkeypatch)
    done = probe(config_of(run, tmp_path / "store", python))
    assert {row["sampler"] for row in done.rows} == {"proposal"}
    inputs = [of for name, of, _ in done.run.asked if name == "sample-e-batch"]
    assert {of["proposal"].engine for of in inputs} == {f"vllm 0.0.1, torch {torch.__version__}"}
    assert {of["policy"].dtype for of in inputs} == {"float64"}
    assert done.run.inputs("sample-u-batch")["proposal"] is None
    ends = {
        reason
        for shard in done.run.artifacts("sample-e-batch")
        for reason in shard.table("sequences.parquet")["finish_reason"].to_pylist()
    }
    assert "stop" in ends
    assert "sample-e-batch" not in probe(config_of(run, tmp_path / "store", python)).run.was_computed
    monkeypatch.setattr("entropy_core.pipeline.specs.vllm_version", lambda _: "vllm 0.0.2")  # when it was planned
    with pytest.raises(ProbeError, match=r"to be drawn by vllm 0.0.2, and execution.vllm_python is vllm 0.0.1, torch"):
        probe(config_of(run, tmp_path / "store", python))


def test_what_cannot_be_is_refused_before_anything_is_computed(run, tmp_path, python):
    def checked(python: str, **execution: object) -> None:
        preflight(parse_config(config_of(run, tmp_path / "store", python, **execution)))

    with pytest.raises(ConfigError, match=r"execution.vllm_python is empty.*Fix: make an environment"):
        checked("")
    with pytest.raises(ConfigError, match=r"devices_per_policy is above 1.*Fix: .*bf16"):
        checked(python, devices_per_policy=2)
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(ConfigError, match=r"broken, has no vLLM: it said nothing"):
        checked(str(broken))
    with pytest.raises(ConfigError, match="cannot be run"):
        vllm_version(str(tmp_path / "nothing"))
