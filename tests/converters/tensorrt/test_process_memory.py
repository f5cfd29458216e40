"""Pages of mapped files are given back, and only those that can be read again."""

import mmap
from pathlib import Path

from cascadekit.converters.tensorrt.process_memory import mappings


def test_what_is_given_back(tmp_path: Path) -> None:
    here, other = tmp_path / "here", tmp_path / "here/other"
    other.mkdir(parents=True)
    sizes = {here / "read": 3 * mmap.PAGESIZE, here / "written": 5 * mmap.PAGESIZE, other / "read": 7 * mmap.PAGESIZE}
    for path, size in sizes.items():
        path.write_bytes(b"x" * size)
    with (here / "read").open("rb") as a, (here / "written").open("r+b") as b, (other / "read").open("rb") as c:
        maps = [
            mmap.mmap(a.fileno(), 0, access=mmap.ACCESS_READ),
            mmap.mmap(b.fileno(), 0, access=mmap.ACCESS_COPY),
            mmap.mmap(c.fileno(), 0, access=mmap.ACCESS_READ),
        ]
        found = list(mappings(here))
        for mapped in maps:
            mapped.close()
    assert [length for _, length in found] == [3 * mmap.PAGESIZE]
