"""Profiles from the profile generator instead of the extractor: one call a conversation, offline, prose without attributes.

What it writes is *silver*: every line of such a bank names the generator in the field `silver`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from usp_env.backends.base import Generation
from usp_env.backends.spec import format_options, parse
from usp_env.data.conversations import Conversation
from usp_env.errors import BackendError
from usp_env.extraction.extractor import Outcome, Watch
from usp_env.extraction.generator import PACKAGED, ProfileGenerator, ProfileTexts, load_generator
from usp_env.models import assets


class Distilled:
    """A profile generator as a source of banks (`usp_env.extraction.run.extract_bank`).

    Args:
        generator: It.
        name: What `silver` says.
        watch: Told of every batch of calls.
    """

    def __init__(self, generator: ProfileGenerator, name: str, watch: Watch | None = None) -> None:
        self.generator, self.name, self.watch = generator, name, watch

    @classmethod
    def from_spec(cls, spec: str = PACKAGED, watch: Watch | None = None) -> Distilled:
        """The one that a spec of `load_generator` names, by what its weights are: model, version, adapter."""
        parsed = parse(spec)
        version = f"-{assets.ASSETS[parsed.model].version}" if parsed.model in assets.ASSETS else ""
        weights = {key: parsed.options[key] for key in ("revision", "adapter") if key in parsed.options}
        return cls(load_generator(spec), f"{parsed.model}{version}{format_options(weights)}", watch)

    def config(self) -> dict[str, Any]:
        """What decides the profiles, for a run's record."""
        sampling = self.generator.sampling
        return {
            "generator": self.name,
            "sampling": {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens},
            "context": self.generator.context,
            "adapter": self.generator.adapter,
        }

    def extract(self, conversations: Sequence[Conversation]) -> list[Outcome]:
        """One outcome per conversation, in order; one engine call for all, and one more for those that it failed.

        Raises:
            BackendError: The engine could do nothing at all.
        """
        start = time.perf_counter()
        seen: list[Generation] = []
        made = self.generator.generate([c.dialogue for c in conversations], seen.extend)
        if self.watch is not None:
            self.watch(time.perf_counter() - start, seen)
        return [self._outcome(c.id, result) for c, result in zip(conversations, made, strict=True)]

    def _outcome(self, id: str, result: ProfileTexts | BackendError | None) -> Outcome:
        if isinstance(result, BackendError):
            return Outcome(id, reason=str(result), failed=True)
        if result is None:
            return Outcome(id, reason=f"the generator wrote no two paragraphs within {self.generator.sampling.max_tokens} tokens")
        return Outcome(id, objective=result.objective, subjective=result.subjective, silver=self.name)
