"""The user study: drawn and frozen, served, kept in a database, exported and imported."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import psycopg
import pytest
import sqlalchemy as sa
import uvicorn
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from fastapi.testclient import TestClient
from limits import RateLimitItemPerMinute
from PIL import Image, ImageChops, ImageStat
from sqlalchemy import event
from sqlalchemy.exc import OperationalError
from typer.testing import CliRunner

from attend_excite.benchmark import store
from attend_excite.cli import app
from attend_excite.study import database, server
from attend_excite.study.connections import PunctualProtocol
from attend_excite.study.create import IMAGES, Rules, Study, create_study, read_study
from attend_excite.study.export import (
    csv_text,
    label_studio_config,
    label_studio_tasks,
    respondent_csv,
    votes_in_csv,
)
from attend_excite.study.server import COOKIE, create_app
from attend_excite.study.votes import Vote

RESPONDENT = "0123456789abcdef" * 2
KEY = "secret"


@pytest.fixture(scope="session")
def study(study_folder: Path) -> Study:
    return read_study(study_folder)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A PostgreSQL of our own on a socket in a temporary folder; gives the folder."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = shutil.which("initdb") or (str(found[-1]) if found else None)
    if initdb is None:
        pytest.skip("PostgreSQL is not installed")
    folder = tempfile.mkdtemp(prefix="study-")
    as_user: list[str] = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root.
        shutil.chown(folder, "postgres")
        as_user = ["runuser", "-u", "postgres", "--"]

    def command(program: str, *options: str) -> None:
        call = [*as_user, str(Path(initdb).with_name(program)), "-D", f"{folder}/data", *options]
        subprocess.run(call, check=True, stdout=subprocess.DEVNULL, cwd=folder)

    command("initdb", "--auth=trust", "--username=postgres", "--no-sync")
    options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
    command("pg_ctl", "start", "--wait", "--silent", "--log", f"{folder}/log", "--options", options)
    yield folder
    command("pg_ctl", "stop", "--silent", "--mode=immediate")
    shutil.rmtree(folder)


_NUMBERS = count()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/votes.sqlite"
    folder, name = request.getfixturevalue("postgres"), f"study{next(_NUMBERS)}"
    with psycopg.connect(host=folder, user="postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return f"postgresql://postgres@/{name}?host={folder}"


@pytest.fixture
def sqlite(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/votes.sqlite"


@pytest.fixture
def engine(url: str, study: Study) -> Iterator[sa.Engine]:
    engine = database.open_database(url, study)
    yield engine
    engine.dispose()


@pytest.fixture
def client(study_folder: Path, url: str) -> Iterator[TestClient]:
    with TestClient(create_app(study_folder, url)) as client:
        yield client


# Drawn and frozen


def test_a_study_is_drawn_as_in_the_paper(small_run: Path, study_folder: Path, study: Study) -> None:
    rows = {(r["prompt"], r["system"], r["seed"]): r for r in store.read_rows(small_run).to_pylist()}
    ordinary = [page for page in study.pages if page.kind == "ordinary"]
    assert sorted(page.subset for page in ordinary) == ["animals"] * 2 + ["objects"] * 2
    assert len({page.prompt for page in ordinary}) == 4
    assert (study.model, study.systems) == ("squares", ("ours", "plain", "structure"))
    for page in study.pages:
        for system, names in page.images.items():
            for name, seed in zip(names, study.seeds, strict=True):
                with Image.open(study_folder / IMAGES / name) as copy:
                    original = store.read_image(small_run, rows[page.prompt, system, seed]["image"])
                    assert copy.format == "WEBP"
                    assert not copy.getexif()
                    difference = ImageChops.difference(copy.convert("RGB"), original)
                    assert max(ImageStat.Stat(difference).mean) < 8
    (check,) = (page for page in study.pages if page.kind == "check")
    assert check.expected in study.systems
    assert check.prompt not in {page.prompt for page in ordinary}
    (repeat,) = (page for page in study.pages if page.kind == "repeat")
    assert study.page[repeat.repeats or ""].images == repeat.images
    assert all(re.fullmatch(r"[0-9a-f]{32}\.webp", name) for name in study.files)


def test_the_draw_is_that_of_its_seed(small_run: Path, tmp_path: Path) -> None:
    drawn = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        made = create_study(small_run, tmp_path / name, prompts_per_subset=2, seeds=2, draw_seed=seed)
        assert read_study(tmp_path / name) == made
        drawn.append(([page.prompt for page in made.pages], made.seeds))
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts_per_subset": 5}, "5 prompts are to be drawn of 'animals', and the run has 4"),
        ({"seeds": 4}, "4 seeds are to be drawn, and the run has 3"),
        ({"seeds": 0}, "seeds is 0"),
        ({"systems": ["ours", "other"]}, "the run has no other"),
        ({"systems": ["ours"]}, "2 to 9 systems"),
        ({"repeats": 9}, "lower --repeats"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    small_run: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    sound: dict[str, Any] = {"prompts_per_subset": 2, "seeds": 2}
    with pytest.raises(ValueError, match=message):
        create_study(small_run, tmp_path / "study", **sound | options)
    assert not list(tmp_path.iterdir())


def test_a_missing_image_is_named_and_not_drawn_around(small_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    rows = store.read_rows(run).to_pylist()
    row = next(row for row in rows if row["system"] == "plain")
    shutil.rmtree(run / "rows")
    failed = row | {"image": None, "error": "out of memory"}
    store.write_rows(run, [failed if each is row else each for each in rows])
    with pytest.raises(
        ValueError, match=f"1 of 72 images .* plain's of '{row['prompt']}' with seed {row['seed']}"
    ):
        create_study(run, tmp_path / "study", prompts_per_subset=4, seeds=3, checks=0)
    with pytest.raises(ValueError, match="never changes"):
        create_study(run, run)


@pytest.mark.parametrize("change", ["prompt", "rule", "image", "image gone"])
def test_a_changed_study_is_refused(study_folder: Path, tmp_path: Path, sqlite: str, change: str) -> None:
    folder = tmp_path / "study"
    shutil.copytree(study_folder, folder)
    file, image = folder / "study.json", next((folder / IMAGES).iterdir())
    if change == "prompt":
        file.write_text(file.read_text().replace("of the animals", "of the beasts"))
    elif change == "rule":
        file.write_text(file.read_text().replace('"least_seconds": 1.0', '"least_seconds": 0.1'))
    elif change == "image":
        image.write_bytes(image.read_bytes() + b"\0")
    else:
        image.unlink()
    with pytest.raises(ValueError, match="has changed since it was created"):
        create_app(folder, sqlite)


def test_votes_of_another_study_are_refused(study: Study, study_folder: Path, tmp_path: Path) -> None:
    url, missing = f"sqlite:///{tmp_path}/votes.sqlite", tmp_path / "missing.sqlite"
    with pytest.raises(ValueError, match="no votes yet"):
        database.votes(f"sqlite:///{missing}", study)
    assert not missing.exists()
    sa.create_engine(url).connect().close()
    with pytest.raises(ValueError, match="holds no study yet"):
        database.votes(url, study)
    other = replace(study, rules=Rules(least_checks=0))
    database.add_votes(url, other, _votes(other))
    assert database.votes(url) == database.votes(url, other)
    with pytest.raises(ValueError, match="another study"):
        database.votes(url, study)
    file = tmp_path / "votes.csv"
    refused = CliRunner().invoke(app, ["study", "export", str(study_folder), str(file), "--database", url])
    assert refused.exit_code == 2
    assert "another study" in refused.output
    assert not file.exists()
    refused = CliRunner().invoke(app, ["study", "analyse", str(study_folder), "--database", url])
    assert refused.exit_code == 2
    assert "another study" in refused.output


def test_a_database_is_one_study_s(study: Study, sqlite: str) -> None:
    with pytest.raises(ValueError, match="no votes yet"):
        database.votes(sqlite)
    database.open_database(sqlite, study)
    with pytest.raises(ValueError, match="another study"):
        database.open_database(sqlite, replace(study, rules=Rules(least_checks=0)))
    with pytest.raises(ValueError, match="neither SQLite nor PostgreSQL"):
        database.open_database("mysql://host/name", study)


# Kept


def test_migrations_make_the_tables(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), database.metadata) == []


def test_orders_are_drawn_for_each_respondent(engine: sa.Engine, study: Study) -> None:
    page_orders, system_orders = set(), set()
    (repeat,) = (page for page in study.pages if page.kind == "repeat")
    for number in range(12):
        database.start(engine, study, f"{number:032x}")
        sheet = database.sheet(engine, f"{number:032x}")
        assert sheet is not None
        pages = [answer.page for answer in sheet.answers]
        assert sorted(pages) == sorted(study.page)
        assert all(sorted(answer.shown) == list(study.systems) for answer in sheet.answers)
        assert pages.index(repeat.id) > pages.index(repeat.repeats or "") + 1
        shown = {answer.page: answer.shown for answer in sheet.answers}
        assert shown[repeat.id] != shown[repeat.repeats or ""]
        page_orders.add(tuple(pages))
        system_orders.update(answer.shown for answer in sheet.answers)
    assert len(page_orders) > 6
    assert len(system_orders) == 6


def test_one_vote_a_page_whatever_happens_at_once(engine: sa.Engine, url: str, study: Study) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: database.start(engine, study, RESPONDENT), range(8)))
        sheet = database.sheet(engine, RESPONDENT)
        assert sheet is not None
        pages = [answer.page for answer in sheet.answers]
        assert not database.submit(engine, RESPONDENT)

        def vote(number: int) -> bool:
            choice = study.systems[number % 3]
            return database.save_vote(engine, RESPONDENT, pages[number % 6], choice, float(number))

        assert all(threads.map(vote, range(48)))
        assert database.save_vote(engine, RESPONDENT, pages[0], None, 0.0)
        assert all(threads.map(lambda _: database.submit(engine, RESPONDENT), range(8)))
        assert not any(threads.map(vote, range(48)))
    votes = database.votes(url)
    assert [vote.page for vote in votes] == pages
    assert votes[0].choice is None
    assert votes[0].seconds > 0 or votes[0].page == pages[0]
    assert database.count(engine)[0].votes == 6


def test_a_deleted_respondent_leaves_nothing(engine: sa.Engine, url: str, study: Study) -> None:
    for respondent in (RESPONDENT, "f" * 32):
        database.start(engine, study, respondent)
        for page in study.pages:
            database.save_vote(engine, respondent, page.id, "ours", 2.0)
    database.delete_respondent(url, RESPONDENT)
    with engine.connect() as connection:
        for table in (database.respondents, database.placements, database.answers):
            kept = connection.scalars(sa.select(*table.primary_key.columns).distinct()).all()
            assert set(kept) == {"f" * 32}
    assert not database.save_vote(engine, RESPONDENT, study.pages[0].id, "ours", 2.0)
    with pytest.raises(ValueError, match="no respondent"):
        database.delete_respondent(url, RESPONDENT)


# Out and in


def _votes(study: Study, source: Any = "imported") -> list[Vote]:
    return [
        Vote(
            respondent=f"{number:032x}",
            page=page.id,
            kind=page.kind,
            repeats=page.repeats,
            prompt=page.prompt,
            subset=page.subset,
            shown=(study.systems[number:] + study.systems[:number]),
            choice=None if number == 2 else study.systems[at % 3],
            expected=page.expected,
            seconds=1.25 * at,
            source=source,
        )
        for number in range(3)
        for at, page in enumerate(study.pages)
    ]


@pytest.mark.parametrize("source", ["imported", "simulated"])
def test_votes_come_back_from_csv(study: Study, url: str, tmp_path: Path, source: str) -> None:
    votes, file = _votes(study, source), tmp_path / "votes.csv"
    file.write_text(csv_text(votes))
    database.add_votes(url, study, votes_in_csv(file, study, KEY))
    assert database.votes(url) == votes
    with pytest.raises(ValueError, match="in the database already"):
        database.add_votes(url, study, votes[:1])


def test_simulated_votes_keep_apart(study: Study, study_folder: Path, sqlite: str) -> None:
    votes = _votes(study, "simulated")
    database.add_votes(sqlite, study, votes)
    with pytest.raises(ValueError, match="don't go into one database"):
        database.add_votes(sqlite, study, [replace(votes[0], respondent="f" * 32, source="imported")])
    with pytest.raises(ValueError, match="simulated votes: give people another"):
        create_app(study_folder, sqlite)


def test_a_study_that_is_served_takes_no_people_beside_simulated_votes(
    client: TestClient, url: str, study: Study
) -> None:
    database.add_votes(url, study, _votes(study, "simulated"))
    answer = client.post("/start", data={"token": _hidden(client.get("/").text)})
    assert answer.status_code == 503
    assert "not for people" in answer.text
    assert {vote.source for vote in database.votes(url)} == {"simulated"}


def test_all_that_is_stored_of_a_respondent(engine: sa.Engine, url: str, study: Study) -> None:
    database.start(engine, study, RESPONDENT)
    first, second = study.pages[:2]
    database.save_vote(engine, RESPONDENT, first.id, "ours", 2.0)
    database.save_vote(engine, RESPONDENT, second.id, None, 3.0)
    rows = {
        row["page"]: row
        for row in csv.DictReader(io.StringIO(respondent_csv(database.stored(url, RESPONDENT))))
    }
    assert len(rows) == len(study.pages)
    assert [rows[page.id]["choice"] for page in study.pages[:3]] == ["ours", "none", ""]
    assert [rows[page.id]["seconds"] for page in study.pages[:3]] == ["2.0", "3.0", ""]
    assert sorted(int(row["position"]) for row in rows.values()) == list(range(len(rows)))
    assert {row["submitted"] for row in rows.values()} == {"False"}


def test_label_studio_and_back(study: Study, tmp_path: Path) -> None:
    votes = _votes(study)
    tasks = json.loads(json.dumps(label_studio_tasks(study, votes)))
    assert not any(system in json.dumps(tasks) for system in study.systems)
    config = ElementTree.fromstring(label_studio_config(study))
    shown = {element.get("value", "").removeprefix("$") for element in config.iter("Image")}
    assert all(shown | {"page", "prompt"} == task["data"].keys() for task in tasks)
    assert [choice.get("value") for choice in config.iter("Choice")] == ["1", "2", "3", "none"]

    # What Label Studio writes as CSV: the task's data, and its own names for who and how long.
    lines = io.StringIO()
    writer = csv.DictWriter(lines, [*tasks[0]["data"], "annotator", "choice", "lead_time"])
    writer.writeheader()
    for task in tasks:
        for annotation in task["annotations"]:
            (result,) = annotation["result"]
            (choice,) = result["value"]["choices"]
            said = {"annotator": result["meta"]["text"][0], "choice": choice}
            writer.writerow(task["data"] | said | {"lead_time": annotation["lead_time"]})
    file = tmp_path / "label-studio.csv"
    file.write_text(lines.getvalue())
    back = {(vote.respondent, vote.page): vote for vote in votes_in_csv(file, study, KEY)}
    for vote in votes:
        read = back.pop((vote.respondent, vote.page))
        assert replace(read, shown=vote.shown) == vote
        assert sorted(read.shown) == list(study.systems)
    assert not back


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ann,{page},best,1", r"line 3: the choice 'best' is not ours, plain, structure, 1 to 3 or none"),
        ("ann,{page},4,1", "line 3: the choice '4'"),
        ("ann,page,ours,1", "line 3: the study has no page 'page'"),
        ("ann,{page},ours,-1", "line 3: the seconds are '-1'"),
        ("ann,{page},ours,soon", "line 3: the seconds are 'soon'"),
        (" ,{page},ours,1", "line 3: it names no respondent"),
        ("ann,{page},ours", "line 3: it has not as many columns"),
        ("bob,{page},ours,1", "line 3: bob has answered page"),
    ],
)
def test_a_bad_line_is_named(study: Study, tmp_path: Path, line: str, message: str) -> None:
    page, file = study.pages[0].id, tmp_path / "votes.csv"
    good = f"respondent,page,choice,seconds,shown\nbob,{page},ours,1,ours;plain;structure\n"
    columns = line.format(page=page)
    if line.count(",") == 3:
        columns += ",ours;plain;structure"
    file.write_text(good + columns + "\n")
    with pytest.raises(ValueError, match=message):
        votes_in_csv(file, study, KEY)
    file.write_text(good)
    (vote,) = votes_in_csv(file, study, KEY)
    assert re.fullmatch("[0-9a-f]{32}", vote.respondent)
    file.write_text("respondent,page\n")
    with pytest.raises(ValueError, match="line 1: there is no column choice, seconds"):
        votes_in_csv(file, study, KEY)


# Served


def _hidden(page: str) -> str:
    found = re.search(r'name="token" value="([^"]+)"', page)
    assert found, page
    return found[1]


def _site(client: TestClient) -> server.Site:
    application: Any = client.app
    return application.state.site


def _start(client: Any) -> Any:
    """Begin as a respondent; the first page."""
    answer = client.post("/start", data={"token": _hidden(client.get("/").text)}, follow_redirects=True)
    assert answer.status_code == 200
    return answer


def _vote(client: Any, number: int, choice: str) -> Any:
    token = _hidden(client.get(f"/page/{number}").text)
    return client.post(f"/page/{number}", data={"token": token, "choice": choice}, follow_redirects=False)


def test_who_skipped_pages_is_led_to_them(client: TestClient) -> None:
    _start(client)
    led_to = [_vote(client, number, "1").headers["location"] for number in (1, 3, 5, 6, 2, 4)]
    assert led_to == [f"/page/{number}" for number in (2, 4, 6)] + ["/review", "/page/4", "/review"]
    assert 'href="/review"' in client.get("/page/1").text


def test_a_whole_session(client: TestClient, url: str, study: Study) -> None:
    _start(client)
    for number in range(1, 7):
        assert _vote(client, number, "2").status_code == 303
    assert _vote(client, 3, "none").headers["location"] == "/review"
    review = client.get("/review").text
    assert "6 of 6 answered" in review
    done = client.post("/submit", data={"token": _hidden(review)})
    assert done.url.path == "/done"
    votes = database.votes(url)
    assert [vote.choice for vote in votes] == [
        None if at == 2 else vote.shown[1] for at, vote in enumerate(votes)
    ]
    assert {vote.page for vote in votes} == set(study.page)
    assert all(0 <= vote.seconds < 60 for vote in votes)
    assert votes[0].respondent in done.text
    assert client.get("/page/1").url.path == "/done"
    assert client.get("/").url.path == "/done"


def test_forged_votes_count_for_nothing(client: TestClient, url: str) -> None:
    first = _start(client).text
    token, cookie = _hidden(first), client.cookies[COOKIE]
    with TestClient(client.app) as other:
        others = _hidden(_start(other).text)

    def post(path: str, data: dict[str, str], **headers: str) -> int:
        return client.post(path, data=data, headers=headers, follow_redirects=False).status_code

    good = {"token": token, "choice": "1"}
    assert post("/page/1", {"token": others, "choice": "1"}) == 403
    assert post("/page/1", {"token": token + "x", "choice": "1"}) == 403
    assert post("/page/2", good) == 403
    assert post("/page/1", {"choice": "1"}) == 400
    assert post("/page/1", good | {"choice": "4"}) == 400
    assert post("/page/1", good | {"choice": "ours"}) == 400
    assert post("/page/7", good) == 404
    assert post("/page/1", good, **{"Sec-Fetch-Site": "cross-site"}) == 403
    assert post("/page/1", good | {"choice": "1" * 20_000}) == 413
    chunks = iter([b"token=", token.encode()])
    # A length that is told beside chunks is not that of the body.
    told = {"Content-Length": "10", "Content-Type": "application/x-www-form-urlencoded"}
    assert (
        client.post("/page/1", content=chunks, headers=told | {"Transfer-Encoding": "chunked"}).status_code
        == 413
    )
    assert post("/submit", {"token": token}) == 403
    assert post("/start", {"token": "forged"}) == 303
    client.cookies.clear()
    client.cookies.set(COOKIE, "x" + cookie)
    assert post("/page/1", good) == 403
    client.cookies.clear()
    assert post("/page/1", good) == 403
    assert post("/start", {"token": "forged"}) == 403
    assert database.votes(url) == []
    client.cookies.set(COOKIE, cookie)
    # Sent again and again, it is one vote; once handed in, none.
    assert [post("/page/1", good) for _ in range(3)] == [303] * 3
    for number in range(2, 7):
        _vote(client, number, "1")
    before = database.votes(url)
    assert len(before) == 6
    assert post("/submit", {"token": _hidden(client.get("/review").text)}) == 303
    assert post("/page/1", good | {"choice": "2"}) == 409
    assert database.votes(url) == before


def test_a_start_sent_twice_is_one_respondent(client: TestClient) -> None:
    token = _hidden(client.get("/").text)
    for _ in range(2):
        client.cookies.clear()
        assert client.post("/start", data={"token": token}).url.path == "/page/1"
    (counted,) = database.count(_site(client).engine)
    assert counted.started == 1


def test_the_client_learns_nothing(study_folder: Path, sqlite: str, study: Study) -> None:
    with TestClient(create_app(study_folder, sqlite)) as client:
        pages = [_start(client)] + [client.get(f"/page/{number}") for number in range(1, 7)]
        pages += [client.get("/review"), client.get("/nothing")]
        for page in pages:
            assert not any(system in page.text for system in study.systems)
            assert page.headers["cache-control"] == "no-store"
            assert "default-src 'none'" in page.headers["content-security-policy"]
        image = client.get(re.findall(r"/images/\w+\.webp", pages[0].text)[0])
        assert image.headers["content-type"] == "image/webp"
        assert "immutable" in image.headers["cache-control"]
        assert not {"etag", "last-modified"} & image.headers.keys()
        for path in ("/images/study.json", "/images/..%2fstudy.json", "/progress", "/progress?token=x"):
            assert client.get(path).status_code == 404
        client.cookies.clear()
        cookie = client.post("/start", data={"token": _hidden(client.get("/").text)}, follow_redirects=False)
        assert {"HttpOnly", "SameSite=lax"} < set(cookie.headers["set-cookie"].split("; "))
    assert all(b"testclient" not in file.read_bytes() for file in Path(sqlite[10:]).parent.glob("votes*"))


def test_the_owner_sees_counts(client: TestClient, study: Study) -> None:
    _start(client)
    assert client.get("/progress", params={"token": "é"}).status_code == 404
    seen = client.get("/progress", params={"token": _site(client).owner_token})
    assert re.search(r"web</td><td>1</td><td>0</td><td>0</td>", seen.text)
    _vote(client, 1, "1")
    seen = client.get(seen.url)
    assert re.search(r"web</td><td>1</td><td>0</td><td>1</td>", seen.text)
    assert not any(system in seen.text for system in study.systems)


def test_too_many_requests_are_refused(
    study_folder: Path, sqlite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "PER_RESPONDENT", RateLimitItemPerMinute(5))
    with TestClient(create_app(study_folder, sqlite)) as client:
        _start(client)
        answers = [client.get("/review") for _ in range(6)]
        assert answers[-1].status_code == 429
        assert answers[-1].headers["retry-after"] == "60"
        client.cookies.clear()
        assert client.get("/").status_code == 200
        monkeypatch.setattr(server, "FILES_PER_ADDRESS", RateLimitItemPerMinute(1))
        monkeypatch.setattr(server, "PER_ADDRESS", RateLimitItemPerMinute(1))
        image = f"/images/{next(iter(_site(client).study.files))}"
        statuses = [client.get(path).status_code for path in ("/static/style.css", image, "/", "/")]
        assert statuses == [200, 429, 200, 429]


@pytest.mark.parametrize("field", ["least_checks", "least_seconds", "least_answered"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_rules_that_are_no_number_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        Rules(**{field: value})


def test_a_taken_or_impossible_address_is_refused_before_a_token_is_printed(
    study_folder: Path, sqlite: str
) -> None:
    with server.listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        for host, there in (("127.0.0.1", port), ("127.0.0.1", "70000"), ("nowhere.invalid", "0")):
            options = ["--host", host, "--port", there, "--database", sqlite]
            result = CliRunner().invoke(app, ["study", "serve", str(study_folder), *options])
            assert result.exit_code == 2, result.output
            assert "token" not in result.output
            assert there in result.stderr


@pytest.mark.parametrize("path", ["/", "/page/1", "/review", "/static/style.css", "/progress"])
def test_head_is_answered_as_get_without_the_body(client: TestClient, path: str) -> None:
    _start(client)
    assert client.head(path).status_code == client.get(path).status_code


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_without_its_database_the_study_says_so(client: TestClient, method: str) -> None:
    _start(client)
    token, site = _hidden(client.get("/page/1").text), _site(client)
    respondent = re.search(r"<code>(\w+)</code>", client.get("/page/1").text)
    assert respondent is not None

    @event.listens_for(site.engine, "before_cursor_execute")
    def full(*_: Any) -> None:
        raise OperationalError("", {}, Exception("database or disk is full"))

    form = {"token": token, "choice": "1"} if method == "POST" else None
    answer = client.request(method, "/page/1", data=form)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "60"
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert respondent[1] in answer.text
    event.remove(site.engine, "before_cursor_execute", full)
    assert client.get("/page/1").status_code == 200


def test_an_error_that_nobody_foresaw_is_a_page_too(
    study_folder: Path, sqlite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError

    with TestClient(create_app(study_folder, sqlite), raise_server_exceptions=False) as client:
        _start(client)
        monkeypatch.setattr(database, "sheet", broken)
        answer = client.get("/page/1")
    assert answer.status_code == 500
    assert "x-frame-options" in answer.headers
    assert "Your number in this study" in answer.text


def test_a_database_that_is_none_is_named(study_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "votes.sqlite").write_bytes(b"no database at all" * 100)
    for url in (f"sqlite:///{tmp_path}/votes.sqlite", f"sqlite:///{tmp_path}/nowhere/votes.sqlite"):
        with pytest.raises(ValueError, match=r"votes\.sqlite' cannot be used"):
            create_app(study_folder, url)


_FORM = "Content-Type: application/x-www-form-urlencoded"
_UNFINISHED = f"POST /start HTTP/1.1\r\nHost: x\r\n{_FORM}\r\nContent-Length: 9\r\n\r\nab"


@pytest.mark.parametrize(
    "sent",
    [
        "",
        "GET / HTTP/1.1\r\n",
        _UNFINISHED,
        f"GET / HTTP/1.1\r\nHost: x\r\n\r\n{_UNFINISHED}",
    ],
)
def test_connections_that_stall_are_closed(
    study_folder: Path, sqlite: str, monkeypatch: pytest.MonkeyPatch, sent: str
) -> None:
    monkeypatch.setattr(PunctualProtocol, "request_seconds", 0.3)
    with server.listen("127.0.0.1", 0) as listener:
        config = uvicorn.Config(create_app(study_folder, sqlite), http=PunctualProtocol, log_level="error")
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, args=([listener],), daemon=True)
        thread.start()
        with socket.create_connection(listener.getsockname(), timeout=20) as connection:
            connection.sendall(sent.encode())
            with suppress(ConnectionResetError):
                while connection.recv(1000):
                    pass
        running.should_exit = True
        thread.join(20)


def test_a_saved_vote_survives_a_killed_server(
    serve_study: Callable[[], tuple[str, subprocess.Popen]], tmp_path: Path, study: Study
) -> None:
    address, process = serve_study()
    with httpx.Client(base_url=address) as client:
        _start(client)
        for number in range(1, 4):
            assert _vote(client, number, "2").status_code == 303
        process.send_signal(signal.SIGKILL)
        process.wait()
        votes = database.votes(f"sqlite:///{tmp_path}/votes.sqlite")
        assert [vote.choice for vote in votes] == [vote.shown[1] for vote in votes]
        assert len(votes) == 3
        serve_study()
        home = client.get("/").text
        assert "3 of your 6 answers are saved" in home
        assert (
            client.post("/start", data={"token": _hidden(home)}, follow_redirects=True).url.path == "/page/4"
        )


def test_the_command_line(small_run: Path, tmp_path: Path) -> None:
    def run(*arguments: str, status: int = 0) -> str:
        result = CliRunner().invoke(app, ["study", *arguments])
        assert result.exit_code == status, result.output
        return result.output

    folder, votes = str(tmp_path / "study"), tmp_path / "votes.csv"
    options = ["--out", folder, "--prompts-per-subset", "2", "--seeds", "2", "--allow-none"]
    assert "10 pages, 3 to check attention, 3 to repeat another" in run("create", str(small_run), *options)
    assert "no votes yet" in run("export", folder, str(votes), status=2)
    votes.write_text(csv_text(_votes(read_study(Path(folder)))))
    assert "30 votes of 3 respondents added" in run("import", folder, str(votes))
    assert run("export", folder, str(tmp_path / "out.csv")).strip() == str(tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == votes.read_text()
    assert run("export", folder, str(tmp_path / "tasks.json")).split() == [
        str(tmp_path / "tasks.json"),
        str(tmp_path / "tasks.xml"),
    ]
    assert len(run("export-respondent", folder, "0" * 32).splitlines()) == 11
    assert "no respondent 'x'" in run("export-respondent", folder, "x", status=2)
    run("delete-respondent", folder, "0" * 32)
    assert "no respondent" in run("delete-respondent", folder, "0" * 32, status=2)
    assert "end the name in .csv" in run("export", folder, "votes.txt", status=2)
    assert "there is no folder" in run("export", folder, str(tmp_path / "none" / "votes.csv"), status=2)
