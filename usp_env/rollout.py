"""Rolls a list of episodes to their ends, many at a time; a finished one makes room for the next.

Used by `usp-env play` and the examples. Trainers that need fixed lanes use `DialogueVectorEnv`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from usp_env.dialogue import Act
from usp_env.driver import Conductor
from usp_env.episode import Episode
from usp_env.records import EpisodeSpec, Reply, check_seed
from usp_env.sampling.base import Sampler
from usp_env.users.base import Partner, replies_of


def plan(sampler: Sampler, populations: Sequence[str], n: int, seed: int) -> list[EpisodeSpec]:
    """`n` episodes spread evenly over populations, the first ones getting what is left over.

    Args:
        sampler: Draws the users.
        populations: Taken in turn.
        n: Episodes in all.
        seed: The k-th episode is the same whatever `n` is.
    """
    rng = np.random.default_rng(check_seed(seed))
    specs = []
    for index in range(n):
        draw = sampler.draw(1, populations[index % len(populations)], rng)[0]
        specs.append(EpisodeSpec(draw.profile.id, draw.population, int(rng.integers(2**53)), None, dict(draw.user_options)))
    return specs


def roll(
    conductor: Conductor,
    agent: Partner,
    episodes: Iterable[EpisodeSpec | Episode],
    lanes: int = 16,
    watch: Callable[[Sequence[Episode]], None] | None = None,
) -> list[Episode]:
    """Let `agent` and the conductor's partner talk until every episode has ended.

    Args:
        conductor: Of an environment whose agent seat is `agent.role`.
        agent: Speaks the agent's seat.
        episodes: Specs to begin, or episodes to go on with.
        lanes: Most conversations at a time.
        watch: Called after each round with the episodes that moved.

    Returns:
        The finished episodes, in the order in which they ended.
    """
    queue = deque(episodes)
    live: list[Episode] = []
    finished: list[Episode] = []
    rng = np.random.default_rng(0)  # a spec fixes its episode: nothing is drawn from it
    while queue or live:
        while queue and len(live) < lanes:
            item = queue.popleft()
            live.append(item if isinstance(item, Episode) else conductor.new_episode(rng, {"episode": item}))
        conductor.run(live)
        talking = [episode for episode in live if not episode.done]
        replies: list[Reply] = []
        if talking:
            with conductor.timing(agent) as noted:
                noted += (replies := ask(agent, talking))
        for episode, reply in zip(talking, replies, strict=True):
            take(episode, reply)
        conductor.run(talking)
        if watch is not None:
            watch(live)
        ended = [episode for episode in live if episode.done]
        conductor.close(ended)
        finished += ended
        live = [episode for episode in live if not episode.done]
    return finished


def ask(agent: Partner, episodes: Sequence[Episode]) -> list[Reply]:
    """The agent's next reply in each episode, in one call."""
    if not episodes:
        return []
    views = [episode.dialogue().view_for(agent.role, episode.profile) for episode in episodes]
    return replies_of(agent, views, [episode.agent_seed for episode in episodes])


def take(episode: Episode, reply: Reply) -> None:
    """The agent's reply as an action; a failure of its engine is infrastructure, not conduct."""
    made = reply.generation
    if reply.error is not None:
        return episode.stop("infra", str(reply.error))
    if made is not None and made.finish_reason == "context_limit":
        return episode.stop("context_limit")
    # The reply ends the conversation by its flag; its text cannot, whatever it quotes.
    if made is None:
        return episode.act(reply.text, reply.ended)
    return episode.act(Act(reply.text, made.token_ids, made.logprobs, made.finish_reason, made.usage), reply.ended)
