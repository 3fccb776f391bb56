"""Pictures of every mode of Pillow, against the same picture in RGB."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin

from probing.data.coco import read_image
from probing.data.image_modes import size_and_orientation

COLOURS = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
GREY = COLOURS[..., 0]
WIDE = GREY.astype(np.uint16) * 257
ALPHA = np.tile(np.array([0, 255, 128, 255], np.uint8), (12, 4))


def as_rgb(grey):
    return np.repeat(np.asarray(grey)[..., None], 3, axis=-1)


def over_white(colours):
    share = ALPHA[..., None] / 255
    return np.rint(colours * share + 255 * (1 - share))


def banded(mode, *bands):
    return Image.merge(mode, [Image.fromarray(band) for band in bands])


def palette(transparent=False):
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(12, 16)).convert("P")
    image.putpalette(COLOURS.reshape(-1).tolist())
    if transparent:
        image.info["transparency"] = bytes(ALPHA.reshape(-1).tolist())
    return image


def palette_alpha():
    image = Image.new("PA", (16, 12))
    image.putpalette(COLOURS.reshape(-1).tolist())
    image.putdata(list(zip(range(192), ALPHA.reshape(-1).tolist(), strict=True)))
    return image


def premultiplied():
    return banded("RGBA", *COLOURS.transpose(2, 0, 1), ALPHA).convert("RGBa")


def keyed(array, value):
    image = Image.fromarray(array)
    image.info["transparency"] = value
    return image


def encoded(image, form, **values):
    buffer = io.BytesIO()
    image.save(buffer, form, **values)
    buffer.seek(0)
    return buffer


PICTURES = {
    "1": (lambda: Image.fromarray(GREY > 127), "PNG", as_rgb((GREY > 127) * 255), 0),
    "L": (lambda: Image.fromarray(GREY), "PNG", as_rgb(GREY), 0),
    "I;16 PNG": (lambda: Image.fromarray(WIDE), "PNG", as_rgb(GREY), 0),
    "I;16 TIFF": (lambda: Image.fromarray(WIDE), "TIFF", as_rgb(GREY), 0),
    "I;16B TIFF": (lambda: Image.fromarray(WIDE.astype(">u2")), "TIFF", as_rgb(GREY), 0),
    "I of 16 bits": (lambda: Image.fromarray(WIDE.astype(np.int32)), "TIFF", as_rgb(GREY), 0),
    "I of 8 bits": (lambda: Image.fromarray(GREY.astype(np.int32)), "TIFF", as_rgb(GREY), 0),
    "F to 1": (lambda: Image.fromarray(GREY.astype(np.float32) / 255), "TIFF", as_rgb(GREY), 0),
    "F to 255": (lambda: Image.fromarray(GREY.astype(np.float32)), "TIFF", as_rgb(GREY), 0),
    "F to 65535": (lambda: Image.fromarray(WIDE.astype(np.float32)), "TIFF", as_rgb(GREY), 0),
    "LA": (lambda: banded("LA", GREY, ALPHA), "PNG", over_white(as_rgb(GREY)), 1),
    "P": (palette, "PNG", COLOURS, 0),
    "P with transparency": (lambda: palette(True), "PNG", over_white(COLOURS), 1),
    "PA": (palette_alpha, "TIFF", over_white(COLOURS), 1),
    "RGB": (lambda: Image.fromarray(COLOURS), "PNG", COLOURS, 0),
    "RGBA PNG": (lambda: banded("RGBA", *COLOURS.transpose(2, 0, 1), ALPHA), "PNG", over_white(COLOURS), 1),
    "RGBA TIFF": (lambda: banded("RGBA", *COLOURS.transpose(2, 0, 1), ALPHA), "TIFF", over_white(COLOURS), 1),
    "RGBA WebP": (
        lambda: banded("RGBA", *COLOURS.transpose(2, 0, 1), ALPHA), "WEBP", over_white(COLOURS), 1,
    ),
    "RGBa": (premultiplied, "WEBP", over_white(COLOURS), 3),
    "CMYK": (lambda: Image.fromarray(COLOURS).convert("CMYK"), "TIFF", COLOURS, 1),
    "YCbCr": (lambda: Image.fromarray(COLOURS).convert("YCbCr"), "TIFF", COLOURS, 3),
    "LAB": (lambda: Image.fromarray(COLOURS).convert("LAB"), "TIFF", COLOURS, 25),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_every_mode_is_read_as_the_same_rgb(tmp_path, name):
    make, form, expected, tolerance = PICTURES[name]
    options = {"lossless": True} if form == "WEBP" else {}
    (tmp_path / "a").write_bytes(encoded(make(), form, **options).getvalue())
    for source in (tmp_path / "a", encoded(make(), form, **options)):
        found = read_image(source)
        assert found.mode == "RGB"
        np.testing.assert_allclose(np.asarray(found, float), expected, atol=tolerance)


@pytest.mark.parametrize("mode", ["HSV", "La", "RGBX", "I;16L", "I;16N"])
def test_modes_that_no_format_writes(mode, monkeypatch):
    made = Image.fromarray(COLOURS).convert(mode) if mode in ("HSV", "RGBX") else Image.new(mode, (16, 12))
    expected = {"HSV": COLOURS, "RGBX": COLOURS, "La": 255}.get(mode, 0)
    monkeypatch.setattr(Image, "open", lambda *a, **k: made)
    np.testing.assert_allclose(np.asarray(read_image(io.BytesIO()), float), expected, atol=6)


@pytest.mark.parametrize("array", [COLOURS, GREY, WIDE], ids=["RGB", "L", "I;16"])
def test_a_transparent_colour_is_white(array):
    key = array[3, 5]
    image = Image.fromarray(array)
    buffer = encoded(image, "PNG", transparency=tuple(map(int, key)) if array.ndim == 3 else int(key))
    hidden = (array == key).all(axis=-1) if array.ndim == 3 else array == key
    plain = COLOURS if array.ndim == 3 else as_rgb(GREY)
    np.testing.assert_array_equal(np.asarray(read_image(buffer)), np.where(hidden[..., None], 255, plain))


def test_grey_of_a_tiff_whose_zero_is_white():
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    buffer = encoded(Image.fromarray(WIDE), "TIFF", tiffinfo=tags)
    if Image.open(buffer).tag_v2[262] != 0:  # Pillow writes its own: exchange it in the file
        content = bytearray(buffer.getvalue())
        place = content.index(struct.pack("<HHI", 262, 3, 1))
        content[place + 8 : place + 10] = b"\0\0"
        buffer = io.BytesIO(content)
    np.testing.assert_array_equal(np.asarray(read_image(buffer)), 255 - as_rgb(GREY))


@pytest.mark.parametrize(
    "values",
    [
        GREY.astype(np.float32) * 1000,
        GREY.astype(np.float32) - 3,
        np.where(GREY > 9, GREY, np.nan).astype(np.float32),
        np.where(GREY > 9, GREY, np.inf).astype(np.float32),
        GREY.astype(np.int32) << 20,
        -GREY.astype(np.int32) - 1,
    ],
    ids=["large", "negative", "nan", "inf", "32 bits", "negative integers"],
)
def test_values_of_no_known_scale_are_refused_in_one_line(values):
    with pytest.raises(OSError, match=r"no known scale|not finite") as caught:
        read_image(encoded(Image.fromarray(values), "TIFF"))
    assert "\n" not in str(caught.value)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


LARGE = bytes(3 << 20)
NOTES = {
    "iCCP": chunk(b"iCCP", b"profile\0\0" + zlib.compress(LARGE)),
    "zTXt": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(LARGE)),
    "iTXt": chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(LARGE)),
    "tEXt": chunk(b"tEXt", b"prompt\0" + b"x" * len(LARGE)),
    "many": chunk(b"tEXt", b"prompt\0" + b"x" * len(LARGE)) * 25,
}


@pytest.mark.parametrize("end", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", NOTES)
def test_large_notes_of_a_png_do_not_matter(tmp_path, kind, end):
    plain = encoded(Image.fromarray(COLOURS), "PNG").getvalue()
    place = len(plain) - 12 if end else 33  # before IEND, or after IHDR
    (tmp_path / "a.png").write_bytes(plain[:place] + NOTES[kind] + plain[place:])
    for source in (tmp_path / "a.png", io.BytesIO((tmp_path / "a.png").read_bytes())):
        np.testing.assert_array_equal(np.asarray(read_image(source)), COLOURS)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"icc_profile": bytes(9000)}, {"exif": True}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_headers_of_jpegs_are_read_as_pillow_reads_them(tmp_path, mode, options):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new(mode, (300, 20)).save(tmp_path / "1.jpg", **options | ({"exif": exif} if "exif" in options else {}))
    assert size_and_orientation(tmp_path / "1.jpg") == ((300, 20), 6 if "exif" in options else 1)


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("turn", range(1, 9))
def test_images_are_turned_upright_even_if_another_exif_field_is_broken(tmp_path, turn, broken):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    exif[ExifTags.Base.ResolutionUnit] = 2
    content = encoded(Image.fromarray(COLOURS), "JPEG", exif=exif, quality=95).getvalue()
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    if broken:  # a number becomes text, which Pillow's exif_transpose cannot write again
        number, text = (struct.pack(">HH", 296, kind) for kind in (3, 2))
        assert number in content
        content = content.replace(number, text)
    (tmp_path / "a.jpg").write_bytes(content)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.jpg")), expected)
