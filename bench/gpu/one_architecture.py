"""Makes the wheel of onnxruntime-gpu small, for a measurement on one known card.

A CUDA library has the code of every GPU architecture. That of all but one becomes zeros, which compress to nothing. It
keeps its place, so the library loads as before. Files that Python does not need are left out.
"""

import re
import struct
import zipfile
from pathlib import Path

from ...schemas.errors import ConversionError

CUDA_LIBRARY = re.compile(r".*/libonnxruntime_providers_cuda\.so")
LEFT_OUT = re.compile(r".*/(libonnxruntime\.so.*|libonnxruntime_providers_tensorrt\.so|transformers/models/.*)")

# NVIDIA's "fat binaries", little-endian: magic number, version, bytes of this header and of all images. An image begins
# with a header of its own: bytes of it, bytes of the code, and from byte 28 on the architecture.
MAGIC, VERSION = 0xBA55ED50, 1
HEADER, IMAGE, ARCHITECTURE = struct.Struct("<IHHQ"), struct.Struct("<4xIQ"), struct.Struct("<28xI")


def keep_architecture(library: bytearray, sm: int) -> int:
    """Zero the code of all architectures but `sm` (90 for sm90) in a CUDA library; returns the bytes of code kept."""
    magic, kept, at = MAGIC.to_bytes(4, "little"), 0, -1
    while (at := library.find(magic, at + 1)) >= 0:
        _, version, header, size = HEADER.unpack_from(library, at) if at + HEADER.size <= len(library) else (0,) * 4
        end = at + header + size
        if (version, header) != (VERSION, HEADER.size) or end > len(library):
            continue  # these four bytes are no header
        image = at + header
        while image < end:
            before, code = IMAGE.unpack_from(library, image)
            if ARCHITECTURE.unpack_from(library, image)[0] == sm:
                kept += code
            else:
                library[image + before : image + before + code] = bytes(code)
            image += before + code
        at = end - 1
    return kept


def slim_wheel(wheel: Path, sm: int, folder: Path) -> Path:
    """The wheel of onnxruntime-gpu for the architecture `sm` alone, in `folder`; it is for `install.py`, not for pip.

    Raises ConversionError when the wheel has no code for `sm`."""
    path = folder / f"{wheel.stem}-sm{sm}.zip"
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as target:
        for name in source.namelist():
            if LEFT_OUT.fullmatch(name):
                continue
            content = bytearray(source.read(name))
            if CUDA_LIBRARY.fullmatch(name) and not keep_architecture(content, sm):
                raise ConversionError(f"{wheel.name}: has no code for sm{sm}; name the architecture of the GPU")
            target.writestr(name, bytes(content))
    return path
