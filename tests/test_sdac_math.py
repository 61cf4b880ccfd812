"""The mathematics of sdac_continuous_action.py against closed forms, quadrature and plain loops in float64.

"k standard errors" in a comment gives the tolerance of a Monte-Carlo estimate; seeds are fixed."""

import copy
import math
import statistics
from collections import deque

import pytest
import torch
import torch.nn.functional as F

import sdac_continuous_action as sdac

CPU = torch.device("cpu")


# ---- References: definitions in plain float64 ----


def chain(num_steps, scale):
    """For each step (β_t, √ᾱ_{t-1}, 1-ᾱ_{t-1}, √ᾱ_t, 1-ᾱ_t), by following mean and variance of the forward chain."""
    steps, signal, variance = [], 1.0, 0.0
    for i in range(num_steps):
        beta = scale * (1e-4 + (0.999 - 1e-4) * i / max(num_steps - 1, 1))
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


def sinusoid(t, size):
    angles = [t * 10_000 ** (-i / (size // 2 - 1)) for i in range(size // 2)]
    return torch.tensor([math.sin(x) for x in angles] + [math.cos(x) for x in angles])


def denoise(net, s, a, t):
    """ε_θ(s, a, t) of one state, action and step: the first layer is one nn.Linear on their concatenation."""
    embedding = net.time_mlp(sinusoid(int(t), net.sizes[1]).to(s.dtype))
    h = F.mish(net.input_layer(torch.cat([s, embedding, a])))
    for layer in net.hidden_layers:
        h = F.mish(layer(h))
    return net.output_layer(h)


def q_value(critics, j, s, a):
    """Q_j of one state and action, layer by layer."""
    h = torch.cat([s, a])
    for i, (weight, bias) in enumerate(zip(critics.weights, critics.biases, strict=True)):
        h = weight[j].T @ (h if i == 0 else F.mish(h)) + bias[j, 0]
    return h[0]


def min_q(critics, s, a):
    return min(q_value(critics, 0, s, a).item(), q_value(critics, 1, s, a).item())


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


# ---- Schedule ----


@pytest.mark.parametrize(("num_steps", "scale"), [(20, 0.8), (3, 1.0), (200, 0.1), (1, 0.5)])
def test_schedule_is_the_ddpm_chain_and_its_bayes_posterior(num_steps, scale):
    """ᾱ follows from the single steps, mean and deviation of q(a_{t-1}|a_t, a_0) from Bayes' rule."""
    schedule = sdac.NoiseSchedule(num_steps, scale, dtype=torch.float64)
    for t, step in enumerate(chain(num_steps, scale)):
        assert schedule.signal[t].item() == pytest.approx(step[3], rel=1e-10)
        assert schedule.noise[t].item() == pytest.approx(math.sqrt(step[4]), rel=1e-10)
        for a_0, a_t in [(1.0, 0.0), (0.0, 1.0), (-0.7, 2.3)]:
            mean, std = bayes(step, a_0, a_t)
            assert schedule.posterior_mean(a_0, a_t, t).item() == pytest.approx(mean, rel=1e-9, abs=1e-12)
            assert schedule.posterior_std[t].item() == pytest.approx(std, rel=1e-9, abs=1e-12)


def test_default_schedule_has_the_published_reverse_deviations():
    """√((1-ᾱ)/ᾱ) of the default T and scale are the figures of the project's notes (435.67 is cut to 435)."""
    args = sdac.Args()
    schedule = sdac.NoiseSchedule(args.denoising_steps, args.beta_scale)
    deviations = (schedule.noise / schedule.signal).tolist()
    assert deviations[1:11] == pytest.approx([0.21, 0.37, 0.55, 0.75, 0.99, 1.29, 1.66, 2.16, 2.85, 3.84], abs=0.00501)
    assert math.floor(deviations[19]) == 435


def test_add_noise_has_the_distribution_of_the_single_steps():
    """a_t from add_noise and from t+1 single steps a ← √(1-β) a + √β z have the same mean and variance."""
    schedule, n, a_0 = sdac.NoiseSchedule(20, 0.8, dtype=torch.float64), 100_000, 0.7
    generator, walk = seeded(1), torch.full((n,), a_0, dtype=torch.float64)
    draw = lambda: torch.randn(n, generator=generator, dtype=torch.float64)  # noqa: E731
    for t, (beta, *_, variance) in enumerate(chain(20, 0.8)):
        walk = math.sqrt(1 - beta) * walk + math.sqrt(beta) * draw()
        jump = schedule.add_noise(a_0, draw(), t)
        # 5 standard errors; the difference of two estimates has √2 times the error of one: σ/√n, σ²√(2/n)
        assert abs(walk.mean() - jump.mean()) < 5 * math.sqrt(2 * variance / n)
        assert abs(walk.var() - jump.var()) < 5 * variance * math.sqrt(4 / n)


def test_predict_a0_undoes_add_noise():
    """Solving the forward process for a_0 gives a_0 back, for a tensor of steps that broadcasts."""
    schedule, t = sdac.NoiseSchedule(20, 0.8, dtype=torch.float64), torch.arange(20)[:, None]
    a_0, eps = 2 * torch.rand(20, 3, generator=seeded(), dtype=torch.float64) - 1, randn(20, 3, seed=1)
    a_t = schedule.add_noise(a_0, eps, t)
    assert (a_t - a_0).abs().max() > 1
    # √ᾱ is 1/435 at t = 19, which magnifies the rounding of 1e-16
    torch.testing.assert_close(schedule.predict_a0(a_t, eps, t), a_0, rtol=0, atol=1e-12)


# ---- Networks ----


def test_denoiser_is_an_mlp_on_the_concatenated_input():
    """The split first layer, broadcast over particles and steps, is one linear layer on cat([s, embedding, a_t])."""
    net, obs, a_t = double(sdac.Denoiser, 4, 3, hidden_dim=32), randn(2, 4), randn(2, 5, 3, seed=1)
    for t in range(20):
        output = net(net.embed_obs(obs)[:, None] + net.embed_time(torch.tensor(t)), a_t)
        for b in range(2):
            for k in range(5):
                # 1e-5: the script computes the angles in float32
                torch.testing.assert_close(output[b, k], denoise(net, obs[b], a_t[b, k], t), rtol=1e-5, atol=1e-5)


def test_time_embedding_tells_all_steps_apart():
    """Any two of 100 steps have sinusoidal embeddings at least 0.5 apart, and different shares of the first layer."""
    net, seen = double(sdac.Denoiser, 4, 3), []
    net.time_mlp.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    output = net.embed_time(torch.arange(100))
    # The first frequency alone puts t and t' at a distance of 2 |sin((t-t')/2)|; 44 ≈ 14π would be nearest to a period
    assert torch.pdist(seen[0]).min() > 0.5
    assert torch.pdist(output).min() > 1e-3


def test_critics_are_two_separate_mlps():
    """The batched forward pass gives, for each state and action, the values of two MLPs evaluated one by one."""
    critics, obs, actions = double(sdac.Critics, 4, 3, hidden_dim=32), randn(2, 4), randn(2, 5, 3, seed=1)
    values = critics(obs, actions)
    expected = [
        [[q_value(critics, j, obs[b], actions[b, n]).item() for n in range(5)] for b in range(2)] for j in range(2)
    ]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert (values[0] - values[1]).abs().min() > 1e-4


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
def test_sample_actions_is_textbook_ddpm_with_the_best_particle(exploration_std):
    """Loops over states, particles and steps with the same noise give the same actions."""
    num_states, num_particles, d, num_steps = 6, 5, 2, 4
    net, critics = double(sdac.Denoiser, 3, d, hidden_dim=16), double(sdac.Critics, 3, d, hidden_dim=16, seed=1)
    for parameter in [*net.parameters(), *critics.parameters()]:
        parameter.data *= 2  # networks that matter
    obs, schedule = randn(num_states, 3), sdac.NoiseSchedule(num_steps, 0.8, dtype=torch.float64)
    actions = sdac.sample_actions(net, critics, schedule, obs, num_particles, seeded(2), exploration_std)

    generator = seeded(2)
    shapes = [(num_states, num_particles, d)] * num_steps + [(num_states, d)]
    *noise, exploration = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    expected, winners, clipped, steps = [], [], 0, chain(num_steps, 0.8)
    for b in range(num_states):
        particles = []
        for k in range(num_particles):
            a = 0.5 * noise[0][b, k]
            for t in range(num_steps - 1, -1, -1):
                a_0 = (a - math.sqrt(steps[t][4]) * denoise(net, obs[b], a, t)) / steps[t][3]
                clipped += (a_0.abs() > 1).sum().item()
                a, std = bayes(steps[t], a_0.clamp(-1, 1), a)
                a = a + std * noise[num_steps - t][b, k] if t > 0 else a
            particles.append(a.detach())
        values = [min_q(critics, obs[b], a) for a in particles]
        winners.append(values.index(max(values)))
        expected.append(particles[winners[-1]] + (exploration_std or 0) * exploration[b])
    # 1e-5: the script computes the embedding's angles in float32
    torch.testing.assert_close(actions, torch.stack(expected).clamp(-1, 1), rtol=0, atol=1e-5)
    assert clipped > 0 and len(set(winners)) > 2
    assert exploration_std is None or (torch.stack(expected).abs() > 1).any()


class GaussianDenoiser:
    """The exact ε* for π* = N(μ, σ²I), with the interface that sample_actions uses; the context is the step t."""

    def __init__(self, steps, mu, sigma):
        self.sizes, self.mu, self.sigma = [1, 1, len(mu)], mu, sigma
        self.signal, self.variance = (torch.tensor([step[i] for step in steps], dtype=torch.float64) for i in (3, 4))

    def embed_obs(self, obs):
        return torch.zeros_like(obs)

    def embed_time(self, t):
        return t[:, None].double()

    def __call__(self, context, a_t):
        signal, variance = self.signal[context.long()], self.variance[context.long()]
        return variance.sqrt() * (a_t - signal * self.mu) / (signal**2 * self.sigma**2 + variance)


def test_sample_actions_samples_a_gaussian_given_its_score():
    """With the exact score of N(μ, σ²I) the samples have the chain's exact moments, which are near μ and σ²."""
    num_steps, scale, n, mu, sigma = 400, 0.02, 20_000, torch.tensor([0.25, -0.2], dtype=torch.float64), 0.15
    steps = chain(num_steps, scale)
    denoiser, schedule = GaussianDenoiser(steps, mu, sigma), sdac.NoiseSchedule(num_steps, scale, dtype=torch.float64)
    critics = lambda obs, actions: torch.zeros(2, *actions.shape[:2])  # noqa: E731
    obs = torch.zeros(n, 1, dtype=torch.float64)
    samples = sdac.sample_actions(denoiser, critics, schedule, obs, 1, seeded())

    # The chain is linear: a_0 predicted from a_t is the mean of N(μ, σ²) given a_t, so the box, 5σ away, is not reached
    mean, variance = torch.zeros(2, dtype=torch.float64), 0.25
    for step in reversed(steps):
        gain = step[3] * sigma**2 / (step[3] ** 2 * sigma**2 + step[4])
        offset, std = bayes(step, mu - gain * step[3] * mu, torch.zeros(2, dtype=torch.float64))
        slope, _ = bayes(step, gain, 1.0)
        mean, variance = slope * mean + offset, slope**2 * variance + std**2
    # 5 standard errors: √(v/n) of a mean, v√(2/n) of a variance, v/√n of a covariance
    assert ((samples.mean(0) - mean).abs() < 5 * math.sqrt(variance / n)).all()
    assert ((samples.var(0) - variance).abs() < 5 * variance * math.sqrt(2 / n)).all()
    assert abs(torch.cov(samples.T)[0, 1]) < 5 * variance / math.sqrt(n)
    # What 400 steps leave of the start at 0.5 N(0, I) and of discretisation: 0.04% and 3.4%
    assert (mean - mu).abs().max() < 0.001 * sigma
    assert math.sqrt(variance) == pytest.approx(sigma, rel=0.04)


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


def test_truncated_samples_stay_in_the_box_and_satisfy_the_forward_equation():
    """Up to 10⁴ deviations outside the box and at the ends of the uniform numbers: finite, in the box, consistent."""
    schedule = sdac.NoiseSchedule(20, 0.8)
    t, a_t = noised_actions(schedule, [0.5, 4, 8, 12, 14, 40, 1e4])
    ends = torch.tensor([0, 2.0**-24, 0.5, 1 - 2.0**-24])
    uniform = torch.cat([ends, torch.rand(28, generator=seeded())])[:, None].expand(len(t), 32, 2)
    eps, a_hat = sdac.reverse_samples(schedule, a_t, t, uniform, "truncate")
    assert eps.isfinite().all() and a_hat.isfinite().all() and a_hat.abs().max() <= 1
    forward = schedule.add_noise(a_hat.double(), eps.double(), t[:, None])
    # 3 roundings of float32 (6e-8 each) of quantities of the size of a_t or 1
    assert ((forward - a_t[:, None]).abs() <= 2e-7 * (1 + a_t[:, None].abs())).all()


@pytest.mark.parametrize("sigmas", [[0.5, 1, 2, 3], [4, 6, 8, 12]], ids=["inside and near", "far outside"])
def test_truncated_samples_have_the_distribution_function_of_the_truncated_normal(sigmas):
    """At the midpoint grid the j-th smallest â is the (j+½)/M quantile, also 12 deviations outside the box."""
    schedule, steps, m = sdac.NoiseSchedule(20, 0.8), chain(20, 0.8), 256
    t, a_t = noised_actions(schedule, sigmas)
    uniform = grid(m)[torch.randperm(m, generator=seeded())][None, :, None].expand(len(t), m, 2)
    _, a_hat = sdac.reverse_samples(schedule, a_t, t, uniform, "truncate")
    for b, (step,) in enumerate(t.tolist()):
        signal, noise = steps[step][3], math.sqrt(steps[step][4])
        for i, a in enumerate(a_t[b].tolist()):
            sign = 1 if a > 0 else -1  # mirrored so that the far end is in the lower tail, where erfc keeps its digits
            samples = sorted((sign * a_hat[b, :, i].double()).tolist())
            low, high, *cdf = [normal_cdf((signal * x - abs(a)) / noise) for x in [-1, 1, *samples]]
            ranks = [(x - low) / (high - low) for x in cdf]
            # No Monte-Carlo error. float32 rounds ε near 12 by 5e-7, of an interval that is 2/435 = 5e-3 long at t = 19
            assert ranks == pytest.approx(grid(m).tolist(), abs=1e-3)


def test_clipped_samples_are_standard_normal_noise_and_clipped_actions():
    """With "clip" ε is standard normal whatever a_t is, and â is the forward process solved and cut to the box."""
    schedule, m = sdac.NoiseSchedule(20, 0.8), 1000
    t, a_t = noised_actions(schedule, [0.5, 8])
    uniform = torch.cat([grid(m), torch.tensor([0, 1 - 2.0**-24])])[None, :, None].expand(len(t), m + 2, 2)
    eps, a_hat = sdac.reverse_samples(schedule, a_t, t, uniform, "clip")
    eps = eps.expand(len(t), m + 2, 2)
    assert eps.isfinite().all() and a_hat.isfinite().all()
    assert [normal_cdf(x) for x in eps[0, :m, 1].tolist()] == pytest.approx(grid(m).tolist(), abs=1e-6)
    assert (eps == eps[:1, :, :1]).all()
    for b, (step,) in enumerate(t.tolist()):
        _, _, _, signal, variance = chain(20, 0.8)[step]
        expected = ((a_t[b].double() - math.sqrt(variance) * eps[b].double()) / signal).clamp(-1, 1)
        torch.testing.assert_close(a_hat[b].double(), expected, rtol=0, atol=5e-4)  # float32 times up to 435


# ---- Reweighted score matching ----


def twins(energy):
    """Two critics whose minimum is the energy, though each of them is far above it in a half of the box."""
    return lambda obs, a: torch.stack([energy(a) + 50 * a[..., 0].relu(), energy(a) + 50 * (-a[..., 0]).relu()])


def test_rsm_target_is_the_closed_form_score_of_a_gaussian():
    """Q = -λ‖a-μ‖²/(2σ²), narrow in the box, gives ε* = √(1-ᾱ)(a_t - √ᾱμ)/(ᾱσ²+1-ᾱ) at every step."""
    temperature, sigma, mu = 0.7, 0.1, torch.tensor([0.3, -0.4], dtype=torch.float64)
    energy = lambda a: -temperature * (a - mu).square().sum(-1) / (2 * sigma**2)  # noqa: E731
    schedule, steps, copies = sdac.NoiseSchedule(20, 0.8, dtype=torch.float64), chain(20, 0.8), 24
    for i, (_, _, _, signal, variance) in enumerate(steps):
        t = torch.full((copies, 1), i)
        a_t = signal * (mu + sigma * randn(2, seed=i)) + math.sqrt(variance) * randn(2, seed=100 + i)
        obs, a = torch.zeros(copies, 1, dtype=torch.float64), a_t.expand(copies, 2)
        uniform = torch.rand(copies, 4096, 2, generator=seeded(i), dtype=torch.float64)
        target, _ = sdac.rsm_target(twins(energy), schedule, obs, a, t, temperature, uniform, "truncate")
        expected = math.sqrt(variance) * (a_t - signal * mu) / (signal**2 * sigma**2 + variance)
        # 5 standard errors, measured on the independent copies of the same a_t (bias is of order error²/σ: smaller)
        assert ((target.mean(0) - expected).abs() < 5 * target.std(0) / math.sqrt(copies)).all()
        assert (target.std(0) < 0.1).all()  # so the tolerance above is at most 0.1, of scores of size 1


def two_mode_error(t, num_samples, proposal, rows=1000):
    """Root-mean-square error of rsm_target against quadrature: 0.8·N(0.5, 0.15²) + 0.2·N(-0.5, 0.15²) in the box."""
    mode = lambda a, centre: torch.exp(-((a - centre) ** 2) / (2 * 0.15**2))  # noqa: E731
    density = lambda a: 0.8 * mode(a, 0.5) + 0.2 * mode(a, -0.5)  # noqa: E731
    _, _, _, signal, variance = chain(20, 0.8)[t]
    modes = torch.where(torch.rand(rows, 1, generator=seeded(1), dtype=torch.float64) < 0.8, 0.5, -0.5)
    a_t = signal * (modes + 0.15 * randn(rows, 1, seed=2)).clamp(-1, 1) + math.sqrt(variance) * randn(rows, 1, seed=3)
    a_0 = 2 * grid(1000, torch.float64) - 1
    eps = (a_t - signal * a_0) / math.sqrt(variance)
    posterior = density(a_0) * torch.exp(-(eps**2) / 2)
    truth = (posterior * eps).sum(1) / posterior.sum(1)
    critics = twins(lambda a: 0.3 * density(a)[..., 0].log())
    schedule, obs = sdac.NoiseSchedule(20, 0.8, dtype=torch.float64), torch.zeros(rows, 1, dtype=torch.float64)
    steps, uniform = (
        torch.full((rows, 1), t),
        torch.rand(rows, num_samples, 1, generator=seeded(4), dtype=torch.float64),
    )
    target, _ = sdac.rsm_target(critics, schedule, obs, a_t, steps, 0.3, uniform, proposal)
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


@pytest.mark.parametrize("proposal", ["truncate", "clip"])
def test_rsm_target_is_the_weighted_mean_with_the_smaller_critic(proposal):
    """Softmax weights of min_j Q_j/λ, their mean of ε and the effective sample size 1/Σw², by loops."""
    schedule, critics = sdac.NoiseSchedule(20, 0.8, dtype=torch.float64), double(sdac.Critics, 3, 2, hidden_dim=16)
    obs, a_t, t, temperature = randn(4, 3), randn(4, 2, seed=1), torch.tensor([[0], [3], [8], [19]]), 0.05
    uniform = torch.rand(4, 16, 2, generator=seeded(2), dtype=torch.float64)
    target, ess = sdac.rsm_target(critics, schedule, obs, a_t, t, temperature, uniform, proposal)
    eps, a_hat = sdac.reverse_samples(schedule, a_t, t, uniform, proposal)
    for b in range(4):
        weights = [math.exp(min_q(critics, obs[b], a_hat[b, i]) / temperature) for i in range(16)]
        assert max(weights) > 1.001 * min(weights)
        total = sum(weights)
        assert ess[b].item() == pytest.approx(1 / sum((w / total) ** 2 for w in weights), rel=1e-9)
        for k in range(2):
            expected = sum(w * eps[b, i, k].item() for i, w in enumerate(weights)) / total
            assert target[b, k].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_effective_sample_size_runs_from_one_to_all():
    """Equal values leave all M samples effective, one dominant value a single one."""
    schedule = sdac.NoiseSchedule(20, 0.8, dtype=torch.float64)
    obs, a_t, t = torch.zeros(3, 1, dtype=torch.float64), randn(3, 2), torch.tensor([[2], [7], [15]])
    equal = lambda obs, a: torch.full((2, *a.shape[:2]), 7.0, dtype=torch.float64)  # noqa: E731
    dominant = lambda obs, a: equal(obs, a) + 1000 * F.one_hot(torch.tensor(5), a.shape[1])  # noqa: E731
    for critics, expected in [(equal, 32.0), (dominant, 1.0)]:
        uniform = torch.rand(3, 32, 2, generator=seeded(), dtype=torch.float64)
        _, ess = sdac.rsm_target(critics, schedule, obs, a_t, t, 1.0, uniform, "truncate")
        assert ess.tolist() == pytest.approx([expected] * 3, rel=1e-12)


def test_rsm_loss_has_the_gradient_of_the_loss_with_all_samples():
    """d/dθ of ‖ε_θ - Σwε‖² is that of Σ_i w_i ‖ε_θ - ε_i‖², with the denoiser evaluated for each i."""
    net, obs, a_t, eps = double(sdac.Denoiser, 3, 2, hidden_dim=8), randn(4, 3), randn(4, 2, seed=1), randn(4, 5, 2)
    t, weights = torch.tensor([[0], [2], [7], [19]]), randn(4, 5, seed=2).softmax(1)
    target = (weights[..., None] * eps).sum(1)
    gradients = torch.autograd.grad(sdac.rsm_loss(net, obs, a_t, t, target), list(net.parameters()))
    loss = 0
    for b in range(4):
        for i in range(5):
            loss = loss + weights[b, i] * (denoise(net, obs[b], a_t[b], t[b]) - eps[b, i]).square().sum() / 4
    expected = torch.autograd.grad(loss, list(net.parameters()))
    for (name, _), gradient, brute_force in zip(net.named_parameters(), gradients, expected, strict=True):
        assert brute_force.abs().max() > 1e-5, name
        # 1e-5: the script computes the embedding's angles in float32
        torch.testing.assert_close(gradient, brute_force, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_mirror_descent_weights():
    """exp of the standardised value, cut at ±3, over α, one value at a time."""
    values, mean, std, alpha = [-40.0, -5.0, 0.5, 1.0, 4.0, 60.0], 1.5, 2.0, 0.8
    weights = sdac.mirror_descent_weights(torch.tensor(values), torch.tensor(mean), torch.tensor(std), alpha)
    for value, weight in zip(values, weights.tolist(), strict=True):
        standardised = (value - mean) / std
        standardised = -3 if standardised < -3 else 3 if standardised > 3 else standardised
        assert weight == pytest.approx(math.e ** (standardised / alpha), rel=1e-5)


# ---- The agent ----


def make_agent(**kwargs):
    torch.manual_seed(3)
    args = sdac.Args(compile=False, bfloat16=False, num_particles=2, denoising_steps=3, num_reverse_samples=4, **kwargs)
    agent = sdac.Agent(args, 3, 2, CPU)
    for parameter in [*agent.target_critics.parameters(), *agent.ema_policy.parameters()]:
        parameter.data += 0.02 * torch.randn(
            parameter.shape, generator=seeded(parameter.numel())
        )  # not the online nets
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


def fixed_actions(*args):
    """Stands in for sample_actions: actions that depend on the observations only."""
    return (2 * args[3][:, :2]).sin()


def test_act_uses_the_averaged_policy_and_explores_on_request(monkeypatch):
    """The environment sees the averaged policy ranked by the online critics, with noise 0.1 α only if asked."""
    agent, obs, generator = make_agent(), randn(5, 3, dtype=torch.float32), seeded()
    calls = spy(monkeypatch, "sample_actions")
    quiet, noisy = agent.act(obs, generator, explore=False), agent.act(obs, generator, explore=True)
    for (args, actions), returned, std in zip(calls, [quiet, noisy], [None, 0.5], strict=True):
        assert args[0] is agent.ema_policy and args[1] is agent.critics and args[2] is agent.schedule
        assert args[3] is obs and args[4] == 2 and args[5] is generator and returned is actions
        assert args[6] is std if std is None else args[6].item() == pytest.approx(std)


def test_critics_regress_on_the_bellman_target(monkeypatch):
    """Both critics get the gradient of the squared error to reward_scale·r + γ(1-end)·min_j Q̄_j(s', a')."""
    agent, batch, calls = make_agent(gamma=0.9), make_batch(), spy(monkeypatch, "sample_actions", fixed_actions)
    before, (obs, actions, rewards, next_obs, ends) = copy.deepcopy(agent), batch
    metrics = agent.update(batch, seeded())
    (policy, critics, _, states, *_, std, _), next_actions = calls[0]
    assert policy is agent.policy and critics is agent.critics and torch.equal(states, next_obs)
    assert std.item() == pytest.approx(0.5)
    losses = [0, 0]
    for i in range(6):
        y = 0.2 * rewards[i].item()
        if ends[i] == 0:
            y += 0.9 * min_q(before.target_critics, next_obs[i], next_actions[i])
        for j in range(2):
            losses[j] = losses[j] + (q_value(before.critics, j, obs[i], actions[i]) - y) ** 2 / 6
    assert metrics["qf1_loss"].item() == pytest.approx(losses[0].item(), rel=1e-5)
    assert metrics["qf2_loss"].item() == pytest.approx(losses[1].item(), rel=1e-5)
    gradients = torch.autograd.grad(losses[0] + losses[1], list(before.critics.parameters()))
    for old, new, gradient in zip(before.critics.parameters(), agent.critics.parameters(), gradients, strict=True):
        torch.testing.assert_close(new.grad, gradient, rtol=1e-4, atol=1e-6)
        large = gradient.abs() > 1e-4  # there Adam's first step is lr · sign(gradient); 1e-7: rounding of the weights
        assert large.any()
        torch.testing.assert_close((new - old)[large], -3e-4 * gradient.sign()[large], rtol=1e-3, atol=1e-7)


def test_policy_regresses_on_the_rsm_target(monkeypatch):
    """At noised actions of the current policy in the batch's states, with the updated critics and λ = α/5."""
    agent, batch = make_agent(policy_frequency=1, reverse_proposal="clip"), make_batch()
    agent.log_alpha.data.fill_(math.log(2.0))
    spy(monkeypatch, "sample_actions", fixed_actions)
    calls, before = spy(monkeypatch, "rsm_target"), copy.deepcopy(agent)
    metrics = agent.update(batch, seeded(5))
    (critics, schedule, obs, a_t, t, temperature, uniform, proposal), (target, ess) = calls[0]
    steps = chain(3, 0.8)
    assert critics is agent.critics and schedule is agent.schedule and torch.equal(obs, batch[0])
    assert temperature.item() == pytest.approx(0.4) and proposal == "clip"
    generator = seeded(5)  # the stand-in for sample_actions draws nothing
    assert torch.equal(t, torch.randint(3, (6, 1), generator=generator))
    eps, loss = torch.randn(6, 2, generator=generator), 0
    assert torch.equal(uniform, torch.rand(6, 4, 2, generator=generator))
    for b in range(6):
        _, _, _, signal, variance = steps[int(t[b])]
        torch.testing.assert_close(a_t[b], signal * (2 * obs[b, :2]).sin() + math.sqrt(variance) * eps[b])
        loss = loss + (denoise(before.policy, obs[b], a_t[b], t[b]) - target[b]).square().sum() / 6
    assert metrics["rsm_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["effective_sample_size"].item() == pytest.approx(statistics.fmean(ess.tolist()), rel=1e-6)
    gradients = torch.autograd.grad(loss, list(before.policy.parameters()))
    for parameter, gradient in zip(agent.policy.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_anchor_next_is_the_pair_of_the_critics_target(monkeypatch):
    """The loss looks at (s', a') with the very a' of the Bellman target, and nothing else is sampled."""
    agent, batch = make_agent(policy_frequency=1, anchor="next"), make_batch()
    sampled, calls = spy(monkeypatch, "sample_actions", fixed_actions), spy(monkeypatch, "rsm_target")
    agent.update(batch, seeded(5))
    ((_, next_actions),), ((_, _, obs, a_t, t, *_), _) = sampled, calls[0]
    assert torch.equal(obs, batch[3])
    generator = seeded(5)  # the stand-in for sample_actions draws nothing
    assert torch.equal(t, torch.randint(3, (6, 1), generator=generator))
    eps = torch.randn(6, 2, generator=generator)
    for b in range(6):
        _, _, _, signal, variance = chain(3, 0.8)[int(t[b])]
        torch.testing.assert_close(a_t[b], signal * next_actions[b] + math.sqrt(variance) * eps[b])


def test_mirror_descent_update(monkeypatch):
    """Running mean and deviation of min_j Q_j(s', a') move by 0.001; a' is denoised at s' with the weights of its Q."""
    agent, batch = make_agent(policy_frequency=1, weighting="mirror-descent"), make_batch()
    spy(monkeypatch, "sample_actions", fixed_actions)
    calls, next_obs, next_actions = spy(monkeypatch, "rsm_loss"), batch[3], fixed_actions(None, None, None, batch[3])
    agent.q_mean.fill_(0.3), agent.q_std.fill_(0.05)
    agent.update(batch, seeded(5))
    values = [min_q(agent.critics, next_obs[i], next_actions[i]) for i in range(6)]
    mean = 0.3 + 0.001 * (statistics.fmean(values) - 0.3)
    std = 0.05 + 0.001 * (statistics.stdev(values) - 0.05)
    assert agent.q_mean.item() == pytest.approx(mean, abs=1e-7) and mean != pytest.approx(0.3, abs=1e-5)
    assert agent.q_std.item() == pytest.approx(std, abs=1e-8) and std != pytest.approx(0.05, abs=1e-6)
    ((policy, obs, a_t, t, target, weights), _), generator = calls[0], seeded(5)
    assert policy is agent.policy and torch.equal(obs, next_obs)
    assert torch.equal(t, torch.randint(3, (6, 1), generator=generator))
    eps = torch.randn(6, 2, generator=generator)
    torch.testing.assert_close(target, eps)
    for b in range(6):
        _, _, _, signal, variance = chain(3, 0.8)[int(t[b])]
        torch.testing.assert_close(a_t[b], signal * next_actions[b] + math.sqrt(variance) * eps[b])
        expected = math.exp(min(max((values[b] - mean) / std, -3), 3) / 5)
        assert weights[b].item() == pytest.approx(expected, rel=1e-4)


def test_rsm_loss_weights_each_transition():
    """The mirror-descent loss is the mean over the batch of weight times squared error, by a loop."""
    net, obs, a_t, eps = (
        double(sdac.Denoiser, 3, 2, hidden_dim=8),
        randn(4, 3),
        randn(4, 2, seed=1),
        randn(4, 2, seed=2),
    )
    t, weights = torch.tensor([[0], [2], [7], [19]]), torch.tensor([0.1, 3.0, 0.5, 1.0], dtype=torch.float64)
    errors = [weights[b] * (denoise(net, obs[b], a_t[b], t[b]) - eps[b]).square().sum() for b in range(4)]
    assert sdac.rsm_loss(net, obs, a_t, t, eps, weights).item() == pytest.approx(sum(errors).item() / 4, rel=1e-5)


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
        assert agent.policy_schedule.last_epoch == update // 3
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
    stds = [agent.exploration_std().item()]
    for _ in range(776):  # of a default run: (1,000,000 - 30,000) steps / 5 environments / 250
        metrics = agent.update(batch, None)
        assert metrics["exploration_std"].item() == stds[-1]
        stds.append(agent.exploration_std().item())
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


def test_policy_learning_rate_is_held_and_then_falls_to_a_tenth():
    """Factor 1 for 25k policy updates, 0.55 at 50k, 0.1 from 75k on; the policy's optimiser follows it."""
    agent, points = make_agent(), {0: 1, 12_345: 1, 25_000: 1, 30_000: 0.91, 50_000: 0.55, 75_000: 0.1, 76_000: 0.1}
    agent.policy_optimizer.step()  # without gradients it does nothing but keep PyTorch from warning
    for n in range(76_001):
        if n in points:
            assert sdac.policy_lr_factor(n) == pytest.approx(points[n])
            assert agent.policy_optimizer.param_groups[0]["lr"] == pytest.approx(3e-4 * points[n])
        agent.policy_schedule.step()
    assert agent.q_optimizer.param_groups[0]["lr"] == 3e-4


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


def test_replay_buffer_refuses_what_memory_cannot_hold(monkeypatch, capsys):
    """One byte too few ends the program with status 2 and the sizes in gigabytes, before any allocation."""
    size = 1_000_000
    needed = 4 * size * (3 + 2 + 1 + 3 + 1)  # bytes of float32: s, a, r, s', end
    monkeypatch.setattr(sdac, "free_memory", lambda device: needed)
    assert sdac.ReplayBuffer(size, 3, 2, CPU).rows.nbytes == needed
    monkeypatch.setattr(sdac, "free_memory", lambda device: needed - 1)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: pytest.fail("memory was allocated"))
    with pytest.raises(SystemExit) as stop:
        sdac.ReplayBuffer(size, 3, 2, CPU)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("0.0 GB") == 2 and "--buffer-size 1000000" in message
    monkeypatch.undo()
    with pytest.raises(SystemExit) as stop:  # 40 PB, against the machine's own memory
        sdac.ReplayBuffer(10**15, 3, 2, CPU)
    assert stop.value.code == 2 and "40000000.0 GB" in capsys.readouterr().err
