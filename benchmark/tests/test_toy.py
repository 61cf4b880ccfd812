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
SCHEDULES = {
    "log-snr": toy.make_schedule(torch.float64, 10, "log-snr"),
    "linear": toy.make_schedule(torch.float64, 20, "linear"),
}


def posterior_noise_on_a_grid(target, a_t, t, schedule, nodes=801):
    """E[ε | a_t] in one or two dimensions, as a sum over a fine regular grid of the box."""
    signal, noise = schedule.signal[t], schedule.noise[t]
    line = torch.linspace(-1, 1, nodes, dtype=torch.float64)
    grid = torch.cartesian_prod(*[line] * target.dim).view(-1, target.dim)
    rows = []
    for x in a_t:
        eps = (x - signal * grid) / noise
        edges = torch.where(grid.abs() == 1, 0.5, 1.0).prod(1)  # the trapezoidal rule
        weights = torch.softmax(target.energy(grid) - eps.square().sum(1) / 2, 0) * edges
        rows.append((weights[:, None] * eps).sum(0) / weights.sum())
    return torch.stack(rows)


# (linear, 0) has the narrowest posterior of all levels, a hundredth of the box, (linear, 19) is nearly pure noise
@pytest.mark.parametrize("kind, t", [("log-snr", 0), ("log-snr", 4), ("log-snr", 9), ("linear", 0), ("linear", 19)])
@pytest.mark.parametrize(
    "target", [toy.make_target("two modes", 1), CUT, toy.make_target("ring", 2)], ids=["two modes", "cut", "ring"]
)
def test_posterior_noise_is_that_of_a_fine_grid(target, kind, t):
    a_t = toy.noised(target, 8, t, SCHEDULES[kind], torch.Generator().manual_seed(t))
    torch.testing.assert_close(
        target.posterior_noise(a_t, t, SCHEDULES[kind]),
        posterior_noise_on_a_grid(target, a_t, t, SCHEDULES[kind]),
        atol=1e-4,
        rtol=0,
    )


@pytest.mark.parametrize("name, dim", [("two modes", 17), ("ring", 2)])
@pytest.mark.parametrize("t", [1, 5, 9])
def test_noised_samples_have_the_noise_that_is_expected_of_them(name, dim, t):
    """E[E[ε | a_t]] = 0 and E[E[ε | a_t] · a_t] = √(1-ᾱ_t) d: also where a grid has too many dimensions."""
    target, schedule = toy.make_target(name, dim), SCHEDULES["log-snr"]
    a_t = toy.noised(target, 4000, t, schedule, torch.Generator().manual_seed(t))
    eps = target.posterior_noise(a_t, t, schedule)
    for values, expected in ((eps.mean(1), 0), ((eps * a_t).mean(1), schedule.noise[t])):
        assert abs(values.mean() - expected) < 4.5 * values.std() / math.sqrt(len(values))


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


def test_other_end_points_are_those_of_the_script_by_default_and_even_in_the_power_that_is_asked_for():
    ends = 0.05, 4
    ours, scripts = toy.Spaced(10, *ends), SCHEDULES["log-snr"]
    assert vars(ours).keys() == vars(scripts).keys()
    for name, table in vars(scripts).items():
        np.testing.assert_allclose(vars(ours)[name], table, rtol=1e-9, atol=1e-9, err_msg=name)
    curved = toy.Spaced(10, 0.05, 4, rho=7)
    roots = (curved.noise / curved.signal) ** (1 / 7)
    np.testing.assert_allclose(roots.diff(), (4 ** (1 / 7) - 0.05 ** (1 / 7)) / 9, rtol=1e-9)
    assert roots[0] ** 7 == pytest.approx(0.05) and roots[-1] ** 7 == pytest.approx(4)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_exact_sampling_of_a_gaussian_has_the_moments_of_its_linear_recursion(kind):
    """Far from the box E[a_0 | a_t] is linear in a_t, so mean and variance follow from step to step by hand."""
    schedule, mu, sigma, n, dim = SCHEDULES[kind], 0.1, 0.15, 40_000, 6
    ratio = (schedule.noise / schedule.signal).tolist()
    # of x = a_t/√ᾱ_t = a_0 + ratio_t ε. One step replaces x by a_0 + r (x - a_0) + ratio_{t-1} √(1-r) z, where
    # r = (ratio_{t-1}/ratio_t)² and a_0 = μ + g (x - μ), g = σ²/(σ² + ratio_t²), the posterior mean
    start = 0.5 if kind == "linear" else 1.0
    mean, variance = 0.0, (start * math.hypot(1, ratio[-1])) ** 2
    for t in reversed(range(schedule.num_steps)):
        less = ratio[t - 1] if t else 0.0
        r, g = (less / ratio[t]) ** 2, sigma**2 / (sigma**2 + ratio[t] ** 2)
        slope = g + r * (1 - g)
        mean, variance = mu + slope * (mean - mu), slope**2 * variance + less**2 * (1 - r)
    denoiser = toy.ExactDenoiser(toy.Mixture([[mu] * dim], sigma, [1.0]), schedule)
    samples = toy.policy_samples(denoiser, n, torch.Generator().manual_seed(0), schedule)
    # 4.5 standard errors of a mean and of a standard deviation of n · dim numbers
    assert samples.mean() == pytest.approx(mean, abs=4.5 * math.sqrt(variance / (n * dim)))
    assert samples.std() == pytest.approx(math.sqrt(variance), rel=4.5 / math.sqrt(2 * n * dim))
    assert variance < 0.9 * sigma**2  # so few steps leave a Gaussian too narrow, which would hide in no tolerance


def error_of_the_minimiser(proposal, t, n=2000, num_samples=2048):
    """Least squares of (RSM target - truth) on (1, a_t) for a one-dimensional Gaussian in the box: coefficients and
    their standard errors. The minimiser of the loss has this error in its level and its slope."""
    target, schedule = toy.Mixture([[0.25]], 0.5, [1.0]), SCHEDULES["log-snr"]
    generator = torch.Generator().manual_seed(t)
    a_t = toy.noised(target, n, t, schedule, generator)
    uniform = torch.rand(n, num_samples, 1, generator=generator, dtype=torch.float64)
    prediction = 0.5 * a_t  # of a network that has not learned yet
    eps, a_hat, log_ratio = sdac.reverse_samples(schedule, a_t, torch.full((n, 1), t), uniform, proposal, prediction)
    eps, _ = sdac.rsm_target(eps, target.energy(a_hat), 1.0, log_ratio)
    error, design = eps - target.posterior_noise(a_t, t, schedule), torch.cat([torch.ones_like(a_t), a_t], dim=1)
    inverse = torch.linalg.inv(design.T @ design)
    coefficients = inverse @ design.T @ error
    residual = (error - design @ coefficients).square().sum() / (n - 2)
    return coefficients[:, 0], (residual * inverse.diagonal()).sqrt()


@pytest.mark.parametrize("t", [3, 5, 7, 9])
def test_the_default_proposal_learns_the_score_of_a_gaussian_and_clip_does_not(t):
    error, standard_errors = error_of_the_minimiser(DEFAULT, t)
    assert (error.abs() < 4.5 * standard_errors).all()
    error, standard_errors = error_of_the_minimiser("clip", t)
    assert (error.abs() > 20 * standard_errors).any()  # the bias that must not come back


def test_training_reaches_the_score_that_true_samples_give_and_clip_does_not():
    """All networks see the same number of noised actions; denoising has true samples of exp(Q/λ)."""
    error = {}
    for method in ("denoising", DEFAULT, "clip"):
        denoiser = toy.train("Gaussian", 3, method, seed=1, steps=300)
        error[method] = toy.score_errors(denoiser, "Gaussian", 3, toy.DEFAULT)[1]
    assert error["denoising"] < 0.3
    assert error[DEFAULT] < 1.25 * error["denoising"]
    assert error["clip"] > 2 * error[DEFAULT]


def test_sliced_wasserstein_of_a_shift_is_its_mean_projection():
    x = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert toy.sliced_wasserstein(x, x[torch.randperm(2000)]) == pytest.approx(0, abs=1e-12)
    shift = torch.tensor([0.3, -0.4, 1.2], dtype=torch.float64)
    # E|shift · u| = ‖shift‖/2 for u uniform on the sphere in three dimensions, uniform on (0, 1.3) up to its sign:
    # 4.5 standard errors of 128 directions
    assert toy.sliced_wasserstein(x, x + shift) == pytest.approx(0.65, abs=4.5 * 1.3 / math.sqrt(12 * 128))


def test_the_share_of_the_first_mode_is_its_weight():
    samples = toy.make_target("two modes", 6).sample(20_000, torch.Generator().manual_seed(0))
    # the box cuts both modes alike; 4.5 standard errors
    assert toy.measure(samples, "two modes", 6)["first_mode"] == pytest.approx(0.8, abs=4.5 * 0.4 / math.sqrt(20_000))


def test_score_errors_compare_mean_squares_at_every_level_and_over_all_of_them():
    exact = toy.ExactDenoiser(toy.make_target("two modes", 2), SCHEDULES["log-snr"])
    times_1_5 = lambda obs, a_t, t: 1.5 * exact(obs, a_t, t)  # noqa: E731
    of_t, overall = toy.score_errors(times_1_5, "two modes", 2, {"schedule": "log-snr", "T": 10})
    np.testing.assert_allclose([*of_t, overall], 0.5, atol=1e-4)
    # 1.5 for half of the levels and 1 for the others: over all of them, the mean squares of the truth are the weights
    squares = []
    for t in range(10):
        a_t = toy.noised(exact.target, 4000, t, exact.schedule, torch.Generator().manual_seed(t))
        squares.append(exact.target.posterior_noise(a_t, t, exact.schedule).square().mean().item())
    half = lambda obs, a_t, t: (1.5 if t < 5 else 1) * exact(obs, a_t, t)  # noqa: E731
    of_t, overall = toy.score_errors(half, "two modes", 2, {"schedule": "log-snr", "T": 10})
    np.testing.assert_allclose(of_t, [0.5] * 5 + [0] * 5, atol=1e-4)
    assert overall == pytest.approx(0.5 * math.sqrt(sum(squares[:5]) / sum(squares)), rel=0.05)
