"""Models in this process, through `transformers`: one decode loop for every row of a batch.

A request gives the same text alone and in any batch (float32 on a CPU: but for near-ties that the rounding of
another batch's matrix products decides). Log-probabilities are those of the distribution that was sampled from:
float32 log-softmax after temperature, forbidden ids and `top_p`; 0.0 for a greedy token. No random state but a request's
own is used.

Keys and values of finished rows are kept, so that a conversation's next turn reads only what is new; `usage["cached_tokens"]`
counts what was not read again. Weights that change make them wrong: a mutable backend keeps none unless it is
told to (`prefix_gib`), and its owner calls `forget()` after every update. Where nobody said so, PyTorch's count of writes to
the parameters tells, which writes through `.data` do not move: these need `mutable=True` and `forget()` in any case.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from usp_env.backends.adapters import BASE, active, add_adapter, mixes, speaking_as
from usp_env.backends.attention import sharing_keys
from usp_env.backends.base import FinishReason, Generation, Request, failed
from usp_env.backends.batching import batches, padding_worth_a_pass
from usp_env.backends.decoding import Decoded, Job, decode, keeps_states
from usp_env.backends.digests import hash_folder, hash_parameters, writes
from usp_env.backends.prefixes import PrefixStore
from usp_env.backends.spec import ModelSpec
from usp_env.errors import BackendError, MissingAssetError, SpecError, UnknownNameError, require
from usp_env.models import assets
from usp_env.rendering import RENDERER_VERSION, Renderer

require("torch", "hf")
import torch  # noqa: E402

_NOT_A_NUMBER = "the model's logits hold NaN or infinity, so that nothing can be sampled: its weights, or its dtype, are at fault"
_OTHER_ENGINES = ("gpu_memory_utilization", "key_env", "timeout", "concurrency")


class HFBackend:
    """A causal language model and its tokenizer behind the `Backend` protocol.

    Args:
        model: A live `transformers` (or PEFT) causal language model. It is put into eval mode during a call and back.
        tokenizer: Its fast tokenizer.
        spec: Recorded in transcripts.
        device: Moves the model there; None leaves it where it is.
        micro_batch: Most rows decoded together.
        max_batch_tokens: Most tokens (padded prompts and replies) decoded together; bounds the memory of keys and values.
        max_model_len: Most tokens of prompt and reply; None takes the model's own limit.
        adapters: Name in `Request.adapter` to a PEFT folder over this model. Without any, requests may name adapters that
            a live PEFT model already has, and None uses the model as it is. Those of folders share batches where they are
            plain LoRA; those of a live model follow each other.
        renderer: Turns messages into ids; None makes the tokenizer's.
        mutable: Whether the weights change during the backend's life.
        prefix_gib: Most memory for keys and values kept from call to call, in GiB; 0 keeps none. None: a quarter of what
            is free, and none where the model is mutable.

    Attributes:
        identity: Weights digest (`live` when mutable) as they are now, dtype, renderer version, adapters' digests.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        spec: str = "",
        device: str | None = None,
        micro_batch: int = 64,
        max_batch_tokens: int = 65_536,
        max_model_len: int | None = None,
        adapters: Mapping[str, str] | None = None,
        renderer: Renderer | None = None,
        mutable: bool = False,
        prefix_gib: float | None = None,
    ) -> None:
        self.spec, self.mutable, self.tokenizer = spec or str(model.config._name_or_path), mutable, tokenizer
        self.renderer = renderer or Renderer(tokenizer)
        self._hash_given: Callable[[], str] = lambda: hash_parameters(self.model)
        own_limit = int(getattr(model.config, "max_position_embeddings", None) or 1_000_000)
        self.max_model_len = min(max_model_len or own_limit, own_limit)
        self.micro_batch, self.max_batch_tokens = micro_batch, max_batch_tokens
        self._padding = padding_worth_a_pass(model)
        self._vocabulary = max(tokenizer.get_vocab().values()) + 1
        self._folders = dict(adapters or {})
        # PEFT allows no dots or slashes in an adapter's name.
        self._adapters = {name: f"adapter_{i}" for i, name in enumerate(self._folders)}
        for name, folder in self._folders.items():
            model = add_adapter(model, folder, self._adapters[name])
        self.model = model.to(device) if device is not None else model
        if not self._adapters:
            self._adapters = {name: name for name in getattr(model, "peft_config", {})}
        if prefix_gib is None:
            prefix_gib = 0.0 if mutable else _free_bytes(self.model.device) / 4 / 2**30
        self.prefixes = PrefixStore(int(prefix_gib * 2**30)) if prefix_gib > 0 and keeps_states(model) else None
        self._given, self._read = writes(self.model), -1  # counts of writes: at the start, and when keys and values were made
        self._digest: tuple[int, str] | None = None  # of the weights at a count of writes
        self._lock = threading.Lock()  # adapters and eval mode are state of the model

    @classmethod
    def from_spec(cls, spec: ModelSpec) -> HFBackend:
        """Load a packaged model, a local folder, or a model of the Hugging Face hub.

        Raises:
            MissingAssetError: The weights are not here and cannot be had.
            SpecError: An option of another engine, or a bad dtype or device.
        """
        if wrong := [key for key in _OTHER_ENGINES if key in spec.options]:
            raise SpecError(f"spec {str(spec)!r}: {', '.join(wrong)} means nothing to a model in this process")
        transformers = require("transformers", "hf")
        device = spec.options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise SpecError(
                f"spec {str(spec)!r}: this machine (or this build of torch) has no GPU; leave 'device' out, or use device=cpu"
            )
        dtype = getattr(torch, spec.options.get("dtype") or ("float32" if device == "cpu" else "bfloat16"), None)
        if not isinstance(dtype, torch.dtype):
            raise SpecError(
                f"spec {str(spec)!r}: expected a dtype such as float32 or bfloat16, got {spec.options.get('dtype')!r}"
            )
        where = str(assets.path(spec.model)) if spec.model in assets.ASSETS else spec.model
        options = {"revision": spec.options.get("revision", "main"), "local_files_only": assets.offline()}
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
            with _no_progress_bar(transformers):
                model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **options).eval()
        except assets.unreadable() as error:
            hint = " (USP_ENV_OFFLINE forbids the network)" if assets.offline() and spec.model not in assets.ASSETS else ""
            raise MissingAssetError(f"model {spec.model!r} cannot be loaded{hint}: {error}{assets.mend(where)}") from error
        adapter = spec.options.get("adapter")
        backend = cls(
            model,
            tokenizer,
            spec=str(spec),
            device=device,
            max_model_len=spec.options.get("max_model_len"),
            adapters={adapter: adapter} if adapter else None,
            prefix_gib=spec.options.get("prefix_gib"),
        )
        if Path(where).is_dir():
            backend._hash_given = lambda: hash_folder(where)
        return backend

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides the output besides the request. Weights that were written to are digested again, which takes time."""
        return {
            "engine": "hf",
            "weights": "live" if self.mutable else self._weights(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "max_model_len": self.max_model_len,
            "renderer": RENDERER_VERSION,
            "adapters": self._adapter_digests,
            **({} if self._folders or not (names := active(self.model)) else {"active": names}),
        }

    @cached_property
    def _adapter_digests(self) -> dict[str, str]:
        return {name: hash_folder(folder) for name, folder in self._folders.items()}

    def _weights(self) -> str:
        count = writes(self.model)
        if self._digest is None or self._digest[0] != count:
            self._digest = count, self._hash_given() if count == self._given else hash_parameters(self.model)
        return self._digest[1]

    def forget(self) -> None:
        """Drop all kept keys and values: the weights have changed, perhaps through `.data`, which nobody else notices."""
        with self._lock:
            if self.prefixes is not None:
                self.prefixes.clear()

    def count_tokens(self, text: str) -> int:
        """Tokens of a text by itself."""
        return len(self.renderer.encode(text))

    async def agenerate(self, requests: Sequence[Request]) -> list[Generation]:
        """`generate` in a thread."""
        return await asyncio.to_thread(self.generate, requests)

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """One generation per request, in order.

        Raises:
            BackendError: No request could be served.
            SpecError: A request without prompt, or with messages that cannot be rendered.
            UnknownNameError: An adapter that nothing answers to.
        """
        with self._lock:  # fast tokenizers do not bear two threads
            jobs = [self._job(request) for request in requests]
        results = {i: unread for i, job in enumerate(jobs) if (unread := self._unread(job)) is not None}
        readable = [i for i in range(len(jobs)) if i not in results]
        with self._lock, self._evaluating(), sharing_keys(self.model):
            self._check_weights()
            owners = [self._owner(request.adapter) for request in requests]
            for speaking, members in self._groups(requests, jobs, readable):
                with speaking:
                    known = {i: self._known(owners[i], jobs[i]) for i in members}
                    for batch in self._batches(jobs, members):
                        results.update(self._run(jobs, batch, known, owners))
        if results and all(result.error for result in results.values()):
            raise BackendError(f"no request of {len(requests)} could be served: {results[0].error}") from results[0].error
        return [results[i] for i in range(len(requests))]

    def _job(self, request: Request) -> Job:
        if request.token_ids is not None:
            prompt = tuple(request.token_ids)
        elif request.messages is not None:
            prompt = self.renderer.render(
                request.messages, generation_role=request.role, chat_template_kwargs=request.chat_template_kwargs
            ).token_ids
        else:
            prompt = ()
        if not prompt:
            raise SpecError("expected a request with messages or token_ids that make a prompt of at least one token")
        if request.adapter is not None and request.adapter not in self._adapters:
            raise UnknownNameError("adapter", request.adapter, self._adapters)
        ends: dict[int, FinishReason] = dict.fromkeys(self.renderer.stop_ids, "stop")
        if self.renderer.header_start_id is not None:
            ends[self.renderer.header_start_id] = "role"
        over = self.renderer.end_of_conversation_id
        if over is not None:
            ends[over] = "end"
        banned = frozenset() if over is None or request.can_end else frozenset([over])
        return Job(prompt, request.sampling, request.seed, ends, banned, self._stopper(request.sampling.stop))

    def _unread(self, job: Job) -> Generation | None:
        """What stands for a prompt that the model cannot read; in a batch it would take the other rows with it."""
        if len(job.prompt) + job.sampling.max_tokens > self.max_model_len:
            usage = {"prompt_tokens": len(job.prompt), "completion_tokens": 0}
            return Generation("", (), (), "context_limit", usage)
        size = int(self.model.config.get_text_config().vocab_size)  # of the embedding; now, since it may be resized
        if (unknown := next((i for i in job.prompt if not 0 <= i < size), None)) is not None:
            return failed(BackendError(f"{self.spec}: expected token ids from 0 to {size - 1}, got {unknown}"))
        return None

    def _stopper(self, stop: tuple[str, ...]) -> Callable[[list[int]], bool] | None:
        if not stop:
            return None
        window = 4 * max(map(len, stop)) + 8  # a character is at most four bytes, a token at least one

        def stopped(token_ids: list[int]) -> bool:
            tail = self.renderer.decode(token_ids[-window:])
            return any(mark in tail for mark in stop)

        return stopped

    def _groups(
        self, requests: Sequence[Request], jobs: list[Job], members: Sequence[int]
    ) -> Iterator[tuple[contextlib.AbstractContextManager[None], list[int]]]:
        """Which requests are decoded together, and the state that the model has to be in meanwhile.

        Where adapters that may mix are asked for, one batch holds them all: its jobs name theirs.
        """
        groups: dict[str | None, list[int]] = {}
        for i in members:
            groups.setdefault(requests[i].adapter, []).append(i)
        names = {adapter: BASE if adapter is None else self._adapters[adapter] for adapter in groups}
        if len(groups) > 1 and self._folders and mixes(self.model, list(names.values())):
            for i in members:
                jobs[i] = replace(jobs[i], adapter=names[requests[i].adapter])
            yield contextlib.nullcontext(), list(members)
            return
        for adapter, together in groups.items():
            as_it_is = adapter is None and not self._folders
            name = None if adapter is None else names[adapter]
            yield contextlib.nullcontext() if as_it_is else speaking_as(self.model, name), together

    def _known(self, owner: str, job: Job) -> Any:
        return None if self.prefixes is None else self.prefixes.find(owner, job.prompt)

    def _owner(self, adapter: str | None) -> str:
        """Whose keys and values these are: without folders of ours, a model speaks through whatever adapters are active."""
        if adapter is None and not self._folders and (names := active(self.model)):
            return f"active {names}"
        return adapter or ""

    def _check_weights(self) -> None:
        """Drop what was kept if a parameter was written to since, by someone who did not say that the model is mutable."""
        if self.prefixes is not None:
            count = writes(self.model)
            if count != self._read:
                self.prefixes.clear()
            self._read = count

    def _batches(self, jobs: Sequence[Job], members: Sequence[int]) -> Iterator[list[int]]:
        prompts = [len(jobs[i].prompt) for i in members]
        replies = [jobs[i].sampling.max_tokens for i in members]
        for batch in batches(prompts, replies, self.micro_batch, self.max_batch_tokens, self._padding):
            yield [members[row] for row in batch]

    def _run(
        self, jobs: Sequence[Job], batch: list[int], known: Mapping[int, Any], owners: Sequence[str]
    ) -> dict[int, Generation]:
        states, keep = [known[i] for i in batch], self.prefixes is not None
        try:
            decoded = decode(self.model, [jobs[i] for i in batch], self._vocabulary, states, keep)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1 and not self.prefixes:
                return {batch[0]: failed(BackendError(f"{self.spec}: out of memory on one request: {error}"))}
            half = len(batch) // 2
        except (RuntimeError, IndexError) as error:
            failure = BackendError(f"{self.spec}: the model failed on {len(batch)} requests: {error}")
            failure.__cause__ = error
            return {i: failed(failure) for i in batch}
        else:
            for i, row in zip(batch, decoded, strict=True):
                if self.prefixes is not None and row.states is not None:
                    self.prefixes.keep(owners[i], (*jobs[i].prompt, *row.token_ids[:-1]), row.states)
            return {i: self._generation(jobs[i], row, known[i]) for i, row in zip(batch, decoded, strict=True)}
        # Outside the handler, whose traceback would keep the failed batch's tensors alive. What is kept has to go first.
        if self.prefixes is not None and len(self.prefixes):
            self.prefixes.clear()
            states, half = [], len(batch)
            known = dict.fromkeys(batch)
        torch.cuda.empty_cache()
        if half == len(batch):
            return self._run(jobs, batch, known, owners)
        return {
            **self._run(jobs, batch[:half], known, owners),
            **self._run(jobs, batch[half:], known, owners),
        }

    def _generation(self, job: Job, row: Decoded, known: Any) -> Generation:
        if row.reason == "error":
            return failed(BackendError(f"{self.spec}: {_NOT_A_NUMBER} (after {len(row.token_ids)} tokens of the reply)"))
        text = self.renderer.decode(row.token_ids)
        cuts = [at for mark in job.sampling.stop if (at := text.find(mark)) >= 0]
        usage = {
            "prompt_tokens": len(job.prompt),
            "completion_tokens": len(row.token_ids),
            "cached_tokens": 0 if known is None else known.shape[-2],
        }
        return Generation(text[: min(cuts)] if cuts else text, tuple(row.token_ids), tuple(row.logprobs), row.reason, usage)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Eval mode, and every module's mode as it was afterwards."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextlib.contextmanager
def _no_progress_bar(transformers: Any) -> Iterator[None]:
    """`transformers` draws one over whatever the terminal shows."""
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _free_bytes(device: Any) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # a system that does not tell
        free = 16 * 2**30
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    text = limit.read_text("ascii").strip() if limit.is_file() else "max"
    return min(free, 16 * 2**30, int(text) if text.isdigit() else free)
