"""Rewards by hand: values, credit, sums, expressions, names, async."""

from __future__ import annotations

import asyncio
import math
import sys
import types
from collections.abc import Sequence

import numpy as np
import pytest

from usp_env.dialogue import Dialogue, Role
from usp_env.errors import BackendError, MissingAssetError, SpecError, UnknownNameError
from usp_env.profiles import Profile
from usp_env.rewards import base
from usp_env.rewards.base import RewardTerms, WeightedSum, make_reward, parse_expression, register_reward, utterance_credit, value

PERSON = Profile("a", "You cook.", "You are terse.")


def talk(*texts: str) -> Dialogue:
    return Dialogue.of({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts))


class Fixed:
    """Returns what it was given, whatever the dialogue."""

    def __init__(self, name: str, terms: RewardTerms | None, when: str = "end") -> None:
        self.name, self.terms, self.when, self.calls = name, terms, when, 0

    def __call__(self, profiles: Sequence[Profile], dialogues: Sequence[Dialogue]) -> list[RewardTerms | None]:
        self.calls += 1
        return [self.terms] * len(dialogues)


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_registered", {})


def evaluate(reward: object, dialogue: Dialogue | None = None, final: bool = True) -> RewardTerms | None:
    made = make_reward(reward, "assistant")
    assert made is not None
    return made.at(final)([PERSON], [dialogue or talk("hi", "hello")])[0]


# ── arithmetic ───────────────────────────────────────────────────────────────────────────────────


def test_value_and_credit() -> None:
    terms = RewardTerms({"human": np.array([0.9, 0.3]), "style": np.array([0.0, 1.0])}, {"cycle": 0.5, "copy": -0.25})
    assert value(terms) == pytest.approx(0.5 - 0.25 + 0.6 + 0.5)
    assert utterance_credit(terms, 2) == pytest.approx([0.25 + 0.9 + 0.0, 0.25 + 0.3 + 1.0])
    with pytest.raises(SpecError, match="each of 3 utterances, got 2"):
        utterance_credit(terms, 3)


def test_equation_6() -> None:
    register_reward("cc", Fixed("cc", RewardTerms(dialogue={"cc": 0.5})))
    register_reward("p_human", Fixed("p_human", RewardTerms({"p_human": np.array([1.0, 0.5])})))
    terms = evaluate("0.8*cc + 0.2*p_human")
    assert terms is not None
    assert utterance_credit(terms, 2) == pytest.approx([0.8 * 0.5 + 0.2 * 1.0, 0.8 * 0.5 + 0.2 * 0.5])
    assert value(terms) == pytest.approx(0.8 * 0.5 + 0.2 * 0.75)


def test_a_sum_scales_its_parts_and_keeps_their_names() -> None:
    one = Fixed("one", RewardTerms({"u": np.array([1.0, 3.0])}, {"d": 2.0}))
    two = Fixed("two", RewardTerms({"v": np.array([4.0, 0.0])}, {"e": 1.0}))
    (terms,) = WeightedSum(((0.5, one), (-1.0, two)))([PERSON], [talk("hi", "hello")])
    assert terms is not None
    assert {name: list(vector) for name, vector in terms.utterance.items()} == {"u": [0.5, 1.5], "v": [-4.0, 0.0]}
    assert terms.dialogue == {"d": 1.0, "e": -1.0}


def test_clashing_terms_take_their_rewards_name() -> None:
    one, two = (Fixed(name, RewardTerms(dialogue={"d": number})) for name, number in (("one", 1.0), ("two", 10.0)))
    (terms,) = WeightedSum(((1.0, one), (2.0, two)))([PERSON], [talk("hi", "hello")])
    assert terms is not None
    assert terms.dialogue == {"d": 1.0, "two.d": 20.0}
    with pytest.raises(SpecError, match=r"two\.d"):
        WeightedSum(((1.0, one), (1.0, two), (1.0, two)))([PERSON], [talk("hi", "hello")])


def test_one_unscorable_part_makes_the_dialogue_unscorable() -> None:
    parts = ((1.0, Fixed("one", RewardTerms(dialogue={"one": 1.0}))), (0.0, Fixed("none", None)))
    assert WeightedSum(parts)([PERSON] * 2, [talk("hi", "hello")] * 2) == [None, None]


class Rows(Fixed):
    """Its own outcome for each dialogue."""

    def __init__(self, name: str, *rows: RewardTerms | BackendError | None) -> None:
        super().__init__(name, None)
        self.rows = list(rows)

    def __call__(self, profiles: object, dialogues: object) -> list[RewardTerms | BackendError | None]:
        return self.rows


def test_a_failure_on_one_dialogue_stays_in_its_row_for_drivers() -> None:
    one, two = RewardTerms(dialogue={"one": 1.0}), RewardTerms(dialogue={"two": 10.0})
    first, second = BackendError("first"), BackendError("second")
    parts = ((1.0, Rows("one", one, first, None, one)), (1.0, Rows("two", two, two, second, None)))
    four = [PERSON] * 4, [talk("hi", "hello")] * 4
    kept = WeightedSum(parts).at(final=True)(*four)
    assert kept == [RewardTerms(dialogue={"one": 1.0, "two": 10.0}), first, second, None]  # a failure hides "not scorable"
    with pytest.raises(BackendError, match="first"):
        WeightedSum(parts)(*four)  # callers without a slot for it hear of it


def test_at_evaluates_only_what_is_due() -> None:
    turn, end = Fixed("t", RewardTerms(dialogue={"t": 1.0}), "turn"), Fixed("e", RewardTerms(dialogue={"e": 5.0}))
    both = WeightedSum(((1.0, turn), (1.0, end)))
    assert both.when == "turn"
    assert WeightedSum(((1.0, end),)).when == "end"
    (terms,) = both.at(False)([PERSON], [talk("hi", "hello")])
    assert terms is not None
    assert terms.dialogue == {"t": 1.0}
    assert end.calls == 0
    assert [len(both.at(final, dense).parts) for final, dense in ((True, False), (False, True), (False, False))] == [2, 2, 1]
    assert WeightedSum(((1.0, end),)).at(False)([PERSON], [talk("hi")])[0] == RewardTerms()


def test_the_steps_of_a_potential_telescope() -> None:
    class Words:
        name, when = "words", "turn"

        def __call__(self, profiles: Sequence[Profile], dialogues: Sequence[Dialogue]) -> list[RewardTerms | None]:
            return [
                RewardTerms(dialogue={"words": float(sum(len(u.split()) for u in d.utterances("assistant")))}) for d in dialogues
            ]

    register_reward("bonus", lambda profile, dialogue: 10.0)
    register_reward("words", Words())
    reward = make_reward("0.5*words + bonus", "assistant")
    assert reward is not None
    texts, potential, paid = ("hi", "one two", "go on", "three four five", "bye", "six"), 0.0, []
    for end in (2, 4, 6):
        (terms,) = reward.at(final=end == 6)([PERSON], [talk(*texts[:end])])
        assert terms is not None
        paid.append(value(terms) - potential)
        potential = value(terms)
    assert paid == [1.0, 1.5, 10.5]  # 0.5 a word; the bonus comes with the last step
    assert sum(paid) == 13.0


# ── plain functions ──────────────────────────────────────────────────────────────────────────────


def test_a_function_is_scored_under_its_name() -> None:
    def length(profile: Profile, dialogue: Dialogue) -> float | None:
        return None if len(dialogue) == 1 else float(len(dialogue))

    made = make_reward(length, "user")
    assert made is not None
    terms = made([PERSON, PERSON], [talk("a", "b", "c"), talk("a")])
    assert terms == [RewardTerms(dialogue={"length": 3.0}), None]
    assert (made.when, str(made)) == ("end", "length")


@pytest.mark.parametrize("number", [1, np.float32(1.0), np.int64(1)])
def test_numbers_are_taken(number: object) -> None:
    terms = evaluate(lambda profile, dialogue: number)
    assert terms is not None
    assert value(terms) == 1.0


@pytest.mark.parametrize("wrong", [True, np.bool_(True), "0.5", b"1", math.nan, math.inf, -math.inf, [1.0], {}, 1j])
def test_anything_else_is_refused_with_the_rewards_name(wrong: object) -> None:
    register_reward("odd", lambda profile, dialogue: wrong)
    with pytest.raises(SpecError, match="reward 'odd': expected a finite number or None"):
        evaluate("odd")


@pytest.mark.parametrize("error", [ValueError("mine"), BackendError("server"), ZeroDivisionError()])
def test_errors_inside_a_reward_come_out_unchanged(error: Exception) -> None:
    def broken(profile: Profile, dialogue: Dialogue) -> float:
        raise error

    with pytest.raises(type(error)) as caught:
        evaluate(broken)
    assert caught.value is error


# ── whole rewards ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([], r"one RewardTerms or None per dialogue \(1\), got 0 of them"),
        (None, "got NoneType"),
        ([0.5], "expected RewardTerms or None, got 0.5"),
        ([RewardTerms(dialogue={"x": math.nan})], "'x' = nan"),
        ([RewardTerms({"x": np.array([0.0, math.inf])})], "'x' = inf"),
    ],
)
def test_what_a_reward_returns_is_checked(returned: object, message: str) -> None:
    class Wrong:
        name, when = "wrong", "end"

        def __call__(self, profiles: object, dialogues: object) -> object:
            return returned

    with pytest.raises(SpecError, match=f"reward 'wrong'.*{message}"):
        evaluate(Wrong())


class Later:
    """Scores after giving way once; notes the loop it ran on."""

    name, when = "later", "end"

    def __init__(self) -> None:
        self.loops: list[object] = []

    async def __call__(self, profiles: Sequence[Profile], dialogues: Sequence[Dialogue]) -> list[RewardTerms | None]:
        await asyncio.sleep(0)
        self.loops.append(asyncio.get_running_loop())
        return [RewardTerms(dialogue={"later": float(len(d))}) for d in dialogues]


def test_an_async_reward_is_awaited_on_one_loop() -> None:
    reward = Later()
    register_reward("later", reward)
    made = make_reward("2*later", "assistant")
    assert made is not None

    async def inside() -> list[RewardTerms | None]:
        return made([PERSON], [talk("hi", "hello", "bye")])  # a running loop, and a synchronous caller

    outcomes = [made([PERSON], [talk("hi", "hello")])[0], asyncio.run(inside())[0]]
    assert [terms and value(terms) for terms in outcomes] == [4.0, 6.0]
    assert reward.loops[0] is reward.loops[1]  # a client of the reward's own outlives the call


def test_an_async_reward_may_fail() -> None:
    class Broken(Later):
        async def __call__(self, profiles: object, dialogues: object) -> list[RewardTerms | None]:
            raise BackendError("judge is down")

    with pytest.raises(BackendError, match="judge is down"):
        evaluate(Broken())


# ── expressions and names ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("goal", [(1.0, "goal")]),
        ("goal+0.1*politeness", [(1.0, "goal"), (0.1, "politeness")]),
        ("0.8*cycle+0.2*human", [(0.8, "cycle"), (0.2, "human")]),
        ("a - 0.5*b", [(1.0, "a"), (-0.5, "b")]),
        ("-(a - b*2)", [(-1.0, "a"), (2.0, "b")]),
        ("0.1*pkg.mod:fn\n + b", [(0.1, "pkg.mod:fn"), (1.0, "b")]),
        ("a + 1e-1*a", [(1.1, "a")]),
    ],
)
def test_expressions(text: str, expected: list[tuple[float, str]]) -> None:
    assert parse_expression(text) == [(pytest.approx(weight), name) for weight, name in expected]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", "at character 1"),
        ("a b", "at character 3"),
        ("goal + 0.1*", "at character 12"),
        ("goal + a*b", "'a[*]b' at character 8"),
        ("goal + 2", "'2' at character 8"),
        ("goal/2", "'goal/2' at character 1"),
        ("0.5*f(x)", r"'f\(x\)' at character 5"),
        ("__import__('os').system", "at character 1"),
        ("True*a", "'True[*]a' at character 1"),
        ("a@b", "'@' at character 2"),
        ("a:", "at character 3"),
        ("1e999*a", "finite weight of 'a', got inf"),
        ("+".join("a" * 5000), "too deep"),
    ],
)
def test_malformed_expressions_are_shown_where(text: str, where: str) -> None:
    with pytest.raises(SpecError, match=where):
        parse_expression(text)


def test_names() -> None:
    with pytest.raises(UnknownNameError, match="unknown reward 'gaol': did you mean 'goal'"):
        make_reward("gaol", "assistant")
    with pytest.raises(SpecError, match="identifier"):
        register_reward("not a name", lambda profile, dialogue: 0.0)
    with pytest.raises(SpecError, match="identifier"):
        register_reward("class", lambda profile, dialogue: 0.0)
    with pytest.raises(SpecError, match="built-in"):
        register_reward("goal", lambda profile, dialogue: 0.0)
    with pytest.raises(SpecError, match="expected a function"):
        register_reward("three", 3)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="got 3"):
        make_reward(3, "assistant")  # type: ignore[arg-type]
    assert make_reward(None, "assistant") is None


def test_naming_again_replaces() -> None:
    for number in (1.0, 2.0):
        register_reward("mine", lambda profile, dialogue, number=number: number)
    terms = evaluate("mine")
    assert terms is not None
    assert terms.dialogue == {"mine": 2.0}


@pytest.mark.parametrize(
    ("name", "loader"),
    [
        ("cycle", "usp_env.extraction.generator.load_generator"),
        ("human", "usp_env.models.scorers.load"),
        ("consistency", "usp_env.models.scorers.load"),
    ],
)
@pytest.mark.parametrize("seat", ["user", "assistant"])
def test_missing_models_are_told_when_the_reward_is_named(
    name: str, loader: str, seat: Role, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(spec: str) -> object:
        raise MissingAssetError(f"{spec}: fetch it")

    monkeypatch.setattr(loader, missing)
    with pytest.raises(MissingAssetError, match=f"reward '{name}': .*: fetch it; or pass reward=None"):
        make_reward(f"0.8*{name}", seat)


def test_goal_is_for_the_assistants_seat() -> None:
    with pytest.raises(SpecError, match="goal"):
        make_reward("goal", "user")


def test_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("my_rewards")
    module.brevity = lambda profile, dialogue: -1.0  # type: ignore[attr-defined]
    module.number = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    terms = evaluate("0.5*my_rewards:brevity")
    assert terms is not None
    assert terms.dialogue == {"brevity": -0.5}
    for name, message in (
        ("my_rewards:nothing", "nothing"),
        ("no_such_module:f", "no_such_module"),
        ("my_rewards:number", "int"),
    ):
        with pytest.raises(SpecError, match=message):
            make_reward(name, "assistant")


def test_when_is_checked() -> None:
    with pytest.raises(SpecError, match="'turn' or 'end', got 'sometimes'"):
        make_reward(Fixed("odd", None, "sometimes"), "assistant")


def test_an_expression_of_bytes_that_are_no_text() -> None:
    with pytest.raises(SpecError, match="expected valid Unicode"):
        make_reward("goal+\udcff", "assistant")  # how a shell hands over a byte that is no UTF-8
