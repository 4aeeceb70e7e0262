"""The state machine: every ending, every failure, the arithmetic of rewards, freezing."""

from __future__ import annotations

import json

import numpy as np
import pytest

from usp_env.backends.base import Generation
from usp_env.dialogue import END, OPENER, Act
from usp_env.episode import Episode
from usp_env.errors import BackendError, CallOrderError, InvalidActionError, SpecError
from usp_env.profiles import Profile
from usp_env.records import EpisodeSpec, PartnerTurn, Reply, RewardTerms, Rules, Scoring, Snapshot, generation_seed

PROFILE = Profile("p", "You cook.", "You are terse.")


def begin(opening: str | None = "hi", seed: int = 7, **rules: object) -> Episode:
    episode = Episode(EpisodeSpec("p", "uniform", seed, opening), PROFILE, Rules(**rules))
    episode.begin()
    return episode


def talk(episode: Episode, *exchanges: tuple[str, Reply | str]) -> Episode:
    for action, reply in exchanges:
        episode.act(action)
        if isinstance(episode.pending, PartnerTurn):
            episode.feed(Reply(reply) if isinstance(reply, str) else reply)
    return episode


def ends(episode: Episode) -> tuple[object, ...]:
    return episode.end_reason, episode.terminated, episode.truncated, episode.outcome, episode.valid


def test_assistant_seat_hides_the_profile_and_ends_on_the_user() -> None:
    episode = begin(opening=None)
    assert episode.pending.view.profile is PROFILE
    assert episode.pending.view.opening
    episode.feed(Reply("hello"))
    talk(episode, ("Hi, how can I help?", "soup please"))
    assert episode.observation() == (
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hi, how can I help?"},
        {"role": "user", "content": "soup please"},
    )
    assert episode.turn == 2


def test_user_seat_sees_the_profile_and_ends_on_the_assistant() -> None:
    episode = begin(opening=None, agent_role="user")
    assert [m["role"] for m in episode.observation()] == ["system"]
    assert "You cook." in episode.observation()[0]["content"]
    episode.act("a soup recipe")
    assert episode.pending.view.profile is None
    episode.feed(Reply("Here it is."))
    assert [m["role"] for m in episode.observation()] == ["system", "user", "assistant"]


def test_flipped_roles_begin_with_the_opener() -> None:
    episode = begin(opening=None, agent_role="user", roles="flipped")
    talk(episode, ("a soup recipe", "Here."))
    shown = [(m["role"], m["content"]) for m in episode.observation()[1:]]
    assert shown == [("user", OPENER), ("assistant", "a soup recipe"), ("user", "Here.")]


def test_end_token_alone_is_no_turn() -> None:
    episode = talk(begin(), ("Hello", Reply("  ", ended=True)))
    assert ends(episode) == ("user_ended", True, False, "completed", True)
    assert episode.turn == 1
    assert len(episode.messages) == 2


def test_text_before_the_end_token_is_the_last_turn_and_is_not_answered() -> None:
    episode = talk(begin(), ("Hello", Reply("bye", ended=True)))
    assert ends(episode)[0] == "user_ended"
    assert episode.turn == 2
    assert episode.observation()[-1]["content"] == "bye"


def test_end_is_masked_on_the_opening() -> None:
    episode = begin(opening=None)
    episode.feed(Reply("hi", ended=True))
    assert not episode.done


def test_user_seat_ends_with_the_marker() -> None:
    episode = begin(opening=None, agent_role="user")
    episode.act(f"that is all {END}")
    assert ends(episode) == ("user_ended", True, False, "completed", True)
    assert episode.observation()[-1] == {"role": "user", "content": "that is all"}
    alone = talk(begin(opening=None, agent_role="user"), ("hi", "hello"))
    alone.act(END)
    assert (alone.end_reason, alone.turn) == ("user_ended", 1)


def test_marker_alone_cannot_open() -> None:
    episode = begin(opening=None, agent_role="user")
    episode.act(END)
    assert ends(episode) == ("bad_action", False, True, "agent_failure", True)


@pytest.mark.parametrize("text", [f"say {END} to end", "<|im_end|>", "User: bye", "<|endoftext|>", f"{END} and on"])
def test_quoted_markers_have_no_effect(text: str) -> None:
    episode = talk(begin(), (text, "ok"))
    assert not episode.done
    assert episode.observation()[1]["content"] == text
    heard = talk(begin(), ("Hello", text))
    assert not heard.done
    assert heard.observation()[-1]["content"] == text


def test_assistant_cannot_end() -> None:
    episode = talk(begin(), (f"Goodbye {END}", "wait"))
    assert not episode.done
    flipped = begin(opening=None, agent_role="user")
    flipped.act("hi")
    flipped.feed(Reply("bye", ended=True))
    assert not flipped.done


def test_turn_limit_comes_after_the_reply_to_the_last_turn() -> None:
    episode = talk(begin(max_turns=2), ("one", "second"), ("two", "never asked"))
    assert ends(episode) == ("turn_limit", False, True, "completed", True)
    assert [m.content for m in episode.messages] == ["hi", "one", "second", "two"]
    user = begin(opening=None, agent_role="user", max_turns=1)
    talk(user, ("hi", "hello"))
    assert user.end_reason == "turn_limit"
    assert user.messages[-1].role == "assistant"


def test_token_budget_counts_engine_tokens_else_bytes() -> None:
    episode = begin(opening="x" * 8, token_budget=7)  # 8 bytes: 2 tokens
    episode.act(Act("ok", usage={"completion_tokens": 4}))  # 6 in all
    assert not episode.done
    episode.feed(Reply("y"))  # 1 more
    assert ends(episode) == ("token_budget", False, True, "completed", True)


def test_context_limit_is_an_end_not_a_failure() -> None:
    episode = begin()
    episode.act("Hello")
    episode.feed(Reply("", generation=Generation("", finish_reason="context_limit")))
    assert ends(episode) == ("context_limit", False, True, "completed", True)


def test_repetition_and_gratitude() -> None:
    same = talk(begin(opening="Tell me more."), ("a", "tell me more"), ("b", "Tell me more!"))
    assert ends(same) == ("repetition", True, False, "completed", True)
    thanks = talk(begin(opening="Thanks!"), ("a", "thank you very much"), ("b", "ok cheers mate, I appreciate it"))
    assert ends(thanks)[0] == "gratitude_loop"
    long = "thanks, " + "and one more question about the soup " * 2
    assert not talk(begin(opening="Thanks!"), ("a", "thank you very much"), ("b", long)).done
    assert not talk(begin(opening="Tell me more.", repetition_ratio=1.0), ("a", "tell me more"), ("b", "Tell me more!")).done


@pytest.mark.parametrize("text", ["", "   \n", "x" * 101, "lone \ud800", "<think>only thoughts</think>", "<think>unclosed"])
def test_bad_actions(text: str) -> None:
    episode = begin(max_chars=100, bad_action_reward=-1.0)
    episode.act(text)
    assert ends(episode) == ("bad_action", False, True, "agent_failure", True)
    assert episode.reward == -1.0
    assert episode.utterance_rewards == [-1.0]
    assert len(episode.messages) == 1


def test_empty_user_is_redrawn_once_with_another_seed() -> None:
    episode = begin()
    episode.act("Hello")
    first = episode.pending.seed
    episode.feed(Reply(" "))
    assert episode.pending.attempt == 1
    assert episode.pending.seed != first
    episode.feed(Reply("here I am"))
    assert not episode.done


@pytest.mark.parametrize("bad", ["", "Assistant: Sure!", "ok\n**Assistant**: here", "\ud800"])
def test_bad_user_and_bad_assistant(bad: str) -> None:
    episode = begin()
    episode.act("Hello")
    episode.feed(Reply(bad))
    episode.feed(Reply(bad))
    assert ends(episode) == ("bad_user", False, True, "user_failure", False)
    partner = begin(opening=None, agent_role="user")
    partner.act("hi")
    partner.feed(Reply(""))
    partner.feed(Reply(""))
    assert ends(partner) == ("bad_assistant", False, True, "assistant_failure", False)


def test_infra_failure_has_no_reward_terms() -> None:
    episode = begin(scoring="end")
    episode.act("Hello")
    episode.feed(Reply("", error=BackendError("down")))
    assert ends(episode) == ("infra", False, True, "infra_failure", False)
    assert (episode.reward, episode.reward_terms, episode.error) == (0.0, {}, "down")
    scored = begin(scoring="end", max_turns=1)
    scored.act("Hello")
    scored.feed(BackendError("reward model down"))
    assert ends(scored) == ("infra", False, True, "infra_failure", False)


def test_unscored_keeps_its_own_end() -> None:
    episode = begin(scoring="end", max_turns=1)
    episode.act("Hello")
    assert isinstance(episode.pending, Scoring)
    episode.feed(None)
    assert ends(episode) == ("turn_limit", False, True, "unscored", False)
    assert episode.reward == 0.0


def test_thoughts_are_seen_by_their_speaker_only() -> None:
    act = "<think>plan: be nice</think>Hello"
    episode = begin()
    episode.act(act)
    assert episode.pending.view.messages[-1].content == "Hello"
    episode.feed(Reply("<think>hm</think>fine"))
    assert [m["content"] for m in episode.observation()] == ["hi", act, "fine"]
    assert [m.raw for m in episode.messages] == [None, act, "<think>hm</think>fine"]
    hidden = begin(keep_think=False)
    talk(hidden, (act, "ok"))
    assert hidden.observation()[1]["content"] == "Hello"


def test_turn_rewards_telescope() -> None:
    episode = begin(scoring="turn", max_turns=3)
    paid = []
    for reply, potential in [("b", 0.25), ("c", 0.2), ("d", 0.7)]:
        episode.act("x" + reply)
        if isinstance(episode.pending, PartnerTurn):
            episode.feed(Reply(reply))
        episode.feed(RewardTerms(dialogue={"goal": potential}))
        paid.append(episode.reward)
    np.testing.assert_allclose(paid, [0.25, -0.05, 0.5])
    assert episode.end_reason == "turn_limit"
    assert sum(episode.rewards) == pytest.approx(0.7)
    assert episode.utterance_rewards == episode.rewards


def test_user_seat_pays_at_the_end_and_gives_equation_6_credit() -> None:
    # Eq. 6 with λ = .8, cc = .5, human = (.9, .1): r = .4 + .2·human = (.58, .42); R = .4 + .2·.5 = .5
    episode = begin(opening=None, agent_role="user", scoring="end", max_turns=2)
    talk(episode, ("one", "a"))
    assert episode.reward == 0.0
    talk(episode, ("two", "b"))
    episode.feed(RewardTerms({"human": 0.2 * np.array([0.9, 0.1])}, {"cycle": 0.8 * 0.5}))
    assert episode.reward == pytest.approx(0.5)
    np.testing.assert_allclose(episode.utterance_rewards, [0.58, 0.42])
    np.testing.assert_allclose([episode.reward_terms[k] for k in ("human", "cycle")], [0.1, 0.4])


def test_utterance_terms_must_have_one_value_per_utterance() -> None:
    episode = begin(opening=None, agent_role="user", scoring="end", max_turns=1)
    talk(episode, ("one", "a"))
    with pytest.raises(SpecError, match="1 utterances, got 2"):
        episode.feed(RewardTerms({"human": np.zeros(2)}))


def test_wrong_order_and_wrong_types_raise() -> None:
    episode = begin()
    with pytest.raises(InvalidActionError, match="int"):
        episode.act(3)  # type: ignore[arg-type]
    episode.act("Hello")
    with pytest.raises(CallOrderError, match="waits"):
        episode.act("again")
    with pytest.raises(CallOrderError, match="RewardTerms"):
        episode.feed(RewardTerms())
    done = talk(begin(max_turns=1), ("Hello", ""))
    with pytest.raises(CallOrderError, match="turn_limit"):
        done.act("more")


@pytest.mark.parametrize(
    "wrong",
    [{"max_turns": 0}, {"max_turns": True}, {"agent_role": "system"}, {"roles": "x"}, {"token_budget": 0}, {"max_chars": "9"}],
)
def test_bad_rules_raise(wrong: dict[str, object]) -> None:
    with pytest.raises(SpecError, match=next(iter(wrong))):
        Rules(**wrong)


def test_snapshot_is_json_and_goes_on_identically() -> None:
    episode = talk(begin(scoring="turn"), (Act("<think>t</think>a", token_ids=(1, 2), logprobs=(-0.5, -0.1)), "more"))
    episode.feed(RewardTerms(dialogue={"goal": 0.3}))
    thawed = Episode.restore(json.loads(json.dumps(episode.snapshot())))
    assert thawed.snapshot() == episode.snapshot()
    assert thawed.messages == episode.messages
    for one in (episode, thawed):
        one.act("b")
    assert thawed.pending == episode.pending
    with pytest.raises(CallOrderError, match="between two steps"):
        episode.snapshot()
    with pytest.raises(SpecError, match="snapshot"):
        Snapshot.from_json([1])  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="snapshot"):
        Episode.restore({"spec": {}})


def test_forks_have_noise_of_their_own_and_leave_the_parent_alone() -> None:
    episode = talk(begin(), ("a", "b"))
    before = episode.snapshot()
    children = [episode.forked(i) for i in range(3)]
    assert episode.snapshot() == before
    assert len({child.id for child in (episode, *children)}) == 4
    for one in (episode, *children):
        one.act("c")
    assert len({one.pending.seed for one in (episode, *children)}) == 4
    assert children[0].branch == "2-0"


def test_generation_seeds_depend_on_everything() -> None:
    base = (5, "", 1, "user", 0)
    others = [
        (6, "", 1, "user", 0),
        (5, "1-0", 1, "user", 0),
        (5, "", 2, "user", 0),
        (5, "", 1, "assistant", 0),
        (5, "", 1, "user", 1),
    ]
    seeds = {generation_seed(*key) for key in (base, *others)}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert generation_seed(*base) == generation_seed(*base)
