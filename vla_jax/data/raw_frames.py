"""Images of one camera over all episodes of a raw data set, for training."""

import os
import pathlib
import threading
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vla_jax import folder_lock
from vla_jax.data.dataset import digest
from vla_jax.data.frame_cache import FrameCache
from vla_jax.data.raw import RawDataset, RawImages, steps_of
from vla_jax.files import crc32_of_file, read_json, replacing, write_json
from vla_jax.types import Resampling

MAX_OPENED = 2048  # episodes whose camera stays open: their indices, a few kB each, no images
STEPS_PER_PASS = 256  # images decoded at once when a whole data set is decoded


class RawFrames:
    """All images of one camera, `[F, h, w, 3]` uint8, indexed like an array.

    Indexing decodes the images that are not in the cache. Safe to share by threads; pickled
    without its images and open files.
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self,
        raw: RawDataset,
        key: str,
        cache: FrameCache,
        *,
        episodes: np.ndarray,
        image_size: tuple[int, int] | None = None,
        resampling: Resampling = "area",
        rotate: bool = False,
    ) -> None:
        """Reads the size of the first image; decodes nothing.

        Args:
          raw: data set with a camera `key`.
          key: the camera's original key.
          cache: cache of decoded images; may be shared by several cameras.
          episodes: `[E]` indices of the episodes of `raw` that are read, in this order.
          image_size: (h, w) in pixels to resize to; None keeps the size of the first episode.
          resampling: how to resize.
          rotate: rotate the images by 180 degrees.
        """
        self._raw = raw
        self.root = raw.path  # file or folder of the data set
        self._key = key
        self._cache = cache
        self._episodes = np.asarray(episodes)
        self._ends = np.cumsum(raw.lengths[self._episodes])
        first = raw.episodes[int(self._episodes[0])].images[key]
        self._size: tuple[int, int] = image_size or (first.shape[1], first.shape[2])
        # of an image before it is resized; and while those of a call are put together
        self.source_bytes = int(np.prod(first.shape[1:]))
        self.bytes_per_image = self.source_bytes + 3 * 3 * int(np.prod(self._size))
        self._resampling: Resampling = resampling
        self._rotate = rotate
        self.fingerprint = digest(
            raw.fingerprint, key, self._episodes, self._size, resampling, rotate
        )
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state without opened episodes."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_opened", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores the state."""
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._opened: OrderedDict[int, RawImages] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def shape(self) -> tuple[int, ...]:
        """(F, h, w, 3)."""
        return int(self._ends[-1]), *self._size, 3

    def __len__(self) -> int:
        """Returns F, the number of frames."""
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> np.ndarray:
        """Decodes images.

        Args:
          index: an integer, a slice, or an array of integers `[...]`, negative ones from the end.

        Returns:
          Images `[..., h, w, 3]` uint8, a new array.

        Raises:
          IndexError: an index is out of range, or not an integer.
          ValueError: an image or video is damaged.
        """
        rows = steps_of(index, len(self))
        unique, places = np.unique(rows, return_inverse=True)
        images = np.empty((len(unique), *self._size, 3), np.uint8)
        owners = np.searchsorted(self._ends, unique, side="right")
        for owner in np.unique(owners):
            inside = np.flatnonzero(owners == owner)
            start = self._ends[owner] - self._raw.lengths[self._episodes[owner]]
            self._read(int(self._episodes[owner]), unique[inside] - start, inside, images)
        return images[places.reshape(rows.shape)]

    def _read(
        self, episode: int, steps: np.ndarray, places: np.ndarray, images: np.ndarray
    ) -> None:
        """Writes the images of ascending distinct steps of an episode to `images[places]`."""
        keys = [(self._key, self._size, episode, int(step)) for step in steps]
        stored = [self._cache.get(key) for key in keys]
        for place, image in zip(places, stored, strict=True):
            if image is not None:
                images[place] = image
        missing = [number for number, image in enumerate(stored) if image is None]
        if not missing:
            return
        decoded = self._open(episode).read(steps[missing], self._size, self._resampling)
        if self._rotate:
            decoded = decoded[:, ::-1, ::-1]
        images[places[missing]] = decoded
        for number, image in zip(missing, decoded, strict=True):
            self._cache.put(keys[number], image.copy())  # a view would keep all of `decoded`

    def _open(self, episode: int) -> RawImages:
        """Returns the camera of an episode; opening it can cost more than reading a window."""
        with self._lock:
            camera = self._opened.get(episode)
        if camera is None:
            camera = self._raw.episodes[episode].images[self._key]
        with self._lock:
            self._opened[episode] = camera
            self._opened.move_to_end(episode)
            if len(self._opened) > MAX_OPENED:
                self._opened.popitem(last=False)
        return camera


def decode_all(frames: RawFrames, name: str, root: pathlib.Path, folder: str | None) -> np.ndarray:
    """Returns all images as a read-only memory map `[F, h, w, 3]`, decoded once, kept on disk.

    One process decodes; others that want the same images wait for it, on any host.

    Args:
      frames: images of one camera.
      name: of the camera, for the file.
      root: file or folder of the data set.
      folder: for decoded images; None means `.frames` in the data set's folder, or the user's
        cache folder if that is not writable.

    Raises:
      ValueError: an image or video is damaged.
      OSError: the disk is full.
    """
    path = decoded_folder(root, folder) / f"{name}-{frames.fingerprint}.npy"
    if _is_complete(path):
        _check_decoded(path)
        return np.load(path, mmap_mode="r")
    if path.exists():
        warnings.warn(
            f"{path} has no checksum, as written by an earlier version; the images are decoded "
            "again",
            stacklevel=2,
        )
    # The processes of a training come here at the same time, and so may two trainings.
    lock = path.with_suffix(".lock")
    with folder_lock.hold(lock, str(path), "give another --dataset.decoded-dir", wait=True):
        if not _is_complete(path):
            _decode(frames, path)
    return np.load(path, mmap_mode="r")


def _decode(frames: RawFrames, path: pathlib.Path) -> None:
    path.unlink(missing_ok=True)  # of an earlier version; the new checksum would not be its own
    with replacing(path) as part:
        images = _create(part, frames.shape)

        def decode(start: int) -> None:
            rows = np.arange(start, min(start + STEPS_PER_PASS, len(frames)))
            images[rows] = frames[rows]

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for _ in pool.map(decode, range(0, len(frames), STEPS_PER_PASS)):
                pass
        images.flush()
        record = {"file": path.name, "bytes": part.stat().st_size, "crc32": crc32_of_file(part)}
        write_json(_checksum_file(path), record)  # first: images without it are decoded again


def _is_complete(path: pathlib.Path) -> bool:
    return path.exists() and _checksum_file(path).exists()


def _checksum_file(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".json")


def _check_decoded(path: pathlib.Path) -> None:
    """Raises a ValueError if decoded images on disk are not those that were written."""
    expected = read_json(_checksum_file(path), "size and checksum of decoded images")
    size = path.stat().st_size
    reason = ""
    if "file" not in expected:
        warnings.warn(
            f"{path} was written by an earlier version, without its name: images that were "
            "exchanged are not noticed; delete it, and the images are decoded again",
            stacklevel=3,
        )
    if expected.get("file", path.name) != path.name:
        reason = f"it was written as {expected['file']}"
    elif size != expected.get("bytes"):
        reason = f"it has {size} bytes instead of {expected.get('bytes')}"
    elif crc32_of_file(path) != expected.get("crc32"):
        reason = "its checksum differs"
    if reason:
        raise ValueError(
            f"{path} is damaged ({reason}); delete this file, and the images are decoded again."
        )


def _create(path: pathlib.Path, shape: tuple[int, ...]) -> np.memmap:
    """Creates the array file of one camera with its full size on disk."""
    try:
        images = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        if hasattr(os, "posix_fallocate"):
            # Writing to a map on a full disk kills the process: allocate the space beforehand.
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, images.offset + images.nbytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"decoded images of {np.prod(shape, dtype=np.int64) / 1e6:.0f} MB in {path.parent} "
            f"could not be written ({error.strerror}); free space, give another decoded_dir, or "
            "decode on demand.",
        ) from error
    return images


def decoded_folder(root: pathlib.Path, folder: str | None) -> pathlib.Path:
    """Returns the folder of decoded images, which is created if necessary.

    Args:
      root: file or folder of the data set.
      folder: as for `decode_all`.
    """
    home = root if root.is_dir() else root.parent
    if folder is None and not os.access(home, os.W_OK):
        base = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
        folder = str(base / "vla_jax" / "frames")
        warnings.warn(f"{home} is not writable; decoded images go to {folder}", stacklevel=4)
    chosen = pathlib.Path(folder) if folder else home / ".frames"
    chosen.mkdir(parents=True, exist_ok=True)
    return chosen
