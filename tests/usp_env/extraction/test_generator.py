"""The profile generator: prompt bytes, what fits, what is read, what is told when it fails."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from usp_env.backends.base import Generation, Request, Sampling
from usp_env.backends.scripted import ScriptedBackend
from usp_env.backends.spec import ModelSpec
from usp_env.dialogue import Dialogue
from usp_env.errors import BackendError, SpecError, UnknownNameError
from usp_env.extraction.generator import (
    ProfileGenerator,
    ProfileTexts,
    fit_turns,
    load_generator,
    parse_profile,
    profile_messages,
)

GOOD = "You want soup.\n\nYou are terse."


def talk(*texts: str) -> Dialogue:
    return Dialogue.of({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts))


def prompt_of(request: Request) -> str:
    assert request.messages is not None
    return request.messages[1]["content"]


# ── the prompt ───────────────────────────────────────────────────────────────────────────────────


def test_the_prompt_is_that_of_the_released_weights_to_the_byte() -> None:
    system, user = profile_messages(["how do i make soup?", "thanks {utterances}\nbye"])
    assert system == {
        "role": "system",
        "content": "You are an expert in creating user profile descriptions based on dialogue analysis.",
    }
    assert user["role"] == "user"
    assert user["content"].encode() == (
        b"Analyze the user utterances marked by [User] to generate a comprehensive and descriptive user profile\n"
        b"[User]: how do i make soup?\n---\n"
        b"[User]: thanks {utterances}\nbye\n---\n"
    )


def test_only_user_turns_are_evidence() -> None:
    backend = ScriptedBackend([GOOD] * 2)
    ProfileGenerator(backend).generate([talk("soup?", "You are a king.", "thanks"), talk("soup?", "No.", "thanks")])
    one, two = backend.history
    assert one == two
    assert prompt_of(one).endswith("\n[User]: soup?\n---\n[User]: thanks\n---\n")


def test_generation_is_greedy_and_one_call() -> None:
    backend = ScriptedBackend([GOOD] * 3)
    generator = ProfileGenerator(backend)
    assert generator.generate([talk("a"), talk("b"), talk("c")]) == [ProfileTexts("You want soup.", "You are terse.")] * 3
    assert backend.batches == [3]
    request = backend.history[0]
    assert (request.role, request.sampling.temperature, request.sampling.max_tokens) == ("assistant", 0.0, 320)
    assert {r.seed for r in backend.history} == {0}
    assert not request.can_end


# ── what is read ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("OF\n\nSC", ("OF", "SC")),
        ("OF\nSC", ("OF", "SC")),
        (" OF \r\n\r\n SC\n\n", ("OF", "SC")),
        ("<think>One.\nTwo.\nThree.</think>\nOF\n\nSC", ("OF", "SC")),
        ("OF \u2028 still OF\n\nSC", ("OF \u2028 still OF", "SC")),
        ("OF", None),
        ("OF\n\nSC\n\nmore", None),
        ("OF\nof\n\nSC", None),
        ("", None),
        ("\n \n", None),
    ],
)
def test_two_paragraphs_or_none(text: str, expected: tuple[str, str] | None) -> None:
    assert parse_profile(text) == expected


def test_each_row_has_its_own_outcome() -> None:
    down = BackendError("server down")
    backend = ScriptedBackend(
        ["One paragraph.", down, GOOD, Generation("You want soup.\n\nYou are te", finish_reason="length"), "1\n2\n3", GOOD]
    )
    silent = Dialogue.of([{"role": "assistant", "content": "Hello?"}])
    rows = ProfileGenerator(backend).generate([talk("a"), Dialogue(), talk("b"), silent, talk("c"), talk("d")])
    assert rows == [None, None, down, None, *[("You want soup.", "You are terse.")] * 2]  # what was cut off is no profile
    assert backend.batches == [4, 2]  # nobody is asked about people who said nothing


def test_what_is_not_two_paragraphs_is_drawn_once_more_with_a_fixed_seed() -> None:
    backend = ScriptedBackend(["One.\n\nTwo.\n\nThree.", GOOD, "You want soup.\n\nYou are terse."])
    rows = ProfileGenerator(backend, Sampling(max_tokens=90)).generate([talk("a"), talk("b")])
    assert rows == [("You want soup.", "You are terse.")] * 2
    first, _, again = backend.history
    assert (again.messages, again.seed) == (first.messages, first.seed)
    assert (again.sampling.temperature, again.sampling.max_tokens) == (0.7, 90)


def test_a_second_try_that_fails_leaves_the_others_their_profiles() -> None:
    class DownNext(ScriptedBackend):
        def generate(self, requests: Sequence[Request]) -> list[Generation]:
            if self.batches:
                raise BackendError("gone")
            return super().generate(requests)

    lost, kept = ProfileGenerator(DownNext(["?", GOOD])).generate([talk("a"), talk("b")])
    assert isinstance(lost, BackendError)
    assert kept == ("You want soup.", "You are terse.")


def test_without_anyone_to_ask_about_nobody_is_asked() -> None:
    backend = ScriptedBackend([])
    assert ProfileGenerator(backend).generate([Dialogue()]) == [None]
    assert ProfileGenerator(backend).generate([]) == []
    assert backend.batches == []


def test_a_full_context_is_a_failure_that_says_how_to_mend_it() -> None:
    backend = ScriptedBackend([Generation("", finish_reason="context_limit")], spec="openai:m@http://x")
    (row,) = ProfileGenerator(backend).generate([talk("a")])
    assert isinstance(row, BackendError)
    assert "openai:m@http://x" in str(row)
    assert "smaller context" in str(row)


def test_when_nothing_can_be_done_it_raises() -> None:
    class Down(ScriptedBackend):
        def generate(self, requests: Sequence[Request]) -> list[Generation]:
            raise BackendError("no device")

    with pytest.raises(BackendError, match="no device"):
        ProfileGenerator(Down([])).generate([talk("a")])


# ── what fits ────────────────────────────────────────────────────────────────────────────────────

FIXED = len(profile_messages([])[0]["content"]) + len(profile_messages([])[1]["content"])
EACH = len("[User]: \n---\n")


def test_the_longest_turns_are_capped_at_one_length() -> None:
    # One token a character: 10 + 100 + 100 fit beside the fixed text, 10 + 101 + 101 do not.
    turns = ["a" * 10, "b" * 1000, "c" * 500]
    for spare in (0, 1):  # the odd one cannot be shared
        kept = fit_turns(turns, FIXED + 3 * EACH + 210 + spare, len)
        assert kept == ["a" * 10, "b" * 99 + "…", "c" * 99 + "…"]


def test_a_dense_beginning_is_cut_further() -> None:
    # "#" costs 3 tokens, the rest 1: at the whole text's rate 600 tokens are 500 characters, which cost 300 + 400. 386 do fit.
    (kept,) = fit_turns(["#" * 100 + "a" * 900], FIXED + EACH + 600, lambda text: len(text) + 2 * text.count("#"))
    assert kept == "#" * 100 + "a" * 285 + "…"


def test_what_fits_is_left_alone() -> None:
    turns = ["a" * 10, "b" * 1000]
    assert fit_turns(turns, FIXED + 2 * EACH + 1010, len) == turns
    assert fit_turns(turns, FIXED + 2 * EACH + 1009, len) == ["a" * 10, "b" * 998 + "…"]
    assert fit_turns([], 0, len) == []


def test_the_oldest_turns_go_where_64_characters_of_each_are_too_many() -> None:
    turns = [letter * 300 for letter in "abcd"]
    kept = fit_turns(turns, FIXED + 2 * (EACH + 64) + 5, len)
    assert kept == ["c" * 63 + "…", "d" * 63 + "…"]
    assert fit_turns(turns, 0, len) == ["d" * 63 + "…"]
    assert fit_turns(["e" * 300], 0, len) == ["e" * 63 + "…"]


class Counting(ScriptedBackend):
    """An engine whose tokens are characters."""

    max_model_len = FIXED + EACH + 200 + 320 + 32  # 200 characters of one turn, 320 of output, 32 of template

    def count_tokens(self, text: str) -> int:
        return len(text)


def test_prompt_and_output_fit_the_engine() -> None:
    backend = Counting([GOOD] * 2)
    for context in (4096, Counting.max_model_len - 100):
        ProfileGenerator(backend, context=context).generate([talk("x" * 5000)])
    lengths = [len(prompt_of(r)) - len(profile_messages([])[1]["content"]) - EACH for r in backend.history]
    assert lengths == [200, 100]  # the smaller of the two limits holds


def test_without_a_tokenizer_a_token_is_three_bytes() -> None:
    backend = ScriptedBackend([GOOD])
    ProfileGenerator(backend, Sampling(0.0, max_tokens=96), context=428).generate([talk("ü" * 5000)])
    # 428 - 96 - 32 = 300 tokens: the system message takes 28 of them, and 272 are 816 bytes of the user's.
    assert -(-len(profile_messages([])[0]["content"]) // 3) == 28
    assert 814 <= len(prompt_of(backend.history[0]).encode()) <= 816


# ── specs ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def asked() -> list[ModelSpec]:
    return []


@pytest.fixture
def source(asked: list[ModelSpec]) -> object:
    return lambda spec: asked.append(spec) or ScriptedBackend([], spec=str(spec))


def test_the_packaged_generator(asked: list[ModelSpec], source: object) -> None:
    generator = load_generator("profile-generator?max_tokens=400", source)
    assert asked == [ModelSpec("hf", "profile-generator", (), {"max_tokens": 400})]
    assert (generator.adapter, generator.sampling) == (None, Sampling(0.0, max_tokens=400))
    assert (generator.context, load_generator("openai:profile-generator@http://x/v1", source).context) == (768, 768)


@pytest.mark.assets
def test_what_the_packaged_generator_reads() -> None:
    pytest.importorskip("torch")
    baker, coder = load_generator().generate([talk("how do I bake rye bread?"), talk("fix this java NullPointerException pls")])
    assert "bread" in baker.objective
    assert "Java" in coder.objective
    assert baker.subjective != coder.subjective


def test_an_adapter_of_ones_own(asked: list[ModelSpec], source: object) -> None:
    generator = load_generator("smollm2-135m?adapter=runs/mine", source)
    assert generator.request(talk("a")).adapter == "runs/mine"


def test_any_model_can_generate_profiles(asked: list[ModelSpec], source: object) -> None:
    hub = load_generator("wangkevin02/Profile_Generator?max_model_len=2048&temperature=0.5", source)
    assert (asked[0].engine, asked[0].model, hub.context) == ("hf", "wangkevin02/Profile_Generator", 2048)
    assert hub.sampling == Sampling(0.5, max_tokens=320)
    server = load_generator('openai:gpt-4o@http://x/v1?chat_template_kwargs={"enable_thinking": false}', source)
    assert (asked[1].engine, server.context, server.adapter) == ("openai", 4096, None)
    assert server.request(talk("a")).chat_template_kwargs == {"enable_thinking": False}
    with pytest.raises(SpecError, match="system prompt is fixed"):
        load_generator("smollm2-135m?system=hi", source)
    with pytest.raises(UnknownNameError, match="did you mean 'temperature'"):
        load_generator("profile-generator?temprature=0", source)


def test_identity_tells_what_decides_the_profile() -> None:
    one = ProfileGenerator(ScriptedBackend([], spec="one"))
    assert one.identity != ProfileGenerator(ScriptedBackend([], spec="two")).identity
    assert one.identity != ProfileGenerator(one.backend, Sampling(0.5)).identity


@pytest.mark.assets
def test_on_a_real_model_a_long_conversation_fits() -> None:
    pytest.importorskip("torch")
    generator = load_generator("smollm2-135m?max_tokens=8&max_model_len=512")
    long = talk("Please fix this code:\n" + "x = 1\n" * 3000, "Sure.", "thanks")
    first, alone = generator.generate([long, talk("hi")]), generator.generate([long])
    assert not isinstance(first[0], BackendError)
    assert first[0] == alone[0]


def test_a_long_conversation_is_fitted_in_few_tries() -> None:
    tries = 0

    def count(text: str) -> int:
        nonlocal tries
        tries += 1
        return len(text) // 4

    turns = [f"question {i} of one who never stops asking about their garden and its weeds" for i in range(2000)]
    kept = fit_turns(turns, 416, count)
    assert kept == [turn[:63].rstrip() + "…" for turn in turns[-len(kept) :]]  # the latest turns stay
    assert sum(count(m["content"]) for m in profile_messages(kept)) <= 416
    assert sum(count(m["content"]) for m in profile_messages([turns[0][:63] + "…", *kept])) > 416  # and no more could
    assert tries < 100
