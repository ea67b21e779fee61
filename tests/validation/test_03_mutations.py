"""Whether the tests would notice: known mistakes, put into a copy of the code one at a time."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from proofs import Proof

pytestmark = pytest.mark.validate

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("entropy_core", "tests", "pyproject.toml")


class Mutation(NamedTuple):
    """A mistake, as an edit of one module of entropy_core that must match once; and the tests that should notice."""

    mistake: str
    module: str
    text: str
    instead: str
    tests: str


MUTATIONS = (
    Mutation(
        "tokens scored one step late",
        "sequences/batch",
        "TeacherForcedRows(input_ids_BL, row_K, column_K - 1, tokens_K)",
        "TeacherForcedRows(input_ids_BL, row_K, column_K, tokens_K)",
        "test_enumeration",
    ),
    Mutation(
        "padding on the left attended to",
        "policy/model",
        "attention_mask=attention_mask_BL,",
        "attention_mask=torch.ones_like(attention_mask_BL),",
        "test_sequence_processor",
    ),
    Mutation(
        "padding on the left counted as positions",
        "policy/model",
        "(attention_mask_BL.cumsum(-1) - 1).clamp_min(0)[",
        "(torch.ones_like(attention_mask_BL).cumsum(-1) - 1).clamp_min(0)[",
        "test_sequence_processor",
    ),
    Mutation(
        "EOS sampled, but not scored",
        "sequences/decoding",
        "self.responses[sequence] = Response(tokens, reason, ",
        'self.responses[sequence] = Response(tokens[:-1] if reason == "eos" else tokens, reason, ',
        "test_sequence_processor",
    ),
    Mutation(
        "a row that was given away keeps the columns of the sequence before",
        "sequences/decoding",
        "(batch.mask_BL.shape[1] - mask_RL.shape[1], 0))",
        "(batch.mask_BL.shape[1] - mask_RL.shape[1], 0), value=1)",
        "test_decoding",
    ),
    Mutation(
        "the entropy left out of its own gradient",
        "numerics/token_statistics",
        "factor_R, own_R1 = entropies_R * dentropies_R + dlogprobs_R, ",
        "factor_R, own_R1 = dlogprobs_R, ",
        "test_token_statistics",
    ),
    Mutation(
        "τ applied after the softmax",
        "numerics/token_statistics",
        "return own_R - normaliser_R,",
        "return logits_RV.log_softmax(-1).gather(-1, tokens_R.unsqueeze(-1)).squeeze(-1) / temperature,",
        "test_token_statistics",
    ),
    Mutation(
        "bias correction dropped",
        "numerics/adamw",
        "correction1, correction2 = 1.0 - beta1**t, 1.0 - beta2**t",
        "correction1, correction2 = 1.0, 1.0",
        "test_adamw",
    ),
    Mutation(
        "step count off by one",
        "numerics/adamw",
        "t = state.step + 1",
        "t = max(state.step, 1)",
        "test_adamw",
    ),
    Mutation(
        "sign of the step flipped",
        "numerics/adamw",
        "sign = -1.0 if maximize else 1.0",
        "sign = 1.0 if maximize else -1.0",
        "test_adamw",
    ),
    Mutation(
        "the second moment's derivative left out of J",
        "numerics/adamw",
        "return self._sign * (frozen - moved * slope / self._denominator)",
        "return self._sign * frozen",
        "test_adamw",
    ),
    Mutation(
        "clip factor left out of J",
        "numerics/adamw",
        "return Lazy(list(pulled), lambda key: factor * pulled[key] - along * gradient[key].double())",
        "return pulled",
        "test_adamw",
    ),
    Mutation(
        "sign of the loss flipped",
        "numerics/losses",
        "x_K = -batch.of_tokens(batch.advantages_N) * ratio_K",
        "x_K = batch.of_tokens(batch.advantages_N) * ratio_K",
        "test_losses",
    ),
    Mutation(
        "1/B_U dropped",
        "numerics/loss_batch",
        "return (self.weights_N * values_N).sum() / self.responses",
        "return (self.weights_N * values_N).sum()",
        "test_losses",
    ),
    Mutation(
        "what a response does to a shared denominator left out of its influence",
        "numerics/losses",
        "length = batch.mean(batch.lengths_N) if",
        "length = batch.mean(batch.lengths_N).detach() if",
        "test_losses",
    ),
    Mutation(
        "ratios clipped on the wrong side",
        "numerics/clipping",
        "torch.where(advantages > 0, ratio.clamp_max(above), below)",
        "torch.where(advantages < 0, ratio.clamp_max(above), below)",
        "test_clipping",
    ),
    Mutation(
        "a later step on a rollout that starts from the checkpoint's moments",
        "checkpoints/optimizer_step",
        "self._after = StateAfter(earlier) if earlier else None",
        "self._after = None",
        "test_phase",
    ),
    Mutation(
        "the loss's term in the entropy left out of the step",
        "sequences/loss_gradient",
        "for values_K in pair)) for pair in theirs]",
        "for values_K in (pair[0], 0 * pair[1]))) for pair in theirs]",
        "test_update",
    ),
    Mutation(
        "length term of ∂_vH_tok dropped",
        "numerics/uncertainty",
        "Estimate(x.value - H.value * y.value, ",
        "Estimate(x.value, ",
        "test_uncertainty",
    ),
    Mutation(
        "length left out of the influence",
        "numerics/uncertainty",
        "(numerator.influence_N - value * denominator.influence_N) / denominator.value",
        "numerator.influence_N / denominator.value",
        "test_uncertainty",
    ),
    Mutation(
        "clusters ignored",
        "numerics/uncertainty",
        "sums_C = cluster_sums(influence_N, clusters_N)",
        "sums_C = influence_N",
        "test_uncertainty",
    ),
    Mutation(
        "standard error of a sum in place of a mean",
        "numerics/uncertainty",
        "(sums_C**2).sum()).sqrt()) / len(influence_N)",
        "(sums_C**2).sum()).sqrt())",
        "test_uncertainty",
    ),
    Mutation(
        "the step's own entropy in the reward to go",
        "numerics/first_order",
        "of_score_K = later_K + values_K if functional.of_action else later_K",
        "of_score_K = later_K + values_K",
        "test_enumeration",
    ),
    Mutation(
        "a baseline that includes its own sequence",
        "numerics/baselines",
        "return total_T.index_select(0, position_K) - own_K",
        "return total_T.index_select(0, position_K)",
        "test_enumeration",
    ),
    Mutation(
        "a value that depends on its own token weighted without it",
        "numerics/weights",
        "return self.after_K if functional.of_action else self.before_K",
        "return self.before_K",
        "test_functional",
    ),
    Mutation(
        "a term in the log-probability left out of a functional's derivative",
        "numerics/functional",
        "return TokenPair(*torch.autograd.grad(values_K.sum(), ends, materialize_grads=True))",
        "return TokenPair(0 * ends[0].detach(), *torch.autograd.grad(values_K.sum(), ends[1], materialize_grads=True))",
        "test_functional",
    ),
    Mutation(
        "prefix weights one step late",
        "numerics/weights",
        "return PrefixWeights(log_before_K.exp(), ",
        "return PrefixWeights((log_before_K + log_ratio_K).exp(), ",
        "test_importance",
    ),
    Mutation(
        "the entropy's derivative not centred",
        "numerics/token_statistics",
        "torch.sub(dz_RV, of_likeliest_R1 + mean_R1, out=product_RV)",
        "dz_RV",
        "test_token_statistics",
    ),
    Mutation(
        "half of a product's derivative dropped",
        "numerics/direct_derivatives",
        "(dx * y).addcmul_(x, dy)",
        "dx * y",
        "test_direct_derivatives",
    ),
    Mutation(
        "attention whose values are taken as constant",
        "numerics/blockwise_attention",
        "do += product(weights, dv[:, :, first:last])",
        "pass",
        "test_blockwise_attention",
    ),
    Mutation(
        "attention whose weights do not stay normalised",
        "numerics/blockwise_attention",
        "do.addcmul_(moved.sum(-1, keepdim=True), o, value=-1)",
        "pass",
        "test_blockwise_attention",
    ),
    Mutation(
        "a layer's weight taken as constant",
        "numerics/direct_derivatives",
        "dy.addmm_(rows, dw.t())",
        "dy",
        "test_direct_derivatives",
    ),
    Mutation(
        "the second order taken for the whole second derivative",
        "numerics/second_order",
        "coefficient = slope.minus(derivative).scaled(1 / (2 * eta))",
        "coefficient = slope.minus(derivative).scaled(1 / eta)",
        "test_second_order",
    ),
)


def files_of(tests: str) -> list[str]:
    found = {path.stem: path for path in (ROOT / "tests").rglob("test_*.py")}
    return [str(found[name].relative_to(ROOT)) for name in tests.split()]


def mutate(mutation: Mutation | None, copy: Path) -> list[str]:
    """Copy the code, with one mistake in it; returns the tests to run there. None: all of them, without a mistake."""
    copy.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "validation"))
        else:
            shutil.copyfile(source, copy / name)
    if mutation is None:
        return list(dict.fromkeys(file for one in MUTATIONS for file in files_of(one.tests)))
    path = copy / "entropy_core" / f"{mutation.module}.py"
    code = path.read_text(encoding="utf-8")
    if code.count(mutation.text) != 1:
        raise ValueError(f"{mutation.text!r} is {code.count(mutation.text)} times in {path.name}")
    path.write_text(code.replace(mutation.text, mutation.instead), encoding="utf-8")
    return files_of(mutation.tests)


def outcome(copy: Path) -> tuple[int, list[str], str]:
    """Exit status, the tests that failed, and the output."""
    said = (copy / "output").read_text(encoding="utf-8")
    failed = re.findall(r"^FAILED tests/(.*?)(?: - .*)?$", said, re.MULTILINE)
    return int((copy / "status").read_text()), failed, said


def test_every_mistake_is_noticed(record: Proof, tmp_path: Path):
    record(
        "Mutations",
        claim="Each of these mistakes, put into a copy of the code, makes a test fail; without one they pass.",
        limit="a test fails for every mistake, and none without one",
        columns=("mistake", "module", "first test that fails"),
    )
    copies = {
        str(tmp_path / str(number)): mutate(mutation, tmp_path / str(number))
        for number, mutation in enumerate((None, *MUTATIONS))
    }
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "tests" / "mutants.py", json.dumps(copies)]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True)
    plain, *mutants = [outcome(Path(copy)) for copy in copies]
    for mutation, (_, failed, _) in zip(MUTATIONS, mutants, strict=True):
        record.row(mutation.mistake, f"`{mutation.module}`", f"`{next(iter(failed), 'none')}`")
    status, failed, output = plain
    record.note(f"Without a mistake: {output.strip().splitlines()[-1]}")
    assert (status, failed) == (0, []), output[-2000:]
    for mutation, (status, failed, output) in zip(MUTATIONS, mutants, strict=True):
        assert status == 1 and failed, f"{mutation.mistake}: {output[-2000:]}"
