"""`RewardTrainer` with objects: data, models, adapters, callbacks and settings of transformers' TrainingArguments."""

import json
import warnings
from pathlib import Path
from typing import ClassVar

import huggingface_hub
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard, parse_eval_result_entries
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from inform_rm import RewardTrainer, RewardTrainingArguments
from inform_rm.errors import InputError
from inform_rm.modeling_inform import InfoRMForSequenceClassification
from inform_rm.training.run import train

COLOURS = ["red", "blue", "green", "black", "white", "brown", "pink", "grey"]
ROWS = [
    {
        "question": f"Name the colour {COLOURS[index % 8]}",
        "better": f"It is {COLOURS[index % 8]}." + " Indeed." * (index % 3),
        "worse": f"It is {COLOURS[(index + 1 + index // 8) % 8]}.",
        "number": str(index),
    }
    for index in range(32)
]
COLUMNS = {"prompt": "question", "chosen": "better", "rejected": "worse", "id": "number"}


@pytest.fixture
def arguments(tmp_path):
    """Arguments of a short run into a folder of the test's."""

    def make(name="run", **changes):
        base = {
            "latent_dim": 4, "learning_rate": 1e-3, "max_steps": 3, "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1, "save_steps": 2, "use_cpu": True,
            "columns": COLUMNS, "disable_tqdm": True,
        }  # fmt: skip
        return RewardTrainingArguments(str(tmp_path / name), **{**base, **changes})

    return make


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def trained(**options):
    trainer = RewardTrainer(**options)
    trainer.train()
    return trainer.accelerator.unwrap_model(trainer.model).state_dict()


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_pairs_train_alike_as_file_dataset_list_and_splits(arguments, pairs_file, causal_lm_dir):
    backbone = str(causal_lm_dir("llama"))
    expected = trained(args=arguments("file", model=backbone, data=str(pairs_file)))
    splits = DatasetDict(train=Dataset.from_list(ROWS), validation=Dataset.from_list(ROWS[:8]))
    for name, rows in (("dataset", Dataset.from_list(ROWS)), ("list", ROWS), ("splits", splits)):
        trainer = RewardTrainer(backbone, arguments(name), train_dataset=rows)
        trainer.train()
        assert_same(trainer.accelerator.unwrap_model(trainer.model).state_dict(), expected)
        assert (trainer.eval_pairs is not None) == (name == "splits")


def test_an_iterable_dataset_without_a_number_of_steps_is_refused(arguments, causal_lm_dir):
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    with pytest.raises(InputError, match="streaming needs max_steps"):
        RewardTrainer(str(causal_lm_dir("llama")), arguments(max_steps=-1), train_dataset=stream)


def test_a_model_may_be_an_object(arguments, causal_lm_dir):
    backbone = str(causal_lm_dir("llama"))
    expected = trained(model=backbone, args=arguments("name"), train_dataset=ROWS)
    torch.manual_seed(0)
    model = InfoRMForSequenceClassification.from_backbone(backbone, latent_dim=4)
    start = RewardTrainer(backbone, arguments("start"), train_dataset=ROWS).model.state_dict()
    model.load_state_dict(start)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    found = trained(model=model, args=arguments("object"), train_dataset=ROWS, processing_class=tokenizer)
    assert_same(found, expected)


def test_a_plain_sequence_classifier_is_trained_on_padded_batches(arguments, causal_lm_dir):
    backbone = str(causal_lm_dir("llama"))
    model = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1)
    trainer = RewardTrainer(model, arguments(), train_dataset=ROWS)
    before = model.score.weight.detach().clone()
    trainer.train()
    assert trainer.batching == "padded" and not torch.equal(model.score.weight, before)
    assert "accuracy" in trainer.state.log_history[0] and "kl_nats" not in trainer.state.log_history[0]


class Halts(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def test_callbacks_metrics_and_optimizers_of_the_caller_are_used(arguments, causal_lm_dir):
    backbone = str(causal_lm_dir("llama"))
    trainer = RewardTrainer(
        backbone, arguments(), train_dataset=ROWS, eval_dataset=ROWS[:8], callbacks=[Halts()],
        compute_metrics=lambda prediction: {"mine": float(len(prediction.predictions))},
    )  # fmt: skip
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.0)
    trainer.optimizer = optimizer
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert trainer.state.global_step == 2
    assert_same(trainer.model.state_dict(), before)  # its learning rate is 0
    measured = trainer.evaluate()
    assert measured["eval_mine"] == measured["eval_num_pairs"] == 8
    assert trainer.evaluate(ROWS[:5])["eval_num_pairs"] == 5


@pytest.mark.parametrize("targets", (None, ["q_proj"]))
def test_any_lora_config_is_trained_and_saved_with_its_base_named(arguments, causal_lm_dir, targets, tmp_path):
    backbone = str(causal_lm_dir("llama"))
    lora = LoraConfig(r=3, lora_alpha=7, target_modules=targets)
    trainer = RewardTrainer(backbone, arguments(), train_dataset=ROWS, peft_config=lora)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["base_model_name_or_path"]) == (3, 7, backbone)
    names = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert any("score" in name for name in names)
    kinds = {name.split(".")[-3] for name in names if "lora_A" in name}
    assert kinds == {"q_proj"} if targets else {"q_proj", "up_proj"} <= kinds
    assert lora.task_type is None  # the caller's own is left as it was


@pytest.mark.parametrize(
    ("settings", "holds"),
    [
        (
            {"lr_scheduler_type": "constant", "adam_beta1": 0.5, "adam_beta2": 0.9, "save_total_limit": 1,
             "num_train_epochs": 2, "run_name": "mine", "logging_first_step": True, "logging_steps": 2},
            lambda t: {
                "lr_scheduler_type": t.lr_scheduler.get_last_lr()[0] == 1e-3,
                "adam_betas": t.optimizer.param_groups[0]["betas"] == (0.5, 0.9),
                "save_total_limit": len(t.saved) == 1,
                "num_train_epochs": t.state.max_steps == 3,  # max_steps goes first
                "run_name": t.result()["settings"]["run_name"] == "mine",
                "logging_first_step": t.state.log_history[0]["step"] == 1,
            },
        ),
        (
            {"optim": "adafactor", "save_strategy": "no", "neftune_noise_alpha": 5.0},
            lambda t: {
                "optim": type(t.optimizer.optimizer).__name__ == "Adafactor",
                "save_strategy": not t.saved,
                "neftune_noise_alpha": t.batching == "padded",
            },
        ),
    ],
    ids=["changed in degree", "changed in kind"],
)  # fmt: skip
def test_settings_of_training_arguments_take_effect(arguments, causal_lm_dir, settings, holds, tmp_path):
    trainer = RewardTrainer(str(causal_lm_dir("llama")), arguments(**settings), train_dataset=ROWS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    trainer.saved = [path.name for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*")]
    assert [name for name, is_so in holds(trainer).items() if not is_so] == []


def test_a_cut_off_run_goes_on_and_is_not_overwritten(arguments, causal_lm_dir):
    backbone = str(causal_lm_dir("llama"))
    expected = trained(model=backbone, args=arguments("whole", max_steps=4), train_dataset=ROWS)
    cut = RewardTrainer(backbone, arguments(max_steps=4), train_dataset=ROWS, callbacks=[Halts()])
    cut.train(resume_from_checkpoint=True)  # there is nothing yet: it begins
    with pytest.raises(InputError, match=r"holds checkpoints of a run\. Pass resume_from_checkpoint=True"):
        RewardTrainer(backbone, arguments(max_steps=4), train_dataset=ROWS).train()
    other = [{**row, "better": row["better"] + "!"} for row in ROWS]
    with pytest.raises(InputError, match=r"other settings or data \(the content of data\)"):
        RewardTrainer(backbone, arguments(max_steps=4), train_dataset=other).train(resume_from_checkpoint=True)
    lora = RewardTrainer(backbone, arguments(max_steps=4), train_dataset=ROWS, peft_config=LoraConfig(r=2))
    with pytest.raises(InputError, match=r"other settings or data \(peft_config"):
        lora.train(resume_from_checkpoint=True)
    resumed = RewardTrainer(backbone, arguments(max_steps=4), train_dataset=ROWS)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.resumed_from.name == "checkpoint-2"
    assert_same(resumed.model.state_dict(), expected)


def test_two_processes_do_not_train_into_one_folder(arguments, causal_lm_dir, exit_code_of_fork, monkeypatch):
    monkeypatch.setattr("inform_rm.training.checkpoints._WAIT_SECONDS", 1.0)
    backbone, codes = str(causal_lm_dir("llama")), []

    class SecondProcess(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            codes.append(exit_code_of_fork(refused))

    def refused():
        with pytest.raises(InputError, match=r"another process trains into .* now"):
            RewardTrainer(backbone, arguments(max_steps=1, overwrite=True), train_dataset=ROWS).train()

    RewardTrainer(backbone, arguments(max_steps=1), train_dataset=ROWS, callbacks=[SecondProcess()]).train()
    assert codes == [0]
    RewardTrainer(backbone, arguments(max_steps=1, overwrite=True), train_dataset=ROWS).train()  # that was all


def test_a_checkpoint_of_an_earlier_version_is_refused_by_name(arguments, causal_lm_dir, tmp_path):
    backbone = str(causal_lm_dir("llama"))
    cut = RewardTrainer(backbone, arguments(max_steps=4), train_dataset=ROWS, callbacks=[Halts()])
    cut.train()
    path = tmp_path / "run" / "checkpoints" / "run.json"
    record = json.loads(path.read_text())
    older = {**record, "objective": "bradley_terry"}
    del older["adam_beta2"]  # the usual one then
    path.write_text(json.dumps(older))
    trainer = RewardTrainer(backbone, arguments(max_steps=4), train_dataset=ROWS)
    with pytest.raises(InputError, match=r"other settings or data \(objective: 'bradley_terry' -> 'plain'\)"):
        trainer.train(resume_from_checkpoint=True)
    path.write_text(json.dumps({name: value for name, value in record.items() if name != "contents"}))  # older still
    with pytest.raises(InputError, match=r"other settings or data \(the content of model"):
        trainer.train(resume_from_checkpoint=True)
    path.write_text(json.dumps(record))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.resumed_from.name == "checkpoint-2"


def test_loss_type_is_the_loss_of_training_of_evaluation_and_of_the_model_itself(arguments, causal_lm_dir):
    args = arguments(loss_type="hinge", architecture="standard", logging_steps=1, label_smoothing=0.0)
    trainer = RewardTrainer(str(causal_lm_dir("llama")), args, train_dataset=ROWS, eval_dataset=ROWS[:4])
    row = trainer.data_collator(list(trainer.eval_dataset))
    with torch.no_grad():
        output = trainer.model.eval()(
            **{name: row[name] for name in row if name not in ("margin", "ids")}, return_loss=True
        )
        chosen, rejected = output.logits.flatten().chunk(2)
    expected = (1 - (chosen - rejected)).clamp(min=0).mean()
    torch.testing.assert_close(output.loss, expected)
    assert trainer.evaluate()["eval_hinge_loss"] == pytest.approx(expected.item(), abs=1e-5)
    trainer.train()
    assert trainer.model.config.loss_type == "hinge"


class StandInHub:
    """Takes a commit as `HfApi` does and keeps its message and the content of its files."""

    files: ClassVar[dict[str, bytes]] = {}
    messages: ClassVar[list[str]] = []

    def __init__(self, token=None):
        pass

    def repo_exists(self, repository):
        return False

    def create_repo(self, repository, private):
        assert repository == "me/model" and private

    def create_commit(self, repository, operations, commit_message):
        self.messages.append(commit_message)
        self.files.update((each.path_in_repo, Path(each.path_or_fileobj).read_bytes()) for each in operations)


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", StandInHub)
    monkeypatch.setattr(StandInHub, "files", {})
    monkeypatch.setattr(StandInHub, "messages", [])
    return StandInHub


def test_a_run_that_is_asked_to_uploads_what_it_leaves(arguments, causal_lm_dir, pairs_file, hub, tmp_path):
    train(arguments(
        model=str(causal_lm_dir("llama")), data=str(pairs_file), eval_data=str(pairs_file), push_to_hub=True,
        hub_model_id="me/model",
    ))  # fmt: skip
    assert hub.messages == ["Upload reward model"]
    for name in ("README.md", "model.safetensors", "config.json", "modeling_inform.py"):
        assert hub.files[name] == (tmp_path / "run" / name).read_bytes()
    assert len(ModelCard(hub.files["README.md"].decode()).data.eval_results) == 1
    assert not any(name.startswith(".eval_results") for name in hub.files)  # a local file is no data set of the Hub


def test_push_to_hub_uploads_a_loadable_folder_with_its_card(arguments, causal_lm_dir, hub, monkeypatch, tmp_path):
    arguments = arguments(hub_model_id="me/model", weight_decay=0.25)
    trainer = RewardTrainer(str(causal_lm_dir("llama")), arguments, train_dataset=ROWS, eval_dataset=ROWS[:8])
    trainer.train()
    of_memory = trainer.result
    settings = {**of_memory()["settings"], "eval_data": ["org/pairs[test]"]}  # as if they had come from there
    more = {"settings": settings, "data_fingerprints": {"org/pairs[test]": "1" * 64}}
    monkeypatch.setattr(trainer, "result", lambda: {**of_memory(), **more})
    with pytest.raises(InputError, match="revision: push_to_hub makes one commit to the main branch"):
        trainer.push_to_hub(revision="v2")
    trainer.push_to_hub("First", revision=None)
    assert hub.messages == ["First"]
    for name, content in hub.files.items():
        (tmp_path / "pulled" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pulled" / name).write_bytes(content)
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "pulled")
    assert {"config.json", "model.safetensors", "modeling_inform.py", "tokenizer.json"} <= {*hub.files}
    accuracy = trainer.evaluate()["eval_accuracy"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(hub.files[".eval_results/org--pairs--test.yaml"]))
    assert (entry.dataset_id, entry.value) == ("org/pairs", accuracy)
    card = ModelCard.load(tmp_path / "pulled" / "README.md")
    (legacy,) = card.data.eval_results
    assert (legacy.dataset_type, legacy.dataset_split, legacy.metric_value) == ("org/pairs", "test", accuracy)
    assert str(tmp_path) not in str(card)
    table = card.text.partition("| setting | value |")[2].partition("\n\n")[0]
    shown = {line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]}
    assert {"model", "latent_dim", "beta", "learning_rate", "weight_decay", "max_steps"} <= shown
    # Neither what was left as it is, nor what this run had no use for.
    assert shown.isdisjoint({"pool_factor", "lora_alpha", "num_train_epochs", "streaming", "hub_model_id"})
    assert len(shown) < 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_dataset": DatasetDict(a=Dataset.from_list(ROWS), b=Dataset.from_list(ROWS))}, "has the splits a, b"),
        ({"train_dataset": ROWS, "peft_config": {"r": 4}}, "peft_config: got a dict; expected a LoraConfig"),
        ({"model": None}, "model: none given"),
    ],
)
def test_what_is_not_clear_is_refused(arguments, causal_lm_dir, options, message):
    with pytest.raises(InputError, match=message):
        RewardTrainer(**{"model": str(causal_lm_dir("llama")), "args": arguments(), "train_dataset": ROWS, **options})


def test_pairs_that_are_given_twice_are_refused(arguments, causal_lm_dir):
    with pytest.raises(InputError, match=r"train_dataset: data names pairs, too \(d.jsonl\)"):
        RewardTrainer(str(causal_lm_dir("llama")), arguments(data="d.jsonl"), train_dataset=ROWS)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "use label_smoothing"),
        ({"hub_strategy": "every_save"}, "only 'end' is known"),
        ({"bf16": True, "fp16": True}, "At most one of fp16 and bf16"),
        ({"loss_type": "x"}, "loss_type: 'x' is unknown"),
        ({"push_to_hub": True}, r"settings: push_to_hub needs hub_model_id, name/model\.$"),
        ({"hub_revision": "v2"}, "uploads go to the main branch"),
    ],
)  # fmt: skip
def test_settings_that_would_do_nothing_or_harm_are_refused(arguments, setting, message):
    with pytest.raises(InputError, match=message):
        arguments(**setting)


@pytest.mark.slow
def test_adapters_train_under_the_default_compiler_and_are_saved(arguments, causal_lm_dir, tmp_path):
    """Pairs of one shape and no evaluation, so that one pass is compiled: each further shape takes a minute."""
    losses, saved = [], []
    for compiles in (False, True):
        args = arguments(f"compiled {compiles}", torch_compile=compiles, batching="padded", max_steps=2)
        trainer = RewardTrainer(
            str(causal_lm_dir("llama")), args, train_dataset=[ROWS[0]] * 8, peft_config=LoraConfig(r=2)
        )
        trainer.train()
        trainer.save_model(str(tmp_path / "adapters"))
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        saved.append(load_file(tmp_path / "adapters" / "adapter_model.safetensors"))
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], abs=1e-4)
    eager, compiled = saved
    assert eager.keys() == compiled.keys()  # no trace of the compiler in the names
    for name, value in eager.items():
        if not name.endswith("decoder.2.bias"):  # a constant has no gradient: Adam makes a step of rounding errors
            torch.testing.assert_close(compiled[name], value, atol=1e-4, rtol=0, msg=name)


@pytest.mark.slow
def test_a_compiled_run_equals_an_eager_one(arguments, causal_lm_dir):
    backbone = str(causal_lm_dir("llama"))
    rows = {"train_dataset": ROWS, "eval_dataset": ROWS[:8]}
    begins = {"kl_warmup_nats": 0}  # before the KL term the bias of the latents has no gradient either
    expected = trained(model=backbone, args=arguments("eager", **begins), **rows)
    compiled = arguments("compiled", torch_compile=True, torch_compile_backend="aot_eager", **begins)
    found = trained(model=backbone, args=compiled, **rows)
    for name, value in expected.items():
        if not name.endswith("decoder.2.bias"):  # see above
            torch.testing.assert_close(found[name.removeprefix("_orig_mod.")], value, atol=1e-4, rtol=0, msg=name)
