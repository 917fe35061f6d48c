"""Text to the tokens of one language model and back: what opens a prompt, what ends an answer, what pads."""

import logging
from collections.abc import Sequence
from typing import Any

import torch


class Tokens:
    """A model's tokenizer, with the decisions that training, writing and embedding must share.

    Args:
        tokenizer: Of transformers.
        config: The configuration of the model's text part.
        causal: Whether the model continues texts; then nothing ends a text before its answer does.

    Attributes:
        end: The token that is put behind an answer; None if the model has none.
        ends: All tokens that end an answer.
        pad: A token that may fill up a row. It may be a real one: padding is told by the attention mask alone.
        context: Most tokens that the model was built for.
    """

    def __init__(self, tokenizer: Any, config: Any, causal: bool) -> None:
        self._tokenizer = tokenizer
        self._causal = causal
        self.end: int | None = tokenizer.eos_token_id
        named = getattr(config, "eos_token_id", None)
        self.ends = {self.end, *(named if isinstance(named, list) else [named])} - {None}
        self.pad: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        built = getattr(config, "max_position_embeddings", None) or 1 << 30
        self.context: int = min(built, tokenizer.model_max_length)

    def of(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts that something follows: with the model's opening token, without an end token."""
        rows = self._tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
        if self._causal:
            rows = [row[:-1] if row and row[-1] in self.ends else row for row in rows]
        # a model without an opening token sees nothing in an empty text
        nothing = next((token for token in (self._tokenizer.bos_token_id, self.end) if token is not None), 0)
        return [list(row) or [nothing] for row in rows]

    def of_answer(self, text: str) -> list[int]:
        """Tokens of an answer as the model is trained to write it: no opening token, the end token behind."""
        tokens = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return tokens if self.end is None else [*tokens, self.end]

    def of_pairs(self, prompts: Sequence[str], answers: Sequence[str], longest: int) -> list[tuple[list[int], int]]:
        """Tokens of prompts with their answers, and how many belong to the prompt.

        Args:
            prompts: What the model is given.
            answers: What it shall write.
            longest: Most tokens of a pair; longer prompts are cut in front, which a warning counts.

        Raises:
            ValueError: There are not as many answers as prompts.
        """
        if len(prompts) != len(answers):
            raise ValueError(f"{len(prompts)} prompts, but {len(answers)} answers.")
        longest = min(longest, self.context)
        pairs, cut = [], 0
        for prompt, answer in zip(self.of(prompts), answers, strict=True):
            written = self.of_answer(answer)[: longest - 1]
            cut += len(prompt) + len(written) > longest
            prompt = prompt[max(0, len(prompt) + len(written) - longest) :]
            pairs.append((prompt + written, len(prompt)))
        self._warn(cut, len(pairs), longest)
        return pairs

    def shortened(self, rows: list[list[int]], longest: int, front: bool = True) -> list[list[int]]:
        """Rows of at most `longest` tokens, cut in front or behind; a warning counts those that were longer."""
        self._warn(sum(len(row) > longest for row in rows), len(rows), longest)
        return [row[-longest:] if front else row[:longest] for row in rows]

    def text(self, tokens: Sequence[int]) -> str:
        """The text of written tokens, without special ones."""
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _warn(self, cut: int, count: int, longest: int) -> None:
        if cut:
            logging.getLogger().warning(f"{cut} of {count} texts are longer than {longest} tokens and are cut")


def padded(rows: Sequence[Sequence[int]], pad: int, device: Any, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens as one tensor.

    Args:
        rows: Tokens, none empty.
        pad: What fills up shorter rows.
        device: Where to.
        left: Fill up in front.

    Returns:
        ids: [n, longest] int64.
        mask: [n, longest] int64, 1 on tokens. It never looks at the ids: the padding token may be a real one.
    """
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[number, place] = torch.tensor(row, dtype=torch.long)
        mask[number, place] = 1
    return ids.to(device), mask.to(device)
