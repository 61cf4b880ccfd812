"""Draw learning curves and write a table of results, from files that are in this repository.

    python benchmark/plot.py [NAME ...]    # folders under benchmark/results, by default all

Writes curves.png and table.md into each folder. Curves: mean over seeds of the return of an
evaluation, with 95% bootstrap intervals of that mean (percentile method, seeds resampled; with
three seeds a rough one). Dotted: what others found, at best, within a million steps. If some
tasks have several settings, those with one are not drawn. Table: the last and the best evaluation
of every task, mean ± standard deviation over seeds. Seeds of unequal length are cut to the steps
that all have.
"""

import csv
import json
import math

import numpy as np
from common import RESULTS, command_line
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from scipy import stats

# Best evaluation within a million steps, mean of five seeds, on -v3 of the tasks: table 1 of CGPO
# (arXiv 2605.30056), the one comparison of SDAC and SAC by others with all numbers in it.
PUBLISHED = {
    "HalfCheetah-v4": {"sdac": 11_179, "sac": 10_617},
    "Ant-v4": {"sdac": 1_405, "sac": 5_031},
    "Humanoid-v4": {"sdac": 4_430, "sac": 5_160},
    "Walker2d-v4": {"sdac": 4_251, "sac": 4_888},
    "Hopper-v4": {"sdac": 2_958, "sac": 2_997},
}


def label(setting):
    """sdac-per-step -> SDAC per step"""
    words = setting.removesuffix("_continuous_action").split("-")
    return " ".join(word.upper() if word in ("sdac", "sac", "dpmd") else word for word in words)


def read(folder):
    """{task: {setting: rows of metrics of every seed}}, SDAC first, then by length"""

    def key(path):
        setting = path.stem.split("__")[1]
        return not setting.startswith("sdac"), len(setting), path.name

    tasks = {}
    for path in sorted(folder.glob("*__*.json"), key=key):
        args = json.loads(path.read_text())["args"]
        with open(path.with_suffix(".csv")) as file:
            settings = tasks.setdefault(args["env_id"], {})
            settings.setdefault(args["exp_name"], []).append(list(csv.DictReader(file)))
    return dict(sorted(tasks.items()))


def aligned(runs):
    """The steps that all seeds have, and the returns (seeds, steps) there."""
    curves = [
        {int(row["global_step"]): float(row["episodic_return"]) for row in rows} for rows in runs
    ]
    steps = sorted(set.intersection(*map(set, curves)))
    if not steps:
        raise SystemExit("the seeds of a setting have no evaluation at a common step")
    return steps, np.array([[curve[step] for step in steps] for curve in curves])


def interval(sample):
    """95% bootstrap interval of the mean of a sample."""
    if np.ptp(sample) == 0:
        return sample[0], sample[0]
    result = stats.bootstrap([sample], np.mean, n_resamples=2000, method="percentile", rng=0)
    return result.confidence_interval


def draw(tasks, path):
    # A task with a single curve compares nothing, where others have several.
    tasks = {task: runs for task, runs in tasks.items() if len(runs) > 1} or tasks
    settings = list(dict.fromkeys(setting for runs in tasks.values() for setting in runs))
    columns = 2 if len(tasks) == 4 else min(len(tasks), 3)
    rows = math.ceil(len(tasks) / columns)
    figure = Figure((4.4 * columns, 3.4 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes[len(tasks) :]:
        axis.axis("off")
    lines = {}
    for axis, (task, of_task) in zip(axes, tasks.items(), strict=False):
        for setting, runs in of_task.items():
            style = {"color": f"C{settings.index(setting)}"}
            steps, returns = aligned(runs)
            low, high = np.transpose([interval(sample) for sample in returns.T])
            (lines[label(setting)],) = axis.plot(steps, returns.mean(0), ".-", **style)
            axis.fill_between(steps, low, high, alpha=0.2, linewidth=0, **style)
            if setting in PUBLISHED.get(task, {}):
                dotted = axis.axhline(PUBLISHED[task][setting], linestyle=":", **style)
                lines[f"{label(setting)}, by others"] = dotted
        seeds = sorted({len(runs) for runs in of_task.values()})
        title = f"{task}, {' or '.join(map(str, seeds))} seed{'s' * (seeds != [1])}"
        axis.set(title=title, xlabel="environment steps", ylabel="return")
        axis.locator_params("x", nbins=5)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k, 1M
        axis.yaxis.set_major_formatter("{x:,.6g}")  # 2,500 and -3.5
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=2 * columns)
    figure.savefig(path, dpi=100)


def table(tasks):
    """Markdown, a line for each setting on each task."""
    lines = [
        "| task | | seeds | steps | updates | last | best | minutes | by others |",
        "|---" * 9 + "|",
    ]
    for task, of_task in tasks.items():
        for setting, runs in of_task.items():
            steps, returns = aligned(runs)
            last_row = next(row for row in runs[0] if int(row["global_step"]) == steps[-1])
            minutes = np.mean([float(rows[-1]["seconds"]) for rows in runs]) / 60
            cells = [
                task,
                label(setting),
                len(runs),
                f"{steps[-1]:,}",
                f"{int(last_row['updates']):,}",
            ]
            for values in (returns[:, -1], returns.max(1)):
                spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
                cells.append(f"{values.mean():.1f}{spread}")
            cells += [f"{minutes:.1f}", PUBLISHED.get(task, {}).get(setting, "")]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    names = parser.parse_args().names
    folders = [RESULTS / name for name in names]
    folders = folders or sorted({path.parent for path in RESULTS.glob("*/*__*.json")})
    if not folders:
        parser.exit(message="There are no results yet: make some with benchmark/run.py.\n")
    for folder in folders:
        tasks = read(folder)
        if not tasks:
            parser.error(f"there are no results in {folder}")
        draw(tasks, folder / "curves.png")
        (folder / "table.md").write_text(table(tasks))
