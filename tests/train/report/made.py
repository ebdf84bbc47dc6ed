"""Run folders written by hand: what `train` leaves, without training."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import tomli_w

from common.files import write_file, write_json

STEPS, BATCH = 40, 256


def made_learner(name: str, variant: str = "batchtopk", **more: Any) -> dict[str, Any]:
    """A learner of a made run: `options`, `seed`, `state`, `reason`, `steps`, `loss`, `extra` (of lines), `evals`."""
    usual: dict[str, Any] = {
        "options": {"d_sae": 32, "k": 4},
        "seed": 0,
        "state": "finished",
        "reason": "",
        "extra": {},
    }
    return usual | {"name": name, "variant": variant, "steps": STEPS, "loss": 0.25, "evals": {}, "ev": 0.8} | more


def made_run(folder: Path, *learners: dict[str, Any], state: str = "finished", **identity: Any) -> Path:
    """A run folder with these learners; one whose state is `running` or `waiting` has no result.json."""
    settings = {"cache": "cache/made.zarr", "learner": [{"name": learner["name"]} for learner in learners]}
    write_file(folder / "run.toml", tomli_w.dumps(settings).encode())
    decides = {"store": "made", "hook": "blocks.1", "seed": 0, "batch_size": BATCH, "n_steps": STEPS}
    write_json(folder / "data.json", {"identity": decides | identity})
    told = {one["name"]: {key: one[key] for key in ("state", "reason")} for one in learners}
    status = {"state": state, "reason": "", "steps": STEPS, "learners": told, "heartbeat": time.time()}
    write_json(folder / "status.json", status)
    for learner in learners:
        write_learner(folder / learner["name"], learner)
    return folder


def write_learner(folder: Path, learner: dict[str, Any]) -> None:
    config = {key: learner[key] for key in ("name", "variant", "options", "seed")}
    write_json(folder / "config.json", config | {"lr": None})
    lines = [line_of(learner, step) for step in range(10, learner["steps"] + 1, 10)]
    if lines:
        write_file(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    if learner["state"] not in ("running", "waiting"):
        write_json(folder / "result.json", result_of(learner))
    for suite, evaluation in learner["evals"].items():
        write_json(folder / "eval" / f"{suite}.json", evaluation)


def line_of(learner: dict[str, Any], step: int) -> dict[str, Any]:
    """A metrics line: losses fall as 10 / step."""
    parts = {"loss_reconstruction": 8 * learner["loss"] * 10 / step, "loss_aux": 0.01}
    return {
        "step": step, "tokens": step * BATCH, "loss": sum(parts.values()), "explained_variance": 1 - 5 / step,
        "l0": 4.0 + 1 / step, "l1": 9.0, "grad_norm": 1 / step, "grad_norm_max": 2 / step, "dense": 0.125, "dead": 0.0,
        "lr": 1e-3, "tokens_per_s": 1000.0, "wait_share": 0.0, **parts, **learner["extra"],
    }  # fmt: skip


def result_of(learner: dict[str, Any]) -> dict[str, Any]:
    finished = learner["state"] == "finished"
    metrics = {"explained_variance": learner["ev"], "mse": 3.5, "cosine": 0.9, "l0": 4.25, "l1": 12.5}
    return {
        "name": learner["name"], "variant": learner["variant"], "state": learner["state"], "reason": learner["reason"],
        "training_steps": learner["steps"], "requested_steps": STEPS, "tokens_seen": learner["steps"] * BATCH,
        "final_loss": learner["loss"] if learner["steps"] else None, "seconds": 2.0 if learner["steps"] else 0.0,
        "metrics": metrics | {"nmse": 0.2, "dead_share": 0.0, "dense_share": 0.1} if finished else None,
    }  # fmt: skip


def evaluation(metrics: dict[str, float | None], **more: Any) -> dict[str, Any]:
    """An `eval/<suite>.json`."""
    return {"metrics": metrics, "reasons": {name: "made so" for name, v in metrics.items() if v is None}, **more}


CORE = evaluation(
    {
        "kl_div_score": 0.95, "kl_div_with_sae": 0.2, "ce_loss_score": 0.9, "ce_loss_without_sae": 3.0,
        "ce_loss_with_sae": 3.5, "ce_loss_with_ablation": 8.0, "l0": 4.5,
    },
    eval_result_details=[{"index": i, "feature_density": d} for i, d in enumerate([0.0, 0.001, 0.01, 0.2])],
)  # fmt: skip
TEMPORAL = evaluation(
    {"l0": 4.5, "matched_rho_8": 0.3},
    intervals={"matched_rho_8": [0.25, 0.375]},
    curve={"lags": [1, 2, 64], "rho": [0.5, 0.25, 0.125], "null": [0.01, None, None]},
    groups={"slow": {"matched_rho_8": 0.5}, "fast": {"matched_rho_8": None}},
)
UNLEARN = evaluation(
    {"score": 0.1},
    settings=[{"relative_retain": r, "relative_forget": f} for r, f in ((0.0, 0.0), (0.004, 0.125), (0.5, 0.75))],
    controls=[{"relative_retain": 0.25, "relative_forget": 0.25}],
    pareto=[{"relative_retain": 0.004, "relative_forget": 0.125}, {"relative_retain": 0.5, "relative_forget": 0.75}],
)
HIERARCHY = evaluation(
    {"path_recovered": 0.5},
    faithfulness=[
        {"kept": kept, "ce": ce, "kl": ce / 2, "random_ce": ce + 1, "random_kl": ce}
        for kept, ce in ((0, 8.0), (1, 5.0), (2, 4.0))
    ],
    faithfulness_model={"ce": 3.0},
)
EVALS = {"core": CORE, "temporal": TEMPORAL, "unlearn": UNLEARN, "hierarchy": HIERARCHY}
