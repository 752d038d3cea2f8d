"""Reward models that resist reward hacking: InfoRM, its training and its evaluation.

Importing the package registers InfoRM with the Auto classes of transformers, so that
``AutoModelForSequenceClassification.from_pretrained(folder)`` needs no remote code.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
_MODULES = {
    "InfoRMConfig": "inform_rm.configuration_inform",
    "InfoRMForSequenceClassification": "inform_rm.modeling_inform",
    "InfoRMOutput": "inform_rm.modeling_inform",
    "RewardScorer": "inform_rm.scoring.scorer",
    "RewardTrainer": "inform_rm.training.trainer",
    "RewardTrainingArguments": "inform_rm.training.reward_arguments",
    "check_data": "inform_rm.data.check_data",
    "compare": "inform_rm.eval.comparison.compare",
    "decompose": "inform_rm.eval.decompose",
    "detect": "inform_rm.eval.detection.detect",
    "evaluate": "inform_rm.eval.evaluate",
    "evaluate_suite": "inform_rm.eval.suites.evaluate_suite",
    "export_model": "inform_rm.hub.export",
    "generate": "inform_rm.eval.generation.generate",
    "judge": "inform_rm.eval.judging.judge",
    "score_file": "inform_rm.scoring.score_files",
    "select": "inform_rm.eval.detection.select",
    "serve": "inform_rm.serving.server",
    "simulate": "inform_rm.eval.best_of_n.simulate",
    "train": "inform_rm.training.run",
    "write_report": "inform_rm.hub.run_report",
}
__all__ = list(_MODULES)

if TYPE_CHECKING:  # named twice, as type checkers want what is passed on
    from inform_rm.configuration_inform import InfoRMConfig as InfoRMConfig
    from inform_rm.modeling_inform import InfoRMForSequenceClassification as InfoRMForSequenceClassification
    from inform_rm.modeling_inform import InfoRMOutput as InfoRMOutput


def register_auto_classes() -> None:
    """Make the Auto classes of transformers know InfoRM, and saved InfoRM models carry their code."""
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    from inform_rm.configuration_inform import InfoRMConfig
    from inform_rm.modeling_inform import InfoRMForSequenceClassification

    AutoConfig.register(InfoRMConfig.model_type, InfoRMConfig, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification):
        auto_class.register(InfoRMConfig, InfoRMForSequenceClassification, exist_ok=True)
    InfoRMConfig.register_for_auto_class()
    InfoRMForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register_auto_classes()
    return getattr(importlib.import_module(_MODULES[name]), name)


def _started_as_command_line() -> bool:
    """True for ``inform-rm ...`` and ``python -m inform_rm.cli ...``: these answer --help before torch is imported."""
    return any(argument.endswith(("inform-rm", "inform-rm.exe", "inform_rm.cli")) for argument in sys.orig_argv[:6])


if not _started_as_command_line():
    register_auto_classes()
