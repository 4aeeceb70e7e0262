"""The benchmark from end to end with scripted users and assistants: pairing, marks, caps, resuming, judges."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles import Speaker

from usp_env import assistants, commands_benchmark
from usp_env.backends.scripted import ScriptedBackend
from usp_env.dialogue import Dialogue, View
from usp_env.errors import BackendError, RunDirectoryError, SpecError, UnknownNameError, UspError
from usp_env.evaluation import benchmark_play
from usp_env.evaluation.benchmark import benchmark, episode_score
from usp_env.evaluation.benchmark_judging import Jury, judge_duels
from usp_env.evaluation.leaderboard import Leaderboard
from usp_env.evaluation.protocol import PINNED, PINNED_PLAN, USP_BENCH_1, Facts, Protocol, departures, draw, weights
from usp_env.metrics.calibration import ANCHORS, JudgeRefusedError, speaker_cases
from usp_env.metrics.judges import Judge
from usp_env.models.assets import ASSETS
from usp_env.profiles import Profile, ProfileBank
from usp_env.records import Reply
from usp_env.report.board import read_board
from usp_env.sampling import load_sampler
from usp_env.sampling.base import Draw
from usp_env.transcripts import read_transcripts

PEOPLE = 12


class Groups:
    """Two populations of a bank: the first half of it and the second."""

    populations = ("first", "second")
    digest = "groups"

    def __init__(self) -> None:
        facts = {"objective_facts": {"scenarios": [{"goals_or_plans": "g", "task_details": ["Ask for milk", "Ask for tea"]}]}}
        self.bank = ProfileBank(
            [Profile(f"p{i}", f"You are person {i}.", "You write.", facts, "test") for i in range(PEOPLE)], "a dozen"
        )

    def members(self, population: str) -> list[Profile]:
        half = PEOPLE // 2
        return list(self.bank)[:half] if population == "first" else list(self.bank)[half:]

    def draw(self, n: int, population: str, rng: np.random.Generator) -> list[Draw]:
        own = self.members(population)
        return [Draw(own[int(i)], population) for i in rng.integers(len(own), size=n)]

    def observe(self, summaries: Sequence[Any]) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


def person(view: View, seed: int) -> str:
    return f"{view.profile.id} says {seed % 1000}"


def helped(profile: Profile, dialogue: Dialogue) -> float:
    """Share of replies that help; a person of the second half is harder to help."""
    replies = dialogue.utterances("assistant")
    share = sum("help" in reply for reply in replies) / len(replies)
    return share * (1.0 if int(profile.id[1:]) < PEOPLE // 2 else 0.5)


PROTOCOL = Protocol(populations=("first", "second"), n=4, turns=3, seeds=(0, 1))
GOOD = Speaker(lambda view, seed: f"help {seed}", "assistant")
MID = Speaker(lambda view, seed: f"help {seed}" if seed % 2 else f"no {seed}", "assistant")
BAD = Speaker(lambda view, seed: f"no {seed}", "assistant")
THREE = {"good": GOOD, "mid": MID, "bad": BAD}


def play(out: Path, assistants: Any = None, user: Any = person, protocol: Protocol = PROTOCOL, **options: Any) -> Leaderboard:
    options = {"sampler": Groups(), "reward": helped} | options
    return benchmark(assistants or THREE, out, protocol, user=Speaker(user), **options)


def test_every_assistant_meets_the_same_people_with_the_same_first_words(tmp_path: Path) -> None:
    board = play(tmp_path / "b")
    told = {}
    for name in THREE:
        own = [t for p in PROTOCOL.populations for t in read_transcripts(tmp_path / "b" / "runs" / name / p)]
        told[name] = {(t.episode_seed, t.profile_id, t.population, t.opening, t.messages[0]["content"]) for t in own}
        assert len(own) == 2 * 4 * 2
    assert told["good"] == told["mid"] == told["bad"]
    assert all(opening == first for *_, opening, first in told["good"])
    assert [row.assistant for row in board.rows] == ["good", "mid", "bad"]
    assert [row.rank for row in board.rows] == [1, 2, 3]
    good = board.row("good")
    assert good.populations["first"].mean == 100
    assert good.populations["first"].n == 4
    assert good.populations["second"].mean == 50
    assert good.average.mean == 75
    assert good.gaps["second-first"].mean == -50
    assert good.gaps["second-first"].ci95 == (-50, -50)
    assert board.difference("good", "bad").mean == 75
    assert board.difference("bad", "good", "second").mean == -50
    assert board.difference("good", "bad", "first").excludes_zero
    assert good.elo.mean > board.row("mid").elo.mean > board.row("bad").elo.mean
    pair = next(pair for pair in board.pairs if {pair.first, pair.second} == {"good", "bad"})
    assert (pair.first, pair.wins, pair.ties, pair.losses) == ("good", 16, 0, 0)
    assert {t.end_reason for t in read_transcripts(tmp_path / "b" / "runs" / "bad" / "first")} == {"turn_limit"}
    cost = json.loads((tmp_path / "b" / "cost.json").read_text("utf-8"))
    assert cost["good"]["second"]["assistant"]["replies"] == 24
    assert {row.weights for row in board.rows} == {None}


def test_the_openings_are_made_once(tmp_path: Path) -> None:
    firsts = []

    def user(view: View, seed: int) -> str:
        if view.opening:
            firsts.append(seed)
        return person(view, seed)

    play(tmp_path / "b", user=user)
    assert len(firsts) == 16
    play(tmp_path / "b", {**THREE, "late": GOOD}, user=user, resume=True)
    assert len(firsts) == 16


def test_curves_are_running_sums_and_those_who_left_keep_their_last(tmp_path: Path) -> None:
    from usp_env.rewards.base import PlainFunction

    def user(view: View, seed: int) -> Reply | str:
        return Reply("", ended=True) if len(view.messages) == 2 and int(view.profile.id[1:]) % 2 else person(view, seed)

    class Turnwise(PlainFunction):
        def __call__(self, profiles: Any, dialogues: Any) -> Any:
            return super().__call__(profiles, dialogues)

    growing = Turnwise(lambda profile, dialogue: len(dialogue.utterances("assistant")) / 10, "growing", "turn")
    board = play(tmp_path / "b", {"good": GOOD}, user, PROTOCOL, reward=growing)
    ids = board.profiles["first"]
    stay = sum(int(one[1:]) % 2 == 0 for one in ids) / len(ids)
    told = [point.mean for point in board.row("good").curves["first"]]
    assert told == pytest.approx([10, 10 + 10 * stay, 10 + 20 * stay])
    assert told[-1] == pytest.approx(board.row("good").populations["first"].mean)
    assert board.row("good").endings == {"turn_limit": 8, "user_ended": 8}
    assert board.curve_score.scorer


def test_a_population_that_is_too_small_is_capped_and_shown(tmp_path: Path) -> None:
    board = play(tmp_path / "b", {"good": GOOD}, protocol=replace(PROTOCOL, n=100))
    assert {name: len(ids) for name, ids in board.profiles.items()} == {"first": 6, "second": 6}
    assert all(len(set(ids)) == len(ids) for ids in board.profiles.values())
    assert board.caps["first"] == "the split has 12 profiles, 6 of them in this population"
    assert "6 of them in this population" in board.markdown()
    assert board.settings["n"] == 100


def test_more_profiles_begin_with_the_same_ones() -> None:
    sampler = Groups()
    few, many = (draw(sampler, replace(PROTOCOL, n=n)) for n in (2, 5))
    assert many.episodes["second"][:4] == few.episodes["second"]
    alone = draw(sampler, replace(PROTOCOL, populations=("second",)))
    assert alone.episodes["second"] == draw(sampler, PROTOCOL).episodes["second"]
    assert alone.episodes["second"] != draw(sampler, replace(PROTOCOL, populations=("second",), seed=1)).episodes["second"]


def test_the_pinned_protocol_is_what_ships() -> None:
    sampler = load_sampler("sharegpt", "test")
    plan = draw(sampler, USP_BENCH_1)
    assert {name: len(plan.people(name)) for name in plan.episodes} == {"majority": 16, "minority": 16, "virtual": 100}
    assert plan.digest == PINNED_PLAN
    from usp_env import users

    user = users.load("usp-mini", lambda spec: ScriptedBackend([], spec=str(spec)))
    facts = replace(Facts.of(sampler, user, None), scorer=PINNED.scorer)
    assert departures(USP_BENCH_1, plan, facts) == []
    fewer = replace(USP_BENCH_1, n=10, seeds=(0, 1))
    assert departures(fewer, draw(sampler, fewer), facts) == ["n: 100 → 10", "seeds: [0] → [0, 1]"]
    other = departures(USP_BENCH_1, plan, replace(facts, user_weights="f" * 64))
    assert other == ["user_weights: 49773eaac768 → ffffffffffff"]
    warm = users.load("usp-mini?temperature=1.5", lambda spec: ScriptedBackend([], spec=str(spec)))
    assert departures(USP_BENCH_1, plan, replace(Facts.of(sampler, warm, None), scorer=PINNED.scorer))[0].startswith("decoding")
    drawn_otherwise = replace(plan, episodes={"majority": plan.episodes["majority"][::-1]})
    assert departures(USP_BENCH_1, drawn_otherwise, facts)[0].startswith("profiles: ")
    with pytest.raises(UnknownNameError, match="usp-bench-1"):
        departures(replace(USP_BENCH_1, name="usp-bench-2"), plan, facts)


def test_a_modified_run_says_so_and_how(tmp_path: Path) -> None:
    board = play(tmp_path / "b", {"good": GOOD})
    assert board.protocol == "usp-bench-1+modified"
    assert "turns: 10 → 3" in board.modified
    assert "user: usp-mini → test" in board.modified
    assert "- turns: 10 → 3" in board.markdown()
    assert json.loads((tmp_path / "b" / "leaderboard.json").read_text("utf-8"))["protocol"] == "usp-bench-1+modified"


def crashing(after: int) -> Speaker:
    """Good for so many replies; then the process dies."""
    said = 0

    def answer(view: View, seed: int) -> str:
        nonlocal said
        said += 1
        if said > after:
            raise KeyboardInterrupt
        return MID.answer(view, seed)

    return Speaker(answer, "assistant")


@pytest.mark.parametrize("after", [0, 1, 10, 26, 40])
def test_a_killed_run_resumes_to_the_same_card(after: int, tmp_path: Path) -> None:
    whole = play(tmp_path / "whole", lanes=3)
    with pytest.raises(KeyboardInterrupt):
        play(tmp_path / "cut", {"good": GOOD, "mid": crashing(after), "bad": BAD}, lanes=3)
    assert not (tmp_path / "cut" / "leaderboard.json").exists()
    again = play(tmp_path / "cut", lanes=3, resume=True)
    assert again == whole
    assert len(json.loads((tmp_path / "cut" / "run.json").read_text("utf-8"))["resumed"]) == 1
    assert "resumed" not in json.loads((tmp_path / "whole" / "run.json").read_text("utf-8"))
    files = [
        (tmp_path / name / file).read_bytes() for file in ("leaderboard.json", "leaderboard.md") for name in ("whole", "cut")
    ]
    assert files[0] == files[1]
    assert files[2] == files[3]
    quiet = Speaker(lambda view, seed: pytest.fail("asked again"), "assistant")
    assert play(tmp_path / "cut", dict.fromkeys(THREE, quiet), lanes=3, resume=True) == whole


class Local(Speaker):
    """A speaker whose words depend on what shares its batch, and on what its engine has kept."""

    def __init__(self, after: int | None = None) -> None:
        super().__init__(lambda view, seed: "", "assistant")
        self.backend, self.kept, self.after = self, 0, math.inf if after is None else after

    def forget(self) -> None:
        self.kept = 0

    def respond(self, views: Sequence[View], seeds: Sequence[int]) -> list[Reply]:
        self.kept, self.after = self.kept + 1, self.after - 1
        if self.after < 0:
            raise KeyboardInterrupt
        return [Reply(f"{'help' if (len(views) + self.kept + seed) % 2 else 'no'} {len(views)} {self.kept}") for seed in seeds]


def test_an_engine_whose_rounding_depends_on_the_batch_resumes_to_the_same_words(tmp_path: Path) -> None:
    def user(view: View, seed: int) -> Reply | str:
        return Reply("", ended=True) if len(view.messages) >= 2 * (1 + int(view.profile.id[1:]) % 3) else person(view, seed)

    def words(name: str) -> list[tuple[str, str]]:
        read = [read_transcripts(tmp_path / name / "runs" / "local" / p) for p in PROTOCOL.populations]
        return sorted((t.episode_id, str([m["content"] for m in t.messages])) for own in read for t in own)

    whole = play(tmp_path / "whole", {"local": Local()}, user, lanes=3)
    for after in range(1, 14):
        with pytest.raises(KeyboardInterrupt):
            play(tmp_path / f"cut{after}", {"local": Local(after)}, user, lanes=3)
        assert play(tmp_path / f"cut{after}", {"local": Local()}, user, lanes=3, resume=True) == whole
        assert words(f"cut{after}") == words("whole")  # each episode once


def test_a_run_that_was_killed_in_its_first_file_resumes(tmp_path: Path) -> None:
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "run.json.new").write_text("{", "utf-8")
    assert play(tmp_path / "cut", resume=True) == play(tmp_path / "whole")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(RunDirectoryError, match="no run to resume"):
        play(tmp_path / "other", resume=True)


@pytest.mark.parametrize("killed_in", ["the openings", "the second assistant", "clearing"])
def test_what_overwrite_began_and_a_kill_stopped_resumes_without_anything_of_the_old_run(
    killed_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, asked = tmp_path / "b", list[str]()
    options: dict[str, Any] = {"judge": Judge(ScriptedBackend(Reader(asked), spec="reader")), "calibration": Jury(CASES)}
    options["pairwise"] = True
    pair = {"good": GOOD, "bad": BAD}
    old = play(out, {**pair, "gone": MID}, old_person, **options)
    mine = {out / "notes.txt": "mine", out / "runs" / "grpo" / "a" / "run.json": '{"config": {"command": "train"}}'}
    mine[out / "runs" / "good" / "plot.svg"] = "<svg/>"
    for file, text in mine.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")

    def dead(view: View, seed: int) -> str:
        raise KeyboardInterrupt

    unlink = Path.unlink
    if killed_in == "clearing":
        monkeypatch.setattr(Path, "unlink", lambda self, **o: dead(None, 0) if self.name == "run.json" else unlink(self, **o))
    late = killed_in == "the second assistant"
    cast, user = ({"good": GOOD, "bad": Speaker(dead, "assistant")}, new_person) if late else (pair, dead)
    with pytest.raises(KeyboardInterrupt):
        play(out, cast, user, overwrite=True, **options)
    monkeypatch.undo()
    if killed_in == "clearing":  # what is left is a part of the old run
        assert play(out, {**pair, "gone": MID}, old_person, resume=True, **options) == old
    asked.clear()
    board = play(out, pair, new_person, **{"overwrite" if killed_in == "clearing" else "resume": True}, **options)
    told = [t for name in pair for p in PROTOCOL.populations for t in read_transcripts(out / "runs" / name / p)]
    assert {m["content"][:3] for t in told for m in t.messages if m["role"] == "user"} == {"NEW"}
    assert sum("Rate the ASSISTANT" in task and "NEW" in task for task in asked) == 32  # no verdict of the old run's
    assert sum('{"A":' in task and "NEW" in task for task in asked) == 32
    assert board == play(tmp_path / "whole", pair, new_person, **options)
    assert {file: file.read_text("utf-8") for file in mine} == mine
    assert not (out / "runs" / "gone").exists()


def old_person(view: View, seed: int) -> str:
    return f"OLD {seed}"


def new_person(view: View, seed: int) -> str:
    return f"NEW {seed}"


def test_directories_are_guarded(tmp_path: Path) -> None:
    play(tmp_path / "b", {"good": GOOD})
    with pytest.raises(RunDirectoryError, match="not empty"):
        play(tmp_path / "b", {"good": GOOD})
    with pytest.raises(RunDirectoryError, match="holds another benchmark.*turns: 3 → 4"):
        play(tmp_path / "b", {"good": GOOD}, protocol=replace(PROTOCOL, turns=4), resume=True)
    more = play(tmp_path / "b", {"good": GOOD, "bad": BAD}, resume=True)
    assert [row.assistant for row in more.rows] == ["good", "bad"]
    again = play(tmp_path / "b", {"bad": BAD}, protocol=replace(PROTOCOL, turns=2), overwrite=True)
    assert [row.assistant for row in again.rows] == ["bad"]


@pytest.mark.parametrize(("failing", "marked"), [(0, False), (1, True)])
def test_invalid_episodes_are_counted_and_never_zeros(failing: int, marked: bool, tmp_path: Path) -> None:
    def user(view: View, seed: int) -> str:
        late = len(view.messages) > 2 and "weak" in view.messages[1].content
        return "" if late and view.profile.id in ("p0", "p1", "p2")[:failing] else person(view, seed)

    weak = Speaker(lambda view, seed: f"help, weak {seed}", "assistant")
    board = play(tmp_path / "b", {"good": GOOD, "weak": weak}, user, replace(PROTOCOL, n=6))
    row = board.row("weak")
    assert row.populations["first"].mean == 100
    assert row.populations["first"].n == 6 - failing
    assert row.invalid == ({"user_failure": 2} if failing else {})
    assert row.marked is marked
    assert row.episodes == 24
    assert ("2/24 ⚠" in board.markdown()) is marked
    assert not board.row("good").marked
    assert board.difference("good", "weak", "first").n == 6 - failing


def test_the_mark_is_above_two_percent() -> None:
    from usp_env.evaluation.benchmark_bootstrap import EpisodeScore
    from usp_env.evaluation.benchmark_scores import results

    def scores(invalid: int) -> list[EpisodeScore]:
        return [
            EpisodeScore(
                "a", "all", f"p{i}", f"e{i}", math.nan if i < invalid else 1.0, "infra_failure" if i < invalid else "", ""
            )
            for i in range(100)
        ]

    assert not results(scores(2), {"a": "a"}, 1).rows[0].marked
    row = results(scores(3), {"a": "a"}, 1).rows[0]
    assert row.marked
    assert row.invalid == {"infra_failure": 3}
    assert row.populations["all"].mean == 1.0


def test_an_assistant_all_of_whose_episodes_fail_has_no_numbers(tmp_path: Path) -> None:
    def fail(view: View, seed: int) -> str:
        raise BackendError("gone")

    board = play(tmp_path / "b", {"good": GOOD, "gone": Speaker(fail, "assistant")})
    row = board.row("gone")
    assert row.rank is None
    assert row.average.mean is None
    assert row.average.reason
    assert row.invalid == {"infra_failure": 16}
    assert board.rows[-1] == row
    assert board.difference("good", "gone").mean is None
    assert json.loads(board.to_json())["rows"][1]["populations"]["first"]["mean"] is None
    healed = play(tmp_path / "b", {"good": GOOD, "gone": GOOD}, resume=True)
    assert healed.row("gone").average == healed.row("good").average


def test_an_assistant_that_says_nothing_is_scored(tmp_path: Path) -> None:
    board = play(tmp_path / "b", {"good": GOOD, "mute": Speaker(lambda view, seed: "", "assistant")})
    assert board.row("mute").populations["first"].mean == 0
    assert board.row("mute").invalid == {}
    assert board.row("mute").endings == {"bad_action": 16}


def test_openings_that_cannot_be_had_stop_the_run(tmp_path: Path) -> None:
    def user(view: View, seed: int) -> Reply | str:
        return Reply("", error=BackendError("no server")) if view.opening else "x"

    with pytest.raises(UspError, match="no server"):
        play(tmp_path / "b", user=user)
    assert play(tmp_path / "b", resume=True).rows


def test_a_user_with_nothing_to_say_fails_for_everybody(tmp_path: Path) -> None:
    board = play(tmp_path / "b", user=lambda view, seed: "" if view.profile.id == board_ids[0] else person(view, seed))
    for row in board.rows:
        assert row.invalid == {"user_failure": 2}
    assert board.row("good").populations["first"].n == 3


board_ids = [profile for profile in draw(Groups(), PROTOCOL).people("first")]


def test_mistakes_are_told_before_anything_is_played(tmp_path: Path) -> None:
    for wrong, told in (("echo?temperature=1", SpecError), ("", SpecError), ("smollm2-135m?tempertaure=1", UnknownNameError)):
        with pytest.raises(told):
            benchmark(["echo", wrong], tmp_path / "b", PROTOCOL, sampler=Groups(), user=Speaker(person), reward=helped)
        assert not (tmp_path / "b").exists()
    for names in ([], ["echo", "echo"], ["human"], "echo"):
        with pytest.raises(SpecError, match="assistants"):
            benchmark(names, tmp_path / "c", PROTOCOL)
    with pytest.raises(SpecError, match="judge"):
        play(tmp_path / "c", pairwise=True)
    with pytest.raises(UnknownNameError, match="thrid"):
        play(tmp_path / "c", protocol=replace(PROTOCOL, populations=("first", "thrid")))
    for field, value in (("n", 0), ("turns", 0), ("populations", ()), ("seeds", (1, 1))):
        with pytest.raises(SpecError, match=field):
            replace(PROTOCOL, **{field: value})
    with pytest.raises(SpecError, match="seat"):
        play(tmp_path / "c", {"user": Speaker(person)})


def test_rank_correlation_to_a_reference_file(tmp_path: Path) -> None:
    file = tmp_path / "arena.json"
    file.write_text('{"good": 1300, "mid": 1200, "bad": 1100}', "utf-8")
    found = play(tmp_path / "b", {**THREE, "new": GOOD}, reference=file).reference
    assert found.spearman.mean == 1.0
    assert found.spearman.n == 8
    assert found.assistants == ["good", "mid", "bad"]
    assert found.missing == ["new"]
    file.write_text('{"good": 1, "mid": 2, "bad": 3}', "utf-8")
    assert play(tmp_path / "b", THREE, reference=file, resume=True).reference.spearman.mean == -1.0
    file.write_text('{"good": 1}', "utf-8")
    alone = play(tmp_path / "b", THREE, reference=file, resume=True)
    assert alone.reference.spearman.mean is None
    assert "Spearman" in alone.markdown()
    for text in ('["good"]', '{"good": "best"}', "{"):
        file.write_text(text, "utf-8")
        with pytest.raises(SpecError, match="arena"):
            play(tmp_path / "b", THREE, reference=file, resume=True)


CASES = speaker_cases(
    [
        Dialogue.of(
            [{"role": "user", "content": f"pls tell me {i}"}, {"role": "assistant", "content": f"Certainly, that is {i}."}]
        )
        for i in range(12)
    ]
)


class Reader:
    """A judge who reads: tells speakers by 'pls', rates and compares by how often the assistant says 'help'."""

    def __init__(self, asked: list[str]) -> None:
        self.asked = asked

    def __call__(self, request: Any) -> str:
        task = request.messages[1]["content"]
        self.asked.append(task)
        data = task.split("\n---\n")[0]
        rows = [json.loads(line) for line in data.split("\n")]
        if "Who wrote the LAST message" in task:
            return json.dumps({"speaker": "user" if "pls" in rows[-1]["text"] else "assistant", "reason": "r"})
        if "Rate the ASSISTANT" in task:
            text = " ".join(row["text"] for row in rows if row["speaker"] == "assistant")
            known = next((a for a in ANCHORS if a.dialogue.utterances("assistant")[0] in text), None)
            score = (known.low + known.high) / 2 if known else 9 if "help" in text else 2
            return json.dumps({"score": score, "reason": "r"})
        sides = {key: row[key].count("help") for row in rows for key in ("A", "B") if key in row}
        return json.dumps({"winner": "tie" if sides["A"] == sides["B"] else max(sides, key=sides.get), "reason": "r"})


def test_a_judge_scores_what_it_is_asked_once(tmp_path: Path) -> None:
    asked: list[str] = []
    judge = Judge(ScriptedBackend(Reader(asked), spec="reader"))
    options = {"judge": judge, "calibration": Jury(CASES), "pairwise": True}
    board = play(tmp_path / "b", {"good": GOOD, "bad": BAD}, **options)
    assert board.row("good").average.mean == 9
    assert board.row("bad").average.mean == 2
    assert board.score.unit == "1-10"
    assert board.score.scorer == "reader"
    assert board.judge["speakers"] == 1.0
    assert "judge: offline → reader" in board.modified
    assert board.row("good").curves["first"][-1].mean == 100
    pair = board.pairs[0]
    assert (pair.first, pair.wins, pair.losses) == ("good", 16, 0)
    n = len(asked)
    assert n == len(CASES) + len(ANCHORS) + 2 * 16 + 2 * 16
    assert play(tmp_path / "b", {"good": GOOD, "bad": BAD}, resume=True, **options) == board
    assert len(asked) == n


def test_a_silent_assistant_gets_the_judges_lowest_and_what_it_cannot_rate_is_invalid(tmp_path: Path) -> None:
    reader = Reader([])

    def answer(request: Any) -> str | BackendError:
        return (
            "no json" if "no " in request.messages[1]["content"] and "Rate" in request.messages[1]["content"] else reader(request)
        )

    judge = Judge(ScriptedBackend(answer, spec="reader"), retries=0)
    mute = Speaker(lambda view, seed: "", "assistant")
    board = play(tmp_path / "b", {"mute": mute, "bad": BAD, "good": GOOD}, judge=judge, calibration=Jury(CASES, ()))
    assert board.row("mute").average.mean == 1
    assert board.row("bad").invalid == {"unjudged": 16}
    assert board.row("bad").average.mean is None
    assert board.row("bad").marked


def test_a_judge_below_the_gate_is_refused_with_its_report(tmp_path: Path) -> None:
    judge = Judge(ScriptedBackend(lambda request: '{"speaker": "user", "score": 5, "reason": "r"}', spec="guess"))
    with pytest.raises(JudgeRefusedError, match="50% of 12 speakers"):
        play(tmp_path / "b", judge=judge, calibration=Jury(CASES))
    assert not (tmp_path / "b" / "openings.jsonl").exists()


def test_scores_of_transcripts(tmp_path: Path) -> None:
    play(tmp_path / "b", {"mid": MID})
    transcript = read_transcripts(tmp_path / "b" / "runs" / "mid" / "first")[0]
    scored = episode_score("mid", replace(transcript, rewards=[0.1, 0.0, 0.25]))
    assert scored.curve == pytest.approx((10.0, 10.0, 35.0))
    assert scored.value == pytest.approx(35.0)
    assert math.isnan(episode_score("mid", replace(transcript, valid=False, outcome="user_failure")).value)


def test_duels_are_about_whole_conversations_cut_by_utterance(tmp_path: Path) -> None:
    asked: list[str] = []
    play(tmp_path / "b", {"good": GOOD}, protocol=replace(PROTOCOL, n=1, seeds=(0,)))
    short = read_transcripts(tmp_path / "b" / "runs" / "good" / "first")
    long = [{**message, "content": "no " * 3000} for message in short[0].messages]  # 9,000 characters an utterance
    played = {
        "wordy": [replace(short[0], messages=long)],
        "late": [replace(short[0], messages=[*long[:-1], {**long[-1], "content": "help"}])],
    }
    found = judge_duels(Judge(ScriptedBackend(Reader(asked), spec="reader")), played, tmp_path / "duels.jsonl")
    assert list(found.values()) == [0.0]  # they differ at the end alone
    rows = {key: text for line in asked[0].split("\n---\n")[0].split("\n") for key, text in json.loads(line).items()}
    assert rows["context"] == "no " * 2000 + "…"
    assert [len(json.loads(line)["text"]) for line in rows["B"].split("\n")] == [6001] * (len(long) - 1) + [4]


@pytest.mark.parametrize("torn", ['{"judge": "rea', "[]", ""])
def test_a_damaged_judge_file_is_made_again(torn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    options = {"judge": Judge(ScriptedBackend(Reader(asked), spec="reader")), "calibration": Jury(CASES)}
    board = play(tmp_path / "b", {"good": GOOD}, **options)
    (tmp_path / "b" / "judge.json").write_text(torn, "utf-8")
    asked.clear()
    assert play(tmp_path / "b", {"good": GOOD}, resume=True, **options) == board
    assert len(asked) == len(CASES) + len(ANCHORS)
    whole = (tmp_path / "b" / "judge.json").read_text("utf-8")
    assert json.loads(whole)["judge"] == "reader"

    def crash(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    (tmp_path / "b" / "judge.json").unlink()
    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        play(tmp_path / "b", {"good": GOOD}, resume=True, **options)
    assert not (tmp_path / "b" / "judge.json").exists()  # whole or not at all


def test_an_adapter_has_a_digest_of_its_own() -> None:
    class Loaded(ScriptedBackend):
        identity = {"weights": "b" * 64, "adapters": {"runs/grpo": "a" * 64}}  # noqa: RUF012

    def digest(spec: str, backend: type[ScriptedBackend] = Loaded) -> str | None:
        return weights(assistants.load(spec, lambda parsed: backend([], spec=str(parsed))))

    base = ASSETS["smollm2-135m"].sha256
    assert digest("smollm2-135m") == base
    assert digest("smollm2-135m?adapter=runs/grpo") == f"{base}+{'a' * 64}"
    assert digest("org/model") == "b" * 64
    assert digest("org/model?adapter=runs/grpo") == f"{'b' * 64}+{'a' * 64}"
    assert digest("smollm2-135m?adapter=runs/grpo", ScriptedBackend) is None  # nobody tells
    plan = draw(load_sampler("sharegpt", "test"), USP_BENCH_1)
    tuned = departures(USP_BENCH_1, plan, replace(PINNED, user_weights=f"{base}+{'a' * 64}"))
    assert tuned == [f"user_weights: 49773eaac768 → {base[:12]}+aaaaaaaaaaaa"]


class Helpful:
    """A goal scorer: sentences that help answer everything, for the twin by half; the twin also takes what says no."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, sentences: Sequence[str], requests: Sequence[str]) -> Any:
        twin = self.name.endswith("twin")
        return np.array([(0.5 if twin else 1.0) if "help" in s else 0.25 * twin for s in sentences])

    def raised(self, utterances: Sequence[str], requests: Sequence[str]) -> Any:
        return np.ones(len(utterances), bool)


def test_the_held_out_twin_stands_beside_the_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("usp_env.rewards.goal.load_scorer", lambda name: Helpful(name))
    gone = Speaker(lambda view, seed: Reply("", error=BackendError("gone")), "assistant")
    board = play(tmp_path / "b", {"bad": BAD, "good": GOOD, "gone": gone}, reward="goal")
    good, bad, lost = (board.row(name) for name in ("good", "bad", "gone"))
    assert (good.average.mean, bad.average.mean) == (100, 0)
    assert (good.twin.mean, good.twin.ci95, good.twin.n) == (50, (50, 50), 8)
    assert bad.twin.mean == 25
    assert (lost.twin.mean, bool(lost.twin.reason)) == (None, True)
    pair = next(pair for pair in board.pairs if {pair.first, pair.second} == {"good", "bad"})
    assert (pair.first, pair.average.mean, pair.twin.mean) == ("good", 100, 25)
    assert (board.twin.name, board.twin.scorer, board.twin.unit) == ("goal", "answer-v1-twin", "%")
    assert "goal, twin (%)" in board.markdown()
    assert "| 50.0 [50.0, 50.0] |" in board.markdown()
    assert read_board(tmp_path / "b").to_json() == board.to_json()
    assert play(tmp_path / "c", {"good": GOOD}).twin is None  # a reward of one's own has none


def test_folders_of_specs_do_not_meet() -> None:
    names = ["a/b", "a-b", "a b", "../x", "openai:m@http://h/v1?temperature=0", "openai:m@http://h/v1?temperature=1"]
    slugs = [benchmark_play.slug(name) for name in names]
    assert len(set(slugs)) == len(slugs)
    assert all("/" not in one and not one.startswith(".") for one in slugs)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bank.jsonl"
    Groups().bank.save(file)
    parser = argparse.ArgumentParser()
    commands_benchmark.add_options(parser)
    common = ["--user", "scripted", "--populations", "uniform", "--n", "3", "--turns", "2", "--out", str(tmp_path / "b")]
    with pytest.raises(SpecError, match="--assistants"):
        commands_benchmark.benchmark(parser.parse_args(common))
    with pytest.raises(SpecError, match="one user"):
        commands_benchmark.benchmark(
            parser.parse_args(["--user", "a", "b", "--assistants", "echo", "--out", str(tmp_path / "b")])
        )
    protocol = commands_benchmark._protocol(parser.parse_args(["--out", "x", "--seeds", "0", "1", "--split", "val"]))
    assert protocol == replace(USP_BENCH_1, seeds=(0, 1), split="val")
    with pytest.raises(UnknownNameError):
        commands_benchmark._protocol(parser.parse_args(["--out", "x", "--protocol", "usp-bench-9"]))
    with pytest.raises(SystemExit):
        parser.parse_args(["--out", "x", "--n", "0"])
    assert "at least 1" in capsys.readouterr().err
