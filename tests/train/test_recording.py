"""A step played again is the step, to the bit, for as long as what the host contributes stays; on a CPU's tape."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.train.tape import CpuTape
from train import learner as learner_module
from train import recording
from train.config import LearnerConfig
from train.data.batch import Batch
from train.learner import Learner, list_silent
from train.recording import Recorder
from train.saes import make_sae
from train.saes.base import SAE, Output
from train.schedule import Clock

D, L, N, STEPS, ALIKE = 8, 48, 64, 60, 3

VARIANTS = {
    "topk": {"k": 4},
    "batchtopk": {"k": 4},
    "batchtopk annealed": {"k": 1, "k_anneal": 0.3},
    "matryoshka": {"k": 4},
    "standard": {"l1": 0.05},
    "standard led": {"l1": 0.05, "target_l0": 4.0},
    "panneal": {"l1": 0.05, "target_l0": 4.0},
    "gated": {"l1": 0.05, "target_l0": 4.0},
    "jumprelu": {"target_l0": 4.0},
    "jumprelu target": {"penalty": "target", "target_l0": 4.0},
}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings after few steps, and latents that die within a short run."""
    monkeypatch.setattr(recording, "ALIKE", ALIKE)
    monkeypatch.setattr(learner_module, "LOOK_EVERY", 4)
    monkeypatch.setattr(learner_module, "LISTED", 4)
    monkeypatch.setattr(learner_module, "dead_after", lambda n_steps, batch_tokens: 8 * N)
    monkeypatch.setattr("train.saes.base.dead_after", lambda n_steps, batch_tokens: 8 * N)


def batch(step: int, n: int = N) -> Batch:
    x = torch.randn(n, 1, D, generator=torch.Generator().manual_seed(step)) / D**0.5
    return Batch.of(x)


def new_learner(name: str, tape: CpuTape | None, looks: bool = True) -> Learner:
    """As on a GPU: plain steps, latents that may be dead looked for now and then, learning rates on the device."""
    variant = name.split()[0]
    sae = make_sae(variant, {"d_sae": L} | VARIANTS.get(name, {"k": 4}), D, 0, "test")
    sae.start(1.0, torch.full((D,), 0.01))
    recorder = Recorder(tape) if tape is not None else None
    config = LearnerConfig(name="x", variant=variant, lr=0.01)
    learner = Learner(config, sae, STEPS, torch.device("cpu"), torch.float32, "plain", recorder=recorder)
    learner.looks = looks
    for group in learner.optimizer.param_groups:
        group |= {"lr": torch.zeros(()), "capturable": True}
    if learner.at_landmark():
        learner.revise(lambda: [batch(0)], N)
    return learner


def everything(learner: Learner) -> dict[str, Tensor]:
    return {f"{kind}/{name}": value for kind, of in learner.tensors().items() for name, value in of.items()}


def assert_equal(one: Learner, other: Learner) -> None:
    first, second = everything(one), everything(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]) or bool(value.isnan().all() & second[name].isnan().all()), name


@pytest.mark.parametrize("name", VARIANTS)
def test_steps_played_again_are_the_steps(name: str) -> None:
    tape = CpuTape()
    played, taken = new_learner(name, tape), new_learner(name, None)
    times = 0
    for step in range(STEPS):
        for learner in (played, taken):
            learner.train_step(batch(step), N)
        assert played.recorder is not None
        times += played.recorder.replay is not None
        assert tape.joined
        if step % 20 == 13:
            assert played.read_metrics() == taken.read_metrics()
    assert_equal(played, taken)
    assert times >= 8
    assert tape.recorded >= 1


def test_another_batch_size_is_recorded_anew() -> None:
    tape = CpuTape()
    played, taken = new_learner("topk", tape, looks=False), new_learner("topk", None, looks=False)
    for learner in (played, taken):
        learner.looks, learner.sae.may_die = True, torch.zeros(0, dtype=torch.int64)
    for step in range(24):
        n = N if step < 12 else N // 2
        for learner in (played, taken):
            learner.train_step(batch(step, n), N)
    assert tape.recorded == 2
    assert_equal(played, taken)


def test_a_change_at_a_landmark_and_a_restored_checkpoint_begin_anew() -> None:
    for change in (lambda one: one.revise(list, N), lambda one: one.restore(one.tensors(), one.facts())):
        learner = new_learner("topk", CpuTape())
        assert learner.recorder is not None
        for step in range(4 + ALIKE + 8):
            learner.train_step(batch(step), N)
            if learner.recorder.replay is not None:
                break
        assert learner.recorder.replay is not None
        change(learner)
        assert learner.recorder.replay is None


def test_a_resumed_learner_goes_on_to_the_bit() -> None:
    whole, first = new_learner("batchtopk", CpuTape()), new_learner("batchtopk", CpuTape())
    for step in range(30):
        whole.train_step(batch(step), N)
        first.train_step(batch(step), N)
        if step == 21:  # between two looks
            second = new_learner("batchtopk", None)
            second.restore(copy.deepcopy(first.tensors()), first.facts())
            first = second
    assert_equal(whole, first)


@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka"])
def test_what_may_die_is_all_that_aux_k_needs(name: str) -> None:
    looking, asking = new_learner(name, None), new_learner(name, None, looks=False)
    for learner in (looking, asking):
        with torch.no_grad():
            learner.sae.b_enc[:6], learner.sae.b_enc[6:12] = -9.0, -0.6  # never at first, and seldom
    listed = []
    for step in range(40):
        for learner in (looking, asking):
            learner.train_step(batch(step), N)
        dead = looking.sae.dead(Clock(looking.step, STEPS, N)).nonzero().squeeze(-1)
        assert looking.sae.may_die is not None
        if looking.step % 4:  # else it looks again before the next step
            assert set(dead.tolist()) <= set(looking.sae.may_die.tolist())
            listed.append((len(dead), len(looking.sae.may_die)))
    assert any(0 < dead < found < L for dead, found in listed)
    assert listed[0] == (0, 0)
    one, other = looking.read_metrics(), asking.read_metrics()
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert one["loss_aux"] > 0
    assert one["loss_aux"] == pytest.approx(other["loss_aux"], rel=1e-4)


def test_what_may_die_is_listed_in_its_place() -> None:
    silent = torch.tensor([5, 0, 9, 7, 0, 0, 9, 1, 0, 0, 0, 0])
    listed = list_silent(silent, 9, None)
    assert listed.tolist() == [0, 2, 3, 6]  # two of them, a quarter more, in fours
    silent[8:10] = 9
    assert list_silent(silent, 9, listed) is listed
    assert listed.tolist() == [2, 6, 8, 9]
    silent[0] = 10
    more = list_silent(silent, 9, listed)
    assert more.tolist() == [0, 1, 2, 3, 6, 7, 8, 9]  # of latents as silent the first
    silent.clamp_(max=9)
    silent[6:] = 0
    assert list_silent(silent, 9, more) is more  # two, where eight is the most that is kept for them
    assert more.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert list_silent(silent, 10, more).tolist() == []
    assert list_silent(silent, 0, None).tolist() == list(range(12))


def test_latents_that_die_and_come_back_seldom_begin_a_recording_anew() -> None:
    tape = CpuTape()
    played, taken, lists, times = new_learner("topk", tape), new_learner("topk", None), [], 0
    for learner in (played, taken):
        with torch.no_grad():
            learner.sae.b_enc[:6], learner.sae.b_enc[6:12] = -9.0, -0.6
    for step in range(STEPS):
        for learner in (played, taken):
            learner.train_step(batch(step), N)
        assert played.recorder is not None
        assert played.sae.may_die is not None
        times += played.recorder.replay is not None
        lists.append(tuple(played.sae.may_die.tolist()))
    assert_equal(played, taken)
    assert times > STEPS / 2
    assert len(set(lists)) > 2 * tape.recorded


def test_a_recording_that_is_not_told_what_changes_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    played, taken = new_learner("standard", CpuTape()), new_learner("standard", None)
    monkeypatch.setattr(type(played.sae), "host_facts", lambda *_: ())
    for step in range(12):  # λ rises over the first 6
        for learner in (played, taken):
            learner.train_step(batch(step), N)
    assert not torch.equal(played.sae.W_enc, taken.sae.W_enc)


@pytest.mark.parametrize("asks", [lambda x: float(x.sum()), lambda x: x.nonzero(), lambda x: x + torch.tensor(1.0)])
def test_the_tape_refuses_a_step_that_waits(asks: Callable[[Tensor], object]) -> None:
    tape = CpuTape()
    with tape.aside(), pytest.raises(AssertionError, match="waits for the device"):
        tape.record(lambda: asks(torch.ones(3)))


def failing(function: Callable[[], object]) -> tuple[object, Callable[[], None]]:
    """As CUDA does it, which ends the recording with another error."""
    try:
        raise RuntimeError("operation not permitted when stream is capturing\nFor debugging consider …")
    finally:
        raise RuntimeError("operation failed due to a previous error during capture")


def test_a_gpu_that_does_not_record_takes_steps_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    tape = CpuTape()
    tape.record = failing  # type: ignore[method-assign, assignment]
    played, taken = new_learner("topk", tape), new_learner("topk", None)
    for step in range(30):
        for learner in (played, taken):
            learner.train_step(batch(step), N)
    assert_equal(played, taken)
    said = capsys.readouterr().err
    assert said.count("--graphs") == 1
    assert "not permitted when stream is capturing); steps" in said


@pytest.mark.parametrize(("variant", "aside"), [("topk", True), ("predictor", False)])
def test_only_steps_that_look_at_no_documents_are_queued_aside(
    monkeypatch: pytest.MonkeyPatch, variant: str, aside: bool
) -> None:
    """Documents come to the device when first wanted; a learner beside this one could read them too soon."""
    tape = CpuTape()
    played = new_learner(variant, tape)
    taken, seen = type(played.sae).training_pass, []

    def watched(sae: SAE, one: Batch, clock: Clock) -> Output:
        seen.append(tape.is_aside)
        return taken(sae, one, clock)

    monkeypatch.setattr(type(played.sae), "training_pass", watched)
    played.train_step(batch(0), N)
    assert seen == [aside]


def test_the_last_loss_waits_for_what_is_queued() -> None:
    tape = CpuTape()
    played, taken = new_learner("topk", tape), new_learner("topk", None)
    played.queue_step(batch(0), N)
    taken.train_step(batch(0), N)
    assert not tape.joined
    assert played.final_loss == taken.final_loss
    assert tape.joined


def test_a_step_that_looks_at_documents_is_not_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder(CpuTape())
    with recorder.tape.aside():
        for step in range(ALIKE + 2):
            given = recorder.step(lambda one: one.doc + 0, batch(step), ())
            assert given[:3, 0].tolist() == [0, 1, 2]
    assert recorder.replay is None
    assert "host_facts must be None" in capsys.readouterr().err


def test_only_small_steps_on_a_gpu_are_recorded() -> None:
    for device, codes, wanted in (("cpu", 8, True), ("cuda", 8, False), ("cuda", recording.MOST_CODES + 1, True)):
        assert recording.recorder_for(torch.device(device), codes, wanted) is None
