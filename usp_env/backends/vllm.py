"""vLLM in this program: continuous batching, paged keys and values, prefix caching, LoRA requests.

    vllm:smollm2-135m          vllm:org/name?gpu_memory_utilization=0.5&adapter=path/to/lora

Prompts are token ids of our own renderer; vLLM's chat template is never used. Each request samples from its own seed,
and log-probabilities are those of the distribution that was sampled from (temperature, bans and `top_p` applied; 0.0 for a
greedy token), as in `usp_env.backends.hf`. Texts of the two engines differ: each draws its noise its own way.

vLLM runs the model in a process of its own, which touches no random state here. Where it spawns that (on a CPU, or once CUDA
is in use), a script needs `if __name__ == "__main__":` around what it does. `VLLM_…` variables keep their meaning.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from usp_env.backends.base import FinishReason, Generation, Request, failed
from usp_env.backends.digests import hash_folder
from usp_env.backends.spec import ModelSpec
from usp_env.errors import BackendError, MissingAssetError, SpecError, UnknownNameError, require
from usp_env.models import assets
from usp_env.rendering import RENDERER_VERSION, Renderer

if TYPE_CHECKING:
    from torch import Tensor

_OTHER_ENGINES = ("key_env", "timeout", "concurrency")
_DTYPES = ("auto", "bfloat16", "float16", "float32")
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # sizes of LoRA that vLLM makes room for
_CPU_BLOCK = 32  # tokens that share a cache entry; vLLM's 128 on a CPU is longer than most first turns
_CPU_CACHE_GIB = 4.0
_SHARD_BYTES = 2**31
_BANNED = float("-inf")


class VLLMBackend:
    """A model in vLLM behind the `Backend` protocol.

    Args:
        model: A local folder, or a model of the Hugging Face hub.
        spec: Recorded in transcripts.
        dtype: None is float32 on a CPU and bfloat16 elsewhere.
        revision: Of the hub.
        max_model_len: Most tokens of prompt and reply; None takes the model's own limit.
        gpu_memory_utilization: Share of the device's memory that vLLM may take, weights included.
        prefix_gib: Memory for keys and values in GiB, in place of that share. None on a CPU: a quarter of what is free, at
            most 4.
        adapters: Name in `Request.adapter` to a PEFT folder over this model.
        eager: Whether to leave compilation and CUDA graphs out. None: on a CPU only, where compiling takes minutes.
        **engine: Further arguments of `vllm.LLM`, e.g. `tensor_parallel_size`.

    Attributes:
        llm: The `vllm.LLM`; None once closed.
        version: How often the weights have been replaced.

    Raises:
        MissingAssetError: The weights are not here and cannot be had.
        SpecError: vLLM refuses an argument.
        BackendError: The engine does not start.
    """

    def __init__(
        self,
        model: str,
        *,
        spec: str = "",
        dtype: str | None = None,
        revision: str | None = None,
        max_model_len: int | None = None,
        gpu_memory_utilization: float | None = None,
        prefix_gib: float | None = None,
        adapters: Mapping[str, str] | None = None,
        eager: bool | None = None,
        **engine: Any,
    ) -> None:
        self._vllm = _import_vllm()
        self.spec, self.model, self.revision, self.version = spec or f"vllm:{model}", model, revision, 0
        self._folders = dict(adapters or {})
        self._lock = threading.Lock()
        self._on_cpu = on_cpu = _platform() == "cpu"
        if on_cpu and gpu_memory_utilization is None and prefix_gib is None:
            prefix_gib = _cpu_cache_gib()
        options: dict[str, Any] = {
            "dtype": dtype or ("float32" if on_cpu else "bfloat16"),
            "revision": revision,
            "tokenizer_revision": revision,
            "max_model_len": max_model_len,
            "gpu_memory_utilization": gpu_memory_utilization,
            "kv_cache_memory_bytes": None if prefix_gib is None else int(prefix_gib * 2**30),
            "block_size": _CPU_BLOCK if on_cpu else None,
            "enforce_eager": on_cpu if eager is None else eager,
            # On a CPU, vLLM 0.32 crashes on a seeded request whose prompt it reads in parts: torch's CPU generator has no offset.
            "enable_chunked_prefill": False if on_cpu else None,
        }
        options = {key: value for key, value in options.items() if value is not None}
        options |= {"enable_prefix_caching": True, "logprobs_mode": "processed_logprobs", "generation_config": "vllm"}
        self.tokenizer = _tokenizer(model, revision)
        self.renderer = Renderer(self.tokenizer)
        self._loras = _lora_requests(self._folders)
        self.llm: Any = self._start({**options, **_lora_options(self._folders), **engine})
        config = self.llm.model_config
        self.max_model_len = int(config.max_model_len)
        known = max(self.tokenizer.get_vocab().values()) + 1
        self._padding = dict.fromkeys(range(known, config.get_vocab_size()), _BANNED)

    @classmethod
    def from_spec(cls, spec: ModelSpec) -> VLLMBackend:
        """Load a packaged model, a local folder, or a model of the Hugging Face hub.

        Raises:
            MissingExtraError: vLLM is not installed.
            MissingAssetError: The weights are not here and cannot be had.
            SpecError: An option of another engine, a bad dtype, or a device that this build of vLLM does not drive.
        """
        options = spec.options
        if wrong := [key for key in _OTHER_ENGINES if key in options]:
            raise SpecError(f"spec {str(spec)!r}: {', '.join(wrong)} means nothing to a model in this program")
        if options.get("dtype", "auto") not in _DTYPES:
            raise SpecError(f"spec {str(spec)!r}: expected a dtype of {', '.join(_DTYPES)}, got {options['dtype']!r}")
        _import_vllm()
        device, drives = options.get("device"), _platform()
        if device is not None and device.partition(":")[0] != drives:
            raise SpecError(f"spec {str(spec)!r}: this build of vLLM drives {drives!r}, not {device!r}; leave 'device' out")
        adapter = options.get("adapter")
        return cls(
            _where(spec.model, options.get("revision")),
            spec=str(spec),
            dtype=options.get("dtype"),
            revision=options.get("revision"),
            max_model_len=options.get("max_model_len"),
            gpu_memory_utilization=options.get("gpu_memory_utilization"),
            prefix_gib=options.get("prefix_gib"),
            adapters={adapter: adapter} if adapter else None,
        )

    @property
    def mutable(self) -> bool:
        """Whether the weights have been replaced; they may be again."""
        return self.version > 0

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides the output besides the request."""
        return {
            "engine": "vllm",
            "engine_version": self._vllm.__version__,
            "weights": f"live {self.version}" if self.version else self._weights(),
            "dtype": str(self._engine().model_config.dtype).removeprefix("torch."),
            "max_model_len": self.max_model_len,
            "renderer": RENDERER_VERSION,
            "adapters": {name: hash_folder(folder) for name, folder in self._folders.items()},
        }

    def __repr__(self) -> str:
        return f"VLLMBackend({self.spec!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> VLLMBackend:
        return self  # engines are shared

    def count_tokens(self, text: str) -> int:
        """Tokens of a text by itself."""
        return len(self.renderer.encode(text))

    async def agenerate(self, requests: Sequence[Request]) -> list[Generation]:
        """`generate` in a thread."""
        return await asyncio.to_thread(self.generate, requests)

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """One generation per request, in order.

        Raises:
            BackendError: The engine is closed or has died, or it refused every request.
            SpecError: A request without prompt, one that cannot be rendered, or a temperature that vLLM does not know.
            UnknownNameError: An adapter that nothing answers to.
        """
        with self._lock:  # neither fast tokenizers nor `vllm.LLM` bear two threads
            engine = self._engine()
            prompts = [self._prompt(request) for request in requests]
            results: dict[int, Generation] = {}
            for i, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
                if len(prompt) + request.sampling.max_tokens > self.max_model_len:
                    usage = {"prompt_tokens": len(prompt), "completion_tokens": 0}
                    results[i] = Generation("", (), (), "context_limit", usage)
            for members in self._groups(requests, [i for i in range(len(requests)) if i not in results]):
                results |= self._run(engine, requests, prompts, members)
        if results and all(result.error for result in results.values()):
            raise BackendError(f"no request of {len(requests)} could be served: {results[0].error}") from results[0].error
        return [results[i] for i in range(len(requests))]

    def forget(self) -> None:
        """Drop all kept keys and values; `load_weights` does so by itself.

        Raises:
            BackendError: The engine is closed, or did not drop them.
        """
        with self._lock:
            if not self._engine().reset_prefix_cache():
                raise BackendError(f"{self.spec}: vLLM did not drop its kept keys and values")

    def load_weights(self, weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Replace the model's weights, e.g. by those of a policy in training; kept keys and values are dropped.

        They travel as files in the temporary folder (`TMPDIR`; a memory-backed one is fastest), so that they reach the
        engine in whatever process and on whatever devices it runs.

        Args:
            weights: Name to tensor, all of them, under the names of the `transformers` model. LoRA has to be merged before.

        Raises:
            BackendError: The engine refused them; its weights may be a mixture, so close it.
        """
        pairs = weights.items() if isinstance(weights, Mapping) else weights
        with self._lock, tempfile.TemporaryDirectory(prefix="usp-env-weights-") as folder:
            engine = self._engine()
            _save_shards(pairs, Path(folder))
            self.version += 1
            try:
                engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
                if not engine.reset_prefix_cache():
                    raise RuntimeError("vLLM did not drop its kept keys and values")
            except Exception as error:
                raise BackendError(
                    f"{self.spec}: the new weights could not be loaded ({error}); make the backend anew"
                ) from error

    def close(self) -> None:
        """End the engine and free its memory; `generate` raises from then on."""
        with self._lock:
            engine, self.llm = self.llm, None
            if engine is not None:
                engine.llm_engine.engine_core.shutdown()

    def _start(self, options: Mapping[str, Any]) -> Any:
        try:
            return self._vllm.LLM(self.model, **options)
        except ValueError as error:  # what vLLM's own checks raise, in this process
            raise SpecError(f"{self.spec}: vLLM refuses these options: {error}") from error
        except OSError as error:
            raise MissingAssetError(f"model {self.model!r} cannot be loaded: {error}") from error
        except RuntimeError as error:
            raise BackendError(
                f"{self.spec}: vLLM's engine did not start ({error}). Its own message stands above; where memory is short, lower "
                "gpu_memory_utilization, prefix_gib (on a CPU also VLLM_CPU_KVCACHE_SPACE) or max_model_len"
            ) from error

    def _engine(self) -> Any:
        if self.llm is None:
            raise BackendError(f"{self.spec}: the engine is closed; make a new VLLMBackend")
        return self.llm

    def _weights(self) -> str:
        return hash_folder(self.model if Path(self.model).is_dir() else _snapshot(self.model, self.revision))

    def _prompt(self, request: Request) -> tuple[int, ...]:
        if request.token_ids is not None:
            prompt = tuple(int(i) for i in request.token_ids)
        elif request.messages is not None:
            prompt = self.renderer.render(
                request.messages, generation_role=request.role, chat_template_kwargs=request.chat_template_kwargs
            ).token_ids
        else:
            prompt = ()
        if not prompt:
            raise SpecError("expected a request with messages or token_ids that make a prompt of at least one token")
        if request.adapter is not None and request.adapter not in self._loras:
            raise UnknownNameError("adapter", request.adapter, self._loras)
        if request.sampling.temperature > 2:
            raise SpecError(f"vLLM samples at temperatures from 0 to 2, got {request.sampling.temperature}")
        return prompt

    def _ends(self) -> dict[int, FinishReason]:
        ends: dict[int, FinishReason] = dict.fromkeys(self.renderer.stop_ids, "stop")
        if self.renderer.header_start_id is not None:
            ends[self.renderer.header_start_id] = "role"
        if self.renderer.end_of_conversation_id is not None:
            ends[self.renderer.end_of_conversation_id] = "end"
        return ends

    def _params(self, request: Request) -> Any:
        sampling, over = request.sampling, self.renderer.end_of_conversation_id
        banned = {over: _BANNED} if over is not None and not request.can_end else {}
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            stop=list(sampling.stop),
            stop_token_ids=list(self._ends()),
            ignore_eos=True,  # the renderer knows what ends a reply, and the model's configuration may disagree
            logit_bias=(self._padding | banned) or None,
            seed=request.seed % 2**63,
            logprobs=0,  # of the sampled token alone
            detokenize=bool(sampling.stop),
            skip_clone=True,
        )

    def _groups(self, requests: Sequence[Request], members: list[int]) -> list[list[int]]:
        """What may share a batch: on a CPU, vLLM 0.32 gives rows without an adapter the adapter of a neighbour."""
        if not (self._loras and self._on_cpu):
            return [members]
        bare = [i for i in members if requests[i].adapter is None]
        return [bare, [i for i in members if requests[i].adapter is not None]]

    def _run(
        self, engine: Any, requests: Sequence[Request], prompts: Sequence[tuple[int, ...]], members: list[int]
    ) -> dict[int, Generation]:
        if not members:
            return {}
        try:
            outputs = engine.generate(
                [self._vllm.TokensPrompt(prompt_token_ids=list(prompts[i])) for i in members],
                [self._params(requests[i]) for i in members],
                lora_request=[self._loras.get(requests[i].adapter or "") for i in members] if self._loras else None,
                use_tqdm=False,
            )
        except (self._vllm.exceptions.VLLMClientError, ValueError) as error:
            if len(members) == 1:
                return {members[0]: failed(BackendError(f"{self.spec}: vLLM refuses the request: {error}"))}
        except RuntimeError as error:  # among them: the engine's process has died
            raise self._broken(error) from error
        except self._vllm.exceptions.VLLMError as error:
            raise self._broken(error) from error
        except BaseException:  # interrupted: what is left in the engine must not answer the next call
            engine.llm_engine.abort_request(list(engine.llm_engine.output_processor.request_states), internal=True)
            raise
        else:
            return {i: self._generation(requests[i], output) for i, output in zip(members, outputs, strict=True)}
        half = len(members) // 2  # one of them was refused, and with it all: find out which
        return {**self._run(engine, requests, prompts, members[:half]), **self._run(engine, requests, prompts, members[half:])}

    def _broken(self, error: Exception) -> BackendError:
        return BackendError(
            f"{self.spec}: vLLM's engine failed ({error}). Its own message stands above; start the program again, with less "
            "prefix_gib, gpu_memory_utilization or max_model_len if memory ran out"
        )

    def _generation(self, request: Request, output: Any) -> Generation:
        made = output.outputs[0]
        ids = tuple(int(i) for i in made.token_ids)
        text = self.renderer.decode(ids)
        usage = {
            "prompt_tokens": len(output.prompt_token_ids),
            "completion_tokens": len(ids),
            "cached_tokens": int(output.num_cached_tokens or 0),
        }
        if made.finish_reason not in ("stop", "length"):
            return failed(BackendError(f"{self.spec}: vLLM gave the reply up (finish_reason {made.finish_reason!r})"))
        cuts = [at for mark in request.sampling.stop if (at := text.find(mark)) >= 0]
        reason: FinishReason = "stop" if cuts else self._ends().get(ids[-1] if ids else -1, made.finish_reason)
        greedy = request.sampling.temperature == 0
        logprobs = tuple(0.0 if greedy else float(row[i].logprob) for i, row in zip(ids, made.logprobs, strict=True))
        return Generation(text[: min(cuts)] if cuts else text, ids, logprobs, reason, usage)


def _import_vllm() -> ModuleType:
    """vLLM, quiet and without its reports of usage, unless the variables say otherwise."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    vllm = require("vllm", "vllm")
    require("vllm.exceptions", "vllm")
    return vllm


def _platform() -> str:
    return str(require("vllm.platforms", "vllm").current_platform.device_type)


def _cpu_cache_gib() -> float:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return min(_CPU_CACHE_GIB, free / 4)


def _where(model: str, revision: str | None) -> str:
    """What vLLM is to load: a folder, or a name of the hub where the network may be used."""
    if model in assets.ASSETS:
        return str(assets.path(model))
    return model if Path(model).is_dir() or not assets.offline() else _snapshot(model, revision)


def _snapshot(model: str, revision: str | None) -> str:
    hub = require("huggingface_hub", "vllm")
    try:
        return str(hub.snapshot_download(model, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        raise MissingAssetError(f"model {model!r} is not on this machine, and the network may not be used: {error}") from error


def _tokenizer(model: str, revision: str | None) -> Any:
    transformers = require("transformers", "vllm")
    try:
        options = {"revision": revision or "main", "local_files_only": assets.offline()}
        return transformers.AutoTokenizer.from_pretrained(model, **options)
    except OSError as error:
        raise MissingAssetError(f"model {model!r} cannot be loaded: {error}") from error


def _lora_requests(folders: Mapping[str, str]) -> dict[str, Any]:
    if not folders:
        return {}
    make = require("vllm.lora.request", "vllm").LoRARequest
    return {name: make(name, number, folder) for number, (name, folder) in enumerate(folders.items(), start=1)}


def _lora_options(folders: Mapping[str, str]) -> dict[str, Any]:
    ranks = [1]
    for folder in folders.values():
        file = Path(folder, "adapter_config.json")
        if not file.is_file():
            raise MissingAssetError(f"expected a PEFT folder with adapter_config.json, got {folder!r}")
        ranks.append(int(json.loads(file.read_text("utf-8"))["r"]))
    if max(ranks) > _RANKS[-1]:
        raise SpecError(f"vLLM runs LoRA adapters of rank {_RANKS[-1]} at most, got {max(ranks)}: merge it into the model")
    rank = next(size for size in _RANKS if size >= max(ranks))
    return {"enable_lora": True, "max_lora_rank": rank, "max_loras": min(4, len(folders))} if folders else {}


def _save_shards(pairs: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """`.safetensors` files of at most 2 GiB or one tensor, so that an iterator's weights are never all in memory."""
    save = require("safetensors.torch", "hf").save_file
    shard: dict[str, Tensor] = {}
    size = number = 0
    for name, tensor in pairs:
        if shard and size + tensor.nbytes > _SHARD_BYTES:
            save(shard, folder / f"model-{number:05}.safetensors")
            shard, size, number = {}, 0, number + 1
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()  # a copy: the format holds no tied tensors
        size += tensor.nbytes
    save(shard, folder / f"model-{number:05}.safetensors")
