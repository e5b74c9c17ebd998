"""From a file of any kind to one square of pixels, and what is said about files that are none."""

import io
import resource
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps, features

from jaxcap.data import photos


def scene(width: int = 97, height: int = 61, channels: int = 3) -> np.ndarray:
    """A smooth, asymmetric uint8 picture: every corner differs."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    image_HWC = np.stack([x / width, y / height, (x + 2 * y) / (width + 2 * height), 0.5 + 0.5 * x / width], -1)
    return (255 * image_HWC[..., :channels]).astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("options", [
    {"quality": 85},
    {"quality": 60, "subsampling": "4:2:0"},
    {"quality": 90, "subsampling": "4:4:4"},
    {"quality": 75, "progressive": True},
])
def test_all_decoders_see_the_same_jpeg(options):
    rng = np.random.default_rng(0)
    noisy = np.clip(scene() + rng.normal(0, 30, (61, 97, 3)), 0, 255).astype(np.uint8)
    assert_decoders_agree(encoded(noisy, "JPEG", **options))


def test_all_decoders_see_the_same_real_photos(shared):
    for path in sorted(shared("photos").glob("*.jpg"))[:8]:
        assert_decoders_agree(path.read_bytes())


def assert_decoders_agree(data: bytes):
    ours = photos.load(data, 64).astype(int)
    others = {
        "simplejpeg": simplejpeg.decode_jpeg(data, "RGB"),
        "Pillow": np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
        "OpenCV": cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1],
    }
    for name, image_HWC in others.items():
        assert np.abs(photos.resize(np.ascontiguousarray(image_HWC), 64).astype(int) - ours).max() <= 1, name


def test_what_simplejpeg_refuses_goes_to_pillow(monkeypatch):
    data = encoded(scene(), "JPEG", quality=90)
    expected = photos.load(data, 32)

    def refuse(*_, **__):
        raise ValueError("refused")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", refuse)
    assert np.abs(photos.load(data, 32).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_photos_stand_upright(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(scene(), kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    np.testing.assert_array_equal(photos.decode(data), expected)


@pytest.mark.parametrize("values", [np.float32(scene()[..., 0] / 255), np.int32(scene()[..., 0])], ids=["float", "int32"])
def test_grey_of_32_bits_is_refused_and_not_made_black(values):
    with pytest.raises(photos.DamagedPhoto, match="32 bits a pixel .* save it with 8 or 16"):
        photos.decode(encoded(values, "TIFF"))


@pytest.mark.parametrize("kind, mode, options", [
    ("JPEG", "RGB", {"quality": 97, "subsampling": 0}),
    ("JPEG", "CMYK", {"quality": 97}),
    ("PNG", "RGB", {}),
    ("PNG", "P", {}),
    ("WEBP", "RGB", {"lossless": True}),
    ("GIF", "P", {}),
    ("BMP", "RGB", {}),
    ("TIFF", "RGB", {}),
    pytest.param("AVIF", "RGB", {"quality": 100, "subsampling": "4:4:4"},
                 marks=pytest.mark.skipif(".avif" not in photos.SUFFIXES, reason="this Pillow does not decode it")),
])
def test_kinds_of_files_give_the_same_colours(kind, mode, options):
    image = Image.fromarray(scene())
    image = image.quantize(256) if mode == "P" else image.convert(mode)
    result = photos.load(encoded(image, kind, **options), 32)
    assert result.dtype == np.uint8 and result.shape == (32, 32, 3)
    tolerance = 24 if mode == "P" else 6  # a palette of 256 colours is coarse
    assert np.abs(result.astype(int) - photos.resize(scene(), 32)).max() <= tolerance


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_grey_becomes_three_equal_channels(kind):
    grey_HW = scene()[..., 0]
    result = photos.decode(encoded(grey_HW, kind))
    assert result.shape == (61, 97, 3)
    assert (result[..., 0] == result[..., 1]).all() and (result[..., 0] == result[..., 2]).all()
    assert np.abs(result[..., 0].astype(int) - grey_HW).max() <= 4


def test_sixteen_bits_of_grey_are_scaled_not_clipped():
    grey_HW = (scene()[..., 0].astype(np.uint16) << 8) + 77
    np.testing.assert_array_equal(photos.decode(encoded(grey_HW, "PNG"))[..., 0], scene()[..., 0])


def test_transparency_lies_on_white():
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[:, :3] = (200, 10, 30, 255)  # the right half stays transparent black
    for data in (encoded(rgba, "PNG"), encoded(rgba, "WEBP", lossless=True)):
        result = photos.decode(data)
        assert (result[:, :3] == (200, 10, 30)).all() and (result[:, 3:] == 255).all()


def test_files_that_pillow_decodes_are_photos_of_a_folder():
    assert (".avif" in photos.SUFFIXES) == features.check("avif")


def test_shrinking_is_antialiased():
    stripes = np.zeros((300, 300, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(photos.resize(stripes, 100).astype(int) - 127).max() <= 43  # 1 or 2 white stripes of 3, never 0 or 3
    assert np.abs(photos.resize(stripes, 150).astype(int) - 127).max() <= 1
    tall = stripes[:40]  # one side shrinks while the other grows
    assert np.abs(photos.resize(tall, 150).astype(int) - 127).max() <= 1


def test_a_photo_of_the_right_size_is_left_alone():
    square = scene(50, 50)
    np.testing.assert_array_equal(photos.resize(square, 50), square)


def test_paths_and_unicode_names(tmp_path):
    path = tmp_path / "Hund in Köln 犬.png"
    path.write_bytes(encoded(scene(), "PNG"))
    np.testing.assert_array_equal(photos.decode(path), scene())
    np.testing.assert_array_equal(photos.decode(str(path)), scene())


def test_one_pixel_is_a_photo():
    result = photos.load(encoded(np.full((1, 1, 3), 9, np.uint8), "PNG"), 16)
    assert (result == 9).all() and result.shape == (16, 16, 3)


@pytest.mark.parametrize("width, height", [(20_000, 200), (200, 20_000), (60_000, 3)])
def test_a_very_wide_photo_is_a_photo(width, height):
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(scene(width, height)), quality=80)
    before = peak_bytes()
    result = photos.load(data, 64)
    assert peak_bytes() - before < 150e6
    along = 0 if width > height else 1  # the channel that grows along the long side
    expected = photos.resize(scene(640, 640), 64)
    assert np.abs(result[..., along].astype(int) - expected[..., along]).max() < 16


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def png_claiming(width: int, height: int) -> bytes:
    """A valid black PNG of one bit a pixel: tiny as a file, huge once decoded."""
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    squeeze = zlib.compressobj(9)
    rows = b"".join(squeeze.compress(bytes((width + 7) // 8 + 1) * 1000) for _ in range(height // 1000))
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows + squeeze.flush()) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [12_000, 20_000])  # within Pillow's own limit, and beyond it
def test_an_absurdly_large_photo_is_refused_in_little_memory(side):
    data = png_claiming(side, side)
    before = peak_bytes()
    with pytest.raises(photos.DamagedPhoto, match="more than the 100 million pixels that are decoded"):
        photos.load(data, 64)
    assert peak_bytes() - before < 50e6


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest resets our own filter
def test_a_large_photo_within_the_limit_is_read():
    assert photos.load(png_claiming(9_500, 10_000), 8).shape == (8, 8, 3)


def damaged_files() -> dict[str, tuple[bytes, str]]:
    jpeg, png = encoded(scene(), "JPEG"), encoded(scene(), "PNG")
    return {
        "empty": (b"", "empty"),
        "text": (b"A child in a pink dress is climbing up a set of stairs.\n" * 20, "not a photo"),
        "html": (b"<!DOCTYPE html><title>404</title>", "not a photo"),
        "jpeg cut in half": (jpeg[: len(jpeg) // 2], "damaged"),
        "jpeg without its end": (jpeg[:-200], "damaged"),
        "jpeg header alone": (jpeg[:20], "damaged|not a photo"),
        "png cut in half": (png[: len(png) // 2], "damaged"),
        "png with a wrong checksum": (png[:40] + bytes([png[40] ^ 255]) + png[41:], "damaged|not a photo"),
        "noise": (bytes(np.random.default_rng(0).integers(0, 256, 5000, np.uint8)), "not a photo"),
    }


@pytest.mark.parametrize("name", damaged_files())
def test_damaged_files_say_why(name):
    data, reason = damaged_files()[name]
    with pytest.raises(photos.DamagedPhoto, match=reason):
        photos.load(data, 32)


def test_what_pillow_does_not_implement_is_damage(monkeypatch):
    def refuse(*_):
        raise RuntimeError("Failed to decode image: Not implemented")  # as of a broken AVIF

    monkeypatch.setattr(photos, "_pillow", refuse)
    with pytest.raises(photos.DamagedPhoto, match="damaged .*Not implemented"):
        photos.load(encoded(scene(), "PNG"), 32)


def test_of_cut_exif_data_nothing_is_said(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "a long description " * 9
    data = encoded(scene(), "JPEG", exif=exif)
    at = data.index(b"Exif") + 14
    (tmp_path / "cut.jpg").write_bytes(data[:at] + b"\xff\xff" + data[at + 2:])  # more entries than there are
    code = f"from jaxcap.data import photos; print(photos.load({str(tmp_path / 'cut.jpg')!r}, 32).shape)"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.stdout == "(32, 32, 3)\n" and not done.stderr


def test_no_file_and_no_permission_say_why(tmp_path):
    with pytest.raises(photos.DamagedPhoto, match="no such file"):
        photos.load(tmp_path / "absent.jpg", 32)
    with pytest.raises(photos.DamagedPhoto, match="cannot be read"):
        photos.load(tmp_path, 32)  # a directory
