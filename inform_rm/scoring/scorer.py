"""Rewards of responses from any sequence-classification reward model, the same however they are batched."""

import inspect
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from inform_rm.data.encoding import Encoded, encode_groups
from inform_rm.data.messages import Fault, conversation, found
from inform_rm.data.rendered_text import not_as_written, warn_of_text
from inform_rm.data.tokenizer import check_vocabulary, fix_date, load_tokenizer, warn_of_no_template
from inform_rm.errors import InputError, check_choice, check_whole_number, shortened
from inform_rm.scoring.packing import (
    default_tokens_per_batch,
    engine_line,
    eval_mode_of,
    pack_sequences,
    packed_attention_of,
    packed_batches,
    packed_rewards,
    split_at,
    why_not_packed,
)
from inform_rm.scoring.reward_models import (
    checked_max_length,
    fingerprint_model,
    fingerprint_tokenizer,
    load_reward_model,
)
from inform_rm.util.processes import computed_in_turn, join_processes, num_processes

logger = logging.getLogger(__name__)

_ENOUGH_TOKENS = 1024

Prompt = str | list[dict[str, str]]
Scores = tuple[Tensor, Tensor | None, int]  # rewards, their standard deviations, tokens computed


class NonFiniteRewardError(RuntimeError):
    """A model gave NaN or infinity as a reward; ``row`` is the row's place in the input, from 0."""

    def __init__(self, row: int, value: float, where: str | None = None):
        super().__init__(
            f"{where or row_name(row)} has the reward {value}; expected a finite number. The model's weights are "
            "broken, or its dtype overflows: try dtype='float32'."
        )
        self.row, self.value = row, value


def row_name(row: int) -> str:
    """A row of an argument, for messages."""
    return f"row {row} (counted from 0)"


class RewardScorer:
    """Scores responses with any reward model: a folder, a Hub id or a loaded model with one output.

    Rows are batched by a token budget; in float32 a reward differs by less than 1e-5 from that of a batch of one.
    Batches are packed (`inform_rm.scoring.packing`): a prompt is computed once for its responses, and nothing is
    padded. A model with which that gives other rewards, found out on a few random tokens when the scorer is made, is
    run on padded batches, and a log line says why. The sequence classifiers of transformers find the last token by
    ``config.pad_token_id``: rows are padded with that id or, where a model has none, scored one at a time.

    Args:
        model: folder, Hub id (see `load_reward_model`) or a loaded model, whose device and dtype are kept.
        tokenizer: by default the one beside the model. A loaded model needs it for text, not for token ids. Where its
            chat template reads the clock, a copy with a fixed date is used (`inform_rm.data.tokenizer.fix_date`).
        max_length: longest accepted input in tokens, by default the model's own limit; nothing is cut.
        tokens_per_batch: tokens in one forward pass, with padding or, packed, with each prompt counted once; a longer
            row makes a batch of its own, and many responses to a long prompt may take four times its tokens. By
            default 2048 on a CPU, else 8192.
        device: see `load_reward_model`, as dtype, trust_remote_code and revision.
        chat_template: see `inform_rm.data.tokenizer.load_tokenizer`.
        batching: ``"packed"`` or ``"padded"``.
        split_over_processes: every process of an ``accelerate launch`` asks for the rewards of the same rows and gets
            them all, but computes its share of the batches alone, on the GPU that belongs to it.

    Attributes:
        tokens_computed: tokens that went through the model so far, with padding, in all processes that share the work.

    Raises:
        InputError: if the model is no reward model, or the tokenizer is missing or does not fit it.
    """

    _told_of_text = False

    def __init__(
        self,
        model: str | Path | torch.nn.Module,
        tokenizer: Any = None,
        *,
        max_length: int | None = None,
        tokens_per_batch: int | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        chat_template: str | None = None,
        batching: str = "packed",
        split_over_processes: bool = False,
    ):
        for name, value in (("max_length", max_length), ("tokens_per_batch", tokens_per_batch)):
            if value is not None:
                check_whole_number(name, value)
        check_choice("batching", batching, ("packed", "padded"))
        self.split_over_processes = split_over_processes
        self.model: Any
        if isinstance(model, str | Path):
            self.name = str(model)
            if split_over_processes:
                join_processes(device)
            origin: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
            self.model = load_reward_model(model, dtype=dtype, device=device, **origin)
            if tokenizer is None:
                tokenizer = load_tokenizer(model, chat_template=chat_template, **origin)
        else:
            given = {"device": device, "dtype": dtype, "revision": revision, "chat_template": chat_template}
            for key, setting in given.items():
                if setting is not None:
                    raise InputError(f"{key} applies to a model named by folder or Hub id; this one is loaded.")
            self.name = getattr(model, "name_or_path", "") or type(model).__name__
            self.model = model
            if self.model.config.num_labels != 1:
                raise InputError(f"model: num_labels is {self.model.config.num_labels}; a reward model has 1.")
        self.tokenizer = fix_date(tokenizer, self.name)
        warn_of_no_template(self.tokenizer, self.name)
        self.tokens_per_batch = tokens_per_batch or default_tokens_per_batch(self.model)
        self.max_length = checked_max_length(self.model, max_length)
        self._vocabulary_size = self.model.get_input_embeddings().weight.shape[0]
        if tokenizer is not None:
            check_vocabulary(tokenizer, self._vocabulary_size)
        self.tokens_computed = 0
        reason = why_not_packed(self.model) if batching == "packed" else "asked for"
        level = logging.WARNING if reason is not None and batching == "packed" else logging.INFO
        self.batching = "packed" if reason is None else "padded"
        logger.log(level, "%s is scored on %s.", self.name, engine_line(self.model, reason))
        is_inform = self.model.config.model_type == "inform"
        # The classifiers of transformers read the reward at the last token that is not this id; InfoRM asks the mask.
        self._pad_id = None if is_inform else getattr(self.model.config.get_text_config(), "pad_token_id", None)
        self._can_pad = is_inform or (self._pad_id is not None and 0 <= self._pad_id < self._vocabulary_size)
        if self.batching == "padded" and not self._can_pad:
            text = "%s has no usable pad_token_id in its config (%r): rows are scored one at a time. Set it for speed."
            logger.warning(text, self.name, self._pad_id)

    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        uncertainty: int | None = None,
        progress: bool = False,
    ) -> Any:
        """Rewards of (prompt, response) rows.

        Args:
            prompts: N prompts: text, or a list of ``{"role", "content"}`` messages.
            responses: N responses.
            uncertainty: for InfoRM models: mean and standard deviation over this many draws of the latent, at least 2.
            progress: show a progress bar.

        Returns:
            ``(N,)`` float32 rewards on the CPU, in input order; with ``uncertainty`` a tuple of two such tensors.

        Raises:
            InputError: on unequal numbers of prompts and responses, or a row that cannot be encoded or is too long.
            NonFiniteRewardError: if the model gives NaN or infinity.
        """
        if isinstance(prompts, str) or isinstance(responses, str):
            raise InputError("score expects lists of prompts and responses, got a single text. Put it in a list.")
        if len(prompts) != len(responses):
            raise InputError(f"{len(prompts)} prompts for {len(responses)} responses; expected one prompt each.")
        encoded = self.encode_all(prompts, responses, [row_name(row) for row in range(len(prompts))])
        sequences, prompt_lengths = [row.input_ids for row in encoded], [len(row.prompt_ids) for row in encoded]
        return self.score_encoded(sequences, prompt_lengths, uncertainty, progress)

    def score_messages(
        self, conversations: Sequence[list[dict[str, str]]], uncertainty: int | None = None, progress: bool = False
    ) -> Any:
        """Rewards of the last replies of N conversations, each after the turns before it; for the rest see `score`.

        A conversation is a list of ``{"role", "content"}`` messages that ends with a turn of the assistant.

        Example::

            scorer.score_messages([[{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]])
        """
        prompts: list[Prompt] = []
        responses = []
        for row, messages in enumerate(conversations):
            try:
                turns = conversation("the conversation", messages) or []
            except Fault as fault:
                raise InputError(f"{row_name(row)}: {fault}") from None
            if len(turns) < 2 or turns[-1]["role"] != "assistant":
                raise InputError(
                    f"{row_name(row)} is {shortened(repr(messages), 60)}; expected a list of messages that "
                    "ends with a reply of the assistant."
                )
            prompts.append(turns[:-1])
            responses.append(turns[-1]["content"])
        return self.score(prompts, responses, uncertainty, progress)

    def score_encoded(
        self,
        sequences: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int] | None = None,
        uncertainty: int | None = None,
        progress: bool = False,
    ) -> Any:
        """Rewards of N rows of token ids, without padding; see `iter_scores` and, for the rest, `score`."""
        rewards, stds = torch.full((2, len(sequences)), float("nan"), dtype=torch.float32)
        with tqdm(total=len(sequences), unit="row", desc="score", disable=not progress) as bar:
            for rows, batch_rewards, batch_stds in self.iter_scores(sequences, prompt_lengths, uncertainty):
                rewards[rows] = batch_rewards
                if batch_stds is not None:
                    stds[rows] = batch_stds
                bar.update(len(rows))
        return rewards if uncertainty is None else (rewards, stds)

    def encode(self, prompt: Prompt, response: str, where: str) -> Encoded:
        """Token ids of one row as the model sees them; ``where`` names the row in an error."""
        return self.encode_all([prompt], [response], [where])[0]

    def encode_all(self, prompts: Sequence[Prompt], responses: Sequence[str], places: Sequence[str]) -> list[Encoded]:
        """`encode` for many rows at once; what the chat template deletes of them is logged."""
        for response, where in zip(responses, places, strict=True):
            if not isinstance(response, str):
                raise InputError(f"{where}: the response is {found(response)}; expected its text.")
        encoded = []
        for row in self.encode_each(prompts, responses, places):
            if isinstance(row, InputError):
                raise row
            encoded.append(row)
        self.tell_of_text(encoded, places)
        return encoded

    def encode_each(
        self, prompts: Sequence[Prompt], responses: Sequence[str], places: Sequence[str]
    ) -> list[Encoded | InputError]:
        """`encode` for many rows at once, with the error of a row that the model cannot take in its place."""
        if self.tokenizer is None:
            raise InputError("tokenizer: a loaded model scores text only with its tokenizer. Pass tokenizer=...")
        encoded: list[Encoded | InputError] = []
        groups = encode_groups(self.tokenizer, prompts, [[response] for response in responses])
        for group, where in zip(groups, places, strict=True):
            try:
                if isinstance(group, InputError):
                    raise InputError(f"{where}: {group}") from group
                self.check_ids(group[0].input_ids, where)
                encoded += group
            except InputError as error:
                encoded.append(error)
        return encoded

    def tell_of_text(self, encoded: Sequence[Encoded], places: Sequence[str]) -> None:
        """Log what is not read as it stands, the first time only: servers ask for rewards for ever."""
        if not self._told_of_text:
            found = [row.not_as_written and f"{where}: {row.not_as_written}"
                     for row, where in zip(encoded, places, strict=True)]  # fmt: skip
            warn_of_text(not_as_written(found), len(found), "rows")
            self._told_of_text = any(found)

    def iter_scores(
        self,
        sequences: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int] | None = None,
        uncertainty: int | None = None,
        check_finite: bool = True,
    ) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
        """Yield ``(rows, rewards, reward_stds)`` by batches, longest first; ``rows`` are places in ``sequences``.

        Args:
            sequences: N rows of token ids.
            prompt_lengths: tokens at the start of each row that are its prompt. Rows with the same prompt tokens share
                their computation (``batching="packed"``); the rewards are the same.
            uncertainty: see `score`.
            check_finite: raise `NonFiniteRewardError` on NaN or infinity instead of handing it on.
        """
        self.check_uncertainty(uncertainty)
        for row, ids in enumerate(sequences):
            self.check_ids(ids, row_name(row))
        lengths = [0] * len(sequences) if prompt_lengths is None else prompt_lengths
        if self.batching == "padded":
            batches, forward = self._padded_batches(sequences), self._padded_forward
        else:
            batches = packed_batches(*split_at(sequences, lengths), self.tokens_per_batch)
            forward = self._packed_forward

        def compute(rows: list[int]) -> Scores:
            try:
                return forward([sequences[row] for row in rows], [lengths[row] for row in rows], uncertainty)
            except torch.OutOfMemoryError:
                if len(rows) < 2 or (self.split_over_processes and num_processes() > 1):
                    raise  # the other processes wait in this pass
            self.tokens_per_batch = max(self.tokens_per_batch // 2, 1)
            logger.warning("A batch of %d rows is too much for the memory of %s: it is split, and later ones hold at "
                           "most %d tokens.", len(rows), self.model.device, self.tokens_per_batch)  # fmt: skip
            halves = [
                forward([sequences[row] for row in half], [lengths[row] for row in half], uncertainty)
                for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :])
            ]
            rewards, stds, tokens = zip(*halves, strict=True)
            return torch.cat(rewards), None if uncertainty is None else torch.cat(stds), sum(tokens)

        plain = ((rows, compute(rows)) for rows in batches)
        with eval_mode_of(self.model):
            computed = computed_in_turn(batches, compute) if self.split_over_processes else plain
            for rows, (rewards, stds, tokens) in computed:
                self.tokens_computed += tokens
                for values in (rewards, stds):
                    if check_finite and values is not None and not values.isfinite().all():
                        place = int(values.isfinite().int().argmin())
                        raise NonFiniteRewardError(rows[place], values[place].item())
                yield rows, rewards, stds

    def check_uncertainty(self, uncertainty: int | None) -> None:
        """Raise `InputError` unless the model can give this many reward samples (``None`` always passes)."""
        if uncertainty is None:
            return
        check_whole_number("uncertainty", uncertainty, least=2)
        if self.model.config.model_type != "inform" or self.model.config.architecture != "inform":
            raise InputError(f"uncertainty: {self.name} has no latent to draw from; InfoRM models have. Leave it out.")

    def identity(self) -> dict[str, Any]:
        """What decides a reward: weights, tokenizer and dtype, as text that is equal on every machine."""
        return {
            "model": fingerprint_model(self.model),
            "tokenizer": None if self.tokenizer is None else fingerprint_tokenizer(self.tokenizer),
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def _padded_batches(self, sequences: Sequence[Sequence[int]]) -> list[list[int]]:
        """Rows in batches of similar length whose padded size keeps the token budget; longest first, to fail early."""
        batches: list[list[int]] = []
        padded = 0  # tokens of the last batch, with padding
        for row in sorted(range(len(sequences)), key=lambda row: -len(sequences[row])):
            longest = len(sequences[batches[-1][0]]) if batches else 0
            is_full = padded + longest > self.tokens_per_batch
            # From some size on a larger batch saves less than the padding of a much shorter row costs.
            is_ragged = padded >= _ENOUGH_TOKENS and len(sequences[row]) < 0.8 * longest
            if not batches or is_full or is_ragged or not self._can_pad:
                batches.append([])
                padded, longest = 0, len(sequences[row])
            batches[-1].append(row)
            padded += longest
        return batches

    @torch.no_grad()
    def _packed_forward(
        self, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int], uncertainty: int | None
    ) -> Scores:
        row = pack_sequences(sequences, prompt_lengths, self._pad_id)
        with packed_attention_of(self.model):
            rewards, stds = packed_rewards(self.model, row, reward_samples=uncertainty)
        return rewards.float().cpu(), None if stds is None else stds.float().cpu(), row.input_ids.numel()

    @torch.no_grad()
    def _padded_forward(
        self, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int], uncertainty: int | None
    ) -> Scores:
        device = self.model.get_input_embeddings().weight.device
        input_ids = pad_sequence([torch.tensor(ids) for ids in sequences], True, self._pad_id or 0)
        lengths = torch.tensor([[len(ids)] for ids in sequences])
        inputs = {"input_ids": input_ids, "attention_mask": (torch.arange(input_ids.shape[1]) < lengths).long()}
        options: dict[str, Any] = {} if uncertainty is None else {"reward_samples": uncertainty}
        if "use_cache" in inspect.signature(self.model.forward).parameters:
            options["use_cache"] = False
        output = self.model(**{name: tensor.to(device) for name, tensor in inputs.items()}, **options)
        logits = output.logits if hasattr(output, "logits") else output[0]
        if logits.shape != (len(sequences), 1):
            shapes = f"{tuple(logits.shape)}; expected {(len(sequences), 1)}, one reward a row"
            raise InputError(f"model: {self.name} gave logits of shape {shapes}.")
        stds = None if uncertainty is None else output.reward_std.flatten().float().cpu()
        return logits.flatten().float().cpu(), stds, input_ids.numel()

    def check_ids(self, ids: Sequence[int], where: str) -> None:
        """Raise `InputError` unless the model can take the token ids; ``where`` names the row."""
        if len(ids) == 0:
            raise InputError(f"{where} has no tokens; expected at least one.")
        if self.max_length is not None and len(ids) > self.max_length:
            raise InputError(
                f"{where} has {len(ids)} tokens; the limit is {self.max_length}. Shorten or leave out the row; inputs "
                "are never cut silently. A larger max_length lifts the limit if the model can take it."
            )
        for token in (min(ids), max(ids)):
            if not 0 <= token < self._vocabulary_size:
                raise InputError(
                    f"{where} has the token id {token}; the model's vocabulary has {self._vocabulary_size}. Use the "
                    "tokenizer that belongs to the model."
                )


def as_scorer(model: Any, tokenizer: Any, options: dict[str, Any]) -> RewardScorer:
    """A `RewardScorer` with its tokenizer: the given one, or one made from model, tokenizer and keywords.

    Raises:
        InputError: if there is no tokenizer, or a scorer comes with settings that it has already.
    """
    is_scorer = isinstance(model, RewardScorer)
    if is_scorer and (tokenizer is not None or options):
        raise InputError("model: a RewardScorer has its tokenizer and options already. Set them on the scorer.")
    scorer = model if is_scorer else RewardScorer(model, tokenizer, **options)
    if scorer.tokenizer is None:
        raise InputError("tokenizer: a loaded model needs its tokenizer here. Pass tokenizer=...")
    return scorer
