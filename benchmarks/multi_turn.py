"""What a long conversation costs: engine time per dialogue against its turns, with keys and values kept and without.

    python -m benchmarks.multi_turn [--dialogues 4] [--turns 16] [--model smollm2-135m] [--picture docs/multi_turn.png]

One run, the two backends turn by turn beside each other, so that a busy machine slows both. The user and the assistant are the
same model with different prompts, each reply has exactly `--tokens` tokens. Without reuse, a turn reads the whole history
again: time grows with the square of the turns. With it, only what is new is read.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field

import numpy as np

from benchmarks.page import Section, command_line, picture
from usp_env import backends, users
from usp_env.backends.base import Backend, Request, Sampling
from usp_env.backends.spec import parse
from usp_env.dialogue import Dialogue, Message
from usp_env.profiles import ProfileBank


@dataclass
class Talk:
    """Dialogues of one backend, and what they took."""

    backend: Backend
    dialogues: list[Dialogue]
    seconds: list[float] = field(default_factory=list)  # after each turn, engine time so far
    read: int = 0
    cached: int = 0

    def turn(self, number: int, profiles: list[object], tokens: int) -> None:
        """Both sides speak once in every dialogue."""
        sampling = Sampling(temperature=0.8, top_p=0.9, max_tokens=tokens, min_tokens=tokens)
        spent = self.seconds[-1] if self.seconds else 0.0
        for role in ("user", "assistant"):
            views = [d.view_for(role, p) for d, p in zip(self.dialogues, profiles, strict=True)]
            prompts = [users.KINDS["usp"].render(v) if role == "user" else [m.chat() for m in v.messages] for v in views]
            asked = [
                Request(prompt, role=role, sampling=sampling, seed=100 * number + i, can_end=False)
                for i, prompt in enumerate(prompts)
            ]
            start = time.perf_counter()
            made = self.backend.generate(asked)
            spent += time.perf_counter() - start
            self.read += sum(g.usage["prompt_tokens"] for g in made)
            self.cached += sum(g.usage.get("cached_tokens", 0) for g in made)
            texts = [g.text.strip() or "…" for g in made]
            self.dialogues = [d.add(Message(role, t)) for d, t in zip(self.dialogues, texts, strict=True)]
        self.seconds.append(spent)


def measure(model: str, dialogues: int, turns: int, tokens: int) -> dict[str, Talk]:
    """Both backends over the same dialogues; the same texts but for near-ties."""
    profiles = list(ProfileBank.load("sharegpt", "train")[:dialogues])
    mark = "&" if "?" in model else "?"
    talks = {
        name: Talk(backends.load(parse(f"{model}{mark}prefix_gib={gib}")), [Dialogue()] * dialogues)
        for name, gib in (("kept", 4), ("read again", 0))
    }
    for talk in talks.values():
        talk.backend.generate([Request([{"role": "user", "content": "warm up"}], sampling=Sampling(max_tokens=4))])
    for number in range(turns):
        for talk in talks.values():
            talk.turn(number, profiles, tokens)
    return talks


def curvature(seconds: list[float]) -> float:
    """The last quarter's slope over the first quarter's: 1 is a straight line."""
    quarter = max(1, len(seconds) // 4)
    steps = np.diff([0.0, *seconds])
    return float(steps[-quarter:].mean() / steps[:quarter].mean())


def section(args: argparse.Namespace) -> Section:
    """The page's section."""
    talks = measure(args.model, args.dialogues, args.turns, args.tokens)
    kept, again = talks["kept"], talks["read again"]
    marks = [t for t in (2, 4, 8, 12, 16, 24, 32) if t <= args.turns]
    rows = [
        [t, *(f"{talk.seconds[t - 1] / args.dialogues:.2f}" for talk in (kept, again)),
         f"{again.seconds[t - 1] / kept.seconds[t - 1]:.2f}"]
        for t in marks
    ]  # fmt: skip
    pairs = [pair for x, y in zip(kept.dialogues, again.dialogues, strict=True) for pair in zip(x, y, strict=True)]
    same = sum(a.content == b.content for a, b in pairs) / len(pairs)
    text = (
        f"{args.dialogues} dialogues at a time, {args.tokens} tokens a reply. A turn of the last quarter takes "
        f"{curvature(kept.seconds):.2f} times one of the first with keys and values kept, {curvature(again.seconds):.2f} times "
        f"without. {kept.cached / kept.read:.1%} of the prompt tokens come from the store. {same:.1%} of the utterances are the "
        "same in both."
    )
    if args.picture:
        lines = {f"history {name}": [s / args.dialogues for s in talk.seconds] for name, talk in talks.items()}
        picture(args.picture, lines, "turns", "engine seconds a dialogue")
    header = ["turns", "s a dialogue, kept", "s a dialogue, read again", "ratio"]
    return Section("Multi-turn cost", command_line("multi_turn", parser(), args), header, rows, text, args.picture)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--dialogues", type=int, default=4)
    made.add_argument("--turns", type=int, default=16)
    made.add_argument("--tokens", type=int, default=24)
    made.add_argument("--model", default="smollm2-135m")
    made.add_argument("--picture", help="PNG file of the curves")
    return made


if __name__ == "__main__":
    section(parser().parse_args()).show()
