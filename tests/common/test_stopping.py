"""Stopping on request."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from common.stopping import Stop
from tests.warm import ROOT

PROGRAM = """
import granary, sys, time
from common.stopping import Stop
stop = Stop.on_signals()
print("ready", flush=True)
while not stop.asked:
    time.sleep(0.01)
print(stop.signal_name, flush=True)
time.sleep(30)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_stop_notes_the_first_signal_and_leaves_at_the_second(name: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.Signals[name])
        assert child.stdout.readline() == f"{name}\n"
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 75
        assert f"{name}: finishing what is under way; once more to leave at once." in child.stderr.read()


def test_stop_is_not_asked_at_first() -> None:
    stop = Stop()
    assert not stop.asked
    stop.request(signal.SIGTERM)
    assert stop.asked
    assert stop.signal_name == "SIGTERM"


def test_stop_may_be_asked_in_the_middle_of_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    class Busy:
        """A stream that a signal has caught in `write`: entering it again is an error."""

        def write(self, text: str) -> None:
            raise RuntimeError("reentrant call")

    monkeypatch.setattr(sys, "stderr", Busy())
    stop = Stop()
    stop.request(signal.SIGINT)
    assert stop.asked
