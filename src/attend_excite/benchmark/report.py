"""The report on a run: one page with the paper's tables and figures, and every number beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from attend_excite import tables
from attend_excite.benchmark import numbers, store
from attend_excite.benchmark.blocks import Plot, Sheet, Table
from attend_excite.benchmark.comparison import Comparison
from attend_excite.benchmark.results import Results, read_results
from attend_excite.benchmark.sections import comparisons_of, sections_of, summary_of, title_of

# Pictures are named after their jobs, the others after what they show.
_OURS = re.compile(
    r"pictures/[0-9a-f]{16}\.webp"
    r"|figures/(pairs(-\d+)?|presence|detector|geneval|similarity|reweighting|separation|sweep-[\w.-]+)"
    r"\.(svg|png|pdf)"
    r"|tables/(systems|reweighting|ablations|findings|agreement|sweep|votes|cost|beside|circumstances)"
    r"(-[\w.-]+)?\.tex"
    r"|numbers/(averages|prompts|images|cost|findings|agreement|bounds|study|beside)\.(csv|parquet)"
)


def write_report(
    run: str | Path,
    out: str | Path,
    *,
    other: str | Path | None = None,
    study: Path | None = None,
    reference: str | None = None,
    highlight: str | None = None,
) -> None:
    """Write `report.md`, `report.html` (of one piece), `figures/`, `tables/`, `pictures/` and `numbers/`.

    What only an earlier report in the folder had is removed.

    Args:
        run: the run's folder, or its URL.
        out: the report's folder, or its URL.
        other: another run to set beside it.
        study: the result of a user study, as `attend-excite study analyse` writes it.
        reference: the system that the others are compared with; None: Attend-and-Excite.
        highlight: the system that the report is about; None: likewise.

    Raises:
        ValueError: there is no run, it has no images or scores, or none by a system that is named; or the
            study's result cannot be read or is of other images.
    """
    results = read_results(run, reference=reference, highlight=highlight)
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
    for folder in ("pictures", "figures", "tables", "numbers"):
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
                for kind, content in block.drawn.files.items():
                    yield f"figures/{block.name}.{kind}", content
            elif isinstance(block, Table):
                caption = " ".join(filter(None, (block.title or f"{section.title}.", block.note)))
                text = tables.latex(block.columns, block.rows, caption, block.name)
                yield f"tables/{block.name}.tex", text.encode()
            elif isinstance(block, Sheet):
                for thumbnail in (shown for _, row in block.rows for shown in row if shown):
                    yield f"pictures/{thumbnail.name}.webp", thumbnail.webp
    for name, rows in numbers.tables(results, comparisons, votes, others).items():
        yield f"numbers/{name}.csv", tables.csv_bytes(rows)
        yield f"numbers/{name}.parquet", tables.parquet_bytes(rows)
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

    html = name.endswith(".html.j2")
    environment = Environment(
        autoescape=html,
        # Prompts are anyone's text.
        finalize=None if html else lambda value: tables.markdown(value) if isinstance(value, str) else value,
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
