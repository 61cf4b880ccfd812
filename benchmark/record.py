"""Keep finished runs as results. benchmark/plot.py draws them.

    python benchmark/record.py runs/<run> [runs/<run> ...]

For each run folder writes benchmark/results/<run>.csv (evaluations, with the updates and seconds at each) and
<run>.json (arguments, versions, machine, duration, return of uniformly random actions), or with --into NAME into
benchmark/results/NAME. Run it on the machine and in the environment of the training, since it asks those for their
names, and with the script of the training still beside runs/: its SHA-256 is kept too, or null if it is not there.
--until STEPS keeps the evaluations up to there, also of a run that has not ended."""

import argparse
import csv
import hashlib
import json
import os
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from speed import cpu_name, versions


def random_policy_return(env_id, episodes=20):
    """Mean and standard deviation of the return of uniformly random actions, seeds 0..episodes-1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about newer versions of the task
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


def algorithm(args):
    """The script to which saved arguments belong."""
    return "sdac" if "denoising_steps" in args else "sac"


def collect(run, until=None):
    """Name, facts and evaluations of the run in a folder."""
    if until is None:
        (run / "model.pt").stat()  # written at the end of a training
    saved = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
    seconds = [evaluation[-1] for evaluation in saved["evaluations"]]
    rows = csv.DictReader((run / "metrics.csv").read_text().splitlines())
    rows = [row | {"seconds": time} for row, time in zip(rows, seconds, strict=True)]
    if until is not None:
        if until not in [int(row["global_step"]) for row in rows]:
            raise ValueError(f"it has no evaluation at step {until}")
        rows = [row for row in rows if int(row["global_step"]) <= until]
    script = run.resolve().parent.parent / f"{algorithm(saved['args'])}_continuous_action.py"
    facts = {
        "algorithm": algorithm(saved["args"]),
        "args": saved["args"] | {"resume": None},  # a path of this machine, if the run was interrupted
        "script_sha256": hashlib.sha256(script.read_bytes()).hexdigest() if script.is_file() else None,
        "versions": versions(),
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "seconds": float(rows[-1]["seconds"]),
        "random_policy": random_policy_return(saved["args"]["env_id"]),
    }
    return run.name, facts, rows


def write(name, facts, rows, results):
    """The CSV first: a run counts as kept when its JSON is there."""
    results.mkdir(parents=True, exist_ok=True)
    with open(results / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (results / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", default=".", metavar="NAME", help="folder under benchmark/results")
    parser.add_argument("--until", type=int, metavar="STEPS", help="the last evaluation to be kept")
    parser.add_argument("runs", nargs="+", type=Path)
    options = parser.parse_args()
    results = Path(__file__).parent / "results" / options.into
    for run in options.runs:
        try:
            write(*collect(run, options.until), results)
        except Exception as error:  # damaged files raise many kinds of errors
            hint = "give the folder of a finished run, or --until a step of its metrics.csv"
            parser.error(f"{run} cannot be kept ({type(error).__name__}: {error}); {hint}")
