"""The report as one HTML page that can be sent to somebody: figures inside, sortable tables, tokens to click through.

It is made of the markdown page, so that the two say the same. It loads nothing: its policy (`Content-Security-Policy`)
forbids a browser to fetch anything, and to run any script but the one that is written here. Names, prompts and tokens
come from a run's files, and are shown as text whatever they hold.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from markdown_it import MarkdownIt

from entropy_core.estimates.selection import Row

MOST_SEQUENCES = 60
"""Responses that the page shows token by token; each token takes about 150 bytes."""

STYLE = """\
:root { --paper: #fff; --ink: #1d2125; --faint: #667; --line: #d5d9de; --band: #f3f5f7; --lowers: 199, 54, 44;
  --raises: 31, 105, 190; }
@media (prefers-color-scheme: dark) { :root { --paper: #16191d; --ink: #e2e5e9; --faint: #9aa3ad; --line: #363c43;
  --band: #1f2429; --lowers: 232, 93, 82; --raises: 84, 152, 235; } img { filter: invert(1) hue-rotate(180deg); } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { margin-top: 2.5rem; font-size: 1.2rem; }
blockquote { margin: 1rem 0; padding: .1rem 1rem; border-left: .3rem solid #d98a00; background: var(--band); }
img { display: block; max-width: 100%; margin: 1rem auto; }
code, .response { font-family: ui-monospace, monospace; font-size: .875em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .8125rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); }
th { background: var(--band); cursor: pointer; }
th[aria-sort=ascending]::after { content: " ↑"; } th[aria-sort=descending]::after { content: " ↓"; }
details { border-bottom: 1px solid var(--line); } summary { padding: .3rem 0; cursor: pointer; }
.response { line-height: 2; overflow-wrap: anywhere; }
.token { padding: .15rem 0; border-radius: .15rem; cursor: pointer;
  background: rgba(var(--lowers), max(0, -1 * var(--share))); }
.token { box-shadow: inset 0 0 0 9rem rgba(var(--raises), max(0, 1 * var(--share))); }
.token[aria-current] { outline: 2px solid var(--ink); }
#figures { position: sticky; top: 0; padding: .4rem .6rem; background: var(--band); font-size: .875rem; }
"""

SCRIPT = """\
"use strict";
const figure = text => {
  const found = text.replace("\u2212", "-").match(/^[^\\w.+-]*([+-]?[0-9.]+(e[+-]?[0-9]+)?)/);
  return found ? Number(found[1]) : NaN;
};
const compare = (one, other, sign) => {
  const [a, b] = [figure(one), figure(other)];
  if (Number.isNaN(a) && Number.isNaN(b)) return sign * one.localeCompare(other, "en", {numeric: true});
  return Number.isNaN(a) ? 1 : Number.isNaN(b) ? -1 : sign * (a - b);
};
for (const head of document.querySelectorAll("th")) {
  head.tabIndex = 0;
  const sort = () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = head.closest("table").tBodies[0], text = row => row.cells[head.cellIndex].textContent;
    body.append(...[...body.rows].sort((a, b) => compare(text(a), text(b), down ? -1 : 1)));
  };
  head.addEventListener("click", sort);
  head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
}
const choose = token => {
  for (const other of document.querySelectorAll("[aria-current]")) other.removeAttribute("aria-current");
  token.setAttribute("aria-current", "true");
  document.getElementById("figures").textContent = token.dataset.figures;
};
for (const token of document.querySelectorAll(".token[data-figures]")) {
  token.addEventListener("click", () => choose(token));
  token.addEventListener("keydown", event => { if (event.key === "Enter") choose(token); });
}
"""


def html(title: str, markdown: str, figures: Mapping[str, bytes], responses: str = "") -> str:
    """Make a page of a report.

    Args:
        title: title of the page, as text.
        markdown: the report. Of its images those in `figures` are shown; links and HTML in it are text.
        figures: SVG files, by the name that the markdown has for them, without its suffix.
        responses: HTML of the responses, from `responses`; it goes to the end.

    Returns:
        HTML that needs no other file.
    """
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}</style></head>\n"
        f"<body>\n<main>\n{_rendered(markdown, figures)}{responses}</main>\n<script>{SCRIPT}</script>\n</body></html>\n"
    )


def with_section(page: str, markdown: str) -> str:
    """Add a section to the end of a page that `html` made. Text of a run cannot end the page: it is escaped there."""
    before, end, after = page.rpartition("</main>")
    return f"{before}{_rendered(markdown, {})}{end}{after}"


def _rendered(markdown: str, figures: Mapping[str, bytes]) -> str:
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "autolink"])

    def image(renderer: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
        alternative = escape(tokens[index].content)
        name = str(tokens[index].attrs["src"]).rsplit(".", 1)[0]
        if name not in figures:
            return alternative
        data = base64.b64encode(figures[name]).decode()
        return f'<img alt="{alternative}" src="data:image/svg+xml;base64,{data}">'

    parser.add_render_rule("image", image)
    rendered: str = parser.render(markdown)
    return rendered.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")


def responses(checkpoint: str, tokens: Sequence[Row], sequences: Sequence[Row], share: str, unit: str) -> str:
    """Show the responses of U that move the entropy most, each token coloured by its share.

    Args:
        checkpoint: whose.
        tokens: rows of `tokens.parquet` of first-order-u, in order.
        sequences: rows of `sequences.parquet` of first-order-u.
        share: the column that holds a token's share.
        unit: of the share.

    Returns:
        HTML: a heading, what is shown, and a folded block per response, the one with the largest sum of |share| first.
    """
    by_sequence: dict[int, list[Row]] = {row["sequence_id"]: [] for row in sequences}
    for token in tokens:
        by_sequence[token["sequence_id"]].append(token)
    weight = {which: sum(abs(token[share]) for token in whole) for which, whole in by_sequence.items()}
    shown = sorted(sequences, key=lambda row: -weight[row["sequence_id"]])[:MOST_SEQUENCES]
    largest = max((abs(token[share]) for token in tokens), default=0.0) or 1.0
    blocks = [_response(row, by_sequence[row["sequence_id"]], share, largest) for row in shown]
    return (
        f"<h2>Responses of U, token by token</h2>\n<p>{len(shown)} of {len(sequences)} responses of "
        f"{escape(checkpoint)}, those with the largest shares first. Open one, and click a token for its figures. "
        f"A share is what a token contributes to δH₁/η, in {escape(unit)}: "
        '<span class="token" style="--share:-.7">red</span> lowers the entropy, '
        '<span class="token" style="--share:.7">blue</span> raises it.</p>\n'
        f'<p id="figures" role="status">No token chosen.</p>\n{"".join(blocks)}'
    )


def _response(sequence: Row, tokens: Sequence[Row], share: str, largest: float) -> str:
    reward = "no reward" if sequence["reward"] is None else f"reward {sequence['reward']:g}"
    total = sum(token[share] for token in tokens)
    spans = "".join(
        f'<span class="token" tabindex="0" style="--share:{token[share] / largest:.3f}" '
        f'data-figures="{escape(_figures(token, share))}">{escape(_visible(token["text"]))}</span>'
        for token in tokens
    )
    return (
        f"<details><summary><code>{escape(_visible(sequence['prompt'][-120:]))}</code> "
        f"{reward}, advantage {sequence['advantage']:+.3g}, share {total:+.3g}</summary>\n"
        f'<p class="response">{spans}</p></details>\n'
    )


def _figures(token: Row, share: str) -> str:
    columns = {"share": share, "sensitivity": share.replace("share", "sensitivity", 1), "coefficient": "coefficient"}
    said = ", ".join(f"{name} {token[column]:+.4g}" for name, column in columns.items())
    return f"{_visible(token['text'])!r}, token {token['position'] + 1}: {said}"


def _visible(text: str) -> str:
    text = text.replace("\n", "↵").replace("\t", "→").replace("\r", "") or "∅"
    return "".join(character if character.isprintable() else "·" for character in text)
