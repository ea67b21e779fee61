"""The form of a deployment: ordered by need, without what cannot be changed, which is taken all the same."""

import json
from datetime import UTC, datetime

import jsonschema
import pytest
from prefect.client.schemas.objects import FlowRun, State, StateType

from entropy_core.config.schema import ProbeConfig
from flows import waiting
from flows.form import is_fixed
from flows.serve import deployments

CONFIG = """
name: demo
checkpoints: [nowhere/checkpoint-3]
generation: {top_p: 1.0, do_sample: true, max_new_tokens: 8}
"""


@pytest.fixture
def sweep(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return deployments(path)[0]


def test_what_is_needed_first_comes_first_and_nothing_is_lost(sweep):
    models = sweep._parameter_openapi_schema.definitions
    assert list(models["ProbeConfig"]["properties"])[:4] == ["checkpoints", "batch_config", "generation", "update"]
    assert list(models["ProbeConfig"]["properties"])[-1] == "execution"
    assert next(iter(models["BatchConfig"]["properties"])) == "dataset_name"
    assert list(models["UpdateConfig"]["properties"])[:2] == ["reward", "loss"]

    for name, model in ProbeConfig.model_json_schema()["$defs"].items():
        arranged = models[name]
        hidden = {pattern.strip("^$") for pattern in arranged.get("patternProperties", {})}
        assert {*arranged.get("properties", {}), *hidden} == set(model.get("properties", {})), name


def test_no_field_has_one_possible_value_and_such_a_value_is_taken(sweep):
    schema = sweep._parameter_openapi_schema
    fields = [field for model in schema.definitions.values() for field in model.get("properties", {}).values()]
    assert len(fields) > 60 and not any(map(is_fixed, fields))
    assert sweep.parameters["config"]["generation"]["max_new_tokens"] == 8
    assert not {"top_p", "do_sample"} & set(sweep.parameters["config"]["generation"])
    check = jsonschema.Draft202012Validator(json.loads(schema.model_dump_json()))
    given = {"checkpoints": ["a"], "generation": {"top_p": 1.0, "do_sample": True}}
    assert check.is_valid({"config": given})
    for name, value in (("top_p", 0.9), ("do_sample", False), ("no_such_key", 1)):
        assert not check.is_valid({"config": given | {"generation": {name: value}}})


class Server:
    """What `waiting` asks of one, with three runs of ours."""

    def __init__(self, *types: StateType) -> None:
        due = datetime.now(UTC)
        self.runs = [
            FlowRun(
                flow_id="0" * 32,
                name=f"run {i}",
                tags=["sweep"],
                state=State(type=type, name=type.value.capitalize()),
                next_scheduled_start_time=due,
            )
            for i, type in enumerate(types)
        ]
        self.logs: list = []

    def read_flow_runs(self, flow_run_filter: object) -> list[FlowRun]:
        return self.runs

    def set_flow_run_state(self, id: object, state: State) -> None:
        [run] = [run for run in self.runs if run.id == id]
        run.state = state

    def create_logs(self, logs: list) -> None:
        self.logs += logs


def test_a_run_that_waits_is_told_once_for_what():
    server = Server(StateType.RUNNING, StateType.SCHEDULED)
    for _ in range(2):
        waiting.tell(server, [])
    [log] = server.logs
    assert log.flow_run_id == server.runs[1].id and "“run 0”" in log.message
    assert [run.state.name for run in server.runs] == ["Running", "Queued"]
    assert server.runs[1].state.message == log.message


@pytest.mark.parametrize("types", [(StateType.SCHEDULED, StateType.SCHEDULED), (StateType.RUNNING, StateType.PENDING)])
def test_one_that_is_next_does_not_wait(types):
    server = Server(*types)
    waiting.tell(server, [])
    assert server.logs == [] and [run.state.type for run in server.runs] == list(types)
