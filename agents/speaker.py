"""A policy that speaks token by token: it reads and makes the rows that it is trained on.

speaker = TokenSpeaker(backend, renderer, usp_prefix)          # the user's seat
episodes = roll(conductor, speaker, specs)                     # `usp_env.rollout.roll`, over the env's own conductor
row = speaker.row(episodes[0])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from agents.rows import Row, row_of
from usp_env.backends.base import Backend, Generation, Request, Sampling
from usp_env.dialogue import Role, View
from usp_env.episode import Episode
from usp_env.profiles import Profile
from usp_env.records import Reply
from usp_env.rendering import Renderer
from usp_env.users import KINDS

Prefix = Callable[[Profile | None], list[dict[str, str]]]
ON_POLICY = Sampling(temperature=1.0, top_p=1.0, max_tokens=96)
"""Whole distribution, as it is scored afterwards; a nucleus or a repetition penalty would make the behaviour another policy."""


def user_prefix(kind: str = "usp") -> Prefix:
    """What a kind of simulated user reads before the dialogue (`usp_env.users`)."""
    return lambda profile: KINDS[kind].render(View("user", (), profile))


class TokenSpeaker:
    """An agent (`usp_env.users.base.Partner`) whose prompts are rows of sampled ids.

    Args:
        backend: The engine.
        renderer: Of its tokenizer.
        prefix: Messages before the dialogue.
        role: The seat.
        sampling: How it samples; `temperature` is the one that log-probabilities are scored at.
        adapter: LoRA adapter of the policy, or None.
        spec: Recorded in transcripts.
    """

    def __init__(
        self,
        backend: Backend,
        renderer: Renderer,
        prefix: Prefix,
        role: Role = "user",
        sampling: Sampling = ON_POLICY,
        adapter: str | None = None,
        spec: str = "policy",
    ) -> None:
        self.backend, self.renderer, self.prefix, self.role = backend, renderer, prefix, role
        self.sampling, self.adapter, self.spec = sampling, adapter, spec
        self._last: dict[int, Generation] = {}

    def respond(self, views: Sequence[View], seeds: Sequence[int]) -> list[Reply]:
        """One engine call for all views."""
        made = self.backend.generate([self._request(view, seed) for view, seed in zip(views, seeds, strict=True)])
        self._last.update(zip(seeds, made, strict=True))
        return [Reply(g.text, g.finish_reason == "end", g, g.error) for g in made]

    def row(self, episode: Episode) -> Row:
        """A finished episode's row, with the end or the failure that did not become a message."""
        taken = bool(episode.messages) and episode.messages[-1].role == self.role  # what came last is a message already
        last = None if taken else self._last.get(episode.agent_seed)
        return row_of(self.renderer, self.prefix(episode.profile), episode.messages, self.role, last)

    def forget(self) -> None:
        """Drop what was said: the episodes that `row` is asked for are over."""
        self._last.clear()

    def _request(self, view: View, seed: int) -> Request:
        row = row_of(self.renderer, self.prefix(view.profile), view.messages, self.role, opens=True)
        ends = self.role == "user" and not view.opening
        return Request(
            token_ids=row.token_ids, role=self.role, sampling=self.sampling, seed=seed, adapter=self.adapter, can_end=ends
        )
