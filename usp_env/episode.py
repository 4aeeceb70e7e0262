"""The state machine of one conversation. Sans-I/O: it never calls a model.

    begin() ──▶ pending: PartnerTurn ──feed(Reply)──▶ observation
    act(text) ─▶ pending: PartnerTurn ──feed(Reply)──▶ pending: Scoring ──feed(RewardTerms | None)──▶ reward, ends

Drivers (`DialogueEnv`, `DialogueVectorEnv`, …) collect the pending work of their episodes, do it in one call
and feed the results back; nothing else knows how a conversation proceeds.

| end_reason                                        | flags      | outcome           | valid |
|---------------------------------------------------|------------|-------------------|-------|
| `user_ended` `repetition` `gratitude_loop`        | terminated | completed         | True  |
| `turn_limit` `token_budget` `context_limit`       | truncated  | completed         | True  |
| `bad_action`                                      | truncated  | agent_failure     | True  |
| `bad_user`                                        | truncated  | user_failure      | False |
| `bad_assistant`                                   | truncated  | assistant_failure | False |
| `infra`                                           | truncated  | infra_failure     | False |
| any of the first two rows, a reward returned None | its own    | unscored          | False |
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Literal

from usp_env.dialogue import Act, Dialogue, Message, Role, View, flip, other, split_end, strip_think, system_message
from usp_env.endings import is_gratitude_loop, is_repetition, speaks_as
from usp_env.errors import BackendError, CallOrderError, InvalidActionError, SpecError
from usp_env.profiles import Profile
from usp_env.records import EpisodeSpec, PartnerTurn, Reply, RewardTerms, Rules, Scoring, Snapshot, counts, generation_seed
from usp_env.spaces import is_unicode

TERMINATED = ("user_ended", "repetition", "gratitude_loop")
FAILURES = {
    "bad_action": "agent_failure",
    "bad_user": "user_failure",
    "bad_assistant": "assistant_failure",
    "infra": "infra_failure",
}
END_REASONS = (*TERMINATED, "turn_limit", "token_budget", "context_limit", *FAILURES)
OUTCOMES = ("completed", *FAILURES.values(), "unscored")


class Episode:
    """One conversation. See the module's docstring.

    Args:
        spec: Which episode.
        profile: The user's profile.
        rules: How it is conducted.
        user_options: From the sampler, for the simulated user only.

    Example:
        >>> episode = Episode(EpisodeSpec("a", "uniform", 7, "hi"), Profile("a", "You cook.", "Terse."), Rules(max_turns=1))
        >>> episode.begin(); episode.observation()
        ({'role': 'user', 'content': 'hi'},)
        >>> episode.act("Hello!"); episode.end_reason, episode.truncated, episode.outcome
        ('turn_limit', True, 'completed')
    """

    def __init__(self, spec: EpisodeSpec, profile: Profile, rules: Rules) -> None:
        self.spec, self.profile, self.rules = spec, profile, rules
        self.branch = ""
        self.messages: list[Message] = []
        self.turn = 0
        self.tokens = 0
        self.pending: PartnerTurn | Scoring | None = None
        self.reward = 0.0
        self.rewards: list[float] = []
        self.potential = 0.0  # value of the turn-wise rewards so far: a step pays the difference
        self.reward_terms: dict[str, float] = {}
        self.utterance_rewards: list[float] = []
        self.end_reason: str | None = None
        self.outcome: str | None = None
        self.error: str | None = None
        self.rejected: str | None = None  # an action or reply that was not taken into the dialogue
        self._acting = False

    # ── what drivers call ────────────────────────────────────────────────────────────────────────

    def begin(self) -> None:
        """Open the conversation: the user's first utterance, unless the agent is the user."""
        if self.spec.opening is not None:
            self._say(Message("user", self.spec.opening))
        if self.rules.agent_role == other(self._next_role):
            self._ask_partner()

    def act(self, text: str, ended: bool | None = None) -> None:
        """The agent says `text`.

        Args:
            text: The utterance.
            ended: Whether a user agent ends the conversation with it; None reads that from a final `END` marker.

        Raises:
            InvalidActionError: `text` is not a `str`.
            CallOrderError: The episode is over, or work is pending.
        """
        if not isinstance(text, str):
            raise InvalidActionError(f"expected a str (the agent's utterance), got {type(text).__name__}: {text!r:.80}")
        if self.done or self.pending is not None:
            state = f"has ended ({self.end_reason})" if self.done else "waits for its partner"
            raise CallOrderError(f"episode {self.id} {state}: call reset() before step()")
        self._acting, self.reward = True, 0.0
        message, ended = self._agent_message(text, ended)
        if ended and message is None and self.turn:
            self._end("user_ended")
        elif message is None:
            self.rejected = str(text)[: self.rules.max_chars + 1]  # one more: an overlong action stays overlong
            self._end("bad_action")
        else:
            self._say(message, ended)
            if not self.done:
                self._ask_partner()
        self._settle()

    def feed(self, result: Reply | RewardTerms | BackendError | None) -> None:
        """Take the result of the pending work."""
        work = self.pending
        if isinstance(work, PartnerTurn) and isinstance(result, Reply):
            self.pending = None
            self._hear(work, result)
            self._settle()
        elif isinstance(work, Scoring) and not isinstance(result, Reply):
            self.pending = None
            self._score(work, result)
        else:
            raise CallOrderError(f"episode {self.id}: {type(result).__name__} was fed while {type(work).__name__} was pending")

    def stop(self, reason: Literal["infra", "context_limit"], error: str | None = None) -> None:
        """End the episode from outside: the agent's own engine failed, or its context is full."""
        self.error, self._acting, self.reward = error, True, 0.0
        self._end(reason)
        self._settle()

    def ask_score(self) -> None:
        """Ask for the score of a conversation that was conducted without one; its last step is paid again.

        For drivers that score all conversations of a rollout in one call.

        Raises:
            CallOrderError: It has not ended, was scored, or ended in a way that is not scored.
        """
        if self.outcome != "completed" or self.pending is not None or self.reward_terms or not self.rewards:
            state = f"ended as {self.outcome}" if self.done else "goes on"
            raise CallOrderError(f"episode {self.id} {state}: expected a completed one without a score")
        self.rewards.pop()
        self._acting, self.pending = True, Scoring(self.profile, self.dialogue(), True)

    # ── what drivers read ────────────────────────────────────────────────────────────────────────

    @property
    def id(self) -> str:
        """Unique under its seed; forks append their branch."""
        return f"{self.spec.episode_seed:014x}" + (f".{self.branch}" if self.branch else "")

    @property
    def done(self) -> bool:
        """Whether the conversation is over (a final scoring may still be pending)."""
        return self.end_reason is not None

    @property
    def terminated(self) -> bool:
        """The conversation came to its own end."""
        return self.end_reason in TERMINATED

    @property
    def truncated(self) -> bool:
        """The conversation was cut off."""
        return self.done and not self.terminated

    @property
    def valid(self) -> bool:
        """Whether a trainer may learn from the episode."""
        return self.outcome in (None, "completed", "agent_failure")

    @property
    def agent_seed(self) -> int:
        """Seed for the agent's own generation at this turn, if it wants one."""
        return generation_seed(self.spec.episode_seed, self.branch, self.turn, self.rules.agent_role)

    @property
    def user_options(self) -> Mapping[str, Any]:
        """What the sampler gave to the simulated user."""
        return self.spec.user_options

    def dialogue(self) -> Dialogue:
        """The conversation so far."""
        return Dialogue(tuple(self.messages))

    def observation(self) -> tuple[dict[str, str], ...]:
        """The conversation as the agent sees it, fresh dicts."""
        rules, role = self.rules, self.rules.agent_role
        chat = [message.chat(rules.keep_think and message.role == role) for message in self.messages]
        if role == "assistant":
            return tuple(chat)
        return (system_message(self.profile), *(flip(chat) if rules.roles == "flipped" else chat))

    def usage(self) -> dict[str, dict[str, int]]:
        """Token counts by role."""
        total: dict[str, dict[str, int]] = {"user": {}, "assistant": {}}
        for message in self.messages:
            counts = total[message.role]
            for key, value in message.usage.items():
                counts[key] = counts.get(key, 0) + value
        return total

    # ── freezing and thawing ─────────────────────────────────────────────────────────────────────

    def snapshot(self) -> dict[str, Any]:
        """The whole state as JSON values; only between steps."""
        if self.pending is not None:
            raise CallOrderError(f"episode {self.id} can be frozen between two steps only; work is pending")
        keep = ("branch", "turn", "tokens", "potential", "end_reason", "outcome", "error", "rejected")
        return {
            "spec": asdict(self.spec),
            "profile": {f.name: getattr(self.profile, f.name) for f in fields(Profile)},
            "rules": asdict(self.rules),
            "messages": [asdict(message) for message in self.messages],
            "rewards": list(self.rewards),
            "reward_terms": dict(self.reward_terms),
            "utterance_rewards": list(self.utterance_rewards),
        } | {name: getattr(self, name) for name in keep}

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> Episode:
        """The inverse of `snapshot`."""
        try:
            for name, kind in (("turn", int), ("tokens", int), ("potential", int | float), ("branch", str)):
                if not isinstance(state[name], kind):
                    raise TypeError(f"{name}: {state[name]!r:.40}")
            if not isinstance(state["spec"]["episode_seed"], int):
                raise TypeError(f"episode_seed: {state['spec']['episode_seed']!r:.40}")
            episode = cls(EpisodeSpec(**state["spec"]), Profile(**state["profile"]), Rules(**state["rules"]))
            episode.messages = [_thaw(message) for message in state["messages"]]
            for name in ("rewards", "utterance_rewards"):
                setattr(episode, name, list(state[name]))
            episode.reward_terms = dict(state["reward_terms"])
            for name in ("branch", "turn", "tokens", "potential", "end_reason", "outcome", "error", "rejected"):
                setattr(episode, name, state[name])
        except (KeyError, TypeError) as error:
            raise SpecError(
                f"expected the state of a snapshot made by this version, got one without or with a wrong {error}"
            ) from error
        return episode

    def copy(self) -> Episode:
        """An episode that goes on from here by itself."""
        twin = copy.copy(self)  # messages, profile and rules are immutable: they are shared
        for name in ("messages", "rewards", "reward_terms", "utterance_rewards"):
            setattr(twin, name, copy.copy(getattr(self, name)))
        return twin

    def forked(self, index: int) -> Episode:
        """A copy with new noise from here on."""
        twin = Episode.restore(self.snapshot())
        twin.branch = f"{self.branch}.{self.turn}-{index}" if self.branch else f"{self.turn}-{index}"
        return twin

    # ── the machine ──────────────────────────────────────────────────────────────────────────────

    @property
    def _next_role(self) -> Role:
        return other(self.messages[-1].role) if self.messages else "user"

    def _ask_partner(self, attempt: int = 0) -> None:
        role = other(self.rules.agent_role)
        profile = self.profile if role == "user" else None
        options = self.user_options if role == "user" else {}
        seed = generation_seed(self.spec.episode_seed, self.branch, self.turn, role, attempt)
        self.pending = PartnerTurn(View(role, tuple(self.messages), profile, options), seed, attempt)

    def _agent_message(self, text: str, said_to_end: bool | None) -> tuple[Message | None, bool]:
        """The action as a message (None: nothing sayable), and whether it ends the conversation."""
        is_user = self.rules.agent_role == "user"
        bare, ended = split_end(text) if is_user and said_to_end is None else (text, is_user and bool(said_to_end))
        content = strip_think(bare)
        if len(text) > self.rules.max_chars or not content.strip() or not is_unicode(text):
            return None, ended and len(text) <= self.rules.max_chars and is_unicode(text)
        raw = str(text) if text != content else None
        known = text if isinstance(text, Act) else Act("")
        facts = (known.token_ids, known.logprobs, known.finish_reason, counts(known.usage))
        return Message(self.rules.agent_role, str(content), raw, *facts), ended

    def _hear(self, work: PartnerTurn, reply: Reply) -> None:
        role = work.view.role
        made = reply.generation
        if reply.error is not None:
            self.error = str(reply.error)
            return self._end("infra")
        if made is not None and made.finish_reason == "context_limit":
            if work.view.opening:  # nothing was said: there is no episode to learn from
                self.error = "the prompt of the opening does not fit the model's context"
                return self._end("infra")
            return self._end("context_limit")
        ended = reply.ended and role == "user" and not work.view.opening
        content = strip_think(reply.text).strip()
        if ended and not content:
            return self._end("user_ended")
        if not content or not is_unicode(reply.text) or (role == "user" and speaks_as(content, "assistant")):
            if work.attempt == 0:
                return self._ask_partner(attempt=1)
            self.rejected = reply.text
            return self._end("bad_user" if role == "user" else "bad_assistant")
        emitted = made.text if made is not None else reply.text
        raw = emitted if emitted != content else None
        facts = (made.token_ids, made.logprobs, made.finish_reason, counts(made.usage), made.notes) if made is not None else ()
        self._say(Message(role, content, raw, *facts), ended)

    def _say(self, message: Message, ended: bool = False) -> None:
        """Take an utterance into the dialogue and see whether it ends it."""
        rules = self.rules
        self.messages.append(message)
        self.tokens += message.usage.get("completion_tokens") or -(-len(message.content.encode()) // 4)
        if message.role == "user":
            self.turn += 1
            said = [m.content for m in self.messages[-5:] if m.role == "user"]  # the window of three user turns
            if ended:
                self._end("user_ended")
            elif is_repetition(said, rules.repetition_ratio):
                self._end("repetition")
            elif is_gratitude_loop(said, rules.gratitude_words):
                self._end("gratitude_loop")
        elif self.turn >= rules.max_turns:
            self._end("turn_limit")
        if not self.done and self._acting and rules.token_budget is not None and self.tokens >= rules.token_budget:
            self._end("token_budget")

    def _end(self, reason: str) -> None:
        self.end_reason = reason
        self.outcome = FAILURES.get(reason, "completed")
        self.pending = None

    def _settle(self) -> None:
        """After the step's last utterance: ask for a score, or close the step."""
        if self.pending is not None or not self._acting:
            return
        final = self.done
        if self.outcome in (None, "completed") and (self.rules.scoring == "turn" or (final and self.rules.scoring == "end")):
            self.pending = Scoring(self.profile, self.dialogue(), final)
        else:
            self._close_step(self.rules.bad_action_reward if self.outcome == "agent_failure" else 0.0)

    def _score(self, work: Scoring, result: RewardTerms | BackendError | None) -> None:
        if isinstance(result, BackendError):
            self.error = str(result)
            self._end("infra")
            self.reward_terms = {}
            return self._close_step(0.0)
        if result is None:
            if work.final:
                self.outcome, self.reward_terms = "unscored", {}
            return self._close_step(0.0)
        reward = result.value - self.potential
        self.potential, self.reward_terms = result.value, result.flat
        self._close_step(reward, result if work.final else None)

    def _close_step(self, reward: float, terms: RewardTerms | None = None) -> None:
        self.reward, self._acting = reward, False
        self.rewards.append(reward)
        if not self.done:
            return
        if self.rules.agent_role == "assistant":
            self.utterance_rewards = self._paid_to_utterances()
        elif terms is not None:
            self.utterance_rewards = terms.credit(self.turn)  # Eq. 6
        else:
            self.utterance_rewards = [0.0] * self.turn + ([reward] if self.outcome == "agent_failure" else [])

    def _paid_to_utterances(self) -> list[float]:
        """Step rewards; what a last step without an utterance pays goes to the last utterance."""
        said = sum(message.role == self.rules.agent_role for message in self.messages) + (self.outcome == "agent_failure")
        paid = list(self.rewards[:said])
        if paid:
            paid[-1] += sum(self.rewards[said:])
        return paid


def _thaw(message: Mapping[str, Any]) -> Message:
    lists = {name: None if message[name] is None else tuple(message[name]) for name in ("token_ids", "logprobs")}
    return Message(**{**message, **lists})


__all__ = [
    "END_REASONS",
    "OUTCOMES",
    "Episode",
    "EpisodeSpec",
    "PartnerTurn",
    "Reply",
    "RewardTerms",
    "Rules",
    "Scoring",
    "Snapshot",
    "generation_seed",
]
