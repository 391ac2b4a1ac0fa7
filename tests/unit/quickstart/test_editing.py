"""How often pixels of kept patches stay: where the patches lie, and what counts."""

import torch

from quickstart.editing import groups_of, rows_of

DRAWN = torch.zeros(6, 6, dtype=torch.bool)
DRAWN[2, 2:4] = True


def test_kept_patches_are_before_the_region_or_beside_it_or_farther_off():
    groups = {name: patches.nonzero().tolist() for name, patches in groups_of(DRAWN).items()}
    whole, earlier, beside, farther = groups.values()
    assert earlier == [[y, x] for y in range(2) for x in range(6)] + [[2, 0], [2, 1]]
    assert beside == [[2, 4], *([3, x] for x in range(1, 5))]
    assert sorted(earlier + beside + farther) == whole and len(whole) == 34


def test_a_group_without_patches_has_no_row():
    drawn = torch.ones(2, 2, dtype=torch.bool)
    drawn[1, 1] = False
    assert list(groups_of(drawn)) == ["all", "later, beside the region"]


def test_shares_count_the_pixels_of_the_group_within_the_tolerance():
    drawn = torch.zeros(2, 2, dtype=torch.bool)
    drawn[0, 1] = True
    changed = torch.zeros(1, 4, 4, dtype=torch.int16)
    changed[0, :2, 2:] = 99  # drawn: does not count
    changed[0, 2, :2] = torch.tensor([8, 33])
    earlier, beside = rows_of("stage 2", changed, drawn)[1:]
    assert earlier == [
        "stage 2",
        "with codes before the region's",
        "1",
        "100.0%",
        "100.0%",
        "100.0%",
    ]
    assert beside == ["stage 2", "later, beside the region", "2", "75.0%", "87.5%", "87.5%"]
