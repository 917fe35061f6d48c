"""The Item LLM: reads the text of an item and returns one vector; frozen with its vectors on disk, or trained with the rest.

Paper: Lite-LLM4Rec (arXiv 2402.09543), the lower of its two levels. Reading is made affordable by four means that change nothing:
an item is read once per batch however often it occurs, items of like length are read together, they are cut to the longest of them,
and what is needed for the gradient is computed anew chunk by chunk (activation checkpointing).
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from recbole_llm import pretrained
from recbole_llm.artifacts import cached_tensor, digest
from recbole_llm.backbone import Backbone, configuration, reads_causally, text_config
from recbole_llm.tokens import Tokens, padded

POOLS = ("mean", "last")


class ItemReader(nn.Module):
    """A backbone over the tokens of every item's text.

    Args:
        backbone: What reads; an encoder reads both ways, a causal language model as it was trained.
        rows: Tokens of each item's text by its number, none empty; row 0 stands for padding.
        pool: How states become a vector: mean (over real tokens, as we read the paper) | last.
        tokens_at_once: Most tokens of a chunk, padding included.
        checkpointed: Whether activations are computed anew for the gradient instead of being kept: a third more work, flat memory.
    """

    def __init__(
        self,
        backbone: Backbone,
        rows: Sequence[Sequence[int]],
        pool: str = "mean",
        tokens_at_once: int = 4096,
        checkpointed: bool = True,
    ):
        super().__init__()
        self.backbone, self.pool = backbone, pool
        self.tokens_at_once, self.checkpointed = tokens_at_once, checkpointed
        tokens, real = padded(rows, 0, "cpu", left=False)
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("length", real.sum(dim=1), persistent=False)

    @classmethod
    def load(
        cls,
        name: str,
        texts: Sequence[str],
        pool: str,
        longest: int,
        *,
        tokens_at_once: int = 4096,
        checkpointed: bool = True,
        dropout: float | None = None,
        key: str = "llm",
        revision: str | None = None,
    ) -> Self:
        """Find the Item LLM and cut the texts into its tokens.

        Args:
            name: Folder, or standard name on the Hugging Face hub.
            texts: Text of each item by its number; row 0, the padding's, is not read.
            pool: mean | last.
            longest: Most tokens of a text; longer ones lose their end, which a warning counts.
            tokens_at_once: See the class.
            checkpointed: See the class.
            dropout: Share of every dropout in it; None keeps its own.
            key: The setting that names the model, for messages.
            revision: Branch, tag or commit on the hub.
        """
        folder = pretrained.find(name, revision, key)
        config = configuration(folder)
        causal = reads_causally(config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokens = Tokens(tokenizer, text_config(config), causal)
        rows = tokens.shortened(tokens.of(["", *texts[1:]]), min(longest, tokens.context), front=False)
        backbone = Backbone.load(name, causal=causal, dropout=dropout, key=key, revision=revision, reads="tokens")
        return cls(backbone, rows, pool, tokens_at_once, checkpointed)

    def forward(self, items: Tensor, progress: bool = False) -> Tensor:
        """Vectors of items that differ from each other [M] -> [M, width], in their order."""
        order = torch.sort(self.length[items], stable=True).indices
        vectors, begin = [], 0
        bar = tqdm(total=len(items), desc="Read items", ncols=100, unit="item", disable=not progress)
        lengths = self.length[items[order]].tolist()
        while begin < len(order):
            end = begin + 1
            while end < len(order) and (end + 1 - begin) * lengths[end] <= self.tokens_at_once:
                end += 1
            chunk, longest = items[order[begin:end]], lengths[end - 1]
            inputs = self.tokens[chunk, :longest], self.length[chunk]
            if self.checkpointed and torch.is_grad_enabled():
                vectors.append(checkpoint(self._read, *inputs, use_reentrant=False))
            else:
                vectors.append(self._read(*inputs))
            bar.update(end - begin)
            begin = end
        bar.close()
        return torch.cat(vectors)[order.argsort()]

    def _read(self, tokens: Tensor, length: Tensor) -> Tensor:
        real = torch.arange(tokens.shape[1], device=tokens.device) < length[:, None]
        states = self.backbone.read(tokens, real)
        if self.pool == "mean":
            return (states * real[..., None]).sum(dim=1) / length[:, None]
        return states[torch.arange(len(states), device=states.device), length - 1]

    @torch.no_grad()
    def table(self, progress: bool = False) -> Tensor:
        """Vectors of all items as they are served, without dropout, row 0 zero [n, width]; the mode is left as it was."""
        was_training = self.training
        self.eval()
        vectors = self(torch.arange(len(self.length), device=self.length.device), progress)
        self.train(was_training)
        vectors[0] = 0
        return vectors


def width_of(name: str, revision: str | None = None) -> int:
    """Length of the vectors of a model, from its configuration alone."""
    return text_config(configuration(pretrained.find(name, revision))).hidden_size


def item_vectors(
    name: str,
    revision: str | None,
    texts: Sequence[str],
    pool: str,
    longest: int,
    folder: str | Path,
    device: str | torch.device,
    progress: bool,
) -> Tensor:
    """Vectors of the items' texts by a frozen Item LLM, row 0 zero [n, width]; from the disk if they are there.

    The file's name holds what the vectors depend on: the hash of the weights, of the texts, and the settings of reading. With other
    weights or texts it is another file. Texts stand in it by the alphabet, so that the order of the data's files means nothing, and
    a text that several items share is read once.

    Args:
        name: Folder, or standard name on the Hugging Face hub.
        revision: Branch, tag or commit on the hub.
        texts: Text of each item by its number, row 0 the padding's.
        pool: mean | last.
        longest: Most tokens of a text.
        folder: Where vectors are kept.
        device: Where it is computed.
        progress: Whether there is a progress bar.
    """
    different = sorted(set(texts[1:]))
    weights = pretrained.digest_of(pretrained.find(name, revision))
    key = digest({"weights": weights, "texts": different, "pool": pool, "longest": longest, "format": 2})
    file = Path(folder) / f"{Path(name).name}-{key}.safetensors"
    if not file.exists():
        logging.getLogger().info(f"{name} reads the texts of {len(different)} items; their vectors are kept in {file}.")

    def read() -> Tensor:
        reader = ItemReader.load(name, ["", *different], pool, longest, checkpointed=False, revision=revision)
        reader = reader.to(device)
        return reader.table(progress).cpu()

    vectors = cached_tensor(file, read)
    place = {text: number for number, text in enumerate(different, start=1)}
    return vectors[torch.tensor([0, *(place[text] for text in texts[1:])])]
