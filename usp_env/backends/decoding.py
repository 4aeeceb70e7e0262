"""A batched decode loop over a causal language model. It knows token ids, not messages.

Every row samples with noise of its own, so a row gives the same tokens alone or among others, up to the rounding
of the model's own matrix products. No global random state is read or changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from usp_env.backends.adapters import speaking_each
from usp_env.backends.base import FinishReason, Sampling
from usp_env.errors import require

require("torch", "hf")
require("transformers", "hf")
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers.cache_utils import DynamicCache, DynamicLayer  # noqa: E402

GROUP = 256
"""Tokens in a group of the two-stage Gumbel draw; part of what a seed means."""
_NOISE_STEPS = 16  # steps of noise drawn at once
_NUCLEUS = 512  # candidates tried before a row is sorted whole


@dataclass(frozen=True, slots=True)
class Job:
    """One row.

    Args:
        prompt: Token ids, at least one.
        sampling: How to sample.
        seed: Seed of this row's noise.
        ends: Ids that end the row, and as what; none before `min_tokens`.
        banned: Ids that are never sampled.
        stopped: Tells from the ids so far whether a stop string is complete; None where there are none.
        adapter: PEFT's name of the adapter that this row alone speaks through; None leaves the model as it is. In a batch
            either every row has one (`adapters.BASE` speaks through none) or none has.
    """

    prompt: Sequence[int]
    sampling: Sampling
    seed: int
    ends: Mapping[int, FinishReason]
    banned: frozenset[int] = frozenset()
    stopped: Callable[[list[int]], bool] | None = None
    adapter: str | None = None


@dataclass(slots=True)
class Decoded:
    """What a row gave: sampled ids (its end token included), their log-probabilities, and why it ended.

    `states` are the keys and values of the prompt and of all sampled ids but the last. The reason is `error` where the
    logits made no distribution.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: FinishReason = "length"
    states: Tensor | None = None

    def take(self, job: Job, token: int, logprob: float) -> bool:
        """Append a token; whether the row is finished."""
        if math.isnan(logprob):
            self.reason = "error"
            return True
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if token in job.ends:
            self.reason = job.ends[token]
            return True
        if job.stopped is not None and job.stopped(self.token_ids):
            self.reason = "stop"
            return True
        return len(self.token_ids) >= job.sampling.max_tokens


@torch.no_grad()
def decode(
    model: Any, jobs: Sequence[Job], vocabulary: int, known: Sequence[Tensor | None] | None = None, keep: bool = False
) -> list[Decoded]:
    """Generate all rows of one batch.

    Args:
        model: A `transformers` causal language model, in eval mode.
        jobs: The rows; they share one left-padded batch.
        vocabulary: Ids from here on are padding of the model's embedding and never sampled.
        known: Keys and values of the first tokens of each prompt, (layers, 2, heads, tokens < len(prompt), head size), or
            None; only for models that `keeps_states`.
        keep: Hand out every row's keys and values (`Decoded.states`).
    """
    out = [Decoded() for _ in jobs]
    known = known or [None] * len(jobs)
    new = [len(job.prompt) - _length(states) for job, states in zip(jobs, known, strict=True)]
    live = sorted(range(len(jobs)), key=lambda which: -new[which])  # which job each row of the batch is
    device, width = model.device, max(len(job.prompt) for job in jobs)
    total = width + max(job.sampling.max_tokens for job in jobs)
    mask = torch.ones(len(jobs), total, dtype=torch.long)
    ids = torch.zeros(len(jobs), width, dtype=torch.long)
    for row, which in enumerate(live):
        start = width - len(jobs[which].prompt)
        mask[row, :start] = 0
        ids[row, start:] = torch.as_tensor(jobs[which].prompt)
    mask, ids = mask.to(device), ids.to(device)
    cache, sampler = buffered_cache(model.config, total), _Sampler([jobs[which] for which in live], vocabulary, device)
    speakers = [jobs[which].adapter for which in live]
    logits = _prefill(model, cache, ids, mask, [new[which] for which in live], [known[which] for which in live], speakers)
    positions = (mask[:, :width].sum(-1, keepdim=True) - 1).clamp_min(0)
    lasts = positions + torch.tensor([[jobs[which].sampling.max_tokens] for which in live], device=device)
    done: set[int] = set()
    while True:
        tokens, logprobs = sampler.draw(logits.float())
        for row, (which, token, logprob) in enumerate(zip(live, tokens.tolist(), logprobs.tolist(), strict=True)):
            if which not in done and out[which].take(jobs[which], token, logprob):
                done.add(which)
                if keep and out[which].reason != "error":
                    out[which].states = _states(cache, row, mask[row])
        if len(done) == len(jobs):
            return out
        kept = [row for row, which in enumerate(live) if which not in done]
        ids, positions = tokens[:, None], torch.minimum(positions + 1, lasts)  # rows that are done idle within the limit
        if len(live) - len(kept) >= max(1, len(live) // 8):  # copying the cache pays once an eighth of it is idle
            live = [live[row] for row in kept]
            index = torch.as_tensor(kept, device=device)
            cache.batch_select_indices(index)
            sampler.select(index)
            ids, positions, lasts, mask = ids[index], positions[index], lasts[index], mask[index]
        speakers = [jobs[which].adapter for which in live]
        logits = _forward(model, cache, ids, mask[:, : cache.get_seq_length() + 1], positions, speakers)


def keeps_states(model: Any) -> bool:
    """Whether all layers cache keys and values of every token, so that a row's can be taken out and put back.

    Not where the rotary angles of early tokens depend on how long the row has become.
    """
    if _rope_types(model.config) & {"longrope", "dynamic"}:
        return False
    return all(type(layer) is _BufferedLayer for layer in buffered_cache(model.config, 1).layers)


def _rope_types(config: Any) -> set[Any]:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]  # some models have one a layer type
    return {kind.get("rope_type", kind.get("type")) for kind in kinds}


def _length(states: Tensor | None) -> int:
    return 0 if states is None else states.shape[-2]


def _forward(model: Any, cache: Any, ids: Tensor, mask: Tensor, positions: Tensor, speakers: Sequence[str | None]) -> Tensor:
    """Logits of the last column (B, V)."""
    with speaking_each(model, speakers):
        made = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
    logits: Tensor = made.logits[:, -1]
    return logits


def _prefill(
    model: Any,
    cache: Any,
    ids: Tensor,
    mask: Tensor,
    new: Sequence[int],
    known: Sequence[Tensor | None],
    speakers: Sequence[str | None],
) -> Tensor:
    """Fill the cache with the prompts; logits after each one's last token (B, V).

    Rows come with the most new tokens first, and are read in slices of similar numbers of them. A row of a slice reads
    again what its padding would have cost.
    """
    width = ids.shape[1]
    positions = (mask[:, :width].cumsum(-1) - 1).clamp_min(0)
    if not any(states is not None for states in known):
        return _forward(model, cache, ids, mask[:, :width], positions, speakers)
    example = next(states for states in known if states is not None)
    for layer in cache.layers:
        layer.prepare(example, len(ids))
    logits = []
    for low, high in slices(new):
        read = new[low]
        for row in range(low, high):
            if (states := known[row]) is not None:
                stop = width - new[row]
                for number, layer in enumerate(cache.layers):
                    for buffer, part in zip(layer.buffers, states[number], strict=True):
                        buffer[row, :, stop - part.shape[-2] : stop] = part
        part_cache = DynamicCache(config=model.config)
        part_cache.layers = [layer.part(low, high, width - read) for layer in cache.layers]
        unread = slice(low, high), slice(width - read, None)
        logits.append(_forward(model, part_cache, ids[unread], mask[low:high, :width], positions[unread], speakers[low:high]))
    for layer in cache.layers:
        layer.rewind(width)
    return torch.cat(logits)


def slices(new: Sequence[int]) -> list[tuple[int, int]]:
    """Cut descending numbers of new tokens into runs that waste at most a quarter, or 64 tokens, on padding.

    Example:
        >>> slices([500, 490, 20, 19, 19])
        [(0, 2), (2, 5)]
    """
    cuts, low, waste = [], 0, 0
    for row, count in enumerate(new):
        waste += new[low] - count
        if waste > max(64, new[low] * (row - low + 1) // 4):
            cuts.append((low, row))
            low, waste = row, 0
    return [*cuts, (low, len(new))]


def _states(cache: Any, row: int, mask: Tensor) -> Tensor:
    """Keys and values of a row's own tokens so far: (layers, 2, heads, tokens, head size)."""
    columns = mask[: cache.get_seq_length()].nonzero().flatten()
    layers = [torch.stack([layer.keys[row], layer.values[row]]) for layer in cache.layers]
    return torch.stack([layer.index_select(-2, columns) for layer in layers])


def nucleus_floor(logits: Tensor, top_p: Tensor) -> Tensor:
    """The smallest logit of each row's nucleus: the fewest most likely tokens whose mass reaches `top_p`.

    Args:
        logits: (B, V), float32.
        top_p: (B, 1) in (0, 1].

    Returns:
        (B, 1); -inf where `top_p` is 1.

    Example:
        >>> nucleus_floor(torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.7]])).exp()
        tensor([[0.3000]])
    """
    count = min(_NUCLEUS, logits.shape[-1])
    norm = logits.logsumexp(-1, keepdim=True)
    floor, enough = _floor_among(_largest(logits, count), norm, top_p)
    wide = (~enough & (top_p < 1)).flatten().nonzero().flatten()
    if len(wide) and count < logits.shape[-1]:
        floor[wide] = _floor_among(_largest(logits[wide], logits.shape[-1]), norm[wide], top_p[wide])[0]
    return torch.where(top_p < 1, floor, -torch.inf)


def _floor_among(values: Tensor, norm: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """The nucleus' smallest logit among descending `values`, and whether the nucleus ends before their end."""
    mass = (values - norm).exp().cumsum(-1)
    inside = torch.cat([torch.ones_like(mass[:, :1], dtype=torch.bool), mass[:, :-1] < top_p], -1)
    return values.gather(-1, inside.sum(-1, keepdim=True) - 1), ~inside[:, -1:]


def _largest(logits: Tensor, count: int) -> Tensor:
    """The `count` largest of each row, descending. On a CPU numpy's vectorised selection beats `topk` tenfold."""
    if logits.device.type != "cpu":
        return logits.topk(count).values
    values, split = logits.numpy(), logits.shape[-1] - count
    part = np.partition(values, split, axis=-1)[:, split:] if split else values
    return torch.from_numpy(np.sort(part, axis=-1)[:, ::-1].copy())


def gumbel_draw(logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Sample softmax(logits) with the Gumbel-max trick in two stages: a group of tokens, then one of its tokens.

    The largest of a group's perturbed logits is distributed as its log-sum-exp plus one Gumbel variable, so the draw is
    exact, with V/256 + 256 noise values instead of V. Unlike inverting the cumulative sum, rounding changes the outcome
    only where two perturbed logits nearly tie, so that a batch gives what its rows give alone.

    Args:
        logits: (B, G * 256), float32; -inf where a token cannot be drawn.
        noise: (B, G + 256) of standard Gumbel variables.

    Returns:
        Tokens (B,) and their log-probabilities (B,).
    """
    rows = torch.arange(len(logits), device=logits.device)
    groups = logits.view(len(logits), -1, GROUP)
    masses = groups.logsumexp(-1)
    group = (masses + noise[:, :-GROUP]).argmax(-1)
    inner = (groups[rows, group] + noise[:, -GROUP:]).argmax(-1)
    token = group * GROUP + inner
    return token, logits[rows, token] - masses.logsumexp(-1)


class _Sampler:
    """Temperature, bans, nucleus and noise of the rows of a batch."""

    def __init__(self, jobs: Sequence[Job], vocabulary: int, device: torch.device) -> None:
        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        self.step, self.vocabulary = 0, vocabulary
        self.temperature = column([job.sampling.temperature for job in jobs])
        self.top_p = column([job.sampling.top_p if job.sampling.temperature > 0 else 1.0 for job in jobs])
        self.min_tokens = column([job.sampling.min_tokens for job in jobs])
        watched = sorted({i for job in jobs for i in (*job.ends, *job.banned)})
        self.watched = torch.tensor(watched, dtype=torch.long, device=device)
        self.banned = torch.tensor([[i in job.banned for i in watched] for job in jobs], dtype=torch.bool, device=device)
        self.ends = torch.tensor([[i in job.ends for i in watched] for job in jobs], dtype=torch.bool, device=device)
        self.streams = [np.random.Generator(np.random.Philox(key=job.seed % 2**64)) for job in jobs]
        self.noise: Tensor | None = None

    def select(self, index: Tensor) -> None:
        """Keep some rows."""
        for name in ("temperature", "top_p", "min_tokens", "banned", "ends"):
            setattr(self, name, getattr(self, name)[index])
        self.streams = [self.streams[row] for row in index.tolist()]
        self.noise = None if self.noise is None else self.noise[index]

    def draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The next token of each row and its log-probability (NaN: there is no distribution), from logits (B, V) in float32."""
        size = -(-logits.shape[-1] // GROUP) * GROUP
        if size != logits.shape[-1]:
            logits = torch.nn.functional.pad(logits, (0, size - logits.shape[-1]), value=-torch.inf)
        logits[:, self.vocabulary :] = -torch.inf
        ban = self.banned | (self.ends & (self.min_tokens > self.step))
        logits[:, self.watched] = logits[:, self.watched].masked_fill(ban, -torch.inf)
        noise = self._next_noise(size // GROUP + GROUP).to(logits.device)
        greedy = self.temperature == 0
        scaled = logits / torch.where(greedy, 1.0, self.temperature)
        if bool((self.top_p < 1).any()):
            scaled = scaled.masked_fill(scaled < nucleus_floor(scaled, self.top_p), -torch.inf)
        tokens, logprobs = gumbel_draw(scaled, noise)
        if bool(greedy.any()):
            tokens = torch.where(greedy[:, 0], logits.argmax(-1), tokens)
            logprobs = logprobs.masked_fill(greedy[:, 0] & ~logprobs.isnan(), 0.0)
        return tokens, logprobs

    def _next_noise(self, width: int) -> Tensor:
        at = self.step % _NOISE_STEPS
        if at == 0:
            drawn = np.stack([stream.standard_exponential((_NOISE_STEPS, width), np.float32) for stream in self.streams])
            self.noise = -torch.from_numpy(drawn).clamp_min_(1e-30).log_()
        self.step += 1
        assert self.noise is not None
        return self.noise[:, at]


class _BufferedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer in one buffer: a step writes one column where `DynamicLayer` copies everything."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length = capacity, 0
        self.buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values so far, the new columns written behind the others."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self.buffers:
            self.buffers = [x.new_empty(*x.shape[:2], self.capacity, x.shape[-1]) for x in (key_states, value_states)]
        start, self.length = self.length, self.length + key_states.shape[-2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : self.length] = new
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)
        return self.keys, self.values

    def prepare(self, like: Tensor, rows: int) -> None:
        """Zeros for `rows` rows: what is masked must be finite all the same."""
        self.buffers = [like.new_zeros(rows, like.shape[2], self.capacity, like.shape[-1]) for _ in range(2)]
        self.lazy_initialization(*self.buffers)

    def part(self, low: int, high: int, length: int) -> _BufferedLayer:
        """A layer that writes into rows `low` to `high` of this one, from column `length` on."""
        view = _BufferedLayer(self.capacity)
        view.buffers, view.length = [buffer[low:high] for buffer in self.buffers], length
        view.lazy_initialization(*view.buffers)
        return view

    def rewind(self, length: int) -> None:
        """Take the first `length` columns as filled."""
        self.length = length
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)

    def get_seq_length(self) -> int:
        return self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self.rewind(self.length)


def buffered_cache(config: Any, capacity: int) -> Any:
    """An empty cache for `capacity` tokens; layers of special kinds (sliding windows, …) stay the library's own."""
    cache = DynamicCache(config=config)
    cache.layers = [_BufferedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
