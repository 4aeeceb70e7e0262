"""The vLLM backend against real vLLM on a CPU, with SmolLM2."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import pytest
from contract import CHECKS, Traits, check_openings_never_end, endings

from usp_env import backends
from usp_env.backends.base import Request, Sampling
from usp_env.backends.hf import HFBackend
from usp_env.backends.spec import parse
from usp_env.backends.vllm import VLLMBackend
from usp_env.errors import BackendError, MissingAssetError, SpecError, UnknownNameError
from usp_env.models import assets

pytestmark = [pytest.mark.vllm, pytest.mark.assets]

ENGINE = "vllm:smollm2-135m?max_model_len=1024&prefix_gib=1"
TOPICS = "tea Rome bread chess rain loans yoga bees".split()
GREEDY = Sampling(0.0, 1.0, 12)


def ask(topic: str, seed: int = 0, **options: object) -> Request:
    return Request([{"role": "user", "content": f"Tell me about {topic}."}], seed=seed, **options)


@pytest.fixture(scope="module")
def engine() -> Iterator[VLLMBackend]:
    made = backends.load(parse(ENGINE))
    assert isinstance(made, VLLMBackend)
    yield made
    made.close()


def smollm2():
    """The same weights in `transformers`."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(assets.path("smollm2-135m"), dtype=torch.float32)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_contract(engine, check) -> None:
    bad = Request(token_ids=[10**7], sampling=Sampling(max_tokens=4))
    check(engine, Traits(limit=1024, bad=bad, ends=False))  # SmolLM2 never says its end of the conversation by itself


def test_the_end_of_the_conversation_is_banned_where_it_may_not_come(engine, monkeypatch) -> None:
    """With the end of a turn in its place, which SmolLM2 does say."""
    monkeypatch.setattr(engine.renderer, "end_of_conversation_id", engine.renderer.end_of_turn_id)
    monkeypatch.setattr("contract.endings", lambda can_end: [replace(r, role="assistant") for r in endings(can_end)[:12]])
    check_openings_never_end(engine, Traits())


def test_identity_is_that_of_the_weights(engine) -> None:
    weights = HFBackend.from_spec(parse("smollm2-135m?device=cpu")).identity["weights"]
    identity = engine.identity
    assert (identity["weights"], identity["dtype"], identity["max_model_len"]) == (weights, "float32", 1024)
    assert not engine.mutable
    assert backends.load(parse(ENGINE + "&max_tokens=24&temperature=0.5")) is engine


def test_greedy_and_logprobs_are_those_of_transformers(engine) -> None:
    """vLLM's log-probabilities are of the distribution that was sampled from, as the HF backend's are."""
    import torch

    model = smollm2()
    requests = [ask(topic, i, sampling=GREEDY) for i, topic in enumerate(TOPICS)]
    expected = [g.token_ids for g in HFBackend(model, engine.tokenizer).generate(requests)]
    made = [g.token_ids for g in engine.generate(requests)]
    assert sum(a == b for a, b in zip(made, expected, strict=True)) >= len(TOPICS) - 1  # one near-tie may fall otherwise
    for sampling in (Sampling(0.8, 0.9, 12), Sampling(1.0, 1.0, 12)):
        request = ask("the sea", 5, sampling=sampling)
        prompt = engine.renderer.render(request.messages, generation_role="assistant").token_ids
        one = engine.generate([request])[0]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *one.token_ids]])).logits[0, len(prompt) - 1 : -1]
        logits[:, engine.renderer.end_of_conversation_id] = -torch.inf
        probs = (logits / sampling.temperature).softmax(-1)
        order = probs.sort(-1, descending=True)
        outside = order.values.cumsum(-1) - order.values >= sampling.top_p
        probs = probs.masked_fill(torch.zeros_like(outside).scatter(-1, order.indices, outside), 0.0)
        exact = (probs / probs.sum(-1, keepdim=True)).log()[torch.arange(len(one.token_ids)), list(one.token_ids)]
        torch.testing.assert_close(torch.tensor(one.logprobs), exact, rtol=0, atol=2e-3)


def test_a_second_turn_comes_from_the_cache(engine) -> None:
    messages = [{"role": "user", "content": "I am planning a long walk through the hills next week. " * 6}]
    sampling = Sampling(0.8, 0.9, 16)
    first = engine.generate([Request(messages, sampling=sampling)])[0]
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "What should I pack?"}]
    second = engine.generate([Request(messages, sampling=sampling)])[0]
    assert second.usage["cached_tokens"] > first.usage["cached_tokens"]
    assert second.usage["prompt_tokens"] - second.usage["cached_tokens"] < 80  # the turn, and a block of 32 at most
    engine.forget()
    again = engine.generate([Request(messages, sampling=sampling)])[0]
    assert (again.usage["cached_tokens"], again.text) == (0, second.text)


def test_more_prompt_than_one_step_reads(engine) -> None:
    """Seeded prompts that vLLM would read in parts: on a CPU that ended its process."""
    long = [Request([{"role": "user", "content": f"{i}: " + "tea and bread " * 250}], seed=i) for i in range(12)]
    made = engine.generate([replace(request, sampling=Sampling(0.8, 0.9, 4)) for request in long])
    assert all(g.usage["prompt_tokens"] > 700 and g.error is None for g in made)


def test_what_it_cannot_do_is_said(engine, tmp_path) -> None:
    with pytest.raises(SpecError, match="temperatures from 0 to 2"):
        engine.generate([ask("x", sampling=Sampling(temperature=3.0))])
    with pytest.raises(SpecError, match="prompt of at least one token"):
        engine.generate([Request()])
    with pytest.raises(UnknownNameError, match="adapter"):
        engine.generate([ask("x", adapter="nope")])
    with pytest.raises(SpecError, match="drives 'cpu'"):
        VLLMBackend.from_spec(parse("vllm:smollm2-135m?device=cuda"))
    with pytest.raises(SpecError, match="expected a dtype"):
        VLLMBackend.from_spec(parse("vllm:smollm2-135m?dtype=nope"))
    with pytest.raises(SpecError, match="key_env"):
        VLLMBackend.from_spec(parse("vllm:smollm2-135m?key_env=X"))
    with pytest.raises(MissingAssetError, match="not on this machine"):
        VLLMBackend.from_spec(parse("vllm:nobody/nothing"))
    with pytest.raises(MissingAssetError, match="PEFT folder"):
        VLLMBackend(str(assets.path("smollm2-135m")), adapters={"a": str(tmp_path)})


def test_an_interrupted_call_leaves_nothing_behind(engine, monkeypatch) -> None:
    expected = engine.generate([ask("tea", 7)])[0].text
    step, calls = engine.llm.llm_engine.step, []

    def interrupted():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(engine.llm.llm_engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([ask(topic, 1, sampling=Sampling(max_tokens=200)) for topic in TOPICS])
    assert not engine.llm.llm_engine.has_unfinished_requests()
    assert [g.text for g in engine.generate([ask("tea", 7)])] == [expected]


def test_rollout_and_the_share_of_vllms_own_speed(engine, monkeypatch, capsys) -> None:
    """16 dialogues through `gym.make_vec`, and the same requests through `vllm.LLM.generate` alone."""
    user = f"usp:{ENGINE}&max_tokens=24"
    envs = gym.make_vec("usp_env/Assistant-v0", num_envs=16, user=user, reward=None, population="uniform", max_turns=4)
    real, batches = engine.generate, []

    def recorded(requests):
        made = real(requests)
        batches.append((requests, made))
        return made

    monkeypatch.setattr(engine, "generate", recorded)
    through_env, bare = [], []
    for _ in range(3):
        engine.forget()
        batches.clear()
        start = time.perf_counter()
        envs.reset(seed=0)
        for _ in range(3):
            *_, infos = envs.step(["I see. Go on, what else would you like to know?"] * 16)
        through_env.append(time.perf_counter() - start)
        assert not any(made.error for _, batch in batches for made in batch)
        assert sum(len(requests) for requests, _ in batches) >= 64
        prompts = [[{"prompt_token_ids": list(engine._prompt(r))} for r in requests] for requests, _ in batches]
        params = [[engine._params(r) for r in requests] for requests, _ in batches]
        engine.forget()
        start = time.perf_counter()
        outputs = [engine.llm.generate(p, s, use_tqdm=False) for p, s in zip(prompts, params, strict=True)]
        bare.append(time.perf_counter() - start)
        same = [
            tuple(output.outputs[0].token_ids) == made.token_ids
            for (_, batch), batch_outputs in zip(batches, outputs, strict=True)
            for made, output in zip(batch, batch_outputs, strict=True)
        ]
        assert sum(same) >= 0.98 * len(same)
    tokens = sum(made.usage["completion_tokens"] for _, batch in batches for made in batch)
    cached = sum(made.usage["cached_tokens"] for _, batch in batches for made in batch)
    prompt = sum(made.usage["prompt_tokens"] for _, batch in batches for made in batch)
    ratio = min(bare) / min(through_env)
    with capsys.disabled():
        print(
            f"\n16 dialogues, {len(batches)} calls, {tokens} tokens: {tokens / min(through_env):.0f} tokens/s through the vector "
            f"environment, {tokens / min(bare):.0f} from vLLM alone, ratio {ratio:.3f}; {cached / prompt:.0%} of prompts from cache"
        )
    assert ratio >= 0.9


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, str]:
    import peft
    import torch

    folders = {}
    for name, seed in (("a", 1), ("b/x.y", 2)):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            lora = peft.get_peft_model(smollm2(), config)
        lora.save_pretrained(folders.setdefault(name, str(tmp_path_factory.mktemp("lora"))))
    return folders


def test_lora_requests_and_new_weights(engine, adapters) -> None:
    """Adapters beside each other over one base, then other weights under them; all as `transformers` and `peft` do it."""
    import torch

    requests = [ask("the sea", sampling=GREEDY, adapter=name) for name in (None, "a", "b/x.y", None, "a")]
    folder = Path(assets.path("smollm2-135m"))
    backend = VLLMBackend(str(folder), max_model_len=512, prefix_gib=0.5, adapters=adapters)
    try:
        made = [g.token_ids for g in backend.generate(requests)]
        assert made[0] == made[3] == engine.generate(requests[:1])[0].token_ids
        assert made[1] == made[4]
        assert len(set(made)) == 3
        model = smollm2()
        assert made == [g.token_ids for g in HFBackend(model, engine.tokenizer, adapters=adapters).generate(requests)]
        assert set(backend.identity["adapters"]) == set(adapters)

        other = smollm2()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
        before = backend.identity
        backend.load_weights(iter(other.state_dict().items()))
        assert backend.mutable
        assert backend.identity["weights"] == "live 1" != before["weights"]
        changed = [g.token_ids for g in backend.generate(requests)]
        assert changed[0] != made[0]
        assert backend.generate(requests[:1])[0].usage["cached_tokens"] <= 32  # of the new weights alone
        assert changed == [g.token_ids for g in HFBackend(other, engine.tokenizer, adapters=adapters).generate(requests)]
    finally:
        backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.generate(requests)
    with pytest.raises(BackendError, match="closed"):
        backend.forget()
