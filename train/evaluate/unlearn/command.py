"""`train unlearn`: one of the two protocols over the learners of runs, results beside each learner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.device import resolve_device
from common.errors import ConfigError
from common.stopping import Stop
from train.config import EvalConfig, UnlearnConfig
from train.evaluate import write_evaluation
from train.evaluate.command import subject_of
from train.evaluate.subject import Models, Subject
from train.evaluate.unlearn.losses import Patient
from train.evaluate.unlearn.nll import evaluate_nll
from train.evaluate.unlearn.saebench import evaluate_saebench
from train.evaluate.unlearn.texts import Text, read_texts
from train.folders import learner_folders

SUITES = {"nll": "unlearn", "saebench": "unlearn-saebench"}


def unlearn_runs(runs: list[Path], config: UnlearnConfig, stop: Stop) -> list[dict[str, Any]]:
    """Evaluate every trained learner of `runs` (run or learner folders); what `eval/unlearn.json` holds of each.

    With `config.data` it is SAEBench's protocol, in `eval/unlearn-saebench.json`.

    Raises:
        ConfigError: the language model or a text cannot be had, or the model does not fit the protocol.
        StoreError: no trained SAE there, or the store is gone or changed.
        DataError: too little text, or a file of SAEBench's that cannot be read.
        Interrupted: asked to stop; what was computed is kept.
    """
    models = Models(resolve_device(config.device))
    shared = EvalConfig(cache=config.cache, model=config.model, device=config.device)
    texts: dict[Any, dict[str, Text]] = {}
    results = []
    for folder in learner_folders(runs):
        with subject_of(folder, shared, models, stop) as subject:
            if config.data is not None:
                suite, found = SUITES["saebench"], evaluate_saebench(subject, config)
            else:
                suite, found = SUITES["nll"], evaluate_nll(folder, *with_texts(subject, config, texts), config)
            results.append(write_evaluation(folder, suite, found))
    return results


def with_texts(
    subject: Subject, config: UnlearnConfig, read: dict[Any, dict[str, Text]]
) -> tuple[Patient, dict[str, Text]]:
    """A learner's model and the texts in its tokens; `read` holds those read for the learners before it."""
    for option in ("forget", "retain"):
        if getattr(config, option) is None:
            raise ConfigError(f"train unlearn: --{option} is needed (or --data, for SAEBench's protocol).")
    model, store = subject.spliced_model(), subject.store
    bos = model.tokenizer.bos if store.identity["bos"] else None
    key = (model.tokenizer.identity(), store.context, bos)
    if key not in read:
        read[key] = read_texts(config, model.tokenizer, store.context, bos)
    return Patient(model, subject.sae, subject.plan.hook, subject.refuse_when_stopped), read[key]
