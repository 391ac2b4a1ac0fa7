"""Unreadable images while training: which image takes their place, the list, and the limit."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data.images import TrainImages, TrainViews
from data.order import EpochDraws, SampleOrder
from data.unreadable import SkipUnreadable
from tests.refusals import refusal

ITEMS, BAD = 9, (3, 4, 8)


@pytest.fixture
def paths(tmp_path):
    """Nine images of one grey value each; three of them are unreadable."""
    made = [str(tmp_path / f"{i}.png") for i in range(ITEMS)]
    for i, path in enumerate(made):
        Image.new("RGB", (8, 8), (10 * i,) * 3).save(path)
        if i in BAD:
            Path(path).write_bytes(b"no image")
    return made


def skipping(paths, limit, report, seed=1):
    return SkipUnreadable(TrainImages(paths, 8, 8, True, seed), ITEMS, limit, report)


def shown(item):
    """The image that an item shows."""
    return int(item.flatten()[0]) // 10


def test_next_readable_image_takes_the_place_and_all_others_keep_theirs(paths, tmp_path):
    dataset = skipping(paths, 3, tmp_path / "skipped.txt")
    for epoch in range(3):
        places = [shown(dataset[epoch, i]) for i in range(ITEMS)]
        assert places == [0, 1, 2, 5, 5, 5, 6, 7, 0]


def test_replacement_comes_with_its_own_label_and_draw(paths):
    draws = EpochDraws(np.arange(len(paths)), 10, seed=2, class_dropout=0.3, no_class=99)
    views = TrainViews(paths, 4, draws)
    dataset = SkipUnreadable(views, ITEMS, 3, Path(paths[0]).parent / "skipped.txt")
    labels = set()
    for epoch in range(12):
        (image, label), (expected, own) = dataset[epoch, 3], views[epoch, 5]
        assert torch.equal(image, expected) and label == own
        labels.add(label)
    assert labels == {5, 99}


def test_items_do_not_depend_on_ranks_workers_or_the_step_of_resuming(paths, tmp_path):
    def line(world, steps, start=0, workers=0):
        """Global batches of six images, from a step on."""
        ranks = []
        for rank in range(world):
            dataset = skipping(paths, 3, tmp_path / f"{world}-{start}-{workers}")
            order = SampleOrder(ITEMS, 6 // world, 1, rank, world, start=start)
            batches = iter(DataLoader(dataset, batch_sampler=order, num_workers=workers))
            ranks.append([next(batches) for _ in range(steps)])
            del batches
        return [torch.cat(step) for step in zip(*ranks)]

    whole = line(1, 6)
    for other in (line(2, 6), line(1, 6, workers=2)):
        assert all(torch.equal(a, b) for a, b in zip(whole, other))
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], line(2, 2, start=4)))


def test_skipped_images_are_listed_once_and_a_resumed_run_continues_the_list(paths, tmp_path):
    report = tmp_path / "run" / "skipped.txt"
    for _ in range(2):  # as a second rank, and as a resumed run
        dataset = skipping(paths, 3, report)
        for _ in range(2):
            for i in range(ITEMS):
                dataset[0, i]
    assert report.read_text().splitlines() == [paths[i] for i in BAD]


def test_one_more_than_the_limit_is_refused_by_name_whoever_met_the_others(paths, tmp_path):
    report = tmp_path / "skipped.txt"
    skipping(paths, 2, report)[0, 3]  # 3 and 4, by one rank
    other = skipping(paths, 2, report)
    other[0, 3]
    refusal(lambda: other[0, 8], "dataset.params.skip_unreadable=2", paths[8], report)
    assert report.read_text().splitlines() == [paths[3], paths[4]]
    assert shown(skipping(paths, 3, report)[0, 8]) == 0


def test_without_a_list_a_worker_counts_its_own(paths):
    dataset = skipping(paths, 2, None)
    assert shown(dataset[0, 3]) == shown(dataset[0, 3]) == 5  # 3 and 4, twice
    refusal(lambda: dataset[0, 8], "dataset.params.skip_unreadable=2", paths[8], paths[3], paths[4])


def test_without_a_limit_the_first_one_ends_it_and_the_option_is_named(paths, tmp_path):
    dataset = skipping(paths, 0, tmp_path / "skipped.txt")
    refusal(lambda: dataset[0, 3], paths[3], "dataset.params.skip_unreadable=N")
    assert not (tmp_path / "skipped.txt").exists()


def test_an_item_of_a_large_data_set_costs_no_list_of_all_items(tmp_path):
    class Images:
        paths = ()

        def __getitem__(self, key):
            return key

    dataset = SkipUnreadable(Images(), 10**12, 0, tmp_path / "skipped.txt")
    assert dataset[3, 10**11] == (3, 10**11)


def test_no_readable_image_at_all_is_said(paths, tmp_path):
    for path in paths:
        Path(path).write_bytes(b"")
    dataset = skipping(paths, ITEMS, tmp_path / "skipped.txt")
    refusal(lambda: dataset[0, 0], "9 images")


def meet(paths, report, index):
    skipping(paths, ITEMS, report)[0, index]


def test_processes_that_report_at_once_lose_no_line(tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(ITEMS)]
    for path in paths[:-1]:
        Path(path).write_bytes(b"no image")
    Image.new("RGB", (8, 8)).save(paths[-1])
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=meet, args=(paths, tmp_path / "l", i)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted((tmp_path / "l").read_text().splitlines()) == paths[:-1]
