"""The loader: whole batches and fastai's way, item by item, give the same; what a fastai user adds takes effect."""

import multiprocessing
import pickle
import random

import albumentations as A
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.load import SkipItemException
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorCategory, TensorImage
from fastai.vision.augment import CropPad, Resize
from fastai.vision.core import PILImage, ToTensor
from fasttransform import Transform
from PIL import Image
from torch import nn

from lib.data import loader
from lib.data.augment import AlbumentationsTransform, shuffled
from tests.conftest import picture, save

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of 3 classes x 14 images of mixed sizes."""
    root = tmp_path_factory.mktemp("ragged")
    for k, name in enumerate("abc"):
        for i in range(14):
            save(root / name / f"{i:02}.png", picture(RNG, k, 20 + i % 5, 24 + i % 3))
    return root


@pytest.fixture
def dls(folder, parse):
    return loader.get_dls(parse("--data", folder, "--size", 16, "-b", 8))


class Same(Transform):
    def encodes(self, x: PILImage):
        return x


class Invert(Transform):
    def encodes(self, x: PILImage):
        return PILImage.create(255 - np.asarray(x))


def batches(dl, epochs=1):
    return [(x.clone(), y) for _ in range(epochs) for x, y in dl]


def equal(a, b):
    return len(a) == len(b) and all((p == q).all() for xs, ys in zip(a, b) for p, q in zip(xs, ys, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_item_by_item_gives_the_batches_that_are_made_whole(name, workers, dls):
    whole = getattr(dls, name).new(num_workers=workers)
    whole._one_pass()
    items = whole.new()
    items.after_item.add(Same())
    assert whole.is_fast([0]) and not items.is_fast([0])
    first, second = batches(whole, 3), batches(items, 3)
    assert equal(first, second) and whole.epoch == items.epoch == (3 if name == "train" else 0)
    assert [type(t) for t in first[0]] == [type(t) for t in second[0]] == [TensorImage, TensorCategory]
    if name == "train":
        assert not equal(first[:4], first[4:8])


def test_a_transform_that_is_added_takes_effect_everywhere(dls):
    before = [batches(dl.new()) for dl in dls.loaders]
    dls.add_tfms([Invert()], "after_item", [0, 1, 2])
    for dl, expected in zip(dls.loaders, before):
        assert not dl.is_fast([0])
        for (x, _), (y, _) in zip(batches(dl), expected, strict=True):
            pixels = lambda x: (x * dls.std[:, None, None] + dls.mean[:, None, None]) * 255
            assert torch.allclose(pixels(x), 255 - pixels(y), atol=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        lambda dl: dl.new(after_item=[Invert(), CropPad(16), ToTensor()]),
        lambda dl: dl.new(create_item=lambda i: (PILImage.create(np.zeros((16, 16, 3), np.uint8)), TensorCategory(0))),
        lambda dl: dl.new(before_batch=[lambda items: [(x + 1, y) for x, y in items]]),
        lambda dl: dl.new(after_item=[CropPad(16), ToTensor()]) if dl.shuffle else dl.new(after_item=Invert),
        lambda dl: dl.new(after_item=[Resize(20), ToTensor()]),
        lambda dl: dl.new(after_batch=[]),
    ],
    ids=["item", "create_item", "before_batch", "no augmentation", "other size", "no batch transforms"],
)
def test_nothing_that_new_is_given_is_passed_over(change, dls):
    expected, found = batches(dls.train.new()), batches(change(dls.train))
    assert len(found) == len(expected) and not any(
        x.shape == y.shape and (x == y).all() for (x, _), (y, _) in zip(found, expected)
    )


def test_type_transforms_that_are_added_take_effect(dls):
    expected = batches(dls.valid.new())
    dls.valid_ds.tls[0].tfms.add(Invert())
    assert not dls.valid.is_fast([0]) and not equal(batches(dls.valid), expected)


def test_items_that_are_skipped_leave_smaller_batches(dls):
    class Skip(Transform):
        def encodes(self, x: TensorCategory):
            if x == 0:
                raise SkipItemException
            return x

    dl = dls.valid.new()
    dl.after_item.add(Skip())
    labels = [int(y) for _, ys in dl for y in ys]
    assert labels == [k for k in dls.valid.labels if k]


def test_everything_that_is_an_image_is_read_alike(dls):
    path = dls.valid.dataset.items[0]
    array = np.asarray(Image.open(path))
    tensor = TensorImage(torch.tensor(array).permute(2, 0, 1))
    given = [
        path,
        str(path),
        path.read_bytes(),
        Image.open(path),
        PILImage.create(path),
        array,
        torch.tensor(array),
        tensor,
    ]
    expected = dls.valid.one_batch()[0][0]
    for item in given:
        (x,) = dls.test_dl([item], num_workers=0).one_batch()
        assert (x[0] == expected).all(), type(item)
    (x,) = dls.test_dl([str(path), *dls.valid.dataset.items[1:3]]).one_batch()
    assert (x == dls.valid.one_batch()[0][:3]).all()
    labelled = dls.test_dl([path, str(path)], with_labels=True)
    assert labelled.one_batch()[1].tolist() == [dls.valid.labels[0]] * 2


def test_fastais_looks_at_a_batch_work(dls, tmp_path):
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(16 * 16 * 3, 3)), CrossEntropyLossFlat(), path=tmp_path)
    dls.show_batch(max_n=4), dls.valid.show_batch(max_n=2)
    *_, items = dls.train.show_batch(show=False, unique=True, max_n=8)  # one image, augmented anew each time
    assert len({label for _, label in items}) == 1 and len({np.asarray(image).tobytes() for image, _ in items}) > 4
    learn.show_results(max_n=2)
    path = dls.valid.dataset.items[0]
    assert learn.predict(path)[0] == learn.predict(np.asarray(Image.open(path)))[0] in dls.vocab
    image, label = dls.valid.decode_batch(dls.valid.one_batch())[0]
    plain = dls.store[dls.valid.ids[0]]
    assert np.abs(np.asarray(image).transpose(1, 2, 0) - loader.centre(plain, 16).astype(int)).max() <= 1
    assert label == dls.vocab[dls.valid.labels[0]] == path.parent.name
    learn.export("x.pkl")
    assert (tmp_path / "x.pkl").stat().st_size < 200_000


def test_tta_draws_from_the_item_transforms_that_it_is_given(dls, tmp_path):
    seen = []

    class See(Callback):
        def before_batch(self):
            seen.append(self.x.clone())

    model = nn.Sequential(nn.Flatten(), nn.Linear(16 * 16 * 3, 3))
    learn = Learner(dls, model, CrossEntropyLossFlat(), path=tmp_path, cbs=See())
    turn = AlbumentationsTransform([A.Rotate(p=1)])
    with learn.no_bar():
        learn.tta(n=2, item_tfms=[turn, CropPad(16), ToTensor()], batch_tfms=list(dls.valid.after_batch.fs))
    augmented, plain = seen[0], seen[-1]
    assert (plain == dls.valid.one_batch()[0]).all() and (augmented != plain).flatten(1).any(1).all()


def test_the_order_is_the_loaders_to_choose(dls):
    dls.train.order = lambda seed, epoch, labels: np.argsort(labels, kind="stable")
    again = dls.train.new()
    assert [y.tolist() for _, y in again] == [y.tolist() for _, y in dls.train]
    assert sum([y.tolist() for _, y in again], []) == sorted(dls.train.labels.tolist())
    assert loader.StoreDL(dls.train.dataset, dls.store).order is shuffled


def test_a_pass_draws_nothing_from_global_generators(dls):
    states = lambda: (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate())
    before = states()
    for workers in (0, 1):
        list(dls.train.new(num_workers=workers))
    assert states() == before


def test_workers_draw_anew_in_each_epoch_for_transforms_that_are_not_ours(dls):
    class Noise(Transform):
        order = 6  # after ToTensor

        def encodes(self, x: TensorImage):
            return TensorImage(torch.randint(0, 256, x.shape, dtype=torch.uint8))

    dls.train.after_item.add(Noise())
    dl = dls.train.new(num_workers=1)
    first, second = batches(dl), batches(dl)
    assert not any((a == b).all() for (a, _), (b, _) in zip(first, second))
    dl.epoch = 0
    assert equal(batches(dl), first)


@pytest.mark.parametrize("world", [2, 3])
def test_the_parts_of_the_ranks_make_the_batches(world, dls):
    for dl in dls.loaders:
        whole, parts = batches(dl.new(bs=5)), []
        for rank in range(world):
            part = dl.new(bs=5)
            part.rank, part.world = rank, world
            parts.append(batches(part))
            shares = [part.shares(i)[part.rank] for i in range(len(whole))]
            assert [max(share, 1) for share in shares] == [len(y) for _, y in parts[-1]]
            parts[-1] = [tuple(t[:share] for t in batch) for batch, share in zip(parts[-1], shares)]
            assert [sum(part.shares(i)) for i in range(len(whole))] == [len(y) for _, y in whole]
        assert equal([tuple(map(torch.cat, zip(*batch))) for batch in zip(*parts)], whole)


def test_a_pass_may_begin_behind_its_first_batches(dls):
    whole, dl = batches(dls.train.new()), dls.train.new()
    dl.skip = 2
    assert equal(batches(dl), whole[2:]) and dl.skip == 0
    dl.epoch = 0
    assert equal(batches(dl), whole)


def test_a_loader_can_be_pickled(dls):
    expected = batches(dls.train.new())
    assert equal(batches(pickle.loads(pickle.dumps(dls.train))), expected)
    dls.train.after_item.add(Same())
    assert equal(batches(pickle.loads(pickle.dumps(dls.train))), expected)


def test_an_empty_loader_carries_no_images(dls):
    empty = dls.new_empty()
    assert [dl.store for dl in empty.loaders] == [None] * 3 and len(pickle.dumps(empty)) < 100_000
    path = dls.valid.dataset.items[0]
    assert (empty.test_dl([path], num_workers=0).one_batch()[0] == dls.valid.one_batch()[0][:1]).all()


@pytest.mark.parametrize("method", ["fork", "forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("cached", [False, True])
def test_workers_may_start_in_any_way(method, cached, folder, parse, tmp_path):
    cache = tmp_path if cached else ""
    dls = loader.get_dls(parse("--data", folder, "--size", 16, "-b", 8, "--cache", cache))
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(method, force=True)
    try:
        assert equal(batches(dls.train.new(num_workers=2)), batches(dls.train.new()))
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_a_batch_transform_may_expand_an_image(dls):
    plain, fastais = dls.valid.after_batch.fs[-1], Normalize.from_stats(dls.mean, dls.std, cuda=False)
    x = TensorImage(torch.rand(4, 1, 16, 16)).expand(4, 3, 16, 16)
    assert torch.allclose(plain(x).float(), fastais(x).float(), atol=1e-6)


def test_loaders_are_on_the_device_of_the_settings(parse, folder, monkeypatch):
    asked = []
    monkeypatch.setattr(loader, "pick_device", lambda config: asked.append(config.device) or torch.device("cpu"))
    settings = parse("--data", folder, "--size", 16, "--device", "cuda")
    assert loader.get_dls(settings).device.type == "cpu" and asked == ["cuda"]
    assert loader.get_dls(settings, "cpu").device.type == "cpu" and asked == ["cuda"]
