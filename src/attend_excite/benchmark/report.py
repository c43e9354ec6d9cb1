"""The report on a run: one page with the paper's tables and figures, and every number beside it."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
from pyarrow import csv, parquet

from attend_excite.benchmark import numbers, store
from attend_excite.benchmark.blocks import Plot, Sheet
from attend_excite.benchmark.comparison import Comparison
from attend_excite.benchmark.results import Results, read_results
from attend_excite.benchmark.sections import comparisons_of, sections_of, summary_of, title_of

# Pictures are named after their jobs, the others after what they show.
_OURS = re.compile(
    r"pictures/[0-9a-f]{16}\.webp"
    r"|figures/(pairs|presence|detector|similarity|reweighting|separation)\.(svg|png)"
    r"|numbers/(averages|prompts|images|cost|findings|agreement|bounds|study|beside)\.(csv|parquet)"
)


def write_report(
    run: str | Path,
    out: str | Path,
    *,
    other: str | Path | None = None,
    study: Path | None = None,
) -> None:
    """Write `report.md`, `report.html` (of one piece), `figures/`, `pictures/` and `numbers/`.

    What only an earlier report in the folder had is removed.

    Args:
        run: the run's folder, or its URL.
        out: the report's folder, or its URL.
        other: another run to set beside it.
        study: the result of a user study, as `attend-excite study analyse` writes it.

    Raises:
        ValueError: there is no run, it has no images or scores, or the study's result cannot be read or is of
            other images.
    """
    results = read_results(run)
    if not results.measures:
        raise ValueError(f"the images of '{run}' have no scores yet: run attend-excite benchmark score")
    votes = None if study is None else _read_study(study, results)
    others = None if other is None else read_results(other)
    comparisons = comparisons_of(results)
    sections = [
        section for section in sections_of(results, comparisons, votes, others) if section is not None
    ]
    page = {
        "title": title_of(results),
        "summary": summary_of(results, comparisons["systems"]),
        "sections": sections,
    }

    target, root = store.open_folder(out)
    written = set()
    for path, content in _files(page, results, comparisons, votes, others):
        store.write_file(target, f"{root}/{path}", content)
        written.add(path)
    for folder in ("pictures", "figures", "numbers"):
        for path in cast(list[str], target.glob(f"{root}/{folder}/*")):
            name = f"{folder}/{path.rpartition('/')[2]}"
            if _OURS.fullmatch(name) and name not in written:
                target.rm_file(path)


def _files(
    page: Mapping[str, Any],
    results: Results,
    comparisons: Mapping[str, Comparison],
    votes: Mapping[str, Any] | None,
    others: Results | None,
) -> Iterator[tuple[str, bytes]]:
    for section in page["sections"]:
        for block in section.blocks:
            if isinstance(block, Plot):
                yield f"figures/{block.name}.svg", block.drawn.svg.encode()
                yield f"figures/{block.name}.png", block.drawn.png
            elif isinstance(block, Sheet):
                for thumbnail in (shown for _, row in block.rows for shown in row if shown):
                    yield f"pictures/{thumbnail.name}.webp", thumbnail.webp
    for name, rows in numbers.tables(results, comparisons, votes, others).items():
        table = pa.Table.from_pylist(rows)
        text, binary = io.BytesIO(), io.BytesIO()
        csv.write_csv(table, text)
        parquet.write_table(table, binary)
        yield f"numbers/{name}.csv", text.getvalue()
        yield f"numbers/{name}.parquet", binary.getvalue()
    for name in ("report.md", "report.html"):
        yield name, _template(f"{name}.j2").render(page).encode()


@cache
def _template(name: str) -> Any:
    try:
        from jinja2 import Environment, StrictUndefined
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the report needs jinja2: pip install 'attend-excite[benchmark]'"
        ) from error

    environment = Environment(
        autoescape=name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = files("attend_excite").joinpath("data", name).read_text(encoding="utf-8")
    return environment.from_string(text)


def _read_study(path: Path, results: Results) -> dict[str, Any]:
    try:
        votes = json.loads(path.read_text(encoding="utf-8"))
        whole = {"subsets", "respondents", "excluded", "simulated"} <= votes.keys()
    except (OSError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"'{path}' is no result of a user study: make one with attend-excite study analyse")
    compared = {system for shares in votes["subsets"].values() for system in shares} - {"none"}
    models = {row["model"] for row in results.rows}
    if compared - set(results.systems) or votes.get("model") not in models | {None}:
        raise ValueError(
            f"'{path}' is a study of {', '.join(sorted(compared))} by {votes.get('model')}, and "
            f"'{results.run}' lacks some of their images: report the run that the study was made from"
        )
    return votes
