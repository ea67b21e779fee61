"""What a process has too little of is said to be that, and never a damaged file; what is no file is not waited for."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lora_fixtures import make_base, make_lora
from pipeline_fixtures import make_run, values
from watching import watched

from entropy_core.config.read import load_config, parse_config
from entropy_core.errors import CheckpointError, MemoryShortageError, ProbeError, PromptError, ShortageError, shortage
from entropy_core.pipeline.preflight import preflight
from entropy_core.store import runs
from entropy_core.store.manifest import check_manifest
from entropy_core.store.store import Store
from flows.cli import main

ROOT = Path(__file__).parents[2]
POOL = '{"prompt": "1+1=", "answer": "2"}\n{"prompt": "2+1=", "answer": "3"}\n'


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    make_run(folder / "run")
    make_base(folder / "base")
    make_lora(folder / "lora", folder / "base", "folder")
    (folder / "pool.jsonl").write_text(POOL)
    return folder


@pytest.fixture
def home(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path, dirs_exist_ok=True))


def config(home: Path, checkpoint: Path | None = None, **batch: object) -> dict:
    small = {"E_total_sequences": 4, "B_U": 2, "G": 2} | batch
    directory = checkpoint or home / "run" / "checkpoint-3"
    return values(home / "run", home / "artifacts", checkpoints=[str(directory)], batch_config=small)


# --- too little ------------------------------------------------------------------------------------------------------

READERS = ["config.json", "generation_config.json", "model.safetensors", "optimizer.pt", "trainer_state.json"]


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_what_a_library_quotes_is_understood(code):
    for error in (OSError(code, os.strerror(code)), RuntimeError(f"unable to open file <x>: {os.strerror(code)}")):
        said = shortage(error)
        assert isinstance(said, MemoryShortageError if code == errno.ENOMEM else ShortageError)
        assert "\n" not in str(said) and os.strerror(code) in str(said) and "Fix: raise the limit" in str(said)
    assert shortage(OSError(errno.ENOENT, "x")) is shortage(ValueError("damaged")) is None


SHORT = """
import sys, os, resource
from entropy_core.config.read import load_config
from entropy_core.errors import ProbeError
from entropy_core.pipeline.preflight import preflight
config = load_config(sys.argv[1])
assert preflight(config)  # everything is loaded, and sound
kept = [os.open(os.devnull, os.O_RDONLY) for _ in range(60)]
here = max(kept)
resource.setrlimit(resource.RLIMIT_NOFILE, (here + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
said = []
for spare in range(12):  # one more descriptor each time: another file is the first that cannot be opened
    for descriptor in kept[len(kept) - spare:]:
        os.close(descriptor)
    try:
        preflight(config)
        said.append("done")
    except ProbeError as error:
        said.append(type(error).__name__)
    except OSError as error:
        said.append(os.strerror(error.errno))
    held = kept[len(kept) - spare:]
    for descriptor in held:
        os.open(os.devnull, os.O_RDONLY)
print(*said, sep=",")
"""


def test_few_descriptors_are_no_damage(home):
    """Whichever file is the first that cannot be opened."""
    (home / "config.yaml").write_text(yaml.safe_dump(config(home, dataset_name=str(home / "pool.jsonl"))))
    done = subprocess.run(
        [sys.executable, "-c", SHORT, str(home / "config.yaml")], cwd=ROOT, capture_output=True, text=True
    )
    said = done.stdout.strip().split(",")
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(said) <= {"done", "ShortageError", os.strerror(errno.EMFILE)} and "ShortageError" in said, said
    assert said[-1] == "done"


QUOTED = RuntimeError(f"unable to mmap 12345 bytes from file <x>: {os.strerror(errno.ENOMEM)} (12)")
READING = {
    "entropy_core.checkpoints.content.require_readable": OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    "safetensors.safe_open": OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    "torch.load": QUOTED,
    "transformers.AutoConfig.from_pretrained": MemoryError(),
    "entropy_core.checkpoints.tokenizer.AutoTokenizer.from_pretrained": RuntimeError("std::bad_alloc"),
    "entropy_core.files.checkpoint.file_digest": OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
}


@pytest.mark.parametrize("reading", READING)
def test_no_address_space_is_no_damage(home, monkeypatch, reading):
    def short(*_: object, **__: object):
        raise READING[reading]

    monkeypatch.setattr(reading, short)
    with pytest.raises(MemoryShortageError, match="there is no memory for a file"):
        preflight(parse_config(config(home)))


# --- what is no file -------------------------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def to_itself(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


PLANTED = {"a pipe": pipe, "a device": endless, "a link to itself": to_itself}
IN_A_CHECKPOINT = [
    *READERS,
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
]


@pytest.mark.attack("a pipe, a device or a link to itself in place of a file that is read")
@pytest.mark.parametrize("plant", PLANTED.values(), ids=PLANTED)
@pytest.mark.parametrize("name", IN_A_CHECKPOINT)
def test_a_file_of_a_checkpoint_is_not_waited_for(home, plant, name):
    plant(home / "run" / "checkpoint-3" / name)
    with watched(home):
        try:
            preflight(parse_config(config(home)))
            assert plant is to_itself and name not in READERS  # it is no more there than one that is missing
        except CheckpointError as error:
            assert "\n" not in str(error)


@pytest.mark.attack("a pipe, a device or a link to itself in place of a file that is read")
@pytest.mark.parametrize("plant", PLANTED.values(), ids=PLANTED)
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "training_info.json"])
def test_nor_is_one_of_an_adapter(home, plant, name):
    directory = home / "lora"
    plant(directory / name if name == "training_info.json" else directory / "model" / name)
    with watched(home), pytest.raises(CheckpointError):
        preflight(parse_config(config(home, directory)))


@pytest.mark.attack("a pipe, a device or a link to itself in place of a file that is read")
@pytest.mark.parametrize("plant", PLANTED.values(), ids=PLANTED)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_nor_are_prompts(home, plant, suffix):
    plant(home / f"pool.{suffix}")
    with watched(home), pytest.raises(PromptError, match=rf"pool\.{suffix} cannot be read"):
        preflight(parse_config(config(home, dataset_name=str(home / f"pool.{suffix}"))))


@pytest.mark.attack("a pipe, a device or a link to itself in place of a file that is read")
@pytest.mark.parametrize("plant", PLANTED.values(), ids=PLANTED)
def test_nor_are_a_configuration_a_record_a_manifest_and_an_archive(home, plant, capsys):
    for path in (home / "config.yaml", home / "archive.tar", home / "store" / "runs" / "x" / "run.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        plant(path)
    folder = home / "store" / "draw" / ("0" * 32)
    folder.mkdir(parents=True)
    plant(folder / "manifest.json")
    store = Store(home / "store")
    with watched(home):
        with pytest.raises(ProbeError, match=r"config\.yaml cannot be read"):
            load_config(home / "config.yaml")
        assert check_manifest(folder, "draw", "0" * 32)[0] == {}
        assert runs.recorded(store.root) == []
        for command in (["ls"], ["verify"], ["prune"], ["import", str(home / "archive.tar")]):
            assert main(["store", *command, "--artifacts", str(store.root)]) in (0, 1, 2)
    assert "Traceback" not in capsys.readouterr().err
