"""Features of a text that need no model: hashed n-grams, rates of what the hand does, content words.

Everything here is a pure function of the text, the same on every machine: hashes are arithmetic on code points, not Python's
`hash`. The sparse result is three plain arrays, so that scoring needs numpy alone.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from usp_env.errors import SpecError

FloatArray = npt.NDArray[np.float64]
MAX_CHARS = 4000  # what a hashed text is cut to: enough for any user turn, and a bound on time

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # Knuth's multiplicative hashing: 2^64 over the golden ratio
_BASE = np.uint64(0x100000001B3)
_SHIFT = np.uint64(40)  # the top 24 bits are the best mixed
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?|[^\w\s]", re.UNICODE)
_ESCAPE = re.compile(r"\\([_*\[\]()#+\-.!`~>|{}])")
_INVISIBLE = re.compile("[\u200b-\u200f\u2060\ufeff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LETTERS = re.compile(r"[^\W\d_]+")

FUNCTION_WORDS = tuple(
    "a about after all also an and any are as at be because been before but by can can't could did do does doesn't don't "
    "dont each for from get give go got had has have he her here his how i i'm if im in into is it it's its just know let "
    "like make may me more most much my no not now of ok okay on one only or other our out over own please pls she should "
    "so some such than thank thanks that the their them then there these they this those to too u up us use very want was "
    "we well were what when where which while who why will with would yes you your sure certainly here's however overall "
    "additionally".split()
)
FUNCTION_INDEX = {word: k for k, word in enumerate(FUNCTION_WORDS)}

OPENER = re.compile(
    r"(?:sure|certainly|of course|absolutely|great|okay|ok|yes|i'm sorry|i apologi[sz]e|sorry|thank you|you're welcome|"
    r"i'd be happy|i can help|here (?:is|are)|here's|let me know|i hope|if you have any|feel free|is there anything)\b",
    re.IGNORECASE,
)
"""How an assistant begins a sentence that only announces, apologises or takes leave."""


class Sparse(NamedTuple):
    """Rows of a sparse matrix in compressed form: row i is `indices[indptr[i]:indptr[i+1]]` with the values beside them."""

    indices: npt.NDArray[np.int64]
    values: FloatArray
    indptr: npt.NDArray[np.int64]

    def dot(self, weights: npt.NDArray[Any]) -> FloatArray:
        """Product with `weights`, (buckets,) or (buckets, d): (n,) or (n, d)."""
        rows = np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))
        flat = weights[self.indices].astype(np.float64)
        if weights.ndim == 1:
            return np.bincount(rows, flat * self.values, minlength=len(self.indptr) - 1).astype(np.float64)
        out = np.zeros((len(self.indptr) - 1, weights.shape[1]))
        filled = np.diff(self.indptr) > 0  # reduceat gives an empty row its neighbour's first value
        if filled.any():
            out[filled] = np.add.reduceat(flat * self.values[:, None], self.indptr[:-1][filled], axis=0)
        return out


def normalise(text: str) -> str:
    r"""A text without what exporters leave behind: markdown escapes, invisible characters, no-break spaces.

    Example:
        >>> normalise("use my\\_var\u200b now ")
        'use my_var now'
    """
    return _ESCAPE.sub(r"\1", _INVISIBLE.sub("", text).replace("\xa0", " ").replace("\r\n", "\n")).strip()


def check_unicode(texts: Sequence[str]) -> None:
    """Refuse what no tokenizer takes.

    Raises:
        SpecError: A text holds a lone surrogate.
    """
    for text in texts:
        if not text.isascii() and (lone := _SURROGATE.search(text)):
            raise SpecError(f"expected valid Unicode, got a text with a lone surrogate at character {lone.start()}")


def words(text: str) -> list[str]:
    """Words and single punctuation marks, in order, case kept.

    Example:
        >>> words("Don't stop, pls!")
        ["Don't", 'stop', ',', 'pls', '!']
    """
    return _WORD.findall(text.replace("’", "'"))


def hashed_words(texts: Sequence[str], buckets: int) -> Sparse:
    """Word 1- and 2-grams in lower case, hashed into `buckets` (a power of two); log(1 + count), rows of norm 1."""
    return _sparse([_word_grams(normalise(text)[:MAX_CHARS].casefold()) for text in texts], buckets)


def hashed_chars(texts: Sequence[str], buckets: int, sizes: Sequence[int] = (1, 2, 3, 4)) -> Sparse:
    """Character n-grams with their case, hashed into `buckets` (a power of two); log(1 + count), rows of norm 1."""
    return _sparse([_char_grams(normalise(text)[:MAX_CHARS], sizes) for text in texts], buckets)


def _sparse(grams: Sequence[npt.NDArray[np.uint64]], buckets: int) -> Sparse:
    if buckets & (buckets - 1):
        raise SpecError(f"expected buckets to be a power of two, got {buckets}")
    rows = [np.unique(_mix(g) & np.uint64(buckets - 1), return_counts=True) for g in grams]
    values = [np.log1p(counts) for _, counts in rows]
    values = [v / np.linalg.norm(v) if len(v) else v for v in values]
    indptr = np.cumsum([0, *(len(v) for v in values)])
    empty = np.zeros(0)
    return Sparse(np.concatenate([empty, *(k for k, _ in rows)]).astype(np.int64), np.concatenate([empty, *values]), indptr)


def _mix(codes: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    return (codes * _MULTIPLIER) >> _SHIFT


@lru_cache(maxsize=200_000)
def _code(word: str) -> int:
    return zlib.crc32(word.encode("utf-8", "surrogatepass"))


def _word_grams(text: str) -> npt.NDArray[np.uint64]:
    codes = np.array([1, *(_code(word) for word in words(text)), 2], np.uint64)  # 1 and 2 mark the ends
    return np.concatenate([codes, codes[:-1] * _BASE + codes[1:] + np.uint64(7)])


def _char_grams(text: str, sizes: Sequence[int]) -> npt.NDArray[np.uint64]:
    codes = np.array([1, *map(ord, text), 2], np.uint64)
    grams, current = [], np.zeros(len(codes), np.uint64)
    for size in range(1, max(sizes) + 1):
        if size > len(codes):
            break
        current = current[: len(codes) - size + 1] * _BASE + codes[size - 1 :]
        if size in sizes:
            grams.append(current + np.uint64(size))
    return np.concatenate(grams)


SURFACE = (
    "first letter small", "ends . ", "ends ?", "ends !", "ends :", "ends without", "no capital", "capitals", "digits",
    "commas", "question marks", "exclamation marks", "colons", "quotes", "brackets", "newlines", "double newline",
    "list marks", "code fence", "backticks", "bold", "small i", "missing apostrophe", "double space", "space before mark",
    "no space after mark", "ellipsis", "ASCII share", "word length", "distinct words", "sentence length", "emoji",
    "all capitals word", "shortened word",
)  # fmt: skip
_CONTRACTION = re.compile(r"\b(?:dont|cant|wont|im|ive|doesnt|didnt|isnt|thats|whats|its a|lets|youre)\b", re.IGNORECASE)
_SHORT = re.compile(r"\b(?:u|ur|pls|plz|thx|ok|btw|idk|lol|wanna|gonna|cuz|info|asap|thnx|hi|hey)\b", re.IGNORECASE)
_LIST = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.MULTILINE)


def surface(texts: Sequence[str]) -> FloatArray:
    """Rates of what the hand does (`SURFACE`) and of function words (`FUNCTION_WORDS`): (n, 34 + number of words).

    No entry is the length itself, and every count is divided by it or capped.
    """
    return np.array([_surface(normalise(text)[:MAX_CHARS]) for text in texts]).reshape(len(texts), surface_size())


def surface_size() -> int:
    """Number of columns of `surface`."""
    return len(SURFACE) + len(FUNCTION_WORDS)


def _surface(text: str) -> list[float]:
    chars, tokens = max(len(text), 1), words(text)
    alpha = [token for token in tokens if token[0].isalnum()]
    n = max(len(alpha), 1)
    letters = sum(char.isalpha() for char in text)
    first = next((char for char in text if char.isalpha()), "A")
    last = text[-1:] or " "
    sentences = max(len(re.findall(r"[.!?]+(?:\s|$)", text)), 1)
    rate = {mark: text.count(mark) / n for mark in ",?!:"}
    hand = [
        first.islower(), last == ".", last == "?", last == "!", last == ":", last.isalnum(), not any(c.isupper() for c in text),
        sum(char.isupper() for char in text) / max(letters, 1), sum(char.isdigit() for char in text) / chars, rate[","],
        rate["?"], rate["!"], rate[":"], sum(text.count(q) for q in "\"'“”") / n, sum(text.count(b) for b in "()[]{}<>") / n,
        text.count("\n") / n, "\n\n" in text, len(_LIST.findall(text)) / n * 5, "```" in text, text.count("`") / n, "**" in text,
        bool(re.search(r"\bi\b", text)), bool(_CONTRACTION.search(text)), bool(re.search(r"[a-z]  +[a-z]", text, re.IGNORECASE)),
        bool(re.search(r"\w [,.?!](?:\s|$)", text)), bool(re.search(r"[a-z][,.?!][A-Za-z]", text)), "..." in text or "…" in text,
        sum(ord(char) < 128 for char in text) / chars, min(sum(map(len, alpha)) / n, 12) / 6,
        len({t.casefold() for t in alpha}) / n, min(n / sentences, 60) / 20, any(ord(char) > 0x1F000 for char in text),
        any(t.isupper() and len(t) > 2 for t in alpha), bool(_SHORT.search(text)),
    ]  # fmt: skip
    counts = [0.0] * len(FUNCTION_WORDS)
    for token in tokens:
        k = FUNCTION_INDEX.get(token.casefold())
        if k is not None:
            counts[k] += 1 / n
    return [*map(float, hand), *(min(5 * c, 1.0) for c in counts)]


_ASKS = r"(?:what|how|why|when|where|who|which|whose|is|are|was|were|do|does|did|can|could|would|will|should|has|have|am)\b"
_BIDS = (
    r"(?:write|make|give|create|explain|list|add|tell|show|generate|provide|describe|continue|rewrite|use|change|summari[sz]e|act|"
    r"find|let|go|turn|convert|translate|answer|help|suggest|now|expand|include|remove|keep|try|compare|come|draft|design)\b"
)
HABITS = {
    "asks first": rf"\A\W*{_ASKS}",
    "bids first": rf"\A\W*{_BIDS}",
    "greets first": r"\A\W*(?:hi|hello|hey|dear|good (?:morning|evening|day))\b",
    "acknowledges first": r"\A\W*(?:next|ok(?:ay)?|great|good|thanks|thank you|yes|no|nice|perfect|cool|sure|alright)\b",
    "joins on": r"\A\W*(?:and|but|so|or|also|then|because)\b",
    "question unmarked": rf"\A\W*{_ASKS}[^?]*\Z",
    "can you": r"\b(?:can|could|would|will) (?:you|u|we|i)\b",
    "please": r"\bplease\b",
    "please first": r"\A\W*please\b",
    "please last": r"\bplease\W*\Z",
    "thanks": r"\b(?:thanks?|thank you|thx|ty|appreciate)\b",
    "sorry": r"\b(?:sorry|excuse|mind)\b",
    "chat words": r"\b(?:pls|plz|u|ur|thx|btw|idk|lol|cuz|asap|imo|fyi)\b",
    "interjections": r"\b(?:wanna|gonna|gotta|kinda|lemme|yeah|yep|nope|hmm+|oh|wow|cool|awesome|great|nice|perfect|good)\b",
    "ok": r"\bok(?:ay)?\b",
    "hedges": r"\b(?:actually|really|basically|just|maybe|perhaps|probably|still|even|also|already|instead|rather|quite)\b",
    "i want": r"\b(?:i want|i need|i would like|i'd like|i wish|i have|i am|i'm)\b",
    "must": r"\b(?:should|must|need to|have to|has to)\b",
    "etc": r"\b(?:etc|e\.g|i\.e|eg|ie|vs)\b",
    "me": r"\b(?:my|me|mine|i)\b",
    "we": r"\b(?:we|our|us)\b",
    "you": r"\b(?:you|your)\b",
    "this": r"\b(?:above|below|following|previous|this|that)\b",
    "contracted": r"\w['’](?:t|s|m|re|ve|ll|d)\b",
    "expanded": r"\b(?:do not|does not|did not|is not|are not|can ?not|it is|that is|i am|i have|i will|you are|what is|let us|"
    r"would not|should not)\b",
    "British": r"\w(?:isation|ise|ised|our|ours|ising)\b",
    "numbers as words": r"\b(?:one|two|three|four|five|six|seven|eight|nine|ten)\b",
    "small numbers": r"\b\d\b",
    "no vowel": r"\b[b-df-hj-np-tv-xz]{2,}\b",
    "letter thrice": r"([a-z])\1\1",
    "long words": r"\b\w{9,}",
    "short words": r"\b\w{1,3}\b",
    "small i": r"(?-i:\bi\b)",
    "capital I": r"(?-i:\bI\b)",
    "small sentence": r"(?-i:(?:[.!?]\s+|\n\s*)[a-z])",
    "capital sentence": r"(?-i:(?:[.!?]\s+|\n\s*)[A-Z])",
    "capital within": r"(?-i:[a-z,] [A-Z][a-z]+)",
    "curly quotes": "[’‘“”]",
    "straight apostrophe": r"\w'\w",
    "double quotes": '"',
    "single quotes": r"(?<!\w)'|'(?!\w)",
    "long dash": "[–—]",
    "spaced dash": " - ",
    "hyphen": r"\w-\w",
    "serial comma": r"\w, and\b",
    "comma without space": r",\w",
    "marks doubled": r"[?!]{2,}",
    "line without mark": r"\w[ \t]*$",
    "line with mark": r"[.!?][ \t]*$",
    "blank line": r"\n[ \t]*\n",
    "tab": "\t",
    "space at the end": r" \Z",
    "newline at the end": r"\n\s*\Z",
    "space at the start": r"\A\s",
    **{mark: re.escape(mark) for mark in ";/&+=%#_<{("},
}
"""Regular expressions, case aside unless they say so, of what one writer does and another does not."""
_HABITS = [re.compile(pattern, re.IGNORECASE | re.MULTILINE) for pattern in HABITS.values()]


def habits(texts: Sequence[str]) -> FloatArray:
    """Whether each of `HABITS` occurs, how often a word, and the shape of lines and sentences: (n, 2 · number of habits + 5).

    Example:
        >>> row = dict(zip(HABITS, habits(["can u fix it ,pls "])[0]))
        >>> [name for name in ("can you", "chat words", "comma without space", "space at the end", "please") if row[name]]
        ['can you', 'chat words', 'comma without space', 'space at the end']
    """
    return np.array([_habits(text.replace("\r\n", "\n")[:MAX_CHARS]) for text in texts]).reshape(len(texts), 2 * len(HABITS) + 5)


def _habits(text: str) -> list[float]:
    counts = np.array([sum(1 for _ in pattern.finditer(text)) for pattern in _HABITS], float)
    tokens = [len(token) for token in _LETTERS.findall(text)] or [0]
    lines = max(sum(bool(line.strip()) for line in text.split("\n")), 1)
    sentences = [len(part.split()) for part in re.split(r"[.!?]+\s+|\n+", text) if part.strip()] or [0]
    shape = [
        np.log1p(lines),
        np.log1p(len(sentences)),
        np.log1p(len(tokens) / lines),
        np.std(tokens) / 3,
        np.log1p(np.std(sentences)),
    ]
    return [*(counts > 0).astype(float), *np.minimum(10 * counts / len(tokens), 1), *map(float, shape)]
