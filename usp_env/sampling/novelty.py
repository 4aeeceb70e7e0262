"""The novelty pool of RLCC: virtual profiles unlike anyone in the bank (paper appendix B.1).

Every OF of a sample is paired with every SC of it, and the pairs least similar to the bank are kept. The similarity is the
reward's own, ½ [cos OF + cos SC], so a pair's similarity to its nearest person is a max-plus product of two cosine matrices:

    S[i, j] = max_k ½ (A[i, k] + B[j, k])

It is exact and embeds no pair's text. The cosines are made in blocks of the bank and never held whole. numba computes it on
the CPU (numpy where numba is missing, some ten times slower), torch on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from usp_env.errors import SpecError, require
from usp_env.profiles import Profile, combine
from usp_env.sampling.density import DensitySampler, _checked
from usp_env.sampling.kde import FloatArray

IntArray = npt.NDArray[np.integer[Any]]
Float32Array = npt.NDArray[np.float32]
Block = tuple[Float32Array, Float32Array]  # (Kb, m) and (Kb, n)

BLOCK = 2048  # bank profiles per product: below 1,024 the threads of BLAS wait for each other
CACHED = 256  # bank profiles that the compiled loop stays at: 1 MB for 1,000 SCs, in a core's second-level cache
UNROLL = 8  # bank profiles per pass of that loop
TILE = 64  # OFs per task
TORCH_CELLS = 2**26  # sums held at once on the device: 256 MB
NORM_TOLERANCE = 2e-3  # rows kept in half precision are off by some 5e-4


class NoveltyPool(NamedTuple):
    """The chosen pairs, least similar to the bank first.

    Args:
        pairs: (size, 2) int64: row of `objective`, row of `subjective`.
        similarity: (size,) float32, in [-1, 1]: to the nearest person of the bank.
    """

    pairs: npt.NDArray[np.int64]
    similarity: Float32Array


def novelty(A: FloatArray, B: FloatArray, exclude: tuple[IntArray, IntArray] | None = None, device: str = "auto") -> Float32Array:
    """Similarity (m, n) of each pair to its nearest profile of the bank: max over k of ½ (A[i, k] + B[j, k]).

    Args:
        A: (m, K) cosine of OF i with the OF of bank profile k.
        B: (n, K) cosine of SC j with the SC of bank profile k.
        exclude: Bank indices (m,) of the OF donors and (n,) of the SC donors: a pair's two donors are left out of its maximum.
        device: `"auto"` (a GPU where torch sees one), `"cpu"`, or a torch device such as `"cuda:1"`.

    Raises:
        SpecError: Shapes do not match, a number is not finite, an index is not one of the bank, or the device is not there.

    Example:
        >>> A, B = np.array([[0.2, 0.8, 0.4]]), np.array([[0.6, 0.2, 0.0]])
        >>> novelty(A, B, device="cpu"), novelty(A, B, exclude=(np.array([1]), np.array([0])), device="cpu")
        (array([[0.5]], dtype=float32), array([[0.2]], dtype=float32))
    """
    A, B = np.asarray(A), np.asarray(B)
    if A.ndim != 2 or B.ndim != 2 or A.shape[1] != B.shape[1] or not A.shape[1]:
        raise SpecError(f"expected A (m, K) and B (n, K) over one bank of K >= 1 profiles, got {A.shape} and {B.shape}")
    if not (np.isfinite(A).all() and np.isfinite(B).all()):
        raise SpecError("expected finite cosines in A and B, got NaN or infinity")
    bank_size = A.shape[1]
    parents = None if exclude is None else _parents(exclude, (len(A), len(B)), bank_size)

    def cosines(rows: IntArray) -> Block:
        return A[:, rows].T.astype(np.float32, order="C"), B[:, rows].T.astype(np.float32, order="C")

    return _max_plus(_blocks(cosines, bank_size, parents), len(A), len(B), device)


def novelty_pool(
    objective: FloatArray,
    subjective: FloatArray,
    bank_objective: FloatArray,
    bank_subjective: FloatArray,
    objective_parents: IntArray,
    subjective_parents: IntArray,
    size: int = 5000,
    max_per_parent: int | None = 25,
    include_parents: bool = False,
    device: str = "auto",
) -> NoveltyPool:
    """The `size` pairs of an OF and an SC that are least similar to the bank.

    Pairs are taken in ascending similarity (equal ones by (i, j)) while both parents have been used fewer than
    `max_per_parent` times; pairs whose two parents are one person are left out. Embeddings are unit vectors, one a row.

    Args:
        objective: (m, d) of the sampled OFs.
        subjective: (n, d) of the sampled SCs.
        bank_objective: (K, d) of everyone's OF.
        bank_subjective: (K, d) of everyone's SC.
        objective_parents: (m,) bank index of each OF's donor.
        subjective_parents: (n,) bank index of each SC's donor.
        size: Pairs wanted.
        max_per_parent: How often one person may give the OF, and how often the SC. None: no limit; a few SCs then fill the pool.
        include_parents: Compare with the two parents too, as the paper's words say: nearly always one is the nearest.
        device: See `novelty`.

    Raises:
        SpecError: Wrong shapes, rows that are not of norm 1, indices outside the bank, or fewer pairs than `size`.

    Example:
        >>> bank, two = np.eye(4), np.array([0, 1])
        >>> pool = novelty_pool(bank[two], bank[two], bank, bank, two, two, size=2, device="cpu")
        >>> pool.pairs.tolist(), pool.similarity.tolist()
        ([[0, 1], [1, 0]], [0.0, 0.0])
    """
    if not _is_positive(size) or (max_per_parent is not None and not _is_positive(max_per_parent)):
        raise SpecError(f"expected whole numbers of at least 1 for size and max_per_parent, got {size} and {max_per_parent}")
    objective, bank_objective = _embeddings("objective", objective, bank_objective)
    subjective, bank_subjective = _embeddings("subjective", subjective, bank_subjective)
    bank_size = len(bank_objective)
    if len(bank_subjective) != bank_size:
        raise SpecError(f"expected the OF and the SC of one bank, got {bank_size} and {len(bank_subjective)} rows")
    parents = _parents((objective_parents, subjective_parents), (len(objective), len(subjective)), bank_size)
    ofs, scs = (np.ascontiguousarray(x.T, dtype=np.float32) for x in (objective, subjective))

    def cosines(rows: IntArray) -> Block:
        return bank_objective[rows].astype(np.float32) @ ofs, bank_subjective[rows].astype(np.float32) @ scs

    blocks = _blocks(cosines, bank_size, None if include_parents else parents)
    return _pick(_max_plus(blocks, len(objective), len(subjective), device), *parents, size, max_per_parent)


def build_pool(
    sampler: DensitySampler,
    rng: np.random.Generator,
    n: int = 1000,
    size: int = 5000,
    max_per_parent: int | None = 25,
    include_parents: bool = False,
    embedder: Callable[[list[str]], Any] | None = None,
    device: str = "auto",
) -> list[Profile]:
    """Virtual profiles for RLCC, least similar to the sampler's bank first.

    `n` profiles are drawn by density; someone drawn twice counts once. A fitted sampler holds embeddings of whole profiles
    only, so every OF and every SC of its bank is embedded here.

    Args:
        sampler: A fitted sampler.
        rng: Source of the draws.
        n: Profiles drawn.
        size: See `novelty_pool`, as for `max_per_parent`, `include_parents` and `device`.
        max_per_parent: See there.
        include_parents: See there.
        embedder: `list[str] -> (n, d)`; the sampler's own by default.
        device: See there.

    Raises:
        SpecError: Fewer than `size` pairs, or the embedder returns something else than (n, d) finite numbers.
        MissingAssetError: The sampler's embedder has not been fetched.
    """
    if not _is_positive(n):
        raise SpecError(f"expected a whole number of at least 1 for n, got {n!r}")
    bank = sampler.bank
    places = {profile.id: k for k, profile in enumerate(bank)}
    drawn = np.unique([places[profile.id] for profile in sampler.sample(n, "density", rng)])
    embed = embedder or sampler._embed
    ofs = _unit(embed([profile.objective for profile in bank]), len(bank))
    scs = _unit(embed([profile.subjective for profile in bank]), len(bank))
    pool = novelty_pool(ofs[drawn], scs[drawn], ofs, scs, drawn, drawn, size, max_per_parent, include_parents, device)
    return [combine(bank[int(drawn[i])], bank[int(drawn[j])]) for i, j in pool.pairs]


def _is_positive(number: object) -> bool:
    return isinstance(number, int | np.integer) and bool(number >= 1)


def _unit(embeddings: Any, n: int) -> FloatArray:
    vectors = _checked(embeddings, n)
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))


def _embeddings(name: str, sampled: FloatArray, bank: FloatArray) -> tuple[FloatArray, FloatArray]:
    sampled, bank = np.asarray(sampled), np.asarray(bank)
    if sampled.ndim != 2 or bank.ndim != 2 or sampled.shape[1] != bank.shape[1]:
        raise SpecError(f"expected {name} embeddings (m, d) and bank_{name} (K, d), got {sampled.shape} and {bank.shape}")
    for rows in (sampled, bank):
        norms = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
        if not (np.abs(norms - 1) <= NORM_TOLERANCE).all():
            raise SpecError(
                f"expected {name} embeddings whose rows have norm 1, got norms from {norms.min():.4g} to {norms.max():.4g}: "
                "divide each row by its norm"
            )
    return sampled, bank


def _parents(parents: tuple[IntArray, IntArray], counts: tuple[int, int], bank_size: int) -> tuple[IntArray, IntArray]:
    if bank_size < 3:
        raise SpecError(f"expected a bank of at least 3 profiles, since a pair has 2 of them as parents, got {bank_size}")
    of, sc = (np.asarray(indices) for indices in parents)
    for indices, n in zip((of, sc), counts, strict=True):
        if indices.shape != (n,) or not np.issubdtype(indices.dtype, np.integer):
            raise SpecError(f"expected the bank indices of {n} parents, got {indices.dtype} of shape {indices.shape}")
        if n and not (0 <= indices.min() and indices.max() < bank_size):
            raise SpecError(f"expected indices of a bank of {bank_size} profiles, got {indices.min()} to {indices.max()}")
    return of, sc


def _blocks(cosines: Callable[[IntArray], Block], bank_size: int, parents: tuple[IntArray, IntArray] | None) -> Iterator[Block]:
    """Cosines by the block of bank rows, -inf between half a profile and its own donor.

    Such a sum is -inf whatever the other half, so both donors drop out of every maximum. The last block is filled up to
    whole passes with the last row: a repeated profile changes no maximum.
    """
    end = -(-bank_size // UNROLL) * UNROLL
    for start in range(0, end, BLOCK):
        rows = np.minimum(np.arange(start, min(start + BLOCK, end)), bank_size - 1)
        block = cosines(rows)
        if parents is not None:
            for half, donors in zip(block, parents, strict=True):
                half[rows[:, None] == donors] = -np.inf
        yield block


def _max_plus(blocks: Iterable[Block], m: int, n: int, device: str) -> Float32Array:
    """½ of the max over bank profiles k of a[k, i] + b[k, j], in blocks of k."""
    chosen = _device(device)
    if chosen != "cpu":
        best = _max_plus_torch(blocks, m, n, chosen)
    elif (kernel := _compiled()) is None:
        best = _max_plus_numpy(blocks, m, n)
    else:
        best = _max_plus_numba(blocks, m, n, kernel)
    best *= 0.5
    return best


def _device(device: str) -> str:
    if device == "auto":
        has_torch = importlib.util.find_spec("torch") is not None
        return "cuda" if has_torch and require("torch", "hf").cuda.is_available() else "cpu"
    if device == "cpu":
        return device
    try:
        require("torch", "hf").empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # torch asserts that it was built for the device
        raise SpecError(f"expected 'auto', 'cpu' or a torch device of this machine, got device={device!r}: {error}") from error
    return device


def _max_plus_numpy(blocks: Iterable[Block], m: int, n: int) -> Float32Array:
    best = np.full((m, n), -np.inf, np.float32)
    buffer = np.empty((TILE, n), np.float32)
    for a, b in blocks:
        for start in range(0, m, TILE):
            part = best[start : start + TILE]
            sums = buffer[: len(part)]
            for a_k, b_k in zip(a[:, start : start + TILE, None], b, strict=True):
                np.add(a_k, b_k, out=sums)
                np.maximum(part, sums, out=part)
    return best


def _max_plus_torch(blocks: Iterable[Block], m: int, n: int, device: str) -> Float32Array:
    torch = require("torch", "hf")
    best = torch.full((m, n), -torch.inf, device=device)
    for block in blocks:
        a, b = (torch.from_numpy(x).to(device) for x in block)
        step = max(1, TORCH_CELLS // max(1, b.numel()))
        for start in range(0, m, step):
            part = best[start : start + step]
            torch.maximum(part, (a[:, start : start + step, None] + b[:, None]).amax(0), out=part)
    return np.asarray(best.cpu().numpy())


def _max_plus_numba(blocks: Iterable[Block], m: int, n: int, kernel: Callable[..., None]) -> Float32Array:
    best = np.full((m, n), -np.inf, np.float32)
    # Python threads around a loop without the GIL: numba's own threads may not be entered by two callers at once.
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        for a, b in blocks:
            for done in [executor.submit(kernel, a, b, best, start, min(start + TILE, m)) for start in range(0, m, TILE)]:
                done.result()
    return best


@cache
def _compiled() -> Callable[..., None] | None:
    """The kernel, compiled once a process (half a second); None without numba."""
    if importlib.util.find_spec("numba") is None:
        return None
    import numba

    compiled: Callable[..., None] = numba.njit(nogil=True)(_kernel)
    return compiled


def _kernel(a: Float32Array, b: Float32Array, best: Float32Array, start: int, stop: int) -> None:
    """Rows `start` to `stop` of `best`. Eight bank profiles a pass: one load and store of `best` serves eight sums."""
    for first in range(0, len(b), CACHED):
        for i in range(start, stop):
            c = best[i]
            for k in range(first, min(first + CACHED, len(b)), UNROLL):
                b0, b1, b2, b3, b4, b5, b6, b7 = b[k], b[k + 1], b[k + 2], b[k + 3], b[k + 4], b[k + 5], b[k + 6], b[k + 7]
                a0, a1, a2, a3 = a[k, i], a[k + 1, i], a[k + 2, i], a[k + 3, i]
                a4, a5, a6, a7 = a[k + 4, i], a[k + 5, i], a[k + 6, i], a[k + 7, i]
                for j in range(len(c)):
                    low = max(max(a0 + b0[j], a1 + b1[j]), max(a2 + b2[j], a3 + b3[j]))
                    high = max(max(a4 + b4[j], a5 + b5[j]), max(a6 + b6[j], a7 + b7[j]))
                    c[j] = max(c[j], max(low, high))


def _pick(
    similarity: Float32Array, objective_parents: IntArray, subjective_parents: IntArray, size: int, max_per_parent: int | None
) -> NoveltyPool:
    order = np.argsort(similarity, axis=None, kind="stable")  # stable: equal ones stay in the order of (i, j)
    rows, columns = np.unravel_index(order, similarity.shape)
    two = objective_parents[rows] != subjective_parents[columns]
    limit = size if max_per_parent is None else max_per_parent
    given: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
    chosen: list[tuple[int, int]] = []
    for i, j in zip(rows[two], columns[two], strict=True):
        if len(chosen) == size:
            break
        of, sc = objective_parents[i], subjective_parents[j]
        if given[0][of] < limit and given[1][sc] < limit:
            given[0][of] += 1
            given[1][sc] += 1
            chosen.append((i, j))
    if len(chosen) < size:
        raise SpecError(
            f"expected {size} pairs, but {similarity.shape[0]} OFs and {similarity.shape[1]} SCs give {len(chosen)} with "
            f"max_per_parent={max_per_parent}: draw more profiles, ask for fewer pairs or raise the limit"
        )
    pairs = np.array(chosen, np.int64)
    return NoveltyPool(pairs, similarity[pairs[:, 0], pairs[:, 1]])
