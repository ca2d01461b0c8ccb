import itertools

import albumentations as A
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data import augment, decode
from lib.data.augment import AlbumentationsTransform, AlternatingFlip, CropFromPadding, Cutout
from tests.conftest import fingerprint

IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def pipeline(seed=0):
    return AlbumentationsTransform([CropFromPadding(32, 4), AlternatingFlip(), Cutout(8, (1.0, 2.0, 3.0))], seed)


def test_augmentation_is_a_function_of_seed_epoch_and_image():
    one, two = pipeline(3), pipeline(3)
    first = [one.apply(IMAGE, e, i) for e in range(3) for i in range(20)]
    backwards = [two.apply(IMAGE, e, i) for e in reversed(range(3)) for i in reversed(range(20))][::-1]
    assert all((a == b).all() for a, b in zip(first, backwards))
    assert len({a.tobytes() for a in first}) == len(first)
    assert any((a != b).any() for a, b in zip(first[:20], [pipeline(4).apply(IMAGE, 0, i) for i in range(20)]))


def test_the_order_is_a_function_of_seed_and_epoch():
    orders = [tuple(augment.order(s, e, 50)) for s in range(3) for e in range(3)]
    assert len(set(orders)) == 9 and all(sorted(o) == list(range(50)) for o in orders)
    assert orders[0] == tuple(augment.order(0, 0, 50))


def test_workers_do_not_change_the_data(make):
    _, learn = make()

    def batches(epoch, workers):
        dl = learn.dls.train.new(num_workers=workers, epoch=epoch)
        return fingerprint([[x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)] for x, y in dl])

    assert batches(0, 0) == batches(0, 2) != batches(1, 2)


def test_the_short_way_gives_what_compose_gives():
    """Our own transforms run without A.Compose around them: same draws, same images."""
    short, whole = pipeline(5), pipeline(5)
    assert short.lean
    whole.lean = False
    tall = np.random.default_rng(1).integers(0, 256, (50, 37, 3), dtype=np.uint8)
    for i in range(200):
        for image in (IMAGE, tall):
            assert (short.apply(image, 2, i) == whole.apply(image, 2, i)).all()
    assert not AlbumentationsTransform([A.VerticalFlip()]).lean


def test_an_image_is_flipped_in_every_other_epoch():
    one, two = (AlbumentationsTransform([AlternatingFlip()], seed) for seed in (0, 1))
    turned = lambda flips, epoch: [not (flips.apply(IMAGE, epoch, i) == IMAGE).all() for i in range(400)]
    first = turned(one, 0)
    assert all((one.apply(IMAGE, 0, i) == IMAGE[:, ::-1]).all() for i in range(400) if first[i])
    for epoch in range(1, 5):
        assert turned(one, epoch) == [flipped ^ (epoch % 2) for flipped in first]
    assert 150 < sum(first) < 250 and 150 < sum(a != b for a, b in zip(first, turned(two, 0))) < 250


def test_each_transform_draws_for_itself():
    """Trap 2: transforms that share a seed fire together or not at all."""
    flips = AlbumentationsTransform([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5), A.InvertImg(p=0.5)])
    seen = [flips.apply(IMAGE, 0, i).tobytes() for i in range(400)]
    counts = [seen.count(kind) for kind in set(seen)]
    assert len(counts) == 8 and min(counts) > 20  # of 50 expected


def test_cutout_masks_as_often_as_the_paper_does():
    """A pixel is masked where the centre falls within half a side of it: half as often at an edge as inside."""
    cut, n, size = AlbumentationsTransform([Cutout(16, 0.0)]), 2000, 16
    masked = np.zeros((32, 32))
    for i in range(n):
        masked += (cut.apply(np.full((32, 32, 3), 255, np.uint8), 0, i) == 0).all(2)
    share = masked / n
    inside, edge = size / 32, (size // 2) / 32
    for (y, x), p in {(16, 16): inside**2, (0, 16): edge * inside, (16, 31): edge * inside, (0, 0): edge**2}.items():
        assert abs(share[y, x] - p) < 0.05, (y, x)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(4, 40), st.integers(4, 40), st.integers(0, 9))
def test_cutout_masks_one_clipped_square_with_the_fill(size, h, w, i):
    image = np.full((h, w, 3), 200, np.uint8)
    out = AlbumentationsTransform([Cutout(size, (7.0, 8.0, 9.0))]).apply(image, 0, i)
    masked = (out == (7, 8, 9)).all(2)
    rows, cols = np.flatnonzero(masked.any(1)), np.flatnonzero(masked.any(0))
    assert masked.sum() == len(rows) * len(cols) <= size * size
    assert size < 2 or masked.any()
    assert (out[~masked] == 200).all() and (image == 200).all()


def test_crop_is_a_window_of_the_padded_image():
    padded = np.pad(IMAGE, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    windows = {padded[y : y + 32, x : x + 32].tobytes() for y in range(9) for x in range(9)}
    crop = AlbumentationsTransform([CropFromPadding(32, 4)])
    seen = [crop.apply(IMAGE, 0, i).tobytes() for i in range(1500)]
    assert set(seen) == windows  # every window is drawn, and nothing else
    long = np.random.default_rng(1).integers(0, 256, (32, 90, 3), dtype=np.uint8)
    assert crop.apply(long, 0, 0).shape == (32, 32, 3)


def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match="not valid"), pytest.warns(UserWarning):
        AlbumentationsTransform([A.CoarseDropout(max_holes=1, max_height=8)])
    with pytest.raises(ValueError):
        Cutout(0)


def test_only_training_images_are_augmented(make):
    _, learn = make()
    store, dl = learn.dls.store, learn.dls.valid
    x, _ = dl.do_batch([0, 1])
    assert all((x[j].permute(1, 2, 0).numpy() == decode.centre(store[dl.ids[j]], 32)).all() for j in range(2))
    x, _ = learn.dls.train.do_batch(range(8))
    plain = np.stack([store[learn.dls.train.ids[j]] for j in range(8)])
    assert (x.permute(0, 2, 3, 1).numpy() != plain).any((1, 2, 3)).all()


def test_a_pass_moves_to_the_next_epoch_and_a_look_does_not(make):
    _, learn = make()
    dl = learn.dls.train
    dl.one_batch()
    assert dl.epoch == 0
    first = [y.tolist() for _, y in dl]
    assert dl.epoch == 1
    second = [y.tolist() for _, y in dl]
    assert first != second and sorted(itertools.chain(*first)) == sorted(itertools.chain(*second))
