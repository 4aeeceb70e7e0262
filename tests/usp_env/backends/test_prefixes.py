"""The store of keys and values, and that a backend with it says what one without it says."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from test_hf import tiny, tokenizer  # noqa: E402, F401 - a fixture

from usp_env.backends.base import Request, Sampling  # noqa: E402
from usp_env.backends.decoding import keeps_states, slices  # noqa: E402
from usp_env.backends.hf import HFBackend  # noqa: E402
from usp_env.backends.prefixes import BLOCK, PrefixStore  # noqa: E402


def states(ids: list[int]) -> object:
    """Recognisable: every column holds its token."""
    return torch.tensor(ids, dtype=torch.float32).view(1, 1, 1, -1, 1).expand(1, 2, 1, -1, 2).clone()


def found(store: PrefixStore, prompt: list[int], owner: str = "a") -> list[int]:
    got = store.find(owner, prompt)
    return [] if got is None else [int(x) for x in got[0, 0, 0, :, 0]]


def test_the_longest_common_beginning_is_found_and_no_more() -> None:
    store = PrefixStore(2**20)
    row = list(range(50))
    store.keep("a", row, states(row))
    assert found(store, [*row, 7, 8]) == row
    assert found(store, [*row[:37], 99, 98]) == row[:37]
    assert found(store, row) == row[:49]  # the last token has to be fed
    assert found(store, row[:BLOCK]) == []  # less than a block
    assert found(store, [99, *row[1:]]) == []
    assert found(store, [*row, 7], owner="b") == []


def test_a_row_takes_the_place_of_what_it_goes_on_from() -> None:
    store = PrefixStore(2**20)
    for end in (20, 40, 60):
        store.keep("a", list(range(end)), states(list(range(end))))
    assert len(store) == 1
    store.keep("a", [*range(40), 99, 99], states([*range(40), 99, 99]))  # a fork
    assert len(store) == 2
    assert found(store, list(range(61))) == list(range(60))
    assert store.bytes == sum(4 * 2 * 2 * n for n in (60, 42))


def test_the_least_recently_used_makes_room() -> None:
    size = states(list(range(32))).numel() * 4
    store = PrefixStore(2 * size)
    rows = [[first, *range(31)] for first in (100, 101, 102)]
    store.keep("a", rows[0], states(rows[0]))
    store.keep("a", rows[1], states(rows[1]))
    found(store, rows[0])
    store.keep("a", rows[2], states(rows[2]))
    assert [bool(found(store, row)) for row in rows] == [True, False, True]
    store.keep("a", list(range(999)), states(list(range(999))))  # larger than everything
    assert (len(store), store.bytes) == (2, 2 * size)
    store.clear()
    assert (len(store), store.bytes, found(store, rows[0])) == (0, 0, [])


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=70), min_size=1, max_size=12), st.integers(200, 5000))
@settings(max_examples=60, deadline=None)
def test_what_is_found_is_always_a_beginning_of_the_prompt(rows: list[list[int]], budget: int) -> None:
    store = PrefixStore(budget)
    for row in rows:
        got = found(store, row)
        assert got == row[: len(got)]
        assert len(got) < len(row)
        store.keep("a", row, states(row))
        assert store.bytes <= budget
        assert store.bytes == sum(r.size for r in store._rows.values())


@given(st.lists(st.integers(1, 600), min_size=1, max_size=40))
def test_slices_cover_every_row_once_and_waste_little(new: list[int]) -> None:
    new = sorted(new, reverse=True)
    cut = slices(new)
    assert [row for low, high in cut for row in range(low, high)] == list(range(len(new)))
    for low, high in cut:
        read, used = new[low] * (high - low), sum(new[low:high])
        assert read - used <= max(64, read // 4)


def conversation(backend: HFBackend, turns: int = 4, n: int = 5) -> tuple[list[list[tuple[int, ...]]], int, int]:
    """`n` conversations of different lengths in one batch; ids of all replies, cached and prompt tokens."""
    rows = [[*range(3, 30 + 9 * i)] for i in range(n)]
    said: list[list[tuple[int, ...]]] = [[] for _ in rows]
    cached = prompts = 0
    for turn in range(turns):
        asked = [
            Request(token_ids=row, sampling=Sampling(max_tokens=6 + 3 * (i % 3)), seed=10 * turn + i)
            for i, row in enumerate(rows)
        ]
        for row, words, made in zip(rows, said, backend.generate(asked), strict=True):
            words.append(made.token_ids)
            row += [*made.token_ids, 40 + turn, 41]
            cached += made.usage["cached_tokens"]
            prompts += made.usage["prompt_tokens"]
    return said, cached, prompts


def test_a_conversation_is_the_same_with_and_without(tokenizer: object) -> None:  # noqa: F811
    model = tiny()
    without, none, _ = conversation(HFBackend(model, tokenizer, prefix_gib=0.0))
    within, cached, prompts = conversation(HFBackend(model, tokenizer, prefix_gib=0.1))
    assert within == without
    assert none == 0
    assert cached > prompts // 2


def test_logprobs_are_the_same_with_and_without(tokenizer: object) -> None:  # noqa: F811
    model, prompt = tiny(), list(range(3, 60))
    store = HFBackend(model, tokenizer, prefix_gib=0.1)
    store.generate([Request(token_ids=prompt[:40], sampling=Sampling(max_tokens=2))])
    asked = [Request(token_ids=prompt, sampling=Sampling(max_tokens=8), seed=3)]
    again = store.generate(asked)[0]
    first = HFBackend(model, tokenizer, prefix_gib=0.0).generate(asked)[0]
    assert again.usage["cached_tokens"] == 40
    assert again.token_ids == first.token_ids
    np.testing.assert_allclose(again.logprobs, first.logprobs, atol=1e-4)


def test_a_forks_rows_share_their_beginning(tokenizer: object) -> None:  # noqa: F811
    backend = HFBackend(tiny(), tokenizer, prefix_gib=0.1)
    prompt = list(range(3, 80))
    backend.generate([Request(token_ids=prompt, sampling=Sampling(max_tokens=4), seed=1)])
    branches = backend.generate([Request(token_ids=[*prompt, 9], sampling=Sampling(max_tokens=4), seed=s) for s in range(4)])
    assert [made.usage["cached_tokens"] for made in branches] == [77] * 4


def test_weights_that_change_keep_nothing_but_on_request(tokenizer: object) -> None:  # noqa: F811
    model = tiny()
    assert HFBackend(model, tokenizer, mutable=True).prefixes is None
    backend = HFBackend(model, tokenizer, mutable=True, prefix_gib=0.1)
    asked = [Request(token_ids=list(range(3, 60)), sampling=Sampling(temperature=0, max_tokens=8))]
    backend.generate(asked)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.5)
    backend.forget()
    made = backend.generate(asked)[0]
    assert made.usage["cached_tokens"] == 0
    assert made.token_ids == HFBackend(model, tokenizer, prefix_gib=0.0).generate(asked)[0].token_ids


@pytest.mark.parametrize(("rope", "keeps"), [(None, True), ("longrope", False), ("dynamic", False)])
def test_angles_that_depend_on_the_length_keep_nothing(rope, keeps) -> None:
    model = tiny()
    if rope:
        model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": rope}
    assert keeps_states(model) is keeps
    if rope:  # as models write it whose layers differ
        model.config.rope_parameters = {"full_attention": {"rope_type": rope}, "sliding_attention": {"rope_type": "default"}}
        assert keeps_states(model) is keeps


def test_another_active_adapter_and_written_weights_find_nothing(tokenizer) -> None:  # noqa: F811
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny(), config, adapter_name="one")
    model.add_adapter("two", config)
    backend = HFBackend(model, tokenizer, prefix_gib=0.01)
    request = Request([{"role": "user", "content": "tea " * 30}], sampling=Sampling(max_tokens=4))

    def cached() -> int:
        return backend.generate([request])[0].usage["cached_tokens"]

    assert cached() == 0
    assert cached() > 0
    model.set_adapter("two")
    assert cached() == 0
    assert cached() > 0
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    assert cached() == 0
