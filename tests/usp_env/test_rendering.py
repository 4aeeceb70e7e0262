from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usp_env.errors import SpecError
from usp_env.models import assets

pytest.importorskip("transformers")
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from usp_env.rendering import Rendered, Renderer  # noqa: E402

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
]  # fmt: skip
LLAMA3_TEMPLATE = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Gemma's: no system role of its own, `model` for the assistant, contents trimmed, turns must alternate.
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set prefix = messages[0]['content'] | trim + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set prefix = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' + (prefix if loop.first else '') + "
    "m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def build(special, template, bos=None, eos=None, words=(), added=(), ignore_merges=True, split=LLAMA3_SPLIT, normalizer=None):
    """A byte-level BPE tokenizer of about 300 tokens, put together as Llama-3's is."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [
        ("h", "e"),
        ("l", "l"),
        ("he", "ll"),
        ("hell", "o"),
        ("Ġ", "t"),
        ("Ġt", "he"),
        ("Ċ", "Ċ"),
        ("u", "s"),
        ("us", "e"),
        ("use", "r"),
    ]
    vocabulary = {t: i for i, t in enumerate([*alphabet, *(a + b for a, b in pairs), *words])}
    backend = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=ignore_merges))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    backend.add_tokens([AddedToken(t, normalized=False) for t in added])
    if bos:  # Llama-3 adds it to every encoded text; rendering must not
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def llama3():
    return build(LLAMA3_SPECIAL, LLAMA3_TEMPLATE, "<|begin_of_text|>", "<|eot_id|>")


@pytest.fixture(scope="module")
def chatml():
    return build(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], CHATML_TEMPLATE, None, "<|im_end|>", added=["<think>", "  "])


@pytest.fixture(scope="module")
def gemma():
    return build(["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], GEMMA_TEMPLATE, "<bos>", "<eos>")


@pytest.fixture(scope="module")
def smollm2():
    if not assets.available("smollm2-135m"):
        pytest.skip("usp-env fetch smollm2-135m")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(assets.path("smollm2-135m"))


EVERY = ["llama3", "chatml", "gemma", pytest.param("smollm2", marks=pytest.mark.assets)]
TEXTS = ["You are a person.", "hello the user, 1998!", "  spaced\n\nout  ", "naïve 你好 👩‍👩‍👧", "x"]


def chat(*contents: str, first: str = "user") -> list[dict[str, str]]:
    roles = ("user", "assistant") if first == "user" else ("system", "user", "assistant", "user", "assistant", "user")
    return [{"role": roles[i % len(roles)], "content": content} for i, content in enumerate(contents)]


def pieces(tokenizer, rendered: Rendered) -> list[tuple[str, int]]:
    """Runs of equal utterance id as (text, id)."""
    runs: list[tuple[list[int], int]] = []
    for token, owner in zip(rendered.token_ids, rendered.utterance_ids, strict=True):
        if not runs or runs[-1][1] != owner:
            runs.append(([], owner))
        runs[-1][0].append(token)
    return [(tokenizer.decode(ids), owner) for ids, owner in runs]


def test_rendered_masks_by_hand():
    row = Rendered((9, 8, 7, 6, 5, 4), ((1, 3), (5, 6)))
    assert row.own_mask == [False, True, True, False, False, True]
    assert row.utterance_ids == [-1, 0, 0, -1, -1, 1]
    assert Rendered((1, 2)).own_mask == [False, False]


@pytest.mark.parametrize("name", EVERY)
def test_ids_are_those_of_apply_chat_template(name, request):
    tokenizer = request.getfixturevalue(name)
    renderer = Renderer(tokenizer)
    plain = ["You are a person.", "hello the user, 1998!", "naïve 你好 👩‍👩‍👧\nend  ", "x"]
    for messages in (chat(*plain, first="system"), chat("hello", "hi there", "bye")):
        for opens in (False, True):
            expected = tokenizer.apply_chat_template(messages, add_generation_prompt=opens, return_dict=False)
            assert list(renderer.render(messages, generation_role="assistant" if opens else None).token_ids) == expected


def test_kinds_are_found(llama3, chatml, gemma):
    assert [Renderer(t).kind for t in (llama3, chatml, gemma)] == ["llama3", "chatml", "template"]
    bare = build(LLAMA3_SPECIAL, None, "<|begin_of_text|>", "<|end_of_text|>")
    assert Renderer(bare).kind == "llama3"
    assert Renderer(chatml, kind="template").kind == "template"


def test_ids_of_ends_and_headers(llama3, chatml, gemma):
    r, number = Renderer(llama3), llama3.convert_tokens_to_ids
    assert (r.end_of_turn_id, r.end_of_conversation_id, r.header_start_id) == tuple(
        number(["<|eot_id|>", "<|end_of_text|>", "<|start_header_id|>"])
    )
    assert set(r.stop_ids) == {r.end_of_turn_id, r.end_of_conversation_id, r.header_start_id}
    r, number = Renderer(chatml), chatml.convert_tokens_to_ids
    assert (r.end_of_turn_id, r.end_of_conversation_id, r.header_start_id) == tuple(
        number(["<|im_end|>", "<|endoftext|>", "<|im_start|>"])
    )
    r, number = Renderer(gemma), gemma.convert_tokens_to_ids
    assert (r.end_of_turn_id, r.end_of_conversation_id, r.header_start_id) == (
        number("<end_of_turn>"),
        None,
        number("<start_of_turn>"),
    )
    assert set(r.stop_ids) == {r.end_of_turn_id, r.header_start_id, number("<eos>")}
    userlm = build([*LLAMA3_SPECIAL, "<|endconversation|>"], LLAMA3_TEMPLATE, "<|begin_of_text|>", "<|eot_id|>")
    assert Renderer(userlm).end_of_conversation_id == userlm.convert_tokens_to_ids("<|endconversation|>")


def test_chatml_spans_by_hand(chatml):
    rendered = Renderer(chatml).render(
        chat("S", "hello", "hi", "bye", first="system"), own_role="user", generation_role="assistant"
    )
    assert pieces(chatml, rendered) == [
        ("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n", -1),
        ("hello<|im_end|>", 0),
        ("\n<|im_start|>assistant\nhi<|im_end|>\n<|im_start|>user\n", -1),
        ("bye<|im_end|>", 1),
        ("\n<|im_start|>assistant\n", -1),
    ]
    ids = chatml.convert_tokens_to_ids(["<|im_start|>", "user", "Ċ", "hello", "<|im_end|>", "Ċ"])
    assert Renderer(chatml).render(chat("hello")).token_ids == tuple(ids)


def test_llama3_spans_by_hand(llama3):
    rendered = Renderer(llama3).render(chat("S", "hello", " hi ", first="system"), own_role="assistant")
    assert pieces(llama3, rendered) == [
        ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
         "hello<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", -1),
        ("hi<|eot_id|>", 0),
    ]  # fmt: skip
    ids = llama3.convert_tokens_to_ids
    assert Renderer(llama3).render(chat("hello"), generation_role="user").token_ids == (
        *ids(["<|begin_of_text|>", "<|start_header_id|>", "user", "<|end_header_id|>", "ĊĊ", "hello", "<|eot_id|>"]),
        *ids(["<|start_header_id|>", "user", "<|end_header_id|>", "ĊĊ"]),
    )


def test_template_spans_by_hand(gemma):
    rendered = Renderer(gemma).render(chat("S", "hello", "hi", first="system"), own_role="assistant", generation_role="user")
    assert pieces(gemma, rendered) == [
        ("<bos><start_of_turn>user\nS\n\nhello<end_of_turn>\n<start_of_turn>model\n", -1),
        ("hi<end_of_turn>", 0),
        ("\n<start_of_turn>user\n", -1),
    ]


def test_the_end_of_the_conversation(chatml, llama3):
    renderer = Renderer(chatml)
    after_reply = renderer.render(chat("hello", "hi"), own_role="user", ended=True)
    assert pieces(chatml, after_reply) == [
        ("<|im_start|>user\n", -1),
        ("hello<|im_end|>", 0),
        ("\n<|im_start|>assistant\nhi<|im_end|>\n<|im_start|>user\n", -1),
        ("<|endoftext|>", 1),
    ]
    on_own = renderer.render(chat("hello", "hi", "bye"), own_role="user", ended=True)
    assert pieces(chatml, on_own)[-1] == ("bye<|endoftext|>", 1)
    assert on_own.own_spans[-1][1] == len(on_own.token_ids)
    for messages in (chat("hello", "hi"), chat("hello", "hi", "bye")):
        row = renderer.render(messages, own_role="user", ended=True)
        assistant = renderer.render(messages, own_role="assistant", ended=True)
        assert assistant.token_ids == row.token_ids
        assert pieces(chatml, assistant)[1] == ("hi<|im_end|>", 0)
        assert len(assistant.own_spans) == 1
    assert llama3.decode(Renderer(llama3).render(chat("x"), ended=True).token_ids).endswith("\n\nx<|end_of_text|>")


def test_end_of_conversation_needs_a_token(gemma, chatml):
    with pytest.raises(SpecError, match="end-of-conversation token"):
        Renderer(gemma).render(chat("hello"), ended=True)
    with pytest.raises(SpecError, match="generation_role=None"):
        Renderer(chatml).render(chat("hello"), ended=True, generation_role="user")


@pytest.mark.assets
def test_default_system_prompt_follows_the_template_for_assistants_only(smollm2):
    text = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    renderer, bare = Renderer(smollm2), Renderer(smollm2, default_system=False)
    assert smollm2.decode(renderer.render(chat("hi"), generation_role="assistant").token_ids).startswith(text)
    for row in (
        renderer.render(chat("hi", "yo"), generation_role="user"),
        renderer.render(chat("hi", "yo"), own_role="user"),
        renderer.render(chat("S", "yo", first="system"), generation_role="assistant"),
        renderer.render([], generation_role="assistant"),
        bare.render(chat("hi"), generation_role="assistant"),
    ):
        assert "SmolLM" not in smollm2.decode(row.token_ids)
    assert renderer.stop_ids == (2, 0, 1)


@pytest.mark.parametrize("name", EVERY)
def test_markers_in_an_utterance_stay_text(name, request):
    """Every special token and chat marker, on both sides: no special id in content, exact round trip."""
    tokenizer = request.getfixturevalue(name)
    renderer = Renderer(tokenizer)
    markers = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab(), *LLAMA3_SPECIAL}
    markers |= {
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|endconversation|>",
        "<|im_start|>user\n",
        "[INST]",
        "</s>",
        "<think>",
    }
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    for marker in sorted(markers):
        text = f"a{marker}b {marker}\n{marker}"
        messages = chat(text, text, text, text)
        trimmed = (
            text.strip()
            if renderer.render(chat(" x "), own_role="user").token_ids == renderer.render(chat("x")).token_ids
            else text
        )
        for role in ("user", "assistant"):
            rendered = renderer.render(messages, own_role=role)
            assert len(rendered.own_spans) == 2
            for start, end in rendered.own_spans:
                *content, last = rendered.token_ids[start:end]
                assert special.isdisjoint(content), marker
                assert last == renderer.end_of_turn_id
                assert tokenizer.decode(content) == renderer.decode(content) == trimmed
        plain = renderer.render(chat("a", "b", "c", "d")).token_ids
        assert sum(i in special for i in renderer.render(messages).token_ids) == sum(i in special for i in plain)


def test_added_blanks_are_no_markers(chatml):
    blanks = chatml.convert_tokens_to_ids("  ")
    assert blanks in Renderer(chatml).encode("a  b")
    assert chatml.convert_tokens_to_ids("<think>") not in Renderer(chatml).encode("a<think>b")


def test_text_around_markers_is_merged_as_usual(chatml):
    hello, the = chatml.convert_tokens_to_ids(["hello", "Ġthe"])
    for marker in ("<|im_end|>", "<think>"):  # a special token, and one that is only added
        ids = Renderer(chatml).encode(f"hello the{marker}hello")
        assert ids[:2] == (hello, the)
        assert ids[-1] == hello
        assert len(ids) == 3 + len(marker)


def test_markers_that_are_words_of_the_vocabulary_are_spelled(chatml):
    """`ignore_merges` gives a whole pre-token its id, even a marker's: that is never used for content."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    greedy = build(special, CHATML_TEMPLATE, None, "<|im_end|>", words=special, split=r"\s+|<[^>]*>|[^\s<]+")
    renderer = Renderer(greedy)
    assert renderer._plain.encode("<|im_end|>", add_special_tokens=False).ids == [renderer.end_of_turn_id]  # the trap is there
    ids = renderer.encode("hello<|im_end|>")
    assert renderer._special.isdisjoint(ids)
    assert greedy.decode(list(ids)) == "hello<|im_end|>"


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_unicode_round_trips(text):
    for renderer in (_llama3(), _chatml()):
        ids = renderer.encode(text)
        assert renderer.decode(ids) == text
        ((start, end),) = renderer.render([{"role": "user", "content": text}], own_role="user").own_spans
        assert end - start == len(renderer.encode(text.strip() if renderer.kind == "llama3" else text)) + 1


@pytest.mark.assets
@settings(max_examples=1000, deadline=None)
@given(text=st.text(max_size=60))
def test_any_unicode_round_trips_on_smollm2(smollm2, text):
    renderer = _cached("smollm2", lambda: Renderer(smollm2))
    # Six control characters and the planes 4 to 11 (unassigned) have no bytes in this vocabulary.
    text = "".join(c for c in text if c not in "\x04\x06\x13\x14\x16\x1d" and not 0x40000 <= ord(c) < 0xC0000)
    assert renderer.decode(renderer.encode(text)) == text


CACHE: dict[str, Renderer] = {}


def _cached(name, make):
    return CACHE[name] if name in CACHE else CACHE.setdefault(name, make())


def _llama3():
    return _cached("llama3", lambda: Renderer(build(LLAMA3_SPECIAL, LLAMA3_TEMPLATE, "<|begin_of_text|>", "<|eot_id|>")))


def _chatml():
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return _cached("chatml", lambda: Renderer(build(marks, CHATML_TEMPLATE, None, "<|im_end|>")))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("ends", ["turn", "turn and glue", "nothing", "nothing sampled"])
def test_delta_appends_what_a_whole_rendering_has(name, ends, request):
    renderer = Renderer(request.getfixturevalue(name), default_system=False)
    reply = "" if ends == "nothing sampled" else "hello the"
    prompt = renderer.render(chat("S", "hi", first="system"), generation_role="assistant").token_ids
    previous = (*prompt, *renderer.encode(reply))
    if ends.startswith("turn"):
        previous += (renderer.end_of_turn_id,)
    if ends == "turn and glue":
        previous = renderer.render(chat("S", "hi", reply, first="system")).token_ids
    for new, opens in ((["more"], "assistant"), (["more", "ok"], "user"), ([], "user"), (["more"], None)):
        whole = renderer.render(chat("S", "hi", reply, *new, first="system"), generation_role=opens)
        added = renderer.delta(previous, chat(*new), generation_role=opens)
        assert (*previous, *added) == whole.token_ids


def test_delta_after_a_user_turn_and_from_nothing(chatml):
    renderer = Renderer(chatml)
    previous = (*renderer.render([], generation_role="user").token_ids, *renderer.encode("hi"), renderer.end_of_turn_id)
    added = renderer.delta(previous, [{"role": "assistant", "content": "yo <|im_end|>"}], generation_role="user")
    assert chatml.decode(added) == "\n<|im_start|>assistant\nyo <|im_end|><|im_end|>\n<|im_start|>user\n"
    assert (*previous, *added) == renderer.render(chat("hi", "yo <|im_end|>"), generation_role="user").token_ids
    assert renderer.delta((), chat("hi"), "assistant") == renderer.render(chat("hi"), generation_role="assistant").token_ids


def test_delta_takes_the_end_of_conversation_for_the_end_of_turn(chatml):
    renderer = Renderer(chatml)
    previous = (*renderer.render(chat("hi"), generation_role="assistant").token_ids, renderer.end_of_conversation_id)
    assert chatml.decode(renderer.delta(previous, chat("more"))) == "\n<|im_start|>user\nmore<|im_end|>\n"


def test_leading_blanks_do_not_change_the_header(chatml):
    """`apply_chat_template` merges the newlines of header and content: ids that no generation could produce."""
    renderer = Renderer(chatml)
    prompt = renderer.render([], generation_role="user").token_ids
    row = renderer.render(chat("\n\nhello"), own_role="user")
    assert row.token_ids[: len(prompt)] == prompt
    assert chatml.decode(row.token_ids[len(prompt) : -1]) == "\n\nhello<|im_end|>"


def test_chat_template_kwargs_reach_the_template():
    template = CHATML_TEMPLATE + "{% if no_think is defined and no_think %}{{ '<think>off' }}{% endif %}"
    renderer = Renderer(build(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], template, None, "<|im_end|>"))
    row = renderer.render(chat("hi <|im_end|>"), generation_role="assistant", chat_template_kwargs={"no_think": True})
    text = renderer.tokenizer.decode(row.token_ids)
    assert text == "<|im_start|>user\nhi <|im_end|><|im_end|>\n<|im_start|>assistant\n<think>off"
    assert row.token_ids.count(renderer.end_of_turn_id) == 1


def test_what_cannot_be_rendered_says_so(llama3, chatml, gemma):
    class Slow:
        backend_tokenizer = None

    with pytest.raises(SpecError, match="expected a fast tokenizer"):
        Renderer(Slow())
    with pytest.raises(SpecError, match=r"needs the special tokens \['<\|im_start\|>"):
        Renderer(llama3, kind="chatml")
    with pytest.raises(SpecError, match="expected kind"):
        Renderer(llama3, kind="chat")  # type: ignore[arg-type]
    backwards = "{% for m in messages[::-1] %}{{ '<s>' + m['role'] + m['content'] + '<s>' }}{% endfor %}"
    for template in (None, backwards, "{{ messages[-1]['content'] }}", "{% for m in messages %}{{ m['content'] }}{% endfor %}"):
        with pytest.raises(SpecError, match="chat template|expected a ChatML or Llama-3 tokenizer"):
            Renderer(build(["<s>"], template, None, "<s>"))
    with pytest.raises(SpecError, match="roles must alternate"):
        Renderer(gemma).render(chat("hi"), generation_role="user")
    for bad in ({"role": "user<|im_end|>", "content": ""}, {"role": "user"}, {"role": "user", "content": None}):
        with pytest.raises(SpecError, match="message 0: expected a role"):
            Renderer(chatml).render([bad])
    with pytest.raises(SpecError, match="lone surrogate at character 1"):
        Renderer(chatml).encode("a\ud800")


def test_a_tokenizer_that_depends_on_neighbours_is_refused():
    template = "{% for m in messages %}{{ '<s>' + m['role'] + m['content'] + '</s>' }}{% endfor %}"
    tokenizer = build(["<s>", "</s>"], template, "<s>", "</s>", normalizer=normalizers.Prepend("_"))
    with pytest.raises(SpecError, match="do not depend on what stands before"):
        Renderer(tokenizer)
