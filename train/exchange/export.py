"""`train export`: trained SAEs as other libraries load them. `FORMATS` is the only list of these."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.console import say
from common.errors import ConfigError
from common.files import make_folder
from train.exchange import dictionary_learning, saelens, sparsify
from train.exchange.about import About, about_sae
from train.folders import learner_folders
from train.saes import load_sae
from train.saes.affine import AffineForm
from train.saes.base import SAE

NATIVE = "granary.load_sae and granary.for_saebench take it as it is."


@dataclass(frozen=True)
class Format:
    """A library's files.

    Attributes:
        write: puts them into a folder and says what they load as.
        files: all that it may write.
        refuse: raises ConfigError for a form of this variant that it does not know.
    """

    write: Callable[[AffineForm, About, Path], str]
    files: set[str]
    refuse: Callable[[AffineForm, str], None] = lambda form, variant: None


FORMATS = {
    "saelens": Format(saelens.write_saelens, saelens.FILES),
    "dictionary_learning": Format(dictionary_learning.write_dictionary_learning, dictionary_learning.FILES),
    "sparsify": Format(sparsify.write_sparsify, sparsify.FILES, sparsify.refuse_but_topk),
}


@dataclass(frozen=True)
class Exported:
    """One exported learner.

    Attributes:
        loads_as: architecture or class in the other library.
        lost: what was left out with `--context-free`.
    """

    learner: str
    variant: str
    loads_as: str
    lost: str
    path: str


def export(run: Path, to: str, out: Path, context_free: bool = False) -> list[Exported]:
    """Export every learner of `run` (a run or learner folder) into `out/<learner>`; those refused are named on stderr.

    Raises:
        ConfigError: none of them could be exported; says why, of each.
        StoreError: no trained SAE there.
    """
    exported: list[Exported] = []
    refused: dict[str, list[str]] = {}
    for folder in learner_folders([run]):
        try:
            exported.append(export_learner(folder, to, out / folder.name, context_free))
        except ConfigError as error:
            refused.setdefault(str(error), []).append(str(folder))
    lines = [f"{', '.join(folders)}: {reason}" for reason, folders in refused.items()]
    if not exported:
        raise ConfigError("\n".join(lines))
    for line in lines:
        say(f"not exported: {line}")
    return exported


def export_learner(folder: Path, to: str, target: Path, context_free: bool) -> Exported:
    """One learner; its folder appears whole, in place of an earlier export.

    Raises:
        ConfigError: the format cannot hold it, or something else lies at `target`.
    """
    sae = load_sae(folder)
    form, about, chosen = form_of(sae, to, context_free), about_sae(folder, sae), FORMATS[to]
    strange = [path.name for path in target.iterdir() if path.name not in chosen.files] if target.is_dir() else []
    if strange or target.is_file():
        raise ConfigError(f"{target} holds something that is no {to} export ({', '.join(strange) or 'a file'}).")
    aside = target.with_name(f".{target.name}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    make_folder(aside)
    try:
        loads_as = chosen.write(form, about, aside)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Exported(folder.name, sae.variant, loads_as, form.lost, str(target))


def form_of(sae: SAE, to: str, context_free: bool) -> AffineForm:
    """The SAE as the other libraries can hold it.

    Raises:
        ConfigError: they cannot, or only without what it reads from other tokens, and that was not asked for.
    """
    form = sae.as_affine()
    if form is None:
        raise ConfigError(f"latents of {sae.variant} depend on one another, which {to} cannot hold. {NATIVE}")
    FORMATS[to].refuse(form, sae.variant)
    if form.lost and not context_free:
        raise ConfigError(
            f"{to} cannot hold {form.lost}. {NATIVE} --context-free exports what it does with a token on its own."
        )
    return form
