"""What a run refuses and finds before its first step, and stores that are damaged on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import read_toml
from common.errors import ConfigError, DataError, StoreError, TrainingError
from common.files import fingerprint
from common.layout import acts_array
from common.places import local_path
from common.stopping import Stop
from common.store import Store
from harvest.run import harvest
from tests.conftest import HOOK, harvest_config
from tests.train.runs import config, equal, learner, run, status_of
from train.checkpoint import MANIFEST
from train.learner import Learner
from train.preflight import rehearse
from train.prepare import load_plan
from train.settings import saved_config
from train.trainer import fit


def test_a_finished_run_does_nothing_and_says_so(
    shared_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(shared_store, tmp_path / "r", learner("topk"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("*")}
    capsys.readouterr()
    again = run(shared_store, tmp_path / "r", learner("topk"), graphs=True, eval_tokens=512)  # nothing that decides
    assert "finished already, nothing to do" in capsys.readouterr().err
    assert again.learners == first.learners
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("*")} == before


def test_a_finished_run_says_nothing_of_another_store(shared_store: Path, own_store: Path, tmp_path: Path) -> None:
    first = run(shared_store, tmp_path / "r", learner("topk"))
    moved = run(own_store, tmp_path / "r", learner("topk"))
    assert moved.learners == first.learners
    metadata = json.loads((own_store / "zarr.json").read_text())
    header = metadata["attributes"]["granary"]
    header["identity"]["seed"] = 99
    header["id"] = fingerprint(header["identity"])
    (own_store / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(StoreError, match="trained on another store than"):
        run(own_store, tmp_path / "r", learner("topk"))


@pytest.mark.parametrize("text", ["{}", '{"plan": {"chunks": 3}}', "[]"])
def test_a_damaged_plan_is_one_error(store: Store, tmp_path: Path, text: str) -> None:
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(StoreError, match=r"data\.json: not what a run leaves"):
        load_plan(tmp_path, store)


def test_files_of_another_form_in_a_run_folder_are_one_error(shared_store: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    run(shared_store, out, learner("topk"), steps=5)
    for name, text in (
        ("status.json", "{}"),
        ("status.json", "[]"),
        ("topk/result.json", "{}"),
        ("run.toml", 'cache = "x"\n'),
    ):
        before = (out / name).read_text()
        (out / name).write_text(text)
        with pytest.raises(StoreError, match=r"not what a run leaves \("):
            run(shared_store, out, learner("topk"), steps=5)
        (out / name).write_text(before)
    (out / "topk" / "result.json").unlink()  # as if stopped
    (out / "topk" / "metrics.jsonl").write_text('{"step": "x"}\n')
    with pytest.raises(StoreError, match=r"metrics\.jsonl: not what a run leaves \("):
        run(shared_store, out, learner("topk"), steps=5)


def test_a_start_that_fails_after_a_learner_diverged_can_be_made_again(shared_store: Path, tmp_path: Path) -> None:
    learners = (learner("standard", "wild", l1=1e39), learner("topk"))
    rehearsed = rehearse

    def fail(one: Learner, *rest: Any) -> str | None:
        if one.name == "topk":
            raise StoreError("no space left")
        return rehearsed(one, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.prepare.rehearse", fail)
        with pytest.raises(StoreError, match="no space left"):
            run(shared_store, tmp_path / "r", *learners)
    outcome = run(shared_store, tmp_path / "r", *learners)
    assert {name: result["state"] for name, result in outcome.learners.items()} == {
        "wild": "diverged",
        "topk": "finished",
    }


def test_a_disk_that_is_full_at_the_end_leaves_no_learner_called_finished(shared_store: Path, tmp_path: Path) -> None:
    def fail(path: Path, data: bytes) -> None:
        raise StoreError(f"{path}: no space left on the disk")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.saes.write_file", fail)
        with pytest.raises(StoreError, match=r"weights\.safetensors: no space left"):
            run(shared_store, tmp_path / "r", learner("topk"))
    status = status_of(tmp_path / "r")
    assert (status["state"], status["learners"]["topk"]["state"]) == ("failed", "failed")
    assert list((tmp_path / "r" / "topk" / "sae").iterdir()) == []
    assert run(shared_store, tmp_path / "r", learner("topk")).state == "finished"


def test_mixing_is_told_as_at_most_ideal(
    shared_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("train.prepare.mixing", lambda *_: 1.009)  # of two samples, by chance
    run(shared_store, tmp_path / "r", learner("topk"))
    assert json.loads((tmp_path / "r" / "data.json").read_text())["mixing"] == 1.0
    assert "mix documents at 100.0% of" in capsys.readouterr().err


def test_another_run_in_the_folder_is_refused_with_the_difference(shared_store: Path, tmp_path: Path) -> None:
    run(shared_store, tmp_path / "r", learner("topk"))
    with pytest.raises(ConfigError, match=r"another run is there.*n_steps: 40 → 41.*seed: 0 → 1"):
        run(shared_store, tmp_path / "r", learner("topk"), steps=41, seed=1)
    with pytest.raises(ConfigError, match=r"topk\.options\.k: 4 → 5"):
        run(shared_store, tmp_path / "r", learner("topk", k=5))
    with pytest.raises(ConfigError, match="topk: in the run, not asked for"):
        run(shared_store, tmp_path / "r", learner("standard"))


def test_a_folder_that_is_no_run_is_refused(shared_store: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something that is not a run"):
        run(shared_store, tmp_path, learner("topk"))


def test_a_checkpoint_of_another_run_is_refused_with_the_difference(shared_store: Path, tmp_path: Path) -> None:
    run(shared_store, tmp_path / "a", learner("topk"))
    run(shared_store, tmp_path / "b", learner("topk", lr=1e-3), seed=1)
    (tmp_path / "a" / "topk" / "result.json").unlink()
    shutil.rmtree(tmp_path / "a" / "topk" / "checkpoints")
    shutil.copytree(tmp_path / "b" / "topk" / "checkpoints", tmp_path / "a" / "topk" / "checkpoints")
    with pytest.raises(StoreError, match=r"belongs to another run.*learner\.lr: 0\.001 → None.*seed: 1 → 0"):
        run(shared_store, tmp_path / "a", learner("topk"))


def test_a_default_that_changed_since_a_checkpoint_is_refused(shared_store: Path, tmp_path: Path) -> None:
    run(shared_store, tmp_path / "r", learner("topk"))
    (tmp_path / "r" / "topk" / "result.json").unlink()
    for file in (tmp_path / "r" / "topk" / "checkpoints").glob(f"step-*/{MANIFEST}"):
        manifest = json.loads(file.read_text())
        manifest["facts"]["options"] |= {"aux_alpha": 0.5, "gone": 1}
        file.write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"\(stored → asked\): options\.aux_alpha: 0\.5 → 0\.03125\. Remove"):
        run(shared_store, tmp_path / "r", learner("topk"))


def test_a_file_in_the_way_of_the_folder_is_refused(shared_store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="file is a file, not a folder"):
            run(shared_store, out, learner("topk"))


def test_status_is_there_while_the_run_prepares(
    shared_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr("train.trainer.prepare", lambda _: seen.append(status_of(tmp_path / "r")) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(shared_store, tmp_path / "r", learner("topk"))
    assert (seen[0]["state"], seen[0]["step"]) == ("running", 0)


def test_no_learner_is_refused(shared_store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no learner: name one with --variant"):
        run(shared_store, tmp_path / "r")


def test_nan_in_a_chunk_is_told_before_step_0(own_store: Path, tmp_path: Path) -> None:
    store = Store.open(own_store)
    for chunk in range(store.n_chunks):  # every chunk, with a journal that agrees
        data = np.array(store.map_chunk(acts_array(HOOK), chunk))
        data[0] = np.nan
        store.commit([(acts_array(HOOK), chunk, data, store.journal.entries[acts_array(HOOK), chunk].extra)])
    with pytest.raises(StoreError, match=r"first batch holds values that are not finite\. Run: harvest verify"):
        run(own_store, tmp_path / "r", learner("topk"))


def flip(path: Path) -> bytes:
    """Change one byte; what the file was before."""
    before = path.read_bytes()
    changed = bytearray(before)
    changed[1000] ^= 0x10
    path.write_bytes(changed)
    return before


def test_a_damaged_store_leaves_a_folder_that_can_go_on_once_repaired(
    own_store: Path, tmp_path: Path, shared_store: Path
) -> None:
    path = Store.open(own_store).chunk_path(acts_array(HOOK), 5)
    before = flip(path)
    with pytest.raises(StoreError, match="chunk 5: checksum"):
        run(own_store, tmp_path / "r", learner("topk"), learner("standard"))
    assert status_of(tmp_path / "r")["state"] == "failed"
    path.write_bytes(before)
    run(own_store, tmp_path / "r", learner("topk"), learner("standard"))
    run(shared_store, tmp_path / "straight", learner("topk"), learner("standard"))
    assert equal(tmp_path / "r" / "topk", tmp_path / "straight" / "topk")
    assert equal(tmp_path / "r" / "standard", tmp_path / "straight" / "standard")


def test_a_chunk_found_damaged_on_the_way_keeps_the_steps_taken(
    own_store: Path, tmp_path: Path, shared_store: Path
) -> None:
    settings: dict[str, Any] = {"pool_tokens": 4096, "steps": 80}
    straight = run(shared_store, tmp_path / "straight", learner("topk"), **settings)
    from train.data.plan import plan_data

    built = config(shared_store, tmp_path, learner("topk"), **settings)
    last = plan_data(Store.open(shared_store), built.data(), 0, {1}).order(1).pool_members(0, 6)[0]
    path = Store.open(own_store).chunk_path(acts_array(HOOK), last)
    before = flip(path)
    with pytest.raises(StoreError, match=f"chunk {last}: checksum"):
        run(own_store, tmp_path / "r", learner("topk"), **settings)
    status = status_of(tmp_path / "r")
    assert status["state"] == "failed"
    assert f"chunk {last}" in status["reason"]
    assert status["step"] > 30
    path.write_bytes(before)
    again = run(own_store, tmp_path / "r", learner("topk"), **settings)
    assert again.learners["topk"]["final_loss"] == straight.learners["topk"]["final_loss"]
    assert equal(tmp_path / "r" / "topk", tmp_path / "straight" / "topk")


def test_no_whole_checkpoint_is_an_error_and_stays_one(shared_store: Path, tmp_path: Path) -> None:
    run(shared_store, tmp_path / "r", learner("topk"))
    (tmp_path / "r" / "topk" / "result.json").unlink()
    for path in (tmp_path / "r" / "topk" / "checkpoints").glob("step-*/weights.safetensors"):
        path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(TrainingError, match=f"no whole checkpoint is left. Remove {tmp_path}/r/topk to train"):
            run(shared_store, tmp_path / "r", learner("topk"))
    outcome = run(shared_store, tmp_path / "r", learner("topk"), learner("standard"))
    assert outcome.reason.startswith("1 of 2 learners finished; topk failed: TrainingError before its first step")
    assert outcome.learners["topk"].keys() == outcome.learners["standard"].keys()
    shutil.rmtree(tmp_path / "r" / "topk")  # as the message says
    again = run(shared_store, tmp_path / "r", learner("topk"), learner("standard"))
    assert again.reason == "2 of 2 learners finished"


def test_a_run_on_a_store_behind_a_url_goes_on_without_its_mirror(
    tiny_model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "memory://prepared/x.zarr"
    monkeypatch.setenv("GRANARY_MIRRORS", str(tmp_path / "mirrors"))
    harvest(harvest_config(tiny_model, texts, local_path(url), tokens=12_000), Stop())
    with pytest.raises(DataError, match=rf"^{url}: 1,000 steps"):
        run(local_path(url), tmp_path / "r", learner("topk"), steps=1000)
    run(local_path(url), tmp_path / "r", learner("topk"), steps=10)
    assert read_toml(tmp_path / "r" / "run.toml")["cache"] == url
    (tmp_path / "r" / "topk" / "result.json").unlink()  # as if stopped
    monkeypatch.setenv("GRANARY_MIRRORS", str(tmp_path / "elsewhere"))
    saved = saved_config(tmp_path / "r")
    assert saved.cache == saved_config(tmp_path / "r", cache=url).cache == local_path(url)
    assert fit(saved, Stop()).state == "finished"


def test_a_store_of_another_model_under_the_same_path_is_refused(
    tiny_model: Path, texts: Path, own_store: Path, tmp_path: Path
) -> None:
    run(own_store, tmp_path / "r", learner("topk"))
    (tmp_path / "r" / "topk" / "result.json").unlink()  # as if stopped
    shutil.rmtree(own_store)
    model = Path(shutil.copytree(tiny_model, tmp_path / "other-model"))
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"layer_norm_eps": 1e-3}))
    harvest(harvest_config(model, texts, own_store), Stop())
    with pytest.raises(StoreError, match="trained on another store than"):
        run(own_store, tmp_path / "r", learner("topk"))
