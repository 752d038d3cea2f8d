"""Settings of `inform_rm.judge`. Imports nothing heavy."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from inform_rm.errors import InputError, check_choice, check_whole_number
from inform_rm.eval.generation.settings import check_temperature


@dataclass(frozen=True)
class JudgeSettings:
    """How the judge is asked.

    Attributes:
        columns: which columns are prompt, response, system and history.
        prompt_file: Jinja file in place of the built-in prompt, see `inform_rm.eval.judging.prompts.JudgePrompt`.
        temperature: of the judge.
        max_answer_tokens: its longest answer.
        price_input: price of a million prompt tokens, in whatever currency; with ``price_output`` that of a million
            answered ones.
        on_bad_row: ``"error"``, or ``"skip"``, which leaves out, counts and lists rows that cannot be read.
        seed: sent with each request, and of resamples.

    Raises:
        InputError: a value out of range, by name.
    """

    columns: Mapping[str, str] | None = None
    prompt_file: str | None = None
    temperature: float = 0.0
    max_answer_tokens: int = 1024
    price_input: float | None = None
    price_output: float | None = None
    on_bad_row: str = "error"
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole_number("max_answer_tokens", self.max_answer_tokens)
        check_whole_number("seed", self.seed, 0)
        check_choice("on_bad_row", self.on_bad_row, ("error", "skip"))
        check_temperature(self.temperature)
        for name in ("price_input", "price_output"):
            price = getattr(self, name)
            if price is not None and (isinstance(price, bool) or not 0 <= price < math.inf):
                raise InputError(f"{name}: {price!r}; expected the price of a million tokens, 0 or more.")
        if (self.price_input is None) != (self.price_output is None):
            raise InputError("price_input, price_output: give both or neither, or the cost would be half of it.")

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """What so many tokens cost; ``None`` without prices."""
        if self.price_input is None or self.price_output is None:
            return None
        return (prompt_tokens * self.price_input + completion_tokens * self.price_output) / 1e6
