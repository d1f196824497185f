"""Pixel values of the original image processors, settings read from a folder, and bad pictures."""

import json
import pathlib
import re
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from vla_jax.backbones import image_settings, preprocess, resizing
from vla_jax.backbones.image_settings import CropSettings, PatchSettings, SquareSettings

GOLDEN = pathlib.Path(__file__).parent / "golden/preprocess"
SETTINGS = json.loads((GOLDEN / "settings.json").read_text())["processors"]
READ = {
    "kosmos2": image_settings.read_kosmos2,
    "paligemma": image_settings.read_paligemma,
    "smolvlm": image_settings.read_smolvlm,
    "qwen3vl": image_settings.read_qwen,
}
CASES = [(model, variant) for model, variants in SETTINGS.items() for variant in variants]
each = pytest.mark.parametrize(("model", "variant"), CASES)


def pictures():
    """The five pictures, in order; some are stored small and enlarged by repetition."""
    for name, image in sorted(load_file(GOLDEN / "images.safetensors").items()):
        repeat = int(re.search(r"repeat_(\d+)", name)[1]) if "repeat" in name else 1
        yield image.repeat(repeat, 0).repeat(repeat, 1)


PICTURES = list(pictures())
PICTURE = PICTURES[0]


def write(folder, data, name="preprocessor_config.json"):
    (folder / name).write_text(json.dumps(data))
    return folder


def channels_first(pixels):
    return np.moveaxis(pixels, -1, -3)


@each
def test_pixel_values_are_those_of_the_original_to_the_bit(model, variant, tmp_path):
    settings = READ[model](write(tmp_path, SETTINGS[model][variant]))
    expected = load_file(GOLDEN / f"{model}.safetensors")
    thin = variant == "full"
    for index, picture in enumerate(PICTURES):
        name = f"out.{variant}_{index}"
        if model == "qwen3vl":
            pixels, grid = preprocess.patches(picture, settings)
            pixels = pixels[5::160] if thin else pixels
            np.testing.assert_array_equal(grid, expected[f"{name}_grid_thw"])
        elif model == "smolvlm":
            pixels, rows, columns = preprocess.crops(picture, settings)
            pixels = channels_first(pixels)
            pixels = pixels[:, :, 7::128, 11::32] if thin else pixels
            np.testing.assert_array_equal([rows, columns], expected[f"{name}_rows_cols"])
        else:
            pixels = channels_first(preprocess.square(picture, settings))
            pixels = pixels[:, 3::32] if thin else pixels
        assert pixels.dtype == np.float32
        np.testing.assert_array_equal(pixels, expected[name])


def test_defaults_are_the_published_settings(tmp_path):
    for model, defaults in (
        ("kosmos2", SquareSettings()),
        ("smolvlm", CropSettings()),
        ("qwen3vl", PatchSettings()),
    ):
        assert READ[model](write(tmp_path, SETTINGS[model]["full"])) == defaults


def test_missing_fields_have_the_defaults_of_the_original_classes(tmp_path):
    empty = write(tmp_path, {"do_convert_rgb": None, "size": None})
    clip, half = image_settings.CLIP_MEAN, image_settings.HALF
    std = image_settings.CLIP_STD
    assert READ["kosmos2"](empty) == SquareSettings(224, True, "bicubic", clip, std)
    assert READ["paligemma"](empty) == SquareSettings(224, False, "bicubic", half, half)
    assert READ["smolvlm"](empty) == CropSettings(1456, 364, True, "lanczos", half, half)
    assert READ["qwen3vl"](empty) == PatchSettings(3136, 1003520, 14, 2, 2, "bicubic", clip, std)


def test_earlier_and_later_forms_of_the_file_are_read(tmp_path):
    published = {"size": {"shortest_edge": 28}, "use_square_size": True, "crop_size": 28}
    assert READ["kosmos2"](write(tmp_path, published)) == SquareSettings(28)
    limits = {"min_pixels": 3136, "max_pixels": 12845056, "image_mean": 0.5, "image_std": 0.5}
    found = READ["qwen3vl"](write(tmp_path, limits))
    assert found == PatchSettings(3136, 12845056, 14)
    nested = {
        "image_processor": {
            "size": {"longest_edge": 96},
            "image_processor_type": "SmolVLMImageProcessorFast",
        }
    }
    write(tmp_path, nested, "processor_config.json")
    assert READ["smolvlm"](tmp_path).longest_edge == 96  # counts before the other file
    write(tmp_path, {"image_seq_len": 64}, "processor_config.json")
    assert READ["qwen3vl"](tmp_path) == found


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("paligemma", {"image_processor_type": "CLIPImageProcessor"}, "must be of Siglip, got"),
        ("paligemma", {"size": {"height": 8, "width": 9}}, "size must be a square, got 8 × 9"),
        ("paligemma", {"size": {"shortest_edge": 8}}, "size.height must be an integer, got None"),
        ("paligemma", {"do_normalize": False}, "do_normalize must be true, got False"),
        ("paligemma", {"rescale_factor": 1}, "rescale_factor must be 1/255, got 1"),
        ("paligemma", {"image_mean": [0.5]}, "image_mean must be 3 numbers, got"),
        ("paligemma", {"resample": 0}, "resample must be one of 1, 2, 3, 4, got 0"),
        ("paligemma", {"size": 0}, "size must be at least 1, got 0"),
        ("kosmos2", {"size": {"shortest_edge": 40}}, "crop_size must be the size 40, got"),
        ("kosmos2", {"do_center_crop": False}, "use_square_size, got neither"),
        ("smolvlm", {"size": {"height": 8}}, "size.longest_edge must be an integer"),
        ("qwen3vl", {"size": 28}, "size.shortest_edge must be an integer"),
        ("qwen3vl", {"patch_size": "14"}, "patch_size must be an integer, got 14"),
        ("qwen3vl", {"max_pixels": 9}, "max_pixels must be at least min_pixels 3136, got 9"),
    ],
)
def test_settings_that_are_not_supported_are_refused(model, data, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        READ[model](write(tmp_path, data))


def test_a_missing_or_damaged_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config.json is missing"):
        READ["kosmos2"](tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        READ["kosmos2"](tmp_path)


def test_the_centre_is_cut_out_where_the_aspect_ratio_is_kept():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    settings = SquareSettings(20, crop=True)
    for picture in (wide, wide.swapaxes(0, 1)):
        cut = preprocess.fit_square(picture, settings)
        assert cut.shape == (20, 20, 3)
        assert (cut == 200).all()


def test_a_picture_that_is_too_narrow_is_refused():
    with pytest.raises(ValueError, match="aspect ratio of at most 200, got 1 × 201 pixels"):
        preprocess.patches(np.zeros((1, 201, 3), np.uint8), PatchSettings())


def test_pixels_that_do_not_divide_into_patches_are_refused():
    with pytest.raises(ValueError, match="sides that are multiples of 32, got 32 × 40"):
        preprocess.patchify(np.zeros((32, 40, 3)), PatchSettings())


def test_a_batch_on_the_device_has_the_pixels_of_the_host():
    settings = PatchSettings(256, 1536, patch_size=4)
    images = np.stack([resizing.resize(p, (16, 24), "bicubic") for p in PICTURES[:2]])

    def on_device(images):
        pixels = preprocess.normalize(images, settings.mean, settings.std)
        return preprocess.patchify(pixels, settings)

    on_host = [preprocess.patches(image, settings).pixels for image in images]
    # XLA divides by a constant as a multiplication
    np.testing.assert_allclose(jax.jit(on_device)(images), on_host, atol=3e-7)


BAD = {
    "dtype": (np.zeros((8, 8, 3), np.float32), "must be uint8 in 0 … 255, got float32"),
    "list": ([[[0, 0, 0]]], "must be uint8 in 0 … 255, got list"),
    "grey": (np.zeros((8, 9), np.uint8), "got [8, 9]; repeat the grey channel"),
    "one channel": (np.zeros((8, 9, 1), np.uint8), "got [8, 9, 1]; repeat the grey channel"),
    "alpha": (np.zeros((8, 9, 4), np.uint8), "got [8, 9, 4]; drop the alpha channel"),
    "colours first": (np.zeros((3, 8, 9), np.uint8), "got [3, 8, 9]; move the colours"),
    "empty": (np.zeros((0, 9, 3), np.uint8), "got [0, 9, 3]; it is empty"),
    "batch": (np.zeros((2, 8, 9, 3), np.uint8), "one picture [h, w, 3], got [2, 8, 9, 3]"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_a_picture_is_refused(case):
    image, message = BAD[case]
    for function, settings in (
        (preprocess.square, SquareSettings()),
        (preprocess.crops, CropSettings()),
        (preprocess.patches, PatchSettings()),
    ):
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            function(image, settings)


def test_missing_pillow_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'vla-jax[vlm]'")):
        preprocess.square(PICTURE, SquareSettings())


def test_resizing_on_the_device_differs_little_from_pillow():
    resize = jax.jit(resizing.resize_on_device, static_argnums=(1, 2))
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    images = np.stack([PICTURES[2][:90, :120], PICTURES[4][:90, :120], noise])
    for method in resizing.DEVICE_METHODS:
        for size in ((30, 44), (97, 224)):  # smaller and larger
            expected = np.stack([resizing.resize(image, size, method) for image in images])
            result = resize(images, size, method)
            assert result.dtype == np.uint8
            difference = np.abs(np.asarray(result, int) - expected)
            assert difference.max() <= 2
            assert difference.mean() <= 0.02


def test_a_method_without_an_equal_on_the_device_is_refused():
    with pytest.raises(ValueError, match="bilinear, bicubic, lanczos, got 'area'"):
        resizing.resize_on_device(PICTURE, (8, 8), "area")
