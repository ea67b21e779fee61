"""Datasets of the Hugging Face hub, read from a local copy: `gsm8k`, `gsm8k_r1_template`, `math`, or `owner/name`.

A copy is a folder that `datasets` wrote with `save_to_disk`, or one with the repository's files, as in the hub cache.
Nothing is downloaded unless the configuration allows it. Results are keyed by the content of the copy, not its path.
"""

import re
import tempfile
from pathlib import Path
from typing import NamedTuple

from entropy_core.errors import PromptError, one_line, shortage, some_names
from entropy_core.files.hub_cache import cached_snapshot, commit_of
from entropy_core.prompts.files import read_rows

R1_TEMPLATE = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The Assistant "
    "first thinks about the reasoning process and then gives the User the answer. The reasoning process is enclosed in "
    "<think> </think> tags and the answer in <answer> </answer> tags, that is, <think> reasoning process here </think> "
    "<answer> answer here </answer>.\nUser: {question}\nAssistant: <think>"
)
"""Prompt that opens `<think>`; the response should close it and end with `<answer>…</answer>`."""


DATA = (".parquet", ".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz")
"""What a folder of data files may hold; their content is the key of results."""


class HubDataset(NamedTuple):
    """A dataset on the hub.

    Args:
        repository: name of the repository.
        folder: folder with the Parquet files to read, because a repository may hold several configurations.
        question: name of the column with the question.
        template: template of the prompt, with the placeholder `{question}`.
    """

    repository: str
    folder: str
    question: str
    template: str = "{question}"


DATASETS = {
    "gsm8k": HubDataset("openai/gsm8k", "main", "question"),
    "gsm8k_r1_template": HubDataset("openai/gsm8k", "main", "question", R1_TEMPLATE),
    "math": HubDataset("DigitalLearningGmbH/MATH-lighteval", "data", "problem"),
}


def locate(name: str, directory: str, allow_download: bool) -> Path:
    """Find the folder of the local copy of a dataset.

    Args:
        name: name of the dataset, a key of `DATASETS`.
        directory: a folder written by `save_to_disk` of `datasets`, or a folder with the repository's Parquet files,
            such as a clone, a snapshot in the hub cache, or its `datasets--…` folder. Empty for the local hub cache.
        allow_download: whether to download the dataset if it is not in the hub cache.

    Returns:
        The folder with the files.

    Raises:
        PromptError: there is no copy, and downloading it was not allowed or failed.
    """
    if directory:
        path = Path(directory).expanduser()
        if not path.is_dir():
            raise PromptError(
                f"there is no directory {path}",
                cause="batch_config.dataset_path is misspelt, or relative to another folder",
                fix=f"give the folder of a local copy of {DATASETS[name].repository}",
            )
        return _snapshot(path)
    repository, folder = DATASETS[name].repository, DATASETS[name].folder
    found = cached_snapshot(repository, "datasets")
    if found is not None and any((found / folder).glob("*.parquet")):
        return found
    return _download(name, repository, folder, allow_download)


def locate_repository(repository: str, allow_download: bool) -> Path:
    """Find the snapshot of a dataset in the local hub cache.

    Args:
        repository: its name on the hub, `owner/name`.
        allow_download: whether to download it if it is not there.

    Returns:
        The folder with the files.

    Raises:
        PromptError: there is no copy, and downloading it was not allowed or failed.
    """
    return cached_snapshot(repository, "datasets") or _download(repository, repository, None, allow_download)


def revision(directory: Path) -> str:
    """Return the commit of a snapshot folder in the hub cache; empty for any other folder."""
    return directory.name if directory.parent.name == "snapshots" else ""


def rows(name: str, split: str, directory: Path) -> list[dict]:
    """Load the questions of one split as prompts; other columns of the dataset are kept.

    Args:
        name: name of the dataset, a key of `DATASETS`.
        split: name of the split.
        directory: folder of the local copy, from `locate`.

    Returns:
        One dictionary per question, with the key `prompt`.

    Raises:
        PromptError: the folder has no such split, or contains another dataset.
    """
    dataset = DATASETS[name]
    found = _read(directory, split, dataset.folder)
    for row in found:
        question = row.pop(dataset.question, None)
        if not isinstance(question, str):
            raise PromptError(
                f"{directory} is not {dataset.repository}: a row has no string in column {dataset.question!r}; its "
                f"other columns are {some_names(sorted(row))}",
                fix=f"give the folder of a copy of {dataset.repository}, or make a .jsonl file of these rows",
            )
        row["prompt"] = dataset.template.replace("{question}", question)
    return found


def rows_of_folder(directory: Path, split: str, configuration: str) -> list[dict]:
    """Load one split of a folder, as `datasets` does.

    Args:
        directory: a folder written by `save_to_disk`, or one with data files, such as a snapshot in the hub cache.
        split: name of the split.
        configuration: name of a configuration of the dataset; empty for the only one.

    Returns:
        One dictionary per row.

    Raises:
        PromptError: the folder has no such split or configuration, or no data files.
    """
    if _is_saved(directory):
        if configuration:
            raise PromptError(
                f"{directory} was written by save_to_disk, and has no configurations", fix="remove dataset_config"
            )
        return _read_saved(directory, split)
    return _loaded(directory, split, configuration)


def _loaded(directory: Path, split: str, configuration: str) -> list[dict]:
    """Rows of the data files of a folder; which these are, says the card of the dataset, or their names."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, load_dataset_builder

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory(prefix="entropy-probe-") as scratch:
            builder = load_dataset_builder(str(directory), configuration or None, cache_dir=scratch)
            files = [file for found in (builder.config.data_files or {}).values() for file in found]
            if others := [file for file in files if not file.endswith(DATA)]:
                raise PromptError(
                    f"{directory} holds {Path(others[0]).name}, which is no data file that is read here",
                    fix=f"give a folder of {', '.join(DATA)} files",
                )
            builder.download_and_prepare()
            splits = builder.as_dataset()
            if split not in splits:
                raise _no_split(directory, split, splits)
            return splits[split].to_list()
    except PromptError:
        raise
    except Exception as error:  # each format has its own
        raise shortage(error) or PromptError(
            f"{directory} cannot be read as a dataset: {one_line(error)}",
            cause="it has several configurations, files of different columns, or an interrupted copy",
            fix="set batch_config.dataset_config to one of its configurations, or give the path of one file",
        ) from error
    finally:
        if shown:
            enable_progress_bars()


def _snapshot(path: Path) -> Path:
    """Return the current snapshot of a folder of the hub cache; any other folder is returned unchanged."""
    return path / "snapshots" / commit_of(path) if (path / "refs" / "main").is_file() else path


def _download(name: str, repository: str, folder: str | None, allowed: bool) -> Path:
    from huggingface_hub import snapshot_download

    if not allowed:
        raise PromptError(
            f"dataset {name!r}{'' if name == repository else f' ({repository})'} is not on this machine",
            cause="it was never downloaded, or is in another folder",
            fix="set batch_config.dataset_name to the folder of a copy, or set batch_config.allow_download: true"
            if name == repository
            else "set batch_config.dataset_path to its folder, or set batch_config.allow_download: true",
        )
    try:
        patterns = [f"{folder}/*.parquet"] if folder else None
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the network fails in many ways
        raise PromptError(
            f"{repository} cannot be downloaded: {one_line(error)}",
            cause="there is no connection to the hub, or no such dataset",
            fix="download it on a machine with a connection, and give the folder of the copy",
        ) from error


def _read(directory: Path, split: str, folder: str) -> list[dict]:
    if _is_saved(directory):
        return _read_saved(directory, split)
    base = directory / folder if (directory / folder).is_dir() else directory
    splits: dict[str, list[Path]] = {}
    for file in sorted(base.rglob("*.parquet")):  # train-00000-of-00001.parquet, or train/0000.parquet
        name = file.parent.name if re.fullmatch(r"\d+", file.stem) else re.sub(r"-\d+-of-\d+$", "", file.stem)
        splits.setdefault(name, []).append(file)
    if not splits:
        raise PromptError(
            f"{directory} contains no dataset: neither Parquet files nor the output of save_to_disk of `datasets`",
            fix="set batch_config.dataset_path to the folder of a local copy",
        )
    if split not in splits:
        raise _no_split(directory, split, splits)
    return [row for file in splits[split] for row in read_rows(file)]


def _is_saved(directory: Path) -> bool:
    return (directory / "dataset_dict.json").is_file() or (directory / "state.json").is_file()


def _read_saved(directory: Path, split: str) -> list[dict]:
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(directory))
    except Exception as error:  # of the formats that it may be in, each has its own
        raise shortage(error) or PromptError(
            f"{directory} cannot be read: {one_line(error)}",
            cause="the copy was interrupted",
            fix="save the dataset again",
        ) from error
    splits = dict(saved) if isinstance(saved, DatasetDict) else {str(saved.split or "train"): saved}
    if split not in splits:
        raise _no_split(directory, split, splits)
    return splits[split].to_list()


def _no_split(directory: Path, split: str, splits: dict) -> PromptError:
    return PromptError(
        f"{directory} has no split {split!r}", fix=f"set batch_config.split to one of {some_names(sorted(splits))}"
    )
