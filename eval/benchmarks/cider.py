"""CIDEr-D (Vedantam et al. 2015): how like a caption is to several reference captions, by tf-idf weighted n-grams.

    g(s) = count of n-gram in s * (log N - log max(1, number of clips whose references hold it))       N clips, n = 1..4
    sim_n(c, r) = sum min(g(c), g(r)) g(r) / (|g(c)| |g(r)|) * exp(-(l(c) - l(r))^2 / (2 * 6^2))        l: bigrams
    CIDEr-D = 10 * mean over references and n of sim_n

As coco-caption computes it (`corpus` document frequencies, those of the references at hand), so that a set of one clip
scores 0. Between 0 and 10; papers write 0.78 or 78. Tokens are like those of the Penn Treebank as coco-caption uses
them, without Java: lower case, contractions split ("it 's", "do n't"), punctuation dropped, hyphenated words whole.

Cost: linear in the tokens.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

ORDERS = (1, 2, 3, 4)
SIGMA = 6.0
TOO_LONG = 250  # bigrams more than the longest reference: exp(-250^2 / 72) is 0 in float64
_WORD = re.compile(r"[^\W_]+(?:[-_.][^\W_]+)*|'(?:s|m|d|re|ve|ll)\b")
_NEGATION = re.compile(r"(?<=[a-z])n't\b")

Grams = Counter[tuple[str, ...]]


@lru_cache(maxsize=65536)
def tokens(caption: str) -> tuple[str, ...]:
    """`It's a dog, barking.` -> it 's a dog barking."""
    text = _NEGATION.sub(" n_t", caption.lower().replace("\u2019", "'"))
    return tuple("n't" if word == "n_t" else word for word in _WORD.findall(text))


def grams(words: Sequence[str]) -> Grams:
    """Counts of all n-grams up to four words."""
    return Counter(tuple(words[i : i + n]) for n in ORDERS for i in range(len(words) - n + 1))


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """The score of each candidate; a clip without references gets 0."""
    told = [[grams(tokens(caption)) for caption in captions] for captions in references]
    clips: Counter[tuple[str, ...]] = Counter(gram for captions in told for gram in set().union(*captions))
    whole = math.log(len(told)) if told else 0.0
    weights = {gram: whole - math.log(count) for gram, count in clips.items()}
    vectors = [[Vector(caption, weights, whole) for caption in captions] for captions in told]
    scores = []
    for candidate, own in zip(candidates, vectors, strict=True):
        words = tokens(candidate)
        if not own or len(words) - max(reference.length for reference in own) > TOO_LONG:
            scores.append(0.0)
            continue
        said = Vector(grams(words), weights, whole)
        scores.append(10 * sum(said.likeness(reference) for reference in own) / len(own))
    return scores


class Vector:
    """The tf-idf vector of one caption, its norm for each n, and its length in bigrams."""

    def __init__(self, counts: Grams, weights: dict[tuple[str, ...], float], unknown: float) -> None:
        self.values = {gram: count * weights.get(gram, unknown) for gram, count in counts.items()}
        self.length = sum(count for gram, count in counts.items() if len(gram) == 2)
        squares = dict.fromkeys(ORDERS, 0.0)
        for gram, value in self.values.items():
            squares[len(gram)] += value**2
        self.norms = {n: math.sqrt(square) for n, square in squares.items()}

    def likeness(self, reference: Vector) -> float:
        products = dict.fromkeys(ORDERS, 0.0)
        for gram, value in self.values.items():
            if gram in reference.values:
                other = reference.values[gram]
                products[len(gram)] += min(value, other) * other
        for n in ORDERS:
            norm = self.norms[n] * reference.norms[n]
            products[n] = products[n] / norm if norm else 0.0
        return (
            sum(products.values()) / len(ORDERS) * math.exp(-((self.length - reference.length) ** 2) / (2 * SIGMA**2))
        )
