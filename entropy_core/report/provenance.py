"""Where the numbers of a run come from, written into every report and table of its folder.

The report stage does not know it: equal results are one artifact, whenever and as whatever run they are recorded.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq

from entropy_core.report import html
from entropy_core.report.markdown import markdown_rows

Provenance = Mapping[str, str]
"""What is said, by name: run, rerun_of, date, code, config, and the settings of the statistics and of the batches."""

_LABELS = {
    "run": "run",
    "rerun_of": "a rerun of",
    "date": "recorded at",
    "code": "code",
    "config": "name in the configuration",
    "baseline": "baseline",
    "cluster": "independent units of E",
    "confidence_level": "confidence level",
    "seed_e": "seeds of E",
    "seed_u": "seed of U",
}


def write_stamped(source: Path, target: Path, provenance: Provenance) -> None:
    """Copy a file of a report, with the provenance in it where its format has a place for it.

    Parquet: in the metadata of the schema. Markdown and HTML: a section at the end. CSV: comments at the top. JSON: the
    field `provenance`. A figure is copied as it is.

    Args:
        source: a file that the report stage wrote.
        target: where to write the copy.
        provenance: what is said.
    """
    match source.suffix:
        case ".parquet":
            table = pq.ParquetFile(source).read()
            said = {**(table.schema.metadata or {}), **provenance}
            pq.write_table(table.replace_schema_metadata(said), target)
        case ".md":
            target.write_text(source.read_text(encoding="utf-8") + section(provenance), encoding="utf-8")
        case ".html":
            page = html.with_section(source.read_text(encoding="utf-8"), section(provenance))
            target.write_text(page, encoding="utf-8")
        case ".csv":
            comments = "".join(f"# {name}: {value}\n" for name, value in provenance.items())
            target.write_text(comments + source.read_text(encoding="utf-8"), encoding="utf-8")
        case ".json":
            content = {"provenance": dict(provenance), **json.loads(source.read_text(encoding="utf-8"))}
            target.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        case _:
            shutil.copyfile(source, target)


def section(provenance: Provenance) -> str:
    """Return the section on the provenance, as markdown."""
    body = [(_LABELS[name], f"`{value}`" if value else "–") for name, value in provenance.items()]
    return "\n".join(["", "## Provenance", "", *markdown_rows(("", ""), body, 2), ""])
