"""One slot for each GPU, held by one run at a time and by nobody who is dead."""

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest
import torch

from entropy_core.errors import StoreError
from tasks.device import device_name, device_slot


@pytest.fixture
def name(tmp_path, monkeypatch) -> str:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return f"a-gpu-{uuid4()}"


def overlap(names: list[str]) -> int:
    """How many of these are in their slots at the same time, at most."""
    inside, most = [], []

    def work(name: str) -> None:
        with device_slot(name):
            inside.append(name)
            most.append(len(inside))
            time.sleep(0.2)
            inside.remove(name)

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(work, names))
    return max(most)


def test_one_at_a_time_on_one_device(name, caplog):
    caplog.set_level("INFO", "entropy_probe.device")
    assert overlap([name] * 3) == 1
    assert f"waits for the GPU {name}" in caplog.text


def test_two_devices_are_two_slots_and_the_cpu_has_none(name):
    assert overlap([name, f"{name}-other"]) == 2
    assert overlap(["", ""]) == 2


def test_a_process_that_dies_frees_its_slot(name):
    script = f"""
import os, tempfile
from tasks.device import device_slot
tempfile.tempdir = {tempfile.gettempdir()!r}
with device_slot({name!r}):
    print("in", flush=True)
    os.read(0, 1)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stdout.readline() == "in\n"
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(overlap, [name])
            time.sleep(0.5)
            assert not waiting.done()
            process.kill()
            assert waiting.result(timeout=20) == 1


def others_folder(folder):
    folder.mkdir()
    folder.chmod(0o777)


@pytest.mark.attack("another user has made the folder of the GPUs' slots, or put a link in its place")
@pytest.mark.parametrize("plant", [others_folder, lambda f: f.symlink_to(f.parent), lambda f: f.touch()])
def test_a_folder_that_others_write_to_has_no_slots(name, tmp_path, plant):
    plant(tmp_path / f"entropy-probe-{os.getuid()}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError, match=r"is not a folder of this user alone.*TMPDIR"), device_slot(name):
        pytest.fail("a slot was taken")
    assert sorted(tmp_path.rglob("*")) == before


def test_slots_are_for_this_user_only(name, tmp_path):
    with device_slot(name):
        [folder] = tmp_path.iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700 and [path.name for path in folder.iterdir()] == [f"{name}.lock"]


def test_a_device_is_named_by_its_own_identity(monkeypatch):
    assert device_name("cpu") == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_name("auto") == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: type("Properties", (), {"uuid": "4a-7f"}))
    assert device_name("auto") == device_name("cuda") == "4a-7f"
