"""Topics of documents: clusters of their words, found with no labels."""

from __future__ import annotations

import warnings

import numpy as np

MOST_TOPICS = 6
DOCUMENTS_PER_TOPIC = 8
WORD_PATTERN = r"[^\W\d_]{3,}"
MOST_WORDS = 5000


def topics_of(texts: list[str], seed: int = 0) -> tuple[np.ndarray, str | None]:
    """The topic of each document, int64, and why there is but one: k-means over tf-idf of words of 3 letters or more.

    There are as many topics as there are eights of documents, at most six.
    """
    from sklearn.cluster import KMeans  # a second to import, and every training run imports the suites
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import TfidfVectorizer

    n_topics = min(MOST_TOPICS, len(texts) // DOCUMENTS_PER_TOPIC)
    one = np.zeros(len(texts), np.int64)
    if n_topics < 2:
        return one, f"topics need {2 * DOCUMENTS_PER_TOPIC} documents, there are {len(texts)}"
    words = TfidfVectorizer(token_pattern=WORD_PATTERN, sublinear_tf=True, max_features=MOST_WORDS)
    try:
        table = words.fit_transform(texts)
    except ValueError:  # "empty vocabulary"
        return one, "topics need words of three letters or more"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different documents than topics
        found = KMeans(n_topics, n_init=10, random_state=seed).fit_predict(table)
    return found.astype(np.int64), None
