"""Shared by the tests: both scripts as modules, settings that make a run small, and hand-made environments."""

import importlib
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["sdac_continuous_action", "sac_continuous_action"]
SMALL = {
    "sdac_continuous_action": {"denoising_steps": 3, "num_particles": 2, "num_reverse_samples": 4},
    "sac_continuous_action": {},
}
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # for the subprocesses; as many threads here, so that sums have the same order
torch.set_num_threads(1)
torch.set_flush_denormal(True)  # as in the scripts
mujoco.set_mju_user_warning(warnings.warn)  # or else MuJoCo writes a log file


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="needs --slow"))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow")
    for known in (".*out of date:DeprecationWarning", "compiler attribute:UserWarning"):  # of the -v4 tasks
        config.addinivalue_line("filterwarnings", f"ignore:{known}")


class Scripted(gym.Env):
    """Episodes that follow a script, so that every transition can be listed by hand.

    plan[who] lists (length, ending) of the episodes of the who-th environment that is reset, counted from 0; the last
    entry repeats, and environments beyond the plan have one-step episodes. Observation: (who, episode, step).
    Reward: 100 episode + 10 who + step. `received` records (who, episode, step, action) of every step."""

    plan, born, received = [], 0, []

    def __init__(self, render_mode=None):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = gym.spaces.Box(np.float32([-3, 1]), np.float32([1, 2]))
        self.who, self.episode = None, -1

    def observation(self):
        return np.array([self.who, self.episode, self.step_number], np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        if self.who is None:
            self.who, Scripted.born = Scripted.born, Scripted.born + 1
        self.episode, self.step_number = self.episode + 1, 0
        return self.observation(), {}

    def step(self, action):
        Scripted.received.append((self.who, self.episode, self.step_number, np.array(action)))
        self.step_number += 1
        plan = Scripted.plan[self.who] if self.who < len(Scripted.plan) else [(1, "terminated")]
        length, ending = plan[min(self.episode, len(plan) - 1)]
        over = self.step_number == length
        reward = 100.0 * self.episode + 10 * self.who + self.step_number
        return self.observation(), reward, over and ending != "truncated", over and ending != "terminated", {}


class Spaces(gym.Env):
    """An environment with the given spaces, in which nothing happens and every episode is one step long."""

    def __init__(self, observation_space, action_space, render_mode=None):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, True, {}


STARTED = []  # processes


@pytest.fixture(autouse=True)
def signal_handlers():
    """main() installs handlers of its own; puts those of pytest back, and ends processes that a failed test left."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for process in STARTED:
        process.kill()
    STARTED.clear()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(params=SCRIPTS)
def script(request):
    """The name of a script."""
    return request.param


@pytest.fixture
def module(script):
    """A script as a module."""
    return importlib.import_module(script)


@pytest.fixture
def small_args(script, module):
    """Makes the Args of a small run on the CPU; keywords override them."""
    small = {
        "cuda": False,
        "compile": False,
        "num_envs": 2,
        "learning_starts": 50,
        "batch_size": 16,
        "eval_episodes": 2,
    }
    return lambda **chosen: module.Args(**{**small, **SMALL[script], **chosen})


@pytest.fixture
def scripted(monkeypatch):
    """Registers Scripted as Scripted-v0 and returns the class, with its counters at zero."""
    monkeypatch.setitem(gym.registry, "Scripted-v0", gym.envs.registration.EnvSpec("Scripted-v0", Scripted))
    for name, value in {"plan": [], "born": 0, "received": []}.items():
        monkeypatch.setattr(Scripted, name, value)
    return Scripted


@pytest.fixture
def register_spaces(monkeypatch):
    """Registers Spaces-v0 with the given observation and action space."""

    def register(observation_space, action_space):
        kwargs = {"observation_space": observation_space, "action_space": action_space}
        monkeypatch.setitem(
            gym.registry, "Spaces-v0", gym.envs.registration.EnvSpec("Spaces-v0", Spaces, kwargs=kwargs)
        )

    return register


def start_process(script, *flags, cwd, env=None, **options):
    """The script as a user starts it, without a GPU and without a display."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "120"}
    environ = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MUJOCO_GL") and not k.startswith("WANDB")}
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    STARTED.append(subprocess.Popen(command, cwd=cwd, env=environ | hidden | (env or {}), **pipes, **options))
    return STARTED[-1]


def command_line(script, *flags, cwd, env=None, **options):
    """The same to its end."""
    process = start_process(script, *flags, cwd=cwd, env=env, **options)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def small_flags(script):
    """Command line of a small run, without the task and the number of steps."""
    small = {"num_envs": 2, "batch_size": 16, "eval_episodes": 2, **SMALL[script]}
    return ["--no-compile"] + [t for name, value in small.items() for t in (f"--{name.replace('_', '-')}", str(value))]


def wait_for(condition, seconds=180):
    """Waits until condition() is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.01)
