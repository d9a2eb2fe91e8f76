"""A self-contained HTML page: no script, no file or address outside itself.

Readable at any width, in print, in a light and a dark browser. The pieces are functions from text
and numbers to HTML strings; whoever writes a report puts them together and calls `page`. Text is
escaped here, except where an argument is called `html`.
"""

from html import escape
from pathlib import Path
from typing import List, Sequence, Tuple

from .. import files, outputs
from ..errors import UserError

# Series colours: blue and vermilion (and two more) of Okabe and Ito's palette, which stay apart
# for the colour-blind; lighter ones of the same palette on dark.
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2430; --soft: #5a6472; --rule: #d9dde3;
  --panel: #f5f7f9; --good: #00563f; --bad: #8a3200; --heat: #0b4f8a; --onheat: #fff;
  --s0: #0072b2; --s1: #d55e00; --s2: #007a5a; --s3: #a3588a; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e8ecf1; --soft: #a4afbc;
  --rule: #343c46; --panel: #1c2229; --good: #5fd3a8; --bad: #f0a070; --heat: #9fd0f5;
  --onheat: #0d1115; --s0: #56b4e9; --s1: #f0a030; --s2: #2bc79a; --s3: #d99cc3; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 16px 56px; }
h1 { font-size: clamp(1.5rem, 1.1rem + 2vw, 2.2rem); line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; line-height: 1.3; }
p, ul { max-width: 72ch; margin: .5rem 0 .8rem; }
ul { padding-left: 1.2rem; } li { margin: .25rem 0; }
.lead { font-size: 1.12rem; line-height: 1.5; } .soft, figcaption { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px;
  margin: 1.2rem 0; }
.cards > div { background: var(--panel); border: 1px solid var(--rule); border-radius: 8px;
  padding: 10px 14px; }
.cards b { display: block; font-size: 1.55rem; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.cards span { color: var(--soft); font-size: .86rem; line-height: 1.35; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%;
  font-variant-numeric: tabular-nums; font-size: .95rem; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--rule); text-align: right;
  vertical-align: top; } th:first-child, td:first-child { text-align: left; padding-left: 2px; }
td, thead th { white-space: nowrap; }
table.words td, table.words th { text-align: left; white-space: normal; }
thead th { border-bottom: 2px solid var(--soft); font-weight: 600; }
tbody th { font-weight: 400; min-width: 7em; }
tbody tr:not(.group) th { position: sticky; left: 0; background: var(--paper); }
tr.group th { font-weight: 600; padding-top: 1rem; text-align: left;
  color: var(--soft); font-size: .86rem; } tr.total > * { font-weight: 650; }
.good { color: var(--good); } .bad { color: var(--bad); }
.pair { display: grid; gap: 0 48px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
td small, th small { display: block; color: var(--soft); font-weight: 400; }
figure { margin: 1.2rem 0 0; }
figcaption { font-size: .9rem; max-width: 72ch; margin: .2rem 0 .9rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr));
  gap: 18px 22px; }
.legend { margin: .2rem 0 .8rem; } .legend span { margin-right: 1.4rem; white-space: nowrap; }
.legend svg { vertical-align: middle; overflow: visible; }
.chart { width: 100%; height: auto; max-width: 420px; display: block; font-size: 12.5px; }
.chart text { fill: var(--ink); } .chart .t { font-weight: 650; font-size: 14px; }
.chart .e { text-anchor: end; } .chart .c { text-anchor: middle; } .chart .a { fill: var(--soft); }
.chart .i { fill: var(--onheat); } .g { stroke: var(--rule); } .z, .k { stroke: var(--soft); }
.z { stroke-width: 1.5; } .h { fill: var(--heat); } .l { fill: none; stroke-width: 2.2; }
.m { stroke: var(--paper); stroke-width: 1; }
.l.s0 { stroke: var(--s0); } .l.s1 { stroke: var(--s1); } .l.s2 { stroke: var(--s2); }
.l.s3 { stroke: var(--s3); } .m.s0 { fill: var(--s0); } .m.s1 { fill: var(--s1); }
.m.s2 { fill: var(--s2); } .m.s3 { fill: var(--s3); }
pre { background: var(--panel); border: 1px solid var(--rule); border-radius: 8px; padding: 12px;
  white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, monospace; }
summary { cursor: pointer; font-weight: 600; margin: .6rem 0; }
@media (max-width: 520px) { body { font-size: 15px; } th, td { padding: 6px 5px;
  font-size: .88rem; }
  .cards { grid-template-columns: 1fr 1fr; } .cards b { font-size: 1.3rem; } }
@media print { :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444;
  --rule: #bbb; --panel: #fff; --good: #00563f; --bad: #8a3200; --heat: #0b4f8a; --onheat: #fff;
  --s0: #0072b2; --s1: #d55e00; --s2: #007a5a; --s3: #a3588a; }
  body { print-color-adjust: exact; -webkit-print-color-adjust: exact; font-size: 10.5pt; }
  main { max-width: none; padding: 0; } h2 { break-after: avoid; }
  table, .chart, .cards > div, figcaption { break-inside: avoid; }
  .grid { grid-template-columns: repeat(2, 1fr); }
  .scroll { overflow: visible; } table { font-size: .72rem; }
  th, td { padding: 3px 4px; }
  details::details-content { content-visibility: visible; } }
"""


def paragraph(text: str, css: str = "") -> str:
    return f'<p class="{css}">{escape(text)}</p>' if css else f"<p>{escape(text)}</p>"


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def bullets(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def cards(items: Sequence[Tuple[str, str]]) -> str:
    """A row of (figure, what it is), wrapping on narrow screens."""
    boxes = "".join(f"<div><b>{escape(a)}</b><span>{escape(b)}</span></div>" for a, b in items)
    return f'<div class="cards">{boxes}</div>'


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], css: str = "") -> str:
    """A table of text cells. A row of one cell is a group's heading; a cell may be a
    (text, css class) pair, and a row's first cell with the class "total" marks the row. What
    follows a line break in a first cell is printed small below it.

    Raises ValueError when a row is neither one cell nor as long as the columns.
    """
    out: List[str] = []
    for row in rows:
        if len(row) == 1:
            out.append(
                f'<tr class="group"><th colspan="{len(columns)}" scope="rowgroup">'
                f"{escape(row[0])}</th></tr>"
            )
            continue
        if len(row) != len(columns):
            raise ValueError(
                f"a row of {len(row)} cells in a table of {len(columns)} columns: {row}"
            )
        cells = [cell if isinstance(cell, tuple) else (cell, "") for cell in row]
        marked = ' class="total"' if cells[0][1] == "total" else ""
        name, _, note = cells[0][0].partition("\n")
        note = f"<small>{escape(note)}</small>" if note else ""
        out.append(f'<tr{marked}><th scope="row">{escape(name)}{note}</th>')
        for text, style in cells[1:]:
            out.append(
                f'<td class="{style}">{escape(text)}</td>' if style else f"<td>{escape(text)}</td>"
            )
        out.append("</tr>")
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    return (
        f'<div class="scroll"><table class="{css}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(out)}</tbody></table></div>"
    )


def grid(charts_html: Sequence[str], caption: str, legend_html: str = "") -> str:
    """Charts side by side where there is room, below each other where there is not."""
    return (
        f"<figure><figcaption>{escape(caption)}</figcaption>{legend_html}"
        f'<div class="grid">{"".join(charts_html)}</div></figure>'
    )


def pair(left_html: str, right_html: str) -> str:
    """Two parts side by side where there is room."""
    return f'<div class="pair"><div>{left_html}</div><div>{right_html}</div></div>'


def folded(title: str, html: str) -> str:
    """A part that opens on a click."""
    return f"<details><summary>{escape(title)}</summary>{html}</details>"


def code(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


_START = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
)


def page(title: str, parts_html: Sequence[str]) -> str:
    """The whole document."""
    return (
        f"{_START}<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(parts_html) + "\n</main></body></html>\n"
    )


def check_renewable(path: Path) -> None:
    """For a page that its command makes anew each time: raise UserError before the work if it
    cannot be written, or another's page is there."""
    outputs.check([("", path)], overwrite=True)
    if path.exists():
        with files.open_binary(path) as file:
            if file.read(len(_START)) != _START.encode():
                raise UserError(f"{path}: is not a page of this command; move it elsewhere")


def write(path: Path, html: str) -> None:
    """Write the page, whole or not at all."""
    outputs.write_text(path, html)
