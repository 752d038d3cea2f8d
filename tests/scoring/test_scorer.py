"""One score per row in any batch; only real reward models load; a file is scored once, also after a kill."""

import copy
import csv
import gzip
import itertools
import json
import logging
import os
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from inform_rm import InfoRMConfig, InfoRMForSequenceClassification
from inform_rm.data.encoding import encode
from inform_rm.data.response_rows import score_rows_or_faults
from inform_rm.errors import InputError
from inform_rm.scoring.reward_models import fingerprint_model, fingerprint_tokenizer, load_reward_model
from inform_rm.scoring.score_files import _FinishedRewards, score_file
from inform_rm.scoring.scorer import NonFiniteRewardError, RewardScorer

MODELS = ("inform", "inform_standard", "llama", "mistral", "qwen2", "gpt_neox", "gpt2")
VOCABULARY = 320


@pytest.fixture(scope="module")
def models(backbone_configs):
    """Reward models with rewards of order 1: an initial std of 0.02 would make every comparison pass."""

    def build(name):
        torch.manual_seed(1)
        if name.startswith("inform"):
            architecture = "standard" if name == "inform_standard" else "inform"
            config = InfoRMConfig(text_config=backbone_configs["llama"], latent_dim=8, architecture=architecture)
            model = InfoRMForSequenceClassification(config)
        else:
            config = type(backbone_configs[name])(**{**backbone_configs[name].to_dict(), "num_labels": 1})
            config.dtype = torch.float32
            model = AutoModelForSequenceClassification.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        return model.eval()

    return {name: build(name) for name in MODELS}


@pytest.fixture(scope="module")
def reward_dir(models, tokenizer, tmp_path_factory):
    """Folder of a complete InfoRM reward model with tokenizer; read-only."""
    folder = tmp_path_factory.mktemp("reward-model")
    models["inform"].save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scorer(models, tokenizer):
    return RewardScorer(models["inform"], tokenizer, tokens_per_batch=128)


def random_rows(count, seed=0, longest=40):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def alone(model, rows):
    """Rewards from the bare model, one unpadded row at a time: the reference."""
    with torch.no_grad():
        return torch.stack([model(input_ids=torch.tensor([row])).logits[0, 0] for row in rows])


class Calls:
    """Rows and tokens of the batches that a model computes; a packed batch counts the sequences in its one row."""

    def __init__(self, model):
        self.shapes = []
        self.fail_at = None
        self._handle = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module, args, kwargs):
        if self.fail_at is not None and len(self.shapes) == self.fail_at:
            raise KeyboardInterrupt
        rows, tokens = kwargs["input_ids"].shape
        packed = kwargs.get("pooled_positions")
        self.shapes.append((rows if packed is None else len(packed), tokens))

    @property
    def rows(self):
        return sum(shape[0] for shape in self.shapes)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._handle.remove()


# --- one score


# Packed rows of every family: test_packing.py.
@pytest.mark.parametrize(("name", "batching"), [("inform", "packed"), *((name, "padded") for name in MODELS)])
def test_reward_equals_that_of_the_bare_model_on_an_unpadded_row(models, name, batching):
    rows = random_rows(23)
    expected = alone(models[name], rows)
    assert expected.std() > 0.1  # otherwise the comparison shows nothing
    for tokens_per_batch in (1, 100):
        scorer = RewardScorer(models[name], tokens_per_batch=tokens_per_batch, batching=batching)
        rewards = scorer.score_encoded(rows)
        assert scorer.batching == batching
        assert rewards.dtype == torch.float32
        torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ("inform", "mistral"))
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_reward_depends_neither_on_order_nor_on_mates(models, name, data):
    rows = data.draw(
        st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30), min_size=1, max_size=8)
    )
    order = data.draw(st.permutations(range(len(rows))))
    scorer = RewardScorer(models[name], tokens_per_batch=data.draw(st.integers(1, 200)), batching="padded")
    rewards = scorer.score_encoded([rows[index] for index in order])
    torch.testing.assert_close(rewards, alone(models[name], rows)[list(order)], atol=1e-5, rtol=0)


def test_rows_that_end_in_the_padding_token_score_as_alone(models):
    model = models["llama"]
    model.config.pad_token_id = 2
    try:
        rows = [[*row, 2] for row in random_rows(9)]
        for batching in ("packed", "padded"):
            rewards = RewardScorer(model, batching=batching).score_encoded(rows)
            torch.testing.assert_close(rewards, alone(model, rows), atol=1e-5, rtol=0)
    finally:
        model.config.pad_token_id = 0


@pytest.mark.parametrize("pad_id", (None, -1, VOCABULARY))
def test_without_a_usable_padding_token_rows_are_scored_one_at_a_time_with_a_warning(models, caplog, pad_id):
    model = models["llama"]
    rows = random_rows(5)
    expected = alone(model, rows)
    model.config.pad_token_id = pad_id
    try:
        with caplog.at_level(logging.WARNING), Calls(model) as calls:
            rewards = RewardScorer(model, batching="padded").score_encoded(rows)
    finally:
        model.config.pad_token_id = 0
    assert [shape[0] for shape in calls.shapes] == [1] * 5
    assert sum("one at a time" in message for message in caplog.messages) == 1
    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=0)


def test_inform_needs_no_padding_token_for_batches(models):
    model = models["inform"]
    rows = random_rows(5)
    model.config.text_config.pad_token_id, pad_id = None, model.config.text_config.pad_token_id
    try:
        with Calls(model) as calls:
            rewards = RewardScorer(model, batching="padded").score_encoded(rows)
    finally:
        model.config.text_config.pad_token_id = pad_id
    assert len(calls.shapes) == 1
    torch.testing.assert_close(rewards, alone(model, rows), atol=1e-5, rtol=0)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=20), budget=st.integers(1, 300))
def test_batches_keep_the_token_budget_unless_one_row_exceeds_it(models, lengths, budget):
    with Calls(models["inform"]) as calls:
        scorer = RewardScorer(models["inform"], tokens_per_batch=budget, batching="padded")
        scorer.score_encoded([[5] * length for length in lengths])
    assert all(rows * longest <= budget or rows == 1 for rows, longest in calls.shapes)
    assert calls.rows == len(lengths)
    assert [longest for _, longest in calls.shapes] == sorted((shape[1] for shape in calls.shapes), reverse=True)


def test_text_is_scored_as_its_tokens_and_a_text_prompt_as_one_user_message(scorer, tokenizer):
    prompts = ["Name a colour.", [{"role": "user", "content": "Name a colour."}], "How many apples?"]
    rewards = scorer.score(prompts, ["Red.", "Red.", "Seven."])
    expected = scorer.score_encoded(
        [
            encode(tokenizer, "Name a colour.", "Red.").input_ids,
            encode(tokenizer, "How many apples?", "Seven.").input_ids,
        ]
    )
    torch.testing.assert_close(rewards, expected[[0, 0, 1]], atol=1e-6, rtol=0)
    assert rewards[0] != rewards[2]


def test_a_conversation_scores_as_its_last_reply_after_the_turns_before_it(scorer):
    turns = [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "An apple."},
             {"role": "user", "content": "Another."}, {"role": "assistant", "content": "A pear."}]  # fmt: skip
    rewards = scorer.score_messages([turns, turns[:2]])
    assert torch.equal(rewards, scorer.score([turns[:3], "Name a fruit."], ["A pear.", "An apple."]))
    for wrong in (turns[:3], turns[1:2], "An apple."):
        with pytest.raises(InputError, match=r"row 1 .* expected a list of messages that ends with a reply"):
            scorer.score_messages([turns, wrong])
    with pytest.raises(InputError, match=r"row 0 .*role"):
        scorer.score_messages([[{"role": "judge", "content": "1"}]])


@pytest.mark.parametrize("response", (None, float("nan"), [{"role": "assistant", "content": "Blue."}]))
def test_a_response_that_is_no_text_is_refused_with_its_row(scorer, response):
    with pytest.raises(InputError, match=r"row 1 \(counted from 0\): the response is .*; expected its text"):
        scorer.score(["one", "two"], ["red", response])
    with pytest.raises(InputError, match=r"row 0 .*prompt"):
        scorer.score([None], ["red"])


def test_rewards_are_float32_whatever_torch_makes_by_default(models):
    rows = random_rows(3)
    expected = RewardScorer(models["inform"]).score_encoded(rows)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(RewardScorer(models["inform"]).score_encoded(rows), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_no_rows_give_no_rewards(scorer):
    assert scorer.score([], []).shape == (0,)


def test_scoring_leaves_training_mode_and_gradients_as_they_were(models):
    model = models["inform"]
    model.train()  # the head then draws noise, unless scoring switches it off
    model.model.eval()
    try:
        rewards = RewardScorer(model).score_encoded(random_rows(3))
        assert model.training and model.score.training and not model.model.training
    finally:
        model.eval()
    assert not rewards.requires_grad and not rewards.is_inference()
    torch.testing.assert_close(rewards, alone(model, random_rows(3)), atol=1e-5, rtol=0)


def test_uncertainty_matches_the_models_own_draws_and_not_the_batch(models):
    rows = random_rows(7)
    means, stds = RewardScorer(models["inform"]).score_encoded(rows, uncertainty=16)
    for row, mean, std in zip(rows, means, stds, strict=True):
        with torch.no_grad():
            output = models["inform"](input_ids=torch.tensor([row]), reward_samples=16)
        assert mean.item() == pytest.approx(output.logits.item(), abs=1e-5)
        assert std.item() == pytest.approx(output.reward_std.item(), abs=1e-5)
    assert (stds > 0).all()


@pytest.mark.parametrize(
    ("name", "uncertainty", "message"),
    [
        ("llama", 4, "only InfoRM|InfoRM models have"),
        ("inform_standard", 4, "InfoRM models have"),
        ("inform", 1, "at least 2"),
        ("inform", True, "at least 2"),
        ("inform", 2.0, "at least 2"),
    ],
)
def test_uncertainty_that_the_model_cannot_give_is_refused(models, name, uncertainty, message):
    with pytest.raises(InputError, match=message):
        RewardScorer(models[name]).score_encoded([[5]], uncertainty=uncertainty)


def test_a_reward_that_is_not_finite_names_its_row(models):
    model = LlamaForSequenceClassification(LlamaConfig(**{**models["llama"].config.to_dict(), "num_labels": 1}))
    model.load_state_dict(models["llama"].state_dict())
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    with pytest.raises(NonFiniteRewardError, match=r"row 2 \(counted from 0\) has the reward nan"):
        RewardScorer(model.eval()).score_encoded([[5, 6], [8, 9, 10], [6, 7], [5]])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[5], []], "row 1 .* has no tokens"),
        ([[5], [5] * 129], "row 1 .* has 129 tokens; the limit is 128"),
        ([[320]], "token id 320; the model's vocabulary has 320"),
        ([[-1]], "token id -1"),
    ],
)
def test_token_ids_that_the_model_cannot_take_are_refused(scorer, rows, message):
    with pytest.raises(InputError, match=message):
        scorer.score_encoded(rows)


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        ("Hi", ["a"], "got a single text"),
        (["Hi"], "a", "got a single text"),
        (["Hi"], ["a", "b"], "1 prompts for 2 responses"),
        (["Hi", ""], ["a", "b"], "row 1 .*empty"),
        (["Hi", [{"role": "robot", "content": "x"}]], ["a", "b"], "row 1 .*robot"),
        (["Hi", "Long " * 200], ["a", "b"], "row 1 .*tokens; the limit is 128"),
    ],
)
def test_wrong_rows_of_text_are_refused_by_row(scorer, prompts, responses, message):
    with pytest.raises(InputError, match=message):
        scorer.score(prompts, responses)


def test_max_length_can_be_lowered(models):
    RewardScorer(models["inform"], max_length=4).score_encoded([[5] * 4])
    with pytest.raises(InputError, match="has 5 tokens; the limit is 4"):
        RewardScorer(models["inform"], max_length=4).score_encoded([[5] * 5])


def test_a_model_wrapped_by_peft_scores_as_alone(models):
    peft = pytest.importorskip("peft")
    base = LlamaForSequenceClassification(models["llama"].config)
    base.load_state_dict(models["llama"].state_dict())
    wrapped = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False)).eval()
    rows = random_rows(6)
    rewards = RewardScorer(wrapped).score_encoded(rows)
    torch.testing.assert_close(rewards, alone(wrapped, rows), atol=1e-5, rtol=0)
    assert (rewards - alone(models["llama"], rows)).abs().max() > 1e-3


# --- loading


def test_a_folder_loads_without_remote_code_and_scores_as_the_model_in_memory(reward_dir, models, tokenizer):
    scorer = RewardScorer(reward_dir)
    assert type(scorer.model) is InfoRMForSequenceClassification and not scorer.model.training
    in_memory = RewardScorer(models["inform"], tokenizer)
    arguments = ["Name a colour."] * 2, ["Red.", "Blue, I think."]
    torch.testing.assert_close(scorer.score(*arguments), in_memory.score(*arguments), atol=1e-6, rtol=0)
    assert scorer.identity() == in_memory.identity()


def test_another_architectures_folder_loads_too(models, tokenizer, tmp_path):
    models["mistral"].save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = random_rows(4)
    rewards = RewardScorer(tmp_path).score_encoded(rows)
    torch.testing.assert_close(rewards, alone(models["mistral"], rows), atol=1e-5, rtol=0)


def test_half_precision_checkpoints_are_computed_in_float32_on_a_cpu_unless_asked(models, tmp_path):
    # A copy: saving writes the float type into the config, which other tests build models from.
    copy.deepcopy(models["llama"]).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_reward_model(tmp_path, device="cpu").dtype == torch.float32
    assert load_reward_model(tmp_path, dtype="auto", device="cpu").dtype == torch.bfloat16
    assert load_reward_model(tmp_path, dtype="bfloat16", device="cpu").dtype == torch.bfloat16


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def make_causal_lm(folder, models):
    AutoModelForCausalLM.from_config(models["llama"].config).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for key in ("id2label", "label2id"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))


def make_causal_lm_that_claims_one_label(folder, models):
    AutoModelForCausalLM.from_config(models["llama"].config).save_pretrained(folder)


def make_classifier(folder, models):
    config = LlamaConfig(**{**models["llama"].config.to_dict(), "id2label": None, "label2id": None, "num_labels": 3})
    LlamaForSequenceClassification(config).save_pretrained(folder)


def make_head_of_another_shape(folder, models):
    models["llama"].save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] = torch.zeros(2, 32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def make_missing_layer(folder, models):
    models["llama"].save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in weights.items() if "layers.1." not in key}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip


def make_pickle(folder, models):
    models["llama"].save_pretrained(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def make_truncated_weights(folder, models):
    models["llama"].save_pretrained(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def make_missing_shard(folder, models):
    models["llama"].save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("model-*.safetensors"))[0].unlink()


def make_no_weights(folder, models):
    models["llama"].config.save_pretrained(folder)


def make_adapter(folder, models):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x/y"}')


def make_adapter_inside_a_model(folder, models):
    peft = pytest.importorskip("peft")
    models["llama"].save_pretrained(folder)
    base = LlamaForSequenceClassification.from_pretrained(folder)
    peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", r=2)).save_pretrained(folder)


def make_broken_config(folder, models):
    models["llama"].save_pretrained(folder)
    (folder / "config.json").write_text("{")


def make_unknown_type(folder, models):
    models["llama"].save_pretrained(folder)
    edit_config(folder, model_type="never_heard_of")


def make_remote_code(folder, models):
    models["llama"].save_pretrained(folder)
    edit_config(folder, model_type="custom", auto_map={"AutoConfig": "configuration_custom.CustomConfig"})
    (folder / "configuration_custom.py").write_text("raise SystemExit('ran remote code')")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_causal_lm, "num_labels=2 .*LlamaForCausalLM.*not a reward model"),
        (make_causal_lm_that_claims_one_label, "not complete: 1 weights .*score.weight"),
        (make_classifier, "num_labels=3 .*several classes"),
        (make_head_of_another_shape, "not complete: 1 weights .*score.weight"),
        (make_missing_layer, "not complete: 9 weights .*layers.1"),
        (make_pickle, r"only pickled weights \(pytorch_model.bin\)"),
        (make_truncated_weights, "incomplete or broken"),
        (make_missing_shard, "cannot load .*model-00001"),
        (make_no_weights, "no \\*.safetensors"),
        (make_adapter, "PEFT adapter"),
        (make_adapter_inside_a_model, "PEFT adapter"),
        (make_broken_config, "cannot load .*config.json"),
        (make_unknown_type, "never_heard_of"),
        (make_remote_code, "trust_remote_code and a pinned revision"),
        (lambda folder, models: None, "no config.json"),
    ],
)  # fmt: skip
def test_what_is_no_reward_model_is_refused(models, tmp_path, make, message):
    make(tmp_path, models)
    with pytest.raises(InputError, match=message):
        load_reward_model(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "./not-there"}, "is not a folder"),
        ({"model": "/etc/hostname"}, "is not a folder"),
        ({"model": " "}, "empty name"),
        ({"dtype": "int8"}, "'int8' is not a float type"),
        ({"dtype": "nonsense"}, "not a float type"),
        ({"device": "toaster"}, "'toaster' is not a device"),
        ({"max_length": 0}, "max_length: 0"),
        ({"tokens_per_batch": "8k"}, "tokens_per_batch: '8k'"),
    ],
)
def test_wrong_arguments_are_refused(reward_dir, options, message):
    with pytest.raises(InputError, match=message):
        RewardScorer(**{"model": reward_dir, **options})


def test_missing_tokenizer_is_refused(models, tmp_path):
    models["inform"].save_pretrained(tmp_path)
    with pytest.raises(InputError, match="tokenizer"):
        RewardScorer(tmp_path)


def test_tokenizer_with_more_ids_than_the_model_is_refused(backbone_configs, tokenizer, tmp_path):
    config = LlamaConfig(**{**backbone_configs["llama"].to_dict(), "vocab_size": 300, "num_labels": 1})
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="300"):
        RewardScorer(tmp_path)


def test_a_loaded_model_takes_no_loading_options_and_needs_a_tokenizer_for_text(models):
    with pytest.raises(InputError, match="dtype applies to a model named by folder"):
        RewardScorer(models["inform"], dtype="float32")
    with pytest.raises(InputError, match="Pass tokenizer"):
        RewardScorer(models["inform"]).score(["a"], ["b"])
    three = LlamaForSequenceClassification(LlamaConfig(**{**models["llama"].config.to_dict(), "num_labels": 3}))
    with pytest.raises(InputError, match="num_labels is 3"):
        RewardScorer(three)


def test_remote_code_without_a_pinned_revision_warns(monkeypatch, caplog):
    monkeypatch.setattr(
        "inform_rm.scoring.reward_models.AutoConfig.from_pretrained",
        lambda *args, **kwargs: (_ for _ in ()).throw(OSError("x")),
    )
    with caplog.at_level(logging.WARNING):
        for revision in (None, "c0ffee" * 6 + "c0ff"):
            with pytest.raises(InputError, match="cannot load some/model: there is no such folder"):
                load_reward_model("some/model", trust_remote_code=True, revision=revision)
    assert sum("runs whatever code" in message for message in caplog.messages) == 1


def test_fingerprints_see_every_weight_and_the_chat_template(models, reward_dir, tokenizer):
    model = load_reward_model(reward_dir)
    before = fingerprint_model(model)
    assert before == fingerprint_model(models["inform"])
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-3
    assert fingerprint_model(model) != before
    other = RewardScorer(reward_dir, chat_template="plain").tokenizer
    assert fingerprint_tokenizer(other) != fingerprint_tokenizer(tokenizer)


def test_a_call_that_pads_does_not_change_a_tokenizers_fingerprint(reward_dir):
    tokenizer = RewardScorer(reward_dir).tokenizer
    before = fingerprint_tokenizer(tokenizer)
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=3)
    assert fingerprint_tokenizer(tokenizer) == before


# --- files


def row(index):
    prompt = (
        "Name a colour." if index % 2 else [{"role": "user", "content": "Name a fruit, please. " * (index % 5 + 1)}]
    )
    return {"prompt": prompt, "response": f"The {'apple ' * (index % 4)}is {index}.", "id": index, "note": "é"}


def write_jsonl(path, rows):
    text = "".join(json.dumps(item) + "\n" for item in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files_of(folder):
    return sorted(path.name for path in folder.iterdir())


def test_file_keeps_rows_order_and_fields_and_adds_the_reward(scorer, tmp_path):
    rows = [row(index) for index in range(30)]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    summary = score_file(scorer, source, tmp_path / "out.jsonl", chunk_rows=7, progress=False)
    assert summary == {
        "output": str(tmp_path / "out.jsonl"), "rows": 30, "resumed_rows": 0, "bad_rows": 0,
        "not_as_written": {"n": 0, "examples": []},
    }  # fmt: skip
    written = read_jsonl(tmp_path / "out.jsonl")
    assert [{key: value for key, value in item.items() if key != "reward"} for item in written] == rows
    expected = scorer.score([item["prompt"] for item in rows], [item["response"] for item in rows])
    torch.testing.assert_close(torch.tensor([item["reward"] for item in written]), expected, atol=1e-5, rtol=0)
    assert files_of(tmp_path) == ["in.jsonl", "out.jsonl"]


def test_every_format_gives_the_same_rewards(scorer, tmp_path):
    rows = [{"prompt": f"How many apples? {index}", "response": 'There are "7",\nI think.'} for index in range(5)]
    rows[3]["prompt"] = [{"role": "user", "content": "Hello"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl.gz", rows)
    with (tmp_path / "c.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "response"])
        for item in rows:
            prompt = item["prompt"] if isinstance(item["prompt"], str) else json.dumps(item["prompt"])
            writer.writerow([prompt, item["response"]])
    texts = [{"role": "user", "content": item["prompt"]} if isinstance(item["prompt"], str) else item["prompt"][0]
             for item in rows]  # fmt: skip
    pq.write_table(
        pa.table({"prompt": [[text] for text in texts], "response": [item["response"] for item in rows]}),
        tmp_path / "d.parquet",
    )
    rewards = []
    for source in (*(tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.csv", "d.parquet")), rows):
        score_file(scorer, source, tmp_path / "out.jsonl", progress=False)
        rewards.append([item["reward"] for item in read_jsonl(tmp_path / "out.jsonl")])
    assert all(part == rewards[0] for part in rewards[1:])
    assert len(set(rewards[0])) == 5


def test_file_with_uncertainty_adds_the_standard_deviation(scorer, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [row(index) for index in range(3)])
    score_file(scorer, source, tmp_path / "out.jsonl", uncertainty=4, progress=False)
    items = [row(index) for index in range(3)]
    means, stds = scorer.score([item["prompt"] for item in items], [item["response"] for item in items], uncertainty=4)
    for item, mean, std in zip(read_jsonl(tmp_path / "out.jsonl"), means, stds, strict=True):
        assert item["reward"] == pytest.approx(mean.item(), abs=1e-5)
        assert item["reward_std"] == pytest.approx(std.item(), abs=1e-5)


def test_interrupted_file_is_finished_without_scoring_a_row_twice(scorer, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [row(index) for index in range(30)])
    score_file(scorer, source, tmp_path / "whole.jsonl", chunk_rows=8, progress=False)
    with Calls(scorer.model) as calls:
        calls.fail_at = 6
        with pytest.raises(KeyboardInterrupt):
            score_file(scorer, source, tmp_path / "out.jsonl", chunk_rows=8, progress=False)
        done = calls.rows
        assert not (tmp_path / "out.jsonl").exists()
        calls.fail_at = None
        summary = score_file(scorer, source, tmp_path / "out.jsonl", chunk_rows=8, progress=False)
        assert calls.rows == 30
    assert summary["resumed_rows"] == done
    # Rows of an interrupted chunk meet other batch mates: equal to the precision promised, not to the last bit.
    whole, resumed = read_jsonl(tmp_path / "whole.jsonl"), read_jsonl(tmp_path / "out.jsonl")
    assert [item["id"] for item in resumed] == list(range(30))
    for one, other in zip(whole, resumed, strict=True):
        assert other["reward"] == pytest.approx(one["reward"], abs=1e-5)
    assert files_of(tmp_path) == ["in.jsonl", "out.jsonl", "whole.jsonl"]


def test_a_killed_process_loses_no_finished_batch(reward_dir, tmp_path, exit_code_of_fork):
    source, output = write_jsonl(tmp_path / "in.jsonl", [row(index) for index in range(30)]), tmp_path / "out.jsonl"

    def killed_run():
        scorer = RewardScorer(reward_dir, tokens_per_batch=128)
        calls = itertools.count(1)

        def count(*_):
            if next(calls) == 6:
                os.kill(os.getpid(), signal.SIGKILL)

        scorer.model.register_forward_pre_hook(count)
        score_file(scorer, source, output, chunk_rows=8, progress=False)

    assert exit_code_of_fork(killed_run) == -signal.SIGKILL
    assert not output.exists()
    partial = tmp_path / "out.jsonl.partial"
    partial.write_bytes(partial.read_bytes() + b'{"prompt": "half a li')  # as if the kill had come in a write
    scorer = RewardScorer(reward_dir, tokens_per_batch=128)
    with Calls(scorer.model) as calls:
        summary = score_file(scorer, source, output, chunk_rows=8, progress=False)
    assert summary["resumed_rows"] >= 5  # five batches were finished
    assert calls.rows == 30 - summary["resumed_rows"]
    items = [row(index) for index in range(30)]
    expected = scorer.score([item["prompt"] for item in items], [item["response"] for item in items])
    written = read_jsonl(output)
    assert [item["id"] for item in written] == list(range(30))
    torch.testing.assert_close(torch.tensor([item["reward"] for item in written]), expected, atol=1e-5, rtol=0)


@pytest.fixture
def unfinished(scorer, tmp_path):
    """``in.jsonl`` and an interrupted run on it."""
    source = write_jsonl(tmp_path / "in.jsonl", [row(index) for index in range(20)])
    with Calls(scorer.model) as calls:
        calls.fail_at = 4
        with pytest.raises(KeyboardInterrupt):
            score_file(scorer, source, tmp_path / "out.jsonl", chunk_rows=8, progress=False)
    return source


def other_tokenizer(tokenizer):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = changed.chat_template.replace("</s>", "")
    return changed


def test_resuming_refuses_another_model_or_setting_by_name_and_the_way_out_works(
    scorer, models, tokenizer, unfinished, tmp_path
):
    output = tmp_path / "out.jsonl"
    half = copy.deepcopy(models["inform"]).to(torch.bfloat16)
    for changed, options, message in (
        (scorer, {"uncertainty": 4}, "uncertainty was None, is 4"),
        (RewardScorer(models["llama"], tokenizer), {}, "model was"),
        (RewardScorer(models["inform"], other_tokenizer(tokenizer)), {}, "tokenizer was"),
        (RewardScorer(half, tokenizer), {}, "dtype was 'float32', is 'bfloat16'"),
    ):
        with pytest.raises(InputError, match=rf"other settings: .*{message}.*Delete .*out.jsonl.partial to start"):
            score_file(changed, unfinished, output, progress=False, **options)
        assert score_file(changed, unfinished, tmp_path / "new.jsonl", progress=False, **options)["rows"] == 20
    (tmp_path / "out.jsonl.partial").unlink()
    assert score_file(scorer, unfinished, output, uncertainty=4, progress=False)["resumed_rows"] == 0


def test_finished_rewards_stay_usable_when_the_input_is_mended(scorer, unfinished, tmp_path):
    finished = len((tmp_path / "out.jsonl.partial").read_text().splitlines()) - 1
    assert 0 < finished < 20
    # One row is corrected, one removed, one added, and the order is another.
    rows = [row(77), *(row(index) for index in range(18)), {**row(19), "response": "Corrected."}][::-1]
    write_jsonl(unfinished, rows)
    with Calls(scorer.model) as calls:
        summary = score_file(scorer, unfinished, tmp_path / "out.jsonl", chunk_rows=8, progress=False)
    assert finished - 2 <= summary["resumed_rows"] <= finished  # what changed may have been among them
    assert calls.rows == len(rows) - summary["resumed_rows"]
    written = read_jsonl(tmp_path / "out.jsonl")
    expected = scorer.score([item["prompt"] for item in rows], [item["response"] for item in rows])
    assert [item["id"] for item in written] == [item["id"] for item in rows]
    torch.testing.assert_close(torch.tensor([item["reward"] for item in written]), expected, atol=1e-5, rtol=0)
    assert files_of(tmp_path) == ["in.jsonl", "out.jsonl"]


def test_finished_rewards_stay_usable_under_another_max_length(models, tokenizer, unfinished, tmp_path):
    finished = len((tmp_path / "out.jsonl.partial").read_text().splitlines()) - 1
    write_jsonl(unfinished, [*(row(index) for index in range(20)), {"prompt": "Hi", "response": "xq" * 52}])
    short, long = (RewardScorer(models["inform"], tokenizer, max_length=length) for length in (100, 128))
    with pytest.raises(InputError, match=r"1 of 21 rows cannot .*row 21 has 1\d\d tokens; the limit is 100"):
        score_file(short, unfinished, tmp_path / "out.jsonl", progress=False)
    assert score_file(long, unfinished, tmp_path / "out.jsonl", progress=False)["resumed_rows"] == finished


def test_finished_rewards_are_found_by_all_of_their_key():
    high, low = 3 << 64, 7
    found = _FinishedRewards([(high | low, 0.5, 0.25), (high | 8, 1.5, float("nan")), (5, -1.0, 2.0)])
    # Of two keys that share their first half one is found; the other is computed again, never mistaken.
    keys = [5, high | low, 6, high | 9, (1 << 128) - 1, 5]
    assert found.find(keys) == {0: (-1.0, 2.0), 1: (0.5, 0.25), 5: (-1.0, 2.0)}
    assert _FinishedRewards([]).find(keys) == {}


BAD_ROWS = {
    "broken JSON": (b"{", "broken JSON"),
    "no response": (b'{"prompt": "a", "note": "kept"}', "no 'response'"),
    "unknown role": (b'{"prompt": [{"role": "boss", "content": "a"}], "response": "b"}', "boss"),
    "too long": (json.dumps({"prompt": "a", "response": "word " * 200}).encode(), "tokens; the limit is 128"),
    "not Unicode": (b'{"prompt": "a", "response": "\\ud800"}', "unpaired surrogate"),
    "a reward already": (b'{"prompt": "a", "response": "b", "reward": 2}', "'reward' already"),
    "an error already": (b'{"prompt": "a", "response": "b", "error": "e"}', "'error' already"),
}


def test_all_faults_are_reported_before_the_first_forward_pass(scorer, tmp_path):
    source = tmp_path / "in.jsonl"
    lines = [content for content, _ in BAD_ROWS.values()]
    source.write_bytes(b"\n".join([json.dumps(row(0)).encode(), *lines, json.dumps(row(1)).encode()]) + b"\n")
    with Calls(scorer.model) as calls, pytest.raises(InputError) as caught:
        score_file(scorer, source, tmp_path / "out.jsonl", chunk_rows=3, progress=False)
    message = str(caught.value)
    # A field "error" is in the way only where faults are written.
    assert "6 of 9 rows cannot be scored" in message and "And 1 more" in message and "on_bad_row='skip'" in message
    for number, (_, fault) in enumerate(list(BAD_ROWS.values())[:5], start=2):
        assert f"in.jsonl, row {number}" in message and fault in message
    assert calls.rows == 0 and files_of(tmp_path) == ["in.jsonl"]


def test_skip_writes_the_fault_of_a_row_in_place_of_its_reward(scorer, tmp_path):
    source = tmp_path / "in.jsonl"
    lines = [content for content, _ in BAD_ROWS.values()]
    source.write_bytes(b"\n".join([json.dumps(row(0)).encode(), *lines, json.dumps(row(1)).encode()]) + b"\n")
    summary = score_file(scorer, source, tmp_path / "out.jsonl", chunk_rows=3, progress=False, on_bad_row="skip")
    assert (summary["rows"], summary["bad_rows"]) == (9, 7)
    first, *bad, last = read_jsonl(tmp_path / "out.jsonl")
    expected = scorer.score([row(0)["prompt"], row(1)["prompt"]], [row(0)["response"], row(1)["response"]])
    assert [first["reward"], last["reward"]] == pytest.approx(expected.tolist(), abs=1e-5)
    assert "error" not in first and "error" not in last
    for number, (item, (_, fault)) in enumerate(zip(bad, BAD_ROWS.values(), strict=True), start=2):
        assert item["reward"] is None and f"row {number}" in item["error"] and fault in item["error"]
    assert bad[1] == {"prompt": "a", "note": "kept", "reward": None, "error": bad[1]["error"]}
    source.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(InputError, match="7 of 7 rows cannot be scored"):
        score_file(scorer, source, tmp_path / "none.jsonl", progress=False, on_bad_row="skip")
    with pytest.raises(InputError, match="on_bad_row: got 'drop'"):
        score_file(scorer, source, tmp_path / "none.jsonl", progress=False, on_bad_row="drop")


@pytest.mark.parametrize("name", ["in.jsonl", "in.csv"])
def test_an_empty_response_is_scored(scorer, tokenizer, name, tmp_path):
    source = tmp_path / name
    if name == "in.csv":
        source.write_text('prompt,response\nHi,\nHi," "\n')
    else:
        write_jsonl(source, [{"prompt": "Hi", "response": text} for text in ("", " ")])
    score_file(scorer, source, tmp_path / "out.jsonl", progress=False)
    expected = scorer.score_encoded([encode(tokenizer, "Hi", text).input_ids for text in ("", " ")])
    rewards = [item["reward"] for item in read_jsonl(tmp_path / "out.jsonl")]
    assert rewards == pytest.approx(expected.tolist(), abs=1e-5) and rewards[0] != rewards[1]


def test_damaged_records_of_an_unfinished_run_are_refused(scorer, unfinished, tmp_path):
    journal = tmp_path / "out.jsonl.partial"
    journal.write_text(journal.read_text() + "\x00\x00\n")
    with pytest.raises(InputError, match=r"is damaged .*Delete"):
        score_file(scorer, unfinished, tmp_path / "out.jsonl", progress=False)
    journal.write_text("something else\n")
    with pytest.raises(InputError, match=r"not the record of an unfinished run.*Delete"):
        score_file(scorer, unfinished, tmp_path / "out.jsonl", progress=False)
    journal.unlink()
    assert score_file(scorer, unfinished, tmp_path / "out.jsonl", progress=False)["resumed_rows"] == 0


def test_a_journal_line_cut_by_a_kill_is_computed_again(scorer, unfinished, tmp_path):
    journal = tmp_path / "out.jsonl.partial"
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) > 1
    journal.write_text("".join(lines[:-1]) + lines[-1][:4])
    score_file(scorer, unfinished, tmp_path / "out.jsonl", chunk_rows=8, progress=False)
    assert len(read_jsonl(tmp_path / "out.jsonl")) == 20


def test_no_more_rows_than_a_chunk_are_held_and_rows_are_read_lazily(scorer, tmp_path, monkeypatch):
    held = []
    iter_scores = scorer.iter_scores
    monkeypatch.setattr(scorer, "iter_scores", lambda rows, *rest: held.append(len(rows)) or iter_scores(rows, *rest))
    source = write_jsonl(tmp_path / "in.jsonl", [row(index) for index in range(30)])
    score_file(scorer, source, tmp_path / "out.jsonl", chunk_rows=8, progress=False)
    assert held == [8, 8, 8, 6]
    source.write_text(json.dumps(row(0)) + "\nbroken\n")
    assert next(score_rows_or_faults(source)).fields == row(0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.jsonl", '{"prompt": "a", "response": "b"}\n\n{"prompt": "a"\n', "in.jsonl, row 3: .*JSON"),
        ("in.jsonl", '{"prompt": "a"}\n', r"row 1: no 'response'. Its fields are 'prompt'; add"),
        ("in.jsonl", '{"response": "a"}\n', "row 1: no 'prompt'"),
        ("in.jsonl", '{"prompt": "a", "response": 3}\n', "row 1: 'response' is int 3; expected text"),
        ("in.jsonl", '{"prompt": [{"role": "user"}], "response": "b"}\n', "row 1: .*content"),
        ("in.jsonl", "[1, 2]\n", "row 1 is a list"),
        ("in.csv", "prompt,answer\na,b\n", "row 1: no 'response'.*--columns response=answer"),
    ],
)
def test_bad_input_is_refused_before_the_model_runs_and_nothing_is_written(scorer, tmp_path, name, content, message):
    source = tmp_path / name
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    with Calls(scorer.model) as calls, pytest.raises(InputError, match=message):
        score_file(scorer, source, tmp_path / "out.jsonl", progress=False)
    assert calls.rows == 0
    assert files_of(tmp_path) == [name]


def test_impossible_outputs_are_refused(scorer, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [row(0)])
    (tmp_path / "folder.jsonl").mkdir()
    for output, message in (
        (tmp_path / "out.csv", "must end in .jsonl"),
        (source, "is the input"),
        (tmp_path / "folder.jsonl", "is a folder"),
        (source / "out.jsonl", "is a file"),
    ):
        with pytest.raises(InputError, match=message):
            score_file(scorer, source, output, progress=False)
    with pytest.raises(InputError, match="no such file"):
        score_file(scorer, tmp_path / "absent.jsonl", tmp_path / "out.jsonl", progress=False)


def test_overlong_and_not_finite_rows_of_a_file_are_named(scorer, models, tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [row(0), {"prompt": "Long " * 200, "response": "b"}])
    with pytest.raises(InputError, match=r"in.jsonl, row 2 has \d+ tokens; the limit is 128"):
        score_file(scorer, source, tmp_path / "out.jsonl", progress=False)
    broken = LlamaForSequenceClassification(models["llama"].config)
    broken.load_state_dict(models["llama"].state_dict())
    source = write_jsonl(tmp_path / "other.jsonl", [row(0), {"prompt": "Hi", "response": "~"}, row(1)])
    with torch.no_grad():
        broken.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("~")] = float("inf")
    with pytest.raises(NonFiniteRewardError, match=r"other\.jsonl, row 2 has the reward nan"):
        score_file(RewardScorer(broken.eval(), tokenizer), source, tmp_path / "out2.jsonl", progress=False)


def test_progress_bar_shows_rate_and_time_left(scorer, tmp_path, capsys):
    source = write_jsonl(tmp_path / "in.jsonl", [row(index) for index in range(3)])
    score_file(scorer, source, tmp_path / "out.jsonl")
    shown = capsys.readouterr().err
    assert "3/3" in shown and "row/s" in shown and "00:00<00:00" in shown


def test_real_reward_head_on_real_weights_scores_as_alone(shared_dir):
    model = InfoRMForSequenceClassification.from_backbone(str(shared_dir / "models" / "stories260K")).eval()
    rows = random_rows(12, longest=200)
    rewards = RewardScorer(model).score_encoded(rows)
    torch.testing.assert_close(rewards, alone(model, rows), atol=1e-5, rtol=0)


@pytest.mark.parametrize("batching", ("packed", "padded"))
def test_a_batch_that_does_not_fit_is_scored_in_two(models, monkeypatch, caplog, batching):
    scorer = RewardScorer(models["inform"], batching=batching)
    sequences = [[5, 6, 7 + row, 9] for row in range(8)]
    expected = scorer.score_encoded(sequences, [2] * 8)
    plain = RewardScorer._packed_forward if batching == "packed" else RewardScorer._padded_forward

    def forward(self, rows, *rest):
        if len(rows) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory, for a test")
        return plain(self, rows, *rest)

    monkeypatch.setattr(RewardScorer, f"_{batching}_forward", forward)
    budget = scorer.tokens_per_batch
    torch.testing.assert_close(scorer.score_encoded(sequences, [2] * 8), expected, atol=1e-5, rtol=0)
    assert scorer.tokens_per_batch == budget // 2 and "8 rows is too much" in caplog.text
    monkeypatch.setattr(RewardScorer, f"_{batching}_forward", lambda *rest: forward(*rest[:1], [0] * 9, *rest[2:]))
    with pytest.raises(torch.OutOfMemoryError, match="for a test"):
        scorer.score_encoded(sequences, [2] * 8)
