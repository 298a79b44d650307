"""Damaged NIfTI files: one random mutation of header or stream at a time."""

from __future__ import annotations

import gzip
from collections.abc import Callable

import nibabel as nib
import numpy as np

from tests.workflows.conftest import head

# Offset and type of NIfTI-1 fields that decide what is read and where it lies.
FIELDS = {
    "sizeof_hdr": (0, "i4", 1), "dim": (40, "i2", 8), "datatype": (70, "i2", 1),
    "bitpix": (72, "i2", 1), "pixdim": (76, "f4", 8), "vox_offset": (108, "f4", 1),
    "scl": (112, "f4", 2), "xyzt_units": (123, "u1", 1), "codes": (252, "i2", 2),
    "quaternion": (256, "f4", 6), "srow": (280, "f4", 12), "magic": (344, "u1", 4),
    "extension": (348, "u1", 4),
}  # fmt: skip
EXTREME = {
    "i": (0, 1, -1, 2, 7, 255, 256, 512, 2048, 32767, -32768),
    "u": (0, 1, 2, 127, 255),
    "f": (0, -0.0, 1, -1, 1e-30, 1e30, 352, 2**31, -3, 0.3, 5, 600, np.nan, np.inf, -np.inf),
}


def whole_file(rng: np.random.Generator) -> bytes:
    """An undamaged head of 3 mm: either byte order, int16 or float32, NIfTI-1."""
    dtype = rng.choice(["<i2", ">i2", "<f4", ">f4"])
    header = nib.Nifti1Header(endianness=dtype[0])
    header.set_data_dtype(np.dtype(dtype))
    image = nib.Nifti1Image(head(1).astype(dtype), np.diag([3.0, 3, 3, 1]), header)
    return image.to_bytes()


def field(content: bytearray, rng: np.random.Generator) -> str:
    """Set one number of the header to an extreme value."""
    name = rng.choice(list(FIELDS))
    start, kind, count = FIELDS[name]
    order = "<" if content[0] == 0x5C else ">"
    dtype = np.dtype(order + kind)
    place = start + dtype.itemsize * int(rng.integers(count))
    value = EXTREME[kind[0]][rng.integers(len(EXTREME[kind[0]]))]
    # 2048 does not fit a byte and so on: such are cut to the type, as a damaged file has them.
    number = (
        np.array(value, "f8").astype(dtype) if kind[0] == "f" else np.array(value).astype(dtype)
    )
    content[place : place + dtype.itemsize] = number.tobytes()
    return f"{name}[{(place - start) // dtype.itemsize}] = {value}"


def header_bits(content: bytearray, rng: np.random.Generator) -> str:
    """Flip up to eight bits of the header."""
    places = rng.integers(0, 352, int(rng.integers(1, 9)))
    for place in places:
        content[place] ^= 1 << int(rng.integers(8))
    return f"bits of header bytes {sorted(places.tolist())}"


def voxels(content: bytearray, rng: np.random.Generator) -> str:
    """Overwrite a stretch of voxels with noise, 255 or 0."""
    start = int(rng.integers(352, len(content)))
    length = int(rng.integers(1, 100_000))
    stop = min(len(content), start + length)
    kind = rng.integers(3)
    content[start:stop] = rng.bytes(stop - start) if kind == 0 else bytes([255 * (kind == 1)]) * (
        stop - start)  # fmt: skip
    return f"voxel bytes {start}:{stop}"


def cut(content: bytearray, rng: np.random.Generator) -> str:
    """End the file early, most often within its header."""
    length = int(len(content) * rng.random() ** 4)
    del content[length:]
    return f"cut to {length} bytes"


def grow(content: bytearray, rng: np.random.Generator) -> str:
    """Append noise or zeros."""
    content += rng.bytes(1000) if rng.random() < 0.5 else bytes(10_000_000)
    return "longer"


def stream_bits(content: bytearray, rng: np.random.Generator) -> str:
    """Flip up to 20 bits anywhere."""
    for place in rng.integers(0, len(content), int(rng.integers(1, 21))):
        content[place] ^= 1 << int(rng.integers(8))
    return "bits of the stream"


def stream_start(content: bytearray, rng: np.random.Generator) -> str:
    """Overwrite one of the first 20 bytes, where gzip keeps its flags."""
    place = int(rng.integers(20))
    content[place] = int(rng.integers(256))
    return f"stream byte {place}"


def stream_twice(content: bytearray, rng: np.random.Generator) -> str:
    """Repeat the stream, whole or in part: gzip allows members one after another."""
    content += content[: int(rng.integers(1, len(content)))]
    return "stream repeated"


def bomb(content: bytearray, rng: np.random.Generator) -> str:
    """Replace the stream by 1 GB of zeros in 1 MB, of which the header tells no lie."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape((730, 730, 730))
    header.set_sform(np.diag([0.3, 0.3, 0.3, 1]), 1)
    header["vox_offset"] = 352
    plain = gzip.compress(header.binaryblock + bytes(4))
    content[:] = plain + gzip.compress(bytes(1 << 24)) * 64
    return "gzip bomb"


PLAIN: tuple[Callable, ...] = (field, field, field, header_bits, header_bits, voxels, cut, grow)
COMPRESSED: tuple[Callable, ...] = (stream_bits, stream_bits, stream_start, stream_twice, cut, bomb)


def damaged_file(seed: int) -> tuple[bytes, str, str]:
    """Return content, extension and what was done: two of three in the header, the rest later."""
    rng = np.random.default_rng(seed)
    content = bytearray(whole_file(rng))
    if seed % 3:
        what = PLAIN[rng.integers(len(PLAIN))](content, rng)
        if rng.random() < 0.3:
            return bytes(content), ".nii", what
        return gzip.compress(bytes(content), 1), ".nii.gz", what
    content = bytearray(gzip.compress(bytes(content), 1))
    what = COMPRESSED[rng.integers(len(COMPRESSED))](content, rng)
    return bytes(content), ".nii.gz", what
