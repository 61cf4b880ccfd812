"""Does the diffusion policy sample exp(Q/λ)? It is trained on known energies Q/λ, with one state.

    python benchmark/toy.py    # some minutes; writes benchmark/results/toy/

Denoiser, noise levels, reverse samples, loss and sampler are those of sdac_continuous_action.py.
The noised actions of the loss come, as there, from the policy's own samples. One seed. Compared are
    truth      samples of exp(Q/λ): the distance of two sets of them is the least to be hoped for
    exact      the true E[ε | a_t] and no learning: what the T sampling steps alone do wrong
    truncate   the script's reverse samples
    clip       the authors' reverse samples (--published)
    denoising  no energy, but samples of exp(Q/λ), which no reinforcement learner has
Score error: sqrt(E‖ε_θ - ε*‖² / E‖ε*‖²) over noised true samples, with ε* = E[ε | a_t]; predicting
0 has 1. Distance: sliced Wasserstein-1 to true samples; the box of actions is 2 wide. First mode:
the share of samples that are nearest to the first of two modes, of which the truth has 0.8.
"""

import json
import math
from itertools import product
from types import SimpleNamespace

import torch
from common import RESULTS, machine, script
from matplotlib.figure import Figure
from tqdm import tqdm

sdac = script("sdac")
METHODS = ("truth", "exact", "truncate", "clip", "denoising")
T, M = sdac.Args.denoising_steps, sdac.Args.num_reverse_samples
BATCH, STEPS, SAMPLES = 128, 2000, 4000


def normal_probability(low, high):
    """P(low < z < high) of a standard normal z. Only the lower tail of Φ keeps its digits."""
    low, high = torch.where(low > 0, -high, low), torch.where(low > 0, -low, high)
    return (torch.special.erfc(-high / math.sqrt(2)) - torch.special.erfc(-low / math.sqrt(2))) / 2


class Mixture:
    """Q/λ = log Σ_k p_k N(a; μ_k, σ² I) in the box [-1, 1]^d; means (modes, d), weights p."""

    def __init__(self, means, std, weights):
        self.means = torch.tensor(means, dtype=torch.float64)
        self.log_weights = torch.tensor(weights, dtype=torch.float64).log()
        self.std, self.dim = std, self.means.shape[1]

    def energy(self, actions):
        """(..., d) -> (...), up to a constant"""
        square = (actions[..., None, :] - self.means.to(actions)).square().sum(-1)
        return torch.logsumexp(self.log_weights.to(actions) - square / (2 * self.std**2), -1)

    def sample(self, n):
        """(n, d): a mode by its mass in the box, then its truncated normal by inversion"""
        low, high = (torch.special.ndtr((side - self.means) / self.std) for side in (-1, 1))
        mass = self.log_weights.exp() * (high - low).prod(1)
        mode = torch.multinomial(mass, n, replacement=True)
        uniform = torch.rand(n, self.dim, dtype=torch.float64)
        z = torch.special.ndtri(low[mode] + uniform * (high - low)[mode])
        return (self.means[mode] + self.std * z).clamp(-1, 1)

    def posterior_noise(self, a_t, signal, noise):
        """E[ε | a_t] (n, d): for each mode, a_0 given a_t is a truncated normal."""
        a_t = a_t.double()[:, None]
        variance = (signal * self.std) ** 2 + noise**2
        mean = (self.std**2 * signal * a_t + noise**2 * self.means) / variance
        std = self.std * noise / variance.sqrt()
        low, high = (-1 - mean) / std, (1 - mean) / std
        inside = normal_probability(low, high)
        density_low, density_high = (
            (-z.square() / 2).exp() / math.sqrt(2 * math.pi) for z in (low, high)
        )
        log_likelihood = inside.log() - (a_t - signal * self.means) ** 2 / (2 * variance)
        weights = torch.softmax(self.log_weights + log_likelihood.sum(-1), 1)[..., None]
        a_0 = weights * (mean + std * (density_low - density_high) / inside)
        return (a_t[:, 0] - signal * a_0.sum(1)) / noise


def two_modes(dim):
    """The paper's 0.8 N((3, 3), I) + 0.2 N((-3, -3), I), scaled into the box, in d dimensions."""
    return Mixture([[0.5] * dim, [-0.5] * dim], 1 / 6, [0.8, 0.2])


CIRCLE = [[math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)] for k in range(8)]
ENERGIES = {
    "normal, d = 2": Mixture([[0.25, 0.25]], 0.25, [1.0]),
    "two modes, d = 2": two_modes(2),
    "eight modes, d = 2": Mixture([[0.8 * x, 0.8 * y] for x, y in CIRCLE], 0.15, [1 / 8] * 8),
    "two modes, d = 17": two_modes(17),
}


def exact_denoiser(energy, schedule):
    """ε*, which takes what the script's denoiser takes."""

    def denoiser(obs, a_t, t):
        eps = energy.posterior_noise(a_t[:, 0], schedule.signal[t], schedule.noise[t])
        return eps[:, None].float()

    return denoiser


def policy_samples(denoiser, n, dim, schedule):
    """(n, d), by the script's sampler, with one particle, so that nothing is chosen by energy."""
    critics = SimpleNamespace(minimum=lambda obs, actions: actions[..., 0])
    return sdac.sample_actions(denoiser, critics, schedule, torch.zeros(n, 1), (n, 1, dim))


def train(energy, method, steps=STEPS):
    """A denoiser trained on an energy."""
    schedule = sdac.NoiseSchedule(T, published=False)
    denoiser = sdac.Denoiser(1, energy.dim)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        if step % 40 == 0 and method == "denoising":
            pool = energy.sample(512).float()
        elif step % 40 == 0:
            pool = policy_samples(denoiser, 512, energy.dim, schedule)
        a_0 = pool[torch.randint(len(pool), (BATCH,))]
        t = torch.randint(T, (BATCH,))
        eps = torch.randn(a_0.shape)
        a_t = schedule.signal[t, None] * a_0 + schedule.noise[t, None] * eps
        if method != "denoising":
            a_hat, eps = sdac.reverse_samples(schedule, a_t, t, M, published=method == "clip")
            eps, _ = sdac.rsm_target(eps, energy.energy(a_hat), temperature=1)
        prediction = denoiser(torch.zeros(BATCH, 1), a_t[:, None], t)[:, 0]
        sdac.gradient_step(optimizer, (prediction - eps).square().sum(1).mean())
    return denoiser


@torch.no_grad()
def score_error(denoiser, energy, schedule, n=500):
    error = size = 0
    for t, (signal, noise) in enumerate(zip(schedule.signal, schedule.noise, strict=True)):
        a_0 = energy.sample(n)
        a_t = (signal * a_0 + noise * torch.randn_like(a_0)).float()
        true = energy.posterior_noise(a_t, signal, noise)
        predicted = denoiser(torch.zeros(n, 1), a_t[:, None], torch.tensor(t))[:, 0]
        error += (predicted - true).square().mean().item()
        size += true.square().mean().item()
    return math.sqrt(error / size)


def distance(x, y):
    """Wasserstein-1 distance of x and y (n, d) projected on a direction, mean over 128 of them."""
    directions = torch.randn(x.shape[1], 128, dtype=torch.float64)
    directions /= directions.norm(dim=0)
    x, y = ((z.double() @ directions).sort(0)[0] for z in (x, y))
    return (x - y).abs().mean().item()


def study(energy, method):
    """The samples before each denoising step and the last ones, and figures of these."""
    torch.manual_seed(1)
    schedule = sdac.NoiseSchedule(T, published=False)
    figures, steps = {}, []
    if method == "truth":
        samples = energy.sample(SAMPLES)
    else:
        denoiser = exact_denoiser(energy, schedule) if method == "exact" else train(energy, method)

        def watched(obs, a_t, t):
            steps.append(a_t[:, 0])
            return denoiser(obs, a_t, t)

        samples = policy_samples(watched, SAMPLES, energy.dim, schedule)
        if method != "exact":
            figures["score error"] = score_error(denoiser, energy, schedule)
    figures["distance"] = distance(samples, energy.sample(SAMPLES))
    if len(energy.means) == 2:
        nearest = torch.cdist(samples.double(), energy.means).argmin(1)
        figures["first mode"] = (nearest == 0).double().mean().item()
    return [*steps, samples], {name: round(value, 4) for name, value in figures.items()}


def draw_steps(energy, samples, path):
    """Every second of the samples (n, 2) on the way from noise to actions, above exp(Q/λ)."""
    axis = torch.linspace(-1, 1, 101)
    density = energy.energy(torch.cartesian_prod(axis, axis)).exp().view(101, 101).T
    titles = ["noise", *(f"after {k} steps" for k in range(2, T, 2)), "actions"]
    figure = Figure((2.5 * len(titles), 2.8), layout="constrained")
    panels = figure.subplots(1, len(titles))
    for panel, title, points in zip(panels, titles, samples[::2], strict=True):
        panel.imshow(density, origin="lower", extent=[-1, 1, -1, 1], cmap="Blues")
        panel.plot(*points[:500].T.numpy(), ".", color="C1", markersize=3)
        panel.set(title=title, xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), xticks=[], yticks=[])
    figure.savefig(path, dpi=100)


def draw(samples, path):
    """2-D histograms of {(energy, method): samples}; a line has one scale of colours."""
    names = [name for name in ENERGIES if name.endswith("d = 2")]
    figure = Figure((2.1 * len(METHODS), 2.2 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), len(METHODS))
    for line, name in zip(axes, names, strict=True):
        brightest = None  # the truth's
        for axis, method in zip(line, METHODS, strict=True):
            points = samples[name, method].T.numpy()
            box = [[-1, 1]] * 2
            counts, *_ = axis.hist2d(*points, bins=50, range=box, cmap="magma", vmax=brightest)
            brightest = brightest or counts.max()
            axis.set(xticks=[], yticks=[], title=method if name == names[0] else None)
        line[0].set_ylabel(name)
    figure.savefig(path, dpi=100)


def table(rows):
    """Markdown, a line for each figure of an energy."""
    lines = [f"| energy | | {' | '.join(METHODS)} |", "|---" * (2 + len(METHODS)) + "|"]
    for name, figure in product(ENERGIES, ("score error", "distance", "first mode")):
        found = {
            row["method"]: row[figure] for row in rows if row["energy"] == name and figure in row
        }
        cells = [f"{found[method]:.3f}" if method in found else "" for method in METHODS]
        lines += [f"| {name} | {figure} | {' | '.join(cells)} |"] if found else []
    return "\n".join(lines) + "\n"


def main():
    torch.set_num_threads(1)
    samples, rows = {}, []
    for name, method in tqdm(list(product(ENERGIES, METHODS)), disable=None):
        samples[name, method], figures = study(ENERGIES[name], method)
        rows.append({"energy": name, "method": method, **figures})
    folder = RESULTS / "toy"
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"machine": machine(), "methods": rows}
    (folder / "toy.json").write_text(json.dumps(facts, indent=1) + "\n")
    (folder / "table.md").write_text(table(rows))
    draw({key: steps[-1] for key, steps in samples.items()}, folder / "densities.png")
    name = "eight modes, d = 2"
    draw_steps(ENERGIES[name], samples[name, "truncate"], folder / "steps.png")
    print(table(rows))


if __name__ == "__main__":
    main()
