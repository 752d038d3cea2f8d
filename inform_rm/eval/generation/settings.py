"""Settings of `inform_rm.generate`, and of every call that asks an endpoint. Imports nothing heavy."""

from collections.abc import Mapping
from dataclasses import dataclass

from inform_rm.errors import InputError, check_choice, check_whole_number
from inform_rm.util.endpoint import ChatEndpoint


@dataclass(frozen=True)
class EndpointSettings:
    """How an OpenAI-compatible endpoint is asked; the key itself is no setting.

    Attributes:
        endpoint: see `inform_rm.util.endpoint.ChatEndpoint`, like the next three.
        api_key_env: name of the environment variable that holds the key.
        timeout: seconds.
        tries: at most.
        concurrency: requests under way at once.
    """

    endpoint: str
    api_key_env: str | None = None
    timeout: float = 300.0
    tries: int = 6
    concurrency: int = 8

    def __post_init__(self) -> None:
        check_whole_number("concurrency", self.concurrency)

    def open(self, model: str) -> ChatEndpoint:
        """The endpoint that serves this model."""
        options = {"api_key_env": self.api_key_env, "timeout": self.timeout, "tries": self.tries}
        return ChatEndpoint(self.endpoint, model, **options)  # type: ignore[arg-type]  # checked there


@dataclass(frozen=True)
class GenerationSettings:
    """What is written.

    Attributes:
        columns: which columns are prompt, system, history and id.
        num_prompts: a random subset of so many prompts; ``None``: all.
        num_samples: responses to each prompt.
        temperature: divides the logits; 0 takes the likeliest token, and one sample is all there is.
        top_p: keeps the likeliest tokens that make up this share of the probability.
        max_new_tokens: a response that has not ended by then is cut there, and counted.
        on_bad_row: ``"error"``, or ``"skip"``: prompts that cannot be read, rendered or answered are left out, counted
            and listed.
        seed: of the subset of prompts, and of every row's own seed.

    Raises:
        InputError: a value out of range, by name.
    """

    columns: Mapping[str, str] | None = None
    num_prompts: int | None = None
    num_samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    on_bad_row: str = "error"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("max_new_tokens", 1), ("seed", 0)):
            check_whole_number(name, getattr(self, name), least)
        if self.num_prompts is not None:
            check_whole_number("num_prompts", self.num_prompts)
        check_choice("on_bad_row", self.on_bad_row, ("error", "skip"))
        check_temperature(self.temperature)
        if isinstance(self.top_p, bool) or not isinstance(self.top_p, int | float) or not 0 < self.top_p <= 1:
            raise InputError(f"top_p: {self.top_p!r}; expected a share above 0, at most 1.")
        if self.temperature == 0 and self.num_samples > 1:
            raise InputError(f"num_samples: {self.num_samples} with temperature 0 would all be the same response.")


def check_temperature(value: float) -> None:
    """Raise `InputError` unless it is a temperature."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise InputError(f"temperature: {value!r}; expected a number from 0 to 100.")
