"""Who is told of a probed checkpoint: trackers, of which stand-ins are asked, and automations of Prefect."""

import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
import yaml
from prefect.events import Event
from prefect.events.schemas.automations import AutomationCore
from prefect.server.events.schemas.automations import EventTrigger
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.server.utilities.user_templates import render_user_template_sync

from entropy_core.errors import ConfigError
from flows import reporters, ui
from flows.numbers import numbers_of_each
from flows.reporters import PLACES, open_reporters
from flows.watch_options import PLACES as OPTIONS
from tasks import events

PAGE = Path(__file__).resolve().parents[1] / "docs" / "watch-a-run.md"
NUMBERS = {"checkpoint": "checkpoint-4", "step": 4, "H": 1.5, "delta_h1": -0.25, "delta_h": None}
NUMBERS |= {"verdict": "resolved", "direction": "falling"}
CHART = {"entropy_probe/H": 1.5, "entropy_probe/delta_h1": -0.25}


def recording(calls: list[Any], *names: str) -> dict[str, Any]:
    """Functions that note how they are called."""

    def of(name: str) -> Any:
        return lambda *given, **more: calls.append((name, *given, more))

    return {name: of(name) for name in names}


def told(place: str, module: str, stand_in: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, stand_in)
    (reporter,) = open_reporters([place, place], run)
    reporter.tell(NUMBERS)
    reporter.close()


def test_tensorboard_gets_scalars(tmp_path, monkeypatch):
    calls: list[Any] = []
    writer = SimpleNamespace(**recording(calls, "add_scalar", "add_text", "flush", "close"))
    stand_in = ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = lambda log_dir: calls.append(log_dir) or writer
    told("tensorboard", "torch.utils.tensorboard", stand_in, tmp_path, monkeypatch)
    assert calls == [
        str(tmp_path / "entropy-probe" / "tensorboard"),
        *(("add_scalar", name, value, 4, {}) for name, value in CHART.items()),
        ("add_text", "entropy_probe/verdict", "resolved", 4, {}),
        ("flush", {}),
        ("close", {}),
    ]


def test_weights_and_biases_gets_a_row_and_one_run_however_often_it_is_begun(tmp_path, monkeypatch):
    calls: list[Any] = []
    stand_in = ModuleType("wandb")
    at = SimpleNamespace(**recording(calls, "define_metric", "log", "finish"))
    stand_in.init = lambda **given: calls.append(given) or at
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for _ in range(2):
        told("wandb", "wandb", stand_in, tmp_path, monkeypatch)
    first = calls[: len(calls) // 2]
    assert calls == first * 2
    assert (first[0]["project"], first[0]["resume"]) == ("mine", "allow") and len(first[0]["id"]) == 8
    row = {**CHART, "entropy_probe/verdict": "resolved", "train/global_step": 4}
    assert first[1:] == [
        ("define_metric", "entropy_probe/*", {"step_metric": "train/global_step"}),
        ("log", row, {}),
        ("finish", {}),
    ]


def test_trackio_gets_a_row(tmp_path, monkeypatch):
    calls: list[Any] = []
    stand_in = ModuleType("trackio")
    vars(stand_in).update(recording(calls, "init", "log", "finish"))
    told("trackio", "trackio", stand_in, tmp_path, monkeypatch)
    (_, begun), row, end = calls
    assert begun["project"] == "entropy-probe" and begun["resume"] == "allow"
    assert row == ("log", {**CHART, "entropy_probe/verdict": "resolved"}, {"step": 4}) and end == ("finish", {})


@pytest.mark.parametrize("place", ["tensorboard", "wandb", "trackio"])
def test_a_library_that_is_not_there_is_named(place, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(place, place), None)
    with pytest.raises(ConfigError, match=rf"--report-to {place}: .* is not installed\..*pip install {place}"):
        open_reporters([place], tmp_path)


def test_without_being_asked_nobody_is_told(tmp_path, monkeypatch):
    for module in ("torch.utils.tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, module, None)
    assert open_reporters([], tmp_path) == []
    assert tuple(PLACES) == OPTIONS


def test_prefect_needs_a_server_that_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(ConfigError, match="PREFECT_API_URL is not set"):
        open_reporters(["prefect"], tmp_path)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    sent: list[Any] = []
    monkeypatch.setattr(events, "emit_event", lambda name, **more: sent.append(name))
    monkeypatch.setattr("prefect.events.worker.EventsWorker.instance", lambda: SimpleNamespace(drain=lambda: None))
    (reporter,) = reporters.open_reporters(["prefect"], tmp_path)
    reporter.tell(NUMBERS)
    reporter.close()
    assert sent == ["entropy-probe.checkpoint.probed"]


# --- events and automations ------------------------------------------------------------------------------------------


def sent_event(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> ReceivedEvent:
    """What a server receives."""
    made: list[Event] = []

    def emit(event: str, **more: Any) -> None:
        made.append(Event(event=event, occurred=datetime.now(UTC), **more))

    monkeypatch.setattr(events, "emit_event", emit)
    events.checkpoint_probed("/runs/grpo", NUMBERS | changes, flow_run=str(uuid4()))
    return ReceivedEvent.model_validate(made[0].model_dump(mode="json"))


def automations() -> list[dict[str, Any]]:
    blocks = re.findall(r"```yaml\n(name: .*?)```", PAGE.read_text(), re.DOTALL)
    return [yaml.safe_load(block) for block in blocks]


def test_the_automations_of_the_page_are_valid_and_wait_for_this_event(monkeypatch):
    message, stop = automations()
    falling = sent_event(monkeypatch)
    rising = sent_event(monkeypatch, direction="rising")
    for automation in (message, stop):
        AutomationCore.model_validate(automation)  # as `prefect automation create --from-file` does
        trigger = EventTrigger.model_validate(automation["trigger"])
        assert trigger.expects(events.PROBED) and not trigger.expects("prefect.flow-run.Completed")
        assert trigger.covers(falling) and not trigger.covers(rising)
    assert EventTrigger.model_validate(stop["trigger"]).bucketing_key(falling) == ("/runs/grpo",)
    said = [render_user_template_sync(message["actions"][0][name], {"event": falling}) for name in ("subject", "body")]
    assert said == [
        "/runs/grpo: the entropy falls",
        "checkpoint-4: H 1.5, the next step -0.25 (resolved)",
    ]
    run = stop["actions"][0]["parameters"]["run"]
    assert run["__prefect_kind"] == "jinja"
    assert render_user_template_sync(run["template"], {"event": falling}) == "/runs/grpo"


def test_the_page_names_what_the_event_has(monkeypatch):
    event = sent_event(monkeypatch)
    text = PAGE.read_text()
    for name in [*event.payload, *(label for label in event.resource.root if label.startswith("entropy-probe."))]:
        assert f"`{name}`" in text, name


def test_a_sweep_through_prefect_sends_an_event_for_each_checkpoint(monkeypatch):
    rows = [
        row("checkpoint-2", 2, 0.0),
        row("checkpoint-2", 2, 1e-3, delta_h1=-0.5, sign_this_update="negative"),
        row("checkpoint-2", 2, 3e-3, delta_h1=-1.5),
        row("checkpoint-4", 4, 0.0, verdict="reference", sign_this_update="unknown"),
    ]
    assert [(one["checkpoint"], one["delta_h1"], one["direction"]) for one in numbers_of_each(rows)] == [
        ("checkpoint-2", -0.5, "falling"),
        ("checkpoint-4", 0.0, "unknown"),
    ]
    sent: list[Any] = []
    monkeypatch.setattr(ui, "checkpoint_probed", lambda run, numbers, of: sent.append((run, numbers["checkpoint"])))
    report = SimpleNamespace(table=lambda _: SimpleNamespace(to_pylist=lambda: rows))
    ui.announce(SimpleNamespace(report=report), "grpo")
    assert sent == [("grpo", "checkpoint-2"), ("grpo", "checkpoint-4")]


def row(checkpoint: str, step: int, eta: float, **changes: Any) -> dict[str, Any]:
    """Of results.parquet, as far as it is told."""
    base = {"checkpoint": checkpoint, "step": step, "eta": eta, "learning_rate": 1e-3, "eta_over_lr": eta / 1e-3}
    base |= {"normalization": "per_token", "estimator": "snis", "H": 1.0, "delta_h1": 0.0, "delta_h": 0.0}
    base |= {"delta_h_se": 0.1, "ess_fraction": 1.0, "verdict": "resolved", "sign_this_update": "unknown"}
    base |= {"second_order": "none", "next_update_low": None, "next_update_high": None}
    return base | changes
