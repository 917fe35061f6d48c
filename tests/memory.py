"""How much memory tensors take while something runs."""

import weakref
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NotesTensors(TorchDispatchMode):
    """Notes the largest tensor that any operation makes, and the most bytes that new storages hold at a time."""

    def __init__(self):
        super().__init__()
        self.largest = self.held = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                self._hold(tensor.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.held += size
            self.most = max(self.most, self.held)
            weakref.finalize(storage, self._let_go, key, size)

    def _let_go(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.held -= size


def largest(make: Callable[[], torch.Tensor]) -> int:
    """Elements of the largest tensor made while a loss and its gradients are computed."""
    with NotesTensors() as noted:
        make().backward()
    return noted.largest


def most_at_a_time(make: Callable[[], object]) -> int:
    """Most bytes that are held at a time while something is computed."""
    with NotesTensors() as noted:
        made = make()
        del made
    return noted.most
