"""What `harvest run` can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.config import build
from common.errors import ConfigError
from harvest.config import HarvestConfig, ToyConfig


def config(**values: Any) -> HarvestConfig:
    return build(HarvestConfig, {"model": "demo", "layer": (3,)} | values, "test")


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({}, "cache/demo.zarr"),
        ({"model": "google/gemma-2-2b"}, "cache/gemma-2-2b.zarr"),
        ({"model": "models/mine/"}, "cache/mine.zarr"),
        ({"out": "x/y.zarr"}, "x/y.zarr"),
        ({"out": "x/y.1"}, "x/y.1.zarr"),
        ({"model": "."}, f"cache/{Path.cwd().name}.zarr"),
        ({"model": "../"}, f"cache/{Path.cwd().parent.name}.zarr"),
    ],
)
def test_store_path_is_out_or_the_models_name(values: dict[str, Any], path: str) -> None:
    assert config(**values).store_path() == Path(path)


def test_corpus_options_take_escapes_in_the_separator() -> None:
    options = config(corpus="x.txt", separator=r"\n\n", column="body", seed=4).corpus_options()
    assert (options.name, options.separator, options.column, options.seed) == ("x.txt", "\n\n", "body", 4)
    assert config().corpus_options().separator is None


def test_corpus_options_keep_a_separator_that_is_not_ascii() -> None:
    assert config(separator="—§—").corpus_options().separator == "—§—"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens": "0"}, "tokens = 0: Input should be greater than 0"),
        ({"context": 1}, "context = 1: Input should be greater than 1"),
        ({"dtype": "int4"}, "dtype = 'int4': Input should be 'bfloat16', 'float16', 'float32' or 'int8'"),
        ({"layer": (), "hook": ()}, "name at least one --layer or --hook"),
        ({"seed": -1}, "seed = -1: Input should be greater than or equal to 0"),  # random's order of 1
        ({"workers": 2, "writers": 3}, "--writers has no effect with --workers and --dask"),
        ({"model": ""}, "model = '': a name is needed, not an empty one"),
        ({"tokenizer": ""}, "tokenizer = '': a name is needed, not an empty one"),
        ({"dask": ""}, "dask = '': a name is needed, not an empty one"),
        ({"out": ""}, "out = '': empty, where a path is needed; a dot is this folder"),
        ({"out": "s3://"}, "out = 's3://': a URL that names no store"),
        ({"layers": (1,)}, r"unknown setting 'layers'\. Did you mean 'layer'\?"),
    ],
)
def test_config_refuses_what_makes_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**values)


@pytest.mark.parametrize("out", [".", "./", "/", "..", "x/..", "file://"])
def test_folder_without_a_name_is_no_store(out: str) -> None:
    for settings in (config(out=out), build(ToyConfig, {"name": "toy-h", "out": out}, "test")):
        with pytest.raises(ConfigError, match=r"^--out [./x]+: a folder, not the name of a store\. Say a name in it: "):
            settings.store_path()
