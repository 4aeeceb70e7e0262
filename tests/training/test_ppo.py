"""PPO's maths by hand. `test_check_NN_…` are the correctness checks that need no model; the others are in test_ppo_model."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from training import ppo  # noqa: E402
from usp_env.errors import SpecError  # noqa: E402

LN = math.log


def ids_of(*rows: str) -> torch.Tensor:
    """`"..00.1"` as utterance ids: digits are own tokens, dots are not."""
    return torch.tensor([[-1 if c == "." else int(c) for c in row] for row in rows])


def random_ids(rng: np.random.Generator, rows: int = 5) -> torch.Tensor:
    """Rows of 1 to 4 utterances of 1 to 5 tokens, with 0 to 3 tokens of context before, between and after, padded."""
    made = []
    for _ in range(rows):
        row: list[int] = []
        for k in range(int(rng.integers(1, 5))):
            row += [-1] * int(rng.integers(0, 4)) + [k] * int(rng.integers(1, 6))
        made.append(row + [-1] * int(rng.integers(0, 4)))
    width = max(map(len, made))
    return torch.tensor([row + [-1] * (width - len(row)) for row in made])


def on(ids: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Random numbers on own tokens, zeros off them."""
    drawn = torch.from_numpy(rng.normal(size=tuple(ids.shape)).astype(np.float32))
    return torch.where(ids >= 0, drawn, 0.0)


def oracle(rewards: torch.Tensor, values: torch.Tensor, ids: torch.Tensor, gamma: float, lam: float, mode: str) -> np.ndarray:
    """GAE as a double sum over compacted rows: A_t = Σ_l (γλ)^l δ_{t+l}, in float64, sharing no line with the code."""
    found = np.zeros(tuple(ids.shape))
    for b in range(len(ids)):
        everything = [int(t) for t in np.flatnonzero(ids[b].numpy() >= 0)]
        labels = sorted({int(ids[b, t]) for t in everything})
        episodes = [everything] if mode == "dialogue" else [[t for t in everything if ids[b, t] == k] for k in labels]
        for where in episodes:
            r, v = rewards[b, where].double().numpy(), np.append(values[b, where].double().numpy(), 0.0)
            deltas = r + gamma * v[1:] - v[:-1]
            for i, t in enumerate(where):
                found[b, t] = sum((gamma * lam) ** n * delta for n, delta in enumerate(deltas[i:]))
    return found


# ── 11: the KL penalty ───────────────────────────────────────────────────────────────────────────


def test_check_11_kl_by_hand() -> None:
    """π = ½, π_ref = ¼ of the sampled token: k1 = ln 2, k2 = ½ ln² 2, k3 = ½ − 1 + ln 2; and the sign turns with d."""
    more, less = torch.tensor([[LN(0.5), LN(0.25)]]), torch.tensor([[LN(0.25), LN(0.5)]])
    assert ppo.kl_estimate(more, less)[0].tolist() == pytest.approx([LN(2), -LN(2)])
    assert ppo.kl_estimate(more, less, "k2")[0].tolist() == pytest.approx([LN(2) ** 2 / 2] * 2)
    assert ppo.kl_estimate(more, less, "k3")[0].tolist() == pytest.approx([0.5 - 1 + LN(2), 2 - 1 - LN(2)])
    for estimator in ("k1", "k2", "k3"):
        assert ppo.kl_estimate(more, more, estimator).tolist() == [[0.0, 0.0]]  # the same policy: exactly 0
    assert ppo.kl_estimate(torch.tensor([-90.0]), torch.tensor([0.0]), "k3").isfinite().all()
    with pytest.raises(SpecError, match="k1, k2 or k3, got 'k4'"):
        ppo.kl_estimate(more, less, "k4")


def test_check_11_k1_estimates_the_full_vocabulary_kl() -> None:
    """Over 200,000 draws from π; the standard error is Std(k1) / √n."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.log_softmax(torch.randn(11, generator=generator), -1) for _ in range(2))
    exact = float((policy.exp() * (policy - reference)).sum())
    drawn = torch.multinomial(policy.exp(), 200_000, replacement=True, generator=generator)
    for estimator in ("k1", "k3"):
        samples = ppo.kl_estimate(policy[drawn], reference[drawn], estimator)
        assert float(samples.mean()) == pytest.approx(exact, abs=4 * float(samples.std()) / 200_000**0.5)
    assert exact > 0.3  # so that a wrong sign is far away


def test_check_11_the_penalty_is_taken_from_the_reward_of_own_tokens() -> None:
    ids = ids_of(".00.1.")
    kl = torch.tensor([[9.0, 0.2, -0.1, 9.0, 0.4, 9.0]])  # what stands off own tokens is nothing that anybody said
    got = ppo.token_rewards([[0.0, 0.0]], ids, kl, beta=0.5)
    assert got[0].tolist() == pytest.approx([0.0, -0.1, 0.05, 0.0, -0.2, 0.0])


# ── 12: where the reward is paid ─────────────────────────────────────────────────────────────────


def test_check_12_rewards_stand_on_last_tokens() -> None:
    ids = ids_of(".00.1..22", "0........", "..00.....")
    paid = ppo.token_rewards([[0.5, -1.0, 2.0], [3.0], [4.0]], ids, torch.zeros(3, 9), beta=0.01)
    assert paid.tolist() == [
        [0, 0, 0.5, 0, -1.0, 0, 0, 0, 2.0],
        [3.0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 4.0, 0, 0, 0, 0, 0],
    ]
    once = ppo.token_rewards([[0.5, -1.0, 2.0], [3.0], [4.0]], ids, torch.zeros(3, 9), mode="dialogue")
    assert once.tolist() == [[0] * 8 + [0.5], [3.0] + [0] * 8, [0, 0, 0, 4.0] + [0] * 5]
    assert ppo.last_tokens(ids_of("0011")).tolist() == [[False, True, False, True]]  # neighbours without a reply between


@pytest.mark.parametrize("mode", ["utterance", "dialogue"])
def test_check_12_token_rewards_sum_to_the_credit_less_the_kl(mode) -> None:
    """With K from 1 to 4 in one batch."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = random_ids(rng)
        kl, counts = on(ids, rng), [int(row.max()) + 1 for row in ids]
        credit = [rng.normal(size=k).tolist() for k in counts]
        rewards = ppo.token_rewards(credit, ids, kl, beta=0.3, mode=mode)
        total = [sum(row) if mode == "utterance" else sum(row) / len(row) for row in credit]
        assert rewards.sum(1).tolist() == pytest.approx(
            [t - 0.3 * k for t, k in zip(total, kl.sum(1).tolist(), strict=True)], abs=1e-5
        )
        assert not rewards[ids < 0].any()
    assert len(set(counts)) > 1


def test_credit_is_clamped_and_counted() -> None:
    ids = ids_of("0.1")
    assert ppo.token_rewards([[99.0, -99.0]], ids, torch.zeros(1, 3)).tolist() == [[10.0, 0.0, -10.0]]
    assert ppo.token_rewards([[99.0, 0.0]], ids, torch.zeros(1, 3), mode="dialogue", clip=1.0).tolist() == [[0.0, 0.0, 0.5]]
    assert ppo.token_rewards([[]], ids_of("..."), torch.zeros(1, 3)).tolist() == [[0.0, 0.0, 0.0]]
    for credit in ([[1.0]], [[1.0, 2.0, 3.0]], [[]]):
        with pytest.raises(SpecError, match=r"row 0: expected one credit for each of the utterances \[0, 1\]"):
            ppo.token_rewards(credit, ids, torch.zeros(1, 3))


# ── 13: nothing is paid twice ────────────────────────────────────────────────────────────────────


def credit_of(cc: float, human: list[float]) -> list[float]:
    """Eq. 6 with λ = .8."""
    return [0.8 * cc + 0.2 * h for h in human]


def returns_of(credit: list[float], ids: torch.Tensor, mode: str, values: torch.Tensor | None = None) -> torch.Tensor:
    zeros = torch.zeros(ids.shape)
    rewards = ppo.token_rewards([credit], ids, zeros, mode=mode)
    return ppo.gae(rewards, zeros if values is None else values, ids >= 0, ids, 1.0, 1.0, mode)[1][0]


def test_check_13_more_turns_are_not_more_reward() -> None:
    """A dialogue said twice over, with the same cycle consistency and the same human-likeness, has the same return."""
    short, long = ids_of(".00.1.2"), ids_of(".00.1.2.33.4.5")
    once, twice = credit_of(0.5, [1.0, 0.25, 0.4]), credit_of(0.5, [1.0, 0.25, 0.4] * 2)
    a, b = returns_of(once, short, "dialogue"), returns_of(twice, long, "dialogue")
    assert a[1].item() == pytest.approx(0.8 * 0.5 + 0.2 * 0.55)  # λ·cc + (1−λ)·mean P(human), on every own token
    assert b[1].item() == pytest.approx(a[1].item(), abs=1e-6)
    assert torch.allclose(b[long[0] >= 0], a[1])


def test_check_13_each_utterance_carries_the_dialogues_reward_once() -> None:
    ids, credit = ids_of(".00.1.2"), credit_of(0.5, [1.0, 0.25, 0.4])
    got = returns_of(credit, ids, "utterance")
    assert got.tolist() == pytest.approx([0, 0.6, 0.6, 0, 0.45, 0, 0.48])  # r_k on utterance k, not the sum of later ones


# ── 14, 15: advantages ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["utterance", "dialogue"])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_check_14_gae_is_that_of_the_compacted_row(mode, gamma, lam) -> None:
    rng = np.random.default_rng(7)
    for _ in range(12):
        ids = random_ids(rng)
        rewards = on(ids, rng)
        values = torch.from_numpy(rng.normal(size=tuple(ids.shape)).astype(np.float32))  # off own tokens too: never read
        advantages, returns = ppo.gae(rewards, values, ids >= 0, ids, gamma, lam, mode)
        expected = oracle(rewards, values, ids, gamma, lam, mode)
        np.testing.assert_allclose(advantages.numpy(), expected, atol=2e-5)
        np.testing.assert_allclose(returns.numpy(), np.where(ids >= 0, expected + values.numpy(), 0.0), atol=2e-5)
        assert not advantages[ids < 0].any()


def test_check_14_a_reply_costs_no_discount() -> None:
    """δ = (−.5 + γ·2, 3 − 2) and A_0 = δ_0 + γλ·δ_1, whatever stands between."""
    for gap in ("", ".", "........"):
        ids = ids_of("0" + gap + "1")
        rewards, values = torch.zeros(ids.shape), torch.full(ids.shape, 7.0)
        rewards[0, -1], values[0, 0], values[0, -1] = 3.0, 0.5, 2.0
        advantages, _ = ppo.gae(rewards, values, ids >= 0, ids, 0.9, 0.5, "dialogue")
        assert advantages[0, [0, -1]].tolist() == pytest.approx([1.3 + 0.45, 1.0])


def test_check_15_nothing_is_bootstrapped_behind_an_end() -> None:
    """V = 0 after the last token of an episode: A_T = r_T − V_T, also where a turn limit cut the dialogue off."""
    rng = np.random.default_rng(3)
    ids = random_ids(rng)
    rewards, values = on(ids, rng), torch.full(ids.shape, 5.0)
    for mode in ("utterance", "dialogue"):
        advantages, returns = ppo.gae(rewards, values, ids >= 0, ids, 0.9, 0.95, mode)
        last = ppo.last_tokens(ids, mode)
        torch.testing.assert_close(advantages[last], rewards[last] - 5.0)
        torch.testing.assert_close(returns[last], rewards[last])


def test_check_15_utterances_do_not_leak_into_each_other() -> None:
    rng = np.random.default_rng(4)
    ids = ids_of(".000..11.222", "00.1111.2...")
    values, kl = on(ids, rng), on(ids, rng)
    credit = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]
    for k in (1, 2):
        changed = [[r + 5.0 * (i == k) for i, r in enumerate(row)] for row in credit]
        both = [ppo.token_rewards(c, ids, kl, mode="utterance") for c in (credit, changed)]
        before, after = (ppo.gae(r, values, ids >= 0, ids, 0.9, 0.95, "utterance")[0] for r in both)
        assert torch.equal(before[ids != k], after[ids != k])
        assert (before[ids == k] != after[ids == k]).all()
        before, after = (ppo.gae(r, values, ids >= 0, ids, 0.9, 0.95, "dialogue")[0] for r in both)
        earlier = (ids >= 0) & (ids < k)
        assert (before[earlier] != after[earlier]).all()  # one episode: what comes later counts


def test_gae_refuses_what_it_would_lose() -> None:
    ids = ids_of("0.1")
    zeros = torch.zeros(1, 3)
    with pytest.raises(SpecError, match="'utterance' or 'dialogue', got 'turn'"):
        ppo.gae(zeros, zeros, ids >= 0, ids, mode="turn")
    with pytest.raises(SpecError, match="one shape"):
        ppo.gae(torch.zeros(1, 2), zeros, ids >= 0, ids)
    with pytest.raises(SpecError, match="own_mask where utterance_ids"):
        ppo.gae(zeros, zeros, torch.ones(1, 3, dtype=torch.bool), ids)
    with pytest.raises(SpecError, match="would be lost"):
        ppo.gae(torch.ones(1, 3), zeros, ids >= 0, ids)


# ── 18: whitening ────────────────────────────────────────────────────────────────────────────────


def test_check_18_whitening_is_over_own_tokens_and_blind_to_padding() -> None:
    rng = np.random.default_rng(5)
    ids = random_ids(rng)
    x = torch.from_numpy(rng.normal(3.0, 2.0, size=tuple(ids.shape)).astype(np.float32))
    own = ids >= 0
    white = ppo.whiten(x, own)
    kept = x[own].double()
    torch.testing.assert_close(white[own].double(), (kept - kept.mean()) / kept.std(unbiased=False), rtol=0, atol=1e-5)
    assert not white[~own].any()
    wide = ppo.whiten(torch.nn.functional.pad(x, (0, 9), value=50.0), torch.nn.functional.pad(own, (0, 9)))
    assert torch.equal(wide[:, : x.shape[1]], white)


def test_check_18_whitening_does_not_know_how_the_rollout_is_cut() -> None:
    """Moments of pieces add up: over processes, over micro-batches."""
    rng = np.random.default_rng(6)
    ids = random_ids(rng, rows=6)
    x, own = on(ids, rng), ids >= 0
    together = ppo.whiten(x, own)
    of = sum(ppo.moments(x[i : i + 2], own[i : i + 2]) for i in (0, 2, 4))
    apart = torch.cat([ppo.whiten(x[i : i + 2], own[i : i + 2], of) for i in (0, 2, 4)])
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-6)
    alone = ppo.whiten(x[:2], own[:2])
    assert (alone - together[:2]).abs().max() > 0.01  # a micro-batch's own moments are others


def test_check_18_one_token_and_equal_ones_become_zero() -> None:
    assert ppo.whiten(torch.tensor([[3.0, 8.0]]), torch.tensor([[True, False]])).tolist() == [[0.0, 0.0]]
    assert ppo.whiten(torch.full((2, 2), 0.1), torch.ones(2, 2, dtype=torch.bool)).tolist() == [[0.0, 0.0]] * 2
    assert ppo.whiten(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool)).tolist() == [[0.0, 0.0]]
    assert ppo.whiten(torch.zeros(0, 0), torch.zeros(0, 0, dtype=torch.bool)).shape == (0, 0)


def test_whitening_does_not_hide_nan() -> None:
    """Zeros in their place would be an update that teaches nothing and says nothing."""
    got = ppo.whiten(torch.tensor([[1.0, float("nan"), 2.0]]), torch.ones(1, 3, dtype=torch.bool))
    assert got.isnan().all()


# ── 19: means over tokens ────────────────────────────────────────────────────────────────────────


def test_check_19_losses_are_means_over_all_tokens_of_the_step() -> None:
    """Short and long dialogues weigh by their tokens; batches of a step, divided by its count, add up to it."""
    rng = np.random.default_rng(8)
    ids = ids_of("00......", "00000000", "0.......")
    new, old, advantages, returns = (on(ids, rng) for _ in range(4))
    own, count = ids >= 0, 11
    for part, other in ((ppo.policy_loss, advantages), (ppo.value_loss, returns)):
        whole = part(new, old, other, own) if part is ppo.policy_loss else part(new, old, other, own, 0.2)
        pieces = [part(new[[i]], old[[i]], other[[i]], own[[i]], 0.2, count) for i in range(3)]
        for field, value in whole._asdict().items():
            if field != "ratio_error":
                assert float(sum(getattr(p, field) for p in pieces)) == pytest.approx(float(value), abs=1e-6)
    by_hand = [float(ppo.policy_loss(new[b : b + 1, t : t + 1], old[b : b + 1, t : t + 1], advantages[b : b + 1, t : t + 1],
                                     torch.tensor([[True]])).loss) for b, t in own.nonzero().tolist()]  # fmt: skip
    assert len(by_hand) == count
    assert float(ppo.policy_loss(new, old, advantages, own).loss) == pytest.approx(sum(by_hand) / count, abs=1e-6)


def test_check_19_a_batch_of_one_token_and_of_none() -> None:
    one = torch.tensor([[True]])
    assert float(ppo.policy_loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.full((1, 1), 2.0), one).loss) == -2.0
    assert float(ppo.value_loss(torch.full((1, 1), 0.1), torch.zeros(1, 1), torch.ones(1, 1), one).loss) == pytest.approx(0.405)
    none = torch.zeros(1, 1, dtype=torch.bool)
    x = torch.ones(1, 1, requires_grad=True)
    for loss in (
        ppo.policy_loss(x, torch.zeros(1, 1), x.detach(), none).loss,
        ppo.value_loss(x, x.detach(), x.detach(), none).loss,
    ):
        loss.backward()
        assert loss.item() == 0.0
        assert x.grad.item() == 0.0


# ── 20: clips ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("advantage", "ratio", "surrogate", "slope"),
    [
        (2.0, 1.5, 2.4, 0.0),  # better, and already far more likely: clipped at 1.2
        (2.0, 1.1, 2.2, 2.2),
        (2.0, 0.5, 1.0, 1.0),  # better, but less likely: pulled back up
        (-2.0, 1.5, -3.0, -3.0),  # worse, and more likely: pushed down without a clip
        (-2.0, 0.9, -1.8, -1.8),
        (-2.0, 0.5, -1.6, 0.0),  # worse, and already far less likely: clipped at 0.8
        (0.0, 1.5, 0.0, 0.0),
    ],
)
def test_check_20_clip_by_hand(advantage, ratio, surrogate, slope) -> None:
    """`slope` is dSurrogate/d log π = ρA where the clip lets it through."""
    log_probs = torch.tensor([[LN(ratio)]], requires_grad=True)
    found = ppo.policy_loss(log_probs, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.tensor([[True]]), 0.2)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(-surrogate, abs=1e-6)
    assert log_probs.grad.item() == pytest.approx(-slope, abs=1e-6)
    assert found.clip_fraction.item() == (abs(ratio - 1) > 0.2)
    assert found.approx_kl.item() == pytest.approx(ratio - 1 - LN(ratio), abs=1e-6)
    assert found.ratio_error.item() == pytest.approx(abs(ratio - 1), abs=1e-6)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "slope"),
    [
        (0.1, 0.0, 1.0, 0.405, -0.9),  # within the clip
        (0.5, 0.0, 1.0, 0.32, 0.0),  # went further than 0.2 the right way: the clipped error is the larger one
        (-0.5, 0.0, 1.0, 1.125, -1.5),  # the wrong way: pulled back
        (0.5, 0.0, -1.0, 1.125, 1.5),
    ],
)
def test_check_20_value_clip_by_hand(value, old, target, loss, slope) -> None:
    values = torch.tensor([[value]], requires_grad=True)
    found = ppo.value_loss(values, torch.tensor([[old]]), torch.tensor([[target]]), torch.tensor([[True]]), 0.2)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(loss)
    assert values.grad.item() == pytest.approx(slope)
    assert found.clip_fraction.item() == (slope == 0.0)
    bare = ppo.value_loss(values, torch.tensor([[old]]), torch.tensor([[target]]), torch.tensor([[True]]), None)
    assert bare.loss.item() == pytest.approx((value - target) ** 2 / 2)


def test_check_20_log_ratios_are_clamped() -> None:
    """A token of probability e^−300 under the old policy, and one under the new: finite losses, finite gradients."""
    log_probs = torch.tensor([[-0.1, -300.0, -0.5]], requires_grad=True)
    old = torch.tensor([[-300.0, -0.1, -0.5]])
    found = ppo.policy_loss(log_probs, old, torch.tensor([[-1.0, 1.0, 1.0]]), torch.ones(1, 3, dtype=torch.bool))
    found.loss.backward()
    assert found.loss.item() == pytest.approx((math.exp(20) - math.exp(-20) - 1) / 3, rel=1e-5)
    assert log_probs.grad.isfinite().all()
    assert all(value.isfinite() for value in found)
    assert ppo.LOG_RATIO == 20.0


# ── 21, 23: masks and precision ──────────────────────────────────────────────────────────────────


def test_check_21_what_stands_off_own_tokens_is_never_read() -> None:
    rng = np.random.default_rng(9)
    ids = ids_of(".00.1.", "0.....")
    own = ids >= 0
    new, old, advantages, returns = (on(ids, rng) for _ in range(4))
    junk = torch.where(own, 0.0, float("nan"))
    clean = [*ppo.policy_loss(new, old, advantages, own), *ppo.value_loss(new, old, returns, own)]
    spoilt = [
        *ppo.policy_loss(new + junk, old + junk, advantages + junk, own),
        *ppo.value_loss(new + junk, old, returns + junk, own),
    ]
    assert [float(x) for x in spoilt] == [float(x) for x in clean]
    assert ppo.explained_variance(new + junk, returns + junk, own) == ppo.explained_variance(new, returns, own)
    assert float(ppo.policy_loss(new, old, advantages, own).approx_kl) == pytest.approx(
        float((torch.expm1(new - old) - (new - old))[own].mean()), rel=1e-5
    )  # the mean over own tokens, not over the padded rectangle


def test_check_21_entropy_by_hand() -> None:
    """ln 2 of (½, ½, 0), ln 4 of four equal ones; a banned word has no part in it and makes no NaN."""
    logits = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf], [1.0, 1.0, 1.0, 1.0]])
    assert ppo.entropy(logits).tolist() == pytest.approx([LN(2), LN(4)])
    assert ppo.entropy(logits, torch.tensor([False, True]), 3).tolist() == pytest.approx([LN(2), LN(3)])
    generator = torch.Generator().manual_seed(0)
    assert (ppo.entropy(30 * torch.randn(50, 20, generator=generator)) >= 0).all()


def test_check_23_probabilities_are_taken_in_float32() -> None:
    """Of bfloat16 logits: their values are exact, and the softmax over 50,000 of them is not rounded to 8 bits."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(4, 50_000, generator=generator)).bfloat16()
    tokens = torch.tensor([0, 7, 49_999, 123])
    exact = torch.log_softmax(logits.double(), -1)
    chosen, spread = ppo.chosen_log_probs(logits, tokens), ppo.entropy(logits)
    assert chosen.dtype == spread.dtype == torch.float32
    torch.testing.assert_close(chosen.double(), exact[torch.arange(4), tokens], rtol=0, atol=1e-5)
    torch.testing.assert_close(spread.double(), -(exact.exp() * exact).sum(-1), rtol=0, atol=1e-4)


def test_banned_words_are_left_out_where_they_were() -> None:
    logits, tokens = torch.zeros(2, 3), torch.tensor([0, 0])
    got = ppo.chosen_log_probs(logits, tokens, torch.tensor([True, False]), 2)
    assert got.tolist() == pytest.approx([-LN(2), -LN(3)])
    assert torch.equal(
        ppo.chosen_log_probs(logits, tokens, torch.tensor([True, True]), None), ppo.chosen_log_probs(logits, tokens)
    )


def test_explained_variance() -> None:
    own = torch.ones(1, 4, dtype=torch.bool)
    returns = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert ppo.explained_variance(returns, returns, own) == 1.0
    assert ppo.explained_variance(torch.zeros(1, 4), returns, own) == pytest.approx(0.0)
    assert ppo.explained_variance(torch.tensor([[0.5, 2.5, 2.5, 4.5]]), returns, own) == pytest.approx(1 - 0.25 / 1.25)
    assert math.isnan(ppo.explained_variance(returns, torch.ones(1, 4), own))
