"""Soft Actor-Critic (SAC) in one file, the baseline of sdac_continuous_action.py.

The policy is a Gaussian squashed by tanh into the box of actions. It maximises
E[Q(s, a) - α log π(a|s)], and α is tuned so that the entropy of the policy stays near -d.

    python sac_continuous_action.py --env-id Humanoid-v4

Paper: Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", arXiv 1812.05905.
The rest is SDAC's, even its one update per joint step of 5 environments (usually it is of one).
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
    tau: float = 0.01  # rate of the averages, per update
    batch_size: int = 256  # transitions
    policy_lr: float = 1e-3  # learning rate at the start
    q_lr: float = 1e-3  # the same; also alpha's, constant
    reward_scale: float = 0.2  # factor of rewards

    def check(self):
        limits = {"seed": (0, 2**31), "gamma": (0, 1), "tau": (0, 1)}
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


class Actor(nn.Module):
    """Mean and log standard deviation of the Gaussian before tanh."""

    def __init__(self, obs_dim, action_dim):
        super().__init__()
        self.input_layer = nn.Linear(obs_dim, 256)
        self.hidden_layers = nn.ModuleList([nn.Linear(256, 256), nn.Linear(256, 256)])
        self.output_layer = nn.Linear(256, 2 * action_dim)

    def forward(self, obs):
        """obs (B, obs_dim) -> mean (B, d), log_std (B, d)"""
        h = mish(self.input_layer(obs))
        for layer in self.hidden_layers:
            h = mish(layer(h))
        mean, log_std = self.output_layer(h).chunk(2, dim=1)
        return mean, -5 + 3.5 * (log_std.tanh() + 1)  # log_std between -5 and 2


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


# ---- Policy
def sample_actions(actor, obs):
    """Draw a = tanh(u) with u ~ N(mean, std²), and compute its log-density
    log π(a|s) = Σ [log N(u; mean, std²) - log(1 - tanh² u)].
    obs (B, obs_dim) -> actions (B, d), log π (B,)"""
    mean, log_std = actor(obs)
    eps = torch.randn(mean.shape)
    u = mean + log_std.exp() * eps
    log_normal = -eps.square() / 2 - log_std - math.log(2 * math.pi) / 2
    log_derivative = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh² u)
    return u.tanh(), (log_normal - log_derivative).sum(1)


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
    """The policy, the critics, the target critics, alpha and the optimisers."""

    def __init__(self, args, obs_dim, action_dim):
        super().__init__()
        self.args = args
        self.action_dim = action_dim
        self.updates = 0
        self.evaluations = []  # step, updates, mean and standard deviation of the return
        self.exit_status = None  # set by a signal to end the run
        self.metrics = {}

        self.policy = Actor(obs_dim, action_dim)
        self.critics = Critics(obs_dim, action_dim)
        self.target_critics = copy.deepcopy(self.critics)
        self.log_alpha = nn.Parameter(torch.tensor(0.0))

        adam = partial(torch.optim.Adam, fused=True, capturable=torch.empty(0).is_cuda)
        self.policy_optimizer = adam(self.policy.parameters(), lr=torch.tensor(args.policy_lr))
        self.q_optimizer = adam(self.critics.parameters(), lr=torch.tensor(args.q_lr))
        self.alpha_optimizer = adam([self.log_alpha], lr=torch.tensor(args.q_lr))
        self.optimizers = [self.policy_optimizer, self.q_optimizer, self.alpha_optimizer]

        self.update_critics = CudaGraph(self.update_critics)
        self.update_policy = CudaGraph(self.update_policy)

    @torch.no_grad()
    def act(self, obs, explore=True):
        """Return actions (B, d): samples of the policy, or the tanh of its mean."""
        return sample_actions(self.policy, obs)[0] if explore else self.policy(obs)[0].tanh()

    def update(self, batch, progress):
        """Learn from a batch of transitions. `progress` goes from 0, at the first update, to 1."""
        args = self.args
        self.updates += 1

        # Lower the learning rates in place: CUDA graphs read them.
        self.policy_optimizer.param_groups[0]["lr"].fill_(args.policy_lr * (1 - progress))
        self.q_optimizer.param_groups[0]["lr"].fill_(args.q_lr * (1 - progress))

        self.metrics.update(self.update_critics(*batch))
        self.metrics.update(self.update_policy(batch[0]))
        update_average(self.target_critics, self.critics, args.tau)

    def update_critics(self, obs, actions, rewards, next_obs, terminations):
        """Fit Q_j to r + γ (min_j Q̄_j(s', a') - α log π(a'|s'))."""
        args = self.args
        with torch.no_grad():
            next_actions, log_prob = sample_actions(self.policy, next_obs)
            next_q = self.target_critics.minimum(next_obs, next_actions[:, None])[:, 0]
            next_q = next_q - self.log_alpha.exp() * log_prob
            target_q = args.reward_scale * rewards + args.gamma * (1 - terminations) * next_q
        q = self.critics(obs, actions[:, None])[..., 0]
        loss = (q - target_q).square().mean(1).sum()
        gradient_step(self.q_optimizer, loss)
        return {"q_values": q.mean().detach(), "q_loss": loss.detach()}

    def update_policy(self, obs):
        """Raise E[min_j Q_j - α log π]; raise α if the entropy is below -d, else lower it."""
        actions, log_prob = sample_actions(self.policy, obs)
        self.critics.requires_grad_(False)  # Their weights need no gradients here.
        q = self.critics.minimum(obs, actions[:, None])[:, 0]
        loss = (self.log_alpha.exp().detach() * log_prob - q).mean()
        gradient_step(self.policy_optimizer, loss)
        self.critics.requires_grad_(True)
        entropy = -log_prob.detach().mean()
        alpha = self.log_alpha.exp()
        gradient_step(self.alpha_optimizer, alpha * (entropy + self.action_dim))
        return {"policy_loss": loss.detach(), "entropy": entropy, "alpha": alpha.detach()}


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
    args = tyro.cli(Args, args=argv)
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
        for name in ("env_id", "buffer_size"):
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
