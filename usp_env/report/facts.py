"""What both viewers (terminal and HTML) say about transcripts: pure functions over their JSON objects.

Text in a transcript comes from models and is never trusted: `visible` goes over all of it before it is shown.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from usp_env.backends.spec import split_options
from usp_env.dialogue import Dialogue, Message, flip, system_message
from usp_env.episode import generation_seed
from usp_env.profiles import Profile
from usp_env.users import KINDS


@dataclass(frozen=True, slots=True)
class Utterance:
    """A message with what happened around it.

    Args:
        index: In `messages`.
        turn: From 1 on: the number of user utterances so far, this one included.
        role: Who speaks.
        agent: Whether this is the agent's seat.
        reward: Of the step in which the agent said it; None for the partner.
        message: The transcript's object.
    """

    index: int
    turn: int
    role: str
    agent: bool
    reward: float | None
    message: Mapping[str, Any]


def utterances(transcript: Mapping[str, Any]) -> tuple[list[Utterance], list[float]]:
    """The messages, each agent utterance with its step's reward, and the rewards of steps that left no message.

    An opening that was given to an agent in the user's seat belongs to no step: it has no reward.
    """
    messages, seat, rewards = transcript["messages"], transcript["agent_role"], list(transcript["rewards"])
    mine = [index for index, message in enumerate(messages) if message["role"] == seat]
    paid = dict(zip(mine[max(0, len(mine) - len(rewards)) :], rewards, strict=False))
    found, turn = [], 0
    for index, message in enumerate(messages):
        role = message["role"]
        turn += role == "user"
        found.append(Utterance(index, max(turn, 1), role, role == seat, paid.get(index), message))
    return found, rewards[len(paid) :]


def turns(transcript: Mapping[str, Any]) -> int:
    """Number of user utterances."""
    return sum(message["role"] == "user" for message in transcript["messages"])


def number(value: float | None, sign: bool = True) -> str:
    """Three decimals; a dash for what is not known.

    Example:
        >>> number(0.5), number(-0.25), number(2, sign=False), number(None)
        ('+0.500', '−0.250', '2.000', '–')
    """
    return "–" if value is None else format(value, "+.3f" if sign else ".3f").replace("-", "−")


def fixed(value: float | None, digits: int = 2, sign: str = "") -> str:
    """So many decimals, with a sign where `sign` is `+`; a dash for what is not known.

    Example:
        >>> fixed(1.234), fixed(-0.001), fixed(-1.5, 1), fixed(2, sign="+"), fixed(None)
        ('1.23', '0.00', '−1.5', '+2.00', '–')
    """
    return "–" if value is None else f"{round(value, digits) + 0.0:{sign}.{digits}f}".replace("-", "−")


def interval(ends: Sequence[float] | None, digits: int = 2, sign: str = "") -> str:
    """Both ends of an interval; nothing without one.

    Example:
        >>> interval((-1, 2)), interval(None)
        ('[−1.00, 2.00]', '')
    """
    return f"[{fixed(ends[0], digits, sign)}, {fixed(ends[1], digits, sign)}]" if ends else ""


def spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation, √(Σ(x−x̄)²/(n−1)); None where there are too few values.

    Example:
        >>> spread([1.0, 3.0]), spread([1.0]), spread([])
        ((2.0, 1.4142135623730951), (1.0, None), (None, None))
    """
    if not values:
        return None, None
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((x - mean) * (x - mean) for x in values) / (len(values) - 1))


@dataclass(frozen=True, slots=True)
class Group:
    """Figures of some episodes; turns and returns are of the valid ones, returns of those with at least one step.

    Args:
        name: The population, or `"all"`.
        episodes: How many.
        valid: How many of them are valid.
        turns: Mean number of user utterances.
        mean: Mean return.
        sd: Sample standard deviation of the returns.
        n: Number of returns.
        outcomes: Outcome to count.
        ends: End reason to count.
    """

    name: str
    episodes: int
    valid: int
    turns: float | None
    mean: float | None
    sd: float | None
    n: int
    outcomes: Mapping[str, int]
    ends: Mapping[str, int]

    @property
    def returns(self) -> str:
        """Mean ± sd of the returns."""
        return number(self.mean) + ("" if self.sd is None else f" ± {number(self.sd, sign=False)}")


def group(name: str, transcripts: Sequence[Mapping[str, Any]]) -> Group:
    """The figures of these episodes."""
    valid = [t for t in transcripts if t["valid"]]
    returns = [float(sum(t["rewards"])) for t in valid if t["rewards"]]
    mean, sd = spread(returns)
    outcomes, ends = (dict(Counter(t[key] for t in transcripts).most_common()) for key in ("outcome", "end_reason"))
    return Group(name, len(transcripts), len(valid), spread([turns(t) for t in valid])[0], mean, sd, len(returns), outcomes, ends)


def groups(transcripts: Sequence[Mapping[str, Any]]) -> list[Group]:
    """One group a population, by name."""
    names = sorted({t["population"] for t in transcripts})
    return [group(name, [t for t in transcripts if t["population"] == name]) for name in names]


def received(transcript: Mapping[str, Any], index: int) -> list[dict[str, str]]:
    """The messages that the speaker of `messages[index]` was given, rebuilt from the transcript.

    Exact for users of `usp_env.users` and for assistants; a speaker with a script, or unknown here, is shown the
    conversation so far. (The chat template, and the escapes of a chat server, come after this.)
    """
    role = transcript["messages"][index]["role"]
    before = [Message(m["role"], m["content"], m.get("raw")) for m in transcript["messages"][:index]]
    profile = Profile(
        transcript["profile_id"], transcript["profile"].get("objective", ""), transcript["profile"].get("subjective", "")
    )
    spec, rules = transcript["models"].get(role, "agent"), transcript.get("rules") or {}
    if spec == "agent":  # its own loop: what the environment let it observe
        chat = [message.chat(rules.get("keep_think", True) and message.role == role) for message in before]
        if role == "assistant":
            return chat
        return [system_message(profile), *(flip(chat) if rules.get("roles") == "flipped" else chat)]
    if role == "user" and spec.partition(":")[0] in KINDS:
        rendered: list[dict[str, str]] = KINDS[spec.partition(":")[0]].render(Dialogue(tuple(before)).view_for("user", profile))
        return rendered
    system = split_options(spec)[1].get("system") if role == "assistant" else None
    return ([{"role": "system", "content": str(system)}] if system else []) + [message.chat() for message in before]


def seed_of(transcript: Mapping[str, Any], index: int) -> int:
    """The seed of the first attempt at `messages[index]`.

    A branch id holds one `turn-copy` part a fork; what was said before a fork was said under the parent's id.
    """
    role = transcript["messages"][index]["role"]
    turn = sum(message["role"] == "user" for message in transcript["messages"][:index])
    # Episodes are forked when the agent is to speak: in the user's seat the answer to that turn was there already.
    last = turn - (transcript["agent_role"] == "user" and role == "assistant")
    parts = [part for part in transcript.get("branch", "").split(".") if part.partition("-")[0].isdigit()]
    branch = ".".join(part for part in parts if int(part.partition("-")[0]) <= last)
    return generation_seed(transcript["episode_seed"], branch, turn, role)
