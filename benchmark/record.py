"""Keep trainings as results, which benchmark/plot.py draws.

    python benchmark/record.py runs/<run> [runs/<run> ...] --into NAME

Writes two files into benchmark/results/NAME for each run folder: <task>__<exp_name>__<seed>.csv has
the evaluations and the seconds of training before each, .json the arguments, the SHA-256 of the
script, the versions and the machine, which is taken to be this one. What is there of the same name
is replaced. A training may be unfinished: its evaluations so far are kept.
"""

import csv
import hashlib
import json
import math
import re
from pathlib import Path

import torch
from common import RESULTS, algorithm, command_line, machine
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader


def seconds_of_evaluations(run):
    """Wall time of training at each evaluation, {step: seconds}. Every start of a training has a
    file of events of its own, so what lies between an interruption and its end is left out."""
    seconds = {}
    now = 0.0
    for path in sorted(run.glob("events.out.tfevents.*")):
        before, start = now, None
        for event in EventFileLoader(str(path)).Load():
            start = start or event.wall_time
            now = before + event.wall_time - start
            if any(value.tag == "eval/episodic_return" for value in event.summary.value):
                seconds[event.step] = now
    return seconds


def record(run, folder):
    """Write the results of a run folder."""
    args = torch.load(run / "checkpoint.pt", map_location="cpu", mmap=True)["args"]
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    if not rows:
        raise ValueError("it has no evaluation yet")
    seconds = seconds_of_evaluations(run)
    for row in rows:
        row["seconds"] = round(seconds.get(int(row["global_step"]), math.nan), 1)

    script = run.resolve().parent.parent / f"{algorithm(args)}_continuous_action.py"
    facts = {
        "algorithm": algorithm(args),
        "args": {**args, "resume": None, "evaluate": None},  # These would be paths.
        "script_sha256": hashlib.sha256(script.read_bytes()).hexdigest()
        if script.exists()
        else None,
        "machine": machine(),
    }
    name = re.sub(r"[^\w.-]", "-", f"{args['env_id']}__{args['exp_name']}__{args['seed']}")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--into", required=True, metavar="NAME", help="under benchmark/results")
    options = parser.parse_args()
    for run in options.runs:
        record(run, RESULTS / options.into)
