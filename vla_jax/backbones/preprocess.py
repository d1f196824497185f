"""Pixel values of a picture, as the original image processors make them.

A picture is uint8 `[h, w, 3]`. It is resized with Pillow on the host, to the same bits as the
original processors without torchvision, then normalised: `(x/255 − mean) / std`. Three layouts
follow from the class of the settings: `square` (Kosmos-2, PaliGemma), `crops` (SmolVLM) and
`patches` (Qwen-VL). Colours are the last axis; only the rows of `patches` have them first.

Where the pictures already have a fixed size, `normalize` and `patchify` run on the device, and
`resizing.resize_on_device` resizes there with a small difference.

Source: the image processors CLIP, SigLIP, SmolVLM and Qwen2-VL of Hugging Face transformers 5.23,
PIL backends. The torchvision backends differ by 1/255 here and there, by 3/255 at most.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange, repeat

from vla_jax.backbones.image_settings import RGB, CropSettings, PatchSettings, SquareSettings
from vla_jax.backbones.resizing import check_colours, check_picture, resize

MAX_EDGE = 4096  # pixels, greatest side of a picture before it is cut into crops
MAX_ASPECT_RATIO = 200  # of a picture for `patches`


class Crops(NamedTuple):
    """Crops of one picture, row by row, and last the whole picture."""

    pixels: np.ndarray  # [num_crops, s, s, 3] float32, or uint8 before normalisation
    rows: int  # rows of crops; 0 = only the whole picture
    columns: int  # crops in a row; 0 = only the whole picture


class Patches(NamedTuple):
    """Patches of one picture; those of several are concatenated by the caller."""

    pixels: np.ndarray  # [num_patches, 3 · T · p · p] float32, rows of `pixel_values`
    grid: tuple[int, int, int]  # frames, rows and columns of patches, a row of `image_grid_thw`


def square(image: np.ndarray, settings: SquareSettings) -> np.ndarray:
    """Returns the normalised picture `[s, s, 3]` float32.

    Args:
      image: uint8 `[h, w, 3]`.
      settings: of Kosmos-2 or PaliGemma.

    Raises:
      TypeError, ValueError: `image` is not a picture, see `check_picture`.
      ImportError: Pillow is missing.
    """
    return normalize(fit_square(image, settings), settings.mean, settings.std)


def fit_square(image: np.ndarray, settings: SquareSettings) -> np.ndarray:
    """Returns the resized picture `[s, s, 3]` uint8; arguments and errors as `square`."""
    height, width = check_picture(image)
    size, shorter = settings.size, min(height, width)
    if not settings.crop:
        return resize(image, (size, size), settings.resampling)
    longer = int(size * max(height, width) / shorter)
    new = (longer, size) if width <= height else (size, longer)
    top, left = (new[0] - size) // 2, (new[1] - size) // 2
    return resize(image, new, settings.resampling)[top : top + size, left : left + size]


def crops(image: np.ndarray, settings: CropSettings) -> Crops:
    """Returns normalised crops `[num_crops, s, s, 3]` float32.

    Args:
      image: uint8 `[h, w, 3]`.
      settings: of SmolVLM.

    Raises:
      TypeError, ValueError: `image` is not a picture, see `check_picture`.
      ImportError: Pillow is missing.
    """
    cut = cut_crops(image, settings)
    return cut._replace(pixels=normalize(cut.pixels, settings.mean, settings.std))


def cut_crops(image: np.ndarray, settings: CropSettings) -> Crops:
    """Returns crops `[num_crops, s, s, 3]` uint8; arguments and errors as `crops`."""
    size, method = settings.crop_size, settings.resampling
    height, width = check_picture(image)
    image = resize(image, _longest_edge(height, width, settings.longest_edge), method)
    if not settings.split:
        return Crops(resize(image, (size, size), method)[None], 0, 0)
    height, width = image.shape[:2]
    image = resize(image, _multiples(height, width, size), method)
    rows, columns = image.shape[0] // size, image.shape[1] // size
    if rows == columns == 1:
        return Crops(image[None], 0, 0)
    parts = rearrange(image, "(r h) (s w) c -> (r s) h w c", r=rows, s=columns)
    whole = resize(image, (size, size), method)
    return Crops(np.concatenate([parts, whole[None]]), rows, columns)


def patches(image: np.ndarray, settings: PatchSettings) -> Patches:
    """Returns normalised patches, in the order of merged tokens.

    Args:
      image: uint8 `[h, w, 3]`.
      settings: of Qwen-VL.

    Raises:
      TypeError, ValueError: `image` is not a picture, see `check_picture`, or too narrow.
      ImportError: Pillow is missing.
    """
    size = smart_resize(*check_picture(image), settings)
    pixels = normalize(resize(image, size, settings.resampling), settings.mean, settings.std)
    rows, columns = size[0] // settings.patch_size, size[1] // settings.patch_size
    return Patches(patchify(pixels, settings), (1, rows, columns))


def patchify(pixels: Any, settings: PatchSettings) -> Any:
    """Divides normalised pictures into rows of patches; the same frame fills a patch's T frames.

    Args:
      pixels: `[..., h, w, 3]`, NumPy or JAX, h and w multiples of `settings.factor`.
      settings: of Qwen-VL.

    Returns:
      `[..., num_patches, 3 · T · p · p]`, the patches of a merged token after one another; the
      features of a row are ordered as colour, frame, row, column.
    """
    height, width = pixels.shape[-3:-1]
    if height % settings.factor or width % settings.factor:
        raise ValueError(
            f"pixels must have sides that are multiples of {settings.factor}, got {height} × "
            f"{width}; resize with `smart_resize`."
        )
    p, m = settings.patch_size, settings.merge_size
    grid = rearrange(pixels, "... (i m p) (j n q) c -> ... (i j m n) c p q", m=m, n=m, p=p, q=p)
    return repeat(grid, "... c p q -> ... (c T p q)", T=settings.temporal_patch_size)


def smart_resize(height: int, width: int, settings: PatchSettings) -> tuple[int, int]:
    """Returns the height and width to which `patches` resizes a picture, pixels.

    Both are multiples of `settings.factor`, their product is within the bounds on the number of
    pixels, and the aspect ratio changes as little as possible.

    Raises:
      ValueError: the longer side is over 200 times the shorter one.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"image must have an aspect ratio of at most {MAX_ASPECT_RATIO}, got {height} × "
            f"{width} pixels; cut it."
        )
    factor = settings.factor
    new = [round(side / factor) * factor for side in (height, width)]  # half to even, as theirs
    if math.prod(new) > settings.max_pixels:
        shrink = math.sqrt((height * width) / settings.max_pixels)
        new = [max(factor, math.floor(s / shrink / factor) * factor) for s in (height, width)]
    elif math.prod(new) < settings.min_pixels:
        grow = math.sqrt(settings.min_pixels / (height * width))
        new = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return new[0], new[1]


def normalize(image: Any, mean: RGB, std: RGB) -> Any:
    """Returns `(image/255 − mean) / std` in float32, in NumPy or JAX as `image` is.

    NumPy gives the bits of the original processors; compiled JAX may differ in the last one.

    Args:
      image: uint8 `[..., h, w, 3]`.
      mean: of RGB values in [0, 1].
      std: of RGB values in [0, 1].

    Returns:
      `[..., h, w, 3]`.

    Raises:
      TypeError: `image` is not uint8.
      ValueError: the last axis is not 3 colours.
    """
    check_colours("image", image)
    ones = (1,) * (image.ndim - 1)
    shift, scale = (np.asarray(x, np.float32).reshape(*ones, 3) for x in (mean, std))
    return (image.astype(np.float32) / np.float32(255) - shift) / scale


def _longest_edge(height: int, width: int, edge: int) -> tuple[int, int]:
    """Returns the size whose longer side is `edge`, the other one truncated and then made even."""
    ratio = width / height
    if width >= height:
        width, height = edge, int(edge / ratio)
        height += height % 2
    else:
        height, width = edge, int(edge * ratio)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    ratio = width / height
    if width >= height and width > MAX_EDGE:
        width, height = MAX_EDGE, int(MAX_EDGE / ratio)
    elif height > width and height > MAX_EDGE:
        height, width = MAX_EDGE, int(MAX_EDGE * ratio)
    return max(height, 1), max(width, 1)


def _multiples(height: int, width: int, size: int) -> tuple[int, int]:
    """Returns the next multiples of `size`; the longer side is first, in floating point."""
    ratio = width / height
    if width >= height:
        width = math.ceil(width / size) * size
        height = math.ceil(int(width / ratio) / size) * size
    else:
        height = math.ceil(height / size) * size
        width = math.ceil(int(height * ratio) / size) * size
    return height, width
