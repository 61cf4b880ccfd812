"""Keep finished runs as results, and draw them.

    python benchmark/record.py runs/<run> [runs/<run> ...]      # then the picture, from all results
    python benchmark/record.py                                  # the picture alone

For each run folder writes benchmark/results/<run>.csv (evaluations, with the updates and seconds at each) and
<run>.json (arguments, versions, machine, duration, return of uniformly random actions), then curves.png beside them.
Run it on the machine and in the environment of the training, since it asks those for their names."""

import csv
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

import gymnasium as gym
import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
PACKAGES = ["torch", "gymnasium", "mujoco", "numpy"]


def random_policy_return(env_id, episodes=20):
    """Mean and standard deviation of the return of uniformly random actions, seeds 0..episodes-1."""
    env, returns = gym.make(env_id), []
    env.action_space.seed(0)
    for seed in range(episodes):
        env.reset(seed=seed)
        returns.append(0.0)
        over = False
        while not over:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            returns[-1] += float(reward)
            over = terminated or truncated
    return {"mean": np.mean(returns), "std": np.std(returns), "episodes": episodes}


def cpu_name():
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def record(run):
    model = torch.load(run / "model.pt", map_location="cpu", weights_only=True)
    with open(run / "metrics.csv") as metrics, open(run / "timing.csv") as timing:
        rows = [m | t for m, t in zip(csv.DictReader(metrics), csv.DictReader(timing), strict=True)]
    with open(RESULTS / f"{run.name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    facts = {
        "algorithm": model["algorithm"],
        "args": model["args"],
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "seconds": float(rows[-1]["seconds"]),
        "random_policy": random_policy_return(model["args"]["env_id"]),
    }
    (RESULTS / f"{run.name}.json").write_text(json.dumps(facts, indent=1) + "\n")


def draw():
    runs = {}
    for path in sorted(RESULTS.glob("*.json")):
        facts = json.loads(path.read_text())
        with open(path.with_suffix(".csv")) as file:
            runs.setdefault(facts["args"]["env_id"], []).append((facts, list(csv.DictReader(file))))
    figure, axes = plt.subplots(1, len(runs), figsize=(5.5 * len(runs), 3.8), squeeze=False, layout="constrained")
    for axis, (env_id, results) in zip(axes[0], runs.items(), strict=True):
        for facts, rows in results:
            step, mean, std = (
                np.array([float(row[name]) for row in rows])
                for name in ("global_step", "episodic_return", "episodic_return_std")
            )
            axis.plot(step, mean, marker=".", label=f"{facts['algorithm'].upper()}, seed {facts['args']['seed']}")
            axis.fill_between(step, mean - std, mean + std, alpha=0.2, linewidth=0)
            axis.axvline(facts["args"]["learning_starts"], color="0.7", linewidth=1)
        random = results[0][0]["random_policy"]
        axis.axhline(random["mean"], color="0.4", linestyle="--", label="random actions")
        axis.set(title=env_id, xlabel="environment steps (the grey line ends the warm-up)", ylabel="evaluation return")
        axis.legend()
    figure.savefig(RESULTS / "curves.png", dpi=130)


if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    for argument in sys.argv[1:]:
        record(Path(argument))
    draw()
