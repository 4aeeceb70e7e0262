"""Published models of the Hugging Face hub: what each is for, and loaders of the classifiers among them.

    detector("wangkevin02/AI_Detect_Model")(["pls make it shorter"])            P(human), (n,)
    verifier("cross-encoder/nli-deberta-v3-base").explains([profile], [turn])   P(profile entails turn), (n,)

Both take a folder of the same layout too, and rewards take their names: `HumanLikeness("wangkevin02/AI_Detect_Model")`,
`PromptToLine("cross-encoder/nli-deberta-v3-base")`. Language models are specs of users and generators, encoders are names of
`usp_env.models.embedders`; `HUB` says which. Card: `docs/models/hub.md`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from usp_env.errors import MissingAssetError, SpecError, UnknownNameError, require
from usp_env.models import assets, scorers
from usp_env.models.features import check_unicode

BATCH_ROWS, BATCH_TOKENS = 64, 16_384  # a batch holds at most this many rows, and tokens with their padding
CONTEXT = 512  # of a checkpoint that does not say

FloatArray = npt.NDArray[np.float64]
Role = Literal["user", "profile generator", "human-likeness", "style", "embedder", "nli"]

_POSITIONS_AFTER_PAD = ("roberta", "xlm-roberta", "camembert", "longformer")  # positions begin at pad_token_id + 1
_HUMAN = {"human", "user", "person", "real"}
_UNNAMED = re.compile(r"(?:label_?)?\d+")


@dataclass(frozen=True, slots=True)
class HubModel:
    """A published model.

    Args:
        repository: Its id on the hub.
        role: Its part in the project.
        spec: What names it here, for the loader of its role.
        base: What it was trained from; its tokenizer is the repository's own.
        template: Form of its prompts; empty for an encoder.
        license: SPDX identifier, or what is known.
        context: Most tokens of its input (and output).
        note: One line.
    """

    repository: str
    role: Role
    spec: str
    base: str
    template: str
    license: str
    context: int
    note: str


_LLAMA3 = "Llama 3 Community License of its base; the repository's own is not known"
HUB: Mapping[str, HubModel] = {
    model.repository: model
    for model in (
        HubModel("wangkevin02/USP", "user", "usp:wangkevin02/USP?max_model_len=4096", "Llama-3-8B (base)", "llama3, user header",
            "MIT", 4096, "The paper's simulator; its tokenizer's eos is <|end_of_text|>, its turns end in <|eot_id|>"),
        HubModel("microsoft/UserLM-8b", "user", "userlm:microsoft/UserLM-8b?max_model_len=4096", "Llama-3 8B (base)",
            "its own, which always ends in an open user header", "MIT", 4096,
            "The intent is the system message; ends a conversation with <|endconversation|>"),
        HubModel("wangkevin02/Profile_Generator", "profile generator", "wangkevin02/Profile_Generator", "Llama-3-8B-Instruct",
            "llama3", _LLAMA3, 4096, "User turns to two paragraphs, objective facts and then subjective characteristics"),
        HubModel("wangkevin02/AI_Detect_Model", "human-likeness", "wangkevin02/AI_Detect_Model", "allenai/longformer-base-4096",
            "", "Apache-2.0 of its base; the repository's own is not known", 4096, "Label 0 is the user; one utterance each"),
        HubModel("AnnaWegmann/Style-Embedding", "style", "AnnaWegmann/Style-Embedding", "roberta-base", "",
            "not stated on its card", 512, "Mean over tokens; also embedder 'style-wegmann'"),
        HubModel("princeton-nlp/sup-simcse-roberta-large", "embedder", "simcse", "roberta-large", "",
            "MIT of its code; the repository's own is not known", 512,
            "Mean over tokens, as in the paper's scripts; SimCSE's authors take the first token's state"),
        HubModel("cross-encoder/nli-deberta-v3-base", "nli", "cross-encoder/nli-deberta-v3-base", "microsoft/deberta-v3-base", "",
            "Apache-2.0", 512, "Not the paper's, which names no NLI model; any checkpoint with a label 'entailment' does"),
    )
}  # fmt: skip


class Classifier:
    """Class probabilities of texts, or of pairs of texts, from a sequence classifier; keeps nothing between calls.

    Args:
        model: A `transformers` sequence classifier in evaluation mode.
        tokenizer: Its tokenizer; what is too long is cut on its `truncation_side`, of a pair the longer text first.
        name: Repository or folder.

    Attributes:
        max_tokens: Most tokens of an input, special tokens counted.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.name = name
        self.config = model.config
        self.max_tokens = _context(model.config, tokenizer)
        self._model, self._tokenizer = model, tokenizer
        self._lock = threading.Lock()  # fast tokenizers keep truncation as state

    def __call__(self, texts: Sequence[str], seconds: Sequence[str] | None = None) -> FloatArray:
        """Probabilities of `n` texts or pairs, (n, labels), in float32 arithmetic; rows sum to 1."""
        if not texts:
            return np.zeros((0, self.config.num_labels))
        check_unicode([*texts, *(seconds or ())])
        with self._lock:
            encoded = self._tokenizer(
                list(texts),
                None if seconds is None else list(seconds),
                truncation="longest_first",
                max_length=self.max_tokens,
                return_attention_mask=True,
            )
        rows = [{key: encoded[key][i] for key in encoded} for i in range(len(texts))]
        out = np.empty((len(rows), self.config.num_labels))
        for batch in _batches([len(row["input_ids"]) for row in rows]):
            out[batch] = self._forward([rows[i] for i in batch])
        return out

    def _forward(self, rows: Sequence[Mapping[str, list[int]]]) -> FloatArray:
        import torch

        width = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self._tokenizer.pad_token_id, "token_type_ids": self._tokenizer.pad_token_type_id}
        padded = {key: [row[key] + [fill.get(key, 0)] * (width - len(row[key])) for row in rows] for key in rows[0]}
        with torch.inference_mode():
            inputs = {key: torch.tensor(value, device=self._model.device) for key, value in padded.items()}
            logits = self._model(**inputs).logits.float()
            p: FloatArray = torch.softmax(logits, dim=-1).cpu().numpy().astype(np.float64)
        return p


class Detector:
    """P(human) of single utterances (`usp_env.rewards.human_likeness.TextScorer`), by a classifier such as the paper's.

    Args:
        classify: Its labels name the human (human, user, person, real), or are numbers: then 0 is the human.
    """

    def __init__(self, classify: Classifier) -> None:
        self.name = classify.name
        self._classify, self._label = classify, human_label(classify)

    def __call__(self, texts: Sequence[str]) -> FloatArray:
        """P(human) of `n` utterances, each on its own: (n,), in [0, 1]. What is too long loses its end."""
        if isinstance(texts, str):
            raise SpecError(f"expected a list of texts, got one str {texts!r:.80}: pass [text]")
        return self._classify(texts)[:, self._label]


class EntailmentVerifier:
    """Does a text support a claim? P(entailment) of premise and claim, by an NLI cross-encoder.

    The interface of `usp_env.models.scorers.FactVerifier`. A pair that is too long loses tokens at the left of the longer text:
    of a long profile or turn, the end is read. An NLI model knows declarative sentences: a person's request is seldom entailed by
    their profile in its sense, so that values of `explains` are low and tell persons apart rather than right from wrong.

    Args:
        classify: One of its labels is called `entailment`.
    """

    def __init__(self, classify: Classifier) -> None:
        self.name = classify.name
        self._classify, self._label = classify, entailment_label(classify)

    def supported(self, turns: Sequence[Sequence[str]], facts: Sequence[str]) -> FloatArray:
        """Largest over a person's turns of P(turn entails fact), of `n` pairs.

        The turns are premises one by one, not joined: a fact is learnt from what the person said at one time, and joined turns
        would not fit. What follows only from several turns together is missed.

        Args:
            turns: A dialogue's user turns for each pair.
            facts: An atomic statement for each pair.

        Returns:
            (n,), in [0, 1]; 0 where there is no turn with text, or no fact.
        """
        _check(turns, facts)
        asked = [(turn, fact) for own, fact in zip(turns, facts, strict=True) for turn in own]
        p = self._entailed(asked)
        return np.array([max((p[turn, fact] for turn in own), default=0.0) for own, fact in zip(turns, facts, strict=True)])

    def explains(self, profiles: Sequence[str], turns: Sequence[str]) -> FloatArray:
        """P(profile entails the user turn) of `n` pairs: (n,), in [0, 1]; 0 where either is blank."""
        _check(profiles, turns)
        asked = list(zip(profiles, turns, strict=True))
        p = self._entailed(asked)
        return np.array([p[pair] for pair in asked])

    def _entailed(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float]:
        judged = [pair for pair in dict.fromkeys(pairs) if pair[0].strip() and pair[1].strip()]
        p = self._classify([premise for premise, _ in judged], [claim for _, claim in judged])[:, self._label]
        return {**dict.fromkeys(pairs, 0.0), **dict(zip(judged, p.tolist(), strict=True))}


@cache
def detector(name: str) -> Detector:
    """The human-likeness classifier of a repository or folder, loaded once a process.

    Raises:
        MissingAssetError: The weights are not on this machine and cannot be had.
        MissingExtraError: torch or transformers is not installed.
        SpecError: It has no trained classifier, or labels that do not tell the human.
        UnknownNameError: Neither a folder nor a hub id.
    """
    return Detector(_load(name, "right"))


@cache
def verifier(name: str) -> EntailmentVerifier:
    """The NLI cross-encoder of a repository or folder, loaded once a process; raises what `detector` raises."""
    return EntailmentVerifier(_load(name, "left"))


def names_checkpoint(name: str) -> bool:
    """Whether a name is that of a folder or a hub id (owner/model) rather than of a shipped model.

    Example:
        >>> names_checkpoint("wangkevin02/AI_Detect_Model"), names_checkpoint("human-v1")
        (True, False)
    """
    return "/" in name or (name not in scorers.NAMES and Path(name).is_dir())


def human_label(classify: Classifier) -> int:
    """Index of the label that stands for a person."""
    names = [str(classify.config.id2label[i]) for i in range(classify.config.num_labels)]
    human = [i for i, name in enumerate(names) if _HUMAN & set(re.findall("[a-z]+", name.lower()))]
    if len(names) > 1 and len(human) == 1:
        return human[0]
    if len(names) > 1 and all(_UNNAMED.fullmatch(name.lower()) for name in names):
        return 0
    raise SpecError(
        f"detector {classify.name!r}: expected two or more labels, one of them human or user (or mere numbers, 0 the human), "
        f"got {names}; name them in id2label of its config.json"
    )


def entailment_label(classify: Classifier) -> int:
    """Index of the label `entailment`, whatever the order."""
    labels = {str(name).lower(): int(index) for name, index in classify.config.label2id.items()}
    if "entailment" not in labels:
        raise SpecError(
            f"verifier {classify.name!r}: expected an NLI model with a label 'entailment', "
            f"got {sorted(classify.config.label2id)}; name it in label2id and id2label of its config.json"
        )
    return labels["entailment"]


def _load(name: str, truncation_side: str) -> Classifier:
    if not names_checkpoint(name):
        raise UnknownNameError("classifier", name, [*HUB, "a folder", "a hub id (owner/model)"])
    torch, transformers = require("torch", "hf"), require("transformers", "hf")
    local = Path(name).is_dir() or assets.offline()
    try:
        # What a checkpoint lacks is drawn at random: the caller's random state must not move.
        with torch.random.fork_rng(devices=[]):
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=local, truncation_side=truncation_side)
            model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                name, local_files_only=local, dtype=torch.float32, output_loading_info=True
            )
    except assets.unreadable() as error:
        raise MissingAssetError(
            f"classifier {name!r}: expected its weights and tokenizer there, but they cannot be read ({error}); "
            f"`hf download {name}` brings a hub model"
        ) from error
    if info["missing_keys"]:
        raise SpecError(
            f"classifier {name!r}: expected a trained classifier, its weights lack {sorted(info['missing_keys'])[:4]}"
        )
    return Classifier(model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, name)


def _context(config: Any, tokenizer: Any) -> int:
    positions = int(getattr(config, "max_position_embeddings", 0) or 0)
    if config.model_type in _POSITIONS_AFTER_PAD:
        positions -= config.pad_token_id + 1
    return min((n for n in (positions, int(tokenizer.model_max_length)) if 0 < n < 10**9), default=CONTEXT)


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in batches of similar length, which pads least."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) == BATCH_ROWS or lengths[i] * (len(batch) + 1) > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _check(left: Sequence[Any], right: Sequence[Any]) -> None:
    if isinstance(left, str) or isinstance(right, str) or len(left) != len(right):
        raise SpecError(f"expected two lists of one length, got {left!r:.60} and {right!r:.60}")
