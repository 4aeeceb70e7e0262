"""USP: the profile in the system message, true roles, the reply generated under a *user* header.

Wang et al. (ACL 2025) §4.2; the prompt is the inference form of the released weights. It can open a conversation
from the system message alone and may end it with the end-of-conversation token after the opening.
"""

from __future__ import annotations

from usp_env.backends.base import Sampling
from usp_env.dialogue import View, system_message
from usp_env.users.base import profile_of

SAMPLING = Sampling(temperature=0.8, top_p=0.9, max_tokens=96)


def render(view: View) -> list[dict[str, str]]:
    """The messages a USP model reads."""
    return [system_message(profile_of(view, "a USP user")), *(message.chat() for message in view.messages)]
