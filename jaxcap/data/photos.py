"""A photo file of any kind becomes one square of pixels, the same whichever decoder is at hand.

JPEG is decoded by simplejpeg, and by Pillow where simplejpeg refuses (CMYK, sloppy but readable files); everything else
by Pillow. With libjpeg-turbo's accurate settings, which both use, their pixels are equal, and so are OpenCV's.
Transparency is laid over white, the EXIF orientation is applied, and one antialiased resize makes the photo square,
ignoring the aspect ratio as im2txt does. Colour profiles are ignored; of an animation the first frame counts.
"""

import io
import os
import warnings

import cv2
import numpy as np
import simplejpeg
from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff",  # of files that are taken for photos in a folder
            *([".avif"] if ".avif" in Image.registered_extensions() else []))  # only where Pillow decodes them
MAX_PIXELS = 100_000_000  # a larger photo is refused: decoding it would take more than 300 MB
_TOO_LARGE = f"it has more than the {MAX_PIXELS // 1_000_000} million pixels that are decoded"

_ORIENTATION = 0x0112  # EXIF tag: how the camera was held
_UPRIGHT = {  # orientation → the photo as it should be seen
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x.transpose(1, 0, 2)[:, ::-1],
    7: lambda x: x.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda x: x.transpose(1, 0, 2)[::-1],
}

warnings.filterwarnings("ignore", module=r"PIL\.")  # of sizes, which MAX_PIXELS limits, and of EXIF data that hardly matter


class DamagedPhoto(Exception):
    """A file that cannot be read as a photo; the message is the reason, without the file's name."""


def load(photo: str | os.PathLike | bytes, size: int) -> np.ndarray:
    """The photo in a file, or in the bytes of one, as uint8 RGB [size, size, 3].

    Raises `DamagedPhoto` if it is missing, empty, truncated, no photo at all, or has more than `MAX_PIXELS` pixels.
    """
    return resize(decode(photo), size)


def decode(photo: str | os.PathLike | bytes) -> np.ndarray:
    """The photo at its own size, upright, as uint8 RGB [H, W, 3]. Raises `DamagedPhoto` as `load` does."""
    data = photo if isinstance(photo, bytes) else _read(photo)
    if not data:
        raise DamagedPhoto("it is empty (zero bytes)")
    try:
        with Image.open(io.BytesIO(data)) as image:  # reads the header only
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DamagedPhoto(f"{_TOO_LARGE}: {width} × {height}")
            pixels_HWC = _jpeg(data) if image.format in ("JPEG", "MPO") else None
            if pixels_HWC is None:
                pixels_HWC = _pillow(image)
            orientation = image.getexif().get(_ORIENTATION, 1)  # only now: Pillow turns a TIFF when it reads the pixels
    except Image.DecompressionBombError:
        raise DamagedPhoto(_TOO_LARGE) from None
    except Image.UnidentifiedImageError:
        raise DamagedPhoto("it is not a photo in any known format") from None
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, OverflowError, MemoryError, RuntimeError) as error:
        raise DamagedPhoto(f"it is damaged ({error})") from error  # what Pillow's decoders raise on broken files
    return np.ascontiguousarray(_UPRIGHT.get(orientation, lambda x: x)(pixels_HWC))


def resize(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] → [size, size, 3]: the area's mean along a side that shrinks, linear along one that grows.

    The two are separate because OpenCV's area resize is no longer antialiased as soon as one side grows.
    """
    height, width = image_HWC.shape[:2]
    small = (min(width, size), min(height, size))
    if small != (width, height):
        image_HWC = cv2.resize(image_HWC, small, interpolation=cv2.INTER_AREA)
    if small != (size, size):
        image_HWC = cv2.resize(image_HWC, (size, size), interpolation=cv2.INTER_LINEAR)
    return image_HWC


def _read(path: str | os.PathLike) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise DamagedPhoto("there is no such file") from None
    except OSError as error:
        raise DamagedPhoto(f"it cannot be read ({error.strerror or error})") from error


def _jpeg(data: bytes) -> np.ndarray | None:
    """The pixels of a JPEG, or None where simplejpeg refuses it and Pillow must decide."""
    try:
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None


def _pillow(image: Image.Image) -> np.ndarray:
    if image.mode == "F" or image.mode == "I" and image.format == "TIFF":
        raise DamagedPhoto("it has 32 bits a pixel and does not say which are black and white; save it with 8 or 16")
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip, not scale
        grey_HW = np.asarray(image).astype(np.int64) >> 8
        return np.repeat(np.clip(grey_HW, 0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))
