"""Keep finished runs as results, and draw them.

    python benchmark/record.py runs/<run> [runs/<run> ...]      # then the picture, from all results
    python benchmark/record.py                                  # the picture alone

For each run folder writes benchmark/results/<run>.csv (evaluations, with the updates and seconds at each) and
<run>.json (arguments, versions, machine, duration, return of uniformly random actions), then curves.png beside them.
With --into NAME all that happens in the folder benchmark/results/NAME. Run it on the machine and in the environment of
the training, since it asks those for their names."""

import argparse
import csv
import json
import os
from pathlib import Path

import gymnasium as gym
import matplotlib
import numpy as np
import torch
from speed import cpu_name, versions

matplotlib.use("Agg")
import matplotlib.pyplot as plt


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


def record(run, results):
    model = torch.load(run / "model.pt", map_location="cpu", weights_only=True)
    with open(run / "metrics.csv") as metrics, open(run / "timing.csv") as timing:
        rows = [m | t for m, t in zip(csv.DictReader(metrics), csv.DictReader(timing), strict=True)]
    with open(results / f"{run.name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    facts = {
        "algorithm": model["algorithm"],
        "args": model["args"],
        "versions": versions(),
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "seconds": float(rows[-1]["seconds"]),
        "random_policy": random_policy_return(model["args"]["env_id"]),
    }
    (results / f"{run.name}.json").write_text(json.dumps(facts, indent=1) + "\n")


def draw(results):
    tasks = {}
    for path in sorted(results.glob("*-v*__*.json")):
        facts = json.loads(path.read_text())
        with open(path.with_suffix(".csv")) as file:
            tasks.setdefault(facts["args"]["env_id"], []).append((facts, list(csv.DictReader(file))))
    figure, axes = plt.subplots(1, len(tasks), figsize=(5.5 * len(tasks), 3.8), squeeze=False, layout="constrained")
    for axis, (env_id, runs) in zip(axes[0], tasks.items(), strict=True):
        names = list(dict.fromkeys(facts["args"]["exp_name"] for facts, _ in runs))
        for facts, rows in runs:
            step, mean, std = (
                np.array([float(row[name]) for row in rows])
                for name in ("global_step", "episodic_return", "episodic_return_std")
            )
            name, seed = facts["args"]["exp_name"], facts["args"]["seed"]
            style = {"color": f"C{names.index(name)}", "linestyle": ["-", "--", ":", "-."][(seed - 1) % 4]}
            axis.plot(step, mean, label=f"{name.removesuffix('_continuous_action')}, seed {seed}", **style)
            axis.fill_between(step, mean - std, mean + std, alpha=0.15, linewidth=0, color=style["color"])
            axis.axvline(facts["args"]["learning_starts"], color="0.7", linewidth=1)
        random = runs[0][0]["random_policy"]
        axis.axhline(random["mean"], color="0.4", linewidth=1, label="random actions")
        axis.set(title=env_id, xlabel="environment steps (the grey line ends the warm-up)", ylabel="evaluation return")
        axis.legend(fontsize="small")
    figure.savefig(results / "curves.png", dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", default=".", metavar="NAME", help="folder under benchmark/results")
    parser.add_argument("runs", nargs="*", type=Path)
    options = parser.parse_args()
    results = Path(__file__).parent / "results" / options.into
    results.mkdir(parents=True, exist_ok=True)
    for run in options.runs:
        record(run, results)
    draw(results)
