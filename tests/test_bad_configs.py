"""Bad configurations, by the command line: refused before a run exists. `test_orchestration` posts the form."""

import re
from pathlib import Path

import pytest
import yaml
from bad_configs import BAD, REFUSED, config_of
from pipeline_fixtures import make_run

from entropy_core.config.read import parse_config
from entropy_core.pipeline.preflight import preflight
from flows import service
from flows.cli import main


def test_there_are_forty_two():
    assert len(BAD) == 42


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    make_run(folder / "run")
    return folder


def test_the_configuration_is_good_but_for_the_change(home):
    assert len(preflight(parse_config(config_of(home, {})))) == 1


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_the_command_line_refuses_it_on_one_line(home, bad, tmp_path, monkeypatch, capsys):
    """A sweep reads its file before it starts anything; what other files show, the plan says as a run would."""
    monkeypatch.setattr(service, "service", lambda *_: pytest.fail("Prefect was started"))
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(config_of(home, bad.change)))
    if bad in REFUSED.values():
        assert main(["sweep", str(path)]) == 2
    else:
        assert main(["plan", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(bad.said, line) and line.endswith(".")
    assert not (home / "artifacts").exists()
