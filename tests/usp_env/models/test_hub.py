"""Hub models on tiny checkpoints with the files of the real ones: prompts to the byte, ends, labels, poolings."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from usp_env import users
from usp_env.backends.scripted import ScriptedBackend
from usp_env.dialogue import Dialogue
from usp_env.errors import MissingAssetError, SpecError, UnknownNameError
from usp_env.extraction.generator import load_generator
from usp_env.models import embedders, hub
from usp_env.profiles import Profile
from usp_env.rewards.consistency import PromptToLine
from usp_env.rewards.human_likeness import HumanLikeness

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors  # noqa: E402
from tokenizers import models as parts  # noqa: E402

from usp_env.backends import hf  # noqa: E402

BOS, EOS, START, STOP, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
OVER = "<|endconversation|>"
# Of the USP repository: a user header at the end. Of Meta-Llama-3-8B-Instruct: an assistant header.
USP_TEMPLATE = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'].lower() + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>user<|end_header_id|>\n\n' }}{% endif %}"
)
INSTRUCT_TEMPLATE = USP_TEMPLATE.replace(">user<", ">assistant<")
# Of UserLM: one line break, no begin token, no switch: it always ends in an open user header.
USERLM_TEMPLATE = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n' + m['content'] + '<|eot_id|>' }}"
    "{% endfor %}{{ '<|start_header_id|>user<|end_header_id|>' }}"
)
COOK = Profile("a", "You are a cook who wants a soup.", "You are terse.")
OPENING = Dialogue()
TALK = Dialogue.of([{"role": "user", "content": "Got a soup?"}, {"role": "assistant", "content": "Leek soup."}])


def byte_tokenizer(folder: Path, special: list[str], config: dict, plain: tuple[str, ...] = (), types: bool = False) -> Tokenizer:
    """`tokenizer.json` and `tokenizer_config.json` of a byte-level tokenizer without merges, as the hub has them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(parts.BPE({token: i for i, token in enumerate([*special, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])
    first = special[0]  # Llama-3 begins every encoded text with it; encoders close every text too
    single, pair = (f"{first} $A", None) if "eot" in "".join(special) else (f"{first} $A </s>", f"{first} $A </s> </s> $B </s>")
    if types:
        pair = f"{first} $A </s> $B:1 </s>:1"
    marks = [(token, backend.token_to_id(token)) for token in dict.fromkeys([first, *(["</s>"] if pair else [])])]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=marks)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return backend


def language_model(folder: Path, template: str | None, says: dict[str, str], end: str = "special") -> str:
    """A Llama folder in shards; after token t it says `says[t]`, whatever stood before."""
    special = [BOS, EOS, START, STOP, "<|reserved_special_token_0|>", EOT, *([OVER] if end == "special" else [])]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": True,
    }
    if template is not None:
        config["chat_template"] = template
    tokenizer = byte_tokenizer(folder, special, config, (OVER,) if end == "added" else ())
    size, number = tokenizer.get_vocab_size(), tokenizer.token_to_id
    shape = transformers.LlamaConfig(
        vocab_size=size, hidden_size=320, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=8192, tie_word_embeddings=False, bos_token_id=number(BOS), eos_token_id=number(EOS),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = transformers.LlamaForCausalLM(shape)
    with torch.no_grad():
        for weights in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj, model.lm_head):
            weights.weight.zero_()  # the layer adds nothing: the last token alone decides
        model.model.embed_tokens.weight.copy_(torch.eye(size, 320))
        for before, after in says.items():
            model.lm_head.weight[number(after), number(before)] = 1.0
    model.save_pretrained(folder, max_shard_size="300KB")
    assert len(list(folder.glob("model-0000*.safetensors"))) > 1
    assert (folder / "model.safetensors.index.json").is_file()
    return str(folder)


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The text of every prompt that a model in this process read, special tokens shown."""
    read: list[str] = []

    def spy(model, jobs, *args):
        read.extend(tokenizers[-1].decode(job.prompt, skip_special_tokens=False) for job in jobs)
        return original(model, jobs, *args)

    tokenizers: list[Tokenizer] = []
    original, init = hf.decode, hf.HFBackend.__init__
    monkeypatch.setattr(hf, "decode", spy)

    def note(self, model, tokenizer, **options):
        tokenizers.append(tokenizer)
        init(self, model, tokenizer, **options)

    monkeypatch.setattr(hf.HFBackend, "__init__", note)
    return read


USP_SYSTEM = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "You are engaging in a conversation with an AI assistant. Your profile is: \n"
    "You are a cook who wants a soup.\n\nYou are terse.\n "
    "You can say anything you want, either based on the profile or something brand new.<|eot_id|>"
)
USP_OPENING = USP_SYSTEM + "<|start_header_id|>user<|end_header_id|>\n\n"
USP_TALK = (
    USP_SYSTEM + "<|start_header_id|>user<|end_header_id|>\n\nGot a soup?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nLeek soup.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
)


@pytest.mark.parametrize("template", [USP_TEMPLATE, INSTRUCT_TEMPLATE, None], ids=["own", "instruct", "none"])
def test_usp_reads_its_prompt_and_stops_at_the_end_of_turn(template, prompts, tmp_path) -> None:
    folder = language_model(tmp_path / "USP", template, {"Ċ": "h", "h": "i", "i": EOT, EOT: "h"})
    user = users.load(f"usp:{folder}?temperature=0")
    replies = user.respond([OPENING.view_for("user", COOK), TALK.view_for("user", COOK)], [0, 0])
    assert sorted(prompts, key=len) == [USP_OPENING, USP_TALK]  # one begin token, true roles, a user header
    assert [(r.text, r.ended, r.generation.finish_reason) for r in replies] == [("hi", False, "stop")] * 2
    assert len(replies[0].generation.token_ids) == 3  # its eos, <|end_of_text|>, never came


def test_usp_may_end_with_end_of_text_but_never_opens_with_it(prompts, tmp_path) -> None:
    folder = language_model(tmp_path / "USP", USP_TEMPLATE, {"Ċ": EOS}, end="none")
    user = users.load(f"usp:{folder}?temperature=0&max_tokens=2")
    opening, later = user.respond([OPENING.view_for("user", COOK), TALK.view_for("user", COOK)], [0, 0])
    assert (opening.ended, later.ended, later.text) == (False, True, "")


def test_usp_keeps_to_the_context_of_its_card(prompts, tmp_path) -> None:
    folder = language_model(tmp_path / "USP", USP_TEMPLATE, {"Ċ": EOT})
    assert hub.HUB["wangkevin02/USP"].spec.endswith("?max_model_len=4096")
    user = users.load(f"usp:{folder}?max_model_len=4096")
    long = Dialogue.of([{"role": "user", "content": "x" * 4096}, {"role": "assistant", "content": "no"}])
    assert user.respond([long.view_for("user", COOK)], [0])[0].generation.finish_reason == "context_limit"


USERLM_OPENING = "<|start_header_id|>system<|end_header_id|>\nYou are a cook who wants a soup.<|eot_id|><|start_header_id|>user<|end_header_id|>"
USERLM_TALK = (
    USERLM_OPENING + "\nGot a soup?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\nLeek soup.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>"
)


@pytest.mark.parametrize("end", ["special", "added"])
def test_userlm_reads_its_own_template_and_says_the_line_break_itself(end, prompts, tmp_path) -> None:
    folder = language_model(tmp_path / "UserLM", USERLM_TEMPLATE, {STOP: "Ċ", "Ċ": "h", "h": "i", "i": EOT}, end)
    user = users.load(f"userlm:{folder}?temperature=0")
    replies = user.respond([OPENING.view_for("user", COOK), TALK.view_for("user", COOK)], [0, 0])
    assert sorted(prompts, key=len) == [USERLM_OPENING, USERLM_TALK]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "system", "content": COOK.objective}, *(m.chat() for m in TALK)]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == USERLM_TALK
    assert [(r.text, r.ended, r.generation.finish_reason) for r in replies] == [("\nhi", False, "stop")] * 2


@pytest.mark.parametrize("end", ["special", "added"])
@pytest.mark.parametrize("before", [STOP, "Ċ", "i"])
def test_userlm_ends_a_conversation_and_its_mark_is_no_text(before, end, prompts, tmp_path) -> None:
    says = {STOP: "Ċ", "Ċ": "h", "h": "i", "i": EOT, before: OVER}
    user = users.load(f"userlm:{language_model(tmp_path / 'UserLM', USERLM_TEMPLATE, says, end)}?temperature=0&max_tokens=4")
    opening, later = user.respond([OPENING.view_for("user", COOK), TALK.view_for("user", COOK)], [0, 0])
    assert (opening.ended, later.ended, later.text) == (False, True, {STOP: "", "Ċ": "\n", "i": "\nhi"}[before])


GENERATOR_PROMPT = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "You are an expert in creating user profile descriptions based on dialogue analysis.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n"
    "Analyze the user utterances marked by [User] to generate a comprehensive and descriptive user profile\n"
    "[User]: Got a soup?\n---\n[User]: thanks\n---<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


def test_profile_generator_reads_its_prompt(prompts, tmp_path) -> None:
    folder = language_model(tmp_path / "gen", INSTRUCT_TEMPLATE, {"Ċ": "h", "h": "Ċ"})
    generator = load_generator(f"{folder}?max_tokens=3")
    talk = Dialogue.of([*(m.chat() for m in TALK), {"role": "user", "content": "thanks"}])
    made = []
    assert generator.generate([talk], made.extend) == [None]  # it never ends, so that it is cut off and asked once more
    assert [(g.text, g.finish_reason) for g in made] == [("h\nh", "length")] * 2
    assert prompts == [GENERATOR_PROMPT] * 2
    assert generator.context == 4096


ENCODER = ["<s>", "<pad>", "</s>", "<unk>"]  # the first ids of RoBERTa's and Longformer's vocabularies
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 260}


def encoder(folder: Path, config, half: bool = False, head: bool = True, types: bool = False) -> str:
    """A folder with an encoder (and its classifier), with logits far enough apart to tell texts apart."""
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "sep_token": "</s>",
        "cls_token": "<s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    inputs = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**30, "model_input_names": inputs, **names}
    byte_tokenizer(folder, ENCODER, tokenizer, types=types)
    kind = transformers.AutoModelForSequenceClassification if head else transformers.AutoModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = kind.from_config(config)
        with torch.no_grad():
            for name, weights in model.named_parameters():
                if weights.ndim == 2:
                    weights.normal_(0, 0.5 if "embeddings" in name else 0.7)
    (model.half() if half else model).save_pretrained(folder)
    return str(folder)


def longformer(folder: Path, labels: dict[int, str] | None = None, head: bool = True) -> str:
    own = {} if labels is None else {"id2label": labels, "label2id": {name: i for i, name in labels.items()}}
    config = transformers.LongformerConfig(
        **SMALL, attention_window=[8, 8], max_position_embeddings=66, pad_token_id=1, bos_token_id=0, eos_token_id=2, sep_token_id=2,
        type_vocab_size=1, **own,
    )  # fmt: skip
    return encoder(folder, config, half=True, head=head)


def by_hand(folder: str, *texts: str) -> np.ndarray:
    """Softmax of the logits of one text, or of one pair, without padding, in float32."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(**tokenizer(*texts, return_tensors="pt")).logits[0].numpy().astype(np.float64)
    return np.exp(logits) / np.exp(logits).sum()


SAID = ["pls shorter", "Certainly! Here is a list of five things.", "k", "what about soup with leeks", "Sure."]
TABLE = Dialogue.of({"role": ("user", "assistant")[i % 2], "content": SAID[i // 2]} for i in range(10))


@pytest.fixture(scope="module")
def detect(tmp_path_factory: pytest.TempPathFactory) -> str:
    return longformer(tmp_path_factory.mktemp("hub") / "AI_Detect_Model")


def test_p_human_is_the_softmax_of_label_0(detect, monkeypatch) -> None:
    monkeypatch.setattr(hub, "BATCH_ROWS", 2)  # in batches by length, each text beside another: padding changes nothing
    expected = [by_hand(detect, text)[0] for text in SAID]
    assert np.ptp(expected) > 0.1
    reward = HumanLikeness(detect)
    (terms,) = reward([COOK], [TABLE])
    np.testing.assert_allclose(terms.utterance["human"], expected, atol=1e-5)
    np.testing.assert_allclose(hub.detector(detect)(SAID[::-1]), expected[::-1], atol=1e-5)
    assert reward.identity == {"scorer": detect}
    for twin in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):  # the name stays a name
        assert twin == reward


def test_a_long_utterance_loses_its_end(detect) -> None:
    judge = hub.detector(detect)
    text = "Sure. Here is what I found about soups, and a few more words on leeks for the reader."
    assert len(text) > 62 + 10  # 64 positions, two of them special tokens
    np.testing.assert_allclose(judge([text]), judge([text[:62]]), atol=1e-6)
    assert abs(judge([text])[0] - judge([text[:61]])[0]) > 1e-6


def test_a_batch_holds_a_bounded_number_of_tokens(monkeypatch) -> None:
    monkeypatch.setattr(hub, "BATCH_TOKENS", 20)
    monkeypatch.setattr(hub, "BATCH_ROWS", 3)
    # By length 2 3 4 5 9 30: three rows; 5 * 2 = 10, but 9 * 2 = 18 fits and 30 does not fit with anything.
    assert list(hub._batches([9, 2, 30, 3, 5, 4])) == [[1, 3, 5], [4, 0], [2]]


@pytest.mark.parametrize(
    ("labels", "human"), [({0: "AI", 1: "Human-written"}, 1), ({0: "user", 1: "assistant"}, 0), ({0: "LABEL_0", 1: "LABEL_1"}, 0)]
)
def test_the_human_label_is_found_by_name(labels, human, tmp_path) -> None:
    folder = longformer(tmp_path / "detector", labels)
    np.testing.assert_allclose(hub.detector(folder)(["k"]), [by_hand(folder, "k")[human]], atol=1e-5)


def test_detectors_that_cannot_judge(detect, tmp_path) -> None:
    with pytest.raises(SpecError, match=r"one of them human or user .* got \['POSITIVE', 'NEGATIVE'\]"):
        HumanLikeness(longformer(tmp_path / "moods", {0: "POSITIVE", 1: "NEGATIVE"}))
    with pytest.raises(SpecError, match="expected a trained classifier, its weights lack .*classifier"):
        HumanLikeness(longformer(tmp_path / "headless", head=False))
    with pytest.raises(MissingAssetError, match="cannot be read"):
        HumanLikeness(str(tmp_path))
    with pytest.raises(UnknownNameError, match="did you mean 'human-v1'"):
        HumanLikeness("humn-v1")
    with pytest.raises(
        UnknownNameError, match="unknown classifier 'AI_Detect_Model'.*did you mean 'wangkevin02/AI_Detect_Model'"
    ):
        hub.detector("AI_Detect_Model")
    with pytest.raises(SpecError, match="pass \\[text\\]"):
        hub.detector(detect)("k")
    assert hub.detector(detect)([]).shape == (0,)


def test_a_folder_does_not_hide_a_shipped_model(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "human-v1").mkdir()
    (tmp_path / "mine").mkdir()
    assert [hub.names_checkpoint(name) for name in ("human-v1", "mine", "owner/model", "nothing")] == [False, True, True, False]


def nli(folder: Path, family: str, labels: list[str]) -> str:
    own = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}, **SMALL}
    if family == "deberta-v2":  # as microsoft/deberta-v3-base
        config = transformers.DebertaV2Config(
            **own, relative_attention=True, position_buckets=8, max_relative_positions=-1, norm_rel_ebd="layer_norm",
            share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False, max_position_embeddings=32,
            type_vocab_size=0, pad_token_id=1, pooler_hidden_size=16,
        )  # fmt: skip
    elif family == "roberta":
        config = transformers.RobertaConfig(**own, max_position_embeddings=34, pad_token_id=1, type_vocab_size=1)
    else:
        config = transformers.BertConfig(**own, max_position_embeddings=32, pad_token_id=1, type_vocab_size=2)
    return encoder(folder, config, types=family == "bert")


FAMILIES = [
    ("deberta-v2", ["contradiction", "entailment", "neutral"], 1),
    ("roberta", ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], 2),
    ("bert", ["entailment", "not_entailment"], 0),
]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # of transformers' DeBERTa, at import
@pytest.mark.parametrize(("family", "labels", "label"), FAMILIES, ids=[row[0] for row in FAMILIES])
def test_entailment_is_found_by_name_and_is_its_softmax(family, labels, label, tmp_path, monkeypatch) -> None:
    folder = nli(tmp_path / "nli", family, labels)
    monkeypatch.setattr(hub, "BATCH_ROWS", 2)
    judge = hub.verifier(folder)

    def p(premise: str, claim: str) -> float:
        return by_hand(folder, premise, claim)[label]

    turns, facts = (
        [["soup?", "no onions"], [], ["ok"], ["  "], ["soup?", "ok"]],
        ["You eat.", "You eat.", "You go.", "You go.", ""],
    )
    best = max(p("soup?", "You eat."), p("no onions", "You eat."))
    np.testing.assert_allclose(judge.supported(turns, facts), [best, 0, p("ok", "You go."), 0, 0], atol=1e-5)
    lines = np.array([p("You eat.", "soup?"), p("You eat.", "no onions"), 0])
    np.testing.assert_allclose(judge.explains(["You eat.", "You eat.", " "], ["soup?", "no onions", "k"]), lines, atol=1e-5)
    assert abs(p("You eat.", "soup?") - p("soup?", "You eat.")) > 1e-3  # premise and claim are not the same


def test_a_long_premise_keeps_its_end_and_the_claim_is_whole(tmp_path) -> None:
    judge = hub.verifier(nli(tmp_path / "nli", *FAMILIES[1][:2]))
    premise, claim = "You want soups, breads and a list of knives", "leeks pls"  # 32 positions: 4 special tokens, 9, 19
    whole = judge.explains([premise], [claim])
    np.testing.assert_allclose(whole, judge.explains([premise[-19:]], [claim]), atol=1e-6)
    assert abs(whole - judge.explains([premise[-18:]], [claim]))[0] > 1e-6


def test_consistency_takes_an_nli_model(tmp_path) -> None:
    folder = nli(tmp_path / "nli", "roberta", ["contradiction", "entailment", "neutral"])
    cook = Profile("a", "You eat.", "Terse.")
    (terms,) = PromptToLine(folder)([cook], [Dialogue.of([{"role": "user", "content": "soup?"}])])
    np.testing.assert_allclose(terms.utterance["consistency"], [by_hand(folder, "You eat.\n\nTerse.", "soup?")[1]], atol=1e-5)


def test_verifiers_that_cannot_judge(tmp_path) -> None:
    with pytest.raises(SpecError, match=r"label 'entailment', got \['LABEL_0', 'LABEL_1', 'LABEL_2'\]"):
        PromptToLine(nli(tmp_path / "nli", "roberta", ["LABEL_0", "LABEL_1", "LABEL_2"]))
    judge = hub.verifier(nli(tmp_path / "good", *FAMILIES[1][:2]))
    for left, right in ((["a"], "a"), (["a"], ["b", "c"])):
        with pytest.raises(SpecError, match="two lists of one length"):
            judge.explains(left, right)
    assert judge.supported([], []).shape == judge.explains([], []).shape == (0,)


def style(folder: Path, mode: str = "mean_tokens", extra: str = "", inside: str = "", tokens: int = 512) -> str:
    """The files of a sentence-transformers repository such as AnnaWegmann/Style-Embedding; `inside` is an older layout."""
    config = transformers.RobertaConfig(**SMALL, max_position_embeddings=514, pad_token_id=1, type_vocab_size=1)
    encoder(folder / inside, config, head=False)
    kinds = [("Transformer", inside), ("Pooling", "1_Pooling"), *([(extra, f"2_{extra}")] if extra else [])]
    rows = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds)
    ]
    modes = {f"pooling_mode_{name}": name == mode for name in ("cls_token", "mean_tokens", "max_tokens")}
    (folder / "modules.json").write_text(json.dumps(rows), "utf-8")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **modes}), "utf-8")
    limit = json.dumps({"max_seq_length": tokens, "do_lower_case": False})
    (folder / inside / "sentence_bert_config.json").write_text(limit, "utf-8")
    return str(folder)


def states(folder: str, text: str) -> np.ndarray:
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(folder), transformers.AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].numpy()


@pytest.mark.parametrize("inside", ["", "0_Transformer"])
@pytest.mark.parametrize(("mode", "pool"), [("mean_tokens", lambda h: h.mean(0)), ("cls_token", lambda h: h[0])])
def test_sentence_transformers_say_how_they_pool(mode, pool, inside, tmp_path) -> None:
    folder = style(tmp_path / "style", mode, "Normalize", inside)
    vectors = embedders.load(folder)(["pls shorter", "k"])
    for text, vector in zip(["pls shorter", "k"], vectors, strict=True):
        mine = pool(states(str(Path(folder, inside)), text))
        np.testing.assert_allclose(vector, mine / np.linalg.norm(mine), atol=1e-5)


def test_sentence_transformers_say_how_much_they_read(tmp_path) -> None:
    embed = embedders.load(style(tmp_path / "style", tokens=8))
    np.testing.assert_allclose(*embed(["soup with leeks", "soup w"]), atol=1e-6)  # 8 tokens, two of them special
    assert not np.allclose(*embed(["soup with leeks", "soup "]), atol=1e-3)


def test_sentence_transformers_that_are_not_known(tmp_path) -> None:
    with pytest.raises(SpecError, match="got Transformer, Pooling with pooling_mode_max_tokens"):
        embedders.load(style(tmp_path / "max", "max_tokens"))
    with pytest.raises(SpecError, match="got Transformer, Pooling, Dense with"):
        embedders.load(style(tmp_path / "dense", extra="Dense"))


PROGRAM = """
import json, sys
from usp_env.models import embedders, hub
from usp_env.dialogue import Dialogue
from usp_env.profiles import Profile
from usp_env.rewards.human_likeness import HumanLikeness
(terms,) = HumanLikeness("wangkevin02/AI_Detect_Model")(
    [Profile("a", "You.", "You.")], [Dialogue.of([{"role": "user", "content": "pls shorter"}])]
)
vectors = {name: embedders.load(name)(["pls shorter"])[0].tolist() for name in ("style-wegmann", "simcse", "auto")}
json.dump([terms.value, vectors], sys.stdout)
"""


def test_hub_ids_are_found_in_the_local_cache(detect, tmp_path) -> None:
    config = transformers.RobertaConfig(**SMALL, max_position_embeddings=514, pad_token_id=1, type_vocab_size=1)
    plain = encoder(tmp_path / "simcse", config, head=False)
    repositories = {hub.HUB["AnnaWegmann/Style-Embedding"]: style(tmp_path / "s", "cls_token")}
    repositories |= {hub.HUB["wangkevin02/AI_Detect_Model"]: detect, hub.HUB["princeton-nlp/sup-simcse-roberta-large"]: plain}
    for model, folder in repositories.items():
        cached = tmp_path / "hub" / f"models--{model.repository.replace('/', '--')}"
        shutil.copytree(folder, cached / "snapshots" / ("0" * 40))
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("0" * 40, "ascii")
    own = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "USP_ENV_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, encoding="utf-8", env=own)
    assert done.returncode == 0, done.stderr
    human, vectors = json.loads(done.stdout)
    assert human == pytest.approx(by_hand(detect, "pls shorter")[0], abs=1e-5)
    first, mean = states(str(tmp_path / "s"), "pls shorter")[0], states(plain, "pls shorter").mean(0)
    np.testing.assert_allclose(vectors["style-wegmann"], first / np.linalg.norm(first), atol=1e-5)
    np.testing.assert_allclose(vectors["simcse"], mean / np.linalg.norm(mean), atol=1e-5)
    assert vectors["auto"] == vectors["simcse"]


def test_the_records_name_loaders_that_exist() -> None:
    assert len(hub.HUB) == 7
    for repository, model in hub.HUB.items():
        assert repository == model.repository
        assert repository in model.spec or model.spec in ("simcse",)
        if model.role == "user":
            assert users.load(model.spec, lambda spec: ScriptedBackend(["hi"])).spec == model.spec
    assert embedders.STYLE in hub.HUB
    assert embedders.SIMCSE in hub.HUB
