"""What Triton's interpreter needs to run these kernels as a device does.

Triton keeps every scalar as an array of one element and turns it into a loop bound by `int()`,
which numpy 2.4 refuses for any array with a dimension. And its `tl.dot` is a BLAS product, which
adds up some columns in another order than others: equal vectors then have unequal products, where
every device gives them the same bits.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy


@functools.cache
def prepare() -> None:
    """Make scalars usable as loop bounds, and every product add in one order; once per process."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_index

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, imprecise: Any) -> Any:
        product = numpy.einsum("...ij,...jk->...ik", a.data, b.data, dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = dot
