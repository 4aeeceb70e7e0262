"""PPO on models of a few thousand weights: what is scored, what is trained, and what has to stay as it is."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
from tiny_actors import (  # noqa: E402
    END,
    EOT,
    START,
    changed,
    full_actor,
    gpt2,
    learner,
    llama,
    lora_actor,
    make_row,
    make_rows,
    scored,
    sft_adapter,
    shake,
    valued,
    weights,
)

from agents.actor_critic import ActorCritic, Rows  # noqa: E402
from agents.rows import Row  # noqa: E402
from training import learner as learning  # noqa: E402
from training import ppo  # noqa: E402
from training.learner import Prepared, rate  # noqa: E402
from usp_env.errors import SpecError, TrainingError  # noqa: E402

KINDS = ("adapter", "lora", "full")


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    return sft_adapter(tmp_path_factory.mktemp("sft"))


@pytest.fixture
def make(byte_tokenizer, sft):
    """An actor of a kind whose policy and critic have left the SFT policy."""

    def made(kind: str, moved: bool = True, **options) -> ActorCritic:
        if kind == "gpt2":
            actor = full_actor(byte_tokenizer, gpt2(), **options)
        elif kind == "full":
            actor = full_actor(byte_tokenizer, **options)
        else:
            actor = lora_actor(byte_tokenizer, sft if kind == "adapter" else None, **options)
        if moved:
            shake(actor.trained("policy"), 1)
            shake(actor.trained("critic"), 2)
        return actor

    return made


def by_the_book(actor: ActorCritic, row: Row, part: str = "policy") -> torch.Tensor:
    """Log-probabilities of own tokens one at a time: a forward pass of what stands before each, without any mask."""
    found = []
    for t, (token, owner, banned) in enumerate(zip(row.token_ids, row.utterance_ids, row.banned, strict=True)):
        if owner < 0:
            continue
        with torch.no_grad(), actor.using(part):
            logits = actor.models[part](torch.tensor([row.token_ids[:t]])).logits[0, -1, : actor.vocabulary].double()
        logits /= actor.temperature
        if banned:
            logits[END] = -torch.inf
        found.append(torch.log_softmax(logits, -1)[token])
    return torch.stack(found).float()


def leaf_logits(actor: ActorCritic, rows: Rows) -> torch.Tensor:
    """Put a table in the place of the policy: logits (B, T, V) whose gradients tell which positions were read."""
    table = torch.randn(*rows.token_ids.shape, 300, generator=torch.Generator().manual_seed(0), requires_grad=True)
    actor.models["policy"] = lambda logits_to_keep, **_: SimpleNamespace(logits=table[:, logits_to_keep])
    return table


# ── 1, 2, 16: which positions ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [*KINDS, "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_check_01_the_logits_before_a_token_score_it(make, kind, temperature) -> None:
    actor = make(kind, temperature=temperature)
    rows, _ = make_rows(1)
    got = scored(actor, rows)
    for row, one in zip(rows, got, strict=True):
        own = torch.tensor(row.utterance_ids) >= 0
        torch.testing.assert_close(one[: len(own)][own], by_the_book(actor, row), rtol=0, atol=1e-5)
        assert not one[: len(own)][~own].any()


def test_check_01_labels_of_context_have_no_part_in_the_loss(make) -> None:
    """The same logits, other people's tokens permuted as labels: the same loss; own tokens permuted: another one."""
    actor = make("full")
    made = learner(actor)
    rows = Rows.of(make_rows(2)[0])
    leaf_logits(actor, rows)

    def loss(token_ids: torch.Tensor) -> float:
        with torch.no_grad():
            log_probs, _ = made.score(replace(rows, token_ids=token_ids))
        return ppo.policy_loss(log_probs, rows.behaviour, torch.ones_like(log_probs), rows.own).loss.item()

    def permuted(where: torch.Tensor) -> torch.Tensor:
        ids = rows.token_ids.clone()
        ids[where] = ids[where].flip(0)
        return ids

    own = rows.utterance_ids >= 0
    assert loss(permuted(~own)) == loss(rows.token_ids)
    assert loss(permuted(own)) != loss(rows.token_ids)


def test_check_02_only_own_tokens_have_a_gradient(make) -> None:
    """Of the policy loss with respect to the logits: 0 everywhere but just before own tokens, where it is not 0."""
    actor = make("full")
    rows = Rows.of(make_rows(3)[0])
    found = learner(actor)
    table = leaf_logits(actor, rows)
    log_probs, _ = found.score(rows)
    ppo.policy_loss(log_probs, rows.behaviour, torch.ones_like(log_probs), rows.own, clip=1e9).loss.backward()
    touched = (table.grad != 0).any(-1)
    assert torch.equal(touched[:, :-1], rows.utterance_ids[:, 1:] >= 0)
    assert not touched[:, -1].any()
    assert not (table.grad[..., actor.vocabulary :] != 0).any()  # embeddings that no tokenizer knows


@pytest.mark.parametrize("kind", [*KINDS, "gpt2"])
def test_check_16_a_value_is_of_the_state_before_the_token(make, kind) -> None:
    """V_t knows the token at t − 1 and does not know the one at t."""
    actor = make(kind)
    row = make_row(np.random.default_rng(4), utterances=3)
    own = [t for t, k in enumerate(row.utterance_ids) if k >= 0]
    before = valued(actor, [row])[0]
    for t in own:
        for at, seen in ((t, False), (t - 1, True)):
            ids = list(row.token_ids)
            ids[at] = 3 + (ids[at] + 50) % 250
            after = valued(actor, [replace(row, token_ids=tuple(ids))])[0]
            assert (abs(float(after[t] - before[t])) > 1e-4) == seen
            earlier = [u for u in own if u <= at]
            torch.testing.assert_close(after[earlier], before[earlier], rtol=0, atol=1e-5)


def test_check_16_a_critic_learns_what_the_first_token_pays(make) -> None:
    """Behind it V is ± 1, at it nobody can know: V = 0. A critic that reads the next state sees the future there, one that
    reads the last state is blind a token longer."""
    actor = make("lora", moved=False)
    made = learner(
        actor, critic_warmup=10**6, critic_lr=2e-2, minibatch=2, micro=2, lr_warmup=0.0, beta=0.0, value_clip=10.0, lam=1.0
    )
    rows = [Row((START, 60, 61, first, 70, 71), (-1, -1, -1, 0, 0, 0), (0.0,) * 6, (False,) * 6) for first in (100, 101)]
    for step in range(50):
        made.update(rows, [[1.0], [-1.0]], step, 50)
    values = valued(actor, rows)
    np.testing.assert_allclose(values[:, 3:].numpy(), [[0, 1, 1], [0, -1, -1]], atol=0.2)


# ── 4, 5, 6: one row, many rows, padding ─────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [*KINDS, "gpt2"])
def test_check_04_a_dialogue_is_its_utterances(make, kind) -> None:
    """The log-probabilities and values of one row are those of K rows that end with an utterance each."""
    actor = make(kind)
    rng = np.random.default_rng(5)
    for _ in range(3):
        row = make_row(rng, utterances=4)
        pieces = []
        for k in range(4):
            end = max(t for t, owner in enumerate(row.utterance_ids) if owner == k) + 1
            cut = Row(*(getattr(row, name)[:end] for name in ("token_ids", "utterance_ids", "behaviour", "banned")))
            pieces.append(cut.only_last())
        for found in (scored, valued):
            whole, apart = found(actor, [row])[0], found(actor, pieces)
            for k, piece in enumerate(pieces):
                where = [t for t, owner in enumerate(piece.utterance_ids) if owner == 0]
                torch.testing.assert_close(whole[where], apart[k][where], rtol=0, atol=1e-5)


def left_padded(rows: list[Row], by: int) -> Rows:
    """As engines pad; nothing in a batch says on which side it is."""
    whole = Rows.of(rows)
    width = whole.own.shape[1] + by
    shifted = {}
    for name, fill in (("token_ids", EOT), ("attention_mask", 0), ("utterance_ids", -1), ("banned", 0), ("behaviour", 0)):
        old = getattr(whole, name)
        new = torch.full((len(rows), width), fill, dtype=old.dtype)
        for b, row in enumerate(rows):
            new[b, width - len(row.token_ids) :] = old[b, : len(row.token_ids)]
        shifted[name] = new
    return Rows(**shifted)


@pytest.mark.parametrize("kind", [*KINDS, "gpt2"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_check_05_padding_changes_nothing(make, kind, side) -> None:
    """A rotary model would forgive a shift of all positions; one with learned positions does not."""
    actor = make(kind)
    rows, _ = make_rows(6)
    batch = Rows.of(rows) if side == "right" else left_padded(rows, 7)
    for found in (scored, valued):
        together = found(actor, batch)[batch.own]
        alone = torch.cat([found(actor, [row])[0][torch.tensor(row.utterance_ids) >= 0] for row in rows])
        torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", [*KINDS, "gpt2"])
def test_check_06_masks_come_from_lengths(make, kind) -> None:
    """The id that pads a batch (0, also the end of conversation) and the one that the model calls pad and eos stand in contexts."""
    actor = make(kind)
    ids = (START, 60, EOT, EOT, 61, END, START, 62, 70, EOT, START, END, 63, 71, 72)
    owners = (-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, -1, -1, -1, 1, 1)
    row = Row(ids, owners, (0.0,) * 15, (False,) * 15)
    longer = make_row(np.random.default_rng(7), utterances=6)
    batch = Rows.of([row, longer])
    assert batch.attention_mask[0].tolist() == [1] * 15 + [0] * (len(longer.token_ids) - 15)
    assert len(longer.token_ids) > 15
    own = batch.own[0]
    torch.testing.assert_close(scored(actor, batch)[0][own], by_the_book(actor, row), rtol=0, atol=1e-5)


# ── 9, 10: the old policy ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
def test_check_09_the_first_ratio_is_one(make, kind, byte_tokenizer, tmp_path) -> None:
    """No dropout anywhere, although the SFT adapter was trained with it."""
    if kind == "adapter":
        actor = lora_actor(byte_tokenizer, sft_adapter(tmp_path, dropout=0.5))
    else:
        actor = make(kind)
    rows, credit = make_rows(8)
    stats = learner(actor, minibatch=2, micro=1).update(rows, credit, 3, 10)
    assert stats["first_ratio_error"] < 1e-5
    assert stats["first_clip_fraction"] == 0.0
    one = learner(actor, minibatch=99).update(rows, credit, 3, 10)
    assert abs(one["approx_kl"]) < 1e-9
    assert one["clip_fraction"] == 0.0


def test_check_09_no_part_is_in_training_mode(byte_tokenizer, tmp_path) -> None:
    actor = lora_actor(byte_tokenizer, sft_adapter(tmp_path, dropout=0.5))
    rows, _ = make_rows(8)
    for part in ("policy", "ref", "critic"):
        assert not [name for name, module in actor.models[part].named_modules() if module.training]
    assert torch.equal(scored(actor, rows), scored(actor, rows))
    shake(actor.trained("critic"))
    assert torch.equal(valued(actor, rows), valued(actor, rows))
    whole = full_actor(byte_tokenizer, llama().train())
    assert not any(module.training for model in whole.models.values() for module in model.modules())


def test_check_10_the_old_policy_is_scored_once(make, monkeypatch) -> None:
    """Before the first step, and never again: in the second epoch the ratio is measured against what acted."""
    actor = make("lora")
    rows, credit = make_rows(9)
    made = learner(actor, epochs=2, minibatch=3, micro=3, lr=1e-2)
    events, olds = [], []
    for optimizer in made.optimizers.values():
        optimizer.register_step_pre_hook(lambda *_: events.append("step"))
    score, loss = made.score, ppo.policy_loss
    monkeypatch.setattr(made, "score", lambda *a: events.append("old" if not torch.is_grad_enabled() else "new") or score(*a))
    monkeypatch.setattr(ppo, "policy_loss", lambda new, old, *a: olds.append(old.clone()) or loss(new, old, *a))
    acted = scored(actor, rows)
    stats = made.update(rows, credit, 3, 10)
    assert events.index("step") > max(i for i, event in enumerate(events) if event == "old")
    assert events.count("old") == 2 * 2  # policy and reference of two micro-batches
    assert sum(old.sum() for old in olds).item() == pytest.approx(2 * acted.sum().item(), abs=1e-3)
    assert stats["ratio_error"] > 0.01  # by then the policy is another one
    assert stats["first_ratio_error"] < 1e-5


# ── 11, 24: the reference ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
def test_check_11_no_penalty_where_nothing_has_moved(make, kind) -> None:
    rows, credit = make_rows(10)
    batch = learner(make(kind, moved=False)).prepare(rows, credit)
    assert torch.equal(batch.old, batch.reference)
    assert batch.old[batch.whole.own].any()
    batch = learner(make(kind)).prepare(rows, credit)
    assert (batch.old != batch.reference)[batch.whole.own].all()


@pytest.mark.parametrize("kind", KINDS)
def test_check_11_the_penalty_estimates_the_kl_to_the_sft_policy(make, kind) -> None:
    """One state, 2,000 tokens sampled in it, k1 of what the learner scores against KL(π ‖ π_SFT) over the whole vocabulary."""
    actor = make(kind, moved=False)
    shake(actor.trained("policy"), 5, 0.15 if kind != "full" else 0.05)
    state = (START, 60, 61, 62, EOT, 63)
    one = Rows.of([Row((*state, 70), (-1,) * 6 + (0,), (0.0,) * 7, (False,) * 7)])
    with torch.no_grad():
        with actor.using("policy"):
            policy = torch.log_softmax(actor.logits(one, "policy"), -1)[0]
        with actor.using("ref"):
            reference = torch.log_softmax(actor.logits(one, "ref"), -1)[0]
    exact = float((policy.exp() * (policy - reference)).sum())
    drawn = torch.multinomial(policy.exp(), 2000, replacement=True, generator=torch.Generator().manual_seed(0)).tolist()
    rows = [Row((*state, token), (-1,) * 6 + (0,), (0.0,) * 7, (False,) * 7) for token in drawn]
    batch = learner(actor, micro=2000).prepare(rows, [[0.0]] * 2000)
    k1 = (batch.old - batch.reference)[batch.whole.own]
    assert float(k1.mean()) == pytest.approx(exact, abs=4 * float(k1.std()) / 2000**0.5)
    assert exact > 3 * float(k1.std()) / 2000**0.5  # far enough from 0 to tell the sign
    assert batch.stats(lambda x: x)["kl"] == pytest.approx(float(k1.mean()), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_check_11_the_reference_pass_leaves_no_trace(make, kind) -> None:
    actor = make(kind)
    rows, credit = make_rows(11)
    made = learner(actor)
    models = {id(model): model for model in actor.models.values()}.values()
    for p in (*made.parts["policy"].values(), *made.parts["critic"].values()):
        p.grad = torch.full_like(p, 0.25)

    def state() -> list[object]:
        return [
            [(name, p.requires_grad, p._version) for model in models for name, p in model.named_parameters()],
            [(name, module.training) for model in models for name, module in model.named_modules()],
            [getattr(model, "active_adapters", None) for model in models],
        ]

    before = state()
    made.prepare(rows, credit)
    assert state() == before
    assert all((p.grad == 0.25).all() for named in made.parts.values() for p in named.values())
    reference = {name: p for name, p in actor.models["ref"].named_parameters() if ".ref." in name or kind == "full"}
    assert not any(p.requires_grad or p.grad is not None for p in reference.values())


@pytest.mark.parametrize("kind", KINDS)
def test_check_24_the_reference_is_the_sft_policy_to_the_bit(make, kind, sft) -> None:
    """Whatever was learnt meanwhile, and after an error in the middle of its pass."""
    import peft

    rows, credit = make_rows(12)
    whole = Rows.of(rows)
    alone = peft.PeftModel.from_pretrained(llama(), str(sft)).eval() if kind == "adapter" else llama()
    with torch.no_grad():
        expected = alone(**whole.inputs).logits
    actor = make(kind, moved=False)
    made = learner(actor, lr=1e-2)

    def logits(part: str) -> torch.Tensor:
        with torch.no_grad(), actor.using(part):
            return actor.models[part](**whole.inputs).logits

    assert torch.equal(logits("ref"), expected)
    assert torch.equal(logits("policy"), expected)
    made.update(rows, credit, 3, 10)
    assert torch.equal(logits("ref"), expected)
    learnt = logits("policy")
    assert not torch.equal(learnt, expected)
    trained = [(name, p.requires_grad) for name, p in actor.models["policy"].named_parameters()]
    active = getattr(actor.models["policy"], "active_adapters", None)
    for part in ("ref", "critic"):
        with pytest.raises(ZeroDivisionError), actor.using(part):
            raise ZeroDivisionError
    assert [(name, p.requires_grad) for name, p in actor.models["policy"].named_parameters()] == trained
    assert getattr(actor.models["policy"], "active_adapters", None) == active
    assert torch.equal(logits("policy"), learnt)
    assert torch.equal(logits("ref"), expected)


def test_check_24_scoring_is_done_by_the_part_that_is_asked(make, sft) -> None:
    """`prepare` with an error in it leaves the policy in place."""
    actor = make("adapter")
    rows, credit = make_rows(13)
    before = scored(actor, rows)
    decoder = actor.models["ref"].get_base_model().get_decoder()
    calls: list[int] = []

    def third_fails(*_: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    handle = decoder.register_forward_pre_hook(third_fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        learner(actor).prepare(rows, credit)
    handle.remove()
    assert torch.equal(scored(actor, rows), before)


# ── 17: the critic ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
def test_check_17_a_critic_begins_with_nothing_to_say(make, kind) -> None:
    """V = 0 of every state, over the SFT policy's own trunk."""
    actor = make(kind, moved=False)
    rows = Rows.of(make_rows(14)[0])
    assert not valued(actor, rows).any()
    states = {}
    for part in ("ref", "critic"):
        model = actor.models[part]
        with torch.no_grad(), actor.using(part):
            states[part] = (model.get_base_model() if actor.adapters else model).get_decoder()(**rows.inputs).last_hidden_state
    assert torch.equal(states["ref"], states["critic"])
    shake({"head": actor.head.weight})
    assert valued(actor, rows)[rows.own].all()
    assert not valued(actor, rows)[~rows.own].any()


@pytest.mark.parametrize("kind", KINDS)
def test_check_17_the_critic_has_a_rate_of_its_own_and_a_head_start(make, kind) -> None:
    actor = make(kind, moved=False)
    made = learner(actor, lr=1e-3, critic_lr=5e-3, critic_warmup=2, lr_warmup=0.0)
    rows, credit = make_rows(15)
    moved = []
    for step in range(3):
        before = weights(made)
        stats = made.update(rows, credit, step, 10)
        moved.append(changed(made, before))
        assert stats["critic_grad_norm"] > 0
        assert (stats["grad_norm"] > 0) == (step == 2)
    assert moved == [{"critic"}, {"critic"}, {"critic", "policy"}]
    rates = {part: optimizer.param_groups[0]["lr"] for part, optimizer in made.optimizers.items()}
    assert rates["critic"] == pytest.approx(5 * rates["policy"])
    assert {"head.weight", "head.bias"} <= set(made.parts["critic"])
    assert not set(map(id, made.parts["critic"].values())) & set(map(id, made.parts["policy"].values()))


# ── 18, 19, 22: one update, however it is cut ────────────────────────────────────────────────────


def test_check_18_advantages_are_whitened_over_the_rollout(make) -> None:
    actor = make("lora")
    rows, credit = make_rows(16, n=9)
    batch = learner(actor, micro=9).prepare(rows, credit)
    own = batch.whole.own
    raw = (batch.returns - batch.values)[own].double()
    torch.testing.assert_close(batch.advantages[own].double(), (raw - raw.mean()) / raw.std(unbiased=False), rtol=0, atol=1e-5)
    assert not batch.advantages[~own].any()
    tail = Row((70,) * 80, (-1,) * 80, (0.0,) * 80, (False,) * 80)
    padded = [
        Row(*(getattr(row, n) + getattr(tail, n) for n in ("token_ids", "utterance_ids", "behaviour", "banned"))) for row in rows
    ]
    for other in (learner(actor, micro=1).prepare(rows, credit), learner(actor, micro=2).prepare(padded, credit)):
        for name in ("old", "reference", "values", "entropy", "advantages", "returns"):
            torch.testing.assert_close(getattr(other, name)[:, : own.shape[1]], getattr(batch, name), rtol=0, atol=5e-5)


def test_check_18_rewards_keep_their_mean(make) -> None:
    """Returns are what the critic learns, in units of the reward: nothing is shifted but advantages."""
    rows, _ = make_rows(17)
    batch = learner(make("lora", moved=False), lam=1.0).prepare(rows, [[3.0] * row.utterances for row in rows])
    assert torch.equal(batch.returns[batch.whole.own], torch.full((int(batch.whole.own.sum()),), 3.0))
    assert not batch.advantages.any()  # everybody did equally well


def gradients(actor: ActorCritic, rows, credit, **settings) -> dict[str, torch.Tensor]:
    """Of an update's only optimiser step, as it reaches the clip."""
    made, found = learner(actor, minibatch=99, **settings), {}

    def move(parts, step, of):
        found.update({part: made._gradient(part).clone() for part in parts})
        return {part: 0.0 for part in parts}

    made._move = move
    made.update(rows, credit, 3, 10)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_check_19_micro_batches_do_not_weigh(make, kind) -> None:
    """Dialogues of 1 to 24 own tokens: gradients of micro-batches of 1, 3 and all are equal."""
    actor = make(kind)
    rows, credit = make_rows(18)
    all_at_once = gradients(actor, rows, credit, micro=99)
    assert all(g.norm() > 1e-3 for g in all_at_once.values())
    for micro in (1, 3):
        for part, found in gradients(actor, rows, credit, micro=micro).items():
            torch.testing.assert_close(found, all_at_once[part], rtol=0, atol=1e-5)


def test_check_19_one_token_and_no_dialogue(make) -> None:
    """One own token in all: its advantage is whitened to 0, nothing is NaN; none at all: nothing moves."""
    actor = make("lora")
    made = learner(actor)
    before = weights(made)
    alone = Row((START, 60, 61), (-1, -1, 0), (0.0, 0.0, -1.0), (False, False, True))
    stats = made.update([alone], [[1.0]], 3, 10)
    assert stats["own_tokens"] == 1
    assert stats["policy_loss"] == 0.0
    assert all(math.isfinite(v) or k == "explained_variance" for k, v in stats.items())
    assert changed(made, before) == {"critic"}  # the policy's gradient was 0
    before = weights(made)
    nothing = made.update([], [], 4, 10)
    assert nothing["own_tokens"] == 0
    assert changed(made, before) == set()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_check_22_one_step_per_minibatch(make, kind) -> None:
    """Old gradients do not count; each norm is clipped once, over the whole part; rates belong to the update, not to the step."""
    rows, credit = make_rows(19)
    results = []
    for junk in (False, True):
        actor = make(kind)
        made = learner(actor, minibatch=3, micro=2, max_grad_norm=0.01, lr=1e-3, critic_lr=1e-2, epochs=2, lr_warmup=0.2)
        if junk:
            for named in made.parts.values():
                for p in named.values():
                    p.grad = torch.full_like(p, 1e6)
        seen = {part: [] for part in made.parts}
        for part, optimizer in made.optimizers.items():

            def look(optimizer, *_, part=part, seen=seen):
                flat = torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]])
                seen[part].append((flat.norm().item(), optimizer.param_groups[0]["lr"]))

            optimizer.register_step_pre_hook(look)
        before = weights(made)
        for step in (0, 1):
            stats = made.update(rows, credit, step, 10)
        results.append(weights(made))
        assert changed(made, before) == {"policy", "critic"}
        for part, base in (("policy", 1e-3), ("critic", 1e-2)):
            assert len(seen[part]) == 2 * 2 * 2  # two updates of two epochs of two minibatches
            assert max(norm for norm, _ in seen[part]) <= 0.01 * (1 + 1e-3)
            assert [lr for _, lr in seen[part]] == pytest.approx([base * rate(s, 10, 0.2) for s in (0, 1) for _ in range(4)])
            assert all(p.grad is None for p in made.parts[part].values())
        assert stats["grad_norm"] > 0.01  # it was larger: the clip was at work
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert rate(0, 10, 0.2) == 0.5


def test_small_gradients_are_not_enlarged(make) -> None:
    actor = make("lora")
    rows, credit = make_rows(20)
    expected = gradients(actor, rows, credit)
    made, seen = learner(actor, minibatch=99, max_grad_norm=1e9), {}
    for part, optimizer in made.optimizers.items():
        optimizer.register_step_pre_hook(
            lambda o, *_, part=part: seen.update({part: torch.cat([p.grad.flatten() for p in o.param_groups[0]["params"]])})
        )
    made.update(rows, credit, 3, 10)
    for part in expected:
        torch.testing.assert_close(seen[part], expected[part])


def test_the_order_of_dialogues_is_seeded(make) -> None:
    rows, credit = make_rows(21, n=8)
    results = []
    for seed in (0, 0, 1):
        made = learner(make("lora"), minibatch=2, seed=seed, lr=1e-2)
        torch.rand(3)  # no global state decides
        made.update(rows, credit, 3, 10)
        results.append(weights(made))
    same = [all(torch.equal(results[0][name], other[name]) for name in other) for other in results[1:]]
    assert same == [True, False]
    made = learner(make("lora"), minibatch=3)
    order = [i for part in made._minibatches(8, 3, 0, credit) for i in part]
    assert sorted(order) == list(range(8))
    assert order != [i for part in made._minibatches(8, 3, 1, credit) for i in part]


# ── 21, 23: what is reported, and in what precision ──────────────────────────────────────────────


def test_check_21_statistics_are_means_over_own_tokens(make) -> None:
    actor = make("adapter")
    rows, credit = make_rows(22)
    batch = learner(actor).prepare(rows, credit)
    own = batch.whole.own
    stats = batch.stats(lambda x: x)
    with torch.no_grad(), actor.using("policy"):
        logits = actor.logits(batch.whole)
    logits[batch.whole.banned[own], END] = -torch.inf
    probs = logits.double().softmax(-1)
    entropy = -(probs * probs.clamp(min=1e-300).log()).sum(-1)
    assert stats["entropy"] == pytest.approx(float(entropy.mean()), abs=1e-5)
    assert stats["entropy"] > 0
    assert stats["own_tokens"] == own.sum()
    assert stats["log_prob"] == pytest.approx(float(batch.old[own].mean()), abs=1e-5)
    assert stats["kl_k3"] >= 0
    assert stats["behaviour_mismatch"] == pytest.approx(float((batch.old + 1)[own].abs().mean()), abs=1e-5)
    assert stats["explained_variance"] == pytest.approx(ppo.explained_variance(batch.values, batch.returns, own), abs=1e-4)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_check_23_scores_and_values_are_float32_in_any_precision(make, kind) -> None:
    """A bfloat16 model, and a float32 one under autocast: softmax and value head work in float32."""
    rows = Rows.of(make_rows(23)[0])
    actor = make(kind)
    made = learner(actor)
    for autocast in (True, False):
        if not autocast:
            for model in actor.models.values():
                model.to(torch.bfloat16)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with actor.using("policy"):
                log_probs, entropy = made.score(rows)
                logits = actor.logits(rows)
            with actor.using("critic"):
                values = actor.values(rows)
        assert {logits.dtype, log_probs.dtype, entropy.dtype, values.dtype} == {torch.float32}
        sampled = values[rows.own]
        assert not torch.equal(sampled, sampled.bfloat16().float())  # not rounded on the way
    assert {(o.defaults["eps"], o.defaults["betas"], o.defaults["weight_decay"]) for o in made.optimizers.values()} == {
        (1e-8, (0.9, 0.95), 0.0)
    }


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("wrong", ["policy", "critic", "credit"])
def test_nan_is_an_error_and_changes_no_weight(make, monkeypatch, wrong) -> None:
    actor = make("lora")
    rows, credit = make_rows(24)
    made = learner(actor, minibatch=99)
    before = weights(made)
    if wrong == "policy":
        loss = ppo.policy_loss
        monkeypatch.setattr(ppo, "policy_loss", lambda *a: (f := loss(*a))._replace(loss=f.loss * float("nan")))
    elif wrong == "critic":
        loss = ppo.value_loss
        monkeypatch.setattr(ppo, "value_loss", lambda *a: (f := loss(*a))._replace(loss=f.loss * float("nan")))
    else:
        credit[2][0] = float("nan")
    named = {
        "policy": "the policy's gradient is nan,",
        "critic": "the critic's gradient is nan,",
        "credit": "policy's .* and the critic's",
    }
    with pytest.raises(TrainingError, match=f"update 4: .*{named[wrong]}.* no weight was changed by this step"):
        made.update(rows, credit, 3, 10)
    assert changed(made, before) == set()
    assert all(not optimizer.state for optimizer in made.optimizers.values())


def test_credit_that_does_not_fit_is_refused(make) -> None:
    rows, credit = make_rows(25)
    with pytest.raises(SpecError, match="row 1: expected one credit for each"):
        learner(make("lora")).update(rows, [credit[0], [*credit[1], 0.0], *credit[2:]], 3, 10)


def test_a_process_without_dialogues_takes_part_on_its_own_device() -> None:
    """Sums over processes are made where the weights are: an engine for GPUs adds no tensors of the CPU."""
    seen = []
    made = Prepared.empty(torch.device("meta"), lambda x: seen.append(x.device.type) or x)
    assert seen == ["meta"]
    assert made.old.device.type == "meta"
    assert made.rows == []


# ── the three forms ──────────────────────────────────────────────────────────────────────────────


def test_the_forms_score_alike(byte_tokenizer) -> None:
    """LoRA matrices that change nothing, over the model that the full form trains."""
    rows, credit = make_rows(26)
    lora, full = (learner(actor).prepare(rows, credit) for actor in (lora_actor(byte_tokenizer), full_actor(byte_tokenizer)))
    for name in ("old", "reference", "values", "entropy", "advantages", "returns"):
        torch.testing.assert_close(getattr(lora, name), getattr(full, name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [*KINDS, "gpt2"])
def test_every_form_learns_and_leaves_the_reference(make, kind) -> None:
    actor = make(kind, moved=False)
    rows, credit = make_rows(27)
    made = learner(actor, lr=1e-2, critic_lr=1e-2, epochs=2)
    trained = {id(p) for named in made.parts.values() for p in named.values()}
    models = {id(model): model for model in actor.models.values()}.values()
    others = [(p, p.detach().clone()) for model in models for p in model.parameters() if id(p) not in trained]
    before, first = weights(made), made.prepare(rows, credit)
    stats = made.update(rows, credit, 3, 10)
    assert changed(made, before) == {"policy", "critic"}
    assert all(torch.equal(p, old) for p, old in others)
    assert stats["ratio_error"] > 0
    second = made.prepare(rows, credit)
    own, good = first.whole.own, first.advantages > 0
    assert torch.equal(second.reference, first.reference)
    assert ((second.old - first.old) * first.advantages)[own].sum() > 0  # what was good is likelier, what was bad less so
    assert (second.values - first.returns)[own].square().mean() < (first.values - first.returns)[own].square().mean()
    assert good.any()


@pytest.mark.parametrize("tied", [True, False])
def test_a_full_critic_trains_no_words(byte_tokenizer, tied) -> None:
    """Its output layer is no part of V: it would only cost memory. Tied to the embeddings, it is read and trained."""
    actor = full_actor(byte_tokenizer, llama(tie_word_embeddings=tied))
    assert actor.models["policy"] is not actor.models["critic"]
    named = actor.trained("critic")
    assert ("lm_head.weight" in named) is False
    assert "model.embed_tokens.weight" in named
    assert ("lm_head.weight" in actor.trained("policy")) is not tied


def test_frozen_models_cannot_be_trained(byte_tokenizer) -> None:
    actor = full_actor(byte_tokenizer)
    actor.models["policy"].requires_grad_(False)
    with pytest.raises(SpecError, match="policy: expected trainable parameters, found none"):
        actor.trained("policy")


def test_dialogues_are_cut_into_equal_steps() -> None:
    assert list(learning._micro([3, 1, 2], 2)) == [[3, 1], [2]]
