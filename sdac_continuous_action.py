"""Soft Diffusion Actor-Critic (SDAC) in one file: reinforcement learning with a diffusion policy.

The goal is the policy π(a|s) ∝ exp(Q(s, a) / λ). Let a_t be an action of π mixed with noise ε. If
a network predicts E[ε | a_t, s], the mean noise in a_t, it can turn pure noise into samples of π in
T steps: a diffusion model. But there are no samples of π to train it with. So reweighted score
matching (RSM) takes any a_t, guesses the action behind it M times, and averages the noises that the
guesses imply, with weights ∝ exp(Q / λ). No gradient passes through the T steps.

    python sdac_continuous_action.py --env-id Humanoid-v4
    python sdac_continuous_action.py --evaluate runs/<run> --capture-video
    python sdac_continuous_action.py --resume runs/<run>

Paper: Ma et al., "Efficient Online Reinforcement Learning for Diffusion Policy", arXiv 2502.00361.
Notation: s is an observation, a_0 an action in [-1, 1]^d, ε standard normal noise, and
a_t = √ᾱ_t a_0 + √(1-ᾱ_t) ε a noised action. t = 0..T-1 is the noise level (diffusion time). Even
level 0 has a little noise: a_0 is always the clean action. Q̄ is a target critic. A batch has B
states. Particles are actions that the policy proposes, K per state; reverse samples are the guesses
â of a_0, M per state. Noise levels, reverse samples, λ and learning rates differ from the authors'
code, as the README explains. --published comes close to theirs.
"""

import copy
import math
import re
import signal
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

PUBLISHED = {  # Defaults with --published.
    "denoising_steps": 20,
    "num_particles": 32,
    "num_reverse_samples": 64,
    "policy_lr": 3e-4,
    "q_lr": 3e-4,
    "tau": 0.005,
    "exploration_decay": 27_500,
    "learning_starts": 30_000,
}


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # in the run folder's name
    seed: int = 1  # of all random numbers
    cuda: bool = True  # use a GPU if there is one
    compile: bool = True  # torch.compile the networks; CPU only
    track: bool = False  # log to Weights & Biases, too
    capture_video: bool = False  # film evaluations, into the run folder
    evaluate: str | None = None  # run folder to evaluate
    resume: str | None = None  # run folder to continue

    env_id: str = "HalfCheetah-v4"  # Gymnasium task
    total_timesteps: int = 1_000_000  # steps, summed over the environments
    num_envs: int = 5  # stepped together; one update per joint step
    buffer_size: int = 1_000_000  # transitions kept
    learning_starts: int = 10_000  # random steps before updates
    eval_frequency: int = 20_000  # steps between evaluations
    eval_episodes: int = 10

    gamma: float = 0.99  # discount factor
    tau: float = 0.01  # rate of the moving averages of networks, per policy update
    batch_size: int = 256  # transitions
    policy_lr: float = 1e-3  # learning rate at the start
    q_lr: float = 1e-3  # the same for the critics
    policy_frequency: int = 2  # critic updates per update of policy and averages
    reward_scale: float = 0.2  # factor of rewards
    exploration_start: float = 0.5  # standard deviation of the noise on actions in [-1, 1]
    exploration_end: float = 0.1  # what it falls to, exponentially
    exploration_decay: float = 5_000  # time constant of the fall, in updates

    published: bool = False  # closer to the authors' code; other defaults (PUBLISHED), too
    mirror_descent: bool = False  # the paper's other method, DPMD: pi_old exp(Q/lambda)
    denoising_steps: int = 6  # noise levels (T)
    num_particles: int = 4  # proposed actions per state (K); the one with the largest Q is taken
    num_eval_particles: int = 32  # the same in evaluations, which do not explore
    num_reverse_samples: int = 16  # guesses of the action behind a noised action (M)
    temperature: float = 0.01  # lambda / std of Q; unused by published and mirror_descent

    def check(self):
        limits = {"seed": (0, 2**31), "gamma": (0, 1), "tau": (0, 1), "denoising_steps": (2, 1000)}
        limits["total_timesteps"] = (self.learning_starts + 1, 10**12)
        for name, value in vars(self).items():
            low, high = limits.get(name, (1, 10**12) if type(value) is int else (1e-9, 1e9))
            if type(value) in (int, float) and not low <= value <= high:
                flag = "--" + name.replace("_", "-")
                raise SystemExit(f"{flag} is {value}; it must be from {low} to {high}")


# ---- Networks
def mish(x):
    """x·tanh(softplus(x)), written with a single exponential for the compiler."""
    if not torch.compiler.is_compiling():
        return F.mish(x)
    w = x.clamp(max=20).exp()
    n = w * (w + 2)
    return x * n / (n + 2)


class MLP(nn.Module):
    """f(context, action) for one context per state and N actions in it."""

    def __init__(self, context_dim, action_dim, output_dim):
        super().__init__()
        self.dims = [context_dim, action_dim]
        self.input_layer = nn.Linear(context_dim + action_dim, 256)
        self.hidden_layers = nn.ModuleList([nn.Linear(256, 256), nn.Linear(256, 256)])
        self.output_layer = nn.Linear(256, output_dim)

    def forward(self, context, actions):
        """context (B, c), actions (B, N, d) -> (B, N, output_dim)"""
        # The first layer is split, to multiply each context once and not N times.
        context_weight, action_weight = self.input_layer.weight.split(self.dims, dim=1)
        context = F.linear(context, context_weight, self.input_layer.bias)
        h = mish(context[:, None] + F.linear(actions, action_weight))
        for layer in self.hidden_layers:
            h = mish(layer(h))
        return self.output_layer(h)


class Denoiser(nn.Module):
    """ε_θ(s, a_t, t), the prediction of the noise in a_t."""

    def __init__(self, obs_dim, action_dim):
        super().__init__()
        self.frequencies = 10_000 ** (-torch.arange(8) / 8)
        self.time_mlp = nn.Sequential(nn.Linear(16, 32), nn.Mish(), nn.Linear(32, 16))
        self.mlp = MLP(obs_dim + 16, action_dim, action_dim)

    def forward(self, obs, a_t, t):
        """obs (B, obs_dim), a_t (B, N, d), t () or (B,) -> (B, N, d)"""
        angles = t[..., None] * self.frequencies
        embedding = torch.cat([angles.sin(), angles.cos()], dim=-1)
        time_features = self.time_mlp(embedding).expand(len(obs), 16)
        return self.mlp(torch.cat([obs, time_features], dim=1), a_t)


class Critics(nn.Module):
    """Q_1 and Q_2, whose minimum is less optimistic than either."""

    def __init__(self, obs_dim, action_dim):
        super().__init__()
        self.q1 = MLP(obs_dim, action_dim, 1)
        self.q2 = MLP(obs_dim, action_dim, 1)

    def forward(self, obs, actions):
        """obs (B, obs_dim), actions (B, N, d) -> Q_1 and Q_2 (2, B, N)"""
        return torch.stack([self.q1(obs, actions), self.q2(obs, actions)])[..., 0]

    def minimum(self, obs, actions):
        return self(obs, actions).amin(0)


# ---- Replay buffer
class ReplayBuffer:
    """The last `size` transitions, one per row: a batch is one indexing operation."""

    def __init__(self, size, obs_dim, action_dim):
        self.widths = [obs_dim, action_dim, 1, obs_dim, 1]
        self.rows = torch.empty(size, sum(self.widths))
        self.added = 0  # also the number of environment steps

    def add(self, obs, actions, rewards, next_obs, terminations):
        rows = torch.cat([obs, actions, rewards[:, None], next_obs, terminations[:, None]], dim=1)
        i = (self.added + torch.arange(len(rows))) % len(self.rows)
        self.rows[i] = rows
        self.added += len(rows)

    def sample(self, batch_size):
        """Draw what was added, uniformly with replacement."""
        i = torch.randint(min(self.added, len(self.rows)), (batch_size,))
        obs, actions, rewards, next_obs, terminations = self.rows[i].split(self.widths, dim=1)
        return obs, actions, rewards[:, 0], next_obs, terminations[:, 0]


# ---- Diffusion
class NoiseSchedule:
    """The noise levels of the diffusion (DDPM: Ho et al., 2020), as tables over t = 0..T-1."""

    def __init__(self, num_steps, published):
        if published:  # β is linear in t.
            self.initial_std = 0.5  # as in the authors' code
            beta = 0.8 * torch.linspace(1e-4, 0.999, num_steps, dtype=torch.float64)
            alpha_bar = torch.cumprod(1 - beta, dim=0)
        else:  # noise/signal, √(1-ᾱ)/√ᾱ, grows from 0.05 to 4 by a constant factor.
            self.initial_std = 1.0
            log_ratio = torch.linspace(math.log(0.05), math.log(4), num_steps, dtype=torch.float64)
            alpha_bar = 1 / (1 + log_ratio.exp().square())
        previous = F.pad(alpha_bar[:-1], (1, 0), value=1.0)  # ᾱ_{t-1}
        beta = 1 - alpha_bar / previous

        # a_t = signal[t] a_0 + noise[t] ε
        self.signal = alpha_bar.sqrt().float()
        self.noise = (1 - alpha_bar).sqrt().float()

        # p(a_{t-1} | a_t, a_0) = N(posterior_a0[t] a_0 + posterior_at[t] a_t, posterior_std[t]² I)
        self.posterior_a0 = (previous.sqrt() * beta / (1 - alpha_bar)).float()
        self.posterior_at = ((1 - beta).sqrt() * (1 - previous) / (1 - alpha_bar)).float()
        self.posterior_std = (beta * (1 - previous) / (1 - alpha_bar)).sqrt().float()


@torch.no_grad()
def sample_actions(denoiser, critics, schedule, obs, shape):
    """Denoise K particles per state, and return the one with the largest min_j Q_j, which the
    critics rate above a typical sample of π.
    obs (B, obs_dim), shape (B, K, d) -> actions (B, d) in [-1, 1]"""
    a_t = schedule.initial_std * torch.randn(shape)
    for t in reversed(range(len(schedule.signal))):
        eps = denoiser(obs, a_t, torch.full((), t))
        a_0 = ((a_t - schedule.noise[t] * eps) / schedule.signal[t]).clamp(-1, 1)
        a_t = schedule.posterior_a0[t] * a_0 + schedule.posterior_at[t] * a_t
        if t > 0:
            a_t = a_t + schedule.posterior_std[t] * torch.randn(shape)

    best = critics.minimum(obs, a_t).argmax(1)
    return a_t[torch.arange(len(obs)), best]


def sample_truncated_normal(mean, std, uniform):
    """Draw from N(mean, std²) restricted to [-1, 1]: Φ⁻¹ of a uniform number between the Φ of both
    ends, where Φ is the CDF of N(0, 1). A negative mean would put the box where Φ is near 1, and
    float32 is not precise there. So the sample is drawn for |mean|, and mirrored.
    mean (B, 1, d), std (B, 1, 1), uniform (B, M, d) -> (B, M, d)"""
    low = (-1 - mean.abs()) / std
    high = (1 - mean.abs()) / std
    phi_low, phi_high = (torch.special.erfc(-z / math.sqrt(2)) / 2 for z in (low, high))
    probability = phi_low + uniform * (phi_high - phi_low)
    tiny = torch.finfo(probability.dtype).tiny  # for boxes so far away that both Φ are 0
    z = torch.special.ndtri(probability.clamp(min=tiny)).clamp(low, high)
    sign = torch.where(mean < 0, -1.0, 1.0)
    return (mean + sign * std * z).clamp(-1, 1)


def reverse_samples(schedule, a_t, t, num_samples, published=False):
    """Draw guesses â_i of the action behind a_t from φ(a_0) ∝ p(a_t | a_0), the normal distribution
    with mean a_t/√ᾱ_t and variance (1-ᾱ_t)/ᾱ_t, truncated to the box of actions.
    a_t (B, d), t (B,) -> â (B, M, d), and the noise ε (B, M, d) that each of them implies"""
    signal, noise = schedule.signal[t, None, None], schedule.noise[t, None, None]
    a_t = a_t[:, None]
    shape = (len(a_t), num_samples, a_t.shape[-1])
    if published:  # Here ε does not belong to the clipped action, which biases the estimate.
        eps = torch.randn(shape)
        return ((a_t - noise * eps) / signal).clamp(-1, 1), eps
    a_hat = sample_truncated_normal(a_t / signal, noise / signal, torch.rand(shape))
    return a_hat, (a_t - signal * a_hat) / noise


def rsm_target(eps, q, temperature):
    """Reweighted score matching. By Bayes' rule p(a_0 | a_t, s) ∝ p(a_t | a_0) π(a_0 | s), which
    is ∝ φ(a_0) exp(Q(s, a_0)/λ). So importance sampling from φ gives E[ε | a_t, s] ≈ Σ_i w_i ε_i
    with w = softmax_i(Q(s, â_i)/λ).
    eps (B, M, d), q (B, M) -> target (B, d), effective sample size 1/Σ w_i² (B,)"""
    weights = torch.softmax(q / temperature, dim=1)
    return (weights[..., None] * eps).sum(1), 1 / weights.square().sum(1)


# ---- Agent
class CudaGraph:
    """A function of tensors of fixed shapes. On a GPU its third call records the kernels, to launch
    them at once from then on. Each call overwrites the last one's results."""

    def __init__(self, function):
        self.function = function
        self.calls = 0

    def __call__(self, *tensors):
        self.calls += 1
        if not tensors[0].is_cuda or self.calls < 3:  # Two calls to warm up
            return self.function(*tensors)
        if self.calls == 3:
            self.graph = torch.cuda.CUDAGraph()
            self.inputs = [tensor.clone() for tensor in tensors]
            with torch.cuda.graph(self.graph):
                self.outputs = self.function(*self.inputs)
        torch._foreach_copy_(self.inputs, tensors)
        self.graph.replay()
        return self.outputs


def gradient_step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def update_average(average, source, tau):
    """average ← τ source + (1-τ) average"""
    torch._foreach_lerp_(list(average.parameters()), list(source.parameters()), tau)


class Agent(nn.Module):
    """The policy, the critics, their moving averages and their optimisers."""

    def __init__(self, args, obs_dim, action_dim):
        super().__init__()
        self.args = args
        self.action_dim = action_dim
        self.updates = 0
        self.evaluations = []  # step, updates, mean and standard deviation of the return
        self.exit_status = None  # set by a signal to end the run
        self.metrics = {}

        self.policy = Denoiser(obs_dim, action_dim)
        self.critics = Critics(obs_dim, action_dim)
        self.average_policy = copy.deepcopy(self.policy)
        self.target_critics = copy.deepcopy(self.critics)
        self.register_buffer("exploration_std", torch.tensor(args.exploration_start))
        self.progress = torch.tensor(0.0)  # share of the training done; CUDA graphs read it
        self.schedule = NoiseSchedule(args.denoising_steps, args.published)

        adam = partial(torch.optim.Adam, fused=True, capturable=torch.empty(0).is_cuda)
        self.policy_optimizer = adam(self.policy.parameters(), lr=torch.tensor(args.policy_lr))
        self.q_optimizer = adam(self.critics.parameters(), lr=torch.tensor(args.q_lr))
        self.optimizers = [self.policy_optimizer, self.q_optimizer]

        self.update_critics = CudaGraph(self.update_critics)
        self.update_policy = CudaGraph(self.update_policy)

    def act(self, obs, policy=None, explore=True):
        """Return actions (B, d), the best of K each, by default from the averaged policy."""
        policy = policy or self.average_policy
        num_particles = self.args.num_particles if explore else self.args.num_eval_particles
        shape = (len(obs), num_particles, self.action_dim)
        a = sample_actions(policy, self.critics, self.schedule, obs, shape)
        if explore:
            a = (a + self.exploration_std * torch.randn(a.shape)).clamp(-1, 1)
        return a

    def update(self, batch, progress):
        """Learn from a batch of transitions. `progress` goes from 0, at the first update, to 1."""
        args = self.args
        self.updates += 1
        self.progress.fill_(progress)

        # Lower the learning rates in place: CUDA graphs read them.
        policy_factor = q_factor = 1 - progress
        if args.published:  # The policy's falls to a tenth between 26% and 77%.
            policy_factor = 1 - 0.9 * min(max((progress - 0.26) / (0.77 - 0.26), 0), 1)
            q_factor = 1
        self.policy_optimizer.param_groups[0]["lr"].fill_(args.policy_lr * policy_factor)
        self.q_optimizer.param_groups[0]["lr"].fill_(args.q_lr * q_factor)

        # Lower the exploration noise.
        decay = math.exp(-self.updates / args.exploration_decay)
        self.exploration_std.fill_(
            args.exploration_end + (args.exploration_start - args.exploration_end) * decay
        )

        metrics, next_actions = self.update_critics(*batch)
        self.metrics.update(metrics)
        if self.updates % args.policy_frequency == 0:
            _, _, _, next_obs, _ = batch
            # Any s would do. In these next states the policy has sampled actions already.
            self.metrics.update(self.update_policy(next_obs, next_actions))
            update_average(self.target_critics, self.critics, args.tau)
            update_average(self.average_policy, self.policy, args.tau)

    def update_critics(self, obs, actions, rewards, next_obs, terminations):
        """Fit Q_j to r + γ min_j Q̄_j(s', a'), or to r where s' is terminal. The exploration noise
        in a' smooths Q̄, as in TD3. Unlike in SAC there is no entropy bonus: the density of a' is
        not known."""
        args = self.args
        next_actions = self.act(next_obs, policy=self.policy)
        with torch.no_grad():
            next_q = self.target_critics.minimum(next_obs, next_actions[:, None])[:, 0]
            target_q = args.reward_scale * rewards + args.gamma * (1 - terminations) * next_q
        q = self.critics(obs, actions[:, None])[..., 0]
        loss = (q - target_q).square().mean(1).sum()
        gradient_step(self.q_optimizer, loss)
        return {"q_values": q.mean().detach(), "q_loss": loss.detach()}, next_actions

    def update_policy(self, obs, actions):
        """Mix noise into the actions, and let the policy predict the mean noise."""
        t = torch.randint(self.args.denoising_steps, (len(obs),))
        eps = torch.randn(actions.shape)
        a_t = self.schedule.signal[t, None] * actions + self.schedule.noise[t, None] * eps
        prediction = self.policy(obs, a_t[:, None], t)[:, 0]

        if self.args.mirror_descent:
            weights = self.mirror_descent_weights(obs, actions)
            loss = (weights * (prediction - eps).square().sum(1)).mean()
            metrics = {}
        else:
            # The RSM loss Σ w_i ‖ε_θ - ε_i‖² has the gradient of ‖ε_θ - Σ w_i ε_i‖², as Σ w_i = 1.
            target, metrics = self.estimate_noise(obs, actions, eps, a_t, t)
            loss = (prediction - target).square().sum(1).mean()
        gradient_step(self.policy_optimizer, loss)
        return {"policy_loss": loss.detach(), **metrics}

    @torch.no_grad()
    def estimate_noise(self, obs, actions, eps, a_t, t):
        """Estimate E[ε | a_t, s], the target (B, d) of the policy, and return metrics, too."""
        args = self.args
        m = args.num_reverse_samples
        a_hat, eps_hat = reverse_samples(self.schedule, a_t, t, m, args.published)
        if not args.published:
            # Few guesses are good. So the first becomes the policy's own action behind a_t, in the
            # second half of training, for earlier it slowed a trial. The action is not drawn from
            # φ: this bias makes the policy greedier.
            late = self.progress > 0.5
            a_hat[:, 0] = torch.where(late, actions, a_hat[:, 0])
            eps_hat[:, 0] = torch.where(late, eps, eps_hat[:, 0])
        q = self.critics.minimum(obs, a_hat)
        if args.published:
            temperature = 2 * self.exploration_std  # The authors lower it with the noise.
        else:
            # λ is small: nearly all weight is on the best guess.
            temperature = args.temperature * q.std(1, correction=0).mean().clamp(min=1e-8)
        target, sample_size = rsm_target(eps_hat, q, temperature)
        return target, {"temperature": temperature, "effective_sample_size": sample_size.mean()}

    @torch.no_grad()
    def mirror_descent_weights(self, obs, actions):
        """Weights exp(Q/λ) (B,) of mirror descent (DPMD). With them the policy learns from actions
        of π_old, here the best particle plus noise, to sample π_new ∝ π_old exp(Q/λ). Q is
        standardised, and λ = 10 exploration_std."""
        q = self.critics.minimum(obs, actions[:, None])[:, 0]
        standardised = ((q - q.mean()) / q.std(correction=0).clamp(min=1e-8)).clamp(-3, 3)
        return (standardised / (10 * self.exploration_std)).exp()


# ---- Environments
def make_env(env_id, video_folder=None):
    """A task with flat observations and actions in [-1, 1]^d, filmed if there is a folder."""
    env = gym.make(env_id, **({"render_mode": "rgb_array"} if video_folder else {}))
    if video_folder:
        env = gym.wrappers.RecordVideo(env, video_folder, episode_trigger=lambda i: i == 0)

    space = env.action_space
    if not isinstance(space, gym.spaces.Box) or space.dtype.kind != "f" or not space.is_bounded():
        raise ValueError(f"its actions are {space}, but they must be real numbers with bounds")
    centre, radius = (space.high + space.low) / 2, (space.high - space.low) / 2

    def rescale(action):
        action = centre + radius * action.reshape(space.shape)
        return np.clip(action, space.low, space.high)  # against rounding

    env = gym.wrappers.TransformAction(env, rescale, gym.spaces.Box(-1, 1, (centre.size,)))
    return gym.wrappers.FlattenObservation(env)  # a copy: some tasks reuse arrays


def make_envs(env_id, num_envs, video_folder=None):
    makers = [partial(make_env, env_id, video_folder)]
    makers += [partial(make_env, env_id)] * (num_envs - 1)
    return gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


def evaluate(agent, run_dir, step):
    """Run episodes without exploration noise, on seeds of their own."""
    args = agent.args
    seed = args.seed + 10**9
    torch.manual_seed(seed)
    video_folder = run_dir / "videos" / f"step-{step}" if args.capture_video else None
    envs = make_envs(args.env_id, args.eval_episodes, video_folder)
    act = CudaGraph(partial(agent.act, explore=False))
    obs, _ = envs.reset(seed=seed)
    returns = np.zeros(args.eval_episodes)
    running = np.ones(args.eval_episodes, dtype=bool)
    while running.any():
        if agent.exit_status:
            raise SystemExit(agent.exit_status)
        actions = act(torch.as_tensor(obs, dtype=torch.float32)).cpu().numpy()
        obs, rewards, terminations, truncations, _ = envs.step(actions)
        returns += rewards * running
        running &= ~(terminations | truncations)
    envs.close()
    tqdm.write(f"evaluation at step {step}: return {returns.mean():.1f} +/- {returns.std():.1f}")
    sys.stdout.flush()  # into a log file, too
    return returns.mean().item(), returns.std().item()


# ---- Training
def save_checkpoint(run_dir, agent, buffer):
    """Write model.pt, enough to evaluate, and checkpoint.pt, enough to resume."""
    rows = buffer.rows[: buffer.added]
    values = {**agent.metrics, **agent.state_dict(), "transitions": rows.sum()}
    for name, value in values.items():
        if not value.isfinite().all():
            raise SystemExit(f"{name} is not finite; {run_dir} keeps the last checkpoint")
    model = {"args": vars(agent.args), "agent": agent.state_dict(), "step": buffer.added}
    training = {
        "updates": agent.updates,
        "evaluations": agent.evaluations,
        "optimizers": [optimizer.state_dict()["state"] for optimizer in agent.optimizers],
        "rows": rows.to("cpu", copy=True),  # A slice would keep the empty rows.
    }
    for name, contents in (("model.pt", model), ("checkpoint.pt", {**model, **training})):
        torch.save(contents, run_dir / "unfinished.tmp")
        (run_dir / "unfinished.tmp").replace(run_dir / name)
    header = "global_step,updates,episodic_return,episodic_return_std"
    table = np.array(agent.evaluations).reshape(-1, 4)
    np.savetxt(run_dir / "metrics.csv", table, "%.10g", ",", header=header, comments="")


def train(agent, buffer, run_dir, writer):
    args = agent.args
    step = first_step = buffer.added
    to_tensor = partial(torch.as_tensor, dtype=torch.float32)
    envs = make_envs(args.env_id, args.num_envs)
    act = CudaGraph(agent.act)
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=None)
    start_time = time.time()
    returns = np.zeros(args.num_envs)  # of the running episodes
    recent_returns = []
    obs = to_tensor(envs.reset(seed=args.seed + step)[0])

    while not agent.exit_status:
        # Evaluate if due, but not again after --resume.
        due = step % args.eval_frequency < args.num_envs or step >= args.total_timesteps
        if due and step > max((row[0] for row in agent.evaluations), default=0):
            with torch.random.fork_rng([0] if obs.is_cuda else []):
                mean, std = evaluate(agent, run_dir, step)
            agent.evaluations.append([step, agent.updates, mean, std])
            writer.add_scalar("eval/episodic_return", mean, step)
            save_checkpoint(run_dir, agent, buffer)
        if step >= args.total_timesteps:
            break

        # Act at random, later by the policy. Update before stepping: a GPU computes meanwhile.
        learning = step >= args.learning_starts
        actions = act(obs) if learning else 2 * torch.rand(args.num_envs, agent.action_dim) - 1
        actions_for_envs = actions.cpu().numpy()
        if learning:
            progress = (step - args.learning_starts) / (args.total_timesteps - args.learning_starts)
            agent.update(buffer.sample(args.batch_size), progress)

        # Step the environments. Where an episode ends, next_obs is the first of the next episode.
        next_obs, rewards, terminations, truncations, infos = envs.step(actions_for_envs)
        step += args.num_envs
        bar.update(args.num_envs)
        returns += rewards
        last_obs = next_obs.copy()
        for i in np.flatnonzero(terminations | truncations):
            last_obs[i] = infos["final_obs"][i]
            recent_returns.append(returns[i])
            writer.add_scalar("charts/episodic_return", returns[i], step)
            returns[i] = 0

        # Store the transitions. The critics bootstrap from the last state of a truncated episode.
        buffer.add(obs, actions, *map(to_tensor, (rewards, last_obs, terminations)))
        obs = to_tensor(next_obs)

        if learning and agent.updates % 100 == 0:
            for name, value in agent.metrics.items():
                writer.add_scalar(f"losses/{name}", value.item(), step)
            sps = int((step - first_step) / (time.time() - start_time))
            writer.add_scalar("charts/SPS", sps, step)
            bar.set_postfix(SPS=sps, episodic_return=np.mean(recent_returns[-20:] or math.nan))


# ---- Main
def parse_args(argv):
    """Return the arguments, and the saved state of a run to resume or evaluate."""
    published = "--published" in (sys.argv if argv is None else argv)
    defaults = Args(published=True, **PUBLISHED) if published else Args()
    args = tyro.cli(Args, args=argv, default=defaults)
    state = None
    run = args.resume if args.evaluate is None else args.evaluate
    if run is not None:
        path = Path(run, "checkpoint.pt" if args.evaluate is None else "model.pt")
        try:
            state = torch.load(path, map_location="cpu")
            assert state["args"].keys() == vars(args).keys()
            saved = Args(**{**state["args"], "resume": args.resume, "evaluate": args.evaluate})
        except Exception as error:
            raise SystemExit(f"{path} is missing, damaged or not of this script") from error
        args = tyro.cli(Args, args=argv, default=saved)  # The run's arguments are the defaults.
        for name in ("env_id", "buffer_size", "published", "denoising_steps"):
            if getattr(args, name) != getattr(saved, name):
                raise SystemExit(f"{name} must stay {getattr(saved, name)} in this run")
    args.check()
    return args, state


def main(argv=None):
    args, state = parse_args(argv)
    step = state["step"] if state else 0
    device = "cuda" if args.cuda and torch.cuda.is_available() else "cpu"
    print(f"device: {device}")
    torch.set_default_device(device)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs: faster
    torch.set_flush_denormal(True)  # Tiny numbers slow CPUs down.
    torch.manual_seed(args.seed + step)
    np.random.seed(args.seed + step)  # Some tasks use it.
    mujoco.set_mju_user_warning(warnings.warn)  # not into MUJOCO_LOG.TXT
    warnings.filterwarnings("ignore", message=".*out of date|compiler attribute")  # of v4 tasks

    try:
        env = make_env(args.env_id)
        obs_dim, action_dim = map(gym.spaces.flatdim, (env.observation_space, env.action_space))
        agent = Agent(args, obs_dim, action_dim)
        buffer = ReplayBuffer(1 if args.evaluate else args.buffer_size, obs_dim, action_dim)
        if args.capture_video:  # Can it be drawn?
            env = gym.make(args.env_id, render_mode="rgb_array")
            env.reset()
            env.render()
    except Exception as error:
        raise SystemExit(f"{args.env_id} cannot be used: {error}") from error
    if args.compile and device == "cpu":
        try:
            torch.compile(mish)(torch.zeros(1))
            for network in agent.children():
                network.compile(dynamic=True)
        except Exception:
            print("No C++ compiler works here: the networks run uncompiled.")
    if state:
        agent.load_state_dict(state["agent"])
    if args.evaluate:
        evaluate(agent, Path(args.evaluate), step)
        return
    if state:
        agent.updates, agent.evaluations = state["updates"], state["evaluations"]
        for optimizer, saved in zip(agent.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": saved})
        buffer.rows[: min(step, args.buffer_size)] = state.pop("rows")
        buffer.added = step

    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 1_000_000}"
    run_dir = Path(args.resume or "runs/" + re.sub(r"[^\w.-]", "-", name))
    if args.track:
        import wandb

        run = run_dir.resolve().name
        try:
            wandb.init(name=run, id=run, resume="allow", config=vars(args), sync_tensorboard=True)
        except wandb.Error as error:
            raise SystemExit(f"--track: {error}") from error
    run_dir.mkdir(parents=True, exist_ok=True)
    handlers = {}

    def stop(number, frame):
        agent.exit_status = 128 + number

    if threading.current_thread() is threading.main_thread():
        hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none.
        for number in {signal.SIGINT, signal.SIGTERM, hangup}:
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                handlers[number] = signal.signal(number, stop)
    try:
        with SummaryWriter(run_dir, purge_step=step + 1) as writer:
            train(agent, buffer, run_dir, writer)
    except (Exception, SystemExit):  # Ctrl-C also ends a compiler at work.
        if not agent.exit_status:
            raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if agent.exit_status:
        save_checkpoint(run_dir, agent, buffer)
        print(f"Saved. Go on with: python {sys.argv[0]} --resume {run_dir}", file=sys.stderr)
        raise SystemExit(agent.exit_status)
    print(f"Film it: python {sys.argv[0]} --evaluate {run_dir} --capture-video")


if __name__ == "__main__":
    main()
