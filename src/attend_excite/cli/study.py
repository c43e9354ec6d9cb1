"""`attend-excite study`: make, serve and keep a user study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attend_excite.cli.messages import failures_as_sentences, given_path, printable

study = typer.Typer(help="Ask people which system draws best, as in Table 2.", no_args_is_help=True)

StudyFolder = Annotated[Path, typer.Argument(help="Folder of the study.", metavar="STUDY", parser=given_path)]
Database = Annotated[
    str | None,
    typer.Option(
        help="Database URL: sqlite:////path/votes.sqlite or postgresql://user:password@host/name.",
        envvar="STUDY_DATABASE",
        show_default="votes.sqlite in the study's folder",
    ),
]
RespondentId = Annotated[str, typer.Argument(help="The number at the foot of the respondent's pages.")]
_RULES = "Who is left out of the analysis"


@study.command()
def create(
    run: Annotated[str, typer.Argument(help="Folder of a benchmark run.")],
    out: Annotated[
        Path,
        typer.Option(help="Folder for the study; must not exist.", parser=given_path, metavar="PATH"),
    ] = Path("study"),
    prompts_per_subset: Annotated[int, typer.Option(help="Prompts drawn from each subset.")] = 10,
    seeds: Annotated[int, typer.Option(help="Images in each set.")] = 4,
    system: Annotated[
        list[str] | None, typer.Option(help="Compare this system; repeat for more.", show_default="all")
    ] = None,
    checks: Annotated[int, typer.Option(help="Pages that check attention.")] = 3,
    repeats: Annotated[int, typer.Option(help="Pages shown twice.")] = 3,
    allow_none: Annotated[bool, typer.Option("--allow-none", help='Offer "none is better".')] = False,
    consent: Annotated[
        Path | None,
        typer.Option(help="A text file to agree to; empty lines separate paragraphs.", show_default="ours"),
    ] = None,
    draw_seed: Annotated[int, typer.Option(help="Seed for drawing prompts and seeds.")] = 0,
    least_checks: Annotated[
        float, typer.Option(help="Those who pass less than this share of the checks.", rich_help_panel=_RULES)
    ] = 0.6,
    least_seconds: Annotated[
        float,
        typer.Option(
            help="Those whose median time on a page is shorter, in seconds.", rich_help_panel=_RULES
        ),
    ] = 1.0,
    least_answered: Annotated[
        float,
        typer.Option(help="Those who answer less than this share of the pages.", rich_help_panel=_RULES),
    ] = 1.0,
) -> None:
    """Make a study from a benchmark run and freeze it."""
    with failures_as_sentences():
        from attend_excite.benchmark.names import titles
        from attend_excite.study.create import CONSENT, Rules, create_study

        made = create_study(
            run,
            out,
            prompts_per_subset=prompts_per_subset,
            seeds=seeds,
            systems=system,
            checks=checks,
            repeats=repeats,
            allow_none=allow_none,
            rules=Rules(least_checks, least_seconds, least_answered),
            consent=CONSENT if consent is None else _consent(consent),
            draw_seed=draw_seed,
        )
        compared = titles(made.systems, made.model, made.titles)
        print(
            f"{out}: {len(made.pages)} pages, {checks} to check attention, {repeats} to repeat another\n"
            f"systems: {', '.join(map(printable, compared.values()))}, drawn by {made.model}\n"
            f"seeds: {', '.join(map(str, made.seeds))}\n"
            f"frozen as {made.hash}"
        )


def _consent(file: Path) -> str:
    from attend_excite.documents import read_text

    try:
        return read_text(file).strip()
    except ValueError as error:
        raise ValueError(f"the consent '{file}' {error}") from error


@study.command()
def serve(
    folder: StudyFolder,
    database: Database = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any that is free.")] = 8000,
) -> None:
    """Serve a study's pages until stopped."""
    with failures_as_sentences():
        from attend_excite.study.database import default_url
        from attend_excite.study.server import create_app, listen, run

        app = create_app(folder, database or default_url(folder))
        with listen(host, port) as listener:
            address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
            print(
                f"the study: {address}/\nits progress: {address}/progress?token={app.state.site.owner_token}",
                flush=True,
            )
            run(app, listener)


@study.command()
def export(
    folder: StudyFolder,
    file: Annotated[
        Path,
        typer.Argument(
            help="To write: votes.csv, or tasks.json for Label Studio.", parser=given_path, metavar="FILE"
        ),
    ],
    database: Database = None,
) -> None:
    """Write the votes as CSV, or the study with its votes in Label Studio's format."""
    with failures_as_sentences():
        from attend_excite.study.create import read_study
        from attend_excite.study.database import default_url, open_database, votes
        from attend_excite.study.export import write_votes

        study, url = read_study(folder), database or default_url(folder)
        if file.suffix == ".json":
            open_database(url, study).dispose()  # Tasks may be taken elsewhere before anybody has voted.
        for written in write_votes(file, study, votes(url, study)):
            print(written)


@study.command("import")
def import_votes(
    folder: StudyFolder,
    file: Annotated[Path, typer.Argument(help="CSV with the columns respondent, page, choice, seconds.")],
    database: Database = None,
) -> None:
    """Add votes that were cast elsewhere: all of the file's, or none."""
    with failures_as_sentences():
        from attend_excite.study.create import read_study
        from attend_excite.study.database import add_votes, default_url, open_database, read_secrets
        from attend_excite.study.export import votes_in_csv

        read, url = read_study(folder), database or default_url(folder)
        engine = open_database(url, read)
        cast = votes_in_csv(file, read, read_secrets(engine).cookie_key)
        engine.dispose()
        add_votes(url, read, cast)
        print(f"{len(cast)} votes of {len({vote.respondent for vote in cast})} respondents added")


@study.command()
def export_respondent(folder: StudyFolder, respondent: RespondentId, database: Database = None) -> None:
    """Print all that is stored of one respondent as CSV: one line for each page, answered or not."""
    with failures_as_sentences():
        from attend_excite.study.database import default_url, stored
        from attend_excite.study.export import respondent_csv

        print(printable(respondent_csv(stored(database or default_url(folder), respondent))), end="")


@study.command()
def delete_respondent(folder: StudyFolder, respondent: RespondentId, database: Database = None) -> None:
    """Delete all that is stored of one respondent."""
    with failures_as_sentences():
        from attend_excite.study.database import default_url
        from attend_excite.study.database import delete_respondent as delete

        delete(database or default_url(folder), respondent)
        print(f"all of {respondent} is deleted")
