"""The page of results: made of the kept cards and of nothing else, the paper's figures beside ours."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import paper, results
from usp_env.errors import UspError
from usp_env.evaluation.leaderboard import Estimate, Leaderboard, Row, Score
from usp_env.metrics.consistency import harmonic_mean

ROOT = Path(__file__).parents[1]
RUN = {
    "command": ["usp-env", "evaluate", "--user", "roleplay:a b", "--out", "runs/x", "--resume"],
    "commit": "0123456789abcdef",
    "versions": {"usp-env": "0.1.0"},
    "hardware": {"machine": "x86_64"},
    "provenance": {"models": {"usp:mini": {"weights": "f" * 64}, "scripted": {}}},
}


def entry(mean: float | None, ci: list[float] | None = None, **more: Any) -> dict[str, Any]:
    return {"mean": mean, "ci95": ci, "n": 5, "scorer": "s", **more}


def user(level: dict[str, Any], **more: Any) -> dict[str, Any]:
    row = {"spec": "x", "profile": True, "invalid": {}, "jobs": {}, "utterance": {}, "conversation": level, "differences": {}}
    return {**row, **more}


def write(folder: Path, name: str, content: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(RUN), "utf-8")
    (folder / name).write_text(json.dumps(content), "utf-8")


def against(other: str, difference: float, ratio: float | None) -> dict[str, Any]:
    ends = [difference - 5, difference + 5]
    return {"against": other, "difference": difference, "ci95": ends, "ratio": ratio, "n": 4, "minimum_detectable_effect": 7.5}


@pytest.fixture
def users(tmp_path: Path) -> Path:
    """A card of three users at one level, of one of them at the other."""
    curve = {"percentiles": [0, 50, 100], "curve": [0.5, 1.0, None]}
    mini = {"sem_sim": entry(36.0, [30.0, 42.0], twin=entry(35.0)), "esr": entry(20.0), "adv": entry(1.0, detail=curve)}
    gaps = {
        "adv": [against("plain", -1.0, 0.5)],
        "sem_sim": [against("plain", 6.0, 1.2), against("other", 8.0, None)],
        "turn_count_distance": [against("other", 0.25, 1.25)],
    }
    card = {
        "users": {
            "mini": user(
                mini,
                utterance={"sem_sim": entry(10.0)},
                differences={"conversation": gaps},
                invalid={"conversation": {"infra_failure": 1}, "utterance": {"user_failure": 2}},
                jobs={"conversation": 10, "utterance": 100},
            ),
            "plain": user({"sem_sim": entry(30.0), "esr": entry(None, reason="none")}),
            "other": user({"sem_sim": entry(28.0), "adv": entry(2.0, detail={**curve, "curve": [1.0, 2.0, 3.0]})}),
            "real": user({"sem_sim": entry(60.0)}),
        },
        "bank": "b",
        "split": "test",
        "people": {"n": 5, "of": 9},
        "assistant": "echo",
        "seeds": [0, 1],
        "turns": 4,
        "scorers": {"embed": ["minilm", None], "human": ["human-v1", "human-v1-twin"]},
    }
    write(tmp_path / "users", "card.json", card)
    return tmp_path


@pytest.mark.parametrize("left", [None, [], ["transcripts.jsonl"], ["run.json"]])
def test_what_a_kill_left_is_gone_on_with(left: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--resume` begins where nothing has begun; without it, whatever lies there is refused."""
    for name in left or ():
        (tmp_path / "runs" / "users").mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / "users" / name).touch()
    given = []

    def ran(command: list[Any], **options: Any) -> SimpleNamespace:
        given.append([str(word) for word in command[1:]])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(results.subprocess, "run", ran)
    words = [
        "--runs",
        str(tmp_path / "runs"),
        "--results",
        str(tmp_path / "kept"),
        "--users",
        "u",
        "--assistants",
        "a",
        "-n",
        "3",
    ]
    results.run(results.parser().parse_args(words))
    assert given == [
        ["evaluate", "--user", "u", "--split", "test", "-n", "3", "--out", str(tmp_path / "runs" / "users"), "--resume"],
        ["benchmark", "--assistants", "a", "--out", str(tmp_path / "runs" / "assistants"), "--resume"],
    ]


def test_users_stand_beside_the_papers(users: Path) -> None:
    page = results.page(users)
    assert "| `mini` ⚠ | 20.00 n 5 | 36.00 [30.00, 42.00] n 5 *35.00* | – |" in page
    assert "| `plain` | – | 30.00 n 5 | – |" in page
    assert (
        "| *USP* | *10.00* | *65.39* | *46.23* | *38.77* | *56.24* | *74.38* | *64.05* | *44.08* | *3.35* | – | – | – |" in page
    )
    assert "5 of 9 people of `b` (test)" in page
    assert "seeds 0, 1. Scorers: embed `minilm`, human `human-v1` (held out: `human-v1-twin`)." in page
    assert "`usp-env evaluate --user 'roleplay:a b' --out runs/x`" in page  # what anybody can give again
    assert "Commit 0123456; usp-env 0.1.0; x86_64.\nWeights: `usp:mini` ffffffffffff." in page


def test_the_first_user_stands_against_every_rival(users: Path) -> None:
    page = results.page(users)
    rows = [
        "| metric | rival | difference | detectable | ratio | n | ratio in the paper |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| Sem-Sim | `plain` | +6.00 [+1.00, +11.00] | 7.50 | 1.20 | 4 | *1.34 (over DialogueGPT(4o))* |",
        "| Sem-Sim | `other` | +8.00 [+3.00, +13.00] | 7.50 | – | 4 |  |",
        "| Turn-count distance | `other` | +0.25 [-4.75, +5.25] | 7.50 | 1.25 | 4 | – |",
        "| ADV | `plain` | -1.00 [-6.00, +4.00] | 7.50 | 0.50 | 4 | *the smallest at every percentile* |",
    ]
    assert "\n".join(rows) in page
    assert "both sides are without their first turns" in page


def test_adv_at_every_percentile(users: Path) -> None:
    rows = (
        "| percentile | `mini` ⚠ | `other` |\n| --- | --- | --- |\n| 0 | 0.50 | 1.00 |\n| 50 | 1.00 | 2.00 |\n| 100 | – | 3.00 |"
    )
    assert rows in results.page(users)


def test_losses_are_marked_at_their_level(users: Path) -> None:
    page = results.page(users)
    assert "- `mini`, infra_failure 1 of 10 conversations\n- `mini`, user_failure 2 of 100 turns\n" in page
    assert "| `mini` | 10.00 n 5 |" in page  # 2 of 100 turns are no more than 2 %
    assert "⚠ more than 2% of the turns are invalid." not in page
    card = json.loads((users / "users" / "card.json").read_text("utf-8"))
    card["users"]["mini"]["invalid"]["utterance"]["user_failure"] = 3
    write(users / "users", "card.json", card)
    page = results.page(users)
    assert "| `mini` ⚠ | 10.00 n 5 |" in page
    assert "⚠ more than 2% of the turns are invalid." in page


def test_what_was_resumed_tells_its_last_command_and_every_commit(users: Path) -> None:
    def again(commit: str, version: str) -> dict[str, Any]:
        command = ["usp-env", "evaluate", "--user", commit, "--resume"]
        return {"command": command, "commit": commit * 10, "versions": {"usp-env": version}, "hardware": {"machine": "arm64"}}

    run = RUN | {"resumed": [again("abcd", "0.2.0"), again("abcd", "0.2.1")]}
    (users / "users" / "run.json").write_text(json.dumps(run), "utf-8")
    page = results.page(users)
    assert "\n`usp-env evaluate --user abcd`\n\nCommits 0123456, abcdabc; usp-env 0.2.1; arm64.\n" in page


def test_the_leaderboard_keeps_its_tables(tmp_path: Path) -> None:
    at = Estimate(50.0, (40.0, 60.0), 4)
    elo = Estimate(1000.0, None, 4)
    row = Row(1, "echo", "echo", at, {"majority": at}, {}, {"majority": [at]}, elo, 4, {}, False, {}, weights="e" * 64)
    score = Score("goal", "answer-v1", "%")
    settings = {
        "user": "usp-mini",
        "user_weights": f"{'a' * 64}+{'b' * 64}",
        "turns": 1,
        "bank": "b",
        "split": "test",
        "n": 4,
        "seeds": [0],
    }
    board = Leaderboard("usp-bench-1", [], settings, {"majority": ["a"]}, {}, score, score, [row], [])
    write(tmp_path / "assistants", "leaderboard.json", asdict(board))
    page = results.page(tmp_path)
    assert "## Assistants: `usp-bench-1`\n" in page
    assert "\n# usp-bench-1" not in page
    assert "Weights: `usp-mini` aaaaaaaaaaaa+bbbbbbbbbbbb, `echo` eeeeeeeeeeee." in page
    assert "| 1 | echo | 50.0 [40.0, 60.0] | 50.0 [40.0, 60.0] | 1000 | 0/4 |" in page
    assert "\n### By turn\n" in page
    assert "| *GPT-4o* | *7.86* | *6.65* | *7.19* | *7.23* |" in page


def test_nothing_to_show_is_said(tmp_path: Path) -> None:
    with pytest.raises(UspError, match="python -m benchmarks.results"):
        results.page(tmp_path)


def test_the_papers_rows_agree_with_themselves() -> None:
    """Slips in copying r-DP.P, r-DP.R and r-DPC of Table 4 or the scores of Table 7 would show; of the rest only widths."""
    for values in paper.CONVERSATION.values():
        row = dict(zip(paper.CONVERSATION_METRICS, values, strict=True))
        if row["r_dpc"] is not None:
            assert harmonic_mean([row["r_dp_p"]], [row["r_dp_r"]])[0] == pytest.approx(row["r_dpc"], abs=0.015)
    for values in paper.UTTERANCE.values():
        assert len(values) == len(paper.UTTERANCE_METRICS)
    for *parts, average in paper.ASSISTANTS.values():
        assert sum(parts) / 3 == pytest.approx(average, abs=0.006)
    assert paper.margin("style_sim") == ("PlatoLM", 1.426)


@pytest.mark.skipif(not (ROOT / "results").is_dir(), reason="no run has been kept yet")
def test_the_page_is_the_one_that_its_cards_give() -> None:
    assert (ROOT / "RESULTS.md").read_text("utf-8") == results.page(ROOT / "results")
