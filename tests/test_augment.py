import itertools
import json

import albumentations as A
import numpy as np
import pytest
import torch
from fastai.torch_core import set_seed
from fastai.vision.augment import Resize
from fastai.vision.data import ImageDataLoaders
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.cli import BadInput
from lib.data import augment, decode, loader
from lib.data.augment import AlbumentationsTransform, AlternatingFlip, CropFromPadding, Cutout
from tests.conftest import fingerprint, save

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
    orders = [tuple(augment.shuffled(s, e, range(50))) for s in range(3) for e in range(3)]
    assert len(set(orders)) == 9 and all(sorted(o) == list(range(50)) for o in orders)
    assert orders[0] == tuple(augment.shuffled(0, 0, range(50)))


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
    x, _ = dl.make_batch([0, 1])
    assert all((x[j].permute(1, 2, 0).numpy() == decode.centre(store[dl.ids[j]], 32)).all() for j in range(2))
    x, _ = learn.dls.train.make_batch(list(range(8)))
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


NESTED = {
    "one of": [A.OneOf([A.HorizontalFlip(p=1), A.VerticalFlip(p=1), A.Blur(p=1)], p=0.9), A.RandomCrop(30, 30)],
    "some of": [A.SomeOf([A.GaussNoise(p=1), A.RandomBrightnessContrast(p=1), A.Rotate(p=1)], n=2)],
    "random order": [A.RandomOrder([A.Rotate(), A.CoarseDropout(p=1, fill="random"), AlternatingFlip()], n=2)],
    "composes in one another": [
        A.Compose([A.Sequential([A.ISONoise(p=0.7), A.OneOrOther(A.RandomGamma(), A.CLAHE())], p=0.8)], p=0.9, seed=3),
        A.ElasticTransform(p=1),
    ],
    "replay": [A.ReplayCompose([A.HorizontalFlip(), A.ShotNoise(p=1), A.Spatter(p=1)])],
    "ours within": [A.OneOf([AlternatingFlip(), Cutout(8)]), A.GridDistortion(p=1)],
    "generators of their own": [A.MultiplicativeNoise(p=1), A.GlassBlur(p=1), A.PixelDropout(p=1), A.FancyPCA(p=1)],
}


def drawn(transform, backwards=False):
    """{(epoch, index): what it makes of IMAGE}, drawn in order or backwards."""
    places = [(epoch, i) for epoch in range(3) for i in range(8)]
    return {place: transform.apply(IMAGE, *place).tobytes() for place in (places[::-1] if backwards else places)}


@pytest.mark.parametrize("name", NESTED)
def test_any_pipeline_is_a_function_of_seed_epoch_and_image(name):
    seen = drawn(AlbumentationsTransform(NESTED[name], 3))
    assert seen == drawn(AlbumentationsTransform(NESTED[name], 3), backwards=True)
    assert len(set(seen.values())) > 12  # of 24
    assert seen != drawn(AlbumentationsTransform(NESTED[name], 4))


def test_two_pipelines_may_share_their_transforms():
    shared = [A.Rotate(p=1)]
    one, two = AlbumentationsTransform(shared, 1), AlbumentationsTransform(shared, 2)
    two.apply(IMAGE, 0, 0)
    expected = drawn(AlbumentationsTransform([A.Rotate(p=1)], 1))
    one.apply(IMAGE, 0, 0), two.apply(IMAGE, 0, 0)
    assert drawn(one) == expected


@pytest.mark.parametrize("name", ["some of", "replay"])
def test_any_pipeline_gives_a_loader_the_same_images_for_any_number_of_workers(name, bands, parse, tmp_path):
    A.save(A.Compose(NESTED[name]), tmp_path / "mine.yaml", "yaml")
    dls = loader.get_dls(parse("--data", bands, "--size", 24, "-b", 16, "--augment", tmp_path / "mine.yaml"))
    batches = lambda epoch, workers: [x for x, _ in dls.train.new(num_workers=workers, epoch=epoch)]
    plain = batches(0, 0)
    assert all((a == b).all() for a, b in zip(plain, batches(0, 2), strict=True))
    assert not any((a == b).all() for a, b in zip(plain, batches(1, 2), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_alone_in_a_fastai_loader_each_call_draws_anew(workers, tmp_path):
    for name in "ab":
        for i in range(8):
            save(tmp_path / name / f"{i}.png", IMAGE)
    tfms = [Resize(32), AlbumentationsTransform([A.RandomBrightnessContrast(p=1), A.Rotate(p=1)])]

    def epochs():
        set_seed(3)
        options = dict(valid_pct=0.25, seed=1, bs=4, item_tfms=tfms, num_workers=workers, device="cpu")
        dls = ImageDataLoaders.from_folder(tmp_path, **options)
        assert (next(iter(dls.valid))[0][0] == next(iter(dls.valid))[0][1]).all()
        return [torch.cat([x for x, _ in dls.train]) for _ in range(2)]

    first, second = epochs()
    images = {x.numpy().tobytes() for x in (*first, *second)}
    assert len(images) == len(first) + len(second) == 24
    assert all((a == b).all() for a, b in zip((first, second), epochs()))


@pytest.mark.parametrize("form", ["yaml", "json"])
@pytest.mark.parametrize("name", [*NESTED, "standard", "photo", "none"])
def test_a_saved_pipeline_reads_back_equal(name, form, tmp_path, parse):
    if name in NESTED:
        transforms = NESTED[name]
    else:
        transforms = augment.pipeline(parse("--data", "x", "--augment", name), 32, (1.5, 2.0, 3.0))
    first, file = AlbumentationsTransform(transforms, 3), tmp_path / f"augment.{form}"
    A.save(first.compose, file, form)
    read = augment.pipeline(parse("--data", "x", "--augment", file), 30, (0, 0, 0))
    again = AlbumentationsTransform(read, 3)
    assert drawn(again) == drawn(first) and augment.saved(again) == augment.saved(first)
    file.write_text(augment.saved(first))
    assert drawn(AlbumentationsTransform(augment.pipeline(parse("--augment", file), 30, (0, 0, 0)), 3)) == drawn(first)


def test_what_the_pipelines_of_the_command_line_do(parse):
    large = np.random.default_rng(1).integers(0, 256, (64, 90, 3), dtype=np.uint8)
    of = lambda *argv: AlbumentationsTransform(augment.pipeline(parse(*argv), 64, (1, 2, 3)), size=64)
    assert (of("--augment", "none").apply(large, 0, 0) == decode.centre(large, 64)).all()
    standard, photo = of(), of("--augment", "photo")
    assert standard.lean and not photo.lean
    kinds = lambda transform: [type(t).__name__ for t in transform.compose.transforms]
    assert kinds(standard) == ["CropFromPadding", "AlternatingFlip", "Cutout"]
    assert kinds(photo) == ["RandomResizedCrop", "AlternatingFlip", "ColorJitter", "Cutout"]
    assert kinds(of("--augment", "photo", "--no-flip", "--cutout", 0)) == ["RandomResizedCrop", "ColorJitter"]
    for transform in (standard, photo):
        assert {transform.apply(large, 0, i).shape for i in range(30)} == {(64, 64, 3)}


BAD = {  # what a file holds in the place of a transform: words of the line
    "a lambda": ({"__class_fullname__": "Lambda", "__name__": "x"}, "Lambda is no transform"),
    "a function": ({"__class_fullname__": "os.system"}, "os.system is no transform"),
    "no name": ({"p": 1}, "cannot be used"),
    "a list": ([], "cannot be used"),
    "a base class": ({"__class_fullname__": "BasicTransform"}, "BasicTransform: wrong arguments"),
    "no transform": ({"__class_fullname__": "BboxParams"}, "BboxParams is no transform"),
    "a wrong value": ({"__class_fullname__": "Blur", "blur_limit": "x"}, "Blur: wrong arguments"),
    "a wrong name": ({"__class_fullname__": "Blur", "limit": 3}, "Blur: wrong arguments"),
    "a wrong name, deep": (
        {"__class_fullname__": "OneOf", "transforms": [{"__class_fullname__": "Cutout_", "p": 1}]},
        "Cutout_ is no transform",
    ),
    "what A.save loses": (
        {"__class_fullname__": "SelectiveChannelTransform", "transforms": [], "channels": [0]},
        "does not keep channels",
    ),
    "another type": ({"__class_fullname__": "Normalize"}, "float32"),
    "a tensor": ({"__class_fullname__": "ToTensorV2"}, "torch.uint8"),
    "too small": ({"__class_fullname__": "Resize", "height": 16, "width": 16}, "(16, 16, 3)"),
    "too large": ({"__class_fullname__": "RandomCrop", "height": 64, "width": 64}, "(64, 64)"),
    "a file to read": ({"__class_fullname__": "FDA", "reference_images": ["/etc/passwd"]}, "FDA"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_transform_that_cannot_be_used_is_one_line(name, tmp_path, parse):
    node, words = BAD[name]
    node = {"p": 1, **node} if isinstance(node, dict) else node
    text = json.dumps({"transform": {"__class_fullname__": "Compose", "p": 1, "transforms": [node]}})
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(BadInput) as e:
        augment.pipeline(parse("--augment", tmp_path / "x.json"), 32, (0, 0, 0))
    assert f"--augment {tmp_path}/x.json: " in str(e.value) and words in str(e.value) and len(str(e.value)) < 1500


@pytest.mark.parametrize("text", [
    "", "[]", "transform: 3", "{", "\0", "[" * 10**4, "x" * 10**6, "a: &a [1]\nb: *a", "transform: " + "[" * 500,
    "__class_fullname__: x\n" * 200, "transform: !!python/object/apply:os.system ['touch {}']",
    "transform:\n  __class_fullname__: Compose\n  transforms: 3",
], ids=range(12))  # fmt: skip
def test_a_file_that_holds_no_pipeline_is_one_line_and_runs_nothing(text, tmp_path, parse):
    (tmp_path / "x.yaml").write_text(text.replace("{}", str(tmp_path / "canary")))
    for path in (tmp_path / "x.yaml", tmp_path / "nowhere"):
        with pytest.raises(BadInput, match="^--augment .*: cannot be used"):
            augment.pipeline(parse("--augment", path), 32, (0, 0, 0))
    assert not (tmp_path / "canary").exists()


def test_images_that_come_out_too_small_are_one_line(tmp_path):
    shrinks = AlbumentationsTransform([A.Resize(16, 16, p=0.5)], size=32)
    with pytest.raises(BadInput, match="--augment: .*at least 32 pixels"):
        for i in range(20):
            shrinks.apply(IMAGE, 0, i)
