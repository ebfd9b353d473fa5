"""What is particular to Omniglot, silhouettes, faces and CIFAR-10; their common contract is in test_datasets."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import loadmat, savemat

from pyrovae import datasets
from pyrovae.datasets import Splits, cifar10, files, omniglot
from pyrovae.errors import CorruptFileError, DataUnavailableError

FILES = {
    "omniglot": omniglot._BACKGROUND.path,
    "caltech-silhouettes": "caltech101_silhouettes/caltech101_silhouettes_28.mat",
    "frey-faces": "freyfaces/frey_rawface.mat",
    "olivetti": "olivetti/olivettifaces.mat",
    "cifar10-subset": "cifar10_subset/data_batch_1_first4000.bin",
}
_DATA = os.environ.get("PYROVAE_DATA")  # which some fixtures take away
NOT_DOWNLOADED = ("frey-faces", "olivetti", "cifar10-subset")


def real(name: str) -> Path:
    """The published file of a data set, or a skip that says what is missing."""
    if not _DATA:
        pytest.skip(f"PYROVAE_DATA is not set, so there are no files of {name}")
    path = Path(_DATA) / FILES[name]
    if not path.is_file():
        pytest.skip(f"{FILES[name]} is not below PYROVAE_DATA")
    return path


def sorted_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows of 8-bit intensities, in the order of their values."""
    pixels = (x.flatten(1) * 255).round().to(torch.uint8).numpy()
    return torch.from_numpy(pixels[np.lexsort(pixels.T[::-1])])


def whole(splits: Splits) -> torch.Tensor:
    return torch.cat([splits.train.x, splits.validation.x, splits.test.x])


# ---------------------------------------------------------------- Omniglot


def test_reduction_is_the_mean_over_areas() -> None:
    """Against pixels cut in 4 x 4, of which 15 x 15 make a reduced one."""
    ink = torch.rand(7, 105, 105, generator=torch.Generator().manual_seed(0)) < 0.1
    ink[0], ink[1] = True, False
    cut = np.kron(ink.numpy(), np.ones((4, 4)))
    expected = cut.reshape(7, 28, 15, 28, 15).sum((2, 4)) / 225
    found = omniglot.reduce(ink)
    assert np.array_equal(found.numpy(), expected.astype(np.float32))
    assert found[0].unique().tolist() == [1.0]
    assert found[1].unique().tolist() == [0.0]


def test_reduction_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    ink = torch.rand(7, 105, 105, generator=torch.Generator().manual_seed(0)) < 0.1
    once = omniglot.reduce(ink)
    monkeypatch.setattr(omniglot, "_CHUNK", 3)
    assert torch.equal(omniglot.reduce(ink), once)


@pytest.fixture
def tiny(network: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[np.ndarray]:
    """An Omniglot of 3 + 2 characters below ``tmp_path``, which the loader takes for the published one."""
    generator = np.random.default_rng(0)
    (tmp_path / "omniglot").mkdir()
    papers = []
    for variable, count in (("_BACKGROUND", 3), ("_EVALUATION", 2)):
        paper = generator.random((count, 20, 105, 105)) < 0.9
        file = getattr(omniglot, variable)
        np.savez_compressed(tmp_path / file.path, images=paper)
        sha256 = hashlib.sha256((tmp_path / file.path).read_bytes()).hexdigest()
        monkeypatch.setattr(omniglot, variable, files.PublishedFile(file.path, sha256, file.url))
        papers.append(paper)
    monkeypatch.setattr(omniglot, "_CHARACTERS", (3, 2))
    return papers


def test_omniglot_is_split_by_drawer_and_alphabet(tiny: list[np.ndarray], tmp_path: Path) -> None:
    splits = datasets.load("omniglot-105", root=tmp_path)
    background, evaluation = (torch.from_numpy(~paper).float() for paper in tiny)
    assert torch.equal(splits.train.x, background[:, :18].flatten(0, 1))
    assert torch.equal(splits.validation.x, background[:, 18:].flatten(0, 1))
    assert torch.equal(splits.test.x, evaluation.flatten(0, 1))
    assert splits.train.y.tolist() == [0] * 18 + [1] * 18 + [2] * 18
    assert splits.validation.y.tolist() == [0, 0, 1, 1, 2, 2]
    assert splits.test.y.tolist() == [3] * 20 + [4] * 20
    assert splits.classes == ("0001", "0002", "0003", "0004", "0005")


def test_omniglot_is_the_large_one_reduced(tiny: list[np.ndarray], tmp_path: Path) -> None:
    large, small = (
        datasets.load("omniglot-105", root=tmp_path),
        datasets.load("omniglot", binarization="none", root=tmp_path),
    )
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(small, part).x, omniglot.reduce(getattr(large, part).x.bool()))
        assert torch.equal(getattr(small, part).y, getattr(large, part).y)
    steps = small.train.x * 225
    assert (steps - steps.round()).abs().max() < 1e-4


@pytest.mark.parametrize("variable", ["_BACKGROUND", "_EVALUATION"])
def test_omniglot_altered(variable: str, tiny: list[np.ndarray], network: list[str], tmp_path: Path) -> None:
    path = tmp_path / getattr(omniglot, variable).path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptFileError, match=rf"{path.name} is truncated or altered"):
        datasets.load("omniglot", root=tmp_path)
    assert not network


@pytest.mark.parametrize("content", [b"", b"no archive", {"labels": np.zeros(3)}, {"images": np.zeros((3, 20, 2, 2))}])
def test_omniglot_file_that_cannot_be_read(content: bytes | dict[str, np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    with pytest.raises(CorruptFileError, match=r"images.npz .*delete it and load again"):
        omniglot._read(path, 3)


@pytest.mark.slow
def test_omniglot_shows_the_published_drawings() -> None:
    path = real("omniglot")
    splits = datasets.load("omniglot", binarization="none")
    with np.load(path) as archive:
        paper, labels = archive["images"][[0, 500, 963]], archive["labels"][[0, 500, 963]]
    for drawings, numbers in zip(paper, labels, strict=True):
        number = int(numbers[0])
        cut = np.kron(~drawings, np.ones((4, 4))).reshape(20, 28, 15, 28, 15).sum((2, 4)) / 225
        for split, expected in ((splits.train, cut[:18]), (splits.validation, cut[18:])):
            assert np.array_equal(split.x[split.y == number].numpy(), expected.astype(np.float32))
    assert not set(splits.test.y.tolist()) & set(splits.train.y.tolist())


@pytest.mark.slow
def test_large_omniglot_is_every_pixel_of_its_files() -> None:
    path = real("omniglot")
    splits = datasets.load("omniglot-105")
    assert splits.describe() == {
        "name": "omniglot-105",
        "binarization": "static",
        "sizes": {"train": 17352, "validation": 1928, "test": 13180},
        "event_shape": [105, 105],
    }
    with np.load(path.with_name("images_evaluation.npz")) as archive:
        assert np.array_equal(splits.test.x.bool().logical_not().view(659, 20, 105, 105).numpy(), archive["images"])
    assert len(splits.classes) == 1623
    assert splits.train.y.bincount().tolist() == [18] * 964


# ---------------------------------------------------------------- silhouettes


def test_silhouettes_are_a_stratified_partition_of_the_file() -> None:
    content = loadmat(real("caltech-silhouettes"))
    splits = datasets.load("caltech-silhouettes")
    upright = content["X"].reshape(-1, 28, 28).transpose(0, 2, 1).copy()
    assert torch.equal(sorted_rows(whole(splits)), sorted_rows(torch.from_numpy(upright).float()))

    labels = torch.from_numpy(content["Y"][0].astype(np.int64)) - 1
    share = labels.bincount() / len(labels)
    for split in (splits.train, splits.validation, splits.test):
        assert (split.y.bincount() - share * len(split)).abs().max() < 2
    assert splits.classes[0] == "Airplanes Side 2"
    assert splits.classes[-1] == "yin yang"
    # An aeroplane is wider than high: it fills more columns than rows.
    planes = 1 - splits.train.x[splits.train.y == 0].mean(0)
    assert (planes.sum(0) > 5).sum() > (planes.sum(1) > 5).sum()
    assert "not the split" in splits.note


# ---------------------------------------------------------------- faces


@pytest.mark.parametrize("name", ["frey-faces", "olivetti", "cifar10-subset"])
def test_intensities_are_256ths_exactly(name: str) -> None:
    real(name)
    x = whole(datasets.load(name))
    assert torch.equal((x.double() * 255).round().to(torch.uint8).float() / 255, x)
    assert 0 <= x.min() < 0.05
    assert 0.9 < x.max() <= 1


def test_frey_faces_are_a_partition_of_the_film() -> None:
    frames = torch.from_numpy(loadmat(real("frey-faces"))["ff"].T.copy())
    splits = datasets.load("frey-faces")
    assert torch.equal(sorted_rows(whole(splits)), sorted_rows(frames.float() / 255))
    assert torch.equal((splits.train.x[0] * 255).round().to(torch.uint8).flatten(), frames[0])
    # Frames of a film are near each other, and those that test are spread over all of it.
    near = torch.cdist(splits.test.x.flatten(1), splits.train.x.flatten(1)).min(1).values
    among = torch.cdist(splits.test.x.flatten(1), splits.train.x.flatten(1)).median()
    assert near.median() < 0.5 * among


def test_olivetti_has_each_person_in_each_split() -> None:
    faces = loadmat(real("olivetti"))["faces"]
    splits = datasets.load("olivetti")
    assert splits.train.y.bincount().tolist() == [8] * 40
    assert splits.validation.y.tolist() == splits.test.y.tolist() == list(range(40))
    assert splits.classes == tuple(str(person) for person in range(1, 41))
    for person in (0, 17, 39):
        for split, row, picture in ((splits.train, 8 * person + 3, 3), (splits.test, person, 9)):
            expected = faces[:, 10 * person + picture].reshape(64, 64).T
            assert np.array_equal((split.x[row] * 255).round().numpy(), expected)


def changed(name: str, folder: Path, alter: bool) -> Path:
    """The faces saved anew below ``folder``, in other bytes, with one pixel altered if asked for."""
    variable = "ff" if name == "frey-faces" else "faces"
    pixels = loadmat(real(name))[variable]
    if alter:
        pixels[5, 7] ^= 1
    path = folder / FILES[name]
    path.parent.mkdir()
    savemat(path, {variable: pixels, "other": np.zeros(3)}, do_compression=True)
    return path


@pytest.mark.parametrize("name", ["frey-faces", "olivetti"])
def test_the_pixels_of_faces_are_checked_and_not_their_file(name: str, tmp_path: Path) -> None:
    changed(name, tmp_path, alter=False)
    assert torch.equal(datasets.load(name, root=tmp_path).test.x, datasets.load(name).test.x)


@pytest.mark.parametrize("name", ["frey-faces", "olivetti"])
def test_an_altered_pixel_of_a_face(name: str, tmp_path: Path) -> None:
    path = changed(name, tmp_path, alter=True)
    with pytest.raises(CorruptFileError, match=r"has other content than published.*roweis/data/"):
        datasets.load(name, root=tmp_path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CorruptFileError, match="is not a MATLAB file with a variable"):
        datasets.load(name, root=tmp_path)


@pytest.mark.parametrize("content", [b"", b"x" * 200, b"MATLAB 5.0 MAT-file".ljust(126) + b"\x01IM" + b"\xff" * 99])
def test_no_matlab_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / FILES["olivetti"]
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match="is not a MATLAB file with a variable 'faces'"):
        datasets.load("olivetti", root=tmp_path)


@pytest.mark.parametrize("array", [np.zeros((2, 2), np.uint8), np.zeros((560, 1965)), np.zeros((560, 1965), np.uint8)])
def test_matlab_file_with_other_arrays(array: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / FILES["frey-faces"]
    path.parent.mkdir()
    savemat(path, {"ff": array})
    with pytest.raises(CorruptFileError, match=r"expected uint8 of shape \(560, 1965\)"):
        datasets.load("frey-faces", root=tmp_path)


# ---------------------------------------------------------------- CIFAR-10


def test_cifar10_subset_is_its_records() -> None:
    records = np.fromfile(real("cifar10-subset"), dtype=np.uint8).reshape(4000, 3073)
    splits = datasets.load("cifar10-subset")
    assert np.array_equal((whole(splits) * 255).round().flatten(1).numpy(), records[:, 1:])
    labels = torch.cat([splits.train.y, splits.validation.y, splits.test.y])
    assert np.array_equal(labels.numpy(), records[:, 0])
    # As everybody knows who has looked at them: a frog, two lorries, a deer and two cars.
    shown = [splits.classes[label] for label in splits.train.y[:6]]
    assert shown == ["frog", "truck", "truck", "deer", "automobile", "automobile"]


def test_cifar10_falls_back_on_its_subset_and_says_so(network: list[str], tmp_path: Path) -> None:
    source = real_subset(tmp_path)
    splits = datasets.load("cifar10", root=source)
    assert splits.name == splits.train.name == "cifar10-subset"
    assert "first 4000" in splits.note
    assert splits.describe()["note"] == splits.note
    assert splits.describe()["sizes"] == {"train": 3200, "validation": 400, "test": 400}
    assert torch.equal(datasets.load(splits.name, root=source).test.x, splits.test.x)
    assert "subset" in datasets.describe("cifar10")
    assert not network


def real_subset(folder: Path) -> Path:
    """A folder with the subset and nothing else."""
    path = folder / FILES["cifar10-subset"]
    path.parent.mkdir(parents=True)
    path.symlink_to(real("cifar10-subset"))
    return folder


@pytest.fixture
def full(network: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, np.ndarray]:
    """A CIFAR-10 of 5 x 4 + 3 images below ``tmp_path``, laid out as the published one and taken for it."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / cifar10._FOLDER
    folder.mkdir()
    generator = np.random.default_rng(0)
    md5, pixels = {}, {}
    for file in cifar10._MD5:
        if file == "batches.meta":
            content = {"label_names": list(cifar10._CLASSES)}
        else:
            count = 3 if file == "test_batch" else 4
            pixels[file] = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
            content = {"data": pixels[file], "labels": [int(label) for label in pixels[file][:, 0] % 10]}
        (folder / file).write_bytes(pickle.dumps(content))
        md5[file] = hashlib.md5((folder / file).read_bytes()).hexdigest()
    monkeypatch.setattr(cifar10, "_MD5", md5)
    monkeypatch.setattr(cifar10, "_TRAIN_SIZE", 18)
    monkeypatch.setattr(CIFAR10, "train_list", [[file, md5[file]] for file in md5 if file.startswith("data_")])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"]})
    return pixels


def test_published_md5_are_those_that_torchvision_knows() -> None:
    from torchvision.datasets import CIFAR10

    known = dict((*CIFAR10.train_list, *CIFAR10.test_list))
    assert known | {CIFAR10.meta["filename"]: CIFAR10.meta["md5"]} == cifar10._MD5


def test_full_cifar10_is_read_in_order(full: dict[str, np.ndarray], tmp_path: Path) -> None:
    real_subset(tmp_path)  # which is not taken where there is more
    splits = datasets.load("cifar10", root=tmp_path)
    assert (splits.name, splits.note, splits.binarization) == ("cifar10", "", "none")
    train = np.concatenate([full[f"data_batch_{number}"] for number in range(1, 6)])
    for split, expected in (
        (splits.train, train[:18]),
        (splits.validation, train[18:]),
        (splits.test, full["test_batch"]),
    ):
        assert split.event_shape == (3, 32, 32)
        assert np.array_equal((split.x * 255).round().flatten(1).numpy(), expected)
        assert np.array_equal(split.y.numpy(), expected[:, 0] % 10)


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_damaged_cifar10_is_never_unpickled(
    file: str, full: dict[str, np.ndarray], network: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / cifar10._FOLDER / file
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    monkeypatch.setattr(pickle, "load", lambda *a, **k: pytest.fail("unpickled"))
    with pytest.raises(CorruptFileError, match=rf"{file} is truncated or altered.*delete it"):
        datasets.load("cifar10", root=tmp_path)
    assert not network


def test_cifar10_download_arrives_whole(
    full: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torchvision.datasets import CIFAR10

    source, target = tmp_path / cifar10._FOLDER, tmp_path / "target"
    target.mkdir()

    def fetch(self: CIFAR10) -> None:
        shutil.copytree(source, Path(self.root) / cifar10._FOLDER)
        (Path(self.root) / "cifar-10-python.tar.gz").write_bytes(b"left over")

    def fail_midway(self: CIFAR10) -> None:
        (Path(self.root) / "cifar-10-python.tar.gz").write_bytes(b"half")
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(CIFAR10, "download", fail_midway)
    with pytest.raises(DataUnavailableError, match="not found or corrupted"):
        datasets.load("cifar10", root=target)
    assert not list(target.rglob("*"))

    monkeypatch.setattr(CIFAR10, "download", fetch)
    assert len(datasets.load("cifar10", root=target).test) == 3
    found = {path for path in target.rglob("*") if path.is_file()}
    assert found == {target / cifar10._FOLDER / file for file in cifar10._MD5}


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", [*FILES, "omniglot-105", "cifar10"])
def test_missing_files_and_no_network(name: str, network: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataUnavailableError) as caught:
        datasets.load(name, root=tmp_path)
    message = str(caught.value)
    assert f"data set {name!r} was not found below {tmp_path}, and" in message
    assert "\n" not in message
    assert "PYROVAE_DATA" in message
    assert FILES.get(name, "cifar-10-batches-py/data_batch_5" if name == "cifar10" else FILES["omniglot"]) in message
    assert "get its files from https://" in message
    assert bool(network) == (name not in NOT_DOWNLOADED)
    assert ("Name or service not known" in message) == (name not in NOT_DOWNLOADED)
    assert ("cannot be downloaded in this form" in message) == (name in NOT_DOWNLOADED)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["caltech-silhouettes", "cifar10-subset"])
def test_altered_file(name: str, network: list[str], tmp_path: Path) -> None:
    path = tmp_path / FILES[name]
    path.parent.mkdir()
    path.write_bytes(b"not what was published")
    with pytest.raises(CorruptFileError, match=rf"{path.name} is truncated or altered.*or replace it by the file from"):
        datasets.load(name, root=tmp_path)
    assert not network


def test_downloads_go_to_the_cache(tiny: list[np.ndarray], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Response(io.BytesIO):
        length = None

    def urlopen(url: str, timeout: float) -> Response:
        return Response((tmp_path / "omniglot" / url.rsplit("/", 1)[1]).read_bytes())

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    splits = datasets.load("omniglot-105")
    assert torch.equal(splits.test.x, datasets.load("omniglot-105", root=tmp_path).test.x)
    found = sorted(path.name for path in (tmp_path / "cache" / "pyrovae" / "omniglot").iterdir())
    assert found == ["images_background.npz", "images_evaluation.npz"]
