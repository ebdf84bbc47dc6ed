"""A count means the same however it is spelled: flags, `--set` and TOML files give one and the same learner."""

from __future__ import annotations

from pathlib import Path

from train.settings import fit_config


def test_fit_config_same_counts_spelled_differently_are_equal(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('cache = "x.zarr"\npasses = 1\n[[learner]]\nvariant = "topk"\nd_sae = 2000\nk = 16\n')
    flags = {"cache": "x.zarr", "passes": "1"}
    from_file = fit_config(file, {}, (), {}, ())
    from_flags = fit_config(None, flags, ("topk",), {"d_sae": "2k", "k": "16"}, ())
    from_set = fit_config(None, flags, ("topk",), {}, ("d_sae=2k", "k=16"))
    assert from_file.learner[0].options == {"d_sae": 2000, "k": 16}
    assert from_flags == from_file == from_set
