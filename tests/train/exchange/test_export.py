"""`train export`: every variant in every format, read by readers of their own; refusals; several learners."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.errors import ConfigError, StoreError
from common.files import write_json
from tests.train.exchange.learners import Read, learner_folder, read_dictionary, read_saelens, read_sparsify
from tests.train.saes.drawn import FORMS, LOST, PLAIN, D, L, drawn, tokens
from tests.warm import WarmServer
from train.commands.exchange import LIBRARIES
from train.exchange.export import FORMATS, export
from train.saes import make_sae
from train.saes.base import SAE

READERS: dict[str, Callable[[Path], Read]] = {
    "saelens": read_saelens,
    "dictionary_learning": read_dictionary,
    "sparsify": read_sparsify,
}
UNIQUE = [form for number, form in enumerate(FORMS) if form not in FORMS[:number]]
HELD = [
    (to, variant, options)
    for to in ("saelens", "dictionary_learning")
    for variant, options in UNIQUE
] + [("sparsify", "topk", {})]  # fmt: skip


def written(sae: SAE, to: str, tmp_path: Path, context_free: bool = False, **facts: object) -> Read:
    learner_folder(tmp_path / "run", sae, **facts)
    export(tmp_path / "run", to, tmp_path / "out", context_free)
    return READERS[to](tmp_path / "out" / sae.variant)


def test_libraries_are_those_of_the_registry() -> None:
    assert LIBRARIES == tuple(FORMATS) == tuple(READERS)


@pytest.mark.parametrize(("to", "variant", "options"), HELD, ids=str)
def test_reconstructions_are_the_same_in_the_other_library(
    to: str, variant: str, options: dict[str, object], tmp_path: Path
) -> None:
    sae, x = drawn(variant, options), tokens()
    read = written(sae, to, tmp_path, context_free=variant in LOST)
    latents = read.encode(x)
    assert torch.equal(latents > 0, sae.encode(x) > 0)
    assert torch.allclose(latents, sae.encode(x), atol=1e-5)
    assert torch.allclose(read.decode(latents), sae(x), atol=1e-5)


@pytest.mark.parametrize("to", ["saelens", "dictionary_learning"])
@pytest.mark.parametrize("variant", ["jumprelu", "batchtopk", "matryoshka"])
def test_a_value_on_the_threshold_is_off_and_the_next_above_it_on(to: str, variant: str, tmp_path: Path) -> None:
    size = {"d_sae": 4, "k": 2, "fractions": (0.5, 0.5)}
    known = {name: value for name, value in size.items() if variant == "matryoshka" or name != "fractions"}
    sae = make_sae(variant, {"d_sae": 4} if variant == "jumprelu" else known, 4, 0, "test")
    theta = torch.tensor(0.7)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(4))
        sae.b_enc.zero_()
        dict(sae.named_parameters(), **dict(sae.named_buffers()))[
            "theta" if variant == "jumprelu" else "sparsity.threshold"
        ].fill_(theta)
    x = torch.diag(torch.stack([theta, torch.nextafter(theta, torch.tensor(1.0)), theta * 2, -theta]))
    read = written(sae.eval().requires_grad_(False), to, tmp_path)
    for codes in (sae.encode(x), read.encode(x)):
        assert (codes > 0).tolist() == torch.diag(torch.tensor([False, True, True, False])).tolist()


def test_saelens_metadata_says_where_the_sae_comes_from(tmp_path: Path) -> None:
    config = written(drawn("contrastive", {}), "saelens", tmp_path).config
    about = config["metadata"]
    assert about["sae_lens_version"] >= "6.0.0"
    assert {
        name: about[name] for name in ("model_name", "hook_name", "context_size", "prepend_bos", "dataset_path")
    } == {
        "model_name": "tiny",  # no path of this machine
        "hook_name": "blocks.3.hook_resid_post",
        "context_size": 16,
        "prepend_bos": False,
        "dataset_path": "owner/texts",
    }
    assert about["exclude_special_tokens"] == [0, 7]
    assert about["granary"]["variant"] == "contrastive"
    assert about["granary"]["groups"] == {"high": [0, 8], "low": [8, L]}
    assert about["granary"]["context_free"] is False
    assert config["reshape_activations"] == "none"


def test_heads_lie_flat_in_saelens_only_at_a_hook_of_heads(tmp_path: Path) -> None:
    sae = drawn("topk", {})
    assert written(sae, "saelens", tmp_path, hook="blocks.0.attn.hook_z").config["reshape_activations"] == "hook_z"


def test_densities_of_suite_core_become_the_sparsity_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = learner_folder(tmp_path / "run", drawn("topk", {}))
    densities = [0.0, 0.5] + [0.1] * (L - 2)
    details = [{"index": i, "feature_density": value} for i, value in enumerate(densities)]
    write_json(folder / "eval" / "core.json", {"eval_result_details": details})
    export(folder, "saelens", tmp_path / "out")
    found = load_file(tmp_path / "out" / "topk" / "sparsity.safetensors")["sparsity"]
    assert found[:3].tolist() == pytest.approx([-10.0, -0.30103, -1.0], abs=1e-4)
    write_json(folder / "eval" / "core.json", {"eval_result_details": None})
    with pytest.raises(StoreError, match=r"core.json: no result of suite core"):
        export(folder, "saelens", tmp_path / "out")


def test_dictionary_learning_settings_are_those_its_loaders_look_for(tmp_path: Path) -> None:
    read = written(drawn("matryoshka", {}), "dictionary_learning", tmp_path)
    trainer = read.config["trainer"]
    assert (trainer["trainer_class"], trainer["layer"], trainer["lm_name"], trainer["k"]) == (
        "MatryoshkaBatchTopKTrainer", 3, "tiny", 6,
    )  # fmt: skip
    assert trainer["submodule_name"] == "resid_post_layer_3"
    assert int(read.tensors["group_sizes"].sum()) == L
    assert read.tensors["k"].dtype == torch.int32
    assert read.config["buffer"]["ctx_len"] == 16


@pytest.mark.parametrize(
    ("variant", "dict_class", "trainer_class"),
    [
        ("standard", "AutoEncoder", "StandardTrainer"),
        ("panneal", "AutoEncoder", "PAnnealTrainer"),
        ("gated", "GatedAutoEncoder", "GatedSAETrainer"),
        ("jumprelu", "JumpReluAutoEncoder", "JumpReluTrainer"),
        ("topk", "AutoEncoderTopK", "TopKTrainer"),
        ("batchtopk", "BatchTopKSAE", "BatchTopKTrainer"),
        ("contrastive", "JumpReluAutoEncoder", "JumpReluTrainer"),
    ],
)
def test_dictionary_learning_classes(variant: str, dict_class: str, trainer_class: str, tmp_path: Path) -> None:
    trainer = written(drawn(variant, {}), "dictionary_learning", tmp_path).config["trainer"]
    assert (trainer["dict_class"], trainer["trainer_class"]) == (dict_class, trainer_class)


# ---- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", sorted(LOST))
def test_a_variant_with_context_is_refused_and_marked_when_exported_without(variant: str, tmp_path: Path) -> None:
    folder = learner_folder(tmp_path / "run", drawn(variant, {}))
    with pytest.raises(ConfigError, match=r"saelens cannot hold what the .* reads from .*--context-free") as caught:
        export(folder, "saelens", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / variant).exists()
    done = export(folder, "saelens", tmp_path / "out", context_free=True)
    ours = read_saelens(tmp_path / "out" / variant).config["metadata"]["granary"]
    assert ours["context_free"] is True
    assert ours["lost"] == done[0].lost != ""


@pytest.mark.parametrize(("variant", "options"), [("tree", {}), ("compositional", {})])
def test_levels_that_read_one_another_are_refused_in_any_case(
    variant: str, options: dict[str, object], tmp_path: Path
) -> None:
    folder = learner_folder(tmp_path / "run", drawn(variant, options))
    for context_free in (False, True):
        with pytest.raises(ConfigError, match=f"latents of {variant} depend on one another"):
            export(folder, "dictionary_learning", tmp_path / "out", context_free)


@pytest.mark.parametrize(
    ("variant", "why"),
    [
        ("batchtopk", "batchtopk latents above thresholds"),
        ("standard", "standard all its positive latents"),
        ("gated", "gated latents by a gate"),
        ("multiscale", "multiscale latents above thresholds"),  # no hint at --context-free, which would not help
    ],
)
def test_sparsify_refuses_what_is_no_topk(variant: str, why: str, tmp_path: Path) -> None:
    folder = learner_folder(tmp_path / "run", drawn(variant, {}))
    with pytest.raises(ConfigError, match=why) as caught:
        export(folder, "sparsify", tmp_path / "out")
    assert "context-free" not in str(caught.value)


def test_an_export_replaces_an_earlier_one_and_nothing_else(tmp_path: Path) -> None:
    folder, out = learner_folder(tmp_path / "run", drawn("topk", {})), tmp_path / "out"
    export(folder, "saelens", out)
    learner_folder(tmp_path / "run", drawn("topk", {"k": 3}))
    export(folder, "saelens", out)
    assert read_saelens(out / "topk").config["k"] == 3
    (out / "topk" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds something that is no saelens export \(notes.txt\)"):
        export(folder, "saelens", out)
    with pytest.raises(ConfigError, match="holds something that is no sparsify export"):
        export(folder, "sparsify", out)
    assert (out / "topk" / "notes.txt").read_text() == "mine"
    assert [path.name for path in out.iterdir()] == ["topk"]  # nothing aside is left


def test_a_folder_that_says_too_little_is_named(tmp_path: Path) -> None:
    folder = learner_folder(tmp_path / "run", drawn("topk", {}))
    path = folder / "sae" / "config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "hook"}))
    with pytest.raises(StoreError, match=r"config.json: it lacks 'hook'"):
        export(folder, "saelens", tmp_path / "out")


# ---- several learners -------------------------------------------------------------------------------------------


def test_learners_that_can_be_are_exported_and_the_others_named(tmp_path: Path, warm: WarmServer) -> None:
    for variant, options in (("topk", {}), ("tree", {}), ("predictor", {}), ("mean", {})):
        learner_folder(tmp_path / "run", drawn(variant, options))
    ended = warm.run(["train", "export", "run", "--to", "saelens", "--out", "out", "--json"], tmp_path)
    assert ended.code == 0, ended.err
    record = json.loads(ended.out)
    assert [(each["learner"], each["loads_as"]) for each in record] == [("mean", "standard"), ("topk", "topk")]
    assert "not exported: run/tree: latents of tree depend on one another" in ended.err
    assert "not exported: run/predictor: saelens cannot hold what the decoder reads from past codes" in ended.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["mean", "topk"]
    freed = warm.run(["train", "export", "run", "--to", "saelens", "--out", "out", "--context-free"], tmp_path)
    assert freed.code == 0
    assert "what the decoder reads from past codes" in " ".join(freed.out.split())
    some = warm.run(["train", "export", "run", "--to", "sparsify", "--out", "out2/deep"], tmp_path)
    assert some.code == 0
    assert sorted(path.name for path in (tmp_path / "out2" / "deep").iterdir()) == ["topk"]


def test_exit_codes(tmp_path: Path, warm: WarmServer) -> None:
    learner_folder(tmp_path / "run", drawn("tree", {}))
    learner_folder(tmp_path / "run", drawn("tree", PLAIN["tree"]), name="flat")
    learner_folder(tmp_path / "run", drawn("tree", {}), name="tree-2")
    every = warm.run(["train", "export", "run", "--to", "sparsify", "--out", "out"], tmp_path)
    assert every.code == 2
    assert len(every.err.strip().splitlines()) == 2  # one for each reason
    assert "run/tree, run/tree-2: latents of tree depend" in every.err
    assert not (tmp_path / "out").exists()
    missing = warm.run(["train", "export", "nowhere", "--to", "saelens", "--out", "out"], tmp_path)
    assert (missing.code, "nowhere: no such folder" in missing.err) == (3, True)
    unknown = warm.run(["train", "export", "run", "--to", "sealens", "--out", "out"], tmp_path)
    assert (unknown.code, "saelens" in unknown.err) == (2, True)


# ---- the libraries themselves, where they are installed ------------------------------------------------------------


@pytest.mark.parametrize(("variant", "options"), UNIQUE, ids=str)
def test_saelens_itself_loads_it_strictly(variant: str, options: dict[str, object], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae_lens = pytest.importorskip("sae_lens", exc_type=ImportError)
        sae, x = drawn(variant, options), tokens()
        written(sae, "saelens", tmp_path, context_free=variant in LOST)
        loaded = sae_lens.SAE.load_from_disk(str(tmp_path / "out" / variant))
    latents = loaded.encode(x)
    assert torch.equal(latents > 0, sae.encode(x) > 0)
    assert torch.allclose(loaded.decode(latents), sae(x), atol=1e-5)
    assert loaded.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    assert loaded.cfg.d_in == D
