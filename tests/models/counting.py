"""A kernel with a loop, whose bound is known when it runs: what Triton's interpreter needs a matching numpy for."""

import triton
import triton.language as tl


@triton.jit
def count(numbers, n):
    for i in range(0, n):
        tl.store(numbers + i, i)
