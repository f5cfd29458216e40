"""The number of threads that the environment allows to engines that do not ask it themselves."""

import os

VARIABLE = "OMP_NUM_THREADS"
MOST = 4096


def environment_threads() -> int | None:
    """The number in OMP_NUM_THREADS, which numpy and torch follow, too; the first one of a list.

    None where the variable is not set or is no positive number."""
    first = os.environ.get(VARIABLE, "").partition(",")[0].strip()
    return min(int(first), MOST) or None if first.isdecimal() else None
