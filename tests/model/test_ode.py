from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import RungeKutta4ODESolver

from omni_jax.errors import InputError
from omni_jax.model import ode
from omni_jax.settings import OdeSolver, SpeechSettings


def _run(name, count, x=None):
    """Integrates dx/dt = cos(3t) x - t."""
    points, tableau = ode.time_points(count), ode.solver(name)
    times = jnp.asarray(ode.evaluation_times(points, tableau))
    x = jnp.array([1.0, -2.0, 0.5]) if x is None else x
    return ode.integrate(lambda x, t: jnp.cos(3 * t) * x - t, x, points, times, tableau)


@pytest.mark.parametrize("count", [2, 5, 10])
def test_default_solver_is_the_oracles(count):
    t = torch.linspace(0, 1, count)
    t = t + -1.0 * (torch.cos(torch.pi / 2 * t) - 1 + t)
    np.testing.assert_allclose(ode.time_points(count), t.numpy(), atol=1e-7)
    start = torch.tensor([1.0, -2.0, 0.5])
    want = RungeKutta4ODESolver(lambda t, x: torch.cos(3 * t) * x - t, start).integrate(t)[-1]
    np.testing.assert_allclose(_run("rk38", count), want.numpy(), atol=1e-6)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("midpoint", 2)])
def test_cheaper_solvers_converge_at_their_order(name, order):
    exact = np.asarray(_run("rk38", 41))
    coarse, fine = (np.abs(np.asarray(_run(name, n)) - exact).max() for n in (11, 21))
    assert coarse / fine == pytest.approx(2**order, rel=0.3)


def test_time_points():
    even = ode.time_points(5, None)
    np.testing.assert_allclose(even, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_array_equal(ode.time_points(5, 0.0), even)
    assert ode.time_points(10)[-1] == 1
    with pytest.raises(ValueError, match="at least 2"):
        ode.time_points(1)
    with pytest.raises(ValueError, match="euler"):
        ode.solver("heun")


def test_settings_name_every_solver():
    assert set(get_args(OdeSolver)) == set(ode.SOLVERS)
    with pytest.raises(InputError, match=r"ode_solver is 'heun'.*midpoint"):
        SpeechSettings(ode_solver="heun")
