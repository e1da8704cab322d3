"""Looking into networks by forward hooks."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def expected_hooks() -> Iterator[None]:
    """Run networks that carry hooks without the remark that the fused operator steps aside.

    Around `residual_tail`, whose separate modules are wanted here: only they call hooks.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="senet runs .* in separate passes")
        yield
