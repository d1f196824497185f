"""A mixture gives every part's windows, padded and masked, in proportion to the weights."""

import functools
import itertools
import pickle

import numpy as np
import pytest

from vla_jax.actions.action_layout import ActionLayout
from vla_jax.backbones import word_hashing
from vla_jax.data import dataset, normalize
from vla_jax.data.loader import LoaderConfig, make_loader
from vla_jax.data.mixing import Mixed
from vla_jax.data.packing import Packed
from vla_jax.data.windows import WindowConfig, Windows
from vla_jax.types import get_images

TOKENIZE = functools.partial(word_hashing.tokenize, max_words=4, vocab_size=64)
SIZES = WindowConfig(window_size=3, action_horizon=2)


def make_data(seed, *, action_dim, proprio_dim, cameras, lengths=(5, 4), gripper=True):
    rng = np.random.default_rng(seed)
    episodes = []
    for length in lengths:
        observation = {name: rng.integers(0, 256, (length, 4, 6, 3), np.uint8) for name in cameras}
        if proprio_dim:
            observation["proprio"] = rng.normal(size=(length, proprio_dim))
        action = rng.uniform(-1, 1, (length, action_dim))
        if not gripper:
            action[:, -1] = 0
        episodes.append(dataset.Episode(observation, action, f"task {seed}"))
    data = dataset.from_episodes(episodes, fps=10)
    if not gripper:
        data = data._replace(action_layout=ActionLayout(action_dim - 1, ()))
    return data


def make_windows(data, **changes):
    config = WindowConfig(**{"window_size": 3, "action_horizon": 2, **changes})
    stats = normalize.compute_norm_stats(data)
    return Windows(data, config, tokenize=TOKENIZE, norm_stats=stats)


@pytest.fixture
def parts():
    return {
        "arm": make_windows(
            make_data(0, action_dim=7, proprio_dim=3, cameras=["image_primary", "image_wrist"])
        ),
        "two arms": make_windows(
            make_data(1, action_dim=9, proprio_dim=5, cameras=["image_primary"], gripper=False)
        ),
        "blind": make_windows(make_data(2, action_dim=3, proprio_dim=0, cameras=["image_top"])),
    }


def test_every_window_is_that_of_its_part_padded_and_masked(parts):
    mixed = Mixed(parts)
    assert len(mixed) == sum(map(len, parts.values()))
    order = np.random.default_rng(0).permutation(len(mixed))
    batch = mixed[order]
    cameras = get_images(batch.observation)
    assert sorted(cameras) == ["image_primary", "image_top", "image_wrist"]
    assert batch.action.shape == (len(order), 3, 2, 9)
    assert batch.observation.proprio.shape == (len(order), 3, 5)
    starts = np.cumsum([0, *map(len, parts.values())])
    for row, index in enumerate(order):
        owner = int(np.searchsorted(starts, index, side="right")) - 1
        name = list(parts)[owner]
        own = parts[name][index - starts[owner]]
        size = own.action.shape[-1]
        np.testing.assert_array_equal(batch.action[row][..., : size - 1], own.action[..., :-1])
        np.testing.assert_array_equal(batch.action[row][..., -1], own.action[..., -1])
        dims = np.zeros(9, bool)
        dims[: size - 1] = True
        dims[-1] = name != "two arms"
        np.testing.assert_array_equal(batch.action_dims[row], np.tile(dims, (3, 1)))
        np.testing.assert_array_equal(batch.action[row][..., ~dims], 0)
        np.testing.assert_array_equal(batch.timestep_mask[row], own.timestep_mask)
        own_proprio = own.observation.proprio
        given = 0 if own_proprio is None else own_proprio.shape[-1]
        assert (batch.observation.column_mask["proprio"][row] == (np.arange(5) < given)).all()
        np.testing.assert_array_equal(batch.observation.proprio[row][..., given:], 0)
        if own_proprio is not None:
            np.testing.assert_array_equal(batch.observation.proprio[row][..., :given], own_proprio)
        for camera, images in cameras.items():
            own_images = get_images(own.observation).get(camera)
            present = own_images is not None
            np.testing.assert_array_equal(images[row], own_images if present else 0)
            assert (batch.observation.image_mask[camera][row] == present).all()


def test_a_mixture_of_equal_robots_needs_no_masks():
    windows = [
        make_windows(make_data(n, action_dim=4, proprio_dim=2, cameras=["image_primary"]))
        for n in range(2)
    ]
    batch = Mixed(dict(zip("ab", windows, strict=True)))[np.array([0, 1])]
    assert batch.observation.image_mask is None
    assert batch.observation.column_mask is None
    assert batch.action_dims.all()


@pytest.mark.parametrize("pack", [False, True])
def test_the_loader_draws_in_proportion_to_the_weights_and_resumes(parts, pack):
    if pack:
        parts = {name: Packed(windows) for name, windows in parts.items()}
    mixed = Mixed(parts, weights=[2, 1, 1])
    config = LoaderConfig(batch_size=8, num_threads=0, seed=3)
    with make_loader(mixed, config) as loader:
        batches = list(itertools.islice(loader, 3))
        state = loader.get_state()
        following = list(itertools.islice(loader, 2))
        assert loader.metrics()["epochs arm"] == pytest.approx(5 * 8 * 2 / 4 / mixed.sizes[0])
    owners = np.concatenate([owner_of(batch) for batch in batches])
    assert np.bincount(owners).tolist() == [12, 6, 6]
    with make_loader(mixed, config) as resumed:
        resumed.set_state(state)
        for expected, found in zip(following, resumed, strict=False):
            assert_equal(expected, found)


def test_processes_share_the_batches_of_one(parts):
    config = LoaderConfig(batch_size=8, num_threads=0)
    with make_loader(Mixed(parts, weights=[1, 1, 2]), config) as whole:
        expected = next(whole)
    shares = []
    for process in range(2):
        mixed = Mixed(parts, weights=[1, 1, 2])
        with make_loader(mixed, config, process_index=process, process_count=2) as loader:
            shares.append(next(loader))
    np.testing.assert_array_equal(expected.action, np.concatenate([s.action for s in shares]))


def test_a_mixture_can_be_pickled_and_tells_its_pipeline(parts):
    mixed = pickle.loads(pickle.dumps(Mixed(parts, weights=[1, 2, 3])))
    assert_equal(mixed[np.arange(4)], Mixed(parts)[np.arange(4)])
    assert mixed.identity["weights"] == [1.0, 2.0, 3.0]
    assert mixed.identity["parts"] == list(parts)
    turned = Mixed(dict(reversed(parts.items())), weights=[3, 2, 1])
    assert turned.identity != {**mixed.identity, "weights": turned.identity["weights"]}
    assert mixed.identity["arm: dataset"] == parts["arm"].identity["dataset"]


def test_parts_that_do_not_fit_are_refused(parts):
    arm = parts["arm"].dataset
    with pytest.raises(ValueError, match="window_size must be the same"):
        Mixed({"arm": parts["arm"], "long": make_windows(arm, window_size=4)})
    with pytest.raises(ValueError, match="weights must be 3 positive numbers"):
        Mixed(parts, weights=[1, 0, 1])
    other = make_data(0, action_dim=7, proprio_dim=3, cameras=[])
    big = dict(other.columns), {"image_primary": np.zeros((9, 8, 8, 3), np.uint8)}
    with pytest.raises(ValueError, match="images of image_primary must have one size"):
        Mixed({"arm": parts["arm"], "big": make_windows(other._replace(frames=big[1]))})
    with pytest.raises(ValueError, match="packed must be the same"):
        Mixed({"arm": parts["arm"], "packed": Packed(parts["arm"])})


def owner_of(batch):
    """Returns the part of every window, identified by the cameras that it has."""
    mask = batch.observation.image_mask
    real = batch.timestep_mask[:, -1] | batch.timestep_mask[:, 0]
    assert real.all()
    return np.where(mask["image_wrist"][:, 0], 0, np.where(mask["image_top"][:, 0], 2, 1))


def assert_equal(first, second):
    import jax

    jax.tree.map(np.testing.assert_array_equal, first, second)
