"""The local page: one latent at a time over HTTP, for one rater.

Browsers let any page send requests to loopback, so a request is heard only if its Host is ours (a name that was pointed
at this machine is not) and, when it changes something, its Origin is.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from common.console import say
from common.errors import ConfigError, GranaryError
from train.rate.answers import Answers
from train.rate.items import Item

PAGE = Path(__file__).parent / "page.html"
MAX_BODY = 8_192
MAX_LABEL = 500
LOOPBACK = ("127.0.0.1", "localhost")


class Session:
    """One rater's way through the items.

    Attributes:
        items: in the order of this rater; their places are all that the page knows them by.
    """

    def __init__(self, rater: str, items: Sequence[Item], answers: Answers) -> None:
        self.rater, self.items, self.answers = rater, items, answers

    def at(self, place: int | None = None) -> dict[str, Any]:
        """What the page shows: the item at `place`, by default the first without an answer; and how far we are."""
        given = self.answers.of(self.rater)
        answered = [(item.learner, item.latent) in given for item in self.items]
        if place is None:
            place = next((number for number, done in enumerate(answered) if not done), None)
        shown: dict[str, Any] = {"done": sum(answered), "total": len(self.items), "place": place}
        if place is not None:
            item = self.items[place]
            before = given.get((item.learner, item.latent))
            shown |= {"item": item.shown(), "score": before.score if before else None}
            shown |= {"label": before.label if before else "", "answered": before is not None}
        return shown

    def answer(self, place: int, score: int | None, label: str) -> None:
        """Store what was said of the item at `place`."""
        item = self.items[place]
        self.answers.store(self.rater, item.learner, item.latent, score, label)


class Refused(Exception):
    """A request that is not heard, with the status that says why."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    """`GET /`, `GET /item[?place=N]` and `POST /answer`."""

    server: RatingServer
    protocol_version = "HTTP/1.1"
    timeout = 30  # of a connection that says nothing

    def do_GET(self) -> None:
        self.handled(self.get)

    def do_POST(self) -> None:
        self.handled(self.post)

    def handled(self, respond: Any) -> None:
        """Respond, or say why not: nothing a request does ends the server."""
        try:
            self.refuse_strangers()
            respond()
        except Refused as refusal:
            self.close_connection = True  # its body, if any, was not read
            self.send_json({"error": str(refusal)}, refusal.status)
        except GranaryError as error:
            say(f"{type(error).__name__}: {error}")
            self.send_json({"error": str(error)}, HTTPStatus.INTERNAL_SERVER_ERROR)

    def refuse_strangers(self) -> None:
        host = self.headers.get("Host", "")
        if host not in self.server.names and self.server.loopback:
            raise Refused(HTTPStatus.FORBIDDEN, f"this server is {sorted(self.server.names)[0]}, not {host!r}")
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{host}":
            raise Refused(HTTPStatus.FORBIDDEN, f"requests from {origin!r} are not heard")
        if self.command == "POST" and origin is None:
            raise Refused(HTTPStatus.FORBIDDEN, "a request that changes something needs an Origin")

    def get(self) -> None:
        path, _, query = self.path.partition("?")
        if path == "/":
            self.send_page()
        elif path == "/item":
            self.send_json(self.server.session.at(self.place_in(query)))
        else:
            raise Refused(HTTPStatus.NOT_FOUND, "nothing here")

    def place_in(self, query: str) -> int | None:
        """The number in `place=N`, None without a query."""
        if not query:
            return None
        number = query.removeprefix("place=")
        return self.place(int(number) if number.isdecimal() and len(number) < 10 else None)

    def place(self, number: Any) -> int:
        if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(self.server.session.items):
            return number
        raise Refused(HTTPStatus.BAD_REQUEST, f"place must be 0 to {len(self.server.session.items) - 1}")

    def post(self) -> None:
        if self.path != "/answer":
            raise Refused(HTTPStatus.NOT_FOUND, "nothing here")
        said = self.read_body()
        place, score, label = self.place(said.get("place")), said.get("score"), said.get("label", "")
        if score is not None and (type(score) is not int or not 1 <= score <= 5):
            raise Refused(HTTPStatus.BAD_REQUEST, "score must be 1 to 5, or null to skip")
        if not isinstance(label, str) or len(label) > MAX_LABEL:
            raise Refused(HTTPStatus.BAD_REQUEST, f"label must be text of at most {MAX_LABEL} characters")
        if any("\ud800" <= letter <= "\udfff" for letter in label):
            raise Refused(HTTPStatus.BAD_REQUEST, "label holds half a character, which no file can")
        self.server.session.answer(place, score, label)
        self.send_json(self.server.session.at())

    def read_body(self) -> dict[str, Any]:
        """The JSON object that was sent."""
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "application/json is needed")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "a Content-Length is needed")
        if len(length) > 9 or int(length) > MAX_BODY:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {MAX_BODY} bytes")
        try:
            said = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            raise Refused(HTTPStatus.BAD_REQUEST, "a JSON object is needed")
        return said

    def send_page(self) -> None:
        nonce = secrets.token_urlsafe(16)
        policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
        policy += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        page = PAGE.read_text(encoding="utf-8").replace("{{nonce}}", nonce)
        self.send(page.encode(), "text/html; charset=utf-8", HTTPStatus.OK, {"Content-Security-Policy": policy})

    def send_json(self, value: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send(json.dumps(value).encode(), "application/json", status, {})

    def send(self, body: bytes, kind: str, status: HTTPStatus, headers: dict[str, str]) -> None:
        self.send_response(status)
        fixed = {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store"}
        if self.close_connection:
            fixed["Connection"] = "close"
        for name, value in {**fixed, "X-Content-Type-Options": "nosniff", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line for each request would bury the address."""


class RatingServer(ThreadingHTTPServer):
    """Serves one session.

    Attributes:
        names: what Host may say.
        loopback: whether only this machine can reach it, so that Host must be one of `names`.
    """

    daemon_threads = True

    def __init__(self, host: str, port: int, session: Session) -> None:
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError, UnicodeError) as error:  # no such port, no such name
            why = getattr(error, "strerror", None) or error
            raise ConfigError(f"--host {host} --port {port}: {why}. Choose another; 0 takes a free one.") from None
        self.session = session
        self.loopback = self.server_address[0] == "127.0.0.1"
        own = self.server_address[1]
        self.names = {f"{name}:{own}" for name in (LOOPBACK if self.loopback else (host,))}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what went wrong; a browser that went away in the middle is nothing."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def address(self) -> str:
        """What to open in a browser."""
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}/"
