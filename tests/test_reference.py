from pathlib import Path

import pytest

from entropy_core.config.reference import PAGES

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.parametrize("name", PAGES)
def test_reference_pages_are_those_of_the_code(name):
    page = PAGES[name]()
    assert (DOCS / name).read_text(encoding="utf-8") == page, "run python -m entropy_core.config.reference"
    assert "None" not in page and "typing." not in page
