"""One chunk's tokens through the model, into host buffers in the storage type.

Chunks are independent. A batch always has the shape it would have in a full chunk (missing rows are zeros), so
that a sequence's activations do not depend on how full its chunk was: resume, repair and extension give equal bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from common.dtypes import TORCH, to_numpy
from common.errors import ConfigError
from common.layout import DOCUMENTS, TOKENS, acts_array, norms_array, partial_array, token_scales_array
from common.models import LanguageModel
from common.quantise import dequantise, quantise
from common.store import ChunkData, Store
from harvest.moments import PartialSums


@dataclass
class HookBuffer:
    """Host memory for one chunk at one hook, pinned when the model is on a GPU, and what was summed over it.

    Attributes:
        dimension: on the model's device, the scales of an int8 hook's dimensions; None for other types.
        token: host memory for the scales of its tokens.
        squared_error: Σ ‖x − x̂‖² over trainable positions that rounding to int8 made.
    """

    acts: torch.Tensor
    norms: torch.Tensor
    partial: PartialSums
    dimension: torch.Tensor | None = None
    token: torch.Tensor | None = None
    squared_error: torch.Tensor | None = None

    def reset(self) -> None:
        """Before a new chunk: nothing is summed."""
        d_model, device = self.partial.sums.shape[1], self.partial.sums.device
        self.partial = PartialSums(d_model, device)
        self.squared_error = torch.zeros((), dtype=torch.float64, device=device)

    def encode(self, x: torch.Tensor, trainable: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Sum over a batch; what is to be copied, as pairs of host memory [sequences, …] and values [batch, …].

        Args:
            x: [batch, context, d_model], as the model gave it.
            trainable: bool [batch, context].
        """
        if self.dimension is None or self.token is None or self.squared_error is None:
            values, norms = self.partial.add(x.to(self.acts.dtype), trainable)
            return [(self.acts, values), (self.norms, norms)]
        q, token = quantise(x, self.dimension)
        back = dequantise(q, token, self.dimension)
        finite = torch.isfinite(torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32))
        if x.device.type != "cpu" or not bool(finite.all()):  # asking a GPU would make the model wait
            back = torch.where(finite[..., None], back, x.float())
        _, norms = self.partial.add(back, trainable)  # moments and norms are those of what readers get
        error = torch.linalg.vector_norm(back.sub_(x), dim=-1).double().square()
        self.squared_error += torch.where(trainable & finite, error, 0.0).sum()
        return [(self.acts, q), (self.norms, norms), (self.token, token)]


@dataclass
class ChunkBuffer:
    """One chunk on its way from the model to the disk.

    Attributes:
        copied: recorded after the last device-to-host copy, None on a CPU.
    """

    hooks: dict[str, HookBuffer]
    copied: Any = None

    def wait(self) -> None:
        """Until all copies have arrived."""
        if self.copied is not None:
            self.copied.synchronize()


def chunk_tokens(store: Store, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a chunk, int32 [rows, context], and which of them may be trained on: bool, likewise.

    Raises:
        StoreError: they are not what the journal says.
    """
    rows = store.sequences_in(chunk)
    tokens = store.map_chunk(TOKENS, chunk, verify=True)[:rows]
    documents = store.map_chunk(DOCUMENTS, chunk, verify=True)[:rows]
    return tokens, (documents >= 0) & ~np.isin(tokens, store.special_tokens)


def files_of(hook: str, chunk: int, rows: int, filled: HookBuffer) -> tuple[list[ChunkData], dict[str, Any]]:
    """What one chunk puts on disk at one hook, and what its moments say of it: count, max_abs, nonfinite, where."""
    sums, facts = filled.partial.result()
    of_acts = {"nonfinite": facts["nonfinite"], "max_abs": facts["max_abs"]}
    files: list[ChunkData] = [(norms_array(hook), chunk, filled.norms.numpy()[:rows], {})]
    if filled.token is not None and filled.squared_error is not None:
        of_acts["squared_error"] = float(filled.squared_error)
        files.append((token_scales_array(hook), chunk, filled.token.numpy()[:rows], {}))
    files.append((partial_array(hook), chunk, sums, {"count": facts["count"], "max_abs": facts["max_abs"]}))
    return [(acts_array(hook), chunk, to_numpy(filled.acts)[:rows], of_acts), *files], facts


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether PyTorch found no memory: a class of its own on a GPU, a plain RuntimeError of its allocator on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


class Forward:
    """Runs chunks; halves its batch when memory runs out.

    Args:
        scales: of the dimensions of each hook, when they are stored as int8.

    Attributes:
        batch_size: sequences per forward pass now.
    """

    def __init__(
        self,
        model: LanguageModel,
        widths: dict[str, int],
        dtype: str,
        chunk_sequences: int,
        context: int,
        batch_size: int,
        scales: dict[str, list[float]] | None = None,
    ) -> None:
        self.scales = {hook: torch.tensor(values, device=model.device) for hook, values in (scales or {}).items()}
        self.model, self.widths, self.dtype = model, widths, TORCH[dtype]
        self.chunk_sequences, self.context = chunk_sequences, context
        self.batch_size = min(batch_size, chunk_sequences)
        self.cuda = model.device.type == "cuda"
        self.copies = torch.cuda.Stream(model.device) if self.cuda else None

    def new_buffer(self) -> ChunkBuffer:
        """Memory for one chunk at all hooks."""
        shape = (self.chunk_sequences, self.context)

        def memory(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, pin_memory=self.cuda)

        return ChunkBuffer(
            {
                hook: HookBuffer(
                    acts=memory(self.dtype, *shape, width),
                    norms=memory(torch.float32, *shape),
                    partial=PartialSums(width, self.model.device),
                    dimension=self.scales.get(hook),
                    token=memory(torch.float32, *shape) if hook in self.scales else None,
                )
                for hook, width in self.widths.items()
            }
        )

    def run(self, tokens: np.ndarray, trainable: np.ndarray, buffer: ChunkBuffer) -> int:
        """Fill `buffer` from tokens int32 [rows, context]; returns how often the batch had to be halved.

        Raises:
            ConfigError: one sequence alone does not fit.
        """
        halved = 0
        while True:
            try:
                self._run(tokens, trainable, buffer)
                return halved
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.batch_size == 1:
                    raise ConfigError(
                        f"out of memory with a single sequence of {self.context} tokens. Lower --context, "
                        "choose --model-dtype bfloat16, or use a device with more memory."
                    ) from None
                self.batch_size, halved = self.batch_size // 2, halved + 1
                torch.cuda.empty_cache()

    def _run(self, tokens: np.ndarray, trainable: np.ndarray, buffer: ChunkBuffer) -> None:
        rows = len(tokens)
        for hook in buffer.hooks.values():
            hook.reset()
        for start in range(0, rows, self.batch_size):
            size = min(self.batch_size, self.chunk_sequences - start)
            batch = torch.zeros(size, self.context, dtype=torch.int64)
            taken = torch.from_numpy(tokens[start : start + size].astype(np.int64))
            batch[: len(taken)] = taken
            keep = torch.zeros(size, self.context, dtype=torch.bool)
            keep[: len(taken)] = torch.from_numpy(trainable[start : start + size])
            self._run_batch(batch, keep, len(taken), start, buffer)
        if self.copies is not None:
            buffer.copied = torch.cuda.Event()
            buffer.copied.record(self.copies)

    def _run_batch(self, batch: torch.Tensor, keep: torch.Tensor, real: int, start: int, buffer: ChunkBuffer) -> None:
        device = self.model.device
        keep = keep.to(device, non_blocking=True)

        def see(hook: str, activations: torch.Tensor) -> None:
            pairs = buffer.hooks[hook].encode(activations.detach().flatten(2)[:real], keep[:real])
            if self.copies is None:
                for memory, values in pairs:
                    memory[start : start + real] = values
                return
            self.copies.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self.copies):
                for memory, values in pairs:
                    memory[start : start + real].copy_(values, non_blocking=True)
                    values.record_stream(self.copies)

        self.model.run_hooks(batch.to(device, non_blocking=True), list(self.widths), see)
