"""`train import`: a published SAE as a run that `train eval` takes."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from common.config import build
from common.console import say
from common.device import resolve_device
from common.errors import ConfigError, Interrupted, StoreError
from common.files import write_json
from common.stopping import Stop
from common.store import Store
from train.config import FitConfig, ImportConfig, LearnerConfig
from train.data.batch import Batch
from train.data.plan import DataPlan, plan_data
from train.data.reader import Batches
from train.evaluate import write_evaluation
from train.evaluate.heldout import evaluate_heldout
from train.evaluate.subject import Evaluation
from train.exchange.published import Published, read_published
from train.finish import store_facts
from train.preflight import Amount
from train.prepare import identity_of, write_settings
from train.record import Status
from train.run import RESULT_FILE, STATUS_FILE
from train.saes import make_sae, save_sae
from train.saes.affine import AffineForm
from train.saes.base import SAE
from train.settings import store_path

VARIANTS = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}


def import_sae(path: Path, config: ImportConfig, stop: Stop) -> dict[str, Any]:
    """Make a run of one learner out of the SAELens folder `path`, and evaluate it on held-out documents.

    Returns:
        the learner's result.json.

    Raises:
        StoreError: no published SAE there, a damaged one, or no store.
        ConfigError: an SAE that no variant here can be, that does not fit the store, or `out` is taken.
        DataError: the store has no documents to hold out.
        Interrupted: asked to stop; nothing is written.
    """
    published = read_published(path)
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise ConfigError(f"--out {config.out}: there is something already. An import begins a run of its own.")
    store = Store.open(store_path(config.cache))
    hook = hook_for(published, store, config.hook, path)
    d_in = published.form.W_enc.shape[0]
    if d_in != store.d_model(hook):
        raise ConfigError(f"{path}: its inputs have {d_in} dimensions, {hook} of {store.name} {store.d_model(hook)}.")
    warn_of_another_source(published, store, hook, path)
    sae = sae_from(published.form)
    fit = settings_of(sae, config, store, hook, learner_name(config.name, path))
    plan = plan_data(store, fit.data(), fit.seed, {1})
    with contextlib.closing(Batches(store, plan, resolve_device(config.device))) as batches:
        sae.to(batches.device)
        looked_at = batches.held_out(sae.window, fit.final_eval_tokens)
        metrics = evaluate_heldout(sae, until_stopped(looked_at, stop))
        return write_run(path, sae, published, fit, batches, metrics)


def until_stopped(batches: Iterator[Batch], stop: Stop) -> Iterator[Batch]:
    """The same batches.

    Raises:
        Interrupted: asked to stop.
    """
    for batch in batches:
        if stop.asked:
            raise Interrupted(f"stopped by {stop.signal_name} in an import. Run the same command again.")
        yield batch


def hook_for(published: Published, store: Store, asked: str | None, path: Path) -> str:
    """The store's hook that the SAE is looked at with.

    Raises:
        ConfigError: none was named, and the SAE's own is not one of several.
    """
    if asked is not None or len(store.hooks) == 1 or published.hook is None:
        return store.hook(asked)
    if published.hook not in store.hooks:
        raise ConfigError(
            f"{path}: it was trained at {published.hook}, which {store.name} does not have: {', '.join(store.hooks)}. "
            "Choose one with --hook."
        )
    return published.hook


def warn_of_another_source(published: Published, store: Store, hook: str, path: Path) -> None:
    """Say on stderr where the store is not what the SAE was trained on."""
    settings, identity = store.header["settings"], store.identity
    if published.model is None or published.hook is None:
        say(f"{path}: it does not say what it was trained on, so nobody knows whether {store.name} fits it.")
        return
    pairs = [
        ("model", published.model, settings["model"], plain_name(published.model) != plain_name(settings["model"])),
        ("hook", published.hook, hook, published.hook != hook),
        ("bos", published.bos, identity.get("bos"), None not in (published.bos, identity.get("bos"))
         and published.bos != identity["bos"]),
    ]  # fmt: skip
    for what, theirs, ours, differs in pairs:
        if differs:
            say(f"{path}: note: trained with {what} {theirs}, looked at with {ours}: its figures say little then.")


def plain_name(model: str) -> str:
    """A model's name without owner, folder and capitals."""
    return model.rstrip("/").rpartition("/")[2].lower()


def sae_from(form: AffineForm) -> SAE:
    """Our variant that computes what the form does."""
    d_in, d_sae = form.W_enc.shape
    variant = VARIANTS[form.activation]
    sae = make_sae(variant, {"d_sae": d_sae} | ({"k": form.k} if form.k else {}), d_in, 0, "train import")
    form = form.with_centre(form.activation != "jumprelu")  # jumprelu subtracts no b_dec, the others do
    values = {"W_enc": form.W_enc, "b_enc": form.b_enc, "W_dec": form.W_dec, "b_dec": form.b_dec}
    own = {"theta": form.threshold, "r": form.r_mag, "b_mag": form.b_mag}
    with torch.no_grad():
        for name, value in {**values, **own}.items():
            if value is not None:
                sae.get_parameter(name).copy_(value)
    return sae.eval().requires_grad_(False)


def learner_name(asked: str | None, path: Path) -> str:
    """A name that a learner's folder can have."""
    return asked or re.sub(r"[^A-Za-z0-9._-]", "_", path.resolve().name).lstrip("._-") or "imported"


def settings_of(sae: SAE, config: ImportConfig, store: Store, hook: str, name: str) -> FitConfig:
    """The settings of a run that would train such an SAE on this store: what `run.toml` says.

    Raises:
        ConfigError: a name that no folder of a run can have.
    """
    described = {"name": name, "variant": sae.variant, "options": sae.config.model_dump(mode="json")}
    learner = build(LearnerConfig, described, "train import")
    values = {"cache": store.path, "out": config.out, "hook": hook, "held_out": config.held_out, "passes": 1.0}
    return build(FitConfig, values | {"device": config.device, "learner": (learner,)}, "train import")


def write_run(
    path: Path, sae: SAE, published: Published, fit: FitConfig, batches: Batches, metrics: dict[str, Any]
) -> dict[str, Any]:
    """The run's files, its status last.

    Raises:
        StoreError: the SAE's reconstructions are not finite.
    """
    run, learner, plan = fit.run_folder(), fit.learner[0], batches.plan
    folder = run / learner.name
    if not math.isfinite(metrics["explained_variance"]):
        raise StoreError(f"{path}: its reconstructions are not finite.")
    reason = f"imported from {path.resolve()}"
    write_settings(run, fit, plan, identity_of(fit, batches.store, plan, Amount(0, 0.0), torch.float32), None)
    described = {"d_in": sae.d_in, "options": sae.config.model_dump(mode="json")}
    write_json(folder / "config.json", learner.model_dump(mode="json") | described)
    save_sae(sae, folder / "sae", facts_of(published, batches.store, plan))
    write_evaluation(folder, "heldout", Evaluation(metrics))
    result = result_of(learner, reason, metrics)
    write_json(folder / RESULT_FILE, result)
    standing = {learner.name: {"state": "finished", "reason": reason, "step": 0}}
    Status(run / STATUS_FILE, 0).write(state="finished", reason=reason, learners=standing)
    return result


def facts_of(published: Published, store: Store, plan: DataPlan) -> dict[str, Any]:
    """`sae/config.json` beside the architecture: the store it is looked at with, and what it says of its training."""
    own = {"context": published.context, "bos": published.bos, "training_tokens": published.training_tokens}
    facts = store_facts(store, plan) | {"training_steps": 0, "training_tokens": 0, "lr": None, "seed": 0}
    return facts | {name: value for name, value in own.items() if value is not None}


def result_of(learner: LearnerConfig, reason: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """`result.json` of a learner that took no step here."""
    return {
        "name": learner.name,
        "variant": learner.variant,
        "state": "finished",
        "reason": reason,
        "alarms": [],
        "training_steps": 0,
        "requested_steps": 0,
        "tokens_seen": 0,
        "final_loss": None,
        "passes": 0.0,
        "lr": None,
        "seconds": 0.0,
        "best_heldout_explained_variance": None,
        "metrics": metrics | {"calibration": {}},
    }
