"""Embedders on a tiny BERT built here; the packaged MiniLM where it has been fetched."""

from __future__ import annotations

import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from usp_env.errors import MissingAssetError, SpecError, UnknownNameError
from usp_env.models import embedders

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS = "you cook sail fish bread and write short long notes".split()
TEXTS = ["you cook", "you sail and write long notes", "", "fish", "you write short notes and long notes and bread"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A folder with a two-layer BERT of width 16 (without a pooler, so that loading draws one) and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), "utf-8")
    transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


def test_mean_over_own_tokens(tiny):
    embed = embedders.load(tiny)
    model = transformers.AutoModel.from_pretrained(tiny).eval()
    ids = transformers.AutoTokenizer.from_pretrained(tiny)("you cook")["input_ids"]
    assert len(ids) == 4  # [CLS] you cook [SEP]
    with torch.inference_mode():
        mean = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()
    [vector] = embed(["you cook"])
    np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-6)


def test_shape_type_norm_and_order(tiny):
    embed = embedders.load(tiny)
    vectors = embed(TEXTS)
    assert (vectors.shape, vectors.dtype, embed.dim, embed.name) == ((5, 16), np.float32, 16, tiny)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(vectors, np.concatenate([embed([text]) for text in TEXTS]), atol=1e-6)  # padding has no effect
    assert embed([]).shape == (0, 16)


def test_many_batches_keep_the_order(tiny, monkeypatch):
    embed = embedders.load(tiny)
    whole = embed(TEXTS * 3)
    monkeypatch.setattr(embedders, "BATCH_SIZE", 2)
    np.testing.assert_allclose(embed(TEXTS * 3), whole, atol=1e-6)


def test_long_texts_are_cut(tiny):
    model = transformers.AutoModel.from_pretrained(tiny).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    embed = embedders.TransformerEmbedder(model, tokenizer, "tiny", max_tokens=6)
    np.testing.assert_allclose(embed(["you cook fish and"]), embed(["you cook fish and bread and notes"]), atol=1e-6)
    assert not np.allclose(embed(["you cook fish and"]), embed(["you cook fish"]), atol=1e-3)


def test_loaded_once_and_no_random_state_moves(tiny):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    embedders._load.cache_clear()
    embed = embedders.load(tiny)
    embed(TEXTS)
    assert embedders.load(tiny) is embed
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert torch.is_inference_mode_enabled() is False


def test_threads_may_share_it(tiny):
    embed = embedders.load(tiny)
    expected = embed(TEXTS)
    with ThreadPoolExecutor(8) as pool:
        for vectors in pool.map(lambda _: embed(TEXTS), range(40)):
            np.testing.assert_allclose(vectors, expected, atol=1e-6)


def test_one_text_in_place_of_a_list_is_refused(tiny):
    with pytest.raises(SpecError, match="expected a list of texts, got one str 'you cook'"):
        embedders.load(tiny)("you cook")


def test_auto_takes_simcse_only_where_its_weights_are(tiny, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    files = {"config.json", "pytorch_model.bin"}
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repo, file: str(tmp_path / file) if file in files else None)
    monkeypatch.setattr(embedders, "_load", lambda name: name)
    assert embedders.load() == "simcse"
    files.discard("pytorch_model.bin")  # a cache that holds only the configuration
    assert embedders.load("auto") == "minilm"
    assert embedders.load("simcse") == "simcse"


def test_names_that_cannot_be_loaded(tmp_path, monkeypatch):
    with pytest.raises(UnknownNameError, match="did you mean 'minilm'"):
        embedders.load("minlm")
    with pytest.raises(MissingAssetError, match="cannot be read"):
        embedders.load(str(tmp_path))  # a folder without a model
    monkeypatch.setenv("USP_ENV_HOME", str(tmp_path))
    embedders._load.cache_clear()
    with pytest.raises(MissingAssetError, match="usp-env fetch minilm"):
        embedders.load("minilm")


@pytest.mark.assets
def test_minilm_knows_what_is_alike():
    embedders._load.cache_clear()
    embed = embedders.load("minilm")
    a, b, c = embed(["How do I bake bread?", "What is the recipe for a loaf?", "The stock market fell."])
    assert embed.dim == 384
    assert a @ b == pytest.approx(0.7252, abs=2e-3)  # of the model as published
    assert a @ c < 0.2


@pytest.mark.assets
def test_minilm_gives_the_shipped_embeddings():
    from usp_env.sampling import load_sampler

    sampler = load_sampler("sharegpt", "val")
    vectors = embedders.load("minilm")([str(profile) for profile in sampler.bank[:8]])
    np.testing.assert_allclose(vectors, sampler.embeddings_[:8], atol=1e-3)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("kept", [0, 100])
def test_weights_that_are_cut_off(tiny, tmp_path, monkeypatch, file, kept):
    from usp_env.backends import load
    from usp_env.backends.spec import parse
    from usp_env.models import assets, hub

    folder = tmp_path / f"minilm-{assets.ASSETS['minilm'].version}"
    shutil.copytree(tiny, folder)
    (folder / "manifest.json").write_text("{}")
    (folder / file).write_bytes((folder / file).read_bytes()[:kept])
    monkeypatch.setenv("USP_ENV_HOME", str(tmp_path))
    for loaded in (lambda: embedders._load.__wrapped__("minilm"), lambda: load(parse("minilm"))):
        with pytest.raises(MissingAssetError, match="`usp-env fetch minilm --force` brings it again"):
            loaded()
    with pytest.raises(MissingAssetError, match="cannot be read"):
        hub.detector(str(folder))


def test_a_lone_surrogate_is_refused_by_name(tiny):
    with pytest.raises(SpecError, match="lone surrogate at character 4"):
        embedders.load(tiny)(["you", "cook\ud800"])
