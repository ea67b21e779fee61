"""The pages as a whole: links and anchors lead somewhere, all are on the site, no verdict and no term is missing."""

import ast
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
from markdown_it import MarkdownIt

from benchmarks.sizes import sizes_page
from entropy_core.estimates import (
    comparison,
    interventions,
    phase_table,
    post_mortem,
    price_table,
    rehearsal_table,
    trainer_agreement,
)
from entropy_core.estimates.second_order import NONE
from entropy_core.estimates.tables import AGREEMENT, COMPARISON, INTERVENTIONS, RESULTS, TABLES
from entropy_core.numerics import verdicts

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
PARSER = MarkdownIt("commonmark").enable("table")


def inline(page: Path, kind: str) -> list:
    """The inline parts of a page that are of a kind, code excluded."""
    return [
        child
        for token in PARSER.parse(page.read_text(encoding="utf-8"))
        for child in token.children or ()
        if child.type == kind
    ]


def links(page: Path) -> list[str]:
    found = [part.attrs["href"] for part in inline(page, "link_open")]
    return found + [part.attrs["src"] for part in inline(page, "image")]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    tokens = PARSER.parse(page.read_text(encoding="utf-8"))
    titles = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    slugs = [re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles]
    counts: Counter[str] = Counter()
    found = set()
    for slug in slugs:
        found.add(f"{slug}-{counts[slug]}" if counts[slug] else slug)
        counts[slug] += 1
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_every_anchor_leads_somewhere(page):
    for link in links(page):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_linked_by_the_readme_and_is_on_the_site():
    linked = {Path(link.partition("#")[0]).name for link in links(ROOT / "README.md")}
    pages = {page.name for page in DOCS.glob("*.md")}
    assert pages - linked <= {"chaos.md"}  # which the page on validation links
    site = (ROOT / ".ci" / "site" / "mkdocs.yml").read_text(encoding="utf-8")
    assert Counter(re.findall(r"^ *- (?:Overview: )?(\S+\.md)$", site, re.MULTILINE)) == Counter([*pages, "index.md"])


def test_the_sizes_are_those_of_the_formulas():
    assert (DOCS / "sizes.md").read_text(encoding="utf-8") == sizes_page(), "run python -m benchmarks.sizes docs"


# --- which verdict means what ----------------------------------------------------------------------------------------


def verdicts_of(module, function: str) -> set[str]:
    """The strings that a function returns, or calls `verdict`, by its source."""
    [found] = [
        node
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name == function
    ]
    values = []
    for node in ast.walk(found):
        if isinstance(node, ast.Return) or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "verdict"):
            values.append(node.value)
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            values += [value for key, value in pairs if key and ast.unparse(key) == "'verdict'"]
    words = set()
    while values:
        value = values.pop()
        if isinstance(value, ast.IfExp):
            values += [value.body, value.orelse]
        elif isinstance(value, ast.Constant) and isinstance(value.value, str):
            words.add(value.value)
    return words


def explained(page: str) -> dict[str, set[str]]:
    """By heading of a page the words in the first column of its table."""
    sections = re.split(r"^## ", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {
        section.splitlines()[0]: set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)) for section in sections
    }


def test_every_verdict_of_the_code_is_explained_and_none_other():
    words = explained("verdicts.md")
    assert words == {
        "`verdict` in results.parquet": set(get_args(verdicts.Word)),
        "`sign_this_update`, `sign_mean_update`, `sign_next_update`": set(get_args(verdicts.Sign)),
        "`linearity`": set(get_args(verdicts.Linearity)),
        "`above_rounding`": {"true", "false"},
        "`weights_reliable`": {"true", "false"},
        "`second_order`": {"resolved", "unresolved", NONE.partition(":")[0]},
        "`interval_over_e`, `interval_over_u`, `delta_h12_interval_over_u`": {
            "valid",
            "no valid interval over E",
            "no valid interval over U",
        },
        "`verdict` in agreement.parquet": verdicts_of(trainer_agreement, "verdict"),
        "`verdict` in interventions.parquet": verdicts_of(interventions, "_verdict") | {"as it is"},
        "`verdict` in price.parquet": set(get_args(price_table.Word)),
        "`verdict` in phase.parquet": set(get_args(phase_table.Word)),
        "`verdict` in compare.parquet": verdicts_of(comparison, "__call__"),
    }


def test_every_verdict_says_what_to_do():
    rows = re.findall(r"^\| `.+$", (DOCS / "verdicts.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 25 and all(len(re.split(r"(?<!\\)\|", row)) == 5 for row in rows)


# --- the glossary ----------------------------------------------------------------------------------------------------


def test_every_column_is_of_a_term_of_the_glossary():
    """Its name, what it begins with, or what it ends with, is in the column "in columns"."""
    text = (DOCS / "glossary.md").read_text(encoding="utf-8")
    rows = [re.split(r"(?<!\\)\|", line)[2] for line in text.splitlines() if line.startswith("| ") and "`" in line]
    terms = {term for row in rows for term in re.findall(r"`([^`]+)`", row)}
    schemas = [RESULTS, AGREEMENT, INTERVENTIONS, COMPARISON, price_table.PRICE, *TABLES.values()]
    schemas += [phase_table.PHASE, phase_table.CLIPPED, rehearsal_table.REHEARSAL, post_mortem.POST_MORTEM]
    columns = {name for schema in schemas for name in schema.names}
    unknown = {name for name in columns if not any(name == term or name.startswith(f"{term}_") for term in terms)}
    assert unknown == set()
    assert {term for term in terms if not any(name == term or name.startswith(f"{term}_") for name in columns)} == set()


@pytest.mark.parametrize("symbol", ["E", "U", "H", "δH₁", "ΔH", "v", "η", "ESS", "k̂", "MDE"])
def test_the_glossary_has_the_symbols_of_the_report(symbol):
    assert f"\n| {symbol} |" in (DOCS / "glossary.md").read_text(encoding="utf-8")
