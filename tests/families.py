"""Small random models of the families that Hugging Face's text models come in, saved as users' are."""

from pathlib import Path

import torch
import transformers

VOCABULARY = 110
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
SMALL |= {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
FAMILIES = {
    # positions are learned
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL, max_position_embeddings=64)),
    # learned, and counted from behind the padding's number
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**SMALL, max_position_embeddings=64)),
    # learned, and what goes in is shorter than a state
    "electra": lambda: transformers.ElectraModel(
        transformers.ElectraConfig(**SMALL, embedding_size=16, max_position_embeddings=64)
    ),
    # relative, with attention in plain code
    "mpnet": lambda: transformers.MPNetModel(transformers.MPNetConfig(**SMALL, max_position_embeddings=64)),
    # relative, and of two halves
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, num_heads=4, num_layers=2, d_ff=64, decoder_start_token_id=0
        )
    ),
    # rotated, trained from left to right
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, max_position_embeddings=64, num_key_value_heads=2)
    ),
    # learned, trained from left to right
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
        )
    ),
}


def make_family(name: str, folder: Path, tiny_lm: Path) -> Path:
    """Save a model of a family with the tiny language model's tokenizer; returns its folder."""
    transformers.AutoTokenizer.from_pretrained(tiny_lm).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = FAMILIES[name]()
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.data.normal_(
                    std=0.2
                )  # as they are drawn, such small networks hardly look at each other's positions
        model.save_pretrained(folder)
    return folder
