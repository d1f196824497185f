"""Settings of image preprocessing, read from a model's folder.

The three classes are the three ways in which `preprocess` makes pixel values. A folder's file may
be sparse: missing fields have the defaults of the original processor's class, which are not always
those of the published model.

Source: the image processors CLIP, SigLIP, SmolVLM (Idefics3) and Qwen2-VL of Hugging Face
transformers 5.23 and 4.57.
"""

import json
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vla_jax.config import LEAST_FLOAT, MAX_INT, MAX_SIDE, checked
from vla_jax.files import Path, read_json
from vla_jax.types import Resampling

RGB = tuple[float, float, float]
CLIP_MEAN: RGB = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: RGB = (0.26862954, 0.26130258, 0.27577711)
HALF: RGB = (0.5, 0.5, 0.5)
RESAMPLING: dict[int, Resampling] = {1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "area"}


_FILE, _PROCESSOR = "preprocessor_config.json", "processor_config.json"
_CONTENT = "the settings of an image processor"


@dataclass(frozen=True)
@checked(std=(LEAST_FLOAT, 1e12))
class Preprocessing:
    """Preprocessing of a policy's images, which have one size, for a model."""

    resampling: Resampling = "bicubic"  # method of resizing images of another size
    mean: RGB = HALF  # of RGB values in [0, 1], subtracted
    std: RGB = HALF  # of RGB values in [0, 1], divided by


@dataclass(frozen=True)
@checked(std=(LEAST_FLOAT, 1e12), size=(0, MAX_SIDE))
class SquareSettings:
    """Settings of a picture resized to a square; the defaults are those of Kosmos-2."""

    size: int = 224  # height and width of the result, pixels
    crop: bool = False  # keep the aspect ratio and cut out the centre; False = change the ratio
    resampling: Resampling = "bicubic"  # method of resizing
    mean: RGB = CLIP_MEAN  # of RGB values in [0, 1], subtracted
    std: RGB = CLIP_STD  # of RGB values in [0, 1], divided by

    def __post_init__(self):
        """Checks that sizes are positive."""
        _check_positive(self, "size")


@dataclass(frozen=True)
@checked(std=(LEAST_FLOAT, 1e12), longest_edge=(0, MAX_SIDE), crop_size=(0, MAX_SIDE))
class CropSettings:
    """Settings of a picture cut into square crops; the defaults are those of SmolVLM2-500M."""

    longest_edge: int = 2048  # longer side of the resized picture, pixels
    crop_size: int = 512  # height and width of a crop, pixels
    split: bool = True  # cut into crops and add the whole picture; False = the whole picture alone
    resampling: Resampling = "lanczos"  # method of resizing
    mean: RGB = HALF  # of RGB values in [0, 1], subtracted
    std: RGB = HALF  # of RGB values in [0, 1], divided by

    def __post_init__(self):
        """Checks that sizes are positive."""
        _check_positive(self, "longest_edge", "crop_size")


@dataclass(frozen=True)
@checked(
    std=(LEAST_FLOAT, 1e12),
    min_pixels=(0, MAX_INT),
    max_pixels=(0, MAX_INT),
    merge_size=(0, 1024),
    temporal_patch_size=(0, 1024),
)
class PatchSettings:
    """Settings of a picture divided into rows of patches; the defaults are those of Qwen3-VL."""

    min_pixels: int = 65_536  # least height · width of the resized picture
    max_pixels: int = 16_777_216  # greatest height · width of the resized picture
    patch_size: int = 16  # height and width of a patch, pixels
    merge_size: int = 2  # patches along each side that the model merges into one token
    temporal_patch_size: int = 2  # frames of a patch; a picture is repeated
    resampling: Resampling = "bicubic"  # method of resizing
    mean: RGB = HALF  # of RGB values in [0, 1], subtracted
    std: RGB = HALF  # of RGB values in [0, 1], divided by

    def __post_init__(self):
        """Checks that sizes are positive and in order."""
        _check_positive(self, "min_pixels", "patch_size", "merge_size", "temporal_patch_size")
        if self.max_pixels < self.min_pixels:
            raise ValueError(
                f"max_pixels must be at least min_pixels {self.min_pixels}, got {self.max_pixels}."
            )

    @property
    def factor(self) -> int:
        """Divisor of the resized picture's height and width, pixels."""
        return self.patch_size * self.merge_size


# Defaults of the original classes, under the names of the file.
_COMMON = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
_CLIP = _COMMON | {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "use_square_size": False,
    "resample": 3,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
_SIGLIP = _COMMON | {
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "image_mean": HALF,
    "image_std": HALF,
}
_SMOLVLM = _COMMON | {
    "size": {"longest_edge": 4 * 364},
    "max_image_size": {"longest_edge": 364},
    "do_image_splitting": True,
    "resample": 1,
    "image_mean": HALF,
    "image_std": HALF,
}
_QWEN = _COMMON | {
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "resample": 3,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}


def read_kosmos2(folder: Path) -> SquareSettings:
    """Returns the settings in the folder of a Kosmos-2; errors as `read_paligemma`."""
    path, entry = _read(folder, ("CLIP",), _CLIP)
    size = entry["size"]
    edge = size if isinstance(size, int) else size.get("shortest_edge")
    crop = edge is not None and not entry["use_square_size"]
    if edge is None:
        edge = _square_side(path, "size", size)
    if crop and not entry["do_center_crop"]:
        raise ValueError(
            f"{path}: a size of one edge must come with do_center_crop or use_square_size, got "
            "neither; set use_square_size to true."
        )
    if entry["do_center_crop"] and _square_side(path, "crop_size", entry["crop_size"]) != edge:
        raise ValueError(
            f"{path}: crop_size must be the size {edge}, got {json.dumps(entry['crop_size'])}; "
            "other crops are not supported."
        )
    resampling, mean, std = _values(path, entry)
    return SquareSettings(edge, crop, resampling, mean, std)


def read_paligemma(folder: Path) -> SquareSettings:
    """Returns the settings in the folder of a PaliGemma.

    Args:
      folder: holds `preprocessor_config.json`, or `processor_config.json` with an entry
        `image_processor` (transformers 5), which then counts.

    Raises:
      FileNotFoundError: neither file is there.
      ValueError: the file is damaged, of another model, or asks for a step that is not supported.
    """
    path, entry = _read(folder, ("Siglip",), _SIGLIP)
    size = _square_side(path, "size", entry["size"])
    resampling, mean, std = _values(path, entry)
    return SquareSettings(size, False, resampling, mean, std)


def read_smolvlm(folder: Path) -> CropSettings:
    """Returns the settings in the folder of a SmolVLM or SmolVLM2; errors as `read_paligemma`."""
    path, entry = _read(folder, ("SmolVLM", "Idefics3"), _SMOLVLM)
    edge = _field(path, "size", entry["size"], "longest_edge")
    crop = _field(path, "max_image_size", entry["max_image_size"], "longest_edge")
    resampling, mean, std = _values(path, entry)
    return CropSettings(edge, crop, bool(entry["do_image_splitting"]), resampling, mean, std)


def read_qwen(folder: Path) -> PatchSettings:
    """Returns the settings in the folder of a Qwen-VL (2, 2.5, 3); errors as `read_paligemma`."""
    path, entry = _read(folder, ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL"), _QWEN)
    size = dict(entry["size"]) if isinstance(entry["size"], Mapping) else {}
    for edge, name in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        size[edge] = entry.get(name, size.get(edge))
    least, most = (_field(path, "size", size, edge) for edge in ("shortest_edge", "longest_edge"))
    names = ("patch_size", "merge_size", "temporal_patch_size")
    patch, merge, frames = (_integer(path, name, entry[name]) for name in names)
    resampling, mean, std = _values(path, entry)
    return PatchSettings(least, most, patch, merge, frames, resampling, mean, std)


def has_settings(folder: Path) -> bool:
    """Returns True if a model's folder has the settings of its image processor."""
    path = pathlib.Path(folder)
    return (path / _FILE).is_file() or "image_processor" in _processor(path)


def _processor(folder: pathlib.Path) -> Mapping[str, Any]:
    """Returns the content of `processor_config.json`; empty if there is none."""
    path = folder / _PROCESSOR
    return read_json(path, _CONTENT) if path.is_file() else {}


def _read(
    folder: Path, types: tuple[str, ...], defaults: Mapping[str, Any]
) -> tuple[pathlib.Path, dict[str, Any]]:
    """Returns the path of the file, and its fields with the defaults of missing ones."""
    folder = pathlib.Path(folder)
    path, entry = folder / _PROCESSOR, _processor(folder).get("image_processor")
    if not isinstance(entry, dict):
        path = folder / _FILE
        entry = read_json(path, _CONTENT)
    name = str(entry.get("image_processor_type", types[0])).partition("ImageProcessor")[0]
    if name not in types:
        raise ValueError(
            f"{path} must be of {' or '.join(types)}, got image_processor_type "
            f"'{entry['image_processor_type']}'; give the folder of the right model."
        )
    entry = {**defaults, **{key: value for key, value in entry.items() if value is not None}}
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if not entry[key]:
            raise ValueError(f"{path}: {key} must be true, got {entry[key]}; set it to true.")
    if abs(entry["rescale_factor"] * 255 - 1) > 1e-6:
        raise ValueError(
            f"{path}: rescale_factor must be 1/255, got {entry['rescale_factor']}; other factors "
            "are not supported."
        )
    return path, entry


def _values(path: pathlib.Path, entry: Mapping[str, Any]) -> tuple[Resampling, RGB, RGB]:
    """Returns the method of resizing, the mean and the standard deviation."""
    if entry["resample"] not in RESAMPLING:
        raise ValueError(
            f"{path}: resample must be one of {', '.join(map(str, RESAMPLING))}, got "
            f"{entry['resample']}; other filters of Pillow are not supported."
        )
    mean, std = (_rgb(path, name, entry[name]) for name in ("image_mean", "image_std"))
    return RESAMPLING[entry["resample"]], mean, std


def _rgb(path: pathlib.Path, name: str, value: Any) -> RGB:
    """Returns one number for each colour; the file may have one number for all."""
    values = [value] * 3 if isinstance(value, int | float) else list(value)
    if len(values) != 3 or not all(isinstance(v, int | float) for v in values):
        raise ValueError(f"{path}: {name} must be 3 numbers, got {value}; restore the file.")
    red, green, blue = values
    return red, green, blue


def _square_side(path: pathlib.Path, name: str, size: Any) -> int:
    """Returns the side of a square `{height, width}`."""
    if isinstance(size, int):
        return size
    height, width = (_field(path, name, size, edge) for edge in ("height", "width"))
    if height != width:
        raise ValueError(
            f"{path}: {name} must be a square, got {height} × {width}; other shapes are not "
            "supported."
        )
    return height


def _field(path: pathlib.Path, name: str, value: Any, key: str) -> int:
    """Returns an integer of an object in the file."""
    return _integer(path, f"{name}.{key}", value.get(key) if isinstance(value, Mapping) else None)


def _integer(path: pathlib.Path, name: str, value: Any) -> int:
    if not isinstance(value, int):
        raise ValueError(f"{path}: {name} must be an integer, got {value}; restore the file.")
    return value


def _check_positive(settings: Any, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(settings, name)}.")
