"""Responses that were written before, by `inform-rm generate` or elsewhere, in place of a model that writes them."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from inform_rm.data.messages import to_messages
from inform_rm.data.records import data_suffix
from inform_rm.data.response_rows import RowFault, score_rows_or_faults
from inform_rm.data.sources import Source, source_digest, source_label
from inform_rm.errors import InputError
from inform_rm.scoring.scorer import Prompt


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
