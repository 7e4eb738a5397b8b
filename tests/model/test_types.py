import numpy as np
import pytest
from jaxtyping import TypeCheckError

from omni_jax.model import rope


def test_shapes_are_checked_in_tests():
    x, angles = np.zeros((1, 3, 2, 8), np.float32), np.zeros((1, 3, 4), np.float32)
    assert rope.rotate(x, angles).shape == x.shape
    with pytest.raises(TypeCheckError):
        rope.rotate(x, angles[:, :2])
