"""Pools: what a file must look like, and that every other file is refused with the line and the fix."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from entropy_core.errors import ConfigError, PromptError
from entropy_core.prompts import arithmetic
from entropy_core.prompts.pools import load_pool, locate

ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}]


@pytest.fixture
def pool_of(tmp_path):
    """The pool in a file of these rows, or of this text."""

    def load(content, **options):
        path = tmp_path / "pool.jsonl"
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        path.write_text(text, encoding="utf-8")
        return load_pool(str(path), "train", **options).table

    return load


@pytest.mark.parametrize("split", arithmetic.SPLITS)
def test_a_known_name_is_code(split):
    pool = load_pool("arithmetic", split)
    assert pool.notes == ()
    assert pool.table.to_pylist() == arithmetic.problems(split)
    assert locate("arithmetic") is None


def test_a_file_is_a_row_per_line(pool_of, tmp_path):
    pool = pool_of(ROWS)
    assert pool.to_pylist() == ROWS
    assert pool.column_names == ["prompt", "answer"]
    assert locate(str(tmp_path / "pool.jsonl")) == tmp_path / "pool.jsonl"


def test_lines_may_be_blank_and_end_in_any_way(pool_of):
    assert pool_of('\n{"prompt": "a"}\r\n\n  \n{"prompt": "b"}')["prompt"].to_pylist() == ["a", "b"]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_newline_ends_a_line(pool_of, character):
    """Python's splitlines() cuts at all of these, and JSON allows some of them in a text as they are."""
    text = json.dumps({"prompt": f"a{character}b"}, ensure_ascii=False)
    assert pool_of(text + "\n")["prompt"].to_pylist() == [f"a{character}b"]


def test_a_byte_order_mark_is_no_part_of_the_first_line(pool_of):
    assert pool_of('\ufeff{"prompt": "a"}\n{"prompt": "b"}')["prompt"].to_pylist() == ["a", "b"]


def test_a_file_in_the_home_folder(pool_of, tmp_path, monkeypatch):
    pool_of(ROWS)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_pool("~/pool.jsonl", "train").table.to_pylist() == ROWS
    assert locate("~/pool.jsonl") == tmp_path / "pool.jsonl"


def test_a_parquet_file_is_a_row_per_row(tmp_path):
    path = tmp_path / "pool.parquet"
    rows = [
        {"question": "1+1=", "answer": 2, "tests": [{"in": "1"}], "level": "low"},
        {"question": "2+2=", "answer": None, "tests": [], "level": "low"},
    ]
    table = pa.Table.from_pylist(rows)
    parquet.write_table(table.set_column(3, "level", table["level"].dictionary_encode()), path)
    assert load_pool(str(path), "train", "question").table.to_pylist() == [
        {"prompt": row["question"], **{k: v for k, v in row.items() if k != "question"}} for row in rows
    ]
    with pytest.raises(
        PromptError, match=r"column 'prompt', nor a conversation; it has \['answer', 'level', 'question'"
    ):
        load_pool(str(path), "train")
    with pytest.raises(PromptError, match="no split 'test'"):
        load_pool(str(path), "test", "question")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(PromptError, match=r"pool\.parquet cannot be read.*Parquet file"):
        load_pool(str(path), "train", "question")
    with pytest.raises(PromptError, match=r"missing\.parquet cannot be read"):
        load_pool(str(tmp_path / "missing.parquet"), "train")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), "columns of maps, whose entries have no names: 'x'"),
        (pa.array([[[("a", 1)]]], pa.list_(pa.map_(pa.string(), pa.int64()))), "columns of maps"),
        (pa.array([2**62], pa.duration("s")), r"pool\.parquet cannot be read"),
    ],
)
def test_a_parquet_file_of_what_has_no_form_here_is_refused(tmp_path, column, message):
    parquet.write_table(pa.table({"prompt": ["a"], "x": column}), tmp_path / "pool.parquet")
    with pytest.raises(PromptError, match=message) as raised:
        load_pool(str(tmp_path / "pool.parquet"), "train")
    assert "\n" not in str(raised.value) and "Fix: " in str(raised.value)


def test_what_belongs_to_another_kind_of_pool_is_refused(pool_of, tmp_path):
    with pytest.raises(ConfigError, match="dataset_path does not apply to dataset 'arithmetic'"):
        locate("arithmetic", str(tmp_path))
    with pytest.raises(ConfigError, match="dataset_options does not apply to dataset 'arithmetic'"):
        load_pool("arithmetic", "train", options={"size": 3})


def test_the_prompt_may_be_in_another_column(pool_of):
    rows = [{"id": 1, "question": "why?", "prompt": "ignored"}, {"id": 2, "question": "how?", "prompt": "ignored"}]
    assert pool_of(rows, prompt_column="question").to_pylist() == [
        {"prompt": "why?", "id": 1},
        {"prompt": "how?", "id": 2},
    ]


def test_a_column_that_only_some_rows_have_is_kept(pool_of):
    pool = pool_of([{"prompt": "a"}, {"prompt": "b", "answer": "2"}, {"prompt": "c", "hint": 3}])
    assert pool.column_names == ["prompt", "answer", "hint"]
    assert pool["answer"].to_pylist() == [None, "2", None]


def test_columns_of_any_depth_come_back_as_they_were(pool_of):
    rows = [{"prompt": "a", "tests": [{"in": "1", "out": ["2"]}]}, {"prompt": "b", "tests": []}]
    assert pool_of(rows).to_pylist() == rows


def test_equal_files_are_equal_pools(pool_of):
    assert pool_of(ROWS).equals(pool_of(ROWS))
    assert isinstance(pool_of(ROWS), pa.Table)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no prompts in split 'train'"),
        ("\n\n", "has no prompts"),
        ('{"prompt": "a"}\n{"prompt": "b"', r"pool\.jsonl:2 is not JSON"),
        ('{"prompt": "a"} {"prompt": "b"}', r"pool\.jsonl:1 is not JSON"),
        ('{"prompt": "a"}\n{"prompt": "b", "n": 1, "n": 2}', r"pool\.jsonl:2 has an object with the key 'n' twice"),
        ('{"prompt": "a", "pr\\u006fmpt": "b"}', r"pool\.jsonl:1 has an object with the key 'prompt' twice"),
        ('{"prompt": "a", "n": [{"m": 1, "m": 2}]}', r"pool\.jsonl:1 has an object with the key 'm' twice"),
        ("prompt\na\n", r"pool\.jsonl:1 is not JSON"),
        ('{"prompt": "a", "n": ' + "9" * 5000 + "}", r"pool\.jsonl:1 is not JSON"),
        ('{"prompt": "a"}\n["b"]', r"pool\.jsonl:2 is not a JSON object"),
        ('{"prompt": "a"}\nnull', r"pool\.jsonl:2 is not a JSON object"),
        (
            '{"question": "a"}',
            r"row 0 of .* has no string in column 'prompt', nor .*; it has \['question'\].*prompt_column",
        ),
        ('{"prompt": "a"}\n{"prompt": ""}', "row 1 of .* has no string"),
        ('{"prompt": "a"}\n{"prompt": null}', "row 1 of .* has no string"),
        ('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "a"}', "1 rows of .* repeat an earlier prompt, for example 'a'"),
        ('{"prompt": "a", "n": 1}\n{"prompt": "b", "n": "one"}', "cannot be converted to a table"),
        ('{"prompt": "a", "n": 1}\n{"prompt": "b", "n": [1]}', "cannot be converted to a table"),
        ('{"prompt": "a", "n": ' + "9" * 30 + "}", "cannot be converted to a table"),
        (r'{"prompt": "\ud800"}', "cannot be converted to a table"),
        ('{"prompt": "a", "x": {}}', "have objects that are empty in every row: 'x'"),
        ('{"prompt": "a", "x": [{"y": {}}]}\n{"prompt": "b"}', "have objects that are empty in every row: 'x'"),
    ],
)
def test_what_is_no_pool_is_refused(pool_of, content, message):
    with pytest.raises(PromptError, match=message) as raised:
        pool_of(content)
    assert "\n" not in str(raised.value)
    assert "Fix: " in str(raised.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(PromptError, match=r"missing\.jsonl cannot be read"):
        load_pool(str(tmp_path / "missing.jsonl"), "train")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(PromptError, match=r"folder\.jsonl cannot be read"):
        load_pool(str(tmp_path / "folder.jsonl"), "train")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(PromptError, match=r"latin\.jsonl cannot be read.*UTF-8"):
        load_pool(str(tmp_path / "latin.jsonl"), "train")


def test_names_and_splits_that_do_not_exist_are_refused(pool_of, tmp_path):
    with pytest.raises(
        PromptError,
        match=r"unknown dataset 'arithmetics'.*arithmetic, gsm8k, .*, reasoning_gym:TASK, OWNER/NAME .*\.jsonl",
    ):
        load_pool("arithmetics", "train")
    with pytest.raises(PromptError, match=r"no split 'validation'.*train, test"):
        load_pool("arithmetic", "validation")
    pool_of(ROWS)
    with pytest.raises(PromptError, match="no split 'test'"):
        load_pool(str(tmp_path / "pool.jsonl"), "test")
