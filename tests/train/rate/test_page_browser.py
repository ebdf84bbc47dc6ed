"""The page in a browser, with real keys: scores, labels, skips, going back, and a server that ends and comes back."""

from __future__ import annotations

import contextlib
import json
import socket
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import needs_browser, open_browser
from tests.serving import running
from tests.train.rate.made import HOSTILE, learner
from train.rate.answers import Answers
from train.rate.items import Item, order_for, read_items
from train.rate.server import RatingServer, Session

pytestmark = needs_browser
N = 4


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(autouse=True)
def connections_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """With their server, as they do with its process: a browser opens some before it needs them."""
    opened: list[socket.socket] = []
    accept, close = RatingServer.get_request, RatingServer.server_close

    def get_request(server: RatingServer) -> tuple[Any, Any]:
        connection, address = accept(server)
        opened.append(connection)
        return connection, address

    def server_close(server: RatingServer) -> None:
        close(server)
        for connection in opened:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    monkeypatch.setattr(RatingServer, "get_request", get_request)
    monkeypatch.setattr(RatingServer, "server_close", server_close)


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    return order_for("ada", read_items([learner(tmp_path / "r" / name) for name in ("topk", "tree")], N // 2, 0), 0)


def serving(items: list[Item], db: Path, port: int = 0) -> contextlib.AbstractContextManager[RatingServer]:
    return running(RatingServer("127.0.0.1", port, Session("ada", items, Answers(db))))


def press(driver: Any, *keys: str) -> None:
    """Real key presses to whatever has the focus."""
    from selenium.webdriver import ActionChains

    ActionChains(driver).send_keys(*keys).perform()


def wait_until(driver: Any, seen: Callable[[], bool]) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 10, poll_frequency=0.02).until(lambda _: seen())


def wait_for(driver: Any, count: int, note: str = "") -> None:
    """Until the page says so many are done, and something of the latent."""
    wait_until(driver, lambda: text(driver, "count") == f"{count} of {N}" and note in text(driver, "note"))


def text(driver: Any, name: str) -> str:
    return str(driver.find_element("id", name).text)


def rows(db: Path) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(db)) as database:
        return database.execute("SELECT rater, learner, latent, score, label FROM answers ORDER BY at").fetchall()


def said(item: Item, score: int | None, label: str = "") -> tuple[Any, ...]:
    return ("ada", item.learner, item.latent, score, label)


def no_errors(driver: Any) -> None:
    assert driver.get_log("browser") == []  # no error, no refused script, nothing that was not found


def test_a_rater_goes_through_all_by_keys_and_on_after_a_restart(
    driver: Any, items: list[Item], tmp_path: Path
) -> None:
    from selenium.webdriver.common.keys import Keys

    db = tmp_path / "ratings.sqlite"
    with serving(items, db) as server:
        port = int(server.server_address[1])
        driver.get(server.address())
        wait_for(driver, 0, "Darker is more active")
        press(driver, "4")
        wait_for(driver, 1)
        assert rows(db) == [said(items[0], 4)]  # on disk before the next one is shown
        press(driver, "l", "sums 12345 bs", Keys.ENTER, "2")  # what is written is no key
        wait_for(driver, 2)
        assert driver.find_element("id", "label").get_property("value") == ""
        press(driver, "s")
        wait_for(driver, 3)
        assert rows(db) == [said(items[0], 4), said(items[1], 2, "sums 12345 bs"), said(items[2], None)]
        no_errors(driver)
    with serving(items, db, port) as server:
        driver.get(server.address())
        wait_for(driver, 3, "Darker")
        press(driver, "b")
        wait_for(driver, 3, "Answered before")
        press(driver, "b")
        wait_until(driver, lambda: driver.find_element("id", "label").get_property("value") == "sums 12345 bs")
        assert [made.text for made in driver.find_elements("css selector", "#scores .given")] == ["2 vague"]
        press(driver, "s")  # on to the first without an answer; what was said stays
        wait_for(driver, 3, "Darker")
        assert said(items[1], 2, "sums 12345 bs") in rows(db)
        press(driver, "b")
        wait_for(driver, 3, "Answered before")
        press(driver, "5")
        wait_for(driver, 3, "Darker")
        press(driver, "1")
        wait_for(driver, 4)
        assert driver.find_element("id", "end").is_displayed()
        assert not driver.find_element("id", "form").is_displayed()
        press(driver, "3", "s", "l")  # nothing is left to be said
        press(driver, "b")
        wait_for(driver, 4, "Answered before")
        no_errors(driver)
    assert sorted(rows(db), key=str) == sorted(
        [said(items[0], 4), said(items[1], 2, "sums 12345 bs"), said(items[2], 5), said(items[3], 1)], key=str
    )


def test_text_is_text_and_nothing_tells_whose_it_is(driver: Any, items: list[Item], tmp_path: Path) -> None:
    with serving(items, tmp_path / "ratings.sqlite") as server:
        driver.get(server.address())
        wait_for(driver, 0)
        spans = driver.find_elements("css selector", "#contexts li:first-child span")
        assert [span.get_property("textContent") for span in spans] == ["a", HOSTILE, "\n"]
        assert [span.get_attribute("class") for span in spans] == ["", "peak", ""]
        assert len({span.value_of_css_property("background-color") for span in spans}) == 3  # none, strong, weak
        page = driver.execute_script("return document.documentElement.outerHTML")
        seen = page + json.dumps(driver.execute_script("return performance.getEntries().map(entry => entry.name)"))
        assert not [word for word in ("topk", "tree", "dilation") if word in seen]
        assert len(driver.find_elements("css selector", "script")) == 1
        no_errors(driver)


def test_a_server_that_is_gone_is_told_and_nothing_is_lost(driver: Any, items: list[Item], tmp_path: Path) -> None:
    db = tmp_path / "ratings.sqlite"
    with serving(items, db) as server:
        port = int(server.server_address[1])
        driver.get(server.address())
        wait_for(driver, 0)
    press(driver, "3")
    wait_until(driver, lambda: "Not stored" in text(driver, "error"))
    assert [entry["message"] for entry in driver.get_log("browser") if "ERR_CONNECTION" not in entry["message"]] == []
    with serving(items, db, port):
        press(driver, "3")
        wait_for(driver, 1)
        assert text(driver, "error") == ""
        assert rows(db) == [said(items[0], 3)]
        no_errors(driver)


def test_answers_that_cannot_be_read_are_told_at_once(
    driver: Any, items: list[Item], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    db = tmp_path / "ratings.sqlite"
    with serving(items, db) as server:
        db.write_text("no database " * 100)
        driver.get(server.address())
        wait_until(driver, lambda: "Not loaded" in text(driver, "error"))
        assert driver.find_element("id", "error").is_displayed()
        driver.get_log("browser")  # the 500
    assert "ratings.sqlite" in capsys.readouterr().err
