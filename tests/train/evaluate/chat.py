"""A chat endpoint on this machine that answers as a test says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.serving import running


@dataclass(frozen=True)
class Reply:
    """A status with a body; `text` is the answer of a chat model, `body` anything else."""

    text: str = ""
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def content(self) -> bytes:
        message = {"choices": [{"message": {"role": "assistant", "content": self.text}}]}
        return json.dumps(message).encode() if self.body is None else self.body


@dataclass
class Asked:
    """A request as the endpoint saw it."""

    path: str
    key: str | None
    body: dict[str, Any]

    @property
    def prompt(self) -> str:
        return str(self.body["messages"][0]["content"])


class Chat:
    """What was asked, and where: `address` is up to /v1."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}/v1"
        self.asked: list[Asked] = []


@contextmanager
def chat(answer: Callable[[Asked, int], Reply]) -> Iterator[Chat]:
    """Serve; `answer` is given each request and its number."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = Asked(self.path, self.headers.get("Authorization"), body)
            state.asked.append(asked)
            reply = answer(asked, len(state.asked) - 1)
            content = reply.content()
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(content)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Chat(server.server_address[1])
    with running(server):
        yield state
