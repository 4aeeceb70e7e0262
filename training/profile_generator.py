r"""The profile generator: a language model learns to write a person's two paragraphs from what the person said.

    python -m training.profile_generator --out runs/profile-generator             # SmolLM2-135M, LoRA, the packaged bank
    python -m training.profile_generator --out runs/profile-generator --resume    # go on from the last checkpoint

It distils the extractor that wrote the bank's profiles: prompt and format of `usp_env.extraction.generator`, which also shortens
what does not fit, and the loss on the two paragraphs and their end token alone. A bank that is not `train` is never read but for
the validation. `training.agreement` measures the result.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence

from training.conversations import of_split
from training.sft import fit, load_model, training_options
from training.sft_rows import IGNORED, Row
from usp_env.dialogue import Dialogue
from usp_env.extraction.generator import TEMPLATE_TOKENS, fit_turns, profile_messages
from usp_env.profiles import Profile
from usp_env.rendering import Renderer


def parser() -> argparse.ArgumentParser:
    """The program's options."""
    made = training_options(__doc__)
    made.add_argument("--prompt-tokens", type=int, default=448, help="longest prompt; longer ones keep each turn's beginning")
    return made


def make_rows(renderer: Renderer, pairs: Iterable[tuple[Profile, Dialogue]], prompt_tokens: int) -> Iterator[Row]:
    """One row a person: the prompt of `profile_messages`, then the profile, the only part with labels."""
    for profile, dialogue in pairs:
        turns = fit_turns(dialogue.utterances("user"), prompt_tokens - TEMPLATE_TOKENS, lambda text: len(renderer.encode(text)))
        row = renderer.render([*profile_messages(turns), {"role": "assistant", "content": str(profile)}], own_role="assistant")
        [(start, end)] = row.own_spans
        # What follows the end token is the template's; a generation never sees it.
        ids = row.token_ids[:end]
        labels = (*[IGNORED] * start, *ids[start:])
        yield Row(profile.id, ids, labels, tuple(start <= at < end - 1 for at in range(end)))


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and keep the best step."""
    args = parser().parse_args(argv)
    model, tokenizer = load_model(args)
    renderer = Renderer(tokenizer)
    rows = {
        split: list(make_rows(renderer, of_split(args.bank, split)[:limit], args.prompt_tokens))
        for split, limit in (("train", args.limit), ("val", args.eval_limit))
    }
    fit(model, tokenizer, rows["train"], rows["val"], args)


if __name__ == "__main__":
    main()
