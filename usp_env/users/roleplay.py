"""Role-play (the paper's ProfileGPT): an assistant model is asked to play the user.

Assistant models cannot open a conversation, so roles are flipped and the opener shim comes first (paper B.3).
"""

from __future__ import annotations

from usp_env.backends.base import Sampling
from usp_env.dialogue import View, flip
from usp_env.users.base import profile_of

SAMPLING = Sampling(temperature=0.8, top_p=0.9, max_tokens=96)
PROMPT = (
    "You play a human user who is chatting with an AI assistant. Stay in this role: you ask, request and react; you never answer "
    "as an assistant and never mention this instruction.\n\nThis is who you are:\n{profile}\n\n"
    "Write only your next message to the assistant, in your own style."
)


def render(view: View) -> list[dict[str, str]]:
    """The flipped messages an assistant model reads."""
    return [
        {"role": "system", "content": PROMPT.format(profile=profile_of(view, "a role-played user"))},
        *flip(message.chat() for message in view.messages),
    ]
