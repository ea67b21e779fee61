"""Every file of a checkpoint that is a pickle, of whatever trainer: nothing in it is ever run."""

import pickle
import shutil
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_fixtures import RunsCode
from lora_fixtures import make_base, make_lora
from pipeline_fixtures import make_run, probe, skip_figures, values
from watching import watched

from entropy_core.config.read import parse_config
from entropy_core.errors import ProbeError
from entropy_core.pipeline.preflight import preflight


def archived(payload: Any, path: Path) -> None:
    torch.save(payload, path)


def legacy(payload: Any, path: Path) -> None:
    torch.save(payload, path, _use_new_zipfile_serialization=False)


def bare(payload: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(payload))


def within_a_state(payload: Any, path: Path) -> None:
    torch.save({"state": {0: {"step": payload}}, "param_groups": [{"params": [0], "lr": 0.1}]}, path)


def other_data(payload: Any, path: Path) -> None:
    """An archive whose own pickle is harmless, and another one beside it."""
    torch.save({}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/constants.pkl", pickle.dumps(payload))


HOW: dict[str, Callable[[Any, Path], None]] = {
    "torch.save": archived,
    "torch.save, as it was": legacy,
    "pickle": bare,
    "within an optimizer's state": within_a_state,
    "beside what is read": other_data,
}
NAMES = (
    *("optimizer.pt", "optimizer.bin", "optimizer_0/x.pt", "scheduler.pt", "scaler.pt", "training_args.bin"),
    *("rng_state.pth", "rng_state_0.pth", "random_states_0.pkl", "trainer_state.pt", "sampler.bin", "dataloader.pt"),
    *("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "adapter_model.bin"),
    *("model.pt", "model.pth", "model.pkl", "model.ckpt", "consolidated.00.pth", "added_tokens.bin", "tokenizer.pkl"),
    *("global_step3/mp_rank_00_model_states.pt", "global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    *("pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp.bin", "value_head.bin", "v_head.pt", "dataset.pkl"),
    *("training_info.pt", "optimizer_param_names.pkl", "custom_checkpoint_0.pkl", "latest.pt", "data.pkl"),
)
LAYOUTS = {"model": "", "lora": "", "folder": "model"}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    shutil.copytree(make_run(folder / "run") / "checkpoint-3", folder / "model")
    make_base(folder / "base")
    make_lora(folder / "lora", folder / "base")
    make_lora(folder / "folder", folder / "base", "folder")
    return folder


def plant(directory: Path, name: str, how: Callable[[Any, Path], None], witness: Path) -> None:
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    how(RunsCode(witness), path)


def config_of(home: Path, layout: str) -> dict[str, Any]:
    small = {"E_total_sequences": 4, "B_U": 2, "G": 2}
    generation = {"max_new_tokens": 4}
    return values(home, home / "artifacts", checkpoints=[str(home / layout)], batch_config=small, generation=generation)


def test_the_payload_works(tmp_path):
    for number, how in enumerate((archived, bare, legacy)):
        how(RunsCode(tmp_path / f"witness-{number}"), tmp_path / "x")
        if how is bare:
            pickle.loads((tmp_path / "x").read_bytes())
        else:
            torch.load(tmp_path / "x", weights_only=False)
        assert (tmp_path / f"witness-{number}").exists()


@pytest.mark.attack("code in a pickle, under every name that a trainer gives one, in every layout")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_pickle_is_run(original, tmp_path, monkeypatch, layout, record_property):
    """The two files that are read, of the optimizer and of the settings, are refused or are plain data; beside all the
    others the sweep goes its way."""
    skip_figures(monkeypatch)
    home = Path(shutil.copytree(original, tmp_path / "home"))
    witness = tmp_path / "executed"
    others = [name for name in NAMES if name not in ("optimizer.pt", "training_args.bin")]
    folders = {home / layout, home / layout / LAYOUTS[layout], home / "base"}
    with watched(tmp_path, limit=300) as seen:
        for first in range(len(HOW)):  # each name in each form
            for number, name in enumerate(others, start=first):
                for directory in folders:
                    plant(directory, name, list(HOW.values())[number % len(HOW)], witness)
            [checkpoint] = preflight(parse_config(config_of(home, layout)))
            assert checkpoint.step == 3
        probe(config_of(home, layout))
        for how in HOW.values():
            plant(home / layout, "training_args.bin", how, witness)
            with suppress(ProbeError):
                preflight(parse_config(config_of(home, layout)))
            (home / layout / "training_args.bin").unlink()
            plant(home / layout, "optimizer.pt", how, witness)
            with pytest.raises(ProbeError, match=r"optimizer\.pt"):
                preflight(parse_config(config_of(home, layout)))
    assert not witness.exists() and [event for event in seen.outside if "mkdir" in event] == []
    record_property("tries", len(NAMES) * len(HOW))
