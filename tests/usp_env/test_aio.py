"""`AsyncDialogue`: the single environment's episodes, awaited; cancelled calls have not happened."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from doubles import Speaker

from usp_env import users
from usp_env.aio import AsyncDialogue
from usp_env.backends.base import Generation, Request
from usp_env.backends.coalesce import CoalescingBackend
from usp_env.backends.scripted import ScriptedBackend
from usp_env.env import DialogueEnv
from usp_env.errors import BackendError, CallOrderError, InvalidActionError, SpecError, UspError
from usp_env.records import EpisodeSpec, Reply
from usp_env.transcripts import read_transcripts

NOUNS = ("soup", "rust", "taxes", "Perth", "lettuce", "chess", "sonnets", "bikes")


def line(request: Request) -> Generation:
    """Tells the request from all others: who asks, what was said, and the seed."""
    said = " ".join(message["content"][-12:] for message in request.messages)
    end = request.can_end and request.seed % 7 == 0
    noun = NOUNS[request.seed % 8]
    return Generation(f"{noun} {request.seed % 99991} after {len(said)}", finish_reason="end" if end else "stop")


def user(backend: object) -> object:
    return users.load("usp:anything", lambda spec: backend)


def agent(observation: tuple[dict[str, str], ...]) -> str:
    return f"about {observation[-1]['content'][:20]}: {len(observation)}"


SPECS = [EpisodeSpec(f"p{i % 6}", "uniform", 1000 + i) for i in range(256)]
SETTINGS = {"population": "uniform", "max_turns": 5}


def single(sampler: object, spec: EpisodeSpec, reward: object = None) -> tuple[object, ...]:
    env = DialogueEnv(user(ScriptedBackend(line)), sampler, reward, **SETTINGS)
    observation, info = env.reset(options={"episode": spec})
    rewards, done = [], False
    while not done:
        observation, reward, terminated, truncated, info = env.step(agent(observation))
        rewards.append(reward)
        done = terminated or truncated
    return info["messages"], info["end_reason"], rewards


async def talk(dialogue: AsyncDialogue, spec: EpisodeSpec, chance: random.Random) -> tuple[object, ...]:
    observation, info = await dialogue.reset(spec)
    rewards, done = [], False
    while not done:
        await asyncio.sleep(chance.random() / 500)
        observation, reward, terminated, truncated, info = await dialogue.step(agent(observation))
        rewards.append(reward)
        done = terminated or truncated
    return info["messages"], info["end_reason"], rewards


def length(profile: object, dialogue: object) -> float:
    return float(sum(len(message.content) for message in dialogue.messages))


def test_256_coroutines_in_random_order_are_the_single_environment(sampler: object) -> None:
    chance = random.Random(0)
    engine = ScriptedBackend(line, latency=0.002)
    partner = user(CoalescingBackend(engine, max_batch=64, max_wait_ms=2))

    async def main() -> list[tuple[object, ...]]:
        order = chance.sample(range(256), 256)
        dialogues = [AsyncDialogue(partner, sampler, length, **SETTINGS) for _ in SPECS]
        made = await asyncio.gather(*(talk(dialogues[i], SPECS[i], chance) for i in order))
        return [result for _, result in sorted(zip(order, made, strict=True), key=lambda pair: pair[0])]

    assert asyncio.run(main()) == [single(sampler, spec, length) for spec in SPECS]
    assert max(engine.batches) > 16
    assert max(engine.batches) <= 64


def test_cancelling_a_tenth_loses_and_crosses_nothing(sampler: object, tmp_path: object) -> None:
    chance = random.Random(1)
    partner = user(CoalescingBackend(ScriptedBackend(line, latency=0.005), max_batch=32, max_wait_ms=2))

    async def stubborn(dialogue: AsyncDialogue, spec: EpisodeSpec) -> tuple[object, ...]:
        """Cancels one call in ten, at a random moment, and makes it again."""
        cancelled = 0

        async def tried(call: object) -> object:
            nonlocal cancelled
            while chance.random() < 0.1:
                task = asyncio.ensure_future(call())
                await asyncio.sleep(chance.random() * 0.01)
                if task.cancel():
                    cancelled += 1
                try:
                    return await task
                except asyncio.CancelledError:
                    continue
            return await call()

        observation, info = await tried(lambda: dialogue.reset(spec))
        rewards, done = [], False
        while not done:
            reply = agent(observation)
            observation, reward, terminated, truncated, info = await tried(lambda reply=reply: dialogue.step(reply))
            rewards.append(reward)
            done = terminated or truncated
        return info["messages"], info["end_reason"], rewards, cancelled

    async def main() -> list[tuple[object, ...]]:
        dialogues = [AsyncDialogue(partner, sampler, None, **SETTINGS) for _ in SPECS]
        first = AsyncDialogue(partner, sampler, None, record=tmp_path / "run", **SETTINGS)
        for dialogue in dialogues:
            dialogue.conductor.record = first.conductor.record
        return await asyncio.gather(*(stubborn(d, spec) for d, spec in zip(dialogues, SPECS, strict=True)))

    made = asyncio.run(main())
    assert [row[:3] for row in made] == [single(sampler, spec) for spec in SPECS]
    assert sum(row[3] for row in made) > 25
    written = read_transcripts(tmp_path / "run")
    assert sorted(t.episode_seed for t in written) == [spec.episode_seed for spec in SPECS]  # each once


def test_a_batched_engine_is_kept_busy(sampler: object) -> None:
    engine = ScriptedBackend(lambda request: f"{NOUNS[request.seed % 8]} {request.seed}", latency=0.1)
    partner = user(CoalescingBackend(engine, max_batch=64))

    async def main() -> tuple[float, int]:
        dialogues = [AsyncDialogue(partner, sampler, None, population="uniform", max_turns=4) for _ in SPECS]
        start = time.perf_counter()
        made = await asyncio.gather(*(talk(d, s, random.Random(0)) for d, s in zip(dialogues, SPECS, strict=True)))
        return time.perf_counter() - start, sum(len(rewards) for _, _, rewards in made)

    shares = []
    while len(shares) < 3 and max(shares, default=0.0) < 0.8:  # a busy machine may need another try
        seconds, steps = asyncio.run(main())
        assert steps == 4 * 256
        # Of a dialogue's four steps the last asks for nothing, the opening does: 4 calls of 64 for each of 4 groups.
        shares.append(4 * 256 / 64 * 0.1 / seconds)
    assert max(shares) >= 0.8, f"{max(shares):.2f} of ideal"


def test_wrong_calls_and_failures_are_typed(sampler: object) -> None:
    async def main() -> None:
        dialogue = AsyncDialogue(user(ScriptedBackend(line, latency=0.05)), sampler, None, **SETTINGS)
        with pytest.raises(CallOrderError, match="reset"):
            await dialogue.step("hi")
        with pytest.raises(SpecError, match="leave options out"):
            await dialogue.reset(SPECS[0], options={"opening": "hi"})
        with pytest.raises(SpecError, match="whole number"):
            await dialogue.reset(seed=-1)
        await dialogue.reset(SPECS[0])
        with pytest.raises(InvalidActionError):
            await dialogue.step(None)
        running = asyncio.ensure_future(dialogue.step("one"))
        await asyncio.sleep(0.01)
        with pytest.raises(CallOrderError, match="under way"):
            await dialogue.step("two")
        observation, *_ = await running
        assert [m["content"] for m in observation if m["role"] == "assistant"] == ["one"]
        await dialogue.step("")
        with pytest.raises(CallOrderError, match="bad_action"):
            await dialogue.step("more")

        broken = AsyncDialogue(Speaker(lambda view, seed: Reply("", error=BackendError("gone"))), sampler, None, **SETTINGS)
        with pytest.raises(BackendError, match="gone"):
            await broken.reset(SPECS[0])
        dying = AsyncDialogue(user(ScriptedBackend(["hello", BackendError("gone")])), sampler, None, **SETTINGS)
        await dying.reset(SPECS[0])
        _, reward, _, truncated, info = await dying.step("hi")
        assert (reward, truncated, info["outcome"], info["valid"]) == (0.0, True, "infra_failure", False)

    asyncio.run(main())


def test_partners_that_cannot_be_awaited_answer_in_a_thread(sampler: object) -> None:
    async def main() -> int:
        dialogue = AsyncDialogue(Speaker(lambda view, seed: f"{NOUNS[seed % 8]}"), sampler, None, **SETTINGS)
        await dialogue.reset(seed=3)
        observation, *_ = await dialogue.step("hm")
        return len(observation)

    assert asyncio.run(main()) == 3


def test_a_seed_gives_the_single_environments_episode(sampler: object) -> None:
    async def main() -> object:
        dialogue = AsyncDialogue(user(ScriptedBackend(line)), sampler, None, **SETTINGS)
        return [(await dialogue.reset(seed=5))[1], (await dialogue.reset())[1]]

    env = DialogueEnv(user(ScriptedBackend(line)), sampler, None, **SETTINGS)
    assert asyncio.run(main()) == [env.reset(seed=5)[1], env.reset()[1]]


def test_stop_iteration_hangs_nobody(sampler: object) -> None:
    answers = iter(["what is soup?"])

    async def run(backend: object) -> None:
        dialogue = AsyncDialogue(user(backend), sampler, **SETTINGS)
        await dialogue.reset(SPECS[0])
        await dialogue.step("Soup is wet.")

    class Partner(Speaker):
        pass

    dry = ScriptedBackend(lambda request: next(answers))
    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(asyncio.wait_for(run(CoalescingBackend(dry)), 5))

    async def plain() -> None:
        dialogue = AsyncDialogue(Partner(lambda view, seed: next(iter(()))), sampler, **SETTINGS)
        await dialogue.reset(SPECS[0])

    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(asyncio.wait_for(plain(), 5))


def test_a_cancelled_reset_has_drawn_nothing(sampler: object) -> None:
    slow = ScriptedBackend(line)

    async def ids(cancel: bool) -> list[str]:
        dialogue = AsyncDialogue(user(CoalescingBackend(slow, max_wait_ms=50)), sampler, **SETTINGS)
        found = [(await dialogue.reset(seed=7))[1]["episode_id"]]
        if cancel:
            task = asyncio.create_task(dialogue.reset())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        return [*found, (await dialogue.reset())[1]["episode_id"]]

    assert asyncio.run(ids(True)) == asyncio.run(ids(False))


def test_one_reply_for_one_view(sampler: object) -> None:
    class Wrong(Speaker):
        def respond(self, views: object, seeds: object) -> list[Reply]:
            return []

    async def run() -> None:
        await AsyncDialogue(Wrong(lambda view, seed: None), sampler, **SETTINGS).reset(SPECS[0])

    with pytest.raises(UspError, match="expected one reply for one view, got 0"):
        asyncio.run(run())
