"""Train the built-in demo model: a small GPT-NeoX on the text of the Python standard library.

    python -m common.demo.train_demo --out common/demo

Writes `config.json`, `model.safetensors` (float16), the tokenizer and `training.json` with the held-out
cross-entropy beside the unigram entropy of the same held-out text. Held-out modules (see
`common.corpus.stdlib_documents`) are seen by neither the tokenizer nor the model.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import click
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from common.corpus import stdlib_documents

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
CONTEXT = 256
D_MODEL = 192
LAYERS = 6
HEADS = 6
BATCH = 16
PEAK_LR = 3e-3


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`; the one special token is beginning, end and padding, as in Pythia."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """One long int64 row: BOS, document, BOS, document, …"""
    bos = tokenizer.bos_token_id
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([np.array([bos, *row], dtype=np.int64) for row in rows])


def build_model(bos: int) -> GPTNeoXForCausalLM:
    """A freshly initialised Pythia-shaped model of about 4.2 M parameters."""
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=D_MODEL,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=4 * D_MODEL,
            max_position_embeddings=CONTEXT,
            rotary_pct=0.25,
            tie_word_embeddings=False,
            bos_token_id=bos,
            eos_token_id=bos,
        )
    )


def sample_batch(tokens: np.ndarray, bos: int, generator: np.random.Generator) -> torch.Tensor:
    """Random slices [BATCH, CONTEXT], BOS first in each as at harvest time."""
    starts = generator.integers(0, len(tokens) - CONTEXT, BATCH)
    rows = tokens[starts[:, None] + np.arange(CONTEXT)[None]]
    rows[:, 0] = bos
    return torch.from_numpy(rows)


def learning_rate(progress: float) -> float:
    """Linear warm-up over 2 % of the steps, then cosine to a tenth of the peak."""
    warm = min(progress / 0.02, 1.0)
    return PEAK_LR * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


@torch.inference_mode()
def cross_entropy(model: GPTNeoXForCausalLM, tokens: np.ndarray, bos: int, rows: int = 512) -> float:
    """Mean nats per token over evenly spaced held-out sequences, targets that are BOS left out."""
    starts = np.linspace(0, len(tokens) - CONTEXT, rows).astype(int)
    batch = tokens[starts[:, None] + np.arange(CONTEXT)[None]]
    batch[:, 0] = bos
    total, count = 0.0, 0
    for part in torch.from_numpy(batch).split(BATCH):
        logits = model(part.to(model.device)).logits[:, :-1].float()
        target = part[:, 1:].to(model.device)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        keep = target.flatten() != bos
        total += float(loss[keep].sum())
        count += int(keep.sum())
    return total / count


def unigram_entropy(tokens: np.ndarray, bos: int) -> float:
    """Entropy in nats of the held-out text's own token frequencies: the best any context-free guess can do."""
    counts = np.bincount(tokens[tokens != bos], minlength=VOCABULARY).astype(float)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for model and tokenizer.")
@click.option("--steps", type=int, default=2800, show_default=True, help="Of 16 x 256 tokens; 0.7 s each on 2 cores.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(out: Path, steps: int, device: str, seed: int) -> None:
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    train_texts = [text for _, text in stdlib_documents("train")]
    tokenizer = build_tokenizer(train_texts)
    bos = tokenizer.bos_token_id
    tokens = pack(tokenizer, train_texts)
    held_out = pack(tokenizer, [text for _, text in stdlib_documents("heldout")])
    model = build_model(bos).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    click.echo(f"{len(tokens):,} training and {len(held_out):,} held-out tokens, {model.num_parameters():,} parameters")

    start = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / steps)
        batch = sample_batch(tokens, bos, generator).to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            click.echo(f"step {step:5d}  {time.monotonic() - start:6.0f} s  loss {loss.item():.3f}")

    model.eval().half()  # rounded first, so that the figure below is the shipped model's
    model.float()
    figures = {
        "steps": steps,
        "tokens_seen": steps * BATCH * CONTEXT,
        "parameters": model.num_parameters(),
        "seconds": round(time.monotonic() - start, 1),
        "heldout_ce_nats": round(cross_entropy(model, held_out, bos), 4),
        "heldout_unigram_entropy_nats": round(unigram_entropy(held_out, bos), 4),
    }
    figures["share_below_unigram"] = round(1 - figures["heldout_ce_nats"] / figures["heldout_unigram_entropy_nats"], 4)
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
    click.echo(json.dumps(figures))


if __name__ == "__main__":
    main()
