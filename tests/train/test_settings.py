"""From flags, `--set` and TOML to one configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError, StoreError
from train.config import FitConfig
from train.settings import fit_config, saved_config


def from_flags(
    *variants: str, file: Path | None = None, settings: tuple[str, ...] = (), shared: dict[str, Any] | None = None,
    **flags: Any,
) -> FitConfig:  # fmt: skip
    given = {"cache": "c.zarr"} if file is None else {}
    length = {} if {"steps", "tokens", "passes"} & flags.keys() or file else {"steps": "10"}
    return fit_config(file, given | length | flags, variants, shared or {}, settings)


def toml(tmp_path: Path, text: str) -> Path:
    (tmp_path / "study.toml").write_text(text)
    return tmp_path / "study.toml"


STUDY = """
cache = "c.zarr"
tokens = "2M"
seed = 5
[[learner]]
variant = "topk"
k = 8
lr = 1e-3
[[learner]]
variant = "topk"
name = "wide"
d_sae = "1k"
"""


def test_a_second_learner_of_a_variant_gets_a_number() -> None:
    config = from_flags("topk", "batchtopk", "topk", "topk")
    assert [learner.name for learner in config.learner] == ["topk", "batchtopk", "topk-2", "topk-3"]


def test_settings_reach_every_learner_that_knows_them_or_the_named_one() -> None:
    config = from_flags("topk", "topk", "standard", settings=("k=16", "topk-2.k=4", "standard.l1=0.05", "lr=1e-4"))
    assert [learner.options for learner in config.learner] == [{"k": 16}, {"k": 4}, {"l1": 0.05}]
    assert [learner.lr for learner in config.learner] == [1e-4] * 3


@pytest.mark.parametrize("spelled", [".5", "5e-1", "0.50", "+.5", '"0.5"'])
def test_a_number_is_one_setting_however_it_is_spelled(spelled: str) -> None:
    assert from_flags("standard", settings=(f"l1={spelled}",)) == from_flags("standard", settings=("l1=0.5",))
    assert from_flags("standard", settings=(f"beta1={spelled}",)).learner[0].beta1 == 0.5


def test_lists_and_switches_are_parsed_as_their_variant_takes_them() -> None:
    learner = from_flags("compositional", settings=('nesting=[0, "0", 1]', "detach_lower=True")).learner[0]
    assert learner.options == {"nesting": [0.0, 0.0, 1.0], "detach_lower": True}
    assert from_flags("topk", settings=("k=many",)).learner[0].options == {"k": "many"}  # refused where it is built


def test_shared_flags_reach_what_each_variant_has_instead() -> None:
    config = from_flags("topk", "standard", shared={"k": "16", "d_sae": "1k", "lr": "1e-4"})
    assert [learner.options for learner in config.learner] == [
        {"k": 16, "d_sae": 1000},
        {"target_l0": 16, "d_sae": 1000},
    ]
    assert config.learner[0].lr == 1e-4


def test_counts_take_suffixes() -> None:
    assert from_flags("topk", tokens="10M", batch_size="4k").tokens == 10_000_000


def test_a_file_says_what_flags_say(tmp_path: Path) -> None:
    config = from_flags(file=toml(tmp_path, STUDY))
    assert (config.tokens, config.seed) == (2_000_000, 5)
    assert [learner.name for learner in config.learner] == ["topk", "wide"]
    assert config.learner[0].options == {"k": 8}
    assert config.learner[1].options == {"d_sae": 1000}


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = toml(tmp_path, STUDY)
    assert from_flags(file=file, seed=6).seed == 6
    assert from_flags(file=file, settings=("topk.k=9",)).learner[0].options == {"k": 9}
    assert [learner.variant for learner in from_flags("batchtopk", file=file).learner] == ["batchtopk"]


def test_a_length_by_flag_replaces_the_one_in_the_file(tmp_path: Path) -> None:
    config = from_flags(file=toml(tmp_path, STUDY), steps="7")
    assert (config.steps, config.tokens) == (7, None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"variants": ["topkk"]}, r"--variant: unknown variant 'topkk'\. Did you mean 'topk'\?"),
        ({"variants": ["topk"], "settings": ("kk=3",)}, r"--set kk=3: unknown setting 'kk'\. Did you mean 'k'\?"),
        ({"variants": ["topk"], "settings": ("k",)}, r"--set k: write it as key=value"),
        ({"variants": ["topk"], "settings": ("topc.k=3",)}, r"no learner 'topc'\. Did you mean 'topk'\?"),
        ({"variants": ["topk"], "settings": ("topk.l1=3",)}, r"unknown setting 'l1'"),
        ({"variants": ["topk"], "settings": ("lr=fast",)}, r"lr = 'fast'"),
        ({"variants": ["topk"], "settings": ("lr=0",)}, r"lr = 0: Input should be greater than 0"),
        ({"variants": ["topk"], "tokens": "1M", "steps": "3"}, "either --steps or --tokens, not both"),
        ({"variants": ["topk", "topk"], "settings": ("name=same",)}, "two learners are called 'same'"),
        ({"variants": ["topk"], "sedd": 1}, r"unknown setting 'sedd'\. Did you mean 'seed'\?"),
        ({"variants": ["topk"], "batch_size": "many"}, "batch_size = 'many'"),
        ({"variants": ["topk"], "passes": "inf"}, "passes = 'inf': Input should be a finite number"),
        ({"variants": ["topk"], "settings": ("lr=NaN",)}, "lr = nan: Input should be a finite number"),
        ({"variants": ["topk"], "settings": ("name=run.toml",)}, "a run folder uses this name itself"),
        ({"variants": ["topk"], "settings": ("name=sae",)}, "a run folder uses this name itself"),
        ({"variants": ["topk"], "settings": ("variant=3",)}, "unknown variant '3'"),
        ({"variants": ["topk"], "settings": ('variant=["topk"]',)}, r"unknown variant '\['topk'\]'"),
        ({"variants": ["topk"], "cache": ""}, r"cache = '': empty, where a path is needed"),
        ({"variants": ["topk"], "out": ""}, r"out = '': empty, where a path is needed"),
        ({"variants": ["topk"], "out": "s3://b/r"}, "a URL, where a folder of this machine is needed"),
        ({"variants": ["topk"], "seed": 10**20}, "less than or equal to 10{18}$"),
        ({"variants": ["topk"], "settings": ("seed=true",)}, "a number is needed, not true or false"),
        ({"variants": ["topk"], "settings": ("seed=-20000000000000000000",)}, "greater than or equal to -10{18}$"),
        ({"variants": ["topk"], "passes": "1e308"}, "less than or equal to 1000000000$"),
        ({"variants": ["topk"], "tokens": "1e400"}, "tokens = '1e400': a whole number is needed"),
    ],
)
def test_mistakes_are_told_with_the_way_out(call: dict[str, Any], message: str) -> None:
    variants = call.pop("variants")
    with pytest.raises(ConfigError, match=message):
        from_flags(*variants, **call)


def test_a_run_needs_a_length() -> None:
    with pytest.raises(ConfigError, match="--steps, --tokens or --passes"):
        fit_config(None, {"cache": "c.zarr"}, ("topk",), {}, ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('cache = "c"\nsteps = 1\n[[learner]]\nk = 3\n', r"needs variant"),
        ('cache = "c"\nsteps = 1\n[[learner]]\nvariant = "topk"\nd_sea = 3\n', r"'d_sea'\. Did you mean 'd_sae'\?"),
        ('cache = "c"\nstep = 1\n', r"unknown setting 'step'\. Did you mean 'steps'\?"),
        ('cache = "c"\nlearner = "topk"\n', r"\[\[learner\]\] tables"),
        ("cache = \n", "not valid TOML"),
        ('cache = "c"\nsteps = 1\n[[learner]]\nvariant = "topk"\noptions = 3\n', "options = 3: a table"),
        ("steps = 1\n", "--cache is needed"),
        ('cache = "c"\nsteps = 1\n[[learner]]\nvariant = "topq"\n', "unknown variant 'topq'"),
        ('cache = "c"\nsteps = ' + 5000 * "9", "not valid TOML"),
        (f'cache = "c"\nsteps = 1\n[[learner]]\nvariant = "topk"\nname = "{300 * "a"}"\n', "at most 200 characters"),
    ],
)
def test_mistakes_in_a_file_name_the_file(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        from_flags(file=toml(tmp_path, text))
    assert "study.toml" in str(caught.value)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no run here \(no run.toml\)"):
        saved_config(tmp_path)


def test_the_stores_suffix_may_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "gemma-2.5.zarr").mkdir()
    assert from_flags("topk", cache=str(tmp_path / "gemma-2.5")).cache == tmp_path / "gemma-2.5.zarr"
    (tmp_path / "gemma-2.5").mkdir()
    assert from_flags("topk", cache=str(tmp_path / "gemma-2.5")).cache == tmp_path / "gemma-2.5"


def test_a_store_that_is_gone_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(f'cache = "{tmp_path}/c.zarr"\nsteps = 1\n')
    with pytest.raises(StoreError, match=r"c\.zarr: the store of .* is not there\. .*--cache"):
        saved_config(tmp_path)


def names(config: FitConfig) -> list[str]:
    return [learner.name for learner in config.learner]


def grid(tmp_path: Path, text: str) -> FitConfig:
    return from_flags(file=toml(tmp_path, f'cache = "c.zarr"\nsteps = 10\n[[grid]]\n{text}'))


def test_a_grid_is_every_combination_named_after_what_varies(tmp_path: Path) -> None:
    config = grid(tmp_path, 'variant = ["topk", "batchtopk"]\nk = [16, "32"]\nseed = [0, 1]\nd_sae = "1k"')
    assert names(config)[:4] == ["topk-k16-seed0", "topk-k16-seed1", "topk-k32-seed0", "topk-k32-seed1"]
    assert len(config.learner) == 8
    last = config.learner[-1]
    assert (last.variant, last.seed, last.options) == ("batchtopk", 1, {"k": 32, "d_sae": 1000})


def test_a_grid_gives_k_as_the_target_of_variants_with_a_penalty(tmp_path: Path) -> None:
    config = grid(tmp_path, 'variant = ["standard", "topk"]\nk = [16, 32]\naux_alpha = [0.0, 0.5]')
    assert names(config)[:2] == ["standard-k16", "standard-k32"]  # without aux_alpha, which it does not have
    assert config.learner[0].options == {"target_l0": 16}
    assert names(config)[2:4] == ["topk-k16-aux_alpha0.0", "topk-k16-aux_alpha0.5"]


def test_a_grid_stands_beside_learners_and_takes_a_name(tmp_path: Path) -> None:
    text = (
        'cache = "c.zarr"\nsteps = 9\n[[learner]]\nvariant = "topk"\n[[grid]]\nvariant = "topk"\nname = "x"\nk = [1, 2]'
    )
    config = from_flags(file=toml(tmp_path, text))
    assert names(config) == ["topk", "x-k1", "x-k2"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('variant = "topk"\nk = ["1k", 1000]', ["topk"]),
        ('variant = "topk"\nk = ["1k", 1000, 8]', ["topk-k1000", "topk-k8"]),
        ('variant = "topk"\nlr = ["1e-3", 0.001]', ["topk-lr1e-3"]),
        ('variant = ["topk", "topk"]\nseed = [3, 3]', ["topk"]),
    ],
)
def test_a_grid_makes_each_learner_once_however_it_is_spelled(tmp_path: Path, text: str, expected: list[str]) -> None:
    assert names(grid(tmp_path, text)) == expected


def test_different_learners_of_a_grid_never_share_a_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two learners are called 'topk-aux_alpha1_2'"):
        grid(tmp_path, 'variant = "topk"\naux_alpha = ["1/2", "1_2", "1:2"]')


@pytest.mark.parametrize("key", ["k", "target_l0"])
def test_a_flag_replaces_the_list_of_a_grid_before_it_is_expanded(tmp_path: Path, key: str) -> None:
    text = f'variant = "standard"\n{key} = [16, 32]\nseed = [0, 1]\nd_sae = [512, 1024]\nlr = [1e-3, 1e-4]'
    file = toml(tmp_path, f'cache = "c.zarr"\nsteps = 10\n[[grid]]\n{text}')
    config = from_flags(file=file, shared={"k": "8", "d_sae": "1k", "lr": "0.01"})
    assert names(config) == ["standard-seed0", "standard-seed1"]
    assert [learner.options for learner in config.learner] == [{"target_l0": 8, "d_sae": 1000}] * 2
    assert config.learner[0].lr == 0.01


@pytest.mark.parametrize("setting", ["k=8", "seed=3", "aux_alpha=0.5", "d_sae=1k"])
def test_a_setting_for_all_replaces_the_list_of_a_grid_before_it_is_expanded(tmp_path: Path, setting: str) -> None:
    lists = {"k": "[16, 32]", "seed": "[0, 1]", "aux_alpha": "[0.0, 1.0]", "d_sae": "[512, 1024]"}
    key, value = setting.split("=")

    def text(lists: dict[str, str]) -> str:
        return 'variant = ["standard", "topk"]\n' + "".join(f"{name} = {given}\n" for name, given in lists.items())

    written = grid(tmp_path, text(lists | {key: f'"{value}"' if value == "1k" else value}))
    file = toml(tmp_path, f'cache = "c.zarr"\nsteps = 10\n[[grid]]\n{text(lists)}')
    config = from_flags(file=file, settings=(setting,))
    assert config.learner == written.learner


def test_two_grids_that_make_a_learner_of_one_name_are_refused_without_blaming_a_flag(tmp_path: Path) -> None:
    text = (
        'cache = "c.zarr"\nsteps = 1\n[[grid]]\nvariant = "topk"\nk = [2, 3]\n[[grid]]\nvariant = "topk"\nk = [3, 4]\n'
    )
    for settings in ((), ("lr=0.1",)):
        with pytest.raises(ConfigError, match="two learners are called 'topk-k3'"):
            from_flags(file=toml(tmp_path, text), settings=settings)


def test_a_setting_that_makes_two_learners_of_a_grid_one_is_refused(tmp_path: Path) -> None:
    file = toml(tmp_path, 'cache = "c.zarr"\nsteps = 10\n[[grid]]\nvariant = ["standard", "topk"]\nk = [16, 32]')
    with pytest.raises(ConfigError, match="--set makes 'standard-k16' and 'standard-k32' one learner"):
        from_flags(file=file, settings=("target_l0=8",))
    only = from_flags(file=file, settings=("standard-k16.target_l0=8",))
    assert [learner.options for learner in only.learner[:2]] == [{"target_l0": 8}, {"target_l0": 32}]
    assert names(from_flags("topk", "topk")) == ["topk", "topk-2"]  # two alike that were asked for are given


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k = [1, 2]", r"a \[\[grid\]\] table needs variant"),
        ("variant = 5", r"study\.toml: a \[\[grid\]\] table needs variant"),
        ("variant = [5]", r"a \[\[grid\]\] table needs variant"),
        ('variant = [["topk"]]', r"a \[\[grid\]\] table needs variant"),
        ('variant = "topq"', r"study\.toml: \[\[grid\]\]: unknown variant 'topq'\. Did you mean 'topk'"),
        ('variant = ["standard", "topk"]\nk = [8]\ntarget_l0 = [8]', "k and target_l0 in one"),
        ('variant = "topk"\nsede = [1]', r"unknown setting 'sede' in \[\[grid\]\]\. Did you mean 'seed'"),
        ('variant = "topk"\nk = []', "an empty list makes no learner"),
        ('variant = "topk"\n[[learner]]\nvariant = "topk"', "two learners are called 'topk'"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        grid(tmp_path, text)
