"""Where the votes are: SQLite or PostgreSQL.

A respondent gets a placement for each page when they start: its position, and the systems in the order
shown. A vote belongs to a placement and has its primary key, so that there can be no second one.
No clock time is stored, and nothing about a respondent but a random id.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

try:
    import sqlalchemy as sa
    from alembic import command
    from alembic.config import Config
    from sqlalchemy import event
    from sqlalchemy.dialects import postgresql, sqlite
    from sqlalchemy.exc import ArgumentError, DBAPIError
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"the study needs {error.name}: pip install 'attend-excite[study]'") from error

from attend_excite.study.create import Page, Study
from attend_excite.study.votes import Source, Vote

metadata = sa.MetaData()

studies = sa.Table(
    "studies",
    metadata,
    sa.Column("hash", sa.String(64), primary_key=True),
    sa.Column("cookie_key", sa.String(64), nullable=False),
    sa.Column("owner_token", sa.String(64), nullable=False),
)
pages = sa.Table(
    "pages",
    metadata,
    sa.Column("id", sa.String(16), primary_key=True),
    sa.Column("kind", sa.String(8), nullable=False),
    sa.Column("repeats", sa.String(16), sa.ForeignKey("pages.id")),
    sa.Column("prompt", sa.Text, nullable=False),
    sa.Column("subset", sa.Text, nullable=False),
    sa.Column("expected", sa.Text),
)
respondents = sa.Table(
    "respondents",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("source", sa.String(9), nullable=False),
    sa.Column("submitted", sa.Boolean, nullable=False),
)
placements = sa.Table(
    "placements",
    metadata,
    sa.Column(
        "respondent",
        sa.String(32),
        sa.ForeignKey("respondents.id", ondelete="CASCADE"),
        primary_key=True,
    ),
    sa.Column("page", sa.String(16), sa.ForeignKey("pages.id"), primary_key=True),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("shown", sa.JSON, nullable=False),
    sa.UniqueConstraint("respondent", "position"),
)
answers = sa.Table(
    "votes",
    metadata,
    sa.Column("respondent", sa.String(32), primary_key=True),
    sa.Column("page", sa.String(16), primary_key=True),
    sa.Column("choice", sa.Text),
    sa.Column("seconds", sa.Float, nullable=False),
    sa.ForeignKeyConstraint(
        ["respondent", "page"], ["placements.respondent", "placements.page"], ondelete="CASCADE"
    ),
)

_SHEET = (
    sa.select(
        respondents.c.submitted,
        placements.c.page,
        placements.c.shown,
        answers.c.page.is_not(None),
        answers.c.choice,
    )
    .select_from(respondents.join(placements).outerjoin(answers))
    .where(respondents.c.id == sa.bindparam("respondent"))
    .order_by(placements.c.position)
)
_STORED = (
    sa.select(
        respondents.c.id.label("respondent"),
        placements.c.page,
        pages.c.kind,
        pages.c.repeats,
        pages.c.prompt,
        pages.c.subset,
        placements.c.shown,
        answers.c.choice,
        pages.c.expected,
        answers.c.seconds,
        respondents.c.source,
        placements.c.position,
        respondents.c.submitted,
    )
    .select_from(respondents.join(placements).join(pages, pages.c.id == placements.c.page).outerjoin(answers))
    .order_by(respondents.c.id, placements.c.position)
)
_VOTE = [field.name for field in fields(Vote)]
_MIXED = "people's votes and simulated ones don't go into one database: use another"
_INSERTS: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
_CONNECT_SECONDS = 10
_PRAGMAS = (
    "journal_mode = WAL",
    "synchronous = FULL",  # A commit is on the disk before it is answered.
    "foreign_keys = ON",
    "secure_delete = ON",
    "busy_timeout = 30000",
)


@dataclass(frozen=True)
class Secrets:
    """What only the server knows: the key that signs cookies and forms, and the owner's token."""

    cookie_key: str
    owner_token: str


@dataclass(frozen=True)
class Answer:
    """A page as one respondent has it.

    Attributes:
        page: its id.
        shown: the systems in the order shown.
        voted: whether it has been answered.
        choice: the system chosen; None: "none is better", or not answered.
    """

    page: str
    shown: tuple[str, ...]
    voted: bool
    choice: str | None


@dataclass(frozen=True)
class Sheet:
    """A respondent's pages in their order, and whether they are handed in."""

    submitted: bool
    answers: tuple[Answer, ...]

    @property
    def voted(self) -> int:
        """How many pages have been answered."""
        return sum(answer.voted for answer in self.answers)


@dataclass(frozen=True)
class Count:
    """How far the respondents of one source are. Says nothing of what they prefer."""

    source: Source
    started: int
    submitted: int
    votes: int
    checks: int
    checks_passed: int


def default_url(folder: Path, name: str = "votes") -> str:
    """The database of a study that was told of none: a SQLite file in its folder."""
    return sa.URL.create("sqlite", database=str(folder.resolve() / f"{name}.sqlite")).render_as_string()


def open_database(url: str, study: Study | None = None, *, create: bool = True) -> sa.Engine:
    """Connect, bring the tables up to date, and write the study's pages into an empty database.

    Args:
        url: SQLAlchemy's: "sqlite:////path/votes.sqlite" or "postgresql://user:password@host/name".
        study: whose votes it holds; None: whatever study it was made for.
        create: make a database for the study where there is none.

    Raises:
        ValueError: the URL is no database's, or the database can't be reached or written to, or belongs to
            another study or to none.
    """
    new = study if create else None
    try:
        address = sa.make_url(url)
    except ArgumentError:
        raise ValueError(
            f"'{url}' is no database's URL: write it like sqlite:////path/votes.sqlite"
        ) from None
    if address.get_backend_name() == "postgresql":
        engine = sa.create_engine(
            address.set(drivername="postgresql+psycopg"),
            pool_pre_ping=True,
            connect_args={"connect_timeout": _CONNECT_SECONDS},
        )
    elif address.get_backend_name() == "sqlite" and address.database:
        engine = _sqlite(address, Path(address.database), create=new is not None)
    else:
        raise ValueError(f"'{address}' is neither SQLite nor PostgreSQL")
    with _usable(address), engine.begin() as connection:
        config = Config()
        config.set_main_option("script_location", "attend_excite.study:migrations")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        there = connection.scalar(sa.select(studies.c.hash))
        if there is None and new is not None:
            _write_study(connection, new)
        elif there is None:
            raise ValueError(f"the database '{address}' holds no study yet")
        elif study is not None and there != study.hash:
            raise ValueError(f"the database '{address}' holds the votes of another study: choose another")
    return engine


def read_secrets(engine: sa.Engine) -> Secrets:
    """The keys that were drawn when the database was made."""
    with engine.connect() as connection:
        return Secrets(*connection.execute(sa.select(studies.c.cookie_key, studies.c.owner_token)).one())


def start(engine: sa.Engine, study: Study, respondent: str) -> None:
    """Draw the orders of a new respondent's pages and systems; does nothing where they have started.

    A repeated page shows the systems in another order than the page that it repeats.

    Raises:
        ValueError: the database holds simulated votes, which people's are not to be mixed with.
    """
    with engine.begin() as connection:
        insert = _INSERTS[engine.dialect.name](respondents)
        new = insert.values(id=respondent, source="web", submitted=False).on_conflict_do_nothing()
        if connection.scalar(new.returning(respondents.c.id)) is None:
            return
        if connection.scalar(sa.select(sa.exists().where(respondents.c.source == "simulated"))):
            raise ValueError(_MIXED)
        # Not a seeded generator: whoever knows the seed would know the systems.
        draw = random.SystemRandom()
        shown: dict[str, list[str]] = {}
        drawn = []
        for position, page in enumerate(_ordered(study.pages, draw)):
            before = shown.get(page.repeats or "")
            order = draw.sample(study.systems, len(study.systems))
            while order == before and len(order) > 1:
                order = draw.sample(study.systems, len(study.systems))
            shown[page.id] = order
            drawn.append({"respondent": respondent, "page": page.id, "position": position, "shown": order})
        connection.execute(sa.insert(placements), drawn)


def sheet(engine: sa.Engine, respondent: str) -> Sheet | None:
    """A respondent's pages and answers; None: there is no such respondent."""
    with engine.connect() as connection:
        rows = connection.execute(_SHEET, {"respondent": respondent}).all()
    if not rows:
        return None
    return Sheet(
        bool(rows[0][0]),
        tuple(Answer(page, tuple(shown), bool(voted), choice) for _, page, shown, voted, choice in rows),
    )


def save_vote(engine: sa.Engine, respondent: str, page: str, choice: str | None, seconds: float) -> bool:
    """Write a vote or change it; on return it is on the disk. False: the answers have been handed in."""
    insert = _INSERTS[engine.dialect.name](answers)
    vote = insert.values(respondent=respondent, page=page, choice=choice, seconds=seconds)
    with engine.begin() as connection:
        if not _open(connection, respondent):
            return False
        # The time is that of the first choice.
        connection.execute(
            vote.on_conflict_do_update(
                index_elements=[answers.c.respondent, answers.c.page], set_={"choice": vote.excluded.choice}
            )
        )
    return True


def submit(engine: sa.Engine, respondent: str) -> bool:
    """Hand in a respondent's answers. False: some page has none."""
    with engine.begin() as connection:
        if not _open(connection, respondent):
            return True
        missing = (
            sa.select(sa.func.count())
            .select_from(placements.outerjoin(answers))
            .where(placements.c.respondent == respondent, answers.c.page.is_(None))
        )
        if connection.scalar(missing):
            return False
        connection.execute(
            sa.update(respondents).where(respondents.c.id == respondent).values(submitted=True)
        )
    return True


def votes(url: str, study: Study | None = None) -> list[Vote]:
    """All votes, also of those who haven't handed in; in the order of the pages.

    Args:
        url: as for `open_database`; no database is made.
        study: whose votes they are to be; None: whatever study the database was made for.

    Raises:
        ValueError: the URL is no study's database, or another study's.
    """
    with _transaction(url, study, create=False) as connection:
        rows = [
            dict[str, Any](row)
            for row in connection.execute(_STORED.where(answers.c.page.is_not(None))).mappings()
        ]
    for row in rows:
        row["shown"] = tuple(row["shown"])
    return [Vote(**{name: row[name] for name in _VOTE}) for row in rows]


def stored(url: str, respondent: str) -> list[dict[str, Any]]:
    """All that is kept of a respondent: a row a page, with `position` and whether they have `submitted`
    beside the columns of a vote; `seconds` is None where they have not answered.

    Raises:
        ValueError: the URL is no study's database, or there is no such respondent.
    """
    with _transaction(url) as connection:
        rows = connection.execute(_STORED.where(respondents.c.id == respondent)).mappings()
        found = [dict[str, Any](row) for row in rows]
    if not found:
        raise ValueError(f"there is no respondent '{respondent}'")
    return found


def add_votes(url: str, study: Study, cast: Sequence[Vote]) -> None:
    """Write the votes of respondents who answered elsewhere; all or none.

    Raises:
        ValueError: a respondent is there already, or people's votes would be mixed with simulated ones.
    """
    with _transaction(url, study) as connection:
        known = {row.id: row.source for row in connection.execute(sa.select(respondents))}
        if twice := known.keys() & {vote.respondent for vote in cast}:
            raise ValueError(f"the respondent {min(twice)} is in the database already")
        sources = {*known.values(), *(vote.source for vote in cast)}
        if "simulated" in sources and len(sources) > 1:
            raise ValueError(_MIXED)
        by_respondent = attrgetter("respondent")
        for respondent, group in groupby(sorted(cast, key=by_respondent), by_respondent):
            theirs = list(group)
            new = {"id": respondent, "source": theirs[0].source, "submitted": len(theirs) == len(study.pages)}
            connection.execute(sa.insert(respondents).values(new))
            connection.execute(
                sa.insert(placements),
                [
                    {"respondent": respondent, "page": vote.page, "position": at, "shown": list(vote.shown)}
                    for at, vote in enumerate(theirs)
                ],
            )
            connection.execute(
                sa.insert(answers),
                [
                    {"respondent": respondent, "page": v.page, "choice": v.choice, "seconds": v.seconds}
                    for v in theirs
                ],
            )


def delete_respondent(url: str, respondent: str) -> None:
    """Delete all that is stored of a respondent.

    Raises:
        ValueError: there is no such respondent.
    """
    with _transaction(url) as connection:
        gone = connection.execute(sa.delete(respondents).where(respondents.c.id == respondent)).rowcount
    if not gone:
        raise ValueError(f"there is no respondent '{respondent}'")


def count(engine: sa.Engine) -> list[Count]:
    """How far the respondents are, source by source."""
    check = pages.c.kind == "check"
    query = (
        sa.select(
            respondents.c.source,
            sa.func.count(sa.distinct(respondents.c.id)),
            sa.func.count(sa.distinct(sa.case((respondents.c.submitted, respondents.c.id)))),
            sa.func.count(answers.c.page),
            sa.func.count(answers.c.page).filter(check),
            sa.func.count(answers.c.page).filter(check, answers.c.choice == pages.c.expected),
        )
        .select_from(respondents.join(placements).join(pages).outerjoin(answers))
        .group_by(respondents.c.source)
        .order_by(respondents.c.source)
    )
    with engine.connect() as connection:
        return [Count(*row) for row in connection.execute(query)]


@contextmanager
def _transaction(url: str, study: Study | None = None, *, create: bool = True) -> Iterator[sa.Connection]:
    engine = open_database(url, study, create=create)
    try:
        with _usable(engine.url), engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


@contextmanager
def _usable(address: sa.URL) -> Iterator[None]:
    """What a database or its driver says at a failure, as one sentence with the database's name."""
    try:
        yield
    except DBAPIError as error:
        reason = str(error.orig).strip().split("\n", 1)[0]
        raise ValueError(f"the database '{address}' cannot be used: {reason}") from error


def _sqlite(address: sa.URL, file: Path, *, create: bool) -> sa.Engine:
    if not file.is_file():
        if not create:
            raise ValueError(f"there are no votes yet: no database '{file}'")
        try:
            file.touch(mode=0o600)
        except OSError as error:
            raise ValueError(f"the database '{address}' cannot be used: {error.strerror}") from error
    # One connection, for which the threads queue up: SQLite writes one at a time anyhow, and a queue
    # is fairer and faster than to try again and again.
    engine = sa.create_engine(address, pool_size=1, max_overflow=0)

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # Python's own BEGIN is deferred: two programs that read first and then write would deadlock.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _write_study(connection: sa.Connection, study: Study) -> None:
    keys = {"cookie_key": secrets.token_hex(32), "owner_token": secrets.token_urlsafe(24)}
    connection.execute(sa.insert(studies).values(hash=study.hash, **keys))
    columns = ("id", "kind", "repeats", "prompt", "subset", "expected")
    connection.execute(
        sa.insert(pages), [{name: getattr(page, name) for name in columns} for page in study.pages]
    )


def _open(connection: sa.Connection, respondent: str) -> bool:
    """Whether a respondent may still vote; holds their row until the transaction ends."""
    query = sa.select(respondents.c.submitted).where(respondents.c.id == respondent).with_for_update()
    return connection.scalar(query) is False


def _ordered(pages: Sequence[Page], draw: random.Random) -> list[Page]:
    """The pages in a random order, with a third of the others between a page and its repeat."""
    shuffled = draw.sample(pages, len(pages))
    repeats = [page for page in shuffled if page.kind == "repeat"]
    repeated = {page.repeats for page in repeats}
    first = [page for page in shuffled if page.id in repeated]
    others = [page for page in shuffled if page.kind != "repeat" and page.id not in repeated]
    third = -(-len(others) // 3)
    parts = (first + others[:third], others[third : 2 * third], repeats + others[2 * third :])
    return [page for part in parts for page in draw.sample(part, len(part))]
