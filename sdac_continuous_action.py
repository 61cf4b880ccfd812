"""Soft Diffusion Actor-Critic (SDAC): online reinforcement learning with a diffusion policy, in one file.

The policy is a diffusion model of π(a|s) ∝ exp(Q(s, a) / λ). It is trained by reweighted score matching (RSM),
which needs the critic Q and nothing else: no sample of π, no gradient through the sampling chain.

    python sdac_continuous_action.py --env-id Humanoid-v4 --cuda     # train; curves: tensorboard --logdir runs
    python sdac_continuous_action.py --env-id Humanoid-v4 --evaluate runs/<run name>/model.pt --capture-video

Paper: Ma, Chen, Wang, Li, Dai, "Efficient Online Reinforcement Learning for Diffusion Policy", ICML 2025,
arXiv 2502.00361. The same file with a Gaussian policy is sac_continuous_action.py: diff the two.

Notation: s observation, a action in [-1, 1]^d, ε standard normal noise, a_t = √ᾱ_t a_0 + √(1-ᾱ_t) ε a noised action.
Shapes:   B batch, d action dimension, T denoising steps, K particles, M reverse samples, H hidden width.

The algorithm ends with class Agent; evaluation, input checks, files and the training loop follow it.
"""

import csv
import ctypes
import difflib
import itertools
import math
import os
import re
import signal
import sys
import time
import warnings
import zipfile
from collections import deque
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

# Idle threads of OpenMP sleep after a short spin; or else, where cores are shared, they keep busy ones from working
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when PyTorch is imported

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ALGORITHM = "sdac"
INITIAL_ALPHA = 5.0
LAMBDA_PER_ALPHA = 1 / 5  # λ = α / 5: 1 at first
TARGET_ENTROPY_PER_DIMENSION = -0.9
MIN_NOISE_TO_SIGNAL, MAX_NOISE_TO_SIGNAL = 0.05, 4.0  # √(1-ᾱ)/√ᾱ of the first and last level of --schedule log-snr


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # the name of this experiment
    seed: int = 1  # seed of the networks, the sampling and the environments
    torch_deterministic: bool = True  # ask PyTorch for deterministic kernels where it has them
    cuda: bool = True  # train on the GPU if there is one
    track: bool = False  # also log to Weights & Biases
    wandb_project_name: str = "sdac"  # the W&B project
    wandb_entity: str | None = None  # the W&B team
    capture_video: bool = False  # record the first episode of every evaluation under videos/{run name}
    save_model: bool = True  # write model.pt into the run folder at the end
    evaluate: str | None = None  # evaluate this model.pt (or its run folder) instead of training
    resume: str | None = None  # go on with the training of this run folder (or its checkpoint.pt)
    compile: bool = not torch.cuda.is_available()  # torch.compile the networks (on CUDA not by default: untried)
    cudagraphs: bool = False  # on CUDA, record the update once and replay it (untried)
    bfloat16: bool = True  # on a CPU that multiplies bfloat16, use it in the reverse diffusion; what learns is float32

    env_id: str = "HalfCheetah-v4"  # the Gymnasium task
    total_timesteps: int = 1_000_000  # environment steps, all environments and the warm-up counted
    num_envs: int = 5  # environments in parallel; one update follows each vector step
    buffer_size: int = 1_000_000  # transitions in the replay buffer
    learning_starts: int = 30_000  # warm-up: environment steps of uniformly random actions
    eval_frequency: int | None = None  # environment steps between evaluations (default: 20 evaluations a run)
    eval_episodes: int = 20  # episodes of an evaluation
    checkpoint_frequency: int | None = None  # steps between checkpoints, where episodes begin anew (default: as above)

    gamma: float = 0.99  # discount factor γ
    tau: float = 0.005  # rate of the moving averages (target critics, policy that acts)
    batch_size: int = 256  # transitions in an update
    policy_lr: float = 3e-4  # learning rate of the policy, before its decay
    q_lr: float = 3e-4  # learning rate of the critics
    policy_frequency: int = 2  # updates per policy update
    target_network_frequency: int = 2  # updates per step of the moving averages
    reward_scale: float = 0.2  # rewards are multiplied by this before they reach the critics
    alpha_lr: float = 7e-3  # learning rate of log α
    alpha_frequency: int = 250  # updates per step of log α

    denoising_steps: int = 10  # T, steps of the diffusion
    schedule: Literal["log-snr", "linear"] = "log-snr"  # noise levels even in log(signal/noise), or β linear in t
    num_particles: int = 32  # K, actions sampled for each state, of which the best is taken
    num_reverse_samples: int = 64  # M, reverse samples in the RSM loss
    reverse_proposal: Literal["truncate", "clip"] = "truncate"  # how reverse samples are kept in the box
    anchor: Literal["current", "next"] = "current"  # the loss at (s, a_0), or at (s', a') of the critic's target
    weighting: Literal["max-entropy", "mirror-descent"] = "max-entropy"  # the target: exp(Q/λ) or π·exp(Q/λ)
    temperature: Literal["fixed", "relative"] = "fixed"  # λ = α/5, or α/5 times the spread of Q over the box
    noise_scale: float = 0.1  # standard deviation of the exploration noise, in units of α


# ---- The diffusion policy and the critics ----


class NoiseSchedule:
    """Variance-preserving diffusion with T steps (DDPM: Ho et al., 2020). t is an index 0..T-1, or a tensor of
    indices that broadcasts against the actions.

    "log-snr": noise/signal √(1-ᾱ)/√ᾱ grows by a constant factor from step to step, and sampling starts from N(0, I).
    "linear": β grows linearly, and sampling starts from 0.5 N(0, I) (the authors' choice)."""

    def __init__(self, num_steps, kind, device=None, dtype=torch.float32):
        if kind == "linear":
            beta = 0.8 * torch.linspace(1e-4, 0.999, num_steps, dtype=torch.float64)
            alpha_bar = torch.cumprod(1 - beta, 0)
        else:
            ends = math.log10(MAX_NOISE_TO_SIGNAL), math.log10(MIN_NOISE_TO_SIGNAL)
            alpha_bar = 1 / (1 + torch.logspace(*ends, num_steps, dtype=torch.float64).flip(0) ** 2)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])  # ᾱ_{t-1}
        beta = 1 - alpha_bar / previous
        tables = {
            "signal": alpha_bar.sqrt(),
            "noise": (1 - alpha_bar).sqrt(),
            "posterior_a0": previous.sqrt() * beta / (1 - alpha_bar),
            "posterior_at": (1 - beta).sqrt() * (1 - previous) / (1 - alpha_bar),
            "posterior_std": (beta * (1 - previous) / (1 - alpha_bar)).sqrt(),
        }
        self.num_steps, self.initial_std = num_steps, 0.5 if kind == "linear" else 1.0
        vars(self).update({name: table.to(device, dtype) for name, table in tables.items()})

    def add_noise(self, a_0, eps, t):
        """Forward process: a_t = √ᾱ_t a_0 + √(1-ᾱ_t) ε."""
        return self.signal[t] * a_0 + self.noise[t] * eps

    def predict_a0(self, a_t, eps, t):
        """The a_0 that noise ε takes to a_t: the forward process solved for a_0."""
        return (a_t - self.noise[t] * eps) / self.signal[t]

    def posterior_mean(self, a_0, a_t, t):
        """Mean of q(a_{t-1} | a_t, a_0); its standard deviation is posterior_std[t]."""
        return self.posterior_a0[t] * a_0 + self.posterior_at[t] * a_t


def mish(x):
    """x·tanh(softplus(x)). Compiled, it is written with one exponential, w = exp(x): x·n/(n+2), n = w(w+2)."""
    if not torch.compiler.is_compiling():
        return F.mish(x)
    w = x.clamp(max=20).exp()
    n = w * (w + 2)
    return x * n / (n + 2)


class Denoiser(nn.Module):
    """ε_θ(s, a_t, t), an MLP on (s, a_t, t). Its first layer is a sum of a term in (s, t), which is computed once per
    state, and a term in a_t, once per action."""

    def __init__(self, obs_dim, action_dim, hidden_dim=256, time_dim=16):
        super().__init__()
        self.sizes, self.action_dim = [obs_dim, time_dim, action_dim], action_dim
        self.time_mlp = nn.Sequential(nn.Linear(time_dim, 2 * time_dim), nn.Mish(), nn.Linear(2 * time_dim, time_dim))
        self.input_layer = nn.Linear(sum(self.sizes), hidden_dim)
        self.hidden_layers = nn.ModuleList([nn.Linear(hidden_dim, hidden_dim) for _ in range(2)])
        self.output_layer = nn.Linear(hidden_dim, action_dim)

    def embed_time(self, t):
        """[sin, cos](t · 10000^(-i/8)), i = 0..7, for a width of 16: indices t (...) -> (..., 16)."""
        width = self.sizes[1]
        frequencies = 10_000 ** (-2 / width * torch.arange(width // 2, device=t.device))
        angles = (t[..., None] * frequencies).to(self.input_layer.weight.dtype)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)  # the authors divide it by 4

    def forward(self, obs, a_t, t):
        """Predicted noise (B, N, d) of N actions in each of B states: obs (B, obs_dim), a_t (B, N, d), t () or (B,)."""
        obs_weight, time_weight, action_weight = self.input_layer.weight.split(self.sizes, dim=1)
        with torch.autocast(obs.device.type, enabled=False):  # what is computed once per state keeps its precision
            context = F.linear(obs, obs_weight, self.input_layer.bias)
            context = context + F.linear(self.time_mlp(self.embed_time(t)), time_weight)
        h = mish(context[:, None] + F.linear(a_t, action_weight))
        for layer in self.hidden_layers:
            h = mish(F.linear(h, layer.weight) + layer.bias)  # compiled, the bias is added in mish's pass over memory
        return F.linear(h, self.output_layer.weight) + self.output_layer.bias


class Critics(nn.Module):
    """Twin critics Q_1, Q_2 as one batched MLP on (s, a)."""

    def __init__(self, obs_dim, action_dim, hidden_dim=256):
        super().__init__()
        sizes = [obs_dim + action_dim, hidden_dim, hidden_dim, hidden_dim, 1]
        self.obs_dim = obs_dim
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise(sizes):  # initialised as nn.Linear is
            self.weights.append(torch.empty(2, fan_in, fan_out).uniform_(-(fan_in**-0.5), fan_in**-0.5))
            self.biases.append(torch.empty(2, 1, fan_out).uniform_(-(fan_in**-0.5), fan_in**-0.5))

    def forward(self, obs, actions):
        """Values (2, B, N) of N actions in each of B states: obs (B, obs_dim), actions (B, N, d)."""
        obs_weight, action_weight = self.weights[0].split([self.obs_dim, actions.shape[-1]], dim=1)
        context = obs @ obs_weight + self.biases[0]  # once per state: (2, B, H)
        h = mish(context[:, :, None] + (actions.flatten(0, 1) @ action_weight).unflatten(1, actions.shape[:2]))
        h = h.flatten(1, 2)
        for weight, bias in zip(self.weights[1:-1], self.biases[1:-1], strict=True):
            h = mish(h @ weight + bias)
        return (h @ self.weights[-1] + self.biases[-1]).view(2, *actions.shape[:2])


class ReplayBuffer:
    """The last `size` transitions, one row each: a batch is one indexing operation."""

    def __init__(self, size, obs_dim, action_dim, device):
        self.sizes = [obs_dim, action_dim, 1, obs_dim, 1]
        self.size, self.position, self.filled = size, 0, 0
        needed, free = 4 * size * sum(self.sizes), free_memory(device)
        if needed > free:
            fail(
                f"--buffer-size {size} asks for {needed / 1e9:.1f} GB, but {device} has {free / 1e9:.1f} GB free; "
                "choose a smaller --buffer-size"
            )
        self.rows = torch.empty(size, sum(self.sizes), device=device)

    def add(self, obs, actions, rewards, next_obs, terminations):
        """Append N transitions in ring order: obs, next_obs (N, obs_dim), actions (N, d), the others (N,)."""
        rows = torch.cat([obs, actions, rewards[:, None], next_obs, terminations[:, None]], dim=1)
        index = (self.position + torch.arange(len(rows), device=rows.device)) % self.size
        self.rows[index] = rows
        self.position = (self.position + len(rows)) % self.size
        self.filled = min(self.filled + len(rows), self.size)

    def sample(self, batch_size, generator):
        """obs, actions, rewards, next_obs, terminations, drawn uniformly with replacement."""
        index = torch.randint(self.filled, (batch_size,), generator=generator, device=self.rows.device)
        obs, actions, rewards, next_obs, terminations = self.rows[index].split(self.sizes, dim=1)
        return obs, actions, rewards[:, 0], next_obs, terminations[:, 0]


@torch.no_grad()
def sample_actions(denoiser, critics, schedule, obs, num_particles, generator, exploration_std=None, bfloat16=False):
    """Reverse diffusion with K particles per state; the particle with the largest min_j Q_j wins.

    obs (B, obs_dim) -> actions (B, d) in [-1, 1], plus exploration_std · N(0, I) if given. With bfloat16 the matrix
    products of the denoiser have 8 bits of precision; a_t and the critics keep float32."""
    shape = (len(obs), num_particles, denoiser.action_dim)
    randn = partial(torch.randn, generator=generator, device=obs.device, dtype=obs.dtype)
    steps = torch.arange(schedule.num_steps, device=obs.device)
    a_t = schedule.initial_std * randn(shape)
    for t in reversed(range(schedule.num_steps)):
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=bfloat16):
            eps = denoiser(obs, a_t, steps[t])
        a_0 = schedule.predict_a0(a_t, eps, t).clamp(-1, 1)
        a_t = schedule.posterior_mean(a_0, a_t, t)
        if t > 0:
            a_t = a_t + schedule.posterior_std[t] * randn(shape)
    best = critics(obs, a_t).amin(0).argmax(1)
    actions = a_t[torch.arange(len(obs), device=obs.device), best]
    if exploration_std is not None:
        actions = actions + exploration_std * randn(actions.shape)
    return actions.clamp(-1, 1)  # the authors leave the noisy action unclipped


def reverse_samples(schedule, a_t, t, uniform, proposal):
    """Samples of φ(a_0 | a_t) = N(a_t/√ᾱ_t, (1-ᾱ_t)/ᾱ_t I) by inversion of the normal distribution function Φ.

    a_t (B, d), t (B, 1), uniform on [0, 1) (B, M, d) -> ε and â = (a_t - √(1-ᾱ_t) ε)/√ᾱ_t, both (B, M, d).
    "clip" moves â outside the box to its surface and leaves ε as it was (the authors' choice, biased);
    "truncate" draws ε from the part of the Gaussian for which â lies in the box: φ on the support of π."""
    a_t, t, tiny = a_t[:, None], t[:, None], torch.finfo(uniform.dtype).tiny
    if proposal == "clip":
        eps = torch.special.ndtri(uniform.clamp(min=tiny))
    else:
        low = (a_t - schedule.signal[t]) / schedule.noise[t]  # the ε for which â = +1
        high = (a_t + schedule.signal[t]) / schedule.noise[t]  # the ε for which â = -1
        upper = a_t > 0  # Φ loses its digits near 1: mirror intervals of the upper tail into the lower one
        low, high = torch.where(upper, -high, low), torch.where(upper, -low, high)
        # Φ(x) = erfc(-x/√2)/2 is exact in the lower tail, where torch.special.ndtr loses its digits too
        cdf_low, cdf_high = (0.5 * torch.special.erfc(-x / math.sqrt(2)) for x in (low, high))
        eps = torch.special.ndtri((cdf_low + uniform * (cdf_high - cdf_low)).clamp(min=tiny))
        eps = eps.maximum(low).minimum(high)
        eps = torch.where(upper, -eps, eps)
    return eps, schedule.predict_a0(a_t, eps, t).clamp(-1, 1)


def rsm_target(eps, q, temperature):
    """Reweighted score matching: the posterior mean E[ε | a_t, s] under π ∝ exp(Q/λ), by self-normalised importance
    sampling, Σ_i w_i ε_i with w = softmax_i(Q(s, â_i) / λ).

    eps (B, M, d) and q = min_j Q_j(s, â) (B, M) of the reverse samples -> target (B, d) and the effective sample size
    1/Σ w_i² (B,)."""
    weights = torch.softmax(q / temperature, dim=1)
    return (weights[..., None] * eps).sum(1), 1 / weights.square().sum(1)


def q_spread(q, t, num_steps):
    """How much Q varies over the box, on average over states: the standard deviation over reverse samples, q (B, M), of
    the rows in the upper half of the noise levels t (B, 1), where reverse samples are nearly uniform in the box."""
    noisy = t[:, 0] >= t.max().clamp(max=num_steps // 2)  # or those with the most noise, if there are none
    return (q.std(1, correction=0) * noisy).sum() / noisy.sum()


def rsm_loss(denoiser, obs, a_t, t, target, weights=1.0):
    """E ‖ε_θ(s, a_t, t) - target‖². With target = Σ w_i ε_i its gradient is that of the RSM loss Σ w_i ‖ε_θ - ε_i‖²,
    since Σ w_i = 1, but the denoiser is evaluated once instead of M times."""
    prediction = denoiser(obs, a_t[:, None], t[:, 0])[:, 0]
    return (weights * (prediction - target).square().sum(1)).mean()


def mirror_descent_weights(q, q_mean, q_std, alpha):
    """exp(clip((Q - mean)/std, -3, 3)/α): weights of the current policy's actions for π_new ∝ π_old exp(Q/λ)."""
    return torch.exp(((q - q_mean) / q_std).clamp(-3, 3) / alpha)


def policy_lr_factor(n):
    """The policy's learning rate after n policy updates: held for 25k, then linear to a tenth over 50k."""
    return 1 - 0.9 * min(max((n - 25_000) / 50_000, 0), 1)


@torch.no_grad()
def ema_update(average, source, tau):
    """average ← τ source + (1-τ) average, for every parameter of two modules."""
    torch._foreach_lerp_(list(average.parameters()), list(source.parameters()), tau)


def gradient_step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class CudaGraph:
    """A function of tensors that is called three times, then recorded as a CUDA graph, and replayed from then on: the
    same kernels in one launch. Each replay overwrites the tensors that the one before it returned."""

    def __init__(self, function):
        self.function, self.calls, self.graph = function, 0, torch.cuda.CUDAGraph()

    def __call__(self, tensors, generator):
        self.calls += 1
        if self.calls <= 3:  # until kernels are chosen and optimisers set up
            return self.function(tensors, generator)
        if self.calls == 4:
            self.inputs = [x.clone() for x in tensors]
            self.graph.register_generator_state(generator)
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                self.outputs = self.function(self.inputs, generator)
        torch._foreach_copy_(self.inputs, tensors)
        self.graph.replay()
        return self.outputs


class Agent(nn.Module):
    """Policy, critics, their moving averages and optimisers. act() takes actions, update() learns from a batch."""

    def __init__(self, args, obs_dim, action_dim, device):
        super().__init__()
        self.args, self.obs_dim, self.action_dim, self.updates = args, obs_dim, action_dim, 0
        self.policy, self.ema_policy = Denoiser(obs_dim, action_dim), Denoiser(obs_dim, action_dim)
        self.critics, self.target_critics = Critics(obs_dim, action_dim), Critics(obs_dim, action_dim)
        self.ema_policy.load_state_dict(self.policy.state_dict())
        self.target_critics.load_state_dict(self.critics.state_dict())
        self.log_alpha = nn.Parameter(torch.tensor(math.log(INITIAL_ALPHA)))
        self.register_buffer("q_mean", torch.tensor(0.0))  # running statistics, for mirror descent only
        self.register_buffer("q_std", torch.tensor(1.0))
        self.register_buffer("q_spread", torch.tensor(0.0))  # σ_Q, for --temperature relative only; 0 before the first
        self.to(device)
        self.schedule = NoiseSchedule(args.denoising_steps, args.schedule, device)
        adam = partial(torch.optim.Adam, fused=True, capturable=args.cudagraphs)
        self.q_optimizer = adam(self.critics.parameters(), lr=args.q_lr)
        self.policy_optimizer = adam(self.policy.parameters(), lr=torch.tensor(args.policy_lr, device=device))
        self.policy_schedule = torch.optim.lr_scheduler.LambdaLR(self.policy_optimizer, policy_lr_factor)
        self.alpha_optimizer = adam([self.log_alpha], lr=args.alpha_lr)
        if args.compile:
            for network in self.children():
                network.compile(dynamic=True)  # one compilation for all numbers of states
        if args.cudagraphs:
            self.update_critics, self.update_policy = CudaGraph(self.update_critics), CudaGraph(self.update_policy)

    def exploration_std(self):
        return self.args.noise_scale * self.log_alpha.detach().exp()

    def sample(self, policy, obs, generator, std):
        k, bfloat16 = self.args.num_particles, self.args.bfloat16
        return sample_actions(policy, self.critics, self.schedule, obs, k, generator, std, bfloat16)

    def act(self, obs, generator, explore):
        """Actions (B, d) in the environment: from the averaged policy, with exploration noise or without."""
        return self.sample(self.ema_policy, obs, generator, self.exploration_std() if explore else None)

    @torch.no_grad()
    def temperature(self, q, t):
        """λ = α/5. With "relative" it is in units of σ_Q, a running mean of the spread of Q, so that neither the scale
        of the rewards nor the progress of the critics matters to the weights; q (B, M) of reverse samples."""
        temperature = LAMBDA_PER_ALPHA * self.log_alpha.exp()
        if self.args.temperature == "fixed":
            return temperature
        spread = q_spread(q, t, self.args.denoising_steps)
        self.q_spread.copy_(torch.where(self.q_spread == 0, spread, self.q_spread.lerp(spread, 0.01)))
        return temperature * self.q_spread.clamp(min=1e-8)

    def update_critics(self, batch, generator):
        """Mean squared error to r + γ min_j Q̄_j(s', a'); unlike SAC, no entropy bonus. Returns metrics and a'."""
        obs, actions, rewards, next_obs, terminations = batch
        args, alpha, std = self.args, self.log_alpha.detach().exp(), self.exploration_std()
        next_actions = self.sample(self.policy, next_obs, generator, std)
        with torch.no_grad():
            next_q = self.target_critics(next_obs, next_actions[:, None]).amin(0)[:, 0]
            target_q = args.reward_scale * rewards + args.gamma * (1 - terminations) * next_q
        q = self.critics(obs, actions[:, None])[..., 0]
        q_losses = (q - target_q).square().mean(1)
        gradient_step(self.q_optimizer, q_losses.sum())
        metrics = {"qf1_values": q[0].mean(), "qf2_values": q[1].mean(), "alpha": alpha, "exploration_std": std}
        metrics |= {"qf1_loss": q_losses[0], "qf2_loss": q_losses[1], "qf_loss": q_losses.mean()}
        return {name: value.detach() for name, value in metrics.items()}, next_actions

    def update_policy(self, batch, generator):
        """Denoise towards π ∝ exp(Q/λ), or with mirror descent towards π_new ∝ π_old exp(Q/λ). Returns metrics."""
        obs, _, _, next_obs, _, next_actions = batch
        args = self.args
        t = torch.randint(args.denoising_steps, (len(obs), 1), generator=generator, device=obs.device)
        eps = torch.randn(next_actions.shape, generator=generator, device=obs.device)
        if args.weighting == "max-entropy":
            if args.anchor == "next":
                obs, a_0 = next_obs, next_actions
            else:
                a_0 = self.sample(self.policy, obs, generator, self.exploration_std())
            a_t = self.schedule.add_noise(a_0, eps, t)
            shape = (len(obs), args.num_reverse_samples, self.action_dim)
            uniform = torch.rand(shape, generator=generator, device=obs.device)
            eps, a_hat = reverse_samples(self.schedule, a_t, t, uniform, args.reverse_proposal)
            with torch.no_grad():
                q = self.critics(obs, a_hat).amin(0)
            temperature = self.temperature(q, t)
            target, ess = rsm_target(eps, q, temperature)
            loss = rsm_loss(self.policy, obs, a_t, t, target)
        else:
            with torch.no_grad():
                q = self.critics(next_obs, next_actions[:, None]).amin(0)[:, 0]
                self.q_mean.lerp_(q.mean(), 0.001)
                self.q_std.lerp_(q.std(), 0.001)
            temperature = self.log_alpha.detach().exp()
            weights = mirror_descent_weights(q, self.q_mean, self.q_std, temperature)
            ess = weights.sum().square() / weights.square().sum()
            a_t = self.schedule.add_noise(next_actions, eps, t)
            loss = rsm_loss(self.policy, next_obs, a_t, t, eps, weights)
        gradient_step(self.policy_optimizer, loss)
        return {"rsm_loss": loss.detach(), "effective_sample_size": ess.mean(), "temperature": temperature}

    def update_alpha(self):
        """Moves the entropy of the exploration noise, N(0, (noise_scale α)² I), to its target."""
        entropy = self.action_dim * (0.5 * math.log(2 * math.pi * math.e) + self.exploration_std().log())
        target_entropy = self.action_dim * TARGET_ENTROPY_PER_DIMENSION
        gradient_step(self.alpha_optimizer, -self.log_alpha * (target_entropy - entropy))

    def update(self, batch, generator):
        """One update from a batch of the replay buffer. Returns what it measured, as tensors that nobody waits for."""
        self.updates += 1
        metrics, next_actions = self.update_critics(batch, generator)
        if self.updates % self.args.policy_frequency == 0:
            metrics = metrics | self.update_policy((*batch, next_actions), generator)
            self.policy_schedule.step()
        if self.updates % self.args.alpha_frequency == 0:
            self.update_alpha()
        if self.updates % self.args.target_network_frequency == 0:
            ema_update(self.target_critics, self.critics, self.args.tau)
            ema_update(self.ema_policy, self.policy, self.args.tau)
        return metrics


# ---- Environments ----


def make_env(env_id, video=None):
    """The task with actions rescaled from its own bounds to [-1, 1]; its first episode is filmed if video is a path."""
    env = gym.make(env_id, render_mode="rgb_array" if video else None)
    if video:
        first = lambda episode: episode == 0  # noqa: E731
        env = gym.wrappers.RecordVideo(env, video.parent, first, name_prefix=video.name, disable_logger=True)
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


def make_vector_env(env_fns):
    # With SAME_STEP, an episode's true last observation is in infos["final_obs"] and no step is spent on the reset
    return gym.vector.SyncVectorEnv(env_fns, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


def final_observations(next_obs, infos):
    """Observations that the actions led to: of an episode that ended, its last one, not the first after the reset."""
    next_obs = next_obs.copy()
    for i in np.flatnonzero(infos.get("_final_obs", [])):
        next_obs[i] = infos["final_obs"][i].reshape(next_obs[i].shape)  # or else it could be broadcast
    return next_obs


def evaluate(agent, args, device, video=None):
    """Mean and spread of the returns of --eval-episodes episodes, one per environment, without exploration noise.

    Every evaluation starts from the same seeds and leaves the training's environments and random stream alone."""
    n, seed = args.eval_episodes, args.seed + 1_000_000
    envs = make_vector_env([partial(make_env, args.env_id, video if i == 0 else None) for i in range(n)])
    generator = torch.Generator(device).manual_seed(seed)
    obs, _ = envs.reset(seed=seed)
    returns, lengths, running = np.zeros(n), np.zeros(n), np.ones(n, dtype=bool)
    while running.any():
        actions = agent.act(torch.as_tensor(obs, dtype=torch.float32, device=device), generator, explore=False)
        obs, rewards, terminations, truncations, _ = envs.step(actions.cpu().numpy())
        returns += rewards * running
        lengths += running
        running &= ~(terminations | truncations)
    envs.close()
    result = {"episodic_return": returns.mean(), "episodic_return_std": returns.std()}
    return result | {"episodic_length": lengths.mean()}


# ---- Input, devices, files ----


def fail(message, status=2):
    """One sentence on stderr. Exit status 2: bad input, before anything is written; 1: training cannot go on."""
    print("error:", *message.split(), file=sys.stderr)
    sys.exit(status)


def validate(args):
    """Refuse bad arguments, in one sentence, before any work. Returns the task's obs_dim and action_dim."""
    limits = {
        "seed": (0 <= args.seed < 2**31, "from 0 to 2147483647"),
        "gamma": (0 <= args.gamma <= 1, "from 0 to 1"),
        "tau": (0 < args.tau <= 1, "above 0 and at most 1"),
    }
    for name, value in asdict(args).items():
        if type(value) is int:
            limits.setdefault(name, (value >= 1, "of at least 1"))
        elif type(value) is float:
            limits.setdefault(name, (0 < value < math.inf, "above 0 and finite"))
    for name, (allowed, interval) in limits.items():
        if not allowed:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; give a value {interval}")
    if args.learning_starts > args.total_timesteps:
        fail(f"--learning-starts {args.learning_starts} is beyond --total-timesteps {args.total_timesteps}; lower it")
    stored = min(args.learning_starts // args.num_envs * args.num_envs, args.buffer_size)
    if args.batch_size > stored or args.num_envs > args.buffer_size:
        fail(
            f"--batch-size {args.batch_size} is more than the {stored} transitions stored when learning starts; "
            "lower it, or raise --learning-starts or --buffer-size"
        )
    try:
        env = gym.make(args.env_id, render_mode=None)
    except Exception as error:  # a task's constructor may raise anything
        similar = difflib.get_close_matches(args.env_id, gym.registry.keys() - {args.env_id}, n=3)
        hint = f"; similar names: {', '.join(similar)}" if similar else ""
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        fail(f"--env-id {args.env_id} cannot be made: {reason}{hint}")
    for kind, space in {"observations": env.observation_space, "actions": env.action_space}.items():
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1 or space.dtype.kind != "f":
            fail(f"{args.env_id} has {kind} in {space}; choose a task with real vectors, as MuJoCo's have")
    if not np.isfinite([env.action_space.low, env.action_space.high]).all():
        fail(f"{args.env_id} has unbounded actions, {env.action_space}; choose a task with finite bounds")
    if not (env.action_space.low < env.action_space.high).all():
        fail(f"{args.env_id} has actions without a range, {env.action_space}; choose a task where low < high")
    if args.capture_video:
        try:
            film = gym.make(args.env_id, render_mode="rgb_array")
            film.reset(seed=args.seed)
            film.render()
            film.close()
        except Exception as error:
            sys.unraisablehook = lambda _: None  # the half-made renderer fails once more when it is deleted
            fail(
                f"--capture-video cannot render {args.env_id} ({type(error).__name__}); set MUJOCO_GL=egl (with a GPU) "
                "or MUJOCO_GL=osmesa (without one; needs the OSMesa library)"
            )
    return env.observation_space.shape[0], env.action_space.shape[0]


def set_up_torch(args):
    """Seed, determinism, and what makes PyTorch fast. Returns the device; turns --compile off where it cannot work."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    missing = " (--cuda is on, but PyTorch finds no CUDA device)" if args.cuda and device.type == "cpu" else ""
    print(f"device: {torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'}{missing}", flush=True)
    torch.manual_seed(args.seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # would write the whole replay buffer at the start
    cpu = torch.cpu.get_capabilities()
    if cpu.get("avx512_bw") and not cpu.get("amx_bf16"):  # here "bf16" means oneDNN instead of MKL, still in float32:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # twice as fast on AMD; only AMX would round to bfloat16
    if sys.platform == "linux":  # malloc keeps what is freed; or else each large tensor is mapped anew, page by page
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
    args.bfloat16 &= device.type == "cpu" and bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    args.cudagraphs &= device.type == "cuda"
    if args.cudagraphs:
        torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot be recorded
    if args.compile:
        try:
            torch.compile(torch.neg)(torch.zeros(2, device=device))
        except Exception:
            args.compile = False
            print("compile: off, since torch.compile finds no compiler here")
    return device


def free_memory(device):
    """Bytes that can still be allocated on the device; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not os.path.exists("/proc/meminfo"):
        return math.inf
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def save(path, args, contents):
    """torch.save through a temporary file in the same folder, so that path always holds a whole file."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"algorithm": ALGORITHM, "args": asdict(args), **contents}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(flag, path, name):
    """What save() wrote, and its arguments. What is damaged or not of this script is refused, and nothing executed."""
    path = Path(path)
    path = path / name if path.is_dir() else path
    if not path.is_file():
        fail(f"{flag}: there is no file {path}; give the {name} that a training run wrote, or its folder")
    try:
        if zipfile.ZipFile(path).testzip():  # compares checksums, which torch.load does not
            raise zipfile.BadZipFile
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if contents["algorithm"] == ALGORITHM:
            args = Args(**contents["args"])
            for field in fields(args):
                value, types = getattr(args, field.name), get_args(field.type) or [field.type]
                if type(value) not in types and value not in types:  # the values of a Literal are its types
                    raise TypeError
            return contents, args
        reason = f"of {str(contents['algorithm'])[:9]}, not of {ALGORITHM}"
    except Exception as error:  # damaged files raise many kinds of errors
        reason = f"damaged, or not a {name} of this version ({type(error).__name__})"
    fail(f"{flag}: {path} is {reason}; give another file or train again")


def append_row(path, *row):
    with open(path, "a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow(row)


RESUME_MAY_CHANGE = "resume total_timesteps eval_frequency eval_episodes checkpoint_frequency capture_video save_model "
RESUME_MAY_CHANGE += "track wandb_project_name wandb_entity"


def parse(argv=None):
    """Arguments and checkpoint. With --resume they are the checkpoint's; a few may change from the command line."""
    args = tyro.cli(Args, args=argv)
    if args.resume is None:
        return args, None
    checkpoint, saved = load("--resume", args.resume, "checkpoint.pt")
    if ":" in saved.env_id and args.env_id != saved.env_id:
        fail(f"--resume: {args.resume} imports a module; if you trust it, add --env-id {saved.env_id}")
    args = tyro.cli(Args, args=argv, default=replace(saved, resume=args.resume))
    for name, value in vars(args).items():
        if value != getattr(saved, name) and name not in RESUME_MAY_CHANGE.split():
            fail(f"--resume: --{name.replace('_', '-')} is {getattr(saved, name)} and cannot change; leave it out")
    return args, checkpoint


# ---- Training ----


def train(args, agent, device, checkpoint):
    """The training loop. Whatever goes wrong ends it with one sentence; the last good state is in checkpoint.pt."""
    run_dir = Path("runs") / re.sub("[/:]", "-", f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}")
    if checkpoint:
        run_dir = Path(args.resume).resolve()
        run_dir = run_dir if run_dir.is_dir() else run_dir.parent
    elif os.path.exists(run_dir):
        fail(f"{run_dir} belongs to a run that began in the same second; start again")
    path, video_dir = run_dir / "checkpoint.pt", Path("videos") / run_dir.name
    generator = torch.Generator(device).manual_seed(args.seed)
    buffer = ReplayBuffer(args.buffer_size, agent.obs_dim, agent.action_dim, device)
    learners = {"agent": agent} | {name: part for name, part in vars(agent).items() if hasattr(part, "state_dict")}
    global_step, seconds, evaluations = 0, 0.0, []
    logs = {"metrics.csv": "global_step,updates,episodic_return,episodic_return_std,episodic_length\n"}
    logs |= {"timing.csv": "global_step,updates,seconds,evaluation_seconds\n"}
    if checkpoint:
        try:
            for name, learner in learners.items():
                learner.load_state_dict(checkpoint[name])
            for group in agent.policy_optimizer.param_groups:
                group["lr"] = group["lr"].to(device)  # a tensor, which was loaded to the CPU
            generator.set_state(checkpoint["generator"])
            agent.updates, global_step, seconds = (int(checkpoint[k]) for k in ("updates", "step", "seconds"))
            buffer.filled, buffer.position = min(global_step, buffer.size), global_step % buffer.size
            buffer.rows[: buffer.filled] = checkpoint["rows"].view(buffer.filled, buffer.rows.shape[1])
            evaluations = [(float(result), str(line)) for result, line in checkpoint["evaluations"]]
            logs = {name: str(checkpoint["logs"][name]) for name in logs}  # without what came after the checkpoint
        except Exception as error:
            fail(f"--resume: {args.resume} does not fit {args.env_id} on {device} ({type(error).__name__})")

    def stop(reason):
        kept = f"the last good state is in {path} (--resume {run_dir})" if os.path.exists(path) else "nothing is saved"
        fail(f"{reason} at step {global_step}; {kept}", 1)

    @contextmanager
    def guard(what, save_step=None):
        """A failure of the surroundings (environment, disk, ...) ends the run with one sentence and its state saved."""
        try:
            yield
        except Exception as error:
            if save_step is not None:
                save_checkpoint(save_step)
            while error.__context__ and not isinstance(error, OSError):
                error = error.__context__  # torch.save hides that the disk is full
            stop(f"{what} failed ({type(error).__name__}: {error})")

    @contextmanager
    def tracking():
        """A failure of TensorBoard or W&B is a warning."""
        try:
            yield
        except Exception as error:
            warnings.warn(f"TensorBoard or W&B failed ({error}); the training goes on", stacklevel=1)

    def log(name, value):
        with tracking():
            writer.add_scalar(name, value, global_step)

    def check(values, what):
        if not (abs(values) <= torch.finfo(torch.float32).max).all():
            stop(f"{what} was not finite")

    def save_checkpoint(step):
        """Everything that the rest of the training depends on, if it is finite."""
        for name, values in (metrics | agent.state_dict()).items():
            check(values, name)
        start = time.time()
        with guard(f"writing {path}"):
            state = {name: learner.state_dict() for name, learner in learners.items()}
            state["rows"] = torch.from_numpy(buffer.rows[: buffer.filled].cpu().numpy())  # not the empty ones behind
            state["logs"] = {name: (run_dir / name).read_text() for name in logs}
            state |= {"generator": generator.get_state(), "updates": agent.updates, "step": step}
            save(path, args, state | {"seconds": start - start_time, "evaluations": evaluations})
        with tracking():
            writer.add_scalar("charts/checkpoint_seconds", time.time() - start, step)
            writer.flush()

    def new_episodes():
        """Episodes begin anew with every scheduled checkpoint, so that none needs the state of a simulator."""
        seed = np.random.SeedSequence((args.seed, global_step)).generate_state(1)[0] // 2
        with guard(args.env_id):
            return envs.reset(seed=int(seed))[0]

    def on_signal(number, _):
        """The loop ends after this step; a second signal ends the process at once."""
        signals.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    if args.track:
        import wandb

        project = {"project": args.wandb_project_name, "entity": args.wandb_entity}
        project |= {"id": run_dir.name, "name": run_dir.name, "resume": "allow"}
        wandb.init(**project, config=asdict(args), sync_tensorboard=True, save_code=True)
    with guard(f"writing into {run_dir}"):
        writer = SummaryWriter(run_dir, purge_step=global_step + 1)
        for name, text in logs.items():
            (run_dir / name).write_text(text)
    table = "".join(f"|{name}|{value}|\n" for name, value in asdict(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")

    envs = make_vector_env([partial(make_env, args.env_id)] * args.num_envs)
    envs = gym.wrappers.vector.RecordEpisodeStatistics(envs)
    to_tensor = partial(torch.as_tensor, dtype=torch.float32, device=device)
    eval_frequency = args.eval_frequency or max(args.total_timesteps // 20, args.num_envs)
    checkpoint_frequency = args.checkpoint_frequency or eval_frequency
    recent_returns, metrics, signals = deque(maxlen=20), {}, []
    start_time = time.time() - seconds
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, on_signal)
    if not checkpoint:
        save_checkpoint(0)
    steps = range(global_step + args.num_envs, args.total_timesteps + 1, args.num_envs)
    bar = tqdm(steps, unit="step", unit_scale=args.num_envs, disable=None)  # None: quiet when not a terminal
    obs = new_episodes()
    for global_step in bar:
        check(obs, "an observation")
        if global_step <= args.learning_starts:
            actions = 2 * torch.rand(args.num_envs, agent.action_dim, generator=generator, device=device) - 1
        else:
            actions = agent.act(to_tensor(obs), generator, explore=True)
        actions_for_envs = actions.cpu().numpy()
        check(actions_for_envs, "an action")
        if global_step > args.learning_starts:  # before the environments step, so that a GPU works meanwhile
            metrics |= agent.update(buffer.sample(args.batch_size, generator), generator)
        with guard(args.env_id, save_step=global_step - args.num_envs):
            next_obs, rewards, terminations, truncations, infos = envs.step(actions_for_envs)
            last_obs = final_observations(next_obs, infos)
        check(rewards, "a reward")
        check(last_obs, "an observation")
        # A truncated episode has not terminated: its last state has a future, so the critics bootstrap from it
        buffer.add(to_tensor(obs), actions, to_tensor(rewards), to_tensor(last_obs), to_tensor(terminations))
        obs = next_obs
        for i in np.flatnonzero(terminations | truncations):
            recent_returns.append(infos["episode"]["r"][i])
            log("charts/episodic_return", infos["episode"]["r"][i])
            log("charts/episodic_length", infos["episode"]["l"][i])

        if metrics and agent.updates % 100 == 0:
            for name, value in metrics.items():
                check(value, name)
                log(f"losses/{name}", value.item())
            log("charts/policy_lr", agent.policy_schedule.get_last_lr()[0])
            sps = int(global_step / (time.time() - start_time))
            log("charts/SPS", sps)
            bar.set_postfix(SPS=sps, episodic_return=np.mean(recent_returns or math.nan))

        if global_step % eval_frequency < args.num_envs or global_step == steps[-1]:
            eval_start = time.time()
            video = video_dir / f"step-{global_step}" if args.capture_video else None
            with guard("the evaluation"):
                result = evaluate(agent, args, device, video)
                check(np.array([*result.values()]), "the return of the evaluation")
                now = time.time()
                append_row(run_dir / "metrics.csv", global_step, agent.updates, *result.values())
                append_row(run_dir / "timing.csv", global_step, agent.updates, now - start_time, now - eval_start)
            for name, value in result.items():
                log(f"eval/{name}", value)
            if args.track and video:
                with tracking():
                    wandb.log({"eval/video": wandb.Video(str(next(video_dir.glob(f"{video.name}-*.mp4"))))})
            line = "evaluation at step {}: return {:.1f} ± {:.1f}, length {:.0f}".format(global_step, *result.values())
            evaluations.append((float(result["episodic_return"]), line))
            bar.write(line)
            sys.stdout.flush()

        if signals or global_step % checkpoint_frequency < args.num_envs or global_step == steps[-1]:
            save_checkpoint(global_step)
            if signals:
                bar.write(f"interrupted after step {global_step}; --resume {run_dir} goes on")
                sys.exit(128 + signals[0])
            obs = new_episodes()

    envs.close()
    with tracking():
        writer.close()
    if evaluations:
        print(f"final {evaluations[-1][1]}\nbest  {max(evaluations)[1]}")
    if args.save_model:
        model = {"policy": agent.ema_policy.state_dict(), "critics": agent.critics.state_dict()}
        model["q_spread"] = agent.q_spread  # σ_Q of --temperature relative
        with guard("writing model.pt"):
            save(run_dir / "model.pt", args, model)
        print(f"watch: python {Path(__file__).name} --env-id {args.env_id} --evaluate {run_dir} --capture-video")
    if args.track:
        with tracking():
            wandb.finish()


def main(args, checkpoint=None):
    """Trains, goes on with the training of a checkpoint, or evaluates a trained model."""
    warnings.filterwarnings("ignore", message=".*out of date")  # -v4 tasks are the ones with published results
    warnings.filterwarnings("ignore", message="compiler attribute")  # the HalfCheetah model under MuJoCo 4
    warnings.filterwarnings("ignore", message=".*Overwriting existing videos")  # one folder a run, one file each
    mujoco.set_mju_user_warning(warnings.warn)  # or else MuJoCo writes a log file into the working folder
    if args.evaluate is not None:
        model, saved = load("--evaluate", args.evaluate, "model.pt")
        if saved.env_id != args.env_id:
            fail(f"--evaluate: {args.evaluate} was trained on {saved.env_id}; add --env-id {saved.env_id}")
        chosen = "exp_name seed torch_deterministic cuda compile cudagraphs capture_video evaluate eval_episodes"
        args = replace(saved, **{name: getattr(args, name) for name in chosen.split()})
    obs_dim, action_dim = validate(args)
    device = set_up_torch(args)
    agent = Agent(args, obs_dim, action_dim, device)
    if args.evaluate is None:
        train(args, agent, device, checkpoint)
        return
    try:
        agent.ema_policy.load_state_dict(model["policy"])
        agent.critics.load_state_dict(model["critics"])
        agent.q_spread.copy_(model["q_spread"])
    except Exception:
        fail(f"--evaluate: {args.evaluate} does not fit the networks for {args.env_id}; train a new model")
    name = re.sub("[/:]", "-", f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}")
    video = Path("videos") / name / "evaluation"
    result = evaluate(agent, args, device, video if args.capture_video else None)
    print("evaluation: return {:.1f} ± {:.1f}, length {:.0f}".format(*result.values()))


if __name__ == "__main__":
    main(*parse())
