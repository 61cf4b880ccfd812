"""benchmark/toy.py against fine grids, and the diffusion policy against what is known of it.

"k standard errors" in a comment gives the tolerance of a Monte-Carlo estimate; seeds are fixed.
"""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)
toy = importlib.import_module("toy")
sdac = toy.sdac

# Two modes cut by two edges and a corner of the box.
CUT = toy.Mixture([[0.9, -0.9], [-0.2, 1.2]], 0.2, [0.3, 0.7])
DEFAULT = sdac.NoiseSchedule(6, published=False)
PUBLISHED = sdac.NoiseSchedule(20, published=True)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def noised(energy, n, signal, noise):
    """Noised true samples (n, d)."""
    a_0 = energy.sample(n)
    return signal * a_0 + noise * torch.randn_like(a_0)


def grid_of(energy, nodes):
    """A regular grid of the box, and the weights of the trapezoidal rule."""
    line = torch.linspace(-1, 1, nodes, dtype=torch.float64)
    grid = torch.cartesian_prod(*[line] * energy.dim).view(-1, energy.dim)
    return grid, torch.where(grid.abs() == 1, 0.5, 1.0).prod(1)


# PUBLISHED has at t = 0 a posterior a hundredth of the box wide, and at t = 19 almost pure noise.
@pytest.mark.parametrize(
    "schedule, t", [(DEFAULT, 0), (DEFAULT, 5), (PUBLISHED, 0), (PUBLISHED, 19)]
)
@pytest.mark.parametrize("energy", [toy.two_modes(1), CUT], ids=["one dimension", "cut"])
def test_posterior_noise_is_that_of_a_fine_grid(energy, schedule, t):
    signal, noise = schedule.signal[t].double(), schedule.noise[t].double()
    grid, edges = grid_of(energy, 801)
    a_t = noised(energy, 8, signal, noise)
    eps = (a_t[:, None] - signal * grid) / noise
    weights = torch.softmax(energy.energy(grid) - eps.square().sum(-1) / 2, 1) * edges
    expected = (weights[..., None] * eps).sum(1) / weights.sum(1, keepdim=True)
    found = energy.posterior_noise(a_t, signal, noise)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("t", [1, 3, 5])
def test_noised_samples_have_the_noise_that_is_expected_of_them(t):
    """E[E[ε | a_t]] = 0 and E[E[ε | a_t] · a_t] = √(1-ᾱ_t) d, also where no grid can be used."""
    energy, signal, noise = toy.two_modes(17), DEFAULT.signal[t], DEFAULT.noise[t]
    a_t = noised(energy, 4000, signal, noise)
    eps = energy.posterior_noise(a_t, signal, noise)
    for values, expected in ((eps.mean(1), 0), ((eps * a_t).mean(1), noise)):
        assert abs(values.mean() - expected) < 4.5 * values.std() / math.sqrt(len(values))


def test_true_samples_have_the_moments_of_the_energy():
    n = 20_000
    grid, edges = grid_of(CUT, 401)
    density = torch.softmax(CUT.energy(grid), 0) * edges
    density /= density.sum()
    samples = CUT.sample(n)
    for function in (
        lambda a: a[:, 0],
        lambda a: a.prod(1),
        lambda a: a.norm(dim=1),
        lambda a: (a[:, 0] > 0.8).double(),
    ):
        expected, values = (density * function(grid)).sum(), function(samples)
        # 4.5 standard errors, and the width of a cell at the step of the last function
        assert abs(values.mean() - expected) < 4.5 * values.std() / math.sqrt(n) + 0.005


@pytest.mark.parametrize("schedule", [DEFAULT, PUBLISHED], ids=["default", "published"])
def test_exact_sampling_of_a_normal_has_the_moments_of_its_linear_recursion(schedule):
    """Far from the box E[a_0 | a_t] is linear in a_t: mean and variance follow step by step."""
    mu, sigma, n, dim = 0.1, 0.15, 40_000, 6
    ratio = (schedule.noise.double() / schedule.signal.double()).tolist()
    # of x = a_t/√ᾱ_t = a_0 + ratio_t ε. A step gives a_0 + r (x - a_0) + ratio_{t-1} √(1-r) z with
    # r = (ratio_{t-1}/ratio_t)² and a_0 = μ + g (x - μ), where g = σ²/(σ² + ratio_t²).
    mean, variance = 0.0, (schedule.initial_std * math.hypot(1, ratio[-1])) ** 2
    for t in reversed(range(len(ratio))):
        less = ratio[t - 1] if t else 0.0
        r, g = (less / ratio[t]) ** 2, sigma**2 / (sigma**2 + ratio[t] ** 2)
        slope = g + r * (1 - g)
        mean, variance = mu + slope * (mean - mu), slope**2 * variance + less**2 * (1 - r)
    denoiser = toy.exact_denoiser(toy.Mixture([[mu] * dim], sigma, [1.0]), schedule)
    samples = toy.policy_samples(denoiser, n, dim, schedule)
    # 4.5 standard errors of a mean and of a standard deviation of n · dim numbers
    assert samples.mean() == pytest.approx(mean, abs=4.5 * math.sqrt(variance / (n * dim)))
    assert samples.std() == pytest.approx(math.sqrt(variance), rel=4.5 / math.sqrt(2 * n * dim))
    assert variance < 0.9 * sigma**2  # So few steps leave it too narrow: no tolerance hides that.


def error_of_the_minimiser(published, t, n=2000, num_samples=2048):
    """Least squares of (RSM target - truth) on (1, a_t) for a one-dimensional normal in the box:
    coefficients and their standard errors. The minimiser of the loss has this error."""
    energy = toy.Mixture([[0.25]], 0.5, [1.0])
    a_t = noised(energy, n, DEFAULT.signal[t], DEFAULT.noise[t])
    a_hat, eps = sdac.reverse_samples(DEFAULT, a_t, torch.full((n,), t), num_samples, published)
    eps, _ = sdac.rsm_target(eps, energy.energy(a_hat), 1.0)
    error = eps - energy.posterior_noise(a_t, DEFAULT.signal[t], DEFAULT.noise[t])
    design = torch.cat([torch.ones_like(a_t), a_t], dim=1)
    inverse = torch.linalg.inv(design.T @ design)
    coefficients = inverse @ design.T @ error
    residual = (error - design @ coefficients).square().sum() / (n - 2)
    return coefficients[:, 0].abs() / (residual * inverse.diagonal()).sqrt()


@pytest.mark.parametrize("t", [2, 3, 4, 5])
def test_truncated_reverse_samples_give_the_score_of_a_normal_and_clipped_ones_do_not(t):
    assert (error_of_the_minimiser(published=False, t=t) < 4.5).all()  # standard errors
    assert (error_of_the_minimiser(published=True, t=t) > 20).any()


def test_training_reaches_the_score_that_true_samples_give_and_with_clipping_does_not():
    energy = toy.Mixture([[0.25] * 3], 0.25, [1.0])
    error = {}
    for method in ("denoising", "truncate", "clip"):
        denoiser = toy.train(energy, method, steps=300)
        error[method] = toy.score_error(denoiser, energy, DEFAULT)
    assert error["denoising"] < 0.3
    assert error["truncate"] < 1.25 * error["denoising"]
    assert error["clip"] > 2 * error["truncate"]


def test_the_distance_of_a_shift_is_its_mean_projection():
    x = torch.randn(2000, 3, dtype=torch.float64)
    assert toy.distance(x, x[torch.randperm(2000)]) == pytest.approx(0, abs=1e-12)
    shift = torch.tensor([0.3, -0.4, 1.2], dtype=torch.float64)
    # |shift · u| is uniform on (0, 1.3) for u uniform on the sphere in three dimensions:
    # 4.5 standard errors of 128 directions
    tolerance = 4.5 * 1.3 / math.sqrt(12 * 128)
    assert toy.distance(x, x + shift) == pytest.approx(0.65, abs=tolerance)


def test_the_score_error_weighs_every_level_by_the_size_of_its_score():
    energy = toy.two_modes(2)
    exact = toy.exact_denoiser(energy, DEFAULT)
    squares = []
    for signal, noise in zip(DEFAULT.signal, DEFAULT.noise, strict=True):
        a_t = noised(energy, 4000, signal, noise)
        squares.append(energy.posterior_noise(a_t, signal, noise).square().mean().item())
    wrong_below_3 = toy.score_error(
        lambda obs, a_t, t: (1.5 if t < 3 else 1) * exact(obs, a_t, t), energy, DEFAULT
    )
    expected = 0.5 * math.sqrt(sum(squares[:3]) / sum(squares))
    assert wrong_below_3 == pytest.approx(expected, rel=0.05)


def test_true_samples_have_the_weights_of_the_modes_and_no_distance_to_others():
    (samples,), figures = toy.study(toy.two_modes(6), "truth")
    assert abs(figures["first mode"] - 0.8) < 4.5 * 0.4 / math.sqrt(len(samples))  # standard errors
    assert figures["distance"] < 0.03


def test_the_steps_lead_from_noise_to_the_samples():
    """With the exact denoiser; the first picture is N(0, I), and each is nearer than the last."""
    energy = toy.two_modes(2)
    steps, figures = toy.study(energy, "exact")
    assert len(steps) == toy.T + 1 and abs(steps[0].std() - 1) < 0.05
    distances = [toy.distance(points, energy.sample(toy.SAMPLES)) for points in steps]
    assert distances[-1] == pytest.approx(figures["distance"], abs=0.02)
    assert distances[3] < distances[2] < distances[1] < distances[0]


def test_the_committed_table_is_that_of_the_committed_figures():
    folder = toy.RESULTS / "toy"
    if folder.exists():
        rows = toy.json.loads((folder / "toy.json").read_text())["methods"]
        assert (folder / "table.md").read_text() == toy.table(rows)
