"""Log-weights against closed forms, and every way in which model and guide can fail to fit each other."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko
from pyro import poutine
from pyro.contrib.zuko import ZukoToPyro
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal

from pyrovae import log_weights
from pyrovae.errors import ArgumentError, ModelGuideError
from pyrovae.structure import check, data_size

X = torch.tensor([0.3, -1.2, 2.0, 0.7])


def local_model(x):
    """z_n ~ N(0, 1), x_n | z_n ~ N(z_n, 1): the posterior is N(x/2, 1/2), the evidence N(0, 2)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        return pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def exact_guide(x):
    with pyro.plate("data", len(x)):
        return pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def evidence(x):
    return dist.Normal(0.0, 2.0**0.5).log_prob(x)


def global_model(x, size=None, rows=None):
    """w ~ N(0, 1) shared by all data points, on a data plate that may be subsampled."""
    w = pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", size or len(x), subsample=rows):
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


def global_guide(x, size=None, rows=None):
    pyro.sample("w", dist.Normal(torch.tensor(0.5), 0.3))


@pytest.mark.parametrize("particles", [1, 2, 7])
def test_log_weights_at_the_exact_posterior_are_the_log_evidence(particles):
    weights = log_weights(local_model, exact_guide, X, particles=particles)
    assert weights.log_w.shape == (particles, 4)
    assert weights.plates == (("data", 4),)
    torch.testing.assert_close(weights.log_w, evidence(X).expand(particles, 4))


def test_sites_are_kept_apart_and_add_up():
    weights = log_weights(local_model, exact_guide, X, particles=3)
    assert set(weights.log_likelihood) == {"x"}
    assert set(weights.log_prior) == set(weights.log_guide) == {"z"}
    total = weights.log_likelihood["x"] + weights.log_prior["z"] - weights.log_guide["z"]
    torch.testing.assert_close(weights.log_w, total)
    torch.testing.assert_close(weights.reconstruction - weights.kl()["z"], total)


@pytest.mark.parametrize("inner_plate", [False, True])
def test_vectorized_particles_equal_a_loop(inner_plate):
    values = torch.randn(5, 3, 4)

    def model(x):
        with pyro.plate("data", 4, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 2.0).expand([4]))
            if inner_plate:
                with pyro.plate("repeat", 3, dim=-2):
                    pyro.sample("y", dist.Normal(z, 1.0), obs=x.expand(3, 4))
            else:
                pyro.sample("y", dist.Normal(z, 1.0), obs=x)

    def guide_at(value):
        def guide(x):
            with pyro.plate("data", 4, dim=-1):
                pyro.sample("z", dist.Delta(value))

        return guide

    value = values[:, 0]
    nesting = 2 if inner_plate else 1
    vectorized = log_weights(
        model, guide_at(value.reshape(5, *[1] * (nesting - 1), 4)), X, particles=5, max_plate_nesting=nesting
    )
    loop = torch.cat([log_weights(model, guide_at(one), X).log_w for one in value])
    assert vectorized.log_w.shape == (5, 4)
    torch.testing.assert_close(vectorized.log_w, loop)


def test_global_latents_give_one_weight_per_particle():
    weights = log_weights(global_model, global_guide, X, particles=6)
    assert weights.log_w.shape == (6,)
    assert weights.plates == ()
    assert weights.log_likelihood["x"].shape == (6,)


def test_scale_of_an_independent_subsampled_plate_is_kept_apart():
    rows = torch.tensor([0, 2])

    def model(x):
        with pyro.plate("data", 4, subsample=rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x):
        with pyro.plate("data", 4, subsample=rows):
            pyro.sample("z", dist.Normal(x[rows] / 2, 0.5**0.5))

    weights = log_weights(model, guide, X, particles=3)
    assert weights.scale == 2.0
    torch.testing.assert_close(weights.log_w, evidence(X[rows]).expand(3, 2))


def test_scale_of_a_plate_inside_global_latents_stays_in_the_weights():
    rows = torch.tensor([1, 3])
    weights = log_weights(global_model, lambda *a: pyro.sample("w", dist.Delta(torch.tensor(0.4))), X[rows], 4, rows)
    assert weights.scale == 1.0
    expected = 2.0 * dist.Normal(0.4, 1.0).log_prob(X[rows]).sum()
    torch.testing.assert_close(weights.log_likelihood["x"], expected.reshape(1))


def test_a_scale_that_all_sites_share_is_kept_apart_and_others_are_not():
    shared = log_weights(poutine.scale(local_model, 0.25), poutine.scale(exact_guide, 0.25), X, particles=2)
    assert shared.scale == 0.25
    torch.testing.assert_close(shared.log_w, evidence(X).expand(2, 4))

    def half_likelihood(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with poutine.scale(scale=0.5):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def zero(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(torch.zeros(4)))

    tempered = log_weights(half_likelihood, zero, X)
    assert tempered.scale == 1.0
    torch.testing.assert_close(tempered.log_likelihood["x"][0], 0.5 * dist.Normal(0.0, 1.0).log_prob(X))


def test_masked_sites_count_nothing():
    mask = torch.tensor([True, False, True, False])

    def model(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    weights = log_weights(model, guide, X, particles=2)
    torch.testing.assert_close(weights.log_w, torch.where(mask, evidence(X), 0.0).expand(2, 4))


def test_partly_observed_sites_are_honoured():
    mask = torch.tensor([True, False, True, True])

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(()), 1.0), obs=x, obs_mask=mask)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x_unobserved", dist.Normal(torch.zeros(()), 1.0))

    weights = log_weights(model, guide, X, particles=2)
    expected = torch.where(mask, dist.Normal(0.0, 1.0).log_prob(X), 0.0)
    observed = weights.log_likelihood["x_observed"]
    torch.testing.assert_close(observed, expected.expand(2, 4))


# --- gradients through the three routes ---------------------------------------------------------------------


def routes_gradient(through, slope):
    """Gradient of the summed log-weights with respect to the slope of the guide's mean, and the particles' noise."""

    def guide(x):
        a = pyro.param("a", torch.tensor(slope))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(a * x, 0.5**0.5))

    torch.manual_seed(1)
    weights = log_weights(local_model, guide, X, particles=50, through=through)
    (gradient,) = torch.autograd.grad(weights.log_w.sum(), pyro.param("a").unconstrained())
    torch.manual_seed(1)
    return gradient, torch.normal(torch.zeros(50, 4), torch.ones(50, 4))


def test_the_path_alone_has_no_variance_at_the_exact_posterior():
    gradient, _ = routes_gradient("path", 0.5)
    torch.testing.assert_close(gradient, torch.tensor(0.0), atol=1e-3, rtol=0)
    both, noise = routes_gradient("both", 0.5)
    score = (noise / 0.5**0.5 * X).sum()  # d log q / d a at fixed z, which "path" leaves out
    torch.testing.assert_close(both, -score)


def test_parameters_alone_get_minus_the_score_of_the_guide():
    gradient, noise = routes_gradient("parameters", 0.3)
    torch.testing.assert_close(gradient, -(noise / 0.5**0.5 * X).sum())


class FlowGuide(torch.nn.Module):
    """One flow for all data points, Pyro's or zuko's: a module that reads its parameters when it is scored."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x):
        pyro.module("flow", self.flow)
        if isinstance(self.flow, zuko.flows.Flow):
            q = ZukoToPyro(self.flow())
        else:
            q = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [self.flow])
        with pyro.plate("data", len(x)):
            pyro.sample("z", q)


@pytest.mark.parametrize(
    "make",
    [lambda: dist.transforms.affine_coupling(2), lambda: zuko.flows.NICE(2, transforms=2, hidden_features=(8,))],
    ids=["affine-coupling", "zuko"],
)
def test_the_path_is_the_only_route_to_the_parameters_of_a_flow(make):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    guide = FlowGuide(make())
    parameters = list(guide.parameters())

    def gradients(factor):
        weights = log_weights(model, guide, X, particles=3, through="path")
        weights.path.factor = factor
        return torch.autograd.grad(weights.log_w.sum(), parameters)

    assert all((gradient == 0).all() for gradient in gradients(torch.zeros(3, len(X))))
    assert all((gradient != 0).any() for gradient in gradients(None))  # the path is open by itself


def test_holding_parameters_fixed_restores_them():
    guide = AutoNormal(global_model)
    log_weights(global_model, guide, X, particles=3, through="path").log_w.sum().backward()
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in guide.parameters())


# --- closed-form KL ------------------------------------------------------------------------------------------


def bottom_up(x):
    """A guide in the opposite order of the model: z1 from x, then z2 from z1."""
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal(x, 0.6))
        pyro.sample("z2", dist.Normal(0.8 * z1, 0.7))


def top_down_model(x):
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(torch.zeros(()), 1.0))
        z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
        pyro.sample("x", dist.Normal(z1, 1.0), obs=x)


def test_closed_form_kl_is_used_only_where_it_is_unbiased():
    weights = log_weights(top_down_model, bottom_up, X, particles=2, kl="analytic")
    # p(z1 | z2) depends on z2, which the guide draws after z1; p(z2) depends on nothing.
    assert set(weights.analytic_kl) == {"z2"}
    sampled = log_weights(top_down_model, bottom_up, X, particles=200_000).log_w.mean(0)
    mixed_w = log_weights(top_down_model, bottom_up, X, particles=200_000, kl="analytic").log_w
    error = (mixed_w.std(0) ** 2 / 200_000 * 2) ** 0.5
    # Four standard errors on four numbers: a false alarm once in 4 000 seeds.
    assert ((mixed_w.mean(0) - sampled).abs() < 4 * error + 4 * 0.01).all()


def test_closed_form_kl_equals_the_mean_of_the_sampled_one():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.2 * x, 0.4))

    closed = log_weights(local_model, guide, X, kl="analytic").kl()["z"][0]
    expected = torch.distributions.kl_divergence(dist.Normal(0.2 * X, 0.4), dist.Normal(0.0, 1.0))
    torch.testing.assert_close(closed, expected)
    sampled = log_weights(local_model, guide, X, particles=20_000).kl()["z"]
    error = sampled.std(0) / 20_000**0.5
    assert ((sampled.mean(0) - closed).abs() < 4 * error).all()  # a false alarm once in 4 000 seeds


@pytest.mark.parametrize(
    ("autoguide", "sites", "closed"), [(AutoNormal, {"w", "s"}, {"w"}), (AutoDiagonalNormal, {"latent"}, set())]
)
def test_kl_of_autoguides_counts_auxiliary_sites_and_jacobians(autoguide, sites, closed):
    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))
        s = pyro.sample("s", dist.LogNormal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, s), obs=x)

    guide = autoguide(model)
    for kl in ("sampled", "analytic"):
        weights = log_weights(model, guide, X, particles=4, kl=kl)
        assert set(weights.kl()) == sites
        torch.testing.assert_close(weights.log_w, weights.reconstruction - sum(weights.kl().values()))
        # On real support AutoNormal's auxiliary site is the latent; s is a transform of its own, whose Delta has none.
        assert set(weights.analytic_kl) == (closed if kl == "analytic" else set())


def test_closed_form_kl_under_autonormal_is_that_of_its_parameters_and_computed_once():
    guide = AutoNormal(global_model)
    kl = log_weights(global_model, guide, X, particles=7, kl="analytic").analytic_kl["w"]
    assert kl.shape == (1,)
    q = dist.Normal(guide.locs.w, guide.scales.w)
    torch.testing.assert_close(kl[0], torch.distributions.kl_divergence(q, dist.Normal(0.0, 1.0)))
    # What depends on another latent differs between the particles, and is computed for each.
    in_order = log_weights(top_down_model, lambda x: top_down_guide(x), X, particles=7, kl="analytic").analytic_kl
    assert {name: value.shape for name, value in in_order.items()} == {"z2": (1, 4), "z1": (7, 4)}


def top_down_guide(x):
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(0.4 * x, 0.7))
        pyro.sample("z1", dist.Normal(0.8 * z2 + 0.1 * x, 0.6))


def test_a_guide_that_cannot_score_a_given_value_is_told_what_to_use():
    class OneWay(dist.Normal):
        """A density that is known at its own last draw alone, as that of a flow without an inverse."""

        def rsample(self, sample_shape=torch.Size()):  # noqa: B008
            self.drawn = super().rsample(sample_shape)
            return self.drawn

        def log_prob(self, value):
            if value is not getattr(self, "drawn", None):
                raise NotImplementedError("no inverse")
            return super().log_prob(value)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", OneWay(pyro.param("a", torch.tensor(0.5)) * x, 0.7))

    assert log_weights(local_model, guide, X, through="both").log_w.isfinite().all()
    with pytest.raises(ModelGuideError, match=r"'z' has no density at a given value.*Use gradient='pathwise'"):
        log_weights(local_model, guide, X, through="path")


# --- what does not fit ---------------------------------------------------------------------------------------


def empty_guide(x):
    pass


def test_a_site_that_the_guide_lacks_is_named():
    with pytest.raises(ModelGuideError, match=r"guide lacks the model's latent site 'z'.*samples: nothing"):
        log_weights(local_model, empty_guide, X)


def test_a_discrete_site_that_the_guide_lacks_points_to_enumeration():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ModelGuideError, match="pyrovae.EnumeratedELBO"):
        log_weights(model, empty_guide, X)


def test_a_site_that_the_model_lacks_is_named():
    def guide(x):
        exact_guide(x)
        pyro.sample("extra", dist.Normal(0.0, 1.0))

    with pytest.raises(ModelGuideError, match=r"guide samples 'extra'.*the model's are: 'z'.*is_auxiliary"):
        log_weights(local_model, guide, X)


def test_an_auxiliary_site_is_allowed_and_counted():
    def guide(x):
        exact_guide(x)
        pyro.sample("extra", dist.Delta(torch.tensor(0.0), log_density=torch.tensor(0.7)), infer={"is_auxiliary": True})

    weights = log_weights(local_model, guide, X)
    assert weights.plates == ()
    torch.testing.assert_close(weights.log_w, (evidence(X).sum() - 0.7).reshape(1))


def test_different_shapes_are_printed_with_their_plates():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(4, 3), 1.0).to_event(1))

    with pytest.raises(ModelGuideError) as raised:
        log_weights(local_model, guide, X)
    for words in ("'z'", "batch (4,) event ()", "batch (4,) event (3,)", "'data' of size 4 at dim -1"):
        assert words in str(raised.value)


def test_a_guide_without_the_plate_is_told_so():
    def guide(x):
        pyro.sample("z", dist.Normal(x / 2, 0.7).to_event(1))

    with pytest.raises(ModelGuideError, match="no plates"):
        log_weights(local_model, guide, X)


@pytest.mark.parametrize("event_dim", [0, 1])
def test_a_column_against_a_row_is_no_n_by_n_model(event_dim):
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(y)):
            mean = w * x if event_dim == 0 else (w * x).expand(4, 4)
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(event_dim), obs=y)

    column = X.unsqueeze(-1)
    y = column if event_dim == 0 else X
    with pytest.raises(ModelGuideError, match=r"'y'.*(broadcast)"):
        log_weights(model, lambda x, y: global_guide(x), X, y)


def test_a_likelihood_that_broadcasts_to_n_by_n_is_caught():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0), obs=x.unsqueeze(-1))

    with pytest.raises((ModelGuideError, ValueError), match="data"):
        log_weights(model, exact_guide, X)


def test_a_batch_outside_any_plate_is_caught():
    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(w, 1.0).expand([4]), obs=x)

    with pytest.raises(ModelGuideError, match=r"'x' of the model.*no plates"):
        log_weights(model, global_guide, X)


def test_a_model_that_cannot_be_vectorized_is_told_why():
    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w[0] + 0 * x, 1.0), obs=x)

    def guide(x):
        pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    assert log_weights(model, guide, X).log_w.shape == (1,)
    with pytest.raises((ModelGuideError, RuntimeError, ValueError)):
        log_weights(model, guide, X, particles=5)


@pytest.mark.parametrize("particles", [0, -1, 1.5, "two"])
def test_a_wrong_number_of_particles(particles):
    with pytest.raises(ArgumentError, match="particles is .*at least 1"):
        log_weights(local_model, exact_guide, X, particles=particles)


# --- structure -----------------------------------------------------------------------------------------------


def test_the_checked_run_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    structure = check(local_model, exact_guide, X)
    assert torch.equal(before, torch.get_rng_state())
    assert structure.max_plate_nesting == 1
    assert structure.reparameterized == {"z": True}
    assert structure.observed == ("x",)


def test_data_size_is_the_full_size_of_the_data_plate():
    assert data_size(local_model, exact_guide, X) == 4
    assert data_size(global_model, global_guide, X[:2], 100, torch.tensor([0, 1])) == 100
    assert (
        data_size(lambda: pyro.sample("w", dist.Normal(0.0, 1.0)), lambda: pyro.sample("w", dist.Normal(0.0, 1.0)))
        is None
    )
