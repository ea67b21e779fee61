"""The step that a trainer took, split into what did what: nothing is left over, and a planted sampler is found."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import Probe, parts_of, skip_figures, whole

pytest.importorskip("trl")

from recorded_fixtures import REWARD, STEPS, asked, predicted, recorded_run, rewritten
from safetensors.torch import load_file, save_file

from entropy_core.config.read import load_config, parse_config
from entropy_core.errors import CheckpointError, ConfigError
from entropy_core.estimates.post_mortem import Sampler, Shares, rows_of, sampler_of
from entropy_core.numerics.halves import HALVES, KINDS, of_all
from entropy_core.numerics.vectors import in_blocks
from entropy_core.pipeline.dissection import next_checkpoint
from entropy_core.pipeline.preflight import preflight
from entropy_core.policy.pretrained import load_policy
from entropy_core.store.columns import TokenTable

LAST = STEPS - 1
PARTS = ("tokens", "sampler", "momentum", "decay", "rounding", "unexplained")


@pytest.fixture(autouse=True)
def _without_figures(monkeypatch):
    skip_figures(monkeypatch)


def drawing_in_bfloat16(made: Any) -> None:
    """Let the trainer draw its tokens from its weights in bfloat16, and take them for its own."""
    generate = made._generate_single_turn

    def drawn(*arguments: Any, **more: Any) -> Any:
        own = {name: parameter.data for name, parameter in made.model.named_parameters()}
        for name, parameter in made.model.named_parameters():
            parameter.data = own[name].bfloat16().float()
        try:
            return generate(*arguments, **more)
        finally:
            for name, parameter in made.model.named_parameters():
                parameter.data = own[name]

    made._generate_single_turn = drawn


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dissected") / "run"
    recorded_run(folder, drawing_in_bfloat16)
    return folder


def loaded(directory: Path, name: str) -> Any:
    return load_policy(directory, name, "float64", "eager", "cpu", None).model


def logprobs(model: Any, row: dict[str, Any]) -> torch.Tensor:
    """log π of the tokens of a response, from the model's own logits."""
    ids, prompt = torch.tensor(row["prompt_ids"] + row["completion_ids"]), len(row["prompt_ids"])
    of_all_tokens = model(ids[None]).logits[0].double().log_softmax(-1)
    return of_all_tokens[prompt - 1 : -1].gather(1, ids[prompt:, None]).squeeze(1)


@pytest.fixture(scope="module")
def with_sampler(run, tmp_path_factory) -> Path:
    """The batch of the last step with the log-probabilities of the weights that drew it."""
    folder = tmp_path_factory.mktemp("sampler")
    shutil.copytree(run / f"checkpoint-{LAST}", folder / "narrow")
    file = folder / "narrow" / "model.safetensors"
    narrow = {name: tensor.bfloat16().float() for name, tensor in load_file(file).items()}
    save_file(narrow, file, {"format": "pt"})
    model = loaded(folder / "narrow", "narrow")

    def more(row: dict[str, Any], _: int) -> dict[str, Any]:
        with torch.no_grad():
            return row | {"sampling_logprobs": logprobs(model, row).tolist()}

    return rewritten(run / "entropy-probe" / "batches", STEPS, folder / f"{STEPS}.jsonl", more)


@pytest.fixture(scope="module")
def dissected(run, with_sampler, tmp_path_factory) -> Probe:
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        u = {"from": str(with_sampler), "old_logprobs": "scored"}
        more = {"policy": {"dtype": "float64"}, "batch_config": {"U": u}, "post_mortem": True}
        return predicted(run, tmp_path_factory.mktemp("store"), **more)


def of_parts(done: Probe) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for row in done.result.report.table("post_mortem.parquet").to_pylist():
        found.setdefault(row["normalization"], {})[row["part"]] = row["delta_h"]
    return found


def test_a_real_step_is_explained_to_a_millionth(dissected):
    for parts in of_parts(dissected).values():
        assert abs(parts["unexplained"]) < 1e-6 * abs(parts["measured"])
        assert sum(parts[part] for part in PARTS) == pytest.approx(parts["first order"], rel=1e-10)
        assert parts["first order"] + parts["higher order"] == pytest.approx(parts["measured"], rel=1e-12)
        assert 0 < abs(parts["rounding"]) < 1e-5 * abs(parts["first order"])
        assert all(abs(parts[part]) > 1e-3 * abs(parts["first order"]) for part in ("tokens", "momentum", "decay"))
    assert dissected.run.artifacts("real-step")[0].summary["rest"] < 1e-6
    assert (dissected.result.run_directory / "post_mortem.parquet").is_file()


def test_a_planted_sampler_is_found_and_its_share_measured(run, with_sampler, dissected):
    """The share is what the step has by each response that it would not have by the ratio of the laws times it."""
    [mortem], [update] = (dissected.run.artifacts(stage) for stage in ("post-mortem", "compute-update"))
    sampler = mortem.summary["sampler"]
    assert sampler["another"] and not sampler["corrected"] and 1e-4 < sampler["rms"] < 1e-2
    report = (dissected.result.run_directory / "report.md").read_text()
    assert "the sampler is another distribution than the policy" in report and "## The step that was taken" in report

    model = loaded(run / f"checkpoint-{LAST}", "own")
    rows = [json.loads(line) for line in with_sampler.read_text().splitlines()]
    foreign = torch.zeros((), dtype=torch.float64)
    for row in rows:
        own = logprobs(model, row)
        weight = (own.detach() - torch.tensor(row["sampling_logprobs"], dtype=torch.float64)).sum().exp()
        foreign = foreign - (1 - weight) * row["advantage"] * own.mean() / len(rows)
    parameters = dict(model.named_parameters())
    gradient = dict(zip(parameters, torch.autograd.grad(foreign, list(parameters.values())), strict=True))
    [dH], [loaded_state] = dissected.run.artifacts("entropy-gradient"), dissected.run.artifacts("load-checkpoint")
    preconditioner = parts_of(update, dissected.run)["preconditioner"]
    factor = update.summary["clip_factor"] * loaded_state.summary["learning_rate"]
    share = 0.0
    for name, g in gradient.items():
        of_halves = [
            whole(in_blocks({name: dict(dH.vector(f"{KINDS[0]}_{half}").items())[name]}), {name: g})[name]
            for half in HALVES
        ]
        share += float((of_all(dH.summary["halves"], of_halves) * preconditioner[name] * g.double()).sum())
    assert factor * share == pytest.approx(of_parts(dissected)["per_sequence"]["sampler"], rel=1e-6)


def test_what_is_planted_in_the_weights_is_unexplained(run, dissected, with_sampler, tmp_path):
    """A weight that something else than the optimizer has moved."""
    shutil.copytree(run / f"checkpoint-{LAST}", tmp_path / "run" / f"checkpoint-{LAST}")
    shutil.copytree(run / f"checkpoint-{STEPS}", tmp_path / "run" / f"checkpoint-{STEPS}")
    file = tmp_path / "run" / f"checkpoint-{STEPS}" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1e-3 * torch.sign(tensors["lm_head.weight"])
    save_file(tensors, file, {"format": "pt"})
    u = {"from": str(with_sampler), "old_logprobs": "scored"}
    more = {"policy": {"dtype": "float64"}, "batch_config": {"U": u}, "post_mortem": True}
    parts = of_parts(predicted(tmp_path / "run", dissected.config.store_root, **more))["per_token"]
    clean = of_parts(dissected)["per_token"]
    assert abs(parts["unexplained"]) > 1e-3 * abs(clean["first order"])
    assert {part: parts[part] for part in PARTS[:5]} == {part: clean[part] for part in PARTS[:5]}


def test_a_post_mortem_needs_the_batch_and_the_next_checkpoint(run, tmp_path):
    sampled = asked(run, tmp_path / "artifacts", post_mortem=True)
    del sampled["batch_config"]["U"]
    with pytest.raises(ConfigError, match="post_mortem: U is sampled"):
        parse_config(sampled)
    alone = tmp_path / "run"
    shutil.copytree(run / f"checkpoint-{LAST}", alone / f"checkpoint-{LAST}")
    shutil.copytree(run / "entropy-probe", alone / "entropy-probe")
    [found] = preflight(parse_config(asked(alone, tmp_path / "artifacts", post_mortem=True)))
    assert not found.after and any("No post-mortem of checkpoint-2" in warning for warning in found.warnings)
    shutil.copytree(run / f"checkpoint-{STEPS}", alone / f"checkpoint-{STEPS}")
    config = alone / f"checkpoint-{STEPS}" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    with pytest.raises(CheckpointError):
        preflight(parse_config(asked(alone, tmp_path / "artifacts", post_mortem=True)))


def test_the_next_checkpoint_is_found_by_its_name(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "global_step_4/actor", "global_step_5/actor", "step_009", "step_010"):
        (tmp_path / name).mkdir(parents=True)
    assert next_checkpoint(tmp_path / "checkpoint-9", 9) == tmp_path / "checkpoint-10"
    assert next_checkpoint(tmp_path / "checkpoint-10", 10) is None
    assert next_checkpoint(tmp_path / "checkpoint-9", 8) is None  # whose name says another step
    assert next_checkpoint(tmp_path / "global_step_4" / "actor", 4) == tmp_path / "global_step_5" / "actor"
    assert next_checkpoint(tmp_path / "step_009", 9) == tmp_path / "step_010"


def test_the_share_of_a_sampler_by_hand():
    """Two responses of two and one tokens, drawn at log μ = log π + (0.1, -0.3 | 0.2)."""
    offsets_N1 = torch.tensor([0, 2, 3])
    log_ratio_K = torch.tensor([-0.1, 0.3, -0.2], dtype=torch.float64)
    shares_K = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    weights = torch.tensor([0.2, 0.2, -0.2], dtype=torch.float64).exp()
    taken, corrected = Sampler(log_ratio_K, offsets_N1, False), Sampler(log_ratio_K, offsets_N1, True)
    torch.testing.assert_close(taken.foreign_K(), 1 - weights)
    torch.testing.assert_close(corrected.foreign_K(), 1 - (-log_ratio_K).exp())
    assert taken.distances()["kl"] == pytest.approx(0.0) and taken.distances()["largest"] == pytest.approx(0.3)
    products = torch.tensor([6.0, 7.0, -2.0, 0.5, 0.25, 0.25], dtype=torch.float64)
    of = {row["part"]: row for row in rows_of(products, Shares(shares_K, offsets_N1, 2, taken), (6.5, 0.1))}
    assert of["sampler"]["delta_h"] == pytest.approx(float(((1 - weights) * shares_K).sum()))
    assert of["tokens"]["delta_h"] + of["sampler"]["delta_h"] == pytest.approx(7.0)
    assert (of["higher order"]["delta_h"], of["measured"]["delta_h_se"]) == (0.5, 0.1)
    by_prompt = torch.stack([((1 - weights) * shares_K)[:2].sum(), ((1 - weights) * shares_K)[2]])
    assert of["sampler"]["delta_h_se"] == pytest.approx(float((by_prompt[0] - by_prompt[1]).abs()))
    nothing = {row["part"]: row for row in rows_of(products, Shares(shares_K, offsets_N1, 2, None), (6.5, 0.1))}
    assert nothing["sampler"]["delta_h"] == 0.0 and nothing["sampler"]["delta_h_se"] is None
    columns = {"logprobs": torch.tensor([-1.0]), "old_logprobs": torch.tensor([-1.5])}
    table = TokenTable(torch.tensor([0]), torch.tensor([0, 1]), columns)
    found = sampler_of(table, corrected=True)
    assert found is not None and found.log_ratio_K.tolist() == [0.5] and found.distances()["another"]
    assert sampler_of(TokenTable(table.sequences_N, table.offsets_N1, {"logprobs": columns["logprobs"]}), True) is None


def test_the_configurations_of_the_page_are_what_they_say(run, tmp_path, monkeypatch):
    """As the page has them, for a run that is where the page has it."""
    page = Path(__file__).parents[2] / "docs" / "your-batch-as-it-was.md"
    first, second = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "runs" / "grpo").mkdir(parents=True)
    for name in (f"checkpoint-{LAST}", f"checkpoint-{STEPS}", "entropy-probe"):
        shutil.copytree(run / name, tmp_path / "runs" / "grpo" / name)
    monkeypatch.chdir(tmp_path)
    own = f"update: {{reward: {REWARD}}}\n"
    for text in (f"checkpoints: [runs/grpo/checkpoint-{LAST}]\n{first}", second.replace("-4", f"-{LAST}")):
        (tmp_path / "probe.yaml").write_text(text + own)
        [found] = preflight(load_config(tmp_path / "probe.yaml", must_exist=True))
        assert found.recorded and found.recorded.number == STEPS
        assert bool(found.after) == ("post_mortem" in text)
