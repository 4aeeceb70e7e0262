"""Shared by the tests of trainers."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def byte_tokenizer():
    """Bytes, and the two headers as one token each, so that rows can be written down by hand; `ab` is a word, too."""
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    from tiny_actors import byte_tokenizer

    return byte_tokenizer(["user\n", "assistant\n", "ab"])
