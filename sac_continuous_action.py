"""Soft Actor-Critic (SAC): the baseline of sdac_continuous_action.py, in one file on the same skeleton.

The policy is a Gaussian squashed by tanh into the box of actions; it maximises E[min_j Q_j(s, a) - α log π(a|s)],
and the temperature α is tuned so that the policy's entropy stays near its target of -d.

    python sac_continuous_action.py --env-id Humanoid-v4 --cuda     # train; curves: tensorboard --logdir runs
    python sac_continuous_action.py --evaluate runs/<run name> --capture-video

Paper: Haarnoja, Zhou, Hartikainen, et al., "Soft Actor-Critic Algorithms and Applications", arXiv 1812.05905.
What is not the algorithm is SDAC's: environments, warm-up, critics, batch, learning rates, reward scale, and one update
per step of 5 environments. --num-envs 1 is the classic one update per environment step.
Notation: s observation, a action in [-1, 1]^d.  Shapes: B batch, d action dimension, N actions per state."""

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

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read with torch; idle threads soon sleep and let other programs work
import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG_STD_MIN, LOG_STD_MAX = -5, 2
REPORT = "evaluation at step {}: return {:.1f} +/- {:.1f}, length {:.0f}"


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
    policy_lr: float = 3e-4  # learning rate of the policy
    q_lr: float = 3e-4  # learning rate of the critics
    policy_frequency: int = 1  # updates per policy update
    target_network_frequency: int = 1  # updates per step of the moving average
    reward_scale: float = 0.2  # rewards are multiplied by this before they reach the critics
    alpha_lr: float = 3e-4  # learning rate of log α

    def __post_init__(self):
        if self.learning_starts is None:
            self.learning_starts = min(30_000, max(self.total_timesteps // 10, self.batch_size))


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

    def forward(self, context, actions):
        """Context (B, c), actions (B, N, d) -> (*ensemble, B, N, output_dim)."""
        context_weight, action_weight = self.weights[0].split(self.inputs, dim=-2)
        context = context @ context_weight + self.biases[0]
        h = (actions.flatten(0, 1) @ action_weight).unflatten(-2, actions.shape[:2])
        h = mish(context[..., None, :] + h).flatten(-3, -2)
        for weight, bias in zip(self.weights[1:-1], self.biases[1:-1], strict=True):
            h = mish(h @ weight + bias)
        return (h @ self.weights[-1] + self.biases[-1]).unflatten(-2, actions.shape[:2])


class Actor(nn.Module):
    def __init__(self, obs_dim, action_dim, hidden_dim=256):
        super().__init__()
        sizes = [obs_dim, hidden_dim, hidden_dim, hidden_dim, 2 * action_dim]
        self.layers = nn.ModuleList([nn.Linear(fan_in, fan_out) for fan_in, fan_out in itertools.pairwise(sizes)])

    def forward(self, obs):
        """Mean and log standard deviation (B, d) of the Gaussian before tanh, the latter squashed into its range."""
        for layer in self.layers[:-1]:
            obs = mish(nn.functional.linear(obs, layer.weight) + layer.bias)
        mean, log_std = self.layers[-1](obs).chunk(2, dim=1)
        return mean, LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(log_std) + 1)


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


def sample_actions(actor, obs, generator):
    """a = tanh(u), u ~ N(mean, std²), and its log-density on (-1, 1)^d, by the change of variables

    log π(a|s) = Σ [log N(u; mean, std²) - log(1 - tanh² u)].    obs (B, obs_dim) -> actions (B, d), log π (B,)"""
    mean, log_std = actor(obs)
    eps = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    u = mean + log_std.exp() * eps
    log_normal = -0.5 * eps.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_derivative = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))  # log(1 - tanh² u) without cancellation
    return u.tanh(), (log_normal - log_derivative).sum(1)


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
        self.policy, self.critics = Actor(obs_dim, action_dim), MLP(obs_dim, action_dim, 1, ensemble=(2,))
        self.target_critics = copy.deepcopy(self.critics)
        self.log_alpha = nn.Parameter(torch.tensor(0.0))
        self.to(device)
        adam = partial(torch.optim.Adam, fused=True, capturable=not on_cpu)
        self.q_optimizer = adam(self.critics.parameters(), lr=args.q_lr)
        self.policy_optimizer = adam(self.policy.parameters(), lr=args.policy_lr)
        self.alpha_optimizer = adam([self.log_alpha], lr=args.alpha_lr)
        self.optimizers = [self.q_optimizer, self.policy_optimizer, self.alpha_optimizer]
        if args.compile and on_cpu:
            for network in self.children():
                network.compile(dynamic=True)  # one compilation for all numbers of states
        self.update_critics, self.update_policy = CudaGraph(self.update_critics), CudaGraph(self.update_policy)

    @torch.no_grad()
    def act(self, obs, generator, explore=True):
        """Actions (B, d): samples of the policy, or the tanh of its mean."""
        return sample_actions(self.policy, obs, generator)[0] if explore else self.policy(obs)[0].tanh()

    def update(self, batch, generator):
        """One update from a batch of the replay buffer. Returns what it measured, as tensors that nobody waits for."""
        args, (obs, *_) = self.args, batch
        self.updates += 1
        metrics = self.update_critics(*batch, generator=generator)
        if self.updates % args.policy_frequency == 0:
            metrics = metrics | self.update_policy(obs, generator=generator)
        if self.updates % args.target_network_frequency == 0:
            with torch.no_grad():  # average ← τ source + (1-τ) average
                for average, source in [(self.target_critics, self.critics)]:
                    torch._foreach_lerp_(list(average.parameters()), list(source.parameters()), args.tau)
        return metrics

    def update_critics(self, obs, actions, rewards, next_obs, terminations, generator):
        """Mean squared error to r + γ (min_j Q̄_j(s', a') - α log π(a'|s')). Returns metrics."""
        args, alpha = self.args, self.log_alpha.detach().exp()
        with torch.no_grad():
            next_actions, next_log_prob = sample_actions(self.policy, next_obs, generator)
            next_q = min_q(self.target_critics, next_obs, next_actions[:, None])[:, 0] - alpha * next_log_prob
            target_q = args.reward_scale * rewards + args.gamma * (1 - terminations) * next_q
        q = self.critics(obs, actions[:, None])[..., 0, 0]
        q_losses = (q - target_q).square().mean(1)
        gradient_step(self.q_optimizer, q_losses.sum())
        metrics = {"qf1_values": q[0].mean(), "qf2_values": q[1].mean(), "qf_loss": q_losses.mean(), "alpha": alpha}
        metrics |= {"qf1_loss": q_losses[0], "qf2_loss": q_losses[1]}
        return {name: value.detach() for name, value in metrics.items()}

    def update_policy(self, obs, generator):
        """Maximise min_j Q_j(s, a) - α log π(a|s); raise α while the policy's entropy is below its target -d, lower it
        while it is above. Returns metrics."""
        alpha, (new_actions, log_prob) = self.log_alpha.detach().exp(), sample_actions(self.policy, obs, generator)
        self.critics.requires_grad_(False)  # here the gradient is wanted in the actions, not in the critics' weights
        loss = (alpha * log_prob - min_q(self.critics, obs, new_actions[:, None])[:, 0]).mean()
        gradient_step(self.policy_optimizer, loss)
        self.critics.requires_grad_(True)
        entropy, target_entropy = -log_prob.detach().mean(), -self.action_dim
        gradient_step(self.alpha_optimizer, -self.log_alpha.exp() * (target_entropy - entropy))
        return {"actor_loss": loss.detach(), "entropy": entropy}


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
