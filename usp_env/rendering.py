r"""Messages to token ids, with the spans a model is trained on. ONE renderer for inference, SFT and RL.

    <|im_start|>system\n…<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n
                                                       ~~~~~~~~~~~~  own span of `own_role="user"`

A conversation is fixed text of the template (headers, ends of turns) around contents. Fixed text is tokenised
with special tokens on; every content is tokenised by itself with special tokens off, so `<|im_end|>` inside an
utterance stays text, and the ids of a turn never depend on its neighbours. For plain contents the ids are those
of the tokenizer's `apply_chat_template`; they differ where that would merge a content's leading whitespace into
the header, which no generation could have produced.

It holds no model and samples nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from usp_env.dialogue import END, Role
from usp_env.errors import SpecError, require

RENDERER_VERSION = "2"
"""Changes whenever the same messages would give other ids; part of every cache key."""

Messages = Sequence[Mapping[str, str]]
Kind = Literal["auto", "chatml", "llama3", "template"]
_ROLES = ("system", "user", "assistant", "tool")
_HEADER_STARTS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>")
_CONVERSATION_ENDS = (END, "<|endoftext|>", "<|end_of_text|>")
_SLOT = "\ue000{}\ue001"  # stands for content i while a template is rendered; private-use, so no template holds it


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as one row of token ids.

    Args:
        token_ids: Length T.
        own_spans: `[start, end)` of each trained utterance, in order: content, then its end token; never the header.

    Example:
        >>> row = Rendered((5, 6, 7, 8, 9), ((1, 3), (4, 5)))
        >>> row.own_mask, row.utterance_ids
        ([False, True, True, False, True], [-1, 0, 0, -1, 1])
    """

    token_ids: tuple[int, ...]
    own_spans: tuple[tuple[int, int], ...] = ()

    @property
    def own_mask(self) -> list[bool]:
        """Length T; True on own tokens."""
        return [index >= 0 for index in self.utterance_ids]

    @property
    def utterance_ids(self) -> list[int]:
        """Length T; 0..K-1 on own tokens, -1 off them."""
        ids = [-1] * len(self.token_ids)
        for index, (start, end) in enumerate(self.own_spans):
            ids[start:end] = [index] * (end - start)
        return ids


@dataclass(frozen=True, slots=True)
class _Format:
    begin: str
    header: str
    end_of_turn: str
    glue: str  # between an end of turn and the next header; not trained
    trim: bool  # whether the template strips contents


_FORMATS = {
    "chatml": _Format("", "<|im_start|>{}\n", "<|im_end|>", "\n", False),
    "llama3": _Format("<|begin_of_text|>", "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", "", True),
}


class Renderer:
    """Renders messages for one tokenizer.

    Args:
        tokenizer: A fast `transformers` tokenizer.
        kind: `chatml`, `llama3`, `template` (whatever the tokenizer's own chat template does, if it shows each message
            once and in order), or `auto`: the first of these that agrees with the tokenizer's template.
        default_system: Whether an assistant's conversation without a system message gets the one that the tokenizer's
            template injects (SmolLM2's does), as `apply_chat_template` would. Never when the user speaks or is trained.

    Attributes:
        end_of_turn_id: Ends an utterance.
        end_of_conversation_id: Ends the conversation, a user's right: `<|endconversation|>` where the tokenizer has it,
            else `<|endoftext|>` or `<|end_of_text|>`; None where there is none.
        header_start_id: Opens another turn's header; sampled, it means that the model speaks for someone else.
        stop_ids: All ids that end a generation.

    Raises:
        SpecError: The tokenizer is not fast, or its template is none that can be rendered safely.
    """

    def __init__(self, tokenizer: Any, kind: Kind = "auto", default_system: bool = True) -> None:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise SpecError(f"expected a fast tokenizer (one with a tokenizer.json), got {type(tokenizer).__name__}")
        self.tokenizer = tokenizer
        self._special = _special_ids(tokenizer)
        self._plain = _plain_tokenizer(tokenizer)
        self._text_ids = lru_cache(maxsize=8192)(self._encode_text)  # histories repeat from turn to turn
        self._fixed_ids = lru_cache(maxsize=1024)(self._encode_fixed)
        self.kind = self._choose(kind)
        self._format = _FORMATS.get(self.kind)
        self._default_system = self._injected_system(self._format) if self._format and default_system else None
        self.end_of_turn_id = self._find_end_of_turn()
        self.end_of_conversation_id = self._first_known(_CONVERSATION_ENDS, but=self.end_of_turn_id)
        self.header_start_id = self._first_known(_HEADER_STARTS)
        ends = (self.end_of_turn_id, self.end_of_conversation_id, self.header_start_id, tokenizer.eos_token_id)
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in ends if i is not None))

    def render(
        self,
        messages: Messages,
        own_role: Role | None = None,
        generation_role: Role | None = None,
        ended: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """Token ids of a conversation.

        Args:
            messages: `{"role", "content"}` dicts, true roles.
            own_role: Whose utterances are trained; None for none.
            generation_role: Whose header is opened at the end, for a generation; None closes the last turn.
            ended: The user ended the conversation: the end-of-conversation token stands in the place of the end of the
                user's last utterance, or after an assistant's utterance under a user header of its own.
            chat_template_kwargs: Passed to the tokenizer's template, which then does the rendering.

        Raises:
            SpecError: A message of another form, a text that is no valid Unicode, or a template that refuses.
        """
        if ended and (generation_role or self.end_of_conversation_id is None):
            raise SpecError("ended=True needs generation_role=None and a tokenizer with an end-of-conversation token")
        user_side = "user" in (own_role, generation_role)
        if self._default_system is not None and messages and messages[0].get("role") != "system" and not user_side:
            messages = [{"role": "system", "content": self._default_system}, *messages]
        last_is_user = bool(messages) and messages[-1].get("role") == "user"
        opens = "user" if ended and not last_is_user else generation_role
        fixed, trims = self._parts(messages, opens, chat_template_kwargs)
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for i, message in enumerate(messages):
            ids += self._fixed_ids(fixed[i])
            start = len(ids)
            ids += self._text_ids(message["content"].strip() if trims[i] else message["content"])
            closed = self._fixed_ids(fixed[i + 1])[:1] == (self.end_of_turn_id,)
            if message["role"] == own_role:
                spans.append((start, len(ids) + closed))
        if not ended:
            return Rendered((*ids, *self._fixed_ids(fixed[-1])), tuple(spans))
        if not last_is_user:
            ids += self._fixed_ids(fixed[-1])
        if own_role == "user":  # one token more: on the utterance it ends, in the place of the end of turn, or alone
            spans = [*spans[:-1], (spans[-1][0], len(ids) + 1)] if last_is_user else [*spans, (len(ids), len(ids) + 1)]
        return Rendered((*ids, self.end_of_conversation_id), tuple(spans))  # type: ignore[arg-type] # checked on entry

    def delta(self, previous_ids: Sequence[int], new_messages: Messages, generation_role: Role | None = None) -> tuple[int, ...]:
        """The ids to append to a row of prompts and sampled ids, none of which is tokenised again; none is trained.

        Args:
            previous_ids: A row that ends in a reply: with its end of turn, with the end of conversation (which then
                stands for it), or without either (a truncated reply, whose end of turn is appended here). A rendered
                conversation does too. Leave out a final `header_start_id`, with which a reply opened another turn.
            new_messages: What was said since.
            generation_role: Whose header is opened at the end.
        """
        if not previous_ids:
            return self.render(new_messages, generation_role=generation_role).token_ids
        opener = new_messages[0]["role"] if new_messages else generation_role
        anchors = [{"role": role, "content": ""} for role in (("user", "assistant") if opener == "user" else ("user",))]
        fixed, trims = self._parts([*anchors, *new_messages], generation_role)
        closing = self._fixed_ids(self._parts(anchors)[0][-1])
        tail = list(self._fixed_ids(fixed[len(anchors)]))
        previous = tuple(previous_ids[-len(closing) :])
        present = next((k for k in range(len(closing), 0, -1) if previous[-k:] == closing[:k]), 0)
        tail = tail[present or (previous[-1] == self.end_of_conversation_id) :]
        for i, message in enumerate(new_messages, start=len(anchors)):
            tail += self._text_ids(message["content"].strip() if trims[i] else message["content"])
            tail += self._fixed_ids(fixed[i + 1])
        return tuple(tail)

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text in which nothing is special; `decode` gives it back.

        Characters that the vocabulary cannot spell are lost (SmolLM2 lacks six control characters and the unassigned
        planes 4 to 11), and a tokenizer with a normalizer applies it.

        Raises:
            SpecError: The text holds a lone surrogate.
        """
        return self._text_ids(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens and ends, untrimmed."""
        said = [i for i in token_ids if i not in self.stop_ids]  # an end that was added as a word is no special token
        return str(self.tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _parts(
        self, messages: Messages, opens: str | None = None, kwargs: Mapping[str, Any] | None = None
    ) -> tuple[list[str], list[bool]]:
        """Fixed text before each content and after the last (n + 1), and whether each content is trimmed (n)."""
        for i, message in enumerate(messages):
            if message.get("role") not in _ROLES or not isinstance(message.get("content"), str):
                raise SpecError(f"message {i}: expected a role of {_ROLES} and a content string, got {dict(message)!r:.120}")
        form = self._format
        if form is None or kwargs:
            return _template_parts(self.tokenizer, [m["role"] for m in messages], opens, kwargs or {})
        headers = [form.header.format(message["role"]) for message in messages]
        closings = [form.end_of_turn + form.glue] * len(messages)
        fixed = [
            a + b for a, b in zip([form.begin, *closings], [*headers, form.header.format(opens) if opens else ""], strict=True)
        ]
        return fixed, [form.trim] * len(messages)

    def _encode_fixed(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids) if text else ()

    def _encode_text(self, text: str) -> tuple[int, ...]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise SpecError(f"expected valid Unicode, got a text with a lone surrogate at character {error.start}") from error
        ids = self._plain.encode(text, add_special_tokens=False).ids
        if self._special.isdisjoint(ids):
            return tuple(ids)
        # Vocabularies that hold markers as words (`ignore_merges`), or spell the unknown with a special token.
        return tuple(i for char in text for i in self._plain.encode(char, add_special_tokens=False).ids if i not in self._special)

    def _choose(self, kind: Kind) -> str:
        self._format, self._default_system, self.end_of_turn_id = None, None, -1
        if kind in _FORMATS:
            if missing := self._missing(_FORMATS[kind]):
                raise SpecError(f"kind={kind!r} needs the special tokens {missing} in the tokenizer")
            return kind
        if kind not in ("auto", "template"):
            raise SpecError(f"expected kind auto, chatml, llama3 or template, got {kind!r}")
        has_template = bool(self.tokenizer.chat_template)
        for name, form in _FORMATS.items() if kind == "auto" else ():
            if not self._missing(form) and (not has_template or self._agrees(form)):
                return name
        if has_template and self._agrees(None):
            return "template"
        raise SpecError(
            "expected a ChatML or Llama-3 tokenizer, or one whose chat template shows each message once, in order, and whose "
            "tokens do not depend on what stands before a message (byte-level BPE); this one's is none of these"
        )

    def _missing(self, form: _Format) -> list[str]:
        needed = [mark for mark in (form.begin, form.header.split("{")[0], form.end_of_turn) if mark]
        return [mark for mark in needed if self._first_known((mark,)) is None]

    def _agrees(self, form: _Format | None) -> bool:
        """Whether rendering that way gives `apply_chat_template`'s ids on three plain conversations."""
        self._format = form
        chat = [{"role": role, "content": f"Well, {role} 1."} for role in ("system", "user", "assistant", "user")]
        try:
            self._default_system = self._injected_system(form) if form else None
            return all(
                list(self.render(part, generation_role="assistant" if opens else None).token_ids)
                == self.tokenizer.apply_chat_template(part, add_generation_prompt=opens, return_dict=False)
                for part, opens in ((chat, True), (chat[:3], False), (chat[1:3], False))
            )
        except SpecError:
            return False

    def _injected_system(self, form: _Format | None) -> str | None:
        if form is None or not self.tokenizer.chat_template:
            return None
        before = _template_parts(self.tokenizer, ["user"], None, {})[0][0]
        start = form.begin + form.header.format("system")
        end = form.end_of_turn + form.glue + form.header.format("user")
        return before[len(start) : -len(end)] if before.startswith(start) and before.endswith(end) else None

    def _find_end_of_turn(self) -> int:
        closing = self._fixed_ids(self._parts([{"role": "user", "content": ""}, {"role": "assistant", "content": ""}])[0][-1])
        if not closing or closing[0] not in self._special:
            raise SpecError(
                "expected a chat template that closes an assistant's message with a special token, and this one does not"
            )
        return closing[0]

    def _first_known(self, marks: Sequence[str], but: int | None = None) -> int | None:
        vocabulary = self.tokenizer.get_added_vocab()
        return next((vocabulary[mark] for mark in marks if mark in vocabulary and vocabulary[mark] != but), None)


def _template_parts(
    tokenizer: Any, roles: Sequence[str], opens: str | None, kwargs: Mapping[str, Any]
) -> tuple[list[str], list[bool]]:
    """`Renderer._parts` from the tokenizer's own template, rendered around slots that are never tokenised."""
    templates = require("jinja2", "hf")
    filled = [*roles, "user"] if opens == "user" else list(roles)
    slots = [_SLOT.format(i) for i in range(len(filled))]
    # A space on each side tells whether the template trims.
    chat = [{"role": role, "content": f" {slot} "} for role, slot in zip(filled, slots, strict=True)]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=opens == "assistant", **kwargs)
    except (templates.TemplateError, TypeError, ValueError) as error:
        raise SpecError(f"the tokenizer's chat template refuses a conversation of roles {filled}: {error}") from error
    if any(text.count(slot) != 1 for slot in slots) or sorted(slots, key=text.index) != slots:
        raise SpecError("expected a chat template that shows each message once and in order, and this one does not")
    fixed, trims, rest = [], [], text
    for slot in slots:
        before, _, rest = rest.partition(slot)
        trims.append(not (before.endswith(" ") and rest.startswith(" ")))
        fixed.append(before if trims[-1] else before[:-1])
        rest = rest if trims[-1] else rest[1:]
    if opens == "user":
        return [*fixed[:-1], _as_left_open(fixed[-1], rest)], trims[:-1]
    return [*fixed, rest], trims


def _as_left_open(header: str, closing: str) -> str:
    """A user's header as far as the template itself opens one after every conversation; the line break is then the model's."""
    start = max(closing.rfind(mark) for mark in _HEADER_STARTS)
    bare = header.rstrip()
    return bare if start >= 0 and bare.endswith(closing[start:]) else header


def _special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that no utterance may hold: special tokens and added markers, but not added runs of blanks."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special or token.content.strip()}
    return frozenset(added | set(tokenizer.all_special_ids))


def _plain_tokenizer(tokenizer: Any) -> Any:
    """A private copy in which no marker is recognised in text.

    `split_special_tokens=True` would still see added tokens that are not marked special, and is state of a shared object.
    """
    record = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in record["added_tokens"]:  # marked, not removed: the ids of the others depend on their number
        token["special"] = token["special"] or bool(token["content"].strip())
    record.update(post_processor=None, truncation=None, padding=None)
    plain = require("tokenizers", "hf").Tokenizer.from_str(json.dumps(record))
    plain.encode_special_tokens = True  # special tokens are encoded as the text they are
    return plain
