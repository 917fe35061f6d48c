"""The loaders of one split as another model's Config wants them: its batches, its negatives, its length of history.

A teacher reads the student's split, row for row, but it is trained as its own settings say.
"""

from typing import Any

from recbole.data.dataloader import TrainDataLoader
from recbole.data.utils import create_samplers

from recbole_llm.dataset import FlatSequentialDataset


def train_loader(config: Any, dataset: Any, valid: Any) -> TrainDataLoader:
    """A training loader over a split.

    Args:
        config: Of the model that is to be trained.
        dataset: The training split.
        valid: The validation split, whose items a sampler has to know; None if there is none.

    Raises:
        ValueError: The split cannot have histories of the model's length.
    """
    own = cut_to(config, dataset)
    sampler = create_samplers(config, own, [own, *([own if valid is None else valid] * 2)])[0]
    return TrainDataLoader(config, own, sampler, shuffle=config["shuffle"])


def eval_loader(config: Any, loader: Any) -> Any:
    """A loader of the same kind over the same rows as another one; None for None.

    Args:
        config: Of the model that is to be evaluated.
        loader: A loader of RecBole's for evaluation.

    Raises:
        ValueError: Its rows cannot have histories of the model's length.
    """
    if not loader:
        return loader
    return type(loader)(config, cut_to(config, loader._dataset), loader._sampler, shuffle=False)


def cut_to(config: Any, dataset: Any) -> Any:
    """A split whose histories have the length that a model wants; the split itself if they have."""
    wanted, there = config["MAX_ITEM_LIST_LENGTH"], dataset.config["MAX_ITEM_LIST_LENGTH"]
    if isinstance(dataset, FlatSequentialDataset) and dataset.flat_log is not None:
        return dataset if dataset.flat_log.width == wanted else dataset.cut_to(wanted)
    if wanted != there:
        raise ValueError(
            f"MAX_ITEM_LIST_LENGTH={wanted}: the rows of {dataset.dataset_name} were written with histories of {there} items, and "
            f"{config['model']} wants others. Set it to {there}, or make the data with recbole_llm.create_dataset."
        )
    return dataset
