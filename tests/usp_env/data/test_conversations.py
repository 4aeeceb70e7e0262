"""Loaders on small files in the layouts that are published, and on the ShareGPT package where it has been fetched."""

from __future__ import annotations

import gzip
import json
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from usp_env.data import conversations, records
from usp_env.data.conversations import Conversation, continued, group_id, join, load
from usp_env.data.preprocessing import digest
from usp_env.data.records import ConversationFormatError
from usp_env.dialogue import Dialogue, Message
from usp_env.errors import MissingAssetError, MissingExtraError, UnknownNameError
from usp_env.models import assets
from usp_env.profiles import Profile, ProfileBank, reserved_ids

TURNS = [{"role": "user", "content": "hi\u2028there"}, {"role": "assistant", "content": "Hello!"}]
SAID = [("user", "hi\u2028there"), ("assistant", "Hello!")]
SHAREGPT = {"id": "a_0", "conversations": [{"from": "human", "value": "hi\u2028there"}, {"from": "gpt", "value": "Hello!"}]}
RESERVED = sorted(reserved_ids())[0]
needs_sharegpt = pytest.mark.skipif(not assets.available("sharegpt"), reason="needs data: usp-env fetch sharegpt")


def said(conversation: Conversation) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in conversation.dialogue]


def jsonl(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8", newline="\n")
    return path


def array(path: Path, *items: Any, end: str = "]") -> Path:
    path.write_text("[\n" + ",\n".join(json.dumps(item, indent=2) for item in items) + end, "utf-8", newline="\n")
    return path


def test_sharegpt_as_array_lines_gzip_and_with_byte_order_mark(tmp_path):
    other = {"id": "b_0", "conversations": [{"from": "system", "value": "Be brief."}, *SHAREGPT["conversations"]]}
    lines = jsonl(tmp_path / "x.jsonl", SHAREGPT, other)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.read_bytes())
    for path in (array(tmp_path / "x.json", SHAREGPT, other), lines, tmp_path / "x.jsonl.gz", tmp_path / "bom.jsonl"):
        first, second = load(path)
        assert said(first) == said(second) == SAID
        assert (first.id, first.system, first.source) == ("a_0", None, str(path))
        assert (second.id, second.system) == ("b_0", "Be brief.")


def test_lmsys_usp(tmp_path):
    system = {"role": "system", "content": "You are engaging …"}
    path = jsonl(tmp_path / "usp.jsonl", {"profile": "You cook.\n\nYou are brief.", "conversation": [system, *TURNS]})
    (c,) = load(path)
    assert c.id == "usp.jsonl:1"
    assert c.profile == Profile("usp.jsonl:1", "You cook.", "You are brief.", source=str(path))
    assert said(c) == SAID
    assert c.system == "You are engaging …"


@pytest.mark.parametrize(
    ("moderation", "toxic"), [([{"flagged": False}, {"flagged": True}], True), ([{"flagged": False}], False), (None, None)]
)
def test_lmsys_chat_1m(tmp_path, moderation, toxic):
    record = {"conversation_id": "33f", "model": "x", "conversation": TURNS, "turn": 1, "language": "English"}
    (c,) = load(jsonl(tmp_path / "x.jsonl", record | {"openai_moderation": moderation, "redacted": True}))
    assert (c.id, c.language, c.toxic, c.profile) == ("33f", "English", toxic, None)
    assert said(c) == SAID


def test_wildchat(tmp_path):
    turns = [
        turn | {"language": "English", "toxic": i == 1, "hashed_ip": "f00" if i == 0 else None} for i, turn in enumerate(TURNS)
    ]
    record = {"conversation_hash": "9e1", "model": "x", "conversation": turns, "language": "English", "toxic": False}
    whole, by_turn = load(jsonl(tmp_path / "x.jsonl", record, {k: v for k, v in record.items() if k != "toxic"}))
    assert (whole.id, whole.language, whole.user_id, whole.toxic) == ("9e1", "English", "f00", False)
    assert by_turn.toxic is True
    assert said(whole) == SAID


def test_personachat_rows_of_one_dialogue_become_one_conversation(tmp_path):
    def row(conv: int, i: int, history: list[str], reply: str) -> dict[str, Any]:
        candidates = ["a distractor", reply]
        return {"personality": ["I am a cook.", "my dog is old ."], "candidates": candidates, "history": history} | {
            "conv_id": conv,
            "utterance_idx": i,
        }

    rows = [row(0, 0, ["Hello"], "Hi!"), row(0, 1, ["Hello", "Hi!", "Any pets?"], "A dog."), row(1, 0, ["Yo"], "Hey")]
    first, second = load(jsonl(tmp_path / "x.jsonl", *rows))
    assert (first.id, second.id) == ("0", "1")
    # the persona is that of whoever replies: the user
    assert said(first) == [("assistant", "Hello"), ("user", "Hi!"), ("assistant", "Any pets?"), ("user", "A dog.")]
    assert first.profile is not None
    assert first.profile.objective == "You are a cook. Your dog is old."


def test_personachat_with_utterances(tmp_path):
    utterances = [
        {"candidates": ["x", "hi"], "history": ["__ SILENCE __"]},
        {"candidates": ["x", "i sew"], "history": ["__ SILENCE __", "hi", "and ?"]},
    ]
    (c,) = load(jsonl(tmp_path / "x.jsonl", {"personality": ["i sew"], "utterances": utterances}))
    assert said(c) == [("user", "hi"), ("assistant", "and ?"), ("user", "i sew")]


def test_openai(tmp_path):
    (c,) = load(jsonl(tmp_path / "x.jsonl", {"messages": [{"role": "system", "content": "s"}, *TURNS]}))
    assert (c.id, c.system) == ("x.jsonl:1", "s")
    assert said(c) == SAID


def test_bank_lines_and_their_split(tmp_path):
    line = {"id": "p", "split": "val", "profile": {"objective": "You cook.", "subjective": "You are brief."}, "user_id": "u"}
    path = jsonl(tmp_path / "x.jsonl", line | {"conversation": TURNS}, line | {"id": "q", "split": "test", "conversation": TURNS})
    (c,) = load(path, split="val")
    assert (c.id, c.user_id) == ("p", "u")
    assert c.profile == Profile("p", "You cook.", "You are brief.", None, "val", "u", str(path))
    assert said(c) == SAID
    with pytest.raises(ConversationFormatError, match=r"line 1, field 'split'"):
        list(load(jsonl(tmp_path / "y.jsonl", SHAREGPT), split="val"))


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist([{"messages": TURNS}]), tmp_path / "x.parquet")
    (c,) = load(tmp_path / "x.parquet")
    assert said(c) == SAID


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delenv("USP_ENV_OFFLINE", raising=False)
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(MissingExtraError, match=r"usp-env\[data\]"):
        list(load(tmp_path / "x.parquet"))
    with pytest.raises(MissingExtraError, match=r"usp-env\[data\]"):
        list(load("wildchat"))


def test_hub_rows_are_streamed(monkeypatch):
    asked: dict[str, Any] = {}

    class Hub:
        @staticmethod
        def load_dataset(name: str, **options: Any) -> Any:
            asked.update(options, name=name)
            return iter([{"profile": "You cook.\nYou are brief.", "conversation": TURNS}])

    monkeypatch.setattr(records, "require", lambda module, extra: Hub)
    monkeypatch.delenv("USP_ENV_OFFLINE", raising=False)
    (c,) = load("lmsys-usp", split="validation")
    assert asked == {"name": "wangkevin02/LMSYS-USP", "split": "validation", "streaming": True}
    assert (c.id, c.source) == ("LMSYS-USP:validation:1", "wangkevin02/LMSYS-USP")
    monkeypatch.setenv("USP_ENV_OFFLINE", "1")
    with pytest.raises(MissingAssetError, match="USP_ENV_OFFLINE"):
        list(load("lmsys-usp"))


def test_made_up_ids_of_different_splits_differ_and_given_ones_stay(monkeypatch):
    def row(split: str) -> dict[str, Any]:
        return {"profile": f"You {split}.\nYou are brief.", "conversation": [{"role": "user", "content": split}]}

    class Hub:
        @staticmethod
        def load_dataset(name: str, split: str, streaming: bool) -> Any:
            return iter([row(split), row(split) | {"id": "given"}])

    monkeypatch.setattr(records, "require", lambda module, extra: Hub)
    monkeypatch.delenv("USP_ENV_OFFLINE", raising=False)
    train, test = list(load("lmsys-usp", split="train")), list(load("lmsys-usp", split="test"))
    assert [c.id for c in (*train, *test)] == ["LMSYS-USP:train:1", "given", "LMSYS-USP:test:1", "given"]
    assert [c.id for c in load("lmsys-usp")] == [c.id for c in train]  # the default split
    bank = ProfileBank([c.profile for c in test[:1] if c.profile])
    with pytest.raises(MissingAssetError, match="1 of 1 profiles"):
        list(join(bank, train))
    assert [d[0].content for _, d in join(bank, test)] == ["test"]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_arrays_are_read_in_chunks_of_any_size(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(records, "CHUNK", chunk)
    texts = ['quote " and \\ and ]}', "", "é \U0001f600 x" * 20, "\\u00e9"]
    items = [{"id": str(i), "conversations": [{"from": "human", "value": text}]} for i, text in enumerate(texts)]
    loaded = list(load(array(tmp_path / "x.json", *items), clean=False))
    assert [c.dialogue[0].content for c in loaded] == texts


@pytest.mark.parametrize("lost", [3, 30, 60])
def test_a_cut_off_array_raises_unless_it_is_the_package_s(tmp_path, lost):
    path = array(tmp_path / "x.json", SHAREGPT, SHAREGPT | {"id": "b_0"})
    path.write_text(path.read_text("utf-8")[:-lost], "utf-8")
    stream = load(path)
    assert next(stream).id == "a_0"
    with pytest.raises(ConversationFormatError, match=r"x\.json, line 15, field '\(array\)'"):
        list(stream)
    assert [r["id"] for _, r in records.read_records(path, "x", cut_off=True)] == ["a_0"]


def test_a_broken_object_is_no_cut(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[{"id": "a", nonsense}, ' + '{"id": "b"},' * 100, "utf-8")
    with pytest.raises(ConversationFormatError, match="line 1"):
        list(records.read_records(path, "x", cut_off=True))


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ("[1]", r"\(record\)"),
        ("{", r"\(line\)"),
        ('{"text": "hi"}', r"\(keys\)"),
        ('{"conversations": "hi"}', "conversations"),
        ('{"conversations": ["hi"]}', r"conversations\[0\]"),
        ('{"conversations": [{"from": "tool", "value": "x"}]}', r"conversations\[0\]\.from"),
        ('{"conversations": [{"from": "human", "value": 3}]}', r"conversations\[0\]\.value"),
        ('{"conversations": [{"from": "human", "value": "\\ud800"}]}', r"conversations\[0\]\.value"),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}', r"messages\[1\]\.role"),
        ('{"id": "", "messages": []}', "id"),
        ('{"profile": {"objective": 1}, "conversation": []}', "profile.objective"),
        ('{"profile": " ", "conversation": []}', "profile"),
        ('{"conversation_id": "x", "conversation": [], "openai_moderation": 1}', "openai_moderation"),
        ('{"conversation_hash": "x", "conversation": [], "toxic": "no"}', "toxic"),
        ('{"personality": ["i sew"], "history": [], "candidates": ["x"]}', "history"),
    ],
)
def test_a_bad_record_names_file_line_and_field(tmp_path, record, field):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(SHAREGPT) + "\n\n" + record + "\n", "utf-8")
    with pytest.raises(ConversationFormatError, match=rf"x\.jsonl, line 3, field '{field}': expected"):
        list(load(path))


def test_files_that_are_no_utf8_or_no_whole_gzip(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"messages": "\xff"}\n')
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(json.dumps(SHAREGPT).encode())[:-9])
    for name in ("x.jsonl", "x.jsonl.gz"):
        with pytest.raises(ConversationFormatError, match=name):
            list(load(tmp_path / name))


def test_names_that_nothing_answers_to():
    with pytest.raises(UnknownNameError, match="did you mean 'sharegpt'"):
        load("sharegpt", format="sharegtp")
    with pytest.raises(MissingAssetError, match="absent.jsonl"):
        load("absent.jsonl")


def test_reserved_conversations_their_segments_and_copies_never_come_out(tmp_path):
    base = RESERVED.rpartition("_")[0]
    out = [RESERVED, f"{base}_7", f"{RESERVED}#1", conversations._COPIES[0]]
    path = jsonl(tmp_path / "x.jsonl", *(SHAREGPT | {"id": id} for id in [*out, f"{base}X_0"]))
    assert [c.id for c in load(path)] == [f"{base}X_0"]
    assert [c.id for c in load(path, ids=out)] == []
    assert [c.id for c in load(path, reserved=True)] == [*out, f"{base}X_0"]


def test_only_sharegpt_is_cleaned(tmp_path):
    dirty = "a\\_b"
    path = jsonl(
        tmp_path / "x.jsonl",
        {"conversations": [{"from": "human", "value": dirty}]},
        {"messages": [{"role": "user", "content": dirty}]},
    )
    assert [c.dialogue[0].content for c in load(path)] == ["a_b", dirty]
    assert [c.dialogue[0].content for c in load(path, clean=False)] == [dirty, dirty]


def test_join_gives_each_profile_its_first_conversation_and_stops():
    bank = ProfileBank([Profile("a", "You cook.", "You are brief."), Profile("b", "You sew.", "You ramble.")])

    def stream():
        for id, text in (("x", "0"), ("b", "1"), ("b", "2"), ("a", "3")):
            yield Conversation(id, Dialogue((Message("user", text),)))
        raise AssertionError("read on after the last profile")

    assert [(p.id, d[0].content) for p, d in join(bank, stream())] == [("b", "1"), ("a", "3")]


def test_join_names_profiles_without_a_conversation():
    bank = ProfileBank([Profile("a", "You cook.", "You are brief."), Profile("b", "You sew.", "You ramble.")])
    only_a = [Conversation("a", Dialogue((Message("user", "x"),)))]
    with pytest.raises(MissingAssetError, match=r"1 of 2 profiles have no conversation in the source \(b"):
        list(join(bank, only_a))
    with pytest.warns(UserWarning, match="1 of 2"):
        assert [p.id for p, _ in join(bank, only_a, missing="warn")] == ["a"]


def test_group_id():
    assert [group_id(id) for id in ("QWJhYvA_0", "QWJhYvA_12#3", "5a1f", "a_b")] == ["QWJhYvA", "QWJhYvA", "5a1f", "a_b"]
    # Ids of somebody's own are not ShareGPT's: they are as many people.
    assert [group_id(id) for id in ("chat_12", "session_12", "chat_12#3")] == ["chat_12", "session_12", "chat_12"]


def test_which_conversations_go_on_in_a_later_segment(tmp_path):
    ids = ["QWJhYvA_9", "QWJhYvA_0", "QWJhYvA_10", "QWJhYvA_0#1", "chat_1", "chat_2", "x", "x#1", "x#2"]
    file = tmp_path / "talks.jsonl"
    file.write_text("".join(json.dumps({"id": id, "messages": []}) + "\n" for id in ids), "utf-8")
    assert continued(file) == {"QWJhYvA_9", "QWJhYvA_0", "QWJhYvA_0#1", "x", "x#1"}


def test_reading_an_array_takes_constant_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "CHUNK", 1 << 12)

    def peak(n: int) -> int:
        path = tmp_path / f"{n}.json"
        path.write_text("[" + ",".join([json.dumps(SHAREGPT)] * n) + "]", "utf-8")
        tracemalloc.start()
        try:
            assert sum(1 for _ in load(path)) == n
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)  # imports and caches
    assert peak(20_000) < 1.5 * peak(200)


@needs_sharegpt
def test_the_package_s_conversations():
    bank = ProfileBank.load("sharegpt")
    start = time.perf_counter()
    pairs = list(join(bank, load("sharegpt", ids={profile.id for profile in bank})))
    assert time.perf_counter() - start < 10
    assert len(pairs) == len(bank) == 1791
    assert all(dialogue[0].role == "user" and dialogue.turns >= 3 for _, dialogue in pairs)
    silver = ProfileBank.load("sharegpt-silver")
    assert len(list(join(silver, load("sharegpt-silver", ids={profile.id for profile in silver})))) == len(silver)


@needs_sharegpt
def test_the_package_holds_17671_and_none_that_comes_out_is_a_reserved_one_s_text():
    everything = list(load("sharegpt", reserved=True))
    assert len(everything) == 17671
    held = {digest(c.dialogue) for c in everything if c.id in reserved_ids()}
    assert len(held) == len(reserved_ids()) == 180
    assert not any(digest(c.dialogue) in held or c.id in reserved_ids() for c in load("sharegpt"))


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TURNS},
        SHAREGPT,
        {"conversation_id": "c", "conversation": TURNS},
        {"conversation_hash": "c", "conversation": TURNS},
        {"profile": "You cook.\n\nYou are brief.", "conversation": TURNS},
        {"profile": {"objective": "You cook.", "subjective": "You are brief."}, "conversation": TURNS},
    ],
)
def test_every_layout_keeps_whose_conversation_it_is(tmp_path, record):
    path = jsonl(tmp_path / "x.jsonl", *({**record, "user_id": value} for value in ("ann", 7, None, "")))
    assert [c.user_id for c in load(path)] == ["ann", "7", None, None]
    with pytest.raises(ConversationFormatError, match="field 'user_id': expected a string"):
        list(load(jsonl(path, {**record, "user_id": ["ann"]})))


@pytest.mark.parametrize(
    "record",
    [
        {"id": "\ud800", "messages": TURNS},
        {"conversation_hash": "c", "conversation": [{**TURNS[0], "hashed_ip": "\ud800"}]},
        {"id": "a", "user_id": "\ud800", "messages": TURNS},
    ],
)
def test_names_that_no_file_can_hold(tmp_path, record):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(record), "utf-8")
    with pytest.raises(ConversationFormatError, match="expected valid Unicode"):
        list(load(path))


def test_damaged_archives(tmp_path):
    pytest.importorskip("pyarrow")
    for content in (b"", b"PAR1 no table PAR1"):
        (tmp_path / "x.parquet").write_bytes(content)
        with pytest.raises(ConversationFormatError, match="expected a whole parquet file"):
            list(load(tmp_path / "x.parquet"))
    whole = gzip.compress(b"".join(json.dumps({"id": f"{i}", "messages": TURNS}).encode() + b"\n" for i in range(200)))
    (tmp_path / "x.jsonl.gz").write_bytes(whole[:10] + b"\xff" * 20 + whole[30:])  # no block of deflate begins so
    with pytest.raises(ConversationFormatError, match="expected a whole gzip file"):
        list(load(tmp_path / "x.jsonl.gz"))
