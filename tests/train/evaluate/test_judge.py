"""The chat endpoint: what is sent, what is tried again, and errors that tell no secret."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest

from common.errors import ConfigError
from tests.train.evaluate.chat import Asked, Reply, chat
from train.evaluate.judge import ATTEMPTS, KEY_VARIABLE, Judge

KEY = "sk-very-secret-0123"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def ask(address: str, key: str | None = KEY, times: int = 1) -> tuple[list[str], list[float]]:
    """The answers to so many questions, and the pauses that were made."""
    pauses: list[float] = []
    with Judge(address, "owl", key, pauses.append) as judge:
        return [judge.answer(f"question {number}") for number in range(times)], pauses


def refused(address: str, key: str | None = KEY) -> str:
    """The one line that a user sees."""
    with pytest.raises(ConfigError) as caught:
        ask(address, key)
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_question_is_one_message_to_the_model_with_the_key() -> None:
    with chat(lambda asked, _: Reply(asked.prompt.upper())) as server:
        assert ask(server.address, times=2) == (["QUESTION 0", "QUESTION 1"], [])
        assert ask(server.address + "/chat/completions/", key=None)[0] == ["QUESTION 0"]
    first = server.asked[0]
    assert (first.path, first.key) == ("/v1/chat/completions", f"Bearer {KEY}")
    message = [{"role": "user", "content": "question 0"}]
    assert first.body == {"model": "owl", "messages": message, "temperature": 0}
    assert server.asked[2].key is None
    assert server.asked[2].path == first.path


@pytest.mark.parametrize("status", [429, 500, 503, 408])
def test_what_passes_is_tried_again_after_growing_pauses(status: int) -> None:
    with chat(lambda _, number: Reply("fine") if number == 3 else Reply(status=status)) as server:
        assert ask(server.address) == (["fine"], [1, 2, 4])


def test_pauses_are_those_that_the_endpoint_asks_for() -> None:
    waits = ["7", "9999", "Wed, 21 Oct 2026 07:28:00 GMT"]

    def answer(_: Asked, number: int) -> Reply:
        return Reply("fine") if number == 3 else Reply(status=429, headers={"Retry-After": waits[number]})

    with chat(answer) as server:
        assert ask(server.address) == (["fine"], [7, 60, 4])


@pytest.mark.parametrize(
    "body",
    [b"<html>", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}', b"[" * 100_000],
)
def test_answers_of_another_kind_are_tried_again_and_then_told(body: bytes) -> None:
    with chat(lambda _, number: Reply("fine") if number == 1 else Reply(body=body)) as server:
        assert ask(server.address)[0] == ["fine"]
    with chat(lambda *_: Reply(body=body)) as server:
        assert "answers that are not those of a chat endpoint, 6 times in a row" in refused(server.address)
        assert len(server.asked) == ATTEMPTS


def test_answers_that_cannot_be_unpacked_are_tried_again_and_then_told() -> None:
    packed = Reply(body=b"hello", headers={"Content-Encoding": "gzip"})
    with chat(lambda _, number: Reply("fine") if number == 1 else packed) as server:
        assert ask(server.address) == (["fine"], [1])
    with chat(lambda *_: packed) as server:
        assert "a broken answer (DecodingError), 6 times in a row" in refused(server.address)


def test_halves_of_characters_in_an_answer_can_be_sent_again() -> None:
    body = b'{"choices": [{"message": {"content": "a \\ud83d word"}}]}'
    with chat(lambda *_: Reply(body=body)) as server:
        assert ask(server.address)[0] == ["a ? word"]


def test_an_endpoint_that_goes_on_failing_ends_it() -> None:
    with chat(lambda *_: Reply(status=502)) as server:
        message = refused(server.address)
    assert message.startswith(f"--judge {server.address}: HTTP 502, 6 times in a row.")
    assert "the same command goes on" in message


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(status=401, body=f"bad key {KEY[:8]}".encode()), f"the key in {KEY_VARIABLE} was refused (HTTP 401)"),
        (Reply(status=403), "was refused (HTTP 403)"),
        (Reply(status=404), "no chat endpoint or no model 'owl' there (HTTP 404)"),
        (Reply(status=307, headers={"Location": "http://127.0.0.1:1/"}), "it points elsewhere (HTTP 307)"),
        (Reply(status=400, body=f"no {KEY}\n".encode() + b"x" * 999), "HTTP 400: no … xxx"),
    ],
)
def test_what_does_not_pass_is_told_at_once(reply: Reply, message: str) -> None:
    with chat(lambda *_: reply) as server:
        told = refused(server.address)
        assert len(server.asked) == 1
    assert message in told
    assert KEY[:8] not in told
    assert len(told) < 400


def test_a_missing_key_is_asked_for() -> None:
    with chat(lambda *_: Reply(status=401)) as server:
        assert f"a key is needed; put it in {KEY_VARIABLE}" in refused(server.address, key=" ")
        assert server.asked[0].key is None


def test_models_that_take_no_temperature_are_asked_without() -> None:
    def answer(asked: Asked, _: int) -> Reply:
        return Reply(status=400, body=b"temperature: unsupported") if "temperature" in asked.body else Reply("fine")

    with chat(answer) as server:
        assert ask(server.address, times=2)[0] == ["fine", "fine"]
        assert ["temperature" in asked.body for asked in server.asked] == [True, False, False]


def test_nobody_there_is_told_at_once() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        assert refused(address) == f"--judge {address}: nothing answers there. Is the address right?"


def test_an_endpoint_that_goes_away_is_waited_for() -> None:
    pauses: list[float] = []
    with contextlib.ExitStack() as endpoint:
        server = endpoint.enter_context(chat(lambda *_: Reply("fine", headers={"Connection": "close"})))
        with Judge(server.address, "owl", KEY, pauses.append) as judge:
            assert judge.answer("one") == "fine"
            endpoint.close()
            with pytest.raises(ConfigError, match="no connection, 6 times in a row"):
                judge.answer("two")
    assert pauses == [1, 2, 4, 8, 16]


def test_an_answer_that_does_not_come_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.evaluate.judge.TIMEOUT_S", 0.05)
    done = threading.Event()

    def answer(_: Asked, number: int) -> Reply:
        if number == 0:
            done.wait(10)
        return Reply("fine")

    with chat(answer) as server:
        assert ask(server.address) == (["fine"], [1])
        done.set()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("api.owl.org/v1", "not an http address"),
        ("ftp://api.owl.org", "not an http address"),
        ("http://host:99999/v1", "not an address"),
        ("http://xn--a/v1", "not an address"),
        ("http://host..b/v1", "not an address"),
        ("http://host\n.b/v1", "not an address"),
        (f"http://{'a' * 64}.b/v1", "not an address"),
        (f"https://me:{KEY}@api.owl.org/v1", "give the bare address"),
        (f"https://api.owl.org/v1?key={KEY}", "give the bare address"),
    ],
)
def test_odd_addresses_are_refused_before_anything_is_sent(address: str, message: str) -> None:
    assert message in refused(address)


def test_a_key_that_cannot_be_one_is_refused_unseen() -> None:
    with pytest.raises(ConfigError, match=f"{KEY_VARIABLE}: it holds characters") as caught:
        Judge("http://127.0.0.1/v1", "owl", f"{KEY}\nHost: x", print)
    assert KEY not in str(caught.value)
