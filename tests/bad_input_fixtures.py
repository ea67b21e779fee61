"""A run that a test may break, and what a sweep of it must do: refuse on one line, or give finite numbers."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import (
    Probe,
    make_run,
    probe,
    skip_figures,
    values,
    write_reward,
)

from entropy_core.errors import ConfigError, ProbeError

NAME = "checkpoint-3"
BATCH = {"E_total_sequences": 4, "B_U": 2, "G": 2}


@pytest.fixture(scope="session")
def original_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    make_run(folder / "run")
    write_reward(folder)
    return folder


@pytest.fixture
def breakable(original_run, tmp_path, monkeypatch) -> Path:
    """A run and a reward, to break."""
    skip_figures(monkeypatch)
    return shutil.copytree(original_run, tmp_path / "home")


def config_of(home: Path, **sections: Any) -> dict[str, Any]:
    own: dict[str, Any] = {
        "checkpoints": [str(home / "run" / NAME)],
        "batch_config": BATCH,
        "generation": {"max_new_tokens": 4},
        "update": {"reward": f"{home / 'reward.py'}:share_of_low_digits"},
    }
    for name, section in sections.items():
        own[name] = own[name] | section if isinstance(own.get(name), dict) and isinstance(section, dict) else section
    return values(home / "run", home / "artifacts", **own)


def one_line(error: ProbeError) -> None:
    """What the user sees says what is so and what to do, and is one line."""
    assert "\n" not in str(error)
    assert "Fix: " in str(error) or isinstance(error, ConfigError)
    assert str(error).endswith(".")


def refused(kind: type[ProbeError], message: str, config: dict[str, Any]) -> str:
    """The sweep is refused with this error, and before it has written anything."""
    with pytest.raises(ProbeError, match=message) as raised:
        probe(config)
    assert type(raised.value) is kind
    one_line(raised.value)
    assert not Path(config["execution"]["artifacts"]).exists()
    return str(raised.value)


OFTEN_NULL = {"pareto_k", "sampler_pareto_k", "derivative_check", "derivative_error", "derivative_error_se"}


def finite(done: Probe) -> list[dict[str, Any]]:
    """The rows, in which no number is missing, infinite or NaN; of so few weights no tail can be fitted.

    Of so few prompts there is no interval over U, and none is given; nor over E, where E says that it cannot know.
    """
    for row in done.rows:
        cannot_know = row["interval_over_e"] != "valid"
        assert row["interval_over_u"].startswith("no valid interval over U: ")
        for name, value in row.items():
            over_u = "mean_update" in name or "next_update" in name or name == "nonlinearity_over_u"
            assert value is None or not over_u or name.startswith(("sign", "nonlinearity")), name
            hidden = over_u or (cannot_know and name.endswith(("_low", "_high", "p_this_update")))
            missing = value is None and name not in OFTEN_NULL and not hidden
            assert not missing and (not isinstance(value, float) or math.isfinite(value)), (name, value)
    return done.rows


def write_pool(home: Path, lines: list[str]) -> dict[str, str]:
    (home / "pool.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return {"dataset_name": str(home / "pool.jsonl")}


def prompts(*texts: str) -> list[str]:
    return [json.dumps({"prompt": text}) for text in texts]


def write_function(home: Path, body: str) -> None:
    write_reward(home, f"def share_of_low_digits(prompts, completions, **columns):\n    {body}\n")


def change_optimizer(directory: Path, change: Callable[[dict], Any]) -> None:
    saved = torch.load(directory / "optimizer.pt", weights_only=True)
    change(saved)
    torch.save(saved, directory / "optimizer.pt")


def change_json(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def cut(path: Path, to: int) -> None:
    path.write_bytes(path.read_bytes()[:to])


def forget_tokenizer(directory: Path) -> None:
    for path in directory.glob("tokenizer*"):
        path.unlink()


def set_rates(saved: dict, rate: float) -> None:
    for group in saved["param_groups"]:
        group["lr"] = rate
