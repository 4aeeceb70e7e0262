"""A person in either seat: what is typed, saved and gone on with. Scripted partners, no model."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from usp_env import assistants
from usp_env.chat import _Screen
from usp_env.cli import main
from usp_env.dialogue import Dialogue, Message, View
from usp_env.env import DialogueEnv
from usp_env.errors import BackendError
from usp_env.profiles import Profile
from usp_env.transcripts import RunDirectory, Transcript, read_transcripts
from usp_env.users.human import HumanSpeaker, LeftError

pytest.importorskip("rich")


def typing(*lines: str) -> Callable[[str], str]:
    rest = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    return read


def person(role: str, *lines: str, **settings: object) -> tuple[HumanSpeaker, list[tuple[str, str]]]:
    shown: list[tuple[str, str]] = []
    return HumanSpeaker(role, typing(*lines), lambda who, text: shown.append((who, text)), **settings), shown


ASKED = View("assistant", (Message("user", "where is my bike"),))
ANSWERED = View("user", (Message("user", "hi"), Message("assistant", "Hello!")), Profile("a", "You cook.", "Terse."))


def test_what_is_typed_is_the_reply() -> None:
    speaker, shown = person("assistant", "in the shed\nbehind the house")
    assert speaker.respond([ASKED], [0])[0].text == "in the shed\nbehind the house"
    assert shown == [("user", "where is my bike")]


def test_empty_and_overlong_messages_are_not_sent() -> None:
    speaker, shown = person("assistant", "", "  \n ", "x" * 11, "/help", "ok", max_chars=10)
    assert speaker.respond([ASKED], [0])[0].text == "ok"
    notes = [text for who, text in shown if who == "note"]
    assert len(notes) == 4
    assert "11 characters" in notes[2]


def test_only_the_user_ends() -> None:
    speaker, _ = person("user", "/end")
    reply = speaker.respond([ANSWERED], [0])[0]
    assert (reply.text, reply.ended) == ("", True)
    speaker, shown = person("assistant", "/end", "fine")
    assert speaker.respond([ASKED], [0])[0].text == "fine"
    assert "Only the user" in shown[-1][1]
    speaker, shown = person("user", "/end", "hi")
    opening = View("user", (), ANSWERED.profile)
    assert speaker.respond([opening], [0])[0].text == "hi"
    assert shown[0] == ("you are", "You cook.\n\nTerse.")


@pytest.mark.parametrize("lines", [(), ("/quit",)])
def test_leaving_is_typed(lines: tuple[str, ...]) -> None:
    with pytest.raises(LeftError, match="left") as caught:
        person("assistant", *lines)[0].respond([ASKED], [0])
    assert isinstance(caught.value, BackendError)


def test_bytes_of_another_encoding_become_valid_text() -> None:
    assert person("assistant", "caf\udce9")[0].respond([ASKED], [0])[0].text == "caf\ufffd"


def test_a_person_can_be_an_environments_partner(sampler: object) -> None:
    assert isinstance(assistants.load("human"), HumanSpeaker)
    env = DialogueEnv(person("user", "hi", "/quit")[0], sampler, None, population="uniform")
    env.reset(seed=0)
    _, _, _, truncated, info = env.step("Hello!")
    assert (truncated, info["outcome"]) == (True, "infra_failure")


def test_bytes_that_are_no_text_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9 au lait\nthanks\n"), "utf-8"))
    speaker = HumanSpeaker("user")
    view = Dialogue().view_for("user", None)
    assert [speaker.respond([view], [0])[0].text for _ in range(2)] == ["caf\ufffd au lait", "thanks"]


def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, *argv: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    status = main(["chat", *argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def talkative(folder: Path) -> str:
    lines = [f"{noun}?" for noun in ("soup", "rust", "taxes", "lettuce", "chess")]
    (folder / "script.jsonl").write_text(json.dumps({"user": lines, "assistant": lines}) + "\n")
    return f"scripted:{folder / 'script.jsonl'}"


def test_chat_begins_anew_where_it_is_told_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, script = str(tmp_path / "run"), talkative(tmp_path)
    argv = ["--user", script, "--assistant", script, "--turns", "3", "--out", out]
    chat(monkeypatch, capsys, "first words\n", *argv)
    status, _, told = chat(monkeypatch, capsys, "", *argv)
    assert status == 2
    assert "--overwrite" in told
    chat(monkeypatch, capsys, "other words\n", *argv, "--overwrite")
    draft = (tmp_path / "run" / "chat.json").read_text("utf-8")
    assert "other words" in draft
    assert "first words" not in draft


@pytest.mark.parametrize("seat", ["assistant", "user"])
def test_chat_is_saved_and_gone_on_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, seat: str
) -> None:
    out, script = str(tmp_path / "run"), talkative(tmp_path)
    argv = ["--as", seat, "--user", script, "--assistant", script, "--turns", "3", "--out", out]
    status, text, _ = chat(monkeypatch, capsys, "first words\n", *argv)
    assert status == 0
    assert "--resume" in text
    assert (tmp_path / "run" / "chat.json").is_file()
    assert read_transcripts(out) == []
    status, _, error = chat(monkeypatch, capsys, "", *argv)
    assert (status, "not empty" in error) == (2, True)

    status, text, _ = chat(monkeypatch, capsys, "second words\nthird words\n", "--out", out, "--resume")
    assert status == 0
    assert "first words" in text
    assert "is over" in text
    (transcript,) = read_transcripts(out)
    own = [m["content"] for m in transcript.messages if m["role"] == seat]
    assert own == ["first words", "second words", "third words"]
    assert transcript.models[seat] == "human"
    assert transcript.end_reason == "turn_limit"
    status, _, error = chat(monkeypatch, capsys, "", "--out", out, "--resume")
    assert (status, "has ended" in error) == (2, True)


def test_what_was_said_survives_an_interrupt_while_the_partner_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from usp_env.users.scripted import ScriptedSpeaker

    out, respond = str(tmp_path / "run"), ScriptedSpeaker.respond

    def interrupted(self: ScriptedSpeaker, views: list[View], seeds: list[int]) -> object:
        if views[0].messages:
            raise KeyboardInterrupt
        return respond(self, views, seeds)

    monkeypatch.setattr(ScriptedSpeaker, "respond", interrupted)
    status, text, _ = chat(monkeypatch, capsys, "precious\n", "--user", talkative(tmp_path), "--turns", "2", "--out", out)
    assert (status, "Saved" in text) == (0, True)
    monkeypatch.setattr(ScriptedSpeaker, "respond", respond)
    status, text, _ = chat(monkeypatch, capsys, "more\n", "--out", out, "--resume")
    (transcript,) = read_transcripts(out)
    assert [m["content"] for m in transcript.messages if m["role"] == "assistant"] == ["precious", "more"]


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["--resume"], "--out DIR"),
        (["--user", "human"], "one seat"),
        (["--as", "user", "--assistant", "human"], "one seat"),
        (["--user", "scripted", "--profile", "nobody"], "unknown profile"),
    ],
)
def test_mistakes_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, argv: list[str], error: str
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = chat(monkeypatch, capsys, "", *argv)
    assert status == 2
    assert error in err


def test_a_damaged_draft_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    chat(monkeypatch, capsys, "", "--user", "scripted", "--out", str(out))
    (out / "chat.json").write_text(json.dumps({"episode": {}, "said": None}))
    status, _, err = chat(monkeypatch, capsys, "", "--out", str(out), "--resume")
    assert (status, "Traceback" in err) == (2, False)


def test_a_model_that_fails_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from usp_env.users.scripted import ScriptedSpeaker

    out, script = str(tmp_path / "run"), talkative(tmp_path)
    argv = ["--as", "assistant", "--user", script, "--turns", "3", "--out", out]
    respond, calls = ScriptedSpeaker.respond, []

    def failing(self: object, views: object, seeds: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise BackendError("the server is restarting")
        return respond(self, views, seeds)

    monkeypatch.setattr(ScriptedSpeaker, "respond", failing)
    status, text, _ = chat(monkeypatch, capsys, "first words\n", *argv)
    assert status == 1
    assert "The model failed: " in text.replace("\n", " ")
    assert "restarting" in text
    assert "--resume" in text
    status, text, _ = chat(monkeypatch, capsys, "second words\nthird words\n", "--out", out, "--resume")
    assert status == 0
    (transcript,) = read_transcripts(out)
    assert [m["content"] for m in transcript.messages if m["role"] == "assistant"] == [
        f"{n} words" for n in ("first", "second", "third")
    ]
    assert transcript.outcome == "completed"


def test_leaving_before_anything_was_said_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from usp_env.users.scripted import ScriptedSpeaker

    out, script = str(tmp_path / "run"), talkative(tmp_path)
    argv = ["--as", "assistant", "--user", script, "--turns", "2", "--out", out]

    def interrupted(self: object, views: object, seeds: object) -> object:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ScriptedSpeaker, "respond", interrupted)
        status, text, _ = chat(patch, capsys, "", *argv)
    assert (status, "Nothing was said yet" in text) == (0, True)
    status, text, _ = chat(monkeypatch, capsys, "a\nb\n", *argv)  # the directory is free again
    assert (status, "is over" in text) == (0, True)


def test_a_conversation_stopped_after_its_line_was_written_is_not_written_twice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, write = tmp_path / "run", RunDirectory.write

    def stopped(self: RunDirectory, transcript: Transcript) -> None:
        write(self, transcript)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write", stopped)
        chat(patch, capsys, "a\nb\n", "--user", talkative(tmp_path), "--turns", "2", "--out", str(out))
    assert (out / "chat.json").is_file()
    written = (out / "transcripts.jsonl").read_bytes()
    for _ in range(2):
        status, _, error = chat(monkeypatch, capsys, "b\n", "--out", str(out), "--resume")
        assert (status, "has ended" in error) == (2, True)
        assert (out / "transcripts.jsonl").read_bytes() == written
        assert not (out / "chat.json").exists()


def test_a_note_does_not_hide_what_was_seen() -> None:
    """The partner's last words are printed at the end only where they were not shown before."""
    printed: list[str] = []
    screen = _Screen(SimpleNamespace(print=lambda *text: printed.append("".join(map(str, text)))))
    screen.show("assistant", "Hello!")
    screen.show("note", "/help and the rest")
    assert screen.last == "Hello!"
