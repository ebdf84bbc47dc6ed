"""The object for SAEBench: shapes, types, units, and what it takes for a document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import granary
from common.errors import ConfigError
from tests.train.exchange.learners import learner_folder
from tests.train.saes.drawn import FORMS, LOST, D, L, drawn
from train.data.batch import Batch
from train.exchange.saebench import BenchSAE
from train.saes.base import SAE

B, T = 3, 8
EVERY = [*FORMS, ("tree", {}), ("compositional", {})]
UNIQUE = [form for number, form in enumerate(EVERY) if form not in EVERY[:number]]
TEMPORAL = [("relational", {"attention": "masked"}), ("multiscale", {}), ("predictor", {})]
every_form = pytest.mark.parametrize(("variant", "options"), UNIQUE, ids=str)
every_temporal_form = pytest.mark.parametrize(("variant", "options"), TEMPORAL, ids=str)


def bench_of(sae: SAE, tmp_path: Path, **facts: object) -> BenchSAE:
    return granary.for_saebench(learner_folder(tmp_path, sae, **facts))  # type: ignore[no-any-return]


def sequences(seed: int = 5) -> Tensor:
    """[B, T, D] of norms around 4, below the sink's 10 × 2."""
    x = torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed))
    return 4 * torch.nn.functional.normalize(x, dim=-1)


@every_form
def test_it_computes_what_the_sae_does(variant: str, options: dict[str, object], tmp_path: Path) -> None:
    sae, x = drawn(variant, options), sequences()
    bench = bench_of(sae, tmp_path)
    rows = x.reshape(-1, D)
    assert torch.equal(bench.encode(rows), sae.encode(rows))
    assert torch.equal(bench(rows), sae(rows))
    if variant not in LOST:
        assert torch.allclose(bench(rows).reshape(B, T, D), bench.decode(bench.encode(x)), atol=1e-5)
    assert bench.W_enc.shape == (D, sae.d_sae)
    assert bench.W_dec.shape == (sae.d_sae, D)
    assert torch.allclose(bench.W_dec.norm(dim=-1), torch.ones(sae.d_sae), atol=1e-5)
    assert (bench.cfg.d_in, bench.cfg.d_sae, bench.cfg.hook_layer) == (D, sae.d_sae, 3)
    json.dumps(bench.cfg.to_dict())


def test_latents_that_read_others_alone_have_no_encoder_of_their_own(tmp_path: Path) -> None:
    sae = drawn("compositional", {"encoder": "comp_only"})
    bench = bench_of(sae, tmp_path)
    upper = slice(0, sae.groups()["low"].start)
    assert bool((sae.W_enc[:, upper] != 0).any())  # there, but of no effect
    assert not bench.W_enc[:, upper].any()
    assert torch.equal(bench.W_enc[:, upper.stop :], sae.W_enc[:, upper.stop :])


def test_weights_are_in_raw_units_where_the_scale_is_not_folded(tmp_path: Path) -> None:
    sae = drawn("relational", {}, scale=0.25)
    bench = bench_of(sae, tmp_path)
    x = 4 * sequences().reshape(-1, D)
    u = (x - bench.b_dec) @ bench.W_enc + bench.b_enc
    f = bench.encode(x)
    assert torch.allclose(f[f > 0], u[f > 0], rtol=1e-4)
    assert torch.allclose(f @ bench.W_dec + bench.b_dec, bench(x), atol=1e-3)


def test_type_and_device_follow_to(tmp_path: Path) -> None:
    sae, x = drawn("batchtopk", {}), sequences()
    bench = bench_of(sae, tmp_path)
    assert bench.to(device="cpu", dtype=torch.bfloat16) is bench
    assert (bench.dtype, bench.cfg.dtype, bench.cfg.device, str(bench.device)) == (
        torch.bfloat16, "bfloat16", "cpu", "cpu",
    )  # fmt: skip
    assert {weight.dtype for weight in bench.parameters()} == {torch.bfloat16}
    latents = bench.encode(x.bfloat16())
    assert torch.equal(latents, sae.encode(x.bfloat16().float()).bfloat16())  # in float32, rounded once
    assert torch.equal(bench.decode(latents), sae.decode(latents.float()).bfloat16())
    assert torch.equal(bench(x.bfloat16()), bench.decode(latents))
    assert set(bench.state_dict()) == {"W_enc", "W_dec", "b_enc", "b_dec"}


def test_settings_are_those_saebench_looks_for(tmp_path: Path) -> None:
    cfg = bench_of(drawn("jumprelu", {}), tmp_path).cfg
    cfg.metadata = object()  # type: ignore[attr-defined]  # SAEBench puts more there
    assert {"metadata"}.isdisjoint(cfg.to_dict())
    assert (cfg.model_name, cfg.hook_name, cfg.context_size, cfg.prepend_bos) == (
        "tiny", "blocks.3.hook_resid_post", 16, False,
    )  # fmt: skip
    assert (cfg.architecture, cfg.apply_b_dec_to_input, cfg.seqpos_slice, cfg.normalize_activations) == (
        "jumprelu", False, (None,), "none",
    )  # fmt: skip
    assert (cfg.dataset_path, cfg.training_tokens, cfg.hook_head_index) == ("owner/texts", 640, None)


def test_a_gated_sae_shows_its_magnitudes_bias(tmp_path: Path) -> None:
    sae = drawn("gated", {})
    bench = bench_of(sae, tmp_path)
    assert bench.cfg.architecture == "gated"
    assert torch.equal(bench.b_mag, sae.get_parameter("b_mag"))


def test_gradients_pass_through_decode(tmp_path: Path) -> None:
    bench, mask = bench_of(drawn("topk", {}), tmp_path), torch.ones(L, requires_grad=True)
    bench.decode(bench.encode(sequences()) * mask).sum().backward()
    assert mask.grad is not None
    assert bool((mask.grad != 0).any())


def test_a_hook_outside_the_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="SAEBench needs a hook inside a block; topk was trained at hook_embed"):
        bench_of(drawn("topk", {}), tmp_path, hook="hook_embed")


def test_an_sae_that_sees_the_future_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sees the future"):
        bench_of(drawn("multiscale", {"causal": False}), tmp_path)


# ---- documents ---------------------------------------------------------------------------------------------------


@every_temporal_form
def test_documents_that_are_told_are_kept_apart(variant: str, options: dict[str, object], tmp_path: Path) -> None:
    sae, x = drawn(variant, options), sequences()
    bench = bench_of(sae, tmp_path)
    doc = torch.tensor([[5, 5, 5, 2, 2, 2, 2, 2], [9] * T, [1, 1, 4, 4, 4, 4, 8, 8]])
    pos = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], list(range(T)), [0, 1, 0, 1, 2, 3, 0, 1]])
    bench.set_context(doc)
    told = Batch.of(x, doc=doc.int(), pos=pos.int())
    assert torch.equal(bench.encode(x), sae.encode(told))
    assert torch.equal(bench(x), sae(told))
    bench.set_context(None)
    assert not torch.equal(bench(x), sae(told))
    whole = Batch.of(x, pos=torch.arange(T, dtype=torch.int32).expand(B, T))
    assert torch.equal(bench(x), sae(whole))
    assert bench.n_inferred == 0


@every_temporal_form
@pytest.mark.parametrize("size", [0.0, 30.0])
def test_rows_of_zeros_and_of_great_norm_begin_documents(
    size: float, variant: str, options: dict[str, object], tmp_path: Path
) -> None:
    sae, x = drawn(variant, options), sequences()
    bench = bench_of(sae, tmp_path)
    x[:, 3] *= size / 4  # the sink is at ten times the median norm, 20
    other = x.clone()
    other[:, :3] = sequences(seed=6)[:, :3]
    assert torch.allclose(bench(x)[:, 3:], bench(other)[:, 3:], atol=1e-5)  # nothing crosses the row
    assert bench.n_inferred == B
    louder = x.clone()
    louder[:, 3] = 0.0 if size else 40.0
    assert torch.allclose(bench(x)[:, 4:], bench(louder)[:, 4:], atol=1e-5)  # and it is no context itself
    changed = x.clone()
    changed[:, 4] = sequences(seed=7)[:, 4]
    assert not torch.allclose(bench(x)[:, 5:], bench(changed)[:, 5:], atol=1e-4)  # but text is


def test_a_negative_id_is_no_context(tmp_path: Path) -> None:
    bench, x = bench_of(drawn("multiscale", {}), tmp_path), sequences()
    doc = torch.zeros(B, T, dtype=torch.int64)
    doc[:, 2] = -1
    bench.set_context(doc)
    other = x.clone()
    other[:, 2] *= -1
    assert torch.allclose(bench(x)[:, 3:], bench(other)[:, 3:], atol=1e-5)


def test_a_special_token_is_the_first_place_of_the_document_after_it(tmp_path: Path) -> None:
    """As in the store, whose BOS is its document's: told or inferred, it counts as place 0."""
    sae, x = drawn("relational", {"attention": "masked"}), sequences()
    bench = bench_of(sae, tmp_path)
    bench.set_context(
        torch.tensor([[-1, 7, 7, 7, -1, 8, 8, 8], [-1, -1, 3, 3, 5, 5, -1, -1], [0, 0, 0, 0, 0, 1, 1, 1]])
    )
    doc = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 2, 2, 3, 4], [0, 0, 0, 0, 0, 1, 1, 1]])
    pos = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3], [0, 0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 0, 1, 2]])
    text = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0, 0], [1] * T]).bool()
    told = Batch.of(x, doc=doc.int(), pos=pos.int(), valid=text)
    assert torch.equal(bench.encode(x), sae.encode(told))
    shifted = told.doc, (pos - 1).clamp_min(0)
    assert not torch.equal(bench.encode(x), sae.encode(Batch.of(x, doc=shifted[0], pos=shifted[1].int(), valid=text)))
    x[:1, [0, 4]] = 0.0
    bench.set_context(None)
    assert torch.equal(bench.encode(x[:1]), sae.encode(Batch.of(x[:1], doc=doc[:1], pos=pos[:1], valid=text[:1])))


def test_without_a_median_only_zeros_begin_documents(tmp_path: Path) -> None:
    bench, x = bench_of(drawn("multiscale", {}), tmp_path, median_norm=None), sequences()
    x[:, 3] *= 100
    x[:, 5] = 0
    bench.encode(x)
    assert bench.n_inferred == B


def test_decode_knows_the_documents_of_the_tokens_last_encoded(tmp_path: Path) -> None:
    sae, x = drawn("predictor", {}), sequences()
    bench = bench_of(sae, tmp_path)
    doc = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]]).expand(B, T)
    bench.set_context(doc)
    f = bench.encode(x)
    assert torch.equal(bench.decode(f), sae.decode(f, Batch.of(x, doc=doc.int())))
    assert torch.equal(bench.decode(f[:, :4]), sae.decode(f[:, :4]))  # not as many: each row a document
    rows = f.reshape(-1, L)
    assert torch.equal(bench.decode(rows), sae.decode(rows))  # unrelated rows have no past


def test_ids_of_another_shape_are_refused(tmp_path: Path) -> None:
    bench = bench_of(drawn("multiscale", {}), tmp_path)
    bench.set_context(torch.zeros(B, T + 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"was given \[3, 9\] ids, the input is \[3, 8, 12\]"):
        bench.encode(sequences())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(tmp_path: Path) -> None:
    sae, x = drawn("relational", {}), sequences()
    bench = bench_of(sae, tmp_path).to(device="cuda", dtype=torch.float32)
    assert bench(x).device.type == "cuda"
    assert torch.allclose(bench(x).cpu(), bench.to(device="cpu")(x), atol=1e-4)
