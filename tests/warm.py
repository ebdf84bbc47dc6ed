"""Run the command lines in children forked from a process that has everything imported: a start costs milliseconds.

    with WarmServer() as server:
        child = server.start(["harvest", "run", …], cwd=tmp_path)
        time.sleep(0.3); child.kill()
        assert server.run(["harvest", "run", …], cwd=tmp_path).code == 0

The server itself computes nothing, so a forked child may use threads.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WARM_MODULES = (
    "granary",  # first: binds common, harvest and train
    "torch.distributed.tensor",
    "transformer_lens.model_bridge",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.gpt_neox.modeling_gpt_neox",
    "harvest.cli",
    "harvest.run",
    "harvest.verify",
    "train.cli",
    "train.trainer",
)
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: exit code, or minus the number of the signal that ended it.
    """

    code: int
    out: str
    err: str


@dataclass
class Child:
    """A command under way in a forked child."""

    server: WarmServer
    pid: int
    log: Path

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> Ended:
        """SIGKILL, then reap."""
        self.signal(signal.SIGKILL)
        return self.wait()

    def ended(self) -> bool:
        """Whether it is over, by itself or not; `wait` then tells how."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    def wait(self) -> Ended:
        code = self.server.ask({"wait": self.pid})["code"]
        return Ended(code, (self.log / "out").read_text(), (self.log / "err").read_text())

    def err_so_far(self) -> str:
        return (self.log / "err").read_text()


class WarmServer:
    """The warm parent, in a process of its own."""

    def __init__(self, threads: int = 1) -> None:
        self.logs = tempfile.TemporaryDirectory(prefix="warm-")
        self.count = 0
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment,
            text=True,
        )
        assert self.answer() == {"ready": True}

    def __enter__(self) -> WarmServer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.logs.cleanup()

    def ask(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def start(self, argv: list[str], cwd: Path, environment: dict[str, str] | None = None) -> Child:
        """Fork a child that runs `argv`, whose first word is `harvest`, `train` or `dask`, in a changed environment."""
        self.count += 1
        log = Path(self.logs.name) / str(self.count)
        log.mkdir()
        (log / "out").touch()
        (log / "err").touch()
        pid = self.ask({"start": argv, "cwd": str(cwd), "log": str(log), "environment": environment or {}})["pid"]
        return Child(self, pid, log)

    def run(self, argv: list[str], cwd: Path) -> Ended:
        """Run `argv` to its end."""
        return self.start(argv, cwd).wait()


def wait_for(condition: Any, timeout_s: float = 60.0) -> None:
    """Until `condition()` is true.

    Raises:
        TimeoutError: it never was.
    """
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout_s} s for {condition}")
        time.sleep(0.005)


def dask_main() -> None:
    """The `dask` command: schedulers and workers that have Granary imported already."""
    from dask.cli import run_cli

    run_cli()


def become_child(request: dict[str, Any]) -> None:
    """In the forked child: its own outputs and folder, then the command line as a console script runs it."""
    import granary

    log = Path(request["log"])
    for descriptor, name in ((1, "out"), (2, "err")):
        target = os.open(log / name, os.O_WRONLY | os.O_APPEND)
        os.dup2(target, descriptor)
        os.close(target)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    sys.argv = request["start"]
    entries = {"harvest": granary.harvest_main, "train": granary.train_main, "dask": dask_main}
    entry = entries[sys.argv[0]]
    code = 0
    try:
        entry()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    """Import everything, then fork a child per request."""
    for module in WARM_MODULES:
        importlib.import_module(module)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            become_child(request)
        print(json.dumps({"pid": pid}), flush=True)


if __name__ == "__main__":
    serve()
