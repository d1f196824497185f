"""Instructions, names and sizes shared by both tables."""

import numpy as np

from vla_jax.backbones import word_hashing
from vla_jax.envs.table import jax_env, mujoco_env, rules, scene


def test_each_pair_of_task_and_colour_has_a_distinct_sentence():
    assert len({instruction.text for instruction in rules.INSTRUCTIONS}) == 12
    for index, (task, colour, sentence) in enumerate(rules.INSTRUCTIONS):
        assert (rules.TASKS.index(task), colour) == divmod(index, rules.NUM_BLOCKS)
        assert rules.COLOURS[colour] in sentence.split()
    word_hashing.check_collisions([i.text for i in rules.INSTRUCTIONS], 2048)


def test_every_feature_has_a_name():
    assert len(rules.STATE_NAMES) == len(set(rules.STATE_NAMES)) == rules.STATE_SIZE
    assert len(rules.PROPRIO_NAMES) == len(set(rules.PROPRIO_NAMES)) == rules.PROPRIO_SIZE
    assert len(rules.ACTION_NAMES) == 7


def test_the_two_tables_have_the_same_sizes_and_options():
    assert tuple(scene.COLOURS) == rules.COLOURS
    seconds = scene.SUBSTEPS * scene.TIMESTEP
    np.testing.assert_allclose(seconds, 1 / rules.CONTROL_HZ)
    one, other = vars(jax_env.JaxTableConfig()), vars(mujoco_env.MujocoTableConfig())
    assert one == {**other, "kind": "table_jax"}
