"""The numbers and texts both viewers show; needs neither rich nor jinja2."""

from __future__ import annotations

import math

import pytest

from usp_env.dialogue import OPENER, visible
from usp_env.episode import Episode
from usp_env.profiles import Profile
from usp_env.records import EpisodeSpec, PartnerTurn, Reply, Rules
from usp_env.report import facts
from usp_env.transcripts import transcribe


def transcript(**changes: object) -> dict[str, object]:
    base: dict[str, object] = {
        "episode_id": "0001",
        "episode_seed": 1,
        "agent_role": "assistant",
        "profile_id": "p0",
        "population": "density",
        "profile": {"objective": "You cook.", "subjective": "You are brief."},
        "messages": [{"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")],
        "rewards": [0.5, 0.25],
        "reward_terms": {"goal": 0.75},
        "utterance_rewards": [0.5, 0.25],
        "terminated": False,
        "truncated": True,
        "end_reason": "turn_limit",
        "outcome": "completed",
        "valid": True,
        "models": {"user": "usp:m", "assistant": "m?system=Be kind."},
        "usage": {},
        "versions": {},
    }
    return base | changes


def test_control_characters_become_visible() -> None:
    assert visible("\x1b]0;title\x07 \x9b31m \x7f \x00 \r") == "␛]0;title␇ \\x9b31m ␡ ␀ ␍"
    assert visible("a\tb\r\nc\u2028\U0001f642 שלום") == "a\tb\nc\u2028\U0001f642 שלום"
    assert visible("\u202eevil\u2069 \ud800") == "\\u202eevil\\u2069 \\ud800"


def test_group_by_hand() -> None:
    many = [
        transcript(rewards=[1.0, 0.5]),  # return 1.5, 2 turns
        transcript(rewards=[-0.5], messages=[{"role": "user", "content": "x"}]),  # return -0.5, 1 turn
        transcript(rewards=[9.0], valid=False, outcome="user_failure", end_reason="bad_user"),  # counts for neither
        transcript(rewards=[], messages=[], end_reason="user_ended"),  # valid, 0 turns, no return
    ]
    found = facts.group("density", many)
    assert (found.episodes, found.valid, found.n, found.turns) == (4, 3, 2, 1.0)
    assert found.mean == 0.5
    assert found.sd == pytest.approx(math.sqrt(2))  # sqrt(((1.5 - .5)² + (-.5 - .5)²) / (2 - 1))
    assert found.outcomes == {"completed": 3, "user_failure": 1}
    assert found.ends == {"turn_limit": 2, "bad_user": 1, "user_ended": 1}
    assert found.returns == "+0.500 ± 1.414"


def test_no_episode_and_one() -> None:
    assert facts.groups([]) == []
    assert facts.group("all", []).returns == "–"
    assert facts.group("all", [transcript()]).returns == "+0.750"
    assert [g.name for g in facts.groups([transcript(population=p) for p in ("virtual", "density", "virtual")])] == [
        "density",
        "virtual",
    ]


def test_numbers_that_are_not_finite_do_not_crash() -> None:
    mean, sd = facts.spread([math.inf, 1.0, math.nan])
    assert math.isnan(mean)
    assert math.isnan(sd)
    assert facts.number(math.nan) == "+nan"


def test_rewards_stand_by_the_agents_utterances() -> None:
    said, silent = facts.utterances(transcript())
    assert [(u.turn, u.role, u.agent, u.reward) for u in said] == [
        (1, "user", False, None),
        (1, "assistant", True, 0.5),
        (2, "user", False, None),
        (2, "assistant", True, 0.25),
    ]
    assert silent == []
    assert facts.utterances(transcript(rewards=[0.5, 0.25, 0.0]))[1] == [0.0]  # the last action was not taken
    opened, _ = facts.utterances(transcript(agent_role="user", rewards=[0.4]))  # the opening was given
    assert [u.reward for u in opened] == [None, None, 0.4, None]


def test_what_each_side_received() -> None:
    system, *rest = facts.received(transcript(), 2)
    assert system["role"] == "system"
    assert "You cook.\n\nYou are brief." in system["content"]
    assert rest == [{"role": "user", "content": "user 0"}, {"role": "assistant", "content": "assistant 0"}]
    assert facts.received(transcript(), 1) == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "user 0"}]
    flipped = facts.received(transcript(models={"user": "roleplay:m"}), 2)
    assert [(m["role"], m["content"]) for m in flipped[1:]] == [
        ("user", OPENER),
        ("assistant", "user 0"),
        ("user", "assistant 0"),
    ]
    assert facts.received(transcript(models={"user": "scripted"}), 0) == []


def test_an_agent_of_ones_own_received_its_observation() -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "a", "raw": "<think>t</think>a"},
        {"role": "user", "content": "b"},
    ]
    messages.append({"role": "assistant", "content": "c"})
    own = transcript(models={"assistant": "agent"}, messages=messages, rules={"keep_think": True})
    assert [m["content"] for m in facts.received(own, 3)] == ["hi", "<think>t</think>a", "b"]
    assert [m["content"] for m in facts.received(own | {"rules": {"keep_think": False}}, 3)] == ["hi", "a", "b"]
    seat = transcript(models={}, agent_role="user", rules={"roles": "flipped"})
    assert [m["role"] for m in facts.received(seat, 2)] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize("seat", ["assistant", "user"])
def test_seeds_are_those_of_the_episode_before_and_after_forks(seat: str) -> None:
    def talk(episode: Episode, steps: int) -> None:
        for _ in range(steps):
            seeds.append(episode.agent_seed)
            episode.act(f"agent {len(seeds)}")
            answer(episode)

    def answer(episode: Episode) -> None:
        if isinstance(episode.pending, PartnerTurn):
            seeds.append(episode.pending.seed)
            episode.feed(Reply(f"partner {len(seeds)} {'x' * len(seeds)}"))

    seeds: list[int] = []
    episode = Episode(EpisodeSpec("p0", "density", 77), Profile("p0", "You.", "You."), Rules(agent_role=seat, max_turns=4))
    episode.begin()
    answer(episode)
    talk(episode, 1)
    episode = episode.forked(3)
    talk(episode, 1)
    episode = episode.forked(0)
    talk(episode, 2)
    record = transcribe(episode, {}).to_json()
    assert len(record["messages"]) == 8
    assert [facts.seed_of(record, index) for index in range(8)] == seeds[:8]
