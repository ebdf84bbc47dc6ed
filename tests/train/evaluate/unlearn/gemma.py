"""A Gemma-2 of random weights, small enough for a test, with a tokenizer that knows its turns; and SAEBench's files."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.tiny import gemma2
from train.evaluate.unlearn.questions import SIDE_SETS

SPECIAL = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
BOS = SPECIAL.index("<bos>")
D = 16


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and " A" to " D" as single tokens; BOS is put first, as Gemma's does."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"Ġ{letter}" for letter in "ABCD")]
    merges = [("Ġ", letter) for letter in "ABCD"]
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
    )


def make_gemma(folder: Path) -> Path:
    """The model, saved with its tokenizer."""
    torch.manual_seed(2)
    tokenizer = make_tokenizer()
    model = gemma2(
        vocab_size=len(tokenizer),
        intermediate_size=16,
        max_position_embeddings=1024,
        sliding_window=4096,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=BOS,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_data(folder: Path, n_questions: int = 5) -> Path:
    """The files, some as .jsonl and some as .parquet, of some rows of text each and a few questions."""
    folder.mkdir()
    papers = [{"text": "qvw quiver " * (20 + number)} for number in range(9)] + [{"text": "too short"}]
    (folder / "bio-forget-corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in papers))
    (folder / "wikitext-2-raw-v1").mkdir()
    wiki = {"text": ["", " = Title = \n", *("the cat sat on the mat " * (10 + number) for number in range(9))]}
    pq.write_table(pa.table(wiki), folder / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet")
    for number, name in enumerate(("wmdp-bio", *SIDE_SETS)):
        words = ["qvw", "quiver", "vow"] if name == "wmdp-bio" else ["cat", "mat", f"set {number}"]
        rows = [
            {
                "question": f"Which {words[i % 3]} has {i}?",
                "choices": [f"{words[(i + j) % 3]} {j * number}" for j in range(4)],
                "answer": i % 4,
            }
            for i in range(n_questions)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    third = [{"text": "a quiver on the mat, " * 10} for _ in range(4)]
    (folder / "openwebtext.jsonl").write_text("".join(json.dumps(row) + "\n" for row in third))
    return folder
