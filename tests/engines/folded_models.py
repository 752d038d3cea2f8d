"""Folded models for an engine to serve, with the rewards of this package: the first half of `make test-engines`.

    python folded_models.py FOLDER [FAMILY ...]     FOLDER/FAMILY/folded and FOLDER/FAMILY/cases.json of each family

Not a pytest file: the engine lives in an environment of its own, where `vllm_rewards.py` is the second half. Each
model has random weights and a tokenizer of few words. One, `smollm2`, has the real tokenizer and weights of the folder
that ``INFORM_RM_SHARED`` names, and is left out where there is none. Another, `trained`, is a small Llama after 20
steps of `inform-rm train`.
"""

import json
import os
import shutil
import sys
from pathlib import Path

# Head size 32 is the smallest that vLLM's attention for CPUs takes.
SIZES = {
    "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
# Rotary settings, windows and biases that no default has: an engine that ignores one gives other rewards.
FAMILIES = {
    "llama": ("LlamaConfig", {**GROUPED, "rope_parameters": LLAMA3_ROPE}),
    "llama_bos": ("LlamaConfig", GROUPED),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 16}),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "qwen2": ("Qwen2Config", {**GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 32}),
    "gemma": ("GemmaConfig", {**GROUPED, "head_dim": 32}),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 48}),
    "gemma3_text": ("Gemma3TextConfig", {**GROUPED, "head_dim": 32, "sliding_window": 16}),
    "phi3": ("Phi3Config", GROUPED),
    "stablelm": ("StableLmConfig", {**GROUPED, "use_qkv_bias": True}),
    "starcoder2": ("Starcoder2Config", GROUPED),
    "smollm3": ("SmolLM3Config", GROUPED),
    "olmo2": ("Olmo2Config", GROUPED),
    "gpt_neox": (
        "GPTNeoXConfig",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
    ),
    "gpt2": ("GPT2Config", {}),
    "smollm2": ("", {}),
    "trained": ("LlamaConfig", GROUPED),
}
WORDS = "red blue green sea sky apple pear seven three name a an the is are of and colour fruit number say".split()
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# The turn opens with the token that is also BOS, and something follows the end token, as in SmolLM2.
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def build_tokenizer(family):
    """Byte-level BPE; it adds BOS, which the template writes as well, or under ChatML neither does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator([" ".join(WORDS)], trainer)
    is_chatml = family == "llama_bos"
    if not is_chatml:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=256
    )
    tokenizer.chat_template = CHATML_TEMPLATE if is_chatml else PLAIN_TEMPLATE
    return tokenizer


def save_model(family, folder):
    """A model whose rewards differ by tenths at least, with its tokenizer; or None where the real one is not there."""
    import torch
    import transformers

    from inform_rm import InfoRMConfig, InfoRMForSequenceClassification
    from inform_rm.data.tokenizer import load_tokenizer

    torch.manual_seed(0)
    if family == "smollm2":
        real = Path(os.environ.get("INFORM_RM_SHARED", "/nowhere"), "models", "smollm2-135m-first6-v16k")
        if not real.is_dir():
            return None
        tokenizer = load_tokenizer(real)
        model = InfoRMForSequenceClassification.from_backbone(
            str(real), latent_dim=8, decoder="linear", dtype=torch.float32
        )
        model.config.text_config.pad_token_id = tokenizer.pad_token_id
    else:
        name, settings = FAMILIES[family]
        text_config = getattr(transformers, name)(**SIZES, **settings)
        if family == "trained":
            return train_model(transformers.LlamaForCausalLM(text_config), build_tokenizer(family), folder)
        model = InfoRMForSequenceClassification(InfoRMConfig(text_config, latent_dim=8, decoder="linear"))
        tokenizer = build_tokenizer(family)
        for parameter in model.model.parameters():
            # Norms and biases included: an engine that leaves one out is seen.
            parameter.data += 0.1 * torch.randn_like(parameter)
    for parameter in model.score.parameters():
        parameter.data.normal_(std=0.5)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train_model(backbone, tokenizer, folder):
    """What `inform-rm train` makes of the backbone in 20 steps: the reply that ends in "pear" is preferred."""
    from inform_rm.cli.dispatch import main as inform_rm

    backbone.save_pretrained(folder.parent / "backbone")
    tokenizer.save_pretrained(folder.parent / "backbone")
    pairs = folder.parent / "pairs.jsonl"
    with pairs.open("w") as file:
        for number in range(80):
            words = [WORDS[(number + step * (1 + number % 5)) % len(WORDS)] for step in range(4)]
            reply = {"prompt": " ".join(words), "chosen": f"{words[1]} pear", "rejected": f"{words[1]} apple"}
            file.write(json.dumps(reply) + "\n")
    settings = {
        "model": folder.parent / "backbone", "data": pairs, "output": folder, "max_steps": 20, "latent_dim": 8,
        "decoder": "linear", "pairs_per_step": 8, "learning_rate": 3e-3, "use_cpu": "true",
    }  # fmt: skip
    if inform_rm(["train", *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]):
        raise SystemExit("inform-rm train failed")
    return folder


def conversations():
    """20 of them: one turn and several, with a system message and without, short and longer than any window."""
    made = []
    for number in range(20):
        words = [WORDS[(number * 7 + step * 5) % len(WORDS)] for step in range(3 + number)]
        prompt = [{"role": "user", "content": " ".join(words) + "?"}]
        if number % 3 == 1:
            prompt = [{"role": "system", "content": "Say a colour."}, *prompt]
        if number % 4 == 2:
            turns = [{"role": "assistant", "content": words[0]}, {"role": "user", "content": f"{words[-1]} ä 7"}]
            prompt = [*prompt, *turns]
        made.append((prompt, " ".join(reversed(words[: 1 + number // 2])) + "."))
    return made


def build(family, folder):
    """Write one family; False if it is not there."""
    from transformers import AutoTokenizer

    from inform_rm import export_model
    from inform_rm.hub.engine_inputs import text_of
    from inform_rm.scoring.scorer import RewardScorer

    shutil.rmtree(folder, ignore_errors=True)
    if save_model(family, folder / "original") is None:
        return False
    export_model(str(folder / "original"), str(folder / "folded"), folded=True)
    scorer = RewardScorer(folder / "original", device="cpu", dtype="float32")
    rows = conversations()
    prompts, responses = [prompt for prompt, _ in rows], [response for _, response in rows]
    rewards = scorer.score(prompts, responses).tolist()
    tokenizer = AutoTokenizer.from_pretrained(folder / "folded")
    cases = {
        "offset": json.loads((folder / "folded" / "config.json").read_text())["reward_offset"],
        "messages": [[*prompt, {"role": "assistant", "content": response}] for prompt, response in rows],
        "prompts": [prompt[-1]["content"] for prompt in prompts],
        "responses": responses,
        "texts": [text_of(tokenizer, prompt, response) for prompt, response in rows],
        "ids": [scorer.encode(prompt, response, "row").input_ids for prompt, response in rows],
        "rewards": rewards,
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    for what, cut in (("first", slice(1, None)), ("last", slice(None, -1))):
        moved = scorer.score_encoded([ids[cut] for ids in cases["ids"]]).sub_(scorer.score_encoded(cases["ids"]))
        print(f"{family}: without the {what} token rewards move by {moved.min():.2g} to {moved.max():.2g}")
    return True


def main():
    folder, *families = sys.argv[1:]
    for family in families or FAMILIES:
        done = build(family, Path(folder, family))
        print(f"{family}: {'built' if done else 'left out, INFORM_RM_SHARED names no such model'}", flush=True)


if __name__ == "__main__":
    main()
