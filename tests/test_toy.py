"""benchmark/toy.py against quadrature and brute force, and the diffusion policy against a Gaussian's closed form.

"k standard errors" in a comment gives the tolerance of a Monte-Carlo estimate; seeds are fixed."""

import importlib
import math
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))
toy = importlib.import_module("toy")
sdac = toy.sdac

DEFAULT = sdac.Args.reverse_proposal
CUT = toy.Mixture([[0.9, -0.9], [-0.2, 1.2]], 0.2, [0.3, 0.7])  # two modes cut by two edges and a corner of the box


def posterior_noise_on_a_grid(target, a_t, t, nodes=801):
    """E[ε | a_t] in one or two dimensions, as a sum over a fine regular grid of the box."""
    signal, noise = toy.EXACT_SCHEDULE.signal[t], toy.EXACT_SCHEDULE.noise[t]
    line = torch.linspace(-1, 1, nodes, dtype=torch.float64)
    grid = torch.cartesian_prod(*[line] * target.dim).view(-1, target.dim)
    rows = []
    for x in a_t:
        eps = (x - signal * grid) / noise
        edges = torch.where(grid.abs() == 1, 0.5, 1.0).prod(1)  # the trapezoidal rule
        weights = torch.softmax(target.energy(grid) - eps.square().sum(1) / 2, 0) * edges
        rows.append((weights[:, None] * eps).sum(0) / weights.sum())
    return torch.stack(rows)


@pytest.mark.parametrize("t", [2, 6, 12, 19])
@pytest.mark.parametrize(
    "target",
    [
        toy.make_target("two modes", 1),
        CUT,
        toy.make_target("ring", 2),
    ],
    ids=["two modes", "cut", "ring"],
)
def test_posterior_noise_is_that_of_a_fine_grid(target, t):
    generator = torch.Generator().manual_seed(t)
    a_0 = target.sample(8, generator)
    a_t = toy.EXACT_SCHEDULE.add_noise(a_0, torch.randn(a_0.shape, generator=generator, dtype=torch.float64), t)
    torch.testing.assert_close(
        target.posterior_noise(a_t, t), posterior_noise_on_a_grid(target, a_t, t), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("target", [CUT, toy.make_target("ring", 2)], ids=["cut", "ring"])
def test_true_samples_have_the_moments_of_the_energy(target):
    n = 20_000
    line = torch.linspace(-1, 1, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    density = torch.softmax(target.energy(grid), 0)
    samples = target.sample(n, torch.Generator().manual_seed(0))
    for function in (
        lambda a: a[:, 0],
        lambda a: a.prod(1),
        lambda a: (a[:, 0] > 0.8).double(),
        lambda a: a.norm(dim=1),
    ):
        expected, values = (density * function(grid)).sum(), function(samples)
        # 4.5 standard errors, and the width of a cell at the step of the third function
        assert abs(values.mean() - expected) < 4.5 * values.std() / math.sqrt(n) + 0.005


def error_of_the_minimiser(proposal, t, n=2000, num_samples=2048):
    """Least squares of (RSM target - truth) on (1, a_t) for a one-dimensional Gaussian in the box: coefficients and
    their standard errors. The minimiser of the loss has this error in its level and its slope."""
    target, generator = toy.make_target("broad", 1), torch.Generator().manual_seed(t)
    a_0 = target.sample(n, generator)
    a_t = toy.EXACT_SCHEDULE.add_noise(a_0, torch.randn(a_0.shape, generator=generator, dtype=torch.float64), t)
    critics = lambda obs, actions: target.energy(actions).expand(2, -1, -1)  # noqa: E731
    steps, uniform = torch.full((n, 1), t), torch.rand(n, num_samples, 1, generator=generator, dtype=torch.float64)
    eps, _ = sdac.rsm_target(critics, toy.EXACT_SCHEDULE, None, a_t, steps, 1.0, uniform, proposal)
    error, design = eps - target.posterior_noise(a_t, t), torch.cat([torch.ones_like(a_t), a_t], dim=1)
    inverse = torch.linalg.inv(design.T @ design)
    coefficients = inverse @ design.T @ error
    residual = (error - design @ coefficients).square().sum() / (n - 2)
    return coefficients[:, 0], (residual * inverse.diagonal()).sqrt()


@pytest.mark.parametrize("t", [2, 6, 10, 15])
def test_the_default_proposal_learns_the_score_of_a_gaussian_and_clip_does_not(t):
    error, standard_errors = error_of_the_minimiser(DEFAULT, t)
    assert (error.abs() < 4.5 * standard_errors).all()
    error, standard_errors = error_of_the_minimiser("clip", t)
    assert (error.abs() > 20 * standard_errors).any()  # the bias that must not come back


def test_training_reaches_the_score_that_true_samples_give_and_clip_does_not():
    """All networks see the same number of noised actions; denoising has true samples of exp(Q/λ)."""
    error = {
        method: toy.train("Gaussian", 1, method, 64, 1, steps=300)[0]["score_error"]
        for method in ("denoising", DEFAULT, "clip")
    }
    assert error["denoising"] < 0.3
    assert error[DEFAULT] < 1.25 * error["denoising"]
    assert error["clip"] > 2 * error[DEFAULT]


@pytest.mark.parametrize("kind", ["independent", "antithetic", "stratified", "sobol"])
def test_every_kind_of_points_estimates_means_over_the_cube_without_bias(kind):
    sets, generator = 2000, torch.Generator().manual_seed(3)
    points = toy.uniforms(kind, sets, 8, 3, generator)
    assert ((points >= 0) & (points < 1)).all()
    # E f = 1/2, 1/3, 1/8, 2/π, the last two not sums over coordinates; 4.5 standard errors over independent sets
    functions = [points[..., 1], points[..., 0] ** 2, points.prod(-1), torch.sin(math.pi * points[..., 2])]
    for values, expected in zip(functions, [1 / 2, 1 / 3, 1 / 8, 2 / math.pi], strict=True):
        means = values.mean(1)
        assert abs(means.mean() - expected) < 4.5 * means.std() / math.sqrt(sets) + 1e-12
    first = points[:, 0]  # and each single point is uniform: Kolmogorov-Smirnov, p < 1e-5
    steps = torch.arange(1, sets + 1, dtype=torch.float64)[:, None] / sets
    assert ((first.sort(0)[0] - steps).abs().max(0)[0] < 2.5 / math.sqrt(sets)).all()


def test_local_mixture_converges_to_the_closed_form():
    target, t, generator = toy.make_target("two modes", 2), 5, torch.Generator().manual_seed(0)
    a_0 = target.sample(30, generator)
    a_t = toy.EXACT_SCHEDULE.add_noise(a_0, torch.randn(a_0.shape, generator=generator, dtype=torch.float64), t)
    true = target.posterior_noise(a_t, t)
    anchors = {"near": a_0, "anywhere": torch.zeros_like(a_0)}
    for anchor in anchors.values():
        few, many = (toy.local_mixture(target, anchor, a_t, t, m, 0.3, generator) for m in (400, 40_000))
        few, many = ((x - true).square().mean().sqrt() for x in (few, many))
        assert many < 0.02 and many < few / 4  # a hundred times the samples, a tenth of the error


def test_sliced_wasserstein_of_a_shift_is_its_mean_projection():
    x = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert toy.sliced_wasserstein(x, x[torch.randperm(2000)]) == pytest.approx(0, abs=1e-12)
    shift = torch.tensor([0.3, -0.4, 1.2], dtype=torch.float64)
    # E|shift · u| = ‖shift‖/2 for u uniform on the sphere in three dimensions, uniform on (0, 1.3) up to its sign:
    # 4.5 standard errors of 128 directions
    assert toy.sliced_wasserstein(x, x + shift) == pytest.approx(0.65, abs=4.5 * 1.3 / math.sqrt(12 * 128))


def test_relative_errors_compare_mean_squares_over_points_and_dimensions():
    name, dim = "two modes", 2
    exact = toy.ExactDenoiser(toy.make_target(name, dim))

    class Shifted:
        embed_obs, embed_time = exact.embed_obs, exact.embed_time

        def __call__(self, context, a_t):
            return 1.5 * exact(context, a_t[:, None])[:, 0]

    np.testing.assert_allclose(toy.relative(toy.score_errors(Shifted(), name, dim)), 0.5, rtol=1e-5)
