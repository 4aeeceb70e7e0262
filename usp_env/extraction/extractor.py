"""The two-stage extractor (paper A.2): three calls infer attributes, one rewrites them as two paragraphs; all answer in JSON.

A malformed answer is asked for again with a new seed and the reason; after `retries` times the conversation is dropped, with that
reason. A call that fails (server down, deadline) drops nothing: the conversation is `failed` and can be done another time.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from usp_env import backends
from usp_env.backends.base import Backend, Generation, Request, Sampling
from usp_env.backends.spec import ModelSpec, parse
from usp_env.data.conversations import Conversation
from usp_env.dialogue import Dialogue
from usp_env.errors import SpecError
from usp_env.extraction import prompts, schema
from usp_env.extraction.schema import Attributes, Claim, MalformedOutputError
from usp_env.records import check_seed, generation_seed

SAMPLING = Sampling(temperature=0.5, top_p=0.95, max_tokens=1500)
RETRIES = 2
Watch = Callable[[float, Sequence[Generation]], None]
"""Told of every batch of calls: its seconds, and what came back."""

_RUN = 5  # words in a row that make a quotation


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one conversation.

    Args:
        id: The conversation's.
        attributes: What was inferred; None unless it was kept, and for a generator, which writes prose alone.
        objective: First paragraph; empty unless it was kept.
        subjective: Second paragraph.
        reason: Why it was dropped, or what failed.
        failed: Calls failed; the conversation is worth another try.
        retried: Calls that were made again.
        foreign: Attributes that were removed because their evidence quotes the assistant.
        silver: The profile generator that wrote it; empty for an extractor's.
    """

    id: str
    attributes: Attributes | None = None
    objective: str = ""
    subjective: str = ""
    reason: str = ""
    failed: bool = False
    retried: int = 0
    foreign: int = 0
    silver: str = ""

    @property
    def kept(self) -> bool:
        """Whether there is a profile."""
        return bool(self.objective)


@dataclass(frozen=True, slots=True)
class _Ask:
    """One call of one conversation."""

    id: str
    name: str
    messages: list[dict[str, str]]
    parse: Callable[[str], Any]
    json_schema: Mapping[str, Any] | None = None


@dataclass(slots=True)
class _Answers:
    """What came of a conversation's calls."""

    values: dict[str, Any] = field(default_factory=dict)
    retried: int = 0
    dropped: str = ""
    failed: str = ""

    def outcome(self, id: str) -> Outcome:
        return Outcome(id, reason=self.failed or self.dropped, failed=bool(self.failed), retried=self.retried)


class Extractor:
    """Infers profiles with a model.

    Args:
        backend: The model.
        sampling: How it samples. At temperature 0 a retry differs by the reason it is told, not by its seed.
        retries: Most repetitions of one call.
        seed: Of every call and shuffle, together with the conversation's id.
        context: Characters shown of an assistant's turn; 0 leaves them out.
        structured: Ask servers for structured outputs (`response_format`); other engines only read the prompt.
        adapter: Name of a LoRA adapter, or None.
        chat_template_kwargs: Passed to the chat template.
        watch: Told of every batch of calls.

    Raises:
        SpecError: A number is out of its range.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        sampling: Sampling = SAMPLING,
        retries: int = RETRIES,
        seed: int = 0,
        context: int = prompts.CONTEXT,
        structured: bool = True,
        adapter: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        watch: Watch | None = None,
    ) -> None:
        for name, value in (("retries", retries), ("context", context)):
            if value < 0:
                raise SpecError(f"{name}: expected at least 0, got {value}")
        self.backend, self.sampling, self.retries, self.seed = backend, sampling, retries, check_seed(seed)
        self.context, self.structured, self.watch = context, structured, watch
        self._adapter, self._template = adapter, dict(chat_template_kwargs or {})

    @classmethod
    def from_spec(cls, spec: str | ModelSpec, **options: Any) -> Extractor:
        """The extractor of a `<model>` spec; `options` are those of the constructor."""
        parsed = parse(spec) if isinstance(spec, str) else spec
        if "system" in parsed.options:
            raise SpecError(f"spec {str(parsed)!r}: the extractor has its own system prompt, leave 'system' out")
        template = parsed.options.get("chat_template_kwargs")
        known = {
            "sampling": parsed.sampling(SAMPLING),
            "adapter": parsed.options.get("adapter"),
            "chat_template_kwargs": template,
        }
        return cls(backends.load(parsed), **{**known, **options})

    def config(self) -> dict[str, Any]:
        """What decides the profiles, for a run's record."""
        texts = (prompts.SYSTEM, prompts.FACTS, prompts.SCENARIOS, prompts.TRAITS, prompts.POLISH_SYSTEM, prompts.POLISH)
        digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
        s = self.sampling
        sampling = {"temperature": s.temperature, "top_p": s.top_p, "max_tokens": s.max_tokens, "stop": list(s.stop)}
        rest = {"retries": self.retries, "seed": self.seed, "context": self.context, "structured": self.structured}
        return {"model": self.backend.spec, "adapter": self._adapter, "sampling": sampling, "prompts": digest, **rest}

    def extract(self, conversations: Sequence[Conversation]) -> list[Outcome]:
        """One outcome per conversation, in order; their calls are made together.

        Raises:
            SpecError: Two conversations share an id.
            BackendError: The engine could do nothing at all.
        """
        dialogues = {c.id: c.dialogue for c in conversations}
        if len(dialogues) != len(conversations):
            raise SpecError("expected conversations with different ids")
        answers = {id: _Answers() for id in dialogues}
        self._ask([ask for id, dialogue in dialogues.items() for ask in self._first_stage(id, dialogue)], answers)
        found: dict[str, tuple[Attributes, int]] = {}
        for id, got in answers.items():
            if not (got.dropped or got.failed):
                facts, foreign = own_claims(got.values["facts"], dialogues[id])
                found[id] = Attributes(facts, got.values["scenarios"], got.values["traits"]), foreign
        self._ask([self._polish(id, attributes) for id, (attributes, _) in found.items()], answers)
        return [_outcome(id, answers[id], *found.get(id, (None, 0))) for id in dialogues]

    def _first_stage(self, id: str, dialogue: Dialogue) -> list[_Ask]:
        return [
            _Ask(id, "facts", prompts.facts_messages(dialogue, self.context), schema.parse_facts, schema.FACTS_SCHEMA),
            _Ask(
                id,
                "scenarios",
                prompts.scenarios_messages(dialogue, self.context),
                schema.parse_scenarios,
                schema.SCENARIOS_SCHEMA,
            ),
            _Ask(id, "traits", prompts.traits_messages(dialogue), schema.parse_traits, schema.TRAITS_SCHEMA),
        ]

    def _polish(self, id: str, attributes: Attributes) -> _Ask:
        lines = attributes.lines()
        rng = np.random.default_rng(generation_seed(self.seed, f"extract/{id}/shuffle", 0, "assistant"))
        shuffled = [lines[i] for i in rng.permutation(len(lines))]  # against position bias (paper A.2)
        return _Ask(id, "polish", prompts.polish_messages(shuffled), schema.parse_profile, schema.PROFILE_SCHEMA)

    def _ask(self, asks: Sequence[_Ask], answers: Mapping[str, _Answers]) -> None:
        """Make the calls, and again those whose answer cannot be used; the results go into `answers`."""
        complaints: dict[int, str] = {}
        waiting = list(range(len(asks)))
        for attempt in range(self.retries + 1):
            for i in waiting:
                answers[asks[i].id].retried += bool(attempt)
            requests = [self._call(asks[i], attempt, complaints.get(i, "")) for i in waiting]
            refused: dict[int, str] = {}
            for i, generation in zip(waiting, self._generate(requests), strict=True):
                if complaint := _take(asks[i], generation, answers[asks[i].id]):
                    refused[i] = complaint
            # A conversation that is lost already needs no better answers.
            waiting = [i for i in refused if not (answers[asks[i].id].dropped or answers[asks[i].id].failed)]
            complaints = refused
        for i in waiting:
            answers[asks[i].id].dropped = f"{asks[i].name}: {complaints[i]}"

    def _call(self, ask: _Ask, attempt: int, complaint: str) -> Request:
        return Request(
            messages=prompts.complain(ask.messages, complaint) if complaint else ask.messages,
            sampling=self.sampling,
            seed=generation_seed(self.seed, f"extract/{ask.id}/{ask.name}", 0, "assistant", attempt),
            json_schema=ask.json_schema if self.structured else None,
            adapter=self._adapter,
            chat_template_kwargs=self._template,
        )

    def _generate(self, requests: Sequence[Request]) -> list[Generation]:
        if not requests:
            return []
        start = time.perf_counter()
        generations = self.backend.generate(requests)
        if self.watch is not None:
            self.watch(time.perf_counter() - start, generations)
        return generations


def own_claims(facts: Mapping[str, tuple[Claim, ...]], dialogue: Dialogue) -> tuple[dict[str, tuple[Claim, ...]], int]:
    """The claims without those whose evidence quotes the assistant and not the person, and how many went.

    A quotation is five words in a row.

    Example:
        >>> talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I work nights at a clinic."}]
        >>> own_claims({"occupation": (Claim("Likely a nurse", "'I work nights at a clinic'"),)}, Dialogue.of(talk))
        ({'occupation': ()}, 1)
    """
    mine, theirs = (_runs(" ".join(dialogue.utterances(role))) for role in ("user", "assistant"))

    def foreign(claim: Claim) -> bool:
        quoted = _runs(claim.evidence)
        return not quoted.isdisjoint(theirs) and quoted.isdisjoint(mine)

    own = {key: tuple(claim for claim in claims if not foreign(claim)) for key, claims in facts.items()}
    return own, sum(map(len, facts.values())) - sum(map(len, own.values()))


def _runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + _RUN]) for i in range(len(words) - _RUN + 1)}


def _take(ask: _Ask, generation: Generation, answers: _Answers) -> str:
    """Keep an answer; the complaint about one that is malformed, else an empty text."""
    if generation.error is not None:
        answers.failed = answers.failed or f"{ask.name}: {generation.error}"
    elif generation.finish_reason == "context_limit":
        answers.dropped = answers.dropped or f"{ask.name}: the conversation does not fit the model's context"
    elif generation.finish_reason == "length":
        return "it was cut off at the most tokens allowed; be shorter"
    else:
        try:
            answers.values[ask.name] = ask.parse(generation.text)
        except MalformedOutputError as error:
            return str(error)
    return ""


def _outcome(id: str, answers: _Answers, attributes: Attributes | None, foreign: int) -> Outcome:
    if attributes is None or "polish" not in answers.values:
        return answers.outcome(id)
    objective, subjective = answers.values["polish"]
    return Outcome(id, attributes, objective, subjective, retried=answers.retried, foreign=foreign)
