"""Language models by hub name, local folder or `demo`, and their activations at named hooks.

The one owner of transformer-lens and transformers. Hook names are TransformerLens's
(`blocks.3.hook_resid_post`); `TransformerBridge` runs the transformers model itself, so activations equal its
hidden states (checked to 1e-6 on GPT-2, GPT-NeoX and Gemma-2 shapes).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from common.errors import ConfigError, nearest
from common.files import file_sha256, fingerprint
from common.truth import TOYS

DEMO_FOLDER = Path(__file__).parent / "demo"
SHORT_NAMES = {
    "gpt2-small": "gpt2",
    "pythia-14m": "EleutherAI/pythia-14m",
    "pythia-70m": "EleutherAI/pythia-70m",
    "pythia-160m": "EleutherAI/pythia-160m",
    "pythia-410m": "EleutherAI/pythia-410m",
    "pythia-1b": "EleutherAI/pythia-1b",
    "gemma-2-2b": "google/gemma-2-2b",
    "gemma-2-2b-it": "google/gemma-2-2b-it",
    "gemma-2-9b": "google/gemma-2-9b",
    "gemma-2-9b-it": "google/gemma-2-9b-it",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
}
MODEL_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tokenizer_config.json")
RESID_POST = "blocks.{layer}.hook_resid_post"


class Tokenizer(Protocol):
    """Text to token ids and back; the special ids are marked in the store so that training can leave them out."""

    bos: int | None
    special: tuple[int, ...]
    size: int
    memory_per_byte: int  # bytes of memory per byte of a text while it is encoded

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """One int64 array of ids per text, no special tokens added."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def name(self, token: int) -> str:
        """What the vocabulary calls an id; for bytes that are no character alone, decoding says nothing."""
        ...

    def identity(self) -> str:
        """A fingerprint of all that decides the ids."""
        ...


class HfTokenizer:
    """A transformers tokenizer."""

    memory_per_byte = 160  # 156 on 10 MB of Python: tokens with their names and offsets

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.bos: int | None = tokenizer.bos_token_id
        ids = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, *tokenizer.all_special_ids}
        self.special = tuple(sorted(i for i in ids if i is not None))
        self.size = len(tokenizer)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        rows = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [np.asarray(row, dtype=np.int64) for row in rows]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids)))

    def name(self, token: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(token) or f"<{token}>")

    def identity(self) -> str:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = backend.to_str() if backend is not None else sorted(self.tokenizer.get_vocab().items())
        return fingerprint([rules, self.bos, self.special])


class ByteTokenizer:
    """UTF-8 bytes as ids 0–255, for models that come without a tokenizer; id 256 is BOS where there is room."""

    memory_per_byte = 10  # the bytes, and int64 of them

    def __init__(self, vocabulary: int) -> None:
        if vocabulary < 256:
            raise ConfigError(
                f"the model has no tokenizer and a vocabulary of {vocabulary}, too small for raw bytes (256). "
                "Name one with --tokenizer PATH."
            )
        self.bos = 256 if vocabulary > 256 else None
        self.special: tuple[int, ...] = () if self.bos is None else (self.bos,)
        self.size = 256 + len(self.special)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def name(self, token: int) -> str:
        return f"<0x{token:02X}>" if token < 256 else f"<{token}>"

    def identity(self) -> str:
        return fingerprint(["bytes", self.bos])


@dataclass(frozen=True)
class ModelSource:
    """Where a model lies and what identifies its weights.

    Attributes:
        name: as the user said it.
        location: hub id or folder, as transformers takes it.
        revision: the hub commit, or None for a folder.
        files: of a folder, config and weights.
    """

    name: str
    location: str
    revision: str | None
    files: tuple[Path, ...] = ()

    @functools.cached_property
    def fingerprint(self) -> str | None:
        """Of a folder's files, which are read whole: gigabytes, so only when somebody asks. None of a hub model."""
        if not self.files:
            return None
        return fingerprint([[file.name, file_sha256(file)] for file in self.files])

    def identity(self) -> dict[str, Any]:
        """What stands in a store's identity; a folder is known by its weights, not by where it lies."""
        if self.fingerprint is not None:
            return {"weights": self.fingerprint}
        return {"name": self.location, "revision": self.revision}


def find_model(name: str, revision: str | None = None) -> ModelSource:
    """Resolve a name: `demo`, a local folder, a short name or a hub id (its commit is looked up).

    Raises:
        ConfigError: no such folder or hub model, a gated model, or no network.
    """
    path = DEMO_FOLDER if name == "demo" else Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ConfigError(f"--model {name}: the folder has no config.json; is it a model saved by transformers?")
        weights = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
        if not weights:
            raise ConfigError(f"--model {name}: the folder has no weights (*.safetensors).")
        return ModelSource(name, str(path), None, (path / "config.json", *weights))
    if name in TOYS:
        raise ConfigError(f"--model {name}: a toy is made up and has no language model. Make one: harvest toy {name}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"--model {name}: no such folder.")
    return _find_hub_model(name, revision)


def _find_hub_model(name: str, revision: str | None) -> ModelSource:
    from huggingface_hub import try_to_load_from_cache

    location = SHORT_NAMES.get(name.lower(), name)
    cached = try_to_load_from_cache(location, "config.json", revision=revision)
    if isinstance(cached, str):  # …/snapshots/<commit>/config.json
        return ModelSource(name, location, Path(cached).parent.name)
    if not hub_answers():
        raise ConfigError(
            f"--model {name}: not a local folder, not in the hub cache, and the hub cannot be reached. "
            "Give the folder of a model saved by transformers, or --model demo."
        )
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return ModelSource(name, location, HfApi().model_info(location, revision=revision, timeout=10).sha)
    except GatedRepoError:
        raise ConfigError(
            f"--model {name}: {location} is gated. Accept its terms on its hub page, then run 'hf auth login'."
        ) from None
    except RepositoryNotFoundError:
        hint = nearest(name, [*SHORT_NAMES, "demo"])
        raise ConfigError(f"--model {name}: neither a local folder nor a model on the hub.{hint}") from None
    except Exception as error:
        raise ConfigError(f"--model {name}: the hub did not answer ({type(error).__name__}).") from None


def hub_answers(timeout_s: float = 3.0) -> bool:
    """Whether the hub's host, or the proxy to it, takes a connection; false when HF_HUB_OFFLINE is set.

    Decides in seconds what the hub's client retries for minutes.
    """
    from urllib.parse import urlparse
    from urllib.request import getproxies, proxy_bypass

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    address = urlparse(constants.ENDPOINT)
    if not proxy_bypass(address.hostname or ""):
        address = urlparse(getproxies().get(address.scheme, constants.ENDPOINT))
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        with socket.create_connection((address.hostname or "", port), timeout=timeout_s):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' own progress bars and notices while a model loads; errors still rise."""
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
        hf_logging.enable_progress_bar()
        hf_logging.set_verbosity(verbosity)


def load_tokenizer(source: ModelSource, vocabulary: int, override: str | None = None) -> Tokenizer:
    """The model's tokenizer, the one named by `override`, or raw bytes for a folder without one.

    Raises:
        ConfigError: it cannot be loaded, or has more ids than the model has embeddings.
    """
    from transformers import AutoTokenizer

    location = override or source.location
    folder = Path(location).expanduser()
    if override == "bytes" or (folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES)):
        return ByteTokenizer(vocabulary)
    try:
        with quiet():
            revision = None if override else source.revision
            tokenizer = HfTokenizer(AutoTokenizer.from_pretrained(str(location), revision=revision))
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else ""
        raise ConfigError(
            f"--tokenizer {location}: cannot be loaded ({type(error).__name__}: {first[:160]})."
        ) from None
    if tokenizer.size > vocabulary and max(tokenizer.tokenizer.get_vocab().values()) >= vocabulary:
        raise ConfigError(
            f"--tokenizer {location}: {tokenizer.size:,} ids, but the model embeds {vocabulary:,}. Is it this model's?"
        )
    return tokenizer


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
