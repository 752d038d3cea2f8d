"""Scoring a long list of responses so that a kill loses one batch: what every evaluation of rewards shares."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from tqdm import tqdm

from inform_rm.scoring.scorer import NonFiniteRewardError, RewardScorer
from inform_rm.util.journal import RewardJournal


def journaled_rewards(
    scorer: RewardScorer,
    chunks: Iterable[tuple[Sequence[Sequence[int]], Sequence[int]]],
    num_responses: int,
    journal: RewardJournal | None,
    where: Callable[[int], str],
    *,
    description: str,
    progress: bool,
) -> np.ndarray:
    """Rewards ``(num_responses,)`` in order, float32; those that the journal holds are not computed again.

    Args:
        scorer: the model.
        chunks: token ids of responses with their prompts, and the prompts' lengths in tokens; responses of one chunk
            are sorted by length together and share the computation of equal prompts.
        num_responses: in all chunks together.
        journal: where finished rewards wait; entry i is response i. ``None`` keeps none.
        where: names response i in an error.
        description: of the progress bar.
        progress: show it.

    Raises:
        NonFiniteRewardError: if the model gives NaN or infinity; ``row`` is the response's number.
    """
    rewards = np.full(num_responses, np.nan, dtype=np.float32)
    if journal is not None:
        for entry, reward, _ in journal.finished():
            rewards[entry] = reward
    finished = int(np.isfinite(rewards).sum())
    first = 0
    with tqdm(total=num_responses, initial=finished, unit="response", desc=description, disable=not progress) as bar:
        for sequences, prompt_lengths in chunks:
            todo = [place for place in range(len(sequences)) if np.isnan(rewards[first + place])]
            left = [sequences[place] for place in todo], [prompt_lengths[place] for place in todo]
            try:
                for places, values, _ in scorer.iter_scores(*left):
                    entries = [first + todo[place] for place in places]
                    rewards[entries] = values.numpy()
                    if journal is not None:
                        journal.add(entries, values.tolist())
                    bar.update(len(places))
            except NonFiniteRewardError as error:
                entry = first + todo[error.row]
                raise NonFiniteRewardError(entry, error.value, where(entry)) from error
            first += len(sequences)
    return rewards
