"""Explicit Runge–Kutta integration over [0, 1] with time points that crowd towards the start ("sway").

Source: `RungeKutta4ODESolver` and the sampling loop in transformers 4.57.6 (the 3/8 rule, not the classic one);
sway: Chen et al. 2024 (arXiv:2410.06885).

P time points, S = P - 1 steps, E evaluations a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

from omni_jax.model.types import AnyArray


@dataclasses.dataclass(frozen=True)
class Solver:
    """A Butcher tableau: `nodes` (fractions of a step), `matrix` (strictly lower triangular) and `weights`."""

    nodes: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


SOLVERS = {
    "rk38": Solver(
        nodes=(0, 1 / 3, 2 / 3, 1),
        matrix=((0, 0, 0, 0), (1 / 3, 0, 0, 0), (-1 / 3, 1, 0, 0), (1, -1, 1, 0)),
        weights=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
    ),
    "midpoint": Solver(nodes=(0, 1 / 2), matrix=((0, 0), (1 / 2, 0)), weights=(0, 1)),
    "euler": Solver(nodes=(0,), matrix=((0,),), weights=(1,)),
}


def solver(name: str) -> Solver:
    """A solver by name. Raises ValueError with the known names."""
    if name not in SOLVERS:
        raise ValueError(f"solver {name!r} is unknown; known are {', '.join(SOLVERS)}")
    return SOLVERS[name]


def time_points(count: int, sway: float | None = -1.0) -> Float32[np.ndarray, " {count}"]:
    """The ends of the steps.

    Args:
      count: how many points; `count` points bound `count - 1` steps.
      sway: moves points towards 0 where negative: -1 makes t into 1 - cos(πt/2). None or 0 keeps them even.
    Returns:
      points that ascend from 0 to 1.
    Raises:
      ValueError: fewer than two points.
    """
    if count < 2:
        raise ValueError(f"{count} time points bound no step; at least 2 are needed")
    t = np.linspace(0, 1, count, dtype=np.float32)
    if sway:
        t = t + np.float32(sway) * (np.cos(np.float32(np.pi / 2) * t) - 1 + t)
    return t.astype(np.float32)


def evaluation_times(points: Float32[np.ndarray, " P"], tableau: Solver) -> Float32[np.ndarray, "P-1 E"]:
    """When each evaluation happens, of the points that bound the steps."""
    start, end = points[:-1, None], points[1:, None]
    nodes = np.asarray(tableau.nodes, np.float32)
    # A node at 1 is the step's end itself: start + (end - start) may round to a neighbour of it.
    return np.where(nodes == 1, end, start + (end - start) * nodes).astype(np.float32)


def integrate(
    velocity: Callable[[jax.Array, Any], jax.Array], x: Float[Array, "*X"], points: Float32[AnyArray, " P"],
    conditions: Any, tableau: Solver,
) -> Float[Array, "*X"]:  # fmt: skip
    """The state at the last time point.

    Args:
      velocity: `(state, condition) -> d state / d t`.
      x: the state at the first point.
      points: of `time_points`.
      conditions: a tree with leading axes [S, E]: what `velocity` needs to know about each time of
        `evaluation_times`, so that nothing that depends on time alone is computed inside the loop.
      tableau: the solver.
    """
    return integrate_and_collect(lambda x, c: (velocity(x, c), None), x, points, conditions, tableau)[0]


def integrate_and_collect(
    velocity: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
    x: Float[Array, "*X"],
    points: Float32[AnyArray, " P"],
    conditions: Any,
    tableau: Solver,
) -> tuple[Float[Array, "*X"], Any]:
    """`integrate` for a velocity that also returns something to keep of each evaluation.

    Args:
      velocity: `(state, condition) -> (d state / d t, kept)`.
    Returns:
      The state at the last time point, and the kept trees with leading axes [S, E].
    """
    points = jnp.asarray(points, jnp.float32)
    matrix, weights = jnp.asarray(tableau.matrix, x.dtype), jnp.asarray(tableau.weights, x.dtype)
    stages = len(tableau.nodes)

    def step(x: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
        dt, conditions = inputs

        # The stages are scanned too, so that the network is compiled once and not once a stage.
        def stage(slopes: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
            i, row, condition = inputs
            slope, kept = velocity(x + dt * jnp.tensordot(row, slopes, 1), condition)
            return slopes.at[i].set(slope), kept

        none = jnp.zeros((stages, *x.shape), x.dtype)
        slopes, kept = lax.scan(stage, none, (jnp.arange(stages), matrix, conditions))
        return x + dt * jnp.tensordot(weights, slopes, 1), kept

    return lax.scan(step, x, (jnp.diff(points), conditions))
