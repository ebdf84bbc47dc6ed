"""What tests of plans and readers share."""

from __future__ import annotations

from common.config import build
from train.config import DataConfig


def data_config(**values: object) -> DataConfig:
    return build(DataConfig, {"held_out": 0.1, "pool_tokens": 8192} | values, "test")
