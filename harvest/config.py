"""What `harvest run` can be told. The command line is made from these fields, one option each."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from common.config import Count, Seed, Settings
from common.corpus import CorpusOptions
from common.errors import ConfigError
from common.places import Location

CACHE = Path("cache")  # where stores go unless told


def zarr_path(path: Path) -> Path:
    """`path`, with `.zarr` added if it lacks it.

    Raises:
        ConfigError: a path that ends in no name.
    """
    if path.name in ("", ".."):
        raise ConfigError(f"--out {path}: a folder, not the name of a store. Say a name in it: {path / 'name.zarr'}")
    return path if path.suffix == ".zarr" else path.with_name(path.name + ".zarr")


class HarvestConfig(Settings):
    """One harvest. Every field is an option of `harvest run` (underscores become dashes)."""

    model: str = Field(
        min_length=1, description="Hub name or short name (gemma-2-2b, pythia-70m, gpt2), a local folder, or 'demo'."
    )
    revision: str | None = Field(None, min_length=1, description="Hub revision of the model.")
    tokenizer: str | None = Field(None, min_length=1, description="Another tokenizer: hub name, folder, or 'bytes'.")
    layer: tuple[int, ...] = Field((), description="Residual stream after this block; may be given several times.")
    hook: tuple[str, ...] = Field((), description="A TransformerLens hook name; may be given several times.")
    corpus: str = Field("stdlib", description="Hub data set, local .txt/.jsonl/.parquet file or folder, or 'stdlib'.")
    corpus_config: str | None = Field(None, description="Configuration of a hub data set.")
    corpus_revision: str | None = Field(None, description="Revision of a hub data set.")
    split: str = Field("train", description="Split of a hub data set; stdlib has train and heldout.")
    column: str = Field("text", description="Field with the text, in .jsonl, .parquet and hub data sets.")
    separator: str | None = Field(
        None, description="Splits .txt files into documents, e.g. '<|endoftext|>'; \\n works."
    )
    tokens: Count = Field(10_000_000, gt=0, description="Positions to harvest, rounded up to whole sequences.")
    context: Count = Field(128, gt=1, description="Tokens per sequence, as the model sees them.")
    packing: Literal["packed", "document"] = Field(
        "packed", description="packed: documents end to end, BOS between; document: one per sequence, cut and padded."
    )
    bos: bool = Field(True, description="BOS first in every sequence and between documents, if the model has one.")
    dtype: Literal["bfloat16", "float16", "float32", "int8"] = Field(
        "bfloat16", description="Storage type of activations; int8 has a scale per dimension and one per token."
    )
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type the model computes in; auto: float32 on a CPU, bfloat16 on a GPU."
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1; auto takes a GPU when there is one.")
    compile: bool | None = Field(
        None,
        description="Compile the model's blocks: a minute, then faster passes; default: as the store began.",
    )
    batch_size: Count | None = Field(
        None,
        gt=0,
        description="Sequences per forward pass, halved when memory runs out; default: 4,096 tokens (GPU: 32,768).",
    )
    chunk_sequences: Count | None = Field(
        None,
        gt=0,
        description="Sequences per chunk; default: chunks of about 64 MiB, or one chunk when all fit in less.",
    )
    compression: Literal["none", "zstd"] = Field(
        "none", description="zstd (with bitshuffle) for archives: smaller, but read far slower than mapped files."
    )
    on_nonfinite: Literal["error", "mask"] = Field(
        "error",
        description="A NaN or infinite activation: stop, or store zeros and leave the position out of training.",
    )
    allow_fewer: bool = Field(False, description="Take what there is when the corpus has fewer tokens than asked for.")
    max_bytes: Count | None = Field(None, gt=0, description="Refuse to start when the store would be larger than this.")
    workers: int | None = Field(
        None,
        gt=0,
        description="Spread the chunks over so many processes here; GPUs are dealt out among them.",
    )
    dask: str | None = Field(
        None,
        min_length=1,
        description="Spread the chunks over the workers of this dask scheduler, such as tcp://host:8786.",
    )
    writers: int = Field(2, gt=0, description="Threads that checksum and write chunks.")
    seed: Seed = Field(0, ge=0, description="Order of a corpus's files (local) or shards (hub).")
    out: Location | None = Field(
        None, description="The store, a path or a URL such as s3://; default cache/<model>.zarr."
    )

    @model_validator(mode="after")
    def _hooks_named(self) -> HarvestConfig:
        if not self.layer and not self.hook:
            raise ValueError("name at least one --layer or --hook")
        return self

    @model_validator(mode="after")
    def _one_cluster(self) -> HarvestConfig:
        if self.workers and self.dask:
            raise ValueError("--workers starts processes here, --dask uses those of a scheduler: say one of them")
        if (self.workers or self.dask) and self.writers != 2:
            raise ValueError("--writers has no effect with --workers and --dask, whose processes write their chunks")
        return self

    def corpus_options(self) -> CorpusOptions:
        escaped = self.separator.encode("latin-1", "backslashreplace") if self.separator else None
        try:
            separator = escaped.decode("unicode_escape") if escaped else None  # \n becomes a line feed, § stays §
        except UnicodeDecodeError:
            raise ConfigError(f"--separator {self.separator}: a lone backslash. Write \\\\ for one.") from None
        return CorpusOptions(
            name=self.corpus,
            config=self.corpus_config,
            split=self.split,
            revision=self.corpus_revision,
            column=self.column,
            separator=separator,
            seed=self.seed,
        )

    def store_path(self) -> Path:
        """Where the store goes: `--out`, or `cache/<model>.zarr`."""
        if self.out is not None:
            return zarr_path(self.out)
        model = Path(self.model)
        name = model.resolve().name if model.name in ("", "..") else model.name  # of --model .
        return CACHE / f"{name}.zarr"


class ToyConfig(Settings):
    """One toy store. Every field but `name` is an option of `harvest toy`."""

    name: Literal["toy-h", "toy-h-independent", "toy-h-tree", "toy-t", "toy-m"] = Field(description="Which toy.")
    tokens: Count = Field(1_000_000, gt=0, description="Positions to make, rounded up to whole sequences.")
    context: Count = Field(128, gt=1, description="Tokens per sequence.")
    dtype: Literal["bfloat16", "float16", "float32"] = Field("float32", description="Storage type of activations.")
    chunk_sequences: Count | None = Field(
        None, gt=0, description="Sequences per chunk; default as in `harvest run`, for an existing store its own."
    )
    seed: int = Field(0, ge=0, description="Seed of the features and of everything drawn from them.")
    out: Location | None = Field(None, description="The store; default cache/<name>.zarr.")

    def store_path(self) -> Path:
        """Where the store goes: `--out`, or `cache/<name>.zarr`."""
        return zarr_path(self.out) if self.out is not None else CACHE / f"{self.name}.zarr"
