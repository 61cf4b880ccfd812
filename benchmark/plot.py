"""Draw learning curves and a table of finished runs, from the files that benchmark/record.py keeps.

    python benchmark/plot.py [FOLDER ...]       # folders under benchmark/results; default: benchmark/results itself

Writes curves.png and table.md into each folder. Curves: evaluation return against environment steps and against wall
time (mean over seeds at equal steps), one column a task, mean over seeds and its 95% bootstrap interval (SciPy,
percentile method, seeds resampled; with three seeds a rough one). The last panel aggregates tasks: the interquartile
mean (Agarwal et al., 2021) of normalised final scores, 0 for random actions and 1 for the reference below, seeds
resampled within tasks. Table: final and best evaluation, mean ± standard deviation over seeds; published figures."""

import argparse
import csv
import json
from pathlib import Path

import matplotlib
import numpy as np
from scipy import stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"
# Best evaluations at one million steps in reports of other groups, the SDAC authors' logs among them, some on -v3 or
# -v5 of the task: of SDAC, of SAC with one update per environment step; then the score that is 1 in the aggregate.
PUBLISHED = {
    "HalfCheetah-v4": ("11.2k to 12.5k", "10.3k to 11.1k", 12_500),
    "Ant-v4": ("1.4k to 5.6k", "5.0k to 5.4k", 5_600),
    "Humanoid-v4": ("4.4k to 5.1k", "5.2k to 6.6k", 5_100),
    "Walker2d-v4": ("4.3k to 4.9k", "4.5k to 4.9k", 4_900),
    "Hopper-v4": ("3.0k", "2.8k to 3.0k", 3_300),
    "InvertedPendulum-v4": ("", "1000", 1_000),
    "InvertedDoublePendulum-v4": ("", "9360", 9_360),
    "Reacher-v4": ("", "-4", -4),
    "Swimmer-v4": ("", "75 to 80", 80),
}


class Runs:
    """The runs of one name on one task: evaluations as arrays (seeds, evaluations), cut to the steps that all have."""

    def __init__(self, runs):
        steps = set.intersection(*({int(row["global_step"]) for row in rows} for _, rows in runs))
        self.facts, self.steps = [facts for facts, _ in runs], np.array(sorted(steps))
        columns = [[row for row in rows if int(row["global_step"]) in steps] for _, rows in runs]
        self.returns = np.array([[float(row["episodic_return"]) for row in rows] for rows in columns])
        self.seconds = np.array([[float(row["seconds"]) for row in rows] for rows in columns])
        self.updates = int(columns[0][-1]["updates"])
        self.random = np.mean([facts["random_policy"]["mean"] for facts in self.facts])


def read(folder):
    """{task: {name: Runs}} of a folder of results."""
    tasks = {}
    for path in sorted(folder.glob("*-v*__*.json")):
        facts = json.loads(path.read_text())
        with open(path.with_suffix(".csv")) as file:
            name = facts["args"]["exp_name"].removesuffix("_continuous_action")
            names = tasks.setdefault(facts["args"]["env_id"], {})
            names.setdefault(name, []).append((facts, list(csv.DictReader(file))))
    return {task: {name: Runs(runs) for name, runs in names.items()} for task, names in tasks.items()}


def interval(samples, statistic):
    """95% bootstrap interval of a statistic of several samples, each of which is resampled by itself."""
    varied, fixed = [], []
    for sample in samples:
        (varied if np.ptp(sample) > 0 else fixed).append(sample)
    if not varied:
        return statistic(*samples), statistic(*samples)
    whole = lambda *resampled: statistic(*resampled, *fixed)  # noqa: E731
    result = stats.bootstrap(varied, whole, n_resamples=2000, vectorized=False, method="percentile", rng=0)
    return result.confidence_interval.low, result.confidence_interval.high


def interquartile_mean(*samples):
    return stats.trim_mean(np.concatenate(samples), 0.25)


def draw(tasks, path):
    """The picture of a folder; the aggregate only of tasks on which every name has several seeds, if there are two."""
    names = list(dict.fromkeys(name for runs in tasks.values() for name in runs))
    color = {name: f"C{i}" for i, name in enumerate(names)}
    complete = lambda runs: len(runs) == len(names) and all(len(run.returns) > 1 for run in runs.values())  # noqa: E731
    shared = [task for task, runs in tasks.items() if task in PUBLISHED and complete(runs)]
    columns = len(tasks) + (len(shared) > 1)
    figure, axes = plt.subplots(2, columns, figsize=(4.6 * columns, 7), squeeze=False, layout="constrained")
    for (above, below), (task, runs) in zip(axes.T, tasks.items(), strict=False):
        for name, run in runs.items():
            mean, seeds = run.returns.mean(0), len(run.returns)
            bands = np.array([interval((values,), np.mean) for values in run.returns.T])
            for axis, x in ((above, run.steps), (below, run.seconds.mean(0) / 60)):
                axis.plot(x, mean, color=color[name], label=f"{name} ({seeds} seed{'s' * (seeds > 1)})")
                axis.fill_between(x, *bands.T, color=color[name], alpha=0.2, linewidth=0)
        for axis in (above, below):
            axis.axhline(run.random, color="0.5", linewidth=1, linestyle=":", label="random actions")
        above.set(title=task, xlabel="environment steps", ylabel="evaluation return")
        below.set(xlabel="minutes", ylabel="evaluation return")
        above.legend(fontsize="small")
    if len(shared) > 1:
        above, below = axes[:, -1]
        for y, name in enumerate(reversed(names)):
            scores = [normalised(task, tasks[task][name]) for task in shared]
            value, (low, high) = interquartile_mean(*scores), interval(scores, interquartile_mean)
            above.plot([low, high], [y, y], color=color[name], linewidth=8, alpha=0.35, solid_capstyle="butt")
            above.plot(value, y, "|", color=color[name], markersize=18, markeredgewidth=3)
        above.set(title=f"{len(shared)} tasks", yticks=range(len(names)), yticklabels=reversed(names))
        above.set_xlabel("interquartile mean of normalised final scores")
        below.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def normalised(task, run):
    """Final scores, with 0 for random actions and 1 for the reference."""
    return (run.returns[:, -1] - run.random) / (PUBLISHED[task][2] - run.random)


def table(tasks):
    """Markdown: one line for each name and task."""
    header = "task, runs, seeds, environment steps, updates, final, best, minutes, elsewhere at 1M steps: SDAC; SAC"
    lines = [f"| {' | '.join(header.split(', '))} |"]
    lines += ["|---" * 9 + "|"]
    for task, runs in tasks.items():
        for name, run in runs.items():
            final, best = run.returns[:, -1], run.returns.max(1)
            cells = [task, name, len(final), f"{run.steps[-1]:,}", f"{run.updates:,}"]
            cells += [f"{x.mean():.1f} ± {x.std(ddof=1):.1f}" if len(x) > 1 else f"{x[0]:.1f}" for x in (final, best)]
            cells += [
                f"{run.seconds[:, -1].mean() / 60:.1f}",
                "; ".join(filter(None, PUBLISHED.get(task, ("", ""))[:2])),
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", default=["."], help="under benchmark/results")
    for name in parser.parse_args().folders:
        tasks = read(RESULTS / name)
        if not tasks:
            parser.error(f"there are no runs in {RESULTS / name}; keep some with benchmark/record.py")
        draw(tasks, RESULTS / name / "curves.png")
        (RESULTS / name / "table.md").write_text(table(tasks))
