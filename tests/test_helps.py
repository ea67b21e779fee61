"""Every `--help`, and every command that a page names in passing: it is one that there is, with options that it has.

The commands of the pages' code blocks are run, in test_documented_commands.py.
"""

import argparse
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = (
    "benchmarks",
    "benchmarks.device",
    "benchmarks.sizes",
    "entropy_core.config.reference",
    "entropy_core.demo",
    "entropy_core.demo.smollm2",
    "oracle",
)
"""What is run as `python -m`, by the Makefile or by a reader."""


def commands(parser: argparse.ArgumentParser, names: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The names of every command and of every command within one."""
    yield names
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from commands(inner, (*names, name))


@pytest.mark.parametrize("names", list(commands(cli._parser())), ids=" ".join)
def test_every_command_has_a_help_that_says_what_each_option_is(names, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main([*names, "--help"])
    said = capsys.readouterr().out
    assert said.startswith(f"usage: {' '.join(('entropy-probe', *names))} ")
    parser = cli._parser()
    for name in names:
        [within] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        parser = within.choices[name]
    assert all(action.help or isinstance(action, argparse._SubParsersAction) for action in parser._actions)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_that_is_run_has_a_help(module, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["python", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* found in sys.modules after import of package", RuntimeWarning)
        runpy.run_module(module, run_name="__main__", alter_sys=False)
    assert "usage:" in capsys.readouterr().out


def test_no_other_module_of_the_makefile_is_run():
    run = re.findall(r"python -m ([\w.]+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert {name for name in run if name.partition(".")[0] in ("entropy_core", "benchmarks", "flows")} <= set(MODULES)


def named_in_passing(program: str) -> Iterator[tuple[str, str]]:
    """Commands of a program in the code spans and blocks of the pages, with the page."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        spans = [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose)]
        for line in [*(line for block in blocks for line in block.splitlines()), *spans]:
            for part in re.split(r"&&|;|\||>", line.partition("  #")[0]):
                if part.strip().startswith(f"{program} "):
                    yield page.name, part.strip().removeprefix(f"{program} ")


@pytest.mark.parametrize(("page", "command"), sorted(set(named_in_passing("entropy-probe"))), ids=": ".join)
def test_every_command_that_a_page_names_can_be_given(page, command, capsys):
    """Its options are parsed and nothing is run. `…` and brackets stand for what a reader puts there."""
    words = shlex.split(re.sub(r" (?:…|\.\.\.|\[.*\])", "", command))
    if words in (["--help"], ["--version"]):
        return
    try:
        cli._parser().parse_args(words)
    except SystemExit:
        said = capsys.readouterr().err
        assert "the following arguments are required" in said, said  # the name of a command alone


def test_every_target_of_make_that_a_page_names_is_there_and_has_its_help():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    [first, second] = [set(line.split()[1:]) for line in re.findall(r"^\.PHONY: .*", makefile, re.MULTILINE)]
    named = {command.split()[0] for _, command in named_in_passing("make")}
    assert first == second and named <= first, named - first
    helped = set(re.findall(r'@echo "make ([\w-]+)', makefile))
    assert helped == first - {"help"}
