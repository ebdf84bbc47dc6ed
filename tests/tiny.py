"""Language models of random weights, made on the spot: three layers of 16 dimensions unless said otherwise."""

from __future__ import annotations

from typing import Any

LAYERS = 3


def gpt2(**more: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"vocab_size": 260, "n_embd": 16, "n_layer": LAYERS, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**(shape | more)))


def neox(**more: Any) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**(shape() | more)))


def gemma2(**more: Any) -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    own = {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8}
    return Gemma2ForCausalLM(Gemma2Config(**(shape() | own | more)))


def llama(**more: Any) -> Any:
    """As the demo model is one, it has its tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**(shape() | {"vocab_size": 4096, "num_key_value_heads": 1} | more)))


def shape() -> dict[str, Any]:
    """What most families call their sizes."""
    return {
        "vocab_size": 260, "hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 32,
    }  # fmt: skip
