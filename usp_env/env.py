"""`DialogueEnv`: one conversation as a `gymnasium.Env`.

The agent speaks as the assistant and the simulated user is the dynamics (`usp_env/Assistant-v0`), or the agent
speaks as the user and a response model answers (`usp_env/User-v0`). This class is a thin driver of one `Episode`;
how a conversation proceeds, ends and fails is written in `usp_env.episode`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import gymnasium as gym
import numpy as np

from usp_env.dialogue import Role
from usp_env.driver import Conductor
from usp_env.episode import Episode
from usp_env.errors import BackendError, CallOrderError, SpecError, UnknownNameError
from usp_env.records import EpisodeSpec, Rules, Snapshot, check_seed, generation_seed
from usp_env.rewards.base import RewardLike, make_reward
from usp_env.sampling.base import Sampler
from usp_env.spaces import Messages, Utterance
from usp_env.transcripts import RunDirectory
from usp_env.users.base import Partner

Observation = tuple[dict[str, str], ...]


def make_conductor(
    partner: Partner,
    sampler: Sampler,
    reward: RewardLike = None,
    agent_role: Role = "assistant",
    *,
    population: str = "density",
    reward_mode: Literal["terminal", "dense"] = "terminal",
    record: str | Path | None = None,
    **rules: Any,
) -> Conductor:
    """Put live objects together; shared by the single and the vector environment."""
    if reward_mode not in ("terminal", "dense"):
        raise SpecError(f"reward_mode: expected 'terminal' or 'dense', got {reward_mode!r}")
    if partner.role == agent_role:
        raise SpecError(
            f"the agent speaks as the {agent_role}, so its partner must speak the other side; {partner.spec!r} does not"
        )
    scorer = make_reward(reward, agent_role)
    dense = reward_mode == "dense"
    scoring = "never" if scorer is None else "turn" if dense or scorer.when == "turn" else "end"
    try:
        checked = Rules(agent_role, scoring=scoring, **rules)  # type: ignore[arg-type]
    except TypeError as error:
        known = [f.name for f in dataclasses.fields(Rules) if f.name not in ("agent_role", "scoring")]
        wrong = next((name for name in rules if name not in known), "")
        others = ("user", "assistant", "bank", "split", "reward", "population", "reward_mode", "record")
        raise UnknownNameError("environment setting", wrong, [*known, *others]) from error
    conductor = Conductor(partner, sampler, scorer, checked, population, dense)
    if record is not None:
        bank = {"bank": sampler.bank.name, "population": population}
        config = {
            "partner": partner.spec,
            "reward": str(scorer),
            "reward_mode": reward_mode,
            **bank,
            "rules": dataclasses.asdict(checked),
        }
        conductor.record = RunDirectory(record, config, provenance=conductor.provenance())
    return conductor


class DialogueEnv(gym.Env[Observation, str]):
    """A conversation with a simulated person.

    Args:
        partner: Speaks the other side: `usp_env.users.load(spec)` or `usp_env.assistants.load(spec)`.
        sampler: Draws the users: `usp_env.sampling.load_sampler()`, or any `Sampler`.
        reward: An expression (`"goal+0.1*politeness"`), a function `(profile, dialogue) -> float | None`, a
            `RewardFunction`, or None for 0.0 at every step.
        agent_role: The agent's seat.
        population: Default population of `reset`.
        reward_mode: `"terminal"`, or `"dense"`: every reward is paid as the difference from turn to turn.
        record: A run directory that finished episodes are written to, or None.
        render_mode: `"ansi"` renders the conversation as text.
        **rules: `max_turns`, `token_budget`, `max_chars`, `keep_think`, `bad_action_reward`, `roles`,
            `repetition_ratio`, `gratitude_words`; see `usp_env.records.Rules`.

    Example:
        >>> import gymnasium as gym, usp_env
        >>> env = gym.make("usp_env/Assistant-v0", user="scripted", reward=None)
        >>> observation, info = env.reset(seed=7)
        >>> observation[-1]["role"]
        'user'
        >>> observation, reward, terminated, truncated, info = env.step("Happy to help.")
        >>> len(observation), reward
        (3, 0.0)
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 1}

    def __init__(
        self,
        partner: Partner,
        sampler: Sampler,
        reward: RewardLike = None,
        agent_role: Role = "assistant",
        *,
        render_mode: str | None = None,
        **settings: Any,
    ) -> None:
        if render_mode not in (None, "ansi"):
            raise SpecError(f"render_mode: expected 'ansi' or None, got {render_mode!r}")
        self.conductor = make_conductor(partner, sampler, reward, agent_role, **settings)
        self.render_mode = render_mode
        self.observation_space = Messages()
        self.action_space = Utterance(self.conductor.rules.max_chars)
        self.episode: Episode | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: Seeds `np_random`, from which the user and the episode's seed are drawn.
            options: `population`, `profile`, `profile_id`, `opening`, `user_id`, or `episode` (an `EpisodeSpec`).

        Raises:
            BackendError: The user's opening could not be had.
            UnknownNameError: An unknown option, population or id.
        """
        super().reset(seed=None if seed is None else check_seed(seed))
        self.episode = None
        episode = self.conductor.new_episode(self.np_random, options)
        self.conductor.run([episode])
        if episode.done:
            cause = episode.error or f"no usable opening came ({episode.end_reason}: {episode.rejected!r:.80})"
            raise BackendError(f"reset failed: {cause}; reset again for another user")
        self.episode = episode
        return episode.observation(), self.conductor.info(episode)

    def step(self, action: str) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Say `action` and hear the answer.

        Raises:
            InvalidActionError: `action` is not a `str`.
            CallOrderError: Before `reset`, or after the end.
        """
        episode = self._live()
        episode.act(action)
        self.conductor.run([episode])
        if episode.done:
            self.conductor.close([episode])
        return episode.observation(), episode.reward, episode.terminated, episode.truncated, self.conductor.info(episode)

    def render(self) -> str | None:  # type: ignore[override]
        """The conversation as text, in `render_mode="ansi"`."""
        if self.render_mode is None or self.episode is None:
            return None
        return "\n".join(f"{m.role}: {m.content}" for m in self.episode.messages)

    def snapshot(self) -> Snapshot:
        """Freeze the conversation and `np_random`; JSON values only."""
        return Snapshot(self._live().snapshot(), cast("dict[str, Any]", self.np_random.bit_generator.state))

    def restore(self, snapshot: Snapshot) -> Observation:
        """Go on from a snapshot, in this or another process; returns the observation there.

        Raises:
            SpecError: The snapshot is foreign, or of the other seat.
        """
        episode = thaw(snapshot, self.conductor)
        if snapshot.rng is not None:
            set_state(self.np_random, snapshot.rng)
        self.episode = episode
        return episode.observation()

    def fork(self, n: int, diverge: bool = True) -> list[DialogueEnv]:
        """`n` environments that go on from here; this one is unchanged. They share models, sampler and recorder.

        Args:
            n: How many.
            diverge: Whether each gets noise of its own; else all repeat this one's.
        """
        check_branches(n)
        snapshot, episode = self.snapshot(), self._live()
        children = []
        for index in range(n):
            child = copy.copy(self)
            child.action_space = copy.deepcopy(self.action_space)  # its generator is its own
            child.observation_space = copy.deepcopy(self.observation_space)
            child.episode = episode.forked(index) if diverge else Episode.restore(snapshot.state)
            child._np_random = copy.deepcopy(self.np_random)
            if diverge:
                seed = generation_seed(episode.spec.episode_seed, child.episode.branch, episode.turn, "user")
                child._np_random = np.random.default_rng(seed)
            children.append(child)
        return children

    def close(self) -> None:
        """End the conversation. Backends stay: the process shares them."""
        self.episode = None

    def _live(self) -> Episode:
        if self.episode is None:
            raise CallOrderError("call reset() before step(), snapshot() or fork()")
        return self.episode


def thaw(snapshot: Snapshot, conductor: Conductor) -> Episode:
    """The episode of a snapshot, to be scored as this conductor scores.

    Raises:
        SpecError: The snapshot is foreign, or of the other seat.
    """
    episode = Episode.restore(snapshot.state)
    if episode.rules.agent_role != conductor.rules.agent_role:
        raise SpecError(f"the snapshot is of the {episode.rules.agent_role}'s seat, this environment's agent has the other")
    episode.rules = dataclasses.replace(episode.rules, scoring=conductor.rules.scoring)
    return episode


def check_branches(n: object) -> None:
    """Raise `SpecError` unless `n` is a number of branches."""
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise SpecError(f"fork: expected a whole number of branches of at least 1, got {n!r}")


def set_state(rng: np.random.Generator, state: Mapping[str, Any]) -> None:
    """Put a generator into a snapshot's state.

    Raises:
        SpecError: It is no state of a PCG64 generator.
    """
    try:
        rng.bit_generator.state = dict(state)
    except (TypeError, ValueError, KeyError) as error:
        raise SpecError(f"snapshot: expected 'rng' to be the state of a PCG64 generator, got {state!r:.80} ({error})") from error


def fork(env: gym.Env[Any, Any], n: int, diverge: bool = True) -> list[gym.Env[Any, Any]]:
    """Fork a wrapped environment: each copy has its own wrappers around its own branch.

    Args:
        env: A `DialogueEnv`, wrapped or not.
        n: How many.
        diverge: See `DialogueEnv.fork`.
    """
    inner = env.unwrapped
    if not isinstance(inner, DialogueEnv):
        raise SpecError(f"expected a (wrapped) DialogueEnv, got {type(inner).__name__}")
    # Deep-copying the wrappers with the inner environment already in the memo puts each child in its place.
    return [copy.deepcopy(env, {id(inner): child}) for child in inner.fork(n, diverge)]


def make_specs(
    n: int, population: str = "density", seed: int = 0, sampler: Sampler | None = None, opening: str | None = None
) -> list[EpisodeSpec]:
    """A dataset for trainers: `n` episodes that can each be rebuilt alone.

    Args:
        n: How many.
        population: Drawn from.
        seed: Of the draw.
        sampler: Default: the packaged bank's, training split.
        opening: The same given opening for all, or None.
    """
    from usp_env.sampling import load_sampler

    if not isinstance(n, int) or n < 0:
        raise SpecError(f"make_specs: expected a number of episodes, got {n!r}")
    source: Sampler = sampler if sampler is not None else load_sampler()
    rng = np.random.default_rng(check_seed(seed))
    draws = source.draw(n, population, rng)
    return [EpisodeSpec(d.profile.id, d.population, int(rng.integers(2**53)), opening, dict(d.user_options)) for d in draws]


def seat_parts(agent_role: Role, partner: str, bank: str, split: str | None, reward: Any) -> Mapping[str, Any]:
    """Live objects from plain names, for the registered ids."""
    from usp_env import assistants, users
    from usp_env.sampling import load_sampler

    if not isinstance(partner, str):
        raise SpecError(f"expected a spec string, got {type(partner).__name__}; live objects go into usp_env.DialogueEnv(...)")
    # Rewards first: a missing one should be told before a model is loaded.
    scorer = make_reward(reward, agent_role)
    load = users.load if agent_role == "assistant" else assistants.load
    return {"partner": load(partner), "sampler": load_sampler(bank, split), "reward": scorer, "agent_role": agent_role}


def assistant_env(
    user: str = "usp-mini", bank: str = "sharegpt", split: str | None = "train", reward: Any = "goal", **settings: Any
) -> DialogueEnv:
    """`usp_env/Assistant-v0`: the agent speaks as the assistant."""
    return DialogueEnv(**seat_parts("assistant", user, bank, split, reward), **settings)


def user_env(
    assistant: str = "smollm2-135m",
    bank: str = "sharegpt",
    split: str | None = "train",
    reward: Any = "0.8*cycle+0.2*human",
    **settings: Any,
) -> DialogueEnv:
    """`usp_env/User-v0`: the agent speaks as the user."""
    return DialogueEnv(**seat_parts("user", assistant, bank, split, reward), **settings)
