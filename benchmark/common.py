"""What the commands of this folder share."""

import argparse
import importlib
import importlib.metadata
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results"
sys.path.insert(0, str(ROOT))


def command_line(text):
    return argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def script(algorithm):
    """The module of "sdac" or "sac"."""
    return importlib.import_module(f"{algorithm}_continuous_action")


def algorithm(args):
    """The algorithm to which saved arguments belong."""
    return "sdac" if "denoising_steps" in args else "sac"


def load(run, name="model.pt"):
    """The trained agent of a run folder, not compiled, and what is saved with it."""
    import gymnasium as gym
    import torch

    state = torch.load(Path(run, name), map_location="cpu", mmap=True)
    module = script(algorithm(state["args"]))
    args = module.Args(**state["args"])
    env = module.make_env(args.env_id)
    agent = module.Agent(args, *map(gym.spaces.flatdim, (env.observation_space, env.action_space)))
    agent.load_state_dict(state["agent"])
    return agent, state


def machine():
    """What a measurement depends on besides the code."""
    import torch

    cpu = platform.processor()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    packages = ("torch", "gymnasium", "mujoco", "numpy")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }
