"""The tokenizer and the small Llama of the embedded world, both made from its own text; nothing is downloaded."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from inform_rm.world.worlds import WorldConfig, make_pairs

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "<|assistant|>{{ message['content'] }}{{ eos_token }}{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MAX_LENGTH = 256  # tokens, several times what a response of the world and its prompt have
_SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>")


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the world's text, with its chat template.

    Any text can be encoded (bytes), and nearly every word of the world is one token. bos, eos and pad are distinct.
    The world has too few words to fill the vocabulary: `len(tokenizer)` is about 850.
    """
    world = WorldConfig()
    rows = make_pairs(world, "train", 800) + make_pairs(world, "unseen_family", 200)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (row[field] for row in rows for field in ("prompt", "chosen", "rejected")),
        trainers.BpeTrainer(
            vocab_size=1024,
            special_tokens=list(_SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    pad, bos, eos, *roles = _SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens=roles,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
    )


def small_llama_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """A Llama of 1.2 million parameters.

    Four layers: of a few single runs of equal cost, those with two and three layers heeded the prompt less.
    """
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def write_backbone(folder: str | Path, seed: int = 0) -> None:
    """Write an untrained `small_llama_config` model and its tokenizer as an ordinary causal-LM folder."""
    tokenizer = train_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(small_llama_config(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
