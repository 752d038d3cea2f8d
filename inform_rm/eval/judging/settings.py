"""Settings of `inform_rm.judge`. Imports nothing heavy."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from inform_rm.errors import InputError
from inform_rm.eval.generation.settings import ON_BAD_ROW, check_temperature
from inform_rm.util.settings import check_settings, setting


@dataclass(frozen=True)
class JudgeSettings:
    """How the judge is asked.

    The built-in prompt and what another must have: `inform_rm.eval.judging.prompts.JudgePrompt`. Prices are in
    whatever currency. ``seed`` is sent with each request, and that of resamples.
    """

    columns: Mapping[str, str] | None = None
    prompt_file: str | None = setting(None, "Jinja template in place of the built-in prompt")
    temperature: float = setting(0.0, "of the judge")
    max_answer_tokens: int = setting(1024, "of the judge", least=1)
    price_input: float | None = setting(None, "of a million prompt tokens: adds the cost")
    price_output: float | None = setting(None, "of a million answered tokens")
    on_bad_row: str = setting(
        "error", "stop at a row that cannot be read, or leave it out, count and list it", choices=ON_BAD_ROW
    )
    seed: int = setting(0, "sent with each request", least=0)

    def __post_init__(self) -> None:
        check_settings(self)
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
