import itertools
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from usp_env.errors import SpecError
from usp_env.profiles import Profile, ProfileBank
from usp_env.sampling import DensitySampler
from usp_env.sampling import novelty as module
from usp_env.sampling.novelty import build_pool, novelty, novelty_pool


@pytest.fixture(params=["numba", "numpy", "torch", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Each way to compute it, as a device: `cpu:0` is torch's name for the processor."""
    module._compiled.cache_clear()
    monkeypatch.setattr(module, "TORCH_CELLS", 200)  # so that small cases too take several steps
    if request.param == "numpy":
        monkeypatch.setitem(sys.modules, "numba", None)
        assert module._compiled() is None
    elif request.param == "numba":
        pytest.importorskip("numba")
    elif request.param == "cuda":
        if not pytest.importorskip("torch").cuda.is_available():
            pytest.skip("needs a GPU")
    else:
        pytest.importorskip("torch")
    yield {"numpy": "cpu", "numba": "cpu", "torch": "cpu:0", "cuda": "cuda"}[request.param]
    module._compiled.cache_clear()


def brute_force(A, B, parents):
    """The definition, one entry after the other."""
    out = np.empty((len(A), len(B)), np.float32)
    for i, j in itertools.product(range(len(A)), range(len(B))):
        others = np.setdiff1d(np.arange(A.shape[1]), [] if parents is None else [parents[0][i], parents[1][j]])
        out[i, j] = max(0.5 * (A[i, k] + B[j, k]) for k in others)
    return out


def greedy(similarity, parents, size, limit):
    """All pairs in order of (similarity, i, j), each taken when both its parents are still free."""
    pairs = sorted((float(s), i, j) for (i, j), s in np.ndenumerate(similarity) if parents[0][i] != parents[1][j])
    taken = []
    for _, i, j in pairs:
        ofs, scs = [parents[0][p] for p, _ in taken], [parents[1][q] for _, q in taken]
        if len(taken) < size and (limit is None or max(ofs.count(parents[0][i]), scs.count(parents[1][j])) < limit):
            taken.append((i, j))
    return taken


def coarse(rng, n):
    """Unit vectors (n, 4) of ±1/2: every product is exact in float32, and many are equal."""
    return rng.choice(np.array([-0.5, 0.5], np.float32), (n, 4))


def test_hand_computed(device):
    # OF 0 and SC 0 come from profile 0, OF 1 and SC 1 from profile 1; the bank has three.
    A = np.array([[1.0, 0.5, -0.5], [0.5, 1.0, 0.25]])
    B = np.array([[1.0, -0.5, 0.0], [0.25, 1.0, 0.5]])
    # All three: (0,0) max(1, 0, -.25); (0,1) max(.625, .75, 0); (1,0) max(.75, .25, .125); (1,1) max(.375, 1, .375).
    np.testing.assert_array_equal(novelty(A, B, device=device), [[1.0, 0.75], [0.75, 1.0]])
    # Without the parents: (0,0) max(0, -.25), (0,1) -.5 + .5, (1,0) .25 + 0, (1,1) max(.375, .375); each halved above.
    own = np.array([0, 1])
    np.testing.assert_array_equal(novelty(A, B, (own, own), device), [[0.0, 0.0], [0.125, 0.375]])


@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize(("m", "n", "bank"), [(2, 5, 3), (3, 2, 8), (4, 3, 9), (67, 3, 41), (3, 4, 2051)])
def test_equals_brute_force(device, m, n, bank, excluded):
    rng = np.random.default_rng(m)
    A, B = rng.uniform(-1, 1, (m, bank)).astype(np.float32), rng.uniform(-1, 1, (n, bank)).astype(np.float32)
    parents = (rng.integers(bank, size=m), rng.integers(bank, size=n)) if excluded else None
    if parents:  # the parents would be the maximum; the last profile is the one repeated to fill a pass
        parents[0][0], parents[1][0] = bank - 1, 0
        A[np.arange(m), parents[0]] = B[np.arange(n), parents[1]] = 1
    before = A.copy(), B.copy()
    np.testing.assert_array_equal(novelty(A, B, parents, device), brute_force(A, B, parents))
    np.testing.assert_array_equal(A, before[0])
    np.testing.assert_array_equal(B, before[1])


@pytest.mark.parametrize("limit", [None, 1, 3])
@pytest.mark.parametrize("include_parents", [False, True])
def test_pool_equals_brute_force(device, include_parents, limit):
    rng = np.random.default_rng(0)
    bank = coarse(rng, 30), coarse(rng, 30)
    parents = rng.permutation(30)[:12], rng.permutation(30)[:9]
    objective, subjective = bank[0][parents[0]], bank[1][parents[1]]
    pool = novelty_pool(objective, subjective, *bank, *parents, 8, limit, include_parents, device)
    similarity = brute_force(objective @ bank[0].T, subjective @ bank[1].T, None if include_parents else parents)
    expected = greedy(similarity, parents, 8, limit)
    assert [tuple(pair) for pair in pool.pairs] == expected
    np.testing.assert_array_equal(pool.similarity, [similarity[pair] for pair in expected])
    assert (pool.pairs.dtype, pool.pairs.shape, pool.similarity.dtype) == (np.int64, (8, 2), np.float32)
    if limit:
        assert max(Counter(pool.pairs[:, 0]).most_common(1)[0][1], Counter(pool.pairs[:, 1]).most_common(1)[0][1]) <= limit


def test_pool_of_random_embeddings(device):
    rng = np.random.default_rng(1)
    bank = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.standard_normal((2, 300, 16))]
    parents = np.arange(80), np.arange(40, 120)
    ofs, scs = bank[0][parents[0]], bank[1][parents[1]]
    pool = novelty_pool(ofs, scs, *bank, *parents, size=6000, max_per_parent=None, device=device)
    similarity = brute_force(ofs @ bank[0].T, scs @ bank[1].T, parents)
    np.testing.assert_allclose(pool.similarity, similarity[tuple(pool.pairs.T)], atol=1e-6)
    assert (np.diff(pool.similarity) >= 0).all()
    assert len({tuple(pair) for pair in pool.pairs}) == 6000


def test_half_precision_is_accepted(device):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((50, 384))
    bank = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    pool = novelty_pool(bank[:9], bank[:9], bank, bank, np.arange(9), np.arange(9), size=20, device=device)
    wide = bank.astype(np.float32)
    expected = brute_force(wide[:9] @ wide.T, wide[:9] @ wide.T, (np.arange(9), np.arange(9)))
    np.testing.assert_allclose(pool.similarity, expected[tuple(pool.pairs.T)], atol=1e-6)


def test_one_person_is_no_pair_and_shares_one_limit():
    rng = np.random.default_rng(3)
    bank = coarse(rng, 10), coarse(rng, 10)
    ofs, scs = np.array([4, 4, 4, 5]), np.array([4, 5, 6, 7])
    pool = novelty_pool(bank[0][ofs], bank[1][scs], *bank, ofs, scs, size=4, max_per_parent=2, device="cpu")
    assert Counter(ofs[pool.pairs[:, 0]]) == {4: 2, 5: 2}  # rows 0, 1 and 2 are the same person
    assert (ofs[pool.pairs[:, 0]] != scs[pool.pairs[:, 1]]).all()
    with pytest.raises(SpecError, match="expected 5 pairs, but 4 OFs and 4 SCs give 4 with max_per_parent=2"):
        novelty_pool(bank[0][ofs], bank[1][scs], *bank, ofs, scs, size=5, max_per_parent=2, device="cpu")
    with pytest.raises(SpecError, match="expected 13 pairs, .* give 12 with"):  # 16 less (4, 4) three times and (5, 5)
        novelty_pool(bank[0][ofs], bank[1][scs], *bank, ofs, scs, size=13, max_per_parent=None, device="cpu")


def test_two_callers_at_once():
    rng = np.random.default_rng(4)
    A, B = rng.uniform(-1, 1, (200, 3000)), rng.uniform(-1, 1, (100, 3000))
    with ThreadPoolExecutor(4) as executor:
        results = list(executor.map(lambda _: novelty(A, B, device="cpu"), range(8)))
    for result in results:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize(
    ("A", "B", "exclude", "message"),
    [
        (np.zeros((2, 4)), np.zeros((2, 5)), None, r"one bank of K >= 1 profiles, got \(2, 4\) and \(2, 5\)"),
        (np.zeros(4), np.zeros((2, 4)), None, r"got \(4,\) and"),
        (np.zeros((2, 0)), np.zeros((2, 0)), None, "K >= 1"),
        (np.full((1, 4), np.nan), np.zeros((1, 4)), None, "got NaN or infinity"),
        (np.zeros((1, 4)), np.full((1, 4), np.inf), None, "got NaN or infinity"),
        (np.zeros((1, 2)), np.zeros((1, 2)), ([0], [1]), "at least 3 profiles, .* got 2"),
        (np.zeros((1, 4)), np.zeros((1, 4)), ([0, 1], [1]), r"of 1 parents, got int64 of shape \(2,\)"),
        (np.zeros((1, 4)), np.zeros((1, 4)), ([0], [1.0]), "of 1 parents, got float64"),
        (np.zeros((1, 4)), np.zeros((1, 4)), ([4], [1]), "a bank of 4 profiles, got 4 to 4"),
        (np.zeros((1, 4)), np.zeros((1, 4)), ([0], [-1]), "a bank of 4 profiles, got -1 to -1"),
    ],
)
def test_wrong_cosines_are_refused(A, B, exclude, message):
    with pytest.raises(SpecError, match=message):
        novelty(A, B, exclude and tuple(np.array(parents) for parents in exclude), "cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": np.eye(4)[:2, :3]}, r"expected objective embeddings \(m, d\) and bank_objective \(K, d\), got \(2, 3\)"),
        ({"subjective": np.eye(4)[0]}, r"expected subjective embeddings .* got \(4,\)"),
        ({"bank_subjective": np.eye(4)[:3]}, "the SC of one bank, got 4 and 3 rows"),
        ({"bank_objective": 2 * np.eye(4)}, "norm 1, got norms from 2 to 2"),
        ({"subjective": np.zeros((2, 4))}, "norm 1, got norms from 0 to 0"),
        ({"objective": np.full((2, 4), np.nan)}, "norm 1, got norms from nan"),
        ({"objective_parents": np.array([0])}, "of 2 parents, got int64"),
        ({"subjective_parents": np.array([0, 4])}, "a bank of 4 profiles, got 0 to 4"),
        ({"size": 0}, "at least 1 for size and max_per_parent, got 0 and 25"),
        ({"max_per_parent": 0}, "at least 1 for size and max_per_parent, got 2 and 0"),
        ({"device": "abacus"}, "a torch device of this machine, got device='abacus'"),
    ],
)
def test_wrong_embeddings_are_refused(changes, message):
    pytest.importorskip("torch")
    two, bank = np.arange(2), np.eye(4)
    good = {
        "objective": bank[:2],
        "subjective": bank[:2],
        "bank_objective": bank,
        "bank_subjective": bank,
        "objective_parents": two,
        "subjective_parents": two,
        "size": 2,
        "device": "cpu",
    }
    assert len(novelty_pool(**good).pairs) == 2
    with pytest.raises(SpecError, match=message):
        novelty_pool(**good | changes)


@pytest.fixture
def small(embed):
    """Twenty people; fewer than UMAP needs. The embedder gives vectors of any length."""
    people = [Profile(f"p{i}", f"You {'sail' if i % 4 == 0 else 'cook'} {i}.", f"You write {i}.") for i in range(20)]
    with pytest.warns(UserWarning, match="too few for UMAP"):
        return DensitySampler(embedder=lambda texts: 3 * embed(texts)).fit(ProfileBank(people))


def test_build_pool(small, embed):
    pool = build_pool(small, np.random.default_rng(0), n=30, size=40, max_per_parent=5)
    drawn = sorted({int(p.id[1:]) for p in small.sample(30, "density", np.random.default_rng(0))})
    assert len(drawn) < 20  # so that the rows of the sample are not those of the bank
    ofs, scs = embed([p.objective for p in small.bank]), embed([p.subjective for p in small.bank])
    similarity = brute_force(ofs[drawn] @ ofs.T, scs[drawn] @ scs.T, (np.array(drawn), np.array(drawn)))
    expected = [(drawn[i], drawn[j]) for i, j in greedy(similarity, (drawn, drawn), 40, 5)]
    assert [p.id for p in pool] == [f"virtual:p{i}+p{j}" for i, j in expected]
    assert [(p.objective, p.subjective) for p in pool] == [
        (small.bank[i].objective, small.bank[j].subjective) for i, j in expected
    ]


def test_build_pool_takes_another_embedder(small):
    asked = []

    def embedder(texts):
        asked.append(texts)
        return np.eye(20)

    pool = build_pool(small, np.random.default_rng(0), n=30, size=3, embedder=embedder, device="cpu")
    assert asked == [[p.objective for p in small.bank], [p.subjective for p in small.bank]]
    drawn = sorted(int(p.id[1:]) for p in {p.id: p for p in small.sample(30, "density", np.random.default_rng(0))}.values())
    assert [p.id for p in pool] == [f"virtual:p{drawn[0]}+p{j}" for j in drawn[1:4]]  # all equal: in order of (i, j)


def test_build_pool_refuses_a_wrong_embedder(small):
    with pytest.raises(SpecError, match=r"return \(20, d\) finite numbers, got shape \(19, 4\)"):
        build_pool(small, np.random.default_rng(0), size=3, embedder=lambda texts: np.ones((19, 4)))
