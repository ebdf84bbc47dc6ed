"""`train import`: a published SAE becomes a run; what comes back from an export is what went out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import build, read_toml
from common.errors import ConfigError, Interrupted, StoreError
from common.files import read_json
from common.places import local_path
from common.stopping import Stop
from common.store import Store
from tests.conftest import HOOK
from tests.stores import filled
from tests.train.exchange.learners import learner_folder
from tests.train.exchange.test_published import ABOUT, published
from tests.train.runs import learner, run
from tests.train.saes.drawn import drawn, tokens
from tests.warm import WarmServer
from train.config import EvalConfig, ImportConfig
from train.evaluate.command import evaluate_runs
from train.exchange.export import export
from train.exchange.imports import import_sae, sae_from
from train.exchange.published import read_published
from train.report.points import read_points
from train.saes import load_sae


def config(store: Path, out: Path, **more: Any) -> ImportConfig:
    return build(ImportConfig, {"cache": store, "out": out, "device": "cpu"} | more, "test")


@pytest.fixture(scope="module")
def trained(shared_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four learners, one of each form."""
    out = tmp_path_factory.mktemp("trained") / "run"
    run(shared_store, out, *(learner(v) for v in ("standard", "topk", "batchtopk", "gated")), steps=10, held_out=0.2)
    return out


@pytest.mark.parametrize(
    "variant", ["standard", "panneal", "gated", "jumprelu", "topk", "batchtopk", "contrastive", "pca"]
)
def test_what_was_exported_comes_back_with_the_same_reconstructions(variant: str, tmp_path: Path) -> None:
    sae, x = drawn(variant, {}), tokens()
    export(learner_folder(tmp_path / "run", sae), "saelens", tmp_path / "out")
    back = sae_from(read_published(tmp_path / "out" / variant).form)
    assert torch.equal(back.encode(x) > 0, sae.encode(x) > 0)
    assert torch.allclose(back(x), sae(x), atol=1e-5)


@pytest.mark.parametrize("name", ["standard", "topk", "batchtopk", "gated"])
def test_an_import_is_a_run_with_the_figures_of_the_run_it_came_from(
    name: str, trained: Path, shared_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(trained / name, "saelens", tmp_path / "out")
    result = import_sae(tmp_path / "out" / name, config(shared_store, tmp_path / "back", held_out=0.2), Stop())
    assert "note:" not in capsys.readouterr().err
    before = read_json(trained / name / "result.json")["metrics"]
    for figure in ("tokens", "explained_variance", "l0", "mse", "dead_share"):
        assert result["metrics"][figure] == pytest.approx(before[figure], rel=1e-5)
    evaluated = evaluate_runs([tmp_path / "back"], EvalConfig(device="cpu"), Stop())
    assert [(each["learner"], each["metrics"]["tokens"]) for each in evaluated] == [(name, before["tokens"])]
    assert [point.name for point in read_points([tmp_path / "back", trained / "topk"])] == [name, "topk"]
    export(tmp_path / "back", "saelens", tmp_path / "again")
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    again = sae_from(read_published(tmp_path / "again" / name).form)
    assert torch.allclose(again(x), load_sae(trained / name)(x), atol=1e-5)


def test_the_run_folder_is_whole(trained: Path, shared_store: Path, tmp_path: Path) -> None:
    export(trained / "topk", "saelens", tmp_path / "out")
    back = tmp_path / "back"
    import_sae(tmp_path / "out" / "topk", config(shared_store, back, name="theirs", held_out=0.2), Stop())
    for name in ("result.json", "config.json"):
        assert read_json(back / "theirs" / name).keys() == read_json(trained / "topk" / name).keys()
    ours, theirs = (
        read_json(trained / "topk" / "sae" / "config.json"),
        read_json(back / "theirs" / "sae" / "config.json"),
    )
    assert ours.keys() == theirs.keys()
    same = ("store", "hook", "context", "bos", "special_tokens", "median_norm", "training_tokens", "variant")
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    status = read_json(back / "status.json")
    assert status.keys() == read_json(trained / "status.json").keys()
    assert (status["state"], status["learners"]["theirs"]["state"]) == ("finished", "finished")
    assert status["reason"].startswith("imported from ")
    first, second = read_json(trained / "data.json"), read_json(back / "data.json")
    assert first["identity"].keys() == second["identity"].keys()
    assert (second["identity"]["n_steps"], first["plan"]["digest"]) == (0, second["plan"]["digest"])
    assert read_toml(back / "run.toml")["learner"][0]["options"]["k"] == 4


def test_a_run_goes_on_from_no_import(trained: Path, shared_store: Path, tmp_path: Path, warm: WarmServer) -> None:
    export(trained / "topk", "saelens", tmp_path / "out")
    import_sae(tmp_path / "out" / "topk", config(shared_store, tmp_path / "back"), Stop())
    again = warm.run(["train", "resume", "back"], tmp_path)
    assert (again.code, "finished already" in again.err) == (0, True)
    words = ["--cache", str(shared_store), "--out", "back", "--variant", "topk", "--steps", "5"]
    other = warm.run(["train", "fit", *words], tmp_path)
    assert (other.code, "another run is there" in other.err) == (2, True)


def test_what_does_not_fit_the_store_is_refused(
    shared_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRANARY_MIRRORS", str(tmp_path / "mirrors"))
    narrow = published(tmp_path / "narrow", "standard")
    with pytest.raises(ConfigError, match=r"its inputs have 6 dimensions, blocks.1.hook_resid_post of .* 16"):
        import_sae(narrow, config(shared_store, tmp_path / "out"), Stop())
    assert not (tmp_path / "out").exists()
    store, _ = filled(local_path("memory://imports/two.zarr"))  # hook a of 6 dimensions
    store.header = store.header | {"hooks": {"a": store.hooks["a"], "b": store.hooks["a"]}}
    store.write_metadata()
    with pytest.raises(ConfigError, match=r"resid_post, which memory://imports/two.zarr does not have: a, b"):
        import_sae(narrow, config(store.path, tmp_path / "out"), Stop())


def test_another_model_hook_and_bos_are_said(
    trained: Path, shared_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(trained / "topk", "saelens", tmp_path / "out")
    path = tmp_path / "out" / "topk" / "cfg.json"
    settings = json.loads(path.read_text())
    bos = Store.open(shared_store).identity["bos"]
    settings["metadata"] |= {"model_name": "gpt2", "hook_name": "blocks.9.hook_mlp_out", "prepend_bos": not bos}
    path.write_text(json.dumps(settings))
    import_sae(path.parent, config(shared_store, tmp_path / "a"), Stop())
    notes = capsys.readouterr().err
    assert "trained with model gpt2, looked at with" in notes
    assert f"trained with hook blocks.9.hook_mlp_out, looked at with {HOOK}" in notes
    assert f"trained with bos {not bos}, looked at with {bos}" in notes
    settings["metadata"] = {"sae_lens_version": "6.0.0"}
    path.write_text(json.dumps(settings))
    import_sae(path.parent, config(shared_store, tmp_path / "b"), Stop())
    assert "does not say what it was trained on" in capsys.readouterr().err


def test_a_taken_folder_or_name_is_refused(trained: Path, shared_store: Path, tmp_path: Path) -> None:
    export(trained / "topk", "saelens", tmp_path / "out")
    with pytest.raises(ConfigError, match="there is something already"):
        import_sae(tmp_path / "out" / "topk", config(shared_store, trained), Stop())
    with pytest.raises(ConfigError, match="a run folder uses this name itself"):
        import_sae(tmp_path / "out" / "topk", config(shared_store, tmp_path / "new", name="sae"), Stop())
    with pytest.raises(StoreError, match="no store here"):
        import_sae(tmp_path / "out" / "topk", config(tmp_path / "none.zarr", tmp_path / "new"), Stop())


def test_a_request_to_stop_leaves_nothing(trained: Path, shared_store: Path, tmp_path: Path) -> None:
    export(trained / "topk", "saelens", tmp_path / "out")
    with pytest.raises(Interrupted, match="stopped by SIGINT in an import"):
        import_sae(tmp_path / "out" / "topk", config(shared_store, tmp_path / "back"), Stop("SIGINT"))
    assert not (tmp_path / "back").exists()


def test_command_line(trained: Path, shared_store: Path, tmp_path: Path, warm: WarmServer) -> None:
    words = ["--cache", str(shared_store.with_suffix("")), "--device", "cpu"]
    export(trained / "topk", "saelens", tmp_path)
    done = warm.run(["train", "import", "topk", *words, "--out", "r1", "--json"], tmp_path)
    assert done.code == 0, done.err
    assert json.loads(done.out)["name"] == "topk"
    shown = warm.run(["train", "import", "topk", *words, "--out", "r2", "--name", "theirs"], tmp_path)
    assert (shown.code, "theirs" in shown.out, "explained_variance" in shown.out) == (0, True, True)
    damaged = warm.run(["train", "import", "r1", *words, "--out", "r3"], tmp_path)
    assert (damaged.code, damaged.err.count("\n")) == (3, 1)
    assert "StoreError: r1/cfg.json: no such file" in damaged.err
    odd = published(tmp_path / "odd", "standard", normalize_activations="layer_norm", metadata=ABOUT)
    refused = warm.run(["train", "import", str(odd), *words, "--out", "r3"], tmp_path)
    assert (refused.code, "ConfigError" in refused.err) == (2, True)
    assert warm.run(["train", "import", "topk", "--out", "r3"], tmp_path).err.strip().endswith("--cache is needed.")
    assert not (tmp_path / "r3").exists()
