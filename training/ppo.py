"""PPO for dialogues: the maths, as pure functions over token rows. No model, no I/O.

A dialogue is ONE row of T token ids. *Own* tokens are those that the policy sampled; `utterance_ids` (B, T) says which
utterance each belongs to, 0 … K−1, and is −1 on everything else: prompt, headers, the other side's turns, padding. Everything is
(B, T) and aligned on the token concerned: `log_probs[b, t]` is that of emitting token t, `values[b, t]` is V of the state before
it (both are read from the model's output at t−1), `rewards[b, t]` is received for emitting it. Off own tokens there are zeros,
and γ and λ count own tokens only, so that neither padding nor what the other side said changes a result.

    kl       = kl_estimate(old, reference, "k1")
    rewards  = token_rewards(credit, utterance_ids, kl, beta=0.01, mode="utterance")
    adv, ret = gae(rewards, values, utterance_ids >= 0, utterance_ids, gamma=1.0, lam=0.95, mode="utterance")
    adv      = whiten(adv, utterance_ids >= 0)
    loss     = policy_loss(new, old, adv, own, 0.2).loss + value_loss(v, values, ret, own, 0.2).loss

`mode="utterance"` is the paper's reference code: every utterance is an episode of its own, which ends with its last token, and
r_k (Eq. 6) is paid there. `mode="dialogue"`: the dialogue is the episode, R = mean_k r_k is paid once, at its last own token, and
V is carried from an utterance to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from usp_env.errors import SpecError, require

require("torch", "train")
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

Mode = Literal["utterance", "dialogue"]
Estimator = Literal["k1", "k2", "k3"]
LOG_RATIO = 20.0
"""Log-ratios are clamped to ± this before they are exponentiated: e²⁰ is finite in float32, and far outside of any clip."""


def chosen_log_probs(logits: Tensor, token_ids: Tensor, banned: Tensor | None = None, banned_id: int | None = None) -> Tensor:
    """Log-probability of each chosen token, in float32.

    Args:
        logits: (N, V), of any dtype: where token n was chosen from, so the model's output one position before it.
        token_ids: (N,).
        banned: (N,) bool, where `banned_id` could not be sampled (the end of the conversation, in an opening); None: nowhere.
        banned_id: The token.

    Returns:
        (N,), at most 0.

    Example:
        >>> chosen_log_probs(torch.tensor([[0.0, 0.0], [0.0, 9.0]]), torch.tensor([1, 0]), torch.tensor([False, True]), 1)
        tensor([-0.6931,  0.0000])
    """
    return torch.log_softmax(_allowed(logits, banned, banned_id), -1).gather(-1, token_ids[:, None]).squeeze(-1)


def entropy(logits: Tensor, banned: Tensor | None = None, banned_id: int | None = None) -> Tensor:
    """Entropy in nats of each row's distribution, (N, V) → (N,), in float32; arguments as of `chosen_log_probs`."""
    log_probs = torch.log_softmax(_allowed(logits, banned, banned_id), -1)
    return -(log_probs.exp() * log_probs.clamp(min=torch.finfo(torch.float32).min)).sum(-1)


def _allowed(logits: Tensor, banned: Tensor | None, banned_id: int | None) -> Tensor:
    logits = logits.float()
    if banned is None or banned_id is None or not bool(banned.any()):
        return logits
    column = torch.arange(logits.shape[-1], device=logits.device) == banned_id
    return logits.masked_fill(banned[:, None] & column, -torch.inf)


def kl_estimate(log_probs: Tensor, reference: Tensor, estimator: Estimator = "k1") -> Tensor:
    """What a sampled token tells of KL(policy ‖ reference), elementwise; 0 where both are 0.

    With d = log π − log π_ref: k1 = d (unbiased, of either sign), k2 = d²/2, k3 = e^−d − 1 + d (unbiased, never negative).
    Schulman (2020), "Approximating KL divergence".

    Example:
        >>> kl_estimate(torch.log(torch.tensor([0.5])), torch.log(torch.tensor([0.25])), "k1")
        tensor([0.6931])
    """
    d = log_probs - reference
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        d = d.clamp(-LOG_RATIO, LOG_RATIO)
        return torch.expm1(-d) + d
    raise SpecError(f"estimator: expected k1, k2 or k3, got {estimator!r}")


def last_tokens(utterance_ids: Tensor, mode: Mode = "utterance") -> Tensor:
    """Where rewards are paid: (B, T) bool, the last own token of each utterance, or of the dialogue.

    Example:
        >>> last_tokens(torch.tensor([[-1, 0, 0, -1, 1, -1]])).int()
        tensor([[0, 0, 1, 0, 1, 0]], dtype=torch.int32)
    """
    own = utterance_ids >= 0
    after = own.flip(1).cumsum(1).flip(1) - own.int()  # own tokens behind this one
    if mode == "dialogue":
        return own & (after == 0)
    following = utterance_ids.new_full(utterance_ids.shape, -1)
    latest = utterance_ids.new_full((len(utterance_ids),), -1)
    for t in reversed(range(utterance_ids.shape[1])):
        following[:, t] = latest
        latest = torch.where(own[:, t], utterance_ids[:, t], latest)
    return own & ((after == 0) | (following != utterance_ids))


def token_rewards(
    credit: Sequence[Sequence[float]],
    utterance_ids: Tensor,
    kl: Tensor,
    beta: float = 0.01,
    mode: Mode = "utterance",
    clip: float = 10.0,
) -> Tensor:
    """Rewards of tokens: the dialogue's reward at last tokens, less the penalty for leaving the reference (paper §4.3).

        r_t = −β·KL_t  on every own token,  + r_k (`utterance`) at the last token of utterance k, or + mean_k r_k (`dialogue`)

    Args:
        credit: Of each row, one r_k for each utterance of `utterance_ids` (Eq. 6).
        utterance_ids: (B, T).
        kl: (B, T), see `kl_estimate`.
        beta: β.
        mode: See the module's docstring.
        clip: r_k are clamped to ± this.

    Returns:
        (B, T), zeros off own tokens; its sum over a row is Σ r_k (or their mean) − β Σ KL.

    Raises:
        SpecError: Not one credit for each utterance.
    """
    paid = torch.zeros(utterance_ids.shape, dtype=torch.float32, device=utterance_ids.device)
    at = last_tokens(utterance_ids, mode)
    for b, row in enumerate(credit):
        spoken = utterance_ids[b][utterance_ids[b] >= 0].unique()
        if spoken.tolist() != list(range(len(row))):
            raise SpecError(f"row {b}: expected one credit for each of the utterances {spoken.tolist()}, got {len(row)} of them")
        if not row:
            continue
        clipped = torch.tensor(row, dtype=torch.float32, device=paid.device).clamp(-clip, clip)
        paid[b, at[b]] = clipped if mode == "utterance" else clipped.mean()
    return paid - beta * torch.where(utterance_ids >= 0, kl.float(), 0.0)


def gae(
    rewards: Tensor,
    values: Tensor,
    own_mask: Tensor,
    utterance_ids: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    mode: Mode = "utterance",
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over own tokens alone (Schulman et al., 2016).

        δ_t = r_t + γ·V(next own token) − V_t        A_t = δ_t + γλ·A(next own token)

    The next own token is that of the compacted row: between two of them there may be a whole reply of the other side, which
    costs neither γ nor λ. V and A are 0 after an episode's last token: of an utterance in mode `utterance`, of the dialogue in
    mode `dialogue`; a dialogue that was cut off at its last turn counts as ended (finite horizon).

    Args:
        rewards: (B, T).
        values: (B, T), of the state before each token.
        own_mask: (B, T) bool.
        utterance_ids: (B, T), −1 off own tokens.
        gamma: γ.
        lam: λ.
        mode: See the module's docstring.

    Returns:
        Advantages and returns (advantages + values), (B, T) each, 0 off own tokens, not whitened.

    Raises:
        SpecError: Shapes differ, the mask is not that of the ids, or a reward lies off own tokens, where it would be lost.

    Example:
        Two utterances of one token each around a reply; λ = ½:

        >>> ids = torch.tensor([[0, -1, 1]])
        >>> r, v = torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([[0.5, 9.0, 2.0]])
        >>> gae(r, v, ids >= 0, ids, lam=0.5, mode="utterance")[0]
        tensor([[0.5000, 0.0000, 1.0000]])
        >>> gae(r, v, ids >= 0, ids, lam=0.5, mode="dialogue")[0]
        tensor([[3., 0., 1.]])
    """
    if mode not in ("utterance", "dialogue"):
        raise SpecError(f"mode: expected 'utterance' or 'dialogue', got {mode!r}")
    shapes = {tuple(x.shape) for x in (rewards, values, own_mask, utterance_ids)}
    if len(shapes) > 1 or rewards.ndim != 2:
        raise SpecError(f"gae: expected four tensors of one shape (B, T), got {sorted(shapes)}")
    if not torch.equal(own_mask.bool(), utterance_ids >= 0):
        raise SpecError("gae: expected own_mask where utterance_ids are not -1, got another")
    if bool((rewards[utterance_ids < 0] != 0).any()):
        raise SpecError("gae: expected rewards on own tokens alone, got some elsewhere: they would be lost")
    own, rewards, values = own_mask.bool(), rewards.float(), values.float()
    advantages = torch.zeros_like(values)
    value = advantage = values.new_zeros(len(values))  # of the next own token
    utterance = utterance_ids.new_full((len(values),), -1)
    for t in reversed(range(values.shape[1])):
        here = own[:, t]
        if mode == "utterance":
            last = here & (utterance_ids[:, t] != utterance)
            value, advantage = torch.where(last, 0.0, value), torch.where(last, 0.0, advantage)
        delta = rewards[:, t] + gamma * value - values[:, t]
        now = delta + gamma * lam * advantage
        advantages[:, t] = torch.where(here, now, 0.0)
        value = torch.where(here, values[:, t], value)
        advantage = torch.where(here, now, advantage)
        utterance = torch.where(here, utterance_ids[:, t], utterance)
    return advantages, torch.where(own, advantages + values, 0.0)


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares over the mask, (3,) in float64: those of several processes add up."""
    kept = x[mask].double()
    return torch.stack([kept.new_tensor(kept.numel()), kept.sum(), kept.square().sum()])


def whiten(x: Tensor, mask: Tensor, of: Tensor | None = None) -> Tensor:
    """Mean 0 and standard deviation 1 over the mask; 0 off it. One value, or equal ones, become 0.

    Args:
        x: (B, T).
        mask: (B, T) bool.
        of: The `moments` to use; None: x's own. Those of the whole rollout, whatever the batch.

    Example:
        >>> whiten(torch.tensor([[1.0, 7.0, 3.0]]), torch.tensor([[True, False, True]]))
        tensor([[-1.,  0.,  1.]])
    """
    count, total, squares = (moments(x, mask) if of is None else of).tolist()
    if not count:
        return torch.zeros_like(x)
    mean = total / count
    variance = squares / count - mean * mean
    if variance <= 1e-16:  # NaN is not: what is wrong has to show
        return torch.zeros_like(x)
    return torch.where(mask, (x - mean) / variance**0.5, 0.0)


class PolicyLoss(NamedTuple):
    """What a batch's clipped surrogate is made of; sums over own tokens divided by `count`, each a scalar tensor.

    Args:
        loss: To be minimised.
        clip_fraction: Share of tokens whose ratio is outside of the clip.
        approx_kl: Of the old policy to the new one, by k3 over the old one's samples.
        ratio_error: Largest |ratio − 1|.
    """

    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    ratio_error: Tensor


def policy_loss(
    log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2, count: float | Tensor | None = None
) -> PolicyLoss:
    """PPO's clipped surrogate (Schulman et al., 2017): −min(ρA, clip(ρ, 1−ε, 1+ε)A), ρ = π/π_old.

    Args:
        log_probs: (B, T) of the policy that learns.
        old: (B, T) of the policy that acted; computed once, before the first update on this batch.
        advantages: (B, T).
        mask: (B, T) bool, own tokens.
        clip: ε.
        count: Own tokens that the mean is over: those of the whole optimiser step, so that it does not matter how the step is
            cut into batches. None: this batch's.

    Example:
        >>> one = torch.tensor([[True]])
        >>> round(policy_loss(torch.log(torch.tensor([[1.5]])), torch.zeros(1, 1), torch.tensor([[2.0]]), one).loss.item(), 4)
        -2.4
    """
    over = _count(mask, count)
    log_ratio = torch.where(mask, log_probs - old, 0.0).clamp(-LOG_RATIO, LOG_RATIO)
    ratio = log_ratio.exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    outside = (ratio.detach() - 1).abs() > clip
    return PolicyLoss(
        -torch.where(mask, surrogate, 0.0).sum() / over,
        (outside & mask).sum() / over,
        torch.where(mask, torch.expm1(log_ratio) - log_ratio, 0.0).detach().sum() / over,
        (ratio.detach() - 1).abs().max() if ratio.numel() else ratio.new_zeros(()),
    )


class ValueLoss(NamedTuple):
    """Sums over own tokens divided by `count`: the loss to be minimised, and the share of tokens that the clip decides."""

    loss: Tensor
    clip_fraction: Tensor


def value_loss(
    values: Tensor,
    old: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float | None = 0.2,
    count: float | Tensor | None = None,
) -> ValueLoss:
    """Half the squared error, clipped: ½·max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²); arguments as of `policy_loss`.

    Args:
        values: (B, T) of the critic that learns.
        old: (B, T) of the critic before the update.
        returns: (B, T).
        mask: (B, T) bool.
        clip: ε; None: no clip.
        count: See `policy_loss`.

    Example:
        >>> one, v = torch.tensor([[True]]), torch.tensor([[1.0]])
        >>> round(value_loss(v, torch.zeros(1, 1), torch.tensor([[2.0]]), one).loss.item(), 4)
        1.62
    """
    over = _count(mask, count)
    error = (values - returns).square()
    if clip is None:
        return ValueLoss(torch.where(mask, error, 0.0).sum() / 2 / over, error.new_zeros(()))
    clipped = (old + (values - old).clamp(-clip, clip) - returns).square()
    loss = torch.where(mask, torch.maximum(error, clipped), 0.0).sum() / 2 / over
    return ValueLoss(loss, ((clipped > error) & mask).sum() / over)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 − Var(R − V) / Var(R) over the mask: 1 of a perfect critic, 0 of a constant; NaN where all returns are equal."""
    v, r = values[mask].double(), returns[mask].double()
    variance = r.var(unbiased=False).item() if len(r) else 0.0
    return 1 - (r - v).var(unbiased=False).item() / variance if variance > 0 else float("nan")


def _count(mask: Tensor, count: float | Tensor | None) -> float | Tensor:
    return mask.sum().clamp(min=1) if count is None else count
