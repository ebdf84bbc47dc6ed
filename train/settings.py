"""From flags, `--set` and a TOML file to one `FitConfig`. Flags win over the file."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any, get_args, get_origin

from common.config import as_parsed, build, parse_count, read_toml
from common.errors import ConfigError, StoreError, nearest
from common.places import url_of
from train.config import FitConfig, LearnerConfig
from train.saes import variant_class

LEARNER_KEYS = set(LearnerConfig.model_fields) - {"options"}


def fit_config(
    file: Path | None,
    flags: dict[str, Any],
    variants: tuple[str, ...],
    shared: dict[str, Any],
    settings: tuple[str, ...],
) -> FitConfig:
    """The configuration that a `train fit` command line describes.

    Args:
        flags: run settings that were given.
        variants: `--variant` names; they replace the file's learners.
        shared: `--d-sae`, `--k`, `--lr`: for every learner; k only where the variant has it.
        settings: `--set` texts.

    Raises:
        ConfigError: an unknown name anywhere, with the nearest known one.
    """
    values = read_toml(file) if file is not None else {}
    if {"steps", "tokens"} & flags.keys():  # two ways to say one thing: the flag replaces either
        values = {key: value for key, value in values.items() if key not in ("steps", "tokens")}
    where = str(file) if file is not None else "train fit"
    tables, grids = values.pop("learner", []), values.pop("grid", [])
    for name, given in (("learner", tables), ("grid", grids)):
        if not isinstance(given, list) or not all(isinstance(entry, dict) for entry in given):
            raise ConfigError(f"{where}: {name}s are given as [[{name}]] tables.")
    made = [entry for grid in grids for entry in expand_grid(replaced(grid, shared, settings), where)]
    tables = tables + made
    if variants:
        tables, made = [{"variant": variant} for variant in variants], []
    tables = with_names(tables, "--variant" if variants else where)
    for entry in tables:
        apply_shared(entry, shared)
    for text in settings:
        apply_setting(tables, text)
    learners = tuple(learner_config(entry, f"{where}: learner '{entry['name']}'") for entry in tables)
    if settings:
        refuse_twins(learners[len(learners) - len(made) :])
    config = build(FitConfig, values | flags | {"learner": learners}, where)
    return config.model_copy(update={"cache": store_path(config.cache)})


def store_path(path: Path) -> Path:
    """`path`, or `path.zarr` where only that exists."""
    full = path.with_name(f"{path.name}.zarr") if path.name else path
    return full if full.exists() and not path.exists() else path


def with_names(tables: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Copies with a name each: the variant's, and `topk-2` for a second `topk`.

    Raises:
        ConfigError: a table without a variant, or an unknown variant.
    """
    named: list[dict[str, Any]] = []
    for entry in tables:
        if "variant" not in entry:
            raise ConfigError(f'{where}: a [[learner]] table needs variant = "…".')
        variant = str(entry["variant"])
        refuse_unknown(variant, where)
        taken = {other["name"] for other in named}
        name, number = variant, 1
        while name in taken:
            number += 1
            name = f"{variant}-{number}"
        named.append({"name": name, **entry})
    return named


def refuse_unknown(variant: str, where: str) -> None:
    """Nothing, if it is a variant.

    Raises:
        ConfigError: it is none; says where it was named.
    """
    try:
        variant_class(variant)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def replaced(grid: dict[str, Any], shared: dict[str, Any], settings: tuple[str, ...]) -> dict[str, Any]:
    """A [[grid]] table with the flags for every learner in place of its own lists; --k stands for `target_l0` too.

    A `--set` that names no learner does the same where the table has its key.
    """
    gone = {"target_l0"} if "k" in shared else set()
    given = {key: parse_value(raw) for key, _, raw in (text.partition("=") for text in settings)}
    own = {key: value for key, value in given.items() if key in grid.keys() - {"name"}}
    return {key: value for key, value in grid.items() if key not in gone} | shared | own


def refuse_twins(made: tuple[LearnerConfig, ...]) -> None:
    """Nothing, if no two learners of the grids are equal but for their names: a grid makes each learner once.

    Raises:
        ConfigError: two are, which only a `--set` of what the grid varies under another name can do.
    """
    for index, learner in enumerate(made):
        for other in made[:index]:
            if other.name != learner.name and other == learner.model_copy(update={"name": other.name}):
                raise ConfigError(
                    f"--set makes '{other.name}' and '{learner.name}' one learner. Change the [[grid]], or set one: "
                    f"--set {learner.name}.key=value."
                )


def expand_grid(grid: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The learners of a [[grid]] table: every combination of its lists, named after what varies.

    With `name` they are named after that, and after the variant only if it varies.
    `k` becomes `target_l0` for variants with a penalty instead of a k. A key that only some of the variants have is
    left out for the others; combinations that are then equal appear once.

    Raises:
        ConfigError: as `grid_lists`, or a value that does not fit.
    """
    variants, lists = grid_lists(grid, where)
    entries: list[dict[str, Any]] = []
    made: list[LearnerConfig] = []
    for variant in variants:
        first = f"{grid['name']}-{variant}" if "name" in grid and len(variants) > 1 else str(grid.get("name", variant))
        for combination in itertools.product(*lists.values()):
            chosen = dict(zip(lists, combination, strict=True))
            entry: dict[str, Any] = {"variant": variant}
            apply_shared(entry, chosen)
            taken = entry.keys() | ({"k"} if "target_l0" in entry else set())
            varying = [f"{key}{as_name(chosen[key])}" for key in lists if len(lists[key]) > 1 and key in taken]
            entry["name"] = "-".join([first, *varying])
            learner = learner_config(entry, f"{where}: learner '{entry['name']}'").model_copy(update={"name": first})
            if learner not in made:
                made.append(learner)
                entries.append(entry)
    return entries


def grid_lists(grid: dict[str, Any], where: str) -> tuple[list[str], dict[str, list[Any]]]:
    """A [[grid]] table's variants, and the values of each of its other keys but the name.

    Raises:
        ConfigError: no variant, an unknown one, an empty list, a key that no variant knows, or k beside target_l0.
    """
    given = grid.get("variant", [])
    variants = given if isinstance(given, list) else [given]
    if not variants or not all(isinstance(variant, str) for variant in variants):
        raise ConfigError(f'{where}: a [[grid]] table needs variant = "…" or a list of them.')
    for variant in variants:
        refuse_unknown(variant, f"{where}: [[grid]]")
    lists = {key: as_list(key, value, variants) for key, value in grid.items() if key not in ("variant", "name")}
    known = LEARNER_KEYS.union(*(option_keys({"variant": variant}) for variant in variants), {"k"})
    for key, values in lists.items():
        if key not in known:
            raise ConfigError(f"{where}: unknown setting '{key}' in [[grid]].{nearest(key, known)}")
        if not values:
            raise ConfigError(f"{where}: {key} = [] in [[grid]]: an empty list makes no learner.")
    if {"k", "target_l0"} <= lists.keys():
        raise ConfigError(f"{where}: k and target_l0 in one [[grid]]: k is the target_l0 of a penalty. Give k alone.")
    return variants, lists


def as_list(key: str, value: Any, variants: list[str]) -> list[Any]:
    """The values of a grid's key, each once. A setting that is a list itself takes a list of lists to vary."""
    fields = [variant_class(variant).Config.model_fields for variant in variants]
    kinds = [known[key].annotation for known in fields if key in known]
    is_list = any(tuple in (get_origin(kind), *map(get_origin, get_args(kind))) for kind in kinds)
    one = not isinstance(value, list) or (is_list and not all(isinstance(entry, list) for entry in value))
    values = [parse_count(entry) for entry in ([value] if one else value)]  # "1k" and 1000 are one value
    return [entry for index, entry in enumerate(values) if entry not in values[:index]]


def as_name(value: Any) -> str:
    """A value as part of a folder's name."""
    text = "_".join(str(part) for part in value) if isinstance(value, list) else str(value)
    return re.sub(r"[^A-Za-z0-9._-]", "_", text)


def option_keys(entry: dict[str, Any]) -> set[str]:
    """Settings of the learner's variant."""
    return set(variant_class(str(entry["variant"])).Config.model_fields)


def apply_shared(entry: dict[str, Any], shared: dict[str, Any]) -> None:
    """Settings meant for every learner, where its variant knows them."""
    for key, value in shared.items():
        if key in LEARNER_KEYS or key in option_keys(entry):
            entry[key] = value
        elif key == "k" and "target_l0" in option_keys(entry):
            entry["target_l0"] = value  # variants with a penalty instead of a k are steered towards the same L0


def apply_setting(tables: list[dict[str, Any]], text: str) -> None:
    """Apply one `--set`: `key=value` to every learner that knows the key, `name.key=value` to one.

    Raises:
        ConfigError: no `=`, no such learner, or a key that no learner knows.
    """
    key, equals, raw = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text}: write it as key=value.")
    name, dot, rest = key.rpartition(".")
    chosen = [entry for entry in tables if entry["name"] == name] if dot else tables
    if dot and not chosen:
        raise ConfigError(f"--set {text}: no learner '{name}'.{nearest(name, [entry['name'] for entry in tables])}")
    knowing = [entry for entry in chosen if rest in LEARNER_KEYS | option_keys(entry)]
    if not knowing:
        known = set().union(*(LEARNER_KEYS | option_keys(entry) for entry in chosen)) if chosen else LEARNER_KEYS
        raise ConfigError(f"--set {text}: unknown setting '{rest}'.{nearest(rest, known)}")
    for entry in knowing:
        entry[rest] = parse_value(raw)


def parse_value(text: str) -> Any:
    """A TOML-like value: number, true/false, list; anything else is text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def learner_config(entry: dict[str, Any], where: str) -> LearnerConfig:
    """A flat learner table, its keys sorted into what is common and what is the variant's own.

    Raises:
        ConfigError: a key that neither knows, or a value that does not fit.
    """
    if not isinstance(entry.get("options", {}), dict):
        raise ConfigError(f"{where}: options = {entry['options']!r}: a table of the variant's own settings is needed.")
    options = dict(entry.get("options", {}))
    common: dict[str, Any] = {}
    known = LEARNER_KEYS | option_keys(entry)
    for key, value in entry.items():
        if key == "options":
            continue
        if key not in known:
            raise ConfigError(f"{where}: unknown setting '{key}'.{nearest(key, known)}")
        if key in LEARNER_KEYS:
            common[key] = value
        else:
            options[key] = value
    fields = variant_class(str(entry["variant"])).Config.model_fields
    options = {key: as_parsed(fields[key], value) if key in fields else value for key, value in options.items()}
    return build(LearnerConfig, common | {"options": options}, where)


def saved_config(run: Path, cache: Path | str | None = None, device: str | None = None) -> FitConfig:
    """The configuration saved in a run folder.

    Args:
        cache: where the store is now; text may be a URL.

    Raises:
        StoreError: no run there, or its store is gone.
    """
    if not (run / "run.toml").exists():
        raise StoreError(f"{run}: no run here (no run.toml). Start one with: train fit")
    values = read_toml(run / "run.toml") | {"out": run}
    if cache is not None:
        values["cache"] = cache
    if device is not None:
        values["device"] = device
    config = build(FitConfig, values, str(run / "run.toml"))
    path = store_path(config.cache)
    if url_of(path) is None and not path.exists():  # of a URL it is asked when the store is opened
        raise StoreError(f"{path}: the store of {run} is not there. Say where it is now with --cache.")
    return config.model_copy(update={"cache": path})
