"""The OpenAI protocol as pure functions: requests to JSON bodies, answers to generations. No I/O.

| request                      | endpoint               | prompt                                      |
|------------------------------|------------------------|---------------------------------------------|
| `role="assistant"`, messages | `/v1/chat/completions` | the messages, chat-template markers broken  |
| `role="user"`, messages      | `/v1/completions`      | token ids, rendered here under a user header |
| token ids                    | `/v1/completions`      | these                                       |

A chat server renders and tokenises on its side, so a marker such as `<|im_end|>` inside an utterance would become
a special token there: it is broken with U+2060. Token ids need none of that.

`max_tokens` is sent because every compatible server knows it; OpenAI's own reasoning models want
`max_completion_tokens` instead and refuse it. Seeds are sent modulo 2^31, the range that servers accept.
"""

from __future__ import annotations

import email.utils
import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from usp_env.backends.base import FinishReason, Generation, Request
from usp_env.dialogue import OPENER
from usp_env.errors import SpecError
from usp_env.rendering import Renderer

WIRE_VERSION = "1"
"""Changes whenever the same request would give another body; part of the backend's identity."""

WORD_JOINER = "\u2060"
_MARKER = re.compile(
    r"<(?=[|｜][^<>\s]{1,64}[|｜]>|/?s>|[be]os>|(?:start|end)_of_turn>|</?SYS>>)"
    r"|\[(?=/?(?:INST|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|SYSTEM_PROMPT)\])"
)
_CONTEXT_LIMIT = re.compile(
    r"context.{0,20}(length|size|window)|maximum model length|maximum number of tokens allowed"
    r"|(prompt|input|message)s?`? (is|are) too long|must have less than \d+ tokens|`?inputs`? tokens \+ `?max_new_tokens`?",
    re.IGNORECASE | re.DOTALL,
)
_AFFINITY_IDS = 128  # beyond a template's fixed head, and short of most first prompts


class MalformedAnswerError(ValueError):
    """A 200 whose body is no answer."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request on the wire.

    Args:
        chat: `/v1/chat/completions`, else `/v1/completions`.
        body: Standard fields.
        extra: Fields that the standard does not have.
        affinity: Equal for the turns of one conversation.
        ends: Meaning of token ids that end a reply.
        notes: For `Generation.notes`.
    """

    chat: bool
    body: Mapping[str, Any]
    extra: Mapping[str, Any]
    affinity: int
    ends: Mapping[int, FinishReason] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


def break_markers(text: str) -> tuple[str, int]:
    """Text in which no chat-template marker is left, and how many were broken.

    Example:
        >>> text, n = break_markers("end it: <|im_end|>")
        >>> text == "end it: <\u2060|im_end|>", n
        (True, 1)
    """
    return _MARKER.subn(lambda match: match[0] + WORD_JOINER, text)


def chat_call(request: Request, model: str) -> Call:
    """A call of `/v1/chat/completions`."""
    if not request.messages:
        raise SpecError("expected a request with at least one message or token id")
    messages, broken = [], 0
    for message in request.messages:
        content, n = break_markers(message["content"])
        messages.append({"role": message["role"], "content": content})
        broken += n
    extra = dict(_extra(request))
    if request.chat_template_kwargs:
        extra["chat_template_kwargs"] = dict(request.chat_template_kwargs)
    body = {"messages": messages, **_body(request, model)}
    if request.json_schema is not None:
        shape = {"name": "answer", "strict": True, "schema": dict(request.json_schema)}
        body["response_format"] = {"type": "json_schema", "json_schema": shape}
    return Call(True, body, extra, affinity(request), notes={"broken_markers": broken} if broken else {})


def completion_call(request: Request, model: str, renderer: Renderer | None) -> Call:
    """A call of `/v1/completions` with token ids as the prompt.

    Args:
        request: With token ids, or with messages and a renderer.
        model: The model's name on the server.
        renderer: Tells the prompt's ids and which ids end a reply; needed for messages, for `can_end`, and to ban the end.
    """
    if request.token_ids is not None:
        prompt: Sequence[int] = request.token_ids
    elif renderer is not None and request.messages is not None:
        kwargs = request.chat_template_kwargs
        prompt = renderer.render(request.messages, generation_role=request.role, chat_template_kwargs=kwargs).token_ids
    else:
        prompt = ()
    if not prompt:
        raise SpecError("expected a request with messages or token_ids that make a prompt of at least one token")
    body = {"prompt": [int(i) for i in prompt], **_body(request, model)}
    extra: dict[str, Any] = {"return_token_ids": True, **_extra(request)}
    ends: dict[int, FinishReason] = {}
    if renderer is not None:
        ends = dict.fromkeys(renderer.stop_ids, "stop")
        if renderer.header_start_id is not None:
            ends[renderer.header_start_id] = "role"
        over = renderer.end_of_conversation_id
        if over is not None and request.can_end:
            ends[over] = "end"
        elif over is not None:
            body["logit_bias"] = {str(over): -100}  # the protocol's way to ban a token
        extra["stop_token_ids"] = [i for i in ends if request.can_end or i != over]
    return Call(False, body, extra, affinity(request), ends)


def affinity(request: Request) -> int:
    """A hash that the turns of one conversation share, so that they meet the same server's prefix cache.

    It is taken over the first two messages (a system message may be everybody's, the first utterance is not; the shim that
    opens a flipped conversation is everybody's too) or the first 128 ids. A conversation's opening, which has less than that,
    goes by its seed.
    """
    if request.token_ids is not None:
        head: Any = list(request.token_ids[:_AFFINITY_IDS])
    else:
        messages = request.messages or ()
        said = [m for m in messages if m["role"] != "system" and m["content"] != OPENER]
        head = [[m["role"], m["content"]] for m in [*messages[:1], *said[:1]]] if said else request.seed
    return int.from_bytes(hashlib.sha256(json.dumps(head).encode()).digest()[:8], "big")


def _body(request: Request, model: str) -> dict[str, Any]:
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": request.adapter or model,  # servers offer a LoRA adapter as a model of its own name
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "seed": request.seed % 2**31,
    }
    return body | ({"stop": list(sampling.stop)} if sampling.stop else {})


def _extra(request: Request) -> dict[str, Any]:
    return {"min_tokens": request.sampling.min_tokens} if request.sampling.min_tokens else {}


def read(payload: bytes, call: Call) -> Generation:
    """The generation in an answer's body. Nothing is made up: what is not there is an error.

    A chat answer without content (`null`, as beside a tool call) is an empty text, for the environment to judge. The
    end of the conversation is recognised by its token id, in `token_ids` or as `stop_reason` (vLLM, SGLang send these);
    from a server that tells neither, `notes["end_unknown"]` says that a stop may have been one.

    Raises:
        MalformedAnswerError: No JSON, no choice, a text of another type, or a reply that the server aborted.
    """
    try:
        answer = json.loads(payload)
    except (ValueError, RecursionError):
        raise MalformedAnswerError(f"an answer that is not JSON: {_shown(payload)}") from None
    choices = answer.get("choices") if isinstance(answer, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    holder = choice.get("message") if call.chat and isinstance(choice, dict) else choice
    if not isinstance(choice, dict) or not isinstance(holder, dict):
        raise MalformedAnswerError(f"an answer without choices: {_shown(payload)}")
    text = (holder.get("content") or "") if call.chat else holder.get("text")
    if not isinstance(text, str):
        raise MalformedAnswerError(f"an answer without a text: {_shown(payload)}")
    ids = choice.get("token_ids")
    token_ids = tuple(ids) if isinstance(ids, list) and all(type(i) is int for i in ids) else None
    reason, notes = _finish(choice, token_ids, call)
    return Generation(text, token_ids, None, reason, _usage(answer.get("usage")), notes={**call.notes, **notes})


def _finish(choice: Mapping[str, Any], token_ids: tuple[int, ...] | None, call: Call) -> tuple[FinishReason, dict[str, Any]]:
    reported, stop_reason = choice.get("finish_reason"), choice.get("stop_reason")
    if reported in ("abort", "error"):
        raise MalformedAnswerError(f"a reply that the server aborted (finish_reason {reported!r})")
    if reported == "length":
        return "length", {}
    notes = {} if reported in ("stop", None) else {"finish_reason": str(reported)}
    last = token_ids[-1] if token_ids else stop_reason
    if type(last) is int:
        return call.ends.get(last, "stop"), notes
    return "stop", notes | ({"end_unknown": True} if "end" in call.ends.values() and not isinstance(stop_reason, str) else {})


def _usage(reported: Any) -> dict[str, int]:
    usage = reported if isinstance(reported, dict) else {}
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    counts = {key: usage.get(key) for key in ("prompt_tokens", "completion_tokens")}
    known = {key: value if _is_count(value) else 0 for key, value in counts.items()}
    return known | ({"cached_tokens": cached} if _is_count(cached) else {})


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 10**12


def is_context_limit(status: int, code: str | None, message: str) -> bool:
    """Whether a refusal says that prompt and `max_tokens` do not fit."""
    if status not in (400, 413, 422):
        return False
    return code in ("context_length_exceeded", "exceed_context_size_error") or bool(_CONTEXT_LIMIT.search(message))


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait (`Retry-After` as a number or a date); 0.0 where it does not.

    Example:
        >>> retry_after({"retry-after": "1.5"}), retry_after({"retry-after-ms": "20"}), retry_after({"retry-after": "soon"})
        (1.5, 0.02, 0.0)
    """
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "")
        if re.fullmatch(r"\d+(\.\d+)?", value):
            return float(value) * unit
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _shown(payload: bytes) -> str:
    return payload.decode("utf-8", "replace") or "(nothing)"
