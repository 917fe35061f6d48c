"""The language model: what it is tuned on, what it writes, where it stops, and the vectors it gives."""

import copy
import shutil

import peft
import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from recbole_llm import decoding, lm, lora
from recbole_llm.adapter import lora_targets, twin
from recbole_llm.backbone import working_dtype
from recbole_llm.decoding import Trie, common_prefix, end_of_title, plan
from recbole_llm.lm import LanguageModel
from recbole_llm.lora import Pair, length_grouped, loss_sum, mean_loss, rate
from recbole_llm.tokens import padded

WORDS = ["red", "blue", "green", "pink", "grey", "black"]
PROMPTS = [f'Seen: "{word} the", next:\n' for word in WORDS]
ANSWERS = [f'"{word} in {number}"\n' for number, word in enumerate(WORDS)]
QUICK = {"learning_rate": 3e-2, "epochs": 4, "batch_size": 2, "warmup_steps": 2, "dropout": 0.1, "progress": False}


@pytest.fixture(autouse=True)
def one_thread(clean_process):
    """Tiny tensors are slower on two threads than on one."""
    torch.set_num_threads(1)


@pytest.fixture
def model(tiny_lm) -> LanguageModel:
    return LanguageModel.load(str(tiny_lm), dtype="float32")  # auto is another format on other machines


@pytest.fixture(scope="module")
def tuned(tiny_lm) -> LanguageModel:
    """A model that knows its six answers by heart."""
    model = LanguageModel.load(str(tiny_lm), dtype="float32", threads=1)
    settings = {**QUICK, "epochs": 60, "dropout": 0.0}
    model.tune(PROMPTS, ANSWERS, PROMPTS, ANSWERS, patience=99, **settings)
    return model


def gpt2(tiny_lm, folder):
    """A model with learned positions and fused, transposed projections."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        eos_token_id=0,
        initializer_range=0.2,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return LanguageModel.load(str(folder))


def bert(tiny_lm, folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return LanguageModel.load(str(folder))


# ending, batches, tries


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('"Alien"', '"Alien"'),
        ('"Alien"\n### ', '"Alien"'),
        ('\n "Alien" and', '\n "Alien"'),
        ("Alien\nsecond", "Alien"),
        ('"Alien\n"', '"Alien'),
        ('see "Alien" or', 'see "Alien"'),
        ('""', '""'),
        ('"Alien', None),
        ('"', None),
        ("", None),
        (" \n", None),
    ],
)
def test_an_answer_ends_at_its_closing_quote_or_line(text, kept):
    end = end_of_title(text)
    assert (None if end is None else text[:end]) == kept


def test_batches_hold_every_row_once_within_the_budget_whatever_the_order():
    rows = [[number] * length for number, length in enumerate([5, 1, 9, 3, 3, 30, 2])]
    batches = plan(rows, 10)
    assert sorted(sum(batches, [])) == list(range(7))
    assert all(len(batch) == 1 or len(batch) * max(len(rows[n]) for n in batch) <= 10 for batch in batches)
    turned = rows[::-1]
    assert [[turned[n] for n in batch] for batch in plan(turned, 10)] == [[rows[n] for n in batch] for batch in batches]


def test_the_common_beginning_leaves_each_row_something():
    assert common_prefix([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert common_prefix([[1, 2], [1, 2, 3]]) == 1
    assert common_prefix([[7]]) == 0


def test_a_trie_offers_what_may_follow():
    trie = Trie([[1, 2, 0], [1, 2, 3, 0], [4]], end=0)
    assert trie.following([]) == [1, 4]
    assert trie.following([1, 2]) == [0, 3]
    assert trie.following([4]) == [] and trie.following([9]) == []
    assert sorted(Trie([[1], [1, 2]], end=0).following([1])) == [0, 2]
    with pytest.raises(ValueError, match="empty"):
        Trie([[]], end=0)


def test_an_epoch_has_every_pair_once_lengths_grouped_and_is_the_same_every_time():
    lengths = [(7 * n) % 50 + 1 for n in range(101)]
    batches = length_grouped(lengths, 4, seed=3)
    assert sorted(sum(batches, [])) == list(range(101))
    assert batches == length_grouped(lengths, 4, seed=3) != length_grouped(lengths, 4, seed=4)
    spread = sum(max(lengths[n] for n in batch) - min(lengths[n] for n in batch) for batch in batches) / len(batches)
    assert spread < 12


def test_the_learning_rate_rises_and_falls_linearly():
    assert [rate(step, 6, 2) for step in range(6)] == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25])


# loss


def test_the_loss_counts_the_answer_and_its_end_token_which_is_also_the_padding(model):
    network, tokens = model._network, model._tokens
    pairs = [Pair(*pair) for pair in tokens.of_pairs(["ab ", "a much longer prompt "], ['"x"\n', '"yellow"\n'], 99)]
    assert tokens.pad == tokens.end == pairs[0].tokens[-1]
    for whole in (False, True):
        total, count = loss_sum(network, pairs, tokens.pad, whole)
        expected, number = 0.0, 0
        for pair in pairs:
            logits = network(torch.tensor([pair.tokens])).logits[0]
            first = 1 if whole else pair.prompt
            expected += functional.cross_entropy(
                logits[first - 1 : -1], torch.tensor(pair.tokens[first:]), reduction="sum"
            )
            number += len(pair.tokens) - first
        assert count == number
        assert total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_long_prompt_is_cut_in_front_and_the_answer_stays(model, caplog):
    [(tokens, prompt)] = model._tokens.of_pairs(["x" * 50 + "yz"], ['"a"\n'], 12)
    assert len(tokens) == 12 and model._tokens.text(tokens) == "xxxxxyz"[-prompt:] + '"a"\n'
    assert "1 of 1 texts are longer than 12 tokens" in caplog.text


# tuning


def test_tuning_learns_the_answers_and_leaves_the_pretrained_model_and_the_generators_alone(model):
    before = {name: weight.clone() for name, weight in model._network.named_parameters()}
    vectors, state = model.embed(WORDS), torch.get_rng_state()
    assert not model.has_adapter
    result = model.tune(PROMPTS, ANSWERS, PROMPTS[:2], ANSWERS[:2], evals_per_epoch=3, **QUICK)
    assert model.has_adapter
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], weight) for name, weight in model._network.named_parameters())
    assert torch.equal(model.embed(WORDS), vectors)
    assert result["eval_steps"] == list(range(1, 13)) and result["steps"] == 12
    assert len(result["train_loss"]) == len(result["valid_loss"]) == 12
    assert result["valid_loss"][-1] < 0.8 * result["valid_loss"][0]
    assert result["best_valid_loss"] == min(result["valid_loss"])
    assert min(result["tokens_per_second"].values()) > 0


def test_the_result_depends_on_the_seed_alone(model):
    runs = []
    for seed in (0, 0, 1):
        torch.rand(seed + 5)
        model.tune(PROMPTS, ANSWERS, seed=seed, **QUICK)
        runs.append(model.adapter_state())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


def test_training_stops_when_validation_does_not_improve_and_keeps_the_best(model):
    result = model.tune(
        PROMPTS[:2], ANSWERS[:2], PROMPTS[4:], ANSWERS[4:], patience=2, **{**QUICK, "learning_rate": 0.3, "epochs": 40}
    )
    assert result["steps"] < 40
    assert result["best_step"] == result["eval_steps"][-3]
    pairs = [Pair(*pair) for pair in model._tokens.of_pairs(PROMPTS[4:], ANSWERS[4:], 99)]
    kept = mean_loss(model._adapter.network, pairs, model._tokens.pad)
    assert kept == pytest.approx(result["best_valid_loss"], rel=1e-5)


@pytest.mark.parametrize("killed", [1, 5, 8])
def test_a_killed_training_goes_on_to_the_same_bits(model, monkeypatch, tmp_path, killed):
    settings = {**QUICK, "evals_per_epoch": 2, "save_every": 2}
    data = (PROMPTS, ANSWERS, PROMPTS[:3], ANSWERS[:3])
    whole = model.tune(*data, **settings)
    expected = model.adapter_state()
    step, left = lora._step, [killed]

    def dies(*arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return step(*arguments)

    monkeypatch.setattr(lora, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        model.tune(*data, state_folder=tmp_path / "state", **settings)
    left[0] = whole["steps"] - killed + killed % 2
    resumed = model.tune(*data, state_folder=tmp_path / "state", **settings)
    assert left[0] == 0
    of_this_process = {"seconds": 0, "tokens_per_second": None}
    assert resumed | of_this_process == whole | of_this_process
    assert all(torch.equal(value, expected[name]) for name, value in model.adapter_state().items())
    # a finished training is not done again
    assert model.tune(*data, state_folder=tmp_path / "state", **settings)["steps"] == whole["steps"]
    assert all(torch.equal(value, expected[name]) for name, value in model.adapter_state().items())


def test_a_state_of_other_data_or_a_damaged_one_is_not_taken_up(model, tmp_path, caplog):
    folder = tmp_path / "state"
    model.tune(PROMPTS, ANSWERS, state_folder=folder, **QUICK)
    first = model.adapter_state()
    model.tune(PROMPTS, ANSWERS[::-1], state_folder=folder, **QUICK)
    assert "state of another training" in caplog.text
    [tensors] = folder.glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-9])
    model.tune(PROMPTS, ANSWERS[::-1], state_folder=folder, **QUICK)
    assert "starts anew" in caplog.text
    model.tune(PROMPTS, ANSWERS, state_folder=folder, **QUICK)
    assert all(torch.equal(value, first[name]) for name, value in model.adapter_state().items())


def test_a_step_in_pieces_is_the_same_step(model):
    states = []
    for tokens in (4096, 40):
        model.tune(PROMPTS, ANSWERS, tokens_at_once=tokens, **{**QUICK, "batch_size": 6, "dropout": 0.0, "epochs": 1})
        states.append(model.adapter_state())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-3, atol=1e-4)


def test_nothing_to_train_on_and_a_loss_that_explodes_are_told(model):
    with pytest.raises(ValueError, match="no training pairs"):
        model.tune([], [], **QUICK)
    with pytest.raises(ValueError, match="6 prompts, but 5 answers"):
        model.tune(PROMPTS, ANSWERS[:5], **QUICK)
    # RecBole switches anomaly detection on for the whole process, which would raise first, in other words
    with torch.autograd.set_detect_anomaly(True), pytest.raises(FloatingPointError, match="learning_rate"):
        model.tune(PROMPTS, ANSWERS, **{**QUICK, "learning_rate": 1e30, "warmup_steps": 0})


# adapters


def test_lora_targets_come_from_the_names_of_the_modules():
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    assert lora_targets(BertModel(BertConfig(vocab_size=9, **small))) == ["query", "value"]
    assert lora_targets(GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=16, n_layer=1, n_head=2))) == ["c_attn"]
    t5 = T5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    assert lora_targets(T5ForConditionalGeneration(t5)) == ["q", "v"]
    assert lora_targets(torch.nn.Sequential(torch.nn.Linear(2, 2))) == "all-linear"


def test_a_saved_adapter_opens_in_peft_and_changes_the_logits(tuned, tiny_lm, tmp_path):
    tuned.save_adapter(tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tiny_lm)
    ids = torch.tensor(tuned._tokens.of(PROMPTS[:1]))
    before = plain(ids).logits
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert (adapted(ids).logits - before).abs().max() > 0.1
    torch.testing.assert_close(adapted(ids).logits, tuned._adapter.network(ids).logits)
    torch.testing.assert_close(adapted(ids).logits, tuned._writer()(ids).logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_was_saved_wrongly_is_found_out(tuned, tmp_path, monkeypatch):
    network = tuned._plain()
    monkeypatch.setattr(lm.Adapter, "read", staticmethod(lambda plain, folder: network))
    with pytest.raises(RuntimeError, match="does not change the model as it should"):
        tuned.save_adapter(tmp_path / "adapter")


def test_an_adapter_state_brings_a_fresh_model_to_the_same_answers(tuned, model):
    assert model.generate(PROMPTS, progress=False) != tuned.generate(PROMPTS, progress=False)
    model.load_adapter_state(tuned.adapter_state())
    assert model.generate(PROMPTS, progress=False) == tuned.generate(PROMPTS, progress=False)
    model.drop_adapter()
    assert not model.has_adapter
    with pytest.raises(ValueError, match="has no adapter"):
        model.adapter_state()


def test_an_adapter_that_does_not_fit_or_does_nothing_is_refused(tuned, tiny_lm, tmp_path, model):
    state = tuned.adapter_state()
    with pytest.raises(ValueError, match="another model"):
        gpt2(tiny_lm, tmp_path / "gpt2").load_adapter_state(state)
    silent = {name: torch.zeros_like(value) if "lora_B" in name else value for name, value in state.items()}
    with pytest.raises(ValueError, match="changes nothing"):
        model.load_adapter_state(silent)
    with pytest.raises(ValueError, match="no LoRA adapter"):
        model.load_adapter_state({"weight": torch.ones(2)})


# writing


def test_prompts_are_read_without_a_graph(model, monkeypatch):
    read, seen = decoding.Reading._read, []
    monkeypatch.setattr(
        decoding.Reading, "_read", lambda *args: seen.append(torch.is_inference_mode_enabled()) or read(*args)
    )
    model.generate(PROMPTS, max_new_tokens=2, progress=False)
    assert seen and all(seen)


def test_it_writes_the_learnt_titles_and_stops_behind_them(tuned):
    expected = [answer.rstrip("\n") for answer in ANSWERS]
    assert tuned.generate(PROMPTS, progress=False) == expected
    assert tuned.generate(PROMPTS, beams=3, progress=False) == expected


@pytest.mark.parametrize("make", ["llama", "gpt2"])
def test_what_is_written_does_not_depend_on_batches_order_or_shared_beginnings(model, tiny_lm, tmp_path, make):
    if make == "gpt2":
        model = gpt2(tiny_lm, tmp_path / "gpt2")
    prompts = [f"The same words first. {text}" for text in ("a", "something longer", "the in", "x" * 40, "", "a")]
    alone = [model.generate([prompt], max_new_tokens=12, progress=False)[0] for prompt in prompts]
    assert len(set(alone)) > 3
    for settings in ({}, {"tokens_per_batch": 1}, {"tokens_per_batch": 60}, {"prefix": "The same"}):
        assert model.generate(prompts, max_new_tokens=12, progress=False, **settings) == alone
        assert model.generate(prompts[::-1], max_new_tokens=12, progress=False, **settings) == alone[::-1]


@pytest.mark.parametrize("beams", [1, 2, 4])
@pytest.mark.parametrize("allowed", [None, ['"red"\n', '"red in 0"\n', '"reddish thing"\n', '"blue"\n', '"the in"\n']])
@pytest.mark.parametrize("make", ["llama", "gpt2"])
def test_it_writes_what_hugging_face_writes(model, tiny_lm, tmp_path, monkeypatch, beams, allowed, make):
    if make == "gpt2":
        model = gpt2(tiny_lm, tmp_path / "gpt2")
    prompts = [f"Words. {text}" for text in ("a", "something longer", "the in", "x" * 40, "", "q w e", '"a" and "b')]
    how = {"beams": beams, "max_new_tokens": 14, "progress": False}
    how |= {"allowed": model.answer_tokens(allowed)} if allowed else {}
    ours = model.generate(prompts, **how)
    monkeypatch.setattr(decoding, "shared_cache", lambda *_: None)
    theirs = model.generate(prompts, **how)
    assert ours == theirs and len(set(ours)) > 1


def test_beams_of_a_tuned_model_end_as_hugging_faces_do(tuned, monkeypatch):
    """Its answers end after tokens of different numbers, so beams finish and are overtaken."""
    prompts = [*PROMPTS, "never heard of", "red"]
    ours = tuned.generate(prompts, beams=4, progress=False)
    monkeypatch.setattr(decoding, "shared_cache", lambda *_: None)
    assert tuned.generate(prompts, beams=4, progress=False) == ours


def test_what_is_asked_again_is_answered_once(model, monkeypatch):
    sizes, read = [], decoding.Reading
    monkeypatch.setattr(
        decoding, "Reading", lambda network, rows, *rest: sizes.append(len(rows)) or read(network, rows, *rest)
    )
    texts = model.generate(["a", "b", "a", "a"], max_new_tokens=5, progress=False)
    assert sizes == [2] and texts[0] == texts[2] == texts[3] != texts[1]


def test_a_beginning_is_read_once_for_all_calls(model, monkeypatch):
    read, cache = [], decoding.shared_cache
    monkeypatch.setattr(
        decoding, "shared_cache", lambda network, tokens, device: read.append(tokens) or cache(network, tokens, device)
    )
    model._read = None
    for texts in (["Say a", "Say b"], ["Say c", "Say dd"], ["Tell e", "Tell f"]):
        model.generate(texts, max_new_tokens=4, progress=False)
    assert len(read) == 2


@pytest.mark.parametrize("beams", [1, 4])
def test_a_prompt_is_read_once_whatever_the_beams(model, monkeypatch, beams):
    read = []
    network = model._writer()
    forward = network.forward

    def counting(input_ids, attention_mask=None, position_ids=None, logits_to_keep=0, **rest):
        read.append(input_ids.shape)
        rest |= {"attention_mask": attention_mask, "position_ids": position_ids, "logits_to_keep": logits_to_keep}
        return forward(input_ids=input_ids, **rest)

    monkeypatch.setattr(network, "forward", counting)
    model._read = None
    model.generate(["Say something about a", "Say something about bb"], max_new_tokens=6, beams=beams, progress=False)
    assert read[0][0] == 1 and read[1][0] == 2  # what both begin with, then the rest of each
    assert all(width == 1 and rows <= 2 * beams for rows, width in read[2:])


def test_finished_rows_are_not_computed_any_more(tuned, monkeypatch):
    sizes = []
    network = tuned._writer()
    forward = network.forward

    def counting(input_ids, attention_mask=None, position_ids=None, logits_to_keep=0, **rest):
        sizes.append(len(input_ids))
        rest |= {"attention_mask": attention_mask, "position_ids": position_ids, "logits_to_keep": logits_to_keep}
        return forward(input_ids=input_ids, **rest)

    monkeypatch.setattr(network, "forward", counting)
    tuned._read = None
    tuned.generate(PROMPTS, max_new_tokens=64, progress=False)
    # one row for the shared beginning, then all of them, fewer as they end, and none after the last end
    assert sizes[:2] == [1, 6] and sizes[2:] == sorted(sizes[2:], reverse=True) and sizes[-1] < 6
    assert len(sizes) < 20


@pytest.mark.parametrize("beams", [1, 3])
def test_a_trie_allows_nothing_else_and_lets_the_likelier_answer_win(tuned, beams):
    allowed = ['"red in 0"\n', '"red in 0 again"\n', '"unheard of"\n']
    texts = tuned.generate(PROMPTS, beams=beams, allowed=tuned.answer_tokens(allowed), progress=False)
    assert set(texts) <= set(allowed)
    assert texts[0] == allowed[0]


def test_a_repetition_penalty_of_the_checkpoint_has_no_say(tiny_lm, tmp_path, model):
    folder = shutil.copytree(tiny_lm, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"repetition_penalty": 9.0, "do_sample": true, "eos_token_id": 0}')
    other = LanguageModel.load(str(folder))
    for beams in (1, 2):
        assert other.generate(["a"], beams=beams, progress=False) == model.generate(["a"], beams=beams, progress=False)
    assert model.generate([]) == []


# vectors


def test_a_causal_vector_is_the_last_state_at_the_last_token_whatever_stands_beside_it(model, tiny_lm):
    texts = ["Alien", "a", "The quite long title of a film", "Alien", ""]
    vectors = model.embed(texts, batch_size=3)
    assert vectors.shape == (5, model.width) and vectors.dtype == torch.float32
    network = AutoModelForCausalLM.from_pretrained(tiny_lm)
    for text, vector in zip(texts[:3], vectors, strict=False):
        states = network(torch.tensor(model._tokens.of([text])), output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(vector, states[0, -1], rtol=1e-4, atol=1e-5)
    assert torch.equal(vectors[0], vectors[3])
    torch.testing.assert_close(model.embed(["a"])[0], vectors[1], rtol=1e-4, atol=1e-5)
    assert vectors[4].isfinite().all() and model.embed([]).shape == (0, model.width)


def test_an_encoder_gives_the_mean_over_tokens_with_length_one_and_cannot_write(tiny_lm, tmp_path):
    model = bert(tiny_lm, tmp_path / "bert")
    texts = ["Alien", "The quite long title"]
    network = AutoModel.from_pretrained(tmp_path / "bert")
    for text, vector in zip(texts, model.embed(texts), strict=True):
        states = network(torch.tensor(model._tokens.of([text]))).last_hidden_state[0]
        torch.testing.assert_close(vector, functional.normalize(states.mean(0), dim=0), rtol=1e-4, atol=1e-5)
    (tmp_path / "bert" / "1_Pooling").mkdir()
    (tmp_path / "bert" / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    first = LanguageModel.load(str(tmp_path / "bert")).embed(texts[:1])[0]
    states = network(torch.tensor(model._tokens.of(texts[:1]))).last_hidden_state[0]
    torch.testing.assert_close(first, functional.normalize(states[0], dim=0), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"llm=.*text encoder and cannot be tuned"):
        model.tune(PROMPTS, ANSWERS)
    with pytest.raises(ValueError, match="cannot be asked to write"):
        model.generate(PROMPTS)


# the rest


def test_the_padding_mask_never_looks_at_the_tokens():
    ids, mask = padded([[0, 0, 5], [0]], 0, "cpu", left=True)
    assert ids.tolist() == [[0, 0, 5], [0, 0, 0]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_copy_of_a_recommender_shares_its_language_model(model):
    assert copy.deepcopy({"lm": model})["lm"] is model


def test_the_digest_is_that_of_the_files(model, tiny_lm, tmp_path):
    folder = shutil.copytree(tiny_lm, tmp_path / "model")
    assert LanguageModel.load(str(folder)).digest == model.digest
    weights = folder / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[-1] ^= 1
    weights.write_bytes(bytes(whole))
    assert LanguageModel.load(str(folder)).digest != model.digest


def test_bfloat16_is_for_tuning_and_writing_only(model, tiny_lm):
    half = LanguageModel.load(str(tiny_lm), dtype="bfloat16")
    half.tune(PROMPTS, ANSWERS, PROMPTS, ANSWERS, patience=99, **{**QUICK, "epochs": 40, "dropout": 0.0})
    assert {weight.dtype for weight in half._writer().parameters()} == {torch.bfloat16}
    assert half.generate(PROMPTS[:2], progress=False) == [answer.rstrip("\n") for answer in ANSWERS[:2]]
    assert torch.equal(half.embed(WORDS), model.embed(WORDS))


def test_a_twin_shares_what_it_need_not_change(model):
    same, half = twin(model._network, torch.float32), twin(model._network, torch.bfloat16)
    for a, b in zip(model._network.parameters(), same.parameters(), strict=True):
        assert a is b
    assert all(buffer.dtype == torch.float32 for buffer in half.buffers())
    assert half.lm_head.weight is half.model.embed_tokens.weight


def test_auto_means_bfloat16_only_where_the_hardware_multiplies_in_it(monkeypatch):
    cpu = torch.device("cpu")
    for test in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, test, lambda: False, raising=False)
    assert working_dtype("auto", cpu) == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert working_dtype("auto", cpu) == torch.bfloat16
    assert working_dtype("float32", cpu) == torch.float32
    with pytest.raises(ValueError, match="llm_dtype=half"):
        working_dtype("half", cpu)


def test_an_encoder_decoder_is_refused_in_words(tmp_path):
    config = T5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"llm=.*t5: is an encoder-decoder model"):
        LanguageModel.load(str(tmp_path / "t5"))


# the real ones


@pytest.fixture(scope="module")
def smol() -> LanguageModel:
    return LanguageModel.load("HuggingFaceTB/SmolLM2-135M-Instruct", dtype="float32")


@pytest.mark.slow
def test_the_real_model_learns_to_answer_in_form_and_is_itself_again_when_it_embeds(smol):
    assert smol.width == 576 and "4-bit" in smol.provenance and smol._tokens.pad == smol._tokens.end
    films = ["Toy Story", "Jumanji", "Heat", "Casino", "Babe", "Seven", "Fargo", "Twister"]
    prompts = [f'### Input:\nWatched: "{film}"\n\n### Response:\n' for film in films]
    answers = [f'"{film}"\n' for film in films[1:] + films[:1]]
    vectors = smol.embed(films)
    assert (smol.embed(films[:1])[0] - vectors[0]).abs().max() < 1e-3 * vectors.abs().max()
    free = smol.generate(prompts, max_new_tokens=12, progress=False)
    result = smol.tune(prompts, answers, prompts, answers, learning_rate=3e-3, epochs=6, batch_size=4, warmup_steps=2)
    assert result["valid_loss"][-1] < 0.5 * result["valid_loss"][0]
    texts = smol.generate(prompts, max_new_tokens=12, progress=False)
    assert texts != free
    assert sum(text.startswith('"') and text.endswith('"') and len(text) > 3 for text in texts) >= 7
    assert torch.equal(smol.embed(films), vectors)


@pytest.mark.slow
def test_the_real_encoder_knows_what_is_near():
    model = LanguageModel.load("sentence-transformers/all-MiniLM-L6-v2")
    assert model.width == 384 and not model.causal
    first, second, third = model.embed(["a movie about space aliens", "film with extraterrestrials", "cooking pasta"])
    assert first.norm().item() == pytest.approx(1, abs=1e-5)
    assert first @ second > 0.5 > first @ third
