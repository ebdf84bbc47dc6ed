"""The texts of protocol `nll`: what is to be forgotten, what is to be kept, and perhaps a third kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from common.corpus import Corpus, CorpusOptions, HubCorpus, open_corpus
from common.errors import DataError, GranaryError
from common.files import fingerprint
from common.tokenizers import Tokenizer
from train.config import UnlearnConfig
from train.evaluate.unlearn.passages import Passages, split_halves

FORGET, RETAIN, ALSO = "forget", "retain", "also_retain"


@dataclass(frozen=True)
class Text:
    """One kind of text: a half to choose latents on, a half to judge them on."""

    selection: Passages
    evaluation: Passages


def read_texts(config: UnlearnConfig, tokenizer: Tokenizer, context: int, bos: int | None) -> dict[str, Text]:
    """The texts named, by `FORGET`, `RETAIN` and, if it is given, `ALSO`.

    A document counts once, in the first text that has it: latents are chosen on one half of a text, and what they do to
    the other half and to the next text must not be what they were chosen on. Of the corpus to be forgotten all that it
    holds is left out of the others, read or not, unless it is a hub data set, which may have no end.

    Raises:
        ConfigError: no such corpus.
        DataError: fewer than two documents.
    """
    names = {FORGET: config.forget, RETAIN: config.retain, ALSO: config.also_retain}
    opened = {option: _opened(option, name, config) for option, name in names.items() if name is not None}
    taken: set[str] = set()
    texts = {}
    for option, corpus in opened.items():
        halves = split_halves(_new(_documents(option, corpus), taken), tokenizer, context, bos, config.max_tokens)
        if not all(half.n_documents for half in halves):
            raise DataError(
                f"--{option.replace('_', '-')} {names[option]}: {sum(half.n_documents for half in halves)} documents "
                "with text that no other text has; two are needed, one to choose latents on and one to judge them on."
            )
        texts[option] = Text(*halves)
        if option == FORGET and not isinstance(corpus, HubCorpus):
            taken |= {fingerprint(text) for text in _documents(FORGET, corpus)}
    return texts


def _new(documents: Iterator[str], taken: set[str]) -> Iterator[str]:
    """Those whose fingerprint is not yet in `taken`, which they join."""
    for text in documents:
        mark = fingerprint(text)
        if mark not in taken:
            taken.add(mark)
            yield text


def _opened(option: str, name: str, config: UnlearnConfig) -> Corpus:
    try:
        return open_corpus(CorpusOptions(name=name, column=config.column))
    except GranaryError as error:
        raise _renamed(error, option) from None


def _documents(option: str, corpus: Corpus) -> Iterator[str]:
    try:
        yield from corpus.documents()
    except GranaryError as error:
        raise _renamed(error, option) from None


def _renamed(error: GranaryError, option: str) -> GranaryError:
    """The same error in the words of this command, whose corpora have other flags."""
    return type(error)(str(error).replace("--corpus", f"--{option.replace('_', '-')}"))
