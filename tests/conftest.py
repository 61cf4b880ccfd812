"""Shared by the tests: the settings of a tiny run, tasks made up for tests, and processes."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sdac_continuous_action as sdac

ROOT = Path(sdac.__file__).parent
SMALL = {"num_envs": 2, "batch_size": 16, "eval_episodes": 2}
SMALL_SDAC = {"denoising_steps": 3, "num_reverse_samples": 4}
SMALL_SDAC |= {"num_particles": 2, "num_eval_particles": 2}
PENDULUM = "--no-cuda --env-id InvertedPendulum-v4 --learning-starts 20 --total-timesteps 40"
PENDULUM = f"{PENDULUM} --eval-frequency 20 --buffer-size 100".split()
BOX = gym.spaces.Box(-1, 1, (2,))
STARTED = []  # processes
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes
torch.set_num_threads(1)
torch.set_flush_denormal(True)  # as in the scripts
mujoco.set_mju_user_warning(warnings.warn)  # or else MuJoCo writes a log file


def pytest_configure(config):
    for known in (".*out of date:DeprecationWarning", "compiler attribute:UserWarning"):
        config.addinivalue_line("filterwarnings", f"ignore:{known}")  # of the -v4 tasks


def small_flags(script):
    """Flags of a small run, without the task and the number of steps."""
    small = SMALL | (SMALL_SDAC if script == "sdac_continuous_action" else {})
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in small.items()]
    return ["--no-compile", *(word for pair in pairs for word in pair)]


# Runs inside this process
@pytest.fixture
def train(tmp_path, monkeypatch):
    """Runs main() in an empty folder, by default SDAC for 40 steps; returns the run folder."""
    monkeypatch.chdir(tmp_path)

    def train(*flags, script=sdac):
        known = set(Path("runs").glob("*"))
        go_on = {"--resume", "--evaluate"} & set(flags)
        defaults = ["--no-cuda"] if go_on else [*small_flags(script.__name__), *PENDULUM]
        script.main([*defaults, *map(str, flags)])
        return next(iter(set(Path("runs").glob("*")) - known), None)

    return train


@pytest.fixture
def refused(train, capsys):
    """Asserts that main() ends with one sentence and writes nothing; returns the sentence."""

    def refused(*flags):
        capsys.readouterr()
        before = sorted(Path().rglob("*"))
        with pytest.raises(SystemExit) as caught:
            train(*flags)
        sentence = caught.value.code
        assert isinstance(sentence, str) and "\n" not in sentence.strip(), sentence
        assert sorted(Path().rglob("*")) == before and "evaluation" not in capsys.readouterr().out
        return sentence

    return refused


def load(run_dir, name="checkpoint.pt"):
    return torch.load(Path(run_dir) / name, weights_only=True)


def metrics(run_dir):
    """The rows of metrics.csv as lists of numbers."""
    header, *rows = (Path(run_dir) / "metrics.csv").read_text().splitlines()
    assert header == "global_step,updates,episodic_return,episodic_return_std"
    return [[float(number) for number in row.split(",")] for row in rows]


def evaluated_steps(run_dir):
    return [row[0] for row in metrics(run_dir)]


def scalars(run_dir, tag):
    """What TensorBoard shows under a tag: a list of (step, value)."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


class Killed(BaseException):
    """Ends a run as SIGKILL does: nothing catches it."""


@pytest.fixture
def at_step(monkeypatch):
    """Does something once at one step of a training, before its transitions are stored."""
    add = sdac.ReplayBuffer.add

    def at_step(step, act):
        def watched(buffer, *columns):
            if buffer.added + len(columns[0]) == step:
                monkeypatch.setattr(sdac.ReplayBuffer, "add", add)
                act()
            add(buffer, *columns)

        monkeypatch.setattr(sdac.ReplayBuffer, "add", watched)

    return at_step


# Made-up tasks
class Scripted(gym.Env):
    """Episodes that follow a script, so that every transition can be listed by hand.

    plan[who] lists (length, ending) of the episodes of the who-th environment that is reset; the
    last entry repeats, and environments beyond the plan have episodes of one step. Observation:
    (who, episode, step). Reward: 100 episode + 10 who + step. All share `received`, the actions by
    observation, and `seeds`, the pairs (who, seed) of resets with a seed."""

    def __init__(self, plan, received, seeds, born):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = gym.spaces.Box(np.float32([-3, 1]), np.float32([1, 2]))
        self.plan, self.received, self.seeds, self.born = plan, received, seeds, born
        self.who, self.episode = None, -1

    def observation(self):
        return np.array([self.who, self.episode, self.step_number], np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        if self.who is None:
            self.who = len(self.born)
            self.born.append(self)
        if seed is not None:
            self.seeds.append((self.who, seed))
        self.episode, self.step_number = self.episode + 1, 0
        return self.observation(), {}

    def step(self, action):
        self.received[tuple(self.observation())] = np.array(action)
        self.step_number += 1
        plan = self.plan[self.who] if self.who < len(self.plan) else [(1, "terminated")]
        length, ending = plan[min(self.episode, len(plan) - 1)]
        over = self.step_number == length
        reward = 100.0 * self.episode + 10 * self.who + self.step_number
        terminated, truncated = over and ending != "truncated", over and ending != "terminated"
        return self.observation(), reward, terminated, truncated, {}


class Made(gym.Env):
    """A task with the given spaces and episodes of five steps. It knows no render_mode."""

    def __init__(self, observation_space=BOX, action_space=BOX):
        self.observation_space, self.action_space = observation_space, action_space

    def observe(self):
        return self.observation_space.sample()

    def reward(self):
        return 1.0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        infos = {"episode": self.steps, "_episode": "x"}  # the keys of Gymnasium's statistics
        return self.observe(), self.reward(), False, self.steps == 5, infos


@pytest.fixture
def register(monkeypatch):
    """Registers a task as Made-v0 and returns the flags that choose it."""

    def register(task, **kwargs):
        # A function, since Gymnasium would give each environment copies of the keywords.
        spec = gym.envs.registration.EnvSpec("Made-v0", lambda **given: task(**kwargs, **given))
        monkeypatch.setitem(gym.registry, "Made-v0", spec)
        return ["--env-id", "Made-v0"]

    return register


# Processes
@pytest.fixture(autouse=True)
def nothing_stays():
    """Puts signal handlers and the device back, and ends processes that a failed test left."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for process in STARTED:
        process.kill()
    STARTED.clear()
    for number, handler in before.items():
        signal.signal(number, handler)
    torch.set_default_device("cpu")


def start_process(*flags, cwd, env=None, **options):
    """A small run as a user starts it, without a GPU, a display and an account."""
    dropped = ("DISPLAY", "MUJOCO_GL")
    environ = {k: v for k, v in os.environ.items() if k not in dropped and "WANDB" not in k}
    environ |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"} | (env or {})
    small = [*small_flags("sdac_continuous_action"), *PENDULUM]
    command = [sys.executable, sdac.__file__, *small, *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    STARTED.append(subprocess.Popen(command, cwd=cwd, env=environ, **pipes, **options))
    return STARTED[-1]


def finish(process):
    """Waits for a process; returns its status, output and errors."""
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err
