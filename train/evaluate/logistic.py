"""Logistic regression by Newton's method, for many small problems with mostly empty rows."""

from __future__ import annotations

import numpy as np
from scipy.special import expit

L2 = 1.0
STEPS = 50
TOLERANCE = 1e-5  # of the largest entry of the gradient, per case
HALVINGS = 20


def fit_logistic(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Coefficients [columns + 1], the intercept last, of the least Σ weight · CE + ½ ‖coefficients but the last‖².

    Args:
        x: [cases, columns]; y: 0 or 1 [cases]; weight: how often each case occurs [cases].
    """
    design = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    ridge = np.append(np.full(x.shape[1], L2), 0.0)
    share = np.clip((weight * y).sum() / weight.sum(), 1e-9, 1 - 1e-9)
    coefficients = np.append(np.zeros(x.shape[1]), np.log(share / (1 - share)))
    loss = penalised(design, y, weight, ridge, coefficients)
    for _ in range(STEPS):
        chance = expit(design @ coefficients)
        gradient = design.T @ (weight * (chance - y)) + ridge * coefficients
        if np.abs(gradient).max() < TOLERANCE * weight.sum():
            break
        curvature = (design * (weight * chance * (1 - chance))[:, None]).T @ design + np.diag(ridge + 1e-9)
        step = np.linalg.solve(curvature, gradient)
        for _ in range(HALVINGS):  # a full step may overshoot where the classes are almost separated
            moved = penalised(design, y, weight, ridge, coefficients - step)
            if moved <= loss:
                break
            step /= 2
        coefficients, loss = coefficients - step, moved
    return coefficients


def penalised(
    design: np.ndarray, y: np.ndarray, weight: np.ndarray, ridge: np.ndarray, coefficients: np.ndarray
) -> float:
    """What `fit_logistic` makes least."""
    return float((weight * cross_entropy(design @ coefficients, y)).sum() + 0.5 * (ridge * coefficients**2).sum())


def cross_entropy(logit: np.ndarray, y: np.ndarray) -> np.ndarray:
    """−log of the chance given to `y`, in nats."""
    loss: np.ndarray = np.logaddexp(0, logit) - y * logit
    return loss
