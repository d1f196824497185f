"""Small CALVIN data sets, as calvin_env and its annotator write them."""

import numpy as np


def frame(number):
    """Arrays of one frame."""
    y, x = np.mgrid[:8, :10]
    waves = [120 + 80 * np.sin(x / 3 + y / (2 + c) + 0.8 * number) for c in range(3)]
    static = np.stack(waves, axis=-1).astype(np.uint8)
    return {
        "actions": np.arange(7) + number,
        "rel_actions": np.linspace(-1, 1, 7) * (number % 3),
        "robot_obs": np.full(15, number, np.float64),
        "scene_obs": np.full(24, -number, np.float32),
        "rgb_static": static,
        "rgb_gripper": static[:6, :6],
        "rgb_tactile": np.concatenate([static, static], axis=-1),
        "depth_static": static[..., 0] / np.float32(7),
    }


def write_part(folder, num_frames, segments, texts, *, play=None, digits=7, first=0):
    """Writes one part of a data set; `segments` and `texts` are those of the annotations."""
    folder.mkdir(parents=True)
    for number in range(first, first + num_frames):
        np.savez_compressed(folder / f"episode_{number:0{digits}}.npz", **frame(number))
    rows = play or [(first, first + num_frames - 1)]
    np.save(folder / "ep_start_end_ids.npy", np.array(rows))
    write_annotations(folder / "lang_annotations/auto_lang_ann.npy", segments, texts)
    return folder


def write_annotations(path, segments, texts):
    """Writes the pickled dict of the annotator."""
    content = {
        "language": {"ann": texts, "task": ["t"] * len(texts), "emb": np.zeros((len(texts), 1, 4))},
        "info": {"episodes": [], "indx": segments},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, content, allow_pickle=True)
