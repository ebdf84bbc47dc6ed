"""Before the first step: what decides a run, what lies in its folder already, its learners brought to their place."""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomli_w
import torch

from common.config import build, read_toml
from common.console import say
from common.errors import ConfigError, StoreError, TrainingError
from common.files import difference, read_json, write_file, write_json
from common.places import url_of
from common.stopping import Stop
from common.store import Store
from train.checkpoint import newest_whole
from train.collective import copy_from_first_
from train.config import DataConfig, FitConfig, LearnerConfig
from train.data.mixing import mixing
from train.data.plan import DataPlan, digest_of
from train.data.reader import Batches
from train.folders import blamed
from train.learner import Learner
from train.preflight import (
    Amount,
    enough_memory,
    rehearse,
    resolve_precision,
    resolve_steps,
    starting_point,
    told_of,
)
from train.ranks import Ranks
from train.record import Status
from train.recording import recorder_for
from train.run import DATA_FILE, RUN_FILE, STATUS_FILE, Run, end_learner, identity_with
from train.saes import REGISTRY, settle_config, variant_class
from train.saes.base import SAEConfig
from train.sharding import Shards

BEFORE_START = re.compile(r"\.lock|status\.json.*|run\.toml.*|data\.json\.aside|\.rehearsal-.*")  # a start cut short


def identity_of(
    config: FitConfig, store: Store, plan: DataPlan, amount: Amount, precision: torch.dtype
) -> dict[str, Any]:
    """What decides every bit of the run, learners apart."""
    return {
        "store": store.id,
        "hook": plan.hook,
        "data": plan.digest,
        "data_settings": config.data().model_dump(mode="json"),
        "n_steps": amount.n_steps,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "precision": str(precision).removeprefix("torch."),
        "kernels": config.kernels,
    }


def refuse_other_run(folder: Path, config: FitConfig, identity: dict[str, Any]) -> None:
    """A run folder belongs to one run; learners may be added to it, and keep their settings.

    Raises:
        ConfigError: another run lies there; the message is the difference.
    """
    if not (folder / DATA_FILE).exists():
        if folder.exists() and not all(BEFORE_START.fullmatch(path.name) for path in folder.iterdir()):
            raise ConfigError(f"--out {folder}: the folder holds something that is not a run. Choose another --out.")
        return
    lines = difference(read_json(folder / DATA_FILE)["identity"], identity)
    stored = {learner["name"]: learner for learner in read_toml(folder / RUN_FILE)["learner"]}
    for learner in config.learner:
        if learner.name in stored:
            lines += difference(stored[learner.name], plain(learner.model_dump(mode="json")), f"{learner.name}.")
    missing = set(stored) - {learner.name for learner in config.learner}
    lines += [f"{name}: in the run, not asked for" for name in sorted(missing)]
    if lines:
        raise ConfigError(
            f"--out {folder}: another run is there (stored → asked): {'; '.join(lines)}. "
            "Choose another --out, or give the same settings to go on with it."
        )


def plain(value: Any) -> Any:
    """Without None at any depth, which TOML cannot say."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items() if inner is not None}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def load_plan(folder: Path, store: Store) -> DataPlan | None:
    """The data plan that a run began with, or None for a new run.

    Raises:
        StoreError: the store's chunks are not what they were, or the file is damaged.
    """
    if not (folder / DATA_FILE).exists():
        return None
    with blamed(folder / DATA_FILE):
        values = read_json(folder / DATA_FILE)["plan"]
        plan = DataPlan(
            **values
            | {
                "chunks": tuple(values["chunks"]),
                "windows": {int(window): tuple(counts) for window, counts in values["windows"].items()},
                "config": build(DataConfig, values["config"], str(folder / DATA_FILE)),
            }
        )
    if plan.store_id != store.id:
        raise StoreError(
            f"{folder}: it was trained on another store than {store.name}. "
            "Name that one with --cache, or start another run with --out."
        )
    store = store.as_of(plan.n_sequences)
    gone = set(plan.chunks) - set(store.usable_chunks(plan.hook))
    if gone:
        raise StoreError(
            f"{store.name}: chunk {min(gone)}, which the run in {folder} reads, is not there. "
            f"Run: harvest verify {store.name} --repair"
        )
    if digest_of(store, plan.hook, plan.chunks) != plan.digest:
        raise StoreError(
            f"{store.name}: its data changed since the run in {folder} began, so it cannot go on exactly. "
            "Start another run with --out."
        )
    return plan


def write_plan(run: Run) -> None:
    """`run.toml`, the resolved settings, and `data.json`, the data plan."""
    window = min(run.plan.windows)
    mixed = min(mixing(run.batches, max(run.config.batch_size // window, 1), window), 1.0)  # samples: chance goes above
    say(f"{run.folder}: batches mix documents at {mixed:.1%} of an ideal shuffle's entropy")
    write_settings(run.folder, run.config, run.plan, run.identity, mixed)


def write_settings(
    folder: Path, config: FitConfig, plan: DataPlan, identity: dict[str, Any], mixed: float | None
) -> None:
    """`run.toml` and `data.json` from what they say."""
    settings = plain(config.model_dump(mode="json")) | {"cache": url_of(config.cache) or str(config.cache.resolve())}
    write_file(folder / RUN_FILE, tomli_w.dumps(settings).encode())
    values = asdict(plan) | {"config": plan.config.model_dump(mode="json")}
    write_json(folder / DATA_FILE, {"identity": identity, "plan": values, "mixing": mixed})


def make_run(
    config: FitConfig,
    store: Store,
    batches: Batches,
    saes: dict[str, SAEConfig],
    device: torch.device,
    stop: Stop,
    ranks: Ranks,
) -> Run:
    """The run made exact; nothing is written.

    Raises:
        ConfigError: settings that do not fit, or another run in this folder.
        DataError: the store does not hold what was asked for.
    """
    plan, folder = batches.plan, config.run_folder()
    amount = min(
        (resolve_steps(config, batches.windows_per_pass(window), window, store.name) for window in windows_of(saes)),
        key=lambda amount: amount.n_steps,
    )
    precision = resolve_precision(config.precision, device)
    identity = identity_of(config, store, plan, amount, precision)
    with blamed(folder):
        refuse_other_run(folder, config, identity)
    run = Run(
        config=config,
        ranks=ranks,
        folder=folder,
        store=store,
        plan=plan,
        batches=batches,
        amount=amount,
        saes=saes,
        mine=frozenset(),
        d_in=store.d_model(plan.hook),
        device=device,
        precision=precision,
        status=Status(folder / STATUS_FILE, amount.n_steps, written=ranks.first),
        stop=ranks.stop_of_all(stop),
        identity=identity,
        log_every=config.log_every or min(max(amount.n_steps // 100, 1), 100),
        checkpoint_every=config.checkpoint_every or min(max(amount.n_steps // 10, 100), 5000),
    )
    left_first = sorted(config.learner, key=lambda learner: run.ended(learner.name))  # so that each rank gets its part
    run.mine = frozenset(learner.name for learner in ranks.own(left_first))
    return run


def settle_learners(config: FitConfig, store: Store) -> dict[str, SAEConfig]:
    """The settings of every learner's variant made exact, by the learner's name.

    Raises:
        ConfigError: no learner, or settings that do not fit.
    """
    if not config.learner:
        raise ConfigError("no learner: name one with --variant, or [[learner]] in a TOML file. See: train variants")
    d_in = store.d_model(store.hook(config.hook))
    settled = {}
    for learner in config.learner:
        where, begun = f"learner '{learner.name}'", (config.run_folder() / learner.name / "config.json").exists()
        settled[learner.name] = settle_config(learner.variant, learner.options, d_in, store.context, where, begun)
    return settled


def refuse_unable(config: FitConfig, what: str, done: str, able: set[str]) -> None:
    """Raise ConfigError if a learner's variant is not among those of which this can be done over ranks."""
    for learner in config.learner:
        if learner.variant not in able:
            known = ", ".join(name for name in REGISTRY if name in able)
            raise ConfigError(
                f"learner '{learner.name}': {what} of {learner.variant} cannot be {done} over ranks; those of {known} "
                "can. Spread learners with --parallel learners, or train it in one process."
            )


def refuse_unsharded(config: FitConfig, saes: dict[str, SAEConfig], n_ranks: int) -> None:
    """Nothing, if every learner can be trained with its latents spread over so many ranks.

    Raises:
        ConfigError: a variant that cannot, or latents that cannot be dealt evenly.
    """
    refuse_unable(config, "latents", "spread", {name for name, variant in REGISTRY.items() if variant.can_shard})
    for learner in config.learner:
        if saes[learner.name].d_sae % n_ranks:
            raise ConfigError(
                f"learner '{learner.name}': {saes[learner.name].d_sae:,} latents cannot be dealt evenly to {n_ranks} "
                f"ranks. Choose a --d-sae that is a multiple of {n_ranks}."
            )


def refuse_unsplit(config: FitConfig, saes: dict[str, SAEConfig], n_ranks: int) -> None:
    """Nothing, if every learner can be trained with its batches split over so many ranks.

    Raises:
        ConfigError: a variant whose loss is no sum over tokens, or rows that cannot be dealt evenly.
    """
    refuse_unable(config, "batches", "split", {name for name, variant in REGISTRY.items() if variant.can_split})
    for learner in config.learner:
        n_windows = config.batch_size // saes[learner.name].window
        if n_windows % n_ranks:
            raise ConfigError(
                f"--batch-size {config.batch_size:,}: {n_windows:,} windows for learner '{learner.name}' cannot be "
                f"dealt evenly to {n_ranks} ranks. Choose a multiple of {n_ranks * saes[learner.name].window:,}."
            )


def windows_of(saes: dict[str, SAEConfig]) -> set[int]:
    return {sae.window for sae in saes.values()}


def prepare(run: Run) -> None:
    """Rehearse every learner that is new, and write down what the run is."""
    run.ranks.first_does(lambda: clear_rehearsals(run.folder))
    say_who_steps_plainly(run)
    # ranks in step talk to each other in a rehearsal: one that fails must not wait for the others
    diverged = rehearse_new(run) if run.ranks.in_step else run.ranks.together(lambda: rehearse_new(run))
    run.ranks.first_does(lambda: write_plan(run))  # before any learner's folder: one without a plan is not a run
    for config, reason in diverged:
        end_learner(run, config, "diverged", reason)
    for config in run.config.learner:
        if config.name in run.mine and run.ranks.writes:
            folder = run.folder_of(config.name)
            folder.mkdir(exist_ok=True)
            architecture = {"d_in": run.d_in, "options": run.saes[config.name].model_dump(mode="json")}
            write_json(folder / "config.json", config.model_dump(mode="json") | architecture)


def say_who_steps_plainly(run: Run) -> None:
    """A line if `--kernels sparse` or `--graphs` is asked for and cannot be had."""
    if run.config.graphs and run.ranks.first and (run.device.type != "cuda" or run.ranks.in_step):
        why = "steps are shared by ranks" if run.ranks.in_step else "there is no GPU"
        say(f"--graphs: nothing is recorded, since {why}")
    spread = run.ranks.in_step and run.ranks.mode == "latents"
    if run.config.kernels == "sparse" and spread and run.ranks.first:
        names = [learner.name for learner in run.config.learner if variant_class(learner.variant).trained]
        say(f"--kernels sparse: plain steps for {', '.join(names)}, since latents are spread over ranks")


def clear_rehearsals(folder: Path) -> None:
    """Remove what rehearsals left that were killed."""
    for leftover in folder.glob(".rehearsal-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def rehearse_new(run: Run) -> list[tuple[LearnerConfig, str]]:
    """Rehearse one learner of each kind that has no checkpoint; those that diverge, with the reason."""
    tried, diverged = set(), []
    for config in run.waiting():
        kind = config.model_copy(update={"name": "any", "seed": None}).model_dump_json()  # seeds fail alike
        if kind in tried or (run.folder_of(config.name) / "checkpoints").exists() or run.stop.asked:
            continue
        tried.add(kind)
        rows = run.rows(0, run.saes[config.name].window)
        sizes = (run.d_in, run.saes[config.name].d_sae, run.config.batch_size)
        with told_of(config.name), enough_memory(*sizes):
            reason = rehearse(started(run, config), run.batches, run.config, run.folder, rows, run.sharing)
        if reason is not None:
            diverged.append((config, reason))
    return diverged


def new_learner(run: Run, config: LearnerConfig) -> Learner:
    """A learner with its first weights."""
    seed = config.seed if config.seed is not None else run.config.seed
    sae = variant_class(config.variant)(run.saes[config.name], run.d_in, seed)
    ranks = run.ranks
    shards = Shards(ranks.data, run.device.type) if ranks.in_step and ranks.mode == "latents" else None
    if shards is not None:
        shards.shard_(sae.to(run.device))
    n_codes = run.config.batch_size * sae.d_sae
    recorder = recorder_for(run.device, n_codes, run.config.graphs and not ranks.in_step)
    return Learner(config, sae, run.amount.n_steps, run.device, run.precision, run.config.kernels, shards, recorder)


def started(run: Run, config: LearnerConfig) -> Learner:
    """A new learner with its input scale and starting point."""
    window = run.saes[config.name].window
    if window not in run.start:
        run.start[window] = starting_point(run.batches, window)
    scale, b_dec = run.start[window]
    learner = new_learner(run, config)
    learner.sae.start(scale, b_dec.to(learner.device))
    return learner


def bring(run: Run, config: LearnerConfig) -> Learner:
    """A learner at its place: from its newest whole checkpoint, or at step 0.

    Raises:
        TrainingError: checkpoints are there, but none is whole.
        StoreError: they belong to another run.
    """
    folder = run.folder_of(config.name)
    found, skipped = newest_whole(folder / "checkpoints")
    for line in skipped:
        run.say(f"{config.name}: {line}")
    if found is None and skipped:
        raise TrainingError(f"no whole checkpoint is left. Remove {folder} to train this learner anew.")
    if found is None:
        learner = started(run, config)
    else:
        learner = new_learner(run, config)
        lines = difference(found.facts["identity"], identity_with(run, config))
        lines += changed_defaults(found.facts.get("options", {}), learner.sae.config)
        if lines:
            raise StoreError(
                f"{found.path}: it belongs to another run (stored → asked): {'; '.join(lines)}. "
                f"Remove {folder} to train this learner anew."
            )
        learner.restore(found.tensors, found.facts)
        run.say(f"{config.name}: going on from step {learner.step:,} of {run.amount.n_steps:,}")
    if run.ranks.writes:
        metrics = run.metrics_of(learner)
        with blamed(metrics.path):
            metrics.keep_until(learner.step)
    return learner


def changed_defaults(stored: dict[str, Any], config: SAEConfig) -> list[str]:
    """Options that nobody named, and that another version of Granary gave another value when the learner began."""
    now = config.model_dump(mode="json")
    known = stored.keys() & now.keys()
    return difference({name: stored[name] for name in known}, {name: now[name] for name in known}, "options.")


def stand_together(run: Run) -> None:
    """Let ranks in step begin from the same bits, those of rank 0.

    Raises:
        StoreError: they found checkpoints of different steps.
    """
    if not run.ranks.in_step:
        return
    for number, steps in enumerate(run.ranks.gather({learner.name: learner.step for learner in run.learners})):
        mine = {learner.name: learner.step for learner in run.learners}
        if steps != mine:
            raise StoreError(
                f"{run.folder}: rank {number} begins at {steps}, rank {run.ranks.rank} at {mine}. All ranks must see "
                "one run folder: put it where they do, with --out."
            )
    if run.ranks.mode == "latents":
        return  # laid out from rank 0's
    with run.sharing():
        for learner in run.learners:
            copy_from_first_(tensor for tensors in learner.tensors().values() for tensor in tensors.values())
