"""`plan`: what it counts against hand calculation, real optimizers, and the peaks of real training on a CPU."""

import multiprocessing
import threading
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, LlamaConfig

from inform_rm import InfoRMConfig, InfoRMForSequenceClassification, RewardTrainer, RewardTrainingArguments
from inform_rm.errors import InputError
from inform_rm.training import fake_step
from inform_rm.training.fake_step import PassCounts, count_pass
from inform_rm.training.plan import Lengths, Machine, advise, plan, read_config
from inform_rm.training.plan_memory import GIB, model_on_meta

SHAPES = Path(__file__).resolve().parents[2] / "recipes" / "shapes"
PROMPT, RESPONSE, LAYERS = 40, 30, 4
SIZES = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": LAYERS, "num_attention_heads": 6}


def config_of(**changes):
    return LlamaConfig(**{**SIZES, "num_key_value_heads": 2, "vocab_size": 320, **changes})


def arguments(folder, **settings):
    base = {"use_cpu": True, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "latent_dim": 16}
    return RewardTrainingArguments(str(folder / "run"), **{**base, **settings})


@pytest.fixture
def evenly(monkeypatch):
    """In place of a pass on fake tensors one whose counts grow with its tokens; checkpointing keeps a quarter."""

    def count(model, rows, length, *, autocast, read):
        share = 0.25 if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) else 1.0
        return PassCounts(*(rows * length * each for each in (share * 1e4, share * 1.5e4, 0.0, 1e6, 3e6)))

    monkeypatch.setattr("inform_rm.training.plan.count_pass", count)


def planned(args, machine=None, config=None, **more):
    return plan(args, config or config_of(), machine or Machine(), Lengths(PROMPT, RESPONSE), **more)


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.1-8b", 8_030_261_248 - 128_256 * 4096),  # the model card's number, without the output layer
        ("qwen3-4b", 4_022_468_096),
    ],
)
def test_the_shapes_of_the_recipes_have_the_published_numbers_of_parameters(name, parameters, tmp_path, evenly):
    config = AutoConfig.from_pretrained(SHAPES / f"{name}.json")
    found = plan(arguments(tmp_path), config, Machine())
    assert found.parameters - found.head_parameters == parameters


def model_of(config, **enable):
    with torch.device("meta"):
        model = InfoRMForSequenceClassification(InfoRMConfig(config, latent_dim=16)).train()
    if enable:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    return model


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": True}, {"lora_r": 4, "dtype": "bfloat16", "bf16": True}],
    ids=("all weights", "checkpointing", "LoRA"),
)
def test_few_layers_tell_of_all(settings, tmp_path, monkeypatch):
    args = arguments(tmp_path, **settings)
    few = count_pass(model_on_meta(args, config_of())[0], 4, 50, autocast=args.bf16)
    monkeypatch.setattr(fake_step, "_MORE", 99)
    assert few == count_pass(model_on_meta(args, config_of())[0], 4, 50, autocast=args.bf16)


def test_a_model_with_unlike_layers_is_run_whole(monkeypatch):
    model = model_of(config_of())
    model.model.layers[3].mlp.gate_proj.bias = torch.nn.Parameter(torch.empty(512, device="meta"))
    runs = []
    count = fake_step._count
    monkeypatch.setattr(
        fake_step, "_count", lambda model, *rest: runs.append(len(model.model.layers)) or count(model, *rest)
    )
    count_pass(model, 1, 8, autocast=False)
    assert runs == [LAYERS]


# Some versions of transformers make the rotary angles of 50 places by a product with 16 frequencies.
ANGLES = (0, 2 * 50 * 16)


def test_operations_are_those_of_the_matrix_products():
    rows, length, hidden, layers, keys = 4, 50, 192, LAYERS, 64
    found = count_pass(model_of(config_of()), rows, length, autocast=False)
    of_layer = 2 * hidden * (hidden + keys) + 3 * hidden * 512  # query and output, key and value; gate, up and down
    products = 2 * rows * length * layers * of_layer
    attention = layers * 2 * 2 * rows * length * length * hidden
    head = 2 * rows * (hidden * 2 * 16 + 16 * 16 + 16)
    angles = found.forward_flops - (products + attention + head)
    assert angles in ANGLES
    assert found.flops == 3 * (products + head) + 3.5 * attention + angles  # attention scores are computed again


def test_activation_checkpointing_computes_the_layers_again():
    kept, again = (
        count_pass(model_of(config_of(), **more), 4, 50, autocast=False) for more in ({}, {"checkpointing": 1})
    )
    # All of the layers but the last product of each, which nothing asks for again, and the head.
    last, head = 2 * 200 * LAYERS * 512 * 192, 2 * 4 * (192 * 2 * 16 + 16 * 16 + 16)
    assert kept.flops + kept.forward_flops - last - head - again.flops in ANGLES
    assert again.layers_bytes < kept.layers_bytes / 2


def test_fsdp_divides_what_is_always_there_and_gathers_a_block_twice(tmp_path):
    found = planned(arguments(tmp_path), Machine(gpus=4))
    number = found.parameters
    parts = {name: size * GIB for name, size in found.parts.items()}
    assert parts["weights"] == parts["gradients"] == pytest.approx(4 * number / 4)
    assert parts["optimizer"] == pytest.approx(8 * number / 4)
    layer = 2 * 192 * (192 + 64) + 3 * 192 * 512 + 2 * 192
    rest = number - LAYERS * layer
    assert parts["gathered weights"] == pytest.approx(2 * (2 * layer + rest))
    alone = planned(arguments(tmp_path, dtype="bfloat16"), Machine())
    kept = "kept for the backward pass"
    assert found.parts[kept] == pytest.approx(alone.parts[kept], rel=0.02)  # of bfloat16, however many divide


def test_ddp_keeps_all_of_it_and_the_gradients_twice(tmp_path, evenly):
    one, four = (
        planned(arguments(tmp_path, bf16=True)),
        planned(arguments(tmp_path, bf16=True), Machine(4, launch="ddp")),
    )
    assert four.total - one.total == pytest.approx(one.parts["gradients"])
    assert four.parts["gradients in the buckets of DDP"] == one.parts["gradients"]


def test_a_quantised_base_is_small_and_whole_at_the_end(tmp_path, evenly):
    found = planned(arguments(tmp_path, lora_r=4, load_in_4bit=True, dtype="bfloat16", bf16=True))
    linear = LAYERS * (2 * 192 * (192 + 64) + 3 * 192 * 512)
    lora = planned(arguments(tmp_path, lora_r=4, dtype="bfloat16", bf16=True))
    saved = (lora.parts["weights"] - found.parts["weights"]) * GIB
    assert saved == pytest.approx(linear * (2 - 0.5 - 1 / 64 - 4 / 16384))
    static = sum(found.parts[name] for name in ("weights", "gradients", "optimizer"))
    assert found.finish == pytest.approx(static + 2 * found.parameters / GIB)
    assert found.need == max(found.total, found.finish)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "stable_adamw", "adamw_bnb_8bit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_optimizers_state_is_that_of_a_real_one(optim, dtype, tmp_path, evenly):
    weight = torch.nn.Parameter(torch.randn(256, 256).to(getattr(torch, dtype)))
    if optim == "adamw_bnb_8bit":
        optim_of = pytest.importorskip("bitsandbytes").optim
        # It knows weights that keep 32 bits by their address, which an earlier test's embedding may have had.
        optim_of.GlobalOptimManager.get_instance().initialize()
        optimizer = optim_of.AdamW8bit([weight])
    elif optim == "stable_adamw":
        optimizer = pytest.importorskip("optimi").StableAdamW([weight], lr=1e-4)
    else:
        optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    held = {id(value): value.nbytes for value in optimizer.state[weight].values() if torch.is_tensor(value)}
    real = sum(held.values()) / weight.numel()
    # The wide embedding outweighs the float32 head; of eight bits it keeps 32.
    config = config_of(vocab_size=8, hidden_size=384)
    found = planned(arguments(tmp_path, optim=optim, dtype=dtype), config=config)
    backbone = found.parameters - found.head_parameters
    head = found.head_parameters * (8 if optim != "adamw_bnb_8bit" else 2 * (1 + 4 / 256))
    embedding = 8 * 384 * (8 - real if optim == "adamw_bnb_8bit" else 0)
    assert found.parts["optimizer"] * GIB == pytest.approx(backbone * real + head + embedding, rel=0.02)


def test_a_pass_has_no_more_tokens_than_it_may(tmp_path, evenly):
    pair = PROMPT + 2 * RESPONSE
    assert planned(arguments(tmp_path)).pass_tokens == 8 * pair
    assert planned(arguments(tmp_path, tokens_per_batch=350)).pass_tokens == 3 * pair
    assert planned(arguments(tmp_path, tokens_per_batch=10)).pass_tokens == pair  # a pair is never divided
    assert planned(arguments(tmp_path, batching="padded", tokens_per_batch=350)).pass_tokens == 16 * (
        PROMPT + RESPONSE
    )


@pytest.mark.slow
def test_as_many_tokens_as_are_said_to_fit_do_fit(tmp_path):
    machine = Machine(memory=0.3, reserve=0)
    now = planned(arguments(tmp_path), machine)
    pairs = now.most_tokens // (PROMPT + 2 * RESPONSE)
    assert planned(arguments(tmp_path, per_device_train_batch_size=pairs), machine).fits
    more = int(pairs * 1.1) + 1
    assert not planned(arguments(tmp_path, per_device_train_batch_size=more), machine).fits


def test_time_is_operations_over_rate(tmp_path, evenly):
    machine = Machine(tflops=2.0, utilisation=0.5)
    found = planned(arguments(tmp_path), machine, pairs=100)
    assert found.seconds_per_step == pytest.approx(16 * (PROMPT + 2 * RESPONSE) * 3e6 / 1e12)
    assert found.pairs_per_step == 16 and found.steps == 7  # six full ones and the rest
    assert found.hours == pytest.approx(7 * found.seconds_per_step / 3600)
    assert planned(arguments(tmp_path, max_steps=3), machine, pairs=100).steps == 3
    assert planned(arguments(tmp_path), machine).hours is None
    two = planned(arguments(tmp_path), Machine(2, tflops=2.0, utilisation=0.5), pairs=100)
    assert two.pairs_per_second == pytest.approx(2 * found.pairs_per_second, rel=1e-6)


def test_selection_takes_its_time(tmp_path, evenly):
    plain = planned(arguments(tmp_path), pairs=1600)
    chosen = {"objective": "prioritized", "pool_factor": 2, "num_prompts": 4, "warmup_fraction": 0.0}
    found = planned(arguments(tmp_path, **chosen), pairs=1600)
    # A pool of 16 pairs under four prompts, which all share.
    per_pool = (4 * PROMPT + 16 * 4 * 2 * RESPONSE) * 1e6 / (989e12 * 0.35)
    assert found.seconds_per_step - plain.seconds_per_step == pytest.approx(2 * per_pool)
    assert found.steps == plain.steps / 2  # of each pool half is learnt from
    behaviour = planned(arguments(tmp_path, **chosen, weights="behavior", behavior_model="lm"), pairs=1600)
    more = (16 * PROMPT - PROMPT) * 1e6 / (989e12 * 0.35)  # the own prompts, each for its pair alone
    assert behaviour.seconds_per_step - found.seconds_per_step == pytest.approx(2 * more)


def test_advice_is_what_planning_again_says(tmp_path, evenly):
    args = arguments(tmp_path)
    machine = Machine(memory=planned(args).need / 2, reserve=0)
    now = planned(args, machine)
    assert not now.fits
    alone, together = advise(args, config_of(), machine, Lengths(PROMPT, RESPONSE))
    assert {"gradient_checkpointing": True} in [found.settings for found in alone]
    for found in [*alone, together]:
        assert found.plan.need < now.need
        again = {name: value for name, value in found.settings.items() if name != "gpus"}
        assert planned(arguments(tmp_path, **again), machine).need == pytest.approx(found.plan.need)
    assert together.plan.fits
    nothing = advise(args, config_of(), Machine(memory=0.001, reserve=0), Lengths(PROMPT, RESPONSE))
    assert nothing[1] is None


@pytest.mark.parametrize(
    "settings, machine, words",
    [
        ({"tokens_per_batch": 100}, {"gpus": 2}, "tokens_per_batch: works in one process"),
        ({"lora_r": 4, "load_in_4bit": True}, {"gpus": 2}, "do not train under FSDP"),
        ({"optim": "lomo"}, {}, "what 'lomo' keeps of a weight is not known"),
        ({}, {"gpus": 0}, "gpus: 0; expected a number above 0"),
        ({}, {"launch": "fsdp"}, "expected fsdp2 or ddp"),
    ],
)
def test_what_cannot_be_planned_is_refused(settings, machine, words, tmp_path, evenly):
    with pytest.raises(InputError, match=words):
        planned(arguments(tmp_path, **settings), Machine(**machine))


def test_a_model_without_a_readable_config_is_named(tmp_path):
    with pytest.raises(InputError, match="--config FILE"):
        read_config(str(tmp_path / "nothing.json"), arguments(tmp_path))


def rows_of_equal_length(number, vocabulary):
    draws = torch.Generator().manual_seed(0)

    def ids(length):
        return torch.randint(5, vocabulary, (length,), generator=draws).tolist()

    rows = []
    for place in range(number):
        prompt = ids(PROMPT)
        sides = {f"{side}_input_ids": prompt + ids(RESPONSE) for side in ("chosen", "rejected")}
        rows.append(
            {**sides, "prompt_length": PROMPT, "margin": None, "id": str(place), "length": PROMPT + 2 * RESPONSE}
        )
    return Dataset.from_list(rows)


def trainer_of(args, tokenizer, config):
    usual = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, args.dtype))
    try:
        model = InfoRMForSequenceClassification(InfoRMConfig(config, latent_dim=args.latent_dim))
    finally:
        torch.set_default_dtype(usual)
    return RewardTrainer(model, args, train_dataset=rows_of_equal_length(32, 300), processing_class=tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batching": "padded"},
        {"lora_r": 8},
        {"gradient_checkpointing": True},
        {"dtype": "bfloat16"},
        {"bf16": True},
        {"tokens_per_batch": 250},
    ],
    ids=lambda settings: ", ".join(f"{name} {value}" for name, value in settings.items()) or "float32 AdamW",
)
def test_the_peak_is_that_of_a_real_training(settings, tokenizer, tmp_path):
    """Every byte that PyTorch's allocator gives out in two steps of two passes each, by its own profiler."""
    run = {"max_steps": 2, "disable_tqdm": True, "save_strategy": "no", **settings}
    args = arguments(tmp_path, **run)
    trainer = trainer_of(args, tokenizer, config_of())
    weights = {weight.data_ptr(): weight.nbytes for weight in trainer.model.parameters()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer.train()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    measured = peak + sum(weights.values())
    assert planned(args).total * GIB == pytest.approx(measured, rel=0.1)


def large_config():
    """So large that what is no tensor does not count."""
    return config_of(hidden_size=384, intermediate_size=1536)


def of_a_process(folder):
    run = {"max_steps": 2, "disable_tqdm": True, "save_strategy": "no", "per_device_train_batch_size": 16}
    return arguments(folder, **run)


def write_peak(folder):
    """Train in this process, and write the most memory of no file that it had, above what it had before."""

    def own_bytes():
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "VmSwap")))

    trainer = trainer_of(of_a_process(folder), AutoTokenizer.from_pretrained(folder), large_config())
    seen, ended = [own_bytes()], threading.Event()

    def look():
        while not ended.wait(0.001):
            seen.append(own_bytes())

    watcher = threading.Thread(target=look)
    watcher.start()
    trainer.train()
    ended.set()
    watcher.join()
    (folder / "peak").write_text(str(max(seen) - seen[0]))


@pytest.mark.slow
def test_the_peak_is_that_of_a_real_process(tokenizer, tmp_path, monkeypatch):
    """The most memory that the kernel counts for a process of its own, above what it has before the first step.

    A fresh one, in which nothing is left of other tests; and each larger block is a mapping of its own, so that the
    kernel has it back when it is freed. The kernel's own counter of the peak is of no use where it drops pages of
    files meanwhile.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("the kernel's counters are Linux's")
    found = plan(of_a_process(tmp_path), large_config(), Machine(), Lengths(PROMPT, RESPONSE))
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # of glibc
    process = multiprocessing.get_context("spawn").Process(target=write_peak, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    measured = int((tmp_path / "peak").read_text())
    assert (found.total - found.parts["weights"]) * GIB == pytest.approx(measured, rel=0.1)
