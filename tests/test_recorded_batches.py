"""U as its trainer recorded it: read from the files of every trainer, refused where it is not this run's, and used."""

import random
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pipeline_fixtures import probe, skip_figures

pytest.importorskip("trl")

from recorded_fixtures import STEPS, asked, change_of, predicted, recorded_run, rewritten

from entropy_core.config.read import parse_config
from entropy_core.demo.run import build_tokenizer
from entropy_core.errors import ConfigError, PromptError
from entropy_core.pipeline.preflight import preflight
from entropy_core.pipeline.recorded_u import RecordedU, remarks
from entropy_core.prompts import rollout_files
from entropy_core.prompts.packed_rollouts import unpacked
from entropy_core.prompts.rollout_files import files_of_step, read_rollouts
from entropy_core.prompts.rollouts import Ends, Pool, as_batch, in_groups

NUMBER = STEPS  # of the step after the last checkpoint but one


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recorded") / "run"
    recorded_run(folder)
    return folder


@pytest.fixture(scope="module")
def batches(run) -> Path:
    return run / "entropy-probe" / "batches"


@pytest.fixture(autouse=True)
def _without_figures(monkeypatch):
    skip_figures(monkeypatch)


def made(files: list[Path], number: int = NUMBER) -> Any:
    tokenizer = build_tokenizer()
    rows = read_rollouts(files, number)
    prompts = sorted({row["prompt"] if "prompt" in row else tokenizer.decode(row["prompt_ids"]) for row in rows})
    pool = Pool(prompts, tokenizer(prompts, add_special_tokens=False)["input_ids"])
    ends = Ends([tokenizer.eos_token_id], 8, len(tokenizer))
    return as_batch(in_groups(rows, "it"), pool, tokenizer, ends, "it")


def responses(batch: Any) -> list[tuple[Any, ...]]:
    """Prompt, response and how it ended of each, in an order of their own."""
    of = batch.sequences
    found = [(of.prompt(i).tolist(), of.response(i).tolist(), of.finish_reasons[i]) for i in range(len(of))]
    return sorted(found)


def in_text(found: list[tuple[Any, ...]]) -> set[str]:
    """The responses that a text says all of."""
    return {str(one) for one in found if not {0, 1} & set(one[1][:-1]) and one[1][-1] != 0}


def test_v_is_the_step_that_the_trainer_took_on_this_batch(run, tmp_path):
    """To the rounding of its float32, and from its token ids and advantages alone: other rewards change nothing."""
    done = predicted(run, tmp_path / "artifacts", policy={"dtype": "float64"})
    [update], [loaded] = done.run.artifacts("compute-update"), done.run.artifacts("load-checkpoint")
    change, v = change_of(run), dict(update.vector("direction").items())
    assert change.keys() == v.keys()
    real, step = (torch.cat([of[name].double().flatten() for name in change]) for of in (change, v))
    step *= loaded.summary["learning_rate"]
    assert (real - step).norm() < 1e-6 * real.norm()
    assert "sample-u-batch" not in done.run.was_computed
    assert update.summary["differing"]["advantages"] == 0 and update.summary["differing"]["log_ratio"] == 0.0
    report = (done.result.run_directory / "report.md").read_text()
    assert "U is the batch of step 3 as checkpoint-3.parquet has it: 4 prompts × 4 responses" in report
    assert "advantages as recorded; ratios of the loss are 1" in report
    assert "| `batch_config.B_U` | `4` |" in report and "Warning" not in report.split("##")[0]


def test_the_files_of_every_trainer_are_read_alike(run, batches, tmp_path):
    plain = made([batches / f"checkpoint-{NUMBER}.parquet"])
    assert not plain.retokenised and plain.rewards_N is None and len(plain.sequences) == 16
    tokenizer = build_tokenizer()

    def as_text(row: dict[str, Any], skip: bool) -> dict[str, Any]:
        text = tokenizer.decode(row["completion_ids"], skip_special_tokens=skip)
        return {"input": tokenizer.decode(row["prompt_ids"]), "output": text, "score": 0.5}

    of_trl = files_of_step(run / "completions", NUMBER)
    assert [file.name for file in of_trl] == [f"completions_{NUMBER:05d}.parquet"]
    of_verl = rewritten(batches, NUMBER, tmp_path / "verl" / f"{NUMBER}.jsonl", lambda row, _: as_text(row, True))
    assert files_of_step(tmp_path / "verl", NUMBER) == [of_verl]
    for texts in (of_trl, [of_verl]):
        found = made(texts)
        assert found.retokenised and len(found.sequences) == 16
        assert len(in_text(responses(plain))) >= 4
        assert in_text(responses(found)) >= in_text(responses(plain))  # a special token within is in no text
    assert made(of_trl).rewards_N is None and made([of_verl]).rewards_N == [0.5] * 16
    assert sorted(made(of_trl).advantages_N.tolist()) == pytest.approx(sorted(plain.advantages_N.tolist()))

    def of_open_instruct(row: dict[str, Any], i: int) -> dict[str, Any]:
        ids = {"prompt_tokens": row["prompt_ids"], "response_tokens": row["completion_ids"]}
        numbers = {"reward": 1.0, "advantage": row["advantage"], "logprobs": [-0.5] * len(row["completion_ids"])}
        return (
            {"step": NUMBER if i < 8 else NUMBER + (i >= 16), "finish_reason": "stop", "dataset": "d"} | ids | numbers
        )

    rewritten(batches, NUMBER, tmp_path / "ai2" / "a_rollouts_000000.jsonl", of_open_instruct)
    shards = files_of_step(tmp_path / "ai2", NUMBER)
    found = made(shards)
    assert responses(found) == responses(plain) and found.advantages_N.equal(plain.advantages_N)
    assert found.of_tokens["sampling_logprobs"].unique().tolist() == [-0.5]

    rows = pq.read_table(batches / f"checkpoint-{NUMBER}.parquet").to_pylist()
    folder = tmp_path / "prime" / f"step_{NUMBER - 1}"
    folder.mkdir(parents=True)
    for between in ([], [[1.0], None], [[1.0], "math", None]):
        (folder / "rollouts.bin").write_bytes(packed([[sample(row, between) for row in rows], NUMBER - 1]))
        assert rollout_files.counts_from(tmp_path / "prime") == 0 and rollout_files.counts_from(batches) == 1
        found = made(files_of_step(tmp_path / "prime", NUMBER - 1), NUMBER - 1)
        assert responses(found) == responses(plain) and found.advantages_N.equal(plain.advantages_N)
        assert found.rewards_N == [0.25] * 16


def sample(row: dict[str, Any], between: list[Any]) -> list[Any]:
    ids, of = row["prompt_ids"], row["completion_ids"]
    masks = [False] * len(ids), [True] * len(of)
    return [ids, masks[0], of, masks[1], [-0.5] * len(of), *between, row["advantage"], 0.25]


def packed(value: Any) -> bytes:
    """msgpack, as a writer of its own makes it."""
    if value is None or isinstance(value, bool):
        return bytes([0xC0 if value is None else 0xC2 + value])
    if isinstance(value, int):
        return bytes([value]) if value < 128 else struct.pack(">BI", 0xCE, value)
    if isinstance(value, float):
        return struct.pack(">Bd", 0xCB, value)
    if isinstance(value, str):
        return bytes([0xA0 + len(value)]) + value.encode()
    return struct.pack(">BI", 0xDD, len(value)) + b"".join(map(packed, value))


def test_what_msgpack_has_besides():
    assert list(unpacked(packed([[[[1], [True], [300], [True], [-1.0]]]]))) == [
        {"prompt_ids": [1], "completion_ids": [300], "logprobs": [-1.0]}
    ]
    for wrong in (b"", b"\xc1", packed([1]), b"\x80", b"\xdd\xff\xff\xff\xff", b"\x91" * 40):
        with pytest.raises(ValueError):
            list(unpacked(wrong))
    with pytest.raises(PromptError, match="another release of prime-rl"):
        list(unpacked(packed([[[[1], [1.0]]]])))
    with pytest.raises(PromptError, match="do not count"):
        list(unpacked(packed([[[[1], [True], [3], [False], [-1.0]]]])))


Change = Callable[[dict[str, Any], int], dict[str, Any]]


def without(*names: str) -> Change:
    return lambda row, _: {name: value for name, value in row.items() if name not in names}


WRONG: dict[str, tuple[Change, str]] = {
    "a token beyond the vocabulary": (lambda row, _: row | {"completion_ids": [5000]}, "token id 5000, .* has only"),
    "a negative token": (lambda row, _: row | {"completion_ids": [-1]}, "else than token ids as its response_ids"),
    "no tokens": (lambda row, i: row | {"completion_ids": [] if i == 3 else [5]}, "rollout 3 of .*else than token ids"),
    "a group less one": (lambda row, i: row | {"group": 1 if i == 5 else 0}, "different sizes: 1, 3, 4 responses"),
    "one response each": (lambda row, i: row | {"group": i}, "one response to each prompt"),
    "prompts of another pool": (lambda row, _: row | {"prompt_ids": [5, 5, *row["prompt_ids"]]}, "4 of 4 prompts of"),
    "longer responses": (lambda row, _: row | {"completion_ids": [5] * 9}, "9 tokens, and max_new_tokens is 8"),
    "no responses": (without("completion_ids"), "has no responses"),
    "no prompts": (without("prompt_ids"), "has no prompts"),
    "another step": (lambda row, _: row | {"step": 7}, "no rollouts of step 3; it has those of 7"),
    "two names for one thing": (lambda row, _: row | {"response_ids": [5]}, "two columns for one thing"),
    "an infinite advantage": (lambda row, _: row | {"advantage": float("inf")}, "no finite number as its advantage"),
    "an advantage per token": (lambda row, _: row | {"advantage": [0.5, 1.0]}, "differ within a response"),
    "log-probabilities of others": (lambda row, _: row | {"logprobs": [-1.0] * 11}, "11 sampling_logprobs of"),
    "probabilities": (
        lambda row, _: row | {"old_logprobs": [0.5] * len(row["completion_ids"])},
        "else than log-probabilities as its old_logprobs",
    ),
    "a column that one has": (
        lambda row, i: row | ({} if i else {"ref_logprobs": [-1.0] * len(row["completion_ids"])}),
        "not all the same columns: ref_logprobs",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_rollouts_that_are_not_this_runs_are_refused_before_anything_runs(run, batches, tmp_path, name):
    change, said = WRONG[name]
    folder = rewritten(batches, NUMBER, tmp_path / "own" / f"{NUMBER}.parquet", change).parent
    config = parse_config(asked(run, tmp_path / "artifacts", batch_config={"U": {"from": str(folder)}}))
    with pytest.raises((ConfigError, PromptError), match=said):
        preflight(config)
    assert not (tmp_path / "artifacts").exists()


def test_a_step_that_was_not_recorded_is_named(run, batches, tmp_path):
    last = asked(run, tmp_path / "artifacts", step=STEPS)
    with pytest.raises(ConfigError, match=f"no rollouts of step {STEPS + 1}; it has those of 1, 2, 3"):
        preflight(parse_config(last))
    one = {"U": {"from": str(batches / "checkpoint-2.parquet")}}
    with pytest.raises(ConfigError, match="no rollouts of step 3; it has those of 2"):
        preflight(parse_config(asked(run, tmp_path / "artifacts", batch_config=one)))
    every = asked(run, tmp_path / "artifacts") | {"checkpoints": [str(run)]}
    found = preflight(parse_config(every))
    assert [one.name for one in found] == ["checkpoint-1", "checkpoint-2"]
    assert [one.recorded.number for one in found if one.recorded] == [2, 3]
    assert any("checkpoint-3 is left out" in warning for warning in found[0].warnings)
    before = parse_config(asked(run, tmp_path / "artifacts", batch_config={"U": one["U"] | {"first_step": "0"}}))
    assert preflight(before)[0].recorded.number == 2


def test_a_part_of_a_step_is_not_taken_for_the_step(run, batches, tmp_path):
    rows = pq.read_table(batches / f"checkpoint-{NUMBER}.parquet").to_pylist()
    prompts = list(dict.fromkeys(tuple(row["prompt_ids"]) for row in rows))[:2]
    half = [row for row in rows if tuple(row["prompt_ids"]) in prompts]
    (tmp_path / "own").mkdir()
    pq.write_table(pa.Table.from_pylist(half), tmp_path / "own" / "rank_0.parquet")
    batch = {"U": {"from": str(tmp_path / "own" / "rank_0.parquet")}}
    with pytest.raises(ConfigError, match=r"2 prompts with 4 responses each, and batch_config\.B_U is, by .* 4"):
        preflight(parse_config(asked(run, tmp_path / "artifacts", batch_config=batch)))
    [found] = preflight(parse_config(asked(run, tmp_path / "artifacts", batch_config=batch | {"B_U": 2})))
    assert found.recorded.prompts == 2 and not found.recorded.says_its_step
    several = asked(run, tmp_path / "artifacts", batch_config=batch | {"B_U": 2}) | {"checkpoints": [str(run)]}
    with pytest.raises(ConfigError, match=r"rank_0.parquet does not say of which step it is, and there are 3"):
        preflight(parse_config(several))


def test_a_file_that_is_broken_or_hostile_is_refused(batches, tmp_path, monkeypatch):
    whole = (batches / f"checkpoint-{NUMBER}.parquet").read_bytes()
    for name, content in (
        ("cut.parquet", whole[: len(whole) // 2]),
        ("no.parquet", b"PAR1"),
        ("cut.jsonl", b'{"prompt_ids": [1'),
        ("deep.json", b"[" * 100_000),
        ("number.jsonl", b"17\n"),
        ("latin.jsonl", b'{"prompt": "\xe9"}\n'),
        ("rollouts.bin", b"\xdd\xff\xff\xff\xff"),
        ("many.jsonl", b'{"prompt": "1", "output": "2", "score": 1e400}\n'),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PromptError):
            read_rollouts([tmp_path / name], 1)
    dice = random.Random(0)
    for _ in range(60):
        spoilt = bytearray(whole)
        for _ in range(dice.randrange(1, 8)):
            spoilt[dice.randrange(len(spoilt))] = dice.randrange(256)
        (tmp_path / "spoilt.parquet").write_bytes(spoilt)
        with suppress(ConfigError, PromptError):
            made([tmp_path / "spoilt.parquet"])
    monkeypatch.setattr(rollout_files, "MOST_BYTES", 2**16)
    bomb = pa.table({"prompt": ["1" * 4096] * 4096, "completion": ["2"] * 4096})  # 16 MB of text in a few KB
    pq.write_table(bomb, tmp_path / "bomb.parquet")
    assert (tmp_path / "bomb.parquet").stat().st_size < 2**16
    with pytest.raises(PromptError, match="more than a batch"):
        read_rollouts([tmp_path / "bomb.parquet"], 1)


def test_what_was_recorded_is_what_the_loss_is_given(run, batches, tmp_path):
    """Rewards, advantages, ℓ_old and ℓ_ref of the file; what differs from what is computed is a warning."""

    def with_all(row: dict[str, Any], i: int) -> dict[str, Any]:
        count = len(row["completion_ids"])
        more = {"reward": float(i % 2), "advantage": float(i), "old_logprobs": [-0.1 * i - 0.1] * count}
        return row | more | {"ref_logprobs": [-1.5] * count}

    folder = rewritten(batches, NUMBER, tmp_path / "own" / f"{NUMBER}.parquet", with_all).parent
    done = predicted(
        run,
        tmp_path / "artifacts",
        policy={"dtype": "float64"},
        batch_config={"U": {"from": str(folder)}},
        interventions=["positives_only", {"scale_rewards": "none"}],
        lab={"measure": "none"},
    )
    assert not {"reward-u-batch", "sample-u-batch", "score-u-reference"} & set(done.run.was_computed)
    [update], [scores] = done.run.artifacts("compute-update"), done.run.artifacts("score-u-batch")
    table = update.table("sequences.parquet")
    assert sorted(table["advantage"].to_pylist()) == [float(i) for i in range(16)]
    loss, scored = update.tensors("loss.safetensors"), scores.tensors("tokens.safetensors")
    lengths_N = torch.tensor(table["length"].to_pylist())
    ratio_K = (scored["logprobs"] - loss["old_logprobs"]).exp()
    of_tokens_K = (torch.tensor(table["advantage"].to_pylist()) / lengths_N).double().repeat_interleave(lengths_N)
    torch.testing.assert_close(loss["coefficient"], -of_tokens_K * ratio_K / 16)
    report = (done.result.run_directory / "report.md").read_text()
    assert "recorded advantages of 3.parquet differ from those that `update` makes of the rewards" in report
    assert "differ from 1 by more than 0.2" in report
    assert "ratios of the loss are to the recorded log-probabilities" in report


def test_recorded_ratios_are_clipped_where_the_phase_is_followed(run, batches, tmp_path):
    """In v and in the first step of the phase, which are the same bit for bit."""

    def older(row: dict[str, Any], i: int) -> dict[str, Any]:
        return row | {"old_logprobs": [-0.3 * i - 0.1] * len(row["completion_ids"]), "advantage": (-1.0) ** i}

    folder = rewritten(batches, NUMBER, tmp_path / "own" / f"{NUMBER}.parquet", older).parent
    given = asked(run, tmp_path / "artifacts", policy={"dtype": "float64"}, batch_config={"U": {"from": str(folder)}})
    bounds = {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 2.0}
    given["update"]["phase"] = {"follow": True, "minibatches": 1, "epochs": 1, "learning_rates": [1]} | bounds
    done = probe(given)
    [update], [step] = done.run.artifacts("compute-update"), done.run.artifacts("phase-step")
    v, direction = dict(update.vector("direction").items()), step.vector("direction")
    assert all(torch.equal(direction[name], v[name]) for name in v)
    [scores], table = done.run.artifacts("score-u-batch"), update.table("sequences.parquet")
    loss, scored = update.tensors("loss.safetensors"), scores.tensors("tokens.safetensors")
    lengths_N = torch.tensor(table["length"].to_pylist())
    advantage_K = torch.tensor(table["advantage"].to_pylist()).repeat_interleave(lengths_N)
    ratio_K = (scored["logprobs"] - loss["old_logprobs"]).exp()
    high_K, low_K, dual_K = (ratio_K > 1.3), (ratio_K < 0.9), (ratio_K > 2.0)
    cut_K = torch.where(advantage_K > 0, high_K, low_K | dual_K)
    assert cut_K.any() and not cut_K.all() and (advantage_K < 0)[dual_K].any()
    assert torch.equal(loss["coefficient"] == 0, cut_K)
    of_summary = sum(step.summary[f"clip_{side}"] for side in ("low", "high", "dual"))
    assert of_summary == pytest.approx(float(cut_K.double().mean()))
    assert "they are clipped at the bounds" in (done.result.run_directory / "report.md").read_text()


@pytest.mark.parametrize(("micro_batch", "told"), [(0, False), (2, True), (8, False)])
def test_which_response_was_in_which_micro_batch_is_not_recorded_and_said(micro_batch, told):
    rollouts = RecordedU({"a": Path("4.jsonl")}, 4, True, 2, 4, frozenset({"reward"}))
    _, found = remarks(rollouts, {}, {}, "scored", micro_batch)
    assert [warning.startswith(f"The loss averages over micro-batches of {micro_batch}") for warning in found] == (
        [True] if told else []
    )
