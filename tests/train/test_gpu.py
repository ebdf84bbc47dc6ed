"""What only a GPU can show: steps that never wait for the host, CUDA graphs, and the kernels of our own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.train.saes.test_contract import K, batch_for, new_sae, trained_variants
from tests.train.test_optim import Weights
from train.config import Kernels, LearnerConfig
from train.learner import Learner
from train.optim import fused_update_
from train.recording import CudaTape, Recorder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def learner_on_gpu(variant: str, kernels: Kernels, graphs: bool = False) -> Learner:
    sae = new_sae(variant)
    sae.start(1.0, batch_for(sae, 0).x.mean((0, 1)))
    config = LearnerConfig(name="x", variant=variant)
    device = torch.device("cuda")
    recorder = Recorder(CudaTape(device)) if graphs else None
    return Learner(config, sae, 100, device, torch.float32, kernels, recorder=recorder)


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


linear = ("topk", "batchtopk", "matryoshka", "predictor")


@pytest.mark.parametrize(
    ("variant", "kernels"),
    [*((variant, "plain") for variant in trained_variants), *((variant, "sparse") for variant in linear)],
)
def test_no_step_waits_for_the_device(variant: str, kernels: Kernels, waiting_is_an_error: None) -> None:
    learner = learner_on_gpu(variant, kernels)
    batches = [batch_for(learner.sae, step).to(torch.device("cuda")) for step in range(6)]
    for batch in batches:
        assert batch.context is not None  # read before the clock starts
    if learner.at_landmark():
        learner.revise(lambda: batches, 256)
    for batch in batches[:2]:
        learner.train_step(batch, 256)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for batch in batches[2:]:
        learner.train_step(batch, 256)


@pytest.mark.parametrize("variant", linear)
def test_a_sparse_step_on_a_gpu_is_the_plain_one(variant: str) -> None:
    learners = [learner_on_gpu(variant, kernels) for kernels in ("plain", "sparse")]
    for step in range(20):
        for learner in learners:
            learner.train_step(batch_for(learner.sae, step).to(torch.device("cuda")), 256)
    plain, sparse = (learner.read_metrics() for learner in learners)
    assert sparse["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    assert sparse["l0"] == pytest.approx(plain["l0"], rel=1e-2) == pytest.approx(K, rel=0.1)


@pytest.mark.parametrize("variant", linear)
def test_an_update_in_one_pass_is_the_plain_one(variant: str) -> None:
    learners = [learner_on_gpu(variant, "sparse") for _ in range(2)]
    assert all(learner.fused for learner in learners)
    learners[1].fused = False
    for step in range(20):
        for learner in learners:
            learner.train_step(batch_for(learner.sae, step).to(torch.device("cuda")), 256)
    fused, plain = learners
    rows = fused.sae.W_dec.norm(dim=-1)
    assert torch.allclose(rows, torch.ones_like(rows), atol=1e-5)
    assert fused.tensors()["optimizer"].keys() == plain.tensors()["optimizer"].keys()
    found, expected = fused.read_metrics(), plain.read_metrics()
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)


def test_an_update_in_one_pass_waits_for_nothing(waiting_is_an_error: None) -> None:
    weights = Weights(64, 300)
    gradients = [[torch.randn_like(parameter) for parameter in weights.all] for _ in range(4)]
    for number, of_step in enumerate(gradients):
        for parameter, gradient in zip(weights.all, of_step, strict=True):
            parameter.grad = gradient
        weights.optimizer.param_groups[0]["lr"] = 0.01 / (number + 1)
        fused_update_(weights.optimizer, weights.rows, 1.0)
        if number == 0:  # the kernels are compiled
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")


@pytest.mark.parametrize("variant", linear)
def test_sparse_steps_repeat_to_the_bit(variant: str) -> None:
    weights = []
    for _ in range(2):
        learner = learner_on_gpu(variant, "sparse")
        for step in range(20):
            learner.train_step(batch_for(learner.sae, step).to(torch.device("cuda")), 256)
        weights.append(learner.sae.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value), name


flat = ("topk", "batchtopk", "matryoshka", "standard", "panneal", "gated", "jumprelu")


@pytest.mark.parametrize(
    ("variant", "kernels"),
    [*((variant, "plain") for variant in flat), *((variant, "sparse") for variant in linear[:3])],
)
def test_steps_played_again_are_the_steps(monkeypatch: pytest.MonkeyPatch, variant: str, kernels: Kernels) -> None:
    monkeypatch.setattr("train.recording.ALIKE", 3)
    monkeypatch.setattr("train.learner.LOOK_EVERY", 4)
    played, also_played, taken = (learner_on_gpu(variant, kernels, graphs) for graphs in (True, True, False))
    times = 0
    for step in range(60):
        batch = batch_for(taken.sae, step).to(torch.device("cuda"))
        for learner in (played, also_played):  # side by side, on streams of their own
            learner.queue_step(batch, 256)
        for learner in (played, also_played):
            learner.join()
        taken.train_step(batch, 256)
        assert played.recorder is not None
        times += played.recorder.replay is not None
        if step == 30:
            assert played.read_metrics() == also_played.read_metrics() == taken.read_metrics()
    assert times > 5
    for name, value in taken.sae.state_dict().items():
        assert torch.equal(value, played.sae.state_dict()[name]), name
        assert torch.equal(value, also_played.sae.state_dict()[name]), name


def test_a_step_played_again_waits_for_nothing(monkeypatch: pytest.MonkeyPatch, waiting_is_an_error: None) -> None:
    monkeypatch.setattr("train.recording.ALIKE", 3)
    learner = learner_on_gpu("topk", "plain", graphs=True)
    batches = [batch_for(learner.sae, step).to(torch.device("cuda")) for step in range(16)]
    for batch in batches[:8]:
        learner.train_step(batch, 256)
    assert learner.recorder is not None
    assert learner.recorder.replay is not None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for batch in batches[8:]:
        learner.train_step(batch, 256)


def test_a_recording_that_fails_leaves_memory_and_stream_usable() -> None:
    tape, x = CudaTape(torch.device("cuda")), torch.ones(3, device="cuda")
    assert float((x + 1).sum()) == 6  # kernels are loaded before a recording
    with tape.aside():
        with pytest.raises(RuntimeError):
            tape.record(lambda: float((x + 1).sum()))
        torch.cuda.empty_cache()  # which PyTorch refuses while it thinks that something is recorded
        y, replay = tape.record(lambda: x + 1)
        x.fill_(4)
        replay()
    tape.join()
    assert y.tolist() == [5, 5, 5]
