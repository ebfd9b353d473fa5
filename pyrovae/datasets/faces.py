"""Small collections of grey 8-bit pictures of faces."""

from __future__ import annotations

from pathlib import Path

import torch

from pyrovae.datasets import files
from pyrovae.datasets.base import Binarization, Splits, make_splits, random_rows

__all__ = ["load_frey", "load_olivetti"]

_FREY = files.PublishedFile("freyfaces/frey_rawface.mat")
_FREY_URL = "https://cs.nyu.edu/~roweis/data/frey_rawface.mat"
_FREY_SHA256 = "fbd70c2c992104024a20f4d253da1a1132eb6bf8ed142dccbe7d2b1743b705c4"
_FREY_SIZES = (1565, 200, 200)
_FREY_SPLIT_SEED = 0

_OLIVETTI = files.PublishedFile("olivetti/olivettifaces.mat")
_OLIVETTI_URL = "https://cs.nyu.edu/~roweis/data/olivettifaces.mat"
_OLIVETTI_SHA256 = "7964c5cc44c85859441189f37c95bb64ac343e67b4fed0ca51e40c35ef12643b"
_PEOPLE, _PICTURES = 40, 10
_PARTS = (slice(0, 8), slice(8, 9), slice(9, 10))  # of the pictures of each person


def load_frey(binarization: Binarization = "none", root: Path | None = None) -> Splits:
    """Frey faces: 1965 frames of a film of one face, 28x20 with 256 grey levels (divided by 255), 1565/200/200.

    The sizes are the usual ones; the frames of each split are drawn at random with a fixed seed. Each frame so has
    near neighbours in the training split, and a bound on the test split does not say how a model does on a new film.

    Args:
        binarization: see ``pyrovae.datasets.load``.
        root: folder that holds ``freyfaces/frey_rawface.mat``, see ``pyrovae.datasets.load``. The pixels are checked,
            not the bytes of the file, which has been saved by several versions of MATLAB.

    Returns:
        The splits, the same at every call, without labels.

    Raises:
        DataUnavailableError: the file is missing; it is not downloaded.
        CorruptFileError: the file does not hold the published pixels.

    Reference:
        Roweis, Saul & Hinton 2002, Global coordination of local linear models, Advances in Neural Information
        Processing Systems 14; file: https://cs.nyu.edu/~roweis/data.html

    Example:
        >>> from pyrovae import datasets
        >>> datasets.describe("frey-faces")
        'Frey faces, 28x20 with 256 grey levels, 1565/200/200 at random, no labels'
    """
    (path,) = files.obtain("frey-faces", [_FREY], root, _FREY_URL)
    pixels = files.read_mat(path, "ff")
    files.verify_array(path, pixels, (560, 1965), _FREY_SHA256, _FREY_URL)
    x = torch.from_numpy(pixels.T.reshape(-1, 28, 20)).to(torch.float32).div_(255)
    rows = random_rows(len(x), _FREY_SIZES[1], _FREY_SIZES[2], _FREY_SPLIT_SEED)
    return make_splits("frey-faces", [x[part] for part in rows], [None] * 3, (), binarization)


def load_olivetti(binarization: Binarization = "none", root: Path | None = None) -> Splits:
    """Olivetti faces: 40 people, 10 pictures each, 64x64 with 256 grey levels (divided by 255), 320/40/40.

    Of each person the first eight pictures train, the ninth validates and the tenth tests: each person is in each
    split, and the splits say nothing about people who were never seen.

    Args:
        binarization: see ``pyrovae.datasets.load``.
        root: folder that holds ``olivetti/olivettifaces.mat``, see ``pyrovae.datasets.load``. The pixels are checked,
            not the bytes of the file, which is published with and without other variables.

    Returns:
        The splits; a label is a person, and the classes are named ``"1"`` to ``"40"``.

    Raises:
        DataUnavailableError: the file is missing; it is not downloaded.
        CorruptFileError: the file does not hold the published pixels.

    Reference:
        Samaria & Harter 1994, Parameterisation of a stochastic model for human face identification,
        https://doi.org/10.1109/ACV.1994.341300 (pictures of the Olivetti Research Laboratory, Cambridge, cropped and
        reduced by S. Roweis); file: https://cs.nyu.edu/~roweis/data.html

    Example:
        >>> from pyrovae import datasets
        >>> datasets.describe("olivetti")
        'Olivetti faces, 40 people, 64x64 with 256 grey levels, 320/40/40'
    """
    (path,) = files.obtain("olivetti", [_OLIVETTI], root, _OLIVETTI_URL)
    pixels = files.read_mat(path, "faces")
    files.verify_array(path, pixels, (64 * 64, _PEOPLE * _PICTURES), _OLIVETTI_SHA256, _OLIVETTI_URL)
    # MATLAB's images are column by column.
    x = torch.from_numpy(pixels.T.reshape(_PEOPLE, _PICTURES, 64, 64)).mT.to(torch.float32).div_(255)
    y = torch.arange(_PEOPLE)[:, None].expand(-1, _PICTURES)
    images, labels = [x[:, part].flatten(0, 1) for part in _PARTS], [y[:, part].flatten() for part in _PARTS]
    classes = tuple(str(person) for person in range(1, _PEOPLE + 1))
    return make_splits("olivetti", images, labels, classes, binarization)
