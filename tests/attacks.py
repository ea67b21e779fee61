"""`make chaos`: what an attacker or an accident was let do, a row for each in docs/chaos.md.

    @pytest.mark.attack("who tries what")
    def test_it_gets_nothing(): ...

Every case of such a test is one try, unless it records how many it made: `record_property("tries", 50)`. They are part
of `make test` and `make test-whole` where they take seconds; the page is written when all of them are asked for, by
`make chaos`.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from proofs import table

PAGE = Path("docs/chaos.md")
TITLE = "# What an attack gets"
ABOUT = (
    "Written by `make chaos`: each row was tried as an attacker or an accident would, on this machine and in folders\n"
    "of its own. Held means that nothing ran, nothing was lost and nothing stale was served."
)

FOUND = pytest.StashKey[dict[str, Counter]]()


def in_place(page: str, section: str) -> str:
    """The page with the section of that title replaced, or put at its end."""
    sections = {
        part.partition("\n")[0]: part.strip() for part in re.split(r"^(?=# )", page, flags=re.MULTILINE) if part
    }
    sections[section.partition("\n")[0]] = section.strip()
    return "\n\n".join(sections.values()) + "\n"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    if (marker := item.get_closest_marker("attack")) and (call.when == "call" or not report.passed):
        report.user_properties.append(("attack", marker.args[0]))
    return report


def pytest_configure(config: pytest.Config) -> None:
    found = config.stash.setdefault(FOUND, {})

    class Counts:
        """Where reports arrive: from this process, or from those that run the tests for it."""

        @staticmethod
        def pytest_runtest_logreport(report: pytest.TestReport) -> None:
            properties = dict(report.user_properties)
            if "attack" in properties:
                found.setdefault(properties["attack"], Counter())[report.outcome] += properties.get("tries", 1)

    config.pluginmanager.register(Counts())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Write the section, if every attack was asked for."""
    found = config.stash[FOUND]
    part = config.option.markexpr != "attack" or config.option.keyword or config.args_source == config.ArgsSource.ARGS
    part = part or "whole" in config.getini("norecursedirs")
    if not found or part:
        return
    rows = [(what, str(tries["passed"] + tries["failed"]), outcome(tries)) for what, tries in sorted(found.items())]
    section = "\n".join([TITLE, "", ABOUT, "", *table(("tried", "times", "outcome"), rows)])
    page = config.rootpath / PAGE
    page.write_text(in_place(page.read_text(encoding="utf-8"), section), encoding="utf-8")
    failed = sum(tries["failed"] for tries in found.values())
    terminalreporter.write_line(f"{PAGE} is written: {len(rows)} attacks, {failed} failed")


def outcome(tries: Counter) -> str:
    """In a word."""
    if tries["failed"]:
        return f"**{tries['failed']} FAILED**"
    return "held" if tries["passed"] else "not tried on this machine"
