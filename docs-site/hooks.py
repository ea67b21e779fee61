"""What the site's generator is told beside `mkdocs.yml`: its first page is the README, and it asks no other host."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
_FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]+src=["']?(?:https?:)?//|<link[^>]+rel=["']?(?:stylesheet|preload|icon|preconnect)"""
    r"""["']?[^>]+href=["']?(?:https?:)?//|@import\s+(?:url\()?["']?(?:https?:)?//|url\(["']?(?:https?:)?//"""
)
"""What makes a browser fetch something from another host by itself; a link that a reader follows does not."""


def on_files(files: Files, config: Any) -> Files:
    """Put the README in front of the pages."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=re.sub(r"\]\(docs/", "](", readme)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Make a link to a file of the source, which is not on the site, the name of the file."""

    def target(link: re.Match[str]) -> str:
        path = link[2].partition("#")[0]
        folder = ROOT if page.file.src_uri == "index.md" else ROOT / "docs"
        of_source = "://" not in path and path and files.get_file_from_path(path) is None and (folder / path).exists()
        return link[1] if of_source else link[0]

    return re.sub(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", target, markdown)


def on_post_build(config: Any) -> None:
    """Fail if a page would fetch something from another host."""
    for path in sorted(Path(config["site_dir"]).rglob("*")):
        if path.suffix in (".html", ".css") and (found := _FETCHED.search(path.read_text(encoding="utf-8"))):
            raise PluginError(f"{path} fetches from another host: {found[0][:200]}")
