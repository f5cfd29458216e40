"""The number of threads that the environment allows to engines that do not ask it themselves."""

import os

VARIABLE = "OMP_NUM_THREADS"
MOST = 4096


def environment_threads() -> int:
    """The first number in OMP_NUM_THREADS, which numpy and torch follow, too.

    The result is 0 where the variable is not set or is no positive number."""
    first = os.environ.get(VARIABLE, "").partition(",")[0].strip()
    return min(int(first[:9]), MOST) if first.isdecimal() else 0
