"""The `train` command line: what it prints and how it exits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.errors import Interrupted
from common.layout import acts_array
from common.stopping import Stop
from common.store import Store
from tests.conftest import HOOK
from tests.warm import Ended, WarmServer
from train.config import EvalConfig
from train.evaluate.command import evaluate_runs
from train.saes import REGISTRY


@pytest.fixture
def train(shared_store: Path, tmp_path: Path, warm: WarmServer) -> Any:
    """Runs `train fit` on the shared store with further words."""

    def call(*words: str, store: Path = shared_store) -> Ended:
        base = ["train", "fit", "--cache", str(store), "--out", "r", "--d-sae", "32", "--k", "4", "--batch-size", "256"]
        return warm.run([*base, *words], tmp_path)

    return call


def test_variants_are_those_of_the_registry(tmp_path: Path, warm: WarmServer) -> None:
    ended = warm.run(["train", "variants", "--json"], tmp_path)
    assert [variant["name"] for variant in json.loads(ended.out)] == list(REGISTRY)
    assert all(setting["help"] for variant in json.loads(ended.out) for setting in variant["settings"].values())
    table = warm.run(["train", "variants"], tmp_path).out
    assert all(name in table for name in REGISTRY)


def test_fit_ends_with_one_json_record(train: Any) -> None:
    ended = train("--variant", "topk", "--steps", "20", "--json")
    record = json.loads(ended.out)
    assert (ended.code, record["state"], record["steps"]) == (0, "finished", 20)
    assert record["learners"]["topk"]["training_steps"] == 20


def test_fit_ends_with_a_table(train: Any) -> None:
    ended = train("--variant", "topk", "--steps", "20")
    assert "1 of 1 learners finished" in ended.out
    assert "held-out EV" in ended.out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--variant", "topkk", "--steps", "5"), 2, "Did you mean 'topk'?"),
        (("--variant", "topk",), 2, "--steps, --tokens or --passes"),
        (("--variant", "topk", "--steps", "0"), 2, "greater than 0"),
        (("--variant", "topk", "--steps", "5", "--d-sae", "2"), 2, "k = 4 is more than d_sae = 2"),
        (("--variant", "topk", "--steps", "5", "--device", "abacus"), 2, "--device abacus: not on this machine"),
        (("--variant", "topk", "--steps", "5", "--device", "meta"), 2, "--device meta: not on this machine"),
        (("--variant", "topk", "--steps", "5", "--hook", "blocks.2.hook_resid_post"), 2, "Did you mean"),
        (("--steps", "5"), 2, "no learner"),
        (("--variant", "topk", "--steps", "5000"), 4, "--passes"),
        (("--variant", "standard", "--steps", "80", "--lr", "1e3", "--log-every", "5"), 5, "no learner finished"),
    ],
)  # fmt: skip
def test_mistakes_have_their_exit_code_and_one_line(
    train: Any, words: tuple[str, ...], code: int, message: str
) -> None:
    ended = train(*words)
    assert ended.code == code, ended.err
    assert message in ended.err
    assert "Traceback" not in ended.err


def test_a_missing_store_is_exit_3(train: Any, tmp_path: Path) -> None:
    ended = train("--variant", "topk", "--steps", "5", store=tmp_path / "absent.zarr")
    assert (ended.code, "no store here" in ended.err) == (3, True)


def test_a_flipped_byte_is_exit_3(train: Any, shared_store: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(shared_store, tmp_path / "own.zarr"))
    path = Store.open(own).chunk_path(acts_array(HOOK), 2)
    data = bytearray(path.read_bytes())
    data[77] ^= 1
    path.write_bytes(data)
    ended = train("--variant", "topk", "--steps", "5", store=own)
    assert ended.code == 3
    assert f"acts/{HOOK} chunk 2: checksum" in ended.err
    assert "harvest verify" in ended.err


def test_eval_repeats_the_figures_of_the_run(train: Any, shared_store: Path, tmp_path: Path, warm: WarmServer) -> None:
    assert train("--variant", "topk", "--variant", "batchtopk", "--steps", "20").code == 0
    ended = warm.run(["train", "eval", "r", "--json"], tmp_path)
    results = {result["learner"]: result["metrics"] for result in json.loads(ended.out)}
    for name in ("topk", "batchtopk"):
        recorded = json.loads((tmp_path / "r" / name / "result.json").read_text())["metrics"]
        recorded.pop("calibration")
        assert results[name] == recorded
    whole = (tmp_path / "r" / "topk" / "eval" / "heldout.json").read_text()
    assert json.loads(whole) == {
        "learner": "topk", "run": "r", "suite": "heldout", "metrics": results["topk"], "reasons": {}
    }  # fmt: skip
    few = warm.run(
        ["train", "eval", ".", "--max-tokens", "100", "--cache", str(shared_store), "--json"], tmp_path / "r" / "topk"
    )
    assert (json.loads(few.out)[0]["learner"], json.loads(few.out)[0]["metrics"]["tokens"]) == ("topk", 100)
    assert json.loads((tmp_path / "r" / "topk" / "eval" / "heldout-100.json").read_text()) == json.loads(few.out)[0]
    assert (tmp_path / "r" / "topk" / "eval" / "heldout.json").read_text() == whole
    assert warm.run(["train", "eval", "r", "--suite", "heldoutt"], tmp_path).code == 2
    assert warm.run(["train", "eval", "nowhere"], tmp_path).code == 3


def test_resume_of_nothing_is_exit_3(tmp_path: Path, warm: WarmServer) -> None:
    ended = warm.run(["train", "resume", "nowhere"], tmp_path)
    assert (ended.code, "no run here" in ended.err) == (3, True)


def test_an_evaluation_heeds_a_stop(train: Any, tmp_path: Path) -> None:
    assert train("--variant", "topk", "--steps", "5").code == 0
    recorded = (tmp_path / "r" / "topk" / "eval" / "heldout.json").read_text()
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        evaluate_runs([tmp_path / "r"], EvalConfig(device="cpu"), Stop("SIGTERM"))
    assert (tmp_path / "r" / "topk" / "eval" / "heldout.json").read_text() == recorded
