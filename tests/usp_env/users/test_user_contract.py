"""The contract of a simulated user, run on every kind of `usp_env.users`."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from usp_env import users
from usp_env.backends.base import Backend, Generation, Request
from usp_env.backends.scripted import ScriptedBackend
from usp_env.backends.spec import ModelSpec
from usp_env.dialogue import Dialogue, View
from usp_env.env import DialogueEnv
from usp_env.errors import BackendError, UspError
from usp_env.profiles import Profile, ProfileBank
from usp_env.sampling.base import UniformSampler
from usp_env.transcripts import transcribe
from usp_env.users.base import ModelSpeaker, Partner

MODEL_SPECS = [
    "usp:m",
    "plato:m?temperature=0.5",
    "plato-mini",
    "roleplay:m",
    "dialogue:m?max_tokens=9",
    "userlm:m",
    "userlm:m?guardrails=all&retries=2",
    "duet:m?retries=1&temperature=0.5+judge?max_tokens=3",
]  # the judge is named `judge`: see `Engines`
SPECS = [*MODEL_SPECS, "agenda", "replay:BANK", "scripted"]
UNPROFILED = ("plato", "dialogue", "scripted")
DRAFTS = ("I want the number {}", "no {}", "please give me recipe number {}", "and how long does number {} keep in the fridge")


def person(i: int) -> Profile:
    facts = {"scenarios": [{"task_details": [f"Ask for recipe {i}", f"Ask how recipe {i} keeps"]}]}
    said = [
        {"role": r, "content": f"{r} {i}.{k}"} for k, r in enumerate(("system", "user", "assistant", "user", "assistant", "user"))
    ]
    return Profile(f"p{i}", f"You cook dish {i}.", f"You write style {i}.", {"objective_facts": facts, "conversation": said})


PEOPLE = [person(i) for i in range(6)]


@pytest.fixture(scope="module")
def bank_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("bank") / "people.jsonl"
    ProfileBank(PEOPLE).save(file)
    return file


def draft(request: Request) -> str | Generation | BackendError:
    """What a model would do: depends on the prompt and the seed, may end, may break."""
    assert request.messages is not None
    said = [m["content"] for m in request.messages]
    if any("BREAK" in text for text in said):
        return BackendError("down")
    if request.can_end and request.seed % 5 == 0:
        return Generation("", finish_reason="end")
    return DRAFTS[request.seed % 4].format(f"{request.seed % 97}-{len(said)}-{sum(map(len, said))}")


def judge(request: Request) -> str:
    return ("Yes.", "no, it does not", "hm")[request.seed % 3]


class Engines:
    """A source of backends that remembers them."""

    def __init__(self) -> None:
        self.made: list[ScriptedBackend] = []

    def __call__(self, spec: ModelSpec) -> Backend:
        self.made.append(ScriptedBackend(judge if spec.model == "judge" else draft, spec=str(spec)))
        return self.made[-1]


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest, bank_file: Path) -> str:
    return str(request.param).replace("BANK", str(bank_file))


@pytest.fixture
def user(spec: str) -> Partner:
    return users.load(spec, Engines())


def chat(turns: int, reply: str = "Certainly, boil it for ten minutes.") -> Dialogue:
    return Dialogue.of(
        {"role": r, "content": c} for k in range(turns) for r, c in (("user", f"first {k}"), ("assistant", f"{reply} {k}"))
    )


def views() -> list[View]:
    return [chat(i % 4).view_for("user", profile) for i, profile in enumerate(PEOPLE)]


def test_one_reply_a_view_in_order_alone_and_in_a_batch(user: Partner) -> None:
    seeds = [7 * i for i in range(6)]
    together = user.respond(views(), seeds)
    assert together == [user.respond([view], [seed])[0] for view, seed in zip(views(), seeds, strict=True)]
    assert together == user.respond(views()[::-1], seeds[::-1])[::-1]
    if isinstance(user, ModelSpeaker):
        assert together == asyncio.run(user.arespond(views(), seeds))
    assert user.respond([], []) == []
    assert isinstance(user, Partner)
    assert user.role == "user"


def test_an_opening_says_something_and_does_not_end(user: Partner) -> None:
    openings = [Dialogue().view_for("user", profile) for profile in PEOPLE]
    for seed in range(8):
        for reply in user.respond(openings, [seed + 100 * i for i in range(6)]):
            assert reply.text
            assert not reply.ended


def test_a_failure_stays_in_its_row(user: Partner) -> None:
    good, seeds = views(), list(range(40, 46))
    broken = [*good[:3], chat(1, "BREAK").view_for("user", PEOPLE[3]), *good[4:]]
    replies, expected = user.respond(broken, seeds), user.respond(good, seeds)
    assert replies[:3] + replies[4:] == expected[:3] + expected[4:]
    if isinstance(user, ModelSpeaker):
        assert isinstance(replies[3].error, BackendError)
        assert (replies[3].text, replies[3].ended) == ("", False)


def test_it_never_speaks_from_an_empty_profile(user: Partner) -> None:
    kind = user.spec.partition(":")[0]
    if kind in UNPROFILED:
        assert user.respond([Dialogue().view_for("user")], [1])[0].text
        return
    with pytest.raises(UspError, match="needs a profile"):
        user.respond([Dialogue().view_for("user")], [1])
    with pytest.raises(UspError, match="blank"):
        user.respond([Dialogue().view_for("user", Profile("b", " ", ""))], [1])


@pytest.mark.parametrize("spec", MODEL_SPECS)
def test_what_the_model_is_shown(spec: str) -> None:
    engines = Engines()
    made = users.load(spec, engines)
    made.respond([chat(2).view_for("user", PEOPLE[0])], [4])
    request, kind = engines.made[0].history[0], spec.partition(":")[0]
    system, *rest = request.messages or ()
    own = users.KINDS[kind.removesuffix("-mini")].header == "user"
    assert (request.role, request.can_end) == (("user", True) if own else ("assistant", False))
    roles = ["user", "assistant"] * 2
    assert [m["role"] for m in rest] == (roles if own else ["user", "assistant", "user", "assistant", "user"])
    assert (PEOPLE[0].objective in system["content"]) == (kind.removesuffix("-mini") not in UNPROFILED)
    assert users.KINDS[kind.removesuffix("-mini")].render(chat(2).view_for("user", PEOPLE[0])) == [system, *rest]


def test_its_spec_names_it_again(user: Partner, spec: str) -> None:
    again = users.load(user.spec, Engines())
    assert again.spec == user.spec
    assert again.respond(views(), range(6)) == user.respond(views(), range(6))
    canonical = {
        "plato-mini": "plato:plato-mini",
        "userlm:m?guardrails=all&retries=2": "userlm:m?guardrails=first,length,repeats&retries=2",
    }
    assert user.spec == canonical.get(spec, spec)


def test_a_whole_episode(user: Partner) -> None:
    env = DialogueEnv(user, UniformSampler(ProfileBank(PEOPLE)), population="uniform", max_turns=4)
    records = []
    for _ in range(2):
        seen = []
        for seed in range(6):
            env.reset(seed=seed)
            turns = 0
            while not env.episode.done:
                _, _, terminated, truncated, info = env.step(f"Take {turns} leeks and boil them.")
                turns += 1
            assert info["outcome"] == "completed"
            assert terminated != truncated
            assert 1 <= info["turn"] <= 4
            seen.append(transcribe(env.episode, {}).to_json())
        records.append(seen)
    assert records[0] == records[1]


@pytest.mark.assets
@pytest.mark.parametrize(
    "spec",
    [
        "plato-mini?max_tokens=16",
        "dialogue:smollm2-135m?max_tokens=16",
        "userlm:smollm2-135m?max_tokens=16",
        "userlm:smollm2-135m?max_tokens=16&guardrails=all&retries=2",
        "duet:smollm2-135m?max_tokens=16&retries=1+smollm2-135m?max_tokens=4",
    ],
)
def test_a_real_model(spec: str) -> None:
    pytest.importorskip("torch")
    user = users.load(spec)
    opening = Dialogue().view_for("user", PEOPLE[0])
    later = chat(1, "Which dish would you like to cook?").view_for("user", PEOPLE[1])
    replies = user.respond([opening, later], [3, 4])
    assert all(reply.error is None and (reply.text.strip() or reply.ended) for reply in replies)
    assert not replies[0].ended
    assert [reply.text for reply in replies] == [user.respond([v], [s])[0].text for v, s in ((opening, 3), (later, 4))]
    assert all(len((reply.generation or Generation("")).token_ids or ()) <= 16 for reply in replies)
