from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from usp_env.backends import adapters, decoding, digests, hf  # noqa: E402
from usp_env.backends.base import Backend, Request, Sampling  # noqa: E402
from usp_env.backends.cache import CacheBackend  # noqa: E402
from usp_env.backends.decoding import GROUP, gumbel_draw, nucleus_floor  # noqa: E402
from usp_env.backends.hf import HFBackend  # noqa: E402
from usp_env.backends.spec import parse  # noqa: E402
from usp_env.errors import BackendError, MissingAssetError, SpecError, UnknownNameError  # noqa: E402
from usp_env.models import assets  # noqa: E402

END, START, EOT = 0, 1, 2  # <|endoftext|>, <|im_start|>, <|im_end|>
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level, ids 0-2 the special tokens, 3-258 the bytes."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {t: i for i, t in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    made.chat_template = TEMPLATE
    return made


def tiny(seed: int = 0, scale: float = 1.0) -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
                         bos_token_id=START, eos_token_id=EOT, pad_token_id=EOT)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(10 * scale)  # peaked enough that texts differ by more than noise
    return model.eval()


@pytest.fixture(scope="module")
def backend(tokenizer):
    return HFBackend(tiny(), tokenizer)


class Puppet(torch.nn.Module):
    """A model that says a fixed script: at position p of the row it is sure of `script[p - start]`."""

    def __init__(self, script, start):
        super().__init__()
        self.script, self.start = script, start
        self.config, self.device, self.dtype = tiny().config, torch.device("cpu"), torch.float32

    def forward(self, input_ids, position_ids, past_key_values, **_):
        kv = torch.zeros(len(input_ids), 1, input_ids.shape[1], 1)
        for layer in range(2):
            past_key_values.update(kv, kv, layer)
        logits = torch.zeros(len(input_ids), 1, 300)
        logits[..., 60] = 1.0  # what comes where the script's token is forbidden
        for row, position in enumerate(position_ids[:, -1].tolist()):
            at = position + 1 - self.start
            logits[row, 0, self.script[at] if at < len(self.script) else 50] = 9.0
        return type("Out", (), {"logits": logits})()


def say(tokenizer, script, *, text_then=(), **options):
    """What a backend makes of a model that says `script` (text) and then `text_then` (ids)."""
    prompt = [START, 10, 11]
    sampling = Sampling(**{"temperature": 0.0, "max_tokens": 20, **options.pop("sampling", {})})
    ids = [*tokenizer(script, add_special_tokens=False).input_ids, *text_then]
    backend = HFBackend(Puppet(ids, len(prompt)), tokenizer)
    return backend.generate([Request(token_ids=prompt, sampling=sampling, **options)])[0], ids


def prompts(count: int, seed: int = 0) -> list[Request]:
    rng = np.random.default_rng(seed)
    return [
        Request(
            token_ids=[int(i) for i in rng.integers(3, 259, size=rng.integers(1, 40))],
            sampling=Sampling(float(rng.choice([0.7, 1.0])), float(rng.choice([0.9, 1.0])), int(rng.integers(1, 24))),
            seed=int(rng.integers(2**62)),
            can_end=bool(rng.integers(2)),
        )
        for _ in range(count)
    ]


def test_gumbel_draw_has_the_softmax_distribution():
    """20,000 draws from p = (.5, .3, .2) that lie in different groups, and the exact log-probability of each."""
    logits = torch.full((1, 2 * GROUP), -torch.inf)
    where = [3, 5, GROUP + 7]
    logits[0, where] = torch.tensor([0.5, 0.3, 0.2]).log() + 4.0  # softmax ignores the shift
    noise = -torch.from_numpy(np.random.default_rng(0).standard_exponential((20_000, 2 + GROUP), np.float32)).log()
    tokens, logprobs = gumbel_draw(logits.expand(20_000, -1), noise)
    share = [(tokens == i).float().mean().item() for i in where]
    assert share == pytest.approx([0.5, 0.3, 0.2], abs=0.012)  # 3.4 standard errors
    expected = dict(zip(where, np.log([0.5, 0.3, 0.2]), strict=True))
    assert {i: logprobs[tokens == i][0].item() for i in where} == pytest.approx(expected, abs=1e-5)


def test_nucleus_floor_by_hand():
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log().repeat(5, 1)
    floor = nucleus_floor(logits, torch.tensor([[0.3], [0.41], [0.71], [0.95], [1.0]])).exp().flatten()
    assert floor.tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])


def test_nucleus_floor_of_wide_and_narrow_rows_is_that_of_a_whole_sort():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(6, 2000)).astype(np.float32)) * torch.tensor(
        [[0.1], [1.0], [5.0], [0.1], [9.0], [2.0]]
    )
    top_p = torch.tensor([[0.9], [0.5], [0.99], [1.0], [0.2], [0.95]])
    floor = nucleus_floor(logits, top_p)
    for row, p in enumerate(top_p.flatten().tolist()):
        values = np.sort(logits[row].double().softmax(-1).numpy())[::-1]
        size = int((np.cumsum(values) - values < p).sum())
        kept = int((logits[row] >= floor[row]).sum())
        assert kept == (2000 if p == 1.0 else size)


def test_it_is_a_backend(backend):
    assert isinstance(backend, Backend)
    assert not backend.mutable
    assert backend.count_tokens("héllo<|im_end|>") == 16
    assert backend.generate([]) == []


def test_greedy_is_the_models_own_greedy(backend):
    requests = [replace(r, sampling=Sampling(0.0, 1.0, 12), can_end=True) for r in prompts(12)]
    for request, made in zip(requests, backend.generate(requests), strict=True):
        ids = torch.tensor([request.token_ids])
        for token in made.token_ids:
            assert int(backend.model(ids).logits[0, -1, :259].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], -1)
        assert made.logprobs == (0.0,) * len(made.token_ids)


def test_logprobs_are_those_of_an_unpadded_forward(backend):
    """Padded ≡ unpadded, and the log-softmax is that of the sampled distribution (temperature, bans, top_p)."""
    for request, made in zip(requests := prompts(24), backend.generate(requests), strict=True):
        ids = torch.tensor([[*request.token_ids, *made.token_ids]])
        with torch.no_grad():
            logits = backend.model(ids).logits[0, len(request.token_ids) - 1 : -1, :259]
        if not request.can_end:
            logits[:, END] = -torch.inf
        probs = (logits / request.sampling.temperature).softmax(-1)
        order = probs.sort(-1, descending=True)
        outside = order.values.cumsum(-1) - order.values >= request.sampling.top_p
        probs = probs.masked_fill(torch.zeros_like(outside).scatter(-1, order.indices, outside), 0.0)
        expected = (probs / probs.sum(-1, keepdim=True)).log()
        got = torch.tensor(made.logprobs)
        torch.testing.assert_close(got, expected[torch.arange(len(got)), list(made.token_ids)], rtol=0, atol=2e-4)
        assert len(made.token_ids) <= request.sampling.max_tokens
        assert made.usage["prompt_tokens"] == len(request.token_ids)
        assert made.usage["completion_tokens"] == len(made.token_ids)
        assert made.text == backend.renderer.decode(made.token_ids)


@pytest.mark.parametrize("options", [{}, {"micro_batch": 5}, {"max_batch_tokens": 128}])
def test_alone_as_in_a_batch(tokenizer, backend, options):
    requests = prompts(32)
    together = HFBackend(tiny(), tokenizer, **options).generate(requests)
    alone = [backend.generate([request])[0] for request in requests]
    assert [g.token_ids for g in together] == [g.token_ids for g in alone]
    assert [g.finish_reason for g in together] == [g.finish_reason for g in alone]
    np.testing.assert_allclose(
        np.concatenate([g.logprobs for g in together]), np.concatenate([g.logprobs for g in alone]), atol=1e-4
    )
    assert len({g.token_ids for g in together}) > 30  # the prompts do differ


def test_padding_does_not_shift_absolute_positions(tokenizer):
    """Llama's rotary positions are relative and would hide it; GPT-2's are not."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=START, eos_token_id=EOT)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(50)
    backend = HFBackend(model, tokenizer)
    requests = [Request(token_ids=[60] * n, sampling=Sampling(max_tokens=8), seed=n) for n in (2, 5, 30)]
    assert [g.token_ids for g in backend.generate(requests)] == [backend.generate([r])[0].token_ids for r in requests]


def test_seeds_decide(backend):
    request = Request(token_ids=[50, 60, 70], sampling=Sampling(max_tokens=16))
    texts = [g.token_ids for g in backend.generate([replace(request, seed=s) for s in (1, 2, 1, 2**62 + 1, -1)])]
    assert texts[0] == texts[2]
    assert len(set(texts)) == 4


def test_no_global_random_state_is_read_or_changed(backend):
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = backend.generate(prompts(4))
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert backend.generate(prompts(4)) == first


def test_end_of_turn(tokenizer):
    made, ids = say(tokenizer, " ok ", text_then=[EOT])
    assert (made.text, made.finish_reason, made.token_ids) == (" ok ", "stop", tuple(ids))
    assert made.usage == {"prompt_tokens": 3, "completion_tokens": 5, "cached_tokens": 0}


def test_end_of_conversation_only_where_it_may(tokenizer):
    made, ids = say(tokenizer, "bye", text_then=[END], can_end=True)
    assert (made.text, made.finish_reason, made.token_ids) == ("bye", "end", tuple(ids))
    made, _ = say(tokenizer, "bye", text_then=[END, EOT], can_end=False)
    assert made.finish_reason == "stop"
    assert made.token_ids == (*ids[:3], 60, EOT)


def test_opening_another_header_is_a_role_finish(tokenizer):
    made, ids = say(tokenizer, "I am", text_then=[START, 60])
    assert (made.text, made.finish_reason, made.token_ids) == ("I am", "role", tuple(ids[:-1]))


def test_max_and_min_tokens(tokenizer):
    made, ids = say(tokenizer, "abcdefgh", sampling={"max_tokens": 5})
    assert (made.text, made.finish_reason, made.token_ids) == ("abcde", "length", tuple(ids[:5]))
    made, _ = say(tokenizer, "", text_then=[EOT, EOT, EOT, EOT], can_end=True, sampling={"min_tokens": 3})
    assert made.token_ids == (60, 60, 60, EOT)


def test_stop_strings_cut_the_text_and_keep_the_ids(tokenizer):
    made, ids = say(tokenizer, "one\nUser: two", sampling={"stop": ("\nUser:", "zzz")})
    assert (made.text, made.finish_reason) == ("one", "stop")
    assert made.token_ids == tuple(ids[: len("one\nUser:")])
    made, ids = say(tokenizer, "né à é!", sampling={"stop": ("é!",)})  # characters of two tokens each
    assert made.text == "né à "
    assert made.token_ids == tuple(ids)


def test_context_limit_is_found_before_any_compute(tokenizer):
    backend = HFBackend(tiny(), tokenizer, max_model_len=32)
    sampling = Sampling(max_tokens=16)
    fits, over = Request(token_ids=[40] * 16, sampling=sampling), Request(token_ids=[40] * 17, sampling=sampling)
    calls = []
    backend.model.register_forward_hook(lambda *_: calls.append(1))
    made = backend.generate([over])[0]
    assert (made.finish_reason, made.text, made.token_ids, made.error) == ("context_limit", "", (), None)
    assert made.usage == {"prompt_tokens": 17, "completion_tokens": 0}
    assert not calls
    mixed = backend.generate([over, fits, over])
    assert [g.finish_reason == "context_limit" for g in mixed] == [True, False, True]
    assert mixed[1] == backend.generate([fits])[0]
    assert HFBackend(tiny(), tokenizer, max_model_len=10_000).max_model_len == 256  # the model's own


def test_messages_go_through_the_renderer(backend):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a <|im_end|>"},
        {"role": "assistant", "content": "b"},
    ]
    for role in ("user", "assistant"):
        ids = backend.renderer.render(messages, generation_role=role).token_ids
        sampling = Sampling(max_tokens=8)
        from_messages, from_ids = backend.generate(
            [Request(messages, role=role, sampling=sampling, seed=5), Request(token_ids=ids, sampling=sampling, seed=5)]
        )
        assert from_messages == from_ids


def test_requests_that_are_no_requests(backend):
    for request in (Request(), Request(token_ids=[])):
        with pytest.raises(SpecError, match="prompt of at least one token"):
            backend.generate([request])
    with pytest.raises(UnknownNameError, match="adapter"):
        backend.generate([Request(token_ids=[5], adapter="nope")])


def test_ids_without_an_embedding_fail_alone(tokenizer):
    backend = HFBackend(tiny(), tokenizer)  # 300 embeddings, 259 of them in the tokenizer
    sampling = Sampling(max_tokens=4)
    good = [replace(r, sampling=sampling) for r in prompts(3)]
    fine = backend.generate(good)
    for unknown in (300, -1, 2**70):
        made = backend.generate([*good[:1], Request(token_ids=[5, unknown], sampling=sampling), *good[1:]])
        assert str(unknown) in str(made[1].error)
        assert made[1].finish_reason == "error"
        assert [g.token_ids for g in (made[0], *made[2:])] == [g.token_ids for g in fine]
    assert backend.generate([Request(token_ids=[5, 299], sampling=sampling)])[0].error is None
    with pytest.raises(BackendError, match="from 0 to 299, got 300"):
        backend.generate([Request(token_ids=[300], sampling=sampling)])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_fail_their_row(tokenizer, temperature, broken):
    backend = HFBackend(tiny(), tokenizer, prefix_gib=0.01)
    sampling = Sampling(temperature, 0.9, 8)
    good, bad = (Request(token_ids=[40] * 20 + [last], sampling=sampling, seed=4) for last in (41, 250))
    fine = backend.generate([good])[0]
    backend.prefixes.clear()

    def spoil(module, args, kwargs, output):
        output.logits[(kwargs["input_ids"][:, -1] == 250), :, 7] = broken

    backend.model.register_forward_hook(spoil, with_kwargs=True)
    made = backend.generate([bad, good])
    assert "NaN" in str(made[0].error)
    assert (made[0].finish_reason, made[0].text, made[0].token_ids) == ("error", "", None)
    assert (made[1].token_ids, made[1].error) == (fine.token_ids, None)
    assert len(backend.prefixes) == 1  # nothing is kept of the broken row
    with pytest.raises(BackendError, match="NaN"):
        backend.generate([bad])


def test_a_failing_model_is_a_backend_error(tokenizer, monkeypatch):
    backend = HFBackend(tiny(), tokenizer, micro_batch=2, prefix_gib=0.0)
    requests = [replace(r, sampling=Sampling(max_tokens=4)) for r in prompts(6)]
    fine, real = backend.generate(requests), hf.decode
    longest = max(len(r.token_ids) for r in requests)

    def flaky(model, jobs, *rest):
        if any(len(job.prompt) == longest for job in jobs):
            raise RuntimeError("device lost")
        return real(model, jobs, *rest)

    monkeypatch.setattr(hf, "decode", flaky)
    made = backend.generate(requests)
    lost = [i for i, g in enumerate(made) if g.error]
    assert len(lost) == 2  # one batch of two
    assert all(made[i].finish_reason == "error" and "device lost" in str(made[i].error) for i in lost)
    assert all(made[i] == fine[i] for i in range(6) if i not in lost)
    with pytest.raises(BackendError, match="no request of 1"):
        backend.generate([r for r in requests if len(r.token_ids) == longest][:1])


def test_out_of_memory_halves_the_batch(tokenizer, monkeypatch):
    backend = HFBackend(tiny(), tokenizer)
    requests = prompts(8)
    fine, real, sizes = backend.generate(requests), hf.decode, []

    def small(model, jobs, *rest):
        sizes.append(len(jobs))
        if len(jobs) > 2:
            raise torch.OutOfMemoryError("too many")
        return real(model, jobs, *rest)

    monkeypatch.setattr(hf, "decode", small)
    assert [g.token_ids for g in backend.generate(requests)] == [g.token_ids for g in fine]
    assert sizes == [8, 8, 4, 2, 2, 4, 4, 2, 2]  # what is kept goes first, then the batch is halved


def test_long_and_short_rows_are_decoded_apart(tokenizer, monkeypatch):
    monkeypatch.setattr(hf, "padding_worth_a_pass", lambda model: 500)
    backend, real, widths = HFBackend(tiny(), tokenizer, prefix_gib=0.0), hf.decode, []
    requests = [Request(token_ids=[60 + n % 9] * n, sampling=Sampling(max_tokens=4), seed=n) for n in (20, 220, 24, 230, 22, 225)]

    def seen(model, jobs, *rest):
        widths.append([len(job.prompt) for job in jobs])
        return real(model, jobs, *rest)

    alone = [backend.generate([request])[0] for request in requests]
    monkeypatch.setattr(hf, "decode", seen)
    assert [g.token_ids for g in backend.generate(requests)] == [g.token_ids for g in alone]
    assert widths == [[230, 225, 220, 24, 22], [20]]  # 429 tokens of padding in the first; the last row would bring 210 more


def test_training_mode_comes_back(tokenizer):
    backend = HFBackend(tiny().train(), tokenizer, mutable=True)
    backend.generate(prompts(2))
    assert backend.model.training
    assert backend.identity["weights"] == "live"


def test_agenerate(backend):
    requests = prompts(3)
    assert asyncio.run(backend.agenerate(requests)) == backend.generate(requests)


def test_identity_follows_the_weights(tokenizer, tmp_path):
    one, same, other = (HFBackend(tiny(seed), tokenizer).identity for seed in (0, 0, 1))
    assert one == same
    assert one["weights"] != other["weights"]
    assert (one["dtype"], one["adapters"]) == ("float32", {})
    tiny().save_pretrained(tmp_path / "a")
    before = digests.hash_folder(tmp_path / "a")
    tiny(1).save_pretrained(tmp_path / "a")
    assert digests.hash_folder(tmp_path / "a") != before
    with pytest.raises(MissingAssetError, match="safetensors"):
        digests.hash_folder(tmp_path)


@pytest.mark.parametrize("from_folder", [False, True])
def test_identity_and_records_follow_weights_written_in_place(tokenizer, tmp_path, monkeypatch, from_folder):
    model = tiny()
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    spec = parse(f"{tmp_path}/m?device=cpu&dtype=float32")
    backend = HFBackend.from_spec(spec) if from_folder else HFBackend(model, tokenizer)
    cache = CacheBackend(backend, tmp_path / "replies.sqlite")
    request = Request(token_ids=list(range(10, 40)), sampling=Sampling(max_tokens=12), seed=3)
    before, old = backend.identity["weights"], cache.generate([request])[0]
    assert cache.generate([request])[0].token_ids == old.token_ids
    with torch.no_grad():
        for weight in backend.model.parameters():
            weight.add_(0.3 * weight.abs())
    new = cache.generate([request])[0]
    assert new.token_ids == HFBackend(backend.model, tokenizer, prefix_gib=0.0).generate([request])[0].token_ids
    assert new.token_ids != old.token_ids
    assert backend.identity["weights"] == digests.hash_parameters(backend.model) != before
    monkeypatch.setattr(hf, "hash_parameters", lambda model: pytest.fail("weights that nobody wrote to are digested once"))
    assert cache.generate([request])[0].token_ids == new.token_ids
    backend.mutable = True
    assert backend.identity["weights"] == "live"


def test_from_spec(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("USP_ENV_OFFLINE", "1")
    tiny().save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    backend = HFBackend.from_spec(parse(f"{tmp_path}/m?max_model_len=64&device=cpu"))
    assert (backend.max_model_len, str(backend.model.dtype), backend.spec) == (
        64,
        "torch.float32",
        f"{tmp_path}/m?device=cpu&max_model_len=64",
    )
    assert backend.identity["weights"] == digests.hash_folder(tmp_path / "m")
    assert HFBackend.from_spec(parse(f"{tmp_path}/m?dtype=bfloat16&device=cpu")).identity["dtype"] == "bfloat16"
    with pytest.raises(SpecError, match="expected a dtype"):
        HFBackend.from_spec(parse(f"{tmp_path}/m?dtype=nope&device=cpu"))
    with pytest.raises(SpecError, match="key_env"):
        HFBackend.from_spec(parse(f"{tmp_path}/m?key_env=X"))
    with pytest.raises(MissingAssetError, match="USP_ENV_OFFLINE forbids"):
        HFBackend.from_spec(parse(f"{tmp_path}/none"))


def saved_adapters(folder, **options):
    """Names and folders of two adapters of `tiny()`; `options` of the second."""
    peft = pytest.importorskip("peft")
    folders = {}
    for name, seed, more in (("a", 1, {}), ("b/x.y", 2, options)):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **more)
            lora = peft.get_peft_model(tiny(), config)
        lora.save_pretrained(folders.setdefault(name, str(folder / str(seed))))
    return folders


def counted(model):
    """A list that grows by the rows of each pass of the model."""
    passes = []
    model.register_forward_pre_hook(lambda module, args, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True)
    return passes


def test_adapters_in_one_batch(tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    folders = saved_adapters(tmp_path)
    request = Request(token_ids=[40, 50, 60], sampling=Sampling(max_tokens=12), seed=3)
    names = [None, "a", "b/x.y", None, "a"]
    backend = HFBackend(tiny(), tokenizer, adapters=folders)
    passes = counted(backend.model)
    made = [g.token_ids for g in backend.generate([replace(request, adapter=name) for name in names])]
    assert passes[0] == 5  # all in one batch
    assert len(passes) == max(map(len, made))
    assert made[0] == made[3] == HFBackend(tiny(), tokenizer).generate([request])[0].token_ids
    assert made[1] == made[4]
    assert len(set(made)) == 3
    for name in ("a", "b/x.y"):
        merged = peft.PeftModel.from_pretrained(tiny(), folders[name]).merge_and_unload()
        assert HFBackend(merged, tokenizer).generate([request])[0].token_ids == made[names.index(name)]
    assert set(backend.identity["adapters"]) == {"a", "b/x.y"}
    live = HFBackend(peft.PeftModel.from_pretrained(tiny(), folders["a"]), tokenizer)  # None: the model as it is
    assert live.generate([request])[0].token_ids == made[1]
    with pytest.raises(MissingAssetError, match="PEFT folder"):
        HFBackend(tiny(), tokenizer, adapters={"c": str(tmp_path)})


@pytest.mark.parametrize("prefix_gib", [0.0, 0.1])
def test_each_row_of_a_batch_of_adapters_is_what_it_is_alone(tokenizer, tmp_path, prefix_gib):
    """Prompts and replies of different lengths, and second turns that begin with what is kept."""
    backend = HFBackend(tiny(), tokenizer, adapters=saved_adapters(tmp_path), prefix_gib=prefix_gib)
    alone = HFBackend(tiny(), tokenizer, adapters=saved_adapters(tmp_path), prefix_gib=0.0)
    asked = [
        Request(token_ids=list(range(30, 34 + 9 * i)), sampling=Sampling(max_tokens=3 + 5 * i), seed=i, adapter=name)
        for i, name in enumerate([None, "a", "b/x.y", "a", None, "b/x.y"])
    ]
    for _ in range(2):
        made = backend.generate(asked)
        for request, generation in zip(asked, made, strict=True):
            single = alone.generate([request])[0]
            assert generation.token_ids == single.token_ids
            np.testing.assert_allclose(generation.logprobs, single.logprobs, atol=1e-4)
        asked = [replace(r, token_ids=[*r.token_ids, *g.token_ids, 41, 42]) for r, g in zip(asked, made, strict=True)]
        asked.append(replace(asked[-1], adapter=None))  # begins as what another adapter has just said
    assert backend.model.active_adapter == alone.model.active_adapter


def test_adapters_that_no_batch_mixes_follow_each_other(tokenizer, tmp_path):
    backend = HFBackend(tiny(), tokenizer, adapters=saved_adapters(tmp_path, use_dora=True))
    request = Request(token_ids=[40, 50, 60], sampling=Sampling(max_tokens=12, min_tokens=12), seed=3)
    passes = counted(backend.model)
    made = backend.generate([replace(request, adapter=name) for name in ("a", "b/x.y", None)])
    assert passes == [1] * 36
    assert len({g.token_ids for g in made}) == 3
    backend.generate([replace(request, adapter=name) for name in ("a", None)])
    assert passes[36:] == [2] * 12  # an adapter that nobody asked for stops nobody


@pytest.mark.parametrize(
    "change", [{"peft_type": "IA3"}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1]},
               {"target_parameters": ["x"]}, {"alora_invocation_tokens": [1]}]
)  # fmt: skip
def test_only_plain_lora_mixes(change, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(tiny(), saved_adapters(tmp_path)["a"], adapter_name="a")
    assert adapters.mixes(model, ["a", adapters.BASE])
    for key, value in change.items():
        setattr(model.peft_config["a"], key, value)
    assert not adapters.mixes(model, ["a", adapters.BASE])
    assert adapters.mixes(model, [adapters.BASE])


def test_merged_adapters_and_experts_do_not_mix(tokenizer, tmp_path):
    backend = HFBackend(tiny(), tokenizer, adapters=saved_adapters(tmp_path))
    assert adapters.mixes(backend.model, ["adapter_0", "adapter_1"])
    backend.model.config.num_local_experts = 2
    assert not adapters.mixes(backend.model, ["adapter_0", "adapter_1"])
    del backend.model.config.num_local_experts
    backend.model.merge_adapter()
    assert not adapters.mixes(backend.model, ["adapter_0", "adapter_1"])


def test_an_error_in_a_batch_of_adapters_leaves_nothing_behind(tokenizer, tmp_path):
    backend = HFBackend(tiny(), tokenizer, adapters=saved_adapters(tmp_path), prefix_gib=0.0)
    request = Request(token_ids=[40, 50, 60], sampling=Sampling(max_tokens=12), seed=3)
    a, b = (replace(request, adapter=name) for name in ("a", "b/x.y"))
    expected = [backend.generate([r])[0].token_ids for r in (a, b)]
    assert expected[0] != expected[1]
    spent = []

    def once(module, args):
        if not spent:
            spent.append(True)
            raise torch.OutOfMemoryError("full")

    backend.model.get_base_model().lm_head.register_forward_pre_hook(once)
    assert [g.token_ids for g in backend.generate([a, b])] == expected
    assert [g.token_ids for g in backend.generate([b, b])] == [expected[1]] * 2
    assert backend.generate([a])[0].token_ids == expected[0]
    assert spent


def test_a_layer_that_is_not_given_the_batch_s_rows_is_an_error(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(tiny(), saved_adapters(tmp_path)["a"], adapter_name="a")
    with (
        pytest.raises(RuntimeError, match="expected a batch of 2 rows in every adapted layer, got 1"),
        adapters.speaking_each(model, ["a", adapters.BASE]),
    ):
        model(input_ids=torch.tensor([[40]]))


def test_speaking_through_one_adapter_leaves_a_live_model_as_it_was(tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    folders = saved_adapters(tmp_path)
    model = peft.PeftModel.from_pretrained(tiny(), folders["a"], adapter_name="a", is_trainable=True)
    model.load_adapter(folders["b/x.y"], adapter_name="b", is_trainable=True)
    model.base_model.set_adapter(["a", "b"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".a." in name)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    backend = HFBackend(model, tokenizer, prefix_gib=0.1)
    request = Request(token_ids=[40, 50, 60], sampling=Sampling(max_tokens=8), seed=3)
    assert backend.identity["active"] == "a,b"
    both = backend.generate([request])[0].token_ids
    one = backend.generate([replace(request, adapter="a")])[0].token_ids
    assert model.active_adapters == ["a", "b"]
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    model.set_adapter("a")
    assert backend.identity["active"] == "a"
    assert backend.generate([request])[0].token_ids == one != both
    with model.disable_adapter():  # what an adapter's layers kept is not the base's
        assert "active" not in backend.identity
        follow = replace(request, token_ids=[*request.token_ids, *one, 41])
        bare = HFBackend(tiny(), tokenizer, prefix_gib=0.0)
        assert backend.generate([follow])[0].token_ids == bare.generate([follow])[0].token_ids


def test_a_model_with_transformers_own_adapters_is_refused(tokenizer, tmp_path):
    folders = saved_adapters(tmp_path)
    model = tiny()
    model.load_adapter(folders["a"], adapter_name="own")
    with pytest.raises(SpecError, match="PeftModel"):
        HFBackend(model, tokenizer, adapters=folders)


def test_an_adapter_s_configuration_is_part_of_its_digest(tmp_path):
    folders = saved_adapters(tmp_path)
    before = digests.hash_folder(folders["a"])
    config = tmp_path / "1" / "adapter_config.json"
    config.write_text(config.read_text("utf-8").replace('"lora_alpha": 8', '"lora_alpha": 16'), "utf-8")
    assert digests.hash_folder(folders["a"]) != before


def test_the_cache_is_written_in_place(backend):
    cache = decoding.buffered_cache(backend.model.config, 8)
    x = torch.arange(2 * 2 * 3 * 8.0).view(2, 2, 3, 8)
    first, _ = cache.update(x, -x, 0)
    second, values = cache.update(x[:, :, :1], -x[:, :, :1], 0)
    assert second.data_ptr() == first.data_ptr()
    assert torch.equal(second, torch.cat([x, x[:, :, :1]], 2))
    cache.layers[0].batch_select_indices(torch.tensor([1]))
    assert torch.equal(cache.layers[0].values, values[1:])
    assert cache.get_seq_length() == 4


@pytest.mark.assets
def test_smollm2_alone_as_in_a_batch():
    assert assets.available("smollm2-135m")
    backend = HFBackend.from_spec(parse("smollm2-135m?device=cpu"))
    topics = "tea Rome bread chess rain loans yoga bees trains taxes Mars soup jazz moss kites law".split()
    asked = [
        f"Tell me {('something', 'one short surprising fact that few know')[i % 2]} about {t}." for i, t in enumerate(topics)
    ]
    sampling = Sampling(0.8, 0.95, 16)
    requests = [Request([{"role": "user", "content": text}], sampling=sampling, seed=i) for i, text in enumerate(asked)]
    together = [g.text for g in backend.generate(requests)]
    alone = [backend.generate([request])[0].text for request in requests]
    assert sum(a == b for a, b in zip(together, alone, strict=True)) >= 0.99 * len(topics)
    assert len(set(together)) == len(topics)


def test_rows_that_are_done_do_not_pass_the_models_last_position():
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2)).eval()
    sampling = Sampling(max_tokens=28)
    jobs = [decoding.Job([1] * 28, replace(sampling, max_tokens=4), 0, {})]
    jobs += [decoding.Job([1, 2], sampling, seed, {}) for seed in range(15)]
    together = decoding.decode(model, jobs, 64)
    assert together[0].token_ids == decoding.decode(model, jobs[:1], 64)[0].token_ids


def test_submodules_keep_their_modes(tokenizer):
    model = tiny().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    HFBackend(model, tokenizer).generate(prompts(1))
    assert [module.training for module in model.modules()] == before


def test_identity_knows_the_models_limit(tokenizer):
    model = tiny()
    short = HFBackend(model, tokenizer, max_model_len=20)
    assert short.identity != HFBackend(model, tokenizer).identity
