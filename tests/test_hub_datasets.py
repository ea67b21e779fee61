"""Datasets of the hub from local copies, in the schema that they have there: every form of a copy is one pool."""

from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from huggingface_hub import constants
from pyarrow import parquet

from entropy_core.errors import PromptError
from entropy_core.files.sources import content_digest
from entropy_core.prompts import hub_datasets
from entropy_core.prompts.pools import load_pool, locate, revision

GSM8K = {
    "train": [
        {"question": "Ann has 40 apples and buys 2. How many has she?", "answer": "40 + 2 = <<40+2=42>>42\n#### 42"},
        {"question": "A book costs $1,000 and a pen $234. Together?", "answer": "They cost 1234.\n#### 1,234"},
    ],
    "test": [{"question": "What is 3 times 4?", "answer": "3 * 4 = 12\n#### 12"}],
}
MATH = {
    "train": [
        {
            "problem": "Solve $2x = 1$.",
            "level": "Level 1",
            "solution": r"So $x = \boxed{\frac{1}{2}}$.",
            "type": "Algebra",
        }
    ]
}
COMMIT = "e53f048856ff4f594e959d75785d2c2d37b678ee"


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty hub cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def write_parquet(folder: Path, splits: dict[str, list[dict]], shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        for i in range(shards):
            name = f"{split}-{i:05d}-of-{shards:05d}.parquet"
            parquet.write_table(pa.Table.from_pylist(rows[i::shards] if shards > 1 else rows), folder / name)
    return folder


def write_hub_cache(root: Path, repository: str, folder: str, splits: dict[str, list[dict]]) -> Path:
    """As the hub's library lays it out."""
    directory = root / f"datasets--{repository.replace('/', '--')}"
    write_parquet(directory / "snapshots" / COMMIT / folder, splits)
    (directory / "refs").mkdir()
    (directory / "refs" / "main").write_text(COMMIT)
    return directory


def saved(tmp_path: Path) -> Path:
    DatasetDict({split: Dataset.from_list(rows) for split, rows in GSM8K.items()}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def clone(tmp_path: Path) -> Path:
    write_parquet(tmp_path / "clone" / "socratic", {"train": [{"question": "another configuration", "answer": "0"}]})
    return write_parquet(tmp_path / "clone" / "main", GSM8K, shards=2).parent


def converted(tmp_path: Path) -> Path:
    for split, rows in GSM8K.items():
        (tmp_path / "converted" / "main" / split).mkdir(parents=True)
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "converted" / "main" / split / "0000.parquet")
    return tmp_path / "converted"


def cached(tmp_path: Path) -> Path:
    return write_hub_cache(tmp_path / "elsewhere", "openai/gsm8k", "main", GSM8K)


@pytest.mark.parametrize("make", [saved, clone, converted, cached])
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_form_of_a_copy_is_the_same_pool(tmp_path, make, split):
    path = locate("gsm8k", str(make(tmp_path)))
    pool = load_pool("gsm8k", split, path=path)
    assert pool.notes == ()
    assert pool.table.to_pylist() == [{"prompt": r["question"], "answer": r["answer"]} for r in GSM8K[split]]


def test_the_template_asks_for_tags_and_begins_to_think(tmp_path):
    path = locate("gsm8k_r1_template", str(saved(tmp_path)))
    first, second = load_pool("gsm8k_r1_template", "train", path=path).table["prompt"].to_pylist()
    for prompt, row in zip((first, second), GSM8K["train"], strict=True):
        assert f"User: {row['question']}\n" in prompt and prompt.endswith("Assistant: <think>")
        assert "<answer>" in prompt and "{" not in prompt


def test_math_keeps_its_columns(tmp_path):
    write_parquet(tmp_path / "math" / "data", MATH)
    (row,) = load_pool("math", "train", path=locate("math", str(tmp_path / "math"))).table.to_pylist()
    expected = MATH["train"][0]
    assert row == {"prompt": expected["problem"]} | {key: expected[key] for key in ("level", "solution", "type")}


def test_one_split_saved_alone(tmp_path):
    Dataset.from_list(GSM8K["test"], split="test").save_to_disk(tmp_path / "one")
    path = locate("gsm8k", str(tmp_path / "one"))
    assert load_pool("gsm8k", "test", path=path).table.num_rows == 1
    with pytest.raises(PromptError, match=r"has no split 'train'.*batch_config.split to one of test"):
        load_pool("gsm8k", "train", path=path)


def test_the_hub_cache_of_this_machine_is_looked_at(hub_cache):
    write_hub_cache(hub_cache, "openai/gsm8k", "main", GSM8K)
    path = locate("gsm8k")
    assert path and revision(path) == COMMIT
    assert load_pool("gsm8k", "train", path=path).table.num_rows == 2
    assert locate("gsm8k", allow_download=True) == path  # nothing is fetched that is there
    assert revision(hub_cache) == ""


def test_the_content_is_what_counts(tmp_path):
    one, other = saved(tmp_path), tmp_path / "moved"
    digest = content_digest(one)
    one.rename(other)
    assert content_digest(other) == digest
    (other / "README.md").write_text("read me")
    assert content_digest(other) == digest
    DatasetDict({"train": Dataset.from_list(GSM8K["test"])}).save_to_disk(tmp_path / "changed")
    assert content_digest(tmp_path / "changed") != digest


def test_nothing_is_fetched_that_was_not_asked_for(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("it was fetched"))
    with pytest.raises(
        PromptError, match=r"'math' .DigitalLearningGmbH/MATH-lighteval. is not on this machine.*allow_d"
    ):
        locate("math")


def test_what_may_be_fetched_is_fetched_once(hub_cache, monkeypatch):
    asked = []

    def snapshot_download(repository: str, repo_type: str, allow_patterns: list[str]) -> str:
        asked.append((repository, repo_type, allow_patterns))
        return str(write_hub_cache(hub_cache, repository, "main", GSM8K) / "snapshots" / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    paths = [locate("gsm8k", allow_download=True) for _ in range(2)]
    assert asked == [("openai/gsm8k", "dataset", ["main/*.parquet"])]
    assert paths[0] == paths[1] and revision(paths[0]) == COMMIT


def test_without_a_connection_it_says_so():
    with pytest.raises(PromptError, match=r"openai/gsm8k cannot be downloaded: .*no connection.*give the folder"):
        locate("gsm8k", allow_download=True)


def test_a_folder_that_is_no_copy(tmp_path):
    with pytest.raises(PromptError, match=r"there is no directory .*nowhere.*local copy of openai/gsm8k"):
        locate("gsm8k", str(tmp_path / "nowhere"))
    with pytest.raises(PromptError, match="contains no dataset: neither Parquet files nor"):
        load_pool("gsm8k", "train", path=tmp_path)
    write_parquet(tmp_path / "other", MATH)
    with pytest.raises(
        PromptError, match=r"is not openai/gsm8k: a row has no string in column .*; its other columns are level"
    ):
        load_pool("gsm8k", "train", path=tmp_path / "other")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{")
    with pytest.raises(PromptError, match=r"broken cannot be read: .*save the dataset again"):
        load_pool("gsm8k", "train", path=tmp_path / "broken")


def test_copies_of_a_problem_are_left_out_and_counted(tmp_path):
    twice = [*GSM8K["train"], GSM8K["train"][0] | {"answer": "#### 43"}]
    write_parquet(tmp_path / "main", {"train": twice})
    pool = load_pool("gsm8k", "train", path=tmp_path)
    assert pool.table["answer"].to_pylist() == [row["answer"] for row in GSM8K["train"]]
    assert pool.notes == ("1 of 3 prompts of gsm8k are duplicates and were removed",)


def test_every_dataset_has_its_question_in_its_template():
    assert all(dataset.template.count("{question}") == 1 for dataset in hub_datasets.DATASETS.values())
