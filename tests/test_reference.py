import re
from pathlib import Path

import pytest

from entropy_core.config.reference import PAGES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


@pytest.mark.parametrize("name", PAGES)
def test_reference_pages_are_those_of_the_code(name):
    page = PAGES[name]()
    assert (DOCS / name).read_text(encoding="utf-8") == page, "run python -m entropy_core.config.reference"
    assert "None" not in page and "typing." not in page


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_every_local_link_of_the_documentation_leads_somewhere(page: Path):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing
