"""Soft Diffusion Actor-Critic (SDAC): online reinforcement learning with a diffusion policy, in one file.

The policy is a diffusion model of π(a|s) ∝ exp(Q(s, a) / λ). It is trained by reweighted score matching (RSM),
which needs the critic Q and nothing else: no sample of π, no gradient through the sampling chain.

    python sdac_continuous_action.py --env-id Humanoid-v4 --cuda     # train; curves: tensorboard --logdir runs
    python sdac_continuous_action.py --evaluate runs/<run name> --capture-video

Paper: Ma, Chen, Wang, Li, Dai, "Efficient Online Reinforcement Learning for Diffusion Policy", ICML 2025,
arXiv 2502.00361. The same file with a Gaussian policy is sac_continuous_action.py: diff the two.
Notation: s observation, a action in [-1, 1]^d, ε standard normal noise, a_t = √ᾱ_t a_0 + √(1-ᾱ_t) ε a noised action.
Shapes:   B batch, d action dimension, T denoising steps, K particles, M reverse samples, N actions per state."""

import copy
import itertools
import math
import os
import shutil
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Literal

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read with torch; idle threads soon sleep and let other programs work
import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

INITIAL_ALPHA, TARGET_ENTROPY_PER_DIM = 5.0, -0.9  # α starts at 5 and moves the exploration noise to this entropy
REPORT = "evaluation at step {}: return {:.1f} +/- {:.1f}, length {:.0f}"
DENOISED_STD = 0.5  # --reverse-proposal mixture: deviation around the denoised action where the noise tells nothing


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # the name of this experiment
    seed: int = 1  # seed of the networks, the sampling and the environments
    cuda: bool = True  # train on the GPU if there is one
    track: bool = False  # also log to Weights & Biases
    wandb_project_name: str = "sdac"  # the W&B project
    wandb_entity: str | None = None  # the W&B team
    capture_video: bool = False  # record the first episode of every evaluation under videos/{run name}
    evaluate: str | None = None  # evaluate the policy of this run folder, model.pt or checkpoint.pt, and end
    resume: str | None = None  # go on with the training of this run folder
    compile: bool = bool(shutil.which("g++"))  # on a CPU: the networks; on a GPU the kernels are recorded instead
    bfloat16: bool = torch.cpu.get_capabilities().get("avx512_bf16", False)  # on such CPUs, in the reverse diffusion

    env_id: str = "HalfCheetah-v4"  # the Gymnasium task
    total_timesteps: int = 1_000_000  # environment steps, all environments and the warm-up counted
    num_envs: int = 5  # environments in parallel; one update follows each vector step
    buffer_size: int = 1_000_000  # transitions in the replay buffer
    learning_starts: int | None = None  # warm-up: steps of uniformly random actions (default: 30,000 or a tenth of all)
    eval_frequency: int | None = None  # environment steps between evaluations (default: 20 evaluations a run)
    eval_episodes: int = 20  # episodes of an evaluation
    checkpoint_frequency: int | None = None  # steps between checkpoints, where episodes begin anew (default: as above)

    gamma: float = 0.99  # discount factor γ
    tau: float = 0.005  # rate of the moving averages of networks
    batch_size: int = 256  # transitions in an update
    policy_lr: float = 3e-4  # learning rate of the policy, before its decay
    q_lr: float = 3e-4  # learning rate of the critics
    policy_frequency: int = 2  # updates per policy update
    target_network_frequency: int = 2  # updates per step of the moving averages
    reward_scale: float = 0.2  # rewards are multiplied by this before they reach the critics
    alpha_lr: float = 7e-3  # learning rate of log α
    alpha_frequency: int = 250  # updates per step of log α

    denoising_steps: int = 6  # T, steps of the diffusion
    schedule: Literal["log-snr", "linear"] = "log-snr"  # noise levels even in log(signal/noise), or β linear in t
    num_particles: int = 32  # K, actions sampled for each state, of which the best is taken
    num_reverse_samples: int = 64  # M, reverse samples in the RSM loss
    reverse_proposal: Literal["truncate", "mixture", "clip"] = "mixture"  # what reverse samples are drawn from
    anchor: Literal["current", "next"] = "current"  # the loss at (s, a_0), or at (s', a') of the critic's target
    weighting: Literal["max-entropy", "mirror-descent"] = "max-entropy"  # the target: exp(Q/λ) or π·exp(Q/λ)
    temperature: Literal["relative", "fixed"] = "relative"  # λ with or without the spread of Q over the box as unit
    temperature_scale: float = 0.0125  # λ / α, in that unit; smaller is greedier
    noise_scale: float = 0.1  # standard deviation of the exploration noise, in units of α

    def __post_init__(self):
        if self.learning_starts is None:
            self.learning_starts = min(30_000, max(self.total_timesteps // 10, self.batch_size))


class NoiseSchedule:
    """Variance-preserving diffusion (DDPM: Ho et al., 2020) as tables over t = 0..T-1: signal √ᾱ_t, noise √(1-ᾱ_t), and
    q(a_{t-1} | a_t, a_0) = N(posterior_a0 a_0 + posterior_at a_t, posterior_std² I). "log-snr": noise/signal grows from
    0.05 to 4 by a constant factor, sampling starts from N(0, I). "linear": β is linear, the start 0.5 N(0, I)."""

    def __init__(self, num_steps, kind, device=None, dtype=torch.float32):
        self.num_steps, self.initial_std = num_steps, 0.5 if kind == "linear" else 1.0
        if kind == "linear":
            alpha_bar = torch.cumprod(1 - 0.8 * torch.linspace(1e-4, 0.999, num_steps, dtype=torch.float64), 0)
        else:
            ratio = torch.logspace(math.log10(4), math.log10(0.05), num_steps, dtype=torch.float64).flip(0)
            alpha_bar = 1 / (1 + ratio**2)
        previous = nn.functional.pad(alpha_bar[:-1], (1, 0), value=1.0)  # ᾱ_{t-1}
        beta = 1 - alpha_bar / previous
        self.signal = alpha_bar.sqrt().to(device, dtype)
        self.noise = (1 - alpha_bar).sqrt().to(device, dtype)
        self.posterior_a0 = (previous.sqrt() * beta / (1 - alpha_bar)).to(device, dtype)
        self.posterior_at = ((1 - beta).sqrt() * (1 - previous) / (1 - alpha_bar)).to(device, dtype)
        self.posterior_std = (beta * (1 - previous) / (1 - alpha_bar)).sqrt().to(device, dtype)


def mish(x):
    """x·tanh(softplus(x)). Compiled, it is written with one exponential, w = exp(x): x·n/(n+2), n = w(w+2)."""
    if not torch.compiler.is_compiling():
        return nn.functional.mish(x)
    w = x.clamp(max=20).exp()
    n = w * (w + 2)
    return x * n / (n + 2)


class MLP(nn.Module):
    """A network of context and action, or an ensemble. The first layer is split: the context's term is per state."""

    def __init__(self, context_dim, action_dim, output_dim, ensemble=(), hidden_dim=256):
        super().__init__()
        self.inputs, self.weights, self.biases = [context_dim, action_dim], nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise([context_dim + action_dim, *[hidden_dim] * 3, output_dim]):
            self.weights.append(torch.empty(*ensemble, fan_in, fan_out).uniform_(-(fan_in**-0.5), fan_in**-0.5))
            self.biases.append(torch.empty(*ensemble, 1, fan_out).uniform_(-(fan_in**-0.5), fan_in**-0.5))

    def forward(self, context, actions, dtype=None):
        """Context (B, c), actions (B, N, d) -> (*ensemble, B, N, output_dim). dtype is that of products per action."""
        context_weight, action_weight = self.weights[0].split(self.inputs, dim=-2)
        context = context @ context_weight + self.biases[0]
        h = (actions.flatten(0, 1).to(dtype) @ action_weight.to(dtype)).unflatten(-2, actions.shape[:2])
        h = mish(context[..., None, :] + h).flatten(-3, -2)
        for weight, bias in zip(self.weights[1:-1], self.biases[1:-1], strict=True):
            h = mish(h.to(dtype) @ weight.to(dtype) + bias)
        return (h.to(dtype) @ self.weights[-1].to(dtype) + self.biases[-1]).unflatten(-2, actions.shape[:2])


class Denoiser(nn.Module):
    def __init__(self, obs_dim, action_dim, hidden_dim=256, time_dim=16):
        super().__init__()
        self.action_dim, self.time_dim = action_dim, time_dim
        self.time_mlp = nn.Sequential(nn.Linear(time_dim, 2 * time_dim), nn.Mish(), nn.Linear(2 * time_dim, time_dim))
        self.mlp = MLP(obs_dim + time_dim, action_dim, action_dim, hidden_dim=hidden_dim)

    def forward(self, obs, a_t, t, dtype=None):
        """ε_θ(s, a_t, t) (B, N, d) of N actions in each of B states: obs (B, obs_dim), a_t (B, N, d), t () or (B,)."""
        angles = t[..., None] * 10_000 ** (-2 / self.time_dim * torch.arange(self.time_dim // 2, device=t.device))
        embedding = torch.cat([angles.sin(), angles.cos()], dim=-1).to(obs.dtype)  # the authors divide it by 4
        time_features = self.time_mlp(embedding).expand(len(obs), self.time_dim)
        return self.mlp(torch.cat([obs, time_features], dim=1), a_t, dtype)


def min_q(critics, obs, actions):
    """min_j Q_j(s, a) (B, N) of N actions in each of B states: obs (B, obs_dim), actions (B, N, d)."""
    return critics(obs, actions).amin(0)[..., 0]


class ReplayBuffer:
    """The last `size` transitions, one row each: a batch is one indexing operation."""

    def __init__(self, size, obs_dim, action_dim, device):
        self.widths, self.added = [obs_dim, action_dim, 1, obs_dim, 1], 0
        self.rows = torch.empty(size, sum(self.widths), device=device)

    def add(self, obs, actions, rewards, next_obs, terminations):
        """Append N transitions in ring order: obs, next_obs (N, obs_dim), actions (N, d), the others (N,)."""
        rows = torch.cat([obs, actions, rewards[:, None], next_obs, terminations[:, None]], dim=1)
        self.rows[(self.added + torch.arange(len(rows), device=rows.device)) % len(self.rows)] = rows
        self.added += len(rows)

    def sample(self, batch_size, generator):
        """obs, actions, rewards, next_obs, terminations, drawn uniformly with replacement."""
        i = torch.randint(min(self.added, len(self.rows)), (batch_size,), generator=generator, device=self.rows.device)
        obs, actions, rewards, next_obs, terminations = self.rows[i].split(self.widths, dim=1)
        return obs, actions, rewards[:, 0], next_obs, terminations[:, 0]


@torch.no_grad()
def sample_actions(denoiser, critics, schedule, obs, num_particles, generator, exploration_std=None, dtype=None):
    """Reverse diffusion with K particles per state; the particle with the largest min_j Q_j wins. obs (B, obs_dim) ->
    actions (B, d) in [-1, 1], with exploration_std · N(0, I) if given. dtype is that of the denoiser's products."""
    shape = (len(obs), num_particles, denoiser.action_dim)
    randn = partial(torch.randn, generator=generator, device=obs.device, dtype=obs.dtype)
    a_t = schedule.initial_std * randn(shape)
    for t in reversed(range(schedule.num_steps)):
        eps = denoiser(obs, a_t, torch.full((), t, device=obs.device), dtype)
        a_0 = ((a_t - schedule.noise[t] * eps) / schedule.signal[t]).clamp(-1, 1)
        a_t = schedule.posterior_a0[t] * a_0 + schedule.posterior_at[t] * a_t
        if t > 0:
            a_t = a_t + schedule.posterior_std[t] * randn(shape)
    actions = a_t[torch.arange(len(obs), device=obs.device), min_q(critics, obs, a_t).argmax(1)]
    if exploration_std is not None:
        actions = actions + exploration_std * randn(actions.shape)
    return actions.clamp(-1, 1)  # the authors leave the noisy action unclipped


def reverse_samples(schedule, a_t, t, uniform, proposal, prediction=None):
    """Samples from which p(a_0 | a_t) ∝ exp(Q/λ) φ(a_0 | a_t) can be had, φ = N(a_t/√ᾱ_t, (1-ᾱ_t)/ᾱ_t I) in the box.

    a_t and ε_θ(s, a_t, t) (B, d), t (B, 1), uniform on [0, 1) (B, M, d) -> ε and â = (a_t - √(1-ᾱ_t) ε)/√ᾱ_t (B, M, d),
    and log φ(â | a_t) minus the log-density of what is drawn (B, M), up to a constant. "truncate": from φ. "clip": from
    the Gaussian; then â outside the box moves to its surface and ε stays (the authors' choice, biased). "mixture": half
    from φ, half around the denoised action, weighted by their density (balance heuristic: Veach and Guibas, 1995)."""
    a_t, signal, noise = a_t[:, None], schedule.signal[t[:, None]], schedule.noise[t[:, None]]
    tiny = torch.finfo(uniform.dtype).tiny
    if proposal == "clip":
        eps = torch.special.ndtri(uniform.clamp(min=tiny))
        return eps, ((a_t - noise * eps) / signal).clamp(-1, 1), torch.zeros_like(uniform[..., 0])
    mean, std = (a_t / signal)[:, None], (noise / signal)[:, None]  # (B, proposals, 1, d) and (B, proposals, 1, 1)
    if proposal == "mixture":
        denoised = ((a_t - noise * prediction[:, None]) / signal).clamp(-1, 1)
        mean, std = torch.cat([mean, denoised[:, None]], 1), torch.cat([std, (std**-2 + DENOISED_STD**-2) ** -0.5], 1)
    # Inversion of Φ(x) = erfc(-x/√2)/2 in the box. Only its lower tail is exact: intervals of the upper are mirrored
    low, high, upper = (-1 - mean) / std, (1 - mean) / std, mean < 0
    low, high = torch.where(upper, -high, low), torch.where(upper, -low, high)
    cdf_low, cdf_high = (0.5 * torch.special.erfc(-x / math.sqrt(2)) for x in (low, high))
    mass = (cdf_high - cdf_low).clamp(min=tiny)
    z = torch.special.ndtri(cdf_low + uniform.unflatten(1, (mean.shape[1], -1)) * mass).maximum(low).minimum(high)
    a_hat = (mean + torch.where(upper, -std, std) * z).clamp(-1, 1).flatten(1, 2)
    eps = (a_t - signal * a_hat) / noise
    log_density = (((a_hat[:, None] - mean) / std).square() / -2 - std.log() - mass.log()).sum(3).logsumexp(1)
    return eps, a_hat, -eps.square().sum(2) / 2 - log_density


def rsm_target(eps, q, temperature, log_ratio=0.0):
    """Reweighted score matching: the posterior mean E[ε | a_t, s] under π ∝ exp(Q/λ), by self-normalised importance
    sampling, Σ_i w_i ε_i with w = softmax_i(Q(s, â_i) / λ + log_ratio_i). eps (B, M, d), q = min_j Q_j(s, â) and
    log_ratio (B, M) of the reverse samples -> target (B, d) and the effective sample size 1/Σ w_i² (B,)."""
    weights = torch.softmax(q / temperature + log_ratio, dim=1)
    return (weights[..., None] * eps).sum(1), 1 / weights.square().sum(1)


def gradient_step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class CudaGraph:
    """A function of tensors and a generator. On a GPU its third call is recorded; from then on a call launches the same
    kernels all at once, on copies of its tensors, and overwrites what the call before returned."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *tensors, generator):
        self.calls += 1
        if not tensors[0].is_cuda or self.calls < 3:  # the first ones choose kernels and set up optimisers
            return self.function(*tensors, generator=generator)
        if self.calls == 3:
            self.graph, self.tensors = torch.cuda.CUDAGraph(), [x.clone() for x in tensors]
            self.graph.register_generator_state(generator)
            with torch.cuda.graph(self.graph):
                self.outputs = self.function(*self.tensors, generator=generator)
        torch._foreach_copy_(self.tensors, tensors)
        self.graph.replay()
        return self.outputs


class Agent(nn.Module):
    """Policy, critics, their moving averages and optimisers. act() takes actions, update() learns from a batch."""

    def __init__(self, args, obs_dim, action_dim, device):
        super().__init__()
        self.args, self.action_dim, self.updates, on_cpu = args, action_dim, 0, device.type == "cpu"
        self.policy, self.critics = Denoiser(obs_dim, action_dim), MLP(obs_dim, action_dim, 1, ensemble=(2,))
        self.ema_policy, self.target_critics = copy.deepcopy(self.policy), copy.deepcopy(self.critics)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(INITIAL_ALPHA)))
        self.register_buffer("q_spread", torch.tensor(0.0))  # σ_Q of --temperature relative; 0 before the first
        self.register_buffer("q_moments", torch.tensor([0.0, 1.0]))  # mean and deviation of Q, for mirror descent
        self.to(device)
        self.schedule = NoiseSchedule(args.denoising_steps, args.schedule, device)
        adam = partial(torch.optim.Adam, fused=True, capturable=not on_cpu)
        self.q_optimizer = adam(self.critics.parameters(), lr=args.q_lr)
        self.policy_optimizer = adam(self.policy.parameters(), lr=torch.tensor(args.policy_lr, device=device))
        self.alpha_optimizer = adam([self.log_alpha], lr=args.alpha_lr)
        self.optimizers = [self.q_optimizer, self.policy_optimizer, self.alpha_optimizer]
        self.dtype = torch.bfloat16 if on_cpu and args.bfloat16 and Args.bfloat16 else None  # wanted, and this CPU can
        if args.compile and on_cpu:
            for network in self.children():
                network.compile(dynamic=True)  # one compilation for all numbers of states
        self.update_critics, self.update_policy = CudaGraph(self.update_critics), CudaGraph(self.update_policy)

    def act(self, obs, generator, explore=True, policy=None):
        """Actions (B, d) of the averaged policy, or of the given one, with exploration noise or without."""
        std = self.args.noise_scale * self.log_alpha.detach().exp() if explore else None
        policy, k = policy or self.ema_policy, self.args.num_particles
        return sample_actions(policy, self.critics, self.schedule, obs, k, generator, std, self.dtype)

    def update(self, batch, generator):
        """One update from a batch of the replay buffer. Returns what it measured, as tensors that nobody waits for."""
        args, (obs, *_, next_obs, _) = self.args, batch
        self.updates += 1
        metrics, next_actions = self.update_critics(*batch, generator=generator)
        if self.updates % args.policy_frequency == 0:
            decay = min(max(self.updates // args.policy_frequency - 25_001, 0) / 50_000, 1)  # 1 at 75k policy updates
            self.policy_optimizer.param_groups[0]["lr"].fill_(args.policy_lr * (1 - 0.9 * decay))
            metrics = metrics | self.update_policy(obs, next_obs, next_actions, generator=generator)
        if self.updates % args.alpha_frequency == 0:  # moves the entropy of the exploration noise to its target
            excess = 0.5 * math.log(2 * math.pi * math.e) + metrics["exploration_std"].log() - TARGET_ENTROPY_PER_DIM
            gradient_step(self.alpha_optimizer, self.log_alpha * self.action_dim * excess)
        if self.updates % args.target_network_frequency == 0:
            with torch.no_grad():  # average ← τ source + (1-τ) average
                for average, source in [(self.target_critics, self.critics), (self.ema_policy, self.policy)]:
                    torch._foreach_lerp_(list(average.parameters()), list(source.parameters()), args.tau)
        return metrics

    def update_critics(self, obs, actions, rewards, next_obs, terminations, generator):
        """Mean squared error to r + γ min_j Q̄_j(s', a'); unlike SAC, no entropy bonus. Returns metrics and a'."""
        args, alpha = self.args, self.log_alpha.detach().exp()
        next_actions = self.act(next_obs, generator, policy=self.policy)
        with torch.no_grad():
            next_q = min_q(self.target_critics, next_obs, next_actions[:, None])[:, 0]
            target_q = args.reward_scale * rewards + args.gamma * (1 - terminations) * next_q
        q = self.critics(obs, actions[:, None])[..., 0, 0]
        q_losses = (q - target_q).square().mean(1)
        gradient_step(self.q_optimizer, q_losses.sum())
        metrics = {"qf1_values": q[0].mean(), "qf2_values": q[1].mean(), "qf_loss": q_losses.mean(), "alpha": alpha}
        metrics |= {"qf1_loss": q_losses[0], "qf2_loss": q_losses[1], "exploration_std": args.noise_scale * alpha}
        return {name: value.detach() for name, value in metrics.items()}, next_actions

    def update_policy(self, obs, next_obs, next_actions, generator):
        """Denoise towards π ∝ exp(Q/λ), or with mirror descent towards π_new ∝ π_old exp(Q/λ). Returns metrics."""
        args, m = self.args, self.args.num_reverse_samples
        t = torch.randint(args.denoising_steps, (len(obs), 1), generator=generator, device=obs.device)
        eps = torch.randn(next_actions.shape, generator=generator, device=obs.device)
        at_next = args.anchor == "next" or args.weighting == "mirror-descent"
        obs, a_0 = (next_obs, next_actions) if at_next else (obs, self.act(obs, generator, policy=self.policy))
        a_t = self.schedule.signal[t] * a_0 + self.schedule.noise[t] * eps
        prediction = self.policy(obs, a_t[:, None], t[:, 0])[:, 0]
        if args.weighting == "max-entropy":
            uniform = torch.rand(len(obs), m, self.action_dim, generator=generator, device=obs.device)
            proposal, temperature = args.reverse_proposal, args.temperature_scale * self.log_alpha.detach().exp()
            with torch.no_grad():
                eps, a_hat, log_ratio = reverse_samples(self.schedule, a_t, t, uniform, proposal, prediction)
                q = min_q(self.critics, obs, a_hat)
            if args.temperature == "relative":  # to σ_Q: how much Q varies where â is nearly uniform in the box
                noisy = t[:, 0] >= t.max().clamp(max=args.denoising_steps // 2)  # upper half of the levels, if any
                share = torch.softmax(log_ratio, dim=1)  # as if all had been drawn from φ
                variance = (share * (q - (share * q).sum(1, keepdim=True)).square()).sum(1)
                spread = (variance.sqrt() * noisy).sum() / noisy.sum()
                self.q_spread.copy_(torch.where(self.q_spread == 0, spread, self.q_spread.lerp(spread, 0.01)))
                temperature = temperature * self.q_spread.clamp(min=1e-8)
            target, ess = rsm_target(eps, q, temperature, log_ratio)
            weights = torch.ones_like(ess)
        else:
            target, q = eps, min_q(self.critics, obs, a_0[:, None])[:, 0].detach()
            self.q_moments.lerp_(torch.stack([q.mean(), q.std()]), 0.001)
            temperature = self.log_alpha.detach().exp()
            weights = (((q - self.q_moments[0]) / self.q_moments[1]).clamp(-3, 3) / temperature).exp()
            ess = weights.sum().square() / weights.square().sum()
        # With target = Σ w_i ε_i this has the gradient of the RSM loss Σ w_i ‖ε_θ - ε_i‖² with one evaluation of ε_θ
        loss = (weights * (prediction - target).square().sum(1)).mean()
        gradient_step(self.policy_optimizer, loss)
        return {"rsm_loss": loss.detach(), "effective_sample_size": ess.mean(), "temperature": temperature}


def make_envs(env_id, num_envs, video=None):
    """num_envs copies of the task with actions rescaled to [-1, 1], the first one filmed if video is a path."""
    envs = [gym.make(env_id, render_mode="rgb_array" if video and i == 0 else None) for i in range(num_envs)]
    if video:
        names = {"video_folder": video.parent, "name_prefix": video.name, "disable_logger": True}
        envs[0] = gym.wrappers.RecordVideo(envs[0], episode_trigger=lambda episode: episode == 0, **names)
    makers = [partial(gym.wrappers.RescaleAction, env, np.float32(-1), np.float32(1)) for env in envs]
    return gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


def evaluate(agent, args, device, name=None):
    """Evaluates without exploration noise; every time from the same seeds, apart from the training's random stream."""
    n, seed, video = args.eval_episodes, args.seed + 1_000_000, Path("videos", name) if args.capture_video else None
    envs, generator = make_envs(args.env_id, n, video), torch.Generator(device).manual_seed(seed)
    obs, _ = envs.reset(seed=seed)
    act = CudaGraph(partial(agent.act, explore=False))
    returns, lengths, running = np.zeros(n), np.zeros(n), np.ones(n, dtype=bool)
    while running.any():
        actions = act(torch.as_tensor(obs, dtype=torch.float32, device=device), generator=generator)
        obs, rewards, terminations, truncations, _ = envs.step(actions.cpu().numpy())
        returns += rewards * running
        lengths += running
        running &= ~(terminations | truncations)
    envs.close()
    return {"episodic_return": returns.mean(), "episodic_return_std": returns.std(), "episodic_length": lengths.mean()}


@contextmanager
def one_sentence(what, status=2):
    """What goes wrong inside ends the program with one sentence. Status 2: bad input; 1: the training cannot go on."""
    try:
        yield
    except Exception as error:
        print("error:", what, *(str(error) or type(error).__name__).split()[:80], file=sys.stderr)
        sys.unraisablehook = lambda _: None  # what is half made may fail once more when it is deleted
        sys.exit(status)


def parse(argv=None):
    """The arguments, and what the run of --resume or --evaluate has saved; its arguments are then the defaults."""
    args = tyro.cli(Args, args=argv)
    source = args.evaluate if args.resume is None else args.resume
    if source is None:
        return args, None
    with one_sentence(f"{source!r} is no run folder or file that this version of {Path(__file__).name} can use:"):
        path = Path(source, "checkpoint.pt") if os.path.isdir(source) else Path(source)
        path = path if args.resume is None else path.with_name("checkpoint.pt")
        state = torch.load(path, map_location="cpu", weights_only=True) | {"run_dir": path.resolve().parent}
        defaults = replace(Args(**state["args"]), evaluate=args.evaluate, resume=args.resume)
    return tyro.cli(Args, args=argv, default=defaults), state


def validate(args):
    """Raises ValueError for arguments or a task with which training cannot work. Returns obs_dim and action_dim."""
    ranges, least = {"seed": (0, 2**31 - 1), "gamma": (0, 1), "tau": (1e-9, 1)}, max(args.num_envs, args.batch_size)
    ranges |= {"learning_starts": (least, args.total_timesteps), "buffer_size": (least, 10**12)}
    for name, value in vars(args).items():
        low, high = ranges.get(name, (1, 10**12) if type(value) is int else (1e-12, 1e12))
        if type(value) in (int, float) and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; give a value from {low} to {high}")
    if args.reverse_proposal == "mixture" and args.num_reverse_samples % 2:
        raise ValueError(f"--num-reverse-samples is {args.num_reverse_samples}; give an even number for a mixture")
    env = gym.make(args.env_id, render_mode="rgb_array" if args.capture_video else None)
    for space in (env.observation_space, env.action_space):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1 or space.dtype.kind != "f":
            raise ValueError(f"{args.env_id} has {space}; choose a task with real vectors as observations and actions")
    if not (np.isfinite(space.high - space.low) & (space.low < space.high)).all():
        raise ValueError(f"{args.env_id} has actions in {space}; choose a task with finite bounds, low < high")
    if args.capture_video:  # rather now than at the first evaluation
        with one_sentence("--capture-video cannot draw; MUJOCO_GL=egl or MUJOCO_GL=osmesa may help:"):
            env.reset()
            env.render()
    return env.observation_space.shape[0], env.action_space.shape[0]


def train(args, agent, buffer, generator, state):
    """The training loop, from the beginning or from a checkpoint: act, learn, store; now and then evaluate and save."""
    device, n, run_dir, evaluations = buffer.rows.device, args.num_envs, state["run_dir"], state["evaluations"]
    step, first_step, last_step = state["step"], state["step"], max(state["step"], args.total_timesteps // n * n)
    eval_frequency = args.eval_frequency or max(args.total_timesteps // 20, n)
    to_tensor = partial(torch.as_tensor, dtype=torch.float32, device=device)
    envs = gym.wrappers.vector.RecordEpisodeStatistics(make_envs(args.env_id, n))
    act = CudaGraph(agent.act)
    writer = SummaryWriter(run_dir, purge_step=step + 1)
    writer.add_text("hyperparameters", "".join(f"    {name}: {value}\n" for name, value in vars(args).items()))
    metrics, recent_returns, signals, start_time = {}, [], [], time.time() - state["seconds"]

    def on_signal(number, _):  # the first signal ends the training after this step, a second one at once
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)
        os.write(2, f"\ninterrupted: writes a checkpoint and ends; --resume {run_dir} goes on from there\n".encode())

    def save(name, **contents):
        """Writes a file in the run folder, whole or not at all. What is not finite ends the training instead."""
        with one_sentence(f"training ends at step {step}, its last checkpoint in {run_dir} is from before:", 1):
            for key, tensor in (agent.state_dict() | {"a transition": buffer.rows[: buffer.added]}).items():
                if not tensor.isfinite().all():
                    raise ValueError(f"{key} is not finite")
            contents |= {"args": asdict(args), "agent": agent.state_dict(), "updates": agent.updates, "step": step}
            torch.save(contents, run_dir / "unfinished.tmp")
            os.replace(run_dir / "unfinished.tmp", run_dir / name)

    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, on_signal)
    bar = tqdm(total=last_step, initial=step, unit="step", disable=None)  # None: quiet when not a terminal
    while True:
        if step > first_step and (step % eval_frequency < n or step == last_step):
            result = evaluate(agent, args, device, f"{run_dir.name}/step-{step}")
            for name, value in result.items():
                writer.add_scalar(f"eval/{name}", value, step)
            evaluations.append([step, agent.updates, *map(float, result.values()), time.time() - start_time])
            table, header = [row[:5] for row in evaluations], "global_step,updates," + ",".join(result)
            with one_sentence(f"training ends at step {step}:", 1):
                np.savetxt(run_dir / "metrics.csv", table, fmt="%.10g", delimiter=",", header=header, comments="")
            bar.write(REPORT.format(step, *result.values()))
        if signals or step % (args.checkpoint_frequency or eval_frequency) < n or step in (first_step, last_step):
            optimizers = [optimizer.state_dict()["state"] for optimizer in agent.optimizers]
            rows = buffer.rows[: buffer.added].clone()  # without the empty ones behind
            progress = {"evaluations": evaluations, "seconds": time.time() - start_time}
            save("checkpoint.pt", optimizers=optimizers, rows=rows, generator=generator.get_state(), **progress)
            if signals:
                sys.exit(128 + signals[0])
            # Episodes begin anew with every checkpoint, so that none needs the state of a simulator
            obs, _ = envs.reset(seed=int(np.random.SeedSequence((args.seed, step)).generate_state(1)[0] // 2))
        if step == last_step:
            break
        if step < args.learning_starts:
            actions = 2 * torch.rand(n, agent.action_dim, generator=generator, device=device) - 1
        else:
            actions = act(to_tensor(obs), generator=generator)
        actions_for_envs = actions.cpu().numpy()
        if step >= args.learning_starts:  # before the environments step, so that a GPU works meanwhile
            metrics |= agent.update(buffer.sample(args.batch_size, generator), generator)
        next_obs, rewards, terminations, truncations, infos = envs.step(actions_for_envs)
        step += n
        bar.update(n)
        last_obs = next_obs.copy()
        for i in np.flatnonzero(terminations | truncations):  # next_obs[i] is the first of the next episode
            last_obs[i] = infos["final_obs"][i]
            recent_returns.append(infos["episode"]["r"][i])
            writer.add_scalar("charts/episodic_return", infos["episode"]["r"][i], step)
            writer.add_scalar("charts/episodic_length", infos["episode"]["l"][i], step)
        # A truncated episode has not terminated: its last state has a future, so the critics bootstrap from it
        buffer.add(to_tensor(obs), actions, to_tensor(rewards), to_tensor(last_obs), to_tensor(terminations))
        obs = next_obs
        if metrics and agent.updates % 100 == 0:
            for name, value in metrics.items():
                writer.add_scalar(f"losses/{name}", value.item(), step)
            sps = int(step / (time.time() - start_time))
            writer.add_scalar("charts/SPS", sps, step)
            bar.set_postfix(SPS=sps, episodic_return=np.mean(recent_returns[-20:] or math.nan))
    writer.close()
    save("model.pt")


def main(args, state=None):
    """Trains, goes on with a training, or evaluates a trained policy."""
    warnings.filterwarnings("ignore", message=".*out of date|compiler attribute|.*Overwriting existing videos")
    with one_sentence("cannot start:"):
        import_module("mujoco").set_mju_user_warning(warnings.warn)  # no log file. Fails where MUJOCO_GL is wrong
        obs_dim, action_dim = validate(args)
        device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
        print(f"device: {device}" + " (PyTorch finds no CUDA device)" * (args.cuda and device.type == "cpu"))
        torch.manual_seed(args.seed)
        torch.set_flush_denormal(True)  # CPUs compute with numbers like mish(-95) many times more slowly
        torch._dynamo.config.suppress_errors = True  # without a compiler, or when Ctrl-C ends it, it runs uncompiled
        torch._logging.set_logs(dynamo=40)  # errors only: without pages of text on that
        agent, generator = Agent(args, obs_dim, action_dim, device), torch.Generator(device).manual_seed(args.seed)
        if state:
            agent.load_state_dict(state["agent"])
            agent.updates = state["updates"]
    if args.evaluate is not None:
        print(REPORT.format(state["step"], *evaluate(agent, args, device, state["run_dir"].name).values()))
        return
    with one_sentence(f"--buffer-size {args.buffer_size} is too large:"):
        buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim, device)
    with one_sentence("cannot start:"):
        if state:
            for optimizer, saved in zip(agent.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(optimizer.state_dict() | {"state": saved})
            generator.set_state(state["generator"])
            buffer.rows[: state["step"]], buffer.added = state["rows"], state["step"]
        else:
            name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
            run_dir = Path("runs", name.replace("/", "-").replace(":", "-"))
            state = {"step": 0, "evaluations": [], "seconds": 0.0, "run_dir": run_dir}
            run_dir.mkdir(parents=True)
        if args.track:
            run = {"name": state["run_dir"].name, "project": args.wandb_project_name, "entity": args.wandb_entity}
            import_module("wandb").init(**run, id=run["name"], resume="allow", config=vars(args), sync_tensorboard=True)
    train(args, agent, buffer, generator, state)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # or else a redirected output stays empty for long
    main(*parse())
