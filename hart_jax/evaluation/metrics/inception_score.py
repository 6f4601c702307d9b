"""The inception score (Salimans et al. 2016): are images clearly of some class, and of all classes together?

Letters: N images, K classes.
"""

import itertools

import numpy as np

from hart_jax.errors import UserError


def inception_score(logits_NK: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation (divisor `splits`) over consecutive splits of exp(E KL(p(class|x) || p(class))).

    Between 1 and K, in float64. The splits are those of the published code, of the images in the order given: within
    a split order does not matter, but which images share one does. Images sorted by what they show score too low,
    so give them in an order that mixes it. `splits=1` does not depend on order.

    Raises:
      UserError: fewer images than splits, or no splits.
    """
    if not 1 <= splits <= len(logits_NK):
        raise UserError(f"inception score of {len(logits_NK)} images in splits={splits}: needs 1 to {len(logits_NK)}")
    bounds = [part * len(logits_NK) // splits for part in range(splits + 1)]
    scores = [_score(logits_NK[start:stop]) for start, stop in itertools.pairwise(bounds)]
    return float(np.mean(scores)), float(np.std(scores))


def _score(logits_NK: np.ndarray) -> float:
    logits_NK = np.asarray(logits_NK, np.float64)
    log_p_NK = logits_NK - np.logaddexp.reduce(logits_NK, axis=1, keepdims=True)
    log_marginal_K = np.logaddexp.reduce(log_p_NK, axis=0) - np.log(len(log_p_NK))
    return float(np.exp(np.sum(np.exp(log_p_NK) * (log_p_NK - log_marginal_K), axis=1).mean()))
