"""The report page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_facts import transcript

from usp_env.errors import MissingExtraError, RunDirectoryError, TranscriptError
from usp_env.report import html

pytest.importorskip("jinja2")

RUN = {
    "command": ["usp-env", "play", "--out", "a b"],
    "config": {"seed": 3, "reward": None, "bank": "six"},
    "versions": {"numpy": "2.0"},
}
EVIL = "<script>alert(1)</script></details><img src=x onerror=alert(2)>\x1b[31m {{ 7 * 7 }} \u202e"


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def scriptless(text: str) -> Page:
    """The parsed page, which runs nothing, loads nothing and holds no control character."""
    found = Page(text)
    assert text.encode()
    assert {tag for tag, _ in found.tags} & {"script", "img", "link", "iframe", "object", "embed", "base"} == set()
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert not re.search(r"""(src|href|action)\s*=\s*["']?\s*(https?:)?//|url\(|@import""", text)
    return found


def page(*transcripts: dict[str, object], run: dict[str, object] = RUN) -> Page:
    return Page(html.render_report(run, transcripts))


def test_every_field_of_a_hostile_transcript_is_escaped() -> None:
    message = {"role": "user", "content": EVIL, "raw": EVIL + "raw", "finish_reason": EVIL, "usage": {}}
    texts = {key: EVIL for key in ("episode_id", "profile_id", "population", "end_reason", "outcome", "rejected", "error")}
    hostile = transcript(
        **texts,
        profile={"objective": EVIL, "subjective": EVIL},
        messages=[message],
        reward_terms={EVIL: 1.0},
        models={"user": EVIL, "assistant": EVIL},
        usage={EVIL: {EVIL: 1}},
        versions={EVIL: EVIL},
    )
    found = page(hostile, run={"name": EVIL, "config": {EVIL: EVIL}, "command": [EVIL], EVIL: EVIL})
    plain = page(transcript(rejected="x", error="x", messages=[message | {"content": "x", "raw": "y", "finish_reason": "z"}]))
    assert len(found.of("script")) == 1
    assert found.of("img") == []
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert len(found.of("details")) == len(plain.of("details"))
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", html.render_report(RUN, [hostile]))
    assert found.text.count("<script>alert(1)</script></details><img src=x onerror=alert(2)>␛[31m {{ 7 * 7 }} \\u202e") >= 15


def test_nothing_comes_from_elsewhere() -> None:
    linked = transcript(messages=[{"role": "user", "content": "https://example.com/x.png"}])
    text = html.render_report(RUN, [linked])
    assert not re.search(r"""(src|href|action)\s*=\s*["']?\s*(https?:)?//""", text)
    assert not re.search(r"url\(|@import", text)
    found = Page(text)
    assert {tag for tag, _ in found.tags} & {"link", "iframe", "object", "embed", "base"} == set()
    policy = next(meta["content"] for meta in found.of("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert html._csp(re.search(r"<script>(.*)</script>", text, re.DOTALL)[1]) in policy


def test_every_episode_is_there_with_what_was_said() -> None:
    many = [transcript(episode_id=f"id {i}", messages=[{"role": "user", "content": f"says {i}\nline <two>"}]) for i in range(30)]
    found = page(*many)
    episodes = [d for d in found.of("details") if d.get("class") == "episode"]
    assert [d["id"] for d in episodes] == [f"e-id {i}" for i in range(30)]
    assert all(f"says {i}\nline <two>" in found.text for i in range(30))
    assert {a["href"] for a in found.of("a")} == {f"#e-id%20{i}" for i in range(30)}
    assert not any("hidden" in d for d in episodes)  # readable without JavaScript


def test_the_summary_by_hand() -> None:
    good = [transcript(rewards=[1.0]), transcript(rewards=[0.0, 0.5], population="virtual")]  # returns 1 and .5
    bad = transcript(rewards=[0.0], valid=False, outcome="infra_failure", end_reason="infra", error="server gone")
    text = " ".join(page(*good, bad).text.split())
    assert "Episodes3 Valid67 % (2 of 3) Mean turns2.0 Mean return+0.750 ± 0.354 sd" in text  # sqrt(.125) = .3536
    assert "density212.0+1.0001 completed 1, infra_failure 1turn_limit 1, infra 1" in text
    assert "virtual112.0+0.5001 completed 1turn_limit 1 all322.0+0.750 ± 0.3542 " in text
    assert "invalid: infra_failure" in text
    assert "Error: server gone" in text
    assert "commandusp-env play --out 'a b' seed3 rewardnone banksix versionsnumpy 2.0" in text
    assert "usp:m talks with m?system=Be kind., seed 3" in text


def test_long_messages_fold_without_loss() -> None:
    words = " ".join(f"word{i}" for i in range(2000))
    found = page(transcript(messages=[{"role": "user", "content": words}]))
    head, _, rest = found.text.partition("Show the other ")
    assert head.endswith(" word162")  # with its space a word has 6, 7, 8 characters: 10·6 + 90·7 + 63·8 = 1,194
    assert words.endswith(rest.split(" characters")[1].split("\n")[0])
    unbroken = page(transcript(messages=[{"role": "user", "content": "a" * 5000}])).text
    assert unbroken.count("a" * 1200) == 1 + 3  # the head, and 3,800 letters


def test_an_empty_run(tmp_path: Path) -> None:
    (tmp_path / "transcripts.jsonl").write_text("", "utf-8")
    text = html.write_report(tmp_path).read_text("utf-8")
    assert "No finished episode yet." in text
    assert "nan" not in Page(text).text
    assert page(transcript(messages=[], rewards=[], utterance_rewards=[], reward_terms={})).text.count("(nothing was said)") == 1


def test_same_input_same_bytes_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    line = json.dumps(
        transcript(messages=[{"role": "user", "content": "a\u2028b \U0001f642"}], rejected="\ud800", episode_id="\ud800")
    )
    (tmp_path / "transcripts.jsonl").write_text(line + "\n" + line[:50], "utf-8")
    (tmp_path / "run.json").write_text(json.dumps(RUN), "utf-8")
    first = html.write_report(tmp_path).read_bytes()
    second = html.write_report(tmp_path, tmp_path / "again.html").read_bytes()
    assert first == second
    assert first.count(b'class="episode"') == 1
    assert f"<title>{tmp_path.name} ".encode() in first


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TranscriptError, match="neither"):
        html.write_report(tmp_path / "nowhere")
    (tmp_path / "transcripts.jsonl").write_text("", "utf-8")
    (tmp_path / "taken.html").write_text("mine", "utf-8")
    with pytest.raises(RunDirectoryError, match="exists"):
        html.write_report(tmp_path, tmp_path / "taken.html")
    for wrong in ("[1]", "{"):
        (tmp_path / "run.json").write_text(wrong, "utf-8")
        with pytest.raises(TranscriptError, match="one JSON object"):
            html.write_report(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"usp-env\[report\]"):
        html.render_report({}, [])


def test_charts_share_a_scale() -> None:
    # from -1 to 3, 28 px: 7 px a unit, zero at 21
    limits = html._limits([transcript(rewards=[3.0, -1.0]), transcript(rewards=[1.0, 0.0, float("nan")])])
    assert limits == (-1.0, 3.0)
    assert html.chart([1.0, 0.0, -1.0], limits) == {
        "width": 24,
        "height": 28,
        "zero": 21.0,
        "up": "M0 21v-7h7v7zM8 21v-1h7v1z",
        "down": "M16 21v7h7v-7z",
    }
    assert html._limits([transcript(rewards=[0.0])]) == (0.0, 1.0)
    assert html.chart([float("nan")], (0.0, 1.0))["up"] == "M0 28v-1h7v1z"
