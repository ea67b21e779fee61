"""Broken and hostile files of every layout: each is one clear error, before anything is sampled, and nothing is run."""

import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_fixtures import RunsCode
from test_layouts import trainers  # noqa: F401 (a fixture)
from torch.distributed.checkpoint.metadata import MetadataIndex
from trainer_layouts import OTHERS, deepspeed

from entropy_core.checkpoints.checkpoint import read_checkpoint
from entropy_core.checkpoints.layout import find_layout
from entropy_core.checkpoints.optimizer_state import check_moments
from entropy_core.checkpoints.shards import read_shards
from entropy_core.errors import CheckpointError

Spoil = Callable[[Path], Any]

DCP, VERL, FULL, FSDP1 = "fsdp_sharded", "verl/global_step_2/actor", "fsdp_full", "fsdp1/global_step_2/actor"
TITAN = "titan/step-2"
ZERO2, ZERO3, UNIVERSAL2, UNIVERSAL3 = "zero2", "zero3", "universal2", "universal3"
OPTIMIZER = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def remove(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def cut(name: str, share: float = 0.5) -> Spoil:
    return lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * share))


def rename(old: str, new: str) -> Spoil:
    return lambda folder: (folder / old).rename(folder / new)


def copy(old: str, new: str) -> Spoil:
    return lambda folder: shutil.copy(folder / old, folder / new)


def write(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content)


def metadata(change: Callable[[Any], Any], name: str = "optimizer_0/.metadata") -> Spoil:
    """Another `.metadata`, written by torch's own classes."""

    def spoil(folder: Path) -> None:
        said = pickle.loads((folder / name).read_bytes())
        change(said)
        (folder / name).write_bytes(pickle.dumps(said))

    return spoil


def elsewhere(path: str) -> Spoil:
    def change(said: Any) -> None:
        for info in said.storage_data.values():
            info.relative_path = path

    return metadata(change)


def moved(said: Any) -> None:
    """The first two tensors change places."""
    first, second = [i for i in said.storage_data if i.fqn.endswith("norm.weight.exp_avg")][:2]
    said.storage_data[first], said.storage_data[second] = said.storage_data[second], said.storage_data[first]
    for info in said.storage_data.values():
        info.length = max(info.length - 64, 1)


def lost_chunk(said: Any) -> None:
    index = next(i for i in said.storage_data if i.fqn.endswith("embed_tokens.weight.exp_avg"))
    del said.storage_data[index]


def overlapping(said: Any) -> None:
    entry = said.state_dict_metadata["optimizer.state.model.embed_tokens.weight.exp_avg"]
    entry.chunks[1] = entry.chunks[0]


def wrong_shape(said: Any) -> None:
    said.state_dict_metadata["optimizer.state.model.embed_tokens.weight.exp_avg"].size = torch.Size([2**40, 16])


def wrong_offset(said: Any) -> None:
    for info in said.storage_data.values():
        info.offset += 2**50


def other_dtype(said: Any) -> None:
    entry = said.state_dict_metadata["optimizer.state.model.embed_tokens.weight.exp_avg"]
    entry.properties.dtype = torch.float64


def nameless(said: Any) -> None:
    said.storage_data = {MetadataIndex(fqn="other", offset=i.offset): v for i, v in said.storage_data.items()}


def code_archive(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        torch.save({"state": RunsCode(folder.parent / "executed"), "param_groups": []}, folder / name)

    return spoil


def code_within(name: str) -> Spoil:
    """Code in the place of a slot, in the archive that the writer made."""

    def spoil(folder: Path) -> None:
        path = folder / name
        payload = pickle.dumps(RunsCode(folder.parent / "executed"), 2)
        with zipfile.ZipFile(path) as archive:
            content = {entry: archive.read(entry) for entry in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for entry, data in content.items():
                archive.writestr(entry, payload if entry.endswith("data.pkl") else data)

    return spoil


def code_bare(name: str) -> Spoil:
    return lambda folder: (folder / name).write_bytes(pickle.dumps(RunsCode(folder.parent / "executed")))


def code_in_chunks(folder: Path) -> None:
    """Every byte range of a distributed checkpoint is an archive with code."""
    torch.save(RunsCode(folder.parent / "executed"), folder / "code.pt")
    payload = (folder / "code.pt").read_bytes()
    (folder / "code.pt").unlink()
    for file in (folder / "optimizer_0").glob("*.distcp"):
        file.write_bytes(payload)

    def change(said: Any) -> None:
        for info in said.storage_data.values():
            info.offset, info.length = 0, len(payload)

    metadata(change)(folder)


def state(name: str, change: Callable[[Any], Any]) -> Spoil:
    """Another state in an archive of one rank; DTensors are loaded and saved by torch."""

    def spoil(folder: Path) -> None:
        import torch.distributed.tensor

        saved = torch.load(folder / name, weights_only=False)
        change(saved)
        torch.save(saved, folder / name)

    return spoil


M0, M1 = "model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"
O0, O1 = "optim_world_size_2_rank_0.pt", "optim_world_size_2_rank_1.pt"
METADATA = "optimizer_0/.metadata"
G, U = "global_step2/", "global_step2_universal/"
HEAD = U + "zero/lm_head.weight/"
EACH_FILE = {
    DCP: (METADATA, "pytorch_model_fsdp_0/.metadata"),
    VERL: (M0, M1, O0, O1),
    FSDP1: (M1, O1),
    TITAN: (".metadata",),
    FULL: ("optimizer.bin", "pytorch_model_fsdp.bin"),
    ZERO2: (G + OPTIMIZER.format(0), G + OPTIMIZER.format(1), G + "mp_rank_00_model_states.pt"),
    ZERO3: (G + OPTIMIZER.format(1), G + "zero_pp_rank_0_mp_rank_00_model_states.pt"),
    UNIVERSAL2: (*(HEAD + f"{key}.pt" for key in ("fp32", "exp_avg", "step")), U + "mp_rank_00_model_states.pt"),
    UNIVERSAL3: (
        U + "zero/optimizer_state.pt",
        HEAD + "exp_avg_sq.pt",
        U + "zero_pp_rank_0_mp_rank_00_model_states.pt",
    ),
}
BROKEN: dict[str, tuple[str, Spoil, str]] = {
    # ranks
    "verl: a rank of the weights is missing": (VERL, remove(M1), r"model files of \[1\] are missing"),
    "verl: a rank of the optimizer is missing": (VERL, remove(O0), r"optim files of \[0\] are missing"),
    "verl: no optimizer": (VERL, lambda f: [remove(O0)(f), remove(O1)(f)], "no optim_world_size"),
    "verl: two world sizes": (VERL, copy(M0, "model_world_size_4_rank_3.pt"), "files of 2 and 4 ranks"),
    "verl: one rank twice": (VERL, lambda f: shutil.copy(f / M0, f / M1), "outside|overlap|numbers of"),
    "verl: a rank of the optimizer twice": (VERL, lambda f: shutil.copy(f / O0, f / O1), "outside|overlap|numbers of"),
    "verl: other parameters": (VERL, state(M1, lambda s: s.popitem()), "two ranks hold different parameters"),
    "verl: other slots": (VERL, state(O1, lambda s: s["state"].popitem()), "two ranks hold different parameters"),
    "FSDP1: a unit is missing": (FSDP1, state(O0, lambda s: s["state"].pop(1)), "two ranks hold different parameters"),
    "FSDP1: other units": (
        FSDP1,
        lambda f: [state(o, lambda s: s["param_groups"][0]["params"].pop())(f) for o in (O0, O1)],
        "flat parameters, and the model's layers give 3",
    ),
    "FSDP1: a shorter part": (
        FSDP1,
        state(O1, lambda s: s["state"][0].update(exp_avg=s["state"][0]["exp_avg"][:5].clone())),
        "a wrapping policy of FSDP1",
    ),
    "ZeRO-2: a rank is missing": (ZERO2, remove(G + OPTIMIZER.format(1)), "of rank 0, and 2 ranks saved"),
    "ZeRO-3: a rank is missing": (ZERO3, remove(G + OPTIMIZER.format(0)), "states of rank 0 are missing"),
    "ZeRO-2: no model states": (ZERO2, remove(G + "mp_rank_00_model_states.pt"), "model_states"),
    "ZeRO-2: one rank twice": (
        ZERO2,
        copy(G + OPTIMIZER.format(0), G + OPTIMIZER.format(1)),
        "numbers of|outside|overlap",
    ),
    "ZeRO-2: a rank under two names": (
        ZERO2,
        copy(G + OPTIMIZER.format(0), G + OPTIMIZER.format(0).removeprefix("bf16_")),
        "rank 0 has two files",
    ),
    "ZeRO-2: tensor parallelism": (
        ZERO2,
        copy(G + OPTIMIZER.format(0), G + "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt"),
        "several model-parallel ranks",
    ),
    "ZeRO-2: latest leads elsewhere": (ZERO2, write("latest", b"../../other"), "latest names"),
    "ZeRO-2: latest is not there": (ZERO2, write("latest", b"global_step9"), "latest names 'global_step9'"),
    "ZeRO-3: the stages are mixed": (
        ZERO3,
        lambda f: shutil.copy(OTHERS / "zero2" / G / OPTIMIZER.format(1), f / G / OPTIMIZER.format(1)),
        "not what it should be|saved by|has no|no param groups|numbers of",
    ),
    # DeepSpeed, universal
    "universal: no model states": (UNIVERSAL2, remove(U + "mp_rank_00_model_states.pt"), "no .*_model_states.pt"),
    "universal: no model states of rank 0": (
        UNIVERSAL3,
        remove(U + "zero_pp_rank_0_mp_rank_00_model_states.pt"),
        "model states of rank 0 are missing",
    ),
    "universal: tensor parallelism": (
        UNIVERSAL2,
        copy(U + "mp_rank_00_model_states.pt", U + "mp_rank_01_model_states.pt"),
        "several model-parallel ranks",
    ),
    "universal: no groups": (
        UNIVERSAL2,
        remove(U + "zero/optimizer_state.pt"),
        "has a latest_universal, and no folder",
    ),
    "universal: another group": (
        UNIVERSAL2,
        lambda f: torch.save({"param_groups": [{"lr": 1.0}]}, f / U / "zero" / "optimizer_state.pt"),
        "do not name the parameters of each group",
    ),
    "universal: groups of something else": (
        UNIVERSAL2,
        lambda f: torch.save({"param_groups": [3]}, f / U / "zero" / "optimizer_state.pt"),
        "no param groups",
    ),
    "universal: latest leads elsewhere": (UNIVERSAL2, write("latest_universal", b"../other"), "latest_universal names"),
    "universal: a parameter is missing": (
        UNIVERSAL2,
        lambda f: shutil.rmtree(f / HEAD),
        "no folder of 'lm_head.weight'",
    ),
    "universal: a parameter outside": (
        UNIVERSAL2,
        state(U + "mp_rank_00_model_states.pt", lambda s: s["param_shapes"][0].update({"../../x": torch.Size([1])})),
        "no folder of '../../x'",
    ),
    "universal: no second moment": (UNIVERSAL2, remove(HEAD + "exp_avg_sq.pt"), "slots lack a moment"),
    "universal: a moment of another parameter": (
        UNIVERSAL2,
        lambda f: shutil.copy(f / U / "zero" / "model.norm.weight" / "exp_avg.pt", f / HEAD),
        "something else than 592 numbers",
    ),
    "universal: another dtype": (
        UNIVERSAL3,
        lambda f: torch.save(torch.zeros(592, dtype=torch.float64), f / HEAD / "fp32.pt"),
        "something else than 592 numbers",
    ),
    "universal: turned round": (
        UNIVERSAL2,
        lambda f: torch.save({"param": torch.zeros(16, 37).t()}, f / HEAD / "exp_avg.pt"),
        "another order",
    ),
    # DCP
    "DCP: a file is missing": (DCP, remove("optimizer_0/__1_0.distcp"), r"__1_0\.distcp cannot be read"),
    "DCP: a file is cut": (DCP, cut("optimizer_0/__0_0.distcp"), "cannot be read as tensors"),
    "DCP: a file of the weights is cut": (DCP, cut("pytorch_model_fsdp_0/__0_0.distcp"), "cannot be read as tensors"),
    "DCP: no metadata": (DCP, remove(METADATA), r"no optimizer\.pt"),
    "DCP: the metadata is cut": (DCP, cut(METADATA), "cannot be read"),
    "DCP: the metadata is empty": (DCP, write(METADATA, b""), "cannot be read"),
    "DCP: the metadata is text": (DCP, write(METADATA, b"{}"), "cannot be read"),
    "DCP: the metadata is a number": (DCP, write(METADATA, pickle.dumps(3)), "no metadata of a distributed"),
    "DCP: a file above": (DCP, elsewhere("../pytorch_model_fsdp_0/__0_0.distcp"), "not beside it"),
    "DCP: an absolute file": (DCP, elsewhere("/etc/passwd"), "not beside it"),
    "DCP: a nameless file": (DCP, elsewhere(""), "not beside it"),
    "DCP: tensors change places": (DCP, metadata(moved), "cannot be read|something else"),
    "DCP: a chunk is missing": (DCP, metadata(lost_chunk), "lies nowhere"),
    "DCP: chunks overlap": (DCP, metadata(overlapping), "numbers of|overlap"),
    "DCP: another shape": (DCP, metadata(wrong_shape), "numbers of"),
    "DCP: behind the end": (DCP, metadata(wrong_offset), "ends at byte"),
    "DCP: another dtype": (DCP, metadata(other_dtype), "something else than"),
    "DCP: other names": (DCP, metadata(nameless), "lies nowhere"),
    "DCP: two optimizers": (DCP, lambda f: shutil.copytree(f / "optimizer_0", f / "optimizer_1"), "optimizer_1"),
    "DCP: code in every range": (DCP, code_in_chunks, "something else|not what it should be"),
    # one file
    "full: cut": (FULL, cut("optimizer.bin"), "not a complete archive"),
    "full: the weights are cut": (FULL, cut("pytorch_model_fsdp.bin"), "cannot be read as tensors"),
    "full: another name": (
        FULL,
        state("optimizer.bin", lambda s: s["param_groups"][0]["params"].append("other")),
        "names parameters that the model does not have",
    ),
    **{
        f"{where}: {name} is cut off": (where, cut(name, 0.9), ".")
        for where, names in EACH_FILE.items()
        for name in names
    },
    **{
        f"{where}: {name} is a pickle with code": (where, code_bare(name), ".")
        for where, names in EACH_FILE.items()
        for name in names
    },
    **{
        f"{where}: {name} has code for a state": (where, code_archive(name), ".")
        for where, names in EACH_FILE.items()
        for name in names
        if not name.endswith(".metadata")
    },
    **{
        f"{where}: {name} has code in its archive": (where, code_within(name), ".")
        for where, names in EACH_FILE.items()
        for name in names
        if not name.endswith(".metadata")
    },
}


def read(directory: Path, base: Path) -> None:
    """All that happens before sampling: load-checkpoint and load-weights."""
    found = read_checkpoint(directory, base_model=base)
    check_moments(found.layout.optimizer, found.optimizer)
    shards = find_layout(directory, base).shards
    assert shards is not None
    for _ in read_shards(shards):
        pass


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_layout(trainers, tmp_path, case):  # noqa: F811 (the fixture)
    where, spoil, message = BROKEN[case]
    plain = trainers / "plain" / "checkpoint-2"
    if where in (ZERO2, ZERO3, UNIVERSAL2, UNIVERSAL3):
        directory = base = deepspeed(where, tmp_path)
    else:
        directory, base = Path(shutil.copytree(trainers / where, tmp_path / "checkpoint-2")), plain
    read(directory, base)  # it is sound
    spoil(directory)
    with pytest.raises(CheckpointError, match=message) as error:
        read(directory, base)
    assert "\n" not in str(error.value) and error.value.fix
    assert not (directory.parent / "executed").exists()


OF_OTHERS = {
    "Megatron": ("iter_0000010/mp_rank_00/model_optim_rng.pt", "Megatron"),
    "torch_dist": ("latest_checkpointed_iteration.txt", "Megatron"),
    "verl with Megatron": ("actor/dist_ckpt/common.pt", "verl with Megatron.*model_merger"),
    "torchtune": ("recipe_state.pt", "torchtune.*FullModelHFCheckpointer"),
}


@pytest.mark.parametrize("trainer", OF_OTHERS)
def test_what_is_not_read_is_named_with_its_converter(tmp_path, trainer):
    file, message = OF_OTHERS[trainer]
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path)
