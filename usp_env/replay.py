"""Reruns recorded episodes through the state machine, with no model, and goes on live from any turn.

A replay is a check, too: every recorded utterance is fed to a fresh `Episode`, which must end as the record says.
"""

from __future__ import annotations

from typing import Any

from usp_env.backends.base import Generation
from usp_env.dialogue import END, Act, split_end
from usp_env.episode import Episode
from usp_env.errors import BackendError, SpecError, TranscriptError
from usp_env.profiles import Profile
from usp_env.records import EpisodeSpec, PartnerTurn, Reply, Rules
from usp_env.transcripts import Transcript, transcribe


def replay(transcript: Transcript) -> Episode:
    """The finished episode of a transcript, rebuilt utterance by utterance.

    Raises:
        TranscriptError: The record does not follow its own rules (it was edited, or comes from elsewhere).
    """
    episode = _start(transcript)
    said = list(transcript.messages[len(episode.messages) :])  # a given opening stands there already
    while said and not episode.done:
        _say(episode, said.pop(0), last=not said, transcript=transcript)
    if not episode.done:
        _finish(episode, transcript)
    rebuilt = transcribe(episode, transcript.models)
    for name in ("messages", "end_reason", "terminated", "truncated"):
        if getattr(rebuilt, name) != getattr(transcript, name) or said:
            where, due, came = _difference(name, getattr(rebuilt, name), getattr(transcript, name))
            raise TranscriptError(
                f"episode {transcript.episode_id}: the record does not follow its own rules: {where} should be "
                f"{due!r:.100}, the file says {came!r:.100}"
            )
    if len(episode.rewards) != len(transcript.rewards):
        raise TranscriptError(
            f"episode {transcript.episode_id}: expected one reward for each of {len(episode.rewards)} steps, "
            f"got {len(transcript.rewards)}"
        )
    episode.rewards, episode.utterance_rewards = list(transcript.rewards), list(transcript.utterance_rewards)
    episode.reward_terms, episode.outcome = dict(transcript.reward_terms), transcript.outcome
    return episode


def _difference(name: str, due: Any, came: Any) -> tuple[str, Any, Any]:
    """The first difference: where, what should stand there, and what does."""
    if name != "messages":
        return name, due, came
    for index, (ours, theirs) in enumerate(zip(due, came, strict=False)):
        for key in {**ours, **theirs}:
            if ours.get(key) != theirs.get(key):
                return f"messages[{index}].{key}", ours.get(key), theirs.get(key)
    return "the number of messages", len(due), len(came)


def go_on(transcript: Transcript, turn: int, rules: Rules, profile: Profile | None = None) -> Episode:
    """The episode as it stood before the agent's `turn`-th action, ready to go on live.

    Args:
        transcript: Of either seat.
        turn: From 1 on.
        rules: How it is conducted from here on (seat as recorded).
        profile: The bank's, whose attributes rewards may need; None takes the record's prose alone.

    Raises:
        SpecError: There is no such turn, or the seats differ.
    """
    if rules.agent_role != transcript.agent_role:
        raise SpecError(f"the record's agent is the {transcript.agent_role}, the environment's is the {rules.agent_role}")
    steps = len(transcript.rewards)
    if not 1 <= turn <= steps:
        raise SpecError(f"episode {transcript.episode_id} has the turns 1 to {steps}; cannot go on from turn {turn}")
    episode = _start(transcript)
    episode.profile = profile or episode.profile
    for message in transcript.messages[len(episode.messages) :]:
        if message["role"] == transcript.agent_role and len(episode.rewards) == turn - 1:
            break
        _say(episode, message, last=False, transcript=transcript)
    episode.rules = rules
    episode.rewards = list(transcript.rewards[: turn - 1])
    episode.potential = float(sum(episode.rewards))  # turn-wise rewards telescope from 0
    return episode


def _start(transcript: Transcript) -> Episode:
    try:
        rules = Rules(**{**transcript.rules, "scoring": "never"})
    except TypeError as error:
        raise TranscriptError(f"episode {transcript.episode_id}: unknown rules ({error})") from error
    options = transcript.user_options
    spec = EpisodeSpec(transcript.profile_id, transcript.population, transcript.episode_seed, transcript.opening, options)
    profile = Profile(transcript.profile_id, transcript.profile.get("objective", ""), transcript.profile.get("subjective", ""))
    episode = Episode(spec, profile, rules)
    episode.branch = transcript.branch
    episode.begin()
    return episode


def _say(episode: Episode, message: Any, last: bool, transcript: Transcript) -> None:
    text = message.get("raw") if message.get("raw") is not None else message["content"]
    notes = message.get("notes", {})
    role, facts = message["role"], (message.get("token_ids"), message.get("logprobs"), message.get("finish_reason"))
    ends = last and transcript.end_reason == "user_ended" and role == "user"
    turn = episode.pending
    if isinstance(turn, PartnerTurn) and turn.view.role == role:
        ids, logprobs, reason = facts
        known = reason is not None or ids is not None or message.get("usage")
        usage = message.get("usage", {})
        made = Generation(text, ids and tuple(ids), logprobs and tuple(logprobs), reason or "stop", usage, notes=notes)
        episode.feed(Reply(text, ends, made if known else None))
    elif turn is None and role == episode.rules.agent_role:
        marked = split_end(text)[1] and not split_end(message["content"])[1]
        episode.act(Act(text, *facts, message.get("usage", {})), None if marked else ends)
    else:
        raise TranscriptError(f"episode {transcript.episode_id}: a {role} utterance stands where the other side speaks")


def _finish(episode: Episode, transcript: Transcript) -> None:
    """Bring about the recorded end, where it left no utterance."""
    reason, waiting = transcript.end_reason, isinstance(episode.pending, PartnerTurn)
    if reason == "user_ended":
        episode.feed(Reply("", ended=True)) if waiting else episode.act(END)
    elif reason == "context_limit" and waiting:
        episode.feed(Reply("", generation=Generation("", finish_reason="context_limit")))
    elif reason == "infra" and waiting:
        episode.feed(Reply("", error=BackendError(transcript.error or "recorded failure")))
    elif reason in ("infra", "context_limit"):
        episode.stop(reason, transcript.error)  # type: ignore[arg-type]
    elif reason == "bad_action" and not waiting:
        episode.act(transcript.rejected or "")
    elif waiting and reason in ("bad_user", "bad_assistant"):
        for _ in range(2):  # the second draw is the one that counts
            episode.feed(Reply(transcript.rejected or ""))
