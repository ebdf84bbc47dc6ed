"""Suite `cost`: parameters, time, memory and operations, beside a flat SAE of the same size (evaluation spec §5.8).

Times are of this machine, while it does what else it does: each is measured in turn with that of the flat SAE, and the
ratio of the two is what compares.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from common.errors import DataError
from train.data.batch import Batch
from train.evaluate.baseline import aim_of
from train.evaluate.missing import Figures, Missing, evaluation
from train.evaluate.subject import Evaluation, Subject
from train.evaluate.tensor_memory import peak_bytes
from train.evaluate.timing import Timing, in_turn
from train.evaluate.training_cost import STEP_TOKENS, batch_of, recorded_speed, training_step
from train.saes import make_sae
from train.saes.base import SAE

SHORT, LONG = (16, 128), (1, 1024)  # sequences × tokens
FLAT_K = 32  # of the flat SAE beside one that aims at no L0

COST_METRICS = {
    "parameters": "trained numbers",
    "parameters_encoder": "of them W_enc",
    "parameters_decoder": "of them decoder rows",
    "parameters_biases": "of them b_enc, b_dec and others called b_…",
    "parameters_other": "of them the rest: composition weights, thresholds, attention, …",
    "bytes": "size of sae/weights.safetensors",
    "training_tokens_per_s": "tokens over seconds of result.json",
    "training_speed_ratio": "that over the baseline's, if it is of the same run",
    "training_step_ms": "a training step of at most 2,048 tokens, median",
    "training_step_ratio": "that over a flat SAE's, median of pairs",
    "training_peak_bytes": "most bytes in such steps: weights, gradients, Adam's averages, what a step makes",
    "training_peak_ratio": "that over the flat SAE's",
    "encode_ms": "encode of 16 × 128 tokens, median",
    "encode_ratio": "that over the flat SAE's, median of pairs",
    "forward_ms": "encode and decode of 16 × 128 tokens, median",
    "forward_ratio": "that over the flat SAE's, median of pairs",
    "long_encode_ms": "encode of 1 × 1024 tokens, median",
    "long_encode_ratio": "that over the flat SAE's, median of pairs",
    "long_forward_ms": "encode and decode of 1 × 1024 tokens, median",
    "long_forward_ratio": "that over the flat SAE's, median of pairs",
    "encode_peak_bytes": "most bytes of tensors that encode of 16 × 128 tokens makes",
    "encode_peak_ratio": "that over the flat SAE's",
    "encode_flops": "of matrix products for a token, of 16 × 128",
    "decode_flops": "the same",
    "flops_ratio": "both over the flat SAE's",
}
PARTS = {"W_enc": "encoder", "W_dec": "decoder", "W_low": "decoder", "residual": "decoder"}


def cost(subject: Subject) -> Evaluation:
    """The suite.

    Raises:
        DataError: no held-out token.
        ConfigError: `--baseline` names no learner of the same activations.
    """
    sae, x = subject.sae, some_activations(subject, max(STEP_TOKENS, subject.sae.window))
    flat = flat_like(subject)
    file = subject.folder / "sae" / "weights.safetensors"
    figures: Figures = {**parameters(sae), "bytes": file.stat().st_size} | recorded_speed(subject)
    timings = inference_times(subject, flat, x)
    step = training_step(subject, flat, x)
    if isinstance(step, Missing):
        figures |= dict.fromkeys(("training_peak_bytes", "training_peak_ratio"), step)
        figures |= dict.fromkeys(("training_step_ms", "training_step_ratio"), step)
    else:
        timings["training_step"] = step.timing
        figures |= {"training_peak_bytes": step.peak, "training_peak_ratio": step.peak / step.flat_peak}
    for name, timing in timings.items():
        figures |= {f"{name}_ms": timing.ms, f"{name}_ratio": timing.ratio}
    batch = batch_of(x, SHORT)
    peaks = [peak_bytes(partial(encode, one, batch), subject.device) for one in (sae, flat)]
    flops, flat_flops = flops_per_token(sae, batch), flops_per_token(flat, batch)
    figures |= {"encode_peak_bytes": peaks[0], "encode_peak_ratio": peaks[0] / peaks[1]}
    figures |= {"encode_flops": flops[0], "decode_flops": flops[1], "flops_ratio": sum(flops) / sum(flat_flops)}
    flat_size = {"d_sae": flat.d_sae, **parameters(flat), "flops": sum(flat_flops)}
    times = {name: timing.described() for name, timing in timings.items()}
    return evaluation(COST_METRICS, figures, {"machine": machine(subject.device), "flat": flat_size, "times": times})


# ---- what is measured --------------------------------------------------------------------------------------------


def some_activations(subject: Subject, n: int) -> Tensor:
    """`n` held-out activations [n, d_in], in float32 on the device; over again from the first where there are fewer.

    Raises:
        DataError: there is none.
    """
    rows, count = [], 0
    for batch in subject.held_out(1):
        rows.append(batch.x[batch.valid].float())
        count += len(rows[-1])
        if count >= n:
            break
    if not count:
        raise DataError("there is no held-out token to evaluate on. Harvest more, or raise --held-out.")
    return torch.cat(rows).repeat(-(-n // count), 1)[:n].to(subject.device)


def flat_like(subject: Subject) -> SAE:
    """A new BatchTopK of the same size."""
    sae = subject.sae
    k = min(round(aim_of(subject.facts) or FLAT_K), sae.d_sae)
    flat = make_sae("batchtopk", {"d_sae": sae.d_sae, "k": max(k, 1)}, sae.d_in, 0, "the flat SAE")
    return flat.to(subject.device).eval().requires_grad_(False)


def inference_times(subject: Subject, flat: SAE, x: Tensor) -> dict[str, Timing]:
    """Encoding, and encoding and decoding, of many short sequences and of a long one."""
    found = {}
    for length, shape in (("", SHORT), ("long_", LONG)):
        batch = batch_of(x, shape)
        for kind, compute in (("encode", encode), ("forward", forward)):
            ours, theirs = (partial(compute, sae, batch) for sae in (subject.sae, flat))
            found[length + kind] = in_turn(ours, theirs, subject)
    return found


def parameters(sae: SAE) -> Figures:
    """How many numbers are trained, or were computed from data, in all and by part."""
    found = dict.fromkeys(("encoder", "decoder", "biases", "other"), 0)
    for name, parameter in sae.named_parameters():
        found[PARTS.get(name, "biases" if name.startswith("b_") else "other")] += parameter.numel()
    figures: Figures = {"parameters": sum(found.values())}
    return figures | {f"parameters_{name}": count for name, count in found.items()}


def encode(sae: SAE, batch: Batch) -> Tensor:
    """Codes of a batch; nothing is kept for gradients."""
    with torch.no_grad():
        return sae.encode(batch)


def forward(sae: SAE, batch: Batch) -> Tensor:
    """Reconstruction of a batch; nothing is kept for gradients."""
    with torch.no_grad():
        return sae.decode(sae.encode(batch), batch)


def flops_per_token(sae: SAE, batch: Batch) -> tuple[float, float]:
    """Of encode and of decode: 2 n m k for each product [n, k] by [k, m] that is computed, over the tokens.

    Elementwise operations, sorting and sums are not counted. Decoding is counted dense, as it is computed.
    """
    latents = encode(sae, batch)
    computes: tuple[Callable[[], Tensor], ...] = (lambda: sae.encode(batch), lambda: sae.decode(latents, batch))
    found = []
    for compute in computes:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            compute()
        found.append(counter.get_total_flops() / batch.n_valid)
    return found[0], found[1]


def machine(device: torch.device) -> dict[str, Any]:
    """What the times are of."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
