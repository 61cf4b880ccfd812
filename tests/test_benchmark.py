"""benchmark/run.py and benchmark/plot.py: grids that are interrupted, a lost Ray worker, intervals, the table."""

import csv
import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SCRIPTS, small_flags, wait_for

GRID = """
flags = "--no-cuda --num-envs 2 --batch-size 16 --eval-episodes 1 --total-timesteps {steps}
--eval-frequency 100 --no-compile"
seeds = [1, 2]
[tasks]
"InvertedPendulum-v4" = "--learning-starts 20"
[settings]
sdac = "sdac {sdac}"
sac = "sac"
"""


@pytest.fixture
def repository(tmp_path):
    """A copy of the scripts and benchmarks, with an empty folder of results and a function that makes a grid file."""
    for name in SCRIPTS:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    (tmp_path / "benchmark").mkdir()
    for path in (ROOT / "benchmark").glob("*.py"):
        shutil.copy(path, tmp_path / "benchmark")
    small = " ".join(small_flags("sdac_continuous_action")[7:])
    (tmp_path / "grid.toml").write_text(GRID.format(steps=400, sdac=small).replace("\n--", " --"))
    return tmp_path


def start(repository, *flags):
    command = [sys.executable, "benchmark/run.py", "grid.toml", *flags]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=repository, env=environment, **pipes)


def kept(repository, seeds=(1, 2), into="grid"):
    """Every run of the grid is kept exactly once, with the evaluations of an uninterrupted run."""
    results = sorted((repository / "benchmark/results" / into).glob("*.json"))
    keys = sorted(path.name.rsplit("__", 1)[0] for path in results)
    assert keys == [f"InvertedPendulum-v4__{name}__{seed}" for name in ("sac", "sdac") for seed in seeds]
    for path in results:
        args = json.loads(path.read_text())["args"]
        assert path.name.startswith(f"{args['env_id']}__{args['exp_name']}__{args['seed']}__")
        with open(path.with_suffix(".csv")) as file:
            assert [row["global_step"] for row in csv.DictReader(file)] == ["100", "200", "300", "400"]
    return results


def test_an_interrupted_grid_goes_on(repository):
    """Ended by SIGTERM in the middle of its runs, and started again: finished runs are kept, the others resumed."""
    work = repository / "benchmark/runs/grid"
    process = start(repository, "--jobs", "2")
    wait_for(lambda: len(list(work.glob("*/runs/*/checkpoint.pt"))) >= 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and output.endswith("interrupted; the same command goes on\n"), output
    assert "interrupted after step" in "".join(path.read_text() for path in work.glob("*/log.txt"))
    begun = {path.parent.name for path in work.glob("*/runs/*/checkpoint.pt")}
    process = start(repository, "--jobs", "2")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    before = {path.stem: path.stat().st_mtime_ns for path in kept(repository)}
    assert begun <= before.keys()  # resumed in their own folders, not begun again
    process = start(repository, "--jobs", "2")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "4 finished  0 running" in output
    assert {path.stem: path.stat().st_mtime_ns for path in kept(repository)} == before
    process = start(repository, "--only", "*__2", "--into", "again")  # runs with results, made anew elsewhere
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    kept(repository, [2], "again")
    assert {path.stem: path.stat().st_mtime_ns for path in kept(repository)} == before


def test_a_failing_run_is_named_and_the_others_end(repository):
    grid = repository / "grid.toml"
    grid.write_text(grid.read_text().replace("[1, 2]", "[1]") + 'wrong = "sac --gamma 2"\n')
    process = start(repository, "--jobs", "3")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "failed: InvertedPendulum-v4__wrong__1; see log.txt" in output
    assert "--gamma is 2.0" in (repository / "benchmark/runs/grid/InvertedPendulum-v4__wrong__1/log.txt").read_text()
    assert len(list((repository / "benchmark/results/grid").glob("*.json"))) == 2


def test_a_file_that_is_no_grid_is_refused(repository):
    (repository / "grid.toml").write_text("tasks = 3")
    output, _ = (process := start(repository)).communicate(timeout=60)
    assert process.returncode == 2 and "grid.toml is not a grid (KeyError: 'seeds')" in output


def test_a_selection_without_runs_is_refused(repository):
    output, _ = (process := start(repository, "--only", "Hopper*")).communicate(timeout=60)
    assert process.returncode == 2 and "no run named Hopper*" in output


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "benchmark").glob("*.toml")])
def test_grids_and_results_agree(name, monkeypatch):
    """The scripts accept every run's flags; on each task all settings have equal budgets of environment steps; results
    of a grid were made with the grid's arguments."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmark"))
    runs = importlib.import_module("run").read_grid(ROOT / "benchmark" / f"{name}.toml")
    budgets, arguments = {}, {}
    for run in runs:
        script = importlib.import_module(f"{run.script}_continuous_action")
        flags = ["--env-id", run.task, "--seed", str(run.seed), "--exp-name", run.name, *run.flags]
        args, _ = script.parse(flags)
        script.validate(args)
        budgets.setdefault(run.task, set()).add((args.total_timesteps, args.learning_starts, args.eval_frequency))
        assert run.key not in arguments
        arguments[run.key] = vars(args)
    assert all(len(budget) == 1 for budget in budgets.values())
    decided_by_the_machine = {"cuda", "compile", "bfloat16", "cudagraphs"}
    for path in (ROOT / "benchmark" / "results" / name).glob("*.json"):
        kept, here = json.loads(path.read_text())["args"], arguments[path.stem.rsplit("__", 1)[0]]
        different = [key for key in here if kept.get(key, here[key]) != here[key]]
        assert not set(different) - decided_by_the_machine, path


def test_every_folder_of_results_has_its_grid():
    folders = {path.parent.name for path in (ROOT / "benchmark" / "results").rglob("*-v*__*.json")}
    assert folders <= {path.stem for path in (ROOT / "benchmark").glob("*.toml")}


def test_a_lost_ray_worker(repository):
    """On a real local cluster one worker is killed in the middle of a run: every run still ends, none twice."""
    ray = pytest.importorskip("ray")
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    except Exception as error:
        pytest.skip(f"Ray cannot start here: {error}")
    try:
        process = start(repository, "--ray-address", ray.get_runtime_context().gcs_address)
        work = repository / "benchmark/runs/grid"

        def training():
            """(process, parent) of the scripts that run in the copy; the parents are the workers."""
            found = []
            for path in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):
                    if f"{repository}/s" in (path / "cmdline").read_text():
                        found.append((int(path.name), int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])))
            return found

        wait_for(lambda: list(work.glob("*/runs/*/checkpoint.pt")) and training())
        child, worker = training()[0]
        os.kill(child, signal.SIGSTOP)  # so that it cannot end by itself before its worker does
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: child not in [pid for pid, _ in training()])  # the run ends with its worker
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        kept(repository)
        logs = "".join(path.read_text() for path in work.glob("*/log.txt"))
        assert logs.count("device: cpu") == 5  # four runs, one of them started a second time
        assert logs.count("final evaluation") == 4
    finally:
        ray.shutdown()


@pytest.fixture
def plot(monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    monkeypatch.syspath_prepend(str(ROOT / "benchmark"))
    return importlib.import_module("plot")


def test_intervals_are_those_of_all_resamples(plot):
    """With three seeds there are 27 equally likely resamples; two samples are resampled each by itself."""
    first, second = np.array([1.0, 5.0, 6.0]), np.array([2.0, 3.0, 11.0])
    means = [np.mean(values) for values in itertools.product(first, repeat=3)]
    expected = np.quantile(means, [0.025, 0.975], method="inverted_cdf")
    assert plot.interval([first], np.mean) == pytest.approx(tuple(expected))
    both = [
        np.max(x) - np.mean(y) for x in itertools.product(first, repeat=3) for y in itertools.product(second, repeat=3)
    ]
    low, high = plot.interval([first, second], lambda x, y: np.max(x) - np.mean(y))
    # 2000 resamples: each end lies between the quantiles 4.5 standard errors beside it
    margin = 4.5 * np.sqrt(0.025 * 0.975 / 2000)
    for end, level in ((low, 0.025), (high, 0.975)):
        assert np.quantile(both, max(level - margin, 0)) <= end <= np.quantile(both, min(level + margin, 1))
    assert plot.interval([np.array([4.0])], np.mean) == (4, 4)


def test_table_and_scores_by_hand(plot, tmp_path):
    """Final and best of two seeds, cut to the steps that both have; scores relative to random actions."""
    for seed, returns in ((1, [10, 40, 20]), (2, [0, 30, 50, 99])):
        args = {"env_id": "Ant-v4", "exp_name": "sdac_continuous_action", "seed": seed}
        facts = {"args": args, "random_policy": {"mean": -400.0}}
        (tmp_path / f"Ant-v4__x__{seed}.json").write_text(json.dumps(facts))
        with open(tmp_path / f"Ant-v4__x__{seed}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["global_step", "updates", "episodic_return", "seconds"])
            writer.writerows([1000 * (i + 1), 200 * i, value, 60 * seed * (i + 1)] for i, value in enumerate(returns))
    tasks = plot.read(tmp_path)
    line = plot.table(tasks).splitlines()[2]
    # final 20 and 50, best 40 and 50, after 3 and 6 minutes
    start = "| Ant-v4 | sdac | 2 | 3,000 | 400 | 35.0 ± 21.2 | 45.0 ± 7.1 | 4.5 | "
    assert line.startswith(start)
    np.testing.assert_allclose(plot.normalised(tasks["Ant-v4"]["sdac"]), [420 / 6000, 450 / 6000])
    # of eight values the two smallest and the two largest are left out
    assert plot.interquartile_mean(np.array([9.0, 1, 2, 100]), np.array([3.0, -50, 4, 5])) == pytest.approx(14 / 4)
    plot.draw(tasks, tmp_path)


@pytest.mark.parametrize("folder", ["cpu", "variants"])
def test_readme_has_the_tables_of_the_files(plot, folder):
    text = plot.table(plot.read(ROOT / "benchmark" / "results" / folder))
    assert text == (ROOT / "benchmark" / "results" / folder / "table.md").read_text()
    assert text in (ROOT / "README.md").read_text()
