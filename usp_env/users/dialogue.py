"""DialogueGPT: an assistant model plays the user from the dialogue alone, without a profile.

The paper's unprofiled prompting baseline. Roles are flipped and the opener shim comes first (paper B.3); the wording of
the instruction is ours, as the paper's is not public.
"""

from __future__ import annotations

from usp_env.backends.base import Sampling
from usp_env.dialogue import View, flip

SAMPLING = Sampling(temperature=0.8, top_p=0.9, max_tokens=96)
PROMPT = (
    "You play a human user who is chatting with an AI assistant. Stay in this role: you ask, request and react; you never answer "
    "as an assistant and never mention this instruction. Go on from the conversation so far, or think of something to ask.\n\n"
    "Write only your next message to the assistant."
)


def render(view: View) -> list[dict[str, str]]:
    """The flipped messages an assistant model reads; a profile in the view is not shown to it."""
    return [{"role": "system", "content": PROMPT}, *flip(message.chat() for message in view.messages)]
