"""How files of this package reach the disk and come back: whole or not at all, hashed, and never as pickle.

Tensors are safetensors, everything else is JSON. A file is written under a temporary name in its own folder and then
renamed, so a reader sees the old file, the new file, or none.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file


class DamagedArtifact(RuntimeError):
    """A file of ours that exists but cannot be read whole; its message names the file."""


def write_atomically(path: str | Path, write: Callable[[str], None]) -> Path:
    """Let `write(temporary_name)` make a file and then rename it to `path`.

    Args:
        path: Where the file shall be; missing folders are made.
        write: Is called with a name in the same folder and must create that file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file atomically (UTF-8)."""
    return write_atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> Path:
    """Write JSON atomically; what JSON does not know (enums, devices, paths, numpy numbers) becomes a plain value."""
    return write_text(path, json.dumps(plain(value), indent=1, ensure_ascii=False))


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedArtifact: The file is there, but is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedArtifact(f"{path}: not readable as JSON ({error}); delete it to have it built again.") from error


def write_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write named tensors as safetensors, atomically; tensors that share memory are stored each on its own."""
    stored = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return write_atomically(path, lambda name: save_file(stored, name, metadata=dict(metadata or {})))


def read_tensors(path: str | Path, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """Read named tensors from safetensors.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedArtifact: The file is there, but is not whole.
    """
    if not Path(path).exists():
        raise FileNotFoundError(path)
    try:
        return load_file(str(path), device=str(device))
    except (SafetensorError, ValueError) as error:
        raise DamagedArtifact(
            f"{path}: not readable as safetensors ({error}); delete it to have it built again."
        ) from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read what `write_tensors` was given as metadata; {} if that was nothing.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedArtifact: The file is there, but is not whole.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise DamagedArtifact(
            f"{path}: not readable as safetensors ({error}); delete it to have it built again."
        ) from error


def cached_tensor(path: str | Path, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A tensor from its file; made and written if the file is missing or damaged."""
    try:
        return read_tensors(path)["tensor"]
    except (FileNotFoundError, DamagedArtifact, KeyError):
        tensor = make()
        write_tensors(path, {"tensor": tensor})
        return tensor


def digest(value: Any, length: int = 16) -> str:
    """Hexadecimal SHA-256 of a JSON-able value, independent of the order of keys; the first `length` digits."""
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:length]


def tensors_digest(tensors: Mapping[str, torch.Tensor], length: int = 16) -> str:
    """Hexadecimal SHA-256 over names, types, shapes and bytes of tensors, independent of their order."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:length]


def file_digest(path: str | Path, length: int = 16) -> str:
    """Hexadecimal SHA-256 of a file's bytes; the first `length` digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:length]


def plain(value: Any) -> Any:
    """`value` as JSON knows it: dicts with string keys, lists, strings, numbers, booleans and null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(plain(item) for item in value)
    if value is None or isinstance(value, bool | int | float | str):
        # numpy's float64 is a float whose repr is not JSON's; float() makes it one
        return float(value) if type(value) is not float and isinstance(value, float) else value
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return plain(value.item())
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def slug(name: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-")
