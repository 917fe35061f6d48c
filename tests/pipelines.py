"""Settings and pipelines that several tests share: the ring with a tiny teacher, and RecBole's documented forms."""

from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

from tests.ring import RING

SMALL = {
    "epochs": 3,
    "stopping_step": 10,
    "hidden_size": 16,
    "inner_size": 32,
    "n_layers": 1,
    "n_heads": 1,
    "embedding_size": 16,
    "MAX_ITEM_LIST_LENGTH": 10,
    "train_batch_size": 128,
    "learning_rate": 0.01,
    "topk": [1, 10],
    "valid_metric": "NDCG@10",
    "show_progress": False,
    "state": "warning",
}
OF_EVERY_MODEL = (
    "epochs", "stopping_step", "MAX_ITEM_LIST_LENGTH", "train_batch_size", "learning_rate", "topk", "valid_metric",
    "show_progress", "state",
)  # fmt: skip
COUNTED = ("Popularity", "Markov", "HistoryKNN", "TextKNN")


def ring_settings(data_path, model: str, tiny_lm=None, **more) -> dict:
    """Settings of a model on the ring; a distilling one has a tiny random LLM as its teacher's."""
    settings = {key: value for key, value in RING.items() if key != "dataset"} | {"data_path": str(data_path)}
    small = dict(SMALL)
    prompts = {key: settings.pop(key) for key in ("prompt_instruction", "prompt_lead")}
    if model == "BIGRec":
        small = {key: SMALL[key] for key in ("topk", "valid_metric", "show_progress", "state", "MAX_ITEM_LIST_LENGTH")}
        small |= {"llm": str(tiny_lm), "train_rows": 16, "valid_rows": 4, "teacher_eval_rows": 8, "teacher_history": 2}
        small |= {"generate_max_new_tokens": 16, **prompts}
    elif model == "LiteLLM4Rec":
        small = {key: SMALL[key] for key in OF_EVERY_MODEL}
        small |= {"llm": str(tiny_lm), "lite_llm_learning_rate": 0.001, "lite_warmup_steps": 0, "lite_dropout": 0.0}
    elif model in COUNTED:
        small = {key: SMALL[key] for key in OF_EVERY_MODEL}
        small |= {"llm": str(tiny_lm)} if model == "TextKNN" else {}
    elif model == "P5":
        small |= {"p5_width": 32, "p5_inner": 64, "p5_heads": 2, "p5_layers": 1, "p5_digits": 1, "p5_beams": 10}
        small |= {"p5_group": 5, "p5_clusters": 3}
    elif model == "LSC4Rec":
        small = {key: SMALL[key] for key in ("topk", "valid_metric", "show_progress", "state")}
        small |= {f"cloud_{key}": SMALL[key] for key in ("epochs", "stopping_step", "MAX_ITEM_LIST_LENGTH")}
        small |= {
            f"{role}_{key}": SMALL[key] for role in ("cloud", "device") for key in ("learning_rate", "train_batch_size")
        }
        small |= {"cloud_llm": str(tiny_lm), "cloud_lite_llm_learning_rate": 0.001, "cloud_lite_warmup_steps": 0}
        small |= {"MAX_ITEM_LIST_LENGTH": 12, "device_MAX_ITEM_LIST_LENGTH": 10, "cloud_lite_dropout": 0.0}
        small |= {
            "lsc_independent_epochs": 6,
            "lsc_cooperative_epochs": 2,
            "lsc_retrain_epochs": 2,
            "lsc_candidates": 24,
        }
        small |= {"lsc_list": 12, "lsc_list_cloud": 5}
    elif tiny_lm is not None:
        small |= {
            "teacher": "BIGRec",
            "teacher_llm": str(tiny_lm),
            "teacher_train_rows": 16,
            "teacher_valid_rows": 4,
            "teacher_rows": 24,
        }
        small |= {
            "teacher_eval_rows": 8,
            "teacher_shard_rows": 8,
            "teacher_history": 2,
            "teacher_generate_max_new_tokens": 16,
        }
    student = more.get("student", "SASRec") if model == "DLLM2Rec" else model
    transformer = {"n_layers", "n_heads", "inner_size", "hidden_size"}
    foreign = {"SASRec": {"embedding_size"}, "LightSANs": {"embedding_size"}}.get(student, transformer)
    foreign = foreign | {"embedding_size"} if model in ("P5", "LSC4Rec") else foreign
    small = {key: value for key, value in small.items() if key not in foreign}
    return settings | small | more


def step_by_step(model: str, settings: dict, dataset: str = "ring", saved: bool = True):
    """RecBole's documented form, step by step; returns (config, trainer, test loader, validation score, test result)."""
    config = Config(model=model, dataset=dataset, config_dict=dict(settings))
    init_seed(config["seed"], config["reproducibility"])
    data = create_dataset(config)
    train_data, valid_data, test_data = data_preparation(config, data)
    init_seed(config["seed"], config["reproducibility"])
    network = get_model(config["model"])(config, train_data._dataset).to(config["device"])
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, network)
    best, _ = trainer.fit(train_data, valid_data, saved=saved, show_progress=False)
    result = trainer.evaluate(test_data, load_best_model=saved, show_progress=False)
    return config, trainer, test_data, best, result
