"""T5 networks for item codes: built from a few sizes or loaded from a folder, and decoded many prefixes of a row at a time.

Decoding is our own loop over the network's layers instead of Hugging Face's `generate`: there every beam is a row, with a copy of
the history's keys and values; here the beams of a row look at one copy of them, and a beam's own past is a few vectors.
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from recbole_llm import pretrained

CELLS = 1 << 24
"""Most scores (prefixes times vocabulary) that exist at a time."""
LOCAL = {"local_files_only": True, "trust_remote_code": False}


def build(vocabulary: int, layers: int, width: int, heads: int, inner: int, dropout: float) -> nn.Module:
    """A T5 of the given sizes with random weights; tokens 0 and 1 are padding and end.

    transformers 5 ties the output layer to the token table whatever the settings say, and scales the states by width^-0.5 before
    it. That is right here: history and answer are written in the same few pieces, and the first logits have a spread of about 1.
    """
    config = transformers.T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=width // heads,
        d_ff=inner,
        num_layers=layers,
        num_heads=heads,
        dropout_rate=dropout,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def load(name: str, revision: str | None = None) -> tuple[nn.Module, Any]:
    """A T5 checkpoint and its tokenizer, found as `pretrained.find` does.

    Args:
        name: Folder, or standard name on the Hugging Face hub.
        revision: Branch, tag or commit on the hub.

    Raises:
        pretrained.ModelNotFound: No source has it.
        ValueError: It is no T5.
    """
    folder, _ = _found(name, revision)
    # the checkpoint itself knows whether its output layer is tied: transformers 5 compares the weights
    network = transformers.T5ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, **LOCAL
    )
    if network.lm_head.weight is not network.shared.weight:
        untie(network)
    return network, transformers.AutoTokenizer.from_pretrained(folder, **LOCAL)


def blank(name: str, revision: str | None, vocabulary: int) -> nn.Module:
    """A network like a checkpoint's, with random weights and another number of words; arguments and errors are those of `load`."""
    _, config = _found(name, revision)
    config.vocab_size = vocabulary
    return transformers.T5ForConditionalGeneration(config)


def untie(network: nn.Module) -> None:
    """Give the output layer a weight of its own.

    transformers 5 believes of every T5 that its output layer is tied to the token table: it ties them when it constructs a network,
    and again when it resizes one, even one whose checkpoint it has loaded untied.
    """
    if network.lm_head.weight is network.shared.weight:
        network.lm_head.weight = nn.Parameter(network.shared.weight.detach().clone())
    # what resizing looks at; whether states are scaled is a setting of its own
    network.config.tie_word_embeddings = False


def _found(name: str, revision: str | None) -> tuple[Any, Any]:
    """Folder and Hugging Face config of a T5 checkpoint."""
    folder = pretrained.find(name, revision)
    config = transformers.AutoConfig.from_pretrained(folder, **LOCAL)
    if config.model_type != "t5":
        raise ValueError(
            f"llm={name}: is a model of type {config.model_type}; P5 reads and writes with an encoder-decoder of type t5, such as "
            "t5-small or google/flan-t5-small. Set llm to one, or leave it empty for a small T5 of its own."
        )
    return folder, config


def words_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Tokens of bare texts, without an end."""
    return [list(each) for each in tokenizer(texts, add_special_tokens=False).input_ids]


def add_words(network: nn.Module, tokenizer: Any, words: list[str]) -> list[int]:
    """Give a network new words, with random vectors as the old ones are spread; returns their tokens."""
    tokenizer.add_tokens(words)
    tokens = tokenizer.convert_tokens_to_ids(words)
    if max(tokens) >= network.config.vocab_size:
        network.resize_token_embeddings(max(tokens) + 1)
    return tokens


class Decoder:
    """Decodes many prefixes of each row at a time (`beams.Steps`).

    Args:
        network: A T5 in evaluation mode.
        memory: What its encoder made of each row [B, S, d].
        mask: Which of it is no padding [B, S].
    """

    def __init__(self, network: nn.Module, memory: Tensor, mask: Tensor):
        self.network, self.blocks = network, network.decoder.block
        self.start = network.config.decoder_start_token_id
        self.heads = network.config.num_heads
        scaled = getattr(network.config, "scale_decoder_outputs", network.config.tie_word_embeddings)
        self.scale = network.config.d_model**-0.5 if scaled else 1.0
        self.seen = mask[:, None, None].bool()
        across = [block.layer[1].EncDecAttention for block in self.blocks]
        # of each layer, keys and values of the history, once for all beams of a row [B, H, S, c]
        self.memory = [(self._split(each.k(memory)), self._split(each.v(memory))) for each in across]
        # ... and of what was written [B, K, H, t, c]
        self.written: list[tuple[Tensor, Tensor]] = []
        self.length = 0

    def _split(self, states: Tensor) -> Tensor:
        """[B, K, H * c] to [B, H, K, c]."""
        return states.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def step(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """States [B, K, d] after one more token [B, K], each behind one of the prefixes of the step before [B, K]; None begins anew."""
        if parents is None:
            self.written, self.length = [], 0
        self.length += 1
        states = self.network.get_input_embeddings()(tokens)
        first = self.blocks[0].layer[0].SelfAttention
        # the bias of the last of `length` positions towards all of them [1, H, 1, t]
        bias = first.compute_bias(self.length, self.length)[:, :, -1:]
        written = []
        for place, block in enumerate(self.blocks):
            own, across, feed = block.layer
            normed, attention = own.layer_norm(states), own.SelfAttention
            query, key, value = (
                each(normed).unflatten(2, (self.heads, 1, -1)) for each in (attention.q, attention.k, attention.v)
            )
            if self.written:
                row = torch.arange(len(tokens), device=tokens.device)[:, None]
                key, value = (
                    torch.cat([past[row, parents], new], dim=3)
                    for past, new in zip(self.written[place], (key, value), strict=True)
                )
            written.append((key, value))
            weight = (query @ key.transpose(-1, -2) + bias).softmax(-1)
            states = states + attention.o((weight @ value).flatten(2))
            query = self._split(across.EncDecAttention.q(across.layer_norm(states)))
            key, value = self.memory[place]
            read = functional.scaled_dot_product_attention(query, key, value, attn_mask=self.seen, scale=1.0)
            states = feed(states + across.EncDecAttention.o(read.transpose(1, 2).flatten(2)))
        self.written = written
        return self.network.decoder.final_layer_norm(states) * self.scale

    def log_p(self, states: Tensor, wanted: Tensor) -> Tensor:
        """Log-probability of the wanted tokens [B, K, C] (or the same for all rows [K, C]) after states [B, K, d]."""
        head, wanted = self.network.lm_head, wanted.expand(len(states), -1, -1)
        some = max(1, CELLS // (len(states) * head.out_features))
        parts = []
        for state, want in zip(states.split(some, dim=1), wanted.split(some, dim=1), strict=True):
            logits = head(state).float()
            parts.append(logits.gather(2, want) - logits.logsumexp(2, keepdim=True))
        return torch.cat(parts, dim=1)
