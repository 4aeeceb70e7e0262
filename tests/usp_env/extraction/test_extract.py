"""The extractor end to end against a local server: good answers, broken ones, a killed process, a bank that plays."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openai")
pytest.importorskip("tenacity")

from extractor_server import breaks, call_of, conversation, extractor, good, says, talk  # noqa: E402
from faulty_server import Action, Seen, serve, status  # noqa: E402

from usp_env.backends.base import Generation, Sampling  # noqa: E402
from usp_env.backends.openai import OpenAIBackend  # noqa: E402
from usp_env.backends.scripted import ScriptedBackend  # noqa: E402
from usp_env.cli import main  # noqa: E402
from usp_env.data.conversations import Conversation  # noqa: E402
from usp_env.dialogue import Dialogue  # noqa: E402
from usp_env.errors import BackendError, ProfileFormatError, RunDirectoryError, SpecError  # noqa: E402
from usp_env.extraction import schema  # noqa: E402
from usp_env.extraction.distilled import Distilled  # noqa: E402
from usp_env.extraction.extractor import Extractor  # noqa: E402
from usp_env.extraction.generator import ProfileGenerator  # noqa: E402
from usp_env.extraction.run import extract_bank, parse_shares, split_of  # noqa: E402
from usp_env.models import assets  # noqa: E402
from usp_env.profiles import Profile, ProfileBank, combine, reserved_ids  # noqa: E402


def reader(url: str, **options: Any) -> Extractor:
    return Extractor(OpenAIBackend("m", [url], backoff=0.01, max_attempts=2, timeout=5.0), **options)


def lines(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").split("\n") if line]


def ids(path: Path | str) -> list[str]:
    return [record["id"] for record in lines(path)]


def test_four_calls_make_a_profile_and_the_bank_reads_it(tmp_path: Path) -> None:
    out, batches = tmp_path / "bank.jsonl", []
    with serve(extractor()) as (server, url):
        tally = extract_bank(
            (conversation(i, user_id=f"u{i // 2}") for i in range(5)),
            out,
            reader(url, watch=lambda seconds, made: batches.append(len(made))),
            batch=2,
        )
    assert (tally.seen, tally.kept, tally.retried, tally.dropped.total(), tally.failed) == (5, 5, 0, 0, 0)
    assert batches == [6, 2, 6, 2, 3, 1]
    assert Counter(call_of(seen.body) for seen in server.seen) == dict.fromkeys(("facts", "scenarios", "traits", "polish"), 5)
    record = lines(out)[3]
    assert record["id"] == "c3"
    assert record["user_id"] == "u1"
    assert record["split"] == split_of("u1")
    assert record["objective_facts"]["occupation"] == ["Likely a trader of chess-3"]
    assert record["objective_facts"]["age"] == []
    assert record["subjective_characteristics"]["big_five"]["neuroticism"] == "low"
    assert record["conversation"] == talk(3)
    bank = ProfileBank.load(out)
    assert bank[3].task_details == ("Ask how to sell chess-3",)
    assert str(bank[3]) == f"{record['profile']['objective']}\n\n{record['profile']['subjective']}"
    assert lines(f"{out}.dropped.jsonl") == []


def test_structured_outputs_are_asked_for_and_the_assistant_is_context_only(tmp_path: Path) -> None:
    for structured in (True, False):
        with serve(extractor()) as (server, url):
            extract_bank([conversation(1)], tmp_path / f"{structured}.jsonl", reader(url, structured=structured))
        bodies = {call_of(seen.body): seen.body for seen in server.seen}
        shapes = {name: body.get("response_format") for name, body in bodies.items()}
        if structured:
            assert shapes["facts"]["type"] == "json_schema"  # type: ignore[index]
            assert shapes["facts"]["json_schema"]["schema"] == schema.FACTS_SCHEMA  # type: ignore[index]
            assert shapes["polish"]["json_schema"]["schema"] == schema.PROFILE_SCHEMA  # type: ignore[index]
            assert shapes["traits"]["json_schema"]["strict"] is True  # type: ignore[index]
        else:
            assert set(shapes.values()) == {None}
        assert "admiral" in json.dumps(bodies["facts"])
        assert "admiral" not in json.dumps(bodies["traits"])


def test_attributes_are_shuffled_by_conversation_and_seed(tmp_path: Path) -> None:
    def orders(seed: int) -> dict[str, list[str]]:
        out = tmp_path / f"{seed}.jsonl"
        with serve(extractor()) as (server, url):
            extract_bank((conversation(i) for i in range(8)), out, reader(url, seed=seed), overwrite=True)
        texts = [seen.body["messages"][1]["content"] for seen in server.seen if call_of(seen.body) == "polish"]
        listed = [text.split("order:\n")[1].split("\n") for text in texts]
        assert all(len(rows) == 4 and all(row.startswith("- ") for row in rows) for rows in listed)
        assert not any("inconclusive" in text.lower() or "Not mentioned" in text for text in texts)
        return {next(r for r in rows if "goal" in r): [row[2:6] for row in rows] for rows in listed}

    first, again, other = orders(0), orders(0), orders(1)
    assert first == again != other
    assert len({tuple(order) for order in first.values()}) > 1


def test_a_third_of_the_answers_is_broken_and_everything_adds_up(tmp_path: Path) -> None:
    out, n = tmp_path / "bank.jsonl", 60
    with serve(extractor(1 / 3)) as (server, url):
        tally = extract_bank((conversation(i) for i in range(n)), out, reader(url, retries=1), batch=7)
    kept, dropped = ids(out), lines(f"{out}.dropped.jsonl")
    assert sorted([*kept, *(d["id"] for d in dropped)]) == sorted(f"c{i}" for i in range(n))
    assert (tally.kept, tally.dropped.total(), tally.failed) == (len(kept), len(dropped), 0)
    # A call is lost with p = 1/9; of three calls and a fourth, a conversation is kept with (8/9)^4 = .62: 37 ± 4 of 60.
    assert 25 <= tally.kept <= 49
    bad = [text for seen in server.seen if breaks(seen, 1 / 3) is not None for text in [seen.body["messages"][1]["content"]]]
    last = [text for text in bad if "An earlier answer" in text]
    assert len(bad) - len(last) == tally.retried
    assert {f"c{re.findall(r'[a-z]+-([0-9]+)', text)[0]}" for text in last} == {d["id"] for d in dropped}
    assert len({(d["reason"].split(":")[0]) for d in dropped}) >= 3
    seeds = [(seen.body["seed"], json.dumps(seen.body["messages"])) for seen in server.seen]
    assert len({seed for seed, _ in seeds}) == len(seeds)
    assert sum("An earlier answer could not be used" in text for _, text in seeds) == tally.retried
    assert all(schema.parse_paragraphs(str(profile)) for profile in ProfileBank.load(out))


def test_retries_run_out_into_a_recorded_drop_that_is_not_tried_again_unasked(tmp_path: Path) -> None:
    out = tmp_path / "bank.jsonl"
    well = False

    def respond(seen: Seen) -> Action:
        if call_of(seen.body) == "traits" and "kites-8" in seen.body["messages"][1]["content"] and not well:
            return says("```json\n{}\n```")
        return says(good(seen.body))

    talks = [conversation(7), conversation(8)]
    with serve(respond) as (server, url):
        first = extract_bank(talks, out, reader(url))
        assert [len(server.seen), first.kept, first.retried, first.dropped.total()] == [9, 1, 2, 1]
        assert lines(f"{out}.dropped.jsonl") == [{"id": "c8", "reason": "traits: expected bare JSON, without a code fence"}]
        well = True
        second = extract_bank(talks, out, reader(url), resume=True)
        assert [len(server.seen), second.done, second.kept] == [9, 2, 0]
        third = extract_bank(talks, out, reader(url), resume=True, retry_dropped=True)
        assert [len(server.seen), third.done, third.kept] == [13, 1, 1]
    assert ids(out) == ["c7", "c8"]
    assert lines(f"{out}.dropped.jsonl") == []


def test_a_reply_that_is_cut_off_is_asked_for_again(tmp_path: Path) -> None:
    def respond(seen: Seen) -> Action:
        again = "An earlier answer" in seen.body["messages"][1]["content"]
        return says(good(seen.body), finish_reason="stop" if again else "length")

    with serve(respond) as (_, url):
        tally = extract_bank([conversation(1)], tmp_path / "b.jsonl", reader(url))
    assert (tally.kept, tally.retried) == (1, 4)


def test_a_conversation_that_does_not_fit_is_dropped_at_once(tmp_path: Path) -> None:
    def respond(seen: Seen) -> Action:
        if "maps-5" in json.dumps(seen.body):
            return status(400, "too long", code="context_length_exceeded")
        return says(good(seen.body))

    with serve(respond) as (server, url):
        tally = extract_bank([conversation(4), conversation(5)], tmp_path / "b.jsonl", reader(url))
    assert (tally.kept, tally.dropped.total(), len(server.seen)) == (1, 1, 7)


def test_failed_calls_drop_nothing_and_a_dead_server_ends_the_run(tmp_path: Path) -> None:
    out = tmp_path / "bank.jsonl"
    sick = {"bread-0"}

    def respond(seen: Seen) -> Action:
        ill = "all" in sick or any(thing in json.dumps(seen.body) for thing in sick)
        return status(500) if ill else says(good(seen.body))

    talks = [conversation(i) for i in range(4)]
    with serve(respond) as (_, url):
        tally = extract_bank(talks[:2], out, reader(url), batch=2)
        assert (tally.kept, tally.failed, tally.dropped.total()) == (1, 1, 0)
        sick.add("all")
        with pytest.raises(BackendError, match=r"every conversation of a batch of 2 failed.*HTTP 500.*--resume"):
            extract_bank(talks, out, reader(url), batch=2, resume=True)
        sick.clear()
        tally = extract_bank(talks, out, reader(url), batch=2, resume=True)
    assert (tally.done, tally.kept, tally.failed) == (1, 3, 0)
    assert sorted(ids(out)) == ["c0", "c1", "c2", "c3"]
    assert lines(f"{out}.dropped.jsonl") == []


def test_reserved_conversations_and_repeated_ids_are_never_extracted(tmp_path: Path) -> None:
    secret = Conversation(sorted(reserved_ids())[0], Dialogue.of(talk(3)))
    with serve(extractor()) as (server, url):
        tally = extract_bank([secret, conversation(1), conversation(1)], tmp_path / "b.jsonl", reader(url))
    assert (tally.seen, tally.reserved, tally.repeated, tally.kept) == (3, 1, 1, 1)
    assert not any("chess-3" in json.dumps(seen.body) for seen in server.seen)
    assert ids(tmp_path / "b.jsonl") == ["c1"]


@pytest.mark.parametrize("pii", ["drop", "mask", "keep"])
def test_private_data(tmp_path: Path, pii: Any) -> None:
    leaky = Conversation("x", Dialogue.of([{"role": "user", "content": "i sell ink-1, mail me at ann@example.org"}]))
    mute = Conversation("y", Dialogue.of([{"role": "assistant", "content": "hello?"}]))
    out = tmp_path / "b.jsonl"
    with serve(extractor()) as (server, url):
        tally = extract_bank([leaky, mute], out, reader(url), pii=pii)
    sent = json.dumps([seen.body for seen in server.seen])
    assert ("ann@example.org" in sent) == (pii == "keep")
    dropped = {record["id"]: record["reason"] for record in lines(f"{out}.dropped.jsonl")}
    assert dropped.pop("y") == "no user turn"
    assert dropped == ({"x": "private data: e-mail"} if pii == "drop" else {})
    assert tally.kept == (pii != "drop")
    if pii == "mask":
        assert lines(out)[0]["conversation"][0]["content"] == "i sell ink-1, mail me at [E-MAIL]"


def test_splits_are_shares_of_people() -> None:
    drawn = Counter(split_of(f"user {i}", (0.8, 0.1, 0.1)) for i in range(10_000))
    # Standard deviations of the counts: 40, 30, 30.
    assert abs(drawn["train"] - 8000) < 160
    assert abs(drawn["val"] - 1000) < 120
    assert parse_shares("0.8,0.1,0.1") == (0.8, 0.1, 0.1)
    for wrong in ("0.8,0.1", "a,b,c", "0.9,0.2,0.1", "1.5,-0.5,0", "nan,0,1"):
        with pytest.raises(SpecError, match="splits"):
            parse_shares(wrong)


def test_segments_of_one_conversation_share_a_split(tmp_path: Path) -> None:
    # `own_1`, … are as many people; each ShareGPT conversation is one, whichever of its segments is read.
    groups = [f"Abc{k:04}" for k in range(12)]
    names = [f"{group}{segment}" for group in groups for segment in ("_0", "_9", "_9#1")] + [f"own_{k}" for k in range(36)]
    talks = [Conversation(name, Dialogue.of(talk(1))) for name in names]
    source = Distilled(ProfileGenerator(ScriptedBackend(["You trade.\n\nYou are brief."] * len(talks))), "tiny-1")
    extract_bank(talks, tmp_path / "b.jsonl", source, splits=(0.4, 0.3, 0.3))
    split = {record["id"]: record["split"] for record in lines(tmp_path / "b.jsonl")}
    for group in groups:
        assert {split[name] for name in names if name.startswith(group)} == {split_of(group, (0.4, 0.3, 0.3))}
    assert {split[f"own_{k}"] for k in range(36)} == {split[f"{group}_0"] for group in groups} == {"train", "val", "test"}


def test_a_bank_that_is_there_is_not_touched_unasked(tmp_path: Path) -> None:
    out = tmp_path / "bank.jsonl"
    with serve(extractor()) as (_, url):
        extract_bank([conversation(1)], out, reader(url))
        with pytest.raises(RunDirectoryError, match="--resume"):
            extract_bank([conversation(2)], out, reader(url))
        with pytest.raises(RunDirectoryError, match="seed: 0 → 1"):
            extract_bank([conversation(2)], out, reader(url, seed=1), resume=True)
        extract_bank([conversation(2)], out, reader(url, seed=1), overwrite=True)
        assert ids(out) == ["c2"]
        foreign = tmp_path / "foreign.jsonl"
        foreign.write_text('{"id": "z"}\n', "utf-8")
        with pytest.raises(RunDirectoryError, match=r"run\.json is missing"):
            extract_bank([conversation(2)], foreign, reader(url), resume=True)


def test_a_torn_last_line_is_done_again_and_a_torn_middle_is_an_error(tmp_path: Path) -> None:
    out, talks = tmp_path / "bank.jsonl", [conversation(i) for i in range(3)]
    with serve(extractor()) as (server, url):
        extract_bank(talks, out, reader(url))
        whole = out.read_bytes()
        out.write_bytes(whole[:-40])
        tally = extract_bank(talks, out, reader(url), resume=True)
        assert (tally.done, tally.kept) == (2, 1)
        assert out.read_bytes() == whole
        first, rest = whole.split(b"\n", 1)
        out.write_bytes(first[:-40] + b"\n" + rest)
        with pytest.raises(ProfileFormatError, match=r"bank\.jsonl, line 1"):
            extract_bank(talks, out, reader(url), resume=True)


def test_memory_holds_one_batch(tmp_path: Path) -> None:
    ahead = 0

    def stream() -> Iterator[Conversation]:
        nonlocal ahead
        for i in range(40):
            ahead += 1
            yield conversation(i)

    most = []
    with serve(extractor()) as (server, url):
        extract_bank(stream(), tmp_path / "b.jsonl", reader(url), batch=4, limit=20, report=lambda t: most.append(ahead - t.kept))
    assert ahead == 20
    assert max(most) == 0
    assert server.most_concurrent <= 12


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "talks.jsonl"
    rows = [{"id": f"c{i}", "messages": talk(i)} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_a_killed_command_resumes_without_repeating_or_losing(source: Path) -> None:
    out = source.with_name("bank.jsonl")
    with serve(extractor(0.15, delay=0.05)) as (server, url):
        command = [sys.executable, "-m", "usp_env.cli", "profiles", "extract", str(source), "--model", f"openai:m@{url}"]
        command += ["--out", str(out), "--batch", "3"]
        kills = 0
        for target in (3, 14, 1000):
            process = subprocess.Popen([*command, *(["--resume"] if kills else [])], stdout=subprocess.PIPE, text=True)
            while process.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") >= target):
                time.sleep(0.005)
            kills += process.poll() is None
            process.send_signal(signal.SIGKILL)
            said = process.communicate()[0]
    assert kills == 2
    assert process.returncode == 0, said
    kept, dropped = ids(out), ids(f"{out}.dropped.jsonl")
    assert sorted([*kept, *dropped]) == sorted(f"c{i}" for i in range(40))
    assert "40 conversations" in said
    assert "done before" in said


def test_the_command_shows_tokens_and_cost(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = source.with_name("bank.jsonl")
    with serve(extractor()) as (_, url):
        spec = f"openai:m@{url}?price_in=100&price_out=1000"
        status = main(["profiles", "extract", str(source), "--model", spec, "--out", str(out), "--limit", "2"])
    said = capsys.readouterr().out
    assert status == 0
    # 2 conversations x 4 calls x (11 tokens at $100 and 7 at $1,000 a million) = 8 x (0.0011 + 0.007) = $0.0648
    assert "2 kept, 0 dropped, 0 failed" in said
    assert "8 replies, 88 tokens read" in said
    assert "56 written" in said
    assert "$0.0648" in said
    assert main(["profiles", "extract", str(source), "--model", spec, "--out", str(out)]) == 2


@pytest.mark.parametrize("n", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_a_bank_of_own_conversations_goes_from_extraction_to_play(tmp_path: Path, n: int) -> None:
    pytest.importorskip("umap" if n > 29 else "sklearn")
    from usp_env import DialogueEnv, users
    from usp_env.sampling import DensitySampler

    out = tmp_path / "own.jsonl"
    with serve(extractor()) as (_, url):
        assert extract_bank((conversation(i) for i in range(n)), out, reader(url)).kept == n

    def embed(texts: list[str]) -> np.ndarray:
        return np.stack([np.random.default_rng(list(text.encode())).normal(size=8) for text in texts])

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "12 profiles are too few for UMAP" if n == 12 else "n_jobs")
        sampler = DensitySampler(embed).fit(ProfileBank.load(out))
    assert sampler.layout_ == ("pca" if n == 12 else "umap")
    env = DialogueEnv(users.load("scripted"), sampler, max_turns=3)
    met = set()
    for seed in range(6):
        observation, _ = env.reset(seed=seed)
        assert env.episode is not None
        met.add(env.episode.profile.id)
        over = False
        while not over:
            observation, _, terminated, truncated, _ = env.step("Let us see what you can sell.")
            over = terminated or truncated
        assert len(observation) >= 2
    assert len(met) > 1
    assert met <= set(ids(out))


def test_a_profile_generator_writes_silver(tmp_path: Path) -> None:
    backend = ScriptedBackend(["You trade.\n\nYou are brief.", "one paragraph", "You mend bikes.\n\nYou ramble.", "one again"])
    seen: list[int] = []
    source = Distilled(ProfileGenerator(backend), "tiny-1", lambda seconds, made: seen.append(len(made)))
    out = tmp_path / "silver.jsonl"
    tally = extract_bank((conversation(i) for i in range(3)), out, source, splits=(1, 0, 0), text=False)
    assert (tally.kept, dict(tally.dropped), seen) == (2, {"the generator wrote no two paragraphs within 320 tokens": 1}, [4])
    record = lines(out)[1]
    assert (record["id"], record["split"], record["silver"]) == ("c2", "train", "tiny-1")
    assert record["profile"] == {"objective": "You mend bikes.", "subjective": "You ramble."}
    assert not {"objective_facts", "conversation"} & set(record)
    trader, mender = ProfileBank.load(out)
    assert (trader.objective, trader.silver) == ("You trade.", "tiny-1")
    assert combine(mender, Profile("a", "You sew.", "You ramble.")).silver == "tiny-1"
    again = extract_bank((conversation(i) for i in range(3)), out, source, splits=(1, 0, 0), text=False, resume=True)
    assert (again.kept, again.done) == (0, 3)


def test_silver_names_the_weights_that_wrote_it_and_not_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("usp_env.extraction.distilled.load_generator", lambda spec: ProfileGenerator(ScriptedBackend([])))
    version = assets.ASSETS["profile-generator"].version
    for spec, name in (
        ("profile-generator", f"profile-generator-{version}"),
        ("vllm:profile-generator?max_model_len=1024", f"profile-generator-{version}"),
        ("openai:gen@http://localhost/v1?price_in=1", "gen"),
        ("owner/gen?revision=v1&adapter=runs/a&max_tokens=9", "owner/gen?adapter=runs/a&revision=v1"),
    ):
        assert Distilled.from_spec(spec).name == name


def test_a_silver_profile_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    cut = Generation("You trade.\n\nYou are br", finish_reason="length")
    source = Distilled(ProfileGenerator(ScriptedBackend([cut, cut]), Sampling(max_tokens=9)), "tiny-1")
    out = tmp_path / "silver.jsonl"
    tally = extract_bank([conversation(0)], out, source)
    assert (tally.kept, dict(tally.dropped)) == (0, {"the generator wrote no two paragraphs within 9 tokens": 1})
    assert lines(out) == []


def test_a_failed_call_of_a_profile_generator_is_done_another_time(tmp_path: Path) -> None:
    source = Distilled(ProfileGenerator(ScriptedBackend([BackendError("gone")])), "tiny-1")
    with pytest.raises(BackendError, match="gone"):
        extract_bank([conversation(0)], tmp_path / "b.jsonl", source)
    assert lines(tmp_path / "b.jsonl.dropped.jsonl") == []


def test_only_the_conversations_of_an_ids_file(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen, out = source.parent / "ids.json", source.parent / "one.jsonl"
    chosen.write_text('["c1"]')
    with serve(extractor()) as (_, url):
        command = ["profiles", "extract", str(source), "--ids", str(chosen), "--out", str(out), "--model", f"openai:m@{url}"]
        assert main(command) == 0
        assert ids(out) == ["c1"]
        for wrong in ('{"c1": 1}', "c1"):
            chosen.write_text(wrong)
            assert main(command) == 2
            assert "JSON list of ids" in capsys.readouterr().err


def test_what_is_read_is_never_written_over(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, alias = source.read_bytes(), source.with_name("alias.jsonl")
    alias.symlink_to(source)
    losses = source.with_name("bank.jsonl.dropped.jsonl")
    losses.write_bytes(whole)
    model = ["--model", "openai:m@http://127.0.0.1:9/v1", "--overwrite"]
    for read, out in ((source, source), (source, alias), (losses, source.with_name("bank.jsonl"))):
        assert main(["profiles", "extract", str(read), "--out", str(out), *model]) == 2
        assert "would be written over" in capsys.readouterr().err
    chosen = source.with_name("ids.json")
    chosen.write_text("[]")
    assert main(["profiles", "extract", str(source), "--ids", str(chosen), "--out", str(chosen), *model]) == 2
    assert source.read_bytes() == losses.read_bytes() == whole


def test_conversations_that_share_an_id_are_counted_apart_from_those_done_before(tmp_path: Path) -> None:
    out = tmp_path / "b.jsonl"
    talks = [Conversation("me", Dialogue.of(talk(i))) for i in range(3)]
    with serve(extractor()) as (_, url):
        first = extract_bank(talks, out, reader(url))
        again = extract_bank(talks, out, reader(url), resume=True)
    assert (first.kept, first.repeated, first.done) == (1, 2, 0)
    assert "2 left out since an earlier one has their id" in str(first)
    assert (again.kept, again.repeated, again.done) == (0, 2, 1)


def test_losses_outlive_a_damaged_bank(tmp_path: Path) -> None:
    out = tmp_path / "b.jsonl"
    losses = Path(f"{out}.dropped.jsonl")
    with serve(extractor()) as (_, url):
        extract_bank([conversation(1)], out, reader(url))
        losses.write_text('{"id": "c9", "reason": "traits"}\n')
        for damage in (b"{broken\n", b"[" * 100_000 + b"\n"):
            out.write_bytes(damage)
            with pytest.raises(ProfileFormatError, match="line 1"):
                extract_bank([conversation(1)], out, reader(url), resume=True, retry_dropped=True)
    assert ids(losses) == ["c9"]


def test_a_generators_broken_unicode_is_no_profile(tmp_path: Path) -> None:
    broken = "You trade \ud83d.\n\nYou are brief."
    source = Distilled(ProfileGenerator(ScriptedBackend([broken, "You sew.\n\nYou ramble.", broken])), "tiny-1")
    out = tmp_path / "silver.jsonl"
    tally = extract_bank([conversation(0), conversation(1)], out, source)
    assert (tally.kept, tally.dropped.total(), ids(out)) == (1, 1, ["c1"])
