"""Small HDF5 data sets of every layout, in variants that the original tools also produce."""

import io
import json

import h5py
import numpy as np
from PIL import Image


def draw(length, height=12, width=16, seed=0):
    """Smooth images `[T, h, w, 3]` uint8 that change at every step."""
    t, y, x = np.mgrid[:length, :height, :width].astype(np.float64)
    waves = [120 + 80 * np.sin(x / 9 + y / (7 + c) + 0.8 * t + seed) for c in range(3)]
    return np.stack(waves, axis=-1).astype(np.uint8)


def write_tree(group, tree, **options):
    """Writes nested dicts of arrays."""
    for key, value in tree.items():
        if isinstance(value, dict):
            write_tree(group.create_group(key), value, **options)
        else:
            group.create_dataset(key, data=value, **(options if np.ndim(value) else {}))


def demo(length, *, arms=1, cameras=("agentview_image", "robot0_eye_in_hand_image"), seed=0):
    """One robomimic demo as nested dicts."""
    rng = np.random.default_rng(seed)
    obs = {camera: draw(length, 12 + 2 * i, 16, seed + i) for i, camera in enumerate(cameras)}
    for arm in range(arms):
        obs[f"robot{arm}_eef_pos"] = rng.normal(size=(length, 3))
        obs[f"robot{arm}_gripper_qpos"] = rng.normal(size=(length, 2)).astype(np.float32)
    actions = rng.uniform(-1, 1, (length, 7 * arms))
    return {"actions": actions, "obs": obs, "dones": np.arange(length) == length - 1}


def write_demos(path, demos, *, attributes=None, samples=True, masks=None, **options):
    """Writes `data/<name>` groups; `demos` maps names to nested dicts."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs.update(attributes or {})
        for name, tree in demos.items():
            write_tree(data.create_group(name), tree, **options)
            if samples:
                data[name].attrs["num_samples"] = len(tree["actions"])
        for key, names in (masks or {}).items():
            file[f"mask/{key}"] = np.array(names, "S")
    return path


def libero_demo(length, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "actions": rng.uniform(-1, 1, (length, 7)),
        "obs": {
            "agentview_rgb": draw(length, seed=seed),
            "eye_in_hand_rgb": draw(length, seed=seed + 1),
            "ee_states": rng.normal(size=(length, 6)),
            "gripper_states": rng.normal(size=(length, 2)),
        },
    }


def isaac_demo(length, seed=0):
    rng = np.random.default_rng(seed)
    pose = {"articulation": {"robot": {"root_pose": rng.normal(size=(length, 7))}}}
    first = {"articulation": {"robot": {"root_pose": rng.normal(size=(1, 7))}}}
    policy = {
        "eef_pos": rng.normal(size=(length, 3)).astype(np.float32),
        "eef_quat": rng.normal(size=(length, 4)).astype(np.float32),
        "gripper_pos": rng.normal(size=(length, 2)).astype(np.float32),
        "table_cam": draw(length, seed=seed),
    }
    actions = rng.uniform(-1, 1, (length, 7)).astype(np.float32)
    return {
        "actions": actions,
        "obs": {"policy": policy, "wrist_cam": draw(length, seed=seed + 1)},
        "states": pose,
        "initial_state": first,
    }


def jpeg(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    return np.frombuffer(file.getvalue(), np.uint8)


def write_aloha(path, length, *, form="raw", seed=0):
    """Writes one ALOHA episode; form: "raw", "padded" or "ragged" images."""
    rng = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        file.attrs["sim"] = False
        file["action"] = rng.uniform(0, 1, (length, 14))
        file["observations/qpos"] = rng.uniform(0, 1, (length, 14)).astype(np.float32)
        file["observations/qvel"] = rng.normal(size=(length, 14)).astype(np.float32)
        for number, camera in enumerate(("cam_high", "cam_left_wrist", "cam_right_wrist")):
            images = draw(length, 16, 24, seed + number)
            coded = [jpeg(image) for image in images]
            place = f"observations/images/{camera}"
            if form == "raw":
                file[place] = images
            elif form == "padded":
                size = max(map(len, coded))
                file[place] = np.stack([np.pad(c, (0, size - len(c))) for c in coded])
            else:
                kind = h5py.vlen_dtype(np.uint8)
                file.create_dataset(place, (length,), kind)[:] = np.array([*coded, None], object)[
                    :-1
                ]
        if form == "padded":
            file["compress_len"] = np.zeros((3, length))


def write_robomme(path, lengths=(5, 3), *, task=None, shown=2):
    """Writes RoboMME episodes; the first `shown` steps are a video without an action."""
    with h5py.File(path, "w") as file:
        root = file.create_group(task) if task else file
        for number, length in enumerate(lengths):
            episode = root.create_group(f"episode_{number}")
            episode["setup/task_goal"] = np.array([f"goal {number} é".encode(), b"other words"])
            episode["setup/seed"] = number
            images = draw(length, seed=number)
            for t in range(length):
                none = t < shown and number == 0
                step = {
                    "obs": {
                        "front_rgb": images[t],
                        "wrist_rgb": images[t, ::-1],
                        "front_depth": np.full((4, 4, 1), t, np.int16),
                        "joint_state": np.full(7, t, np.float32),
                        "gripper_state": np.array([t, -t], np.float32),
                    },
                    "action": {"joint_action": "None" if none else np.full(8, t, np.float32)},
                    "info": {"is_video_demo": none, "simple_subgoal": f"step {t} ü".encode()},
                }
                write_tree(episode.create_group(f"timestep_{t}"), step)


ENV_ARGS = {"env_args": json.dumps({"type": 1, "env_kwargs": {"control_freq": 20}})}
