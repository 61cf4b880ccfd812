"""The mathematics of sac_continuous_action.py against closed forms, quadrature and plain loops."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from test_sdac_math import first_adam_step, mlp
from torch.distributions import Normal

import sac_continuous_action as sac


@pytest.fixture
def float64():
    """The script computes in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ---- The squashed Gaussian
def sample(mean, std, n):
    """n actions and log-densities of a policy with this mean and deviation in every state."""
    mean, log_std = torch.tensor(mean).expand(n, -1), torch.tensor(std).log().expand(n, -1)
    torch.manual_seed(0)
    return sac.sample_actions(lambda obs: (mean, log_std), None)


@pytest.mark.parametrize(("mean", "std"), [(0.8, 0.5), (-1.5, 1.0), (0.3, 2.0)])
def test_density_integrates_to_the_distribution_function(float64, mean, std):
    """The integral of exp(log π) up to an action is the share of samples below it; in all, 1."""
    n = 400_000
    actions, log_prob = sample([mean], [std], n)
    actions, order = actions[:, 0].sort()
    cdf = torch.cumulative_trapezoid(log_prob[order].exp(), actions)
    share = torch.arange(1, n) / n
    # Kolmogorov and Smirnov: below 2/√n with probability 0.9993
    assert (cdf - share).abs().max() < 2 / math.sqrt(n) + 1e-3
    assert abs(cdf[-1] - 1) < 2e-3


def test_density_of_several_dimensions_is_the_change_of_variables(float64):
    """The Gaussian's density at atanh(a), times a derivative of atanh by finite differences."""
    mean, std = [0.2, -0.7, 0.0], [0.5, 0.3, 0.9]
    actions, log_prob = sample(mean, std, 1000)
    h = 1e-6 * (1 - actions.abs())
    slope = ((actions + h).atanh() - (actions - h).atanh()) / (2 * h)
    normal = Normal(torch.tensor(mean), torch.tensor(std))
    expected = (normal.log_prob(actions.atanh()) + slope.log()).sum(1)
    torch.testing.assert_close(log_prob, expected, rtol=1e-6, atol=1e-6)


def test_entropy_is_that_of_quadrature(float64):
    """-E[log π] by samples, and -∫ p log p da on a grid."""
    u, (mean, std) = torch.linspace(-12, 12, 200_001), (0.5, 0.8)
    a, p = u.tanh(), Normal(mean, std).log_prob(u).exp() * u.cosh() ** 2
    inside = a.abs() < 1
    entropy = torch.trapezoid(-(p * p.log())[inside], a[inside])
    n = 400_000
    _, log_prob = sample([mean], [std], n)
    assert abs(-log_prob.mean() - entropy) < 4 * log_prob.std() / math.sqrt(n) + 1e-4


@pytest.mark.parametrize("mean", [-30.0, 30.0])
def test_saturated_actions_have_a_finite_density(mean):
    """Far out, log(1 - tanh² u) is 2 log 2 - 2|u|, where 1 - tanh² u itself is 0 in float32."""
    actions, log_prob = sample([mean], [1.0], 100)
    torch.manual_seed(0)
    eps = torch.randn(100, 1)[:, 0].double()
    expected = Normal(0, 1).log_prob(eps) - 2 * math.log(2) + 2 * (mean + eps).abs()
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-5, atol=1e-4)
    assert actions.abs().max() <= 1


# ---- An update
def q_values(critics, s, a):
    return mlp(critics.q1, s, a)[0], mlp(critics.q2, s, a)[0]


def draw(actor, states):
    """For each state an action and its log-density, with log_std between -5 and 2."""
    eps, pairs = torch.randn(len(states), 2), []
    for s, e in zip(states, eps, strict=True):
        mean, x = mlp(actor, s).split(2)
        log_std = -5 + 7 * torch.sigmoid(2 * x)
        a = torch.tanh(mean + log_std.exp() * e)
        density = Normal(mean, log_std.exp()).log_prob(mean + log_std.exp() * e)
        pairs.append((a, (density - (1 - a**2).log()).sum()))
    return pairs


def make_agent_and_batch(**choices):
    """An agent with target critics that are not its critics, and eight transitions."""
    torch.manual_seed(0)
    agent = sac.Agent(sac.Args(**choices), 3, 2)
    for parameter in agent.target_critics.parameters():
        parameter.data *= 1.3
    obs, next_obs, actions = torch.randn(8, 3), torch.randn(8, 3), 2 * torch.rand(8, 2) - 1
    terminations = torch.tensor([0.0, 1, 0, 1, 0, 0, 1, 0])
    return agent, (obs, actions, 3 * torch.randn(8), next_obs, terminations)


def test_one_update_is_its_recomputation_by_loops(float64):
    """Soft Bellman target, policy, α, averages and learning rates, at progress 0.4."""
    agent, batch = make_agent_and_batch(policy_lr=2e-3, q_lr=5e-3, tau=0.1, gamma=0.9)
    agent.log_alpha.data.fill_(math.log(0.3))
    nets = SimpleNamespace(**{name: copy.deepcopy(net) for name, net in agent.named_children()})

    torch.manual_seed(5)
    q_loss, values, smaller = 0, [], set()
    transitions = zip(*batch, draw(nets.policy, batch[3]), strict=True)
    for s, a, reward, next_s, terminated, (next_a, log_prob) in transitions:
        y = 0.2 * reward
        if not terminated:
            q_1, q_2 = q_values(nets.target_critics, next_s, next_a)
            smaller.add((q_1 < q_2).item())
            y = y + 0.9 * (min(q_1, q_2) - 0.3 * log_prob).detach()
        for q in q_values(nets.critics, s, a):
            values.append(q.item())
            q_loss = q_loss + (q - y) ** 2 / 8
    assert len(smaller) == 2  # Neither network is always the smaller.
    first_adam_step(nets.critics, q_loss, 0.6 * 5e-3)

    pairs = draw(nets.policy, batch[0])
    entropy = -sum(log_prob for _, log_prob in pairs) / 8
    soft_values = [
        min(q_values(nets.critics, s, a)) - 0.3 * log_prob
        for s, (a, log_prob) in zip(batch[0], pairs, strict=True)
    ]
    policy_loss = -sum(soft_values) / 8
    first_adam_step(nets.policy, policy_loss, 0.6 * 2e-3)
    for old, new in zip(nets.target_critics.parameters(), nets.critics.parameters(), strict=True):
        old.data = 0.1 * new.data + 0.9 * old.data

    torch.manual_seed(5)
    agent.update(batch, 0.4)
    expected = {"q_values": sum(values) / 16, "q_loss": q_loss.item(), "alpha": 0.3}
    expected |= {"policy_loss": policy_loss.item(), "entropy": entropy.item()}
    assert {k: v.item() for k, v in agent.metrics.items()} == pytest.approx(expected, rel=1e-9)
    gradient = 0.3 * (entropy.item() + 2)
    assert agent.log_alpha.grad.item() == pytest.approx(gradient, rel=1e-9)
    for name, network in agent.named_children():
        pairs = zip(network.parameters(), getattr(nets, name).parameters(), strict=True)
        for found, reference in pairs:
            torch.testing.assert_close(found, reference, rtol=0, atol=1e-9)
            torch.testing.assert_close(found.grad, reference.grad, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(("alpha", "q_scale"), [(0.01, 100), (1.0, 0)])
def test_the_policy_ascends_the_soft_value(alpha, q_scale):
    """With critics and α held, it comes to the best of many random actions if α is small, and to
    the entropy of uniform actions, 2 log 2, if Q is flat."""
    agent, batch = make_agent_and_batch(q_lr=1e-12, policy_lr=3e-3)
    agent.log_alpha.data.fill_(math.log(alpha))
    for critic in (agent.critics.q1, agent.critics.q2):
        critic.output_layer.weight.data *= q_scale
    for _ in range(100):
        agent.update(batch, 0)
    if q_scale == 0:
        assert abs(agent.metrics["entropy"] - 2 * math.log(2)) < 0.3
    else:
        tried = agent.critics.minimum(batch[0], 2 * torch.rand(8, 1000, 2) - 1)
        actions = agent.act(batch[0], explore=False)
        reached = agent.critics.minimum(batch[0], actions[:, None])[:, 0]
        assert (reached > tried.quantile(0.95, dim=1)).all()


@pytest.mark.parametrize(("bias", "direction"), [(-1.0, 1), (0.458, -1)])
def test_alpha_rises_while_the_entropy_is_below_its_target_and_falls_above(bias, direction):
    """The target is -d = -2; the first step of Adam is the learning rate, uphill or downhill."""
    agent, batch = make_agent_and_batch(policy_lr=1e-12, q_lr=3e-4)
    agent.policy.output_layer.weight.data.zero_()
    agent.policy.output_layer.bias.data = torch.tensor([0.0, 0, bias, bias])
    agent.update(batch, 0)
    assert (agent.metrics["entropy"] < -2) == (direction > 0)
    assert agent.log_alpha.item() == pytest.approx(direction * 3e-4, rel=1e-3)


def test_actions_are_samples_and_without_exploration_the_tanh_of_the_mean():
    agent, (obs, *_) = make_agent_and_batch()
    expected = torch.stack([mlp(agent.policy, s)[:2].tanh() for s in obs])
    torch.testing.assert_close(agent.act(obs, explore=False), expected)
    torch.manual_seed(1)
    expected = torch.stack([a for a, _ in draw(agent.policy, obs)])
    torch.manual_seed(1)
    torch.testing.assert_close(agent.act(obs), expected)


def test_target_critics_start_as_copies():
    agent = sac.Agent(sac.Args(), 3, 2)
    for pair in zip(agent.target_critics.parameters(), agent.critics.parameters(), strict=True):
        assert torch.equal(*pair) and pair[0].data_ptr() != pair[1].data_ptr()


def test_learning_rates_fall_linearly_to_0_and_that_of_alpha_stays():
    agent, batch = make_agent_and_batch(policy_lr=2e-3, q_lr=5e-3)
    for progress in (0, 0.25, 0.9, 1):
        agent.update(batch, progress)
        found = [optimizer.param_groups[0]["lr"].item() for optimizer in agent.optimizers]
        expected = [2e-3 * (1 - progress), 5e-3 * (1 - progress), 5e-3]
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-12)
