"""A small causal language model and tokenizer, saved as users' are, so that tests load it the real way."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<end>"
LETTERS = [END, "\n", *map(chr, range(32, 127))]
# one token may close a title and its line at once, as real vocabularies have it
PIECES = ["th", "he", "in", '"\n', ' "', ', "']


def make_tiny_lm(folder: str | Path, seed: int = 0) -> Path:
    """Save a 2-layer Llama (width 32, random weights) and a character tokenizer whose padding is its end token.

    Args:
        folder: Where to; made if missing.
        seed: Of the weights.
    """
    folder = Path(folder)
    vocabulary = {token: number for number, token in enumerate(LETTERS + PIECES)}
    merges = [(piece[0], piece[1:]) for piece in PIECES if len(piece) == 2] + [(",", ' "')]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder
