"""Every step on hand-made conversations, segmentation by hand, artefacts as they look in the real export."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import pytest

from usp_env.data import cleaning
from usp_env.data.conversations import Conversation
from usp_env.data.preprocessing import (
    Report,
    Step,
    alternate,
    clean,
    dedupe,
    detect_language,
    digest,
    language,
    length,
    pipeline,
    segment,
    segments,
    toxicity,
)
from usp_env.dialogue import Dialogue, Message
from usp_env.errors import MissingExtraError, SpecError

USER, REPLY = "user", "assistant"


def talk(*texts: str, id: str = "a", first: str = USER, **known: object) -> Conversation:
    roles = [USER, REPLY] if first == USER else [REPLY, USER]
    return Conversation(id, Dialogue(tuple(Message(roles[i % 2], text) for i, text in enumerate(texts))), **known)


def texts(conversation: Conversation) -> list[str]:
    return [m.content for m in conversation.dialogue]


# ------------------------------------------------------------------------------------------------- artefacts


@pytest.mark.parametrize(
    ("dirty", "mended"),
    [
        ("what is it?2 / 2", "what is it?"),
        ("can xgboost be used in pyspark1 / 1", "can xgboost be used in pyspark"),
        ("each with a description of the pokemon.11 / 11", "each with a description of the pokemon."),
        ("stylized.11 / 13", "stylized."),
        ("advanced civilization1 / 2", "advanced civilization"),
        ("isn't it? 2 / 2", "isn't it?"),
        ("a fun atmosphere!\n\n5 / 5", "a fun atmosphere!"),
        ("remembered him.\n4 / 9\n", "remembered him."),
        ("line 1 pos 111 / 1", "line 1 pos 11"),
        ("March 29, 20231 / 1", "March 29, 2023"),
        ("E_f>0 e E_g> 02 / 2", "E_f>0 e E_g> 0"),
    ],
)
def test_a_page_counter_at_the_end_of_a_user_s_turn_goes(dirty, mended):
    assert cleaning.page_counter(USER, dirty) == mended


@pytest.mark.parametrize(
    "text",
    [
        "I ate 2 / 2 of them and was full",
        "I ate 2 / 2\nthen slept",
        "my score is 4 / 5",
        "compute 10 / 2",
        "what is 7 / 2",
        "x=7 / 2",
        "Rt = 11.5149 / 5",
        "ratio 0.5 / 5",
        "due 4/10",
        "2 / 2",
        "chapter 0 / 5",
    ],
)
def test_a_fraction_stays(text):
    assert cleaning.page_counter(USER, text) == text


def test_replies_have_no_page_counters():
    assert cleaning.page_counter(REPLY, "Σ = (14/27) * (6 / 9") == "Σ = (14/27) * (6 / 9"
    assert cleaning.page_counter(REPLY, "done2 / 2") == "done2 / 2"


@pytest.mark.parametrize(
    ("dirty", "mended"),
    [
        ("what about water parksShare Prompt", "what about water parks"),
        ("one more drink for my friendSave & SubmitCancel", "one more drink for my friend"),
        ("continue\n \n \n \n 지금 번역하기", "continue"),
        ("Answer in English.지금 번역하기", "Answer in English."),
        ("10 topics plz\n \n \n \n Translate now", "10 topics plz"),
        ("in our story.\n \n \n \n 지금 번역하기\n CopyCopy HTMLRead Aloud7 chars | 2 words", "in our story."),
        ("Please write in English language.Share Prompt지금 번역하기", "Please write in English language."),
        ("Share Prompt", ""),
    ],
)
def test_the_labels_of_buttons_go(dirty, mended):
    assert cleaning.buttons(USER, dirty) == mended
    assert cleaning.buttons(REPLY, dirty) == dirty


@pytest.mark.parametrize(
    "text", ["How do I use the Share Prompt button?", "No, Translate now", "지금 번역하기 is Korean", "Cancel"]
)
def test_the_same_words_in_a_sentence_stay(text):
    assert cleaning.buttons(USER, text) == text


@pytest.mark.parametrize(
    ("role", "dirty", "mended"),
    [
        (USER, r"import { FETCH\_GRAPH } and 2 \* 3", "import { FETCH_GRAPH } and 2 * 3"),
        (USER, "```\ndef \\_\\_init\\_\\_(self):\n```", "```\ndef __init__(self):\n```"),
        (USER, r"share\\nltk\_data", r"share\\nltk_data"),  # a doubled backslash before another letter is the user's own
        (USER, r"\\_", r"\_"),  # the user's own backslash before an escaped underscore
        (REPLY, r"V = A \* L, the user\_id", "V = A * L, the user_id"),
        (REPLY, "a\\_b\n```python\nre.sub('\\_', x)\n```\nc\\_d", "a_b\n```python\nre.sub('\\_', x)\n```\nc_d"),
        (REPLY, r"write `\_` and \_", r"write `\_` and _"),
        (REPLY, "```\nan open \\_ fence", "```\nan open \\_ fence"),
    ],
)
def test_the_converter_s_backslashes_go(role, dirty, mended):
    assert cleaning.escapes(role, dirty) == mended


@pytest.mark.parametrize("text", [r"C:\Users\new", r"regex \d+\.\d", r"my_name in \_latex\_", r"\\server\share", r"\[mfa\]"])
def test_other_backslashes_and_turns_that_were_never_converted_stay(text):
    assert cleaning.escapes(USER, text) == text


@pytest.mark.parametrize(
    ("dirty", "mended"),
    [
        ("See <https://a.org/x_y>.", "See https://a.org/x_y."),
        ("mail [me@a.org](mailto:me@a.org)", "mail me@a.org"),
        ("([www.a.org](http://www.a.org))", "(www.a.org)"),
        ("[the site](https://a.org)", "[the site](https://a.org)"),
        ("`<https://a.org>`", "`<https://a.org>`"),
        ("```\n<https://a.org>\n```", "```\n<https://a.org>\n```"),
    ],
)
def test_links_that_are_their_own_label(dirty, mended):
    assert cleaning.links(REPLY, dirty) == mended
    assert cleaning.links(USER, dirty) == dirty


def test_a_turn_that_is_the_page_s_own_html_becomes_text():
    html = (
        '<div class="markdown prose w-full break-words dark:prose-invert light"><p>Use &lt;b&gt; &amp; <em>wait</em>:<br>now</p>'
        "<ul><li>one</li><li>two</li></ul><pre><code>if a &lt; b:\n    pass</code></pre></div>"
    )
    text = "Use <b> & wait:\nnow\n\n- one\n- two\n\n```\nif a < b:\n    pass\n```"
    assert cleaning.page_html(REPLY, html) == text


@pytest.mark.parametrize(
    "text",
    [
        'Why is this empty?\n<div class="card"><p>Hi</p></div>',
        "```html\n<div>\n  <p>1 &lt; 2</p>\n</div>\n```",
        "<div>\n<p>my page</p>\n</div>",
        "escape it as `&lt;` and `&amp;`",
        '<div class="markdown">open',
    ],
)
def test_html_that_somebody_pasted_stays(text):
    for role in (USER, REPLY):
        assert cleaning.clean_dialogue(Dialogue((Message(role, text),)))[0].content == text


def test_a_clean_dialogue_is_the_same_object():
    dialogue = talk("hi", "Hello!").dialogue
    assert cleaning.clean_dialogue(dialogue) is dialogue


# ---------------------------------------------------------------------------------------------- segmentation

# lengths of user, reply, user, reply, …; the limit is 10
HUMAN, GPT = True, False


@pytest.mark.parametrize(
    ("lengths", "spans"),
    [
        ([3, 3, 2, 2], [(0, 4)]),  # 10 in all: nothing overflows
        # user: 4+4+4 > 10 at turn 2, so [0, 1]; restart on reply 1 with 4+4; 8+1 fits
        ([4, 4, 4, 1], [(0, 2), (1, 4)]),
        # reply: 3+3+3+5 > 10 at turn 3, which still belongs to its segment; restart on it with 5; 5+2+3 fits
        ([3, 3, 3, 5, 2, 3], [(0, 4), (3, 6)]),
        # user overflow at turn 2 (12), restart on 1 with 4+4 = 8; reply 3: 8+3 > 10, [1 .. 3], restart on 3 with 3; 3+1+1
        ([4, 4, 4, 3, 1, 1], [(0, 2), (1, 4), (3, 6)]),
        # the last turn is a user's and overflows: nothing is left behind
        ([5, 5, 1], [(0, 2)]),
        # the last turn is a reply and overflows: it is in its segment, nothing follows
        ([5, 4, 1, 1], [(0, 4)]),
        # a last user turn that fits is left out
        ([2, 2, 2], [(0, 2)]),
        # a reply that is too long alone: [0, 1]; restart on 1 with 11; user 2 overflows: [1, 1], restart on 1 with 12;
        # reply 3 overflows: [1 .. 3]
        ([1, 11, 1, 1], [(0, 2), (1, 2), (1, 4)]),
        # an opening that is too long alone has nothing before it to end or to restart on
        ([11, 1, 1, 1], [(0, 2), (1, 4)]),
        ([3], []),
        ([], []),
    ],
)
def test_segments_by_hand(lengths, spans):
    assert segments([i % 2 == 0 for i in range(len(lengths))], lengths, 10) == spans


def test_segments_of_a_continuation_start_on_the_reply():
    # reply 4, user 4, reply 4 overflows (12): [0 .. 2], restart on 2 with 4; user 3, reply 3: 10
    assert segments([GPT, HUMAN, GPT, HUMAN, GPT], [4, 4, 4, 3, 3], 10) == [(0, 3), (2, 5)]


def test_the_step_names_its_segments_and_leaves_out_those_without_a_user():
    one, two = pipeline([talk("a", "b" * 11, "c", "d")], [segment(10, len)])
    assert (one.id, texts(one)) == ("a", ["a", "b" * 11])
    assert (two.id, texts(two)) == ("a#1", ["b" * 11, "c", "d"])
    whole = talk("a", "b")
    assert list(pipeline([whole], [segment(10, len)])) == [whole]
    with pytest.raises(SpecError, match="above 0"):
        segment(0, len)


# --------------------------------------------------------------------------------------------------- filters


def test_language_by_label_then_by_detector():
    def spanish(text: str) -> str | None:
        return {"hola": "es", "hmm": None}.get(text.split("\n")[0], "en")

    kept = pipeline(
        [
            talk("hola", "x", id="label", language="English"),
            talk("hola", "x", id="code", language="en"),
            talk("hi", "x", id="german", language="German"),
            talk("hola", "x", id="seen"),
            talk("hmm", "x", id="unsure"),
            talk("hi", "x", id="english"),
        ],
        [language(detect=spanish)],
    )
    assert [c.id for c in kept] == ["label", "code", "unsure", "english"]


def test_detect_language():
    pytest.importorskip("py3langid")
    assert detect_language("How do I make a fresh loaf of bread without an oven at home?") == "en"
    assert detect_language("¿Puedes escribir un cuento corto para mis hijos sobre un perro?") == "es"
    assert detect_language("") is None
    assert [detect_language("nur ein kurzer Satz auf Deutsch, bitte") for _ in range(3)] == ["de"] * 3


def test_a_missing_detector_is_named(monkeypatch):
    import sys

    from usp_env.data import preprocessing

    preprocessing._identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(MissingExtraError, match=r"usp-env\[data\]"):
        list(pipeline([talk("hi", "x")], [language()]))


def test_toxicity_by_flag_then_by_terms():
    conversations = [
        talk("kill myself", "x", id="flag says no", toxic=False),
        talk("hi", "x", id="flag says yes", toxic=True),
        talk("I want to Kill Myself.", "x", id="term"),
        talk("a document", "to kill myself", id="only the reply"),
        talk("cucumber documents", "x", id="part of a word"),
    ]
    assert [c.id for c in pipeline(conversations, [toxicity()])] == ["flag says no", "only the reply", "part of a word"]
    assert [c.id for c in pipeline(conversations, [toxicity(["cucumber"])])] == ["flag says no", "term", "only the reply"]
    assert len(list(pipeline(conversations, [toxicity([])]))) == 4


def test_dedupe_compares_whole_conversations():
    conversations = [
        talk("a", "b", id="1"),
        talk("a", "b", id="2"),
        talk("a", "c", id="3"),
        talk("ab", "", id="4"),
        talk("a", "b", id="5", first=REPLY),
    ]
    assert [c.id for c in pipeline(conversations, [dedupe()])] == ["1", "3", "4", "5"]
    assert len(digest(conversations[0].dialogue)) == 16


def test_alternate_leaves_out_blank_turns_and_merges():
    both = Dialogue((Message(USER, "a"), Message(USER, "b"), Message(REPLY, "\u200b"), Message(USER, "c"), Message(REPLY, "d")))
    (mended,) = pipeline([Conversation("x", both)], [alternate()])
    assert [(m.role, m.content) for m in mended.dialogue] == [(USER, "a\n\nb\n\nc"), (REPLY, "d")]
    whole = talk("a", "b")
    assert next(pipeline([whole], [alternate()])) is whole
    assert list(pipeline([talk(" ", "\n"), Conversation("none", Dialogue())], [alternate()])) == []


@pytest.mark.parametrize(
    ("caps", "fits"),
    [
        ({}, True),
        ({"min_turns": 3}, False),
        ({"max_turns": 1}, False),
        ({"max_chars": 8}, True),
        ({"max_chars": 7}, False),
        ({"max_user_chars": 3}, True),
        ({"max_user_chars": 2}, False),
        ({"opens": True}, True),
    ],
)
def test_length(caps, fits):
    assert bool(length(**caps).apply(talk("hey", "a" * 8, "you", "b"))) is fits


def test_length_of_a_continuation():
    assert not length(opens=True).apply(talk("a", "b", first=REPLY))
    assert not length().apply(talk("a", first=REPLY))


# -------------------------------------------------------------------------------------------------- pipeline


def test_the_report_counts_what_each_step_did():
    report = Report()
    conversations = [
        talk("one2 / 2", "x", "two\\_x2 / 2", "y", id="a"),
        talk("one", "x", "two_x", "y", id="b"),
        talk("\u200b", "", id="c"),
        talk("a" * 9, "b" * 9, "c", "d", id="d"),
    ]
    kept = list(pipeline(conversations, [*clean(), alternate(), dedupe(), segment(10, len)], report))
    assert [c.id for c in kept] == ["a", "d", "d#1"]
    counter, escape = report.steps["clean: page counter"], report.steps["clean: escapes"]
    assert (counter.seen, counter.changed, counter.turns, counter.changed_example) == (4, 1, 2, "a")
    assert (escape.changed, escape.turns) == (1, 1)
    assert (report.steps["alternate"].dropped, report.steps["alternate"].dropped_example) == (1, "c")
    assert (report.steps["dedupe"].dropped, report.steps["dedupe"].dropped_example) == (1, "b")
    assert (report.steps["segment"].seen, report.steps["segment"].changed, report.steps["segment"].out) == (2, 1, 3)
    assert report.to_json()["dedupe"]["out"] == 2
    assert "dedupe" in str(report)
    with pytest.raises(SpecError, match="'dedupe' twice"):
        pipeline([], [dedupe()], report)


def test_the_pipeline_is_lazy():
    read: list[int] = []

    def source() -> Iterator[Conversation]:
        for i in range(5):
            read.append(i)
            yield talk(f"q{i}", "a")

    stream = pipeline(source(), [Step("keep", lambda c: [c]), dedupe()])
    assert read == []
    next(stream)
    assert read == [0]


def test_memory_does_not_grow_with_the_number_of_conversations():
    def peak(n: int, steps: list[Step]) -> int:
        source = (talk(f"question {i}", "x" * 40, id=str(i)) for i in range(n))
        tracemalloc.start()
        try:
            assert sum(1 for _ in pipeline(source, steps)) >= n
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def steps() -> list[Step]:
        return [*clean(cleaning.RULES[1:3]), alternate(), segment(70, len), length()]

    peak(10, steps())  # caches
    small, large = peak(1_000, steps()), peak(100_000, steps())
    assert large < 1.5 * small + 20_000
    # a digest is an object of 49 bytes; the set has a slot of 16 bytes for 3/5 of them and grows fourfold, beside its old self
    assert peak(20_000, [dedupe()]) < large + 20_000 * 250
