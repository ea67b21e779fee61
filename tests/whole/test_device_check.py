"""The check of a device, on the CPU: it passes, needs what it says it needs, and notices what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.device import __main__ as check
from benchmarks.device import fits, right
from benchmarks.device.models import SMOLLM2, TINY, make_policy
from benchmarks.device.page import section
from benchmarks.device.table import Table
from entropy_core.numerics import token_statistics

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")

ABSENT = ("prefect", "trl", "datasets", "matplotlib", "peft", "pandas", "accelerate", "math_verify", "reasoning_gym")
WITHOUT = f"""
import importlib.util, socket, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *of: None if name in {ABSENT} else find_spec(name, *of)

def refuse(*_, **__):
    raise OSError("there is no network")

sys.meta_path.insert(0, Absent())
socket.socket.connect = socket.getaddrinfo = refuse
from benchmarks.device.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_it_passes_with_nothing_but_the_packages_that_it_names(tmp_path):
    out = tmp_path / "found" / "device.json"
    command = [sys.executable, "-c", WITHOUT, "--tiny", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["finished"] and found["failed"] == [] and "all within tolerance" in done.stdout
    assert {row["what"] for row in found["right"]} >= {"draws", "ℓ", "h", "ℓ̇", "ḣ", "∇H", "AdamW against torch's own"}
    assert sum(row["what"].startswith("sweep: ") for row in found["right"]) > 12
    assert all(row["holds"] for row in found["right"] if row.get("tolerance") is not None)
    for what in ("scoring", "forward mode", "a step size", "sampling, batch 8"):
        assert any(what in row["what"] and row["tokens_per_s"] > 0 for row in found["fast"] if "tokens_per_s" in row)
    assert [len(row["lines"]) for row in found["profile"]] == [10, 10, 10]


def test_every_package_that_it_may_need_is_one_that_it_names():
    named = set(check.__doc__.split())
    for package in ("torch", "transformers", "filelock", "psutil", "pyyaml", "peft"):
        assert package in named


def test_a_wrong_derivative_is_noticed(monkeypatch):
    plain = token_statistics._TokenStatistics._jvp_of_rows

    def wrong(*arguments):
        dlogprobs_R, dentropies_R = plain(*arguments)
        return 1.01 * dlogprobs_R, dentropies_R

    def verdict() -> bool:
        return next(row["holds"] for row in right.derivatives_agree(CPU) if row["what"].endswith("against backward"))

    assert verdict()
    monkeypatch.setattr(token_statistics._TokenStatistics, "_jvp_of_rows", wrong)
    assert not verdict()


def test_what_was_found_is_on_disk_after_every_row(tmp_path):
    table = Table(tmp_path / "device.json", CPU, 60.0)
    for number, holds in enumerate((True, None, False)):
        table.add("right", {"what": f"check {number}", "holds": holds})
        found = json.loads(table.path.read_text(encoding="utf-8"))
        assert len(found["right"]) == number + 1 and not found["finished"]
    assert found["failed"] == ["check 2"]
    assert [path.name for path in tmp_path.iterdir()] == ["device.json"]


def test_what_falls_over_is_a_row_and_the_check_goes_on(monkeypatch):
    def falls_over(device):
        raise RuntimeError("CUDA error: no kernel image")

    table = Table(None, CPU, 60.0)
    monkeypatch.setattr(right, "CHECKS", (falls_over, right._draws))
    right.right(table, CPU)
    table.write()
    broken, draws = table.found["right"]
    assert broken["note"] == "RuntimeError: CUDA error: no kernel image" and "falls_over" in broken["traceback"]
    assert draws["holds"] and table.found["failed"] == ["falls over"]


def test_no_model_is_begun_that_there_is_no_time_for(monkeypatch):
    from benchmarks.device import fast

    table = Table(None, CPU, 0.0)
    monkeypatch.setattr(fast, "_peak", lambda device: 1e12)
    fast.fast(table, CPU, tiny=False)
    assert all("no time was left" in row["note"] for row in table.found["fast"][1:])
    assert len(table.found["fast"]) > 2


def test_the_sizes_of_a_shape_are_those_of_its_model():
    matrices = [p.numel() for p in make_policy(TINY, CPU).model.parameters() if p.dim() == 2]
    assert sum(matrices) == TINY.parameters
    assert TINY.flops(10, 1) == pytest.approx(20 * TINY.parameters, rel=0.01)


def test_more_memory_holds_longer_answers_and_larger_models():
    small, large = (list(fits.predictions(gib * 2**30)) for gib in (16, 80))
    key = f"longest_answer {SMOLLM2.name}"
    assert all(b[key] >= a[key] for a, b in zip(small, large, strict=True))
    assert any(b[key] > a[key] for a, b in zip(small, large, strict=True))
    assert {row["largest_model"] for row in small} != {row["largest_model"] for row in large}
    scoring, forward_mode, gradient, _ = large
    assert scoring[key] >= forward_mode[key] > gradient[key] > 0


def test_the_page_has_a_section_for_gpus_that_says_what_was_measured_or_that_nothing_was():
    assert "Nothing has been measured on a GPU yet" in "\n".join(section(None))
    found = {
        "setting": {"device": "Some GPU", "cuda": "13.0", "memory": ""},
        "seconds": 401.2,
        "finished": True,
        "failed": [],
        "right": [{"what": "ℓ", "arithmetic": "TF32", "error": 2.5e-4, "tolerance": 5e-3, "holds": True}],
        "fast": [{"what": "scoring", "seconds": 0.5}, {"what": "left", "note": "left out: no time was left"}],
        "fits": [{"what": "scoring", "ratio": 0.9, "holds": False}, {"what": "scoring", "largest_model": "7B"}],
        "profile": [{"what": "scoring", "lines": ["wall 1 s"]}],
    }
    page = "\n".join(section(found))
    assert "in 401 s: device Some GPU, cuda 13.0." in page and "All numbers are within" in page
    assert "| ℓ | TF32 | 0.00025 | 0.005 | yes |" in page and "| scoring | 0.9 | **no** |" in page
    assert "| left |  | left out: no time was left |" in page and "wall 1 s" in page
    assert "**Missed their tolerance**: ℓ" in "\n".join(section(found | {"failed": ["ℓ"]}))
    assert "cut off" in "\n".join(section(found | {"finished": False}))
