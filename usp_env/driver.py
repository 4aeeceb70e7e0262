"""What every driver of episodes shares: it starts them, does their pending work in batches, and reports their ends.

`DialogueEnv` conducts one episode, `DialogueVectorEnv` many in lockstep. All I/O of an environment happens in
`Conductor.run`: one call of the partner, one of the reward, whatever the number of episodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from usp_env.episode import Episode
from usp_env.errors import BackendError, SpecError, UnknownNameError, UspError
from usp_env.profiles import Profile
from usp_env.records import EpisodeSpec, PartnerTurn, Reply, RewardTerms, Rules, Scoring, check_seed
from usp_env.sampling.base import Draw, EpisodeSummary, Sampler
from usp_env.sampling.density import bank_digest
from usp_env.spaces import is_unicode
from usp_env.users.base import ModelSpeaker, Partner, replies_of

if TYPE_CHECKING:
    from usp_env.rewards.base import WeightedSum
    from usp_env.transcripts import RunDirectory

OPTIONS = ("population", "profile", "profile_id", "opening", "user_id", "episode")


class Conductor:
    """Starts, advances and closes episodes.

    Args:
        partner: Speaks the other side.
        sampler: Draws the users.
        reward: Scores, or None.
        rules: How conversations are conducted.
        population: Default population of `new_episode`.
        dense: Pay every reward as differences from turn to turn, not only those that ask for it.
        record: Where finished episodes are written, or None.
    """

    def __init__(
        self,
        partner: Partner,
        sampler: Sampler,
        reward: WeightedSum | None,
        rules: Rules,
        population: str = "density",
        dense: bool = False,
        record: RunDirectory | None = None,
    ) -> None:
        self.partner, self.sampler, self.reward, self.rules = partner, sampler, reward, rules
        self.population, self.dense, self.record = population, dense, record
        check_population(sampler, population)

    def new_episode(self, rng: np.random.Generator, options: Mapping[str, Any] | None = None) -> Episode:
        """Draw a user and begin an episode; `options` as in `DialogueEnv.reset`."""
        if options is not None and not isinstance(options, Mapping):
            raise SpecError(f"options: expected a dict with any of {', '.join(OPTIONS)}, got {options!r:.80}")
        options = dict(options or {})
        for name in options:
            if name not in OPTIONS:
                raise UnknownNameError("reset option", name, OPTIONS)
        if (spec := options.pop("episode", None)) is not None:
            if options:
                raise SpecError(f"reset option 'episode' stands alone: it fixes {', '.join(sorted(options))} too")
            checked = _as_spec(spec)
            return self._begin(checked, self.sampler.bank.get(checked.profile_id))
        draw = self._draw(rng, options)
        opening = options.get("opening")
        check_opening(opening, "reset option 'opening'")
        # 53 bits: any JSON reader keeps the number exactly.
        spec = EpisodeSpec(draw.profile.id, draw.population, int(rng.integers(2**53)), opening, dict(draw.user_options))
        return self._begin(spec, draw.profile)

    def run(self, episodes: Sequence[Episode]) -> None:
        """Do all pending work, each kind in one call, until none is left.

        Raises:
            Exception: Whatever a reward raises, with the episodes and turns it was scoring as a note.
        """
        busy = [episode for episode in episodes if episode.pending is not None]
        while busy:
            speaking = [episode for episode in busy if isinstance(episode.pending, PartnerTurn)]
            if speaking:
                for episode, reply in zip(speaking, self._replies(speaking), strict=True):
                    episode.feed(reply)
            for final in (False, True):
                scoring = [e for e in busy if isinstance(e.pending, Scoring) and e.pending.final == final]
                if scoring:
                    for episode, terms in zip(scoring, self.terms(scoring, final), strict=True):
                        episode.feed(terms)
            busy = [episode for episode in busy if episode.pending is not None]

    def close(self, episodes: Sequence[Episode]) -> None:
        """Record finished episodes and show the valid ones to the sampler, in the order given."""
        if self.record is not None and episodes:
            for episode in episodes:
                self.record.write_episode(episode, self)
            self.record.ledger.write()
        valid = [episode for episode in episodes if episode.valid]
        if valid:
            self.sampler.observe([summary(episode) for episode in valid])

    def timing(self, speaker: Partner) -> AbstractContextManager[list[Reply]]:
        """Times a call of a speaker for the run's ledger; the block puts the replies into the list that it gets."""
        return nullcontext([]) if self.record is None else self.record.ledger.timing(speaker.role, speaker)

    def info(self, episode: Episode) -> dict[str, Any]:
        """The `info` of one episode: deterministic under a seed."""
        spec = episode.spec
        info: dict[str, Any] = {
            "profile_id": spec.profile_id,
            "population": spec.population,
            "bank": self.sampler.bank.name,
            "split": episode.profile.split or "",
            "episode_id": episode.id,
            "episode_seed": spec.episode_seed,
            "branch": episode.branch,
            "turn": episode.turn,
            "end_reason": episode.end_reason,
            "outcome": episode.outcome,
            "valid": episode.valid,
            "reward_terms": dict(episode.reward_terms),
            "usage": episode.usage(),
            "messages": tuple({"role": m.role, "content": m.content} for m in episode.messages),
        }
        if notes := {str(index): dict(m.notes) for index, m in enumerate(episode.messages) if m.notes}:
            info["notes"] = notes
        if episode.done:
            info["utterance_rewards"] = list(episode.utterance_rewards)
        if self.rules.agent_role == "user":
            info["target_profile"] = episode.profile
        return info

    def provenance(self, *speakers: Partner) -> dict[str, Any]:
        """What decides the outcome besides the configuration: digests of bank, sampler, models and scorers."""
        models = {s.spec: dict(s.backend.identity) for s in (self.partner, *speakers) if isinstance(s, ModelSpeaker)}
        return {
            "bank": bank_digest(self.sampler.bank),
            "sampler": getattr(self.sampler, "digest", None),
            "models": models,
            "reward": self.reward.identity if self.reward else {},
        }

    def _draw(self, rng: np.random.Generator, options: Mapping[str, Any]) -> Draw:
        given = [name for name in ("population", "profile", "profile_id", "user_id") if options.get(name) is not None]
        if len(given) > 1:
            raise SpecError(f"reset options {' and '.join(given)} both say who the user is: give one")
        if "profile" in given:
            profile = options["profile"]
            if not isinstance(profile, Profile):
                raise SpecError(f"reset option 'profile': expected a usp_env.Profile, got {type(profile).__name__}")
            return Draw(profile, "given")
        if "profile_id" in given:
            return Draw(self.sampler.bank.get(options["profile_id"]), "given")
        if "user_id" in given:
            return Draw(self._session(rng, options["user_id"]), "given")
        population = options["population"] if "population" in given else self.population
        check_population(self.sampler, population)
        return self.sampler.draw(1, population, rng)[0]

    def _session(self, rng: np.random.Generator, user_id: str) -> Profile:
        sessions = [profile for profile in self.sampler.bank if profile.user_id == user_id]
        if not sessions:
            known = {profile.user_id for profile in self.sampler.bank if profile.user_id}
            raise UnknownNameError(f"user_id of bank {self.sampler.bank.name!r}", user_id, known)
        return sessions[int(rng.integers(len(sessions)))]

    def _begin(self, spec: EpisodeSpec, profile: Profile) -> Episode:
        if spec.opening is not None and self.rules.agent_role == "user" and self.rules.max_turns == 1:
            raise SpecError("a given opening is the user's first turn: with max_turns=1 it leaves the agent none")
        episode = Episode(spec, profile, self.rules)
        episode.begin()
        return episode

    def _replies(self, episodes: Sequence[Episode]) -> list[Reply]:
        work = [episode.pending for episode in episodes]
        turns = [turn for turn in work if isinstance(turn, PartnerTurn)]
        with self.timing(self.partner) as noted:
            noted += replies_of(self.partner, [turn.view for turn in turns], [turn.seed for turn in turns])
        return noted

    def terms(self, episodes: Sequence[Episode], final: bool) -> Sequence[RewardTerms | BackendError | None]:
        """What the reward finds in episodes whose pending work is a `Scoring` of this kind; a failure stands for its terms."""
        if self.reward is None:
            raise UspError("an episode asks for a score, but the environment has no reward")
        work = [episode.pending for episode in episodes]
        scorings = [scoring for scoring in work if isinstance(scoring, Scoring)]
        reward = self.reward.at(final, self.dense)
        try:
            return reward([scoring.profile for scoring in scorings], [scoring.dialogue for scoring in scorings])
        except BackendError as error:
            return [error] * len(scorings)
        except Exception as error:
            error.add_note("while scoring " + "; ".join(f"episode {e.id}, turn {e.turn}" for e in episodes))
            raise


def summary(episode: Episode) -> EpisodeSummary:
    """What a sampler learns of a finished episode."""
    spec = episode.spec
    reason, outcome = episode.end_reason or "", episode.outcome or ""
    return EpisodeSummary(spec.profile_id, spec.population, episode.turn, sum(episode.rewards), reason, outcome)


def check_population(sampler: Sampler, population: str) -> None:
    """Raise `UnknownNameError` unless the sampler has this population."""
    if not isinstance(population, str) or population not in sampler.populations:
        raise UnknownNameError("population", population, sampler.populations)


def check_opening(text: object, name: str) -> None:
    """Raise `SpecError` unless a user can begin with this; None means that the user finds the words."""
    if text is not None and not (isinstance(text, str) and text.strip() and is_unicode(text)):
        raise SpecError(f"{name}: expected the user's first utterance, got {text!r:.80}")


def _as_spec(value: Any) -> EpisodeSpec:
    try:
        spec = value if isinstance(value, EpisodeSpec) else EpisodeSpec(**value)
    except TypeError as error:
        raise SpecError(f"reset option 'episode': expected an EpisodeSpec, got {value!r:.120} ({error})") from error
    seed = check_seed(spec.episode_seed, "reset option 'episode', episode_seed")
    if seed >= 2**63:
        raise SpecError(f"reset option 'episode', episode_seed: expected less than 2**63, got {seed}")
    if not isinstance(spec.population, str):
        raise SpecError(f"reset option 'episode': expected a population's name, got {spec.population!r:.80}")
    check_opening(spec.opening, "reset option 'episode', opening")
    if not isinstance(spec.user_options, Mapping):
        raise SpecError(f"reset option 'episode', user_options: expected a mapping, got {spec.user_options!r:.80}")
    return replace(spec, episode_seed=seed)
