"""Near misses: a true statement with one detail changed, so that it is false of the same person.

Four kinds: another number, another tool (the topically nearest name of other people's statements), another place, another order.
A change that the person's own words contain is not made.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from training.auxiliary import Array
from usp_env.models.pairs import names_of, numbers_of

KINDS = ("number", "tool", "place", "order")
PLACES = (
    "Afghanistan Africa America Argentina Australia Austria Bangladesh Belgium Berlin Boston Brazil Britain California "
    "Canada Chicago Chile China Colombia Denmark Dubai Egypt England Europe Finland Florida France Germany Ghana Greece "
    "Hungary India Indonesia Iran Iraq Ireland Israel Istanbul Italy Japan Kenya London Malaysia Mexico Morocco Mumbai "
    "Nepal Netherlands Nigeria Norway Pakistan Paris Peru Philippines Poland Portugal Rome Russia Scotland Singapore Spain "
    "Sweden Switzerland Sydney Taiwan Texas Thailand Tokyo Toronto Turkey UK US USA Ukraine Vietnam Wales Zimbabwe"
).split()
_PLACE = re.compile(rf"\b(?:{'|'.join(PLACES)})\b")
_WORDS = "two three four five six seven eight nine ten twelve fifteen twenty".split()
_NUMBER = re.compile(rf"(?<![\w.])\d+(?:,\d{{3}})*(?![\w.]*\w)|\b(?:{'|'.join(_WORDS)})\b")
_ORDER = (
    ("first", "finally"), ("finally", "first"), ("lastly", "first"), ("last", "first"), ("before", "after"), ("after", "before"),
    ("begin", "finish"), ("start", "end"), ("end", "start"), ("open", "close"), ("earlier", "later"), ("later", "earlier"),
)  # fmt: skip


class NearMiss(NamedTuple):
    """A changed statement and which kind of detail was changed."""

    text: str
    kind: str


def near_misses(fact: str, said: str, names: Sequence[str], vectors: Array, rng: np.random.Generator) -> list[NearMiss]:
    """At most one near miss of each kind.

    Args:
        fact: The true statement.
        said: All that the person said: what stands there is no change for the worse.
        names: Names that other people's statements hold.
        vectors: Their MiniLM vectors, (n, d), norm 1.
        rng: Draws which detail and what it becomes.
    """
    made = {
        "number": _number(fact, said, rng),
        "tool": _tool(fact, said, names, vectors, rng),
        "place": _place(fact, said, rng),
        "order": _order(fact),
    }
    return [NearMiss(text, kind) for kind, text in made.items() if text and text != fact]


def _number(fact: str, said: str, rng: np.random.Generator) -> str | None:
    spans = list(_NUMBER.finditer(fact))
    if not spans:
        return None
    span = spans[int(rng.integers(len(spans)))]
    known = set(numbers_of(said))
    if span[0] in _WORDS:
        options = [w for w in _WORDS if w != span[0] and not set(numbers_of(w)) & known]
    else:
        value = int(span[0].replace(",", ""))
        spread = min(max(3, value // 2), 100)  # a population of 10^9 is changed by little, too
        options = [str(v) for v in range(max(1, value - spread), value + spread + 1) if v != value and str(v) not in known]
    return _replaced(fact, span, options, rng)


def _tool(fact: str, said: str, names: Sequence[str], vectors: Array, rng: np.random.Generator) -> str | None:
    own = [name for name in names_of(fact) if not _PLACE.fullmatch(name) and name in names]
    if not own:
        return None
    name = own[int(rng.integers(len(own)))]
    near = np.argsort(-(vectors @ vectors[list(names).index(name)]))[1:40]
    folded, root = said.casefold(), name.casefold()
    options = [
        names[k]
        for k in near
        if names[k].casefold() not in folded and names[k].casefold() not in root and root not in names[k].casefold()
    ]
    span = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", fact)
    return _replaced(fact, span, options[:8], rng) if span else None


def _place(fact: str, said: str, rng: np.random.Generator) -> str | None:
    spans = list(_PLACE.finditer(fact))
    if not spans:
        return None
    return _replaced(fact, spans[0], [p for p in PLACES if p.casefold() not in said.casefold() and p != spans[0][0]], rng)


def _order(fact: str) -> str | None:
    for word, other in _ORDER:
        changed, n = re.subn(rf"\b{word}\b", other, fact, count=1)
        if n:
            return changed
        changed, n = re.subn(rf"\b{word.capitalize()}\b", other.capitalize(), fact, count=1)
        if n:
            return changed
    return None


def _replaced(fact: str, span: re.Match[str], options: Sequence[str], rng: np.random.Generator) -> str | None:
    return fact[: span.start()] + options[int(rng.integers(len(options)))] + fact[span.end() :] if options else None
