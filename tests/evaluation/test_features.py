"""Classifiers from few labels: against scikit-learn, on clusters whose accuracy is known, and on real digits."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

import pyrovae
from pyrovae.datasets import Split
from pyrovae.errors import ArgumentError, DataError
from pyrovae.evaluation.features import FeatureAccuracies, FeatureAccuracy, _balanced, classify_features
from pyrovae.guides import AmortizedNormal
from pyrovae.models import VAE
from pyrovae.models.autoencoder import Autoencoder, DeterministicEncoder

N = 400


@pytest.fixture
def clusters():
    """Four clusters in 6 dimensions, of which two tell them apart; a linear classifier reaches 0.995 there."""
    y = torch.arange(2 * N) % 4
    centres = torch.tensor([[0.0, 0.0], [0.0, 6.0], [6.0, 0.0], [6.0, 6.0]])
    x = torch.cat([centres[y], torch.zeros(2 * N, 4)], dim=1) + torch.randn(2 * N, 6)
    return (x[:N], y[:N]), (x[N:], y[N:])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
        self.unused = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return self.layers(x)


def test_regression_is_scikit_learns_on_standardised_features(clusters):
    train, test = clusters
    found = classify_features(lambda x: 3.0 * x + 1.0, train, test, (12, 40, None), methods=["features"])
    scaler = StandardScaler()
    theirs = LogisticRegression(max_iter=5000).fit(scaler.fit_transform(train[0].double()), train[1])
    right = int((theirs.predict(scaler.transform(test[0].double())) == test[1].numpy()).sum())
    assert found["features", N].correct == right
    assert [row.labels for row in found] == [12, 40, N]
    assert found["features", N].accuracy > 0.97


def test_networks_reach_what_the_clusters_allow(clusters):
    train, test = clusters
    found = classify_features(Encoder(), train, test, (None,), steps=300, lr=0.01)
    for row in found[1:]:  # the features are those of a random encoder
        assert row.accuracy > 0.97, row
        assert row.error == pytest.approx(math.sqrt(row.accuracy * (1 - row.accuracy) / N))


def test_what_was_learnt_is_kept_for_tuning_and_lost_from_scratch(clusters):
    """A step with a tiny rate leaves an encoder as it was given."""
    train, test = clusters
    encoder = Encoder()
    with torch.no_grad():  # an encoder that tells nothing of the data
        encoder.layers[2].weight.zero_()
    settings = dict(labels=(100,), steps=200, lr=0.01)
    blind = classify_features(encoder, train, test, methods=["features"], **settings)["features", 100]
    assert blind.accuracy == 0.25
    assert encoder.layers[2].weight.abs().sum() == 0
    found = classify_features(encoder, train, test, **settings)
    assert found["from scratch", 100].accuracy > 0.9
    frozen = classify_features(encoder, train, test, labels=(100,), steps=1, lr=1e-6)
    assert frozen["fine-tuned", 100].accuracy == 0.25  # all features alike: one class for all
    assert classify_features(encoder, train, test, untrained=encoder, labels=(100,), steps=1, lr=1e-6)[
        "from scratch", 100
    ].accuracy == pytest.approx(0.25)


def test_points_are_balanced_and_nested():
    y = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[torch.randperm(100)]
    order = _balanced(y, 3)
    assert sorted(order.tolist()) == list(range(100))
    for number in range(3, 61):
        counts = y[order[:number]].bincount(minlength=3)
        assert counts.max() - counts.min() <= 1
    assert not torch.equal(order, _balanced(y, 3))


def test_a_seed_fixes_all_and_the_caller_keeps_his_state(clusters):
    train, test = clusters
    encoder = Encoder().eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = torch.get_rng_state()
    settings = dict(labels=(20, 60), steps=50)
    first = classify_features(encoder, train, test, seed=3, **settings)
    torch.randn(5)
    assert classify_features(encoder, train, test, seed=3, **settings) == first
    assert classify_features(encoder, train, test, seed=4, **settings) != first
    torch.set_rng_state(state)
    classify_features(encoder, train, test, **settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert not encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())


@pytest.mark.parametrize("kind", ["guide", "autoencoder"])
def test_packaged_encoders_and_splits(kind):
    digits = pyrovae.datasets.load("digits")  # train is drawn anew, test once
    encode = AmortizedNormal(VAE((8, 8), 5, (16,))).encode if kind == "guide" else Autoencoder((8, 8), 5, (16,)).encode
    found = classify_features(encode, digits.train, digits.test, (50,), steps=20)
    assert len(found) == 3
    assert {row.points for row in found} == {300}


def test_the_table_and_the_plot(clusters):
    rows = [FeatureAccuracy(m, n, c, 400) for n, c in ((100, 360), (1000, 380)) for m in ("features", "from scratch")]
    found = FeatureAccuracies(tuple(rows))
    assert repr(found).split("\n") == [
        "accuracy ± s.e.     100 labels   1,000 labels",
        "features         0.900 ± 0.015  0.950 ± 0.011",
        "from scratch     0.900 ± 0.015  0.950 ± 0.011",
    ]
    assert found[1].method == "from scratch"
    with pytest.raises(KeyError, match="there is no"):
        found["features", 7]
    ax = found.plot(Figure().subplots())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["features", "from scratch"]
    line = ax.containers[0].lines[0]
    assert line.get_xdata().tolist() == [100, 1000]
    assert line.get_ydata().tolist() == [0.9, 0.95]
    assert "standard error" in ax.get_ylabel()
    assert found.plot().figure is not None
    plt.close("all")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": (3,)}, "labels has 3; there are 400 labelled data points in 4 classes"),
        ({"labels": (401,)}, "labels has 401"),
        ({"labels": (2.5,)}, "labels is 2.5"),
        ({"methods": ["tuned"]}, "unknown method 'tuned'"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"encode": lambda x: x}, "encode is a function, of which no copy can be trained"),
        ({"encode": 3}, "encode is a int; it must be a function of data"),
        ({"encode": nn.Identity()}, "encode has no parameters to train"),
        ({"encode": nn.Unflatten(1, (2, 3)), "methods": ["features"]}, r"encode gives features of shape \(400, 2, 3\)"),
    ],
)
def test_bad_arguments_are_named(clusters, change, words):
    train, test = clusters
    arguments = {"encode": Encoder(), "labels": (None,), "steps": 1} | change
    with pytest.raises(ArgumentError, match=words):
        classify_features(arguments.pop("encode"), train, test, **arguments)


def test_bad_data_and_encoders_are_named(clusters):
    train, test = clusters
    for bad, words in (
        (Split(torch.rand(5, 6), None, "none"), "train has no labels"),
        ((train[0], train[1][:7]), "train has 400 data points and labels of torch.int64 and shape"),
        ((train[0], train[1].float()), "labels of torch.float32"),
    ):
        with pytest.raises(DataError, match=words):
            classify_features(Encoder(), bad, test)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 3))

        def forward(self, x):
            return x @ self.weight

    with pytest.raises(ArgumentError, match="parameters outside of torch's layers.*give untrained="):
        classify_features(Own(), train, test, (None,), steps=1)
    assert len(classify_features(Own(), train, test, (None,), steps=1, untrained=Own())) == 3


@pytest.mark.slow
def test_features_learnt_without_labels_save_labels_on_digits():
    """A deep, narrow autoencoder (64-128-128-64-6 tanh units, masking noise) of all 1 197 images, and 10 classes.

    Over five choices of the labelled points and initial networks the features win by 0.10 in the mean with 20 labels
    (0.05 to 0.19) and by 0.05 with 50 (0.01 to 0.07). Wide and rectified networks gain nothing on these data.
    """
    digits = pyrovae.datasets.load("digits", binarization="none")

    def build():
        return Autoencoder(
            (8, 8), 6, (64, 128, 128), activation="tanh", likelihood="continuous-bernoulli", noise=0.2
        ).initialize_output(digits.train.x)

    model = build()
    pyrovae.fit(
        model,
        DeterministicEncoder(model),
        digits.train,
        epochs=60,
        batch_size=50,
        lr=2e-3,
        schedule="cosine",
        compile=False,
        progress=False,
    )
    margins = {20: [], 50: []}
    for seed in range(5):
        torch.manual_seed(100 + seed)
        settings = dict(methods=["features", "from scratch"], untrained=build().encode, seed=seed)
        found = classify_features(model.encode, digits.train, digits.test, tuple(margins), **settings)
        for labels, margin in margins.items():
            margin.append(found["features", labels].accuracy - found["from scratch", labels].accuracy)
    mean = {labels: sum(margin) / len(margin) for labels, margin in margins.items()}
    assert mean[20] > 0.04, margins
    assert mean[50] > 0.02, margins
