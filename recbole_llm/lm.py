"""A pretrained language model as the rest of the package sees it: load, tune with LoRA, write, and embed text.

Everything model-specific (width, special tokens, context length, LoRA targets) is read off the model. The pretrained
weights are never changed: tuning and writing happen in a second network that shares every tensor it does not change.
"""

import json
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from torch import nn
from tqdm import tqdm

from recbole_llm import decoding, pretrained
from recbole_llm.adapter import Adapter, twin
from recbole_llm.backbone import causal_by_training, quietly, text_config, working_dtype
from recbole_llm.lora import Pair, Schedule, fit
from recbole_llm.tokens import Tokens, padded


class LanguageModel:
    """A causal language model, or a text encoder such as BERT (which can only `embed`).

    Args:
        network: The pretrained network; its weights stay as they are.
        tokenizer: Its tokenizer.
        name: The name it was asked for by.
        folder: Where its files are.
        dtype: Number format in which a causal model is tuned and writes.

    Attributes:
        width: Length of the vectors that `embed` returns.
        causal: False for text encoders.
        provenance: One line on where the weights come from, for result tables.
        dtype: Number format in which it is tuned and writes; embedding is always float32 unless the weights are not.
    """

    def __init__(
        self, network: nn.Module, tokenizer: Any, *, name: str, folder: str | Path, dtype: torch.dtype = torch.float32
    ) -> None:
        self.name = name
        self.folder = str(folder)
        self.provenance = pretrained.provenance_of(folder)
        self.causal = causal_by_training(network.config)
        self.dtype = dtype
        self._network = network.eval().requires_grad_(False)
        self._tokens = Tokens(tokenizer, text_config(network.config), self.causal)
        self._adapter: Adapter | None = None
        self._writing: nn.Module | None = None
        self._read: tuple[nn.Module, tuple[int, ...], Any | None] | None = None
        head = network.get_output_embeddings() if self.causal else None
        # where input and hidden width differ (OPT-350m), the output projection knows the latter
        self.width: int = getattr(head, "in_features", None) or text_config(network.config).hidden_size

    @classmethod
    def load(
        cls,
        name: str,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: str = "auto",
        threads: int | None = None,
        key: str = "llm",
    ) -> Self:
        """Find a model (see `pretrained.find`) and load it.

        Args:
            name: Folder, or standard name on the Hugging Face hub.
            revision: Branch, tag or commit on the hub.
            device: Where it computes.
            dtype: `float32`, `bfloat16`, or `auto`: bfloat16 where the hardware computes in it.
            threads: CPU threads that torch uses from now on.
            key: The setting that names the model, for messages.

        Raises:
            pretrained.ModelNotFound: No source has it.
            ValueError: Unknown `dtype`, or neither a causal language model nor an encoder.
        """
        if threads:
            torch.set_num_threads(threads)
        device = torch.device(device)
        work = working_dtype(dtype, device)
        folder = pretrained.find(name, revision, key)
        local = {"local_files_only": True, "trust_remote_code": False}
        config = transformers.AutoConfig.from_pretrained(folder, **local)
        if config.is_encoder_decoder:
            raise ValueError(
                f"{key}={name}: is an encoder-decoder model ({config.model_type}); causal language models and text "
                f"encoders can be used. Name another one: {key}=owner/model or a folder."
            )
        kind = transformers.AutoModelForCausalLM if causal_by_training(config) else transformers.AutoModel
        with quietly():
            network = kind.from_pretrained(
                folder, dtype=_stored_dtype(folder, device, work), use_safetensors=True, **local
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
        # a checkpoint's own sampling settings or repetition penalty would change what greedy means
        if causal_by_training(config):
            network.generation_config = transformers.GenerationConfig()
        model = cls(network.to(device), tokenizer, name=name, folder=folder, dtype=work)
        millions = sum(weight.numel() for weight in network.parameters()) / 1e6
        logging.getLogger().info(
            f"{name}: {millions:.1f} M parameters, width {model.width}, on {device}"
            + (f" with {torch.get_num_threads()} threads" if device.type == "cpu" else "")
            + (f", tuned and decoded in {str(work).removeprefix('torch.')}" if model.causal else "")
        )
        return model

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: a recommender that is copied (RecBole counts FLOPs on a copy) keeps the one language model."""
        return self

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self._network.parameters()).device

    @property
    def has_adapter(self) -> bool:
        """Whether it was tuned or an adapter was loaded."""
        return self._adapter is not None

    @cached_property
    def digest(self) -> str:
        """Hexadecimal hash of configuration, tokenizer and weights: the identity of the pretrained model."""
        return pretrained.digest_of(self.folder)

    def answer_tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of answers, end token included; what `generate` takes as `allowed`."""
        return [self._tokens.of_answer(text) for text in texts]

    def tune(
        self,
        prompts: Sequence[str],
        answers: Sequence[str],
        valid_prompts: Sequence[str] = (),
        valid_answers: Sequence[str] = (),
        *,
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.05,
        max_length: int = 512,
        seed: int = 0,
        state_folder: str | Path | None = None,
        progress: bool = True,
        **schedule: Any,
    ) -> dict[str, Any]:
        """Train a new LoRA adapter on pairs of prompt and answer, and keep it on for `generate`.

        The random generators of the caller are left as they were; the result depends on `seed` alone.

        Args:
            prompts: What the model is given.
            answers: What it shall write.
            valid_prompts: Prompts of the pairs that decide when to stop and what to keep; may be empty.
            valid_answers: Their answers.
            rank: Rank of the adapter.
            alpha: Its scale is alpha / rank.
            dropout: Dropout on its input.
            max_length: Tokens of prompt and answer at most; longer prompts lose their beginning.
            seed: Of the adapter's initial values, the data order and dropout.
            state_folder: Where an interrupted training is saved and taken up again.
            progress: Show a progress bar.
            schedule: Fields of `lora.Schedule`: learning_rate, epochs, batch_size, warmup_steps, patience,
                evals_per_epoch, train_on_prompt, save_every, tokens_at_once.

        Returns:
            See `lora.fit`.
        """
        self._need_causal("tuned")
        pairs = [Pair(*pair) for pair in self._tokens.of_pairs(prompts, answers, max_length)]
        valid = [Pair(*pair) for pair in self._tokens.of_pairs(valid_prompts, valid_answers, max_length)]
        devices = [self.device] if self.device.type == "cuda" else []
        # RecBole's sine.py switches anomaly detection on for the whole process; it makes tuning several times slower
        with torch.random.fork_rng(devices=devices), torch.autograd.set_detect_anomaly(False):
            torch.manual_seed(seed)
            adapter = Adapter(self._plain(), rank, alpha, dropout, self.name)
            result = fit(
                adapter.network,
                pairs,
                valid,
                Schedule(seed=seed, **schedule),
                self._tokens.pad,
                state_folder=state_folder,
                identity=[self.digest, str(self.dtype), self.device.type, rank, alpha, dropout],
                progress=progress,
            )
        self._adapter, self._writing = adapter, None
        return result

    def refuse_longer(self, max_new_tokens: int) -> None:
        """Refuse answers that leave no room for a prompt. Raises: ValueError."""
        if not 0 < max_new_tokens < self._tokens.context:
            raise ValueError(
                f"generate_max_new_tokens={max_new_tokens}: {self.name} reads and writes {self._tokens.context} tokens in all, prompt and "
                f"answer; there is 1 to {self._tokens.context - 1}. Set generate_max_new_tokens."
            )

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 64,
        beams: int = 1,
        tokens_per_batch: int = 4096,
        allowed: Sequence[Sequence[int]] | None = None,
        prefix: str | None = None,
        progress: bool = True,
        description: str = "Generate",
    ) -> list[str]:
        """What the model answers to each prompt, up to the end of the title (`decoding.end_of_title`).

        Deterministic: greedy, or the best of `beams` beams. Batches depend on the prompts, not on their order.

        Args:
            prompts: What the model is given.
            max_new_tokens: Longest answer.
            beams: Width of the beam search; 1 is greedy.
            tokens_per_batch: Prompts' tokens in one batch, padding included.
            allowed: Token sequences (`answer_tokens`) of the only answers it may give.
            prefix: A text that every prompt begins with; computed once. Found by comparison if None.
            progress: Show a progress bar, counting prompts.
            description: Its label.

        Returns:
            One text per prompt, in the order of the prompts.
        """
        self._need_causal("asked to write")
        self.refuse_longer(max_new_tokens)
        if not prompts:
            return []
        network = self._writer()
        different = list(dict.fromkeys(prompts))  # what is asked again is answered once
        rows = self._tokens.shortened(self._tokens.of(different), self._tokens.context - max_new_tokens)
        known = [] if prefix is None else self._tokens.of([prefix])
        shared = decoding.common_prefix([*rows, *known])
        trie = None if allowed is None else decoding.Trie(allowed, self._tokens.end)
        ends = self._tokens.ends

        def complete(written: Sequence[int]) -> bool:
            if written[-1] in ends:
                return True
            if trie is not None:
                return not trie.following(written)
            return decoding.end_of_title(self._tokens.text(written)) is not None

        cache = self._read_once(network, tuple(rows[0][: max(1, shared)]))
        texts = [""] * len(rows)
        with tqdm(total=len(rows), desc=description, ncols=100, disable=not progress) as bar:
            for batch in decoding.plan([row[shared:] if cache else row for row in rows], tokens_per_batch):
                some = [rows[number] for number in batch]
                limits = {"max_new_tokens": max_new_tokens, "complete": complete, "trie": trie}
                if cache is None:
                    pad = self._tokens.pad
                    written = decoding.search(network, some, beams=beams, ends=sorted(ends), pad=pad, **limits)
                else:
                    reading = decoding.Reading(network, some, cache, shared, self._tokens.pad, max_new_tokens)
                    written = (
                        decoding.greedy(reading, **limits)
                        if beams == 1
                        else decoding.beams_of(reading, beams, len(ends), **limits)
                    )
                for number, tokens in zip(batch, written, strict=True):
                    text = self._tokens.text(tokens)
                    texts[number] = text[: decoding.end_of_title(text)] if trie is None else text
                bar.update(len(batch))
        answers = dict(zip(different, texts, strict=True))
        return [answers[prompt] for prompt in prompts]

    @torch.inference_mode()
    def embed(
        self, texts: Sequence[str], *, batch_size: int = 64, progress: bool = False, description: str = "Embed"
    ) -> torch.Tensor:
        """Vectors of texts from the pretrained model, any adapter off.

        A causal model's vector is its last hidden state (after the final norm) at the last token; BIGRec's code, where
        the encoder is the LLM without its adapter. An encoder's vector is pooled as its files say (mean if they say
        nothing) and has length 1, as in sentence-transformers.

        Args:
            texts: Bare texts.
            batch_size: Texts per batch.
            progress: Show a progress bar, counting texts.
            description: Its label.

        Returns:
            [n, width] float32, on the CPU. A text's vector does not depend on the other texts (up to rounding).
        """
        different = list(dict.fromkeys(texts))
        rows = self._tokens.shortened(self._tokens.of(different), self._tokens.context, front=self.causal)
        vectors = torch.empty(len(different), self.width)
        order = sorted(range(len(rows)), key=lambda n: (-len(rows[n]), rows[n]))
        network = self._network.base_model if self.causal else self._network
        once = {"use_cache": False} if self.causal else {}
        with tqdm(total=len(texts), desc=description, ncols=100, disable=not progress) as bar:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                ids, mask = padded([rows[n] for n in batch], self._tokens.pad, self.device, left=False)
                states = network(input_ids=ids, attention_mask=mask, **once).last_hidden_state.float()
                vectors[batch] = _pool(states, mask, "last" if self.causal else self._pooling).cpu()
                bar.update(len(batch))
            bar.update(len(texts) - len(different))
        if not self.causal:
            vectors = nn.functional.normalize(vectors, dim=-1)
        place = {text: number for number, text in enumerate(different)}
        return vectors[[place[text] for text in texts]]

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors by name, and its alpha: all that `load_adapter_state` needs."""
        return self._need_adapter().state()

    def load_adapter_state(self, state: dict[str, torch.Tensor]) -> None:
        """Put an adapter on, and see that it changes what the model says.

        Raises:
            ValueError: The adapter belongs to another model, or changes nothing.
        """
        self._need_causal("given an adapter")
        adapter = Adapter.from_state(self._plain(), state, self.name)
        if torch.equal(self._probe(adapter.network), self._probe(self._plain())):
            raise ValueError(f"The adapter changes nothing in {self.name}; it was not trained, or not saved whole.")
        self._adapter, self._writing = adapter, None

    def drop_adapter(self) -> None:
        """Be the pretrained model again."""
        self._adapter = self._writing = None

    def save_adapter(self, folder: str | Path) -> Path:
        """Write the adapter in peft's form (`PeftModel.from_pretrained` opens it), and read it back to be sure.

        Raises:
            RuntimeError: What was read back does not change the logits, or not as the adapter does.
        """
        adapter = self._need_adapter()
        adapter.save(folder)
        again = self._probe(Adapter.read(self._plain(), folder))
        if not torch.equal(again, self._probe(adapter.network)) or torch.equal(again, self._probe(self._plain())):
            raise RuntimeError(f"{folder}: the adapter read back from here does not change the model as it should.")
        return Path(folder)

    def _plain(self) -> nn.Module:
        """A network of its own modules over the pretrained tensors, in the working number format."""
        return twin(self._network, self.dtype)

    def _writer(self) -> nn.Module:
        """The network that writes."""
        if self._writing is None:
            self._writing, self._read = self._plain().eval(), None
            if self._adapter is not None:
                self._adapter.merge_into(self._writing, self._network)
        return self._writing

    def _read_once(self, network: nn.Module, tokens: tuple[int, ...]) -> Any | None:
        """The cache of a beginning, kept until another network writes or prompts begin otherwise: every shard of a run has the same."""
        if self._read is None or self._read[0] is not network or self._read[1] != tokens:
            self._read = network, tokens, decoding.shared_cache(network, tokens, self.device)
        return self._read[2]

    @torch.inference_mode()
    def _probe(self, network: nn.Module) -> torch.Tensor:
        rows = self._tokens.of(["The quick brown fox jumps over the lazy dog 1995"])
        return network(input_ids=torch.tensor(rows, device=self.device)).logits

    @cached_property
    def _pooling(self) -> str:
        told = Path(self.folder) / "1_Pooling" / "config.json"
        modes = json.loads(told.read_text()) if told.exists() else {}
        if modes.get("pooling_mode_cls_token"):
            return "first"
        return "last" if modes.get("pooling_mode_lasttoken") else "mean"

    def _need_causal(self, what: str) -> None:
        if not self.causal:
            raise ValueError(
                f"llm={self.name}: is a text encoder and cannot be {what}; it only embeds. "
                "Name a causal language model: llm=owner/model or a folder."
            )

    def _need_adapter(self) -> Adapter:
        if self._adapter is None:
            raise ValueError(f"{self.name} has no adapter: it was neither tuned nor given one.")
        return self._adapter


def _stored_dtype(folder: Path, device: torch.device, work: torch.dtype) -> torch.dtype:
    """float32, in which embedding is exact; bfloat16 on an accelerator for weights over 4 GB, which would not fit."""
    heavy = sum(file.stat().st_size for file in folder.glob("*.safetensors")) > 4 << 30
    return torch.bfloat16 if heavy and device.type != "cpu" and work == torch.bfloat16 else torch.float32


def _pool(states: torch.Tensor, mask: torch.Tensor, how: str) -> torch.Tensor:
    """[B, l, d] states of right-padded rows to [B, d]: the first or last token's, or the mean over tokens."""
    if how == "mean":
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    place = torch.zeros_like(mask[:, 0]) if how == "first" else mask.sum(1) - 1
    return states[torch.arange(len(states), device=states.device), place]
