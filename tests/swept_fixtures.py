"""A sweep of two checkpoints with every estimator: its folder, to copy and change, and what it made."""

from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
from pipeline_fixtures import (
    Probe,
    make_run,
    probe,
    values,
    write_reward,
)

from entropy_core.numerics.choices import Estimator
from entropy_core.policy import spec

ETAS = [0, 0.01, 0.02, 1]
OF_THE_RUN = ("agreement", "report")  # which are of all checkpoints together
ESTIMATORS = list(get_args(Estimator))
P, G = 8, 4
BATCH = {"E_total_sequences": 16, "B_U": P, "G": G}


def config_of(folder: Path, **sections: Any) -> dict[str, Any]:
    """The sweep of `swept`, in a folder that has a run and a reward."""
    own = {
        "batch_config": BATCH,
        "update": {"reward": f"{folder / 'reward.py'}:share_of_low_digits"},
        "importance": {"etas": ETAS, "estimators": ESTIMATORS},
    }
    for name, section in sections.items():
        own[name] = own[name] | section if name in own else section
    return values(folder / "run", folder / "artifacts", **own)


class Swept(NamedTuple):
    """A folder with a run, a reward and the store of a sweep; read only."""

    home: Path
    first: Probe


@pytest.fixture(scope="session")
def swept(tmp_path_factory) -> Swept:
    folder = tmp_path_factory.mktemp("swept")
    make_run(folder / "run")
    write_reward(folder)
    return Swept(folder, probe(config_of(folder)))


@pytest.fixture
def without_model(monkeypatch):
    """From here on nothing may load a model or a tokenizer."""

    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(spec, "load_policy", refuse)
    for name in ("policy.pretrained.AutoModelForCausalLM", "checkpoints.tokenizer.AutoTokenizer"):
        monkeypatch.setattr(f"entropy_core.{name}.from_pretrained", refuse)


def main_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["estimator"] == "per_decision"]


def by_eta(rows: list[dict[str, Any]]) -> list[dict[float, dict[str, Any]]]:
    """Per checkpoint and normalisation: the rows of per_decision by multiple of the learning rate."""
    groups: dict[tuple[str, str], dict[float, dict[str, Any]]] = {}
    for row in main_rows(rows):
        groups.setdefault((row["checkpoint"], row["normalization"]), {})[round(row["eta_over_lr"], 6)] = row
    return list(groups.values())
