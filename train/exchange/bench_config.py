"""The settings of an SAE that SAEBench looks for: on the object it evaluates, and in the results it saves."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class BenchConfig:
    """SAEBench sets more of them itself. `hook_layer` is None for a hook outside the blocks."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int | None
    hook_name: str
    context_size: int
    architecture: str
    apply_b_dec_to_input: bool
    dtype: str = "float32"
    device: str = "cpu"
    hook_head_index: int | None = None
    finetuning_scaling_factor: bool = False
    activation_fn_str: str = "relu"
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    prepend_bos: bool = True
    normalize_activations: str = "none"
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = True
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = 0
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of the above, as JSON can hold it."""
        return asdict(self) | {"seqpos_slice": list(self.seqpos_slice)}
