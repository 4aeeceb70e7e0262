"""PlatoLM: a user model without a profile; true roles, the reply generated under a *user* header.

Kong et al. (PlatoLM), `FreedomIntelligence/PlatoLM`; the system prompt is theirs, its closing line breaks left to the
chat template. It is the paper's unprofiled baseline: what it wants comes from its weights and the dialogue alone.
"""

from __future__ import annotations

from usp_env.backends.base import Sampling
from usp_env.dialogue import View

SAMPLING = Sampling(temperature=0.8, top_p=0.9, max_tokens=96)
PROMPT = (
    "A chat between a curious human and an artificial intelligence assistant. The human can ask further questions based on "
    "previous conversations, or he can directly ask brand new questions without any conversations as context."
)


def render(view: View) -> list[dict[str, str]]:
    """The messages a PlatoLM model reads; a profile in the view is not shown to it."""
    return [{"role": "system", "content": PROMPT}, *(message.chat() for message in view.messages)]
