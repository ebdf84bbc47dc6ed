"""Settings of variant `relational`; its formula is in `relational`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from common.config import Count
from train.saes.base import KeptConfig
from train.saes.idle import Idle
from train.saes.past import RESTART


class RelationalConfig(KeptConfig):
    """Settings of `relational`."""

    window: Count = Field(128, gt=1, description="Tokens of a training window; shorter where the store's context is.")
    span: Count = Field(64, gt=0, le=RESTART, description="Past places attention reads, once the curriculum is over.")
    memory: Literal["attention", "lags"] = Field(
        "attention", description="How the past is read; lags: a learned filter over 16 places instead of attention."
    )
    context_as: Literal["latents", "input"] = Field(
        "latents", description="What c is added to: temporal pre-activations, or their input h (W_C = W_B W_enc)."
    )
    temporal_share: float = Field(0.25, gt=0, le=1, description="Share of the latents, and of k, that is temporal.")
    temporal_lr: float = Field(1.0, gt=0, description="Factor on the learning rate of the temporal weights.")
    gate_penalty: float = Field(0.0, ge=0, description="λ_g, on the mean gate; 1e-3 where gates should be sparse.")
    decoder_reads: Literal["temporal", "all"] = Field("temporal", description="Codes that y is made of.")
    decoder_rank: Count = Field(32, gt=0, description="Values y is made of, before W_O; as a predictor's rank.")
    attention: Literal["masked", "prefix", "softmax"] = Field(
        "masked",
        description="Linear, over all pairs of places or by prefix sums, for long windows; or softmax: an ablation.",
    )
    position_gate: bool = Field(
        False, description="A hard-concrete gate per temporal latent on its position term; off: unhelpful gates close."
    )
    position_penalty: float = Field(1e-3, ge=0, description="λ_z, on open position gates, in the second half.")
    prune_positions: float = Field(
        0.0, ge=0, lt=1, description="Explained variance that dropping position rows at the end may cost; 0: all stay."
    )
    gate_bias: float = Field(-2.0, description="b of the gate at the start; 0 opens it where terms stay unused.")
    joint: bool = Field(False, description="One budget for both groups; the temporal one then starves.")
    no_position: bool = Field(False, description="Ablation: no position term.")
    no_attention: bool = Field(False, description="Ablation: no attention in the encoder.")
    no_gate: bool = Field(False, description="Ablation: g = 1.")
    no_dec_temporal: bool = Field(False, description="No y: the decoder is a plain one, token by token.")
    no_curriculum: bool = Field(False, description="Ablation: the whole span from the start.")

    @model_validator(mode="after")
    def _consistent(self) -> RelationalConfig:
        if self.gate_penalty > 0 and not self.gated:
            raise ValueError("gate_penalty has no gate to act on: no_gate, or no_attention with no_position, is set")
        if self.gate_bias != -2.0 and not self.gated:
            raise ValueError("gate_bias has no gate to act on: no_gate, or no_attention with no_position, is set")
        if self.prune_positions > 0 and self.no_position:
            raise ValueError("prune_positions drops position rows, which no_position leaves out: set one of them")
        if self.position_gate and self.no_position:
            raise ValueError("position_gate gates the position term, which no_position leaves out: set one of them")
        if self.attention == "softmax" and self.memory == "lags":
            raise ValueError("attention = softmax has no attention to act on: memory = lags is set")
        return self

    def idle(self) -> Iterator[Idle]:
        blind = self.no_attention and self.no_dec_temporal
        yield Idle(blind, "no_attention and no_dec_temporal", "memory", "attention", "no_curriculum")
        yield Idle(self.memory == "lags", "memory = lags", "no_curriculum")
        yield Idle(self.no_attention, "no_attention", "context_as")
        yield Idle(self.no_dec_temporal, "no_dec_temporal", "decoder_reads", "decoder_rank")
        yield Idle(not self.position_gate, "position_gate off", "position_penalty")

    @property
    def gated(self) -> bool:
        """Whether there is a gate g: something for it to let through."""
        return not self.no_gate and not (self.no_attention and self.no_position)
