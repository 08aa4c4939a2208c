"""Images: whole or refused, without metadata, bounded, and never other bytes than the reference names."""

import base64
import hashlib
import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from intersafe.errors import InputError, StorageError
from intersafe.images.store import ImageStore, Normalised, dhash, distance, normalise, read_image
from tests.support.runs import refusal

AT = "here"
Encoding = tuple[str, dict[str, Any]]
ENCODINGS: list[Encoding] = [
    ("PNG", {}),
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
]
SECRET = b"48.8584 N 2.2945 E"


def drawing(size: tuple[int, int] = (96, 64), mode: str = "RGB") -> Image.Image:
    """A picture with edges, a ramp and some noise, the same on every call."""
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    pen = ImageDraw.Draw(image)
    pen.ellipse((size[0] // 8, size[1] // 8, size[0] // 2, size[1] // 2), fill=(200, 30, 60))
    pen.rectangle((size[0] // 2, size[1] // 2, size[0] - 4, size[1] - 4), fill=(20, 160, 90))
    return image.convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def chunk(name: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))


def png(width: int, height: int, rows: bytes, *, depth: int = 8, color: int = 2, extra: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# --- whole or refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), ENCODINGS)
def test_an_image_that_needs_nothing_keeps_its_bytes(kind: str, options: dict[str, Any]) -> None:
    data = encoded(drawing(), kind, **options)
    image = normalise(data, at=AT)
    assert image.data == data
    assert image.ref.split(".")[0] == hashlib.sha256(data).hexdigest()
    assert (image.width, image.height) == (96, 64)


@pytest.mark.parametrize(("kind", "options"), ENCODINGS)
def test_every_truncation_is_refused(kind: str, options: dict[str, Any]) -> None:
    data = encoded(drawing(), kind, **options)
    for length in range(len(data)):
        refusal(lambda: normalise(data[:length], at=AT))  # noqa: B023


def test_a_thumbnail_end_mark_does_not_hide_a_truncation() -> None:
    exif = b"Exif\0\0" + encoded(drawing((16, 16)), "JPEG")
    data = encoded(drawing(), "JPEG", exif=exif)
    assert "truncated" in refusal(lambda: normalise(data[: len(data) * 2 // 3], at=AT))


def test_every_bit_flip_of_a_png_is_refused() -> None:
    data = encoded(drawing((24, 16)))
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        refusal(lambda: normalise(bytes(flipped), at=AT))  # noqa: B023


@pytest.mark.parametrize(("kind", "options"), ENCODINGS[1:])
def test_damage_is_refused_or_decodes_but_never_escapes(kind: str, options: dict[str, Any]) -> None:
    """Without checksums a flip may leave a valid image; what is accepted must then be stable and decodable."""
    data, dice = encoded(drawing(), kind, **options), random.Random(7)
    refused = 0
    for _ in range(400):
        hurt = bytearray(data)
        for _ in range(dice.choice((1, 1, 4, 16))):
            hurt[dice.randrange(len(hurt))] ^= 1 << dice.randrange(8)
        try:
            image = normalise(bytes(hurt), at=AT)
        except InputError:
            refused += 1
            continue
        assert normalise(image.data, at=AT) == image
        assert opened(image.data).size == (image.width, image.height)
    assert refused > 0


def test_a_png_whose_stream_is_sound_but_lacks_rows_is_refused() -> None:
    row = b"\0" + b"\x50" * 3 * 8
    assert normalise(png(8, 8, row * 8), at=AT).height == 8
    for rows in range(8):
        assert "truncated" in refusal(lambda: normalise(png(8, 8, row * rows), at=AT))  # noqa: B023


def test_an_interlaced_png_is_whole_or_refused() -> None:
    # Adam7's seven passes over 8 x 8 grey pixels: (rows, columns), a filter byte before each row.
    rows = [
        b"\0" + b"\x50" * wide
        for high, wide in ((1, 1), (1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8))
        for _ in range(high)
    ]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 1))
    for count in range(len(rows) + 1):
        body = zlib.compress(b"".join(rows[:count]))
        data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")
        if count == len(rows):
            assert opened(normalise(data, at=AT).data).tobytes() == b"\x50" * 64
        else:
            assert "truncated" in refusal(lambda: normalise(data, at=AT))  # noqa: B023


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"hello", "not an image"),
        (b"<html>404</html>", "not an image"),
        (b"RIFF\x10\0\0\0WAVEfmt ", "not an image"),
        (encoded(drawing(), "GIF"), "GIF"),
        (encoded(drawing(), "BMP"), "BMP"),
        (encoded(drawing(), "TIFF"), "TIFF"),
        (b"\0\0\0\x1cftypheic" + b"\0" * 32, "HEIC"),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"IEND", b""), "damaged"),
        (b"\xff\xd8\xff\xd9", "damaged"),
        (b"\xff\xd8\xff\xc0\0\x04\x08\0\xff\xd9", "damaged"),
        (b"\xff\xd8\xff\xc0\0\0\xff\xd9", "damaged"),
        (b"RIFF\x04\0\0\0WEBP", "damaged"),
    ],
)
def test_what_is_no_image_of_ours_is_named(data: bytes, says: str) -> None:
    message = refusal(lambda: normalise(data, at=AT))
    assert message.startswith("here: ")
    assert says in message


# --- floods ----------------------------------------------------------------------------------------------------------


def jpeg_of(width: int, height: int) -> bytes:
    data = encoded(drawing(), "JPEG")
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", height, width) + data[place + 4 :]


def webp_of(width: int, height: int) -> bytes:
    canvas = b"\0\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + canvas + encoded(drawing(), "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("bomb", [png(50_000, 50_000, b"\0" * 9), jpeg_of(50_000, 50_000), webp_of(50_000, 50_000)])
@pytest.mark.parametrize("limit", [40_000_000, 10**12])
def test_a_bomb_is_refused_from_its_header(bomb: bytes, limit: int) -> None:
    before = Image.MAX_IMAGE_PIXELS
    assert "50000 x 50000 pixels" in refusal(lambda: normalise(bomb, at=AT, max_pixels=limit))
    assert before == Image.MAX_IMAGE_PIXELS


def test_pillows_own_warning_does_not_leak() -> None:
    # 100 million pixels: Pillow would warn on opening, and a warning fails this suite.
    assert "pixels" in refusal(lambda: normalise(png(10_000, 10_000, b"\0" * 9), at=AT, max_pixels=10**12))


def test_a_second_frame_header_cannot_smuggle_another_size() -> None:
    data = encoded(drawing(), "JPEG")
    start = data.index(b"\xff\xc0")
    length = int.from_bytes(data[start + 2 : start + 4], "big") + 2
    smuggled = jpeg_of(9_000, 9_000)[start : start + length]
    behind = b"\xff\x01" + struct.pack(">H", 2 + length) + smuggled
    for hidden, says in ((smuggled, "9000 x 9000 pixels"), (behind, "a marker is missing")):
        for place in (start, start + length):
            assert says in refusal(lambda: normalise(data[:place] + hidden + data[place:], at=AT))  # noqa: B023
    refusal(lambda: normalise(data[:start] + data[start : start + length] + data[start:], at=AT))


def test_a_flood_of_scans_is_refused() -> None:
    data = encoded(drawing(), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    assert "scans" in refusal(lambda: normalise(data[:start] + data[start:-2] * 600 + b"\xff\xd9", at=AT))


def test_a_compressed_text_flood_is_dropped_unopened() -> None:
    flood = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * 20_000_000, 1))
    data = encoded(drawing())
    assert normalise(data[:33] + flood + data[33:], at=AT).data == data


def test_limits_bite_at_the_limit() -> None:
    data = encoded(drawing((40, 25)))
    assert normalise(data, at=AT, max_bytes=len(data), max_pixels=1000, max_edge=40).data == data
    assert "bytes" in refusal(lambda: normalise(data, at=AT, max_bytes=len(data) - 1))
    assert "40 x 25 pixels" in refusal(lambda: normalise(data, at=AT, max_pixels=999))
    smaller = normalise(data, at=AT, max_edge=39)
    assert (smaller.width, smaller.height) == (39, 24)
    assert opened(smaller.data).size == (39, 24)


@pytest.mark.parametrize(("size", "fits"), [((3000, 30), (2048, 20)), ((1, 5000), (1, 2048)), ((2048, 2048), None)])
def test_the_longest_edge_is_bounded(size: tuple[int, int], fits: tuple[int, int] | None) -> None:
    data = encoded(Image.new("RGB", size, "teal"))
    image = normalise(data, at=AT)
    assert (image.width, image.height) == (fits or size)
    assert (image.data == data) == (fits is None)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_refused(kind: str) -> None:
    frames = [drawing(), drawing().rotate(90), drawing().rotate(180)]
    assert "animated" in refusal(
        lambda: normalise(encoded(frames[0], kind, save_all=True, append_images=frames), at=AT)
    )


# --- metadata --------------------------------------------------------------------------------------------------------


def exif_with_place(orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = SECRET.decode()
    exif[0x8825] = {1: "N"}
    return exif.tobytes()


@pytest.mark.parametrize(("kind", "options"), ENCODINGS)
def test_metadata_goes_and_the_pixels_stay(kind: str, options: dict[str, Any]) -> None:
    bare = encoded(drawing(), kind, **options)
    tagged = encoded(drawing(), kind, exif=exif_with_place(), icc_profile=SECRET, **options)
    if kind == "PNG":
        tagged = tagged[:33] + chunk(b"tEXt", b"Author\0" + SECRET) + tagged[33:]
    if kind == "JPEG":
        tagged = tagged[:2] + b"\xff\xfe" + struct.pack(">H", 2 + len(SECRET)) + SECRET + tagged[2:]
    tagged += SECRET
    assert opened(tagged).getexif().get_ifd(0x8825)
    image = normalise(tagged, at=AT)
    assert SECRET not in image.data
    assert not opened(image.data).getexif()
    if image.data[12:16] == b"VP8X":
        assert image.data[20] & 0b101110 == 0, "the header still announces a profile, EXIF, XMP or frames"
    assert opened(image.data).tobytes() == opened(bare).tobytes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_turned_picture_is_set_upright(kind: str, orientation: int) -> None:
    upright = drawing()
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(turns[orientation])
    image = normalise(encoded(stored, kind, exif=exif_with_place(orientation)), at=AT)
    result = opened(image.data)
    assert result.size == upright.size == (image.width, image.height)
    assert not result.getexif()
    worst = max(abs(a - b) for a, b in zip(_small(result), _small(upright), strict=True))
    assert worst < 12


def _small(image: Image.Image) -> bytes:
    return image.convert("RGB").resize((12, 8), Image.Resampling.BOX).tobytes()


@pytest.mark.parametrize("junk", [b"II", b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 40, b"?"])
def test_broken_exif_is_dropped_quietly(junk: bytes) -> None:
    bare = encoded(drawing(), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", 8 + len(junk)) + b"Exif\0\0" + junk
    assert normalise(bare[:2] + segment + bare[2:], at=AT).data == bare


def test_a_thumbnail_in_the_jfif_header_goes() -> None:
    bare = encoded(drawing(), "JPEG")
    payload = bare[6:18] + b"\x02\x02" + SECRET[:12]
    image = normalise(bare[:2] + b"\xff\xe0" + struct.pack(">H", 2 + len(payload)) + payload + bare[20:], at=AT)
    assert image.data == bare


# --- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_plain_modes_are_left_alone(mode: str) -> None:
    data = encoded(drawing(mode=mode))
    assert normalise(data, at=AT).data == data


@pytest.mark.parametrize(("mode", "becomes"), [("1", "L"), ("LA", "RGBA")])
def test_other_modes_become_plain(mode: str, becomes: str) -> None:
    image = normalise(encoded(drawing(mode=mode)), at=AT)
    assert opened(image.data).mode == becomes
    assert opened(image.data).tobytes() == drawing(mode=mode).convert(becomes).tobytes()


def test_a_palette_gives_way_when_the_picture_must_change_anyway() -> None:
    picture = drawing(mode="P")
    see_through = encoded(picture, transparency=picture.getpixel((0, 0)))
    assert opened(normalise(see_through, at=AT).data).mode == "P"
    shrunk = opened(normalise(see_through, at=AT, max_edge=48).data)
    assert shrunk.mode == "RGBA"
    assert shrunk.getpixel((0, 0))[3] < 255  # type: ignore[index]
    assert opened(normalise(encoded(picture), at=AT, max_edge=48).data).mode == "RGB"


def test_cmyk_becomes_rgb_of_the_same_look() -> None:
    image = normalise(encoded(drawing(mode="CMYK"), "JPEG", quality=95), at=AT)
    assert opened(image.data).mode == "RGB"
    assert max(abs(a - b) for a, b in zip(_small(opened(image.data)), _small(drawing()), strict=True)) < 12


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    levels = (0, 300, 0x4000, 0x8000, 0xC000, 0xFFFF)
    grey = b"\0" + struct.pack(">6H", *levels)
    result = opened(normalise(png(6, 1, grey, depth=16, color=0), at=AT).data)
    assert result.mode == "L"
    assert list(result.tobytes()) == [level >> 8 for level in levels]
    colour = b"\0" + b"".join(struct.pack(">3H", level, level, 0) for level in levels)
    image = normalise(png(6, 1, colour, depth=16, color=2), at=AT)
    assert image.data[24] == 8
    assert list(opened(image.data).tobytes()) == [v for level in levels for v in (level >> 8, level >> 8, 0)]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "LA", "I;16"])
def test_normalising_twice_changes_nothing(mode: str) -> None:
    source = Image.new("I;16", (50, 40), 40_000) if mode == "I;16" else drawing(mode=mode)
    once = normalise(encoded(source), at=AT, max_edge=32)
    assert normalise(once.data, at=AT, max_edge=32) == once


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_jpeg_named_png_is_refused_by_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(drawing(), "JPEG"))
    message = refusal(lambda: read_image(path))
    assert "JPEG" in message
    assert "photo.jpg" in message
    good = path.rename(tmp_path / "photo.JPEG")
    assert read_image(good).ref.endswith(".jpg")


def test_what_cannot_be_a_file_is_refused(tmp_path: Path) -> None:
    refusal(lambda: read_image(tmp_path))
    refusal(lambda: read_image(tmp_path / "missing.png"))
    refusal(lambda: read_image(tmp_path / "nul\0.png"))
    refusal(lambda: read_image(tmp_path / ("n" * 300 + ".png")))
    os.mkfifo(tmp_path / "pipe.png")  # reading it would hang
    refusal(lambda: read_image(tmp_path / "pipe.png"))


def test_the_size_of_a_file_is_checked_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(1 << 42)  # sparse: four tebibytes that would not fit into memory
    assert "bytes" in refusal(lambda: read_image(path))


# --- store -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


def test_what_is_put_comes_back(store: ImageStore) -> None:
    image = normalise(encoded(drawing(), "WEBP"), at=AT)
    assert store.put(image) == store.put(image) == image.ref
    assert store.read(image.ref) == image.data
    assert [path.relative_to(store.root) for path in store.root.rglob("*.*")] == [Path(image.ref[:2]) / image.ref]


@pytest.mark.parametrize("hurt", [lambda d: d[:-1], lambda d: d + b"x", lambda d: b"", lambda d: b"X" + d[1:]])
def test_corruption_is_found_on_read(store: ImageStore, hurt: Callable[[bytes], bytes]) -> None:
    image = normalise(encoded(drawing()), at=AT)
    path = store.root / image.ref[:2] / image.ref
    store.put(image)
    path.write_bytes(hurt(image.data))
    for use in (store.read, store.data_uri, store.perceptual_hash):
        assert "corrupt" in refusal(lambda: use(image.ref))  # noqa: B023


def test_putting_again_heals_a_torn_file(store: ImageStore) -> None:
    image = normalise(encoded(drawing()), at=AT)
    store.put(image)
    (store.root / image.ref[:2] / image.ref).write_bytes(image.data[:40])
    store.put(image)
    assert store.read(image.ref) == image.data


@pytest.mark.parametrize(
    "ref",
    [
        "",
        "../../etc/passwd",
        "a" * 64,
        "a" * 64 + ".gif",
        "A" * 64 + ".png",
        "/" + "a" * 63 + ".png",
        "a" * 64 + ".png\n",
    ],
)
def test_no_reference_leads_elsewhere(store: ImageStore, ref: str) -> None:
    assert "reference" in refusal(lambda: store.read(ref))
    assert "reference" in refusal(lambda: store.data_uri(ref))
    refusal(lambda: store.put(Normalised(ref, b"", 1, 1)))
    assert not store.root.exists()


def test_a_missing_image_is_named(store: ImageStore) -> None:
    assert "missing" in refusal(lambda: store.read("0" * 64 + ".png"))


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "images").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="cannot be written"):
        ImageStore(tmp_path / "images").put(normalise(encoded(drawing()), at=AT))


@pytest.mark.parametrize(("kind", "media"), [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp")])
def test_a_data_uri_carries_its_own_type(store: ImageStore, kind: str, media: str) -> None:
    image = normalise(encoded(drawing(), kind), at=AT)
    head, _, body = store.data_uri(store.put(image)).partition(",")
    assert head == f"data:{media};base64"
    assert base64.b64decode(body, validate=True) == image.data


@pytest.mark.parametrize(("room", "count"), [(0, 0), (1, 0), (400, 3), (10**6, 12)])
def test_the_uri_cache_keeps_the_last_used_that_fit(room: int, count: int, tmp_path: Path) -> None:
    images = [normalise(encoded(Image.new("RGB", (8, 8), (i, 0, 0))), at=AT) for i in range(12)]
    store = ImageStore(tmp_path / "images", cache_bytes=room)
    uris = {image.ref: store.data_uri(store.put(image)) for image in images}
    used = random.Random(room).choices(images, k=60)
    for image in used:
        assert store.data_uri(image.ref) == uris[image.ref]
    for image in images:
        (store.root / image.ref[:2] / image.ref).unlink()
    last_used = list(dict.fromkeys(image.ref for image in (*reversed(used), *reversed(images))))
    remembered = {image.ref for image in images if _answers(store, image.ref)}
    assert remembered == set(last_used[:count])
    assert sum(len(uris[ref]) for ref in remembered) <= room
    assert count == 12 or sum(len(uris[ref]) for ref in last_used[: count + 1]) > room


def _answers(store: ImageStore, ref: str) -> bool:
    try:
        return bool(store.data_uri(ref))
    except InputError:
        return False


# --- similarity ------------------------------------------------------------------------------------------------------


def scene(seed: int) -> Image.Image:
    dice = random.Random(seed)
    return Image.frombytes("L", (6, 5), dice.randbytes(30)).resize((300, 220), Image.Resampling.BICUBIC).convert("RGB")


def test_the_hash_survives_scaling_and_recompression_and_tells_scenes_apart() -> None:
    hashes = [dhash(encoded(scene(i))) for i in range(12)]
    for i, value in enumerate(hashes):
        for other in (encoded(scene(i).resize((170, 90))), encoded(scene(i), "JPEG", quality=40)):
            assert distance(value, dhash(other)) <= 6
        assert encoded(scene(i), "WEBP", lossless=True) != encoded(scene(i))
        assert dhash(encoded(scene(i), "WEBP", lossless=True)) == value
    assert min(distance(a, b) for i, a in enumerate(hashes) for b in hashes[:i]) > 12


def test_the_bits_mean_darker_than_the_right_neighbour() -> None:
    ramp = Image.linear_gradient("L").transpose(Image.Transpose.ROTATE_90)
    assert {dhash(encoded(ramp)), dhash(encoded(ramp.transpose(Image.Transpose.ROTATE_180)))} == {0, 2**64 - 1}
    assert dhash(encoded(Image.new("RGB", (50, 50), "white"))) == 0


@pytest.mark.parametrize("ink", ["black", "white"])
def test_hidden_colours_of_transparent_pixels_do_not_count(ink: str) -> None:
    def on(ground: tuple[int, int, int, int], shift: int) -> bytes:
        image = Image.new("RGBA", (90, 80), ground)
        ImageDraw.Draw(image).rectangle((10 + shift, 10, 40 + shift, 60), fill=ink)
        return encoded(image)

    assert dhash(on((255, 255, 255, 0), 0)) == dhash(on((0, 0, 0, 0), 0)) == dhash(on((255, 0, 0, 0), 0))
    assert distance(dhash(on((0, 0, 0, 0), 0)), dhash(on((0, 0, 0, 0), 40))) > 4


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_the_hash_does_not_depend_on_the_mode(mode: str) -> None:
    picture = Image.new("RGB", (90, 80), "white")
    ImageDraw.Draw(picture).ellipse((20, 10, 70, 60), fill="black")
    assert distance(dhash(encoded(picture)), dhash(encoded(picture.convert(mode)))) <= 1


def test_distance_counts_bits() -> None:
    assert distance(0, 2**64 - 1) == 64
    assert distance(0b1011, 0b0001) == 2
