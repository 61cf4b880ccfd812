"""Run a grid of experiments, each as a process of a plain script, here or on a Ray cluster, and keep the results.

    python benchmark/run.py benchmark/cpu.toml                # as many at a time as there are cores
    python benchmark/run.py benchmark/cpu.toml --only "Hopper-v4__sdac__*" --into mine     # again, some of them
    ray start --head && python benchmark/run.py benchmark/mujoco.toml --ray-address auto --gpus-per-run 0.25

A grid is a TOML file: seeds, flags for all runs, tasks and named settings with flags of their own; see cpu.toml.
A run's name is <task>__<setting>__<seed>. Results go to benchmark/results/<grid>/, or to the folder named with --into,
as benchmark/record.py writes them (draw them with benchmark/plot.py); logs and run folders go to benchmark/runs/. Run
the same command again after an interruption: runs with results are left out, the others go on from their checkpoints.
Ctrl-C lets every run on this machine write a checkpoint first.

On a Ray cluster each run is a task with the given share of a GPU, retried when its worker is lost. It needs this
repository at the same path and its requirements on every machine; a retry goes on from the checkpoint if
benchmark/runs is a shared folder, and starts again if not. Results are written where this command runs."""

import argparse
import ctypes
import importlib
import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Run:
    grid: str
    task: str
    name: str
    seed: int
    script: str
    flags: list

    def __post_init__(self):
        self.key = f"{self.task}__{self.name}__{self.seed}"

    def folder(self):
        return ROOT / "benchmark" / "runs" / self.grid / self.key

    def results(self):
        return list((ROOT / "benchmark" / "results" / self.grid).glob(f"{self.key}__*.json"))

    def finished(self):
        """Run folders whose training came to its end."""
        return [path.parent for path in self.folder().glob("runs/*/model.pt")]

    def last_line(self):
        log = self.folder() / "log.txt"
        lines = log.read_text().splitlines() if log.exists() else []
        return next((line for line in reversed(lines) if line.startswith(("evaluation", "error"))), "")

    def start(self, threads):
        """Starts the training, or goes on with it from its newest checkpoint. It ends with the caller."""
        self.folder().mkdir(parents=True, exist_ok=True)
        checkpoints = sorted(self.folder().glob("runs/*/checkpoint.pt"), key=os.path.getmtime)
        flags = ["--env-id", self.task, "--seed", str(self.seed), "--exp-name", self.name, *self.flags]
        if checkpoints:
            flags = ["--resume", str(checkpoints[-1].parent)]
        command = [sys.executable, str(ROOT / f"{self.script}_continuous_action.py"), *flags]
        with open(self.folder() / "log.txt", "a") as log:
            return subprocess.Popen(
                command, cwd=self.folder(), stdout=log, stderr=log, start_new_session=True, preexec_fn=die_with_parent,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            )  # fmt: skip


def die_with_parent():
    if sys.platform == "linux":  # or else a run whose Ray worker is lost would go on beside its own retry
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def read_grid(path, into=None):
    grid = tomllib.loads(Path(path).read_text())
    runs = []
    for seed in grid["seeds"]:  # seeds outermost, so that an unfinished grid has whole comparisons
        for task, task_flags in grid["tasks"].items():
            for name, setting in grid["settings"].items():
                script, *flags = shlex.split(f"{setting} {grid['flags']} {task_flags}")
                runs.append(Run(into or Path(path).stem, task, name, seed, script, flags))
    return runs


def collect(run):
    """Facts and evaluations of a finished run, on the machine where it ran."""
    sys.path.insert(0, str(ROOT / "benchmark"))
    return importlib.import_module("record").collect(run.finished()[0])


def keep(run, result):
    sys.path.insert(0, str(ROOT / "benchmark"))
    importlib.import_module("record").write(*result, ROOT / "benchmark" / "results" / run.grid)


def show(runs, state, seconds):
    """A table of the runs, redrawn in a terminal and printed when it changes elsewhere."""
    counts = {
        name: sum(value == name for value in state.values()) for name in ("finished", "running", "waiting", "failed")
    }
    lines = [f"{seconds / 60:6.1f} min  " + "  ".join(f"{count} {name}" for name, count in counts.items())]
    if sys.stdout.isatty():
        lines += [f"  {state[r.key]:9} {r.key:50} {r.last_line()}"[:119] for r in runs if state[r.key] != "waiting"]
        print("\033[2J\033[H" + "\n".join(lines), flush=True)
    else:
        print(lines[0], flush=True)


def run_here(runs, jobs):
    """`jobs` processes at a time, the cores divided among them. Returns the keys of the runs that failed."""
    threads, active, failed, shown, start = max(os.cpu_count() // jobs, 1), {}, set(), None, time.time()
    waiting = [run for run in runs if not run.results()]
    try:
        while True:
            while waiting and len(active) < jobs:
                run = waiting.pop(0)
                active[run.key] = run, None if run.finished() else run.start(threads)
            for key, (run, process) in list(active.items()):
                if process is None or process.poll() is not None:
                    del active[key]
                    if run.finished():
                        keep(run, collect(run))
                    else:
                        failed.add(key)
            names = [(failed, "failed"), (active, "running"), ({run.key for run in waiting}, "waiting")]
            state = {run.key: next((n for keys, n in names if run.key in keys), "finished") for run in runs}
            if state != shown or (sys.stdout.isatty() and int(time.time()) % 5 == 0):
                show(runs, state, time.time() - start)
                shown = state
            if not waiting and not active:
                return failed
            time.sleep(0.5)
    finally:
        for _, process in active.values():
            if process:
                process.send_signal(signal.SIGTERM)  # each writes a checkpoint of this moment
        for _, process in active.values():
            if process:
                process.wait()


def run_on_ray(runs, address, cpus, gpus):
    """The same on a Ray cluster; a task whose worker is lost is tried up to three times more."""
    import ray

    ray.init(address=address, log_to_driver=False)

    @ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=3)
    def task(run):
        if not run.finished():
            run.start(cpus).wait()
        return collect(run) if run.finished() else None

    state, start = {run.key: "finished" if run.results() else "running" for run in runs}, time.time()
    tasks = {task.remote(run): run for run in runs if not run.results()}
    while tasks:
        show(runs, state, time.time() - start)
        for done in ray.wait(list(tasks), timeout=10)[0]:
            run, result = tasks.pop(done), None
            with suppress(ray.exceptions.RayError):
                result = ray.get(done)
            if result:
                keep(run, result)
            state[run.key] = "finished" if result else "failed"
    show(runs, state, time.time() - start)
    ray.shutdown()
    return {key for key, value in state.items() if value == "failed"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", help="a TOML file")
    parser.add_argument("--only", default="*", metavar="PATTERN", help='of the names of runs, for example "Hopper*__1"')
    parser.add_argument("--into", metavar="NAME", help="folder of the results, instead of the grid's name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time on this machine")
    parser.add_argument("--ray-address", help="of a running Ray cluster, for example auto")
    parser.add_argument("--cpus-per-run", type=int, default=1, help="with Ray")
    parser.add_argument("--gpus-per-run", type=float, default=0, help="with Ray")
    options = parser.parse_args()
    if options.jobs < 1 or options.cpus_per_run < 1:
        parser.error("--jobs and --cpus-per-run must be at least 1")
    try:
        runs = [run for run in read_grid(options.grid, options.into) if fnmatch(run.key, options.only)]
    except (OSError, KeyError, ValueError, AttributeError, TypeError) as error:
        parser.error(f"{options.grid} is not a grid ({type(error).__name__}: {error}); see benchmark/cpu.toml")
    if not runs:
        parser.error(f"{options.grid} has no run named {options.only}; names are like Hopper-v4__sdac__1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if options.ray_address:
            failed = run_on_ray(runs, options.ray_address, options.cpus_per_run, options.gpus_per_run)
        else:
            failed = run_here(runs, options.jobs)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
    if failed:
        sys.exit(f"failed: {', '.join(sorted(failed))}; see log.txt in benchmark/runs/{runs[0].grid}/<run>")


if __name__ == "__main__":
    main()
