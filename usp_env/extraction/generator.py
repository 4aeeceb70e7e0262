r"""The profile generator: a model that reads what a person said and writes their two paragraphs in one pass.

It is the distilled extractor, and the mirror of cycle consistency (`usp_env.rewards.cycle`). It reads USER turns alone; what the
assistant said changes nothing. Prompt of the released weights (`examples/profile_generator.py`), to the byte:

    system  You are an expert in creating user profile descriptions based on dialogue analysis.
    user    Analyze the user utterances marked by [User] to generate a comprehensive and descriptive user profile\n
            [User]: {u}\n---\n                                                              once for each utterance

**What does not fit.** Prompt and output must fit the model's context. Where they do not, the longest turns are capped at one
common length, about as long as fits, and end in "…": every turn keeps its beginning, where people ask, and a pasted file loses
its tail. Cutting the conversation's front or end instead would lose whole requests. Only when 64 characters a turn are
still too many do the oldest turns go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from usp_env.backends import load as load_backend
from usp_env.backends.base import Backend, Generation, Request, Sampling
from usp_env.backends.spec import ModelSpec, parse
from usp_env.dialogue import Dialogue, strip_think
from usp_env.errors import BackendError, SpecError

PACKAGED = "profile-generator"
SYSTEM_PROMPT = "You are an expert in creating user profile descriptions based on dialogue analysis."
USER_PROMPT = (
    "Analyze the user utterances marked by [User] to generate a comprehensive and descriptive user profile\n{utterances}"
)
SAMPLING = Sampling(temperature=0.0, max_tokens=320)
RETRY = Sampling(temperature=0.7, top_p=0.95, max_tokens=320)
"""Where the greedy output is not two paragraphs: one more, drawn with a fixed seed, so that a reward stays a function."""
CONTEXT = 4096
"""Most tokens of prompt and output: what the released generator was trained on."""
PACKAGED_CONTEXT = 448 + SAMPLING.max_tokens
"""The same of the packaged generator: its training's longest prompt, and its output."""
MIN_CHARS = 64
TEMPLATE_TOKENS = 32  # role headers and end-of-turn tokens around the two messages
_BYTES_PER_TOKEN = 3  # where nobody can count: English has 4, code and other scripts fewer


class ProfileTexts(NamedTuple):
    """The two paragraphs of a profile.

    Args:
        objective: OF, what the person is and wants.
        subjective: SC, how the person writes and which traits show.
    """

    objective: str
    subjective: str


Read = ProfileTexts | BackendError | None
"""What came of one dialogue."""


def profile_messages(utterances: Sequence[str]) -> list[dict[str, str]]:
    r"""The prompt for a person's utterances.

    Example:
        >>> profile_messages(["hi", "thanks"])[1]["content"].split("\n", 1)[1]
        '[User]: hi\n---\n[User]: thanks\n---\n'
    """
    marked = "".join(f"[User]: {utterance}\n---\n" for utterance in utterances)
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": USER_PROMPT.replace("{utterances}", marked)},
    ]


def parse_profile(text: str) -> ProfileTexts | None:
    r"""First line OF, last line SC, as the released reward service reads them; None unless these are all there is.

    Example:
        >>> parse_profile("You cook.\n\nYou are terse.")
        ProfileTexts(objective='You cook.', subjective='You are terse.')
        >>> parse_profile("You cook and are terse."), parse_profile("One.\n\nTwo.\n\nThree.")
        (None, None)
    """
    paragraphs = [line.strip() for line in strip_think(text).split("\n") if line.strip()]
    whole = not any("\ud800" <= char <= "\udfff" for part in paragraphs for char in part)  # no file and no tokenizer takes these
    return ProfileTexts(*paragraphs) if len(paragraphs) == 2 and whole else None


def fit_turns(utterances: Sequence[str], budget: int, count: Callable[[str], int]) -> list[str]:
    """Utterances whose prompt costs at most `budget` tokens; see the module's docstring.

    Where the first 64 characters of the last turn alone are too many, they are returned: the engine refuses them.

    Args:
        utterances: What the person said.
        budget: Most tokens of the prompt, the template's own not counted.
        count: Tokens of a text.

    Example:
        >>> words = lambda text: len(text.split())
        >>> [len(turn.split()) for turn in fit_turns(["fix it", "a " * 500], 100, words)]
        [2, 65]
    """

    def cost(turns: Sequence[str]) -> int:
        return sum(count(message["content"]) for message in profile_messages(turns))

    kept = list(utterances)
    if (spent := cost(kept)) <= budget:
        return kept
    fixed = cost([""] * len(kept))
    # Characters, at the rate of tokens of the whole text: engines remember what they tokenise, so few versions are tried.
    room = sum(map(len, kept)) * (budget - fixed) / max(1, spent - fixed)
    while True:
        cap = max(MIN_CHARS, _level([len(turn) for turn in kept], room))
        capped = [_capped(turn, cap) for turn in kept]
        if cost(capped) <= budget or (cap == MIN_CHARS and len(kept) <= 1):
            return capped
        if cap == MIN_CHARS:
            lost = _too_many(capped, lambda turns: cost(turns) <= budget)
            kept, room = kept[lost:], room * 0.95 ** (lost - 1)
        room *= 0.95


def _too_many(turns: Sequence[str], fits: Callable[[Sequence[str]], bool]) -> int:
    """How many of the oldest turns must go until the others fit; all but one at most, at least one. Few tries: each is read."""
    low, high = 1, max(1, len(turns) - 1)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(turns[middle:]) else (middle + 1, high)
    return low


def _level(lengths: Sequence[int], room: float) -> int:
    """The cap c that makes the sum of min(length, c) as large as `room` allows; at least 0."""
    for k, length in enumerate(sorted(lengths)):
        share = room / (len(lengths) - k)
        if length > share:
            return max(0, int(share))
        room -= length
    return max(lengths, default=0)


def _capped(turn: str, chars: int) -> str:
    return turn if len(turn) <= chars else turn[: chars - 1].rstrip() + "…"


@dataclass(frozen=True)
class ProfileGenerator:
    r"""Asks a backend for profiles.

    Args:
        backend: The engine.
        sampling: Greedy by default, so that a reward is a function of the dialogue.
        context: Most tokens of prompt and output; a smaller limit of the engine's own holds.
        adapter: LoRA adapter, or None.
        chat_template_kwargs: Passed to the chat template.

    Example:
        >>> from usp_env.backends.scripted import ScriptedBackend
        >>> generator = ProfileGenerator(ScriptedBackend(["You want soup.\n\nYou are terse."]))
        >>> generator.generate([Dialogue.of([{"role": "user", "content": "soup?"}])])
        [ProfileTexts(objective='You want soup.', subjective='You are terse.')]
    """

    backend: Backend
    sampling: Sampling = SAMPLING
    context: int = CONTEXT
    adapter: str | None = None
    chat_template_kwargs: tuple[tuple[str, object], ...] = ()

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides the profiles besides the dialogue."""
        return {
            "backend": dict(self.backend.identity),
            "adapter": self.adapter,
            "sampling": self.sampling,
            "context": self.context,
        }

    def generate(
        self, dialogues: Sequence[Dialogue], watch: Callable[[Sequence[Generation]], object] | None = None
    ) -> list[Read]:
        """One profile per dialogue, in one engine call, and one more for those whose output was not two whole paragraphs.

        Args:
            dialogues: Any number.
            watch: Told what the engine gave.

        Returns:
            For each dialogue its profile; None where the person said nothing, or the model wrote no two paragraphs within
            its `max_tokens`; the `BackendError` where this one call failed.

        Raises:
            BackendError: Nothing of the batch could be done.
        """
        asked = [i for i, dialogue in enumerate(dialogues) if dialogue.turns]
        made = self._ask([self.request(dialogues[i]) for i in asked], watch)
        results = dict(zip(asked, made, strict=True))
        again = [i for i in asked if results[i] is None]
        second = replace(RETRY, max_tokens=self.sampling.max_tokens)
        try:
            made = self._ask([replace(self.request(dialogues[i]), sampling=second) for i in again], watch)
        except BackendError as error:  # the first answers stand
            made = [error] * len(again)
        results |= dict(zip(again, made, strict=True))
        return [results.get(i) for i in range(len(dialogues))]

    def _ask(self, requests: Sequence[Request], watch: Callable[[Sequence[Generation]], object] | None) -> list[Read]:
        made = self.backend.generate(requests) if requests else []
        if watch is not None and requests:
            watch(made)
        return [self._read(generation) for generation in made]

    def request(self, dialogue: Dialogue) -> Request:
        """What the engine is asked for one dialogue."""
        limit = min(self.context, int(getattr(self.backend, "max_model_len", None) or self.context))
        count = getattr(self.backend, "count_tokens", None) or _estimate
        turns = fit_turns(dialogue.utterances("user"), limit - self.sampling.max_tokens - TEMPLATE_TOKENS, count)
        return Request(
            messages=profile_messages(turns),
            sampling=self.sampling,
            adapter=self.adapter,
            chat_template_kwargs=dict(self.chat_template_kwargs),
        )

    def _read(self, generation: Generation) -> Read:
        if generation.error is not None:
            return generation.error
        if generation.finish_reason == "context_limit":
            # Not the model's fault, and no row would do better: None would hide it in the unscored ones.
            return BackendError(
                f"profile generator {self.backend.spec}: the prompt, cut to {self.context} tokens with its output, did not fit; "
                "give ProfileGenerator a smaller context, or the spec fewer max_tokens"
            )
        # What was cut off may look whole: the second paragraph lacks what would have come.
        return None if generation.finish_reason == "length" else parse_profile(generation.text)


def load_generator(spec: str = PACKAGED, source: Callable[[ModelSpec], Backend] = load_backend) -> ProfileGenerator:
    """The profile generator that a spec names.

    Args:
        spec: `"profile-generator"` (the packaged one, an adapter merged into SmolLM2-135M), or any `<model>`, e.g.
            `"wangkevin02/Profile_Generator"` or `"openai:MODEL@URL"`; options follow as everywhere (`?max_tokens=400`).
        source: Gives the backend of a model spec, e.g. one behind `usp_env.backends.load_cached`.

    Raises:
        MissingAssetError: Its weights have to be fetched first.
        SpecError: The spec breaks the grammar, or sets a system prompt.
        UnknownNameError: An unknown option or endpoint.
    """
    parsed = parse(spec)
    if "system" in parsed.options:
        raise SpecError(f"profile generator {spec!r}: its system prompt is fixed, it was trained with it; leave 'system' out")
    return ProfileGenerator(
        source(parsed),
        parsed.sampling(SAMPLING),
        parsed.options.get("max_model_len", PACKAGED_CONTEXT if parsed.model == PACKAGED else CONTEXT),
        parsed.options.get("adapter"),
        tuple(parsed.options.get("chat_template_kwargs", {}).items()),
    )


def _estimate(text: str) -> int:
    return -(-len(text.encode()) // _BYTES_PER_TOKEN)
