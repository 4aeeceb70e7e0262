"""Does the benchmark measure help? Assistants whose place in the ranking is known before it is played.

    | name          | what                                                                          | where it belongs          |
    |---------------|-------------------------------------------------------------------------------|---------------------------|
    | `spammer`     | is told what the user wants and says the words of it, in a heap                | below any real assistant  |
    | `essay`       | 2,000 generic words, whatever is asked                                        | below any real assistant  |
    | `ladder-good` | the real assistant's replies, from the conversation that the profile was read from | above `ladder-mid`   |
    | `ladder-mid`  | the same at half of the turns, by the toss of a coin, else a refusal          | between the two           |
    | `ladder-bad`  | refuses                                                                       | below `ladder-mid`        |

The benchmark takes these names beside specs. A user simulator and a reward that do not rank the ladder `LADDER` in its order
measure something else than help (tester ladders: Sun et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from usp_env.assistants import REFUSAL, RuleAssistant
from usp_env.dialogue import Dialogue, Message, Role, View
from usp_env.errors import MissingAssetError, UnknownNameError, UspError
from usp_env.evaluation.leaderboard import Estimate, Leaderboard
from usp_env.metrics.lexical import word_tokens
from usp_env.profiles import VIRTUAL_PREFIX, Profile, ProfileBank
from usp_env.records import EpisodeSpec, Reply, generation_seed
from usp_env.rewards.goal import details_of
from usp_env.users.base import Partner
from usp_env.users.replay import Nearest

LADDER = ("ladder-good", "ladder-mid", "ladder-bad")
"""Best first."""
ANCHORS = ("spammer", "essay", *LADDER)

Answer = Callable[[Profile, Sequence[Message], int], str]


class Informed:
    """An assistant that knows whom it talks with: for anchors only. It tells an episode by the seed of its reply.

    Args:
        spec: Its name.
        answer: (profile, messages, seed) to the reply.
        episodes: Of the benchmark.
        bank: Where profile ids are looked up.
        turns: Most turns of an episode.
    """

    role: Role = "assistant"

    def __init__(self, spec: str, answer: Answer, episodes: Sequence[EpisodeSpec], bank: ProfileBank, turns: int) -> None:
        self.spec, self.answer = spec, answer
        self._people = {
            generation_seed(episode.episode_seed, "", turn, "assistant"): bank.get(episode.profile_id)
            for episode in episodes
            for turn in range(1, turns + 1)
        }

    def respond(self, views: Sequence[View], seeds: Sequence[int]) -> list[Reply]:
        """One answer per view."""
        return [Reply(self.answer(self._people[seed], view.messages, seed)) for view, seed in zip(views, seeds, strict=True)]


def anchor(name: str, episodes: Sequence[EpisodeSpec], bank: ProfileBank, turns: int) -> Partner:
    """One of `ANCHORS` for the episodes of a benchmark.

    Raises:
        UnknownNameError: No such anchor.
        MissingAssetError: The ladder needs conversations: the bank has none, and the data set was not fetched.
    """
    if name == "essay":
        return RuleAssistant("essay", lambda said: essay())
    if name == "ladder-bad":
        return RuleAssistant("ladder-bad", lambda said: REFUSAL)
    if name == "spammer":
        return Informed("spammer", lambda profile, messages, seed: spam(profile), episodes, bank, turns)
    if name not in ANCHORS:
        raise UnknownNameError("anchor", name, ANCHORS)
    real = RealReplies(conversations(bank, [episode.profile_id for episode in episodes]))

    def half(profile: Profile, messages: Sequence[Message], seed: int) -> str:
        return real(profile, messages, seed) if seed % 2 else REFUSAL

    return Informed(name, real if name == "ladder-good" else half, episodes, bank, turns)


def spam(profile: Profile) -> str:
    """The words of what a user wants, each once, in a heap."""
    return " ".join(dict.fromkeys(word_tokens(details_of(profile)))) or REFUSAL


@cache
def essay(words: int = 2000) -> str:
    """Generic advice of so many words that fits everything and answers nothing."""
    parts = [pattern.format(topic=topic) for topic in _TOPICS for pattern in _PATTERNS]
    text: list[str] = []
    while len(text) < words:
        text += " ".join(parts).split()
    return " ".join(text[:words])


class RealReplies:
    """The reply that followed the user turn nearest to the newest one, in the conversation that a profile was read from.

    Args:
        dialogues: Profile id to that conversation.
    """

    def __init__(self, dialogues: Mapping[str, Dialogue]) -> None:
        self._replies: dict[str, dict[str, str]] = {}
        self._nearest: dict[str, Nearest] = {}
        for key, dialogue in dialogues.items():
            turns = [(a.content, b.content) for a, b in pairwise(dialogue) if (a.role, b.role) == ("user", "assistant")]
            said = {str(i): (asked, reply) for i, (asked, reply) in enumerate(turns) if reply.strip()}
            if said:
                self._replies[key] = {i: reply for i, (_, reply) in said.items()}
                self._nearest[key] = Nearest({i: asked for i, (asked, _) in said.items()})

    def __call__(self, profile: Profile, messages: Sequence[Message], seed: int) -> str:
        """The reply; a refusal where the conversation has none."""
        key = next((key for key in donors(profile.id) if key in self._replies), None)
        if key is None or not messages:
            return REFUSAL
        return self._replies[key][self._nearest[key](messages[-1].content)]


def donors(profile_id: str) -> list[str]:
    """The id itself, or every id that may be the donor of a virtual profile's requests (ids may hold plus signs)."""
    if not profile_id.startswith(VIRTUAL_PREFIX):
        return [profile_id]
    parts = profile_id.removeprefix(VIRTUAL_PREFIX).split("+")
    return ["+".join(parts[:cut]) for cut in range(len(parts) - 1, 0, -1)]


def conversations(bank: ProfileBank, profile_ids: Sequence[str]) -> dict[str, Dialogue]:
    """The conversations that profiles were read from: the bank's own, else the data set's.

    Raises:
        MissingAssetError: There are none.
    """
    known = {profile.id for profile in bank}
    wanted = {key for profile_id in profile_ids for key in donors(profile_id)} & known
    own = {key: (bank.get(key).attributes or {}).get("conversation") for key in wanted}
    found = {key: Dialogue.of({"role": m["role"], "content": m["content"]} for m in talk) for key, talk in own.items() if talk}
    if found:
        return found
    from usp_env.data.conversations import load

    found = {c.id: c.dialogue for c in load("sharegpt", ids=wanted)}
    if not found:
        raise MissingAssetError(f"the ladder needs the conversations that bank {bank.name!r} was read from, and it has none")
    return found


@dataclass(frozen=True, slots=True)
class LadderReport:
    """Whether a user simulator and a score rank assistants whose order is known.

    Args:
        user: Spec of the simulated user.
        averages: Rung to average, best rung first.
        steps: `good-mid` and so on: rung less the next, with intervals.
        ordered: Every rung's average is above the next one's, on average and in every population.
        certain: And every step's interval, on average, excludes 0.
    """

    user: str
    averages: Mapping[str, Estimate]
    steps: Mapping[str, Estimate]
    ordered: bool
    certain: bool


def ladder(board: Leaderboard, rungs: Sequence[str] = LADDER) -> LadderReport:
    """Read the ladder off a leaderboard that holds its rungs.

    Raises:
        UspError: A rung is missing.
    """
    if missing := set(rungs) - {row.assistant for row in board.rows}:
        raise UspError(
            f"expected the ladder's assistants {', '.join(rungs)} on the leaderboard, missing: {', '.join(sorted(missing))}"
        )
    steps = {f"{a}-{b}": board.difference(a, b) for a, b in pairwise(rungs)}
    everywhere = [board.difference(a, b, p).mean for a, b in pairwise(rungs) for p in board.profiles]
    means = [step.mean for step in steps.values()] + everywhere
    ordered = all(mean is not None and mean > 0 for mean in means)
    certain = ordered and all(step.excludes_zero for step in steps.values())
    averages = {rung: board.row(rung).average for rung in rungs}
    return LadderReport(str(board.settings["user_spec"]), averages, steps, ordered, certain)


_TOPICS = (
    "a clear goal", "good preparation", "open communication", "the right tools", "regular practice", "careful planning",
    "honest feedback", "a steady routine", "the wider context", "time management", "reliable sources", "a positive attitude",
    "attention to detail", "the people around you", "continuous learning", "a balanced approach", "simple first steps",
    "realistic expectations", "available resources", "personal experience", "patience", "good habits", "long-term thinking",
    "flexibility", "a fresh perspective",
)  # fmt: skip
_PATTERNS = (
    "When we think about any question of this kind, {topic} is one of the most important things to keep in mind.",
    "There are many different views on {topic}, and each of them has its own advantages and disadvantages depending on the case.",
    "Experts often point out that {topic} makes a real difference in the long run, both in daily life and at work.",
    "It is worth taking the time to reflect on {topic} before moving on to the next step of the process.",
    "In the end, everyone has to find out for themselves what role {topic} should play in their own situation.",
)
