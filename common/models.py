"""Loaded language models, and their activations at named hooks.

The one owner of transformer-lens; transformers is shared with `tokenizers`. Hook names are TransformerLens's
(`blocks.3.hook_resid_post`); `TransformerBridge` runs the transformers model itself, so activations equal its
hidden states (checked to 1e-6 on GPT-2, GPT-NeoX and Gemma-2 shapes).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from common.errors import ConfigError, nearest
from common.sources import ModelSource
from common.tokenizers import HfTokenizer, Tokenizer, load_tokenizer, quiet

MODEL_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RESID_POST = "blocks.{layer}.hook_resid_post"


class LanguageModel:
    """A loaded model: activations at hooks, nothing computed past the highest one."""

    def __init__(self, bridge: Any, tokenizer: Tokenizer, source: ModelSource) -> None:
        self.bridge, self.tokenizer, self.source = bridge, tokenizer, source
        self.n_layers = int(bridge.cfg.n_layers)
        self.d_model = int(bridge.cfg.d_model)
        self.vocabulary = int(bridge.cfg.d_vocab)
        self.context: int | None = getattr(bridge.cfg, "n_ctx", None) or None  # the most tokens it takes
        self.device = torch.device(str(bridge.cfg.device))

    def hook_names(self) -> list[str]:
        """All hooks, TransformerLens's classic aliases (`blocks.0.hook_resid_post`) included."""
        return sorted(self.bridge.hook_dict)

    def resolve_hook(self, name: str) -> str:
        """`name` if it is a hook.

        Raises:
            ConfigError: it is not; with the number of layers when that is what is wrong.
        """
        layer = layer_of(name)
        if layer is not None and layer >= self.n_layers:
            raise ConfigError(
                f"--hook {name}: layer {layer}, but {self.source.name} has layers 0 to {self.n_layers - 1}."
            )
        known = self.hook_names()
        if name not in known:
            similar = [hook for hook in known if layer is None or hook.startswith(f"blocks.{layer}.")]
            raise ConfigError(f"--hook {name}: {self.source.name} has no such hook.{nearest(name, similar or known)}")
        return name

    @torch.inference_mode()
    def run_hooks(self, tokens: torch.Tensor, hooks: Sequence[str], see: Callable[[str, torch.Tensor], None]) -> None:
        """Run `tokens` [batch, context] through the model, calling `see(hook, activations)` at each hook.

        Stops after the highest block that has a wanted hook; the unembedding is never computed for block hooks.
        """

        def hook_function(name: str) -> Callable[..., None]:
            def record(activations: torch.Tensor, hook: Any) -> None:
                see(name, activations)

            return record

        layers = [layer_of(hook) for hook in hooks]
        highest = max((layer for layer in layers if layer is not None), default=0)
        whole = any(layer is None and not hook.startswith(("embed", "hook_embed", "pos_embed", "hook_pos_embed"))
                    for layer, hook in zip(layers, hooks, strict=True))  # fmt: skip
        stop = None if whole or highest + 1 >= self.n_layers else highest + 1
        fwd_hooks = [(name, hook_function(name)) for name in hooks]
        if stop is None and not whole:
            # the last block is wanted: its output is seen, then the forward ends before the unembedding
            self._run_to_last_block(tokens, fwd_hooks, hooks)
        else:
            self.bridge.run_with_hooks(tokens, fwd_hooks=fwd_hooks, stop_at_layer=stop, return_type=None)

    def _run_to_last_block(
        self, tokens: torch.Tensor, fwd_hooks: list[tuple[str, Callable[..., None]]], hooks: Sequence[str]
    ) -> None:
        class Done(Exception):
            pass

        def leave(*_: Any) -> None:
            raise Done

        handle = self.bridge.blocks[self.n_layers - 1].register_forward_hook(leave)
        try:
            self.bridge.run_with_hooks(tokens, fwd_hooks=fwd_hooks, return_type=None)
        except Done:
            pass
        finally:
            handle.remove()
            self.bridge.reset_hooks()

    def unembedding(self) -> torch.Tensor:
        """The map from the residual stream, after the final norm, to logits: [d_model, vocabulary]."""
        weights: torch.Tensor = self.bridge.unembed.W_U
        return weights

    def capture(self, tokens: torch.Tensor, hooks: Sequence[str]) -> dict[str, torch.Tensor]:
        """Activations at `hooks` for `tokens` [batch, context], each [batch, context, d] on the model's device."""
        seen: dict[str, torch.Tensor] = {}
        self.run_hooks(tokens, hooks, seen.__setitem__)
        return seen


def layer_of(hook: str) -> int | None:
    """The block number in a hook's name, or None for hooks outside the blocks."""
    match = re.match(r"blocks\.(\d+)\.", hook)
    return int(match[1]) if match else None


def load_model(source: ModelSource, device: str, dtype: str = "float32", tokenizer: str | None = None) -> LanguageModel:
    """Load the model and its tokenizer onto `device`, in evaluation mode, with no gradient.

    Raises:
        ConfigError: the architecture is not supported, files are missing or broken, or the tokenizer does not fit.
    """
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoConfig, ByT5Tokenizer

    try:
        with quiet():
            config = AutoConfig.from_pretrained(source.location, revision=source.revision)
    except Exception as error:
        raise _load_error(source, error) from None
    words = load_tokenizer(source, int(config.get_text_config().vocab_size), tokenizer)
    # the bridge wants a tokenizer, which is never asked; without one it makes its own, and fails where there is none
    unused = ByT5Tokenizer()
    try:
        with quiet():
            bridge = TransformerBridge.boot_transformers(
                source.location,
                device=device,
                dtype=MODEL_DTYPES[dtype],
                tokenizer=words.tokenizer if isinstance(words, HfTokenizer) else unused,
                revision=source.revision,
            )
    except Exception as error:
        raise _load_error(source, error) from None
    bridge.eval()
    bridge.original_model.config.get_text_config().use_cache = False  # nobody generates: keys and values are of no use
    for parameter in bridge.parameters():
        parameter.requires_grad_(False)
    return LanguageModel(bridge, words, source)


def _load_error(source: ModelSource, error: Exception) -> ConfigError:
    first = str(error).splitlines()[0] if str(error) else ""
    return ConfigError(f"--model {source.name}: cannot be loaded ({type(error).__name__}: {first[:300]}).")
