"""Tables as files: for programs (CSV, Parquet), for a repository (Markdown), for a paper (LaTeX)."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

try:
    import pyarrow as pa
    from pyarrow import csv, parquet
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"reports need {error.name}: pip install 'attend-excite[benchmark]' or 'attend-excite[study]'"
    ) from error

# A spreadsheet takes a cell that begins so for a formula, and runs it.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")

_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "\N{MINUS SIGN}": "$-$",
    "→": r"$\rightarrow$",
    "×": r"$\times$",
    "–": "--",
    "“": "``",
    "”": "''",
}


@dataclass(frozen=True)
class Cell:
    """Of a table: what it says, what it says in small, and whether it is the best of its column."""

    text: str
    small: str = ""
    best: bool = False


def csv_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows with the same columns as CSV. What a spreadsheet would run gets an apostrophe before it."""
    buffer = io.BytesIO()
    csv.write_csv(_table([{key: harmless(value) for key, value in row.items()} for row in rows]), buffer)
    return buffer.getvalue()


def harmless(value: Any) -> Any:
    """A value of a CSV that no spreadsheet takes for a formula; numbers stay what they are."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def parquet_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The same as Parquet, with every text as it is."""
    buffer = io.BytesIO()
    parquet.write_table(_table(rows), buffer)
    return buffer.getvalue()


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    table = pa.Table.from_pylist(list(rows))
    # Only numbers can be absent, and a column of nothing else has no type.
    typed = [
        column.with_type(pa.float64()) if column.type == pa.null() else column for column in table.schema
    ]
    return table.cast(pa.schema(typed))


def markdown(text: str) -> str:
    """Anyone's text for Markdown: it stays text, in a table too, and is no HTML, link or emphasis."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # An underline within a word means nothing there.
    return re.sub(r"[\\`*\[\]|]|(?<!\w)_|_(?!\w)", lambda found: f"\\{found[0]}", text)


def latex(columns: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str, label: str) -> str:
    """A table for a paper, which needs the package booktabs. The first column names the rows.

    Args:
        columns: their heads.
        rows: of as many cells.
        caption: what it shows.
        label: by which the paper speaks of it, without "tab:".
    """
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{_escaped(caption)}}}",
        rf"  \label{{tab:{label}}}",
        rf"  \begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}",
        r"    \toprule",
    ]
    if any(columns):
        lines += [f"    {' & '.join(map(_escaped, columns))} \\\\", r"    \midrule"]
    for row in rows:
        lines.append(f"    {' & '.join(map(_latex_cell, row))} \\\\")
        # Below and not beside: a page is narrow.
        if any(cell.small for cell in row):
            small = (rf"{{\scriptsize {_escaped(cell.small)}}}" if cell.small else "" for cell in row)
            lines.append(f"    {' & '.join(small)} \\\\")
    return "\n".join([*lines, r"    \bottomrule", r"  \end{tabular}", r"\end{table}", ""])


def _latex_cell(cell: Cell) -> str:
    return rf"\textbf{{{_escaped(cell.text)}}}" if cell.best else _escaped(cell.text)


def _escaped(text: str) -> str:
    printable = "".join(sign for sign in " ".join(text.split()) if sign.isprintable())
    return "".join(_LATEX.get(sign, sign) for sign in printable).replace(" \\%", r"\,\%")
