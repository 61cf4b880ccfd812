"""The mathematics of sdac_continuous_action.py against closed forms, quadrature and plain loops in float64.

"k standard errors" in a comment gives the tolerance of a Monte-Carlo estimate; seeds are fixed."""

import copy
import itertools
import math
import statistics
from collections import deque
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import sdac_continuous_action as sdac

CPU = torch.device("cpu")
DEFAULT, AUTHORS = ("log-snr", 6), ("linear", 20)  # schedules: kind and number of steps
both_schedules = pytest.mark.parametrize(("kind", "num_steps"), [DEFAULT, AUTHORS], ids=["log-snr", "linear"])


# ---- References: definitions in plain float64 ----


def chain(kind, num_steps):
    """For each step (β_t, √ᾱ_{t-1}, 1-ᾱ_{t-1}, √ᾱ_t, 1-ᾱ_t), by following mean and variance of the forward chain."""
    steps, signal, variance, last = [], 1.0, 0.0, 1.0
    for t in range(num_steps):
        if kind == "linear":
            beta = 0.8 * (1e-4 + (0.999 - 1e-4) * t / max(num_steps - 1, 1))
        else:  # noise/signal falls from 4 by equal factors to 0.05, if there is more than one step
            ratio = 4 * (0.05 / 4) ** ((num_steps - 1 - t) / max(num_steps - 1, 1))
            beta, last = 1 - 1 / (1 + ratio**2) / last, 1 / (1 + ratio**2)
        before = signal, variance
        signal, variance = signal * math.sqrt(1 - beta), (1 - beta) * variance + beta
        steps.append((beta, *before, signal, variance))
    return steps


def bayes(step, a_0, a_t):
    """Mean and standard deviation of q(a_{t-1} | a_t, a_0): prior given a_0 times likelihood of a_t, by precisions."""
    beta, signal, variance, _, _ = step
    if variance == 0:
        return a_0, 0.0
    precision = 1 / variance + (1 - beta) / beta
    return (signal * a_0 / variance + math.sqrt(1 - beta) * a_t / beta) / precision, precision**-0.5


def sinusoid(t):
    angles = [t * 10_000 ** (-i / 8) for i in range(8)]
    return torch.tensor([math.sin(x) for x in angles] + [math.cos(x) for x in angles], dtype=torch.float64)


def mlp(net, *inputs, which=()):
    """One network, or the given one of several, layer by layer on one vector: the concatenated inputs."""
    *hidden, last = [(w[which].T, b[which][0]) for w, b in zip(net.weights, net.biases, strict=True)]
    h = torch.cat(inputs)
    for weight, bias in hidden:
        h = F.mish(F.linear(h, weight, bias))
    return F.linear(h, *last)


def denoise(net, s, a, t):
    """ε_θ(s, a, t) of one state, action and step."""
    return mlp(net.mlp, s, net.time_mlp(sinusoid(int(t)).to(s.dtype)), a)


def q_value(critics, j, s, a):
    """Q_j of one state and action."""
    return mlp(critics, s, a, which=j)[0]


def min_q(critics, s, a):
    return min(q_value(critics, 0, s, a).item(), q_value(critics, 1, s, a).item())


@torch.no_grad()
def ddpm(policy, critics, steps, start, obs, noise):
    """Reverse diffusion from start · N(0, I) by loops over states, particles and steps, with noise (B, K, d) for each.

    Actions (B, d), the number of the particle that won in each state, and how many predictions left the box."""
    actions, winners, clipped = [], [], 0
    for b in range(len(obs)):
        particles = []
        for k in range(noise[0].shape[1]):
            a = start * noise[0][b, k]
            for t in reversed(range(len(steps))):
                a_0 = (a - math.sqrt(steps[t][4]) * denoise(policy, obs[b], a, t)) / steps[t][3]
                clipped += (a_0.abs() > 1).sum().item()
                a, std = bayes(steps[t], a_0.clamp(-1, 1), a)
                a = a + std * noise[len(steps) - t][b, k] if t > 0 else a
            particles.append(a)
        values = [min_q(critics, obs[b], a) for a in particles]
        winners.append(values.index(max(values)))
        actions.append(particles[winners[-1]])
    return torch.stack(actions), winners, clipped


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def double(module_class, *args, seed=0, **kwargs):
    torch.manual_seed(seed)
    return module_class(*args, **kwargs).double()


def grid(m, dtype=torch.float32):
    """The midpoints of m equal parts of [0, 1]: uniform numbers without Monte-Carlo error."""
    return ((torch.arange(m, dtype=torch.float64) + 0.5) / m).to(dtype)


def normal_cdf(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


def truncated_density(x, mean, std):
    """Of N(mean, std²) within [-1, 1]."""
    mass = normal_cdf((1 - mean) / std) - normal_cdf((-1 - mean) / std)
    return math.exp(-(((x - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi) * mass)


# ---- Schedule ----


@pytest.mark.parametrize("kind", ["log-snr", "linear"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 20, 200])
def test_schedule_is_the_ddpm_chain_and_its_bayes_posterior(kind, num_steps):
    """ᾱ follows from the single steps, mean and deviation of q(a_{t-1}|a_t, a_0) from Bayes' rule."""
    schedule = sdac.NoiseSchedule(num_steps, kind, dtype=torch.float64)
    assert len(schedule.signal) == num_steps
    for t, step in enumerate(chain(kind, num_steps)):
        assert schedule.signal[t].item() == pytest.approx(step[3], rel=1e-10)
        assert schedule.noise[t].item() == pytest.approx(math.sqrt(step[4]), rel=1e-10)
        for a_0, a_t in [(1.0, 0.0), (0.0, 1.0), (-0.7, 2.3)]:
            mean, std = bayes(step, a_0, a_t)
            found = schedule.posterior_a0[t] * a_0 + schedule.posterior_at[t] * a_t
            assert found.item() == pytest.approx(mean, rel=1e-9, abs=1e-12)
            assert schedule.posterior_std[t].item() == pytest.approx(std, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("num_steps", [1, 2, 10, 33])
def test_log_snr_levels_are_even_between_the_constants(num_steps):
    """Noise/signal ends at the largest level, begins at the smallest, grows by equal factors in between."""
    schedule = sdac.NoiseSchedule(num_steps, "log-snr", dtype=torch.float64)
    ratios = (schedule.noise / schedule.signal).tolist()
    assert ratios[-1] == pytest.approx(4, rel=1e-10)  # the only one, for T = 1
    assert num_steps == 1 or ratios[0] == pytest.approx(0.05, rel=1e-10)
    factors = [after / before for before, after in itertools.pairwise(ratios)]
    assert all(factor == pytest.approx(factors[0], rel=1e-9) for factor in factors)


def test_linear_schedule_has_the_published_reverse_deviations():
    """√((1-ᾱ)/ᾱ) of the authors' schedule are the figures of the project's notes (435.67 is cut to 435)."""
    schedule = sdac.NoiseSchedule(20, "linear")
    deviations = (schedule.noise / schedule.signal).tolist()
    assert deviations[1:11] == pytest.approx([0.21, 0.37, 0.55, 0.75, 0.99, 1.29, 1.66, 2.16, 2.85, 3.84], abs=0.00501)
    assert math.floor(deviations[19]) == 435


@pytest.mark.parametrize(("choices", "kind", "num_steps"), [({}, *DEFAULT), ({"schedule": "linear"}, "linear", 6)])
def test_agent_has_the_chosen_schedule(choices, kind, num_steps):
    """By default six steps, even in log-SNR; --schedule linear changes the levels and nothing else."""
    agent = sdac.Agent(sdac.Args(compile=False, **choices), 3, 2, CPU)
    expected = [math.sqrt(variance) / signal for *_, signal, variance in chain(kind, num_steps)]
    assert (agent.schedule.noise / agent.schedule.signal).tolist() == pytest.approx(expected, rel=1e-5)


@both_schedules
def test_noised_actions_have_the_distribution_of_the_single_steps(kind, num_steps):
    """a_t of the policy's loss, t uniform, and t+1 single steps a ← √(1-β) a + √β z have the same mean and variance."""
    n, a_0, generator = 50_000, 0.7, seeded(1)
    agent = make_agent(schedule=kind, denoising_steps=num_steps, num_reverse_samples=1, anchor="next")

    def stop(_, args):
        raise RuntimeError(*args)

    agent.policy.register_forward_pre_hook(stop)  # what it is asked is enough; its answer would take long
    with pytest.raises(RuntimeError) as caught:
        agent.update_policy(*torch.zeros(2, n * num_steps, 3), torch.full((n * num_steps, 2), a_0), generator=generator)
    _, a_t, steps = caught.value.args
    walk = torch.full((2 * n,), a_0, dtype=torch.float64)
    for t, (beta, *_, variance) in enumerate(chain(kind, num_steps)):
        walk = math.sqrt(1 - beta) * walk + math.sqrt(beta) * torch.randn(2 * n, generator=generator)
        jump = a_t[steps == t].double().flatten()
        # 5 standard errors; the difference of two estimates has √2 times the error of one: σ/√N, σ²√(2/N), N = 2n
        assert abs(len(jump) / 2 - n) < 5 * math.sqrt(n)
        assert abs(walk.mean() - jump.mean()) < 5 * math.sqrt(2 * variance / (2 * n))
        assert abs(walk.var() - jump.var()) < 5 * variance * math.sqrt(4 / (2 * n))


@both_schedules
def test_sampling_ends_in_the_a0_that_the_noise_tells(kind, num_steps):
    """A denoiser that knows a_0 and solves the forward process for ε, at every step, brings every particle to a_0."""
    schedule, steps = sdac.NoiseSchedule(num_steps, kind, dtype=torch.float64), chain(kind, num_steps)
    a_0 = 2 * torch.rand(5, 1, 3, generator=seeded(), dtype=torch.float64) - 1
    farthest = []

    def denoiser(obs, a_t, t, dtype):
        farthest.append((a_t - a_0).abs().max())
        return (a_t - steps[t][3] * a_0) / math.sqrt(steps[t][4])

    denoiser.action_dim, no_choice = 3, lambda obs, actions: torch.zeros(2, *actions.shape[:2], 1)
    ends = sdac.sample_actions(denoiser, no_choice, schedule, torch.zeros(5, 1).double(), 4, seeded(1))
    # √ᾱ is 1/435 at t = 19 of the linear schedule, which magnifies the rounding of 1e-16
    torch.testing.assert_close(ends, a_0[:, 0], rtol=0, atol=1e-12)
    assert len(farthest) == num_steps and farthest[0] > 1


# ---- Networks ----


def test_denoiser_is_an_mlp_on_the_concatenated_input():
    """The split first layer is one linear layer on cat([s, embedding, a_t]), for one step or one for each state."""
    net, obs, a_t = double(sdac.Denoiser, 4, 3, hidden_dim=32), randn(2, 4), randn(2, 5, 3, seed=1)
    for t in range(20):
        steps = [19 - t, t]
        same, own = net(obs, a_t, torch.tensor(t)), net(obs, a_t, torch.tensor(steps))
        for b in range(2):
            for k in range(5):
                # 1e-6: the script computes the angles in float32
                torch.testing.assert_close(same[b, k], denoise(net, obs[b], a_t[b, k], t), rtol=0, atol=1e-6)
                torch.testing.assert_close(own[b, k], denoise(net, obs[b], a_t[b, k], steps[b]), rtol=0, atol=1e-6)


def test_time_embedding_is_the_formula_and_tells_all_steps_apart():
    """[sin, cos](t · 10000^(-i/8)); any two of 100 steps are 1 apart, and stay apart behind the layers on top."""
    net, t, seen = double(sdac.Denoiser, 4, 3), torch.arange(100), []
    net.time_mlp.register_forward_hook(lambda _, inputs, output: seen.append((*inputs, output)))
    for steps in (t, t[7]):  # one for each state, or one for all
        net(torch.zeros(100, 4).double(), torch.zeros(100, 1, 3).double(), steps)
    (embedding, features), (seventh, _) = seen
    # Angles in float32: up to 99, each with two roundings of 6e-8
    torch.testing.assert_close(embedding, torch.stack([sinusoid(i) for i in range(100)]), rtol=0, atol=1.6e-5)
    torch.testing.assert_close(seventh, embedding[7], rtol=0, atol=1.2e-7)  # one rounding
    # The distance depends on Δ = t - t' alone, √(Σ_i (2 sin(Δ 10000^(-i/8)/2))²): 1.02 for Δ = 1, more for others
    assert torch.pdist(embedding).min() > 1
    assert torch.pdist(features).min() > 1e-3


def test_critics_are_two_separate_mlps():
    """The batched forward pass gives, for each state and action, the values of two MLPs evaluated one by one, and min_q
    the smaller one."""
    critics, obs, actions = double(sdac.MLP, 4, 3, 1, (2,), hidden_dim=32), randn(2, 4), randn(2, 5, 3, seed=1)
    values = critics(obs, actions)[..., 0]
    expected = [
        [[q_value(critics, j, obs[b], actions[b, n]).item() for n in range(5)] for b in range(2)] for j in range(2)
    ]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    assert (values[0] - values[1]).abs().min() > 1e-4
    smaller = torch.minimum(*expected)
    torch.testing.assert_close(sdac.min_q(critics, obs, actions), smaller, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("network", "copies", "sizes"), [("critics", (2,), [17, 1]), ("policy", (), [33, 6])])
def test_networks_are_initialised_as_linear_layers_are(network, copies, sizes):
    """Weights and biases are uniform on ±1/√(fan-in), for each layer of the denoiser and of each of the two critics."""
    torch.manual_seed(5)
    agent, sizes = sdac.Agent(sdac.Args(compile=False), 11, 6, CPU), [sizes[0], 256, 256, 256, sizes[1]]
    net = agent.critics if network == "critics" else agent.policy.mlp
    for weight, bias, (fan_in, fan_out) in zip(net.weights, net.biases, itertools.pairwise(sizes), strict=True):
        assert weight.shape == (*copies, fan_in, fan_out) and bias.shape == (*copies, 1, fan_out)
        for values in [*weight.view(-1, fan_in, fan_out), bias]:
            x, n = values.detach().double().flatten() * fan_in**0.5, values.numel()
            assert x.abs().max() <= 1 + 1e-6
            # 5 standard errors of the first two moments of a uniform number on ±1: 0 and 1/3, variances 1/3 and 4/45
            assert abs(x.mean()) < 5 * math.sqrt(1 / 3 / n)
            assert abs(x.square().mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / n)


def test_compiled_mish_formula_is_mish(monkeypatch):
    """The formula with one exponential equals F.mish in value and gradient from -30 to 60."""
    x = torch.linspace(-30, 60, 9001, dtype=torch.float64).requires_grad_()
    expected = F.mish(x)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    value = sdac.mish(x)
    assert value.grad_fn.name() != expected.grad_fn.name()  # it is the other formula that ran
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-13)


# ---- Sampling actions ----


@pytest.mark.parametrize("exploration_std", [None, 0.5])
@pytest.mark.parametrize(("kind", "start"), [("log-snr", 1.0), ("linear", 0.5)])
def test_sample_actions_is_textbook_ddpm_with_the_best_particle(kind, start, exploration_std):
    """Loops over states, particles and steps with the same noise give the same actions."""
    num_states, num_particles, d, num_steps = 6, 5, 2, 4
    net, critics = double(sdac.Denoiser, 3, d, hidden_dim=16), double(sdac.MLP, 3, d, 1, (2,), 16, seed=1)
    for parameter in [*net.parameters(), *critics.parameters()]:
        parameter.data *= 2  # networks that matter
    obs, schedule = randn(num_states, 3), sdac.NoiseSchedule(num_steps, kind, dtype=torch.float64)
    actions = sdac.sample_actions(net, critics, schedule, obs, num_particles, seeded(2), exploration_std)

    generator = seeded(2)
    shapes = [(num_states, num_particles, d)] * num_steps + [(num_states, d)]
    *noise, exploration = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    expected, winners, clipped = ddpm(net, critics, chain(kind, num_steps), start, obs, noise)
    expected = expected + (exploration_std or 0) * exploration
    # 1e-6: the script computes the embedding's angles in float32
    torch.testing.assert_close(actions, expected.clamp(-1, 1), rtol=0, atol=1e-6)
    assert clipped > 0 and len(set(winners)) > 2 and not actions.requires_grad
    assert exploration_std is None or (expected.abs() > 1).any()


class GaussianDenoiser:
    """The exact ε* for π* = N(μ, σ²I), with the interface that sample_actions uses."""

    def __init__(self, steps, mu, sigma):
        self.action_dim, self.mu, self.sigma = len(mu), mu, sigma
        self.signal, self.variance = (torch.tensor([step[i] for step in steps], dtype=torch.float64) for i in (3, 4))

    def __call__(self, obs, a_t, t, dtype):
        signal, variance = self.signal[t], self.variance[t]
        return variance.sqrt() * (a_t - signal * self.mu) / (signal**2 * self.sigma**2 + variance)


@pytest.mark.parametrize(("kind", "num_steps"), [DEFAULT, AUTHORS, ("log-snr", 200)])
def test_sample_actions_samples_a_gaussian_given_its_score(kind, num_steps):
    """Given the score of N(μ, σ²I), samples have the chain's moments, with many steps those of E[a_0|a_t], t = 0."""
    n, mu, sigma, steps = 20_000, torch.tensor([0.25, -0.2], dtype=torch.float64), 0.15, chain(kind, num_steps)
    denoiser, schedule = GaussianDenoiser(steps, mu, sigma), sdac.NoiseSchedule(num_steps, kind, dtype=torch.float64)
    critics = lambda obs, actions: torch.zeros(2, *actions.shape[:2], 1)  # noqa: E731
    obs = torch.zeros(n, 1, dtype=torch.float64)
    samples = sdac.sample_actions(denoiser, critics, schedule, obs, 1, seeded())

    # The chain is linear: a_0 predicted from a_t is the mean of N(μ, σ²) given a_t, so the box, 5σ away, is not reached
    mean, variance = torch.zeros(2, dtype=torch.float64), 0.25 if kind == "linear" else 1.0
    for step in reversed(steps):
        gain = step[3] * sigma**2 / (step[3] ** 2 * sigma**2 + step[4])
        offset, std = bayes(step, mu - gain * step[3] * mu, torch.zeros(2, dtype=torch.float64))
        slope, _ = bayes(step, gain, 1.0)
        mean, variance = slope * mean + offset, slope**2 * variance + std**2
    # 5 standard errors: √(v/n) of a mean, v√(2/n) of a variance, v/√n of a covariance
    assert ((samples.mean(0) - mean).abs() < 5 * math.sqrt(variance / n)).all()
    assert ((samples.var(0) - variance).abs() < 5 * variance * math.sqrt(2 / n)).all()
    assert abs(torch.cov(samples.T)[0, 1]) < 5 * variance / math.sqrt(n)
    if num_steps == 200:  # the start at N(0, I) leaves 0.25% of σ, discretisation 1%
        assert (mean - mu).abs().max() < 0.0025 * sigma
        assert math.sqrt(variance) == pytest.approx(sigma**2 / math.hypot(sigma, 0.05), rel=0.01)


# ---- Reverse samples ----


def noised_actions(schedule, sigmas):
    """All steps t (B, 1) with a_t (B, 2): means inside the box, and beyond its sides by `sigmas` standard deviations.

    The second coordinate is the first one mirrored and halved, so the two have different intervals."""
    rows = []
    for t in range(schedule.num_steps):
        signal, noise = schedule.signal[t].item(), schedule.noise[t].item()
        inside = [signal * x for x in (-1, -0.9, -0.3, 0, 0.3, 0.9, 1)]
        rows += [(t, a) for a in inside + [sign * (signal + k * noise) for k in sigmas for sign in (-1, 1)]]
    t, a_t = torch.tensor([[t] for t, _ in rows]), torch.tensor([[a, -a / 2] for _, a in rows])
    return t, a_t


@both_schedules
def test_truncated_samples_stay_in_the_box_and_satisfy_the_forward_equation(kind, num_steps):
    """Up to 10⁴ deviations outside the box and at the ends of the uniform numbers: finite, in the box, consistent."""
    schedule = sdac.NoiseSchedule(num_steps, kind)
    t, a_t = noised_actions(schedule, [0.5, 4, 8, 12, 14, 40, 1e4])
    ends = torch.tensor([0, 2.0**-24, 0.5, 1 - 2.0**-24])
    uniform = torch.cat([ends, torch.rand(28, generator=seeded())])[:, None].expand(len(t), 32, 2)
    eps, a_hat, _ = sdac.reverse_samples(schedule, a_t, t, uniform, "truncate")
    assert eps.isfinite().all() and a_hat.isfinite().all() and a_hat.abs().max() <= 1
    forward = schedule.signal[t[:, None]] * a_hat.double() + schedule.noise[t[:, None]] * eps.double()
    # 3 roundings of float32 (6e-8 each) of quantities of the size of a_t or 1
    assert ((forward - a_t[:, None]).abs() <= 2e-7 * (1 + a_t[:, None].abs())).all()


@pytest.mark.parametrize("sigmas", [[0.5, 1, 2, 3], [4, 6, 8, 12]], ids=["inside and near", "far outside"])
@both_schedules
def test_truncated_samples_have_the_distribution_function_of_the_truncated_normal(kind, num_steps, sigmas):
    """At the midpoint grid the j-th smallest â is the (j+½)/M quantile, also 12 deviations outside the box."""
    schedule, steps, m = sdac.NoiseSchedule(num_steps, kind), chain(kind, num_steps), 256
    t, a_t = noised_actions(schedule, sigmas)
    uniform = grid(m)[torch.randperm(m, generator=seeded())][None, :, None].expand(len(t), m, 2)
    _, a_hat, _ = sdac.reverse_samples(schedule, a_t, t, uniform, "truncate")
    for b, (step,) in enumerate(t.tolist()):
        signal, noise = steps[step][3], math.sqrt(steps[step][4])
        for i, a in enumerate(a_t[b].tolist()):
            sign = 1 if a > 0 else -1  # mirrored so that the far end is in the lower tail, where erfc keeps its digits
            samples = sorted((sign * a_hat[b, :, i].double()).tolist())
            low, high, *cdf = [normal_cdf((signal * x - abs(a)) / noise) for x in [-1, 1, *samples]]
            ranks = [(x - low) / (high - low) for x in cdf]
            # No Monte-Carlo error. float32 rounds ε near 12 by 5e-7, of an interval that is 2/435 = 5e-3 long at t = 19
            assert ranks == pytest.approx(grid(m).tolist(), abs=1e-3)


@both_schedules
def test_clipped_samples_are_standard_normal_noise_and_clipped_actions(kind, num_steps):
    """With "clip" ε is standard normal whatever a_t is, and â is the forward process solved and cut to the box."""
    schedule, steps, m = sdac.NoiseSchedule(num_steps, kind), chain(kind, num_steps), 1000
    t, a_t = noised_actions(schedule, [0.5, 8])
    uniform = torch.cat([grid(m), torch.tensor([0, 1 - 2.0**-24])])[None, :, None].expand(len(t), m + 2, 2)
    eps, a_hat, log_ratio = sdac.reverse_samples(schedule, a_t, t, uniform, "clip")
    assert (log_ratio == 0).all()
    eps = eps.expand(len(t), m + 2, 2)
    assert eps.isfinite().all() and a_hat.isfinite().all()
    assert [normal_cdf(x) for x in eps[0, :m, 1].tolist()] == pytest.approx(grid(m).tolist(), abs=1e-6)
    assert (eps == eps[:1, :, :1]).all()
    for b, (step,) in enumerate(t.tolist()):
        _, _, _, signal, variance = steps[step]
        expected = ((a_t[b].double() - math.sqrt(variance) * eps[b].double()) / signal).clamp(-1, 1)
        torch.testing.assert_close(a_hat[b].double(), expected, rtol=0, atol=5e-4)  # float32 times up to 435


# ---- Reweighted score matching ----


def rsm(energy, schedule, a_t, t, temperature, uniform, proposal="truncate", prediction=None):
    """rsm_target on reverse samples whose Q is the energy of their actions."""
    eps, a_hat, log_ratio = sdac.reverse_samples(schedule, a_t, t, uniform, proposal, prediction)
    return sdac.rsm_target(eps, energy(a_hat), temperature, log_ratio)


@both_schedules
@pytest.mark.parametrize("proposal", ["truncate", "mixture"])
def test_rsm_target_is_the_closed_form_score_of_a_gaussian(kind, num_steps, proposal):
    """Q = -λ‖a-μ‖²/(2σ²), narrow in the box, gives ε* = √(1-ᾱ)(a_t - √ᾱμ)/(ᾱσ²+1-ᾱ) at every step; with a mixture
    also where the denoiser is wrong."""
    temperature, sigma, mu = 0.7, 0.1, torch.tensor([0.3, -0.4], dtype=torch.float64)
    energy = lambda a: -temperature * (a - mu).square().sum(-1) / (2 * sigma**2)  # noqa: E731
    schedule, copies = sdac.NoiseSchedule(num_steps, kind, dtype=torch.float64), 24
    for i, (_, _, _, signal, variance) in enumerate(chain(kind, num_steps)):
        t = torch.full((copies, 1), i)
        a_t = signal * (mu + sigma * randn(2, seed=i)) + math.sqrt(variance) * randn(2, seed=100 + i)
        uniform = torch.rand(copies, 4096, 2, generator=seeded(i), dtype=torch.float64)
        prediction = randn(1, 2, seed=200 + i)
        target, _ = rsm(energy, schedule, a_t.expand(copies, 2), t, temperature, uniform, proposal, prediction)
        expected = math.sqrt(variance) * (a_t - signal * mu) / (signal**2 * sigma**2 + variance)
        # 5 standard errors, measured on the independent copies of the same a_t (bias is of order error²/σ: smaller)
        assert ((target.mean(0) - expected).abs() < 5 * target.std(0) / math.sqrt(copies)).all()
        assert (target.std(0) < 0.1).all()  # so the tolerance above is at most 0.1, of scores of size 1


def two_mode_error(t, num_samples, proposal, rows=1000):
    """Root-mean-square error of rsm_target against quadrature: 0.8·N(0.5, 0.15²) + 0.2·N(-0.5, 0.15²) in the box."""
    mode = lambda a, centre: torch.exp(-((a - centre) ** 2) / (2 * 0.15**2))  # noqa: E731
    density = lambda a: 0.8 * mode(a, 0.5) + 0.2 * mode(a, -0.5)  # noqa: E731
    _, _, _, signal, variance = chain(*AUTHORS)[t]
    modes = torch.where(torch.rand(rows, 1, generator=seeded(1), dtype=torch.float64) < 0.8, 0.5, -0.5)
    a_t = signal * (modes + 0.15 * randn(rows, 1, seed=2)).clamp(-1, 1) + math.sqrt(variance) * randn(rows, 1, seed=3)
    a_0 = 2 * grid(1000, torch.float64) - 1
    eps = (a_t - signal * a_0) / math.sqrt(variance)
    posterior = density(a_0) * torch.exp(-(eps**2) / 2)
    truth = (posterior * eps).sum(1) / posterior.sum(1)
    energy = lambda a: 0.3 * density(a)[..., 0].log()  # noqa: E731
    schedule, steps = sdac.NoiseSchedule(20, "linear", dtype=torch.float64), torch.full((rows, 1), t)
    uniform = torch.rand(rows, num_samples, 1, generator=seeded(4), dtype=torch.float64)
    target, _ = rsm(energy, schedule, a_t, steps, 0.3, uniform, proposal)
    return (target[:, 0] - truth).square().mean().sqrt().item()


@pytest.mark.parametrize(("t", "factor"), [(5, 8), (10, 50)])
def test_truncate_converges_to_quadrature_and_clip_does_not(t, factor):
    """With 16 times the samples truncate's error falls to a quarter; clip's stays, `factor` times larger."""
    few, many = (two_mode_error(t, m, "truncate") for m in (64, 1024))
    # 1000 rows give a root-mean-square error to 1/√(2·1000) = 2%; 20% allows for errors that are not Gaussian
    assert many / few == pytest.approx(1 / 4, rel=0.2)
    clip_many, clip_more = (two_mode_error(t, m, "clip") for m in (1024, 4096))
    assert clip_more > 0.9 * clip_many
    assert clip_more > factor * many


def test_a_mixture_needs_fewer_samples_in_many_dimensions():
    """Where 16 samples of φ seldom meet a narrow maximum, those around the action of a denoiser that is right do."""
    sigma, rows, d, schedule = 0.2, 2000, 6, sdac.NoiseSchedule(*DEFAULT[::-1], dtype=torch.float64)
    energy = lambda a: -a.square().sum(-1) / (2 * sigma**2)  # noqa: E731
    for i, (_, _, _, signal, variance) in enumerate(chain(*DEFAULT)):
        a_t = signal * sigma * randn(rows, d, seed=i) + math.sqrt(variance) * randn(rows, d, seed=9)
        exact, error = math.sqrt(variance) * a_t / (signal**2 * sigma**2 + variance), {}
        for proposal in ("truncate", "mixture"):
            uniform = torch.rand(rows, 16, d, generator=seeded(i), dtype=torch.float64)
            target, _ = rsm(energy, schedule, a_t, torch.full((rows, 1), i), 1.0, uniform, proposal, exact)
            error[proposal] = (target - exact).square().mean().sqrt().item()
        assert i == 0 or error["mixture"] < 0.75 * error["truncate"]  # measured: 0.50 to 0.69, at i = 0 0.86


def test_rsm_target_is_the_weighted_mean_of_the_noise():
    """Softmax weights of Q/λ, their mean of ε and the effective sample size 1/Σw², by loops."""
    eps, q, temperature = randn(4, 16, 2), 3 + 0.05 * randn(4, 16, seed=1), 0.04
    target, ess = sdac.rsm_target(eps, q, temperature)
    for b in range(4):
        weights = [math.exp(value / temperature) for value in q[b].tolist()]
        total = sum(weights)
        assert ess[b].item() == pytest.approx(1 / sum((w / total) ** 2 for w in weights), rel=1e-9)
        for k in range(2):
            expected = sum(w * eps[b, i, k].item() for i, w in enumerate(weights)) / total
            assert target[b, k].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_effective_sample_size_runs_from_one_to_all():
    """Equal values leave all M samples effective, one dominant value a single one, also where exp(Q) overflows."""
    for value, advantage, expected in [(7.0, 0, 32), (7.0, 1000, 1), (1e6, 0, 32), (1e6, 1000, 1)]:
        q = torch.full((3, 32), value) + advantage * F.one_hot(torch.tensor(5), 32)
        target, ess = sdac.rsm_target(eps := randn(3, 32, 2, dtype=torch.float32), q, 1.0)
        assert ess.tolist() == pytest.approx([expected] * 3, rel=1e-6)
        torch.testing.assert_close(target, eps[:, 5] if advantage else eps.mean(1))


# ---- The agent ----


def make_agent(**choices):
    """A small agent whose averages are not the online networks, and whose critics matter to the weights; with α/5 and
    all reverse samples from φ unless chosen otherwise."""
    torch.manual_seed(3)
    small = {"num_particles": 2, "denoising_steps": 3, "num_reverse_samples": 4}
    small |= {"temperature_scale": 0.2, "reverse_proposal": "truncate"}
    agent = sdac.Agent(sdac.Args(compile=False, bfloat16=False, **small | choices), 3, 2, CPU)
    for critics in (agent.critics, agent.target_critics):
        critics.weights[-1].data *= 10
    for parameter in [*agent.target_critics.parameters(), *agent.ema_policy.parameters()]:
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=seeded(parameter.numel()))
    return agent


def make_batch():
    """Six transitions, two of them terminated."""
    obs, actions, next_obs = (randn(6, n, seed=n + i, dtype=torch.float32) for i, n in enumerate([3, 2, 3]))
    return obs, actions.tanh(), 10 * randn(6, seed=9, dtype=torch.float32), next_obs, torch.tensor([0, 1, 0, 0, 1, 0.0])


def spy(monkeypatch, name, function=None):
    """Record the arguments and results of a function of the script, or of what stands in for it."""
    calls, function = [], function or getattr(sdac, name)
    monkeypatch.setattr(sdac, name, lambda *args: calls.append((args, function(*args))) or calls[-1][1])
    return calls


def record(network):
    """The arguments and the result of every call of a network that learns from it; the result keeps its gradient."""
    calls = []
    network.register_forward_hook(lambda _, args, y: calls.append((args, y)) or y.retain_grad())
    return calls


def fixed_actions(*args):
    """Stands in for sample_actions: actions that depend on the observations only."""
    return (2 * args[3][:, :2]).sin()


def test_act_uses_the_averaged_policy_and_explores_on_request(monkeypatch):
    """The environment sees the averaged policy ranked by the online critics, with noise 0.1 α unless told otherwise."""
    agent, obs, generator = make_agent(), randn(5, 3, dtype=torch.float32), seeded()
    agent.dtype, calls = torch.bfloat16, spy(monkeypatch, "sample_actions")
    results = [agent.act(obs, generator, **choice) for choice in ({"explore": False}, {}, {"policy": agent.policy})]
    policies = agent.ema_policy, agent.ema_policy, agent.policy
    for (args, actions), returned, policy, std in zip(calls, results, policies, [None, 0.5, 0.5], strict=True):
        assert args[0] is policy and args[1] is agent.critics and args[2] is agent.schedule
        assert args[3] is obs and args[4] == 2 and args[5] is generator and returned is actions
        assert args[6] is std if std is None else args[6].item() == pytest.approx(std)
        assert args[7] is torch.bfloat16


def recompute_update(agent, batch, generator, dtype):
    """An agent's first update by loops in float64 from its own draws, if every frequency is 1.

    Returns a copy of the agent after the update, with the gradients, and the metrics."""
    args, net, (n, d), normal = agent.args, copy.deepcopy(agent).double(), batch[1].shape, statistics.NormalDist()
    obs, actions, rewards, next_obs, ends = (x.double() for x in batch)
    num_steps, num_samples, alpha = args.denoising_steps, args.num_reverse_samples, net.log_alpha.exp().item()
    steps, std = chain(args.schedule, num_steps), args.noise_scale * alpha
    draw = lambda function, *shape: function(shape, generator=generator, dtype=dtype).double()  # noqa: E731

    def act(states):
        noise = [draw(torch.randn, n, args.num_particles, d) for _ in steps]
        best, winners, _ = ddpm(net.policy, net.critics, steps, 0.5 if args.schedule == "linear" else 1, states, noise)
        assert len(set(winners)) > 1
        return (best + std * draw(torch.randn, n, d)).clamp(-1, 1)

    def first_adam_step(parameters, loss, lr):
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
            parameter.data -= lr * gradient / (gradient.abs() + 1e-8)

    next_actions, values, losses = act(next_obs), [0, 0], [0, 0]
    for i in range(n):
        y = 0.2 * rewards[i].item()  # the default scale of the rewards
        if ends[i] == 0:
            y += args.gamma * min_q(net.target_critics, next_obs[i], next_actions[i])
        for j in range(2):
            q = q_value(net.critics, j, obs[i], actions[i])
            values[j], losses[j] = values[j] + q.item() / n, losses[j] + (q - y) ** 2 / n
    first_adam_step(list(net.critics.parameters()), losses[0] + losses[1], args.q_lr)
    metrics = {"qf1_values": values[0], "qf2_values": values[1], "alpha": alpha, "exploration_std": std}
    metrics |= {"qf1_loss": losses[0].item(), "qf2_loss": losses[1].item(), "qf_loss": sum(losses).item() / 2}

    t, eps = torch.randint(num_steps, (n, 1), generator=generator)[:, 0].tolist(), draw(torch.randn, n, d)
    states, a_0 = (next_obs, next_actions) if args.anchor == "next" else (obs, act(obs))
    a_t, predictions, noise, q, ratios = [], [], draw(torch.rand, n, num_samples, d), [], []  # noise: uniform numbers,
    for b in range(n):  # which are replaced one by one
        signal, deviation = steps[t[b]][3], math.sqrt(steps[t[b]][4])
        a_t.append(signal * a_0[b] + deviation * eps[b])
        predictions.append(denoise(net.policy, states[b], a_t[b], t[b]))
        gaussians = [((a_t[b] / signal).tolist(), deviation / signal)]
        if args.reverse_proposal == "mixture":
            expected = ((a_t[b] - deviation * predictions[b]) / signal).clamp(-1, 1).tolist()
            gaussians.append((expected, 1 / math.sqrt(1 / 0.25 + signal**2 / deviation**2)))
        for i, c in itertools.product(range(num_samples), range(d)):
            u, (mean, width) = noise[b, i, c].item(), gaussians[i * len(gaussians) // num_samples]
            low, high = (normal_cdf((end - mean[c]) / width) for end in (-1, 1))
            if args.reverse_proposal == "clip":
                noise[b, i, c] = normal.inv_cdf(u)
            else:  # the script mirrors the intervals of means below 0
                a = mean[c] + width * normal.inv_cdf(low + (1 - u if mean[c] < 0 else u) * (high - low))
                noise[b, i, c] = (a_t[b][c].item() - signal * a) / deviation
        a_hat = ((a_t[b] - deviation * noise[b]) / signal).clamp(-1, 1)
        q.append([min_q(net.critics, states[b], a) for a in a_hat])
        ratios.append([1.0] * num_samples)
        for i in range(num_samples) if args.reverse_proposal == "mixture" else []:
            densities = [
                math.prod(truncated_density(a, m, width) for a, m in zip(a_hat[i].tolist(), mean, strict=True))
                for mean, width in gaussians
            ]
            ratios[b][i] = densities[0] / statistics.fmean(densities)
    temperature = args.temperature_scale * alpha
    if args.temperature == "relative":
        assert min(t) < num_steps // 2 <= max(t)
        spreads = []
        for values, w in [(q[b], ratios[b]) for b in range(n) if t[b] >= num_steps // 2]:
            mean = sum(x * y for x, y in zip(w, values, strict=True)) / sum(w)
            spreads.append(math.sqrt(sum(x * (y - mean) ** 2 for x, y in zip(w, values, strict=True)) / sum(w)))
        net.q_spread.fill_(statistics.fmean(spreads))
        temperature *= net.q_spread.item()
    loss, short_loss, ess = 0, 0, []
    for b in range(n):
        weights = [r * math.exp((x - max(q[b])) / temperature) for x, r in zip(q[b], ratios[b], strict=True)]
        weights = torch.tensor([w / sum(weights) for w in weights], dtype=torch.float64)
        prediction, target = predictions[b], weights @ noise[b]
        for i in range(num_samples):  # the loss of the paper, with the same gradient as the shorter one
            loss = loss + weights[i] * (prediction - noise[b, i]).square().sum() / n
        short_loss += (prediction - target).square().sum().item() / n
        ess.append(1 / sum(w**2 for w in weights.tolist()))
    first_adam_step(list(net.policy.parameters()), loss, args.policy_lr)
    metrics |= {"rsm_loss": short_loss, "effective_sample_size": statistics.fmean(ess), "temperature": temperature}

    gradient = d * math.log(std * math.sqrt(2 * math.pi * math.e)) + 0.9 * d
    net.log_alpha.data -= args.alpha_lr * gradient / (abs(gradient) + 1e-8)
    for average, source in [(net.target_critics, net.critics), (net.ema_policy, net.policy)]:
        for old, new in zip(average.parameters(), source.parameters(), strict=True):
            old.data = args.tau * new.data + (1 - args.tau) * old.data
    return net, metrics


@pytest.fixture
def use_dtype(monkeypatch):
    """Makes the script compute in a dtype: in float64 it has to agree with a recomputation to nine digits."""

    def use(dtype):
        torch.set_default_dtype(dtype)
        monkeypatch.setattr(sdac, "NoiseSchedule", partial(sdac.NoiseSchedule, dtype=dtype))

    yield use
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("schedule", "temperature", "reverse_proposal", "anchor"),
    [
        ("log-snr", "fixed", "truncate", "current"),
        ("log-snr", "relative", "clip", "current"),
        ("linear", "fixed", "clip", "next"),
        ("linear", "relative", "truncate", "current"),
        ("log-snr", "relative", "mixture", "current"),
        ("linear", "fixed", "mixture", "next"),
    ],
)
def test_one_update_is_its_recomputation_by_loops(use_dtype, dtype, schedule, temperature, reverse_proposal, anchor):
    """From the same noise: both sampling chains, the losses, their gradients, Adam, α, the averages and all metrics."""
    use_dtype(dtype)
    choices = {"gamma": 0.9, "tau": 0.1, "policy_lr": 2e-3, "q_lr": 5e-3, "noise_scale": 0.15}
    choices |= {"temperature_scale": 0.15, "denoising_steps": 4, "num_particles": 3, "num_reverse_samples": 6}
    choices |= {"policy_frequency": 1, "target_network_frequency": 1, "alpha_frequency": 1, "anchor": anchor}
    agent = make_agent(schedule=schedule, temperature=temperature, reverse_proposal=reverse_proposal, **choices)
    agent.log_alpha.data.fill_(math.log(2.0))
    batch = [x.to(dtype) for x in make_batch()]
    for critics in (agent.critics, agent.target_critics):  # the minimum is not always the same one
        q = critics(batch[0], 2 * torch.rand(6, 50, 2, generator=seeded(1), dtype=dtype) - 1)
        assert 0.1 < (q[0] < q[1]).double().mean() < 0.9
    expected, expected_metrics = recompute_update(agent, batch, seeded(5), dtype)
    metrics = agent.update(batch, seeded(5))

    exact = dtype is torch.float64
    assert 1.2 < expected_metrics["effective_sample_size"] < 5.8  # of 6
    assert not any(value.requires_grad for value in metrics.values())
    rel = 1e-9 if exact else 1e-3
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected_metrics, rel=rel)
    for network in ("critics", "policy"):
        pairs = zip(getattr(agent, network).parameters(), getattr(expected, network).parameters(), strict=True)
        for parameter, reference in pairs:
            torch.testing.assert_close(parameter.grad.double(), reference.grad, rtol=rel, atol=1e-12 if exact else 1e-4)
    if exact:  # in float32 the sign of a gradient near 0, which is all that Adam's first step looks at, is rounding
        torch.testing.assert_close(agent.state_dict(), expected.state_dict(), rtol=1e-9, atol=1e-9)


def test_averages_start_as_the_online_networks():
    """Target critics and averaged policy have, before any update, the weights of the online ones, but as copies."""
    agent = sdac.Agent(sdac.Args(compile=False), 3, 2, CPU)
    for average, source in [(agent.target_critics, agent.critics), (agent.ema_policy, agent.policy)]:
        torch.testing.assert_close(average.state_dict(), source.state_dict(), rtol=0, atol=0)
        for old, new in zip(average.parameters(), source.parameters(), strict=True):
            new.data += 1
            assert (new - old).min() > 0.5


# ---- The temperature ----


@pytest.fixture
def measure(monkeypatch):
    """λ of an agent's policy update that finds Q (B, M) at the reverse samples, and ε, target and effective sample size
    that go with it; t are the B noise levels drawn."""
    spy(monkeypatch, "sample_actions", fixed_actions)
    calls = spy(monkeypatch, "rsm_target")

    def measure(agent, q, t):
        agent.args.num_reverse_samples, obs = q.shape[1], torch.zeros(len(t), 3)
        with monkeypatch.context() as patch:
            patch.setattr(sdac, "min_q", lambda critics, obs, actions: q)
            patch.setattr(torch, "randint", lambda *args, **kwargs: torch.tensor(t)[:, None])
            metrics = agent.update_policy(obs, obs, torch.zeros(len(t), 2), generator=seeded())
        (eps, found, temperature, _), (target, ess) = calls[-1]
        assert found is q and metrics["temperature"].item() == temperature.item()
        return temperature.item(), eps, target, ess

    return measure


@pytest.mark.parametrize("choices", [{}, {"temperature_scale": 0.05}])
def test_fixed_temperature_is_a_share_of_alpha_and_measures_nothing(measure, choices):
    """λ = α/5, or another share, whatever Q is, and σ_Q stays where it was. The default is a sixteenth of that."""
    assert sdac.Args.temperature_scale == pytest.approx(0.2 / 16)
    agent = make_agent(temperature="fixed", **choices)
    for alpha in (5.0, 2.0):
        agent.log_alpha.data.fill_(math.log(alpha))
        for scale in (1.0, 100.0):
            q = scale * randn(2, 7, dtype=torch.float32)
            assert measure(agent, q, [2, 0])[0] == pytest.approx(
                choices.get("temperature_scale", 0.2) * alpha, rel=1e-6
            )
    assert agent.q_spread.item() == 0


@pytest.mark.parametrize("num_steps", [1, 3, 4, 10])
def test_relative_temperature_follows_a_running_mean_of_the_spread(measure, num_steps):
    """σ_Q starts at its first measurement and moves by 0.01; rows below T/2 count only if there are no others."""
    agent, expected, half = make_agent(temperature="relative", denoising_steps=num_steps), None, num_steps // 2
    agent.log_alpha.data.fill_(math.log(2.0))
    for n in range(8):
        t = torch.randint(num_steps, (6, 1), generator=seeded(n))[:, 0].tolist()
        if n == 3:  # the noisiest rows stand in for the upper half
            t = [min(step, max(half - 1, 0)) for step in t]
        counted = [b for b in range(6) if t[b] >= half] or [b for b in range(6) if t[b] == max(t)]
        q = 20 + (n + 1) * torch.arange(1, 7)[:, None] * randn(6, 9, seed=n, dtype=torch.float32)
        measured = statistics.fmean(statistics.pstdev(q[b].tolist()) for b in counted)
        expected = measured if n == 0 else expected + 0.01 * (measured - expected)
        assert measure(agent, q, t)[0] == pytest.approx(0.4 * expected, rel=1e-5)
        assert agent.q_spread.item() == pytest.approx(expected, rel=1e-5)
    assert measured > 1.5 * expected  # the mean lags far behind, as it should with so small a rate


def test_spread_of_a_batch_without_upper_rows_is_finite(measure):
    """With every t below T/2 the rows with the largest t count, be they all rows or one; the others do not matter."""
    q = torch.tensor([[0.0, 2.0], [0.0, 6.0], [1.0, 9.0]])
    for t, expected in [([1, 3, 1], 3.0), ([0, 0, 0], 8 / 3), ([4, 2, 4], 2.5), ([5, 4, 9], 2.5), ([1, 4, 5], 4.0)]:
        agent = make_agent(temperature="relative", denoising_steps=10)  # with λ = σ_Q
        assert measure(agent, q, t)[0] == pytest.approx(expected, rel=1e-6), t


def test_constant_q_leaves_everything_finite_and_the_first_spread_to_come(measure):
    """Without any spread λ is positive and the weights are equal; the first spread that is not 0 is taken whole."""
    agent, t, constant = make_agent(temperature="relative"), [2, 1], torch.full((2, 8), 0.75)
    temperature, eps, target, ess = measure(agent, constant, t)
    assert 0 < temperature < 1e-6
    torch.testing.assert_close(target, eps.mean(1))
    assert ess.tolist() == pytest.approx([8, 8])
    q = randn(2, 8, dtype=torch.float32)
    expected = statistics.fmean(statistics.pstdev(row) for row in q.tolist())
    assert measure(agent, q, t)[0] == pytest.approx(expected, rel=1e-5)
    measure(agent, constant, t)  # later on, no spread is a measurement like any other
    assert agent.q_spread.item() == pytest.approx(0.99 * expected, rel=1e-5)


@pytest.mark.parametrize("temperature", ["relative", "fixed"])
def test_a_hundred_times_the_q_leaves_relative_weights_as_they_are(monkeypatch, temperature):
    """Critics whose values are 100 times as large: λ grows by 100 and the targets stay; with a fixed λ they do not."""
    results, calls = [], spy(monkeypatch, "rsm_target")
    for scale in (1, 100):
        agent = make_agent(temperature=temperature, num_reverse_samples=32)
        agent.critics.weights[-1].data *= scale
        agent.critics.biases[-1].data *= scale
        generator, (obs, actions, _, next_obs, _) = seeded(7), make_batch()
        for _ in range(3):  # the policy learns from its targets, so these are the same three times or not at all
            results.append(agent.update_policy(obs, next_obs, actions, generator=generator)["temperature"].item())
    for n in range(3):
        (_, (target, ess)), (_, (large_target, large_ess)) = calls[n], calls[n + 3]
        if temperature == "relative":
            assert results[n + 3] == pytest.approx(100 * results[n], rel=1e-4)
            torch.testing.assert_close(large_target, target, rtol=0, atol=1e-3)
            torch.testing.assert_close(large_ess, ess, rtol=1e-3, atol=0)
            assert 8 < ess.mean() < 28  # of 32: the weights matter
        else:
            assert results[n + 3] == results[n] == pytest.approx(1, rel=1e-6)
            assert large_ess.mean() < 0.7 * ess.mean()


def test_the_state_of_an_agent_holds_the_spread(measure):
    """σ_Q survives a round trip through state_dict(): the next measurement moves it by a hundredth."""
    first, second = make_agent(temperature="relative"), make_agent(temperature="relative")
    q, t = randn(2, 8, dtype=torch.float32), [2, 1]
    measure(first, q, t)
    second.load_state_dict(first.state_dict())
    assert measure(second, 50 * q, t)[0] == pytest.approx(1.49 * first.q_spread.item(), rel=1e-5)


# ---- The other parts of an update ----


def weights_of(prediction, num_steps, generator):
    """The w_b of a loss mean_b w_b ‖ε_θ - ε‖² whose noise is drawn by this generator, from its gradient in ε_θ."""
    torch.randint(num_steps, (len(prediction), 1), generator=generator)
    error = prediction.detach()[:, 0] - torch.randn(prediction[:, 0].shape, generator=generator)
    weights = prediction.grad[:, 0] * len(error) / (2 * error)
    torch.testing.assert_close(weights[:, 0], weights[:, 1], rtol=1e-4, atol=0)
    return weights[:, 0]


def test_mirror_descent_weights(monkeypatch):
    """exp of the standardised value, cut at ±3, over α, one value at a time."""
    agent, values, alpha = make_agent(weighting="mirror-descent"), [-40.0, -5.0, 0.5, 1.0, 4.0, 60.0], 0.8
    agent.q_moments.copy_(torch.tensor([1.5, 2.0])), agent.log_alpha.data.fill_(math.log(alpha))
    spy(monkeypatch, "min_q", lambda critics, obs, actions: torch.tensor(values)[:, None])
    calls, (obs, actions, _, next_obs, _) = record(agent.policy), make_batch()
    agent.update_policy(obs, next_obs, actions, generator=seeded())
    weights = weights_of(calls[0][1], 3, seeded())
    mean = 0.999 * 1.5 + 0.001 * statistics.fmean(values)
    std = 0.999 * 2 + 0.001 * statistics.stdev(values)
    for value, weight in zip(values, weights.tolist(), strict=True):
        standardised = (value - mean) / std
        standardised = -3 if standardised < -3 else 3 if standardised > 3 else standardised
        assert weight == pytest.approx(math.e ** (standardised / alpha), rel=1e-5)


def test_mirror_descent_update(monkeypatch):
    """Running mean and deviation of min_j Q_j(s', a') move by 0.001; a' is denoised at s' with the weights of its Q."""
    agent, batch = make_agent(policy_frequency=1, weighting="mirror-descent"), make_batch()
    spy(monkeypatch, "sample_actions", fixed_actions)
    calls, next_obs, next_actions = record(agent.policy), batch[3], fixed_actions(None, None, None, batch[3])
    agent.q_moments.copy_(torch.tensor([0.3, 0.05]))
    metrics = agent.update(batch, seeded(5))
    values = [min_q(agent.critics, next_obs[i], next_actions[i]) for i in range(6)]
    mean = 0.3 + 0.001 * (statistics.fmean(values) - 0.3)
    std = 0.05 + 0.001 * (statistics.stdev(values) - 0.05)
    assert agent.q_moments.tolist() == pytest.approx([mean, std], abs=1e-7)
    assert mean != pytest.approx(0.3, abs=1e-5) and std != pytest.approx(0.05, abs=1e-6)
    (((obs, a_t, t), _),), generator, weights = calls, seeded(5), weights_of(calls[0][1], 3, seeded(5))
    assert torch.equal(obs, next_obs) and torch.equal(t[:, None], torch.randint(3, (6, 1), generator=generator))
    eps = torch.randn(6, 2, generator=generator)
    for b in range(6):
        _, _, _, signal, variance = chain("log-snr", 3)[int(t[b])]
        torch.testing.assert_close(a_t[b, 0], signal * next_actions[b] + math.sqrt(variance) * eps[b])
        expected = math.exp(min(max((values[b] - mean) / std, -3), 3) / 5)
        assert weights[b].item() == pytest.approx(expected, rel=1e-4)
    ess = weights.sum().item() ** 2 / weights.square().sum().item()
    assert metrics["effective_sample_size"].item() == pytest.approx(ess, rel=1e-5) and 1 < ess < 6
    assert metrics["temperature"].item() == pytest.approx(5)


def test_updates_happen_at_their_frequencies():
    """Policy every 3rd, averages every 2nd (τ·new + (1-τ)·old), α every 4th update; the critics always."""
    agent, batch, generator = make_agent(policy_frequency=3, alpha_frequency=4, tau=0.1), make_batch(), seeded()
    parts = ["policy", "critics", "target_critics", "ema_policy"]
    snapshot = lambda: {p: torch.nn.utils.parameters_to_vector(getattr(agent, p).parameters()).detach() for p in parts}  # noqa: E731
    for update in range(1, 13):
        old, old_alpha = snapshot(), agent.log_alpha.item()
        agent.update(batch, generator)
        new = snapshot()
        assert not torch.equal(new["critics"], old["critics"])
        assert torch.equal(new["policy"], old["policy"]) == (update % 3 != 0)
        assert (agent.log_alpha.item() == old_alpha) == (update % 4 != 0)
        for average, source in [("target_critics", "critics"), ("ema_policy", "policy")]:
            if update % 2:
                assert torch.equal(new[average], old[average])
            else:
                expected = 0.1 * new[source].double() + 0.9 * old[average].double()
                torch.testing.assert_close(new[average].double(), expected, rtol=0, atol=2e-7)  # float32 of weights < 1
                assert not torch.equal(new[average], old[average])


def test_exploration_noise_anneals_as_by_an_adam_of_plain_floats(monkeypatch):
    """The standard deviation starts at 0.5, follows Adam on H - H_target, and stays in [0.09, 0.11] at the end."""
    agent, batch = make_agent(alpha_frequency=1, policy_frequency=10**9, target_network_frequency=10**9), make_batch()
    spy(monkeypatch, "sample_actions", fixed_actions)
    step = sdac.gradient_step
    only_alpha = lambda optimizer, loss: optimizer is agent.alpha_optimizer and step(optimizer, loss)  # noqa: E731
    monkeypatch.setattr(sdac, "gradient_step", only_alpha)
    # a default run has (1,000,000 - 30,000) steps / 5 environments / 250 = 776 such updates; one more, to see the last
    stds = [agent.update(batch, None)["exploration_std"].item() for _ in range(777)]
    expected, log_alpha, m, v = [0.5], math.log(5), 0.0, 0.0
    for n in range(1, 777):
        entropy = 2 * 0.5 * math.log(2 * math.pi * math.e * (0.1 * math.exp(log_alpha)) ** 2)
        gradient = entropy - (-0.9 * 2)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        log_alpha -= 7e-3 * (m / (1 - 0.9**n)) / (math.sqrt(v / (1 - 0.999**n)) + 1e-8)
        expected.append(0.1 * math.exp(log_alpha))
    assert stds == pytest.approx(expected, rel=1e-4)
    assert stds[0] == pytest.approx(0.5) and stds[232] == pytest.approx(0.148, abs=5e-4)  # 58 thousand updates
    assert all(0.09 < std < 0.11 for std in stds[400:])  # from 100 thousand updates on
    assert stds[-1] == pytest.approx(math.exp(-0.9) / math.sqrt(2 * math.pi * math.e), rel=2e-3)  # entropy -0.9 each


@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_policy_learning_rate_is_held_and_then_falls_to_a_tenth(monkeypatch, frequency):
    """After n policy updates the next one steps with its learning rate times 1 up to n = 25k, 0.55 at 50k, 0.1 from 75k
    on, linear in between; the critics' is held."""
    agent, batch, generator = make_agent(policy_frequency=frequency, policy_lr=2e-3, q_lr=5e-3), make_batch(), seeded()
    rates, step = {}, sdac.gradient_step

    def recording_step(optimizer, loss):
        rates.setdefault(optimizer, []).append(float(optimizer.param_groups[0]["lr"]))
        step(optimizer, loss)

    monkeypatch.setattr(sdac, "gradient_step", recording_step)
    points = {0: 1, 12_345: 1, 25_000: 1, 30_000: 0.91, 50_000: 0.55, 74_999: 0.100018, 75_000: 0.1, 10**7: 0.1}
    for n in points:
        agent.updates = n * frequency
        for _ in range(frequency):
            agent.update(batch, generator)
    assert rates[agent.policy_optimizer] == pytest.approx([2e-3 * factor for factor in points.values()])
    assert rates[agent.q_optimizer] == [5e-3] * len(points) * frequency


# ---- The replay buffer ----


def transitions(first, count):
    """Transitions whose eight numbers all tell which one it is."""
    n = torch.arange(first, first + count, dtype=torch.float32)[:, None]
    return n + torch.tensor([0, 0.1]), n + 0.2, n[:, 0] + 0.3, n + torch.tensor([0.4, 0.5]), n[:, 0] + 0.6


def test_replay_buffer_keeps_the_last_transitions_whole():
    """Adds that cross the end of the ring leave what a deque would; samples are whole rows of it, equally often."""
    buffer, kept, added = sdac.ReplayBuffer(10, 2, 1, CPU), deque(maxlen=10), 0
    buffer.rows.fill_(math.nan)
    for count in [3, 4, 5, 1, 7, 10, 4]:
        buffer.add(*transitions(added, count))
        kept.extend(range(added, added + count))
        added += count
        n = 20_000
        obs, actions, rewards, next_obs, terminations = buffer.sample(n, seeded(count))
        drawn = obs[:, 0].round().int()
        counts = {i: (drawn == i).sum().item() for i in drawn.unique().tolist()}
        assert sorted(counts) == sorted(kept)
        # 5 standard errors √(n p (1-p)) of a count
        p = 1 / len(kept)
        assert all(abs(count - n * p) < 5 * math.sqrt(n * p * (1 - p)) for count in counts.values())
        expected = [torch.cat([part[:1].flatten() for part in transitions(i, 1)]) for i in range(added)]
        rows = torch.cat([obs, actions, rewards[:, None], next_obs, terminations[:, None]], dim=1)
        torch.testing.assert_close(rows, torch.stack(expected)[drawn.long()], rtol=0, atol=0)
