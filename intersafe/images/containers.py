"""The containers of PNG, JPEG and WEBP: read part by part before Pillow gets the bytes.

This finds truncation (checksums, end marks), limits the size before anything is decompressed, and drops everything that
is not the picture (EXIF, XMP, comments, colour profiles, thumbnails, trailing bytes) without changing a pixel.
"""

import re
import struct
import zlib
from typing import Any, NamedTuple

from intersafe.errors import InputError

_TRUNCATED = ("the image is truncated", "copy or download it again")
_ANIMATED = ("the image is animated", "save one frame of it")
ORIENTATION = 0x0112


class Picture(NamedTuple):
    """The parts of a container that make the picture; `orientation` is EXIF's 1 to 8, `deep` is 16 bits per channel."""

    data: bytes
    width: int
    height: int
    orientation: int
    deep: bool = False


def read_container(data: bytes, kind: str, at: object, max_pixels: int) -> Picture:
    """The picture in a container of that kind (png, jpg or webp).

    Raises `InputError` naming `at` for a damaged, truncated or animated image, and for one of more than `max_pixels`.
    """
    return {"png": _png, "jpg": _jpeg, "webp": _webp}[kind](data, at, max_pixels)


def image_error(at: object, what: str, remedy: str = "export it again as PNG, JPEG or WEBP") -> InputError:
    """The error for an image that cannot be used."""
    return InputError(what, at=at, remedy=remedy)


def _bounded(at: object, size: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    width, height = size
    if not width or not height:
        raise image_error(at, "the image is damaged (no width or height)")
    if width * height > max_pixels:
        raise image_error(at, f"the image claims {width} x {height} pixels, more than {max_pixels:,}", "scale it down")
    return size


_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def _png(data: bytes, at: object, max_pixels: int) -> Picture:
    """The chunks of a PNG (W3C PNG, section 5): every checksum is checked and the end chunk required."""
    kept, body, header, exif, place, name = [data[:8]], [], b"", b"", 8, b""
    while name != b"IEND":
        start, place = place, place + 12 + int.from_bytes(data[place : place + 4], "big")
        if len(data) < place:
            raise image_error(at, *_TRUNCATED)
        chunk, name, payload = data[start:place], data[start + 4 : start + 8], data[start + 8 : place - 4]
        if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
            raise image_error(at, "the image is damaged (a checksum does not match)")
        if (name == b"IHDR") != (start == 8) or (name == b"IHDR" and len(payload) != 13):
            raise image_error(at, "the image is damaged (bad header)")
        if name == b"acTL" and int.from_bytes(payload[:4], "big") > 1:
            raise image_error(at, *_ANIMATED)
        if name == b"IHDR":
            header = payload
            _bounded(at, struct.unpack(">II", header[:8]), max_pixels)
        elif name == b"eXIf":
            exif = payload
        elif name == b"IDAT":
            body.append(payload)
        if name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(chunk)
    _check_rows(at, header, body)
    width, height, depth = struct.unpack(">IIB", header[:9])
    return Picture(b"".join(kept), width, height, _orientation(exif), depth == 16)


def _check_rows(at: object, header: bytes, body: list[bytes]) -> None:
    """Raises unless `body` decompresses to every row: Pillow shows missing rows of a well-formed stream as black."""
    width, height, depth, color, _, _, interlace = struct.unpack(">IIBBBBB", header)
    missing = 0
    for left, top, across, down in _ADAM7 if interlace else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        row_bytes = 1 + (columns * depth * _CHANNELS.get(color, 1) + 7) // 8
        missing += rows * row_bytes if columns > 0 and rows > 0 else 0
    inflate = zlib.decompressobj()
    try:
        for part in body:
            left_over = part
            while left_over and missing > 0:
                missing -= len(inflate.decompress(left_over, 2**20))
                left_over = inflate.unconsumed_tail
    except zlib.error:
        raise image_error(at, "the image is damaged (its pixels do not decompress)") from None
    if missing > 0:
        raise image_error(at, *_TRUNCATED)


_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd8\xff])")
_SCAN_END = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")
_MOST_SCANS = 500  # each scan, however short, costs a pass over all pixels; encoders write about ten


def _jpeg(data: bytes, at: object, max_pixels: int) -> Picture:
    """The segments of a JPEG (ITU-T T.81, annex B) up to its end mark, which is required."""
    kept, scans, size, exif, place = [data[:2]], 0, (0, 0), b"", 2
    while (marker := _MARKER.match(data, place)) and marker[1] != b"\xd9":
        code, start = marker[1][0], marker.end()
        length = int.from_bytes(data[start : start + 2], "big")
        place = start + max(length, 2)
        if len(data) < place:
            raise image_error(at, *_TRUNCATED)
        segment, payload = b"\xff" + marker[1] + data[start:place], data[start + 2 : place]
        if code == 0xDA:
            scans, scan_end = scans + 1, _SCAN_END.search(data, place)
            if scan_end is None:
                raise image_error(at, *_TRUNCATED)
            segment, place = segment + data[place : scan_end.start()], scan_end.start()
        elif 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            if length < 8:
                raise image_error(at, "the image is damaged (bad header)")
            size = _bounded(at, struct.unpack(">HH", payload[1:5])[::-1], max_pixels)
        elif code == 0xE1 and payload.startswith(b"Exif"):
            exif = exif or payload
        kept.append(_application(code, payload) if 0xE0 <= code <= 0xEF or code == 0xFE else segment)
    if marker is None:
        raise (
            image_error(at, *_TRUNCATED)
            if place >= len(data) - 1
            else image_error(at, "the image is damaged (a marker is missing)")
        )
    if not scans or scans > _MOST_SCANS:
        raise image_error(at, f"the image is damaged ({scans} scans)")
    return Picture(b"".join([*kept, b"\xff\xd9"]), *_bounded(at, size, max_pixels), _orientation(exif))


def _application(code: int, payload: bytes) -> bytes:
    """Of application and comment segments only the fixed fields of JFIF and Adobe, which decide the colour space."""
    if code == 0xE0 and payload.startswith(b"JFIF\0") and len(payload) >= 14:
        return b"\xff\xe0\0\x10" + payload[:12] + b"\0\0"
    if code == 0xEE and payload.startswith(b"Adobe") and len(payload) >= 12:
        return b"\xff\xee\0\x0e" + payload[:12]
    return b""


def _webp(data: bytes, at: object, max_pixels: int) -> Picture:
    """The chunks of a WEBP (RFC 9649, section 2) up to its stated length; the flags of the header are corrected."""
    kept, size, exif, place, total = [], (0, 0), b"", 12, 8 + int.from_bytes(data[4:8], "little")
    if len(data) < total:
        raise image_error(at, *_TRUNCATED)
    while place < total:
        name, length = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        payload, place = data[place + 8 : place + 8 + length], place + 8 + length + length % 2
        if place > total:
            raise image_error(at, *_TRUNCATED)
        if name in (b"ANIM", b"ANMF"):
            raise image_error(at, *_ANIMATED)
        if name == b"EXIF":
            exif = payload
        if name == b"VP8X":
            payload = bytes([payload[0] & 0x10 if payload else 0, 0, 0, 0]) + payload[4:10]
        if name in (b"VP8X", b"VP8 ", b"VP8L"):
            size = max(size, _bounded(at, _webp_size(name, payload), max_pixels))
        if name in (b"VP8X", b"VP8 ", b"VP8L", b"ALPH"):
            kept.append(name + len(payload).to_bytes(4, "little") + payload + b"\0" * (len(payload) % 2))
    body = b"WEBP" + b"".join(kept)
    out = b"RIFF" + len(body).to_bytes(4, "little") + body
    return Picture(out, *_bounded(at, size, max_pixels), _orientation(exif))


def _webp_size(name: bytes, payload: bytes) -> tuple[int, int]:
    if name == b"VP8X":
        return int.from_bytes(payload[4:7], "little") + 1, int.from_bytes(payload[7:10], "little") + 1
    if name == b"VP8L":
        packed = int.from_bytes(payload[1:5], "little")
        return (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    return int.from_bytes(payload[6:8], "little") & 0x3FFF, int.from_bytes(payload[8:10], "little") & 0x3FFF


def _orientation(exif: bytes) -> int:
    """The orientation tag of the first directory; 1 (upright) if there is none or the block is broken."""
    exif = exif.removeprefix(b"Exif\0\0")
    if exif[:2] not in (b"II", b"MM"):
        return 1
    order: Any = "little" if exif[:2] == b"II" else "big"
    first = int.from_bytes(exif[4:8], order) + 2
    for place in range(first, first + 12 * int.from_bytes(exif[first - 2 : first], order), 12):
        if int.from_bytes(exif[place : place + 2], order) == ORIENTATION:
            value = int.from_bytes(exif[place + 8 : place + 10], order)
            return value if 1 <= value <= 8 else 1
    return 1
