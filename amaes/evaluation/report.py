"""One page of HTML with the tables and pictures of an evaluation: it needs no other file, no script and no network."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from amaes.evaluation.tables import markdown_table

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; border-bottom: 1px solid #ccc; overflow-wrap: anywhere; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: left; } th { border-bottom: 2px solid #888; }
.wide { overflow-x: auto; } img { max-width: 100%; } figure { margin: 1em 0; } summary { cursor: pointer; }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # a browser loads nothing from elsewhere


def report_html(
    title: str, text: str, folds: Sequence[Mapping], names: Mapping[str, str], pictures: Mapping[str, Path] | None
) -> str:
    """The page.

    Args:
        title: of the page.
        text: Markdown of the summary, as `tables` writes it.
        folds: each with "fold" and "cases"; every case becomes a row.
        names: class number (as text) to name.
        pictures: caption to PNG file; None: there is nothing to draw.
    """
    figures = ""
    if pictures is not None:
        none = "<p>None: they need a working matplotlib (pip install 'amaes[plots]', then evaluate again).</p>"
        shown = "".join(_figure(caption, path) for caption, path in pictures.items())
        figures = f"<h2>Pictures</h2>\n{shown or none}\n"
    cases = f"<details><summary>Dice of every case, worst first</summary>{markdown_to_html(_case_table(folds, names))}"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><style>{STYLE}</style></head>\n'
        f"<body><h1>{html.escape(title)}</h1>\n{markdown_to_html(text)}\n{figures}"
        f"<h2>Cases</h2>\n{cases}</details>\n</body></html>\n"
    )


def _figure(caption: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(caption)
    return f'<figure><figcaption>{text}</figcaption><img alt="{text}" src="data:image/png;base64,{data}"></figure>\n'


def _case_table(folds: Sequence[Mapping], names: Mapping[str, str]) -> str:
    """Markdown: Dice of every case and class, the lowest mean first."""
    rows = []
    for fold in folds:
        for case in fold["cases"]:
            of_class = {name: row["dice"] for name, row in case["classes"].items() if name != "all"}
            defined = [value for value in of_class.values() if not math.isnan(value)]
            mean = sum(defined) / len(defined) if defined else math.nan
            rows.append((mean, fold["fold"], case["id"], case["subject"], of_class))
    classes = list(dict.fromkeys(name for row in rows for name in row[4]))
    rows.sort(key=lambda row: (math.isnan(row[0]), row[0]))
    cells = [
        [fold, case, subject, *(_percent(of_class.get(name, math.nan)) for name in classes), _percent(mean)]
        for mean, fold, case, subject, of_class in rows
    ]
    heads = ["fold", "case", "subject", *(names.get(name, name) for name in classes), "mean"]
    return markdown_table(heads, cells)


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.2f}"


def markdown_to_html(text: str) -> str:
    """The Markdown that our tables are written in: headings, tables, lists, paragraphs, bold; all else as it is."""
    return "\n".join(_block(block.splitlines()) for block in re.split(r"\n\s*\n", text.strip()) if block.strip())


def _block(lines: list[str]) -> str:
    if lines[0].startswith("## "):
        return f"<h2>{_inline(lines[0][3:])}</h2>"
    if lines[0].startswith("|"):
        head, _, *rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines]
        cells = [f"<th>{_inline(cell)}</th>" for cell in head]
        body = ["<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in rows]
        return f'<div class="wide"><table><tr>{"".join(cells)}</tr>\n' + "\n".join(body) + "</table></div>"
    item = re.compile(r"(?:-|\d+\.) ")
    items = [f"<li>{_inline(item.sub('', line, count=1))}</li>" for line in lines if item.match(line)]
    words = [_inline(line) for line in lines if not item.match(line)]  # a list may follow its first line at once
    return ("<p>" + "\n".join(words) + "</p>" if words else "") + ("<ul>" + "".join(items) + "</ul>" if items else "")


def _inline(text: str) -> str:
    """Bold and escaped characters; what looks like HTML is shown as it is."""
    made, bold = [], False
    for part in re.split(r"(\\[\\`\[\]]|\*\*)", text):
        if part == "**":
            bold = not bold
            made.append("<b>" if bold else "</b>")
        else:
            made.append(html.escape(html.unescape(part.removeprefix("\\") if len(part) == 2 else part)))
    return "".join(made) + ("</b>" if bold else "")
