"""Run a grid of trainings, each as a process of a plain script, and keep the results.

    python benchmark/run.py benchmark/million.toml --only "Hopper-v4__*" --into mine

A grid is a TOML file such as that. Its runs are named <task>__<setting>__<seed>. Results go to
benchmark/results/<grid>/ when a run ends, see benchmark/record.py; its log, its copy of the script
and its run folder are in benchmark/runs/<grid>/<run>/. --into gives both another name than <grid>.

After Ctrl-C or SIGTERM every run writes a checkpoint, and the same command goes on: runs with
results to the last step are left out, and the others are resumed, each with its copy of the script.
Where a run has been made or begun with other arguments than the grid's, nothing starts.
"""

import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from fnmatch import fnmatch
from itertools import product
from pathlib import Path

from common import RESULTS, ROOT, command_line, script
from record import record

# These arguments do not change what is learned.
NOT_COMPARED = {"cuda", "compile", "track", "capture_video", "evaluate", "resume"}
# glibc then keeps freed memory, which saves mapping each large tensor anew, page by page.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


class Run:
    def __init__(self, into, task, setting, seed, algorithm, flags):
        self.name = re.sub(r"[^\w.-]", "-", f"{task}__{setting}__{seed}")
        self.algorithm = algorithm
        self.flags = ["--env-id", task, "--exp-name", setting, "--seed", str(seed), *flags]
        self.args = vars(script(algorithm).parse_args(self.flags)[0])
        self.folder = ROOT / "benchmark" / "runs" / into / self.name
        self.result = RESULTS / into / f"{self.name}.json"
        self.log = self.folder / "log.txt"

    def differences(self):
        """The arguments with which it was made or begun and that are not the grid's, in words."""
        for path in (self.result, self.folder / "args.json"):
            if path.exists():
                facts = json.loads(path.read_text())
                defaults = vars(script(self.algorithm).Args())
                there = {**defaults, **facts["args"], "algorithm": facts["algorithm"]}
                here = {**self.args, "algorithm": self.algorithm}
                names = [x for x in here if here[x] != there.get(x) and x not in NOT_COMPARED]
                if names:
                    return " and ".join(f"{x} {there.get(x)} (grid: {here[x]})" for x in names)

    def run_dir(self):
        """Its newest run folder that can be resumed."""
        paths = self.folder.glob("runs/*/metrics.csv")  # It is written after the checkpoint.
        return max((path.parent for path in paths), default=None)

    def finished(self, table):
        """Whether a file of evaluations goes to the last step."""
        if not table.exists():
            return False
        step = table.read_text().strip().rpartition("\n")[2].split(",")[0]
        return step.isdigit() and int(step) >= self.args["total_timesteps"]

    def has_result(self):
        """Whether its results go to the last step. The JSON file is written last."""
        return self.result.exists() and self.finished(self.result.with_suffix(".csv"))

    def start(self, threads):
        """Begin the training, or resume it. OMP_NUM_THREADS wins over the number of threads."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{self.algorithm}_continuous_action.py"
        if self.run_dir():
            flags = ["--resume", str(self.run_dir().relative_to(self.folder))]
        else:
            flags = self.flags
            shutil.copy(ROOT / name, self.folder)
            facts = {"algorithm": self.algorithm, "args": self.args}
            (self.folder / "args.json").write_text(json.dumps(facts))
        env = {**KEEP_MEMORY, "OMP_NUM_THREADS": str(threads), **os.environ}
        command = [sys.executable, name, *flags]
        with open(self.log, "a") as log:
            print(f"\n$ {shlex.join(command)}", file=log, flush=True)
            streams = {"stdout": log, "stderr": subprocess.STDOUT}
            # In a session of its own it gets no Ctrl-C but the SIGTERM that run_all sends.
            own = {"start_new_session": True, "preexec_fn": end_with_parent}
            return subprocess.Popen(command, cwd=self.folder, env=env, **streams, **own)

    def last_line(self):
        return self.log.read_text(errors="replace").strip().splitlines()[-1]


def end_with_parent():
    """Get SIGTERM when run.py is killed: no run may go on beside its own resumption."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def read_grid(path, into=None):
    """The runs of a grid, in its order; in each block the first seed of everything comes first."""
    grid = tomllib.loads(Path(path).read_text())
    runs = []
    for block in grid["runs"]:
        for seed, task, setting in product(block["seeds"], block["tasks"], block["settings"]):
            algorithm, *own = shlex.split(grid["settings"][setting])
            flags = shlex.split(f"{grid['flags']} {block.get('flags', '')}") + own
            runs.append(Run(into or Path(path).stem, task, setting, seed, algorithm, flags))
    return runs


def run_all(runs, jobs):
    """Run `jobs` processes at a time, which share the cores. Return the runs that failed."""
    threads = max(os.cpu_count() // jobs, 1)
    start_time = time.time()
    waiting = [run for run in runs if not run.has_result()]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs have results", flush=True)
    active = {}
    failed = []

    def say(run, words):
        print(f"{(time.time() - start_time) / 60:6.1f} min  {run.name} {words}", flush=True)

    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.pop(0)
                say(run, "goes on" if run.run_dir() else "begins")
                active[run] = run.start(threads)
            time.sleep(0.2)
            for run in [run for run, process in active.items() if process.poll() is not None]:
                run_dir = run.run_dir() or run.folder
                if active.pop(run).returncode == 0 and run.finished(run_dir / "metrics.csv"):
                    record(run_dir, run.result.parent)
                    say(run, "has ended")
                else:
                    failed.append(run)
                    say(run, f"failed: {run.last_line()}")
    finally:
        for process in active.values():
            process.terminate()
        for process in active.values():
            process.wait()
    return failed


def main():
    parser = command_line(__doc__)
    parser.add_argument("grid", help="a TOML file")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="of run names")
    parser.add_argument("--into", metavar="NAME", help="of the folders, instead of the grid's name")
    parser.add_argument("--rerun", action="store_true", help="delete the selected runs at first")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    options = parser.parse_args()
    try:
        grid = read_grid(options.grid, options.into)
    except (OSError, KeyError, ValueError, AttributeError, TypeError, ImportError) as error:
        parser.error(f"{options.grid} is not a grid ({type(error).__name__}: {error})")
    runs = {}
    for pattern in options.only:
        found = {run.name: run for run in grid if fnmatch(run.name, pattern)}
        if not found:
            parser.error(f"no run has the name {pattern}; one is {grid[0].name}")
        runs = {**runs, **found}
    runs = list(runs.values())

    for run in runs if options.rerun else []:
        shutil.rmtree(run.folder, ignore_errors=True)
        run.result.unlink(missing_ok=True)
        run.result.with_suffix(".csv").unlink(missing_ok=True)
    different = [f"{run.name} has {words}" for run in runs if (words := run.differences())]
    if different:
        parser.error(
            f"{len(different)} of {len(runs)} runs differ from the grid: {different[0]}; "
            "keep them and choose --into another folder, or delete them with --rerun"
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        failed = run_all(runs, options.jobs)
    except KeyboardInterrupt:
        again = "the same command" + " without --rerun" * options.rerun
        sys.exit(f"interrupted; {again} goes on")
    if failed:
        names = ", ".join(run.name for run in failed)
        sys.exit(f"failed: {names}; see {failed[0].log.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
