"""Settings that would have no effect are refused, and only those that were given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from train.saes import REGISTRY, load_sae, save_sae, settle_config, variant_class

IDLE: list[tuple[str, dict[str, Any], str]] = [
    ("compositional", {"level_floor": 0.5}, "level_floor has no effect with sparsity = budgets"),
    ("compositional", {"sparsity": "joint", "l1": 0.1}, "l1 has no effect with sparsity = joint"),
    ("compositional", {"hierarchy": "fixed_random", "clustering": "partition"}, "clustering has no effect"),
    ("compositional", {"hierarchy": "fixed_random", "candidates": 8}, "candidates has no effect"),
    ("compositional", {"random_parts": 4}, "random_parts has no effect with hierarchy = learned"),
    ("compositional", {"hierarchy": "fixed_cluster", "living_parts": True}, "living_parts has no effect"),
    ("compositional", {"encoder": "no_comp", "detach_lower": True}, "detach_lower has no effect"),
    ("compositional", {"agree_on": "values"}, "agree_on has no effect with agreement = 0"),
    ("compositional", {"residual_penalty": 0.1}, "residual_penalty has no effect with decoder = composed"),
    ("contrastive", {"lambda_c": 0, "key_momentum": 0.9}, "key_momentum has no effect with lambda_c = 0"),
    ("contrastive", {"density_cap": 0.3}, "density_cap has no effect with density_penalty = 0"),
    ("contrastive", {"sparsity": "joint", "k_high": 4}, "k_high has no effect with sparsity = joint"),
    ("contrastive", {"sparsity": "l1", "k_anneal": 0.1}, "k_anneal has no effect with sparsity = l1"),
    ("contrastive", {"loss": "difference", "tau": 0.2}, "tau has no effect with loss = difference"),
    ("compositional", {"copies": 0, "copy_limit": 0.5}, "copy_limit has no effect with copies = 0"),
    ("contrastive", {"positives": "adjacent", "contrast_windows": [4]}, "contrast_windows has no effect"),
    ("contrastive", {"l1": 0.2}, "l1 has no effect with sparsity = budgets"),
    ("tree", {"l1": 0.2}, "l1 has no effect with sparsity = budgets"),
    ("tree", {"sparsity": "l1", "k_anneal": 0.1}, "k_anneal has no effect with sparsity = l1"),
    ("tree", {"no_dec_skip": True, "sum_init": False}, "sum_init has no effect with no_dec_skip"),
    ("multiscale", {"l1": 0.2}, "l1 has no effect with sparsity = joint"),
    ("multiscale", {"sparsity": "l1", "k_anneal": 0.1}, "k_anneal has no effect with sparsity = l1"),
    ("multiscale", {"dilations": [2], "lambda_scale": 0.5}, "lambda_scale has no effect with a single dilation"),
    ("relational", {"memory": "lags", "no_curriculum": True}, "no_curriculum has no effect with memory = lags"),
    ("relational", {"no_attention": True, "context_as": "input"}, "context_as has no effect with no_attention"),
    ("relational", {"no_dec_temporal": True, "decoder_rank": 8}, "decoder_rank has no effect with no_dec_temporal"),
    ("relational", {"position_penalty": 0.1}, "position_penalty has no effect with position_gate off"),
    ("jumprelu", {"penalty": "target", "target_l0": 8, "l0": 0.1}, "l0 has no effect with penalty = target"),
    ("jumprelu", {"target_weight": 2.0}, "target_weight has no effect with penalty = l0"),
    ("predictor", {"rank": 0, "lags": 4}, "lags has no effect with rank = 0"),
]


@pytest.mark.parametrize(("variant", "options", "message"), IDLE)
def test_setting_without_effect_is_refused_and_its_default_is_not(
    variant: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^test: {message}.*: leave it out$"):
        settle_config(variant, options, 64, 128, "test")
    name = message.split()[0]
    default = REGISTRY[variant].Config.model_fields[name].get_default()
    assert getattr(settle_config(variant, options | {name: default}, 64, 128, "test"), name) == default


def test_what_was_trained_with_such_a_setting_lives_on(tmp_path: Path) -> None:
    options = {"d_sae": 16, "k": 2, "l1": 0.2}
    config = settle_config("tree", options, 8, 128, "test", begun=True)
    save_sae(variant_class("tree")(config, 8), tmp_path, {})
    assert load_sae(tmp_path).config == config


@pytest.mark.parametrize("variant", REGISTRY)
def test_saved_settings_are_taken_again(variant: str) -> None:
    config = settle_config(variant, {}, 64, 128, "test")
    assert settle_config(variant, config.model_dump(mode="json"), 64, 128, "test") == config
