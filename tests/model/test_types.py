import numpy as np
import pytest
from jaxtyping import TypeCheckError

from omni_jax.model import rope
from omni_jax.runtime import media


def test_shapes_are_checked_in_tests():
    x, angles = np.zeros((1, 3, 2, 8), np.float32), np.zeros((1, 3, 4), np.float32)
    assert rope.rotate(x, angles).shape == x.shape
    with pytest.raises(TypeCheckError):
        rope.rotate(x, angles[:, :2])


def test_shapes_of_the_runtime_are_checked_in_tests():
    keys = media.reply_keys([4, 5, 6], first_position=2)
    assert media.common_prefix(keys, keys[:2]) == 2
    with pytest.raises(TypeCheckError):
        media.common_prefix(keys, keys[:, :3])
    with pytest.raises(TypeCheckError):
        media.common_prefix(keys, keys.astype(np.int32))
