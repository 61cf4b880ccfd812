"""Run a grid of experiments, each as a process of a plain script, here or on a Ray cluster, and keep the results.

    python benchmark/run.py benchmark/cpu.toml                # as many at a time as there are cores
    python benchmark/run.py benchmark/cpu.toml --only "Hopper-v4__sdac__*" --into mine     # again, some of them
    python benchmark/run.py benchmark/full.toml --only "Ant*__1" "Humanoid*__1"            # these first, then those
    ray start --head && python benchmark/run.py benchmark/mujoco.toml --ray-address auto --gpus-per-run 0.25

A grid is a TOML file: seeds, flags for all runs, tasks and named settings with flags of their own; see cpu.toml.
A run's name is <task>__<setting>__<seed>, with - for / and : in it. Results go to benchmark/results/<grid>/, or to the
folder named with --into, as benchmark/record.py writes them (draw them with benchmark/plot.py); logs, run folders and
the copy of the script with which each run began go to benchmark/runs/<grid>/<run>/.

Ctrl-C lets every run on this machine write a checkpoint. Run the same command again: runs with results are left out,
the others go on, each with its copy of the script. Results or checkpoints with other arguments than the grid's are
refused; --rerun deletes the folders of the selected runs and makes them anew, and old results stay until new ones come.

On a Ray cluster each run is a task with the given share of a GPU, retried when its worker is lost. It needs this
repository at the same path and its requirements on every machine; a retry goes on from the checkpoint if
benchmark/runs is a shared folder, and starts again if not. Results are written where this command runs, and only the
benchmark/runs that it sees there is compared with the grid or, with --rerun, deleted."""

import argparse
import ctypes
import importlib
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
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_COMPARED = {"cuda", "compile", "bfloat16", "resume"}  # decided by the machine and by interruptions
NOT_COMPARED |= {"track", "wandb_project_name", "wandb_entity"}  # of no influence on the results
# glibc keeps freed memory; or else each large tensor is mapped anew, page by page. benchmark/README.md, Speed
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


def module(name):
    """A file of this repository as a module, on a Ray worker too."""
    sys.path[:] = dict.fromkeys([str(ROOT), str(ROOT / "benchmark"), *sys.path])
    return importlib.import_module(name)


@dataclass
class Run:
    grid: str
    task: str
    name: str
    seed: int
    script: str
    flags: list

    def __post_init__(self):
        self.key = re.sub("[/:]", "-", f"{self.task}__{self.name}__{self.seed}")

    def folder(self):
        return ROOT / "benchmark" / "runs" / self.grid / self.key

    def results(self):
        paths = (ROOT / "benchmark" / "results" / self.grid).glob("*.json")
        return [path for path in paths if path.stem.rpartition("__")[0] == self.key]

    def kept(self):
        """Its results, unless --rerun asked for new ones that are not there yet."""
        return [] if (self.folder() / "rerun").exists() else self.results()

    def finished(self):
        """Run folders whose training came to its end."""
        return [path.parent for path in self.folder().glob("runs/*/model.pt")]

    def differences(self):
        """What its results, or else its checkpoint and model, have and the grid has not, in words."""
        for path in self.kept() or sorted(self.folder().glob("runs/*/*.pt")):
            try:
                load = partial(module("torch").load, map_location="cpu", weights_only=True, mmap=True)
                facts = json.loads(path.read_text()) if path.suffix == ".json" else load(path)
            except Exception:  # damaged files raise many kinds of errors
                return f"a damaged file, {path}"
            script = module(f"{self.script}_continuous_action")
            here = vars(script.parse(self.flags)[0]) | {"algorithm": self.script}
            there = here | facts["args"] | {"algorithm": module("record").algorithm(facts["args"])}
            # Flags that an earlier version had and this one has not are not in `here`
            different = [key for key in here if here[key] != there[key] and key not in NOT_COMPARED]
            if different:
                return " and ".join(f"{key} {there[key]} (grid: {here[key]})" for key in different)

    def last_line(self, failed=False):
        """The newest evaluation in the log or, of a failed run, its error in the last start, or else its last words."""
        log = self.folder() / "log.txt"
        text = log.read_text(errors="replace") if log.exists() else ""
        if failed:
            text = text.rpartition("\n$ ")[2].partition("\n")[2].strip()
        lines = [line for line in text.splitlines() if line.startswith("error:" if failed else "evaluation")]
        return (lines or text.splitlines() * failed or ["no output" * failed])[-1]

    def start(self, threads):
        """Starts the training, or goes on with it from its newest checkpoint. It ends with the caller."""
        self.folder().mkdir(parents=True, exist_ok=True)
        checkpoints = sorted(self.folder().glob("runs/*/checkpoint.pt"), key=os.path.getmtime)
        original = ROOT / f"{self.script}_continuous_action.py"
        copy = self.folder() / original.name  # so that a run stays with the version of the script with which it began
        if not (checkpoints and copy.exists()):
            shutil.copy(original, copy)
        flags = ["--resume", str(checkpoints[-1].parent)] if checkpoints else self.flags
        command = [sys.executable, str(copy), *flags]
        paths = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"  # modules beside the script are found as before
        with open(self.folder() / "log.txt", "a") as log:
            print("\n$", shlex.join(command), file=log, flush=True)
            return subprocess.Popen(
                command, cwd=self.folder(), stdout=log, stderr=log, start_new_session=True, preexec_fn=die_with_parent,
                env=KEEP_MEMORY | os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths},
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
                script, *flags = shlex.split(setting)
                flags = shlex.split(f"{grid['flags']} {task_flags}") + flags  # the last one counts
                if not (ROOT / f"{script}_continuous_action.py").is_file():
                    raise ValueError(f"there is no script {script}")
                flags = ["--env-id", task, "--seed", str(seed), "--exp-name", name, *flags]
                runs.append(Run(into or Path(path).stem, task, name, seed, script, flags))
    return runs


def collect(run):
    """Facts and evaluations of a finished run, on the machine where it ran."""
    return module("record").collect(run.finished()[0])


def keep(run, result):
    """Writes new results, then removes old ones."""
    old = [path for path in run.results() if path.stem != result[0]]
    module("record").write(*result, ROOT / "benchmark" / "results" / run.grid)
    for path in old:
        path.unlink()
        path.with_suffix(".csv").unlink(missing_ok=True)
    (run.folder() / "rerun").unlink(missing_ok=True)


def show(runs, state, seconds):
    """A table of the runs, redrawn in a terminal and printed when it changes elsewhere."""
    counts = {
        name: sum(value == name for value in state.values()) for name in ("finished", "running", "waiting", "failed")
    }
    lines = [f"{seconds / 60:6.1f} min  " + "  ".join(f"{count} {name}" for name, count in counts.items())]
    if sys.stdout.isatty():
        begun = [(run, state[run.key]) for run in runs if state[run.key] != "waiting"]
        lines += [f"  {now:9} {run.key:50} {run.last_line(now == 'failed')}"[:119] for run, now in begun]
        print("\033[2J\033[H" + "\n".join(lines), flush=True)
    else:
        print(lines[0], flush=True)


def run_here(runs, jobs):
    """`jobs` processes at a time, the cores divided among them. Returns the keys and errors of the runs that failed."""
    threads, active, failed, shown, start = max(os.cpu_count() // jobs, 1), {}, {}, None, time.time()
    waiting = [run for run in runs if not run.kept()]
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
                        failed[key] = run.last_line(failed=True)
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
        return collect(run) if run.finished() else run.last_line(failed=True)

    state, start, failed = {run.key: "finished" if run.kept() else "running" for run in runs}, time.time(), {}
    tasks = {task.remote(run): run for run in runs if not run.kept()}
    while tasks:
        show(runs, state, time.time() - start)
        for done in ray.wait(list(tasks), timeout=10)[0]:
            run = tasks.pop(done)
            try:
                result = ray.get(done)
            except ray.exceptions.RayError as error:
                result = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
            if isinstance(result, str):
                failed[run.key] = result
            else:
                keep(run, result)
            state[run.key] = "failed" if run.key in failed else "finished"
    show(runs, state, time.time() - start)
    ray.shutdown()
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", help="a TOML file")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="of names of runs, in this order")
    parser.add_argument("--into", metavar="NAME", help="folder of the results, instead of the grid's name")
    parser.add_argument("--rerun", action="store_true", help="make the selected runs anew, also those with results")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time on this machine")
    parser.add_argument("--ray-address", help="of a running Ray cluster, for example auto")
    parser.add_argument("--cpus-per-run", type=int, default=1, help="with Ray")
    parser.add_argument("--gpus-per-run", type=float, default=0, help="with Ray")
    options = parser.parse_args()
    if options.jobs < 1 or options.cpus_per_run < 1:
        parser.error("--jobs and --cpus-per-run must be at least 1")
    try:
        grid = read_grid(options.grid, options.into)
        chosen = [[run for run in grid if fnmatch(run.key, pattern)] for pattern in options.only]
    except (OSError, KeyError, ValueError, AttributeError, TypeError) as error:
        parser.error(f"{options.grid} is not a grid ({type(error).__name__}: {error}); see benchmark/cpu.toml")
    for pattern, found in zip(options.only, chosen, strict=True):
        if not found:
            parser.error(f"{options.grid} has no run named {pattern}; names are like Hopper-v4__sdac__1")
    runs = list({run.key: run for found in chosen for run in found}.values())
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for run in runs if options.rerun else []:
            shutil.rmtree(run.folder(), ignore_errors=True)
            run.folder().mkdir(parents=True, exist_ok=True)
            (run.folder() / "rerun").touch()
        different = [f"{run.key} has {words}" for run in runs if (words := run.differences())]
        if different:
            parser.error(
                f"the grid and {len(different)} of {len(runs)} runs disagree: {different[0]}; "
                "choose another folder with --into, or make all selected runs (--only) anew with --rerun"
            )
        if options.ray_address:
            failed = run_on_ray(runs, options.ray_address, options.cpus_per_run, options.gpus_per_run)
        else:
            failed = run_here(runs, options.jobs)
    except KeyboardInterrupt:
        sys.exit(f"interrupted; the same command{' without --rerun' * options.rerun} goes on")
    if failed:
        lines = [f"failed: {key}: {error}\n" for key, error in sorted(failed.items())]
        sys.exit(f"{''.join(lines)}see log.txt in benchmark/runs/{runs[0].grid}/<run>")


if __name__ == "__main__":
    main()
