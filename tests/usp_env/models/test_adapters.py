"""The models that ship as adapters."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

import usp_env.models
from usp_env.models import assets

FOLDER = Path(usp_env.models.__file__).parent
ADAPTERS = [asset for asset in assets.ASSETS.values() if asset.base is not None]


@pytest.mark.parametrize("asset", ADAPTERS, ids=lambda asset: asset.name)
def test_what_ships_is_what_is_registered(asset: assets.Asset) -> None:
    folder = FOLDER / asset.member
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest() == asset.sha256
    assert asset.version == asset.sha256[:12]
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == assets.ASSETS[asset.base].hub
    card = FOLDER.parents[1] / "docs" / "models" / f"{asset.name}.md"
    assert card.is_file() or not (FOLDER.parents[1] / "docs").is_dir()


def test_the_byte_budget() -> None:
    assert sum(file.stat().st_size for file in (FOLDER / "adapters").rglob("*") if file.is_file()) <= 28e6
    assert sum(file.stat().st_size for file in FOLDER.rglob("*.safetensors")) <= 40e6


@pytest.mark.assets
@pytest.mark.parametrize("asset", ADAPTERS, ids=lambda asset: asset.name)
def test_a_fetched_model_is_its_base_with_its_adapter(asset: assets.Asset) -> None:
    if not assets.available(asset.name):
        pytest.skip(f"needs usp-env fetch {asset.name}")
    torch = pytest.importorskip("torch")
    load = pytest.importorskip("safetensors.torch").load_file
    merged, base = (load(assets.path(name) / "model.safetensors") for name in (asset.name, asset.base))
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert len(changed) == 20 * 7
    assert all(base[name].dtype == merged[name].dtype for name in base)
    assert assets.manifest(asset.name)["base"] == asset.base
    assert assets.verify(asset.name) == []
