"""A handful of people, and the markers."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

from usp_env.profiles import Profile, ProfileBank
from usp_env.sampling.base import UniformSampler

os.environ.setdefault("USP_ENV_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A machine that is busy with something else is no failure.
settings.register_profile("usp-env", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("usp-env")


@pytest.fixture
def bank() -> ProfileBank:
    return ProfileBank(
        [Profile(f"p{i}", f"You are person {i}.", f"You write style {i}.", split="train") for i in range(6)], "six"
    )


@pytest.fixture
def sampler(bank: ProfileBank) -> UniformSampler:
    return UniformSampler(bank)


def pytest_collection_modifyitems(items: list[pytest.Item], config: pytest.Config) -> None:
    from usp_env.models import assets

    fetched = all(
        assets.available(name) for name in ("smollm2-135m", "minilm", "usp-mini-sft", "plato-mini", "profile-generator")
    )
    chosen = config.getoption("-m") or ""
    for item in items:
        if "assets" in item.keywords and not fetched:
            item.add_marker(pytest.mark.skip(reason="needs models: usp-env fetch"))
        if "slow" in item.keywords and "slow" not in chosen:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
