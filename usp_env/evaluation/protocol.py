"""What the benchmark `usp-bench-1` fixes, and how a run departs from it.

    pinned = USP_BENCH_1                                     the record
    wanted = replace(pinned, n=10)                           what a command line asks for
    plan = draw(sampler, wanted)                             who is played: the same episodes for every assistant
    departures(wanted, plan.digest, facts)                   ["n: 100 → 10", …], empty where nothing was changed

A run with departures is called `usp-bench-1+modified`, and its card lists them: its numbers compare with no other run's.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from usp_env.backends.spec import parse
from usp_env.errors import SpecError, UnknownNameError, UspError
from usp_env.models.assets import ASSETS
from usp_env.records import EpisodeSpec, check_seed
from usp_env.sampling.base import Draw, Sampler
from usp_env.sampling.density import bank_digest
from usp_env.users.base import ModelSpeaker, Partner

TRIES = 50
"""Draws per wanted profile, where a population has no list of members, before it counts as exhausted."""


@dataclass(frozen=True, slots=True)
class Protocol:
    """Everything that decides a benchmark besides the assistants.

    Args:
        name: Of the protocol.
        bank: Whose profiles.
        split: Of the bank.
        populations: Each gives profiles of its own.
        n: Most profiles of a population; fewer where it has fewer (a tenth of the split is `majority`).
        seed: Of the draw of profiles and of all noise.
        seeds: Episodes of a profile: one for each, with an opening and noise of its own.
        user: Spec of the simulated user.
        turns: Most user turns.
        reward: Expression; its return is the score, and its sums over the turns are the curve.
        judge: `"offline"` (the reward is the score) or the spec of a judge.
    """

    name: str = "usp-bench-1"
    bank: str = "sharegpt"
    split: str = "test"
    populations: tuple[str, ...] = ("majority", "minority", "virtual")
    n: int = 100
    seed: int = 0
    seeds: tuple[int, ...] = (0,)
    user: str = "usp-mini"
    turns: int = 10
    reward: str = "goal"
    judge: str = "offline"

    def __post_init__(self) -> None:
        for name in ("n", "turns"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise SpecError(f"{name}: expected a whole number of at least 1, got {getattr(self, name)!r}")
        for name in ("populations", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise SpecError(f"{name}: expected at least one, each once, got {list(values)!r}")
        for seed in (self.seed, *self.seeds):
            check_seed(seed)


@dataclass(frozen=True, slots=True)
class Facts:
    """What the names of a protocol stood for in a run: digests and settings, None where nobody can tell.

    Args:
        bank_digest: SHA-256 over ids and texts of the split's profiles.
        sampler_digest: SHA-256 of bank and layout.
        user_weights: Digest of the simulated user's weights, see `weights`.
        decoding: How the simulated user samples.
        scorer: What decides the reward's value.
    """

    bank_digest: str | None = None
    sampler_digest: str | None = None
    user_weights: str | None = None
    decoding: Mapping[str, Any] | None = None
    scorer: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, sampler: Sampler, user: Partner, reward: Any) -> Facts:
        """Of the parts of an environment."""
        decoding = asdict(user.sampling) if isinstance(user, ModelSpeaker) else None
        return cls(
            bank_digest(sampler.bank),
            getattr(sampler, "digest", None),
            weights(user),
            None if decoding is None else json.loads(json.dumps(decoding)),
            dict(getattr(reward, "identity", {})),
        )


USP_BENCH_1 = Protocol()
PINNED = Facts(
    bank_digest="c7e318408524d748a34c5c7256e95a9685b80bb6ecabeb5223160def0c7bf446",
    sampler_digest="aee78d30dae328434cb7101ad435266ec9708784a9885601bb97dae852be2675",
    user_weights="49773eaac7687d27475aa1c65f0e26930c9ab0c418d9c4ba302dc87d6290b131",
    decoding={"temperature": 0.8, "top_p": 0.9, "max_tokens": 96, "stop": [], "min_tokens": 0},
    scorer={"goal": {"scorer": "answer-v1"}},
)
PINNED_PLAN = "ff02b5033889620400c4ceb66c8023ea7b2e3ee1907c30ac7904524ece470e65"
"""Digest of the episodes of `USP_BENCH_1`: profile ids, populations, seeds."""
PROTOCOLS = {USP_BENCH_1.name: (USP_BENCH_1, PINNED, PINNED_PLAN)}


@dataclass(frozen=True, slots=True)
class Plan:
    """Who is played.

    Args:
        episodes: Population to its episodes: people in the order of the draw, each with its seeds in theirs.
        wanted: Profiles that were asked for, of each population.
        why: Population to the reason why there are fewer.
    """

    episodes: Mapping[str, tuple[EpisodeSpec, ...]]
    wanted: int
    why: Mapping[str, str]

    @property
    def all(self) -> list[EpisodeSpec]:
        """All episodes, population by population."""
        return [spec for specs in self.episodes.values() for spec in specs]

    def people(self, population: str) -> list[str]:
        """Profile ids of a population, each once, in the order of the draw."""
        return list(dict.fromkeys(spec.profile_id for spec in self.episodes[population]))

    @property
    def digest(self) -> str:
        """SHA-256 over the episodes, without their openings."""
        rows = [[s.profile_id, s.population, s.episode_seed, dict(s.user_options)] for s in self.all]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def draw(sampler: Sampler, protocol: Protocol) -> Plan:
    """The episodes of a protocol: distinct profiles of each population, in an order that `n` and the others do not change.

    Raises:
        UnknownNameError: A population that the sampler does not have.
    """
    for name in protocol.populations:
        if name not in sampler.populations:
            raise UnknownNameError("population", name, sampler.populations)
    wanted = min(protocol.n, len(sampler.bank))
    episodes, why = {}, {}
    for population in protocol.populations:
        drawn = _distinct(sampler, population, wanted, protocol.seed)
        if len(drawn) < protocol.n:
            reason = f"the split has {len(sampler.bank)} profiles"
            if len(drawn) < wanted:
                reason += f", {len(drawn)} of them in this population"
            why[population] = reason
        episodes[population] = tuple(
            EpisodeSpec(
                d.profile.id, population, _seed(protocol.seed, population, d.profile.id, seed), None, dict(d.user_options)
            )
            for d in drawn
            for seed in protocol.seeds
        )
    return Plan(episodes, protocol.n, why)


def _distinct(sampler: Sampler, population: str, n: int, seed: int) -> list[Draw]:
    rng = np.random.default_rng([seed, zlib.crc32(population.encode())])
    members = _members(sampler, population)
    if members is not None:
        return [Draw(members[i], population) for i in rng.permutation(len(members))[:n]]
    found: dict[str, Draw] = {}
    for _ in range(TRIES * n):
        if len(found) == n:
            break
        drawn = sampler.draw(1, population, rng)[0]
        found.setdefault(drawn.profile.id, drawn)
    return list(found.values())


def _members(sampler: Sampler, population: str) -> Sequence[Any] | None:
    """Everyone in a population, where it has a fixed membership."""
    listed = getattr(sampler, "members", None)
    try:
        return None if listed is None else list(listed(population))
    except UnknownNameError:
        return None


def _seed(*parts: object) -> int:
    """53 bits of a keyed hash: any JSON reader keeps the number exactly."""
    text = json.dumps(parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, key=b"usp_env/bench").digest(), "big") >> 11


def weights(speaker: Partner) -> str | None:
    """Digest of a speaker's weights, `BASE+ADAPTER` where it has an adapter; None for one without, or whose engine does not tell.

    Of a packaged model the digest of what was released: what a machine makes of it at `fetch` (a LoRA merge) may differ in
    last bits.
    """
    if not isinstance(speaker, ModelSpeaker):
        return None
    try:
        spec = parse(speaker.backend.spec)
        model, adapter = spec.model, spec.options.get("adapter")
    except UspError:  # two models, or a test's backend
        model, adapter = "", None
    identity = speaker.backend.identity
    base = ASSETS[model].sha256 if model in ASSETS else identity.get("weights")
    if adapter is None or base is None:
        return None if base is None else str(base)
    added = identity.get("adapters", {}).get(adapter)
    return None if added is None else f"{base}+{added}"


def departures(wanted: Protocol, plan: Plan, facts: Facts) -> list[str]:
    """How a run departs from the protocol that it names, one line each: `n: 100 → 10`.

    Raises:
        UnknownNameError: No such protocol.
    """
    if wanted.name not in PROTOCOLS:
        raise UnknownNameError("protocol", wanted.name, PROTOCOLS)
    protocol, pinned, pinned_plan = PROTOCOLS[wanted.name]
    found = [*_changes(protocol, wanted), *_changes(pinned, facts)]
    if not found and plan.digest != pinned_plan:
        found.append(f"profiles: {pinned_plan[:12]} → {plan.digest[:12]}")
    return found


def _changes(old: Any, new: Any) -> list[str]:
    pairs = [(f.name, getattr(old, f.name), getattr(new, f.name)) for f in fields(old)]
    return [f"{name}: {_short(a)} → {_short(b)}" for name, a, b in pairs if a != b]


def _short(value: Any) -> str:
    if isinstance(value, str) and all(len(part) == 64 for part in value.split("+")):  # digests
        return "+".join(part[:12] for part in value.split("+"))
    return str(list(value)) if isinstance(value, tuple) else str(value)
