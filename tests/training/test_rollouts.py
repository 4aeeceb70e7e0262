"""From dialogues to rows with credit: which are learnt from, and what each of their utterances is paid."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from doubles import Speaker

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
from tiny_actors import END, EOT, START, changed, full_actor, learner, lora_actor, scored, shake, valued, weights  # noqa: E402

from agents.speaker import TokenSpeaker, user_prefix  # noqa: E402
from training import rollouts  # noqa: E402
from training.guards import guards, reward_terms  # noqa: E402
from training.rollouts import learnable, real_people, roll_out, specs_of  # noqa: E402
from usp_env.backends.base import Generation, Sampling  # noqa: E402
from usp_env.backends.hf import HFBackend  # noqa: E402
from usp_env.backends.scripted import ScriptedBackend  # noqa: E402
from usp_env.env import make_conductor  # noqa: E402
from usp_env.errors import BackendError, SpecError, TrainingError, UspError  # noqa: E402
from usp_env.records import EpisodeSpec, Reply, RewardTerms  # noqa: E402
from usp_env.rendering import Renderer  # noqa: E402
from usp_env.rollout import roll  # noqa: E402

CC, HUMAN = 0.4, (1.0, 0.5, 0.3, 0.0)


class Eq6:
    """λ·cc + (1−λ)·P(human), which falls from turn to turn; None where a test wants a dialogue that nobody can score."""

    name, when, scorable = "eq6", "end", True

    def __call__(self, profiles, dialogues):
        assert all(dialogue.turns for dialogue in dialogues)
        if not self.scorable:
            return [None] * len(dialogues)
        return [RewardTerms({"human": 0.2 * np.array(HUMAN[: d.turns])}, {"cycle": 0.8 * CC}) for d in dialogues]


def credit_of(k: int) -> list[float]:
    return [0.8 * CC + 0.2 * human for human in HUMAN[:k]]


@pytest.fixture
def stage(byte_tokenizer, sampler):
    """Plays scripted users: `stage("hi", ("length", "so lo"), END)`."""

    def play(*lines, answer=lambda view, seed: "ok", opening=None, max_turns=4, reward=None, **rules):
        renderer = Renderer(byte_tokenizer)
        backend = ScriptedBackend(
            [one if isinstance(one, Generation | BackendError) else generation(byte_tokenizer, one) for one in lines]
        )
        speaker = TokenSpeaker(backend, renderer, user_prefix())
        conductor = make_conductor(
            Speaker(answer, role="assistant"),
            sampler,
            reward or Eq6(),
            "user",
            population="uniform",
            max_turns=max_turns,
            **rules,
        )
        (episode,) = roll(conductor, speaker, [EpisodeSpec("p1", "uniform", 5, opening)])
        return SimpleNamespace(episode=episode, speaker=speaker, backend=backend, found=learnable(episode, speaker))

    return play


def generation(tokenizer, line) -> Generation:
    """A line as it was sampled: byte by byte, although the vocabulary has `ab`."""
    reason, text = line if isinstance(line, tuple) else ("end", "") if line == END else ("stop", line)
    last = {"stop": (EOT,), "end": (END,), "role": (START,), "length": ()}.get(reason, ())
    ids = tuple(i for char in text for i in tokenizer(char, add_special_tokens=False).input_ids) + last
    if reason == "context_limit":
        ids = ()
    return Generation(text, ids, tuple(-0.1 * (i + 1) for i in range(len(ids))), reason, {"completion_tokens": len(ids)})


def own_of(row, k: int) -> list[int]:
    return [t for t, owner in zip(row.token_ids, row.utterance_ids, strict=True) if owner == k]


# ── 3: token in, token out ───────────────────────────────────────────────────────────────────────


def test_check_03_prompts_and_rows_hold_the_sampled_ids(stage, byte_tokenizer) -> None:
    """`ab` was sampled as two tokens. The next prompt goes on from them, and the row that is trained goes through every prompt."""
    lines = ["ab ab", ("length", "cab"), ("end", "no ab")]
    played = stage(*lines, answer=lambda view, seed: "ab?")
    row, credit = played.found
    sampled = [list(generation(byte_tokenizer, line).token_ids) for line in lines]
    assert [own_of(row, k) for k in range(3)] == sampled
    prompts = [list(request.token_ids) for request in played.backend.history]
    for k, prompt in enumerate(prompts):
        assert list(row.token_ids[: len(prompt)]) == prompt
        assert list(row.token_ids[len(prompt) : len(prompt) + len(sampled[k])]) == sampled[k]
    assert prompts[1][: len(prompts[0]) + len(sampled[0])] == prompts[0] + sampled[0]
    (word,) = byte_tokenizer("ab", add_special_tokens=False).input_ids
    assert row.token_ids.count(word) == 2  # the assistant's two replies
    assert [m.content for m in played.episode.messages if m.role == "user"] == ["ab ab", "cab", "no ab"]
    assert credit == pytest.approx(credit_of(3))


def test_check_03_an_engines_own_ids_come_back(byte_tokenizer, sampler) -> None:
    """The same, sampled by a model: each utterance of the row is what the engine says it sampled, behind the prompt it read."""
    speaker, play, seen = sampled_play(lora_actor(byte_tokenizer), byte_tokenizer, sampler)
    assert len(play.rows) >= 6
    checked = 0
    for row in play.rows:
        for k in range(row.utterances):
            start = row.utterance_ids.index(k)
            end = max(t for t, owner in enumerate(row.utterance_ids) if owner == k) + 1
            ids, prompt = row.token_ids[start:end], row.token_ids[:start]
            (made,) = {m.token_ids: m for p, m in seen if p == prompt and m.token_ids[: len(ids)] == ids}.values()
            assert made.token_ids[len(ids) :] in ((), (START,))
            assert row.behaviour[start:end] == made.logprobs[: len(ids)]
            checked += 1
    assert checked == sum(row.utterances for row in play.rows) >= 12


# ── 7: how utterances end ────────────────────────────────────────────────────────────────────────


def test_check_07_both_finish_reasons_in_one_dialogue(stage, byte_tokenizer) -> None:
    played = stage("hello", ("length", "and n"), "thanks", max_turns=3)
    row, credit = played.found
    assert own_of(row, 0)[-1] == own_of(row, 2)[-1] == EOT
    assert EOT not in own_of(row, 1)
    cut = max(t for t, k in enumerate(row.utterance_ids) if k == 1)
    assert row.token_ids[cut + 1] == EOT  # the next turn renders, but nobody is trained to have ended here
    assert row.utterance_ids[cut + 1] == -1
    assert [m.finish_reason for m in played.episode.messages if m.role == "user"] == ["stop", "length", "stop"]
    assert (row.utterances, credit) == (3, pytest.approx(credit_of(3)))


# ── 8: the policy that acts is the one that is scored ────────────────────────────────────────────


def sampled_play(actor, tokenizer, sampler, n: int = 8, temperature: float = 1.0):
    """Dialogues of a tiny model, and what its engine said of each prompt."""
    backend = HFBackend(actor.models["policy"], tokenizer, mutable=True, prefix_gib=0.01)
    seen, generate = [], backend.generate

    def watched(requests):
        made = generate(requests)
        seen.extend(zip([tuple(request.token_ids) for request in requests], made, strict=True))
        return made

    backend.generate = watched
    sampling = Sampling(temperature=temperature, max_tokens=6)
    speaker = TokenSpeaker(backend, Renderer(tokenizer), user_prefix(), "user", sampling, actor.adapters.get("policy"))
    conductor = make_conductor(
        Speaker(lambda view, seed: "ab ok", role="assistant"), sampler, Eq6(), "user", population="uniform", max_turns=3
    )
    specs = specs_of([sampler.bank[i] for i in range(6)], 0, n, seed=0, population="uniform")
    return speaker, roll_out(conductor, speaker, specs), seen


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_check_08_sampling_is_what_is_scored(byte_tokenizer, sampler, kind, temperature) -> None:
    """|log π_old − what the engine said when it sampled|, in float32: its caches, its left padding, its bans, its temperature."""
    actor = (lora_actor if kind == "lora" else full_actor)(byte_tokenizer, temperature=temperature)
    shake(actor.trained("policy"), by=0.1 if kind == "lora" else 0.02)
    endings(actor)
    _, play, _ = sampled_play(actor, byte_tokenizer, sampler, 16, temperature)
    batch = learner(actor).prepare(play.rows, play.credit)
    own = batch.whole.own
    gap = (batch.old - batch.whole.behaviour)[own].abs()
    assert gap.max() < 1e-3
    assert gap.mean() < 1e-4
    assert batch.stats(lambda x: x)["behaviour_mismatch"] < 1e-4
    assert own.sum() > 50
    assert {batch.whole.token_ids[own].eq(i).any().item() for i in (END, EOT)} == {True}  # both ends were sampled
    assert batch.whole.banned[own].any()
    free = scored(actor, [replace(row, banned=(False,) * len(row.token_ids)) for row in play.rows])
    assert (batch.whole.behaviour - free)[batch.whole.banned].abs().mean() > 0.01  # the ban is part of the distribution


def endings(actor) -> None:
    """Make both ends likely in every state, so that a tiny model ends turns and conversations."""
    bias = torch.zeros(300)
    bias[[END, EOT]] = 6.0
    for model in {id(model): model for model in actor.models.values()}.values():
        model.get_output_embeddings().register_forward_hook(lambda module, args, out: out + bias)


# ── who is paid what ─────────────────────────────────────────────────────────────────────────────


def test_a_silent_end_is_worth_what_the_dialogue_is(stage) -> None:
    """Eq. 6 pays utterances; the lone end token gets their mean, so that ending is neither bought nor punished."""
    row, credit = stage("hello", "and now", END).found
    assert own_of(row, 2) == [END]
    assert credit == pytest.approx([*credit_of(2), np.mean(credit_of(2))])
    assert len(credit) == row.utterances == 3


def test_an_end_with_words_is_an_utterance(stage) -> None:
    row, credit = stage("hello", ("end", "bye")).found
    assert own_of(row, 1)[-1] == END
    assert credit == pytest.approx(credit_of(2))


def test_a_failure_trains_only_itself(stage) -> None:
    """Nothing to say: the reward of bad actions, on these tokens; what was said before was never scored, and is context."""
    played = stage("hello", ("stop", "  "), bad_action_reward=-1.5)
    row, credit = played.found
    assert (played.episode.outcome, played.episode.valid) == ("agent_failure", True)
    assert credit == [-1.5]
    assert row.utterances == 1
    assert [t for t, k in enumerate(row.utterance_ids) if k == 0] == list(range(len(row.token_ids) - 3, len(row.token_ids)))
    assert row.token_ids[-1] == EOT
    first = stage(("stop", ""), bad_action_reward=-1.0)
    assert first.found[1] == [-1.0]
    assert first.found[0].utterances == 1


def test_a_failure_without_tokens_teaches_nothing(stage) -> None:
    """A header of somebody else's is no word of the policy's that could be trained."""
    played = stage("hello", ("role", ""))
    assert played.episode.outcome == "agent_failure"
    assert played.found is None


def test_a_prompt_that_does_not_fit_ends_the_dialogue(stage) -> None:
    """What was said before is scored, and learnt from."""
    played = stage("hello", ("context_limit", ""))
    assert (played.episode.end_reason, played.episode.outcome) == ("context_limit", "completed")
    assert played.found[1] == pytest.approx(credit_of(1))
    assert played.found[0].utterances == 1


def test_a_given_opening_has_no_credit(stage) -> None:
    row, credit = stage("and now", "thanks", opening="hello", max_turns=3).found
    assert credit == pytest.approx(credit_of(3)[1:])
    assert row.utterances == 2
    assert not any(row.banned)


@pytest.mark.parametrize(
    ("outcome", "options"),
    [
        ("assistant_failure", {"answer": lambda view, seed: ""}),
        ("infra_failure", {"answer": lambda view, seed: Reply("", error=BackendError("down"))}),
        ("unscored", {"reward": (unscorable := Eq6())}),
    ],
)
def test_nothing_is_learnt_from_invalid_dialogues(stage, outcome, options) -> None:
    unscorable.scorable = False
    played = stage("hello", "and now", max_turns=2, **options)
    assert (played.episode.outcome, played.episode.valid) == (outcome, False)
    assert played.found is None


def test_the_policys_own_engine_may_fail(stage) -> None:
    played = stage("hello", BackendError("out of memory"))
    assert played.episode.outcome == "infra_failure"
    assert played.found is None


def test_a_row_that_does_not_fit_its_rewards_is_an_error(stage) -> None:
    played = stage("hello", "and now", "thanks", max_turns=3)
    played.episode.utterance_rewards = [0.5]
    with pytest.raises(UspError, match="3 utterances were sampled and 1 have a reward"):
        learnable(played.episode, played.speaker)


@pytest.mark.parametrize("ends", [False, True])
def test_an_assistants_last_words_stand_once_in_its_row(byte_tokenizer, sampler, ends) -> None:
    """The seat whose seeds do not move on with its own message: at a turn limit, and where the user leaves without a word."""
    backend = ScriptedBackend([generation(byte_tokenizer, "one"), generation(byte_tokenizer, "two")])
    speaker = TokenSpeaker(backend, Renderer(byte_tokenizer), lambda profile: [], "assistant")
    user = Speaker(lambda view, seed: Reply("", ended=True) if ends and len(view.messages) == 4 else f"q{len(view.messages)}")
    conductor = make_conductor(user, sampler, None, "assistant", population="uniform", max_turns=9 if ends else 2)
    (episode,) = roll(conductor, speaker, [EpisodeSpec("p1", "uniform", 5)])
    assert episode.end_reason == ("user_ended" if ends else "turn_limit")
    row = speaker.row(episode)
    assert row.utterances == 2
    assert bytes("".join(byte_tokenizer.decode(own_of(row, 1)[:-1])), "utf8") == b"two"


# ── whole rollouts ───────────────────────────────────────────────────────────────────────────────


def test_rollouts_keep_the_order_of_their_specs(byte_tokenizer, sampler) -> None:
    """However many lanes there are, and whoever ends first; the same seeds give the same rows."""
    actor = lora_actor(byte_tokenizer)
    endings(actor)
    _, play, _ = sampled_play(actor, byte_tokenizer, sampler)
    specs = specs_of([sampler.bank[i] for i in range(6)], 0, 8, seed=0, population="uniform")
    assert [episode.spec for episode in play.episodes] == specs
    assert sum(play.outcomes.values()) == 8
    assert len(play.rows) == len(play.credit) == sum(learnt(episode) for episode in play.episodes)
    assert all(row.utterances == len(credit) for row, credit in zip(play.rows, play.credit, strict=True))
    backend = HFBackend(actor.models["policy"], byte_tokenizer, mutable=True)
    speaker = TokenSpeaker(backend, Renderer(byte_tokenizer), user_prefix(), "user", Sampling(max_tokens=6), "policy")
    conductor = make_conductor(
        Speaker(lambda view, seed: "ab ok", role="assistant"), sampler, Eq6(), "user", population="uniform", max_turns=3
    )
    again = roll_out(conductor, speaker, specs, lanes=2)
    assert [row.token_ids for row in again.rows] == [row.token_ids for row in play.rows]
    assert again.credit == play.credit
    assert speaker._last == {}


def learnt(episode) -> bool:
    return episode.outcome in ("completed", "agent_failure")


def test_scores_of_a_whole_rollout_are_those_of_each_end(byte_tokenizer, sampler) -> None:
    """`late` asks the reward once; what is learnt, and what the episodes tell, is the same."""
    plays, calls = [], []
    for late in (False, True):
        asked: list[int] = []

        class Counted(Eq6):
            def __call__(self, profiles, dialogues, asked=asked):
                asked.append(len(dialogues))
                return super().__call__(profiles, dialogues)

        backend = ScriptedBackend(
            lambda request: generation(
                byte_tokenizer, END if request.can_end and request.seed % 3 == 0 else f"say {request.seed % 97}"
            )
        )
        speaker = TokenSpeaker(backend, Renderer(byte_tokenizer), user_prefix())
        answers = Speaker(lambda view, seed: "ok", role="assistant")
        conductor = make_conductor(answers, sampler, Counted(), "user", population="uniform", max_turns=3)
        specs = specs_of([sampler.bank[i] for i in range(6)], 0, 8, seed=0, population="uniform")
        plays.append(roll_out(rollouts.late(conductor) if late else conductor, speaker, specs, lanes=3))
        calls.append(asked)
    ends, once = plays
    assert calls[1] == [8]
    assert len(calls[0]) > 1
    assert (once.rows, once.credit, once.outcomes) == (ends.rows, ends.credit, ends.outcomes)
    assert {episode.turn for episode in ends.episodes} == {1, 2, 3}
    for a, b in zip(ends.episodes, once.episodes, strict=True):
        assert (a.rewards, a.reward_terms, a.utterance_rewards) == (b.rewards, b.reward_terms, b.utterance_rewards)


def failing(byte_tokenizer, sampler, n: int = 4):
    backend = ScriptedBackend(lambda request: generation(byte_tokenizer, "hello"))
    speaker = TokenSpeaker(backend, Renderer(byte_tokenizer), user_prefix())
    down = Speaker(lambda view, seed: Reply("", error=BackendError("the response model is down")), role="assistant")
    return (
        speaker,
        make_conductor(down, sampler, Eq6(), "user", population="uniform", max_turns=3),
        [sampler.bank[i] for i in range(n)],
    )


def test_a_rollout_of_failures_moves_nothing(byte_tokenizer, sampler) -> None:
    speaker, conductor, pool = failing(byte_tokenizer, sampler)
    play = roll_out(conductor, speaker, specs_of(pool, 0, 4, seed=0, population="uniform"))
    assert (play.rows, play.credit, play.outcomes, play.scored) == ([], [], {"infra_failure": 4}, [])
    made = learner(lora_actor(byte_tokenizer))
    before = weights(made)
    assert made.update(play.rows, play.credit, 0, 10)["own_tokens"] == 0
    assert changed(made, before) == set()


def test_the_trainer_stops_where_nothing_can_be_learnt(byte_tokenizer, sampler, tmp_path) -> None:
    """It says why, and what to do; the weights of the update before stay."""
    from training.rlcc import Rlcc

    speaker, conductor, pool = failing(byte_tokenizer, sampler)
    args = SimpleNamespace(real_profiles=True, dialogues=4, seed=0, lanes=4, dialogues_every=1, out=tmp_path)
    run = Rlcc.__new__(Rlcc)
    run.args, run.pool, run.speaker, run.conductor = args, pool, speaker, conductor
    run.learner = learner(lora_actor(byte_tokenizer))
    run.accelerator, run.log = run.learner.accelerator, SimpleNamespace(keep=lambda *_: None)
    before = weights(run.learner)
    with pytest.raises(TrainingError, match="update 8: none of 4 dialogues .*the response model is down.*--resume"):
        run.update(7)
    assert changed(run.learner, before) == set()


def test_specs_of_a_step_do_not_depend_on_what_was_played(bank, sampler) -> None:
    """The pool is gone through again and again, each time with new noise."""
    pool = [bank[i] for i in range(5)]
    once = specs_of(pool, 0, 12, seed=3)
    assert [spec.profile_id for spec in once] == [pool[k % 5].id for k in range(12)]
    assert len({spec.episode_seed for spec in once}) == 12
    assert specs_of(pool, 3, 4, seed=3) == specs_of(pool, 0, 16, seed=3)[12:]
    assert specs_of(pool, 0, 4, seed=4)[0].episode_seed != once[0].episode_seed
    with pytest.raises(SpecError, match="at least one profile"):
        specs_of([], 0, 4, seed=0)
    asked = []
    real_people(SimpleNamespace(sample=lambda n, population, rng: asked.append((n, population)) or []), seed=0, size=9)
    assert asked == [(9, "density")]
    assert rollouts.virtual_pool is not None


# ── 26: what a policy may do instead of speaking like its person ─────────────────────────────────


def scorers():
    def human(texts):
        return np.array([0.9 if "!" in text else 0.2 for text in texts])

    return SimpleNamespace(human=SimpleNamespace(model=human, twin=lambda texts: 1 - human(texts)))


@pytest.mark.parametrize(
    ("lines", "monitor", "value"),
    [
        (["ok!", "so a!", "b?", "c d"], "words", 1.5),
        (["ok!", ("length", "so a"), "b?", "c d"], "cut_off", 0.25),
        (["same words again!"] * 3, "early_stopped", 1.0),
        (["hi!", "what now?", "and then?"], "early_stopped", 0.0),
        (["I am person 1.", "and then?"], "copy_rate", 1.0),
        (["this is no part of it", "and then?"], "copy_rate", 0.0),
        (["hi!", "and then?", END], "ended_by_user", 1.0),
        (["hi!", "and then?", "well", "yes"], "ended_by_user", 0.0),
        (["hi!", "and then?", "well", "yes"], "turns", 4.0),
        (["hi!", "well!"], "human_twin", 0.1),
    ],
)
def test_check_26_reward_hacking_is_watched(stage, lines, monitor, value) -> None:
    """Length, repetition, recitation and early ends each move a number of their own, and so does the scorer's twin."""
    played = stage(*lines, max_turns=min(4, len([line for line in lines if line != END])) if lines[-1] != END else 4)
    assert guards([played.episode], scorers())[monitor] == pytest.approx(value)


def test_check_26_duplicate_first_turns_are_watched(stage) -> None:
    same = [stage("tell me of soup", max_turns=1).episode for _ in range(3)]
    others = [stage(text, max_turns=1).episode for text in ("tell me of soup", "a poem please", "fix this code")]
    assert guards(same, scorers())["first_turn_diversity"] == 0.0
    assert guards(others, scorers())["first_turn_diversity"] == 1.0
    assert np.isnan(guards(same[:1], scorers())["first_turn_diversity"])


def test_check_26_each_reward_has_its_own_share(stage) -> None:
    """Cycle and human-likeness apart, without their weights; and their spread over dialogues."""
    episodes = [stage("hello", "and now", max_turns=2).episode, stage("hello", max_turns=1).episode]
    found = reward_terms(episodes, {"human": 0.2, "cycle": 0.8})
    assert found["cycle"] == pytest.approx(CC)
    assert found["human"] == pytest.approx((0.75 + 1.0) / 2)
    rewards = [0.8 * CC + 0.2 * 0.75, 0.8 * CC + 0.2]
    assert found["reward"] == pytest.approx(np.mean(rewards))
    assert found["reward_std"] == pytest.approx(np.std(rewards))


def test_check_26_every_update_tells_kl_and_explained_variance(byte_tokenizer, sampler) -> None:
    actor = lora_actor(byte_tokenizer)
    endings(actor)
    shake(actor.trained("policy"), by=0.1)
    _, play, _ = sampled_play(actor, byte_tokenizer, sampler)
    stats = learner(actor).update(play.rows, play.credit, 0, 10)
    assert stats["kl"] != 0.0
    assert stats["kl_k3"] > 0.0
    assert np.isfinite(stats["explained_variance"])
    for key in (
        "kl_k3",
        "entropy",
        "clip_fraction",
        "approx_kl",
        "behaviour_mismatch",
        "grad_norm",
        "critic_grad_norm",
        "return",
    ):
        assert np.isfinite(stats[key]), key


def test_values_are_learnt_on_whole_rollouts(byte_tokenizer, sampler) -> None:
    actor = lora_actor(byte_tokenizer)
    endings(actor)
    _, play, _ = sampled_play(actor, byte_tokenizer, sampler)
    made = learner(actor, critic_lr=1e-2, critic_warmup=99, value_clip=9.0)
    first = made.update(play.rows, play.credit, 0, 20)["value_loss"]
    last = [made.update(play.rows, play.credit, step, 20)["value_loss"] for step in range(1, 6)][-1]
    assert last < first / 2
    assert valued(actor, play.rows).isfinite().all()
