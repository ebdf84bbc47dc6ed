"""What raters see, and in which order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.errors import ConfigError, DataError, StoreError
from tests.train.rate.made import latent, learner
from train.rate.items import item_of, order_for, read_items


def test_every_learner_gives_as_many_latents_as_asked(tmp_path: Path) -> None:
    folders = [learner(tmp_path / "r" / name) for name in ("topk", "tree")]
    items = read_items(folders, 4, 0)
    assert [item.learner for item in items] == ["r/topk"] * 4 + ["r/tree"] * 4
    assert len({(item.learner, item.latent) for item in items}) == 8
    assert items == read_items(folders, 4, 0)
    assert items != read_items(folders, 4, 1)


def test_a_latent_that_was_never_active_is_not_shown(tmp_path: Path) -> None:
    assert 99 not in {item.latent for item in read_items([learner(tmp_path / "topk")], 50, 0)}


def test_the_page_learns_nothing_of_the_learner(tmp_path: Path) -> None:
    shown = json.dumps(read_items([learner(tmp_path / "secret" / "multiscale")], 1, 0)[0].shown())
    for tell in ("secret", "multiscale", "dilation", "density", "index", "learner"):
        assert tell not in shown


def test_promoted_tokens_are_shown_of_all_learners_or_of_none(tmp_path: Path) -> None:
    folders = [learner(tmp_path / "r" / name) for name in ("topk", "imported")]
    assert {item.promoted for item in read_items(folders, 50, 0)} == {("x",)}
    path = folders[1] / "eval" / "latents.json"
    path.write_text(path.read_text().replace('"promoted": [["x", 1.5]]', '"promoted": null'))
    assert {item.promoted for item in read_items(folders, 50, 0)} == {()}
    assert {item.promoted for item in read_items(folders[:1], 50, 0)} == {("x",)}


def test_activations_are_shares_of_the_largest() -> None:
    assert item_of("r/x", latent(0, largest=4.0)).contexts[0]["values"] == [0.0, 1.0, 0.25]


def test_orders_differ_by_rater_and_hold_the_same_items(tmp_path: Path) -> None:
    items = read_items([learner(tmp_path / "topk", 12)], 12, 0)
    ada, bob = order_for("ada", items, 0), order_for("bob", items, 0)
    assert ada != bob
    assert ada == order_for("ada", items, 0)
    assert set(map(id, ada)) == set(map(id, bob)) == set(map(id, items))


def test_a_learner_without_latents_is_told_what_to_run(tmp_path: Path) -> None:
    (tmp_path / "topk").mkdir()
    with pytest.raises(StoreError, match=r"no eval/latents\.json.*train eval .*topk --suite latents"):
        read_items([tmp_path / "topk"], 5, 0)


@pytest.mark.parametrize("text", ["{}", "[]", '{"latents": [{"index": 1}]}', '{"latents": 3}', "{"])
def test_a_damaged_file_is_one_error(tmp_path: Path, text: str) -> None:
    folder = learner(tmp_path / "topk")
    (folder / "eval" / "latents.json").write_text(text)
    with pytest.raises(StoreError, match=r"latents\.json"):
        read_items([folder], 5, 0)


def test_learners_of_one_name_are_refused(tmp_path: Path) -> None:
    folders = [learner(tmp_path / place / "r" / "topk") for place in ("a", "b")]
    with pytest.raises(ConfigError, match=r"a/r/topk.*b/r/topk.*both r/topk.*rename"):
        read_items(folders, 5, 0)
    with pytest.raises(ConfigError, match="both r/topk"):
        read_items(folders[:1] * 2, 5, 0)


def test_nothing_to_rate_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to rate"):
        read_items([learner(tmp_path / "topk", 0)], 5, 0)
