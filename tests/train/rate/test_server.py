"""The local page over real HTTP."""

from __future__ import annotations

import http.client
import json
import re
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from tests.serving import running
from tests.train.rate.made import HOSTILE, learner
from train.rate.answers import Answers
from train.rate.items import order_for, read_items
from train.rate.server import MAX_BODY, RatingServer, Session


@pytest.fixture
def session(tmp_path: Path) -> Session:
    items = read_items([learner(tmp_path / "r" / name) for name in ("topk", "tree")], 3, 0)
    return Session("ada", order_for("ada", items, 0), Answers(tmp_path / "ratings.sqlite"))


@pytest.fixture
def server(session: Session) -> Iterator[RatingServer]:
    with running(RatingServer("127.0.0.1", 0, session)) as server:
        yield server


def ask(
    server: RatingServer, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, Any, dict[str, str]]:
    """Status, body (parsed if JSON) and headers; a header given as "" is left out."""
    port = server.server_address[1]
    own = {"Host": f"127.0.0.1:{port}"}
    if method == "POST":
        own |= {"Origin": f"http://127.0.0.1:{port}", "Content-Type": "application/json"}
    sent = {name: value for name, value in (own | (headers or {})).items() if value}
    data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request(method, path, data, sent)
    reply = connection.getresponse()
    text = reply.read()
    connection.close()
    found = json.loads(text) if reply.headers.get_content_type() == "application/json" else text.decode()
    return reply.status, found, dict(reply.headers)


def test_answers_are_stored_and_lead_to_the_next_latent(server: RatingServer, session: Session) -> None:
    _, first, _ = ask(server, "GET", "/item")
    assert (first["place"], first["done"], first["total"], first["score"]) == (0, 0, 6, None)
    status, second, _ = ask(server, "POST", "/answer", {"place": 0, "score": 4, "label": "sums"})
    assert (status, second["place"], second["done"]) == (200, 1, 1)
    item = session.items[0]
    stored = session.answers.all()[0]
    assert (stored.learner, stored.latent, stored.score, stored.label) == (item.learner, item.latent, 4, "sums")


def test_a_restarted_server_goes_on_and_shows_what_was_said(server: RatingServer, session: Session) -> None:
    ask(server, "POST", "/answer", {"place": 0, "score": None, "label": ""})
    ask(server, "POST", "/answer", {"place": 1, "score": 2, "label": "x"})
    again = Session("ada", session.items, Answers(session.answers.path))
    assert again.at()["place"] == 2
    earlier = again.at(1)
    assert (earlier["score"], earlier["label"], earlier["answered"]) == (2, "x", True)
    assert Session("bob", session.items, Answers(session.answers.path)).at()["place"] == 0


def test_when_all_is_answered_there_is_no_place(server: RatingServer) -> None:
    for place in range(6):
        _, last, _ = ask(server, "POST", "/answer", {"place": place, "score": 1, "label": ""})
    assert (last["place"], last["done"], "item" in last) == (None, 6, False)


def test_the_page_runs_no_script_but_its_own(server: RatingServer) -> None:
    status, page, headers = ask(server, "GET", "/")
    nonce = headers["Content-Security-Policy"].split("'nonce-")[1].split("'")[0]
    assert status == 200
    assert page.count("<script") == page.count(f'<script nonce="{nonce}"') == 1
    assert "innerHTML" not in page
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "{{" not in page
    assert HOSTILE in ask(server, "GET", "/item")[1]["item"]["contexts"][0]["tokens"]  # as data, never as page


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", ""])
def test_other_origins_store_nothing(server: RatingServer, session: Session, origin: str) -> None:
    status, said, _ = ask(server, "POST", "/answer", {"place": 0, "score": 1, "label": ""}, {"Origin": origin})
    assert status == 403
    assert "rigin" in said["error"] or "not heard" in said["error"]
    assert session.answers.all() == []


@pytest.mark.parametrize("path", ["/", "/item"])
def test_a_name_pointed_at_this_machine_is_refused(server: RatingServer, path: str) -> None:
    assert ask(server, "GET", path, None, {"Host": "evil.example"})[0] == 403


def test_an_oversized_body_is_refused_unread(server: RatingServer, session: Session) -> None:
    assert ask(server, "POST", "/answer", b"x" * (MAX_BODY + 1))[0] == 413
    status, _, _ = ask(server, "POST", "/answer", {"place": 0, "score": 1, "label": "y" * 501})
    assert status == 400
    assert session.answers.all() == []


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[1]", {}, 400),
        (b"[" * 4000, {}, 400),
        (b"\xff\xfe", {}, 400),
        ({"place": 6, "score": 1, "label": ""}, {}, 400),
        ({"place": -1, "score": 1, "label": ""}, {}, 400),
        ({"place": True, "score": 1, "label": ""}, {}, 400),
        ({"place": 0, "score": 6, "label": ""}, {}, 400),
        ({"place": 0, "score": 2.5, "label": ""}, {}, 400),
        ({"place": 0, "score": True, "label": ""}, {}, 400),
        ({"place": 0, "score": 1, "label": 3}, {}, 400),
        ({"place": 0, "score": 1, "label": "\ud800"}, {}, 400),
        ({"place": 0, "score": 1, "label": ""}, {"Content-Type": "text/plain"}, 415),
        ({"place": 0, "score": 1, "label": ""}, {"Content-Length": "x"}, 411),
    ],
)
def test_what_is_not_an_answer_is_refused(
    server: RatingServer, session: Session, body: Any, headers: dict[str, str], status: int
) -> None:
    assert ask(server, "POST", "/answer", body, headers)[0] == status
    assert session.answers.all() == []
    assert ask(server, "GET", "/item")[0] == 200


@pytest.mark.parametrize("path", ["/item?place=6", "/item?place=x", "/item?place=-1", "/item?place=99999999999"])
def test_places_that_are_none_are_refused(server: RatingServer, path: str) -> None:
    assert ask(server, "GET", path)[0] == 400


@pytest.mark.parametrize("path", ["/ratings.sqlite", "/../../etc/passwd", "/answer"])
def test_nothing_else_is_served(server: RatingServer, path: str) -> None:
    assert ask(server, "GET", path)[0] == 404


def test_a_port_in_use_is_one_error(server: RatingServer, session: Session) -> None:
    with pytest.raises(ConfigError, match=r"--port .*Choose another"):
        RatingServer("127.0.0.1", server.server_address[1], session)


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (PermissionError(13, "Permission denied"), "--port 80: Permission denied. Choose another"),
        (OSError("odd"), "--port 80: odd. Choose another"),
        (OverflowError("port must be 0-65535"), "port must be 0-65535. Choose another"),
        (UnicodeError("label too long"), "--host h --port 80: label too long"),
    ],
)
def test_an_address_that_cannot_be_had_is_one_error(
    session: Session, monkeypatch: pytest.MonkeyPatch, raised: Exception, said: str
) -> None:
    def refuse(server: RatingServer) -> None:
        raise raised

    monkeypatch.setattr(RatingServer, "server_bind", refuse)
    with pytest.raises(ConfigError, match=re.escape(said)):
        RatingServer("h", 80, session)


def test_a_browser_that_goes_away_is_no_error(
    server: RatingServer, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    port = server.server_address[1]
    with socket.create_connection(("127.0.0.1", port)) as connection:
        linger = struct.pack("ii", 1, 0)  # closes with a reset, which the server meets while it reads
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.sendall(f"POST /answer HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n".encode())
        time.sleep(0.1)
    assert ask(server, "GET", "/item")[0] == 200
    assert capsys.readouterr().err == ""


def test_a_database_that_breaks_is_told_and_the_server_lives(
    server: RatingServer, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    session.answers.path.write_text("no database " * 100)
    status, said, _ = ask(server, "POST", "/answer", {"place": 0, "score": 1, "label": ""})
    assert (status, "ratings.sqlite" in said["error"]) == (500, True)
    assert "StoreError" in capsys.readouterr().err
    assert ask(server, "GET", "/")[0] == 200
