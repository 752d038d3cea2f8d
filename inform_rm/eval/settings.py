"""Settings of evaluations that read rows; the command line makes its flags of them. Imports nothing heavy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inform_rm.errors import InputError
from inform_rm.util.settings import check_settings, setting

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """How the rows of an evaluation are read.

    Rows that are skipped are those, too, that cannot be encoded or do not fit (see
    `inform_rm.data.encoding.encode_pairs`). ``overlong="truncate_prompt"`` takes the same tokens from the left of the
    prompt for all responses. All of it is counted.
    """

    data_revision: str | None = setting(None, "revision of the data on the Hub")
    on_bad_row: str = setting(
        "error", "stop at a row that cannot be used, or leave it out, count and list it", choices=("error", "skip")
    )
    overlong: str = setting("error", "rows over --max-length", choices=("error", "drop", "truncate_prompt"))
    seed: int = setting(0, "seed of all random choices", least=0)

    def __post_init__(self) -> None:
        check_settings(self)

    def to_dict(self) -> dict[str, Any]:
        """All but the seed, as JSON can hold them."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "seed"}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class PairSettings(RowSettings):
    """Which preference pairs are evaluated: keywords of `evaluate`.

    ``columns`` says which are prompt, chosen, rejected, ... (`inform_rm.data.columns.Columns.of`); ``score_weights``,
    of scored responses, columns whose weighted sum is the score.
    """

    columns: Mapping[str, str] | None = None
    max_pairs: int | None = setting(None, "use a seeded random subset of each item of data", least=1)
    score_weights: Mapping[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class SuiteSettings(RowSettings):
    """How a suite is evaluated: keywords of `evaluate_suite`; what is left out makes the suite incomplete.

    ``ties``: what equal rewards give in suites of pairs: nothing (as published), or half (RewardBench only).
    """

    ties: str = setting("wrong", choices=("wrong", "half"))


@dataclass(frozen=True, kw_only=True)
class DecompositionSettings(PairSettings):
    """How reward gaps are decomposed: keywords of `decompose`.

    With ``weights="uniform"`` all prompts of a pair count the same; with ``"behavior"`` as much as ``behavior_model``
    finds both responses likely under them, tempered (`inform_rm.decomposition.prompt_free_gap.tempered_weights`). That
    is a causal language model near what wrote the responses: a folder, Hub id or loaded model, which must have the
    reward model's tokenizer. ``stratify``, because prompts of a maths set say little about a chat pair.
    """

    num_prompts: int = setting(16, "prompts for each pair, its own among them", least=2)
    stratify: bool = setting(False, "only prompts of the pair's own subset")
    weights: str = setting("uniform", choices=("uniform", "behavior"))
    behavior_model: "str | Path | torch.nn.Module | None" = None
    ess_target: float = setting(0.25, "effective sample size that the weights keep, as a share of the prompts")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.weights == "behavior") != (self.behavior_model is not None):
            raise InputError(
                f"weights: {self.weights!r} with behavior_model {self.behavior_model!r}; expected 'uniform' without "
                "one, or 'behavior' with one."
            )
        if not 0 < self.ess_target <= 1:
            raise InputError(f"ess_target: {self.ess_target!r}; it is a share of the prompts, above 0 and at most 1.")

    def to_dict(self) -> dict[str, Any]:
        """What decides the figures."""
        without = {"behavior_model"} | ({"ess_target"} if self.behavior_model is None else set())
        return {name: value for name, value in super().to_dict().items() if name not in without}


@dataclass(frozen=True)
class SimulationSettings:
    """How hard and how often best-of-n chooses.

    ``ns`` are the numbers to choose from, at most ``num_responses``; by default powers of two up to that. Temperature
    and ``max_new_tokens`` are those of a policy named by folder or Hub id.
    """

    columns: Mapping[str, str] | None = None
    num_prompts: int | None = setting(None, "use so many prompts, drawn at random", least=2)
    num_responses: int = setting(1024, "for each prompt", least=2)
    ns: Sequence[int] | None = None
    temperature: float = setting(1.0, "of the policy")
    max_new_tokens: int = setting(128, "of the policy")
    seed: int = setting(0, "seed of all random choices", least=0)

    def __post_init__(self) -> None:
        check_settings(self)
        check_numbers(self.numbers, self.num_responses)

    @property
    def numbers(self) -> list[int]:
        """The ns."""
        return [2**power for power in range(self.num_responses.bit_length())] if self.ns is None else list(self.ns)


def check_numbers(ns: Sequence[int], num_responses: int) -> None:
    """Raise `InputError` on ns that do not rise from 1 or more to at most ``num_responses``."""
    whole = all(isinstance(n, Integral) and not isinstance(n, bool) for n in ns)
    if not len(ns) or not whole or sorted(set(ns)) != list(ns) or not 1 <= ns[0] <= ns[-1] <= num_responses:
        raise InputError(
            f"ns: {list(ns)}; expected rising whole numbers from 1 to at most the {num_responses} responses of each "
            "prompt. Sample more responses or leave the larger numbers out."
        )
