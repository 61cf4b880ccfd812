"""Does the diffusion policy sample exp(Q/λ)? Trains it on energies Q/λ that are known, without an environment.

    python benchmark/toy.py      # about 20 minutes on 2 cores; writes benchmark/results/toy/

Denoiser, noise schedule, reverse samples, loss and sampler are those of sdac_continuous_action.py; the critics are
replaced by the energy, there is one state, and one particle is sampled, so that no choice among particles hides an
error. The noised actions of the loss come, as in the algorithm, from the policy's own samples. Compared, with 3 seeds:
    truth           true samples of exp(Q/λ): the distance between two sets of them is the floor
    exact           no learning, the true posterior mean of the noise: what the sampler's T steps alone do wrong
    truncate, clip  two of the --reverse-proposal
    mirror-descent  --weighting mirror-descent, from the policy's own samples
    denoising       denoising score matching on true samples, which no reinforcement learner has
on the default noise levels; exact and (one seed) truncate on both --schedule with several T; exact on other ends.

Score error: for each noise level t, sqrt(E‖ε_θ - ε*‖² / E‖ε*‖²) over true noised actions, ε* = E[ε | a_t] being in
closed form or by quadrature; 1 is the error of always predicting 0. Where one number is given, both expectations run
over t too. Distance: the sliced Wasserstein-1 distance to true samples, in units of half the box.
Written: densities.png, scores.png, errors.png, levels.png, and the numbers in toy.json; tables are printed."""

import importlib
import json
import math
import multiprocessing
import os
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from speed import cpu_name, versions
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sdac = importlib.import_module("sdac_continuous_action")

M, BATCH, STEPS, LONG, SAMPLES, TEST_POINTS = sdac.Args.num_reverse_samples, 128, 700, 2000, 4000, 500
COLORS = {"truth": "k", "exact": "C2", "truncate": "C0", "clip": "C3", "mirror-descent": "C1", "denoising": "0.3"}
SEEDS, NAMES, DIMENSIONS = (1, 2, 3), ("Gaussian", "ring", "two modes"), [2, 6, 17]
ENERGIES = [(name, dim) for dim in DIMENSIONS for name in NAMES if name != "ring" or dim == 2]
DEFAULT = {"schedule": sdac.Args.schedule, "T": sdac.Args.denoising_steps}
ALL_T = sorted({4, 6, 8, 10, 14, 20, DEFAULT["T"]})
LEVELS = [{"schedule": schedule, "T": T} for schedule in ("log-snr", "linear") for T in ALL_T]
ENDS = [(0.05, 5), (0.05, 4), (0.05, 3), (0.05, 2), (0.02, 5), (0.1, 4), (0.1, 3)]
END_POINTS = [dict(T=10, low=low, high=high, rho=None) for low, high in ENDS] + [dict(T=10, low=0.05, high=4, rho=7)]


class Spaced(sdac.NoiseSchedule):
    """Noise/signal from low to high, even in its logarithm or, given rho, in its power 1/rho (Karras et al., 2022)."""

    def __init__(self, num_steps, low, high, rho=None):
        u = torch.linspace(0, 1, num_steps, dtype=torch.float64)
        ratio = low * (high / low) ** u
        if rho is not None:
            ratio = (low ** (1 / rho) + u * (high ** (1 / rho) - low ** (1 / rho))) ** rho
        before = torch.cat([torch.zeros(1, dtype=torch.float64), ratio[:-1]])
        signal_before, kept = (1 + before**2).rsqrt(), (before / ratio) ** 2
        self.num_steps, self.initial_std = num_steps, 1.0
        self.signal, self.noise = (1 + ratio**2).rsqrt(), ratio * (1 + ratio**2).rsqrt()
        # of a_{t-1}/√ᾱ_{t-1} given a_0 and a_t: mean a_0 + kept (a_t/√ᾱ_t - a_0), variance before² (1 - kept)
        self.posterior_a0 = signal_before * (1 - kept)
        self.posterior_at = signal_before * kept / self.signal
        self.posterior_std = signal_before * before * (1 - kept).sqrt()


@lru_cache
def make_schedule(dtype, T, schedule=None, **ends):
    """Noise levels of the script, or with ends of our choice: float32 where networks are, float64 for what is exact."""
    return Spaced(T, **ends) if schedule is None else sdac.NoiseSchedule(T, schedule, dtype=dtype)


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

    def posterior_noise(self, a_t, t, schedule):
        """E[ε | a_t] (n, d): for each mode p(a_0 | a_t) is a Gaussian truncated to the box, its mean in closed form."""
        signal, noise, x = schedule.signal[t], schedule.noise[t], a_t[:, None].double()
        variance = (signal * self.std) ** 2 + noise**2
        mean, std = (self.std**2 * signal * x + noise**2 * self.means) / variance, self.std * noise / variance.sqrt()
        low, high = (-1 - mean) / std, (1 - mean) / std
        inside = normal_interval(low, high)
        log_weights = self.log_weights + (inside.log() - (x - signal * self.means) ** 2 / (2 * variance)).sum(-1)
        pdf_low, pdf_high = (torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) for z in (low, high))
        a_0 = (torch.softmax(log_weights, 1)[..., None] * (mean + std * (pdf_low - pdf_high) / inside)).sum(1)
        return (a_t - signal * a_0) / noise


class Ring:
    """Q/λ = -(‖a‖ - radius)²/(2 width²) in two dimensions; with a radius near 1 the edge of the box cuts it."""

    radius, width, dim = 0.9, 0.1, 2

    def energy(self, actions):
        return -(actions.norm(dim=-1) - self.radius).square() / (2 * self.width**2)

    def sample(self, n, generator):
        """By rejection from the uniform distribution on the box."""
        actions = 2 * torch.rand(20 * n, 2, generator=generator, dtype=torch.float64) - 1
        accepted = torch.rand(20 * n, generator=generator, dtype=torch.float64) < self.energy(actions).exp()
        return actions[accepted][:n]

    def posterior_noise(self, a_t, t, schedule, nodes=300):
        """By Gauss-Legendre quadrature over the box: φ is a product of two factors, so the sums are matrix products."""
        nodes, weights = (torch.from_numpy(z) for z in np.polynomial.legendre.leggauss(nodes))
        density = self.energy(torch.stack(torch.meshgrid(nodes, nodes, indexing="ij"), -1)).exp()
        eps = (a_t.double()[..., None] - schedule.signal[t] * nodes) / schedule.noise[t]  # (n, 2, nodes)
        first, second = torch.softmax(weights.log() - eps.square() / 2, -1).unbind(1)
        mass = (first @ density * second).sum(1)
        sums = ((first * eps[:, 0]) @ density * second).sum(1), (first @ density * second * eps[:, 1]).sum(1)
        return torch.stack(sums, dim=1) / mass[:, None]


def make_target(name, dim):
    """The energies of this study, by name."""
    if name == "Gaussian":
        return Mixture([[0.25] * dim], 0.25, [1.0])
    if name == "two modes":  # the paper's 0.8 N((3, 3), I) + 0.2 N((-3, -3), I), scaled by 1/6 into the box
        return Mixture([[0.5] * dim, [-0.5] * dim], 1 / 6, [0.8, 0.2])
    return Ring()


class ExactDenoiser:
    """The true E[ε | a_t] of a schedule, with the interface that sample_actions() needs."""

    def __init__(self, target, schedule):
        self.target, self.schedule, self.action_dim = target, schedule, target.dim

    def __call__(self, obs, a_t, t, dtype=None):
        return self.target.posterior_noise(a_t[:, 0], t, self.schedule)[:, None]


def policy_samples(denoiser, n, generator, schedule):
    """n samples of the policy by the script's sampler, with one particle, so that nothing is chosen by its energy."""
    no_choice = lambda obs, actions: torch.zeros(2, *actions.shape[:2], 1)  # noqa: E731
    obs = torch.zeros(n, 1, dtype=schedule.signal.dtype)
    return sdac.sample_actions(denoiser, no_choice, schedule, obs, 1, generator)


def sliced_wasserstein(x, y):
    """Mean over 128 random directions of the Wasserstein-1 distance of two samples (n, d) projected onto them."""
    directions = torch.randn(x.shape[1], 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    directions /= directions.norm(dim=0)
    return ((x.double() @ directions).sort(0)[0] - (y.double() @ directions).sort(0)[0]).abs().mean().item()


def noised(target, n, t, schedule, generator):
    """True samples with the noise of level t: (n, d)."""
    a_0 = target.sample(n, generator)
    return schedule.signal[t] * a_0 + schedule.noise[t] * torch.randn(a_0.shape, generator=generator, dtype=a_0.dtype)


@torch.no_grad()
def score_errors(denoiser, name, dim, levels):
    """sqrt(E‖ε_θ - ε*‖² / E‖ε*‖²) at every noise level, and over all of them."""
    target, generator = make_target(name, dim), torch.Generator().manual_seed(54321)
    schedule, squares = make_schedule(torch.float64, **levels), []
    for t in range(schedule.num_steps):
        a_t = noised(target, TEST_POINTS, t, schedule, generator)
        true = target.posterior_noise(a_t, t, schedule)
        predicted = denoiser(torch.zeros(TEST_POINTS, 1), a_t[:, None].float(), torch.tensor(t))[:, 0]
        squares.append([(predicted - true).square().mean().item(), true.square().mean().item()])
    error, true = np.array(squares).T
    return np.sqrt(error / true).round(4).tolist(), round(math.sqrt(error.sum() / true.sum()), 4)


def measure(samples, name, dim):
    """Distance to true samples; a Gaussian's standard deviation; the share of samples nearest to the first of modes."""
    others = make_target(name, dim).sample(len(samples), torch.Generator().manual_seed(12345))
    result = {"distance": sliced_wasserstein(samples, others)}
    if name == "Gaussian":
        result["std"] = samples.std(0).mean().item()
    if name == "two modes":
        nearest = torch.cdist(samples.double(), make_target(name, dim).means).argmin(1)
        result["first_mode"] = (nearest == 0).double().mean().item()
    return {quantity: round(value, 4) for quantity, value in result.items()}


def train(name, dim, method, seed, num_samples=M, levels=DEFAULT, steps=None):
    """A denoiser trained on one energy."""
    torch.manual_seed(seed)
    target, generator = make_target(name, dim), torch.Generator().manual_seed(seed)
    schedule, denoiser = make_schedule(torch.float32, **levels), sdac.Denoiser(1, dim)
    steps, q_mean, q_std = steps or (LONG if dim == 2 else STEPS), torch.tensor(0.0), torch.tensor(1.0)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        if step % 40 == 0 and method != "denoising":
            pool = policy_samples(denoiser, 512, generator, schedule)
        index = torch.randint(512, (BATCH,), generator=generator)
        a_0 = target.sample(BATCH, generator).float() if method == "denoising" else pool[index]
        t = torch.randint(schedule.num_steps, (BATCH, 1), generator=generator)
        eps, weights = torch.randn(BATCH, dim, generator=generator), 1.0
        a_t = schedule.signal[t] * a_0 + schedule.noise[t] * eps
        prediction = denoiser(torch.zeros(BATCH, 1), a_t[:, None], t[:, 0])[:, 0]
        if method == "mirror-descent":
            q = target.energy(a_0)
            q_mean, q_std = q_mean.lerp(q.mean(), 0.001), q_std.lerp(q.std(), 0.001)
            weights = (((q - q_mean) / q_std).clamp(-3, 3) / sdac.INITIAL_ALPHA).exp()  # at λ = α/5 = 1
        elif method != "denoising":
            uniform = torch.rand(BATCH, num_samples, dim, generator=generator)
            eps, a_hat, log_ratio = sdac.reverse_samples(schedule, a_t, t, uniform, method, prediction.detach())
            eps, _ = sdac.rsm_target(eps, target.energy(a_hat), 1.0, log_ratio)
        sdac.gradient_step(optimizer, (weights * (prediction - eps).square().sum(1)).mean())
        decay.step()
    return denoiser


def study(job):
    """One method on one energy: its samples, measured. A job is (name, dim, method, seed, M, levels)."""
    name, dim, method, seed, _, levels = job
    row = dict(zip(("target", "dim", "method", "seed", "M"), job, strict=False)) | levels
    target, generator, pictured = make_target(name, dim), torch.Generator().manual_seed(seed), {}
    if method == "truth":
        samples = target.sample(SAMPLES, generator)
    elif method == "exact":
        schedule = make_schedule(torch.float64, **levels)
        samples = policy_samples(ExactDenoiser(target, schedule), SAMPLES, generator, schedule)
    else:
        pictured["denoiser"] = denoiser = train(*job)
        samples = policy_samples(denoiser, SAMPLES, generator, make_schedule(torch.float32, **levels))
        row["score_errors"], row["score_error"] = score_errors(denoiser, name, dim, levels)
    pictured["samples"] = samples.numpy()
    row |= measure(samples, name, dim)
    return row | pictured if dim == 2 and seed == SEEDS[0] and levels == DEFAULT else row


def pick(rows, **wanted):
    """The rows that have these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def mean(rows, quantity, **wanted):
    return round(float(np.mean([row[quantity] for row in pick(rows, M=M, **wanted)])), 4)


def subplots(rows, columns, width, height, **shared):
    from matplotlib.figure import Figure  # here, so that the tests need no matplotlib

    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **shared)


def draw_densities(rows, path):
    """2-D histograms of the samples of the first seed."""
    figure, axes = subplots(len(NAMES), len(COLORS), 2.1 * len(COLORS), 2.35 * len(NAMES))
    for line, name in zip(axes, NAMES, strict=True):
        for axis, method in zip(line, COLORS, strict=True):
            row = pick(rows, target=name, dim=2, method=method, seed=SEEDS[0], **DEFAULT)[0]
            counts, _, _ = np.histogram2d(*row["samples"].T, bins=50, range=[[-1, 1]] * 2)
            if method == "truth":
                highest = counts.max()
            axis.imshow(counts.T, origin="lower", extent=(-1, 1, -1, 1), vmin=0, vmax=highest, cmap="magma")
            axis.set(xticks=[], yticks=[], title=method if name == NAMES[0] else None)
            axis.set_xlabel(f"distance {row['distance']:.3f}", fontsize="small")
        line[0].set_ylabel(name)
    figure.savefig(path, dpi=130)


def draw_scores(rows, path):
    """Learned and true score fields of the two-mode energy at four noise levels, over the true noised density."""
    target, schedule = make_target("two modes", 2), make_schedule(torch.float64, **DEFAULT)
    ratio, generator = schedule.noise / schedule.signal, torch.Generator().manual_seed(0)
    denoisers = {row["method"]: row["denoiser"] for row in pick(rows, target="two modes") if "denoiser" in row}
    figure, axes = subplots(3, 4, 12, 9.3, sharex="col", sharey="col")
    for line, wanted in zip(axes.T, (0.1, 0.35, 1, 2.5), strict=True):
        t = (ratio - wanted).abs().argmin()
        a_t = noised(target, 40_000, t, schedule, generator)
        reach = float(a_t.abs().quantile(0.995))
        grid = torch.cartesian_prod(*[torch.linspace(-reach, reach, 15)] * 2)
        obs, fields = torch.zeros(len(grid), 1), {"truth": target.posterior_noise(grid.double(), t, schedule)}
        fields |= {name: denoisers[name](obs, grid[:, None], t)[:, 0].detach() for name in ("truncate", "clip")}
        for axis, (name, field) in zip(line, fields.items(), strict=True):
            axis.hist2d(*a_t.T.numpy(), bins=60, range=[[-reach, reach]] * 2, cmap="Blues")
            axis.quiver(*grid.T.numpy(), *-field.T.numpy(), color=COLORS.get(name, "k"), scale=45, width=0.005)
            axis.set(title=f"{name}, noise/signal {ratio[t]:.2f}", xticks=[], yticks=[])
    figure.savefig(path, dpi=110)


def draw_errors(rows, path):
    """Two modes: score error against t, M and dimension; distance and mode share; mean and range over seeds."""
    figure, axes = subplots(1, 5, 20, 4)
    for method, color in COLORS.items():
        chosen, panels = pick(rows, target="two modes", method=method, **DEFAULT), {}
        for axis, name in zip(axes, ("score_error", "distance", "first_mode"), strict=False):
            axis.set(title="two modes", xlabel="action dimension", xticks=DIMENSIONS, ylabel=name.replace("_", " "))
            panels[axis] = DIMENSIONS, [[row.get(name) for row in pick(chosen, M=M, seed=seed)] for seed in SEEDS]
        if "score_error" in chosen[0]:
            of_m = [sorted((r["M"], r["score_error"]) for r in pick(chosen, dim=6, seed=seed)) for seed in SEEDS]
            panels[axes[3]] = np.array(of_m[0])[:, 0], np.array(of_m)[..., 1]
            panels[axes[4]] = range(DEFAULT["T"]), [row["score_errors"] for row in pick(chosen, dim=2)]
        for axis, (x, ys) in panels.items():
            if ys[0][0] is not None:
                axis.plot(x, np.mean(ys, 0), "o-", color=color, label=method)
                axis.fill_between(x, np.min(ys, 0), np.max(ys, 0), color=color, alpha=0.2, linewidth=0)
    axes[0].set_yscale("log")
    axes[3].set(title="two modes, d = 6", xlabel="M", ylabel="score error", yscale="log", xscale="log")
    axes[4].set(title="two modes, d = 2", xlabel="t", ylabel="score error", yscale="log")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=len(COLORS))
    figure.savefig(path, dpi=80)


def draw_levels(rows, path):
    """Distance to true samples against T for both schedules, with the true score and learned; the mode share too."""
    figure, axes = subplots(2, 4, 15, 7)
    panels = [(*energy, "distance") for energy in ENERGIES] + [("two modes", 17, "first_mode")]
    for axis, (name, dim, quantity) in zip(axes.flat, panels, strict=True):
        for kind, color in (("log-snr", "C0"), ("linear", "C3")):
            for method, style in (("exact", "o-"), ("truncate", "o--")):
                ys = [mean(rows, quantity, target=name, dim=dim, method=method, schedule=kind, T=T) for T in ALL_T]
                axis.plot(ALL_T, ys, style, color=color, label=f"{kind}, {method}")
        axis.axhline(mean(rows, quantity, target=name, dim=dim, method="truth"), color="k", ls=":", label="truth")
        axis.set(title=f"{name}, d = {dim}", xlabel="T", ylabel=quantity.replace("_", " "), ylim=(0, None))
    axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def print_tables(rows):
    """Means over seeds: the methods on the default noise levels and at the default M; distances on all noise levels."""
    methods, distances = [["energy, d", "quantity", *COLORS]], [["exact / truncate"]]
    for name, dim in ENERGIES:
        distances[0].append(f"{name}, {dim}")
        chosen = pick(rows, target=name, dim=dim, **DEFAULT)
        for quantity in ("score_error", "distance", "std", "first_mode"):
            have = {row["method"] for row in chosen if quantity in row}
            cells = [f"{mean(chosen, quantity, method=x):.3f}" if x in have else "" for x in COLORS]
            methods += [[f"{name}, {dim}", quantity.replace("_", " "), *cells]] if have else []
    for levels in LEVELS:
        distances.append([f"{levels['schedule']}, T = {levels['T']}"])
        for name, dim in ENERGIES:
            pair = (mean(rows, "distance", target=name, dim=dim, method=x, **levels) for x in ("exact", "truncate"))
            distances[-1].append("{:.3f} / {:.3f}".format(*pair))
    for first, *others in (methods, distances):
        for line in first, ["---"] * len(first), *others:
            print("| " + " | ".join(line) + " |")
        print()


def set_up():
    torch.set_num_threads(1)  # one process a core


def main():
    start, results = time.time(), ROOT / "benchmark" / "results" / "toy"
    results.mkdir(parents=True, exist_ok=True)
    jobs = [(*energy, x, seed, M, DEFAULT) for energy in ENERGIES for x in COLORS for seed in SEEDS]
    jobs += [("two modes", 6, x, s, m, DEFAULT) for x in ("truncate", "clip") for m in (4, 16, 256) for s in SEEDS]
    for method, all_levels in {"exact": LEVELS + END_POINTS, "truncate": LEVELS}.items():
        others = [levels for levels in all_levels if levels != DEFAULT]
        seeds = SEEDS if method == "exact" else SEEDS[:1]
        jobs += [(*energy, method, seed, M, levels) for energy in ENERGIES for levels in others for seed in seeds]
    with multiprocessing.get_context("spawn").Pool(initializer=set_up) as pool:
        rows = list(tqdm(pool.imap(study, jobs), total=len(jobs), disable=None))
    table = []
    for ends in END_POINTS:
        distances = {f"{name}, {dim}": mean(rows, "distance", target=name, dim=dim, **ends) for name, dim in ENERGIES}
        table.append(ends | distances | {"first mode, 17": mean(rows, "first_mode", target=NAMES[2], dim=17, **ends)})
    facts = {"cpu": cpu_name(), "cores": os.cpu_count(), "versions": versions(), "seconds": round(time.time() - start)}
    runs = [{k: x for k, x in row.items() if k not in ("samples", "denoiser")} for row in rows if "schedule" in row]
    tables = {"study": [facts | {"batch": BATCH, "default": DEFAULT}], "end points": table, "runs": runs}
    lines = [f'"{name}": [\n' + ",\n".join(map(json.dumps, table)) + "\n]" for name, table in tables.items()]
    (results / "toy.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for draw in (draw_densities, draw_scores, draw_errors, draw_levels):
        draw(rows, results / f"{draw.__name__.removeprefix('draw_')}.png")
    print_tables(rows)


if __name__ == "__main__":
    main()
