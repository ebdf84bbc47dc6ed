"""`train rate`: serve the page until somebody stops it, or say what came out."""

from __future__ import annotations

import getpass
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.console import say
from common.errors import ConfigError, StoreError
from common.stopping import Stop
from train.rate.answers import Answers
from train.rate.items import learner_name, order_for, read_items, refuse_namesakes
from train.rate.server import RatingServer, Session

if TYPE_CHECKING:
    from train.rate.summary import Rated

LOOK_EVERY_S = 0.2


def rate(
    learners: Sequence[Path], rater: str, db: Path, host: str, port: int, per_learner: int, seed: int, stop: Stop
) -> None:
    """Serve the page to one rater until `stop`.

    Raises:
        StoreError: a learner without latents to show, or a file that holds no ratings.
        DataError: nothing to rate.
        ConfigError: an address that cannot be had, or learners of one name.
    """
    items = order_for(rater, read_items(learners, per_learner, seed), seed)
    session = Session(rater, items, Answers(db))
    server = RatingServer(host, port, session)
    if not server.loopback:
        say(f"--host {host}: everybody who reaches this machine can answer as {rater}.")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": LOOK_EVERY_S}, daemon=True)
    thread.start()
    say(f"{len(items)} latents of {len(learners)} learners, rater {rater}: {server.address()} (Ctrl-C ends it)")
    while not stop.asked:
        time.sleep(LOOK_EVERY_S)
    server.shutdown()
    server.server_close()
    state = session.at()
    say(f"{db}: {state['done']} of {state['total']} answered by {rater}. The same command goes on.")


def login_name() -> str:
    """Who runs this.

    Raises:
        ConfigError: the machine does not know, as in some containers.
    """
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        raise ConfigError("nobody is logged in here, so say whose answers these are: --rater NAME.") from None


def summary(learners: Sequence[Path], db: Path) -> list[Rated]:
    """What raters said of these learners.

    Raises:
        StoreError: no file of ratings there.
        ConfigError: learners of one name.
    """
    from train.rate.summary import summarise  # imports scipy, which serving does not need

    refuse_namesakes(learners)
    if not db.exists():
        raise StoreError(f"{db}: no such file. Name the file of answers with --db, or rate first.")
    return summarise(Answers(db).all(), [learner_name(folder) for folder in learners])
