"""Prompt files as people have them, right and by mistake: each is read right, or refused in one sentence."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers.processors import TemplateProcessing

from entropy_core.demo.run import build_tokenizer
from entropy_core.errors import ProbeError
from entropy_core.prompts.pools import load_pool, locate
from entropy_core.prompts.tokens import encode

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "{{ {'system': '>', 'user': ',', 'assistant': '='}[m['role']] }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}"
    "{% endif %}{% endfor %}{% if hint is defined and hint %}++{% endif %}{% if add_generation_prompt %};{% endif %}"
)
USER, OTHER = {"role": "user", "content": "1+1="}, {"role": "user", "content": "2+2="}
ROWS = [{"prompt": "1+1=", "n": 2}, {"prompt": "2+2=", "n": 4}]
CHATS: list[dict[str, Any]] = [{"prompt": [USER]}, {"prompt": [OTHER]}]
Case = tuple[str, str | bytes | list[dict[str, Any]], dict[str, Any]]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def one(*messages: Any) -> list[dict[str, Any]]:
    return [{"prompt": [*messages]}]


def tokenizer_of(template: str = TEMPLATE) -> Any:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template or None
    return tokenizer


def seen(home: Path, name: str, content: str | bytes | list[dict[str, Any]], **options: Any) -> tuple[list[str], Any]:
    """The prompts of a file as the policy is given them, and its table."""
    path = home / name
    text = content if isinstance(content, str | bytes) else lines(content)
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") and isinstance(content, str | list) else data)
    return pooled(str(path), **options)


def pooled(
    dataset: str,
    split: str = "train",
    column: str = "prompt",
    configuration: str = "",
    template: str = TEMPLATE,
    **encoding: Any,
) -> tuple[list[str], Any]:
    pool = load_pool(dataset, split, column, locate(dataset), configuration=configuration)
    tokenizer = tokenizer_of(template)
    kept, ids = encode(pool, tokenizer, **encoding)
    return [tokenizer.decode(row) for row in ids], kept


RIGHT: dict[str, tuple[Case, list[str]]] = {
    "a list": (("p.json", json.dumps(ROWS, indent=1), {}), ["1+1=", "2+2="]),
    "lines in a .json": (("p.json", ROWS, {}), ["1+1=", "2+2="]),
    "one object": (("p.json", '{"prompt": "1+1="}', {}), ["1+1="]),
    "a packed list": (("p.json.gz", json.dumps(ROWS), {}), ["1+1=", "2+2="]),
    "packed lines": (("p.jsonl.gz", ROWS, {}), ["1+1=", "2+2="]),
    "a table": (("p.csv", 'prompt,n\n1+1=,2\n"2+2=",4\n', {}), ["1+1=", "2+2="]),
    "a packed table": (("p.csv.gz", "\ufeffprompt,n\r\n1+1=,2\r\n2+2=,4\r\n", {}), ["1+1=", "2+2="]),
    "a user's turn": (("p.jsonl", CHATS, {}), [",1+1=;", ",2+2=;"]),
    "a system turn": (("p.jsonl", one({"role": "system", "content": "0"}, USER), {}), [">0,1+1=;"]),
    "several turns": (("p.jsonl", one(USER, {"role": "assistant", "content": "2"}, OTHER), {}), [",1+1==2,2+2=;"]),
    "an answer that has begun": (("p.jsonl", one(USER, {"role": "assistant", "content": "2"}), {}), [",1+1==2;"]),
    "parts of text": (("p.jsonl", one(USER | {"content": [{"type": "text", "text": "3"}]}), {}), [",3;"]),
    "arguments of the template": (
        ("p.jsonl", CHATS, {"chat_template_kwargs": {"hint": True}}),
        [",1+1=++;", ",2+2=++;"],
    ),
    "a text in the template": (("p.jsonl", ROWS, {"apply_chat_template": True}), [",1+1=;", ",2+2=;"]),
    "conversations and special tokens": (("p.jsonl", CHATS, {"add_special_tokens": True}), [",1+1=;", ",2+2=;"]),
    "OpenRLHF's": (("p.jsonl", [{"input": "1+1=", "label": "2"}], {"column": "input"}), ["1+1="]),
    "OpenRLHF's messages": (("p.jsonl", [{"input": [USER], "label": "2"}], {"column": "input"}), [",1+1=;"]),
}


@pytest.mark.parametrize("case", RIGHT)
def test_a_file_that_people_have_is_read(tmp_path: Path, case: str):
    (name, content, options), expected = RIGHT[case]
    assert seen(tmp_path, name, content, **options)[0] == expected


REFUSED: dict[str, tuple[Case, str]] = {
    "packed by its name only": (
        ("p.jsonl.gz", lines(ROWS).encode(), {}),
        r"p\.jsonl\.gz cannot be read.*\.jsonl\.gz file",
    ),
    "packed and cut": (("p.jsonl.gz", gzip.compress(lines(ROWS).encode())[:-9], {}), "cannot be read"),
    "packed Latin-1": (("p.csv.gz", gzip.compress("prompt\ncafé\n".encode("latin-1")), {}), "cannot be read.*UTF-8"),
    "a list of texts": (("p.json", '["1+1="]', {}), r"entry 0 of .*p\.json is not a JSON object"),
    "a list within an object": (("p.json", '{"data":\n[]}', {}), r"p\.json is not a list of JSON objects"),
    "a number": (("p.json", "3", {}), "is not a list of JSON objects"),
    "a key twice in a list": (
        ("p.json", '[{"prompt": "1"},\n{"prompt": "2", "prompt": "3"}]', {}),
        r"p\.json has an object with the key 'prompt' twice",
    ),
    "a list that is cut": (("p.json", '[{"prompt": "1"},\n', {}), r"p\.json:1 is not JSON"),
    "a table of too many cells": (("p.csv", "prompt\n1,2\n", {}), r"p\.csv is not CSV: .*Expected 1 columns"),
    "a table of two columns of one name": (
        ("p.csv", "prompt,prompt\n1,2\n", {}),
        "two columns with one name: 'prompt'",
    ),
    "an empty table": (("p.csv", "", {}), "has no prompts"),
    "a table of names": (("p.csv", "prompt,n\n", {}), "has no prompts"),
    "a table of numbers": (("p.csv", "prompt\n17\n", {}), "row 0 of .* has no string in column 'prompt'"),
    "no message": (("p.jsonl", one(), {}), "row 0 of .* has a conversation of no messages"),
    "a message that is a text": (("p.jsonl", [{"prompt": ["1+1="]}], {}), "message 0 that is str"),
    "ShareGPT's": (
        ("p.jsonl", one({"from": "human", "value": "1"}), {}),
        "`from` and `value`, which are to be renamed",
    ),
    "no role": (("p.jsonl", one({"content": "1"}), {}), "message 0 without a role"),
    "no content": (("p.jsonl", one(USER, {"role": "user", "content": None}), {}), "message 1 without content"),
    "images beside texts": (("p.jsonl", [{"prompt": "1+1=", "images": ["a.png"]}], {}), "prompts with pictures"),
    "an image": (("p.jsonl", one(USER | {"content": [{"type": "image"}]}), {}), "parts that are not text"),
    "texts, then a conversation": (
        ("p.jsonl", [*ROWS, {"prompt": [USER]}], {}),
        "row 2 .* has a conversation as its prompt",
    ),
    "a conversation, then a text": (
        ("p.jsonl", [CHATS[0], ROWS[0]], {}),
        "row 1 .* has a text as its prompt, and row 0 a c",
    ),
    "contents of two kinds": (
        ("p.jsonl", one(USER, USER | {"content": [{"type": "text", "text": "3"}]}), {}),
        "to a table",
    ),
    "one conversation twice": (("p.jsonl", [CHATS[0], CHATS[0]], {}), "1 rows of .* repeat an earlier prompt"),
    "no template": (("p.jsonl", CHATS, {"template": ""}), "has no chat template.*prompts that are texts"),
    "a system prompt beside": (
        ("p.jsonl", CHATS, {"system_prompt": "0"}),
        "system_prompt is for prompts that are texts",
    ),
    "an unknown role": (("p.jsonl", one(USER | {"role": "robot"}), {}), "chat template of .* failed.*these turns"),
    "characters that it has not": (("p.jsonl", one(USER | {"content": "é"}), {}), "cannot encode every prompt"),
    "an argument of ours": (
        ("p.jsonl", CHATS, {"chat_template_kwargs": {"tokenize": False}}),
        "has 'tokenize', which no",
    ),
    "an answer to go on with": (
        ("p.jsonl", CHATS, {"chat_template_kwargs": {"continue_final_message": True}}),
        "has 'continue_final_message', which no chat template is given",
    ),
    "a configuration of a file": (("p.jsonl", ROWS, {"configuration": "main"}), "dataset_config does not apply"),
    "another split of a file": (("p.json", ROWS, {"split": "test"}), "has no split 'test'"),
    "a text file": (("p.txt", "1+1=\n", {}), "unknown dataset"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_no_pool_is_refused_in_one_sentence(tmp_path: Path, case: str):
    (name, content, options), message = REFUSED[case]
    with pytest.raises(ProbeError, match=message) as raised:
        seen(tmp_path, name, content, **options)
    assert "\n" not in str(raised.value) and "Fix: " in str(raised.value) and len(str(raised.value)) < 700


def test_numbers_of_a_table_are_numbers_and_dates_are_text(tmp_path: Path):
    text = 'prompt,answer,day,note,share\n1+1=,2,2026-01-02,"a, ""b""\nc",0.5\n2+2=,4,2026-01-03,,\n'
    table = seen(tmp_path, "p.csv", text)[1].table
    assert table.to_pylist() == [
        {"prompt": "1+1=", "answer": 2, "day": "2026-01-02", "note": 'a, "b"\nc', "share": 0.5},
        {"prompt": "2+2=", "answer": 4, "day": "2026-01-03", "note": None, "share": None},
    ]


def test_special_tokens_are_those_that_the_tokenizer_adds(tmp_path: Path):
    (tmp_path / "p.jsonl").write_text(lines(ROWS))
    pool, tokenizer = load_pool(str(tmp_path / "p.jsonl"), "train"), tokenizer_of()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="> $A", special_tokens=[(">", tokenizer.convert_tokens_to_ids(">"))]
    )
    for added in (True, False):
        ids = encode(pool, tokenizer, add_special_tokens=added)[1]
        assert [tokenizer.decode(row) for row in ids] == [(">" if added else "") + row["prompt"] for row in ROWS]
        chat = encode(pool, tokenizer, add_special_tokens=added, apply_chat_template=True)[1]
        assert [tokenizer.decode(row) for row in chat] == [f",{row['prompt']};" for row in ROWS]  # its own alone


def test_verls_file_keeps_what_its_reward_needs(tmp_path: Path):
    rows = [
        {
            "data_source": "sums",
            "prompt": [message],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "2"},
            "extra_info": {"index": number, "split": "train"},
        }
        for number, message in enumerate((USER, OTHER))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    texts, pool = pooled(str(tmp_path / "train.parquet"))
    assert texts == [",1+1=;", ",2+2=;"]
    assert [{k: v for k, v in row.items() if k != "prompt"} for row in pool.table.to_pylist()] == [
        {k: v for k, v in row.items() if k != "prompt"} for row in rows
    ]


def test_what_trl_does_with_conversations_alone_is_noted(tmp_path: Path):
    rows = [row | {"chat_template_kwargs": {"hint": True}} for row in CHATS]
    texts, pool = seen(tmp_path, "p.jsonl", rows)
    assert texts == [",1+1=;", ",2+2=;"]  # TRL's GRPO and RLOO trainers do not look at this column
    assert "passed to the reward only" in pool.notes[0]


# --- folders and the hub cache ----------------------------------------------------------------------------------------


def saved(home: Path) -> str:
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list(CHATS)}).save_to_disk(str(home / "saved"))
    return str(home / "saved")


def of_lines(home: Path) -> str:
    folder = home / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text(lines([*CHATS, CHATS[0]]))
    (folder / "test.jsonl").write_text(lines([{"prompt": [USER | {"content": "5"}]}]))
    return str(folder)


def cached(home: Path) -> str:
    from huggingface_hub import constants

    top = Path(constants.HF_HUB_CACHE) / "datasets--lab--sums"
    snapshot = top / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (top / "refs").mkdir()
    (top / "refs" / "main").write_text("0123abc")
    for name, rows in (("low", CHATS), ("hard", CHATS[:1])):
        (snapshot / f"{name}.jsonl").write_text(lines(rows))
    (snapshot / "README.md").write_text(
        "---\nconfigs: [{config_name: low, data_files: low.jsonl}, {config_name: hard, data_files: hard.jsonl}]\n---\n"
    )
    return "lab/sums"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize(
    ("make", "options", "expected"),
    [
        (saved, {}, [",1+1=;", ",2+2=;"]),
        (of_lines, {}, [",1+1=;", ",2+2=;"]),  # of duplicates the first
        (of_lines, {"split": "test"}, [",5;"]),
        (cached, {"configuration": "hard"}, [",1+1=;"]),
    ],
)
def test_a_folder_and_a_dataset_of_the_hub(
    tmp_path: Path, make: Callable, options: dict[str, Any], expected: list[str]
):
    texts, pool = pooled(make(tmp_path), **options)
    assert texts == expected
    assert ["duplicates" in note for note in pool.notes] == [True] * (make is of_lines and not options)


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (saved, {"split": "test"}, r"no split 'test'.*split to one of \[?train"),
        (saved, {"configuration": "main"}, "written by save_to_disk, and has no configurations"),
        (of_lines, {"split": "validation"}, "no split 'validation'"),
        (cached, {}, "cannot be read as a dataset: .*dataset_config"),
        (cached, {"configuration": "other"}, "cannot be read as a dataset"),
        (lambda home: "lab/missing", {}, "dataset 'lab/missing' is not on this machine.*allow_download"),
        (lambda home: str(home), {}, "cannot be read as a dataset|holds no data"),
    ],
)
def test_a_folder_that_is_no_pool(tmp_path: Path, make: Callable, options: dict[str, Any], message: str):
    with pytest.raises(ProbeError, match=message) as raised:
        pooled(make(tmp_path), **options)
    assert "\n" not in str(raised.value) and "Fix: " in str(raised.value)
