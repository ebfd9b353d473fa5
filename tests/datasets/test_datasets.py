"""One contract for all data sets, then what is particular to each, then everything that can go wrong with files."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pyrovae import datasets
from pyrovae.datasets import Split, Splits, base, binarized_mnist, files, mnist
from pyrovae.errors import ArgumentError, CorruptFileError, DataError, DataUnavailableError

FOLDERS = {
    "mnist": "MNIST/raw",
    "fashion-mnist": "FashionMNIST/raw",
    "binarized-mnist": "binarized_mnist",
    "omniglot": "omniglot",
    "omniglot-105": "omniglot",
    "caltech-silhouettes": "caltech101_silhouettes",
    "frey-faces": "freyfaces",
    "olivetti": "olivetti",
    "cifar10": "cifar-10-batches-py",
    "cifar10-subset": "cifar10_subset",
}
DIGITS = ("mnist", "fashion-mnist", "binarized-mnist")
SIZES = dict.fromkeys(DIGITS, (50000, 10000, 10000)) | {
    "digits": (1197, 300, 300),
    "omniglot": (17352, 1928, 13180),
    "omniglot-105": (17352, 1928, 13180),
    "caltech-silhouettes": (4100, 2264, 2307),
    "frey-faces": (1565, 200, 200),
    "olivetti": (320, 40, 40),
    "cifar10": (45000, 5000, 10000),
    "cifar10-subset": (3200, 400, 400),
}
SHAPES = dict.fromkeys(SIZES, (28, 28)) | {
    "digits": (8, 8),
    "omniglot-105": (105, 105),
    "frey-faces": (28, 20),
    "olivetti": (64, 64),
    "cifar10": (3, 32, 32),
    "cifar10-subset": (3, 32, 32),
}
BINARY = ("binarized-mnist", "omniglot-105", "caltech-silhouettes")
GREY = ("frey-faces", "olivetti", "cifar10", "cifar10-subset")
ALLOWED = dict.fromkeys(SIZES, ("none", "static", "dynamic")) | dict.fromkeys(BINARY, ("static",))
DEFAULT = dict.fromkeys(SIZES, "dynamic") | dict.fromkeys(BINARY, "static") | dict.fromkeys(GREY, "none")
UNLABELLED = ("binarized-mnist", "frey-faces")
NOTED = ("caltech-silhouettes", "cifar10-subset")
CLASSES = dict.fromkeys(SIZES, 10) | {
    "omniglot": 1623,
    "omniglot-105": 1623,
    "caltech-silhouettes": 101,
    "olivetti": 40,
}
SLOW = ("omniglot",)  # read from 358 million pixels
LARGE = ("omniglot-105",)  # 1.5 GB: one test of its own, in test_more_datasets, loads it


def by_name(names: Iterable[str]) -> list[Any]:
    """Parameters of a test that loads the real files."""
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in names if name not in LARGE]


CASES = [
    pytest.param((name, binarization), marks=pytest.mark.slow if name in SLOW else (), id=f"{name}-{binarization}")
    for name in datasets.names()
    if name not in LARGE
    for binarization in ALLOWED[name]
]
# A standard normal exceeds this once in 1.7 million draws.
SIGMAS = 5.0


def data_folder(name: str) -> Path:
    """The folder with the real files of a data set, or a skip that says what is missing."""
    given = os.environ.get("PYROVAE_DATA")
    if not given:
        pytest.skip(f"PYROVAE_DATA is not set, so there are no files of {name}")
    folder = Path(given) / FOLDERS[name]
    if not folder.is_dir():
        pytest.skip(f"{FOLDERS[name]} is not below PYROVAE_DATA")
    return folder


def load(name: str, binarization: str | None = None) -> Splits:
    if name in FOLDERS:
        data_folder(name)
    return datasets.load(name, binarization=binarization)


def parts(splits: Splits) -> tuple[Split, Split, Split]:
    return splits.train, splits.validation, splits.test


@pytest.fixture(scope="module", params=CASES)
def splits(request: pytest.FixtureRequest) -> Splits:
    return load(*request.param)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


# ---------------------------------------------------------------- the contract


def test_every_data_set_is_under_test() -> None:
    assert set(datasets.names()) == set(SIZES)


def test_sizes_shapes_and_types(splits: Splits) -> None:
    assert tuple(len(split) for split in parts(splits)) == SIZES[splits.name]
    assert tuple(splits.event_shape) == SHAPES[splits.name]
    for split, size in zip(parts(splits), SIZES[splits.name], strict=True):
        assert split.x.dtype == torch.float32
        assert split.x.shape == (size, *SHAPES[splits.name])
        assert split.event_shape == split.x.shape[1:]
        assert split[0].shape == split.event_shape
        assert split[:3].shape == (3, *split.event_shape)


def test_labels(splits: Splits) -> None:
    for split in parts(splits):
        if splits.name in UNLABELLED:
            assert split.y is None
            assert splits.classes == ()
        else:
            assert split.y is not None
            assert split.y.dtype == torch.int64
            assert split.y.shape == (len(split),)
            assert len(splits.classes) == CLASSES[splits.name]
            if splits.name not in SLOW:  # whose test characters are others than those it trains on
                assert split.y.unique().tolist() == list(range(len(splits.classes)))


def test_support_and_marks(splits: Splits) -> None:
    held_out = "static" if splits.binarization == "dynamic" else splits.binarization
    assert [split.binarization for split in parts(splits)] == [splits.binarization, held_out, held_out]
    for split in parts(splits):
        if split.binarization == "static":
            assert torch.equal(split.x, split.x.bool().float())
            assert 0.05 < split.x.mean() < (0.65 if splits.name in (*GREY, "caltech-silhouettes") else 0.5)
        else:
            assert split.x.min() == 0 or splits.name in GREY
            assert split.x.max() == 1 or splits.name in GREY
            assert len(split.x[:100].unique()) > 10


@pytest.mark.slow
def test_every_load_gives_the_same_numbers_and_leaves_the_global_seed_alone(splits: Splits) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = datasets.load(splits.name, binarization=splits.binarization)
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(parts(splits), parts(again), strict=True):
        assert torch.equal(one.x, other.x)
        assert (one.y is None and other.y is None) or torch.equal(one.y, other.y)


def test_draws_differ_only_where_dynamic(splits: Splits) -> None:
    for split in parts(splits):
        rows = split.x[:50]
        if split.binarization == "dynamic":
            assert not torch.equal(split.draw(rows), split.draw(rows))
            assert split.draw(rows).unique().tolist() == [0.0, 1.0]
            assert split[:50].unique().tolist() == [0.0, 1.0]
        else:
            assert split.draw(rows) is rows
            assert torch.equal(split[7], split.x[7])


def test_dynamic_draws_follow_the_global_seed(splits: Splits) -> None:
    torch.manual_seed(3)
    one = splits.train[:20]
    torch.manual_seed(3)
    assert torch.equal(splits.train[:20], one)


def standardized(draws: torch.Tensor, p: torch.Tensor) -> float:
    """Sum of Bernoulli(p) draws (`k x *p.shape`), minus its mean, in standard deviations."""
    p = p.double()
    return float((draws.double() - p).sum() / (len(draws) * p * (1 - p)).sum().sqrt())


@pytest.mark.parametrize("name", by_name(name for name in datasets.names() if "dynamic" in ALLOWED[name]))
@pytest.mark.slow
def test_draws_have_the_intensities_as_mean(name: str) -> None:
    grey, static, dynamic = (load(name, binarization) for binarization in ("none", "static", "dynamic"))
    for intensity, pixels, held_out in zip(parts(grey), parts(static), parts(dynamic), strict=True):
        assert abs(standardized(pixels.x[None, :5000], intensity.x[:5000])) < SIGMAS
        if held_out is not dynamic.train:
            assert torch.equal(held_out.x, pixels.x)
    assert torch.equal(dynamic.train.x, grey.train.x)

    p = grey.train.x[:20]
    draws = torch.stack([dynamic.train[:20] for _ in range(400)])
    assert abs(standardized(draws, p)) < SIGMAS
    # Each pixel on its own: n squared z-values have mean n and, for these p and 400 draws, variance below 2.05 n.
    inner = (p > 0.05) & (p < 0.95)
    z = (draws.mean(0) - p)[inner] / (p * (1 - p) / len(draws))[inner].sqrt()
    assert abs(float((z**2).sum()) - len(z)) < SIGMAS * math.sqrt(2.05 * len(z))


@pytest.mark.parametrize("name", by_name(datasets.names()))
def test_defaults_and_description(name: str) -> None:
    line = datasets.describe(name)
    assert "\n" not in line
    assert "/".join(map(str, SIZES[name])) in line
    described = load(name).describe()
    assert json.loads(json.dumps(described)) == described
    assert bool(described.pop("note", "")) == (name in NOTED)
    assert described == {
        "name": name,
        "binarization": DEFAULT[name],
        "sizes": dict(zip(("train", "validation", "test"), SIZES[name], strict=True)),
        "event_shape": list(SHAPES[name]),
    }


def test_works_with_a_data_loader() -> None:
    train = load("digits").train
    batches = list(DataLoader(train, batch_size=500))
    assert [batch.shape for batch in batches] == [(500, 8, 8), (500, 8, 8), (197, 8, 8)]


@pytest.mark.parametrize("name", ["mnits", "", None])
def test_unknown_name(name: str) -> None:
    for function in (datasets.load, datasets.describe):
        with pytest.raises(ArgumentError, match="unknown data set") as caught:
            function(name)
        assert all(known in str(caught.value) for known in datasets.names())
        if name == "mnits":
            assert "did you mean 'mnist'" in str(caught.value)


@pytest.mark.parametrize("name", datasets.names())
@pytest.mark.parametrize("binarization", ["stochastic", "Static", ""])
def test_unknown_binarization(name: str, binarization: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        datasets.load(name, binarization=binarization)
    assert repr(binarization) in str(caught.value)
    assert str(caught.value).endswith(f"allowed: {', '.join(ALLOWED[name])}")


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("binarization", ["none", "dynamic"])
def test_binary_data_say_why_they_are_only_static(name: str, binarization: str) -> None:
    with pytest.raises(ArgumentError, match=r"(are|is) (already )?binary.*allowed: static"):
        datasets.load(name, binarization=binarization)


@pytest.mark.parametrize("name", datasets.names())
def test_root_is_not_a_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"root is '.*absent', which is not a folder"):
        datasets.load(name, root=tmp_path / "absent")


# ---------------------------------------------------------------- Split


@pytest.mark.parametrize(
    ("x", "y", "binarization", "error", "words"),
    [
        (torch.rand(3, 2), None, "bernoulli", ArgumentError, "'bernoulli'; allowed are: none, static, dynamic"),
        (torch.rand(3, 2).double(), None, "none", DataError, "float64"),
        (torch.rand(3), None, "none", DataError, r"shape \(3,\)"),
        (torch.rand(0, 2), None, "none", DataError, "not empty"),
        (torch.tensor([[0.5, 1.5]]), None, "dynamic", DataError, r"\[0.5, 1.5\].*\(dynamic\) must be in \[0, 1\]"),
        (torch.tensor([[0.0, 2.0]]), None, "static", DataError, r"\[0, 2\].*\(static\) must be in \[0, 1\]"),
        (torch.tensor([[float("inf"), 0.5]]), None, "none", DataError, "finite"),
        (torch.tensor([[float("nan"), 0.5]]), None, "none", DataError, "finite"),
        (torch.tensor([[-1.0, 0.5]]), None, "dynamic", DataError, r"\[-1, 0.5\]"),
        (torch.tensor([[float("nan"), 0.5]]), None, "dynamic", DataError, "finite"),
        (torch.tensor([[0.0, 0.5]]), None, "static", DataError, "0 or 1"),
        (torch.rand(3, 2), torch.zeros(2, dtype=torch.int64), "none", DataError, r"shape \(3,\)"),
        (torch.rand(3, 2), torch.zeros(3), "none", DataError, "int64"),
    ],
)
def test_split_refuses(x: torch.Tensor, y: object, binarization: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Split(x, y, binarization)


def test_split_that_is_not_binarized_holds_any_finite_numbers() -> None:
    x = torch.tensor([[-3.0, 0.5], [1e6, 2.0]])
    assert torch.equal(Split(x, None, "none")[1], x[1])
    for binarization in ("static", "dynamic"):
        with pytest.raises(DataError, match="must be in"):
            base.make_splits("wide", [x] * 3, [None] * 3, (), binarization)


def test_random_rows_are_a_partition_and_stratified() -> None:
    y = torch.arange(300) % 3
    rows = base.random_rows(300, 60, 30, seed=1, stratify=y)
    assert [y[part].bincount().tolist() for part in rows] == [[70] * 3, [20] * 3, [10] * 3]
    assert torch.equal(torch.cat(rows).sort().values, torch.arange(300))
    assert all(torch.equal(part, part.sort().values) for part in rows)
    again, other = (base.random_rows(300, 60, 30, seed=seed, stratify=y) for seed in (1, 2))
    assert torch.equal(rows[2], again[2])
    assert not torch.equal(rows[2], other[2])


def test_split_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Split(torch.rand(3, 2), None, "none").binarization = "dynamic"


def test_static_pixels_of_a_split_do_not_depend_on_the_others() -> None:
    grey = [torch.full((n, 4, 4), 0.5) for n in (6, 5, 5)]
    small = [grey[0][:2], *grey[1:]]
    one, other = (base.make_splits("grey", images, [None] * 3, (), "static") for images in (grey, small))
    assert torch.equal(one.test.x, other.test.x)
    assert not torch.equal(one.validation.x, one.test.x)


# ---------------------------------------------------------------- each data set


def test_digits_splits_are_stratified_and_a_partition() -> None:
    from sklearn.datasets import load_digits

    digits = load("digits", "none")
    pixels, labels = load_digits(return_X_y=True)
    share = torch.from_numpy(labels).bincount() / len(labels)
    for split in parts(digits):
        assert (split.y.bincount() - share * len(split)).abs().max() < 2
    found = np.concatenate([np.c_[split.x.flatten(1) * 16, split.y] for split in parts(digits)])
    expected = np.c_[pixels, labels]
    assert np.array_equal(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)])


def test_digits_need_no_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYROVAE_DATA", str(tmp_path / "absent"))
    assert len(datasets.load("digits").train) == 1197


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_files_are_split_in_order(name: str) -> None:
    folder = data_folder(name)
    splits = load(name, "none")

    def idx(file: str, header: int) -> np.ndarray:
        return np.fromfile(folder / file, dtype=np.uint8)[header:]

    train, test = idx("train-images-idx3-ubyte", 16).reshape(-1, 28, 28), idx("t10k-images-idx3-ubyte", 16)
    for split, expected in zip(parts(splits), (train[:50_000], train[50_000:], test), strict=True):
        for row in (0, len(split) - 1):
            pixels = torch.from_numpy(expected.reshape(-1, 28, 28)[row].copy())
            assert torch.equal((split.x[row] * 255).round().to(torch.uint8), pixels)
    labels = np.concatenate([idx("train-labels-idx1-ubyte", 8), idx("t10k-labels-idx1-ubyte", 8)])
    assert np.array_equal(torch.cat([split.y for split in parts(splits)]).numpy(), labels)


def test_first_labels_name_what_the_images_show() -> None:
    splits = load("mnist", "none")
    assert [splits.classes[label] for label in splits.train.y[:10]] == list("5041921314")
    clothes = load("fashion-mnist", "none")
    assert [clothes.classes[label] for label in clothes.train.y[:3]] == ["Ankle boot", "T-shirt/top", "T-shirt/top"]


def test_binarized_mnist_is_the_text_of_its_files() -> None:
    folder = data_folder("binarized-mnist")
    splits = load("binarized-mnist")
    for split, part in zip(parts(splits), ("train", "valid", "test"), strict=True):
        path = folder / f"binarized_mnist_{part}.amat"
        # loadtxt reads gzipped files too
        expected = np.loadtxt(path if path.exists() else f"{path}.gz", max_rows=20)
        assert np.array_equal(split.x[:20].flatten(1).numpy(), expected)


# ---------------------------------------------------------------- files


@pytest.fixture
def tiny(network: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Texts of a binarized MNIST of 3, 2 and 2 images, which the loader takes for the published one."""
    generator = np.random.default_rng(0)
    texts, specifications = {}, []
    for part, rows in zip(binarized_mnist._PARTS, (3, 2, 2), strict=True):
        pixels = generator.integers(0, 2, (rows, 784))
        text = "".join(" ".join(map(str, row)) + "\n" for row in pixels).encode()
        texts[part.file] = text
        specifications.append(specification(part.file, rows, text))
    monkeypatch.setattr(binarized_mnist, "_PARTS", tuple(specifications))
    return texts


def specification(file: str, rows: int, text: bytes) -> binarized_mnist._Part:
    zipped = gzip.compress(text, mtime=0)
    return binarized_mnist._Part(file, rows, *(hashlib.sha256(data).hexdigest() for data in (text, zipped)))


def write(texts: dict[str, bytes], root: Path, ending: str = "") -> Path:
    folder = root / "binarized_mnist"
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        (folder / (file + ending)).write_bytes(gzip.compress(text, mtime=0) if ending else text)
    return folder


class Response(io.BytesIO):
    """An answer of a server, which may not say how long it is."""

    length: int | None = None


def serve(monkeypatch: pytest.MonkeyPatch, texts: dict[str, bytes]) -> None:
    def urlopen(url: str, timeout: float) -> Response:
        response = Response(texts[url.rsplit("/", 1)[1]])
        response.length = None if "test" in url else len(response.getbuffer())
        return response

    monkeypatch.setattr("urllib.request.urlopen", urlopen)


@pytest.mark.parametrize("name", DIGITS)
@pytest.mark.parametrize("given", [True, False], ids=["root", "cache"])
def test_missing_files_and_no_network(name: str, given: bool, network: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataUnavailableError) as caught:
        datasets.load(name, root=tmp_path if given else None)
    message = str(caught.value)
    folder = tmp_path if given else tmp_path / "cache" / "pyrovae"
    assert f"not found below {folder}, and the download to {folder} failed" in message
    assert "Name or service not known" in message
    assert "\n" not in message
    assert "PYROVAE_DATA" in message
    source = "yann.lecun.com" if name == "mnist" else "zalandoresearch" if "fashion" in name else "larocheh"
    assert source in message
    wanted = ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
    for file in ["_train.amat", "_test.amat"] if name == "binarized-mnist" else wanted:
        assert file in message
    assert FOLDERS[name] in message
    assert network  # it did try
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", FOLDERS)
def test_data_variable_is_not_a_folder(
    name: str, network: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYROVAE_DATA", str(tmp_path / "absent"))
    with pytest.raises(ArgumentError, match=r"PYROVAE_DATA is '.*absent', which is not a folder"):
        datasets.load(name)
    assert not network


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_damaged_idx_file(name: str, damage: str, network: list[str], tmp_path: Path) -> None:
    spec = mnist._MNIST if name == "mnist" else mnist._FASHION_MNIST
    folder = tmp_path / FOLDERS[name]
    folder.mkdir(parents=True)
    for file in spec.sha256:
        (folder / file).write_bytes(b"" if damage == "truncated" else b"\0\0\x08\x01 not what was published")
    with pytest.raises(CorruptFileError) as caught:
        datasets.load(name, root=tmp_path)
    bad = folder / "train-images-idx3-ubyte"
    for word in (str(bad), spec.sha256[bad.name], hashlib.sha256(bad.read_bytes()).hexdigest(), "delete it"):
        assert word in str(caught.value)
    assert not network


def test_damage_in_the_last_idx_file_is_found(tmp_path: Path) -> None:
    """Real images beside a label file with two labels exchanged, which has the right size."""
    source = data_folder("mnist")
    folder = tmp_path / FOLDERS["mnist"]
    folder.mkdir(parents=True)
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)
    labels = bytearray((source / "t10k-labels-idx1-ubyte").read_bytes())
    labels[8], labels[9] = labels[9], labels[8]
    (folder / "t10k-labels-idx1-ubyte").unlink()
    (folder / "t10k-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(CorruptFileError, match="t10k-labels-idx1-ubyte is truncated or altered"):
        datasets.load("mnist", root=tmp_path)


def test_mnist_download_arrives_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torchvision.datasets import MNIST

    source = data_folder("mnist")
    monkeypatch.delenv("PYROVAE_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fetch(self: MNIST) -> None:
        Path(self.raw_folder).mkdir(parents=True)
        for file in mnist._MNIST.sha256:
            (Path(self.raw_folder) / file).write_bytes((source / file).read_bytes())
            (Path(self.raw_folder) / f"{file}.gz").write_bytes(b"left over")

    def fail_midway(self: MNIST) -> None:
        Path(self.raw_folder).mkdir(parents=True)
        (Path(self.raw_folder) / "train-images-idx3-ubyte").write_bytes(b"half")
        raise RuntimeError("connection reset")

    monkeypatch.setattr(MNIST, "download", fail_midway)
    with pytest.raises(DataUnavailableError, match="connection reset"):
        datasets.load("mnist")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]

    monkeypatch.setattr(MNIST, "download", fetch)
    assert len(datasets.load("mnist", binarization="none").train) == 50_000
    found = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {tmp_path / "pyrovae" / "MNIST" / "raw" / file for file in mnist._MNIST.sha256}


@pytest.mark.parametrize("endings", [("",), (".gz",), ("", ".gz")], ids=["plain", "gzip", "both"])
def test_amat_plain_and_gzipped(endings: tuple[str, ...], tiny: dict[str, bytes], tmp_path: Path) -> None:
    for ending in endings:
        write(tiny, tmp_path, ending)
    splits = datasets.load("binarized-mnist", root=tmp_path)
    for split, text in zip(parts(splits), tiny.values(), strict=True):
        expected = np.loadtxt(io.BytesIO(text))
        assert np.array_equal(split.x.flatten(1).numpy(), expected)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_truncated_amat(ending: str, tiny: dict[str, bytes], network: list[str], tmp_path: Path) -> None:
    path = write(tiny, tmp_path, ending) / f"binarized_mnist_valid.amat{ending}"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptFileError, match="truncated or altered") as caught:
        datasets.load("binarized-mnist", root=tmp_path)
    part = binarized_mnist._PARTS[1]
    for word in (str(path), part.gzip_sha256 if ending else part.text_sha256, files.sha256(path), "delete it"):
        assert word in str(caught.value)
    assert not network


@pytest.mark.parametrize("bad", ["2", "-", "x", "\t"])
def test_amat_with_other_characters(bad: str, tiny: dict[str, bytes], tmp_path: Path) -> None:
    path = write(tiny, tmp_path) / "binarized_mnist_train.amat"
    path.write_bytes(bad.encode() + path.read_bytes()[1:])
    with pytest.raises(CorruptFileError, match=r"train.amat has characters other than 0, 1"):
        binarized_mnist._read(path, 3)


@pytest.mark.parametrize("text", [b"", b"0 1\n", b"0 " * 784 * 2])
def test_amat_with_another_number_of_values(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.amat"
    path.write_bytes(text)
    with pytest.raises(CorruptFileError, match=rf"has {len(text) // 2} values, expected 3 rows of 784"):
        binarized_mnist._read(path, 3)


@pytest.mark.parametrize("damage", ["truncated", "not gzip", "altered"])
def test_gzip_that_cannot_be_read(damage: str, tmp_path: Path) -> None:
    zipped = bytearray(gzip.compress(b"0 1 " * 784))
    zipped[15] ^= 0xFF
    bad = {"truncated": gzip.compress(b"0 1 " * 784)[:-12], "not gzip": b"0 1\n", "altered": bytes(zipped)}
    path = tmp_path / "a.amat.gz"
    path.write_bytes(bad[damage])
    with pytest.raises(CorruptFileError, match="not a complete gzip file"):
        binarized_mnist._read(path, 2)


def test_download_to_the_cache(tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    serve(monkeypatch, tiny)
    splits = datasets.load("binarized-mnist")
    assert [len(split) for split in parts(splits)] == [3, 2, 2]
    folder = tmp_path / "cache" / "pyrovae" / "binarized_mnist"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == tiny
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("downloaded what was there"))
    assert torch.equal(datasets.load("binarized-mnist").test.x, splits.test.x)


def test_download_of_something_else(tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    serve(monkeypatch, {file: text[:-2] for file, text in tiny.items()})
    with pytest.raises(CorruptFileError, match=r"http://.*_train.amat sent a file.*nothing was kept") as caught:
        datasets.load("binarized-mnist")
    assert binarized_mnist._PARTS[0].text_sha256 in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_download_interrupted(tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Interrupted(Response):
        length = 10_000

        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                raise ConnectionResetError("reset by peer")
            return super().read(100)

    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: Interrupted(b"0 " * 5000))
    with pytest.raises(DataUnavailableError, match="ConnectionResetError: reset by peer"):
        datasets.load("binarized-mnist")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("writable", [True, False])
def test_where_downloads_go(
    writable: bool, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    monkeypatch.setenv("PYROVAE_DATA", str(data))
    monkeypatch.setattr(os, "access", lambda path, mode: writable)
    serve(monkeypatch, tiny)
    datasets.load("binarized-mnist")
    target = data if writable else tmp_path / "cache" / "pyrovae"
    assert sorted(path.name for path in tmp_path.rglob("*.amat")) == sorted(tiny)
    assert sorted(path.name for path in (target / "binarized_mnist").iterdir()) == sorted(tiny)


def test_order_of_roots(
    tiny: dict[str, bytes], network: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data, given = tmp_path / "data", tmp_path / "given"
    given.mkdir()
    write(tiny, tmp_path / "cache" / "pyrovae")
    assert len(datasets.load("binarized-mnist").train) == 3  # from the cache
    write(dict.fromkeys(tiny, b"bad"), data)
    monkeypatch.setenv("PYROVAE_DATA", str(data))
    with pytest.raises(CorruptFileError, match="data/binarized_mnist"):  # the variable comes before the cache
        datasets.load("binarized-mnist")
    with pytest.raises(DataUnavailableError):  # the argument leaves both out
        datasets.load("binarized-mnist", root=given)
    assert len(network) == 1


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert files.cache() == tmp_path / ".cache" / "pyrovae"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache() == tmp_path / "xdg" / "pyrovae"


def test_a_file_is_hashed_once_until_it_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    first = files.sha256(path)
    assert first == hashlib.sha256(b"one").hexdigest()
    misses = files._sha256.cache_info().misses
    assert files.sha256(path) == first
    assert files._sha256.cache_info().misses == misses
    path.write_bytes(b"another")
    assert files.sha256(path) == hashlib.sha256(b"another").hexdigest()


def test_labels_come_with_the_data_where_they_are_asked_for() -> None:
    """All of them, or some of each class; pixels are still drawn anew."""
    train = datasets.load("digits").train
    whole = train.labelled()
    x, y = whole[torch.arange(50)]
    assert torch.equal(y, train.y[:50])
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(x, whole[torch.arange(50)][0])
    some = train.labelled(23, seed=1)
    counts = some.y[some.y >= 0].bincount(minlength=10)
    assert int(counts.sum()) == 23
    assert int(counts.max()) - int(counts.min()) == 1
    assert torch.equal(some.y[some.y >= 0], train.y[some.y >= 0])
    assert torch.equal(some.y, train.labelled(23, seed=1).y)
    assert not torch.equal(some.y, train.labelled(23, seed=2).y)
    with pytest.raises(DataError, match="has no labels"):
        Split(torch.ones(3, 2), None, "none").labelled()
    with pytest.raises(DataError, match="count is 2000, but there are 1197 labels"):
        train.labelled(2000)
