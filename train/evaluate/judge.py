"""A chat endpoint that the user names, of the kind that OpenAI's API made common. The owner of httpx.

Nothing is sent before somebody asks, and only to the address given. The key comes from the environment and goes into
one header; it is in no file and no message.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx

from common.errors import ConfigError

KEY_VARIABLE = "GRANARY_JUDGE_KEY"
TIMEOUT_S = 120.0
CONNECT_S = 10.0
ATTEMPTS = 6
FIRST_PAUSE_S = 1.0  # doubled each time
LONGEST_PAUSE_S = 60.0
PASSING = {408, 409, 425, 429}  # and every 5xx
EXCERPT = 200  # characters of an endpoint's own words


class Judge:
    """Asks one model, again where an answer fails for reasons that pass.

    Attributes:
        address: what the user gave, up to `/v1`.
        model: the name that the endpoint knows.
    """

    def __init__(self, address: str, model: str, key: str | None, pause: Callable[[float], None]) -> None:
        self.address, self.model = address.rstrip("/").removesuffix("/chat/completions"), model
        check_address(self.address)
        self._key, self._pause = checked_key(key), pause
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        timeout = httpx.Timeout(TIMEOUT_S, connect=CONNECT_S)
        self._client = httpx.Client(headers=headers, timeout=timeout, follow_redirects=False)
        self._reached = False  # a connection that never was is a wrong address; one that was is tried again
        self._settings: dict[str, Any] = {"temperature": 0}

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def answer(self, prompt: str) -> str:
        """The model's answer to one message.

        Raises:
            ConfigError: the address, the model or the key is wrong, or the endpoint goes on failing.
        """
        wrong = ""
        for attempt in range(ATTEMPTS):
            response, wrong = self._post(prompt)
            if response is not None and response.status_code == 200:
                text = content_of(response)
                if text is not None:
                    return text
                wrong = "answers that are not those of a chat endpoint"
            elif response is not None and not self._passes(response):
                raise self._refused(response)
            if attempt + 1 < ATTEMPTS:
                self._pause(pause_after(attempt, response))
        raise ConfigError(
            f"--judge {self.address}: {wrong}, {ATTEMPTS} times in a row. "
            "What was scored is kept: the same command goes on."
        )

    def _post(self, prompt: str) -> tuple[httpx.Response | None, str]:
        """The response, or None; and what was wrong with it, if anything."""
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], **self._settings}
        try:
            response = self._client.post(f"{self.address}/chat/completions", json=body)
        except httpx.ConnectError:
            if not self._reached:
                raise ConfigError(f"--judge {self.address}: nothing answers there. Is the address right?") from None
            return None, "no connection"
        except httpx.TimeoutException:
            return None, f"no answer in {TIMEOUT_S:.0f} s"
        except httpx.TransportError as error:
            return None, f"a broken connection ({type(error).__name__})"
        except httpx.RequestError as error:
            return None, f"a broken answer ({type(error).__name__})"
        self._reached = True
        return response, f"HTTP {response.status_code}"

    def _passes(self, response: httpx.Response) -> bool:
        """Whether asking again may help."""
        if response.status_code == 400 and "temperature" in self._settings and "temperature" in response.text:
            self._settings = {}  # models that reason take only their own
            return True
        return response.status_code in PASSING or response.status_code >= 500

    def _refused(self, response: httpx.Response) -> ConfigError:
        code, where = response.status_code, f"--judge {self.address}"
        if code in (401, 403):  # these answers may repeat part of the key
            said = (
                f"the key in {KEY_VARIABLE} was refused" if self._key else f"a key is needed; put it in {KEY_VARIABLE}"
            )
            return ConfigError(f"{where}: {said} (HTTP {code}).")
        if code == 404:
            return ConfigError(
                f"{where}: no chat endpoint or no model '{self.model}' there (HTTP 404). "
                "Give the address up to /v1, and the endpoint's own name of the model as --judge-model."
            )
        if 300 <= code < 400:
            return ConfigError(f"{where}: it points elsewhere (HTTP {code}). Give the address itself.")
        return ConfigError(f"{where}: HTTP {code}: {self._redacted(response.text)}")

    def _redacted(self, text: str) -> str:
        """The endpoint's own words on one line, cut short, without the key."""
        words = " ".join(text.split())
        return (words.replace(self._key, "…") if self._key else words)[:EXCERPT]


def pause_after(attempt: int, response: httpx.Response | None) -> float:
    """Seconds to wait before the next attempt: what the endpoint asks for, or 1, 2, 4, …; at most a minute."""
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    seconds = float(asked) if asked.isascii() and asked.isdigit() else FIRST_PAUSE_S * 2**attempt
    return min(seconds, LONGEST_PAUSE_S)


def content_of(response: httpx.Response) -> str | None:
    """The text of a chat completion; None if it is none."""
    try:
        text = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    # JSON can name half of a surrogate pair, which no request and no file can hold
    return text.encode(errors="replace").decode() if isinstance(text, str) else None


def check_address(address: str) -> None:
    """Raises:
    ConfigError: not an http address, or one that carries a name, a password or a query.
    """
    try:
        parts = urlsplit(address)
        port_is_fine = parts.port is None or parts.port > 0
        for host in (parts.hostname, httpx.URL(address).host):  # what a request would trip over
            (host or "").encode("idna")
    except (ValueError, httpx.InvalidURL):
        raise ConfigError("--judge: not an address. Give one such as https://host/v1.") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ConfigError(f"--judge: give the bare address, such as https://host/v1, and the key in {KEY_VARIABLE}.")
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_fine:
        raise ConfigError(f"--judge {address}: not an http address. Give one such as https://host/v1.")


def checked_key(key: str | None) -> str | None:
    """The key without spaces around it; None for an empty one.

    Raises:
        ConfigError: it cannot stand in a header.
    """
    key = (key or "").strip()
    if not key.isascii() or not key.isprintable():
        raise ConfigError(f"{KEY_VARIABLE}: it holds characters that no key has.")
    return key or None


def key_from_environment() -> str | None:
    return os.environ.get(KEY_VARIABLE)
