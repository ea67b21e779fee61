"""The store: reuse, keys, files and manifests."""

import json
import logging
import math
import pickle
import sys
from pathlib import Path

import pytest
from store_fixtures import (
    CONSTANT,
    DRAW,
    EXECUTED,
    RETURNS,
    TOTAL,
    Settings,
    constant,
    draw,
    visible,
    writes_everything,
)

from entropy_core.errors import StoreError
from entropy_core.store import manifest as manifest_module
from entropy_core.store.artifact import Artifact, Writer
from entropy_core.store.store import Stage, Store

# ---- reuse


def test_second_run_reuses(store, caplog):
    caplog.set_level(logging.DEBUG, "entropy_probe.store")
    first = store.run(DRAW, None, {"seed": 1})
    second = store.run(DRAW, None, {"seed": 1})
    assert first == second and hash(first) == hash(second)
    assert len(EXECUTED) == 1
    assert second.json("numbers.json") == [0, 1, 2]
    assert second.path("more/text.txt").read_text() == "seed 1"
    assert second.summary == {"n": 3, "mean": 0.1}
    assert first.directory == store.root / "draw" / first.key
    assert [(record.levelname, record.message.split(" in ")[0]) for record in caplog.records] == [
        ("INFO", f"draw {first.key[:12]}: computed"),
        ("DEBUG", f"draw {first.key[:12]}: reused"),
    ]


def test_another_store_object_finds_it(store):
    made = store.run(DRAW, None, {"seed": 1})
    again = Store(str(store.root))
    assert again.find("draw", made.key) == made == again.run(DRAW, None, {"seed": 1})
    assert list(again.ls()) == [made]
    assert again.find("draw", "0" * 32) is None and again.find("other", made.key) is None
    assert len(EXECUTED) == 1


def test_a_moved_store_is_still_valid(store, tmp_path):
    made = store.run(DRAW, None, {"seed": 1})
    summed = store.run(TOTAL, None, {"numbers": made})
    store.root.rename(tmp_path / "elsewhere")
    moved = Store(tmp_path / "elsewhere")
    found = moved.run(DRAW, None, {"seed": 1})
    assert found == made and found.path("numbers.json").is_relative_to(moved.root)
    assert moved.run(TOTAL, None, {"numbers": found}) == summed
    assert len(EXECUTED) == 2


def test_a_reference_survives_json_and_pickle(store):
    made = store.run(DRAW, None, {"seed": 1})
    reference = json.loads(json.dumps(made.to_dict()))
    assert set(reference) == {"stage", "key", "digest"}
    assert Artifact.from_dict(reference, store.root).json("numbers.json") == [0, 1, 2]
    assert pickle.loads(pickle.dumps(made)).summary == made.summary


def test_what_a_summary_does_not_say_is_of_another_version(store):
    made = store.run(DRAW, None, {"seed": 1})
    with pytest.raises(StoreError, match=rf"{made.key}.* says nothing of median") as caught:
        made.summary["median"]
    assert caught.value.fix == "run the sweep again"
    assert pickle.loads(pickle.dumps(made.summary)) == {"n": 3, "mean": 0.1}


def test_ls_is_sorted_and_skips_what_is_not_complete(store, caplog):
    made = [store.run(stage, None, {"seed": seed}) for stage in (CONSTANT, DRAW) for seed in range(3)]
    (store.root / "draw" / ".tmp-x").mkdir()
    (store.root / "draw" / "unfinished").mkdir()
    (made[0].directory / "manifest.json").write_text("{}")
    assert list(store.ls()) == sorted(made[1:], key=lambda artifact: (artifact.stage, artifact.key))
    assert "unsound" in caplog.text


def test_finding_does_not_make_the_root(store):
    assert store.find("draw", "0" * 32) is None and list(store.ls()) == []
    assert not store.root.exists()


# ---- keys


def test_every_input_is_in_the_key(store):
    inputs = {
        "n": 3,
        "rate": 0.1,
        "name": "a",
        "none": None,
        "list": [1, [2]],
        "dict": {"a": {"b": 1}},
        "model": Settings(),
    }
    changes: list[dict] = [
        {},
        {"n": 4},
        {"rate": math.nextafter(0.1, 1)},
        {"name": "A"},
        {"none": False},
        {"list": [1, 2]},
        {"list": [[2], 1]},
        {"dict": {"a": {"b": 2}}},
        {"dict": {"a": {"c": 1}}},
        {"model": Settings(size=3)},
        {"model": Settings(rate=0.25)},
        {"extra": 0},
    ]
    keys = [store.key(DRAW, inputs | change) for change in changes]
    assert len(set(keys)) == len(changes)
    assert all(len(key) == 32 and set(key) <= set("0123456789abcdef") for key in keys)


def test_alike_but_different_values_differ(store):
    values = [1, 1.0, True, "1", "1.0", [1], {"a": 1}, None, "", [], {}, 0.0, -0.0]
    assert len({store.key(DRAW, {"n": value}) for value in values}) == len(values)


def test_order_and_container_do_not_count(store):
    assert store.key(DRAW, {"a": 1, "b": (1, 2)}) == store.key(DRAW, {"b": [1, 2], "a": 1})
    assert store.key(DRAW, {"model": Settings()}) == store.key(
        DRAW, {"model": {"size": 2, "rate": 0.5, "device": None}}
    )


def test_stage_name_and_code_are_in_the_key(store):
    renamed, other_code = Stage("draw-again", draw), Stage("draw", constant)
    assert len({store.key(stage, {"seed": 1}) for stage in (DRAW, renamed, other_code)}) == 3


def test_execution_is_recorded_but_not_in_the_key(store):
    class Execution:
        def describe(self):
            return {"device": "cpu"}

    made = store.run(DRAW, Execution(), {"seed": 1})
    assert store.run(DRAW, object(), {"seed": 1}) == made
    assert len(EXECUTED) == 1
    assert made.manifest["execution"] == {"device": "cpu"}


def test_the_key_takes_the_content_of_an_artifact_and_not_its_key(store):
    one, other = (store.run(CONSTANT, None, {"seed": seed}) for seed in (1, 2))
    assert one.key != other.key and one.digest == other.digest
    assert store.key(TOTAL, {"numbers": one}) == store.key(TOTAL, {"numbers": other})
    three, four = (store.run(DRAW, None, {"n": n}) for n in (3, 4))
    assert store.key(TOTAL, {"numbers": three}) != store.key(TOTAL, {"numbers": four})
    assert store.key(TOTAL, {"numbers": [three, four]}) != store.key(TOTAL, {"numbers": [four, three]})


def test_the_summary_is_part_of_the_content():
    files = {"a": {"sha256": "0" * 64, "bytes": 1}}
    assert manifest_module.content_digest(files, {"n": 1}) != manifest_module.content_digest(files, {"n": 2})


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (Path("a"), "inputs.x"),
        ({"device": object()}, "inputs.x.device"),
        ([1, {"deep": {1, 2}}], "inputs.x.1.deep"),
        (math.nan, "inputs.x"),
        ((0.0, math.inf), "inputs.x.1"),
        (b"bytes", "inputs.x"),
        ({1: "one"}, "inputs.x"),
        ({"float": "1.0"}, "inputs.x"),
        ({"artifact": "draw", "digest": "0"}, "inputs.x"),
        (Settings(device=Path("a")), "inputs.x.device"),
        (Settings(device={"a": {1}}), "inputs.x.device.a"),
        (Settings(rate=math.nan), "inputs.x.rate"),
        (DRAW, "inputs.x"),
    ],
)
def test_an_input_without_an_exact_form_is_refused_by_name(store, value, where):
    with pytest.raises(StoreError) as caught:
        store.run(DRAW, None, {"x": value})
    assert caught.value.fact.startswith(f"{where} = ")
    assert EXECUTED == []


def test_a_tensor_is_refused(store):
    import torch

    with pytest.raises(StoreError, match=r"inputs\.x\.device = .* \(device\)"):
        store.key(DRAW, {"x": {"device": torch.device("cpu")}})
    with pytest.raises(StoreError, match=r"inputs\.x = .* \(Tensor\)"):
        store.key(DRAW, {"x": torch.zeros(2)})


@pytest.mark.parametrize("name", ["", "Draw", "a/b", "..", ".tmp", "a_b", "a--b"])
def test_a_stage_name_must_be_able_to_name_a_directory(name):
    with pytest.raises(StoreError, match="cannot name a stage"):
        Stage(name, draw)


# ---- files and manifest


def test_files_come_back_and_have_the_same_bytes_every_time(tmp_path):
    torch = pytest.importorskip("torch")
    stage = Stage("everything", writes_everything)
    made, again = (Store(tmp_path / name).run(stage, None, {"values": [0.5, -1.5]}) for name in ("one", "two"))
    assert made.digest == again.digest
    tensors = made.tensors()
    assert {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()} == {
        "x": (torch.float32, (2,)),
        "same": (torch.float32, (2,)),
        "column": (torch.float32, (1, 2)),
        "half": (torch.bfloat16, (2,)),
    }
    assert torch.equal(tensors["x"], torch.tensor([0.5, -1.5]))
    assert made.tensors("empty.safetensors") == {}
    assert made.table("rows.parquet").to_pylist()[1] == {"sequence_id": 1, "reward": None}
    assert made.json("notes.json") == {"a": [None, "η"], "b": 1}

    from safetensors import safe_open

    with safe_open(made.path("tensors.safetensors"), "pt") as file:
        assert file.metadata()["h"] == "h of «τ»\n"
    assert made.path("tensors.safetensors").stat().st_mode == made.path("notes.json").stat().st_mode


def test_the_manifest_says_what_made_it(store):
    upstream = store.run(DRAW, None, {"seed": 1})
    made = store.run(TOTAL, None, {"numbers": upstream})
    manifest = json.loads((made.directory / "manifest.json").read_text())
    assert manifest == made.manifest
    assert (manifest["stage"], manifest["key"], manifest["digest"]) == ("total", made.key, made.digest)
    assert manifest["inputs"] == {"numbers": {"artifact": "draw", "digest": upstream.digest}}
    assert manifest["upstream"] == [upstream.to_dict()]
    assert {"store_fixtures:total", "store_fixtures:EXECUTED"} <= set(manifest["definitions"])
    assert "store_fixtures:draw" not in manifest["definitions"]
    assert len(manifest["code"]) == 64 and manifest["format"] == manifest_module.FORMAT
    assert manifest["libraries"] == {"torch": manifest["versions"]["torch"].rpartition(".")[0]}
    assert manifest["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "pyarrow", "safetensors"} <= set(manifest["versions"])
    assert manifest["wall_seconds"] >= 0 and manifest["peak_rss_bytes"] > 2**20
    assert manifest["created"].endswith("+00:00")
    assert upstream.manifest["files"]["more/text.txt"]["bytes"] == len("seed 1")


FORMATS = {  # SHA-256 of what `writes_everything` leaves, written by this project; Parquet varies with the library
    1: {
        "tensors.safetensors": "653963fddf9f16d5f5f5c418f6df79449e7048b794c6c28e5f91747d9752071d",
        "empty.safetensors": "9bbcbf73561f6bc5d0a17ea6a2081feed2d1304e87602d8c502d9a5c4bd85576",
        "notes.json": "7a162c50579103a71d2faa112d0c7b736f841f191393f3e58170582835d413ce",
    }
}


def test_what_a_writer_makes_of_results_is_numbered(store):
    """It is no part of a stage's code. Whoever changes it raises `manifest.FORMAT`, which is a part of every key."""
    files = store.run(Stage("everything", writes_everything), None, {"values": [0.5, -1.5]}).manifest["files"]
    assert {name: files[name]["sha256"] for name in FORMATS[manifest_module.FORMAT]} == FORMATS[manifest_module.FORMAT]


def test_the_manifest_describes_tensors_and_tables(store):
    files = store.run(Stage("everything", writes_everything), None, {"values": [1.0]}).manifest["files"]
    assert files["tensors.safetensors"]["tensors"]["column"] == {"dtype": "F32", "shape": [1, 1]}
    assert files["tensors.safetensors"]["tensors"]["half"] == {"dtype": "BF16", "shape": [1]}
    assert files["rows.parquet"]["num_rows"] == 2
    assert files["rows.parquet"]["schema"] == "sequence_id: int64\nreward: double"
    assert "tensors" not in files["notes.json"]


def test_a_file_that_is_not_there_is_named(store):
    with pytest.raises(StoreError, match=r"draw/.* no file other\.json.*run the sweep again"):
        store.run(DRAW, None, {"seed": 1}).path("other.json")


@pytest.mark.parametrize("name", ["", ".", "../x", "a/../../x", "/x", "manifest.json", "./manifest.json"])
def test_a_data_file_stays_inside_the_artifact(tmp_path, name):
    with pytest.raises(StoreError, match="cannot name a data file"):
        Writer(tmp_path).path(name)


@pytest.mark.parametrize("what", ["list", "nan", "object"])
def test_a_summary_must_be_a_json_dict(store, what):
    with pytest.raises(StoreError, match="the summary of stage returns is"):
        store.run(RETURNS, None, {"what": what})
    assert visible(store) == set()


def test_a_summary_is_what_will_be_read_back(store):
    made = store.run(RETURNS, None, {"what": "keys"})
    assert made.summary == {"9": {"b": [1, 2]}, "10": 1}
    assert store.find("returns", made.key) == made
