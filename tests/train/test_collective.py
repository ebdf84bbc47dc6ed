"""Steps shared by ranks, in real processes: the losses of one process, whoever is stopped or killed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train.runs import equal, status_of
from tests.train.team import newest_step, run_team, start_team, wait_for_steps
from tests.warm import WarmServer
from train.checkpoint import checkpoints
from train.collective import all_min, all_sum, all_sums, among_largest, over_ranks, shared_step, sum_gradients_
from train.saes import REGISTRY

SPLIT = [name for name, variant in REGISTRY.items() if variant.can_split]
SHARDED = [name for name, variant in REGISTRY.items() if variant.can_shard]
# predictor has windows, so that ranks with rows of their own have unlike numbers of valid tokens
NAMES = {"batch": ("topk", "predictor"), "latents": ("topk", "batchtopk")}
MODES = list(NAMES)


def argv(store: Path, out: str, names: tuple[str, ...], *more: str, mode: str = "batch") -> list[str]:
    variants = [word for name in names for word in ("--variant", name)]
    if mode == "latents":
        more = (*more, "--kernels", "plain")  # as ranks with latents of their own take their steps
    return [
        *("train", "fit", "--cache", str(store), "--out", out, "--parallel", mode, *variants),
        *("--eval-tokens", "256", "--final-eval-tokens", "256", "--device", "cpu", *more),
    ]


def small(store: Path, mode: str) -> list[str]:
    """A run that is checkpointed every third of its 60 steps."""
    sizes = ("--d-sae", "64", "--k", "4", "--steps", "60", "--batch-size", "256")
    return argv(store, "r", NAMES[mode], *sizes, "--log-every", "3", "--checkpoint-every", "3", mode=mode)


def metrics_of(learner: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (learner / "metrics.jsonl").read_text().splitlines()]


def assert_alike(run: Path, straight: Path, names: tuple[str, ...] | list[str]) -> None:
    """The losses of every interval agree; sums in another order differ by 1e-7, which selections and Adam amplify."""
    for name in names:
        ours, theirs = metrics_of(run / name), metrics_of(straight / name)
        assert [line["step"] for line in ours] == [line["step"] for line in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one.keys() == other.keys()
            for key in one:
                if key.startswith("loss") or key in ("l0", "dead", "dense", "threshold", "lr"):
                    assert one[key] == pytest.approx(other[key], rel=2e-4, abs=1e-6), f"{name} {key} {one['step']}"


@pytest.fixture(scope="module")
def straight(shared_store: Path, warm: WarmServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small run on two ranks, never stopped, by mode."""
    folders = {mode: tmp_path_factory.mktemp(mode) for mode in MODES}
    for mode, folder in folders.items():
        run_team(warm, small(shared_store, mode), folder)
    return {mode: folder / "r" for mode, folder in folders.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "names"), [("batch", SPLIT), ("latents", SHARDED)])
def test_every_variant_that_can_be_shared_has_the_losses_of_one_process(
    shared_store: Path, tmp_path: Path, warm: WarmServer, mode: str, names: list[str]
) -> None:
    # long enough for latents to die, so that AuxK has something to do
    sizes = ("--d-sae", "48", "--k", "2", "--steps", "9", "--batch-size", "8192", "--passes", "9", "--held-out", "0")
    more = ("--log-every", "1", "--checkpoint-every", "99")
    words = argv(shared_store, "r", tuple(names), *sizes, *more, mode=mode)
    ended = run_team(warm, [word if word != "plain" else "sparse" for word in words], tmp_path)
    if mode == "latents":  # which steps are plain, whatever was asked for
        said = f"--kernels sparse: plain steps for {', '.join(names)}, since latents are spread over ranks"
        assert [said in one.err for one in ended] == [True, False]
    assert warm.run([word if word != "r" else "solo" for word in words], tmp_path).code == 0
    assert_alike(tmp_path / "r", tmp_path / "solo", names)
    for name in ("topk", "batchtopk"):
        assert metrics_of(tmp_path / "r" / name)[-1]["loss_aux"] > 0
    for name in names:
        ours, theirs = (load_file(tmp_path / run / name / "sae" / "weights.safetensors") for run in ("r", "solo"))
        assert ours.keys() == theirs.keys()
        assert torch.allclose(ours["W_dec"], theirs["W_dec"], atol=2e-3), name


def test_plain_steps_split_over_three_ranks_have_the_losses_of_one_process(
    shared_store: Path, tmp_path: Path, warm: WarmServer
) -> None:
    sizes = ("--d-sae", "48", "--k", "4", "--steps", "12", "--batch-size", "384", "--kernels", "plain")
    words = argv(shared_store, "r", ("topk", "batchtopk", "predictor"), *sizes, "--log-every", "1")
    run_team(warm, words, tmp_path, n_ranks=3)
    assert warm.run([word if word != "r" else "solo" for word in words], tmp_path).code == 0
    assert_alike(tmp_path / "r", tmp_path / "solo", ["topk", "batchtopk", "predictor"])


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_goes_on_with_another_number_of_ranks(
    shared_store: Path, tmp_path: Path, warm: WarmServer, straight: dict[str, Path], mode: str
) -> None:
    learner = tmp_path / "r" / "topk"
    for n_ranks in (1, 2):
        team = start_team(warm, small(shared_store, mode), tmp_path, n_ranks)
        wait_for_steps(learner, 9)
        team.signal(signal.SIGTERM)
        assert [ended.code for ended in team.wait()] == [75] * n_ranks
    assert newest_step(learner) < 60
    whole = load_file(checkpoints(learner / "checkpoints")[-1] / "weights.safetensors")
    assert [len(whole[name]) for name in ("W_dec", "b_enc", "tokens_silent")] == [64] * 3
    run_team(warm, ["train", "resume", "r"], tmp_path, n_ranks=1)
    assert_alike(tmp_path / "r", straight[mode], NAMES[mode])


@pytest.mark.parametrize("mode", MODES)
def test_a_signal_to_one_rank_stops_all_at_one_step(
    shared_store: Path, tmp_path: Path, warm: WarmServer, straight: dict[str, Path], mode: str
) -> None:
    for rank in (0, 1) if mode == "batch" else (1,):
        team = start_team(warm, small(shared_store, mode), tmp_path)
        wait_for_steps(tmp_path / "r" / "topk", 6)
        team.children[rank].signal(signal.SIGTERM)
        for ended in team.wait():
            assert ended.code == 75, ended.err
            assert "Traceback" not in ended.err
        status = status_of(tmp_path / "r")
        assert status["state"] == "interrupted"
        for name in NAMES[mode]:
            assert status["learners"][name]["step"] == status["step"] == newest_step(tmp_path / "r" / name)
    run_team(warm, ["train", "resume", "r"], tmp_path)
    assert all(equal(tmp_path / "r" / name, straight[mode] / name) for name in NAMES[mode])


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_rank_ends_the_others_and_the_same_command_ends_with_the_same_bits(
    shared_store: Path, tmp_path: Path, warm: WarmServer, straight: dict[str, Path], mode: str
) -> None:
    for killed in (1, 0) if mode == "batch" else (1,):
        team = start_team(warm, small(shared_store, mode), tmp_path)
        wait_for_steps(tmp_path / "r" / "topk", 6)
        team.children[killed].signal(signal.SIGKILL)
        left = team.wait()[1 - killed]
        assert left.code == 75, left.err
        assert "Traceback" not in left.err
        assert left.err.count("RankLost: another rank ended") == 1
        if killed == 1:
            assert status_of(tmp_path / "r")["state"] == "interrupted"
    run_team(warm, small(shared_store, mode), tmp_path)
    assert all(equal(tmp_path / "r" / name, straight[mode] / name) for name in NAMES[mode])


@pytest.mark.parametrize("mode", MODES)
def test_one_writer_leaves_one_run_folder(straight: dict[str, Path], mode: str) -> None:
    run = straight[mode]
    for name in NAMES[mode]:
        assert [line["step"] for line in metrics_of(run / name)] == list(range(3, 63, 3))
        assert len(checkpoints(run / name / "checkpoints")) <= 3
    assert not list(run.rglob("*.aside")) + list(run.glob(".rehearsal-*"))


@pytest.mark.parametrize(
    ("names", "more", "said"),
    [
        (
            ("matryoshka",),
            ("--parallel", "latents"),
            "latents of matryoshka cannot be spread over ranks; those of topk,",
        ),
        (("topk",), ("--parallel", "latents", "--d-sae", "63"), "63 latents cannot be dealt evenly to 2 ranks. Choose"),
        (
            ("topk", "contrastive"),
            (),
            "learner 'contrastive': batches of contrastive cannot be split over ranks; those",
        ),
        (("topk",), ("--batch-size", "255"), "--batch-size 255: 255 windows for learner 'topk' cannot be dealt evenly"),
        (
            ("predictor",),
            ("--batch-size", "192"),
            "3 windows for learner 'predictor' cannot be dealt evenly to 2 ranks",
        ),
    ],
)
def test_what_cannot_be_split_is_refused_in_one_line(
    shared_store: Path, tmp_path: Path, warm: WarmServer, names: tuple[str, ...], more: tuple[str, ...], said: str
) -> None:
    words = argv(shared_store, "r", names, "--d-sae", "64", "--k", "4", "--steps", "6", "--batch-size", "256", *more)
    first, second = start_team(warm, words, tmp_path).wait()
    assert (first.code, second.code) == (2, 2)
    assert said in first.err
    assert len(first.err.splitlines()) == 1
    assert second.err == ""
    assert not (tmp_path / "r").exists()


def test_outside_a_shared_step_there_is_one_rank() -> None:
    value = torch.tensor([3.0, 1.0], requires_grad=True)
    with shared_step(None):
        assert all_sum(value) is value
        assert all_min(value) is value
        assert all_sums({"a": value})["a"] is value
        assert among_largest(value, 1) is None
        assert over_ranks(7) == 7
        sum_gradients_([value], [value])
    assert value.grad is None
