"""`attend-excite study analyse` and `study simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attend_excite.cli.messages import MESSAGES, failures_as_sentences, given_path, plain, warn
from attend_excite.cli.options import AsJson
from attend_excite.cli.study import Database, StudyFolder


def analyse(
    folder: StudyFolder,
    database: Database = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for tables and plots.",
            show_default="results, or results-simulated, in the study's folder",
            parser=given_path,
            metavar="PATH",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Count the votes: shares, strengths, winners and agreement, as tables and plots."""
    with failures_as_sentences():
        from attend_excite.cli.summary import RESULTS, print_json, table
        from attend_excite.study import results
        from attend_excite.study.analysis import analyse as analysed
        from attend_excite.study.create import read_study
        from attend_excite.study.database import default_url, votes

        with MESSAGES.status("counting the votes"):
            study = read_study(folder)
            result = analysed(study, votes(database or default_url(folder), study))
            written = results.write_results(
                result, out or folder / f"results{'-simulated' if result.simulated else ''}"
            )
        warning = results.banner(result)
        if warning:
            warn(warning)
        if as_json:
            print_json(result.document())
            return
        shares = table(*results.TABLE_COLUMNS)
        shares.title = warning
        for row in results.table_rows(result):
            shares.add_row(*map(plain, row))
        RESULTS.print(shares)
        for line in (*results.remarks(result), *map(str, written)):
            RESULTS.print(plain(line))


def simulate(
    folder: StudyFolder,
    database: Annotated[
        str | None,
        typer.Option(
            help="Database URL; it must not hold people's votes.",
            show_default="simulated.sqlite in the study's folder",
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="presence: choices follow the sticker judge's verdict on the images. Or a judge's folder."
        ),
    ] = None,
    strength: Annotated[
        list[str] | None,
        typer.Option(
            help="Choices follow known strengths instead: attend-excite=3, repeat for each system.",
            metavar="SYSTEM=NUMBER",
        ),
    ] = None,
    respondents: Annotated[int, typer.Option(help="Number of respondents.")] = 65,
    inattentive: Annotated[float, typer.Option(help="Chance that one answers at random, 0 to 1.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Seed for everything drawn at random.")] = 0,
) -> None:
    """Let a program vote, to try a study out: its votes are marked as simulated everywhere."""
    with failures_as_sentences():
        from attend_excite.study import simulate as panel
        from attend_excite.study.create import read_study
        from attend_excite.study.database import add_votes, count, default_url, open_database

        read = read_study(folder)
        if strength and judge is None:
            utilities = panel.known_utilities(read, _strengths(strength), seed=seed)
        elif judge and not strength:
            name = "stickers-judge" if judge == "presence" else judge
            utilities = panel.judged_utilities(read, folder, name)
        else:
            raise ValueError("say what choices follow: --judge presence, or a --strength for each system")
        votes = panel.simulate(read, utilities, respondents, inattentive=inattentive, seed=seed)
        url = database or default_url(folder, "simulated")
        engine = open_database(url, read)
        there = count(engine)
        engine.dispose()
        if there:
            raise ValueError(f"the database '{url}' has votes already: give each panel one of its own")
        add_votes(url, read, votes)
        warn(f"{len(votes)} SIMULATED votes of {respondents} respondents added to {url}")


def _strengths(options: list[str]) -> dict[str, float]:
    strengths: dict[str, float] = {}
    for option in options:
        system, _, number = option.rpartition("=")
        try:
            strengths[system] = float(number)
        except ValueError:
            raise ValueError(f"'{option}' is no strength: write it like attend-excite=3") from None
    return strengths
