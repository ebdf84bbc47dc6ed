"""A model that knows what follows what, and a run whose SAE has a latent for each letter: nothing is left to chance.

The model's blocks add nothing, so that its stream is the token's embedding, and its logits say the letter that
follows. A latent fires on one letter. Clamping q's latent takes away what follows q, and nothing else.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GPTNeoXForCausalLM

from common.stopping import Stop
from harvest.run import harvest
from tests.conftest import harvest_config
from tests.tiny import neox
from tests.train import runs
from train.saes import make_sae, save_sae
from train.saes.base import SAE

HOOK = "blocks.1.hook_resid_post"
D, CERTAIN = 16, 4.0
FORGOTTEN, COMMON, OTHER = "qvw", "abc", "xyz"  # each letter is followed by the next one of its word
LETTERS = FORGOTTEN + COMMON + OTHER
Q, A, X = (LETTERS.index(letter) for letter in "qax")


def make_model(folder: Path) -> Path:
    """The model, saved."""
    torch.manual_seed(0)
    model = neox(vocab_size=257, num_hidden_layers=2, intermediate_size=16, max_position_embeddings=64)
    with torch.no_grad():
        for block in model.gpt_neox.layers:
            for layer in (block.attention.dense, block.mlp.dense_4h_to_h):
                layer.weight.zero_()
                layer.bias.zero_()
        embeddings = model.gpt_neox.embed_in.weight
        embeddings.copy_(torch.nn.functional.normalize(torch.randn(257, D), dim=-1))
        model.get_output_embeddings().weight.zero_()
        for word in (FORGOTTEN, COMMON, OTHER):
            for letter, following in zip(word, word[1:] + word[0], strict=True):
                normed = model.gpt_neox.final_layer_norm(embeddings[ord(letter)])
                model.get_output_embeddings().weight[ord(following)] = CERTAIN * normed / normed.norm()
    model.save_pretrained(folder)
    return folder


def make_letters_sae(model: Path) -> SAE:
    """Latent i fires on letter i alone: its direction is the letter's embedding, less what others have of it."""
    embeddings = GPTNeoXForCausalLM.from_pretrained(model).gpt_neox.embed_in.weight.detach()
    directions = embeddings[[ord(letter) for letter in LETTERS]]
    sae = make_sae("standard", {"d_sae": len(LETTERS), "l1": 0.1}, D, 0, "test").requires_grad_(False)
    sae.W_enc.copy_(directions.t())
    sae.W_dec.copy_(directions)
    sae.b_enc.fill_(-0.95)
    assert ((embeddings @ directions.t() > 0.95).sum(0) == 1).all()  # no other token comes near
    return sae


def write_texts(folder: Path, name: str, words: tuple[str, ...], n: int = 12) -> Path:
    """Documents of repeated words: `n` files, each a little longer than the one before."""
    (folder / name).mkdir(parents=True)
    for number in range(n):
        (folder / name / f"{number:02d}.txt").write_text("".join(word * 3 for word in words) * (6 + number))
    return folder / name


def make_run(folder: Path) -> Path:
    """A run with a learner `letters`, whose store was harvested from the model."""
    model = make_model(folder / "model")
    texts = write_texts(folder, "store-texts", (FORGOTTEN, COMMON, OTHER), 40)
    config = harvest_config(model, texts, folder / "store.zarr", tokens=3_200, context=32, chunk_sequences=16)
    harvest(config, Stop())
    runs.run(
        folder / "store.zarr", folder / "run", runs.learner("standard", "letters", d_sae=9), steps=1, batch_size=64
    )
    save_sae(make_letters_sae(model), folder / "run" / "letters" / "sae", {})
    return folder / "run"
