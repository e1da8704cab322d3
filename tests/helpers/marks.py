"""Marks of tests."""

import pytest

# Of modules that the fused operator leaves to separate passes, and says so. Elsewhere that warning
# is an error.
separate_passes = pytest.mark.filterwarnings("ignore:senet runs .* in separate passes")
