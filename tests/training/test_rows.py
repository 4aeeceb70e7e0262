"""Rows: sampled ids stay as they were sampled, and only they are own."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("transformers")
from agents.rows import Row, row_of  # noqa: E402
from usp_env.backends.base import Generation  # noqa: E402
from usp_env.dialogue import Message  # noqa: E402
from usp_env.rendering import Renderer  # noqa: E402

END, START, EOT = 0, 1, 2


@pytest.fixture
def renderer(byte_tokenizer) -> Renderer:
    return Renderer(byte_tokenizer)


@pytest.fixture
def ids(byte_tokenizer):
    """`ids("user\\n")`: the one token of a header, or of a letter."""

    def found(text: str) -> tuple[int, ...]:
        return tuple(byte_tokenizer(text, add_special_tokens=False).input_ids)

    return found


def said(token_ids, text="x", reason="stop", role="user") -> Message:
    return Message(role, text, None, tuple(token_ids), tuple(-0.1 * (i + 1) for i in range(len(token_ids))), reason)


def test_check_01_own_mask_of_a_row_by_hand(renderer, ids) -> None:
    """`<s>user⏎ x <e> | ⏎ <s>assistant⏎ y <e> ⏎ <s>user⏎ <end>`: own are x <e> and <end>; headers, ⏎ and y <e> are not."""
    (user,), (assistant,), (x,), (y,), (line,) = (ids(t) for t in ("user\n", "assistant\n", "x", "y", "\n"))
    last = Generation("", (END,), (-0.5,), "end")
    row = row_of(renderer, [], [said([x, EOT]), Message("assistant", "y")], "user", last)
    assert row.token_ids == (START, user, x, EOT, line, START, assistant, y, EOT, line, START, user, END)
    assert row.utterance_ids == (-1, -1, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1, 1)
    assert row.behaviour == (0, 0, -0.1, -0.2, 0, 0, 0, 0, 0, 0, 0, 0, -0.5)
    assert row.banned == (False, False, True, True, *[False] * 9)  # an opening cannot be the end
    assert (row.utterances, row.own) == (2, 3)
    assistants = row_of(renderer, [], [Message("user", "x"), said([y, EOT], role="assistant")], "assistant")
    assert assistants.utterance_ids == (-1,) * 7 + (0, 0)


def test_check_03_sampled_ids_are_never_tokenised_again(renderer, ids) -> None:
    """`a`, `b` were sampled where the vocabulary has `ab`: text, and back, would be another row."""
    (a,), (b,), (both,) = ids("a"), ids("b"), ids("ab")
    assert renderer.decode([a, b]) == "ab"
    assert renderer.encode("ab") == (both,)
    row = row_of(renderer, [], [said([a, b, EOT], "ab"), Message("assistant", "ab")], "user", opens=True)
    assert [t for t, k in zip(row.token_ids, row.utterance_ids, strict=True) if k == 0] == [a, b, EOT]
    assert row.token_ids.count(both) == 1  # what the other side said is tokenised as text


@pytest.mark.parametrize(("reason", "closed"), [("stop", True), ("length", False)])
def test_check_07_the_end_of_turn_is_trained_where_it_was_sampled(renderer, ids, reason, closed) -> None:
    """A truncated utterance has none of its own: the next turn's context brings one, which is not trained."""
    (x,), (z,), (line,) = ids("x"), ids("z"), ids("\n")
    sampled = [x, x, EOT] if closed else [x, x]
    row = row_of(renderer, [], [said(sampled, "xx", reason), Message("assistant", "y"), said([z, EOT], "z")], "user")
    own = [(t, p) for t, p, k in zip(row.token_ids, row.behaviour, row.utterance_ids, strict=True) if k == 0]
    assert own == [(t, pytest.approx(-0.1 * (i + 1))) for i, t in enumerate(sampled)]
    assert row.token_ids[2:6] == (x, x, EOT, line)  # the same row for whoever reads it
    assert row.utterance_ids[2:6] == (0, 0, 0 if closed else -1, -1)
    assert row.behaviour[4] == (pytest.approx(-0.3) if closed else 0.0)
    alone = row_of(renderer, [], [said(sampled, "xx", reason)], "user")
    assert alone.token_ids[2:] == tuple(sampled)  # no end is invented for a row's last utterance


def test_an_end_stands_for_the_end_of_turn(renderer, ids) -> None:
    (x,) = ids("x")
    row = row_of(renderer, [], [said([x, END], reason="end")], "user")
    assert row.token_ids[-1] == END
    assert row.utterance_ids == (-1, -1, 0, 0)


def test_a_header_that_was_sampled_is_left_out(renderer, ids) -> None:
    (x,), (line,) = ids("x"), ids("\n")
    row = row_of(renderer, [], [said([x, START], reason="role"), Message("assistant", "y")], "user", opens=True)
    assert row.token_ids[2:5] == (x, EOT, line)
    assert row.utterance_ids[2:5] == (0, -1, -1)
    nothing = row_of(renderer, [], [], "user", Generation("", (START,), (-0.1,), "role"))
    assert nothing.utterances == 0


def test_a_given_opening_is_context(renderer, ids) -> None:
    (z,) = ids("z")
    row = row_of(
        renderer, [{"role": "system", "content": "S"}], [Message("user", "hi"), Message("assistant", "y"), said([z, EOT])], "user"
    )
    assert row.utterance_ids[-2:] == (0, 0)
    assert row.own == 2
    assert not any(row.banned)
    rendered = renderer.render(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "y"}],
        generation_role="user",
    )
    assert row.token_ids[:-2] == rendered.token_ids


def test_an_assistant_can_never_end_the_conversation(renderer, ids) -> None:
    """`TokenSpeaker` asks for its seat without that right, so that its words are scored without that token, too."""
    row = row_of(renderer, [], [Message("user", "x"), said([*ids("y"), EOT], role="assistant")], "assistant")
    assert row.banned == tuple(k >= 0 for k in row.utterance_ids)


def test_only_the_last_utterance(renderer, ids) -> None:
    (x,) = ids("x")
    row = row_of(renderer, [], [said([x, EOT]), Message("assistant", "y"), said([x, x, EOT], "xx")], "user")
    last = row.only_last()
    assert last.token_ids == row.token_ids
    assert last.utterance_ids == (-1,) * (len(row.token_ids) - 3) + (0, 0, 0)
    assert last.behaviour[-3:] == row.behaviour[-3:]
    assert (sum(map(bool, last.behaviour)), sum(last.banned), last.utterances) == (3, 0, 1)
    assert row_of(renderer, [], [said([x, EOT])], "user").only_last().banned == (False, False, True, True)
    bare = replace(row, utterance_ids=(-1,) * len(row.token_ids), behaviour=(0.0,) * len(row.token_ids))
    assert bare.only_last().utterances == bare.only_last().own == 0
    assert Row((), (), (), ()).only_last() == Row((), (), (), ())
