"""What stands before the page: no request is larger, and no address asks more often, than the page needs."""

from __future__ import annotations

import json
import re
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from secure import ContentSecurityPolicy, ReferrerPolicy, Secure, XContentTypeOptions, XFrameOptions
from secure.middleware import SecureASGIMiddleware
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from attend_excite.app.limits import LOGINS, MAX_BODY, MAX_SESSION, MAX_UPLOAD, UPLOADS
from attend_excite.app.parts import Function

_UPLOAD = "/gradio_api/upload"
_RATES = {"/login": RateLimitItemPerMinute(LOGINS), _UPLOAD: RateLimitItemPerMinute(UPLOADS)}
# What Gradio has for parts that this page hasn't: one of them cuts videos, another hands values to a run that
# nobody has looked at.
_UNUSED = re.compile(r"/gradio_api/(?:process_recording|component_server|stream)(?:/|$)")
# Gradio would fetch what stands there, from wherever it is, and hand it out as the page's own.
_ELSEWHERE = re.compile(r"/(?:file[=/]\s*https?:|proxy=)", re.IGNORECASE)
_LISTENING = re.compile(r"/queue/data/?$|/call/(?:v2/)?[^/]+/(?P<event>[^/]+)/?$")
_JOINED = re.compile(r"/queue/join$|/(?:run|api)/(?P<name>[^/]+)$")
_CALLED = re.compile(r"/call/(?P<by_name>v2/)?(?P<name>[^/]+)$")

# Gradio's page writes its configuration into a script of its own, and makes functions of the snippets that
# its events have: both must stay allowed. Nothing comes from elsewhere or goes there, and no other page may
# show this one in a frame.
_POLICY = (
    ContentSecurityPolicy()
    .default_src("'self'")
    .script_src("'self'", "'unsafe-inline'", "'unsafe-eval'", "blob:")
    .style_src("'self'", "'unsafe-inline'")
    .img_src("'self'", "data:", "blob:")
    .font_src("'self'", "data:")
    .connect_src("'self'", "data:", "blob:")
    .worker_src("'self'", "blob:")
    .object_src("'none'")
    .base_uri("'self'")
    .form_action("'self'")
    .frame_ancestors("'none'")
)


Endpoints = Mapping[str, Mapping[str, bool]]
"""What programs may call -> its parameters by name, and whether each has to be given."""

Functions = Mapping[int, Function]
"""The page's functions by number."""


class Listeners:
    """Which runs somebody listens to: a browser or a client holds a connection open for what is reported."""

    def __init__(self) -> None:
        self._open = Counter[str]()

    @contextmanager
    def listening(self, session: str) -> Iterator[None]:
        """In the block somebody listens to a session."""
        self._open[session] += 1
        try:
            yield
        finally:
            self._open[session] -= 1
            if not self._open[session]:
                del self._open[session]

    def __contains__(self, session: object) -> bool:
        return session in self._open


class Guard:
    """Refuses what is too large or too often, and knows who listens."""

    def __init__(
        self, app: ASGIApp, listeners: Listeners, endpoints: Endpoints, functions: Functions
    ) -> None:
        self._app, self._listeners = app, listeners
        self._endpoints, self._functions = endpoints, functions
        self._rates = SlidingWindowCounterRateLimiter(MemoryStorage())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/")
        if _UNUSED.match(path) if scope["method"] == "POST" else _ELSEWHERE.search(path):
            return await _refused(404, "this page has no such thing")(scope, receive, send)
        if scope["method"] == "GET" and (found := _LISTENING.search(path)):
            session = (
                found["event"]
                or parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
            )
            with self._listeners.listening(session):
                return await self._app(scope, receive, send)
        if scope["method"] != "POST":
            return await self._app(scope, receive, send)
        if path in _RATES and not self._rates.hit(_RATES[path], path, _address(scope)):
            refusal = _refused(429, "that was too often: wait a minute and try again", {"Retry-After": "60"})
            return await refusal(scope, receive, send)
        if path == _UPLOAD:
            if _is_one_picture(scope):  # whose file Gradio limits, as it comes
                return await self._app(scope, receive, send)
            told = f"an upload is one picture of at most {MAX_UPLOAD // 2**20} MB"
            return await _refused(413, told)(scope, receive, send)
        body = await _body(receive)
        if body is None:
            refusal = _refused(413, f"the request is too large: at most {MAX_BODY} bytes are read here")
            return await refusal(scope, receive, send)
        if problem := _problem(path, body, self._endpoints, self._functions):
            return await _refused(400, problem)(scope, receive, send)
        return await self._app(scope, _again(body, receive), send)


def guards(listeners: Listeners, endpoints: Endpoints, functions: Functions) -> list[Middleware]:
    """The middleware of the page, the outermost first."""
    headers = Secure(
        csp=_POLICY,
        xfo=XFrameOptions().deny(),
        xcto=XContentTypeOptions().nosniff(),
        referrer=ReferrerPolicy().no_referrer(),
    )
    return [
        Middleware(SecureASGIMiddleware, secure=headers),
        Middleware(Guard, listeners=listeners, endpoints=endpoints, functions=functions),
    ]


def check_address(host: str, port: int | None) -> None:
    """Refuse an address that nothing can listen on, before anything is loaded.

    Raises:
        ValueError: the host isn't one of this machine's, or the port is taken or out of range.
    """
    if port is not None and not 0 < port < 2**16:
        raise ValueError(f"the port is {port}: it must be 1 to {2**16 - 1}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"nobody knows the host '{host}': give an address of this machine, as 127.0.0.1, or "
            "0.0.0.0 for all of them"
        ) from error
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            where = host if port is None else f"{host}, port {port}"
            raise ValueError(
                f"the page cannot listen on {where}: {error.strerror}. Choose another --port or --host"
            ) from error


def _is_one_picture(scope: Scope) -> bool:
    """Whether an upload can be no more than a picture and what stands around it. A body in chunks has no
    length that could be held against it."""
    headers = Headers(scope=scope)
    length = headers.get("content-length", "")
    return "transfer-encoding" not in headers and length.isdecimal() and int(length) <= MAX_UPLOAD + 2**16


async def _body(receive: Receive) -> bytes | None:
    """A request's body; None: it is too large. No more than the limit is kept."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            return None
        if not message.get("more_body", False):
            return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """What gives a body that has been read once more, and then what comes after it."""
    given = False

    async def give() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return give


def _problem(path: str, body: bytes, endpoints: Endpoints, functions: Functions) -> str:
    """What is wrong with a body; "" where nothing is, or it is no JSON, which Gradio refuses."""
    try:
        values: Any = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    try:
        json.dumps(values, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return "a text has half a character, which is none: leave it out"
    except (ValueError, RecursionError):
        return "a number is none, as NaN, or too large, or lists lie too deep in one another"
    called = _CALLED.search(path)
    if not isinstance(values, dict):
        return "a call is an object" if called or _JOINED.search(path) else ""
    session = values.get("session_hash")
    if session is not None and (not isinstance(session, str) or len(session) > MAX_SESSION):
        return f"the session's name must be a text of at most {MAX_SESSION} characters"
    if called is None:
        return _join_problem(values, functions) if _JOINED.search(path) else ""
    if called["name"] not in endpoints:
        return f"there is no such call: choose one of {', '.join(endpoints)}"
    parameters = endpoints[called["name"]]
    if called["by_name"]:
        if strangers := sorted(values.keys() - parameters.keys()):
            return f"{called['name']} takes no {strangers[0][:40]}: it takes {', '.join(parameters)}"
        if missing := [name for name, needed in parameters.items() if needed and name not in values]:
            return f"{called['name']} needs {missing[0]}"
        return ""
    if session is not None:  # its runs are listened to by their own names
        return "a call has no session: leave session_hash out"
    data = values.get("data")
    if not isinstance(data, list) or len(data) != len(parameters):
        return (
            f"{called['name']} takes a list of {len(parameters)} values as its data: "
            f"{', '.join(parameters)}; or some of them by name, at call/v2/{called['name']}"
        )
    return ""


def _join_problem(values: Mapping[str, Any], functions: Functions) -> str:
    """What is wrong with what a browser sends; "" where nothing is."""
    number, data = values.get("fn_index"), values.get("data")
    if type(number) is not int or number not in functions:
        return "the page has no such function: load the page again, or call one by name, at call/NAME"
    function = functions[number]
    if not isinstance(data, list) or len(data) != len(function.kinds):
        return f"this function takes a list of {len(function.kinds)} values as its data: load the page again"
    return function.problem(data, values.get("event_data"))


def _refused(status: int, why: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": why, "error": why}, status, headers)


def _address(scope: Scope) -> str:
    return scope["client"][0] if scope.get("client") else ""
