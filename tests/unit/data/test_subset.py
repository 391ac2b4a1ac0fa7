"""The part of a training set that `experiment.max_train_examples` keeps."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.subset import KeyedSubset, evenly_spaced, spread_over_classes


def test_every_class_gives_as_many_from_all_over_it():
    labels = np.repeat([0, 1, 2], 10)
    chosen = spread_over_classes(labels, 6)
    assert chosen.tolist() == [2, 7, 12, 17, 22, 27]
    mixed = np.tile([0, 1, 2], 10)  # a cache need not be sorted by class
    assert np.bincount(mixed[spread_over_classes(mixed, 6)]).tolist() == [2, 2, 2]


def test_small_class_gives_all_and_the_others_the_rest():
    labels = np.repeat([0, 1, 2], [1, 20, 20])
    assert np.bincount(labels[spread_over_classes(labels, 11)]).tolist() == [1, 5, 5]


def test_fewer_images_than_classes_are_of_classes_from_all_over():
    labels = np.repeat(np.arange(10), 3)
    assert labels[spread_over_classes(labels, 2)].tolist() == [2, 7]


# Times say nothing on a machine that is busy.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 70))
def test_sample_is_of_the_size_and_as_even_as_the_classes_allow(labels, count):
    labels = np.array(labels)
    chosen = spread_over_classes(labels, count)
    assert len(chosen) == min(count, len(labels)) and (np.diff(chosen) > 0).all()
    assert chosen.tolist() == spread_over_classes(labels, count).tolist()
    sizes = np.bincount(labels, minlength=7)
    shares = np.bincount(labels[chosen], minlength=7)
    most = shares.max()
    assert all(share == size or share >= most - 1 for share, size in zip(shares, sizes))


@pytest.mark.parametrize("items, count", [(1, 1), (5, 5), (7, 3), (1_281_167, 10)])
def test_evenly_spaced_indices_differ_and_lie_within(items, count):
    places = evenly_spaced(items, count)
    assert len(set(places.tolist())) == count and places[0] >= 0 and places[-1] < items


class Items:
    paths = ("a", "b", "c", "d")

    def __getitem__(self, key):
        return key


def test_subset_shows_the_items_of_the_whole_dataset():
    subset = KeyedSubset(Items(), np.array([1, 3]))
    assert subset.paths == ["b", "d"]
    assert [subset[5, i] for i in range(2)] == [(5, 1), (5, 3)]
