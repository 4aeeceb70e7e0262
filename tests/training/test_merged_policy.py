"""A policy as a model by itself: what is sent to another engine speaks as the adapter does."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_actors import byte_tokenizer, llama

from agents.actor_critic import ActorCritic


def loud(actor: ActorCritic) -> ActorCritic:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in ("policy", "critic"):
            for parameter in actor.trained(part).values():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return actor


@pytest.mark.parametrize("tied", [True, False])
def test_the_merged_policy_speaks_as_its_adapter(tied: bool) -> None:
    base = llama(tie_word_embeddings=tied)
    alone = copy.deepcopy(base)
    actor = loud(ActorCritic.lora(base, byte_tokenizer(), rank=4))
    missing, unexpected = alone.load_state_dict(dict(actor.merged()), strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if tied else [])
    ids = torch.arange(3, 40)[None]
    with actor.using("policy"), torch.no_grad():
        wanted = actor.models["policy"](ids).logits
        assert not torch.allclose(wanted, llama(tie_word_embeddings=tied)(ids).logits, atol=1e-2)
        torch.testing.assert_close(alone(ids).logits, wanted, atol=1e-4, rtol=1e-4)


def test_a_whole_model_is_given_as_it_is() -> None:
    model = llama()
    actor = ActorCritic.full(model, byte_tokenizer())
    given = dict(actor.merged())
    assert given.keys() == dict(model.named_parameters()).keys()
    assert all(given[name] is not None and not given[name].requires_grad for name in given)


def test_the_reference_without_an_adapter_is_the_base() -> None:
    base = llama()
    before = {name: weight.clone() for name, weight in base.named_parameters()}
    actor = loud(ActorCritic.lora(base, byte_tokenizer(), rank=4))
    given = dict(actor.merged("ref"))
    assert given.keys() == before.keys()
    assert all(torch.equal(given[name], before[name]) for name in before)
