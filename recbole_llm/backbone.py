"""A pretrained network as a trainable part of a recommender: it reads tokens or vectors, and gives one state per position.

Most families of Hugging Face's text models: encoders (BERT and its kin, the encoder of T5) and causal language models. Both kinds read
with either mask; a family whose attention takes no mask of ours is refused when it is loaded. Rows are read from their first position
on, wherever their padding stands, so that absolute positions (BERT, GPT-2), rotated ones (Llama) and relative ones (T5) mean the same
in every batch.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import peft
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as WRITERS
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

from recbole_llm import pretrained
from recbole_llm.adapter import lora_targets, with_lora


class Backbone(nn.Module):
    """A transformer without its output side, whose mask is chosen from outside.

    Args:
        network: A model of transformers that takes `inputs_embeds` and a mask of four dimensions, and gives `last_hidden_state`.
        causal: Whether a position reads itself and earlier ones only; otherwise it reads all of its row.

    Attributes:
        width: Length of a state.
        input_width: Length of a vector that goes in; some families (ELECTRA, ALBERT) have it shorter.
        positions: Most positions of a row that it was built for; None if its positions are relative or rotated without end.
    """

    def __init__(self, network: nn.Module, causal: bool):
        super().__init__()
        self.network, self.causal = network, causal
        config = text_config(network.config)
        self.width: int = config.hidden_size
        self.input_width: int = network.get_input_embeddings().embedding_dim
        self.positions = positions_of(network)
        # a mask of truth values is added as numbers by attention in plain torch code, such as MPNet's
        self.additive = network.config._attn_implementation == "eager"

    @classmethod
    def load(
        cls,
        name: str,
        *,
        causal: bool,
        layers: int = 0,
        dropout: float | None = None,
        pretrained_weights: bool = True,
        key: str = "llm",
        revision: str | None = None,
        reads: str = "vectors",
    ) -> Self:
        """Find a model (see `pretrained.find`) and load its first layers, in float32.

        Args:
            name: Folder, or standard name on the Hugging Face hub.
            causal: The mask.
            layers: How many of its layers; 0 is all.
            dropout: Share of every dropout in it; None keeps its own.
            pretrained_weights: Whether its weights are loaded; otherwise they are drawn, which is the control of what they are worth.
            key: The setting that names the model, for messages.
            revision: Branch, tag or commit on the hub.
            reads: What it is to read, vectors | tokens; a family that cannot is refused here.

        Raises:
            pretrained.ModelNotFound: No source has it.
            ValueError: It has fewer layers, or its family cannot be read with our masks.
        """
        folder = pretrained.find(name, revision, key)
        config = configuration(folder)
        own = text_config(config)
        if layers > own.num_hidden_layers:
            raise ValueError(
                f"lite_rec_layers={layers}: {name} has {own.num_hidden_layers} layers; there is 0 (all) to {own.num_hidden_layers}. "
                "Set lite_rec_layers in a config file or on the command line."
            )
        own.num_hidden_layers = layers or own.num_hidden_layers
        if getattr(own, "layer_types", None):  # one entry per layer, where layers differ
            own.layer_types = own.layer_types[: own.num_hidden_layers]
        if dropout is not None:
            for entry in DROPOUTS:
                if hasattr(own, entry):
                    setattr(own, entry, dropout)
        # of an encoder-decoder (T5) the encoder alone
        kind = transformers.AutoModelForTextEncoding if config.is_encoder_decoder else transformers.AutoModel
        if config.is_encoder_decoder and type(config) not in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
            raise ValueError(unreadable(key, name, config.model_type, "its encoder cannot be had alone"))
        with quietly():
            if pretrained_weights:
                network = kind.from_pretrained(
                    folder,
                    config=config,
                    dtype=torch.float32,
                    use_safetensors=True,
                    local_files_only=True,
                    trust_remote_code=False,
                )
            else:
                network = kind.from_config(config, dtype=torch.float32, trust_remote_code=False)
        if getattr(network, "pooler", None) is not None:
            network.pooler = None  # nothing here reads it, and what is not read has no gradient
        backbone = cls(network, causal)
        if fault := backbone.fault_of_reading(reads):
            raise ValueError(unreadable(key, name, config.model_type, fault))
        return backbone

    @torch.no_grad()
    def fault_of_reading(self, reads: str) -> str | None:
        """Why this family does not read two short rows as its mask says; None if it does. Args: reads, vectors | tokens."""
        real = torch.tensor([[True] * 4, [True, True, False, False]])
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(10, 18, (2, 4), generator=generator)
        changed = tokens.clone()
        changed[0, 3], changed[1, 2:] = changed[0, 3] + 1, changed[1, 2:] + 1  # what is last, and what is padding
        was_training = self.training
        self.eval()
        try:
            if reads == "vectors":
                drawn = torch.randn(32, self.input_width, generator=generator) * self.token_spread()
                states, others = (self(drawn[each], real) for each in (tokens, changed))
            else:
                states, others = (self.read(each, real) for each in (tokens, changed))
        except Exception as error:  # whatever a family raises here, it does not take what we give it
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        finally:
            self.train(was_training)
        moved = (states - others).abs().amax(dim=2)
        still = 1e-3 * float(states.abs().max())
        if moved[1, :2].max() > still:
            return "what stands in padding changes what it says"
        if self.causal and moved[0, :3].max() > still:
            return "it reads what comes later"
        return None

    def without_tokens(self) -> Self:
        """Let go of the table of tokens, which a reader of vectors does not need."""
        stub = nn.Embedding(1, self.input_width).requires_grad_(False)
        self.network.set_input_embeddings(stub)
        return self

    def token_spread(self) -> float:
        """Standard deviation of the entries of its token vectors: the scale of the inputs that it was trained on."""
        return float(self.network.get_input_embeddings().weight.detach().std())

    def forward(self, vectors: Tensor, real: Tensor) -> Tensor:
        """Read vectors [B, l, input_width]; real, bool [B, l], tells them from padding. Returns states [B, l, width]."""
        return self._in_place("inputs_embeds", vectors, real)

    def read(self, tokens: Tensor, real: Tensor) -> Tensor:
        """Read tokens [B, l]; real, bool [B, l], tells them from padding. Returns states [B, l, width]."""
        return self._in_place("input_ids", tokens, real)

    def _in_place(self, name: str, values: Tensor, real: Tensor) -> Tensor:
        if not bool((real[:, 1:] > real[:, :-1]).any()):
            return self._run(name, values, real)
        # padding stands before or among what is real: read without it, and put the states where the values stood
        order = torch.sort((~real).byte(), dim=1, stable=True).indices
        states = self._run(name, _taken(values, order), real.gather(1, order))
        return _taken(states, order.argsort(dim=1))

    def _run(self, name: str, values: Tensor, real: Tensor) -> Tensor:
        length = real.shape[1]
        allowed = real[:, None, None, :].expand(-1, 1, length, length)
        if self.causal:
            # what is real stands in front, so that no real position would read padding anyway
            allowed = (
                torch.ones(length, length, dtype=torch.bool, device=real.device).tril().expand(len(real), 1, -1, -1)
            )
        once = {"use_cache": False} if hasattr(text_config(self.network.config), "use_cache") else {}
        with self._in_range(values.device.type):
            return self.network(**{name: values}, attention_mask=self._mask(allowed), **once).last_hidden_state

    def _in_range(self, kind: str) -> contextlib.AbstractContextManager:
        """Keeps a T5 out of float16, in which it overflows and which RecBole's `enable_amp` computes in; bfloat16 has the range."""
        if self.network.config.model_type in OVERFLOW and torch.is_autocast_enabled(kind):
            return torch.autocast(kind, torch.bfloat16)
        return contextlib.nullcontext()

    def read_on(self, vectors: Tensor, allowed: Tensor, place: Tensor, kept: Any) -> Tensor:
        """Read vectors [B, l, input_width] behind what was read before.

        Args:
            vectors: What is new.
            allowed: Which places of a row each new one may look at, bool [B, 1, l, longest].
            place: Places of the new ones in their rows [B, l].
            kept: A cache as transformers' models use it.

        Returns:
            States of the new ones [B, l, width].
        """
        more = {
            "attention_mask": self._mask(allowed),
            "position_ids": place,
            "past_key_values": kept,
            "use_cache": True,
        }
        return self.network(inputs_embeds=vectors, **more).last_hidden_state

    def _mask(self, allowed: Tensor) -> Tensor:
        """A mask of truth values as this network's attention takes it."""
        if not self.additive:
            return allowed
        lowest = torch.finfo(self.network.dtype).min
        return torch.zeros(allowed.shape, dtype=self.network.dtype, device=allowed.device).masked_fill(~allowed, lowest)

    def train_only(self, how: str, layers: int = 0, rank: int = 8, alpha: float = 16, dropout: float = 0.05) -> None:
        """Choose which parameters are trained.

        Args:
            how: full | partial (the last `layers` layers) | lora (thin matrices beside the attention's query and value) | frozen.
            layers: For partial.
            rank: Of the thin matrices.
            alpha: Their product is scaled by alpha / rank.
            dropout: On their input while training.

        Raises:
            ValueError: It has fewer layers.
        """
        self.network.requires_grad_(how == "full")
        if how == "partial":
            blocks = max(
                (module for module in self.network.modules() if isinstance(module, nn.ModuleList)),
                key=lambda module: sum(weight.numel() for weight in module.parameters()),
            )
            if not 0 < layers <= len(blocks):
                raise ValueError(
                    f"lite_item_layers={layers}: the Item LLM has {len(blocks)} layers; there is 1 to {len(blocks)}. "
                    "Set lite_item_layers in a config file or on the command line."
                )
            blocks[-layers:].requires_grad_(True)
        elif how == "lora":
            settings = peft.LoraConfig(
                r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=lora_targets(self.network), bias="none"
            )
            self.network = with_lora(self.network, settings).get_base_model()


DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate", "dropout", "attention_dropout", "attn_pdrop",
    "embd_pdrop", "resid_pdrop", "hidden_dropout", "embedding_dropout", "mlp_dropout",
)  # fmt: skip
"""What families call their dropouts in their configurations."""
OVERFLOW = ("t5", "mt5", "umt5")
"""Families whose states outgrow float16."""
READABLE = "BERT, RoBERTa, MPNet, DistilBERT, ELECTRA, ALBERT, ModernBERT, the encoder of T5, GPT-2, Llama, Mistral, Qwen, Gemma"


def unreadable(key: str, name: str, kind: str, fault: str) -> str:
    """What is said of a model whose family we cannot read."""
    return (
        f"{key}={name}: a model of the family {kind} cannot be read with masks of ours ({fault}); there are {READABLE} and their like. "
        f"Set {key} to one of them, by folder or by its name on the hub."
    )


def positions_of(network: nn.Module) -> int | None:
    """Most positions of a row that a network was built for; None if they are relative or rotated without end."""
    most = getattr(text_config(network.config), "max_position_embeddings", None)
    for table in network.modules():
        # RoBERTa and its like count positions from behind the padding's number
        if isinstance(table, nn.Embedding) and table.num_embeddings == most and table.padding_idx is not None:
            return most - table.padding_idx - 1
    return most


def configuration(folder: str | Path) -> Any:
    """The configuration of the model in a folder."""
    return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the text model; for most models that is all of it."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def causal_by_training(config: Any) -> bool:
    """Whether a model was trained to read from left to right, and writes: its checkpoint has the head for it."""
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or [])


def reads_causally(config: Any) -> bool:
    """Whether a model was trained to read from left to right, also where it is saved without its head, as embedders are."""
    only_writes = config.model_type in WRITERS and config.model_type not in {*MASKED, "xlnet"}
    return causal_by_training(config) or only_writes


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """While this lasts, transformers shows neither progress bars nor its report on weights that are left out on purpose."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _taken(values: Tensor, order: Tensor) -> Tensor:
    """Positions of each row in another order; values [B, l] or [B, l, d], order [B, l]."""
    return values.gather(1, order if values.ndim == 2 else order.unsqueeze(2).expand(-1, -1, values.shape[2]))


def working_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The number format in which a model is tuned and writes.

    `auto` is bfloat16 only where the hardware multiplies in it. A CPU with plain AVX-512 emulates it: measured there,
    forward and LoRA steps are 3 to 6 times slower than in float32. float16 is never used: T5 and others overflow.

    Raises:
        ValueError: Unknown format.
    """
    if wanted not in {"auto", "float32", "bfloat16"}:
        raise ValueError(f"llm_dtype={wanted}: unknown number format; there are auto, float32, bfloat16.")
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        fast = device.type == "cpu" and any(getattr(torch.cpu, test, lambda: False)() for test in tests)
    return torch.bfloat16 if fast else torch.float32
