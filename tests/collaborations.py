"""LSC4Rec in small, for the tests of all its parts: a log, a cloud and a device model that train in a second."""

from types import SimpleNamespace

from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

from tests.small_logs import random_log, write_log

SMALL = {
    "cloud": "SASRec", "cloud_epochs": 2, "cloud_hidden_size": 16, "cloud_MAX_ITEM_LIST_LENGTH": 10,
    "device_hidden_size": 8, "device_MAX_ITEM_LIST_LENGTH": 10, "device_train_batch_size": 128, "device_learning_rate": 0.01,
    "lsc_independent_epochs": 3, "lsc_cooperative_epochs": 2, "lsc_retrain_epochs": 2, "lsc_candidates": 12, "lsc_list": 16,
    "lsc_list_cloud": 8, "topk": [1, 5], "valid_metric": "NDCG@5", "MAX_ITEM_LIST_LENGTH": 12, "show_progress": False, "state": "warning",
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
}  # fmt: skip


def sequences():
    """Forty random users, and before them one who meets every item once, so that a changed log numbers the items alike."""
    log = random_log(users=40, items=40, longest=24, seed=3)
    return {"0": [f"i{item}" for item in range(40)]} | log


def prepared(source, **more) -> SimpleNamespace:
    """Config, loaders, model and trainer, ready to be trained."""
    config = Config("LSC4Rec", "log", config_dict=SMALL | {"data_path": str(source)} | more)
    init_seed(config["seed"], config["reproducibility"])
    data = data_preparation(config, create_dataset(config))
    model = get_model("LSC4Rec")(config, data[0]._dataset).to(config["device"])
    return SimpleNamespace(
        config=config, data=data, model=model, trainer=get_trainer(config["MODEL_TYPE"], "LSC4Rec")(config, model)
    )


def fitted(source, **more) -> SimpleNamespace:
    """The same after its training; `best` is what `fit` returned."""
    run = prepared(source, **more)
    run.best = run.trainer.fit(run.data[0], run.data[1])
    return run


def changed(target, choose):
    """A copy of the log in which `choose(place from the end)` says which items of each user become another one."""
    log = sequences()
    for user, sequence in log.items():
        for place in range(len(sequence)):
            if user != "0" and choose(len(sequence) - place):
                sequence[place] = f"i{(int(sequence[place][1:]) + 7) % 40}"
    return write_log(target, "log", log)
