"""The same seed gives the same transcript: alone and among 64, scripted, replayed from a store, and with a real model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from usp_env import users
from usp_env.backends.base import Request
from usp_env.backends.cache import CacheBackend
from usp_env.backends.scripted import ScriptedBackend
from usp_env.env import DialogueEnv
from usp_env.records import EpisodeSpec
from usp_env.sampling import load_sampler
from usp_env.transcripts import transcribe
from usp_env.users import usp
from usp_env.users.base import ModelSpeaker, Partner
from usp_env.vector import DialogueVectorEnv

ANSWERS = ("Happy to help.", "Yes, that works.", "Tell me more about it.")


def speaker(backend: object) -> Partner:
    return ModelSpeaker(backend, "user", "test", usp.render, "user", usp.SAMPLING, can_end=True)


def noisy(request: Request) -> str:
    """A reply that depends on everything a model's would: the prompt and the seed."""
    return f"{request.seed} after {len(request.messages)} messages, {len(request.messages[0]['content'])}"


def singles(partner: Partner, seeds: range, steps: int = 3) -> list[str]:
    env = DialogueEnv(partner, load_sampler(), max_turns=3)
    found = []
    for seed in seeds:
        env.reset(seed=seed)
        for answer in ANSWERS[:steps]:
            if not env.episode.done:
                env.step(answer)
        found.append(json.dumps(transcribe(env.episode, {}).to_json()))
    return found


def lanes(partner: Partner, seeds: range, n: int = 64) -> list[str]:
    envs = DialogueVectorEnv(n, partner, load_sampler(), autoreset_mode="NextStep", max_turns=3)
    found = []
    for start in range(seeds.start, seeds.stop, n):
        envs.reset(seed=start)
        episodes = list(envs.episodes)
        for answer in ANSWERS:
            envs.step([answer] * n)
        found += [json.dumps(transcribe(episode, {}).to_json()) for episode in episodes]
    return found[: len(seeds)]


def test_100_seeds_alone_and_among_64_are_bit_identical() -> None:
    alone = singles(speaker(ScriptedBackend(noisy)), range(100))
    assert lanes(speaker(ScriptedBackend(noisy)), range(128))[:100] == alone
    assert len(set(alone)) == 100
    assert singles(users.load("scripted"), range(100)) == lanes(users.load("scripted"), range(128))[:100]


def test_a_store_replays_100_seeds_bit_identically(tmp_path: Path) -> None:
    store = tmp_path / "calls.sqlite"
    alone = singles(speaker(CacheBackend(ScriptedBackend(noisy), store, "record")), range(100))
    strict = CacheBackend(None, store, "strict")
    assert singles(speaker(strict), range(100)) == alone
    assert lanes(speaker(strict), range(64)) == alone[:64]


def test_a_spec_alone_equals_that_episode_among_64() -> None:
    sampler = load_sampler()
    specs = [EpisodeSpec(sampler.bank[i].id, "uniform", 10_000 + i) for i in range(64)]
    envs = DialogueVectorEnv(64, speaker(ScriptedBackend(noisy)), sampler, autoreset_mode="Disabled")
    envs.reset(options=[{"episode": spec} for spec in specs])
    envs.step(["ok"] * 64)
    env = DialogueEnv(speaker(ScriptedBackend(noisy)), sampler)
    for lane, spec in enumerate(specs):
        env.reset(options={"episode": spec})
        assert env.step("ok")[0] == envs.episodes[lane].observation()


@pytest.mark.assets
def test_global_random_states_are_untouched_by_a_real_model() -> None:
    torch = pytest.importorskip("torch")

    def states() -> tuple[object, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    user = users.load("usp-mini?max_tokens=8")
    before = states()
    singles(user, range(1), steps=1)
    assert states() == before


@pytest.mark.assets
@pytest.mark.slow
def test_64_seeds_of_a_real_model_alone_and_among_64() -> None:
    """≥ 99 % of the user turns (float32, CPU)."""
    pytest.importorskip("torch")
    user = users.load("usp-mini?max_tokens=32")
    alone = [json.loads(text)["messages"] for text in singles(user, range(64))]
    among = [json.loads(text)["messages"] for text in lanes(user, range(64))]
    turns = [
        (a["content"], b["content"])
        for one, other in zip(alone, among, strict=True)
        for a, b in zip(one, other, strict=False)
        if a["role"] == "user"
    ]
    same = sum(a == b for a, b in turns) / len(turns)
    print(f"{same:.4f} of {len(turns)} user turns are the same alone and among 64")
    assert len(turns) >= 128
    assert same >= 0.99


@pytest.mark.assets
def test_branches_of_a_real_user_differ_and_repeat() -> None:
    pytest.importorskip("torch")
    env = DialogueEnv(users.load("usp-mini?max_tokens=10&temperature=1&top_p=1"), load_sampler())
    env.reset(seed=1, options={"opening": "Can you help me plan a garden?"})
    env.step("Happy to help. How large is it?")
    before = env.snapshot()

    def next_turns(diverge: bool) -> set[str]:
        return {child.step("And how much sun does it get?")[0][-1]["content"] for child in env.fork(8, diverge)}

    assert len(next_turns(True)) >= 2
    assert len(next_turns(False)) == 1
    assert env.snapshot() == before
