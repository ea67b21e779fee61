"""Every kind of pass is tried on a short row, before anything is sampled."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lora_fixtures import make_base
from transformers import BloomConfig, BloomForCausalLM

from entropy_core.demo.run import build_tokenizer
from entropy_core.errors import CheckpointError
from entropy_core.execution import Execution
from entropy_core.files.checkpoint import weights_digest
from entropy_core.pipeline import rehearsal
from entropy_core.pipeline.catalogue import SAMPLE_U, SCORE_REFERENCE
from entropy_core.pipeline.runner import direct_runner
from entropy_core.policy.model import Policy
from entropy_core.policy.spec import PolicySpec
from entropy_core.sequences.decoding import Decoding
from entropy_core.store.store import Stage, Store


@pytest.fixture(autouse=True)
def _first_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "_rehearsed", set())


def spec_of(directory: Path) -> tuple[PolicySpec, Execution]:
    weights = weights_digest(directory)
    spec = PolicySpec(weights=weights, dtype="float32", attn_implementation="eager", temperature=1.0)
    return spec, Execution(paths={weights: directory}, device="cpu")


def make_bloom(directory: Path) -> Path:
    """An architecture whose activation has no forward-mode derivative."""
    config = BloomConfig(vocab_size=len(build_tokenizer()), hidden_size=16, n_layer=1, n_head=2, eos_token_id=1)
    BloomForCausalLM(config).save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


def test_all_passes_are_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: Counter[str] = Counter()

    def count(owner: type, name: str) -> None:
        plain = getattr(owner, name)

        def counted(*args, **kwargs):
            passes[name] += 1
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for owner, name in ((Decoding, "run"), (Policy, "statistics"), (Policy, "add_gradients")):
        count(owner, name)
    spec, execution = spec_of(make_base(tmp_path / "base"))
    run = direct_runner(Store(tmp_path / "store"), execution)
    for name in (SAMPLE_U.name, "score-u-batch"):
        run._run(Stage(name, nothing), {"policy": spec}, "")
    assert passes == {"run": 1, "statistics": 1, "add_gradients": 1}


def test_an_architecture_is_refused_by_name_and_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="BloomForCausalLM has no forward-mode derivative"):
        rehearsal.rehearse(*spec_of(make_bloom(tmp_path / "bloom")))

    def broken(*_: object) -> None:
        raise IndexError("list index out of range")

    base = make_base(tmp_path / "base")
    monkeypatch.setattr(Policy, "add_gradients", broken)
    with pytest.raises(CheckpointError, match="GPT2LMHeadModel has no gradient: IndexError: list index"):
        rehearsal.rehearse(*spec_of(base))
    monkeypatch.setattr(Decoding, "run", broken)
    with pytest.raises(CheckpointError, match="GPT2LMHeadModel cannot be sampled: IndexError"):
        rehearsal.rehearse(*spec_of(base))


def nothing(out: Any, execution: Any, *, policy: PolicySpec) -> dict[str, Any]:
    """A stage that needs a policy."""
    return {}


def test_nothing_is_computed_with_a_policy_that_cannot_be_differentiated(tmp_path: Path) -> None:
    spec, execution = spec_of(make_bloom(tmp_path / "bloom"))
    store = Store(tmp_path / "store")
    run = direct_runner(store, execution)
    with pytest.raises(CheckpointError, match="forward-mode"):
        run._run(Stage(SAMPLE_U.name, nothing), {"policy": spec}, "")
    assert not list(store.ls())
    run._run(Stage(SCORE_REFERENCE.name, nothing), {"policy": spec}, "")  # a reference is only scored
    assert [artifact.stage for artifact in store.ls()] == [SCORE_REFERENCE.name]
