"""The mathematics of sdac_continuous_action.py against closed forms, quadrature and plain loops.

Seeds are fixed. "5 standard errors" says how far a Monte Carlo estimate may be from the truth."""

import copy
import itertools
import math
import statistics
from collections import deque
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import sdac_continuous_action as sdac

both_schedules = pytest.mark.parametrize("published", [False, True], ids=["default", "published"])


@pytest.fixture
def float64(monkeypatch):
    """The script computes in float64, its noise schedule included."""
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    yield
    torch.set_default_dtype(torch.float32)


def randn(*shape, seed=0):
    """Normal numbers that leave the global stream alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- References: the definitions, one number or one vector at a time
class Level(NamedTuple):
    """A step a_t = √(1-β) a_{t-1} + √β z, and the moments of a_{t-1} and a_t given a_0."""

    beta: float
    signal_before: float
    variance_before: float
    signal: float
    variance: float

    @property
    def noise(self):
        return math.sqrt(self.variance)


def chain(num_steps, published):
    """All levels, by following mean and variance from step to step."""
    levels = []
    signal, variance = 1.0, 0.0
    for t in range(num_steps):
        if published:
            beta = 0.8 * (1e-4 + (0.999 - 1e-4) * t / (num_steps - 1))
        else:  # noise / signal is 0.05 at first and 4 at last, and grows by equal factors
            ratio = 0.05 * 80 ** (t / (num_steps - 1))
            beta = 1 - 1 / (1 + ratio**2) / signal**2
        before = signal, variance
        signal, variance = signal * math.sqrt(1 - beta), (1 - beta) * variance + beta
        levels.append(Level(beta, *before, signal, variance))
    return levels


def bayes(level, a_0, a_t):
    """Mean and deviation of q(a_{t-1} | a_t, a_0): prior given a_0 times likelihood of a_t."""
    beta, signal, variance = level[:3]
    if variance == 0:
        return a_0, 0.0
    precision = 1 / variance + (1 - beta) / beta
    return (signal * a_0 / variance + math.sqrt(1 - beta) * a_t / beta) / precision, precision**-0.5


def sinusoid(t):
    angles = [t * 10_000 ** (-i / 8) for i in range(8)]
    return torch.tensor([math.sin(x) for x in angles] + [math.cos(x) for x in angles])


def mlp(net, *inputs):
    """A network on one vector: the concatenated inputs."""
    h = torch.cat(inputs)
    for layer in (net.input_layer, *net.hidden_layers):
        h = layer(h)
        h = h * h.exp().log1p().tanh()
    return net.output_layer(h)


def denoise(net, s, a, t):
    return mlp(net.mlp, s, net.time_mlp(sinusoid(t)), a)


def min_q(critics, s, a):
    return min(mlp(critics.q1, s, a).item(), mlp(critics.q2, s, a).item())


@torch.no_grad()
def ddpm(policy, critics, levels, obs, num_particles, published):
    """Reverse diffusion by loops over states, particles and steps. Returns the actions with the
    largest Q, who won in each state, and how many predictions left the box."""
    noise = [torch.randn(len(obs), num_particles, 2) for _ in levels]
    actions, winners, outside = [], [], 0
    for b, s in enumerate(obs):
        particles = []
        for k in range(num_particles):
            a = (0.5 if published else 1.0) * noise[0][b, k]
            for t in reversed(range(len(levels))):
                a_0 = (a - levels[t].noise * denoise(policy, s, a, t)) / levels[t].signal
                outside += (a_0.abs() > 1).sum().item()
                a, std = bayes(levels[t], a_0.clamp(-1, 1), a)
                if t > 0:
                    a = a + std * noise[len(levels) - t][b, k]
            particles.append(a)
        values = [min_q(critics, s, a) for a in particles]
        winners.append(values.index(max(values)))
        actions.append(particles[winners[-1]])
    return torch.stack(actions), winners, outside


def normal_cdf(x):
    return math.erfc(-x / math.sqrt(2)) / 2


def make_agent(**choices):
    """A small agent whose networks matter and whose averages differ from their sources."""
    torch.manual_seed(3)
    small = {"denoising_steps": 4, "num_reverse_samples": 6}
    small |= {"num_particles": 5, "num_eval_particles": 3}
    agent = sdac.Agent(sdac.Args(**{**small, **choices}), 3, 2)
    with torch.no_grad():
        for critics in (agent.critics, agent.target_critics):
            for critic in (critics.q1, critics.q2):
                critic.output_layer.weight.mul_(10)
        for average in (agent.average_policy, agent.target_critics):
            for i, parameter in enumerate(average.parameters()):
                parameter.add_(0.02 * randn(*parameter.shape, seed=i))
    return agent


def make_batch():
    """Six transitions, two of them terminated."""
    obs, next_obs, actions = randn(6, 3, seed=1), randn(6, 3, seed=2), randn(6, 2, seed=3).tanh()
    return obs, actions, 10 * randn(6, seed=4), next_obs, torch.tensor([0, 1, 0, 0, 1, 0.0])


# ---- Noise schedule
@both_schedules
@pytest.mark.parametrize("num_steps", [2, 6, 20])
def test_schedule_is_the_ddpm_chain_and_its_bayes_posterior(float64, num_steps, published):
    schedule = sdac.NoiseSchedule(num_steps, published)
    for t, level in enumerate(chain(num_steps, published)):
        assert schedule.signal[t].item() == pytest.approx(level.signal, rel=1e-9)
        assert schedule.noise[t].item() == pytest.approx(level.noise, rel=1e-9)
        for a_0, a_t in [(1.0, 0.0), (0.0, 1.0), (-0.7, 2.3)]:
            mean, std = bayes(level, a_0, a_t)
            found = schedule.posterior_a0[t] * a_0 + schedule.posterior_at[t] * a_t
            assert found.item() == pytest.approx(mean, rel=1e-9, abs=1e-12)
            assert schedule.posterior_std[t].item() == pytest.approx(std, rel=1e-9, abs=1e-12)


def test_published_schedule_has_the_published_reverse_deviations():
    """√((1-ᾱ)/ᾱ) at t = 1..10 and 19, as computed from the authors' code."""
    schedule = sdac.NoiseSchedule(20, published=True)
    deviations = (schedule.noise / schedule.signal).tolist()
    published = [0.21, 0.37, 0.55, 0.75, 0.99, 1.29, 1.66, 2.16, 2.85, 3.84]
    assert deviations[1:11] == pytest.approx(published, abs=0.00501)
    assert int(deviations[19]) == 435


@both_schedules
def test_the_policy_learns_at_all_levels_from_actions_noised_step_by_step(published):
    """The a_t that it is asked about have the mean and variance of t + 1 single steps."""
    agent = make_agent(denoising_steps=6, published=published)
    asked = []

    def stop(_, inputs):
        asked.extend(inputs)
        raise InterruptedError

    agent.policy.register_forward_pre_hook(stop)
    n = 50_000
    with pytest.raises(InterruptedError):
        agent.update_policy(torch.zeros(6 * n, 3), torch.full((6 * n, 2), 0.7))
    _, a_t, steps = asked

    walk = torch.full((2 * n,), 0.7)
    for t, (beta, *_, variance) in enumerate(chain(6, published)):
        walk = math.sqrt(1 - beta) * walk + math.sqrt(beta) * torch.randn(2 * n)
        jump = a_t[steps == t].flatten()
        # 5 standard errors: √n of a count, and of differences of means and of variances
        assert abs(len(jump) / 2 - n) < 5 * math.sqrt(n)
        assert abs(walk.mean() - jump.mean()) < 5 * math.sqrt(variance / n)
        assert abs(walk.var() - jump.var()) < 5 * variance * math.sqrt(2 / n)


# ---- Networks
def test_denoiser_is_an_mlp_on_the_concatenated_input(float64):
    """For one level of noise, and for one per state."""
    net, obs, a_t = sdac.Denoiser(4, 3), randn(2, 4), randn(2, 5, 3, seed=1)
    steps = torch.tensor([0, 7])
    same, own = net(obs, a_t, steps[1]), net(obs, a_t, steps)
    for b, k in itertools.product(range(2), range(5)):
        torch.testing.assert_close(same[b, k], denoise(net, obs[b], a_t[b, k], 7))
        torch.testing.assert_close(own[b, k], denoise(net, obs[b], a_t[b, k], steps[b].item()))


def test_time_embedding_is_the_formula():
    """[sin, cos](t · 10000^(-i/8)) at t = 0..99, in the script's float32."""
    net, seen = sdac.Denoiser(4, 3), []
    net.time_mlp.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    net(torch.zeros(100, 4), torch.zeros(100, 1, 3), torch.arange(100))
    expected = torch.stack([sinusoid(t) for t in range(100)])
    torch.testing.assert_close(*seen, expected, rtol=0, atol=1.6e-5)  # Angles are rounded.


def test_critics_are_two_separate_mlps(float64):
    """On the concatenated input; `minimum` is the smaller value of each state and action."""
    critics, obs, actions = sdac.Critics(4, 3), randn(2, 4), randn(2, 5, 3, seed=1)
    q, minimum = critics(obs, actions), critics.minimum(obs, actions)
    for b, k in itertools.product(range(2), range(5)):
        for j, network in enumerate((critics.q1, critics.q2)):
            torch.testing.assert_close(q[j, b, k], mlp(network, obs[b], actions[b, k])[0])
        assert minimum[b, k].item() == pytest.approx(min_q(critics, obs[b], actions[b, k]))
    assert (q[0] - q[1]).abs().min() > 1e-4


@pytest.mark.parametrize("network", ["policy.mlp", "critics.q1", "critics.q2"])
def test_weights_start_as_those_of_linear_layers(network):
    """Uniform on ±1/√(fan-in), where the first layer's fan-in is the whole input."""
    torch.manual_seed(5)
    net = sdac.Agent(sdac.Args(), 11, 6).get_submodule(network)
    fan_ins = [33 if network == "policy.mlp" else 17, 256, 256, 256]
    layers = [net.input_layer, *net.hidden_layers, net.output_layer]
    for layer, fan_in in zip(layers, fan_ins, strict=True):
        x = math.sqrt(fan_in) * torch.cat([layer.weight.flatten(), layer.bias]).detach()
        assert x.abs().max() <= 1 + 1e-6
        # 5 standard errors of the moments 0 and 1/3, whose variances are 1/3 and 4/45
        assert abs(x.mean()) < 5 * math.sqrt(1 / 3 / len(x))
        assert abs(x.square().mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / len(x))


def test_the_formula_for_the_compiler_is_mish(monkeypatch):
    """In value and gradient, from -30 to 60."""
    x = torch.linspace(-30, 60, 9001, dtype=torch.float64).requires_grad_()
    expected = x * x.exp().log1p().tanh()
    (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(F, "mish", None)
    value = sdac.mish(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-13)


# ---- Sampling actions
@both_schedules
def test_sampling_is_textbook_ddpm_with_the_best_particle(float64, published):
    """Loops over states, particles and steps with the same noise give the same actions."""
    torch.manual_seed(0)
    net, critics, obs = sdac.Denoiser(3, 2), sdac.Critics(3, 2), randn(6, 3)
    for parameter in (*net.parameters(), *critics.parameters()):
        parameter.data *= 2  # networks that matter
    torch.manual_seed(2)
    schedule = sdac.NoiseSchedule(4, published)
    actions = sdac.sample_actions(net, critics, schedule, obs, (6, 5, 2))
    torch.manual_seed(2)
    expected, winners, outside = ddpm(net, critics, chain(4, published), obs, 5, published)
    torch.testing.assert_close(actions, expected, rtol=0, atol=1e-9)
    assert outside > 0 and len(set(winners)) > 2


@pytest.mark.parametrize(("num_steps", "published"), [(6, False), (20, True), (200, False)])
def test_sampling_with_the_score_of_a_gaussian_draws_from_it(float64, num_steps, published):
    """Samples have the moments of the chain; with 200 steps, those of E[a_0 | a_t] at t = 0."""
    mu, sigma, n = torch.tensor([0.25, -0.2]), 0.15, 20_000
    levels = chain(num_steps, published)

    def denoiser(obs, a_t, t):
        signal, variance = levels[t].signal, levels[t].variance
        return math.sqrt(variance) * (a_t - signal * mu) / (signal**2 * sigma**2 + variance)

    critics = SimpleNamespace(minimum=lambda obs, actions: torch.zeros(n, 1))
    torch.manual_seed(0)
    schedule = sdac.NoiseSchedule(num_steps, published)
    samples = sdac.sample_actions(denoiser, critics, schedule, torch.zeros(n, 1), (n, 1, 2))

    # The chain is linear: a_0 is predicted as its mean given a_t, so the box, 5σ away, is not met.
    mean, variance = torch.zeros(2), 0.25 if published else 1.0
    for level in reversed(levels):
        gain = level.signal * sigma**2 / (level.signal**2 * sigma**2 + level.variance)
        offset, std = bayes(level, mu - gain * level.signal * mu, 0.0)
        slope, _ = bayes(level, gain, 1.0)
        mean, variance = slope * mean + offset, slope**2 * variance + std**2
    # 5 standard errors
    assert ((samples.mean(0) - mean).abs() < 5 * math.sqrt(variance / n)).all()
    assert ((samples.var(0) - variance).abs() < 5 * variance * math.sqrt(2 / n)).all()
    assert abs(torch.cov(samples.T)[0, 1]) < 5 * variance / math.sqrt(n)
    if num_steps == 200:
        assert (mean - mu).abs().max() < 0.0025 * sigma
        assert math.sqrt(variance) == pytest.approx(sigma**2 / math.hypot(sigma, 0.05), rel=0.01)


# ---- Reverse samples
@pytest.mark.parametrize("std", [0.05, 0.7, 4.0])
def test_truncated_normal_has_exact_quantiles_inside_and_far_outside_the_box(std):
    """At the midpoints of m parts of [0, 1], the j-th smallest sample is the (j+½)/m quantile: in
    float32, on both sides, up to 12 standard deviations outside."""
    midpoints = (torch.arange(256) + 0.5) / 256
    for outside in (-1 / std, -0.5 / std, 0, 0.5, 2, 4, 8, 12):
        for sign in (1, -1):
            mean = torch.tensor(sign * (1 + outside * std))
            samples = sign * sdac.sample_truncated_normal(mean, torch.tensor(std), midpoints)
            # Mirrored, so that the box lies in the lower tail, where Φ keeps its digits.
            ends = [(x - abs(mean.item())) / std for x in [-1, 1, *sorted(samples.tolist())]]
            low, high, *cdf = map(normal_cdf, ends)
            ranks = [(x - low) / (high - low) for x in cdf]
            assert ranks == pytest.approx(midpoints.tolist(), abs=1e-3)


def test_truncated_samples_stay_in_the_box_and_satisfy_the_forward_equation():
    """a_t = signal · â + noise · ε, also 10⁴ deviations outside and at the least uniform number."""
    schedule = sdac.NoiseSchedule(6, published=False)
    t = torch.arange(6).repeat(6)
    signal, noise = schedule.signal[t], schedule.noise[t]
    far = signal + torch.tensor([-3, 0, 1, 14, 40, 1e4]).repeat_interleave(6) * noise
    a_t = torch.stack([far, -far], dim=1)
    torch.manual_seed(0)
    a_hat, eps = sdac.reverse_samples(schedule, a_t, t, 1000)
    assert a_hat.isfinite().all() and a_hat.abs().max() <= 1
    forward = signal.double()[:, None, None] * a_hat + noise.double()[:, None, None] * eps
    # 3 roundings of float32 (6e-8) of numbers as large as a_t or 1
    assert ((forward - a_t[:, None]).abs() <= 2e-7 * (1 + a_t[:, None].abs())).all()

    means, uniform = torch.tensor([-1e4, -1, 0, 1, 1e4]), torch.tensor([0, 2**-24, 1 - 2**-24])
    samples = sdac.sample_truncated_normal(means[:, None], torch.tensor(0.05), uniform)
    assert (samples.abs() <= 1).all() and (samples[0] == -1).all() and (samples[-1] == 1).all()


def test_published_samples_are_clipped_and_keep_their_noise(float64):
    """ε is standard normal whatever a_t is, and â the forward equation's action, cut to the box."""
    schedule, a_t = sdac.NoiseSchedule(20, published=True), 2 * randn(5, 2)
    t = torch.tensor([0, 3, 7, 12, 19])
    torch.manual_seed(0)
    a_hat, eps = sdac.reverse_samples(schedule, a_t, t, 1000, published=True)
    torch.manual_seed(0)
    assert torch.equal(eps, torch.randn(5, 1000, 2))
    for b, level in enumerate(chain(20, True)[i] for i in t):
        whole = (a_t[b] - level.noise * eps[b]) / level.signal
        torch.testing.assert_close(a_hat[b], whole.clamp(-1, 1), rtol=0, atol=1e-9)


# ---- Reweighted score matching
@both_schedules
def test_rsm_target_is_the_closed_form_score_of_a_gaussian(float64, published):
    """Q = -λ‖a-μ‖²/(2σ²) gives E[ε | a_t] = √(1-ᾱ)(a_t - √ᾱμ)/(ᾱσ²+1-ᾱ) at every level."""
    temperature, sigma, mu, copies = 0.7, 0.1, torch.tensor([0.3, -0.4]), 24
    num_steps = 20 if published else 6
    schedule = sdac.NoiseSchedule(num_steps, published)
    for i, level in enumerate(chain(num_steps, published)):
        a_0 = mu + sigma * randn(2, seed=i)
        a_t = level.signal * a_0 + level.noise * randn(2, seed=100 + i)
        torch.manual_seed(i)
        t = torch.full((copies,), i)
        a_hat, eps = sdac.reverse_samples(schedule, a_t.expand(copies, 2), t, 4096)
        q = -temperature * (a_hat - mu).square().sum(2) / (2 * sigma**2)
        target, _ = sdac.rsm_target(eps, q, temperature)
        expected = a_t - level.signal * mu
        expected = level.noise * expected / (level.signal**2 * sigma**2 + level.variance)
        # 5 standard errors, measured on independent copies
        assert ((target.mean(0) - expected).abs() < 5 * target.std(0) / math.sqrt(copies)).all()
        assert (target.std(0) < 0.1).all()  # The tolerance is small for a score of size 1.


def two_mode_error(t, num_samples, clip, rows=1000):
    """Root mean square error of rsm_target, against quadrature, for exp(Q/λ) =
    0.8 N(0.5, 0.15²) + 0.2 N(-0.5, 0.15²) in the box."""

    def density(a):
        mode_1, mode_2 = (torch.exp(-((a - c) ** 2) / (2 * 0.15**2)) for c in (0.5, -0.5))
        return 0.8 * mode_1 + 0.2 * mode_2

    level = chain(20, published=True)[t]
    torch.manual_seed(0)
    modes = torch.where(torch.rand(rows, 1) < 0.8, 0.5, -0.5)
    actions = (modes + 0.15 * torch.randn(rows, 1)).clamp(-1, 1)
    a_t = level.signal * actions + level.noise * torch.randn(rows, 1)

    a_0 = torch.arange(-0.999, 1, 0.002)  # midpoints
    eps = (a_t - level.signal * a_0) / level.noise
    posterior = density(a_0) * torch.exp(-(eps**2) / 2)
    truth = (posterior * eps).sum(1) / posterior.sum(1)

    schedule, steps = sdac.NoiseSchedule(20, published=True), torch.full((rows,), t)
    a_hat, eps = sdac.reverse_samples(schedule, a_t, steps, num_samples, published=clip)
    target, _ = sdac.rsm_target(eps, 0.3 * density(a_hat)[..., 0].log(), 0.3)
    return (target[:, 0] - truth).square().mean().sqrt().item()


@pytest.mark.parametrize(("t", "factor"), [(5, 5), (10, 50)])
def test_truncating_converges_to_quadrature_and_clipping_does_not(float64, t, factor):
    """With 16 times the samples one error falls to a quarter. The other does not halve with four
    times the samples, and is `factor` times as large."""
    few, many = (two_mode_error(t, m, clip=False) for m in (64, 1024))
    assert many / few == pytest.approx(1 / 4, rel=0.2)
    clip_many, clip_more = (two_mode_error(t, m, clip=True) for m in (1024, 4096))
    assert clip_more > 0.8 * clip_many and clip_more > factor * many


def test_rsm_target_is_the_weighted_mean_of_the_noise(float64):
    """Weights ∝ exp(Q/λ), their mean of ε and the effective sample size, by loops."""
    eps, q, temperature = randn(4, 16, 2), 3 + 0.05 * randn(4, 16, seed=1), 0.04
    target, sample_size = sdac.rsm_target(eps, q, temperature)
    for b in range(4):
        weights = [math.exp(value / temperature) for value in q[b].tolist()]
        weights = [w / sum(weights) for w in weights]
        assert sample_size[b].item() == pytest.approx(1 / sum(w**2 for w in weights))
        for k in range(2):
            expected = sum(w * eps[b, i, k].item() for i, w in enumerate(weights))
            assert target[b, k].item() == pytest.approx(expected)


def test_one_dominant_value_leaves_a_single_sample_even_where_exp_overflows():
    eps, q = randn(3, 32, 2), 1e6 + 1000 * F.one_hot(torch.full((3,), 5), 32)
    target, sample_size = sdac.rsm_target(eps, q, 1.0)
    assert sample_size.tolist() == pytest.approx([1, 1, 1])
    torch.testing.assert_close(target, eps[:, 5])


# ---- The temperature λ
NOISED = randn(6, 3, seed=1), randn(6, 2, seed=3), randn(6, 2, seed=4)  # s, a_0, ε
NOISED += randn(6, 2, seed=2), torch.tensor([0, 1, 2, 3, 0, 1])  # a_t, t


def test_lambda_is_a_share_of_the_mean_spread_of_q_over_the_reverse_samples():
    agent = make_agent(temperature=0.03, num_reverse_samples=9)
    q = 20 + torch.arange(1, 7)[:, None] * randn(6, 9)
    agent.critics.minimum = lambda obs, actions: q
    _, metrics = agent.estimate_noise(*NOISED)
    spread = statistics.fmean(statistics.pstdev(row) for row in q.tolist())
    assert metrics["temperature"].item() == pytest.approx(0.03 * spread, rel=1e-5)


def test_a_hundred_times_the_q_leaves_the_targets_as_they_are():
    agent = make_agent(num_reverse_samples=32, temperature=0.5)
    results = []
    for scale in (1, 100):
        for critic in (agent.critics.q1, agent.critics.q2):
            critic.output_layer.weight.data *= scale
            critic.output_layer.bias.data *= scale
        torch.manual_seed(1)
        results.append(agent.estimate_noise(*NOISED))
    (target, metrics), (large_target, large_metrics) = results
    torch.testing.assert_close(large_target, target, rtol=0, atol=1e-4)
    assert large_metrics["temperature"].item() == pytest.approx(100 * metrics["temperature"].item())
    assert 2 < metrics["effective_sample_size"] < 28  # of 32: the weights matter


def test_a_constant_q_gives_all_samples_the_same_weight():
    agent = make_agent()
    agent.critics.minimum = lambda obs, actions: torch.full((6, 6), 0.75)
    torch.manual_seed(1)
    target, metrics = agent.estimate_noise(*NOISED)
    torch.manual_seed(1)
    _, eps = sdac.reverse_samples(agent.schedule, *NOISED[3:], 6)
    torch.testing.assert_close(target, eps.mean(1))
    assert metrics["effective_sample_size"].item() == pytest.approx(6)


def test_published_lambda_is_twice_the_exploration_noise():
    agent = make_agent(published=True)
    agent.exploration_std.fill_(0.17)
    assert agent.estimate_noise(*NOISED)[1]["temperature"].item() == pytest.approx(0.34)


@pytest.mark.parametrize("published", [False, True])
def test_the_own_action_is_a_guess_in_the_second_half(published):
    """Q is largest there. Then the target is the noise with which the action was mixed."""
    agent, (a_0, eps) = make_agent(published=published), torch.full((2, 100, 2), 0.5)
    agent.critics.minimum = lambda obs, actions: (actions == 0.5).all(2).float()
    agent.exploration_std.fill_(1e-4)
    for progress in (0, 0.49, 0.51, 1):
        agent.progress.fill_(progress)
        inputs = torch.zeros(100, 3), a_0, eps, randn(100, 2), torch.arange(100) % 4
        target, _ = agent.estimate_noise(*inputs)
        own = (target == 0.5).all(1)
        assert own.all() if progress > 0.5 and not published else not own.any()


def test_mirror_descent_weights_are_exponentials_of_the_standardised_q():
    """exp(z / (10 · noise)), one value at a time, where z is cut at ±3."""
    agent = make_agent(mirror_descent=True)
    agent.exploration_std.fill_(0.08)
    q = [-60.0, 60.0, *(0.5 * i for i in range(38))]
    agent.critics.minimum = lambda obs, actions: torch.tensor(q)[:, None]
    weights = agent.mirror_descent_weights(torch.zeros(40, 3), torch.zeros(40, 2)).tolist()
    z = [(x - statistics.fmean(q)) / statistics.pstdev(q) for x in q]
    assert z[0] < -3 and z[1] > 3
    expected = [math.exp(min(max(x, -3), 3) / 0.8) for x in z]
    assert weights == pytest.approx(expected, rel=1e-5)


# ---- The agent
@both_schedules
def test_act_samples_the_averaged_policy_ranked_by_the_online_critics(float64, published):
    agent, obs = make_agent(published=published), randn(8, 3)
    agent.exploration_std.fill_(0.4)
    levels = chain(4, published)
    for explore, num_particles in [(False, 3), (True, 5)]:
        torch.manual_seed(1)
        best, _, _ = ddpm(
            agent.average_policy, agent.critics, levels, obs, num_particles, published
        )
        noisy = best + 0.4 * torch.randn(8, 2)
        expected = noisy.clamp(-1, 1) if explore else best
        torch.manual_seed(1)
        torch.testing.assert_close(agent.act(obs, explore=explore), expected, rtol=0, atol=1e-9)
    assert (noisy.abs() > 1).any()


def guess(level, a_t, draw, published):
    """The action â and the noise ε behind one coordinate, from one random number, in floats."""
    mean, width, normal = a_t / level.signal, level.noise / level.signal, statistics.NormalDist()
    if published:
        return min(max(mean - width * draw, -1), 1), draw
    low, high = (normal.cdf((end - mean) / width) for end in (-1, 1))
    rank = 1 - draw if mean < 0 else draw  # The script mirrors negative means.
    action = mean + width * normal.inv_cdf(low + rank * (high - low))
    return action, (a_t - level.signal * action) / level.noise


def first_adam_step(network, loss, lr):
    parameters = list(network.parameters())
    for x, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        x.grad = gradient
        x.data -= lr * gradient / (gradient.abs() + 1e-8)


def recompute_update(agent, batch, progress, policy_lr, q_lr):
    """An agent's first update by loops, from the same random numbers. Returns the networks, with
    gradients, and the metrics."""
    args, (obs, actions, rewards, next_obs, terminations) = agent.args, batch
    nets = SimpleNamespace(**{name: copy.deepcopy(net) for name, net in agent.named_children()})
    levels, n = chain(args.denoising_steps, args.published), len(obs)
    std = 0.1 + 0.4 * math.exp(-(agent.updates + 1) / args.exploration_decay)

    # a' from the current policy, with noise
    best, winners, outside = ddpm(nets.policy, nets.critics, levels, next_obs, 5, args.published)
    noisy = best + std * torch.randn(n, 2)
    next_actions = noisy.clamp(-1, 1)
    assert outside > 0 and len(set(winners)) > 1 and not torch.equal(noisy, next_actions)

    # critics
    loss, values = 0, []
    for i in range(n):
        y = args.reward_scale * rewards[i]
        if not terminations[i]:
            y = y + args.gamma * min_q(nets.target_critics, next_obs[i], next_actions[i])
        for critic in (nets.critics.q1, nets.critics.q2):
            values.append(mlp(critic, obs[i], actions[i])[0])
            loss = loss + (values[-1] - y) ** 2 / n
    first_adam_step(nets.critics, loss, q_lr)
    metrics = {"q_values": sum(values).item() / (2 * n), "q_loss": loss.item()}

    # noised actions and predictions at (s', a')
    t, true_eps = torch.randint(len(levels), (n,)).tolist(), torch.randn(n, 2)
    a_t, predictions = [], []
    for b in range(n):
        a_t.append(levels[t[b]].signal * next_actions[b] + levels[t[b]].noise * true_eps[b])
        predictions.append(denoise(nets.policy, next_obs[b], a_t[b], t[b]))

    # policy: a loss with M weights and noises per state, or with one
    if args.mirror_descent:
        q = [min_q(nets.critics, next_obs[b], next_actions[b]) for b in range(n)]
        z = [(x - statistics.fmean(q)) / statistics.pstdev(q) for x in q]
        weights, eps = [[math.exp(x / (10 * std))] for x in z], true_eps[:, None]
    else:
        m = args.num_reverse_samples
        draws = (torch.randn if args.published else torch.rand)(n, m, 2)
        q, eps, a_hat = torch.empty(n, m), torch.empty(n, m, 2), torch.empty(2)
        for b, i in itertools.product(range(n), range(m)):
            for c in range(2):
                inputs = levels[t[b]], a_t[b][c].item(), draws[b, i, c].item(), args.published
                a_hat[c], eps[b, i, c] = guess(*inputs)
            if progress > 0.5 and i == 0 and not args.published:
                a_hat, eps[b, 0] = next_actions[b].clone(), true_eps[b]
            q[b, i] = min_q(nets.critics, next_obs[b], a_hat)
        temperature = args.temperature * statistics.fmean(map(statistics.pstdev, q.tolist()))
        temperature = 2 * std if args.published else temperature
        weights = [[math.exp((x - max(row)) / temperature) for x in row] for row in q.tolist()]
        weights = [[w / sum(row) for w in row] for row in weights]
        sample_size = statistics.fmean(1 / sum(w**2 for w in row) for row in weights)
        metrics |= {"temperature": temperature, "effective_sample_size": sample_size}
        assert 1.2 < sample_size < m - 0.2  # The weights matter.
    loss, least = 0, 0
    for b in range(n):
        mean = sum(w * e for w, e in zip(weights[b], eps[b], strict=True))
        for w, e in zip(weights[b], eps[b], strict=True):
            loss = loss + w * (predictions[b] - e).square().sum() / n
            least += 0 if args.mirror_descent else w * (mean - e).square().sum().item() / n
    first_adam_step(nets.policy, loss, policy_lr)
    metrics["policy_loss"] = loss.item() - least  # The script leaves out a constant.

    # averages
    pairs = (nets.target_critics, nets.critics), (nets.average_policy, nets.policy)
    for average, source in pairs:
        for old, new in zip(average.parameters(), source.parameters(), strict=True):
            old.data = args.tau * new.data + (1 - args.tau) * old.data
    return nets, metrics


@pytest.mark.parametrize("kind", ["default", "published", "mirror_descent"])
@pytest.mark.parametrize("progress", [0.4, 0.6])
def test_one_update_is_its_recomputation_by_loops(float64, kind, progress):
    """Sampling, losses, gradients, steps of Adam, averages and metrics."""
    choices = {} if kind == "default" else {kind: True}
    sizes = {"temperature": 0.4, "gamma": 0.9, "tau": 0.1, "policy_lr": 2e-3, "q_lr": 5e-3}
    agent, batch = make_agent(policy_frequency=1, **sizes, **choices), make_batch()
    policy_factor = q_factor = 1 - progress
    if kind == "published":
        policy_factor, q_factor = 1 - 0.9 * (progress - 0.26) / 0.51, 1
    agent.updates = 1000
    for critics in (agent.critics, agent.target_critics):  # Neither network is always the smaller.
        q_1, q_2 = critics(batch[3], 2 * torch.rand(6, 50, 2) - 1)
        assert 0.1 < (q_1 < q_2).double().mean() < 0.9

    torch.manual_seed(5)
    expected, metrics = recompute_update(
        agent, batch, progress, 2e-3 * policy_factor, 5e-3 * q_factor
    )
    torch.manual_seed(5)
    agent.update(batch, progress)
    assert {k: v.item() for k, v in agent.metrics.items()} == pytest.approx(metrics, rel=1e-9)
    for name, network in agent.named_children():
        pairs = zip(network.parameters(), getattr(expected, name).parameters(), strict=True)
        for found, reference in pairs:
            torch.testing.assert_close(found, reference, rtol=0, atol=1e-9)
            torch.testing.assert_close(found.grad, reference.grad, rtol=1e-8, atol=1e-11)


def test_averages_start_as_copies():
    """Equal to their sources before any update, but not the same tensors."""
    agent = sdac.Agent(sdac.Args(), 3, 2)
    pairs = (agent.target_critics, agent.critics), (agent.average_policy, agent.policy)
    for average, source in pairs:
        for old, new in zip(average.parameters(), source.parameters(), strict=True):
            assert torch.equal(old, new) and old.data_ptr() != new.data_ptr()


def test_policy_and_averages_move_at_every_third_update_and_critics_at_each():
    agent, batch = make_agent(policy_frequency=3), make_batch()
    for update in range(1, 7):
        old = {name: copy.deepcopy(net.state_dict()) for name, net in agent.named_children()}
        agent.update(batch, 0)
        for name, net in agent.named_children():
            moved = any(not torch.equal(x, old[name][key]) for key, x in net.state_dict().items())
            assert moved == (name == "critics" or update % 3 == 0)


def test_exploration_noise_falls_exponentially_with_the_updates():
    agent, batch = make_agent(), make_batch()
    for update in (1, 1000, 5000, 100_000):
        agent.updates = update - 1
        agent.update(batch, 0)
        expected = 0.1 + 0.4 * math.exp(-update / 5000)
        assert agent.exploration_std.item() == pytest.approx(expected)


def learning_rates(agent, progress):
    agent.update(make_batch(), progress)
    return [optimizer.param_groups[0]["lr"].item() for optimizer in agent.optimizers]


def test_learning_rates_fall_linearly_to_0():
    agent = make_agent(policy_lr=2e-3, q_lr=5e-3)
    for progress in (0, 0.25, 0.9, 1):
        expected = [2e-3 * (1 - progress), 5e-3 * (1 - progress)]
        assert learning_rates(agent, progress) == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_published_learning_rate_of_the_policy_is_held_and_falls_to_a_tenth():
    """Linearly, from 26% to 77% of the training; the critics' stays."""
    agent = make_agent(published=True, policy_lr=2e-3, q_lr=5e-3)
    for progress, factor in {0: 1, 0.26: 1, 0.515: 0.55, 0.77: 0.1, 1: 0.1}.items():
        assert learning_rates(agent, progress) == pytest.approx([2e-3 * factor, 5e-3])


# ---- Replay buffer
def transitions(first, count):
    """Transitions whose seven numbers all tell which one it is."""
    n = torch.arange(first, first + count)[:, None].float()
    obs, next_obs = n + torch.tensor([0, 0.1]), n + torch.tensor([0.4, 0.5])
    return obs, n + 0.2, n[:, 0] + 0.3, next_obs, n[:, 0] + 0.6


def test_replay_buffer_keeps_the_last_transitions_and_samples_them_uniformly():
    """As a deque would, also where an addition crosses the end of the rows."""
    torch.manual_seed(0)
    buffer, kept, added = sdac.ReplayBuffer(10, 2, 1), deque(maxlen=10), 0
    buffer.rows.fill_(math.nan)
    for count in [3, 4, 5, 1, 7, 10, 4]:
        buffer.add(*transitions(added, count))
        kept.extend(range(added, added + count))
        added += count
        n = 20_000
        batch = buffer.sample(n)
        drawn = batch[0][:, 0].long()
        counts = drawn.bincount(minlength=added)
        assert counts.nonzero()[:, 0].tolist() == list(kept)
        p = 1 / len(kept)  # 5 standard errors of a count
        assert all(abs(counts[i] - n * p) < 5 * math.sqrt(n * p * (1 - p)) for i in kept)
        for found, expected in zip(batch, transitions(0, added), strict=True):
            assert torch.equal(found, expected[drawn])
