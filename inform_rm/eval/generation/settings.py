"""Settings of `inform_rm.generate`, and of every call that asks an endpoint. Imports nothing heavy."""

from collections.abc import Mapping
from dataclasses import dataclass

from inform_rm.errors import InputError
from inform_rm.util.endpoint import ChatEndpoint
from inform_rm.util.settings import check_settings, setting

ON_BAD_ROW = ("error", "skip")


@dataclass(frozen=True)
class EndpointSettings:
    """How an OpenAI-compatible endpoint is asked (`ChatEndpoint`); the key itself is no setting."""

    endpoint: str
    api_key_env: str | None = setting(None, "environment variable that holds the key (default: none is sent)")
    timeout: float = setting(300.0, "seconds that a reply may take")
    tries: int = setting(6, "how often a request is sent at most")
    concurrency: int = setting(8, "requests under way at once", least=1)

    def __post_init__(self) -> None:
        check_settings(self)

    def open(self, model: str) -> ChatEndpoint:
        """The endpoint that serves this model."""
        options = {"api_key_env": self.api_key_env, "timeout": self.timeout, "tries": self.tries}
        return ChatEndpoint(self.endpoint, model, **options)  # type: ignore[arg-type]  # checked there


@dataclass(frozen=True)
class GenerationSettings:
    """What is written.

    At temperature 0, which takes the likeliest token, one sample is all there is. Skipped are prompts that cannot be
    read, rendered or answered. ``seed`` is that of the subset of prompts, and of every row's own seed.
    """

    columns: Mapping[str, str] | None = None
    num_prompts: int | None = setting(None, "use so many prompts, drawn at random", least=1)
    num_samples: int = setting(1, "for each prompt", least=1)
    temperature: float = setting(1.0, "0: the likeliest token")
    top_p: float = setting(1.0, "share of the probability that is kept")
    max_new_tokens: int = setting(512, "cut there, and counted", least=1)
    on_bad_row: str = setting(
        "error", "stop at a prompt that cannot be answered, or leave it out, count and list it", choices=ON_BAD_ROW
    )
    seed: int = setting(0, "seed of all random choices", least=0)

    def __post_init__(self) -> None:
        check_settings(self)
        check_temperature(self.temperature)
        if isinstance(self.top_p, bool) or not isinstance(self.top_p, int | float) or not 0 < self.top_p <= 1:
            raise InputError(f"top_p: {self.top_p!r}; expected a share above 0, at most 1.")
        if self.temperature == 0 and self.num_samples > 1:
            raise InputError(f"num_samples: {self.num_samples} with temperature 0 would all be the same response.")


def check_temperature(value: float) -> None:
    """Raise `InputError` unless it is a temperature."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise InputError(f"temperature: {value!r}; expected a number from 0 to 100.")
