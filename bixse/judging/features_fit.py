"""Fitting the embedded judge: proportional odds by penalised maximum likelihood.

Kept from `features.py` because no run of the judge needs an optimiser. Shape suffixes as there.
"""

import numpy as np
from scipy.optimize import minimize

from bixse.judging.features import Floats, ordinal_log_probs


def fit_ordinal(
    features_NF: Floats, target_NK: Floats, weight_N: Floats, l2: float
) -> tuple[Floats, Floats]:
    """Weights [F], none negative, and rising thresholds [K-1] of a proportional-odds model.

    Minimises mean_weighted(-sum_k target_k log p_k) + l2 |w * std(x)|^2 / 2: a target is a
    distribution over the grades (a half-way human grade is shared by its neighbours), and the
    penalty sees features on equal footing, whatever their spread.

    Raises ValueError when a number is not finite or a grade has no target mass: its thresholds
    would run away.
    """
    if not all(np.isfinite(a).all() for a in (features_NF, target_NK, weight_N)):
        raise ValueError("features, targets and weights must be finite")
    share_N = weight_N / weight_N.sum()
    mass_K = share_N @ target_NK
    if mass_K.min() <= 0:
        raise ValueError(f"no pair has grade number {int(mass_K.argmin())}: nothing to fit it on")
    spread_F = np.sqrt(share_N @ (features_NF - share_N @ features_NF) ** 2)
    scale_F = np.where(spread_F > 0, spread_F, 1.0)
    z_NF = features_NF / scale_F
    F = z_NF.shape[1]

    def unpack(parameters: Floats) -> tuple[Floats, Floats]:
        first, log_gaps = parameters[F], parameters[F + 1 :]
        return parameters[:F], np.concatenate([[first], first + np.cumsum(np.exp(log_gaps))])

    def loss(parameters: Floats) -> float:
        w_F, thresholds_T = unpack(parameters)
        log_probs_NK = ordinal_log_probs(z_NF @ w_F, thresholds_T)
        fit = -float(share_N @ (target_NK * log_probs_NK).sum(axis=1))
        return fit + l2 * float(w_F @ w_F) / 2

    # Start at the thresholds that give the targets' own frequencies when no feature speaks.
    below_T = np.clip(np.cumsum(mass_K)[:-1], 1e-6, 1 - 1e-6)
    odds_T = np.log(below_T / (1 - below_T))
    start = np.concatenate([np.zeros(F), odds_T[:1], np.log(np.diff(odds_T))])
    bounds = [(0.0, None)] * F + [(None, None)] + [(-10.0, 10.0)] * (len(odds_T) - 1)
    found = minimize(loss, start, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-12})
    if not found.success:
        raise ValueError(f"the fit did not converge: {found.message}")
    w_F, thresholds_T = unpack(found.x)
    return w_F / scale_F, thresholds_T
