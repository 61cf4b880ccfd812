"""Does the diffusion policy sample exp(Q/λ)? Trains it on energies Q/λ that are known, without an environment.

    python benchmark/toy.py      # under 15 minutes on 2 cores; writes benchmark/results/toy/

The denoiser, noise schedule, reverse samples, loss and sampler are those of sdac_continuous_action.py with its default
T; the critics are replaced by the energy, there is one state, and one particle is sampled, so that no choice among
particles hides an error. The noised actions of the loss come, as in the algorithm, from the policy's own samples.

What is compared:
    truncate, clip  the two --reverse-proposal, with independent reverse samples
    sobol           truncate with Sobol points in place of independent ones (see uniforms)
    mirror-descent  --weighting mirror-descent, from the policy's own samples
    denoising       denoising score matching on true samples of exp(Q/λ), which no reinforcement learner has
    exact           no learning, the true posterior mean of the noise: what the sampler's T steps alone do wrong

Errors. Score error: for each noise level t, sqrt(E‖ε_θ - ε*‖² / E‖ε*‖²) over true noised actions, ε* = E[ε | a_t] being
in closed form or by quadrature; 1 is the error of always predicting 0. Where one number is given, both expectations
run over t too. Distance: the sliced Wasserstein-1 distance to true samples (mean over 128 directions, in units of half
the box); its floor is that of two independent sets of true samples."""

import importlib
import json
import math
import multiprocessing
import os
import re
import sys
import time
from contextlib import redirect_stdout
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from speed import cpu_name, versions
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sdac = importlib.import_module("sdac_continuous_action")

T, M, BATCH, STEPS, LONG, SEEDS = sdac.Args.denoising_steps, sdac.Args.num_reverse_samples, 128, 700, 3500, (1, 2, 3)
COLORS = {"truncate": "C0", "sobol": "C2", "clip": "C3", "mirror-descent": "C1", "denoising": "0.3"}
DIMENSIONS = [1, 2, 6, 8, 17]
SAMPLES, TEST_POINTS = 4000, 500
SCHEDULE = sdac.NoiseSchedule(T, sdac.Args.beta_scale)
EXACT_SCHEDULE = sdac.NoiseSchedule(T, sdac.Args.beta_scale, dtype=torch.float64)


def normal_interval(low, high):
    """P(low < Z < high) of a standard normal Z, computed in the lower tail, where Φ keeps its digits."""
    upper = low > 0
    low, high = torch.where(upper, -high, low), torch.where(upper, -low, high)
    return 0.5 * (torch.special.erfc(-high / math.sqrt(2)) - torch.special.erfc(-low / math.sqrt(2)))


class Mixture:
    """Q/λ = log Σ_k p_k N(a; μ_k, σ² I) in the box [-1, 1]^d; means (modes, d), weights p (modes,)."""

    def __init__(self, means, std, weights):
        self.means = torch.tensor(means, dtype=torch.float64)
        self.log_weights = torch.tensor(weights, dtype=torch.float64).log()
        self.std, self.dim = std, self.means.shape[1]

    def energy(self, actions):
        """(..., d) -> (...), up to a constant."""
        means, log_weights = self.means.to(actions), self.log_weights.to(actions)
        square = actions.square().sum(-1, keepdim=True) - 2 * actions @ means.T + means.square().sum(1)
        return torch.logsumexp(log_weights - square / (2 * self.std**2), -1)

    def sample(self, n, generator):
        """(n, d): a mode by its mass in the box, then its truncated Gaussians by inversion."""
        low, high = (torch.special.ndtr((side - self.means) / self.std) for side in (-1, 1))
        mass = self.log_weights.exp() * (high - low).prod(1)
        mode = torch.multinomial(mass, n, replacement=True, generator=generator)
        uniform = torch.rand(n, self.dim, generator=generator, dtype=torch.float64)
        z = torch.special.ndtri(low[mode] + uniform * (high - low)[mode])
        return (self.means[mode] + self.std * z).clamp(-1, 1)

    def posterior_noise(self, a_t, t, schedule=EXACT_SCHEDULE):
        """E[ε | a_t] (n, d): for each mode p(a_0 | a_t) is a Gaussian truncated to the box, its mean in closed form."""
        signal, noise, x = schedule.signal[t], schedule.noise[t], a_t[:, None].double()
        variance = (signal * self.std) ** 2 + noise**2
        mean, std = (self.std**2 * signal * x + noise**2 * self.means) / variance, self.std * noise / variance.sqrt()
        low, high = (-1 - mean) / std, (1 - mean) / std
        inside = normal_interval(low, high)
        log_weights = self.log_weights + (inside.log() - (x - signal * self.means) ** 2 / (2 * variance)).sum(-1)
        pdf_low, pdf_high = (torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) for z in (low, high))
        means = mean + std * (pdf_low - pdf_high) / inside
        a_0 = (torch.softmax(log_weights, 1)[..., None] * means).sum(1)
        return (a_t - signal * a_0) / noise

    def first_mode(self, actions):
        """The share of actions (n, d) nearer to the first mean than to the others."""
        return (torch.cdist(actions.double(), self.means).argmin(1) == 0).double().mean().item()


class Ring:
    """Q/λ = -(‖a‖ - radius)²/(2 width²) in two dimensions; with a radius near 1 the edge of the box cuts it."""

    def __init__(self, radius, width):
        self.radius, self.width, self.dim = radius, width, 2

    def energy(self, actions):
        return -(actions.norm(dim=-1) - self.radius).square() / (2 * self.width**2)

    def sample(self, n, generator):
        """By rejection from the uniform distribution on the box."""
        actions = 2 * torch.rand(20 * n, 2, generator=generator, dtype=torch.float64) - 1
        accepted = torch.rand(20 * n, generator=generator, dtype=torch.float64) < self.energy(actions).exp()
        return actions[accepted][:n]

    def posterior_noise(self, a_t, t, schedule=EXACT_SCHEDULE, nodes=64):
        """By Gauss-Legendre quadrature over the part of the box within 8 standard deviations of φ's mean."""
        signal, noise, x = schedule.signal[t], schedule.noise[t], a_t.double()
        nodes, weights = (torch.from_numpy(z) for z in np.polynomial.legendre.leggauss(nodes))
        low, high = ((x + side * 8 * noise) / signal for side in (-1, 1))
        low, high = low.clamp(-1, 1), high.clamp(-1, 1)
        axes = (low + high)[..., None] / 2 + (high - low)[..., None] / 2 * nodes  # (n, 2, nodes)
        first, second = axes[:, 0, :, None], axes[:, 1, None, :]
        energy = -((torch.sqrt(first**2 + second**2) - self.radius) ** 2) / (2 * self.width**2)
        eps = (x[..., None] - signal * axes) / noise
        phi = -eps.square() / 2
        density = torch.log(weights[:, None] * weights) + energy + phi[:, 0, :, None] + phi[:, 1, None, :]
        density = torch.softmax(density.flatten(1), 1).view(density.shape)
        return torch.stack([(density.sum(2) * eps[:, 0]).sum(1), (density.sum(1) * eps[:, 1]).sum(1)], dim=1)


def make_target(name, dim):
    """The energies of this study, by name."""
    if name in ("Gaussian", "broad"):
        return Mixture([[0.25] * dim], 0.25 if name == "Gaussian" else 0.5, [1.0])
    if name == "two modes":  # the paper's 0.8 N((3, 3), I) + 0.2 N((-3, -3), I), scaled by 1/6 into the box
        return Mixture([[0.5] * dim, [-0.5] * dim], 1 / 6, [0.8, 0.2])
    return Ring(0.9, 0.1)


class ExactDenoiser:
    """The true E[ε | a_t] with the interface that sample_actions() needs."""

    def __init__(self, target, schedule=EXACT_SCHEDULE):
        self.target, self.schedule, self.sizes = target, schedule, [target.dim]

    def embed_obs(self, obs):
        return torch.zeros(len(obs), 1)

    def embed_time(self, t):
        return t[:, None].float()

    def __call__(self, context, a_t):
        t = int(context.max())
        chunks = [self.target.posterior_noise(x, t, self.schedule) for x in a_t[:, 0].split(500)]
        return torch.cat(chunks)[:, None].to(a_t)


def policy_samples(denoiser, n, generator, schedule=SCHEDULE):
    """n samples of the policy by the script's sampler, with one particle, so that nothing is chosen by its energy."""
    no_choice = lambda obs, actions: torch.zeros(2, *actions.shape[:2])  # noqa: E731
    return sdac.sample_actions(denoiser, no_choice, schedule, torch.zeros(n, 1), 1, generator)


def sliced_wasserstein(x, y):
    """Mean over 128 random directions of the Wasserstein-1 distance of two samples (n, d) projected onto them."""
    directions = torch.randn(x.shape[1], 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    directions /= directions.norm(dim=0)
    return ((x.double() @ directions).sort(0)[0] - (y.double() @ directions).sort(0)[0]).abs().mean().item()


@lru_cache
def test_set(name, dim):
    """For every t, true noised actions and the true E[ε | a_t]; and true samples. The same for all methods."""
    target, generator = make_target(name, dim), torch.Generator().manual_seed(12345)
    points = []
    for t in range(T):
        a_0 = target.sample(TEST_POINTS, generator)
        a_t = EXACT_SCHEDULE.add_noise(a_0, torch.randn(a_0.shape, generator=generator, dtype=torch.float64), t)
        points.append((a_t.float(), target.posterior_noise(a_t, t)))
    return points, target.sample(SAMPLES, generator)


@torch.no_grad()
def score_errors(denoiser, name, dim):
    """Mean squares of the error of the predicted noise and of the true one, at every t: (T, 2)."""
    errors, obs = [], torch.zeros(TEST_POINTS, 1)
    for t, (a_t, true) in enumerate(test_set(name, dim)[0]):
        context = denoiser.embed_obs(obs) + denoiser.embed_time(torch.full((TEST_POINTS,), t))
        error = denoiser(context, a_t).double() - true
        errors.append([error.square().mean().item(), true.square().mean().item()])
    return np.array(errors)


def relative(squares):
    """Relative error from mean squares (..., 2) of error and truth."""
    return np.sqrt(squares[..., 0] / squares[..., 1]).tolist()


def train(name, dim, method, num_samples, seed, steps=STEPS):
    """Trains a denoiser on one energy and measures it. Returns results, samples of the policy, and the denoiser."""
    torch.manual_seed(seed)
    target, generator = make_target(name, dim), torch.Generator().manual_seed(seed)
    critics = lambda obs, actions: target.energy(actions).expand(2, -1, -1)  # noqa: E731
    denoiser = sdac.Denoiser(1, dim)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    obs, q_mean, q_std = torch.zeros(BATCH, 1), torch.tensor(0.0), torch.tensor(1.0)
    curve, seconds, start = [], 0.0, time.process_time()
    for step in range(steps):
        if method == "denoising":
            a_0 = target.sample(BATCH, generator).float()
        else:
            if step % 40 == 0:  # fresh samples of the policy, from which 40 steps draw
                pool = policy_samples(denoiser, 1024, generator)
            a_0 = pool[torch.randint(len(pool), (BATCH,), generator=generator)]
        t = torch.randint(T, (BATCH, 1), generator=generator)
        eps = torch.randn(BATCH, dim, generator=generator)
        a_t, weights = SCHEDULE.add_noise(a_0, eps, t), 1.0
        if method == "mirror-descent":
            q = target.energy(a_0)
            q_mean, q_std = q_mean.lerp(q.mean(), 0.001), q_std.lerp(q.std(), 0.001)
            weights = sdac.mirror_descent_weights(q, q_mean, q_std, sdac.INITIAL_ALPHA)  # at λ = α/5 = 1
        elif method != "denoising":
            proposal = "clip" if method == "clip" else "truncate"
            uniform = uniforms(method, BATCH, num_samples, dim, generator, torch.float32)
            eps, _ = sdac.rsm_target(critics, SCHEDULE, obs, a_t, t, 1.0, uniform, proposal)
        loss = sdac.rsm_loss(denoiser, obs, a_t, t, eps, weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        if (step + 1) % (steps // 10) == 0:
            seconds += time.process_time() - start
            curve.append((seconds, relative(score_errors(denoiser, name, dim).mean(0))))
            start = time.process_time()
    result = {"target": name, "dim": dim, "method": method, "M": num_samples, "seed": seed, "steps": steps}
    samples = policy_samples(denoiser, SAMPLES, generator)
    return result | measure(denoiser, samples, name, dim) | {"curve": curve}, samples, denoiser


def measure(denoiser, samples, name, dim):
    """Score error at each t, distance of the policy's samples to true ones, share of samples at the first mode."""
    result = {"distance": sliced_wasserstein(samples, test_set(name, dim)[1])}
    if isinstance(denoiser, sdac.Denoiser):
        squares = score_errors(denoiser, name, dim)
        result |= {"score_errors": relative(squares), "score_error": relative(squares.mean(0))}
    if name == "two modes":
        result["first_mode"] = make_target(name, dim).first_mode(samples)
    return result


def floors(name, dim):
    """What to compare with: two sets of true samples, and the true score in the sampler. Returns its samples too."""
    generator, true = torch.Generator().manual_seed(99), test_set(name, dim)[1]
    target = make_target(name, dim)
    sets = [target.sample(SAMPLES, generator) for _ in range(10)]
    result = {"target": name, "dim": dim, "distance_floor": float(np.mean([sliced_wasserstein(x, true) for x in sets]))}
    if name == "two modes":
        result["first_mode"] = float(np.mean([target.first_mode(x) for x in sets]))
    exact = ExactDenoiser(target)
    samples = policy_samples(exact, SAMPLES, generator)
    return result | {"exact": measure(exact, samples, name, dim)}, samples


def exact_sampler(steps, name="Gaussian", dim=2):
    """The sampler with the true score and T = steps: what it does to the standard deviation of a Gaussian's samples."""
    schedule = sdac.NoiseSchedule(steps, sdac.Args.beta_scale)
    exact_schedule = sdac.NoiseSchedule(steps, sdac.Args.beta_scale, dtype=torch.float64)
    denoiser = ExactDenoiser(make_target(name, dim), exact_schedule)
    samples = policy_samples(denoiser, SAMPLES, torch.Generator().manual_seed(1), schedule)
    true = test_set(name, dim)[1]
    return {"T": steps, "std": samples.std(0).mean().item(), "true_std": true.std(0).mean().item()}


def uniforms(kind, batch, num_samples, dim, generator, dtype=torch.float64):
    """Points (B, M, d), each uniform on the unit cube, from which reverse_samples() makes reverse samples.

    Every kind keeps each single point uniform, so numerator and denominator of Σ w_i ε_i, means of exp(Q/λ) ε and of
    exp(Q/λ) over φ, are estimated without bias, as with independent points; only the points' dependence differs.
    "antithetic": pairs u, 1-u. "stratified": in each coordinate one point per interval of length 1/M (Latin hypercube).
    "sobol": one fixed set of Sobol points plus a uniform shift for each state, modulo 1 (Cranley & Patterson, 1976):
    u + shift mod 1 is uniform for any fixed u, and the set stays evenly spread."""
    rand = lambda *shape: torch.rand(shape, generator=generator, dtype=dtype)  # noqa: E731
    if kind == "antithetic":
        half = rand(batch, num_samples // 2, dim)
        return torch.cat([half, 1 - half], dim=1)
    if kind == "stratified":
        order = rand(batch, num_samples, dim).argsort(1)
        return (order + rand(batch, num_samples, dim)) / num_samples
    if kind == "sobol":
        points = torch.quasirandom.SobolEngine(dim, scramble=True, seed=0).draw(num_samples, dtype=dtype)
        return (points + rand(batch, 1, dim)) % 1
    return rand(batch, num_samples, dim)


def local_mixture(target, a_0, a_t, t, num_samples, std, generator):
    """Σ w_i ε_i when half of the reverse samples come from φ and half from N(a_0, std² I), both truncated to the box.

    With q = (φ + N)/2 the density that a random one of the samples has, the weights that keep the limit are
    w_i ∝ exp(Q(â_i)/λ) φ(â_i)/q(â_i) (multiple importance sampling with the balance heuristic; Veach & Guibas, 1995).
    a_0 is the action from which a_t was made: if the policy is π already, it is a sample of p(a_0 | a_t)."""
    half, dim, step = num_samples // 2, a_t.shape[1], torch.full((len(a_t), 1), t)
    _, near_t = sdac.reverse_samples(
        EXACT_SCHEDULE, a_t, step, uniforms("independent", len(a_t), half, dim, generator), "truncate"
    )
    u = uniforms("independent", len(a_t), half, dim, generator)
    low, high = (torch.special.ndtr((side - a_0[:, None]) / std) for side in (-1, 1))
    near_0 = (a_0[:, None] + std * torch.special.ndtri(low + u * (high - low))).clamp(-1, 1)
    a_hat = torch.cat([near_t, near_0], dim=1)
    width, eps = EXACT_SCHEDULE.noise[t] / EXACT_SCHEDULE.signal[t], EXACT_SCHEDULE.predict_a0(a_t, 0.0, t)[:, None]
    center, eps = eps, (eps - a_hat) / width

    def log_density(mean, scale):
        inside = normal_interval((-1 - mean) / scale, (1 - mean) / scale)
        return (-(((a_hat - mean) / scale) ** 2) / 2 - (inside * scale).log()).sum(-1)

    phi, near = log_density(center, width), log_density(a_0[:, None], std)
    weights = torch.softmax(target.energy(a_hat) + phi - torch.logaddexp(phi, near), 1)
    return (weights[..., None] * eps).sum(1)


def variance_study(name, dim, states=250):
    """Error of Σ w_i ε_i itself, for M samples, at every t; share clipped, effective samples."""
    target, rows = make_target(name, dim), []
    generator = torch.Generator().manual_seed(dim)
    for t in range(T):
        a_0, step = target.sample(states, generator), torch.full((states, 1), t)
        a_t = EXACT_SCHEDULE.add_noise(a_0, torch.randn(a_0.shape, generator=generator, dtype=torch.float64), t)
        true = target.posterior_noise(a_t, t)
        estimates, row = {}, {"target": name, "dim": dim, "t": t}
        for kind in ("clip", "independent", "antithetic", "stratified", "sobol"):
            uniform = uniforms(kind, states, M, dim, generator)
            eps, a_hat = sdac.reverse_samples(
                EXACT_SCHEDULE, a_t, step, uniform, "clip" if kind == "clip" else "truncate"
            )
            weights = torch.softmax(target.energy(a_hat), 1)
            estimates[kind] = (weights[..., None] * eps).sum(1)
            if kind == "clip":
                row["clipped_coordinates"] = (a_hat.abs() == 1).double().mean().item()
                row["clipped_samples"] = (a_hat.abs() == 1).any(2).double().mean().item()
            if kind == "independent":
                row["effective_samples"] = (1 / weights.square().sum(1)).mean().item()
        for std in (0.1, 0.3):
            estimates[f"local {std}"] = local_mixture(target, a_0, a_t, t, M, std, generator)
        squares = {kind: [(x - true).square().mean(), true.square().mean()] for kind, x in estimates.items()}
        rows.append(row | {"error": {kind: relative(np.array(value)) for kind, value in squares.items()}})
    return rows


def subplots(*shape, **options):
    import matplotlib  # here, so that the tests need no matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(*shape, **options)


def draw_densities(samples, runs, path):
    """2-D histograms of samples: truth, the sampler with the true score, and the trained policies of the first seed."""
    names = list(dict.fromkeys(name for name, _ in samples))
    columns = ["truth", "exact", *(method for method in COLORS if method != "sobol")]
    figure, axes = subplots(len(names), len(columns), figsize=(2.1 * len(columns), 2.35 * len(names)))
    for row, name in zip(axes, names, strict=True):
        highest = None
        for axis, column in zip(row, columns, strict=True):
            counts, _, _ = np.histogram2d(*samples[name, column].T, bins=50, range=[[-1, 1]] * 2)
            highest = highest or counts.max()
            axis.imshow(counts.T, origin="lower", extent=(-1, 1, -1, 1), vmin=0, vmax=highest, cmap="magma")
            axis.set(xticks=[], yticks=[], title=column if name == names[0] else None)
            distance = runs.get((name, column))
            axis.set_xlabel(f"distance {distance:.3f}" if distance else "", fontsize="small")
        row[0].set_ylabel(name)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def draw_scores(denoisers, path):
    """Learned and true score fields of the two-mode energy at four noise levels, over the true noised density."""
    target, times = make_target("two modes", 2), [2, 5, 9, 14]
    figure, axes = subplots(3, 4, figsize=(12, 9.3), sharex="col", sharey="col")
    generator = torch.Generator().manual_seed(0)
    for column, t in enumerate(times):
        a_0 = target.sample(40_000, generator)
        a_t = EXACT_SCHEDULE.add_noise(a_0, torch.randn(a_0.shape, generator=generator, dtype=torch.float64), t)
        reach = float(a_t.abs().quantile(0.995))
        line = torch.linspace(-reach, reach, 15)
        grid = torch.cartesian_prod(line, line)
        fields = {"truth": target.posterior_noise(grid.double(), t)}
        for name, denoiser in denoisers.items():
            obs = torch.zeros(len(grid), 1)
            with torch.no_grad():
                context = denoiser.embed_obs(obs) + denoiser.embed_time(torch.full((len(grid),), t))
                fields[name] = denoiser(context, grid)
        for axis, (name, field) in zip(axes[:, column], fields.items(), strict=True):
            axis.hist2d(*a_t.T.numpy(), bins=60, range=[[-reach, reach]] * 2, cmap="Blues")
            axis.quiver(*grid.T.numpy(), *-field.T.numpy(), color=COLORS.get(name, "k"), scale=45, width=0.005)
            axis.set(title=f"{name}, t = {t}", xticks=[], yticks=[])
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def draw_errors(runs, limits, rows, sampler, path):
    """Score error against t, dimension, seconds and M; distance and mode weight; clipping; what the sampler does."""
    figure, axes = subplots(2, 4, figsize=(18, 7.4), layout="constrained")

    def curves(axis, x, y, keep, **style):
        for method, color in COLORS.items():
            chosen = [run for run in runs if run["method"] == method and keep(run)]
            groups = {}
            for run in chosen:
                for a, b in zip(np.atleast_1d(x(run)), np.atleast_1d(y(run)), strict=True):
                    groups.setdefault(float(a), []).append(b)
            if not groups:
                continue
            xs = sorted(groups)
            mean, low, high = ([f(groups[a]) for a in xs] for f in (np.mean, min, max))
            axis.plot(xs, mean, color=color, label=method, **style)
            axis.fill_between(xs, low, high, color=color, alpha=0.2, linewidth=0)

    two = lambda run: run["target"] == "two modes" and run["steps"] == LONG  # noqa: E731
    six = lambda run: run["target"] == "two modes" and run["dim"] == 6  # noqa: E731
    modes = lambda run: run["target"] == "two modes" and run["M"] == M and run["steps"] == STEPS  # noqa: E731
    curves(axes[0, 0], lambda run: range(T), lambda run: run["score_errors"], two)
    axes[0, 0].set(title="two modes, d = 2", xlabel="t", ylabel="score error", yscale="log")
    curves(axes[0, 1], lambda run: run["dim"], lambda run: run["score_error"], modes, marker="o")
    axes[0, 1].set(title="two modes", xlabel="action dimension", xticks=DIMENSIONS, ylabel="score error", yscale="log")
    points = {  # the mean over seeds of the seconds, so that curves of several seeds can be averaged
        method: np.mean([[s for s, _ in run["curve"]] for run in runs if run["method"] == method and six(run)], 0)
        for method in COLORS
    }
    curves(
        axes[0, 2], lambda run: points[run["method"]], lambda run: [e for _, e in run["curve"]],
        lambda run: six(run) and run["M"] == M,
    )  # fmt: skip
    axes[0, 2].set(title="two modes, d = 6", xlabel="seconds of one core", ylabel="score error", yscale="log")
    curves(axes[1, 0], lambda run: run["M"], lambda run: run["score_error"], six, marker="o")
    axes[1, 0].set(title="two modes, d = 6", xlabel="M, reverse samples", ylabel="score error", yscale="log")
    axes[1, 0].set_xscale("log", base=2)
    curves(axes[1, 1], lambda run: run["dim"], lambda run: run["distance"], modes, marker="o")
    chosen = sorted((limit for limit in limits if limit["target"] == "two modes"), key=lambda limit: limit["dim"])
    dims = [limit["dim"] for limit in chosen]
    axes[1, 1].plot(dims, [limit["exact"]["distance"] for limit in chosen], "k--", label="exact")
    axes[1, 1].plot(dims, [limit["distance_floor"] for limit in chosen], "k:", label="floor")
    axes[1, 1].set(
        title="two modes", xlabel="action dimension", xticks=DIMENSIONS, ylabel="distance to true samples", yscale="log"
    )
    curves(axes[1, 2], lambda run: run["dim"], lambda run: run["first_mode"], modes, marker="o")
    axes[1, 2].plot(dims, [limit["exact"]["first_mode"] for limit in chosen], "k--")
    axes[1, 2].plot(dims, [limit["first_mode"] for limit in chosen], "k:")
    axes[1, 2].set(
        title="two modes", xlabel="action dimension", xticks=DIMENSIONS, ylabel="share of samples at the first mode"
    )
    axes[1, 1].legend(fontsize="small")
    for i, dim in enumerate((1, 2, 6, 17)):
        chosen = [row for row in rows if row["target"] == "two modes" and row["dim"] == dim]
        t, color = [row["t"] for row in chosen], ["#c6dbef", "#6baed6", "#2171b5", "#08306b"][i]
        axes[0, 3].plot(t, [row["clipped_samples"] for row in chosen], color=color, label=f"clipped, d = {dim}")
        axes[0, 3].plot(t, [row["effective_samples"] / M for row in chosen], ":", color=color)
    axes[0, 3].set(title="two modes: share of reverse samples", xlabel="t", ylabel="outside the box (dots: effective)")
    axes[0, 3].legend(fontsize="small")
    sampler = sorted(sampler, key=lambda row: row["T"])
    axes[1, 3].plot([row["T"] for row in sampler], [row["std"] for row in sampler], "ko--", label="exact")
    axes[1, 3].axhline(sampler[0]["true_std"], color="k", linestyle=":", label="true")
    axes[1, 3].set(
        title="Gaussian, d = 2, true score", xlabel="T", ylabel="standard deviation of samples", ylim=(0, None)
    )
    axes[1, 3].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def draw_variance(rows, path):
    """Error of the estimated posterior mean of the noise against t for several proposals, three dimensions."""
    names, dims = list(dict.fromkeys(row["target"] for row in rows)), [1, 2, 6, 17]
    figure, axes = subplots(len(names), 4, figsize=(15, 3.5 * len(names)), layout="constrained")
    for line, name in zip(axes, names, strict=True):
        for axis, dim in zip(line, dims, strict=True):
            chosen = [row for row in rows if row["target"] == name and row["dim"] == dim]
            for kind in chosen[0]["error"]:
                axis.plot([row["t"] for row in chosen], [row["error"][kind] for row in chosen], label=kind)
            samples = [row["effective_samples"] for row in chosen]
            axis.set_title(f"{name}, d = {dim}; effective samples ≥ {min(samples):.1f}", fontsize="medium")
            axis.set(yscale="log", xlabel="t", ylabel="relative error of Σ w ε")
    axes[0, 0].legend(fontsize="x-small")
    figure.savefig(path, dpi=100)


def work(job):
    kind, *arguments = job
    functions = {"train": train, "floors": floors, "variance": variance_study, "sampler": exact_sampler}
    return kind, functions[kind](*arguments)


def set_up():
    torch.set_num_threads(1)  # one process a core
    with redirect_stdout(None):
        sdac.set_up_torch(sdac.Args(cuda=False, compile=False))


def main():
    start, results = time.time(), ROOT / "benchmark" / "results" / "toy"
    results.mkdir(parents=True, exist_ok=True)
    energies = [(name, dim) for name in ("Gaussian", "two modes") for dim in DIMENSIONS]
    jobs = [("train", *energy, method, M, seed) for energy in energies for method in COLORS for seed in SEEDS]
    energies.append(("ring", 2))
    pictured = [(name, method) for name in ("Gaussian", "two modes", "ring") for method in COLORS if method != "sobol"]
    jobs += [("train", name, 2, method, M, seed, LONG) for name, method in pictured for seed in SEEDS]
    for num_samples in (4, 16, 256):
        jobs += [
            ("train", "two modes", 6, x, num_samples, seed) for x in ("truncate", "sobol", "clip") for seed in SEEDS
        ]
    jobs += [("floors", *energy) for energy in energies]
    jobs += [("variance", name, dim) for name in ("Gaussian", "two modes", "broad") for dim in (1, 2, 6, 17)]
    jobs += [("sampler", steps) for steps in (5, 10, 20, 50, 100)]
    jobs.sort(key=lambda job: (-len(job), -job[min(2, len(job) - 1)]))  # the longest first
    runs, limits, rows, sampler, samples, distances, denoisers = [], [], [], [], {}, {}, {}
    with multiprocessing.get_context("spawn").Pool(initializer=set_up) as pool:
        for kind, result in tqdm(pool.imap_unordered(work, jobs), total=len(jobs), disable=None):
            if kind == "variance":
                rows += result
                continue
            if kind == "sampler":
                sampler.append(result)
                continue
            facts, drawn = result[:2]
            (runs if kind == "train" else limits).append(facts)
            if facts["dim"] == 2 and facts.get("seed", 1) == 1 and facts.get("steps", LONG) == LONG:
                key = facts["target"], facts.get("method", "exact")
                samples[key], distances[key] = drawn, facts.get("exact", facts)["distance"]
                if key in (("two modes", "truncate"), ("two modes", "clip")):
                    denoisers[key[1]] = result[2]
    for name in ("Gaussian", "two modes", "ring"):
        samples[name, "truth"] = test_set(name, 2)[1]
        distances[name, "truth"] = next(x for x in limits if (x["target"], x["dim"]) == (name, 2))["distance_floor"]
    draw_densities(dict(sorted(samples.items())), distances, results / "densities.png")
    draw_scores(dict(sorted(denoisers.items(), reverse=True)), results / "scores.png")
    draw_errors(runs, limits, rows, sampler, results / "errors.png")
    draw_variance(rows, results / "variance.png")
    order = lambda facts: [str(facts.get(name)) for name in ("target", "dim", "method", "M", "seed", "steps", "t")]  # noqa: E731
    facts = {"machine": {"cpu": cpu_name(), "cores": os.cpu_count()}, "versions": versions()}
    facts |= {"seconds": time.time() - start, "batch": BATCH, "M": M, "T": T, "seeds": SEEDS}
    tables = {"limits": limits, "sampler": sampler, "training": runs, "variance": rows}
    lines = [f'"{name}": {json.dumps(value)}' for name, value in facts.items()]
    for name, table in tables.items():
        short = [json.dumps(row, ensure_ascii=False) for row in sorted(table, key=order)]
        lines.append(f'"{name}": [\n' + ",\n".join(re.sub(r"(\.\d{4})\d+", r"\1", row) for row in short) + "\n]")
    (results / "toy.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print_table(runs, limits)


def print_table(runs, limits):
    """The README's table: mean over seeds, at the default M; in two dimensions after LONG steps."""
    print("| energy, d | quantity | floor | exact | " + " | ".join(COLORS) + " |\n" + "|---" * (4 + len(COLORS)) + "|")
    for limit in sorted(limits, key=lambda limit: (limit["target"], limit["dim"])):
        key = limit["target"], limit["dim"]
        for quantity in ("score_error", "distance", "first_mode"):
            if quantity not in limit["exact"] and quantity != "score_error":
                continue
            cells = [limit.get({"distance": "distance_floor"}.get(quantity, quantity)), limit["exact"].get(quantity)]
            for method in COLORS:
                wanted = (*key, method, M, LONG if key[1] == 2 else STEPS)
                chosen = [r for r in runs if tuple(r[k] for k in ("target", "dim", "method", "M", "steps")) == wanted]
                cells.append(np.mean([run[quantity] for run in chosen]) if chosen else None)
            numbers = " | ".join("" if cell is None else f"{cell:.3f}" for cell in cells)
            print(f"| {key[0]}, {key[1]} | {quantity.replace('_', ' ')} | {numbers} |")


if __name__ == "__main__":
    main()
