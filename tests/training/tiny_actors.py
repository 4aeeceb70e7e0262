"""Tokenizers, models and rows so small that PPO on them takes milliseconds; float32 on one core, all from seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from agents.actor_critic import ActorCritic, Rows
from agents.rows import Row
from training.learner import Learner, Settings

END, START, EOT = 0, 1, 2  # <|endoftext|>, <|im_start|>, <|im_end|>, which also pads
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = 300
"""Embeddings; more than any of the tokenizers knows."""
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """ChatML over bytes: ids 0-2 are special, 3-258 the bytes; `words` are put together from their left by BPE merges."""
    vocabulary = {t: i for i, t in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    merges = []
    for word in words:
        spelt = word.replace("\n", "Ċ")
        for end in range(2, len(spelt) + 1):
            if spelt[:end] not in vocabulary:
                vocabulary[spelt[:end]] = len(vocabulary)
                merges.append((spelt[: end - 1], spelt[end - 1]))
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    made.chat_template = TEMPLATE
    return made


def llama(seed: int = 0, **more: Any) -> LlamaForCausalLM:
    """Two layers, pad = eos = end of turn; tied embeddings unless `more` says otherwise."""
    options = {"tie_word_embeddings": True, "max_position_embeddings": 512, "num_hidden_layers": 2, **more}
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=START,
        eos_token_id=EOT,
        pad_token_id=EOT,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(10)  # peaked enough that distributions differ
    return model.eval()


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Learned absolute positions, which a rotary model would not miss; they are made loud."""
    config = GPT2Config(
        vocab_size=WORDS, n_positions=256, n_embd=32, n_layer=2, n_head=4, bos_token_id=START, eos_token_id=EOT, pad_token_id=EOT
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(30)
        model.transformer.wte.weight.mul_(10)
    return model.eval()


def shake(named: dict[str, torch.nn.Parameter], seed: int = 1, by: float = 0.05) -> None:
    """Move parameters a little, so that an adapter is not the identity and a value head is not 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in named.values():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))


def sft_adapter(folder: Path, seed: int = 3, dropout: float = 0.0) -> Path:
    """An SFT policy as a PEFT folder over `llama()`."""
    import peft

    config = peft.LoraConfig(
        r=2, lora_alpha=4, lora_dropout=dropout, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(llama(), config)
    shake({name: p for name, p in model.named_parameters() if "lora_" in name}, seed, 0.2)
    model.save_pretrained(folder)
    return folder


def lora_actor(tokenizer: Any, adapter: Path | None = None, temperature: float = 1.0, seed: int = 0) -> ActorCritic:
    """Over `llama(seed)`; without an adapter its new matrices are drawn from the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ActorCritic.lora(llama(seed), tokenizer, END, adapter, rank=2, temperature=temperature)


def full_actor(tokenizer: Any, model: Any = None, temperature: float = 1.0) -> ActorCritic:
    return ActorCritic.full(llama() if model is None else model, tokenizer, END, temperature)


def make_row(rng: np.random.Generator, utterances: int | None = None, longest: int = 6) -> Row:
    """A dialogue of random ids; contexts hold special tokens, too. The opening's end of conversation is banned."""
    ids: list[int] = []
    owners: list[int] = []
    for k in range(int(rng.integers(1, 5)) if utterances is None else utterances):
        context, own = int(rng.integers(2, 6)), int(rng.integers(1, longest + 1))
        ids += [*rng.integers(0, 259, context).tolist(), *rng.integers(3, 259, own).tolist()]
        owners += [-1] * context + [k] * own
    ids += rng.integers(3, 259, tail := int(rng.integers(0, 4))).tolist()
    owners += [-1] * tail
    return Row(tuple(ids), tuple(owners), tuple(-1.0 if k >= 0 else 0.0 for k in owners), tuple(k == 0 for k in owners))


def make_rows(seed: int, n: int = 6, **more: Any) -> tuple[list[Row], list[list[float]]]:
    """Rows and their credits."""
    rng = np.random.default_rng(seed)
    rows = [make_row(rng, **more) for _ in range(n)]
    return rows, [rng.normal(size=row.utterances).tolist() for row in rows]


def scored(actor: ActorCritic, rows: Rows | Sequence[Row], part: Any = "policy") -> torch.Tensor:
    """Log-probabilities of own tokens, (B, T)."""
    whole = rows if isinstance(rows, Rows) else Rows.of(rows)
    made = learner(actor)
    with torch.no_grad(), actor.using(part):
        return made.score(whole, part)[0]


def valued(actor: ActorCritic, rows: Rows | Sequence[Row]) -> torch.Tensor:
    """V, (B, T)."""
    with torch.no_grad(), actor.using("critic"):
        return actor.values(rows if isinstance(rows, Rows) else Rows.of(rows))


def learner(actor: ActorCritic, **settings: Any) -> Learner:
    """The policy moves from the first update on, unless `critic_warmup` says otherwise."""
    return Learner(actor, Settings(**{"critic_warmup": 0, "minibatch": 4, **settings}), Accelerator(cpu=True))


def weights(found: Learner) -> dict[str, torch.Tensor]:
    """A copy of everything that is trained."""
    return {f"{part} {name}": p.detach().clone() for part, named in found.parts.items() for name, p in named.items()}


def changed(found: Learner, before: dict[str, torch.Tensor]) -> set[str]:
    """Which parts have moved since."""
    return {name.split()[0] for name, now in weights(found).items() if not torch.equal(now, before[name])}
