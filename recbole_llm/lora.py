"""Low-rank fine-tuning of a causal language model on (prompt, answer) pairs: batches, loss, loop, and exact resume.

Paper: BIGRec (arXiv 2308.08434) §3.2; settings of its public code are r 8, alpha 16, dropout .05, learning rate 1e-4,
20 warm-up steps, early stopping on the validation loss. Differs: the loss counts the answer only unless told otherwise,
and its mean is over the answer tokens of the whole batch.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm

from recbole_llm.artifacts import DamagedArtifact, digest, read_json, read_tensors, write_json, write_tensors
from recbole_llm.decoding import accepts, plan
from recbole_llm.tokens import padded

STATE = "state.json"


@dataclass(frozen=True)
class Pair:
    """One training example.

    Args:
        tokens: Prompt and answer.
        prompt: Number of tokens that belong to the prompt.
    """

    tokens: list[int]
    prompt: int


@dataclass(frozen=True)
class Schedule:
    """How long and how fast `fit` trains.

    Args:
        learning_rate: Highest rate, reached after the warm-up.
        epochs: Passes over the pairs at most.
        batch_size: Pairs per optimizer step.
        warmup_steps: Optimizer steps of linear rise; afterwards the rate falls linearly to 0.
        patience: Evaluations without improvement after which training ends.
        evals_per_epoch: Evaluations of the validation pairs per epoch.
        train_on_prompt: Count the prompt's tokens in the training loss, too.
        seed: Of data order and dropout.
        tokens_at_once: A step's pairs go through the network in pieces of at most this many tokens.
        save_every: Optimizer steps between two saved states.
    """

    learning_rate: float
    epochs: int
    batch_size: int
    warmup_steps: int = 20
    patience: int = 5
    evals_per_epoch: int = 1
    train_on_prompt: bool = False
    seed: int = 0
    tokens_at_once: int = 4096
    save_every: int = 10


def rate(step: int, total: int, warmup: int) -> float:
    """Share of the full learning rate at optimizer step `step` (from 0): linear rise, then linear fall to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (total - step) / max(1, total - warmup)


def length_grouped(lengths: Sequence[int], batch_size: int, seed: int) -> list[list[int]]:
    """One epoch's batches: every pair once, random, but pairs of similar length together.

    A pure function of its arguments, so an interrupted epoch can be taken up again.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    pool = batch_size * 8
    batches = []
    for start in range(0, len(order), pool):
        near = sorted(order[start : start + pool], key=lambda n: lengths[n])
        batches += [near[place : place + batch_size] for place in range(0, len(near), batch_size)]
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]


def loss_sum(network: torch.nn.Module, pairs: Sequence[Pair], pad: int, whole: bool) -> tuple[torch.Tensor, int]:
    """Sum of the cross entropy over the answers' tokens, and their number.

    Args:
        network: Causal language model.
        pairs: The pairs of one batch.
        pad: Any token: padding is told by its place, because the padding token may be the end-of-answer token.
        whole: Count the prompts' tokens as well.
    """
    device = next(network.parameters()).device
    ids, mask = padded([pair.tokens for pair in pairs], pad, device, left=False)
    counted = mask.bool()
    for number, pair in enumerate(pairs):
        counted[number, : 1 if whole else max(1, pair.prompt)] = False
    # the output at a position predicts the next token; only the span that holds answers is projected to the vocabulary
    first = 0 if whole else max(0, min(pair.prompt for pair in pairs) - 1)
    span = torch.arange(first, ids.shape[1] - 1, device=device)
    keep = {"logits_to_keep": span} if accepts(network, "logits_to_keep") else {}
    logits = network(input_ids=ids, attention_mask=mask, use_cache=False, **keep).logits
    if not keep:
        logits = logits[:, first : ids.shape[1] - 1]
    counted = counted[:, first + 1 :]
    total = functional.cross_entropy(logits[counted].float(), ids[:, first + 1 :][counted], reduction="sum")
    return total, int(counted.sum())


@torch.inference_mode()
def mean_loss(network: torch.nn.Module, pairs: Sequence[Pair], pad: int, tokens_at_once: int = 4096) -> float:
    """Mean cross entropy per answer token over all pairs, dropout off."""
    network.eval()
    total, count = 0.0, 0
    for batch in plan([pair.tokens for pair in pairs], tokens_at_once):
        loss, number = loss_sum(network, [pairs[n] for n in batch], pad, whole=False)
        total, count = total + loss.item(), count + number
    return total / max(1, count)


def fit(
    network: torch.nn.Module,
    pairs: Sequence[Pair],
    valid: Sequence[Pair],
    schedule: Schedule,
    pad: int,
    *,
    state_folder: str | Path | None = None,
    identity: Any = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train the parameters that require gradients; the network ends with the best ones (the last without validation).

    Uses the global random generators (dropout): seed them before, inside `torch.random.fork_rng`.

    Args:
        network: A causal language model whose adapter parameters alone require gradients.
        pairs: Training pairs.
        valid: Validation pairs; the mean loss of their answers decides what is best and when to stop.
        schedule: How to train.
        pad: Any token.
        state_folder: Where the state is saved. Found there, training goes on from it, with the same result as if never
            interrupted.
        identity: Whatever else makes two trainings the same one; a state of another training is not taken up.
        progress: Show a progress bar.

    Returns:
        `eval_steps` (optimizer steps after which was evaluated), `train_loss` (mean since the evaluation before) and
        `valid_loss` at these, `best_step`, `best_valid_loss` (None without validation pairs), `steps`, `seconds`, and of this process
        `tokens_per_second`, those trained on and those that only went forward (None where there were none).

    Raises:
        ValueError: There is nothing to train on.
        FloatingPointError: The loss is not a number any more.
    """
    if not pairs:
        raise ValueError("There are no training pairs to tune the language model on.")
    logger = logging.getLogger()
    device = next(network.parameters()).device
    trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=schedule.learning_rate, weight_decay=0.0)
    lengths = [len(pair.tokens) for pair in pairs]
    per_epoch = -(-len(pairs) // schedule.batch_size)
    steps = per_epoch * schedule.epochs
    evaluations = {round(per_epoch * (n + 1) / schedule.evals_per_epoch) for n in range(schedule.evals_per_epoch)}
    key = digest([vars(schedule), identity, [vars(pair) for pair in pairs], [vars(pair) for pair in valid]])

    log: dict[str, Any] = {"eval_steps": [], "train_loss": [], "valid_loss": []}
    log |= {"best_step": 0, "best_valid_loss": None, "seconds": 0.0}
    now = {"step": 0, "sum": 0.0, "count": 0, "worse": 0, "finished": False}
    best: dict[str, torch.Tensor] = {}
    found = None if state_folder is None else _read_state(Path(state_folder), key)
    if found is not None:
        log, now, tensors = found
        best = _load_state(tensors, trained, optimizer, device)
        logger.info(f"LoRA goes on after step {now['step']} of {steps} ({state_folder})")

    def save() -> None:
        if state_folder is not None:
            log["seconds"] = earlier + time.monotonic() - begin
            _write_state(Path(state_folder), key, log, now, _state(trained, best, optimizer, device))

    def timed(kind: str, tokens: int, work: Callable[..., Any], *arguments: Any) -> Any:
        start = time.monotonic()
        made = work(*arguments)
        spent[kind] += torch.tensor([tokens, time.monotonic() - start], dtype=torch.float64)
        return made

    spent = {kind: torch.zeros(2, dtype=torch.float64) for kind in ("trained", "forward")}
    earlier, begin = log["seconds"], time.monotonic()
    bar = tqdm(total=steps, initial=now["step"], desc="LoRA", ncols=100, disable=not progress)
    batches: list[list[int]] = []
    while now["step"] < steps and not now["finished"]:
        epoch, place = divmod(now["step"], per_epoch)
        if not batches or place == 0:
            batches = length_grouped(lengths, schedule.batch_size, schedule.seed * 1_000_003 + epoch)
        batch = [pairs[n] for n in batches[place]]
        share = rate(now["step"], steps, schedule.warmup_steps)
        size = sum(len(pair.tokens) for pair in batch)
        total, count = timed(
            "trained", size, _step, network, batch, pad, schedule, optimizer, list(trained.values()), share
        )
        now["step"] += 1
        now["sum"] += total
        now["count"] += count
        bar.update()
        bar.set_postfix_str(f"loss {total / count:.3f}")
        if place + 1 in evaluations:
            log["eval_steps"].append(now["step"])
            log["train_loss"].append(now["sum"] / now["count"])
            now["sum"], now["count"] = 0.0, 0
            if valid:
                size = sum(len(pair.tokens) for pair in valid)
                loss = timed("forward", size, mean_loss, network, valid, pad, schedule.tokens_at_once)
                log["valid_loss"].append(loss)
                better = log["best_valid_loss"] is None or loss < log["best_valid_loss"]
                now["worse"] = 0 if better else now["worse"] + 1
                if better:
                    log["best_step"], log["best_valid_loss"] = now["step"], loss
                    best = {name: weight.detach().clone() for name, weight in trained.items()}
                now["finished"] = now["worse"] >= schedule.patience
                logger.info(
                    f"LoRA step {now['step']}/{steps}: train loss {log['train_loss'][-1]:.4f}, validation {loss:.4f}"
                    + ("" if better else f" (best {log['best_valid_loss']:.4f} at step {log['best_step']})")
                )
        if now["step"] % schedule.save_every == 0 and now["step"] < steps:
            save()
    bar.close()
    now["finished"] = True
    if not best:
        log["best_step"], best = now["step"], {name: weight.detach().clone() for name, weight in trained.items()}
    save()
    with torch.no_grad():
        for name, weight in trained.items():
            weight.copy_(best[name])
    network.eval()
    speed = {kind: float(tokens / seconds) if tokens else None for kind, (tokens, seconds) in spent.items()}
    if all(speed.values()):
        logger.info(
            f"LoRA trained on {speed['trained']:.0f} tokens a second; forward alone {speed['forward']:.0f}, "
            f"{speed['forward'] / speed['trained']:.1f} times as many."
        )
    seconds = earlier + time.monotonic() - begin
    return {**log, "steps": now["step"], "seconds": seconds, "tokens_per_second": speed}


def _step(
    network: torch.nn.Module,
    batch: Sequence[Pair],
    pad: int,
    schedule: Schedule,
    optimizer: torch.optim.Optimizer,
    trained: list[torch.nn.Parameter],
    share: float,
) -> tuple[float, int]:
    """One optimizer step; the batch's loss sum and number of counted tokens."""
    whole = schedule.train_on_prompt
    count = sum(len(pair.tokens) - (1 if whole else max(1, pair.prompt)) for pair in batch)
    network.train()
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for piece in plan([pair.tokens for pair in batch], schedule.tokens_at_once):
        loss, _ = loss_sum(network, [batch[n] for n in piece], pad, whole)
        (loss / count).backward()
        total += loss.item()
    if not total < float("inf"):
        raise FloatingPointError(f"The LoRA loss became {total}; a lower learning_rate or llm_dtype: float32 may help.")
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = schedule.learning_rate * share
    optimizer.step()
    return total, count


def _state(
    trained: dict[str, torch.nn.Parameter],
    best: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    tensors = {f"adapter/{name}": weight for name, weight in trained.items()}
    tensors |= {f"best/{name}": weight for name, weight in best.items()}
    for number, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{number}/{name}": value for name, value in moments.items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def _load_state(
    tensors: dict[str, torch.Tensor],
    trained: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Put a saved state back into place; returns the best weights."""
    best = {}
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "adapter":
            trained[rest].data.copy_(value)
        elif kind == "best":
            best[rest] = value.to(device)
        elif kind == "optimizer":
            number, _, moment = rest.partition("/")
            moments.setdefault(int(number), {})[moment] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random/cuda"], device)
    return best


def _write_state(
    folder: Path, key: str, log: dict[str, Any], now: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    """Tensors first under a name of their own, then the JSON that names them: a reader always finds a pair."""
    name = f"state-{now['step']}{'-end' if now['finished'] else ''}.safetensors"
    write_tensors(folder / name, tensors)
    write_json(folder / STATE, {"key": key, "log": log, "now": now, "tensors": name})
    for old in folder.glob("state-*.safetensors"):
        if old.name != name:
            old.unlink()


def _read_state(folder: Path, key: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, torch.Tensor]] | None:
    """The saved state of the same training, or None."""
    try:
        state = read_json(folder / STATE)
        if state["key"] != key:
            logging.getLogger().warning(f"{folder}: a state of another training (other settings or data) is not used")
            return None
        return state["log"], state["now"], read_tensors(folder / state["tensors"])
    except FileNotFoundError:
        return None
    except DamagedArtifact as error:
        logging.getLogger().warning(f"{error} LoRA training starts anew.")
        return None
