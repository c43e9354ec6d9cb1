"""The study's web pages: rendered here, with nothing to build, and usable without a script."""

from __future__ import annotations

import hmac
import logging
import secrets
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, Any, NoReturn

try:
    import sqlalchemy as sa
    import uvicorn
    from fastapi import APIRouter, Depends, FastAPI, Form, HTTPException, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, RedirectResponse
    from fastapi.staticfiles import StaticFiles
    from itsdangerous import BadSignature, URLSafeSerializer
    from jinja2 import Environment, PackageLoader
    from limits import RateLimitItemPerMinute
    from limits.storage import MemoryStorage
    from limits.strategies import SlidingWindowCounterRateLimiter
    from sqlalchemy.exc import SQLAlchemyError
    from starlette.datastructures import Headers, MutableHeaders
    from starlette.exceptions import HTTPException as StarletteHTTPException
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"the study needs {error.name}: pip install 'attend-excite[study]'") from error

from attend_excite.study import database
from attend_excite.study.connections import PunctualProtocol
from attend_excite.study.create import IMAGES, NONE, Study, read_study
from attend_excite.study.database import Answer, Sheet

COOKIE = "study"
_COOKIE_DAYS = 60
_LARGEST_BODY = 10_000

# A person takes seconds for a page. An address may be that of a whole lecture hall.
PER_RESPONDENT = RateLimitItemPerMinute(240)
PER_ADDRESS = RateLimitItemPerMinute(12_000)
STARTS_PER_ADDRESS = RateLimitItemPerMinute(400)
FILES_PER_ADDRESS = RateLimitItemPerMinute(60_000)

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Robots-Tag": "noindex",
}
_FILES = ("/images/", "/static/")
_TOO_FAST, _WAIT = "That was too fast: wait a minute and go on.", {"Retry-After": "60"}
_NO_DATABASE = (
    "The study cannot store anything right now. Your earlier answers are safe: wait a minute, then load the "
    "page again, or go back and choose once more."
)
_BROKEN = "Something went wrong on our side. Your answers so far are kept: go on from the first page."
_FOREVER = "private, max-age=31536000, immutable"
_LOG = logging.getLogger("uvicorn.error")


@dataclass(frozen=True)
class Site:
    """What the pages stand on: the frozen study, its images, its database and what signs."""

    study: Study
    images: Path
    engine: sa.Engine
    owner_token: str
    cookies: URLSafeSerializer
    forms: URLSafeSerializer
    starts: URLSafeSerializer
    limiter: SlidingWindowCounterRateLimiter
    address_key: bytes

    @classmethod
    def of(cls, folder: Path, url: str) -> Site:
        """Check the study, open its database.

        Raises:
            ValueError: the study has changed, or the database is another study's or a simulation's.
        """
        study = read_study(folder)
        engine = database.open_database(url, study)
        if any(counted.source == "simulated" for counted in database.count(engine)):
            raise ValueError("the database holds simulated votes: give people another")
        keys = database.read_secrets(engine)
        return cls(
            study=study,
            images=folder / IMAGES,
            engine=engine,
            owner_token=keys.owner_token,
            cookies=URLSafeSerializer(keys.cookie_key, "cookie"),
            forms=URLSafeSerializer(keys.cookie_key, "form"),
            starts=URLSafeSerializer(keys.cookie_key, "start"),
            limiter=SlidingWindowCounterRateLimiter(MemoryStorage()),
            address_key=secrets.token_bytes(32),
        )


def create_app(folder: Path, url: str) -> FastAPI:
    """The web application of one study.

    Args:
        folder: the study's.
        url: its database.

    Raises:
        ValueError: the study has changed, or the database is another study's or a simulation's.
    """
    app = FastAPI(openapi_url=None)
    app.state.site = Site.of(folder, url)
    app.include_router(_pages)
    app.include_router(_files)
    app.mount("/static", StaticFiles(packages=[("attend_excite.study", "static")]))
    app.add_middleware(_Guard)
    app.add_exception_handler(StarletteHTTPException, _told)
    app.add_exception_handler(RequestValidationError, _told)
    app.add_exception_handler(SQLAlchemyError, _without_database)
    app.add_exception_handler(Exception, _broken)
    return app


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address.

    Args:
        host: a name or number; "" or "0.0.0.0": every address of this machine.
        port: 0: any that is free.

    Raises:
        ValueError: nobody can listen there, or another program does.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"the port is {port}: it must be 0 to 65535")
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"nobody can listen at {host}, port {port} ({reason}): choose another") from error


def run(app: FastAPI, listener: socket.socket) -> None:
    """Serve until stopped. One process, so that the rates are counted in one place; no log of addresses."""
    config = uvicorn.Config(
        app, http=PunctualProtocol, access_log=False, server_header=False, log_level="warning"
    )
    with suppress(KeyboardInterrupt), listener:
        uvicorn.Server(config).run([listener])


class _Guard:
    """Refuses what no page of ours sends, and puts the security headers on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await (_refusal(scope) or self.app)(scope, receive, send_guarded)


def _refusal(scope: Scope) -> Response | None:
    kind, limit = ("files", FILES_PER_ADDRESS) if scope["path"].startswith(_FILES) else ("pages", PER_ADDRESS)
    if not scope["app"].state.site.limiter.hit(limit, kind, _address(scope)):
        return _error_page(Request(scope), 429, _TOO_FAST, _WAIT)
    if scope["method"] in ("GET", "HEAD"):
        return None
    headers = Headers(scope=scope)
    length = headers.get("content-length", "")
    # A body in chunks has no length that could be held against it.
    if "transfer-encoding" in headers or not (length.isdecimal() and int(length) <= _LARGEST_BODY):
        return _error_page(Request(scope), 413, "That is too long for a form.")
    if headers.get("sec-fetch-site", "same-origin") != "same-origin":
        return _error_page(Request(scope), 403, "The form was sent from another site.")
    return None


def _told(request: Request, error: Exception) -> Response:
    """An error as a page."""
    if isinstance(error, StarletteHTTPException):
        return _error_page(request, error.status_code, error.detail, error.headers)
    return _error_page(request, 400, "Something is missing in the form.")


def _without_database(request: Request, error: Exception) -> Response:
    """The database is down, full or busy. The reason is for whoever runs the study."""
    reason = getattr(error, "orig", None) or error
    _LOG.error("the database cannot be used: %s", str(reason).strip().split("\n", 1)[0])
    return _error_page(request, 503, _NO_DATABASE, _WAIT)


def _broken(request: Request, _: Exception) -> Response:
    """Anything else; the server writes the trace. This answer is made outside of `_Guard`."""
    return _error_page(request, 500, _BROKEN, _HEADERS)


def _error_page(
    request: Request, status: int, sentence: str, headers: Mapping[str, str] | None = None
) -> Response:
    """A respondent who asks for help, or to be forgotten, finds the number also here."""
    respondent = _signed_in(request)
    return _page("error.html", status, headers, sentence=sentence, respondent=respondent)


def _signed_in(request: Request) -> str | None:
    """The id in the cookie, if we signed it."""
    site: Site = request.scope["app"].state.site
    try:
        return site.cookies.loads(request.cookies.get(COOKIE, ""))
    except BadSignature:
        return None


# Dependencies that wait for nothing are coroutines: others cost a hop to a thread each.


async def _site(request: Request) -> Site:
    return request.app.state.site


SiteHere = Annotated[Site, Depends(_site)]


async def _respondent(request: Request) -> str | None:
    return _signed_in(request)


RespondentHere = Annotated[str | None, Depends(_respondent)]


def _sheet(site: Site, respondent: str | None) -> Sheet:
    sheet = None if respondent is None else database.sheet(site.engine, respondent)
    if sheet is None:
        raise HTTPException(403, "This browser has not started the study, or its cookie is gone.")
    return sheet


Field = Annotated[str, Form()]


async def _limited(request: Request, site: SiteHere, respondent: RespondentHere) -> None:
    """Refuse a respondent who asks too much, or an address that starts too many."""
    allowed = request.url.path != "/start" or site.limiter.hit(STARTS_PER_ADDRESS, _address(request.scope))
    if respondent is not None:
        allowed = allowed and site.limiter.hit(PER_RESPONDENT, respondent)
    if not allowed:
        raise HTTPException(429, _TOO_FAST, _WAIT)


def _address(scope: Scope) -> str:
    """Of an address only a keyed digest is kept, in memory, for a minute."""
    site: Site = scope["app"].state.site
    client = scope["client"][0] if scope.get("client") else ""
    return hmac.digest(site.address_key, client.encode(), "sha256").hex()


_pages = APIRouter(dependencies=[Depends(_limited)])
_files = APIRouter()

# FastAPI answers HEAD only where it is told to.
_READ: Any = {"methods": ["GET", "HEAD"]}


@_pages.api_route("/", **_READ)
def _home(site: SiteHere, respondent: RespondentHere) -> Response:
    """Consent and instructions, or the way back in."""
    sheet = None if respondent is None else database.sheet(site.engine, respondent)
    if sheet is not None and sheet.submitted:
        return _to("/done")
    return _page(
        "home.html",
        consent=site.study.consent.split("\n\n"),
        allow_none=site.study.allow_none,
        pages=len(site.study.pages),
        systems=len(site.study.systems),
        sheet=sheet,
        respondent=None if sheet is None else respondent,
        # The id is drawn with the form: sent twice, it starts one respondent.
        token=site.starts.dumps(secrets.token_hex(16)),
    )


@_pages.post("/start")
def _start(request: Request, site: SiteHere, respondent: RespondentHere, token: Field) -> Response:
    """Begin, or go on at the first page without an answer."""
    sheet = None if respondent is None else database.sheet(site.engine, respondent)
    if sheet is not None:
        return _to(_next_unanswered(sheet))
    try:
        new = site.starts.loads(token)
    except BadSignature:
        _refuse()
    try:
        database.start(site.engine, site.study, new)
    except ValueError:
        raise HTTPException(503, "The study is closed: its database is not for people's votes.") from None
    response = _to("/page/1")
    response.set_cookie(
        COOKIE,
        site.cookies.dumps(new),
        max_age=_COOKIE_DAYS * 24 * 3600,
        httponly=True,
        samesite="lax",
        secure=request.url.scheme == "https",
    )
    return response


@_pages.api_route("/page/{number}", **_READ)
def _show(number: int, site: SiteHere, respondent: RespondentHere) -> Response:
    """One prompt and the sets of images."""
    sheet = _sheet(site, respondent)
    if sheet.submitted:
        return _to("/done")
    answer = _numbered(sheet, number)
    page = site.study.page[answer.page]
    return _page(
        "page.html",
        number=number,
        sheet=sheet,
        respondent=respondent,
        prompt=page.prompt,
        expected=None if page.expected is None else answer.shown.index(page.expected) + 1,
        sets=[page.images[system] for system in answer.shown],
        choices=_choices(site.study, answer),
        answer=answer,
        token=site.forms.dumps([respondent, answer.page, time.time()]),
    )


@_pages.post("/page/{number}")
def _vote(number: int, site: SiteHere, respondent: RespondentHere, token: Field, choice: Field) -> Response:
    """Keep a vote, then go on. The answer is sent once the vote is on the disk."""
    sheet = _sheet(site, respondent)
    answer = _numbered(sheet, number)
    shown_at = _signed(site, token, respondent, answer.page)
    choices = _choices(site.study, answer)
    if choice not in choices:
        raise HTTPException(400, "There is no such set of images.")
    seconds = max(0.0, time.time() - shown_at)
    if not database.save_vote(site.engine, str(respondent), answer.page, choices[choice], seconds):
        raise HTTPException(409, "Your answers are handed in already, and stay as they were.")
    return _to(_next_unanswered(sheet, after=number))


@_pages.api_route("/review", **_READ)
def _review(site: SiteHere, respondent: RespondentHere) -> Response:
    """Which pages have been answered, and the way to hand them in."""
    sheet = _sheet(site, respondent)
    if sheet.submitted:
        return _to("/done")
    token = site.forms.dumps([respondent, "submit", time.time()])
    return _page("review.html", sheet=sheet, respondent=respondent, token=token)


@_pages.post("/submit")
def _submit(site: SiteHere, respondent: RespondentHere, token: Field) -> Response:
    """Hand the answers in."""
    _sheet(site, respondent)
    _signed(site, token, respondent, "submit")
    return _to("/done" if database.submit(site.engine, str(respondent)) else "/review")


@_pages.api_route("/done", **_READ)
def _done(site: SiteHere, respondent: RespondentHere) -> Response:
    """Thanks."""
    submitted = _sheet(site, respondent).submitted
    return _page("done.html", respondent=respondent) if submitted else _to("/review")


@_pages.api_route("/progress", **_READ)
def _progress(site: SiteHere, token: str = "") -> Response:
    """How far the respondents are, for the owner. What they prefer stays unknown until the analysis."""
    if not hmac.compare_digest(token.encode(), site.owner_token.encode()):
        raise HTTPException(404, "Not Found")
    counts = database.count(site.engine)
    return _page("progress.html", counts=counts, pages=len(site.study.pages), hash=site.study.hash)


@_files.api_route("/images/{name}", **_READ)
async def _image(name: str, site: SiteHere) -> Response:
    """An image of the study. No date goes with it: the order in which files were written tells tales."""
    if name not in site.study.files:
        raise HTTPException(404, "Not Found")
    content = (site.images / name).read_bytes()
    return Response(content, media_type="image/webp", headers={"Cache-Control": _FOREVER})


def _next_unanswered(sheet: Sheet, after: int = 0) -> str:
    """The first page without an answer behind one, or else the overview."""
    unanswered = (at for at, answer in enumerate(sheet.answers, 1) if at > after and not answer.voted)
    at = next(unanswered, None)
    return "/review" if at is None else f"/page/{at}"


def _numbered(sheet: Sheet, number: int) -> Answer:
    if not 1 <= number <= len(sheet.answers):
        raise HTTPException(404, "There is no such page.")
    return sheet.answers[number - 1]


def _choices(study: Study, answer: Answer) -> dict[str, str | None]:
    """What can be answered, as a form writes it -> the system."""
    numbered: dict[str, str | None] = dict(zip(map(str, count(1)), answer.shown, strict=False))
    return numbered | ({NONE: None} if study.allow_none else {})


def _signed(site: Site, token: str, respondent: str | None, purpose: str) -> float:
    """When the form was shown, if we gave it to this respondent for this purpose."""
    try:
        owner, signed_purpose, shown_at = site.forms.loads(token)
    except BadSignature:
        _refuse()
    if (owner, signed_purpose) != (respondent, purpose):
        _refuse()
    return shown_at


def _refuse() -> NoReturn:
    raise HTTPException(403, "The form is not one that this site gave to this browser.")


def _to(path: str) -> RedirectResponse:
    return RedirectResponse(path, 303)


_TEMPLATES = Environment(
    loader=PackageLoader("attend_excite.study"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


def _page(
    template: str, status: int = 200, headers: Mapping[str, str] | None = None, **context: Any
) -> HTMLResponse:
    # Not stored, so that the back button shows what has been answered since.
    kept = {"Cache-Control": "no-store", **(headers or {})}
    return HTMLResponse(_TEMPLATES.get_template(template).render(context), status, kept)
