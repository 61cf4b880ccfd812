"""SAC: the squashed Gaussian's density, the soft Bellman target and the temperature."""

import math

import pytest
import torch

import sac_continuous_action as sac


def squashed_gaussian(mean, log_std, n, seed=0):
    """n samples and log-densities of sample_actions for a policy with this mean and log std in every state."""
    mean, log_std = (torch.tensor(x, dtype=torch.float64).expand(n, -1) for x in (mean, log_std))
    return sac.sample_actions(lambda obs: (mean, log_std), None, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.8, 0.5), (-1.5, 1.0), (0.3, 2.0)])
def test_density_integrates_over_the_box(mean, std):
    """exp(log π), integrated over sorted samples with the trapezoid rule, is the distribution function of a."""
    actions, log_prob = squashed_gaussian([mean], [math.log(std)], 400_000)
    actions, order = actions[:, 0].sort()
    cdf = torch.cumulative_trapezoid(log_prob[order].exp(), actions)
    empirical = torch.arange(1, len(actions)) / len(actions)
    # Kolmogorov-Smirnov: sup |F_n - F| < 2/√n with probability 0.9993
    assert (cdf - empirical).abs().max() < 2 / math.sqrt(len(actions)) + 1e-3
    assert abs(cdf[-1] - 1) < 2e-3


def test_density_of_several_dimensions_is_the_change_of_variables():
    """log π against the density of atanh(a) under the Gaussian and a Jacobian by finite differences."""
    mean, std = torch.tensor([0.2, -0.7, 0.0], dtype=torch.float64), torch.tensor([0.5, 0.3, 0.9], dtype=torch.float64)
    actions, log_prob = squashed_gaussian(mean.tolist(), std.log().tolist(), 1000)
    h = 1e-6 * (1 - actions.abs())
    slope = (torch.atanh(actions + h) - torch.atanh(actions - h)) / (2 * h)  # du/da
    density = torch.exp(-(((torch.atanh(actions) - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi)) * slope
    torch.testing.assert_close(log_prob, density.prod(1).log(), rtol=1e-6, atol=1e-6)


def test_entropy_is_that_of_quadrature():
    """-E[log π] by Monte Carlo against -∫ p log p da on a grid of the open interval."""
    u = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    mean, std = 0.5, 0.8
    normal = torch.exp(-(((u - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))
    a, p = u.tanh(), normal * u.cosh() ** 2
    inside = a.abs() < 1
    entropy = torch.trapezoid(-(p * p.log())[inside], a[inside])
    _, log_prob = squashed_gaussian([mean], [math.log(std)], 400_000)
    assert abs(-log_prob.mean() - entropy) < 4 * log_prob.std() / math.sqrt(len(log_prob)) + 1e-4


@pytest.mark.parametrize("mean", [-30.0, 30.0])
def test_saturated_actions_have_finite_density(mean):
    """Far out, log(1 - tanh² u) is 2 log 2 - 2|u|, where 1 - tanh² u itself is 0 in float32."""
    n = 100
    eps = torch.randn(n, 1, generator=torch.Generator().manual_seed(3))
    policy = lambda obs: (torch.full((n, 1), mean), torch.zeros(n, 1))  # noqa: E731
    actions, log_prob = sac.sample_actions(policy, None, torch.Generator().manual_seed(3))
    u = (mean + eps[:, 0]).double()
    expected = -(eps[:, 0].double() ** 2) / 2 - 0.5 * math.log(2 * math.pi) - 2 * math.log(2) + 2 * u.abs()
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-5, atol=1e-4)
    assert actions.abs().max() <= 1


def make_agent_and_batch(**settings):
    torch.manual_seed(0)
    agent = sac.Agent(sac.Args(compile=False, **settings), 3, 2, torch.device("cpu"))
    g = torch.Generator().manual_seed(1)
    obs, next_obs = torch.randn(8, 3, generator=g), torch.randn(8, 3, generator=g)
    actions, rewards = torch.rand(8, 2, generator=g) * 2 - 1, torch.randn(8, generator=g)
    return agent, (obs, actions, rewards, next_obs, torch.tensor([0.0, 1, 0, 1, 0, 0, 1, 0]))


def test_critic_loss_is_the_soft_bellman_error():
    """The first update's losses equal a loop over transitions with both critics evaluated one by one."""
    agent, (obs, actions, rewards, next_obs, terminations) = make_agent_and_batch(reward_scale=0.5, gamma=0.9)
    with torch.no_grad():
        agent.log_alpha.fill_(math.log(0.3))
        for parameter in agent.target_critics.parameters():
            parameter.mul_(1.5)  # tell the target critics from the online ones
        next_actions, log_prob = sac.sample_actions(agent.policy, next_obs, torch.Generator().manual_seed(2))
        expected = torch.zeros(2)
        for i in range(8):
            q_next = agent.target_critics(next_obs[i : i + 1], next_actions[i][None, None]).flatten()
            target = 0.5 * rewards[i]
            if terminations[i] == 0:
                target += 0.9 * (min(q_next[0], q_next[1]) - 0.3 * log_prob[i])
            expected += (agent.critics(obs[i : i + 1], actions[i][None, None]).flatten() - target) ** 2 / 8
    metrics = agent.update((obs, actions, rewards, next_obs, terminations), torch.Generator().manual_seed(2))
    torch.testing.assert_close(torch.stack([metrics["qf1_loss"], metrics["qf2_loss"]]), expected)


@pytest.mark.parametrize("q_scale, alpha", [(100.0, 0.01), (0.0, 1.0)])
def test_policy_ascends_the_soft_value(q_scale, alpha):
    """Policy updates at fixed critics reach the best min_j Q_j of many random actions if α is small, and the uniform
    distribution's entropy, 2 log 2, if Q is flat."""
    agent, batch = make_agent_and_batch(q_lr=1e-12, alpha_lr=1e-12, policy_lr=3e-3)
    obs, g = batch[0], torch.Generator().manual_seed(4)
    with torch.no_grad():
        agent.log_alpha.fill_(math.log(alpha))
        agent.critics.weights[-1].mul_(q_scale)
    for _ in range(300):
        metrics = agent.update(batch, g)
    with torch.no_grad():
        tried = agent.critics(obs, torch.rand(8, 5000, 2, generator=g) * 2 - 1).amin(0)[..., 0]
        reached = agent.critics(obs, agent.policy(obs)[0].tanh()[:, None]).amin(0)[:, 0, 0]
    if q_scale:
        assert (reached > tried.quantile(0.95, dim=1)).all()
    else:
        assert abs(metrics["entropy"] - 2 * math.log(2)) < 0.3


@pytest.mark.parametrize("bias, direction", [(-1.0, 1), (0.458, -1)])
def test_temperature_moves_the_entropy_to_its_target(bias, direction):
    """α rises while the policy's entropy is below -d and falls while it is above."""
    agent, batch = make_agent_and_batch(policy_lr=1e-12)
    with torch.no_grad():  # standard deviation about e^-4, and about 1
        agent.policy.layers[-1].weight.zero_()
        agent.policy.layers[-1].bias.copy_(torch.tensor([0.0, 0, bias, bias]))
    metrics = agent.update(batch, torch.Generator().manual_seed(5))
    assert (metrics["entropy"] < -2) == (direction > 0)
    # Adam's first step is the learning rate in the direction of the gradient
    torch.testing.assert_close(agent.log_alpha.item(), direction * 3e-4, rtol=1e-3, atol=0)


def test_target_critics_follow_by_tau():
    """They start as the critics; after one update each parameter is τ of the new critic's and 1-τ of its old value."""
    agent, batch = make_agent_and_batch(tau=0.25)
    old = [p.clone() for p in agent.critics.parameters()]
    agent.update(batch, torch.Generator().manual_seed(6))
    for before, after, online in zip(old, agent.target_critics.parameters(), agent.critics.parameters(), strict=True):
        assert not torch.equal(before, online)
        torch.testing.assert_close(after.double(), 0.25 * online.double() + 0.75 * before.double())
