"""`DialogueVectorEnv`: N conversations in lockstep, one batched partner call a turn.

The same episodes as N single environments: lane i of `reset(seed=s)` is `DialogueEnv.reset(seed=s + i)`.
Infos are filled by column: `infos[key]` is an array over lanes (object arrays for anything but numbers and
flags, so `infos["reward_terms"][i]` is lane i's dict) and `infos["_" + key]` says which lanes have it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from usp_env.dialogue import Role
from usp_env.driver import OPTIONS
from usp_env.env import Observation, check_branches, make_conductor, seat_parts, set_state, thaw
from usp_env.episode import Episode
from usp_env.errors import CallOrderError, SpecError, UnknownNameError
from usp_env.records import Snapshot, check_seed
from usp_env.rewards.base import RewardLike
from usp_env.sampling.base import Sampler
from usp_env.spaces import Messages, Utterance
from usp_env.users.base import Partner

Observations = tuple[Observation, ...]
_DTYPES: dict[str, type] = {"turn": int, "episode_seed": np.int64, "valid": bool}  # type: ignore[dict-item]


class DialogueVectorEnv(VectorEnv[Observations, Sequence[str], np.ndarray]):
    """N conversations with simulated people.

    Args:
        num_envs: N.
        partner: As in `DialogueEnv`; so are `sampler`, `reward`, `agent_role` and `**settings`.
        sampler: See there.
        reward: See there.
        agent_role: See there.
        autoreset_mode: `"SameStep"` (a finished lane begins anew in the same step; the last observation is in
            `infos["final_obs"]`), `"NextStep"` or `"Disabled"` (reset finished lanes with `reset_mask`).
        **settings: See there.

    Example:
        >>> import gymnasium as gym, usp_env
        >>> envs = gym.make_vec("usp_env/Assistant-v0", num_envs=3, user="scripted", reward=None)
        >>> observations, infos = envs.reset(seed=0)
        >>> observations, rewards, terminations, truncations, infos = envs.step(["Sure."] * 3)
        >>> len(observations), rewards.shape
        (3, (3,))
    """

    def __init__(
        self,
        num_envs: int,
        partner: Partner,
        sampler: Sampler,
        reward: RewardLike = None,
        agent_role: Role = "assistant",
        *,
        autoreset_mode: str | AutoresetMode = "SameStep",
        render_mode: None = None,
        **settings: Any,
    ) -> None:
        if not isinstance(num_envs, int) or num_envs < 1:
            raise SpecError(f"num_envs: expected a whole number of at least 1, got {num_envs!r}")
        self.conductor = make_conductor(partner, sampler, reward, agent_role, **settings)
        self.num_envs, self.render_mode = num_envs, render_mode
        self.autoreset_mode = _autoreset(autoreset_mode)
        self.metadata = {"autoreset_mode": self.autoreset_mode, "render_modes": []}
        self.single_observation_space: gym.Space[Any] = Messages()
        self.single_action_space: gym.Space[Any] = Utterance(self.conductor.rules.max_chars)
        self.observation_space: gym.Space[Any] = batch_space(self.single_observation_space, num_envs)
        self.action_space: gym.Space[Any] = batch_space(self.single_action_space, num_envs)
        self.episodes: list[Episode | None] = [None] * num_envs
        self._rngs: list[np.random.Generator | None] = [None] * num_envs
        self._ended = np.zeros(num_envs, dtype=bool)  # lanes whose end has been reported

    def reset(  # type: ignore[override]
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[Observations, dict[str, Any]]:
        """Begin an episode in every lane, or in those that `reset_mask` names.

        Args:
            seed: One for all (lane i gets `seed + i`) or one per lane.
            options: One dict for all lanes, or one per lane. A dict may hold `reset_mask` (bool array over lanes)
                and `lanes` (the dicts per lane).

        A lane whose opening cannot be had starts failed: its observation is empty and its next step reports it.
        """
        mask, per_lane = self._split_options(options)
        for lane, lane_seed in enumerate(self._seeds(seed)):
            if mask[lane] and (lane_seed is not None or self._rngs[lane] is None):
                self._rngs[lane] = seeding.np_random(lane_seed)[0]
        lanes = [int(lane) for lane in np.flatnonzero(mask)]
        self._begin(lanes, per_lane)
        if any(episode is None for episode in self.episodes):
            raise CallOrderError("the first reset must begin every lane: leave reset_mask out")
        return self._observations(), self._infos(lanes)

    def step(self, actions: Sequence[str]) -> tuple[Observations, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One utterance per lane; all partners answer in one call.

        Raises:
            CallOrderError: Before `reset`; or, in `"Disabled"` mode, with a lane that has ended.
            InvalidActionError: An action is not a `str`; no lane has moved.
            SpecError: Not one action per lane.
        """
        episodes = self._check(actions)
        again = np.flatnonzero(self._ended) if self.autoreset_mode == AutoresetMode.NEXT_STEP else np.array([], dtype=int)
        fresh = {int(lane) for lane in again}
        self._open(sorted(fresh), {})
        for lane, episode in enumerate(episodes):
            # A lane that started failed has nothing to say: this step reports it.
            if lane not in fresh and not episode.done:
                episode.act(actions[lane])
        live = self._live()
        self.conductor.run(live)
        rewards = np.array([0.0 if lane in fresh else episode.reward for lane, episode in enumerate(live)])
        done = np.array([episode.done and lane not in fresh for lane, episode in enumerate(live)])
        terminations = np.array([episode.terminated for episode in live]) & done
        truncations = np.array([episode.truncated for episode in live]) & done
        self._ended = done
        ended = [int(lane) for lane in np.flatnonzero(done)]
        self.conductor.close([live[lane] for lane in ended])
        infos = self._finish(ended) if self.autoreset_mode == AutoresetMode.SAME_STEP and ended else {}
        return self._observations(), rewards, terminations, truncations, infos | self._infos(range(self.num_envs))

    def snapshot(self, index: int) -> Snapshot:
        """Freeze lane `index`."""
        self._check_lane(index)
        rng = self._rngs[index]
        return Snapshot(self._live()[index].snapshot(), None if rng is None else rng.bit_generator.state)  # type: ignore[arg-type]

    def restore(self, index: int, snapshot: Snapshot) -> Observation:
        """Put a snapshot into lane `index`; returns its observation."""
        self._check_lane(index)
        episode, rng = thaw(snapshot, self.conductor), np.random.default_rng()
        if snapshot.rng is not None:
            set_state(rng, snapshot.rng)
        self.episodes[index], self._rngs[index], self._ended[index] = episode, rng, episode.done
        return episode.observation()

    def fork(self, index: int, n: int, diverge: bool = True) -> DialogueVectorEnv:
        """A vector environment of `n` lanes that go on from lane `index`, which is unchanged."""
        check_branches(n)
        snapshot, episode = self.snapshot(index), self._live()[index]
        child = object.__new__(DialogueVectorEnv)
        child.__dict__.update(self.__dict__)
        child.num_envs, child._ended = n, np.full(n, episode.done)
        child.observation_space = batch_space(self.single_observation_space, n)
        child.action_space = batch_space(self.single_action_space, n)
        child.episodes = [episode.forked(i) if diverge else Episode.restore(snapshot.state) for i in range(n)]
        child._rngs = [
            np.random.default_rng([episode.agent_seed, i]) if diverge else copy.deepcopy(self._rngs[index]) for i in range(n)
        ]
        return child

    # ── inside ───────────────────────────────────────────────────────────────────────────────────

    def _begin(self, lanes: Sequence[int], per_lane: Mapping[int, Mapping[str, Any]]) -> None:
        self._open(lanes, per_lane)
        self.conductor.run([episode for lane in lanes if (episode := self.episodes[lane]) is not None])
        self._ended[list(lanes)] = False

    def _open(self, lanes: Sequence[int], per_lane: Mapping[int, Mapping[str, Any]]) -> None:
        # All or none: bad options must not leave some lanes begun.
        begun = [self.conductor.new_episode(self._rng(lane), per_lane.get(lane)) for lane in lanes]
        for lane, episode in zip(lanes, begun, strict=True):
            self.episodes[lane] = episode

    def _finish(self, ended: Sequence[int]) -> dict[str, Any]:
        final_obs = np.full(self.num_envs, None, dtype=object)
        for lane in ended:
            final_obs[lane] = self._live()[lane].observation()
        mask = np.zeros(self.num_envs, dtype=bool)
        mask[list(ended)] = True
        final = {"final_obs": final_obs, "_final_obs": mask, "final_info": self._infos(ended), "_final_info": mask.copy()}
        self._begin(ended, {})
        return final

    def _infos(self, lanes: Sequence[int] | range) -> dict[str, Any]:
        live = self._live()
        rows = [(lane, self.conductor.info(live[lane])) for lane in lanes]
        infos: dict[str, Any] = {}
        for key in dict.fromkeys(key for _, row in rows for key in row):
            column = infos[key] = np.zeros(self.num_envs, dtype=_DTYPES.get(key, object))
            if column.dtype == object:
                column[:] = None
            mask = infos[f"_{key}"] = np.zeros(self.num_envs, dtype=bool)
            for lane, row in rows:
                if key in row:
                    column[lane] = row[key]
                    mask[lane] = True
        return infos

    def _observations(self) -> Observations:
        # A lane that started failed shows nothing: no utterance is ever invented.
        return tuple(() if e.done and not e.rewards else e.observation() for e in self._live())

    def _live(self) -> list[Episode]:
        return [episode for episode in self.episodes if episode is not None]

    def _check_lane(self, index: int) -> None:
        if not isinstance(index, int | np.integer) or not 0 <= index < self.num_envs:
            raise SpecError(f"expected a lane from 0 to {self.num_envs - 1}, got {index!r}")
        if len(self._live()) < self.num_envs:
            raise CallOrderError("call reset() first")

    def _rng(self, lane: int) -> np.random.Generator:
        rng = self._rngs[lane]
        if rng is None:
            raise CallOrderError("call reset() first")
        return rng

    def _check(self, actions: Sequence[str]) -> list[Episode]:
        episodes = self._live()
        if len(episodes) < self.num_envs:
            raise CallOrderError("call reset() before step()")
        countable = isinstance(actions, Sequence | np.ndarray) and not isinstance(actions, str)
        if not countable or len(actions) != self.num_envs:
            came = f"{len(actions)} actions" if countable else repr(actions)[:80]
            raise SpecError(f"expected one utterance for each of {self.num_envs} lanes, got {came}")
        for action in actions:
            check_action(action)
        if self.autoreset_mode == AutoresetMode.DISABLED and self._ended.any():
            lanes = np.flatnonzero(self._ended).tolist()
            raise CallOrderError(f"lanes {lanes} have ended: reset them with options={{'reset_mask': mask}} before step()")
        return episodes

    def _seeds(self, seed: int | Sequence[int | None] | None) -> Sequence[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, str) or not isinstance(seed, Sequence | np.ndarray):
            return [check_seed(seed) + lane for lane in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise SpecError(f"seed: expected one for all or {self.num_envs} of them, got {len(seed)}")
        return [None if one is None else check_seed(one) for one in seed]

    def _split_options(self, options: Any) -> tuple[np.ndarray, dict[int, Mapping[str, Any]]]:
        """Which lanes to reset, and the options of each."""
        every = np.ones(self.num_envs, dtype=bool)
        if options is None:
            return every, {}
        if not isinstance(options, Mapping):
            return every, self._lanes(options)
        shared = dict(options)
        mask = shared.pop("reset_mask", None)
        lanes = self._lanes(shared.pop("lanes", None) or [{}] * self.num_envs)
        for name in shared:
            if name not in OPTIONS:
                raise UnknownNameError("reset option", name, (*OPTIONS, "reset_mask", "lanes"))
        if mask is not None:
            mask = np.asarray(mask)
            if mask.dtype != bool or mask.shape != (self.num_envs,) or not mask.any():
                raise SpecError(
                    f"reset_mask: expected {self.num_envs} flags with at least one True, got {mask.dtype} {mask.shape}"
                )
        return every if mask is None else mask, {lane: {**shared, **own} for lane, own in lanes.items()}

    def _lanes(self, dicts: Any) -> dict[int, Mapping[str, Any]]:
        listed = isinstance(dicts, Sequence) and not isinstance(dicts, str)
        if not listed or len(dicts) != self.num_envs or not all(isinstance(own, Mapping) for own in dicts):
            raise SpecError(f"options: expected one dict for all lanes or {self.num_envs} dicts, got {dicts!r:.120}")
        return dict(enumerate(dicts))


def _autoreset(mode: str | AutoresetMode) -> AutoresetMode:
    try:
        return AutoresetMode(mode)
    except ValueError as error:
        raise UnknownNameError("autoreset_mode", mode, [m.value for m in AutoresetMode]) from error


def check_action(action: object) -> None:
    """Raise `InvalidActionError` unless the action is a `str`."""
    from usp_env.errors import InvalidActionError

    if not isinstance(action, str):
        raise InvalidActionError(f"expected a str (the agent's utterance), got {type(action).__name__}: {action!r:.80}")


def assistant_vector_env(
    num_envs: int = 1,
    user: str = "usp-mini",
    bank: str = "sharegpt",
    split: str | None = "train",
    reward: Any = "goal",
    **settings: Any,
) -> DialogueVectorEnv:
    """`gym.make_vec("usp_env/Assistant-v0")`."""
    return DialogueVectorEnv(num_envs, **seat_parts("assistant", user, bank, split, reward), **settings)


def user_vector_env(
    num_envs: int = 1,
    assistant: str = "smollm2-135m",
    bank: str = "sharegpt",
    split: str | None = "train",
    reward: Any = "0.8*cycle+0.2*human",
    **settings: Any,
) -> DialogueVectorEnv:
    """`gym.make_vec("usp_env/User-v0")`."""
    return DialogueVectorEnv(num_envs, **seat_parts("user", assistant, bank, split, reward), **settings)
