"""An evaluation from end to end on users whose card can be told beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from evaluation_doubles import (
    Actor,
    candidate,
    echo,
    make_people,
    make_plan,
    make_scorers,
    real_turns,
    talk,
    words_embed,
)

from usp_env.backends.cache import CacheBackend
from usp_env.backends.scripted import ScriptedBackend
from usp_env.errors import BackendError, RunDirectoryError, SpecError
from usp_env.evaluation import resampling, spoken, utterance
from usp_env.evaluation.card import METRICS, NEIGHBOUR, REAL, read_card
from usp_env.evaluation.columns import Column
from usp_env.evaluation.people import person
from usp_env.evaluation.plan import Candidate
from usp_env.evaluation.run import JUDGE, SCORES, USERS, evaluate
from usp_env.metrics.judges import Judge
from usp_env.profiles import Profile
from usp_env.records import Reply

pytest.importorskip("sklearn")


def run(folder: Path, *users: Candidate, people=None, scorers=None, **settings):
    people = people or make_people()
    control = {key: settings.pop(key) for key in ("resume", "overwrite", "card_file") if key in settings}
    return evaluate(
        users, settings.pop("assistant", echo()), make_plan(people, **settings), scorers or make_scorers(), folder, **control
    )


def mean(card, user: str, level: str, metric: str) -> float | None:
    return card["users"][user][level][metric]["mean"]


@pytest.fixture(autouse=True)
def few_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "REPLICATES", 50)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):
    people = make_people()
    others = {who.id: people[(k + 1) % len(people)] for k, who in enumerate(people)}
    theirs = [person(who.profile, others[who.id].dialogue, not who.ended) for who in people]
    backwards = [person(who.profile, talk(*(who.turns[k // 2] for k in (2, 3, 0, 1)))) for who in people]
    folder = tmp_path_factory.mktemp("run")
    card = run(
        folder,
        candidate("replay", real_turns(people)),
        candidate("swapped", real_turns(theirs)),
        candidate("backwards", real_turns(backwards)),
        neighbours={who.id: others[who.id].dialogue for who in people},
    )
    return folder, card


# ── what the metrics say ─────────────────────────────────────────────────────────────────────────


def test_who_says_what_the_person_said_gets_everything(finished) -> None:
    card = finished[1]
    for level in ("utterance", "conversation"):
        for metric in ("sem_sim", "style_sim", "ava"):
            assert mean(card, "replay", level, metric) == 100, (level, metric)
        for metric in ("r_dp_p", "p_cover", "human_likeness", "copy_rate", "role_drift"):
            assert mean(card, "replay", level, metric) == mean(card, REAL, level, metric), (level, metric)
    assert mean(card, "replay", "conversation", "r_dpc") == mean(card, REAL, "conversation", "r_dpc") == 80  # of 100 and 66.7
    assert mean(card, "replay", "conversation", "adv") == 0
    assert card["users"]["replay"]["conversation"]["adv"]["detail"]["curve"] == [0.0] * 21
    assert mean(card, "replay", "utterance", "termination_f1") == 100
    assert mean(card, "replay", "conversation", "turn_count_distance") == 0
    assert mean(card, "replay", "conversation", "ended_by_user") == 100


def test_swapped_dialogues_score_less(finished) -> None:
    card = finished[1]
    for level in ("utterance", "conversation"):
        assert mean(card, "swapped", level, "sem_sim") < 90
        assert mean(card, "swapped", level, "r_dp_p") == 0
    assert mean(card, "swapped", "conversation", "adv") > 0
    gaps = card["users"]["swapped"]["differences"]["conversation"]["sem_sim"]
    assert {gap["against"] for gap in gaps} == {"replay", "backwards"}
    for gap in gaps:
        assert gap["ci95"][1] < 0
        assert gap["n"] == 4
        assert gap["difference"] == pytest.approx(mean(card, "swapped", "conversation", "sem_sim") - 100, abs=1e-3)


def test_turn_by_turn_and_all_turns_together_differ(finished) -> None:
    card = finished[1]  # the right turns in the wrong order; the embedder counts words
    assert mean(card, "backwards", "conversation", "sem_sim") == 100
    assert mean(card, "backwards", "utterance", "sem_sim") < 60


def test_every_scorer_has_its_twin_beside_it(finished) -> None:
    card = finished[1]
    for metric, scorer in (
        ("human_likeness", "short-twin"),
        ("role_drift", "short-twin"),
        ("r_dp_p", "never"),
        ("drift", "never"),
    ):
        for level in ("utterance", "conversation"):
            assert card["users"]["replay"][level][metric]["twin"]["scorer"] == scorer
    assert card["users"]["replay"]["conversation"]["r_dpc"]["twin"]["mean"] == 0
    assert card["users"]["swapped"]["differences"]["conversation"]["human_likeness"][0]["twin"]["difference"] == 0
    assert card["scorers"]["human"] == ["short", "short-twin"]


def test_real_people_are_ceilings(finished) -> None:
    card = finished[1]
    people = make_people()
    halves = [words_embed([who.turns[0], who.turns[1]]) for who in people]
    cosines = [float(a @ b / np.sqrt((a @ a) * (b @ b))) for a, b in halves]
    for level in ("utterance", "conversation"):  # two turns a person: odd and even are the first and the second
        assert mean(card, REAL, level, "sem_sim") == pytest.approx(100 * np.mean(cosines), abs=1e-3)
    other = mean(card, NEIGHBOUR, "conversation", "sem_sim")
    assert other == mean(card, "swapped", "conversation", "sem_sim")  # both are the next person's turns
    assert mean(card, NEIGHBOUR, "utterance", "sem_sim") == mean(card, "swapped", "utterance", "sem_sim")
    assert mean(card, REAL, "conversation", "dp_p") == mean(card, REAL, "conversation", "r_dp_r")
    assert mean(card, REAL, "conversation", "ended_by_user") == 75  # one goes on elsewhere


def test_the_card_keeps_to_its_form(finished) -> None:
    folder, card = finished
    assert read_card(folder) == card
    assert set(card) == {
        "users", "bank", "split", "people", "assistant", "seeds", "turns", "protocol", "judge", "scorers", "versions", "invalid",
        "calibration",
    }  # fmt: skip
    for facts in card["users"].values():
        for level in ("utterance", "conversation"):
            for name, entry in facts[level].items():
                assert name in METRICS
                if entry["mean"] is None:
                    assert entry.keys() == {"mean", "ci95", "n", "scorer", "reason"}
                    assert (entry["ci95"], entry["n"], entry["scorer"]) == (None, 0, None)
                else:
                    assert entry["n"] > 0
                    assert entry["scorer"]
                    assert entry["unit"] == METRICS[name].unit
                    assert entry["ci95"] is None or entry["ci95"][0] <= entry["mean"] <= entry["ci95"][1]
    text = (folder / "card.md").read_text("utf-8")
    assert "Scorers: embed `words`, style `length`, human `short` (held out: `short-twin`), facts `shared`" in text
    for line in ("## Utterance level", "## Conversation level", "## Not measured", "## Cost", "`real:neighbour`"):
        assert line in text
    rows = [json.loads(line) for line in (folder / SCORES).read_text("utf-8").split("\n") if line]
    own = [row for row in rows if row["user"] == "replay" and row["level"] == "conversation"]
    assert [row["sem_sim"] for row in own] == [100] * 4
    assert own[0].keys() >= {"person", "seed", "end_reason", "human_likeness.twin"}


def test_where_to_end(tmp_path: Path) -> None:
    people = make_people()
    never = candidate("never", lambda view, seed: "tell me more")
    always = candidate("always", lambda view, seed: Reply("" if view.messages else "hi", ended=bool(view.messages)))
    card = run(tmp_path, never, always, people=people, levels=("utterance",))
    assert mean(card, "never", "utterance", "termination_f1") == 0
    found = card["users"]["always"]["utterance"]["termination_f1"]
    # Decisions: before each second turn (4 people: go on) and after the end of the 3 whose end is known.
    assert (found["detail"]["decisions"], found["detail"]["ends"]) == (7, 3)
    assert found["detail"]["precision"] == pytest.approx(100 * 3 / 7)
    assert found["mean"] == pytest.approx(100 * 2 * 3 / (2 * 3 + 4), abs=1e-3)
    assert card["users"]["always"]["utterance"]["sem_sim"]["n"] == 4  # the openings


def test_ending_where_it_is_hard_wins_nothing(tmp_path: Path) -> None:
    people = make_people()
    own = real_turns(people)
    brave = candidate("brave", lambda view, seed: "what else" if view.messages else own(view, seed))
    quits = candidate("quits", lambda view, seed: Reply("", ended=True) if view.messages else own(view, seed))
    card = run(tmp_path, brave, quits, people=people, levels=("utterance",))
    assert (mean(card, "brave", "utterance", "sem_sim"), mean(card, "quits", "utterance", "sem_sim")) == (50, 100)
    for metric in ("sem_sim", "ava", "human_likeness", "r_dp_p", "p_cover", "copy_rate"):
        gap = card["users"]["quits"]["differences"]["utterance"][metric][0]
        assert (gap["difference"], gap["n"]) == (0, 4), metric  # the openings, which both said
    for user, turns, ended in (("brave", 8, 0), ("quits", 4, 4)):
        detail = card["users"][user]["utterance"]["sem_sim"]["detail"]
        assert (detail["turns"], detail["ended"]) == (turns, ended)
    assert "100.00 [100.00, 100.00] n 4 (ended at 4 of 8 turns)" in (tmp_path / "card.md").read_text("utf-8")


def test_openings_do_not_count_against_who_is_given_nothing(tmp_path: Path) -> None:
    people = make_people()
    own = real_turns(people)
    second = {who.dialogue[0].content: who.turns[1] for who in people}
    free = candidate("free", lambda view, seed: second[view.messages[0].content] if view.messages else "hello", given=False)
    half = candidate("half", lambda view, seed: own(view, seed) if view.messages else "hello")
    card = run(tmp_path, free, half, candidate("replay", own), people=people, levels=("utterance",))
    assert mean(card, "free", "utterance", "sem_sim") == mean(card, "half", "utterance", "sem_sim") == 50
    for user, difference in (("free", 0), ("half", -50)):
        gaps = {
            gap["against"]: (gap["difference"], gap["n"]) for gap in card["users"][user]["differences"]["utterance"]["sem_sim"]
        }
        assert gaps["replay"] == (difference, 4)
    assert card["users"]["free"]["utterance"]["sem_sim"]["note"] == utterance.OPENINGS
    assert "note" not in card["users"]["half"]["utterance"]["sem_sim"]


def test_metrics_over_all_turns_are_the_cards() -> None:
    people = make_people()
    todo = spoken.jobs(people, [0, 1])
    answers = [spoken.Spoken(*job.key, f"{job.person.id} likes leeks so very much {job.turn}", False, "said") for job in todo]
    found = utterance.measure(todo, answers[1:], True, make_scorers())
    assert found.invalid == {"infra_failure": 1}
    assert found.compared is not None
    assert found.compared.tolist() == [[False, True]] + [[True, True]] * 7
    columns = {name: column for name, column in found.metrics.items() if isinstance(column, Column)}
    assert columns.keys() - {name for name, column in columns.items() if column.among} == {"termination_f1"}
    for name, column in columns.items():
        if column.among:
            np.testing.assert_allclose(column.among(found.compared), column.values, err_msg=name)


def test_the_first_turn_that_was_given_is_not_the_users(tmp_path: Path) -> None:
    people = make_people()
    seen = []

    def answer(view, seed):
        seen.append((view.profile, len(view.messages)))
        return Reply("so be it") if sum(m.role == "user" for m in view.messages) < 2 else Reply("", ended=True)

    card = run(tmp_path / "ours", candidate("free", answer, given=False), people=people)
    assert all(profile is None for profile, messages in seen[: len(people) * 3 - 1])  # the utterance level
    assert mean(card, "free", "conversation", "sem_sim") == 0  # real: the second turn alone
    assert mean(card, "free", "conversation", "user_turns") == 2
    for metric in ("first_turn_diversity", "sc_score"):
        assert "given" in card["users"]["free"]["conversation"][metric]["reason"]
    paper = run(tmp_path / "paper", candidate("free", answer, given=False), people=people, paper=True)
    assert mean(paper, "free", "conversation", "sem_sim") > 30  # the given turn is compared with itself
    assert paper["protocol"] == "paper"


def test_a_first_turn_that_one_was_given_counts_for_nobody(tmp_path: Path) -> None:
    """Who has a profile must not gain by an opening that its rival is not judged by."""
    people = make_people()
    own = real_turns(people)

    def second(view, seed):
        said = sum(message.role == "user" for message in view.messages)
        return "the same words" if said == 1 else own(view, seed)

    free = candidate("free", lambda view, seed: second(view, seed) if len(view.messages) < 3 else Reply("", ended=True), False)
    card = run(tmp_path, candidate("opens", second), free, people=people, levels=("conversation",))
    assert mean(card, "opens", "conversation", "sem_sim") > mean(card, "free", "conversation", "sem_sim")
    for metric in ("sem_sim", "style_sim", "human_likeness", "r_dp_p", "p_cover", "adv", "esr", "turn_count_distance"):
        for user in ("opens", "free"):
            gaps = card["users"][user]["differences"]["conversation"][metric]
            assert [(gap["difference"], gap["n"]) for gap in gaps] == [(0, 3 if metric == "turn_count_distance" else 4)], metric
    assert "both sides are without their first turns" in (tmp_path / "card.md").read_text("utf-8")


def test_a_user_that_is_the_same_for_everybody_sets_off_the_alarm(tmp_path: Path) -> None:
    people = make_people(6)
    own = real_turns(people)

    def noisy(view, seed):
        reply = own(view, seed)
        return reply if reply.ended else Reply(f"{reply.text} {seed % 7}")

    card = run(
        tmp_path, candidate("people", noisy), candidate("one", lambda view, seed: "hello"), people=people, seeds=(0, 1, 2),
        levels=("conversation",),
    )  # fmt: skip
    found = {user: card["users"][user]["conversation"]["collapse"]["detail"] for user in ("people", "one")}
    assert (found["people"]["alarm"], found["one"]["alarm"]) == (False, True)
    assert mean(card, "one", "conversation", "first_turn_diversity") == 0
    assert mean(card, "one", "conversation", "esr") == 100
    assert "**collapsed**" in (tmp_path / "card.md").read_text("utf-8")
    assert card["users"]["people"]["conversation"]["sem_sim"]["n"] == 6  # people, not dialogues
    one_seed = run(tmp_path / "one", candidate("people", noisy), people=people, levels=("conversation",))
    assert "--seeds 2" in one_seed["users"]["people"]["conversation"]["collapse"]["reason"]


def test_per_turn_drift_shows_the_turn(tmp_path: Path) -> None:
    people = make_people()
    topics = {who.id: who.profile.objective.split(".")[0].split()[-1] for who in people}

    def answer(view, seed):
        said = sum(m.role == "user" for m in view.messages)
        return f"{topics[view.profile.id]} part {said} {'abcdefgh'[said] * 9}" if said < 5 else f"zz {'abcdefghij'[said] * 9}"

    card = run(tmp_path, candidate("forgets", answer), people=people, levels=("conversation",), turns=8)
    found = card["users"]["forgets"]["conversation"]["drift"]
    assert found["detail"]["turns"] == [100] * 5 + [0] * 3
    assert found["detail"]["dialogues"] == [4] * 8
    assert found["mean"] < 0


# ── failures ─────────────────────────────────────────────────────────────────────────────────────


def dies(view, seed):
    return Reply("", error=BackendError("no connection"))


def test_a_dying_backend_gives_counts_and_no_numbers(tmp_path: Path) -> None:
    card = run(tmp_path, candidate("dead", dies))
    facts = card["users"]["dead"]
    assert facts["invalid"] == {"utterance": {"infra_failure": 11}, "conversation": {"infra_failure": 4}}
    assert card["invalid"] == {"infra_failure": 15}
    for level in ("utterance", "conversation"):
        assert all(entry["mean"] is None and entry["n"] == 0 for entry in facts[level].values()), level
    assert "infra_failure 11" in facts["utterance"]["sem_sim"]["reason"]
    assert "infra_failure 15" not in (tmp_path / "card.md").read_text("utf-8")


def test_a_whole_batch_that_fails_is_a_batch_of_failures(tmp_path: Path) -> None:
    user = candidate("dead", dies)

    def respond(views, seeds):
        raise BackendError("the server is gone")

    user.speaker.respond = respond  # type: ignore[method-assign]
    card = run(tmp_path, user)
    assert card["invalid"] == {"infra_failure": 15}


def test_failures_of_some_leave_the_others_measured(tmp_path: Path) -> None:
    people = make_people()
    own = real_turns(people)
    empty = candidate("half", lambda view, seed: Reply("") if view.profile.id == "p1" else own(view, seed))
    card = run(tmp_path, empty, candidate("replay", own), people=people)
    assert card["users"]["half"]["invalid"] == {"utterance": {"user_failure": 3}, "conversation": {"user_failure": 1}}
    for level in ("utterance", "conversation"):
        assert card["users"]["half"][level]["sem_sim"]["n"] == 3
        assert mean(card, "half", level, "sem_sim") == 100
        assert card["users"]["half"]["differences"][level]["sem_sim"][0]["n"] == 3
    text = (tmp_path / "card.md").read_text("utf-8")
    assert card["users"]["half"]["jobs"] == {"utterance": 11, "conversation": 4}
    assert text.count("`half` ⚠ | `replay` |") == 2  # 3 of 11 turns, 1 of 4 conversations
    for lost in ("turns", "conversations"):
        assert f"⚠ more than 2% of the {lost} are invalid." in text
    assert "- `half`, user_failure 3 of 11 turns\n- `half`, user_failure 1 of 4 conversations" in text


def test_what_the_assistant_spoils_is_not_the_users(tmp_path: Path) -> None:
    mute = Actor(lambda view, seed: "", "assistant", "mute")
    card = run(tmp_path, candidate("replay", real_turns(make_people())), assistant=mute, levels=("conversation",))
    assert card["invalid"] == {"agent_failure": 4}
    assert mean(card, "replay", "conversation", "user_turns") is None


def test_an_empty_or_foreign_turn_is_drawn_once_more(tmp_path: Path) -> None:
    tries: dict[int, int] = {}

    def answer(view, seed):
        tries[seed] = tries.get(seed, 0) + 1
        return "Assistant: here it is" if len(tries) % 2 else "ok then"

    card = run(tmp_path, candidate("slips", answer), levels=("utterance",), lanes=1)
    assert card["invalid"] == {}
    assert set(tries.values()) == {1}  # another seed
    assert len(tries) == 22


# ── resuming ─────────────────────────────────────────────────────────────────────────────────────


class Killed(BaseException):
    """The machine went away."""


def killable(after: int):
    """A user that says the person's turns, noisily, and kills the run in its `after`-th batch."""
    people = make_people()
    own = real_turns(people)

    def answer(view, seed):
        reply = own(view, seed)
        return reply if reply.ended else Reply(f"{reply.text} {seed % 97}")

    user = candidate("noisy", answer)
    plain, batches = user.speaker.respond, [0]

    def respond(views, seeds):
        batches[0] += 1
        if batches[0] == after:
            raise Killed
        return plain(views, seeds)

    user.speaker.respond = respond  # type: ignore[method-assign]
    return user


def results(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("card.json", SCORES)}


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    settings = {"seeds": (0, 1), "lanes": 3}
    whole = killable(0)
    run(tmp_path / "whole", whole, **settings)
    total, expected = whole.speaker.asked, results(tmp_path / "whole")  # type: ignore[attr-defined]
    # 22 utterance generations in rounds of at most 3, then two seeds of conversations.
    rounds = [len(batch) for batch in spoken.rounds(spoken.jobs(make_people(), (0, 1)), 3)]
    assert sum(rounds) == 22
    for after in (1, 5, 8, 9, 11, 14):
        folder = tmp_path / f"killed-{after}"
        first, again = killable(after), killable(0)
        with pytest.raises(Killed):
            run(folder, first, **settings)
        assert not (folder / "card.json").exists()
        kept = len(spoken.read(folder / USERS / first.slug / "utterances.jsonl"))
        lines = sum(len(file.read_bytes().splitlines()) for file in folder.glob("users/*/seed-*/transcripts.jsonl"))
        assert kept == sum(rounds[: after - 1])
        run(folder, again, resume=True, **settings)
        assert results(folder) == expected, after
        asked = total - kept - lines * 3  # a conversation asks the user three times
        assert again.speaker.asked == asked, after  # type: ignore[attr-defined]


def test_rounds_follow_each_persons_turns() -> None:
    """A context that goes on from the one of the round before is what an engine reads fastest."""
    todo = spoken.jobs(make_people(), (0, 1))
    batches = list(spoken.rounds(todo, 3))
    assert sorted(job.key for batch in batches for job in batch) == sorted(job.key for job in todo)
    for batch in batches:
        assert len({(job.person.id, job.seed) for job in batch}) == len(batch) <= 3
    last = {(job.person.id, job.seed): job.turn for job in todo}
    for who, turn in last.items():
        own = [(k, job.turn) for k, batch in enumerate(batches) for job in batch if (job.person.id, job.seed) == who]
        rounds, turns = zip(*own, strict=True)
        assert rounds == tuple(range(rounds[0], rounds[0] + len(own)))  # one in each, from its first
        assert list(turns) == sorted(turns)
        assert turns[-1] == turn


def test_a_line_that_was_cut_off_is_generated_again(tmp_path: Path) -> None:
    run(tmp_path / "whole", killable(0), levels=("utterance",))
    expected = results(tmp_path / "whole")
    folder = tmp_path / "whole"
    file = folder / USERS / killable(0).slug / "utterances.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    again = killable(0)
    run(folder, again, levels=("utterance",), resume=True)
    assert again.speaker.asked == 1  # type: ignore[attr-defined]
    assert results(folder) == expected


def test_what_infrastructure_failed_is_tried_again(tmp_path: Path) -> None:
    people = make_people()
    own = real_turns(people)
    run(tmp_path, candidate("flaky", lambda view, seed: dies(view, seed) if view.profile.id == "p2" else own(view, seed)))
    again = candidate("flaky", own)
    card = run(tmp_path, again, resume=True)
    assert card["invalid"] == {}
    assert again.speaker.asked == 3 + 3  # p2's turns and its conversation
    assert mean(card, "flaky", "utterance", "sem_sim") == 100


def test_another_configuration_is_refused_and_overwriting_begins_anew(tmp_path: Path) -> None:
    run(tmp_path, candidate("a", lambda view, seed: "one"))
    with pytest.raises(RunDirectoryError, match="not empty"):
        run(tmp_path, candidate("a", lambda view, seed: "one"))
    with pytest.raises(RunDirectoryError, match="turns: 10 → 4"):
        run(tmp_path, candidate("a", lambda view, seed: "one"), turns=4, resume=True)
    fresh = candidate("a", lambda view, seed: "two")
    run(tmp_path, fresh, overwrite=True)
    assert {one.text for one in spoken.read(tmp_path / USERS / fresh.slug / "utterances.jsonl")} == {"two"}
    assert fresh.speaker.asked > 11


@pytest.mark.parametrize("left", [(), ("transcripts.jsonl",), ("transcripts.jsonl", "run.json.new")])
def test_a_run_that_was_killed_before_it_began_resumes(left: tuple[str, ...], tmp_path: Path) -> None:
    for name in left:
        (tmp_path / name).touch()
    assert run(tmp_path, candidate("a", lambda view, seed: "one"), resume=True, levels=("utterance",))["users"]
    (tmp_path / "run.json").unlink()
    with pytest.raises(RunDirectoryError, match="no run to resume"):
        run(tmp_path, candidate("a", lambda view, seed: "one"), resume=True, levels=("utterance",))


def test_names_and_levels_are_checked(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="names that differ"):
        run(tmp_path, candidate("a", dies), candidate("a", dies))
    with pytest.raises(SpecError, match="names that differ"):
        run(tmp_path, candidate(REAL, dies))
    with pytest.raises(SpecError, match="needs an assistant"):
        run(tmp_path, candidate("a", dies), assistant=None)
    with pytest.raises(SpecError, match="levels of"):
        make_plan(make_people(), levels=("dialogue",))


# ── judge ────────────────────────────────────────────────────────────────────────────────────────


def test_a_judge_is_asked_once_for_each_verdict(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    inner = ScriptedBackend(lambda request: '{"score": 4, "reason": "Terse."}', spec="judge")
    users = [candidate("replay", real_turns(make_people())), candidate("free", lambda view, seed: "so", given=False)]

    def scorers():
        return make_scorers(judge=Judge(CacheBackend(inner, folder / JUDGE, "record")))

    card = run(folder, *users, scorers=scorers())
    assert mean(card, "replay", "utterance", "sc_score") == mean(card, REAL, "conversation", "sc_score") == 4
    assert card["users"]["free"]["utterance"]["sc_score"]["reason"] == "the user is given no profile"
    assert card["judge"] == "judge"
    asked = len(inner.history)
    assert asked == 8 + 4 + 4  # turns, which are the real row's too; the user's conversations; the real ones
    run(folder, *users, scorers=scorers(), resume=True)
    assert len(inner.history) == asked


def test_verdicts_that_were_not_to_be_had_are_no_scores(tmp_path: Path) -> None:
    judge = Judge(ScriptedBackend(lambda request: BackendError("gone"), spec="judge"))
    card = run(tmp_path, candidate("replay", real_turns(make_people())), scorers=make_scorers(judge=judge))
    assert mean(card, "replay", "conversation", "sc_score") is None
    assert mean(card, "replay", "conversation", "sem_sim") == 100


# ── people ───────────────────────────────────────────────────────────────────────────────────────


def test_the_end_is_a_decision_only_where_it_is_known() -> None:
    people = make_people()
    ends = [job.person.id for job in spoken.jobs(people, [0]) if job.turn == 2]
    assert ends == ["p0", "p1", "p2"]
    assert {job.turn for job in spoken.jobs(people, [0], most=1)} == {0}
    asks = person(Profile("q", "You knit.", "Terse."), talk("hi", "hello", "and then?"))
    assert not asks.ended


def test_the_context_of_a_continuation_holds_the_reply_that_it_begins_with() -> None:
    begun = person(Profile("q", "You knit.", "Terse."), talk("hi", "hello", "and then?", "bye"))
    later = person(begun.profile, type(begun.dialogue)(begun.dialogue.messages[1:]))
    assert [m.content for m in spoken.context(later, 0)] == ["hello"]
    assert [m.content for m in spoken.context(begun, 0)] == []
    assert len(spoken.context(later, 1)) == 3
