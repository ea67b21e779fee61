"""Prompts and rewards of the user, from the file to the report: the example of the documentation, chat, and lengths."""

import importlib.metadata
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pipeline_fixtures import Probe, make_run, probe, skip_figures, values, write_reward

from entropy_core.checkpoints.tokenizer import load_tokenizer
from entropy_core.config.read import load_config
from entropy_core.demo.run import build_tokenizer
from entropy_core.errors import CheckpointError, ConfigError, PromptError
from entropy_core.prompts.pools import load_pool
from entropy_core.prompts.tokens import encode

PAGE = Path(__file__).parents[2] / "docs" / "bring-your-prompts-and-reward.md"
CHAT = (
    "{% for m in messages %}{{ {'system': '>', 'user': ','}[m['role']] + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %};{% endif %}"
)
PROMPTS = ["1+2=", "30+4=", "500+6="]  # of 4, 5 and 6 tokens


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    skip_figures(monkeypatch)
    make_run(tmp_path / "runs" / "grpo")
    write_reward(tmp_path)
    (tmp_path / "pool.jsonl").write_text(
        "".join(json.dumps({"prompt": text, "id": text[:1]}) + "\n" for text in PROMPTS)
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def swept(home: Path, checkpoints: str = "checkpoint-3", **batch: Any) -> Probe:
    return probe(
        values(
            home / "runs" / "grpo",
            home / "artifacts",
            checkpoints=[str(home / "runs" / "grpo" / checkpoints)],
            batch_config={"dataset_name": str(home / "pool.jsonl"), "E_total_sequences": 4, "B_U": 2, "G": 2} | batch,
            generation={"max_new_tokens": 4},
            update={"reward": f"{home / 'reward.py'}:share_of_low_digits"},
        )
    )


def add_template(home: Path, template: str = CHAT) -> None:
    for directory in (home / "runs" / "grpo").glob("checkpoint-*"):
        (directory / "chat_template.jinja").write_text(template)


def report(done: Probe) -> str:
    return (done.result.run_directory / "report.md").read_text()


def tokens_of_prompts(done: Probe) -> set[str]:
    """What the policy was given."""
    tokenizer, found = build_tokenizer(), set()
    for artifact in done.run.artifacts("sample-e-batch") + done.run.artifacts("sample-u-batch"):
        tensors = artifact.tensors("tokens.safetensors")
        offsets = tensors["prompt_offsets"].tolist()
        ids = tensors["prompt_tokens"].tolist()
        found |= {tokenizer.decode(ids[a:b]) for a, b in pairwise(offsets)}
    return found


def test_the_example_of_the_documentation(home):
    """Three prompts, a function and one YAML of at most 25 lines, each of them as the page has it."""
    blocks = dict(re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    assert sorted(blocks) == ["jsonl", "python", "yaml"]
    assert blocks["jsonl"].count("\n") == 3
    assert blocks["yaml"].count("\n") <= 25
    for name, kind in (("prompts.jsonl", "jsonl"), ("rewards.py", "python"), ("probe.yaml", "yaml")):
        (home / name).write_text(blocks[kind], encoding="utf-8")
    done = probe(load_config("probe.yaml").model_dump(mode="json"))
    assert {row["checkpoint"] for row in done.rows} == {"checkpoint-3", "checkpoint-5"}
    assert {(row["n_sequences"], row["n_prompts_u"]) for row in done.rows} == {(256, 3)}
    assert all(row["this_update_low"] < row["delta_h1"] < row["this_update_high"] for row in done.rows if row["eta"])

    namespace: dict[str, Any] = {}
    exec(blocks["python"], namespace)
    answers = {row["prompt"]: row["answer"] for row in map(json.loads, blocks["jsonl"].splitlines())}
    for u_batch, rewards in zip(
        done.run.artifacts("sample-u-batch"), done.run.artifacts("reward-u-batch"), strict=True
    ):
        sampled = u_batch.table("sequences.parquet")
        prompts, responses = sampled["prompt"].to_pylist(), sampled["response"].to_pylist()
        expected = namespace["right_ending"](prompts, responses, [answers[p] for p in prompts])
        assert rewards.table("rewards.parquet")["reward"].to_pylist() == expected
        assert len(set(expected)) > 1


def test_long_prompts_are_left_out_and_the_report_says_how_many(home, caplog):
    done = swept(home, "checkpoint-*", max_prompt_length=5)
    assert tokens_of_prompts(done) == set(PROMPTS[:2])
    note = "1 of 3 prompts are longer than 5 tokens and were removed"
    assert f"Split `train`: {note}." in report(done)
    assert note in caplog.text
    (pool,) = done.run.artifacts("load-prompts")  # one tokenizer, one pool
    assert pool.summary == {"prompts": 2, "notes": [f"Split `train`: {note}."]}
    assert pool.table("prompts.parquet")["id"].to_pylist() == ["1", "3"]
    assert "were removed" not in report(swept(home, max_prompt_length=6))


@pytest.mark.parametrize(
    ("batch", "kind", "message"),
    [
        (
            {"max_prompt_length": 3},
            PromptError,
            "all 3 prompts are longer than max_prompt_length of 3 .*shortest has 4",
        ),
        ({"max_prompt_length": 4}, ConfigError, "B_U asks for 2 distinct prompts, but split 'train' has 1"),
        ({"apply_chat_template": True}, PromptError, "tokenizer of .*checkpoint-3 has no chat template.*base model"),
    ],
)
def test_what_is_left_of_a_pool_must_do(home, batch, kind, message):
    with pytest.raises(kind, match=message):
        swept(home, **batch)
    assert not (home / "artifacts").exists()


def test_a_reward_is_not_tried_on_what_was_left_out(home):
    body = "    assert '5' not in columns['id']\n    return [0.5 * len(c) for c in completions]\n"
    write_reward(home, f"def share_of_low_digits(completions, **columns):\n{body}")
    assert swept(home, max_prompt_length=5).rows


def test_a_chat_template_is_applied_when_asked(home):
    add_template(home)
    body = (
        "    assert set(prompts) <= {'1+2=', '30+4=', '500+6='} and all(type(c) is str for c in completions)\n"
        "    return [0.25 * len(c) for c in completions]\n"
    )
    write_reward(home, f"def share_of_low_digits(prompts, completions, **_):\n{body}")
    batch = {"E_total_sequences": 32, "B_U": 3}
    assert tokens_of_prompts(swept(home, **batch)) == set(PROMPTS)
    chat = swept(home, apply_chat_template=True, **batch)
    assert tokens_of_prompts(chat) == {f",{text};" for text in PROMPTS}
    assert set(chat.run.artifacts("sample-u-batch")[0].table("sequences.parquet")["prompt"].to_pylist()) == set(PROMPTS)
    system = swept(home, apply_chat_template=True, system_prompt="0>9", max_prompt_length=11)
    assert tokens_of_prompts(system) == {f">0>9,{text};" for text in PROMPTS[:2]}  # of 10 and 11 tokens
    assert "1 of 3 prompts are longer than 11 tokens" in report(system)


def test_another_template_is_another_pool(home):
    add_template(home)
    first = swept(home, apply_chat_template=True)
    add_template(home, CHAT.replace(";", "="))
    second = swept(home, apply_chat_template=True)
    assert second.run.was_computed["load-prompts"] == 1
    assert tokens_of_prompts(second).isdisjoint(tokens_of_prompts(first))


def test_a_template_that_fails_says_so(home):
    add_template(home, "{{ raise_exception('System role not supported') }}")
    with pytest.raises(
        PromptError,
        match=r"chat template of .* failed: System role not supported.*no system role.*remove batch_config",
    ):
        swept(home, apply_chat_template=True, system_prompt="0")
    with pytest.raises(PromptError, match=r"failed: System role.*correct chat_template\.jinja"):
        swept(home, apply_chat_template=True)


def test_prompts_as_tokens():
    """Those of the tokenizer, by hand: one token to a character."""
    pool, tokenizer = load_pool("arithmetic", "test"), build_tokenizer()
    kept, token_ids = encode(pool, tokenizer)
    assert kept is pool
    assert [tokenizer.decode(ids) for ids in token_ids] == pool.table["prompt"].to_pylist()
    short, short_ids = encode(pool, tokenizer, max_prompt_length=6)
    expected = [text for text in pool.table["prompt"].to_pylist() if len(text) <= 6]
    assert short.table["prompt"].to_pylist() == expected and 0 < len(expected) < 512
    assert list(map(len, short_ids)) == list(map(len, expected))


def test_a_prompt_without_tokens_is_refused(tmp_path):
    class Mute:
        name_or_path = "mute"

        def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
            return {"input_ids": [[] for _ in texts]}

    with pytest.raises(PromptError, match=r"prompt '.*=' becomes 0 tokens"):
        encode(load_pool("arithmetic", "train"), Mute())
    with pytest.raises(CheckpointError, match=r"no tokenizer that can be loaded.*save the tokenizer"):
        load_tokenizer(tmp_path)


def test_a_dataset_of_the_hub_and_its_revision_are_in_the_report(home):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = home / "copy" / "snapshots" / "0123abc" / "main"
    folder.mkdir(parents=True)
    rows = [{"question": text, "answer": f"so\n#### {i}"} for i, text in enumerate([*PROMPTS, PROMPTS[0]])]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    done = swept(home, dataset_name="gsm8k", dataset_path=str(folder.parent))
    assert "Prompts of `gsm8k`: revision 0123abc." in report(done)
    assert "1 of 4 prompts of gsm8k are duplicates and were removed." in report(done)
    again = swept(home, dataset_name="gsm8k", dataset_path=str(folder.parent))
    assert again.run.was_computed == {}
    rows[0]["answer"] = "#### 7"
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    assert swept(home, dataset_name="gsm8k", dataset_path=str(folder.parent)).run.was_computed["load-prompts"] == 1


def test_the_library_that_decides_is_part_of_the_key(home):
    """Of a library the version counts, as its judgement may change with it."""
    config = {"checkpoints": [str(home / "runs" / "grpo" / "checkpoint-3")], "update": {"reward": "answer_tag"}}
    batch = {"E_total_sequences": 4, "B_U": 2, "G": 2}
    done = probe(values(home / "runs" / "grpo", home / "artifacts", batch_config=batch, **config))
    (rewards,) = done.run.artifacts("reward-u-batch")
    assert (
        rewards.manifest["inputs"]["rewards"][0]["library"]
        == f"math-verify {importlib.metadata.version('math-verify')}"
    )
    assert rewards.table("rewards.parquet")["reward"].to_pylist() == [0.0] * 4  # no tag in any response


def test_conversations_and_rewards_from_the_file_to_the_report(home):
    """The rewards are given messages; the policy the template; a sibling's content is part of the key."""
    add_template(home)
    rows = [{"prompt": [{"role": "system", "content": "0"}, {"role": "user", "content": text}]} for text in PROMPTS]
    (home / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "weight_of_mine.py").write_text("WEIGHT = 0.25\n")
    body = (
        "from weight_of_mine import WEIGHT\n"
        "async def share_of_low_digits(prompts, completions, completion_ids, trainer_state, **_):\n"
        "    assert all(prompt[0]['role'] == 'system' for prompt in prompts) and trainer_state.global_step == 3\n"
        "    return [WEIGHT * len(ids) for ids in completion_ids]\n"
        "def some(completions, **_):\n"
        "    return [None if i % 3 else float('1' in c[0]['content']) for i, c in enumerate(completions)]\n"
    )
    write_reward(home, body)
    both = [f"{home / 'reward.py'}:{name}" for name in ("share_of_low_digits", "some")]

    def run(**update: Any) -> Probe:
        batch = {"dataset_name": str(home / "chats.jsonl"), "E_total_sequences": 4, "B_U": 3, "G": 2}
        return probe(
            values(
                home / "runs" / "grpo",
                home / "artifacts",
                checkpoints=[str(home / "runs" / "grpo" / "checkpoint-3")],
                batch_config=batch,
                generation={"max_new_tokens": 4},
                update=update,
            )
        )

    done = run(reward=both, reward_weights=[1.0, 2.0])
    assert tokens_of_prompts(done) == {f">0,{text};" for text in PROMPTS}
    (u_batch,), (rewards,) = done.run.artifacts("sample-u-batch"), done.run.artifacts("reward-u-batch")
    lengths = u_batch.table("sequences.parquet")["length"].to_pylist()
    table = rewards.table("rewards.parquet").to_pydict()
    assert table["reward_1"] == [0.25 * length for length in lengths]
    assert [value is None for value in table["reward_2"]] == [False, True, True] * 2
    assert table["reward"] == [a + 2 * (b or 0) for a, b in zip(table["reward_1"], table["reward_2"], strict=True)]
    assert "with the rewards `reward.py:share_of_low_digits` + `reward.py:some`" in report(done)
    (home / "weight_of_mine.py").write_text("WEIGHT = 0.75\n")
    again = run(reward=both, reward_weights=[1.0, 2.0])
    assert again.run.was_computed["reward-u-batch"] == 1 and "sample-u-batch" not in again.run.was_computed
    alone = run(reward=both[1])
    (rewards,) = alone.run.artifacts("reward-u-batch")
    assert rewards.summary["open"] == 4 and rewards.table("rewards.parquet")["reward"].null_count == 4
    (update,) = alone.run.artifacts("compute-update")
    of_sequences = update.table("sequences.parquet").to_pylist()
    assert all(row["advantage"] == 0 for row in of_sequences if row["reward"] is None)


def test_what_does_not_fit_together_is_refused_before_anything_is_sampled(home):
    for update, message in (
        ({"reward_weights": [1.0, 0.5]}, "update.reward names 1 and update.reward_weights has 2"),
        ({"loss": "rloo", "multi_objective_aggregation": "normalize_then_sum"}, "rloo has no rewards that are"),
    ):
        with pytest.raises(ConfigError, match=message):
            probe(values(home / "runs" / "grpo", home / "artifacts", update={"reward": "arithmetic"} | update))
    assert not (home / "artifacts").exists()
