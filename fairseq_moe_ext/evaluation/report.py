"""A self-contained HTML page: no script, no file or address outside itself.

Readable at any width, in print, in a light and a dark browser. A page is a template (Jinja2, which
escapes all text) that extends templates/base.html and draws its parts with templates/parts.html.
"""

import functools
from pathlib import Path
from typing import Any, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from .. import files, outputs
from ..errors import UserError

TEMPLATES = Path(__file__).resolve().parent / "templates"
FIGURES = "figures"  # the folder of a page's charts

Text = Union[str, Tuple[str, str]]  # with a class of the style sheet


class Cell(NamedTuple):
    text: str
    css: str = ""


class Row(NamedTuple):
    """A group's heading, if it has no cells."""

    name: str
    note: str  # printed small below the name
    total: bool
    cells: List[Cell]


class Table(NamedTuple):
    columns: Sequence[str]
    rows: List[Row]
    css: str


def table(columns: Sequence[str], rows: Sequence[Sequence[Text]], css: str = "") -> Table:
    """A table of text cells. A row of one cell is a group's heading; a cell may be a
    (text, css class) pair, and a row's first cell with the class "total" marks the row. What
    follows a line break in a first cell is printed small below it.

    Raises ValueError when a row is neither one cell nor as long as the columns.
    """
    body = []
    for row in rows:
        if len(row) not in (1, len(columns)):
            raise ValueError(
                f"a row of {len(row)} cells in a table of {len(columns)} columns: {row}"
            )
        first, *cells = (Cell(*cell) if isinstance(cell, tuple) else Cell(cell) for cell in row)
        name, _, note = first.text.partition("\n")
        body.append(Row(name, note, first.css == "total", cells))
    return Table(columns, body, css)


@functools.cache
def style_sheet() -> str:
    return (TEMPLATES / "style.css").read_text(encoding="utf-8")


def render(template: str, folder: Optional[Path] = None, **values: Any) -> str:
    """A page from a template of ours, or of a folder. Whatever the template names must be there."""
    import jinja2

    folders = [TEMPLATES] if folder is None else [TEMPLATES, folder]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values)


# How a page of ours begins (templates/base.html).
_START = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'


def check_renewable(path: Path) -> None:
    """For a page that its command replaces each time: raise UserError before the work if the page
    cannot be written, or if another program's page is there."""
    outputs.check([("", path)], overwrite=True)
    if path.exists():
        with files.open_binary(path) as file:
            if file.read(len(_START)) != _START.encode():
                raise UserError(f"{path}: is not a page of this command; move it elsewhere")


def check_with_charts(folder: Path) -> None:
    """Raise UserError before the work if `write_with_charts` could not write to the folder, which
    is there."""
    check_renewable(folder / "report.html")
    figures = folder / FIGURES
    if figures.exists() and not figures.is_dir():
        raise UserError(f"{figures}: is not a folder; move it elsewhere")


def write_with_charts(
    folder: Path, html: str, charts: Mapping[str, Any], png: bool = False
) -> None:
    """Write report.html and each figures.Chart as figures/NAME.svg, with `png` also NAME.png.
    Raises UserError before the first if one cannot be written, or if another program's page is
    there."""
    check_with_charts(folder)
    figures = folder / FIGURES
    try:
        figures.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{figures}: cannot be created: {files.reason(error)}") from None
    drawn = [figures / f"{name}{suffix}" for name in charts for suffix in (".svg", ".png")]
    outputs.check([("", path) for path in drawn], overwrite=True)
    for name, chart in charts.items():
        chart.write_svg(figures / f"{name}.svg")
        if png:
            chart.write_png(figures / f"{name}.png")
    outputs.write_text(folder / "report.html", html)
