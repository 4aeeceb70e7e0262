"""The one seam between conversations and engines: `Backend.generate(requests) -> list[Generation]`.

A backend turns message lists (or token ids) into text. It knows nothing of profiles, users or rewards.
A request that fails is a `Generation` whose `error` is set, so that one bad call never loses the others;
a backend raises `BackendError` only when nothing of the batch could be done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from usp_env.dialogue import Role
from usp_env.errors import BackendError

FinishReason = Literal["stop", "length", "end", "role", "context_limit", "error"]
"""Why a generation ended.

`stop`: end of turn. `length`: `max_tokens` reached. `end`: the end-of-conversation token. `role`: the model
opened another speaker's turn. `context_limit`: the prompt and `max_tokens` do not fit; nothing was generated.
`error`: the call failed after its retries.
"""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample.

    Args:
        temperature: 0 is greedy.
        top_p: Nucleus mass in (0, 1].
        max_tokens: Most tokens of one reply; at least 1.
        stop: Strings that end a reply (not part of it).
        min_tokens: No end token before this many tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    min_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """One reply to generate.

    Args:
        messages: `{"role", "content"}` dicts, `system` first where there is one; or None with `token_ids`.
        token_ids: A rendered prompt, generation header included; or None with `messages`.
        role: Whose header the reply is generated under: `"user"` for a USP model, else `"assistant"`.
        sampling: How to sample.
        seed: Seed of this reply alone; the same request with the same seed gives the same text, in any batch.
        adapter: Name of a LoRA adapter over the base model, or None.
        can_end: Whether the end-of-conversation token may be sampled (never on an opening).
        chat_template_kwargs: Passed to the chat template.
        json_schema: Shape of a JSON reply. Chat servers are asked to keep to it (`response_format`); other engines do not, so
            a prompt must say it in words, and a reply must be checked in any case.
    """

    messages: Sequence[Mapping[str, str]] | None = None
    token_ids: Sequence[int] | None = None
    role: Role = "assistant"
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    adapter: str | None = None
    can_end: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    json_schema: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """What an engine produced for one request.

    Args:
        text: Decoded text without special tokens, untrimmed.
        token_ids: Sampled ids, the end token included; None where the engine does not tell.
        logprobs: Of each id under the distribution it was sampled from; same length, or None.
        finish_reason: See `FinishReason`.
        usage: `prompt_tokens`, `completion_tokens` (both 0 where unknown), and what else the engine counts.
        error: Set exactly when `finish_reason == "error"`.
        notes: What a log should show (e.g. a prompt that had to be changed for a chat server).
    """

    text: str
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    finish_reason: FinishReason = "stop"
    usage: Mapping[str, int] = field(default_factory=dict)
    error: BackendError | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Backend(Protocol):
    """An engine.

    Attributes:
        spec: The resolved spec, without keys; recorded in transcripts.
        identity: What decides the output besides the request: weights digest, renderer version. The cache's key.
        mutable: Whether the weights can change during its life (a model in training); such a backend is never recorded.
    """

    @property
    def spec(self) -> str: ...  # noqa: D102 - see Attributes

    @property
    def identity(self) -> Mapping[str, Any]: ...  # noqa: D102

    @property
    def mutable(self) -> bool: ...  # noqa: D102

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """One generation per request, in order.

        Raises:
            BackendError: Nothing of the batch could be done.
        """
        ...

    async def agenerate(self, requests: Sequence[Request]) -> list[Generation]:
        """`generate` for event loops."""
        ...


def failed(error: BackendError) -> Generation:
    """The generation that stands for a call which failed."""
    return Generation("", finish_reason="error", error=error)
