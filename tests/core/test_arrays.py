import numpy as np

from engine.core.arrays import Stack


def test_a_stack_gives_the_rows_of_its_arrays_in_the_order_asked_for():
    arrays = [
        np.arange(6).reshape(3, 2),
        np.empty((0, 2), dtype=int),
        np.arange(10, 14).reshape(2, 2),
    ]
    stack, whole = Stack(arrays), np.concatenate(arrays)
    wanted = np.array([4, 0, 0, 2, 3])
    assert np.array_equal(stack[wanted], whole[wanted])
    assert stack[wanted].dtype == arrays[0].dtype
