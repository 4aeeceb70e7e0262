"""A language model that acts, the reference it must stay near, and a critic that tells what a state is worth.

    actor = ActorCritic.lora(base, tokenizer, adapter="…/usp-mini-sft")   # one frozen base, adapters `policy`, `ref`, `critic`
    actor = ActorCritic.full(model, tokenizer)                            # three models; 16 bytes a weight and more
    with actor.using("policy"):
        logits = actor.logits(rows)                                       # (N, V) of the N own tokens

The three of the LoRA form share the base's weights, so that a critic and a reference cost a few megabytes. Where the SFT policy
is an adapter, `ref` is a frozen copy of it; where it is a whole model, `ref` is that model with every adapter left out.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agents.rows import Row
from usp_env.backends.adapters import speaking_as
from usp_env.errors import SpecError, require

require("torch", "train")
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

Part = Literal["policy", "ref", "critic"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, slots=True)
class Rows:
    """Dialogues as one batch, padded on the right.

    Args:
        token_ids: (B, T).
        attention_mask: (B, T), 1 on the row, 0 on padding; made from lengths, never from ids.
        utterance_ids: (B, T), −1 off own tokens.
        banned: (B, T) bool, own tokens that could not have been the end of the conversation.
        behaviour: (B, T) log-probabilities at sampling time, 0 off own tokens.
    """

    token_ids: Tensor
    attention_mask: Tensor
    utterance_ids: Tensor
    banned: Tensor
    behaviour: Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device | str = "cpu") -> Rows:
        """A batch of rows, as long as its longest."""
        length = max(len(row.token_ids) for row in rows)

        def padded(values: Sequence[Sequence[float]], fill: float, dtype: torch.dtype) -> Tensor:
            made = torch.full((len(values), length), fill, dtype=dtype)
            for b, row in enumerate(values):
                made[b, : len(row)] = torch.tensor(row, dtype=dtype)
            return made.to(device)

        return cls(
            padded([row.token_ids for row in rows], 0, torch.long),
            padded([[1] * len(row.token_ids) for row in rows], 0, torch.long),
            padded([row.utterance_ids for row in rows], -1, torch.long),
            padded([row.banned for row in rows], 0, torch.bool),
            padded([row.behaviour for row in rows], 0.0, torch.float32),
        )

    @property
    def own(self) -> Tensor:
        """(B, T) bool."""
        return self.utterance_ids >= 0

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model reads; positions count from each row's first token."""
        positions = (self.attention_mask.cumsum(1) - 1).clamp(min=0)
        return {"input_ids": self.token_ids, "attention_mask": self.attention_mask, "position_ids": positions}


class ActorCritic:
    """Policy, reference and critic; see the module's docstring. `lora` and `full` make one.

    Args:
        models: The causal language model behind each part: one `PeftModel` for all three, or three models.
        adapters: Adapter of each part; None: no adapter. Empty where the models are three.
        head: Linear layer from the critic's last hidden state to V.
        vocabulary: Ids that the tokenizer knows: embeddings may be padded, and nothing behind is ever sampled.
        end_id: The end of the conversation, or None.
        temperature: That the policy acts at; scored log-probabilities are those of the distribution sampled from.
    """

    def __init__(
        self,
        models: Mapping[Part, Any],
        adapters: Mapping[Part, str | None],
        head: torch.nn.Linear,
        vocabulary: int,
        end_id: int | None,
        temperature: float = 1.0,
    ) -> None:
        self.models, self.adapters, self.head = dict(models), dict(adapters), head
        self.vocabulary, self.end_id, self.temperature = vocabulary, end_id, temperature

    @classmethod
    def lora(
        cls,
        base: Any,
        tokenizer: Any,
        end_id: int | None = None,
        adapter: str | Path | None = None,
        rank: int = 16,
        temperature: float = 1.0,
    ) -> ActorCritic:
        """One base, three adapters.

        Args:
            base: A causal language model without adapters; it is frozen.
            tokenizer: Its tokenizer.
            end_id: The end of the conversation.
            adapter: PEFT folder of the SFT policy: `policy`, `ref` and `critic` start from it. None: the base is the SFT
                policy; `policy` and `critic` start as adapters that change nothing, and `ref` is the base.
            rank: Of new adapters.
            temperature: See `ActorCritic`.
        """
        peft = require("peft", "train")
        base.requires_grad_(False)
        if adapter is not None:
            model = peft.PeftModel.from_pretrained(base, str(adapter), adapter_name="policy", is_trainable=True)
            model.load_adapter(str(adapter), "ref", is_trainable=False)
            model.load_adapter(str(adapter), "critic", is_trainable=True)
        else:
            config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM")
            model = peft.get_peft_model(base, config, adapter_name="policy")
            model.add_adapter("critic", copy.deepcopy(config))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".policy." in name or ".critic." in name)
        model.eval()  # an adapter that was trained with dropout comes with it
        adapters: dict[Part, str | None] = {"policy": "policy", "ref": "ref" if adapter is not None else None, "critic": "critic"}
        models: dict[Part, Any] = {"policy": model, "ref": model, "critic": model}
        return cls(models, adapters, new_head(base), _vocabulary(tokenizer), end_id, temperature)

    @classmethod
    def full(cls, model: Any, tokenizer: Any, end_id: int | None = None, temperature: float = 1.0) -> ActorCritic:
        """Three models, of which `policy` and `critic` are trained whole and `ref` stays as it is."""
        model.eval()
        models: dict[Part, Any] = {"policy": model, "ref": copy.deepcopy(model), "critic": copy.deepcopy(model)}
        models["policy"].requires_grad_(True)
        models["ref"].requires_grad_(False)
        models["critic"].requires_grad_(True)
        models["critic"].get_output_embeddings().requires_grad_(False)  # a critic speaks no words
        models["critic"].get_input_embeddings().requires_grad_(True)  # unless its words are its embeddings, which are read
        return cls(models, {}, new_head(model), _vocabulary(tokenizer), end_id, temperature)

    @contextlib.contextmanager
    def using(self, part: Part) -> Iterator[None]:
        """One part in place; backward passes belong inside, since checkpointed layers are computed again there."""
        if not self.adapters:
            yield
            return
        with speaking_as(self.models[part], self.adapters[part]):
            yield

    def logits(self, rows: Rows, part: Part = "policy") -> Tensor:
        """Where each own token was chosen from: (N, vocabulary), rows in order, float32, divided by the temperature.

        They are computed at the columns before own tokens alone, and kept in float32 at own tokens alone: a row of 2,000 tokens
        and 128,000 words would be a gigabyte.
        """
        keep = rows.own[:, 1:].any(0).nonzero().squeeze(1)
        logits = self.models[part](**rows.inputs, logits_to_keep=keep, use_cache=False).logits
        found: Tensor = logits[rows.own[:, keep + 1]][:, : self.vocabulary].float() / self.temperature
        return found

    def values(self, rows: Rows) -> Tensor:
        """V of the state before each own token, (B, T), 0 off own tokens; float32."""
        model = self.models["critic"]
        decoder = (model.get_base_model() if self.adapters else model).get_decoder()
        states = decoder(**rows.inputs, use_cache=False).last_hidden_state[:, :-1]
        with torch.autocast(states.device.type, enabled=False):  # which would round V to 8 bits
            return scatter(self.head(states[rows.own[:, 1:]].float()).squeeze(-1), rows.own)

    def merged(self, part: Part = "policy") -> Iterator[tuple[str, Tensor]]:
        """Name to weight of one part as a model by itself, under the base's own names: what another engine loads.

        W + (α/r)·B·A in float32, then in W's dtype; one weight at a time, so that no second model is held.
        """
        model, adapter = self.models[part], self.adapters.get(part)
        if not self.adapters:
            yield from ((name, weight.detach()) for name, weight in model.named_parameters())
            return
        base = model.get_base_model()
        for name, weight in base.named_parameters():
            if ".lora_" in name:
                continue
            layer = base.get_submodule(name.rpartition(".base_layer.")[0]) if ".base_layer.weight" in name else None
            if layer is not None and adapter in layer.lora_A:
                with torch.no_grad():
                    added = layer.get_delta_weight(adapter)
                    yield name.replace(".base_layer", ""), (weight.float() + added.float()).to(weight.dtype)
            else:
                yield name.replace(".base_layer", ""), weight.detach()

    def trained(self, part: Part) -> dict[str, torch.nn.Parameter]:
        """Name to parameter of what an optimiser moves: of `policy` or of `critic` (its head with it)."""
        if self.adapters:
            named = self.models[part].named_parameters()
            found = {name: p for name, p in named if p.requires_grad and f".{self.adapters[part]}." in name}
        else:
            found = {name: p for name, p in self.models[part].named_parameters() if p.requires_grad}
        head = {f"head.{name}": p for name, p in self.head.named_parameters()} if part == "critic" else {}
        if not found:
            raise SpecError(f"{part}: expected trainable parameters, found none")
        return found | head


def new_head(model: Any) -> torch.nn.Linear:
    """A value head that says 0 of every state, where the model's last layer is."""
    where = next(model.get_decoder().parameters()).device
    head = torch.nn.Linear(model.config.get_text_config().hidden_size, 1).to(where)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return head


def _vocabulary(tokenizer: Any) -> int:
    return int(max(tokenizer.get_vocab().values())) + 1


def scatter(values: Tensor, own: Tensor) -> Tensor:
    """(N,) values of own tokens in the order of rows, as (B, T) with 0 elsewhere."""
    return torch.zeros(own.shape, dtype=values.dtype, device=values.device).masked_scatter(own, values)
