"""The tokenizer and the small Llama of the embedded world, both made from its own text; nothing is downloaded."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from inform_rm.encoding import encode_many
from inform_rm.worlds import WorldConfig, make_pairs, sample_prompts, sample_responses

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "<|assistant|>{{ message['content'] }}{{ eos_token }}{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>")


def train_tokenizer(vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the world's text, with its chat template.

    Any text can be encoded (bytes), and nearly every word of the world is one token. bos, eos and pad are distinct. The
    world has too few words to fill the vocabulary: `len(tokenizer)` is about 850.
    """
    world = WorldConfig()
    rows = make_pairs(world, "train", 800) + make_pairs(world, "unseen_family", 200)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (row[field] for row in rows for field in ("prompt", "chosen", "rejected")),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
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
        model_max_length=256,
    )


def small_llama_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """A Llama of 1.2 million parameters.

    Four layers: finding a requested word, comparing it and passing the outcome on to the last token take one each, and
    models of two and three layers learnt to heed the prompt later, if at all.
    """
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train_backbone(
    folder: str | Path, world: WorldConfig, *, num_steps: int = 400, batch_size: int = 16, seed: int = 0
) -> list[float]:
    """Train a language model from scratch on right answers of the world and save it as a causal-LM folder.

    Reward models start from a language model; this is the world's. It sees prompts of the training families with
    responses that do what is asked, in styles that are independent of content, and no preference.

    Args:
        folder: where the model and its tokenizer go.
        world: the world; its unseen families are not shown.
        num_steps: AdamW steps.
        batch_size: texts a step.
        seed: seed of the weights.

    Returns:
        The loss of each step, in nats per token.
    """
    tokenizer = train_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(small_llama_config(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, max(0.1, 0.5 + 0.5 * math.cos(math.pi * step / num_steps)))
    )
    prompts = sample_prompts(world, num_steps * batch_size, seed=seed)
    responses = [sample_responses(prompt, 1, seed=index, word_accuracy=1.0)[0] for index, prompt in enumerate(prompts)]
    texts = [encoded.input_ids for encoded in encode_many(tokenizer, prompts, responses)]
    losses = []
    for start in tqdm(range(0, len(texts), batch_size), desc="language model", unit="step"):
        loss = _language_model_loss(model, texts[start : start + batch_size])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return losses


def _language_model_loss(model: LlamaForCausalLM, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    longest = max(map(len, texts))
    input_ids = torch.zeros(len(texts), longest, dtype=torch.long)
    labels = torch.full_like(input_ids, -100)
    for row, ids in enumerate(texts):
        input_ids[row, : len(ids)] = labels[row, : len(ids)] = torch.tensor(ids)
    logits = model(input_ids=input_ids, attention_mask=(labels >= 0).long(), use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
