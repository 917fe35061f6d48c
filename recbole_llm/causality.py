"""Whether a model may be trained at every position of a sequence, found out by running it, and its states there.

A loss at every position is the loss of all prefixes only for a model whose output at a position is what it would say after
that prefix alone.
"""

import copy
import inspect
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from torch import Tensor, nn
from torch.nn import functional

CAUSAL_TOLERANCE = 1e-4
"""Largest difference, as a share of the largest state, that still counts as rounding."""
STEP = 0.02
"""How far every trained weight is moved to see what training could make of a model; more than `CAUSAL_TOLERANCE`, also squared."""


def forward_arguments(model, batch: Interaction) -> dict[str, Tensor]:
    """What a RecBole sequential model's `forward` wants to be called with, taken from a batch.

    Raises:
        ValueError: `forward` has a parameter that is neither the history, its length nor the user (FPMC, for one, wants
            the target).
    """
    known = {
        "item_seq": model.ITEM_SEQ,
        "seq_item": model.ITEM_SEQ,
        "item_seq_len": model.ITEM_SEQ_LEN,
        "seq_item_len": model.ITEM_SEQ_LEN,
        "user": model.USER_ID,
        "user_id": model.USER_ID,
    }
    arguments = {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if name in known:
            arguments[name] = batch[known[name]]
        elif parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_ONLY,
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        ):
            raise ValueError(
                f"model={type(model).__name__}: its forward wants '{name}'; there is {', '.join(known)}. "
                "Choose a model that makes its output from the history, its length and the user."
            )
    return arguments


@contextmanager
def _every_position(model) -> Iterator[None]:
    """While this lasts, the model keeps its outputs of all positions where it would pick the last one."""
    before = model.__dict__.get("gather_indexes")
    model.gather_indexes = lambda output, gather_index: output
    try:
        yield
    finally:
        del model.gather_indexes
        if before is not None:
            model.gather_indexes = before


def states(model, batch: Interaction) -> Tensor:
    """The model's output at every position of a batch.

    Only for models that pick the last position by `self.gather_indexes` as their last step; `is_causal` tells.

    Args:
        model: A RecBole sequential model.
        batch: Has the model's history, length and user columns, histories `[B, l]`.

    Returns:
        States `[B, l, d]`; after the end of a history they mean nothing.
    """
    with _every_position(model):
        return model.forward(**forward_arguments(model, batch))


def sample_rows(model, rows: int = 4, longest: int = 50) -> Interaction:
    """A small made-up batch of full histories that a model can read, the same at every call.

    Histories are one item shorter than the model's longest (or than `longest`), so that padding can be told from items.

    Args:
        model: A RecBole sequential model.
        rows: Number of histories B.
        longest: Most items of a history.

    Returns:
        History `[B, l]`, its length `[B]`, user `[B]` and a target item `[B]`, on the model's device.
    """
    generator = torch.Generator().manual_seed(0)
    width = min(longest, model.max_seq_length - 1 if model.max_seq_length > 2 else model.max_seq_length)
    columns = {
        model.ITEM_SEQ: torch.randint(1, model.n_items, (rows, width), generator=generator),
        model.ITEM_SEQ_LEN: torch.full((rows,), width),
        # ids of the sample stay at 1: a model's user table need not be larger
        model.USER_ID: torch.ones(rows, dtype=torch.long),
        model.ITEM_ID: torch.randint(1, model.n_items, (rows,), generator=generator),
    }
    return Interaction(columns).to(model.device)


def sample_at_full_width(model) -> Interaction:
    """The histories of `sample_rows`, padded to the width of RecBole's rows: some models run at no other width."""
    sample = sample_rows(model).interaction
    pad = model.max_seq_length - sample[model.ITEM_SEQ].shape[1]
    return Interaction(sample | {model.ITEM_SEQ: functional.pad(sample[model.ITEM_SEQ], (0, max(0, pad)))})


def fault_of_scores(model) -> str | None:
    """Why a model's ranking is not that of its state times its item table; None if it is.

    Compared on a made-up batch and up to a number per row, which no ranking and no softmax sees.

    Args:
        model: A RecBole sequential model.
    """
    batch = sample_at_full_width(model)
    try:
        with undisturbed(model):
            made = model(**forward_arguments(model, batch)) @ model.item_embedding.weight.T
            own = model.full_sort_predict(batch).view(len(batch), -1)
            if made.shape != own.shape:
                return "they differ"
            made, own = (torch.log_softmax(scores[:, 1:].float(), dim=1) for scores in (made, own))
            return None if torch.allclose(made, own, rtol=1e-3, atol=1e-4) else "they differ"
    except Exception as error:  # whatever a model raises here, its scores are made of something else
        return f"{type(error).__name__}: {error}"


def fault_of_loss(model, network) -> str | None:
    """Why a model's own loss is not the cross entropy of its network's states with the network's item table; None if it is.

    Args:
        model: A RecBole sequential model.
        network: What makes its states; the model itself, or a part of it.
    """
    name, weight = type(network).__name__, getattr(getattr(network, "item_embedding", None), "weight", None)
    if weight is None or len(weight) != network.n_items:
        return f"{name} has no item_embedding table of one row per item"
    try:
        with undisturbed(model):
            same = _same_loss(model, network)
            if same:  # a term may be of the training alone, or have a factor that is zero at the start
                training = moved(model, network)
                for part in training:
                    without_dropout(part.train())
                same = _same_loss(*training)
    except Exception as error:  # a loss that needs other columns cannot be compared
        return f"{name}'s own loss could not be compared ({type(error).__name__}: {error})"
    return None if same else f"{name}'s own loss is more than the cross entropy of its states with its item table"


def _same_loss(model, network) -> bool:
    """Whether a model's own loss is that cross entropy, in the mode that it is in."""
    batch = sample_at_full_width(model)
    with torch.random.fork_rng(_devices(model)):  # both draw the same, where they draw
        logits = network.forward(**forward_arguments(network, batch)) @ network.item_embedding.weight.T
    ours = functional.cross_entropy(logits, batch[model.POS_ITEM_ID])
    own = model.calculate_loss(batch)
    return torch.is_tensor(own) and torch.allclose(own, ours, rtol=1e-4)


def copied(*models: nn.Module) -> tuple[nn.Module, ...]:
    """Copies of models, and of what they share among each other, that can be changed without a trace.

    Frozen weights and data sets are not copied, which may be large and which no training changes.
    """
    memo: dict[int, object] = {}
    for part in (part for model in models for part in model.modules()):
        memo |= {id(weight): weight for weight in part.parameters(recurse=False) if not weight.requires_grad}
        for value in vars(part).values():
            if isinstance(value, Dataset):
                memo[id(value)] = value
            elif isinstance(value, Tensor) and not value.is_leaf:  # kept of an earlier pass; torch copies no graph
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(models, memo)


def without_dropout(model: nn.Module) -> None:
    """Switch every dropout layer of a model off, also in training, and those within recurrent and attention layers."""
    for part in model.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
        elif isinstance(part, nn.RNNBase | nn.MultiheadAttention):
            part.dropout = 0.0


def moved(*models: nn.Module, sign: int = 1) -> tuple[nn.Module, ...]:
    """Copies of models each of whose trained weights is `STEP` larger or smaller, by chance but the same at every call.

    Args:
        models: Any modules, which may share weights.
        sign: 1 or -1, which moves every weight the other way.
    """
    others = copied(*models)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in {id(weight): weight for other in others for weight in other.parameters()}.values():
            if weight.requires_grad:
                way = torch.empty(weight.shape).uniform_(-1, 1, generator=generator).sign_()
                weight.add_(way.to(weight), alpha=sign * STEP)
    return others


@contextmanager
def undisturbed(model) -> Iterator[None]:
    """While this lasts, a model is in evaluation mode; its mode and all random number generators come back after it."""
    was_training, python, legacy = model.training, random.getstate(), np.random.get_state()
    try:
        # on a GPU, TF32 rounds more coarsely than the comparisons made here allow
        with torch.no_grad(), torch.random.fork_rng(_devices(model)), torch.backends.cudnn.flags(allow_tf32=False):
            model.eval()
            yield
    finally:
        model.train(was_training)
        random.setstate(python)
        np.random.set_state(legacy)


def _devices(model) -> list:
    """The GPU whose random number generator a model draws from, if it does from one's."""
    return [model.device] if torch.device(model.device).type == "cuda" else []


def is_causal(model, batch: Interaction | None = None) -> tuple[bool, str]:
    """Find out by running it whether a model's output at a position is what it would say after that prefix alone.

    Two things are compared, in evaluation mode: the states before and after all later items were changed, and the state
    at t with `forward` of the padded prefix, as evaluation will call it. Both are compared again on copies whose weights are
    moved, one way and the other: a gate that is zero at the start hides what stands behind it until it is trained. The
    model, its mode and the random number generators are left as they were.

    Args:
        model: A RecBole sequential model.
        batch: Full histories (no padding) to try it on; made up if there is none.

    Returns:
        Whether it is causal, and a sentence for the log that says why.
    """
    name, fault = type(model).__name__, "does not run on all positions at once"
    try:
        with undisturbed(model):
            batch = sample_rows(model) if batch is None else batch
            causal, why = _is_causal(model, batch)
            fault = "cannot be tried with other weights than it has"
            for sign in (1, -1) if causal else ():
                still, reason = _is_causal(*moved(model, sign=sign), batch)
                if not still:
                    return False, f"{reason}, once its weights are others"
            return causal, why
    except Exception as error:  # whatever a model raises here, it cannot be trained on all positions
        line = (str(error).strip().splitlines() or ["no message"])[0]
        return False, f"{name} {fault} ({type(error).__name__}: {line})"


def _is_causal(model, batch: Interaction) -> tuple[bool, str]:
    """The two comparisons of `is_causal`, without its precautions."""
    name = type(model).__name__
    items = batch[model.ITEM_SEQ]
    rows, width = items.shape
    output = states(model, batch)
    if not isinstance(output, Tensor) or output.ndim != 3 or output.shape[:2] != items.shape:
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        return False, f"{name} does not give one state per position (its output is {shape} for {rows} x {width} items)"
    allowed = CAUSAL_TOLERANCE * float(output.abs().max())

    kept = (width + 1) // 2
    changed = items.clone()
    changed[:, kept:] = items[:, kept:] % (model.n_items - 1) + 1
    other = states(model, _with(batch, {model.ITEM_SEQ: changed}))
    leak = float((other - output)[:, :kept].abs().max())
    if not leak <= allowed:
        return False, f"{name}'s output at a position depends on later items (by {leak:.2g})"

    at = torch.linspace(0, width - 1, min(width, 16), device=items.device).long()
    padded = torch.zeros(len(at), max(width, model.max_seq_length), dtype=torch.long, device=items.device)
    padded[:, :width] = torch.where(torch.arange(width, device=items.device) <= at[:, None], items[0], 0)
    columns = {name: batch[name][:1].expand(len(at)) for name in (model.USER_ID, model.ITEM_ID) if name in batch}
    prefixes = Interaction(columns | {model.ITEM_SEQ: padded, model.ITEM_SEQ_LEN: at + 1})
    alone = model.forward(**forward_arguments(model, prefixes))
    if alone.shape != output[0, at].shape:
        return False, f"{name} gives {list(alone.shape)} where {list(output[0, at].shape)} was expected"
    gap = float((alone - output[0, at]).abs().max())
    if not gap <= allowed:
        return False, f"{name}'s output at a position is not its output after that prefix (they differ by {gap:.2g})"
    return True, f"{name}'s output at a position does not depend on later items (tried on {rows} x {width} items)"


def _with(batch: Interaction, columns: dict[str, Tensor]) -> Interaction:
    """A copy of a batch with some columns replaced."""
    return Interaction(batch.interaction | columns)
