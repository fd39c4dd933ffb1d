"""Rivals that look text up: kNN-LM at its best setting, an n-gram of any length over the rows, and BM25."""

import bisect
import itertools
from collections import Counter

import bm25s
import numpy as np

from datastore import hidden_batches, knn_weights
from texts import Window, entries_of

NEIGHBOURS = (8, 32, 128, 1024)  # K that kNN-LM is tried with, each at all of the temperatures and lambdas
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 16.0)  # temperatures, times the one the memory was trained with
LAMBDAS = np.linspace(0, 1, 21)
LONGEST = 32  # tokens of context that the n-gram looks up at most
QUERY = 64  # first tokens of a window, with which BM25 is asked; the base alone predicts them


def knn_table(base, store, windows, temperature, batch_size):
    """Log probability (P, K x S) of the next token under the kNN distribution, for every K and temperature."""
    values, _, _, offsets = entries_of(windows)
    table = np.empty((len(values), len(NEIGHBOURS) * len(FACTORS)), np.float32)
    for first, hidden in hidden_batches(base, windows, batch_size):
        here = slice(offsets[first], offsets[first] + len(hidden))
        D, I = store.search(hidden.float().cpu().numpy(), min(NEIGHBOURS[-1], len(store)))
        hit = store.values[I] == values[here, None]
        columns = [(knn_weights(D[:, :k], factor * temperature) * hit[:, :k]).sum(1)
                   for k, factor in itertools.product(NEIGHBOURS, FACTORS)]
        with np.errstate(divide="ignore"):
            table[here] = np.log(np.stack(columns, 1))
    return table


def mixed(base, other, share):
    """Log of (1 - share) * exp(base) + share * exp(other)."""
    with np.errstate(divide="ignore"):
        return np.logaddexp(base + np.log1p(-share), other + np.log(share))


def best_share(base, other):
    """The share, among LAMBDAS, with the highest likelihood."""
    means = [mixed(base, other, share).mean() for share in LAMBDAS]
    return float(LAMBDAS[int(np.argmax(means))])


def best_knn(base, table):
    """(column of the table, lambda) with the highest likelihood."""
    found = [(mixed(base, column, share).mean(), number, share) for number, column in enumerate(table.T) for share in LAMBDAS]
    _, number, share = max(found)
    return number, float(share)


class NGram:
    """Predicts what followed the longest end of the context that occurs in the rows, found in a suffix array.

    A token that never followed there gets probability 0, so the result is mixed with the base. Infini-gram, Liu et al. 2024
    (arXiv 2401.17377).
    """

    def __init__(self, rows):
        """rows: lists of token ids."""
        self.ids = [token for row in rows for token in [*row, -1]]  # -1 stands between rows and matches nothing
        self.counts = Counter(token for token in self.ids if token >= 0)
        self.order = sorted(range(len(self.ids)), key=lambda i: self.ids[i:i + LONGEST])

    def spans(self, pattern):
        """Places (low, high) in the suffix array: the suffixes that begin with a pattern."""
        def start(i):
            return self.ids[i:i + len(pattern)]
        low = bisect.bisect_left(self.order, pattern, key=start)
        return low, bisect.bisect_right(self.order, pattern, lo=low, key=start)

    def following(self, pattern):
        """What follows a pattern in the rows: {token: how often}."""
        if not pattern:
            return self.counts
        low, high = self.spans(pattern)
        return Counter(token for i in self.order[low:high] if (token := self.ids[i + len(pattern)]) >= 0)

    def predict(self, row):
        """For each position except the last: (probability of the next token, whether only one token ever followed)."""
        found, length = [], 0
        for i in range(len(row) - 1):
            length = min(length + 1, LONGEST, i + 1)  # a match is at most one token longer than the one before
            while not (counts := self.following(row[i + 1 - length:i + 1])):
                length -= 1
            found.append((counts[row[i + 1]] / counts.total(), len(counts) == 1))
        return found


def ngram_scores(ngram, rows, windows):
    """(log probability (P,), sparse (P,) bool) of the windows' positions; rows: each example's token ids."""
    _, example, position, _ = entries_of(windows)
    told = {number: ngram.predict(rows[number]) for number in np.unique(example).tolist()}
    chance, sparse = np.array([told[e][p] for e, p in zip(example.tolist(), position.tolist(), strict=True)]).T
    with np.errstate(divide="ignore"):
        return np.log(chance), sparse.astype(bool)


class BM25:
    """Finds the text that is nearest to a query."""

    def __init__(self, texts):
        self.index = bm25s.BM25()
        self.index.index(self.words(texts), show_progress=False)

    @staticmethod
    def words(texts):
        return bm25s.tokenize(texts, stopwords="en", show_progress=False)

    def __call__(self, query):
        """The number of the nearest text."""
        found, _ = self.index.retrieve(self.words([query or "-"]), k=1, show_progress=False)
        return int(found[0, 0])


class InPrompt:
    """Puts one stored row before each window: the row that BM25 finds for the window's first QUERY tokens.

    A simple form of in-context RALM (Ram et al. 2023, arXiv 2302.00083), which searches again every few tokens.
    """

    def __init__(self, base, rows, most):
        """rows: token ids of each stored row. most: tokens of a row that go into a prompt."""
        self.base, self.rows, self.most, self.newline = base, rows, most, base.encode("\n")[1:]
        self.texts = [base.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        self.nearest = BM25(self.texts)

    def front(self, ids):
        """Token ids to put before a window: the nearest row with its own marks, and a newline."""
        query = self.base.tokenizer.decode(ids[:QUERY], skip_special_tokens=True)
        return [*self.rows[self.nearest(query)][:self.most], *self.newline]

    def windows(self, windows):
        """The same windows, with the same entries, each after its row."""
        pairs = [(w, self.front(w.ids)) for w in windows]
        return [Window(w.example, [*front, *w.ids], w.skip + len(front), w.position) for w, front in pairs]

    @staticmethod
    def in_query(windows):
        """Whether each position (P,) belongs to the query of its window."""
        return np.concatenate([np.arange(w.skip, len(w.ids) - 1) < QUERY for w in windows])
