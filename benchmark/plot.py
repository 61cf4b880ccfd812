"""Draw learning curves and a table of finished runs, from the files that benchmark/record.py keeps.

    python benchmark/plot.py [FOLDER ...]       # folders under benchmark/results; default: all that have runs

Writes into each folder curves.png, evaluation return against environment steps, time.png, the same against wall time
(mean over seeds at equal steps), and table.md. Curves are means over seeds with 95% bootstrap intervals (SciPy,
percentile method, seeds resampled; with three seeds a rough one). The last panel of curves.png aggregates tasks: the
interquartile mean (Agarwal et al., 2021) of normalised final scores, 0 for random actions and 1 for the reference
below, seeds resampled within tasks. Table: final and best evaluation, mean ± standard deviation over seeds. Runs of
unequal lengths are cut to the steps that all seeds have; the table then says "60,000 of 100,000"."""

import argparse
import csv
import json
import math
from pathlib import Path

import matplotlib
import numpy as np
from scipy import stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"
# What others report after a million steps, mostly the best evaluation of a run, some on -v3 or -v5 of the task; README,
# Results, has the sources. Then the score that is 1 in the aggregate.
PUBLISHED = {
    "HalfCheetah-v4": ("SDAC 11.2k to 12.5k, SAC 10.3k to 11.1k", 12_500),
    "Ant-v4": ("SDAC 1.4k to 5.6k, SAC 5.0k to 5.4k", 5_600),
    "Humanoid-v4": ("SDAC 4.4k to 5.1k, SAC 5.2k to 6.6k", 5_100),
    "Walker2d-v4": ("SDAC 4.3k to 4.9k, SAC 4.5k to 4.9k", 4_900),
    "Hopper-v4": ("SDAC 3.0k, SAC 2.8k to 3.0k", 3_300),
    "InvertedPendulum-v4": ("1000", 1_000),
    "InvertedDoublePendulum-v4": ("9360", 9_360),
    "Reacher-v4": ("about -4", -4),
    "Swimmer-v4": ("75 to 80", 80),
}


class Runs:
    """The runs of one name on one task: evaluations as arrays (seeds, evaluations), cut to the steps that all have."""

    def __init__(self, task, name, runs):
        every = [{int(row["global_step"]) for row in rows} for _, rows in runs]
        steps = set.intersection(*every)
        if not steps:
            raise ValueError(f"the seeds of {name} on {task} have no evaluation at a common step")
        self.task, self.longest = task, max(set.union(*every))
        self.facts, self.steps = [facts for facts, _ in runs], np.array(sorted(steps))
        columns = [[row for row in rows if int(row["global_step"]) in steps] for _, rows in runs]
        self.returns = np.array([[float(row["episodic_return"]) for row in rows] for rows in columns])
        self.seconds = np.array([[float(row["seconds"]) for row in rows] for rows in columns])
        self.bands = np.array([interval((values,), np.mean) for values in self.returns.T])
        self.updates = int(columns[0][-1]["updates"])
        self.random = np.mean([facts["random_policy"]["mean"] for facts in self.facts])


def read(folder):
    """{task: {name: Runs}} of a folder of results."""
    tasks = {}
    for path in sorted(folder.glob("*__*.json")):
        facts = json.loads(path.read_text())
        with open(path.with_suffix(".csv")) as file:
            name = facts["args"]["exp_name"].removesuffix("_continuous_action")
            names = tasks.setdefault(facts["args"]["env_id"], {})
            names.setdefault(name, []).append((facts, list(csv.DictReader(file))))
    return {task: {name: Runs(task, name, runs) for name, runs in names.items()} for task, names in tasks.items()}


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


def draw(tasks, folder):
    """Two pictures. The aggregate is of the tasks on which every name has several seeds, if there are three."""
    names = list(dict.fromkeys(name for runs in tasks.values() for name in runs))
    color = {name: f"C{i}" for i, name in enumerate(names)}
    complete = lambda runs: len(runs) == len(names) and all(len(run.returns) > 1 for run in runs.values())  # noqa: E731
    shared = [task for task, runs in tasks.items() if task in PUBLISHED and complete(runs)]
    for picture, label in (("curves", "environment steps"), ("time", "minutes")):
        panels = len(tasks) + (len(shared) > 2 and picture == "curves")
        columns = min(panels, 4)
        rows = math.ceil(panels / columns)
        size = (4.4 * columns, 3.6 * rows + 0.4)
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        for axis, (task, runs) in zip(axes.flat, tasks.items(), strict=False):
            for name, run in runs.items():
                x = run.steps if picture == "curves" else run.seconds.mean(0) / 60
                axis.plot(x, run.returns.mean(0), color=color[name], label=name)
                axis.fill_between(x, *run.bands.T, color=color[name], alpha=0.2, linewidth=0)
            axis.axhline(run.random, color="0.5", linewidth=1, linestyle=":", label="random actions")
            seeds = sorted({len(run.returns) for run in runs.values()})
            title = f"{task}, {' or '.join(map(str, seeds))} seed{'s'[: seeds != [1]]}"
            axis.set(title=title, xlabel=label, ylabel="evaluation return")
            axis.locator_params("x", nbins=6)
        for axis in axes.flat[len(tasks) :]:
            axis.axis("off")
        if panels > len(tasks):
            runs = {name: [tasks[task][name] for task in shared] for name in names}
            draw_aggregate(axes.flat[len(tasks)], runs, color)
        entries = [axis.get_legend_handles_labels() for axis in axes.flat]
        curves = {label: line for entry in entries for line, label in zip(*entry, strict=True)}
        ncols = min(len(curves), max(2, 3 * (columns - 1)))
        figure.legend(curves.values(), curves, loc="outside lower center", ncols=ncols)
        figure.savefig(folder / f"{picture}.png", dpi=110)
        plt.close(figure)


def draw_aggregate(axis, runs, color):
    for y, name in enumerate(reversed(runs)):
        scores = [normalised(run) for run in runs[name]]
        value, (low, high) = interquartile_mean(*scores), interval(scores, interquartile_mean)
        axis.plot([low, high], [y, y], color=color[name], linewidth=8, alpha=0.35, solid_capstyle="butt")
        axis.plot(value, y, "|", color=color[name], markersize=18, markeredgewidth=3)
    axis.axis("on")
    axis.set(title=f"{len(scores)} tasks", yticks=range(len(runs)), yticklabels=reversed(runs), ylim=(-1, len(runs)))
    axis.axvline(0, color="0.5", linewidth=1, linestyle=":")
    axis.set_xlabel("interquartile mean of normalised final scores")


def normalised(run):
    """Final scores, with 0 for random actions and 1 for the reference."""
    return (run.returns[:, -1] - run.random) / (PUBLISHED[run.task][1] - run.random)


def table(tasks):
    """Markdown: one line for each name and task."""
    header = "task, runs, seeds, environment steps, updates, final, best, minutes, elsewhere at 1M steps"
    lines = [f"| {' | '.join(header.split(', '))} |"]
    lines += ["|---" * 9 + "|"]
    for task, runs in tasks.items():
        for name, run in runs.items():
            final, best = run.returns[:, -1], run.returns.max(1)
            longer = f" of {run.longest:,}" if run.longest > run.steps[-1] else ""
            cells = [task, name, len(final), f"{run.steps[-1]:,}{longer}", f"{run.updates:,}"]
            cells += [f"{x.mean():.1f} ± {x.std(ddof=1):.1f}" if len(x) > 1 else f"{x[0]:.1f}" for x in (final, best)]
            cells += [f"{run.seconds[:, -1].mean() / 60:.1f}", PUBLISHED.get(task, ("",))[0]]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", help="under benchmark/results")
    folders = [RESULTS / name for name in parser.parse_args().folders]
    for folder in folders or sorted({path.parent for path in RESULTS.rglob("*__*.json")}) or [RESULTS]:
        try:
            tasks = read(folder)
        except (OSError, KeyError, TypeError, ValueError) as error:
            parser.error(f"the runs in {folder} cannot be drawn ({type(error).__name__}: {error})")
        if not tasks:
            parser.error(f"there are no runs in {folder}; keep some with benchmark/record.py")
        draw(tasks, folder)
        (folder / "table.md").write_text(table(tasks))
