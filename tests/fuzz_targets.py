"""What is fuzzed: for each kind of file, what may be in it, and what is done with it.

A target writes its files into a folder of its own, beside links to sound ones, and acts on them. It ends in a result or
in a `ProbeError`, which the console command prints; it must not fail in any other way.
"""

import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hostile_values import TEXTS, changed, changed_archive, damaged, json_bytes, json_file, junk
from hypothesis import strategies as st
from lora_fixtures import make_base, make_lora
from pipeline_fixtures import make_run, probe, skip_figures, values

from entropy_core.config.read import load_config, parse_config
from entropy_core.execution import Execution
from entropy_core.files.checkpoint import tokenizer_digest
from entropy_core.files.digests import file_digest
from entropy_core.pipeline import catalogue
from entropy_core.pipeline.plan import plan
from entropy_core.pipeline.preflight import preflight
from entropy_core.policy.pretrained import load_policy
from entropy_core.rewards.functions import compute_rewards
from entropy_core.store import manifest, runs
from entropy_core.store.archive import export
from entropy_core.store.store import Store
from flows.cli import main

Files = Mapping[str, bytes]


class Target(NamedTuple):
    """What is written below a folder, and what is done with it there."""

    files: st.SearchStrategy[Files]
    act: Callable[[Path], object]
    beside: str = ""  # a folder of sound files, which those above take the places of


class Home:
    """Sound files of every kind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = make_run(folder / "run")
        make_base(folder / "base")
        for layout in ("trainer", "folder"):
            make_lora(folder / f"lora-{layout}", folder / "base", layout)
        self._share_weights(folder / "run" / "checkpoint-3", folder / "sharded")
        with pytest.MonkeyPatch.context() as patch:
            skip_figures(patch)
            probe(self.values([str(self.run / "checkpoint-3")], folder / "stored"))
        export(Store(folder / "stored"), "latest", folder / "run.tar")

    def values(self, checkpoints: list[str], artifacts: Path) -> dict[str, Any]:
        small = {"E_total_sequences": 4, "B_U": 2, "G": 2}
        return values(self.folder, artifacts, checkpoints=checkpoints, batch_config=small)

    def _share_weights(self, directory: Path, to: Path) -> None:
        shutil.copytree(directory, to)
        names = json.loads(_header((to / "model.safetensors").read_bytes())[0]).keys() - {"__metadata__"}
        (to / "model.safetensors").rename(to / "model-00001-of-00001.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(sorted(names), "model-00001-of-00001.safetensors")}
        (to / "model.safetensors.index.json").write_text(json.dumps(index))


def link(source: Path, to: Path) -> None:
    """The same files in another folder, without their content."""
    shutil.copytree(source, to, copy_function=os.link)


# --- configurations --------------------------------------------------------------------------------------------------


def configuration(home: Home) -> Target:
    sound = parse_config(home.values([str(home.run / "checkpoint-3")], Path("artifacts"))).model_dump(mode="json")
    text = yaml.safe_dump(sound).encode()
    as_json = changed(sound).map(json_bytes)  # which is YAML
    anything = st.one_of(st.text(max_size=60).map(lambda t: t.encode(errors="surrogatepass")), st.binary(max_size=60))

    def act(folder: Path) -> None:
        config = load_config(folder / "config.yaml", must_exist=True)
        plan(config, preflight(config), Store(config.store_root))

    files = st.one_of(as_json, as_json, damaged(text), anything).map(lambda content: {"config.yaml": content})
    return Target(files, act)


# --- prompts ---------------------------------------------------------------------------------------------------------

_ROWS = [{"prompt": f"{n}+{n}=", "answer": str(n), "more": {"of": [n]}} for n in range(1, 5)]
_COLUMNS = [
    pa.array([{}] * 4, pa.struct([])),
    pa.array([[("a", 1)]] * 4, pa.map_(pa.string(), pa.int64())),
    pa.array([[[("a", None)]]] * 4, pa.list_(pa.map_(pa.string(), pa.string()))),
    pa.array([b"\xff"] * 4),
    pa.array(["1+1=", "2", "3", "4"]).dictionary_encode(),
    pa.array(["1+1=", "2", "3", "4"], pa.large_string()),
    pa.array(["1+1=", "2", "3", "4"], pa.string_view()),
    pa.array([b"1+1=", b"2", b"3", b"4"], pa.binary()),
    pa.array([1, 2, 3, None], pa.uint64()),
    pa.array([2**63] * 4, pa.uint64()),
    pa.array([2**62] * 4, pa.timestamp("ns")),
    pa.array([-(2**62)] * 4, pa.timestamp("s", "Mars/Olympus")),
    pa.array([2**31 - 1] * 4, pa.date32()),
    pa.array([2**62] * 4, pa.duration("s")),
    pa.array(["1.1"] * 4).cast(pa.decimal256(70, 3)),
    pa.array([1.5, None, float("nan"), float("inf")], pa.float16()),
    pa.nulls(4),
    pa.array([[1, 2]] * 4, pa.list_(pa.int8(), 2)),
    pa.array([[]] * 4, pa.list_(pa.null())),
    pa.array([{"a": {"b": {}}}] * 4),
]


def _parquet(columns: list[tuple[str, pa.Array]]) -> bytes:
    out = io.BytesIO()
    with suppress(pa.ArrowException, UnicodeError):  # what cannot be written cannot be read
        pq.write_table(pa.Table.from_arrays([c for _, c in columns], names=[name for name, _ in columns]), out)
    return out.getvalue()


def prompts(home: Home) -> Target:
    lines = b"\n".join(map(json_bytes, _ROWS))
    rows = changed(_ROWS).map(
        lambda value: b"\n".join(map(json_bytes, value if isinstance(value, list) else [value])),
    )
    column = st.tuples(st.sampled_from(["prompt", "answer", "extra", *TEXTS]), st.sampled_from(_COLUMNS))
    good = ("prompt", pa.array([row["prompt"] for row in _ROWS]))
    tables = st.lists(column, max_size=3).flatmap(
        lambda found: st.sampled_from([[good, *found], found]).map(_parquet),
    )
    table = _parquet([good, ("answer", pa.array([row["answer"] for row in _ROWS]))])
    files = st.one_of(
        st.one_of(rows, rows, damaged(lines)).map(lambda content: {"pool.jsonl": content}),
        st.one_of(tables, tables, damaged(table)).map(lambda content: {"pool.parquet": content}),
    )
    tokenizer = home.run / "checkpoint-3"

    def act(folder: Path) -> None:
        [path] = folder.glob("pool.*")
        inputs = {
            **dict.fromkeys(("revision", "library"), ""),
            **{
                "dataset_name": "",
                "split": "train",
                "prompt_column": "prompt",
                "options": {},
                "encoding": {},
                "configuration": "",
            },
            "source": file_digest(path),
            "tokenizer": tokenizer_digest(tokenizer),
        }
        execution = Execution(paths={inputs["source"]: path, inputs["tokenizer"]: tokenizer})
        pool = Store(folder / "store").run(catalogue.LOAD_PROMPTS, execution, inputs).table("prompts.parquet")
        columns = {name: pool[name].to_pylist() for name in pool.column_names if name != "prompt"}
        compute_rewards("exact_match", pool["prompt"].to_pylist(), [""] * pool.num_rows, columns)

    return Target(files, act)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _header(content: bytes) -> tuple[bytes, bytes]:
    """The header of a safetensors file, and the rest."""
    stop = 8 + int.from_bytes(content[:8], "little")
    return content[8:stop], content[stop:]


def _tensors(content: bytes) -> st.SearchStrategy[bytes]:
    header, rest = _header(content)
    rewritten = changed(json.loads(header)).map(json_bytes).map(lambda h: len(h).to_bytes(8, "little") + h + rest)
    return st.one_of(rewritten, damaged(content))


def _optimizer(content: bytes) -> st.SearchStrategy[bytes]:
    saved = torch.load(io.BytesIO(content), weights_only=True)

    def with_junk(change: tuple[int, str, Any]) -> bytes:
        index, key, value = change
        copied = torch.load(io.BytesIO(content), weights_only=True)
        of = [copied, *copied["param_groups"], *copied["state"].values()]
        of[index][key] = value
        out = io.BytesIO()
        try:
            torch.save(copied, out)
        except (RuntimeError, UnicodeError):
            return b""
        return out.getvalue()

    keys = ["state", "param_groups", *saved["param_groups"][0], *saved["state"][0]]
    places = 1 + len(saved["param_groups"]) + len(saved["state"])
    odd = st.sampled_from(
        [
            *(torch.zeros(0), torch.tensor(3), torch.full((2, 2), torch.nan), torch.zeros(2, dtype=torch.complex64)),
            *(torch.zeros(3, 3).to_sparse(), torch.zeros(4, 4).t()[1:], torch.zeros(2**20).expand(4, -1)),
        ]
    )
    changes = st.tuples(st.integers(0, places - 1), st.sampled_from(keys), st.one_of(junk, odd))
    return st.one_of(changes.map(with_junk), damaged(content))


def _checkpoint(home: Home, name: str, within: str, files: Mapping[str, Callable[[bytes], Any]]) -> Target:
    sound = home.folder / name
    kinds = [
        of((sound / within / file).read_bytes()).map(lambda content, file=file: {f"{name}/{within}{file}": content})
        for file, of in files.items()
    ]

    def act(folder: Path) -> None:
        [checkpoint] = preflight(parse_config(home.values([str(folder / name)], folder / "artifacts")))
        load_policy.cache_clear()
        of = {"base": checkpoint.paths[checkpoint.base]} if checkpoint.base else {}
        load_policy(checkpoint.paths[checkpoint.weights], checkpoint.weights, "float32", "eager", "cpu", **of)

    return Target(st.one_of(kinds), act, name)


def model(home: Home) -> Target:
    names = ("config.json", "generation_config.json", "trainer_state.json", "tokenizer_config.json", "tokenizer.json")
    files = dict.fromkeys(names, json_file) | {"model.safetensors": _tensors, "optimizer.pt": _optimizer}
    return _checkpoint(home, "run/checkpoint-3", "", files)


def shards(home: Home) -> Target:
    files = {"model.safetensors.index.json": json_file, "config.json": json_file}
    return _checkpoint(home, "sharded", "", files)


def adapter(home: Home) -> Target:
    files = {"adapter_config.json": json_file, "adapter_model.safetensors": _tensors}
    return _checkpoint(home, "lora-trainer", "", files)


def progress(home: Home) -> Target:
    files = {"training_info.json": json_file, "optimizer_param_names.json": json_file, "optimizer.pt": _optimizer}
    return _checkpoint(home, "lora-folder", "", files)


# --- the store -------------------------------------------------------------------------------------------------------


class PrintedError(Exception):
    """What a command of the console has printed instead of a result."""


def command(*arguments: object) -> None:
    """A command of the console, in this process."""
    said = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(said):
        status = main([str(argument) for argument in arguments])
    if status == 2:
        raise PrintedError(said.getvalue().removesuffix("\n"))
    assert status in (0, 1)


def _members(root: Path) -> list[tuple[str, bytes]]:
    files = sorted(path for path in root.rglob("*") if path.is_file() and ".locks" not in path.parts)
    return [(path.relative_to(root).as_posix(), path.read_bytes()) for path in files]


def imported(home: Home) -> Target:
    content = (home.folder / "run.tar").read_bytes()
    members = _members(home.folder / "stored")
    files = st.one_of(changed_archive(members), damaged(content), damaged(content[:2000]))

    def act(folder: Path) -> None:
        command("store", "import", folder / "run.tar", "--artifacts", folder / "store")
        for of in ("ls", "verify"):
            command("store", of, "--artifacts", folder / "store")

    return Target(files.map(lambda changed: {"run.tar": changed}), act)


def _resealed(path: str, made: Any) -> bytes:
    """A manifest as somebody would write it who knows how: under its own key, with its digest and its seal."""
    with suppress(TypeError, ValueError, LookupError, AttributeError):
        made.pop("seal", None)
        made["digest"] = manifest.content_digest(made["files"], made["summary"])
        return manifest._sealed(made)
    return json_bytes(made)


COMMANDS = (
    *("store ls", "store verify", "store prune", "store prune --keep-runs 0 --yes", "store explain KEY", "runs"),
    *(
        "store export latest OUT",
        "store export latest OUT --all",
        "variance --direct",
        "variance --direct --confidence 0.5",
    ),
)


def store(home: Home) -> Target:
    root = home.folder / "stored"
    manifests = [(name, content) for name, content in _members(root) if name.endswith("manifest.json")]
    [record] = [(name, content) for name, content in _members(root) if name.endswith(runs.RECORD)]
    data = [(name, content) for name, content in _members(root) if "manifest.json" not in name]
    key = next(name for name, _ in manifests if name.startswith("variance")).split("/")[1]

    def written(of: tuple[str, bytes]) -> st.SearchStrategy[Files]:
        name, content = of
        other = changed(json.loads(content))
        resealed = other.map(lambda value: _resealed(name, value))
        return st.one_of(resealed, resealed, json_file(content)).map(lambda changed: {f"stored/{name}": changed})

    recorded = changed(json.loads(record[1])).map(json_bytes)
    broken = st.sampled_from(data).flatmap(
        lambda of: damaged(of[1][:5000]).map(lambda changed: {f"stored/{of[0]}": changed})
    )
    written_anew = st.one_of(
        st.sampled_from(manifests).flatmap(written),
        recorded.map(lambda changed: {f"stored/{record[0]}": changed}),
        broken,
    )
    files = st.tuples(written_anew, st.sampled_from(COMMANDS)).map(
        lambda pair: {**pair[0], "command": json_bytes(pair[1].replace("KEY", key).split())}
    )

    def act(folder: Path) -> None:
        asked = json.loads((folder / "command").read_bytes())
        asked = [str(folder / "out.tar") if part == "OUT" else part for part in asked]
        command(*asked, "--artifacts", folder / "stored")

    return Target(files, act, "stored")


TARGETS: dict[str, Callable[[Home], Target]] = {
    "configurations": configuration,
    "prompt files": prompts,
    "files of a model": model,
    "an index of shards": shards,
    "an adapter": adapter,
    "what a trainer says": progress,
    "archives": imported,
    "manifests and records": store,
}
