"""DuetSim: a generator drafts the user's utterance, a verifier says whether it fits, and refused drafts are drawn again.

After Luo et al. 2024 (DuetSim). The generator is a role-played user; the verifier is asked for yes or no about the whole
instruction (with the profile in it), the conversation and the draft. Only a clear "no" refuses: what a verifier mumbles
is no reason to redraw. When the retries are spent the last draft is taken, as is one that a verifier whose context is full
could not read; such a reply's notes say `unjudged`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from usp_env.backends.base import Backend, Generation, Request, Sampling
from usp_env.backends.spec import ModelSpec
from usp_env.dialogue import View
from usp_env.errors import SpecError
from usp_env.records import generation_seed
from usp_env.users import roleplay
from usp_env.users.base import profile_of
from usp_env.users.redraw import RETRIES, RedrawingBackend, Steps, Verdict, ask

SAMPLING = roleplay.SAMPLING
VERDICT = Sampling(temperature=0.0, max_tokens=8)
PROMPT = (
    "You check whether a message could have been written by a certain person in a conversation with an AI assistant. This is "
    "the instruction that the person's player was given:\n\n{instruction}\n\nThe conversation so far:\n\n{conversation}\n\n"
    "The message to check:\n\n{draft}\n\nDoes the message fit the person and the conversation, and is it what a user, not an "
    "assistant, would write next? Answer with yes or no."
)
_REFUSAL = re.compile(r"\W*no\b", re.IGNORECASE)


def render(view: View) -> list[dict[str, str]]:
    """The messages that the generator reads: those of a role-played user."""
    profile_of(view, "a duet's user")
    return roleplay.render(view)


def split(text: str) -> tuple[str, str]:
    """The two model specs of `<generator>+<verifier>`, each with its own options.

    Raises:
        SpecError: Not two specs joined by one plus sign.
    """
    generator, plus, verifier = text.partition("+")
    if not (generator and plus and verifier) or "+" in verifier:
        raise SpecError(
            f"user 'duet:{text}': expected duet:GENERATOR+VERIFIER, two model specs and one plus sign (a plus sign within an "
            "option is %2B; a model whose path holds one is named in usp-env.toml)"
        )
    return generator, verifier


def verified(backend: Backend, verifier: Backend, spec: ModelSpec, retries: int = RETRIES) -> Backend:
    """A backend whose drafts a verifier judges.

    Args:
        backend: The generator's.
        verifier: The verifier's.
        spec: The verifier's, for how it samples and which adapter it uses.
        retries: Most redraws.
    """

    def judge(requests: Sequence[Request], drafts: Sequence[Generation]) -> Steps:
        verdicts = {i: Verdict("blank") for i, draft in enumerate(drafts) if not draft.text.strip()}
        rows = [i for i in range(len(drafts)) if i not in verdicts]
        made = yield from ask(verifier, [question(requests[i], drafts[i].text, spec) for i in rows])
        verdicts |= {i: Verdict("refused" if _REFUSAL.match(g.text) else None, g) for i, g in zip(rows, made, strict=True)}
        return [verdicts[i] for i in range(len(drafts))]

    return RedrawingBackend(backend, judge, retries, lambda: {"verifier": dict(verifier.identity), "spec": str(spec)})


def question(request: Request, draft: str, spec: ModelSpec) -> Request:
    """What the verifier is asked about a draft; its seed is derived from the draft's."""
    instruction, _, *flipped = request.messages or ()  # the second message is the opener shim
    text = PROMPT.format(instruction=instruction["content"], conversation=_transcript(flipped), draft=draft.strip())
    return Request(
        messages=[{"role": "user", "content": text}],
        sampling=spec.sampling(VERDICT),
        seed=generation_seed(request.seed, "verdict", 0, "user"),
        adapter=spec.options.get("adapter"),
        chat_template_kwargs=spec.options.get("chat_template_kwargs", {}),
    )


def _transcript(flipped: Sequence[Mapping[str, str]]) -> str:
    names = {"assistant": "Person", "user": "AI assistant"}
    return "\n\n".join(f"{names[m['role']]}: {m['content']}" for m in flipped) or "(nothing yet)"
