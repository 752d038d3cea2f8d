"""Reward function and overoptimization check for reinforcement learning with TRL (`GRPOTrainer`, `RLOOTrainer`).

    reward = RewardFunction(scorer, reference=latents.values, shaping_coefficient=0.1)
    trainer = trl.GRPOTrainer(policy, reward_funcs=reward, ...)
    OveroptimizationCallback(scorer, latents.values, reward.recent, every=50).attach(trainer)

``scorer`` is a `RewardScorer`, ``latents`` what `inform_rm.eval.detection.latents.collect_latents` gives for responses
of the policy before training. Nothing here imports TRL: any trainer that calls reward functions as TRL does will do.
"""

import json
import logging
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback

from inform_rm.errors import InputError, shortened
from inform_rm.eval.detection.early_stopping import CSIEarlyStopping, RewardFallStopping
from inform_rm.eval.detection.latents import collect_latents
from inform_rm.eval.detection.outliers import fit_mahalanobis
from inform_rm.eval.detection.settings import DetectionSettings
from inform_rm.eval.detection.statistic import STATISTICS
from inform_rm.scoring.scorer import Prompt, RewardScorer
from inform_rm.util.files import write_json

logger = logging.getLogger(__name__)

_STATE_FILE = "overoptimization_state.json"


class RewardFunction:
    """Rewards of a reward model, shaped on request by the distance from the reference: ``r - gamma * D_M``.

    D_M is the Mahalanobis distance of a response's latent from the reference latents (IBL regularization of
    arXiv:2510.13694); responses that the reference never looked like lose reward. The covariance is Ledoit and Wolf's;
    the authors' released code adds 1e-6 to the diagonal of the plain one.

    Args:
        scorer: the reward model or, without a reference, an ensemble.
        reference: ``(N, K)`` latents of reference responses; needed for shaping, and with it the outlier probability
            of every batch is logged.
        shaping_coefficient: gamma, in reward units per unit of distance.
        squared: shape by ``D_M ** 2`` instead.
        alpha: tail probability below which a response counts as an outlier.
        tail: see `inform_rm.eval.detection.outliers.mahalanobis_outlier_probability`.
        keep: responses that `recent` remembers.

    Raises:
        InputError: shaping without a reference, or an alpha that so small a reference cannot show.
    """

    __name__ = "inform_reward"

    def __init__(
        self,
        scorer: RewardScorer,
        *,
        reference: np.ndarray | None = None,
        shaping_coefficient: float = 0.0,
        squared: bool = False,
        alpha: float = 0.01,
        tail: Literal["chi2", "reference"] = "reference",
        keep: int = 1024,
    ):
        if shaping_coefficient and reference is None:
            raise InputError(f"shaping_coefficient: {shaping_coefficient} needs reference latents. Pass reference=...")
        self.scorer = scorer
        self.reference = None if reference is None else fit_mahalanobis(reference)
        if self.reference is not None:
            self.reference.check_alpha(alpha, tail)
        self.shaping_coefficient, self.squared, self.alpha, self.tail = shaping_coefficient, squared, alpha, tail
        self._recent: deque[tuple[Prompt, str]] = deque(maxlen=keep)

    def __call__(
        self,
        prompts: list[Prompt],
        completions: list[Any],
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        """One reward a completion; see TRL's documentation of reward functions for the arguments."""
        responses = [_text(completion) for completion in completions]
        self._recent.extend(zip(prompts, responses, strict=True))
        if self.reference is None:
            rewards: list[float] = self.scorer.score(prompts, responses).tolist()
            return rewards
        found = collect_latents(self.scorer, prompts, responses)
        plain = found.rewards.astype(np.float64)
        squares = self.reference.squared_distances(found.values)
        distances = np.sqrt(squares)
        if log_metric is not None:
            log_metric("unshaped_reward", float(plain.mean()))
            log_metric("mahalanobis_distance", float(distances.mean()))
            log_metric("mop", float((self.reference.tail_probabilities(squares, self.tail) < self.alpha).mean()))
        shaped: list[float] = (plain - self.shaping_coefficient * (squares if self.squared else distances)).tolist()
        return shaped

    def recent(self) -> tuple[list[Prompt], list[str]]:
        """Prompts and responses since the last call of this method, the newest ``keep`` of them."""
        prompts, responses = [prompt for prompt, _ in self._recent], [response for _, response in self._recent]
        self._recent.clear()
        return prompts, responses


class OveroptimizationCallback(TrainerCallback):
    """Every so many steps: the statistics of `detect` for fresh policy responses, logged; stops if asked to.

    Logs a line with ``csi``, ``csi_normalized``, ``mop``, ``knn_outliers`` and what else the statistics are made of,
    ``sampled_reward`` and ``sampled_words``. The responses of several processes are checked together; the state of
    the stopping rules goes with the checkpoints.

    Alone, the stopping rule is Algorithm 1 of arXiv:2402.09345 (`CSIEarlyStopping`) on the normalized CSI, so that
    unequal numbers of responses compare. With a ``second_scorer`` it is `RewardFallStopping` on that model's mean
    reward, logged as ``second_reward``; a jump of CSI is then a warning only. That rule's start is the first check.

    Args:
        scorer: InfoRM model.
        reference: ``(N, K)`` its latents of reference responses.
        sample: gives prompts and fresh responses, such as `RewardFunction.recent`.
        every: steps between checks.
        action: ``"stop"`` or ``"warn"``.
        second_scorer: a reward model of another kind, which the policy is *not* optimised against.
        settings: fields of `DetectionSettings`: ``eps``, ``alpha``, ``tail``, ``max_change_ratio``,
            ``max_reward_fall``, ...; ``eps="auto"`` takes a radius for each check, by its number of responses.
    """

    def __init__(
        self,
        scorer: RewardScorer,
        reference: np.ndarray,
        sample: Callable[[], tuple[list[Prompt], list[str]]],
        *,
        every: int = 50,
        action: Literal["stop", "warn"] = "stop",
        second_scorer: RewardScorer | None = None,
        **settings: Any,
    ):
        if every < 1:
            raise InputError(f"every: {every}; expected a number of steps of at least 1.")
        if action not in ("stop", "warn"):
            raise InputError(f"action: {action!r}; expected 'stop' or 'warn'.")
        self._scorer, self._second, self._sample = scorer, second_scorer, sample
        self._every, self._action = every, action
        chosen = DetectionSettings(**settings)
        self._measures = [statistic.fit(reference, chosen) for statistic in STATISTICS]
        self.stopping = CSIEarlyStopping(chosen.max_change_ratio)
        self.falling = RewardFallStopping(chosen.max_reward_fall)
        self._trainer: Any = None

    def attach(self, trainer: Any) -> None:
        """Watch this trainer; its log and reporters receive the figures."""
        self._trainer = trainer
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A resumed run goes on with the rules' state."""
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _STATE_FILE
        if state.global_step and path.exists():
            saved = json.loads(path.read_text(encoding="utf-8"))
            falling = saved.pop("reward_fall", None)
            self.stopping.load_state_dict(saved)
            if self._second is not None and falling is not None:
                self.falling.load_state_dict(falling)
            elif self._second is not None:
                logger.warning("%s has no state of second_scorer: its rule starts at the next check.", path)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the rules' state beside the checkpoint."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            falling = {} if self._second is None else {"reward_fall": self.falling.state_dict()}
            write_json(folder / _STATE_FILE, self.stopping.state_dict() | falling)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check, log, and stop or warn."""
        if state.global_step % self._every:
            return
        found = self._collect()
        if found is None:
            logger.warning("No fresh responses at step %d: nothing to check.", state.global_step)
            return
        latents, rewards, words, second = found
        measured = [item for measure in self._measures for item in measure(latents, 0)[0].items()]
        values = {name: value for name, value in measured if isinstance(value, float)}
        values |= {"sampled_reward": float(rewards.mean()), "sampled_words": float(words.mean())}
        if self._second is not None:
            values["second_reward"] = float(second.mean())
        # Past the log method of TRL's trainers, which would add and clear what they gather for their own line.
        should_log = control.should_log
        Trainer.log(self._trainer, values)
        control.should_log = should_log  # logging cleared it, and the trainer's own line of this step is still to come
        stop = jumped = self.stopping.update(values["csi_normalized"])
        if jumped:
            jump = state.global_step, values["csi_normalized"]
            logger.warning("Step %d: CSI jumped to %.3g per response, the sign of overoptimization.", *jump)
        if self._second is not None:
            error = float(second.std(ddof=1)) / math.sqrt(len(second)) if len(second) > 1 else 0.0
            stop = self.falling.update(values["second_reward"], error)
            if stop:
                fall = state.global_step, values["second_reward"]
                logger.warning("Step %d: the second model's reward fell to %.3g, the sign of overoptimization.", *fall)
        control.should_training_stop |= stop and self._action == "stop"

    def _collect(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
        """Latents, rewards, words and the second model's rewards (NaN without one) of the fresh responses.

        Those of all processes together, so that all of them decide alike.
        """
        prompts, responses = self._sample()
        own = []
        if responses:
            found = collect_latents(self._scorer, prompts, responses)
            words = [len(response.split()) for response in responses]
            second = np.full(len(words), math.nan)
            if self._second is not None:
                second = self._second.score(prompts, responses).double().numpy()
            own.append((found.values, found.rewards, words, second))
        parts = gather_object(own)
        if not parts:
            return None
        together = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
        return together[0], together[1], together[2], together[3]


def _text(completion: Any) -> str:
    """A completion as text: a string, or one message of the assistant.

    Raises:
        InputError: several messages, as of a policy that calls tools: a reward of the last alone would be another's.
    """
    if isinstance(completion, str):
        return completion
    content = completion[0].get("content") if len(completion) == 1 else None
    if isinstance(content, list) and all(isinstance(part.get("text"), str) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise InputError(
            f"completions: {shortened(repr(completion), 200)}; expected text, or one message of the assistant with "
            "text. Tool calls and images are not encoded: write a reward function that puts them into words."
        )
    return content
