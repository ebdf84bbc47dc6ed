"""Where a language model lies: a hub name, a local folder, or `demo`; and what identifies its weights."""

from __future__ import annotations

import functools
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
