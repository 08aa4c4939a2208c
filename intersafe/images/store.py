"""Verifies and normalises images, stores them by content, makes data URIs and compares images.

Images are untrusted: `containers.py` reads their container before Pillow gets the bytes. An image that needs no change
keeps its bytes, so its reference `<sha256>.<ext>` does not depend on the version of Pillow.
"""

import base64
import contextlib
import hashlib
import io
import re
import stat
import struct
import threading
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from intersafe.errors import InputError, StorageError
from intersafe.images.containers import ORIENTATION, Picture, image_error, read_container
from intersafe.storage.files import write_whole

MAX_PIXELS = 40_000_000
MAX_BYTES = 20 * 2**20
MAX_EDGE = 2048
REMEMBERED_HASHES = 65_536
"""Most perceptual hashes in memory."""

_NAMES = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
_SUFFIXES = {"png": (".png",), "jpg": (".jpg", ".jpeg", ".jpe", ".jfif"), "webp": (".webp",)}
_START = re.compile(rb"(?P<png>\x89PNG\r\n\x1a\n)|(?P<jpg>\xff\xd8\xff)|(?P<webp>RIFF.{4}WEBP)", re.DOTALL)
_OTHERS = {b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"%PDF": "PDF", b"<svg": "SVG"}
_SAVE: dict[str, dict[str, Any]] = {"png": {}, "jpg": {"quality": 95}, "webp": {"quality": 95}}
_REF = re.compile(r"[0-9a-f]{64}\.(?:png|jpg|webp)")
# What Pillow's decoders raise on bad bytes.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, struct.error)


class Normalised(NamedTuple):
    """A verified image: its reference, its bytes, and its size in pixels."""

    ref: str
    data: bytes
    width: int
    height: int


# --- verify and normalise --------------------------------------------------------------------------------------------


def _kind(data: bytes, at: object) -> str:
    if start := _START.match(data):
        return str(start.lastgroup)
    other = "AVIF or HEIC" if data[4:8] == b"ftyp" else next((_OTHERS[m] for m in _OTHERS if data.startswith(m)), "")
    if other:
        raise image_error(at, f"a {other} file is not supported")
    raise image_error(at, "not an image" if data else "the image is empty", "use a PNG, JPEG or WEBP file")


def _decode(data: bytes, kind: str, at: object, max_pixels: int) -> tuple[Picture, Image.Image]:
    # Pillow warns above its own limit; below both limits it cannot.
    picture = read_container(data, kind, at, min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels))
    try:
        image = Image.open(io.BytesIO(picture.data), formats=[_NAMES[kind]])
        if image.size != (picture.width, picture.height):
            raise image_error(at, "the image is damaged (its headers contradict each other)")
        image.load()
    except _DECODER_ERRORS as error:
        raise image_error(at, f"the {_NAMES[kind]} image cannot be decoded") from error
    return picture, image


def _plain(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB, RGBA or L."""
    if image.mode == "I;16":
        # Pillow's own conversion clips at 255; taking the high byte of each little-endian pair scales instead.
        return Image.frombytes("L", image.size, image.tobytes()[1::2])
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def normalise(
    data: bytes, *, at: object, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES, max_edge: int = MAX_EDGE
) -> Normalised:
    """The image upright, without metadata, as 8-bit RGB, RGBA, L or palette, no edge over `max_edge` pixels.

    Raises `InputError` naming `at` for anything but a complete, still PNG, JPEG or WEBP within the limits.
    """
    if len(data) > max_bytes:
        raise image_error(at, f"the image has more than {max_bytes:,} bytes", "scale or compress it")
    picture, image = _decode(data, kind := _kind(data, at), at, max_pixels)
    out, edge = picture.data, max(image.size)
    if picture.orientation != 1 or picture.deep or edge > max_edge or image.mode not in ("RGB", "RGBA", "L", "P"):
        image = _plain(image)
        image.getexif()[ORIENTATION] = picture.orientation
        image = ImageOps.exif_transpose(image)
        if edge > max_edge:
            image = image.resize(
                [max(1, round(side * max_edge / edge)) for side in image.size], Image.Resampling.LANCZOS
            )
        buffer = io.BytesIO()
        image.save(buffer, _NAMES[kind], **_SAVE[kind])
        out = buffer.getvalue()
    return Normalised(f"{hashlib.sha256(out).hexdigest()}.{kind}", out, *image.size)


def read_image(path: Path, *, at: object = None) -> Normalised:
    """The normalised image of a file; `InputError` names `at`, or the path if `at` is None."""
    at = path if at is None else at
    return normalise(_bytes_of(path, at), at=at)


def reference_of(path: Path, known: dict[str, str], *, at: object = None) -> str:
    """The reference of the image in a file; raises like `read_image`.

    `known` has references by the sha256 of the file. An image that is not in it is normalised and added.
    """
    at = path if at is None else at
    data = _bytes_of(path, at)
    source = hashlib.sha256(data).hexdigest()
    if source not in known:
        known[source] = normalise(data, at=at).ref
    return known[source]


def _bytes_of(path: Path, at: object) -> bytes:
    """The bytes of an image file whose suffix matches its content."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise image_error(at, "not a file", "use a PNG, JPEG or WEBP file")
        if status.st_size > MAX_BYTES:
            raise image_error(at, f"the image has more than {MAX_BYTES:,} bytes", "scale or compress it")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise image_error(at, f"no readable image ({getattr(error, 'strerror', error)})", "check the path") from error
    kind = _kind(data, at)
    if path.suffix.lower() not in _SUFFIXES[kind]:
        raise image_error(
            at, f"the bytes are {_NAMES[kind]}, the name is `{path.name}`", f"name it `{path.stem}.{kind}`"
        )
    return data


# --- store -----------------------------------------------------------------------------------------------------------


class ImageStore:
    """Images by content: `<root>/ab/<sha256>.<ext>`, written whole, compared with their name on every read."""

    def __init__(self, root: Path, *, cache_bytes: int = 32 * 2**20) -> None:
        """`cache_bytes` limits the data URIs in memory; the least recently used are dropped first."""
        self.root = root
        self._cache_bytes, self._cached, self._lock = cache_bytes, 0, threading.Lock()
        self._uris: dict[str, str] = {}
        self._hashes: dict[str, int] = {}

    def path(self, ref: str) -> Path:
        """The path of a reference, whether the file exists or not; `InputError` for anything but a reference."""
        if not _REF.fullmatch(ref):
            raise image_error(self.root, f"{ref!r} is not an image reference", "write <sha256>.<png|jpg|webp>")
        return self.root / ref[:2] / ref

    def put(self, image: Normalised) -> str:
        """Stores the image unless it is there and returns its reference; raises `StorageError`."""
        path = self.path(image.ref)
        with contextlib.suppress(OSError):
            if path.read_bytes() == image.data:
                return image.ref
        write_whole(path, image.data)
        return image.ref

    def is_sound(self, ref: str) -> bool:
        """True if the image exists and its bytes hash to its name."""
        try:
            self.read(ref)
        except InputError:
            return False
        return True

    def read(self, ref: str) -> bytes:
        """The bytes of a reference; `InputError` if ill-formed, missing or corrupt, `StorageError` if unreadable."""
        path = self.path(ref)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            if not self.root.parent.is_dir():
                gone = "is gone: was it moved or deleted? Put it back, or resume it where it is now"
                raise StorageError(f"{self.root.parent} {gone}") from None
            raise image_error(path, "the image is missing from the store", "restore the images folder") from None
        except OSError as error:
            raise StorageError(f"{path}: cannot be read ({error.strerror})") from error
        if hashlib.sha256(data).hexdigest() != path.stem:
            raise image_error(path, "the image is corrupt (its bytes do not hash to its name)", "restore the file")
        return data

    def data_uri(self, ref: str) -> str:
        """`data:<media type>;base64,...` of a reference; raises like `read`."""
        with self._lock:
            uri = self._uris.pop(ref, "")
            if not uri:
                body = base64.b64encode(self.read(ref)).decode("ascii")
                uri = f"data:image/{_NAMES[ref[65:]].lower()};base64,{body}"
                self._cached += len(uri)
            self._uris[ref] = uri
            while self._cached > self._cache_bytes:
                self._cached -= len(self._uris.pop(next(iter(self._uris))))
            return uri

    def perceptual_hash(self, ref: str) -> int:
        """`dhash` of a reference, cached; raises like `read`."""
        found = self._hashes.get(ref)
        if found is None:
            found = dhash(self.read(ref))
            self.remember(ref, found)
        return found

    def remember(self, ref: str, found: int) -> None:
        """Caches the `dhash` of a reference, computed here or by another process."""
        with self._lock:
            self._hashes[ref] = found
            if len(self._hashes) > REMEMBERED_HASHES:
                del self._hashes[next(iter(self._hashes))]


def dhash(data: bytes) -> int:
    """64-bit difference hash (Krawetz, "Kind of Like That", hackerfactor.com, 2013); raises `InputError`.

    A bit is set where a pixel of the 9 x 8 grey thumbnail is darker than its right neighbour; a flat image gives 0.
    """
    image = _plain(_decode(data, _kind(data, "image"), "image", MAX_PIXELS)[1])
    if image.mode == "RGBA":
        # On mid-grey, both dark and light drawings with a transparent background keep their outline.
        image = Image.alpha_composite(Image.new("RGBA", image.size, (128, 128, 128, 255)), image)
    grey = image.convert("L").resize((9, 8), Image.Resampling.BOX).tobytes()
    bits = (grey[9 * row + column] < grey[9 * row + column + 1] for row in range(8) for column in range(8))
    return sum(bit << place for place, bit in enumerate(bits))


def distance(a: int, b: int) -> int:
    """Number of different bits (Hamming distance), 0 to 64."""
    return (a ^ b).bit_count()
