"""What the annotations of arrays are made of.

`Float[Array, "B T D"]` (jaxtyping) states kind and shape of an array; the letters are those of the module's text, and
mean the same size in all arguments and results of a function. The tests check them at run time.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Int32

# On the way in: a jax array inside a program, a numpy one from the host.
AnyArray = jax.Array | np.ndarray
# One value for each row of the slots.
RowMask = Bool[Array, " B"]
RowInts = Int32[Array, " B"]


def traced(tree: Any) -> Any:
    """The same, for the type checker: inside a program all arrays are jax's, whatever came in."""
    return tree
