"""When to stop a policy's optimisation: a jump of CSI, or a reward that another reward model takes back."""

import math
from typing import Any

from inform_rm.errors import InputError


class _StoppingRule:
    """A rule whose attributes are all of its state; the first is its setting."""

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs, as numbers and ``None`` that JSON keeps exactly."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken: all later decisions are those of the run that was not cut off.

        `InputError` for a state with other entries, or of a rule with another setting.
        """
        own = self.state_dict()
        if not isinstance(state, dict) or state.keys() != own.keys():
            raise InputError(f"state: {state!r}; expected the entries {', '.join(own)}, as state_dict() gives them.")
        setting = next(iter(own))
        if state[setting] != own[setting]:
            raise InputError(
                f"{setting}: {own[setting]:g}, but the state comes from a rule with {state[setting]!r}. "
                "Pass that one to go on with the same decisions."
            )
        vars(self).update(state)


class CSIEarlyStopping(_StoppingRule):
    """Stop when ``|C_t - C_{t-1}| > max_change_ratio * mean of the earlier absolute changes``.

    The first two values cannot fire: there is no earlier change to compare with. Nor can any value as long as all
    earlier changes are 0: equal values mean that the same latents were measured again (the policy has not moved yet,
    as in a warm-up), which tells nothing about how far CSI moves by chance. Zeros count in the mean once there is a
    change above 0. A change that fires joins the mean, too, for a run that goes on after a warning.

    From few changes their mean is not well known: of 2,000 sequences of 61 independent normal values 6 % fired at a
    ratio of 10, all of them within the first five changes. The rule has the unit of CSI: give it values of the same
    number of responses and the same settings each time.

    Args:
        max_change_ratio: above 0; 10 in the paper.

    Example:
        Changes are 1, 1, 2, 0, then 11. Their mean before the last is 4 / 4 = 1, and 11 > 10 * 1.

        >>> rule = CSIEarlyStopping(max_change_ratio=10.0)
        >>> [rule.update(csi) for csi in (5.0, 6.0, 5.0, 7.0, 7.0, 18.0)]
        [False, False, False, False, False, True]

        The mean is now (4 + 11) / 5 = 3: a change of 30 does not fire, one of more than 10 * (45 / 6) = 75 does.

        >>> [rule.update(csi) for csi in (48.0, 124.0)]
        [False, True]
    """

    def __init__(self, max_change_ratio: float = 10.0):
        if isinstance(max_change_ratio, bool) or not 0 < max_change_ratio < math.inf:
            raise InputError(f"max_change_ratio: {max_change_ratio!r}; expected a number above 0 (10 in the paper).")
        self.max_change_ratio = float(max_change_ratio)
        self.last_csi: float | None = None
        self.sum_of_changes = 0.0
        self.num_changes = 0

    def update(self, csi: float) -> bool:
        """Take the next CSI; true if the run should stop.

        `InputError` for NaN or infinity; the state is then as before.
        """
        value = float(csi)
        if not math.isfinite(value):
            raise InputError(f"csi: {value}; no change from or to it can be measured. Leave this step out.")
        last, self.last_csi = self.last_csi, value
        if last is None:
            return False
        change = abs(value - last)
        # Multiplied out: with no earlier change, or only zeros, the right side is 0.
        fires = 0 < self.max_change_ratio * self.sum_of_changes < change * self.num_changes
        self.sum_of_changes += change
        self.num_changes += 1
        return fires


class RewardFallStopping(_StoppingRule):
    """Stop when the mean reward has lost more than ``max_fall`` of its largest gain over the start; ours.

    For the rewards of a model that the policy is *not* optimised against. Those of the model that it is optimised
    against rise as long as there is something to exploit, and the rule then says nothing. It needs no jump: a slow
    fall adds up. So that chance does not fire, the fall must also exceed twice its standard error.

    Measured where gold is known: docs/results/hacking.md.

    Args:
        max_fall: share of the gain, above 0 and below 1.

    Example:
        From 1 the reward rises to 5, a gain of 4. At 4.7 it has lost 0.3, at 4.5 more than 0.4.

        >>> rule = RewardFallStopping(max_fall=0.1)
        >>> [rule.update(reward) for reward in (1.0, 3.0, 5.0, 4.7, 4.5)]
        [False, False, False, False, True]
    """

    def __init__(self, max_fall: float = 0.05):
        if not isinstance(max_fall, int | float) or not 0 < max_fall < 1:
            raise InputError(f"max_reward_fall: {max_fall!r}; it is a share, above 0 and below 1 (default 0.05).")
        self.max_reward_fall = float(max_fall)
        self.start: float | None = None
        self.largest, self.largest_error = 0.0, 0.0  # of no meaning before there is a start

    def update(self, reward: float, standard_error: float = 0.0) -> bool:
        """Take the next mean reward, the first before optimisation; true if the run should stop.

        `InputError` for NaN or infinity; the state is then as before.
        """
        value, error = float(reward), float(standard_error)
        if not math.isfinite(value + error):
            raise InputError(f"reward: {value} ± {error}; expected finite numbers. Leave this step out.")
        if self.start is None:
            self.start = self.largest = value
        if value >= self.largest:
            self.largest, self.largest_error = value, error
            return False
        fall = self.largest - value
        return fall > self.max_reward_fall * (self.largest - self.start) and fall > 2 * math.hypot(
            error, self.largest_error
        )
