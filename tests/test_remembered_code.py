"""What was found of the code of a stage outlives the process, as long as nothing that was read for it has changed."""

import json
import os
from pathlib import Path

import pytest

from entropy_core.code import identity, remembered
from entropy_core.pipeline.final_stages import AGREEMENT

NAME = "entropy_core.stages.agreement:agreement"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(identity, "_known", {})
    return tmp_path / "entropy-probe" / "code"


@pytest.fixture
def walks(monkeypatch) -> list[str]:
    """The functions whose code was walked through."""
    found: list[str] = []
    walk = identity.walk

    def counting(sources, module, function):
        found.append(f"{module}:{function}")
        return walk(sources, module, function)

    monkeypatch.setattr(identity, "walk", counting)
    return found


def as_in_another_process() -> identity.Code:
    identity._known.clear()
    return identity.code_of(AGREEMENT.function)


def test_a_later_process_finds_the_same_without_looking(cache, walks):
    first = as_in_another_process()
    assert as_in_another_process() == first == as_in_another_process()
    assert walks == [NAME]
    (file,) = cache.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("module", ["entropy_core.numerics.verdicts", "entropy_core.stages.agreement"])
def test_a_changed_module_is_looked_through_again(cache, walks, monkeypatch, module):
    first = as_in_another_process()
    source = identity._source

    def edited(name: str):
        found = source(name)
        return found._replace(content=found.content + b"\nEDITED = 1\n") if name == module else found

    read, _ = remembered.recall(NAME, identity._fingerprint)
    assert ("entropy_core.stages.agreement" in read) and ("torch" not in read)
    monkeypatch.setattr(identity, "_source", edited)
    again = as_in_another_process()
    assert len(walks) == (2 if module in read else 1)
    assert again == first, "nothing that it reaches has changed"


def test_a_module_that_there_was_not_is_noticed(cache):
    remembered.remember("a:b", {"a": "1", "a.c": ""}, {"digest": "x"})
    assert remembered.recall("a:b", {"a": "1", "a.c": ""}.__getitem__) == ({"a": "1", "a.c": ""}, {"digest": "x"})
    assert remembered.recall("a:b", {"a": "1", "a.c": "2"}.__getitem__) is None
    assert remembered.recall("a:other", str) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(file.read_bytes().replace(b"digest", b"digost", 1)),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(b"\xff\n[]"),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_text(json.dumps([{}, {}])),
        lambda file: file.chmod(0o666),
        lambda file: file.parent.chmod(0o777),
        lambda file: (file.rename(file.with_name("elsewhere")), file.symlink_to("elsewhere")),
    ],
)
def test_what_is_not_as_it_was_written_is_not_believed(cache, walks, spoil):
    first = as_in_another_process()
    spoil(next(cache.iterdir()))
    assert as_in_another_process() == first
    assert walks == [NAME, NAME]


def test_another_python_or_another_way_to_find_code_begins_anew(cache, walks, monkeypatch):
    as_in_another_process()
    monkeypatch.setattr(remembered, "_FINDER", "another")
    as_in_another_process()
    monkeypatch.setattr(remembered.sys, "version", "3.99")
    as_in_another_process()
    assert walks == [NAME] * 3


def test_without_a_folder_for_it_everything_works(cache, walks, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull + "/nowhere")
    assert as_in_another_process() == as_in_another_process()
    assert walks == [NAME, NAME]
