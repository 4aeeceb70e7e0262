"""A Gymnasium environment whose dynamics are a person: a simulated user with an implicit profile.

Importing it registers `usp_env/Assistant-v0` and `usp_env/User-v0` and loads numpy and gymnasium only;
everything else loads where it is used.
"""

from __future__ import annotations

import importlib
from typing import Any

import gymnasium as gym

__version__ = "0.1.0"

_HOMES = {
    "DialogueEnv": "env",
    "DialogueVectorEnv": "vector",
    "AsyncDialogue": "aio",
    "Act": "dialogue",
    "END": "dialogue",
    "Message": "dialogue",
    "Dialogue": "dialogue",
    "Profile": "profiles",
    "ProfileBank": "profiles",
    "DensitySampler": "sampling.density",
    "EpisodeSpec": "records",
    "make_specs": "env",
    "fork": "env",
    "register_reward": "rewards.base",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"usp_env.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'usp_env' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]


for _seat in ("assistant", "user"):
    gym.register(
        id=f"usp_env/{_seat.capitalize()}-v0",
        entry_point=f"usp_env.env:{_seat}_env",
        vector_entry_point=f"usp_env.vector:{_seat}_vector_env",
    )
