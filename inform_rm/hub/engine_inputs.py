"""What each engine feeds to a folded model, against what this package feeds to it.

An engine that renders or tokenizes otherwise gives the reward of other tokens, and nothing in its answer says so. The
rules stand in the functions below, each with the source that it was read from. `compare_engine_inputs` applies them to
a few conversations; `drop_bos_token` mends what verl does to tokenizers whose template begins with the BOS token;
`engine_advice` is what ``inform-rm export --folded`` prints.
"""

import copy
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from inform_rm.data.encoding import encode, shared_prefix_length
from inform_rm.data.messages import Message
from inform_rm.errors import InputError

Feed = Callable[[Any, list[Message], str], list[int]]

_USER, _SYSTEM = {"role": "user", "content": "Name a prime."}, {"role": "system", "content": "Be brief."}
_FIRST_TURNS = [_USER, {"role": "assistant", "content": "Seven."}, {"role": "user", "content": "And a larger one?"}]
# What a template may treat on its own: one turn, several, a system message. The response ends without blanks, which a
# policy's tokens keep and many templates trim.
_CONVERSATIONS: tuple[list[Message], ...] = ([_USER], _FIRST_TURNS, [_SYSTEM, _USER])
_RESPONSE = "It is 11, and 13."
# Classes that vLLM 0.32.0 does not load by themselves, and the one around which it builds the same classifier.
_VLLM_CLASSES = {"Gemma3TextForSequenceClassification": "Gemma3ForCausalLM"}


@dataclass(frozen=True)
class EngineInput:
    """Whether one way into a folded model feeds the tokens that the model was trained on.

    Attributes:
        way: engine and what is sent to it.
        difference: the first that was seen, such as a line break that is lacking at the end; ``None``: there is none.
        remedy: what to do where there is one.
        is_avoidable: the engine has a switch for it, which its advice names anyway: no reason to warn.
    """

    way: str
    difference: str | None
    remedy: str
    is_avoidable: bool

    @property
    def is_wrong(self) -> bool:
        """Whether the engine gives rewards of other text, without a switch against it."""
        return self.difference is not None and not self.is_avoidable


def text_of(tokenizer: Any, prompt: list[Message], response: str) -> str:
    """The text of a conversation: what the chat template makes of it, else prompt, response and end token."""
    if tokenizer.chat_template is None:
        return prompt[-1]["content"] + response + (tokenizer.eos_token or "")
    conversation = [*prompt, {"role": "assistant", "content": response}]
    return tokenizer.apply_chat_template(conversation, tokenize=False)


def feed_with_special_tokens(tokenizer: Any, prompt: list[Message], response: str) -> list[int]:
    """Text to vLLM's ``/classify`` or to SGLang: the tokenizer adds its special tokens, whatever the text begins with.

    vLLM 0.32.0, ``vllm/entrypoints/pooling/base/protocol.py``: ``add_special_tokens`` of a request with ``input`` is
    true unless said otherwise. SGLang 0.5.23, ``sglang/srt/managers/tokenizer_manager.py``: the tokenizer is called on
    the text, and the request has no such field.
    """
    return _ids(tokenizer, text_of(tokenizer, prompt, response), add_special_tokens=True)


def feed_messages(tokenizer: Any, prompt: list[Message], response: str) -> list[int]:
    """Messages to vLLM's ``/classify``: the tokenizer's chat template, and no special tokens on top.

    vLLM 0.32.0, ``vllm/entrypoints/pooling/base/protocol.py``: ``add_generation_prompt`` and ``add_special_tokens`` of
    a request with ``messages`` are false. Taken for granted: vLLM hands the template texts, not lists of parts, which
    it decides by reading the template. Without a template it refuses such a request.
    """
    if tokenizer.chat_template is None:
        raise InputError("the tokenizer has no chat template")
    return _ids(tokenizer, text_of(tokenizer, prompt, response), add_special_tokens=False)


def feed_verl(tokenizer: Any, prompt: list[Message], response: str) -> list[int]:
    """verl: the template's text without a BOS token in front, to vLLM's ``/classify`` or SGLang's embeddings.

    verl 0.9.1, ``verl/experimental/reward_loop/reward_loop.py``, ``_preprocess_reward_inputs``: a text that begins
    with ``bos_token`` loses it, for the engine's tokenizer to add it again, which not every tokenizer does. Without a
    template it fails.
    """
    if tokenizer.chat_template is None:
        raise InputError("the tokenizer has no chat template")
    text = text_of(tokenizer, prompt, response)
    return _ids(tokenizer, text.removeprefix(tokenizer.bos_token or ""), add_special_tokens=True)


def feed_openrlhf(tokenizer: Any, prompt: list[Message], response: str) -> list[int]:
    """OpenRLHF: the prompt as the template asks for a reply to it, then the policy's tokens, which end with EOS.

    OpenRLHF 0.11.2, ``openrlhf/utils/agent.py``, ``SingleTurnAgentExecutor``, and
    ``openrlhf/datasets/prompts_dataset.py`` with ``--data.apply_chat_template``: a model beside the policy gets these
    ids, a remote one their text with special tokens, which its server tokenizes without more. The policy is taken to
    have the same tokenizer and template.
    """
    start = prompt[-1]["content"]
    if tokenizer.chat_template is not None:
        start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [*_ids(tokenizer, start, False), *_ids(tokenizer, response, False), *end]


def feed_trl(tokenizer: Any, prompt: list[Message], response: str) -> list[int]:
    """TRL: the template's text of prompt and completion, without special tokens on top.

    TRL 1.16.0, ``trl/trainer/grpo_trainer.py`` and ``rloo_trainer.py``, ``_calculate_rewards``. Texts that are no
    conversations are glued, and the completion has lost its end token.
    """
    if tokenizer.chat_template is None:
        return _ids(tokenizer, prompt[-1]["content"] + response, add_special_tokens=False)
    return _ids(tokenizer, text_of(tokenizer, prompt, response), add_special_tokens=False)


_BY_HAND = "Reward through a function of your own that sends token ids"
_WAYS: tuple[tuple[str, Feed, str, bool], ...] = (
    ("vLLM /classify, messages", feed_messages, "Send token ids.", False),
    ("vLLM /classify, text", feed_with_special_tokens, "Send add_special_tokens: false, or messages.", True),
    ("SGLang /v1/embeddings, text", feed_with_special_tokens, "Send token ids.", True),
    ("verl", feed_verl, f"{_BY_HAND} (reward.custom_reward_function).", False),
    ("OpenRLHF", feed_openrlhf, "Train with a chat template in which the reply ends with the end token, or reward "
     "through a function of your own (--reward.remote_url FILE.py).", False),
    ("TRL", feed_trl, f"{_BY_HAND}.", False),
)  # fmt: skip


def compare_engine_inputs(tokenizer: Any) -> list[EngineInput]:
    """What each engine makes of a few conversations, against `encode`; those that a template refuses are left out."""
    return [
        EngineInput(way, _first_difference(tokenizer, feed), remedy, is_avoidable)
        for way, feed, remedy, is_avoidable in _WAYS
    ]


def drop_bos_token(tokenizer: Any) -> tuple[Any, str | None]:
    """A tokenizer that verl, too, feeds the model's own tokens, and the BOS token that it no longer names.

    Where the template begins with ``bos_token`` and the tokenizer does not add it, verl takes it away and nothing
    brings it back (SmolLM2, whose ``<|im_start|>`` is both). Without the name nothing is taken away. The token itself
    stays in the vocabulary; a template that asks for ``bos_token`` gets its text written in.

    Returns:
        The same tokenizer and ``None`` where verl feeds the right tokens, or where this would not help or would
        change what this package feeds.
    """
    template, name = tokenizer.chat_template, tokenizer.bos_token
    if not isinstance(template, str) or name is None or _first_difference(tokenizer, feed_verl) is None:
        return tokenizer, None
    mended = copy.deepcopy(tokenizer)
    mended.bos_token = None
    if "bos_token" in template:
        mended.chat_template = "{% set bos_token = " + json.dumps(name, ensure_ascii=False) + " %}" + template
    if _first_difference(mended, feed_verl) is not None or not reads_the_same(tokenizer, mended):
        return tokenizer, None
    return mended, name


def reads_the_same(tokenizer: Any, other: Any) -> bool:
    """Whether `encode` makes the same of the trial conversations with both tokenizers."""
    return all(encode(other, prompt, _RESPONSE).input_ids == ids for prompt, ids in _own_inputs(tokenizer))


def _own_inputs(tokenizer: Any) -> list[tuple[list[Message], list[int]]]:
    """The conversations that can be encoded, with their token ids; the first one always."""
    encoded = [(_CONVERSATIONS[0], encode(tokenizer, _CONVERSATIONS[0], _RESPONSE).input_ids)]
    for prompt in _CONVERSATIONS[1:]:
        try:
            encoded.append((prompt, encode(tokenizer, prompt, _RESPONSE).input_ids))
        except InputError:  # no template, or one without system messages
            continue
    return encoded


def _first_difference(tokenizer: Any, feed: Feed) -> str | None:
    for prompt, ids in _own_inputs(tokenizer):
        try:
            fed = feed(tokenizer, prompt, _RESPONSE)
        except InputError as error:
            return f"takes nothing: {error}"
        if fed != ids:
            return _describe(tokenizer, ids, fed)
    return None


def _describe(tokenizer: Any, ids: list[int], fed: list[int]) -> str:
    """Where two rows of token ids part: what the fed one has more or less, in front, at the end or between."""
    end = shared_prefix_length(ids[::-1], fed[::-1])
    start = shared_prefix_length(ids[: len(ids) - end], fed[: len(fed) - end])
    missing, added = ids[start : len(ids) - end], fed[start : len(fed) - end]
    where = "in front" if start == 0 else "at the end" if end == 0 else f"after {start} tokens"
    parts = [f"{verb} {tokenizer.decode(some)!r}" for verb, some in (("lacks", missing), ("adds", added)) if some]
    return f"{' and '.join(parts)} {where}"


def _ids(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]


def engine_advice(folder: str | Path) -> list[str]:
    """Lines about a folded model: its constant, vLLM's command, and what must be said in a request.

    Ways in which an engine feeds other tokens whatever is said were warned of when the folder was written.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (class_name,), offset = config["architectures"], config["reward_offset"]
    constant = f" {'-' if offset < 0 else '+'} {abs(offset)!r}" if offset else ""
    inputs = compare_engine_inputs(AutoTokenizer.from_pretrained(folder))
    said = [
        f"{item.way}: {item.difference}. {item.remedy}" for item in inputs if item.difference and item.is_avoidable
    ]
    return [
        f"{class_name}: reward of the model = folded reward{constant}",
        f"vLLM: {vllm_command(str(folder), class_name, offset)}",
        *said,
    ]


def vllm_command(model: str, class_name: str, offset: float) -> str:
    """The command that serves a folded model with its constant added.

    vLLM 0.32.0, ``vllm/config/pooler.py``: what ``logit_mean`` holds is subtracted.
    """
    command = ["vllm", "serve", model, "--runner", "pooling"]
    if class_name in _VLLM_CLASSES:
        overrides = json.dumps({"architectures": [_VLLM_CLASSES[class_name]]})
        command += ["--convert", "classify", "--hf-overrides", overrides]
    if offset:
        command += ["--pooler-config", json.dumps({"logit_mean": -offset})]
    return shlex.join(command)
