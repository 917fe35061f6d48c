"""A LoRA adapter: two thin matrices beside the attention projections of a network whose own weights stay as they are.

Paper: BIGRec (arXiv 2308.08434) tunes the query and value projections so. The modules are peft's.
"""

import copy
import warnings
from pathlib import Path
from typing import Any, Self

import peft
import torch
from torch import nn

ALPHA = "lora_alpha"
# names that architectures give to the query and value projections of attention; fused ones stand alone
_QUERY_VALUE = [
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("q", "v"),
    ("wq", "wv"),
    ("query_key_value",),
    ("qkv_proj",),
    ("Wqkv",),
    ("c_attn",),
]


class Adapter:
    """An adapter and the network that it is in.

    Args:
        plain: A network that becomes the adapter's; see `twin`.
        rank: Width of the thin matrices.
        alpha: Their product is scaled by alpha / rank.
        dropout: Dropout on their input while training.
        name: Name of the pretrained model, for peft's file.
    """

    def __init__(self, plain: nn.Module, rank: int, alpha: float, dropout: float, name: str) -> None:
        settings = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=lora_targets(plain),
            bias="none",
            task_type="CAUSAL_LM",
        )
        self._model = with_lora(plain, settings).eval()
        self._settings.base_model_name_or_path = name

    @classmethod
    def from_state(cls, plain: nn.Module, state: dict[str, torch.Tensor], name: str) -> Self:
        """The adapter that `state` describes.

        Raises:
            ValueError: `state` is no adapter, or belongs to another model.
        """
        tensors = {key: value for key, value in state.items() if key != ALPHA}
        ranks = {value.shape[0] for key, value in tensors.items() if ".lora_A." in key}
        if len(ranks) != 1 or ALPHA not in state:
            raise ValueError("This is no LoRA adapter of ours: it needs tensors of one rank, and lora_alpha.")
        with torch.random.fork_rng(devices=[]):
            adapter = cls(plain, ranks.pop(), float(state[ALPHA]), 0.0, name)
        expected = {key: value.shape for key, value in _tensors(adapter._model).items()}
        if expected != {key: value.shape for key, value in tensors.items()}:
            raise ValueError(f"The adapter was made for another model than {name}: names or shapes differ.")
        peft.set_peft_model_state_dict(adapter._model, tensors)
        return adapter

    @staticmethod
    def read(plain: nn.Module, folder: str | Path) -> nn.Module:
        """The network with the adapter that `save` wrote, opened as any user of peft opens it."""
        return peft.PeftModel.from_pretrained(plain, str(folder)).eval().get_base_model()

    @property
    def network(self) -> nn.Module:
        """The network with the adapter in it; the adapter's parameters alone require gradients."""
        return self._model.get_base_model()

    @property
    def _settings(self) -> peft.LoraConfig:
        return self._model.peft_config["default"]

    def state(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors by name, and alpha, which they do not tell."""
        tensors = _tensors(self._model)
        alpha = torch.tensor(float(self._settings.lora_alpha))
        return {**{name: value.detach().cpu().clone() for name, value in tensors.items()}, ALPHA: alpha}

    def save(self, folder: str | Path) -> None:
        """Write the adapter as peft does: safetensors and a JSON of its settings."""
        self._model.save_pretrained(str(folder), save_embedding_layers=False)

    def merge_into(self, plain: nn.Module, pretrained: nn.Module) -> None:
        """Add the adapter's product to a network's weights, which spares its two extra layers when it writes.

        Args:
            plain: Gets new weights where the adapter acts; its other tensors are left alone.
            pretrained: Has the weights at full precision.
        """
        for name, module in self.network.named_modules():
            if hasattr(module, "get_delta_weight"):
                old = plain.get_submodule(name).weight
                weight = pretrained.get_submodule(name).weight.float() + module.get_delta_weight("default").float()
                plain.get_submodule(name).weight = nn.Parameter(weight.detach().to(old.dtype), requires_grad=False)


def with_lora(network: nn.Module, settings: peft.LoraConfig) -> peft.PeftModel:
    """A network in peft's model, without its remarks on what it finds out by itself."""
    with warnings.catch_warnings():
        # GPT-2 stores its projections transposed
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        warnings.filterwarnings("ignore", message=".*base_model_name_or_path")
        return peft.get_peft_model(network, settings)


def _tensors(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's tensors; peft would ask the hub whether the vocabulary had grown, which LoRA never changes here."""
    return peft.get_peft_model_state_dict(model, save_embedding_layers=False)


def lora_targets(network: torch.nn.Module) -> list[str] | str:
    """Names of the attention query and value projections of a network, or peft's word for every linear layer."""
    names = {name.rpartition(".")[2] for name, module in network.named_modules() if not list(module.children())}
    return next((list(pair) for pair in _QUERY_VALUE if names.issuperset(pair)), "all-linear")


def twin(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a network's modules over the same tensors; parameters of another number format are converted.

    Buffers (rotary frequencies) stay as they are: they lose too much in bfloat16.
    """
    tensors: dict[int, Any] = {id(buffer): buffer for buffer in network.buffers()}
    for weight in network.parameters():
        same = weight.dtype == dtype
        tensors[id(weight)] = weight if same else nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    return copy.deepcopy(network, tensors)
