"""The kit of the GPU benchmark: packed, cut, made small, and unpacked. pip's downloads are stand-ins."""

import struct
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cascadekit.bench.gpu import kit as kits
from cascadekit.bench.gpu.kit import BENCH, INSTALLER, Kit, make_kit, pack
from cascadekit.bench.gpu.one_architecture import keep_architecture
from cascadekit.schemas.errors import ConversionError, UsageError


@pytest.fixture
def wheels(tmp_path: Path) -> list[Path]:
    """Two wheels, one of which is cut into parts."""
    made = []
    for name, size in (("small-1-py3-none-any.whl", 10), ("large-1-py3-none-any.whl", 5000)):
        path = tmp_path / name
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{name[:5]}/data.bin", np.random.default_rng(0).bytes(size))
        made.append(path)
    return made


def test_the_kit(tmp_path: Path, wheels: list[Path]) -> None:
    kit, site = tmp_path / "kit", tmp_path / "site"
    index = pack(kit, wheels, part_bytes=1000)
    parts = next(file["parts"] for file in index["files"] if file["name"].startswith("large"))
    assert len(parts) == 6
    assert max((kit / part).stat().st_size for file in index["files"] for part in file["parts"]) <= 1000
    assert _install(kit, site) == ""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                assert (site / name).read_bytes() == archive.read(name)
    ours = {path.relative_to(BENCH) for path in BENCH.rglob("*.py")}
    assert {path.relative_to(site / "cascadekit/bench") for path in (site / "cascadekit").rglob("*.py")} == ours
    (kit / parts[2]).write_bytes(b"x" * 1000)
    assert "large-1-py3-none-any.whl: damaged; expected SHA-256" in _install(kit, site)
    (kit / parts[2]).unlink()
    assert f"not there: {parts[2]}; copy them" in _install(kit, site)


def test_a_kit_in_whole_files(tmp_path: Path, wheels: list[Path]) -> None:
    pack(tmp_path / "kit", wheels)
    names = {path.name for path in (tmp_path / "kit").iterdir()}
    assert names == {*(wheel.name for wheel in wheels), "kit.json", INSTALLER.name, "cascadekit-bench.zip"}


def _install(kit: Path, site: Path) -> str:
    """The complaint of `install.py`, in a Python without packages."""
    return subprocess.run(
        [sys.executable, "-I", "-S", str(kit / "install.py"), str(site)], capture_output=True, text=True, check=False
    ).stderr


def fat_binary(*images: tuple[int, bytes]) -> bytes:
    """As `cuobjdump` reads it: a header, and an image with its own header of 64 bytes for each architecture."""
    body = b"".join(
        struct.pack("<HHIQ", 2, 0x101, 64, len(code)) + bytes(12) + struct.pack("<I", sm) + bytes(32) + code
        for sm, code in images
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_one_architecture_is_kept() -> None:
    first = fat_binary((80, b"a" * 100), (90, b"b" * 60), (120, b"c" * 40))
    second = fat_binary((90, b"d" * 8))
    odd = b"\x50\xed\x55\xba" + b"\xff" * 20  # the four bytes, and no header
    library = bytearray(b"ELF" + first + odd + second + b"\x50\xed\x55\xba")
    wanted = bytes(library).replace(b"a" * 100, bytes(100)).replace(b"c" * 40, bytes(40))
    assert keep_architecture(library, 90) == 68
    assert library == wanted
    assert keep_architecture(library, 75) == 0


ORT = "onnxruntime_gpu-1.31.1-cp312-cp312-manylinux_2_28_x86_64.whl"


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages that pip would download: onnxruntime-gpu, numpy and the wheel of this checkout."""

    def download(folder: Path, python: str, onnxruntime: str, more: Sequence[str]) -> list[Path]:
        assert (python, onnxruntime, more) == ("3.12", "onnxruntime-gpu==1.31.1", ())
        for name in (ORT, "numpy-2.5.5-cp312-cp312-manylinux_2_28_x86_64.whl", "cascadekit-0.1.0-py3-none-any.whl"):
            with zipfile.ZipFile(folder / name, "w") as archive:
                archive.writestr(f"{name.split('-')[0]}/__init__.py", name)
                if name == ORT:
                    code = fat_binary((90, b"kernels"), (80, np.random.default_rng(0).bytes(100_000)))
                    archive.writestr("onnxruntime/capi/libonnxruntime_providers_cuda.so", code)
                    archive.writestr("onnxruntime/capi/libonnxruntime.so.1.31.1", b"for C")
        return sorted(folder.glob("*.whl"))

    monkeypatch.setattr(kits, "download", download)


@pytest.mark.usefixtures("downloads")
def test_a_small_kit(tmp_path: Path) -> None:
    """For one architecture, and without what the machine has: its files can be unpacked all the same."""
    wanted = Kit("3.12", "onnxruntime-gpu==1.31.1", without=("numpy",), sm=90)
    names = make_kit(tmp_path / "kit", wanted)
    assert names == ["cascadekit-0.1.0-py3-none-any.whl", f"{Path(ORT).stem}-sm90.zip", "cascadekit-bench.zip"]
    assert (tmp_path / "kit" / names[1]).stat().st_size < 5000
    assert _install(tmp_path / "kit", tmp_path / "site") == ""
    capi = tmp_path / "site" / "onnxruntime" / "capi"
    assert [path.name for path in capi.iterdir()] == ["libonnxruntime_providers_cuda.so"]
    assert b"kernels" in (capi / "libonnxruntime_providers_cuda.so").read_bytes()
    assert not (tmp_path / "site" / "numpy").exists()


@pytest.mark.usefixtures("downloads")
def test_kits_that_cannot_be(tmp_path: Path) -> None:
    for changes, error, words in (
        ({"sm": 100}, ConversionError, "has no code for sm100"),
        ({"without": ("torch",)}, UsageError, "without torch: expected names of cascadekit, numpy, onnxruntime-gpu"),
    ):
        with pytest.raises(error, match=words):
            make_kit(tmp_path / "kit", Kit("3.12", "onnxruntime-gpu==1.31.1", **changes))  # type: ignore[arg-type]
        assert not (tmp_path / "kit").exists()
    (tmp_path / "kit").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        make_kit(tmp_path / "kit", Kit("3.12", "onnxruntime-gpu==1.31.1"))
