"""Files of a user's own: every kind, what they become, and everything that can be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pyrovae
from pyrovae import datasets
from pyrovae.datasets import Splits, from_path
from pyrovae.errors import ArgumentError, DataError
from pyrovae.guides.amortized import AmortizedNormal
from pyrovae.models.vae import VAE


def parts(splits: Splits) -> list[torch.Tensor]:
    return [splits.train.x, splits.validation.x, splits.test.x]


def same(one: Splits, other: Splits) -> bool:
    equal = all(torch.equal(a, b) for a, b in zip(parts(one), parts(other), strict=True))
    labels = [(a.y, b.y) for a, b in ((one.train, other.train), (one.test, other.test))]
    return equal and all(torch.equal(a, b) if a is not None else b is None for a, b in labels)


def numbered(n: int, *shape: int) -> np.ndarray:
    """An array whose rows can be told apart."""
    return np.arange(n * int(np.prod(shape)), dtype=np.float64).reshape(n, *shape)


def save(folder: Path, array: np.ndarray, name: str = "a.npy") -> Path:
    np.save(folder / name, array)
    return folder / name


def write(folder: Path, text: str, name: str = "a.csv") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def table(rows: int) -> str:
    return "".join(f"{row},{row / 8},{'ab'[row % 2]}\n" for row in range(rows))


# ---------------------------------------------------------------- arrays


def test_npy_is_split_at_random_into_all_of_its_rows(tmp_path: Path) -> None:
    array = numbered(50, 2, 3)
    splits = from_path(save(tmp_path, array), validation=0.2, test=0.3)
    assert [len(part) for part in parts(splits)] == [25, 10, 15]
    assert splits.event_shape == (2, 3)
    assert (splits.binarization, splits.classes, splits.train.y) == ("none", (), None)
    together = torch.cat(parts(splits))
    assert np.array_equal(together[together[:, 0, 0].argsort()].numpy(), array)
    assert not torch.equal(together[:25], torch.from_numpy(array[:25]).float())


def test_partition_follows_the_seed_alone(tmp_path: Path) -> None:
    path = save(tmp_path, numbered(50, 2))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one = from_path(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(one, from_path(path, seed=0))
    assert not same(one, from_path(path, seed=1))


@pytest.mark.parametrize(
    ("array", "expected", "binarization"),
    [
        (np.array([[0, 255]] * 10, np.uint8), [0.0, 1.0], "static"),
        (np.array([[51, 255]] * 10, np.uint8), [51 / 255, 1.0], "none"),
        (np.array([[False, True]] * 10), [0.0, 1.0], "static"),
        (np.array([[0, 1]] * 10), [0.0, 1.0], "static"),
        (np.array([[0, 255]] * 10), [0.0, 255.0], "none"),
        (np.array([[-1.5, 1e6]] * 10), [-1.5, 1e6], "none"),
        (np.array([[0.25, 1.0]] * 10, np.float16), [0.25, 1.0], "none"),
    ],
    ids=["binary bytes", "bytes", "bool", "binary", "int", "float", "half"],
)
def test_what_numbers_become(array: np.ndarray, expected: list[float], binarization: str, tmp_path: Path) -> None:
    splits = from_path(save(tmp_path, array))
    assert splits.binarization == binarization
    for x in parts(splits):
        assert x.dtype == torch.float32
        assert torch.equal(x, torch.tensor(expected).expand(len(x), 2))


def test_bytes_are_divided_exactly(tmp_path: Path) -> None:
    splits = from_path(save(tmp_path, np.arange(256, dtype=np.uint8).reshape(-1, 1)))
    assert torch.equal(torch.cat(parts(splits)).flatten().sort().values, torch.arange(256).float() / 255)


@pytest.mark.parametrize("binarization", ["none", "static", "dynamic"])
def test_binarization(binarization: str, tmp_path: Path) -> None:
    path = save(tmp_path, np.full((40, 30), 0.5))
    splits = from_path(path, binarization=binarization)
    held_out = "static" if binarization == "dynamic" else binarization
    assert [split.binarization for split in (splits.train, splits.validation, splits.test)] == [
        binarization,
        held_out,
        held_out,
    ]
    assert set(splits.test.x.unique().tolist()) == ({0.5} if binarization == "none" else {0.0, 1.0})
    assert same(splits, from_path(path, binarization=binarization))


@pytest.mark.parametrize(
    ("y", "classes"),
    [
        (np.tile([7, -1, 10], 20), ("-1", "7", "10")),
        (np.tile(["b", "a", "c"], 20), ("a", "b", "c")),
        (np.tile(["10", "9", "01"], 20), ("01", "9", "10")),
        (np.tile([True, False, True], 20), ("False", "True")),
    ],
)
def test_npz_with_labels(y: np.ndarray, classes: tuple[str, ...], tmp_path: Path) -> None:
    x = numbered(60, 2)
    np.savez(tmp_path / "a.npz", x=x, y=y)
    splits = from_path(tmp_path / "a.npz")
    assert splits.classes == classes
    for split in (splits.train, splits.validation, splits.test):
        rows = (split.x[:, 0] / 2).long()
        assert [splits.classes[code] for code in split.y] == [str(label) for label in y[rows.numpy()]]
    np.savez(tmp_path / "b.npz", x=x, kind=y)
    assert from_path(tmp_path / "b.npz").train.y is None
    named = from_path(tmp_path / "b.npz", labels="kind")
    assert same(named, splits)


@pytest.mark.parametrize(
    ("arrays", "labels", "error", "words"),
    [
        ({"images": numbered(9, 2)}, None, DataError, "no array 'x'; its arrays are: images"),
        ({"x": numbered(30, 2)}, "kind", ArgumentError, "labels is 'kind', which is no array of .*: x"),
        ({"x": numbered(30, 2), "y": np.arange(29)}, None, DataError, r"labels int64 of shape \(29,\).*\(30,\)"),
        ({"x": numbered(30, 2), "y": np.zeros(30)}, None, DataError, "labels float64"),
        ({"x": np.array([[object()]] * 30)}, None, DataError, "no objects"),
    ],
)
def test_bad_npz(
    arrays: dict[str, Any], labels: str | None, error: type[Exception], words: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(error, match=words):
        from_path(tmp_path / "a.npz", labels=labels)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros(30), r"shape \(30,\); it must be n x \*event_shape.*n x 1"),
        (np.zeros((0, 3)), "not empty"),
        (np.zeros((30, 2), complex), "complex128; rows must be of numbers"),
        (np.full((30, 2), "a"), "<U1; rows must be of numbers"),
        (np.where(numbered(30, 2) == 7, np.nan, 1.0), r"holds a NaN.*at \(3, 1\)"),
        (np.where(numbered(30, 2) == 6, np.inf, 1.0), r"at \(3, 0\)"),
        (np.zeros((4, 2)), "4 rows, of which 4 train, 0 validate and 0 test"),
    ],
)
def test_bad_npy(array: np.ndarray, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        from_path(save(tmp_path, array))


def test_number_too_large_for_float32(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"too large for float32, at \(2, 0\)"):
        from_path(save(tmp_path, np.where(numbered(30, 2) == 4, 1e300, 1.0)))


@pytest.mark.parametrize("binarization", ["static", "dynamic"])
def test_values_that_cannot_be_binarized(binarization: str, tmp_path: Path) -> None:
    path = save(tmp_path, numbered(30, 2))
    with pytest.raises(DataError, match=rf"\[0, 59\]; for binarization='{binarization}'.*uint8.*binarization='none'"):
        from_path(path, binarization=binarization)


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\x03\x04 broken", b"some text"])
def test_arrays_that_cannot_be_read(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} cannot be read"):
        from_path(tmp_path / name)


# ---------------------------------------------------------------- csv


def test_csv_with_names_and_labels(tmp_path: Path) -> None:
    splits = from_path(write(tmp_path, "size, weight, kind\n" + table(40)), labels="kind")
    assert splits.event_shape == (2,)
    assert splits.classes == ("a", "b")
    together = torch.cat(parts(splits))
    assert torch.equal(together[:, 0].sort().values, torch.arange(40.0))
    assert torch.equal(together[:, 1] * 8, together[:, 0])
    assert torch.equal(splits.train.y, splits.train.x[:, 0].long() % 2)


@pytest.mark.parametrize(
    "text",
    [
        "1,2\n3,4\n" * 10,
        "a,b\n" + "1,2\n3,4\n" * 10,
        "\ufeffa,b\r\n" + "1,2\r\n3,4\r\n" * 10,
        '"a","b"\n' + '"1", 2\n\n3,4.0e0\n' * 10,
    ],
    ids=["no names", "names", "byte order mark", "quotes and empty lines"],
)
def test_csv_spellings(text: str, tmp_path: Path) -> None:
    x = torch.cat(parts(from_path(write(tmp_path, text))))
    assert x.shape == (20, 2)
    assert sorted(x.tolist()) == [[1.0, 2.0]] * 10 + [[3.0, 4.0]] * 10


def test_csv_whose_names_are_numbers_but_for_the_labels(tmp_path: Path) -> None:
    splits = from_path(write(tmp_path, "digit,0,1\n" + "3,0.5,1\n5,0.25,0\n" * 10), labels="digit")
    assert (splits.classes, splits.event_shape) == (("3", "5"), (2,))


@pytest.mark.parametrize(
    ("text", "labels", "error", "words"),
    [
        ("", None, DataError, "is empty"),
        ("a,b\n", None, DataError, "line of names and no rows"),
        ("a,b\n1,2\n3\n", None, DataError, "1 cells in line 3 and 2 in line 1"),
        ("a,b\n1,2\n3,4,5\n", None, DataError, "3 cells in line 3 and 2 in line 1"),
        ("a,b\n1,2\n\n3,x\n", None, DataError, r"'x' in line 4, column 'b'; every cell .*labels="),
        ("a,b\n1,2\n3,\n", None, DataError, "'' in line 3, column 'b'"),
        ("a,b\n1,2\nnan,4\n", None, DataError, "'nan' in line 3, column 'a'"),
        ("1,2\n3,-inf\n", None, DataError, "'-inf' in line 2, column '2'"),
        ("5.1,setosa\n4.9,setosa\n", None, DataError, "'setosa' in line 1, column '2'"),
        ("1;2\n3;4\n", None, DataError, "'3;4' in line 2"),
        ("a,b\n1,2\n", "c", ArgumentError, "labels is 'c', which is no column of .*: a, b"),
        ("1,2\n3,4\n", "c", ArgumentError, "its first line has no names"),
        ("a,b\n1,2\n3,\n", "b", DataError, "no label in line 3, column 'b'"),
        ("a\nx\n" * 20, "a", DataError, "not empty"),
        ('a,b\n"1,2\n', None, DataError, "cannot be read"),
    ],
)
def test_bad_csv(text: str, labels: str | None, error: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        from_path(write(tmp_path, text), labels=labels)


def test_csv_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    with pytest.raises(DataError, match="cannot be read as comma-separated UTF-8 text"):
        from_path(tmp_path / "a.csv")


# ---------------------------------------------------------------- images


def draw(path: Path, value: int, mode: str = "L", size: tuple[int, int] = (4, 3)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode in ("1", "L", "I;16", "P") else (value,) * len(mode)).save(path)


def test_folder_of_grey_images(tmp_path: Path) -> None:
    for value in range(20):
        draw(tmp_path / f"{value:02}.png", value * 10)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_text("nor this")
    splits = from_path(tmp_path)
    assert (splits.event_shape, splits.classes, splits.binarization) == ((3, 4), (), "none")
    x = torch.cat(parts(splits))
    assert torch.equal(x.flatten(1).sort(0).values, (torch.arange(20.0) * 10 / 255)[:, None].expand(20, 12))


def test_folder_of_colour_images(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 3, 4, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{number}.PNG")
    splits = from_path(tmp_path)
    assert splits.event_shape == (3, 3, 4)
    found = (torch.cat(parts(splits)) * 255).round().to(torch.uint8).numpy()
    expected = pixels.transpose(0, 3, 1, 2).reshape(10, -1)
    assert sorted(found.reshape(10, -1).tolist()) == sorted(expected.tolist())


def test_subfolders_are_classes(tmp_path: Path) -> None:
    for kind, value in (("cat", 10), ("dog", 200)):
        for number in range(15):
            draw(tmp_path / kind / f"{number}.jpg", value)
    splits = from_path(tmp_path)
    assert splits.classes == ("cat", "dog")
    for split in (splits.train, splits.validation, splits.test):
        assert torch.equal(split.y, (split.x[:, 0, 0] > 0.5).long())


@pytest.mark.parametrize(
    ("modes", "shape"),
    [(("1", "L", "LA"), (3, 4)), (("RGB", "P", "RGBA"), (3, 3, 4))],
    ids=["grey", "colour"],
)
def test_kinds_of_pixels(modes: tuple[str, ...], shape: tuple[int, ...], tmp_path: Path) -> None:
    for number in range(12):
        draw(tmp_path / f"{number}.png", 1, modes[number % 3])
    assert from_path(tmp_path).event_shape == shape


@pytest.mark.parametrize(
    ("mode", "size", "words"),
    [
        ("L", (5, 3), r"odd.png is 3x5 and grey, while .*0.png is 3x4 and grey; all images must have one size"),
        ("RGB", (4, 3), r"odd.png is 3x4 and in colour, while .*0.png is 3x4 and grey"),
        ("I;16", (4, 3), r"odd.png has pixels of mode 'I;16'; they must be 8-bit grey or colour"),
    ],
)
def test_the_odd_image_is_named(mode: str, size: tuple[int, int], words: str, tmp_path: Path) -> None:
    for number in range(12):
        draw(tmp_path / f"{number}.png", number)
    draw(tmp_path / "odd.png", 3, mode, size)
    with pytest.raises(DataError, match=words):
        from_path(tmp_path)


def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    for number in range(12):
        draw(tmp_path / f"{number}.png", number)
    whole = (tmp_path / "3.png").read_bytes()
    for content in (b"", b"text", whole[:40], whole[:45]):
        (tmp_path / "3.png").write_bytes(content)
        with pytest.raises(DataError, match=r"3.png cannot be read as an image"):
            from_path(tmp_path)


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no image; images end in .jpeg, .jpg, .png"):
        from_path(tmp_path)
    draw(tmp_path / "cat" / "0.png", 0)
    (tmp_path / "dog").mkdir()
    with pytest.raises(DataError, match=r"dog has no image"):
        from_path(tmp_path)
    draw(tmp_path / "0.png", 0)
    with pytest.raises(DataError, match=r"has images \(0.png, …\) beside subfolders \(cat, …\); use one"):
        from_path(tmp_path)


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"validation": 0}, "validation is 0; it must be a share"),
        ({"test": 1.0}, "test is 1.0; it must be a share"),
        ({"test": float("nan")}, "test is nan"),
        ({"test": "0.1"}, "test is '0.1'"),
        ({"validation": True}, "validation is True"),
        ({"validation": 0.5, "test": 0.5}, "leave nothing to train on"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"binarization": "bernoulli"}, "binarization is 'bernoulli'; allowed are: none, static, dynamic"),
        ({"labels": "y"}, "has no named columns or arrays"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=words):
        from_path(save(tmp_path, numbered(30, 2)), **arguments)


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"there is no file or folder '.*absent.npy'"):
        from_path(tmp_path / "absent.npy")
    (tmp_path / "a.txt").write_text("1,2")
    with pytest.raises(ArgumentError, match=r"ends in '.txt'; it must be a folder, or end in .csv, .npy, .npz"):
        from_path(tmp_path / "a.txt")


# ---------------------------------------------------------------- by name


def test_load_takes_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, np.full((40, 30), 0.5))
    expected = from_path(path, binarization="dynamic")
    monkeypatch.chdir(tmp_path)
    for name in (path, str(path), "a.npy", "./a.npy", Path("a.npy")):
        splits = datasets.load(name, binarization="dynamic")
        assert same(splits, expected)
        assert splits.name == splits.train.name == str(path)
    folder = tmp_path / "images"
    for number in range(10):
        draw(folder / f"{number}.png", number)
    assert datasets.load("images").name == str(folder)


@pytest.mark.parametrize("special", [{"seed": 3}, {"validation": 0.25, "labels": "what? & why"}, {"test": 1 / 3}])
def test_the_name_of_splits_loads_them_again(special: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, "size,weight,what? & why\n" + table(40), "my table?.csv")
    special = {"labels": "what? & why"} | special
    splits = from_path(path, **special)
    again = datasets.load(splits.name)
    assert again.name == splits.name != str(path)
    assert same(splits, again)
    assert json.loads(json.dumps(splits.describe()))["name"] == splits.name


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("sed=1", "asks for sed; allowed are: validation, test, seed, labels"),
        ("seed=one", "seed is 'one'"),
        ("validation=2", "validation is 2.0"),
        ("labels=kind", "has no named columns"),
    ],
)
def test_bad_queries(query: str, words: str, tmp_path: Path) -> None:
    path = save(tmp_path, numbered(30, 2))
    with pytest.raises(ArgumentError, match=words):
        datasets.load(f"{path}?{query}")


def test_load_of_a_path_that_is_not_there(tmp_path: Path) -> None:
    for name in ("absent.csv", "absent/digits", tmp_path / "absent"):
        with pytest.raises(ArgumentError, match="there is no file or folder"):
            datasets.load(name)
    with pytest.raises(ArgumentError, match="unknown data set 'absent'"):
        datasets.load("absent")
    with pytest.raises(ArgumentError, match="leave root out"):
        datasets.load(save(tmp_path, numbered(30, 2)), root=tmp_path)


def test_a_folder_does_not_hide_a_packaged_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert datasets.load("digits").name == "digits"


def test_own_file_in_a_fit(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).random((40, 6))
    splits = from_path(save(tmp_path, pixels), binarization="dynamic", seed=2)
    model = VAE((6,), latent_dim=2, hidden=[8])
    run = pyrovae.fit(model, AmortizedNormal(model), splits.train, validation=splits.validation, epochs=1, seed=0)
    assert run.config["data"]["name"] == splits.name
    assert same(datasets.load(run.config["data"]["name"], binarization="dynamic"), splits)
