"""A world so small that an update takes a fraction of a second: a byte-level Llama, sixteen people, rewards that count letters."""

from __future__ import annotations

import importlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from usp_env.dialogue import Dialogue
from usp_env.errors import BackendError, UspError
from usp_env.profiles import Profile
from usp_env.records import RewardTerms

HERE = Path(__file__).resolve().parent
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def letters(profile: Profile, dialogue: Dialogue) -> float:
    """The share of ASCII letters in what the user said."""
    said = "".join(dialogue.utterances("user"))
    return sum(c.isascii() and c.isalpha() for c in said) / len(said)


class Wanting:
    """`letters`, but a model fails on some dialogues, or on all; and some cannot be scored."""

    name, when = "wanting", "end"

    def __call__(self, profiles: Sequence[Profile], dialogues: Sequence[Dialogue]) -> list[RewardTerms | BackendError | None]:
        found: list[RewardTerms | BackendError | None] = []
        for profile, dialogue in zip(profiles, dialogues, strict=True):
            place = sum(map(ord, dialogue.utterances("user")[0])) % 3
            terms = RewardTerms(dialogue={"wanting": letters(profile, dialogue)})
            found.append((BackendError("the reward service timed out after 3 attempts"), None, terms)[place])
        return found


wanting = Wanting()


def timing_out(profile: Profile, dialogue: Dialogue) -> float:
    raise BackendError("the reward service timed out after 3 attempts")


def tokenizer(characters: str | None = None):
    """Of bytes, or of a few characters: whatever else is in a text is left out. Ids 0 to 2 are the special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if characters is None else characters
    made = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *alphabet])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    return fast


def llama(vocabulary: int, seed: int = 0, size: int = 16):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size,
        intermediate_size=2 * size,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def make(folder: Path) -> Path:
    """All that a run needs: a bank and its fitted sampler in a home with the real assets, which `USP_ENV_HOME` then names."""
    from usp_env.models import assets
    from usp_env.sampling import load_sampler

    home = folder / "home"
    home.mkdir()
    for entry in assets.home().iterdir():
        if entry.name != "samplers":
            (home / entry.name).symlink_to(entry)
    os.environ["USP_ENV_HOME"] = str(home)
    trades = "cook,sew,sail,paint,weld,teach,farm,bake,code,sing,dance,row,fish,knit,type,drive".split(",")
    lines = [
        {
            "id": f"p{i}",
            "split": "val" if i > 11 else "train",
            "profile": {
                "objective": f"You {trade} in town {i}.",
                "subjective": f"You write {'!' * i} like someone who can {trade}.",
            },
        }
        for i, trade in enumerate(trades)
    ]
    (folder / "bank.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # twelve people are too few for UMAP, and it says so
        load_sampler(folder / "bank.jsonl")
    llama(259).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    return folder


def options(world: Path, out: Path, **more: object) -> list[str]:
    """Arguments of a run of four updates that takes seconds."""
    given = {
        "out": out,
        "policy": world / "model",
        "bank": world / "bank.jsonl",
        "pool": 8,
        "pool_from": 60,
        "assistant": "echo",
        "reward": "rlcc_world:letters",
        "dtype": "float32",
        "rank": 2,
        "updates": 4,
        "dialogues": 4,
        "turns": 2,
        "max_tokens": 6,
        "minibatch": 2,
        "micro": 4,
        "lr": 0.01,
        "critic_lr": 0.01,
        "stop_kl": 1e9,
        "validate_every": 0,
        "validate_n": 3,
        "checkpoint_every": 1,
        **more,
    }
    words = []
    for name, value in given.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


def train(words: list[str], variables: dict[str, str] | None = None) -> None:
    """A run in a process of its own."""
    import torch

    os.environ |= variables or {}
    torch.set_num_threads(1)
    rlcc = importlib.import_module("training.rlcc")
    if "RANK" not in os.environ:
        return rlcc.main(words)
    args = rlcc.parser(None).parse_args(words)
    told = args.out.with_name(f"rank-{os.environ['RANK']}.pt")
    try:
        run = rlcc.Rlcc(args)
        run.run()
    except UspError as error:
        return torch.save(f"{type(error).__name__}: {error}", told)
    torch.save({f"{part}|{name}": p.data for part, named in run.learner.parts.items() for name, p in named.items()}, told)


def records(out: Path) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl` without what a clock gave."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith("_seconds")} for line in lines]


def files(out: Path) -> dict[str, bytes]:
    """What a run holds byte by byte; of what a clock has a part in, the rest."""
    found = {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}
    found["metrics.jsonl"] = json.dumps(records(out)).encode()
    for name in [name for name in found if name.endswith("state.json")]:
        state = json.loads(found[name])
        found[name] = json.dumps({key: value for key, value in state.items() if key != "seconds"}).encode()
    for name in [name for name in found if name.endswith("arguments.json")]:
        del found[name]  # it names the folder
    return found
