"""What both tables share says the same thing everywhere."""

import numpy as np

from vla_jax.data import text
from vla_jax.envs import table, table_jax, table_mujoco, table_scene


def test_each_task_asks_for_each_colour_in_a_sentence_of_its_own():
    assert len({instruction.text for instruction in table.INSTRUCTIONS}) == 12
    for index, (task, colour, sentence) in enumerate(table.INSTRUCTIONS):
        assert (table.TASKS.index(task), colour) == divmod(index, table.NUM_BLOCKS)
        assert table.COLOURS[colour] in sentence.split()
    text.check_collisions([i.text for i in table.INSTRUCTIONS], 2048)


def test_every_number_has_a_name():
    assert len(table.STATE_NAMES) == len(set(table.STATE_NAMES)) == table.STATE_SIZE
    assert len(table.PROPRIO_NAMES) == len(set(table.PROPRIO_NAMES)) == table.PROPRIO_SIZE
    assert len(table.ACTION_NAMES) == 7


def test_the_two_tables_have_the_same_sizes_and_options():
    assert tuple(table_scene.COLOURS) == table.COLOURS
    assert table_scene.BLOCK_HALF_SIZE == table.BLOCK_HALF_SIZE
    scene = (table_scene.PLATE_RADIUS, table_scene.PLATE_HEIGHT, 2 * table_scene.FINGER_TRAVEL)
    np.testing.assert_allclose(scene, (table.PLATE_RADIUS, table.PLATE_HEIGHT, table.MAX_OPENING))
    seconds = table_scene.SUBSTEPS * table_scene.TIMESTEP
    np.testing.assert_allclose(seconds, 1 / table.CONTROL_HZ)
    one, other = vars(table_jax.TableConfig()), vars(table_mujoco.TableConfig())
    assert one == {**other, "kind": "table_jax"}
