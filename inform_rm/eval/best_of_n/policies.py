"""Where best-of-n takes prompts and responses from: preference data, a language model, and files of responses."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from datasets import concatenate_datasets
from transformers import GenerationConfig

from inform_rm.data.messages import to_messages
from inform_rm.data.preferences import load_preferences
from inform_rm.data.records import data_suffix
from inform_rm.data.response_rows import RowFault, score_rows_or_faults
from inform_rm.data.sources import Source, source_digest, source_label, source_list
from inform_rm.data.tokenizer import fix_date, load_tokenizer, render
from inform_rm.decomposition.gap_grid import distinct_prompts
from inform_rm.errors import InputError, check_whole_number
from inform_rm.scoring.packing import eval_mode_of
from inform_rm.scoring.reward_models import (
    checked_max_length,
    fingerprint_model,
    fingerprint_tokenizer,
    load_causal_lm,
)
from inform_rm.scoring.scorer import Prompt

# Prompt and new tokens of the sequences that are generated together; a 7B model needs about 8 GiB of cache for them.
TOKENS_PER_BATCH = 16384


class Policy(Protocol):
    """Writes independent responses to a prompt; the same prompt and seed give the same ones."""

    name: str

    def sample(self, prompt: Prompt, num_responses: int, seed: int) -> list[str]:
        """``num_responses`` independent responses."""

    def identity(self) -> dict[str, Any]:
        """What decides the responses, apart from the seed, as JSON values."""


class CausalLMPolicy:
    """Samples from a causal language model: temperature only, no cut of unlikely tokens, to the end token.

    ``model`` is a folder, a Hub id or a loaded model, which needs its ``tokenizer``. A response that has not ended
    after ``max_new_tokens`` is cut there, and counted. The other keywords are those of `RewardScorer`, for what is
    loaded here.

    Attributes:
        num_cut: responses cut so far.
        end_ids: tokens that end a response.

    Raises:
        InputError: on a model that cannot be loaded, a temperature or number of tokens that is not positive, or a
            chat template for a tokenizer that is loaded already.
    """

    def __init__(
        self,
        model: str | Path | torch.nn.Module,
        tokenizer: Any = None,
        *,
        temperature: float = 1.0,
        max_new_tokens: int = 128,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        chat_template: str | None = None,
    ):
        if isinstance(temperature, bool) or not 0 < temperature < float("inf"):
            raise InputError(f"temperature: {temperature!r}; expected a number above 0.")
        check_whole_number("max_new_tokens", max_new_tokens)
        if chat_template is not None and (tokenizer is not None or not isinstance(model, str | Path)):
            raise InputError("chat_template: set it on the tokenizer that you pass, or leave the tokenizer out.")
        self.model: Any
        if isinstance(model, str | Path):
            self.name = str(model)
            hub: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
            self.model = load_causal_lm(model, device=device, **hub)
            tokenizer = tokenizer or load_tokenizer(model, chat_template=chat_template, **hub)
        else:
            self.name = getattr(model, "name_or_path", "") or type(model).__name__
            self.model = model
        if tokenizer is None:
            raise InputError("tokenizer: a loaded policy needs its tokenizer. Pass tokenizer=...")
        self.tokenizer = tokenizer = fix_date(tokenizer, "policy")
        self.temperature, self.max_new_tokens, self.num_cut = temperature, max_new_tokens, 0
        # Chat models end a turn with a token of their own, which only the generation config may name.
        ends = self.model.generation_config.eos_token_id
        self.end_ids = sorted({tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None})
        self._generation = GenerationConfig(
            do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
            eos_token_id=self.end_ids or None, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip

    def sample(self, prompt: Prompt, num_responses: int, seed: int) -> list[str]:
        """Responses to one prompt; `InputError` as of `prompt_ids`."""
        ids = self.prompt_ids(prompt)
        device = self.model.get_input_embeddings().weight.device
        batch = max(1, TOKENS_PER_BATCH // (len(ids) + self.max_new_tokens))
        key = hashlib.sha256(f"policy/{seed}/{ids}".encode()).digest()
        responses: list[str] = []
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), eval_mode_of(self.model):
            torch.manual_seed(int.from_bytes(key[:7], "big"))
            while len(responses) < num_responses:
                input_ids = torch.tensor([ids] * min(batch, num_responses - len(responses)), device=device)
                output = self.model.generate(
                    input_ids=input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    generation_config=self._generation,
                )
                new = output[:, len(ids) :].cpu()
                has_end = torch.isin(new, torch.tensor(self.end_ids, dtype=new.dtype)).any(dim=1)
                self.num_cut += int((~has_end).sum())
                responses += self.decode(new)
        return responses

    def identity(self) -> dict[str, Any]:
        """Weights, tokenizer and how tokens are drawn."""
        return {
            "name": self.name,
            "model": fingerprint_model(self.model),
            "tokenizer": fingerprint_tokenizer(self.tokenizer),
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
        }

    def decode(self, ids: torch.Tensor) -> list[str]:
        """The texts of ``(N, T)`` generated ids."""
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        # A chat template puts its own white space around a reply; without one the text goes on as it is.
        return [text.strip() for text in texts] if self.tokenizer.chat_template else texts

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids to go on from; `InputError` if it cannot be rendered, or leaves no room for ``max_new_tokens``."""
        messages = to_messages(prompt)
        if self.tokenizer.chat_template is not None:
            ids = list(render(self.tokenizer, [messages], add_generation_prompt=True)[0])
        elif len(messages) > 1:
            raise InputError(
                f"policy: a prompt of {len(messages)} messages needs a chat template and the tokenizer has none."
            )
        else:
            ids = list(self.tokenizer(messages[0]["content"])["input_ids"])
            ids = ids[:-1] if ids[-1:] == [self.tokenizer.eos_token_id] else ids
        limit = checked_max_length(self.model, None)
        if not ids:
            raise InputError("the prompt has no tokens.")
        if limit is not None and len(ids) + self.max_new_tokens > limit:
            raise InputError(
                f"the prompt has {len(ids)} tokens; these and max_new_tokens={self.max_new_tokens} exceed the {limit} "
                "that the model can take. Lower max_new_tokens or leave out the prompt."
            )
        return ids


def is_recorded(policy: Any) -> bool:
    """Whether a policy is named by a file of responses."""
    return isinstance(policy, str | Path) and data_suffix(Path(policy).name) is not None


class RecordedPolicy:
    """The responses of a source, as a `Policy`: those to a prompt in order, whatever the seed.

    The source has rows with ``prompt`` and ``response``, see `inform_rm.data.response_rows.score_rows_or_faults`;
    `InputError` for one that cannot be read.

    Attributes:
        prompts: distinct prompts, in order.
        num_cut: responses given so far whose ``finish_reason`` is ``"length"``.
    """

    def __init__(self, source: Source):
        self.name, self._digest, self.num_cut = source_label(source), source_digest(source), 0
        self._responses: dict[str, list[tuple[str, bool]]] = defaultdict(list)
        found: dict[str, Prompt] = {}
        for row in score_rows_or_faults(source):
            if isinstance(row, RowFault):
                raise InputError(row.reason)
            key = json.dumps(row.prompt)
            found.setdefault(key, row.prompt)
            self._responses[key].append((row.response, row.fields.get("finish_reason") == "length"))
        self.prompts = list(found.values())

    def sample(self, prompt: Prompt, num_responses: int, seed: int) -> list[str]:
        """The first ``num_responses`` to a prompt; `InputError` if there are fewer."""
        own = self._responses.get(json.dumps(to_messages(prompt)), [])
        if len(own) < num_responses:
            raise InputError(
                f"policy: {self.name} has {len(own)} responses to the prompt {str(prompt)[:60]!r}; asked for are "
                f"{num_responses}. Lower num_responses, or write more: generate with num_samples."
            )
        self.num_cut += sum(is_cut for _, is_cut in own[:num_responses])
        return [text for text, _ in own[:num_responses]]

    def identity(self) -> dict[str, Any]:
        """Name and digest of the source."""
        return {"name": self.name, "digest": self._digest}


def choose_prompts(
    prompts: Sequence[Prompt] | None = None,
    data: "Source | Sequence[Source] | None" = None,
    num_prompts: int | None = None,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
) -> list[Prompt]:
    """Distinct prompts (texts or lists of messages) from a list or from the preference pairs of ``data``.

    With ``num_prompts`` a random subset of this many, drawn with ``seed``. `InputError` for both, neither or bad
    sources, an empty or repeated prompt, or fewer than asked for.
    """
    if (prompts is None) == (data is None):
        given = "neither" if data is None else "both"
        raise InputError(f"prompts and data: {given} given; expected one source of prompts.")
    if isinstance(prompts, str):
        raise InputError("prompts: got a single text; expected a list of prompts.")
    if data is not None:
        pairs = concatenate_datasets([load_preferences(each, columns=columns).dataset for each in source_list(data)])
        prompts = [pairs[int(row)]["prompt"] for row in distinct_prompts(pairs)[0]]
    found = list(prompts or ())
    first: dict[str, int] = {}
    for place, prompt in enumerate(found):
        key = json.dumps(to_messages(prompt))
        if key in first:
            # It would get the same responses again and count twice.
            raise InputError(f"prompts: number {place} (from 0) repeats number {first[key]}. Give each once.")
        first[key] = place
    if num_prompts is not None and num_prompts < len(found):
        chosen = np.random.default_rng(seed).choice(len(found), num_prompts, replace=False)
        found = [found[place] for place in sorted(chosen.tolist())]
    if len(found) < max(2, num_prompts or 2):
        raise InputError(f"prompts: there are {len(found)} distinct ones; expected at least {num_prompts or 2}.")
    return found
