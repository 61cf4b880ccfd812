"""benchmark/run.py, record.py, plot.py, policy.py, values.py: interrupted grids, intervals, tables."""

import csv
import hashlib
import importlib
import itertools
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
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


@pytest.fixture
def one_run(repository):
    """The same with a grid of one run."""
    edit(repository / "grid.toml", "[1, 2]", "[1]")
    edit(repository / "grid.toml", "sdac = ", "# ")
    return repository


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def start(repository, *flags, **variables):
    command = [sys.executable, "benchmark/run.py", "grid.toml", *flags]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"} | variables
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=repository, env=environment, **pipes)


def outcome(repository, *flags, **variables):
    """Exit status and output of the command, when it has ended."""
    process = start(repository, *flags, **variables)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


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
    wait_for(lambda: len(list(work.glob("*/runs/*/metrics.csv"))) >= 2)  # there is an evaluation, of four
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and output.endswith("interrupted; the same command goes on\n"), output
    assert "interrupted: writes a checkpoint and ends; " in "".join(path.read_text() for path in work.glob("*/log.txt"))
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
    error = "error: cannot start: --gamma is 2.0; give a value from 0 to 1"
    failed = f"failed: InvertedPendulum-v4__wrong__1: {error}"
    assert process.returncode == 1 and output.endswith(f"{failed}\nsee log.txt in benchmark/runs/grid/<run>\n")
    assert "--gamma is 2.0" in (repository / "benchmark/runs/grid/InvertedPendulum-v4__wrong__1/log.txt").read_text()
    assert len(list((repository / "benchmark/results/grid").glob("*.json"))) == 2


def test_a_file_that_is_no_grid_is_refused(repository):
    (repository / "grid.toml").write_text("tasks = 3")
    output, _ = (process := start(repository)).communicate(timeout=60)
    assert process.returncode == 2 and "grid.toml is not a grid (KeyError: 'seeds')" in output


def test_a_script_that_is_not_there_is_refused(one_run):
    edit(one_run / "grid.toml", '"sac"', '"sacc"')
    status, output = outcome(one_run)
    assert status == 2 and "grid.toml is not a grid (ValueError: there is no script sacc)" in output


def test_a_selection_without_runs_is_refused(repository):
    output, _ = (process := start(repository, "--only", "*sac*", "Hopper*")).communicate(timeout=60)
    assert process.returncode == 2 and "no run named Hopper*" in output


def test_selected_runs_go_in_the_order_of_their_patterns(monkeypatch):
    """Each once, with those of a pattern in the grid's order."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmark"))
    module, found = importlib.import_module("run"), []
    monkeypatch.setattr(module, "run_here", lambda runs, _: found.extend(run.key for run in runs))
    monkeypatch.setattr(module.Run, "differences", lambda run: None)
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    patterns = ["Swimmer*__sac__2", "Swimmer*__2", "Hopper*__sdac__[13]"]
    monkeypatch.setattr(sys, "argv", ["run.py", str(ROOT / "benchmark/cpu.toml"), "--only", *patterns])
    module.main()
    assert found == [f"Swimmer-v4__{x}__2" for x in ("sac", "sdac")] + [f"Hopper-v4__sdac__{x}" for x in (1, 3)]


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ("\n$ a\nerror: old\n\n$ b\nerror: first\nerror: second\nevaluation\n", "error: second"),
        ("\n$ a\nerror: old\n\n$ b\nevaluation\nValueError: new\n \n", "ValueError: new"),
        ("\n$ a\nerror: old\n\n$ b\n", "no output"),
    ],
)
def test_the_error_of_a_failed_run(log, error, monkeypatch, tmp_path, capsys):
    """It is that of its last start. A terminal shows it, too."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmark"))
    module = importlib.import_module("run")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    run = module.Run("grid", "Task-v0", "sac", 1, "sac", [])
    run.folder().mkdir(parents=True)
    (run.folder() / "log.txt").write_text(log)
    assert run.last_line(failed=True) == error
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    module.show([run], {run.key: "failed"}, 0)
    assert capsys.readouterr().out.splitlines()[-1].split(maxsplit=2) == ["failed", "Task-v0__sac__1", error]


def test_an_edited_grid_is_refused(one_run):
    """Results and checkpoints of other arguments do not count; --rerun replaces results when new ones are there."""
    grid, results = one_run / "grid.toml", one_run / "benchmark/results/grid"
    key = "InvertedPendulum-v4__sac__1"
    status, output = outcome(one_run)
    assert status == 0, output
    first = sorted(results.iterdir())
    edit(grid, "--no-cuda", "--cuda")  # the machine decides
    status, output = outcome(one_run)
    assert status == 0 and "1 finished" in output, output
    edit(grid, '"sac"', '"sac --gamma 0.97"')
    status, output = outcome(one_run)
    assert status == 2 and f"the grid and 1 of 1 runs disagree: {key} has gamma 0.99 (grid: 0.97); " in output, output
    assert "--into" in output and "--rerun" in output and "running" not in output
    edit(grid, "0.97", "2")
    status, output = outcome(one_run, "--rerun")
    assert status == 1 and f"failed: {key}: error: cannot start: --gamma is 2.0" in output
    assert sorted(results.iterdir()) == first
    edit(grid, "gamma 2", "gamma 0.97")
    status, output = outcome(one_run)  # goes on with what --rerun began
    assert status == 0, output
    data, facts = sorted(results.iterdir())
    assert data.stem == facts.stem and not {data, facts} & set(first)
    assert json.loads(facts.read_text())["args"]["gamma"] == 0.97
    status, output = outcome(one_run)
    assert status == 0 and "1 finished" in output, output
    facts.unlink()  # as after an interruption: the run has begun, and there are no results
    edit(grid, "0.97", "0.96 --tau 0.5")
    for name in ("checkpoint.pt", "model.pt"):
        status, output = outcome(one_run)
        assert status == 2 and f"{key} has gamma 0.97 (grid: 0.96) and tau 0.005 (grid: 0.5); " in output, output
        next(one_run.glob(f"benchmark/runs/grid/*/runs/*/{name}")).write_bytes(b"")
        status, output = outcome(one_run)
        assert status == 2 and "has a damaged file" in output and name in output
        next(one_run.glob(f"benchmark/runs/grid/*/runs/*/{name}")).unlink()


def test_a_run_stays_with_its_script(one_run):
    """A run that has begun goes on with the version of the script with which it began, and its result names it."""
    status, output = outcome(one_run)
    assert status == 0, output
    (facts,) = (one_run / "benchmark/results/grid").glob("*.json")
    facts.unlink()  # as after an interruption
    next(one_run.glob("benchmark/runs/grid/*/runs/*/model.pt")).unlink()
    script = one_run / "sac_continuous_action.py"
    began = hashlib.sha256(script.read_bytes()).hexdigest()
    edit(script, '    run_dir = Path("', '    sys.exit("error: another version")\n            run_dir = Path("')
    status, output = outcome(one_run)
    assert status == 0, output
    assert json.loads(facts.read_text())["script_sha256"] == began
    status, output = outcome(one_run, "--rerun")
    assert status == 1 and output.count("error: another version") == 1


TASK = """
import os
import gymnasium as gym
import numpy as np

class Task(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (1,))
    steps = 0

    def __init__(self, render_mode=None):
        pass

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        if "BROKEN" in os.environ and self.steps > 120:
            raise RuntimeError("not today")
        return np.zeros(2, np.float32), 1.0, False, self.steps % 20 == 0, {}

gym.register(f"ns/{__name__}-v0", Task)
"""


def test_tasks_with_slash_and_colon(one_run):
    """Of a module on PYTHONPATH and of one beside the script: they fail, go on, and keep their names in the results."""
    (one_run / "modules").mkdir()
    (one_run / "modules/far.py").write_text(TASK)
    (one_run / "near.py").write_text(TASK)
    edit(one_run / "grid.toml", '"InvertedPendulum-v4"', '"far:ns/far-v0" = ""\n"near:ns/near-v0"')
    edit(one_run / "grid.toml", '= ""', '= "--learning-starts 20"')
    variables = {"PYTHONPATH": str(one_run / "modules")}
    status, output = outcome(one_run, "--jobs", "2", BROKEN="1", **variables)
    assert status == 1
    for name in ("near", "far"):
        assert f"failed: {name}-ns-{name}-v0__sac__1: RuntimeError: not today\n" in output
    for _ in range(2):  # the second time there is nothing left to do
        status, output = outcome(one_run, "--jobs", "2", **variables)
        assert status == 0 and output.splitlines()[-1].endswith("2 finished  0 running  0 waiting  0 failed"), output
    results = sorted((one_run / "benchmark/results/grid").glob("*.json"))
    for path, name in zip(results, ("far", "near"), strict=True):
        assert path.name.startswith(f"{name}-ns-{name}-v0__sac__1__")
        assert json.loads(path.read_text())["args"]["env_id"] == f"{name}:ns/{name}-v0"


PARTS = {"temperature": "full", "gpu": "full"}  # folders of results with a part of the runs of a grid


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "benchmark").glob("*.toml")])
def test_grids_and_results_agree(name, monkeypatch):
    """The scripts accept every run's flags; on each task all settings have equal budgets of environment steps; results
    of a grid were made with the grid's arguments."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmark"))
    runs = importlib.import_module("run").read_grid(ROOT / "benchmark" / f"{name}.toml")
    budgets, arguments = {}, {}
    for run in runs:
        script = importlib.import_module(f"{run.script}_continuous_action")
        args, _ = script.parse(run.flags)
        script.validate(args)
        budgets.setdefault(run.task, set()).add((args.total_timesteps, args.learning_starts, args.eval_frequency))
        assert run.key not in arguments
        arguments[run.key] = vars(args)
    assert all(len(budget) == 1 for budget in budgets.values())
    decided_elsewhere = {"cuda", "compile", "bfloat16", "resume", "wandb_project_name"}
    for path in (ROOT / "benchmark" / "results").glob("*/*__*.json"):
        if PARTS.get(path.parent.name, path.parent.name) != name:
            continue
        kept, here = json.loads(path.read_text())["args"], arguments[path.stem.rsplit("__", 1)[0]]
        different = [key for key in here if kept.get(key, here[key]) != here[key]]
        assert not set(different) - decided_elsewhere, path


def test_every_folder_of_results_has_its_grid():
    folders = {path.parent.name for path in (ROOT / "benchmark" / "results").rglob("*__*.json")}
    assert {PARTS.get(folder, folder) for folder in folders} <= {
        path.stem for path in (ROOT / "benchmark").glob("*.toml")
    }


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
                    if f"{repository}/benchmark/runs/" in (path / "cmdline").read_text():
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
        assert logs.count("evaluation at step 400: ") == 4
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


def write_run(folder, task, seed, steps, returns):
    """A result with the evaluations given, after `seed` minutes each."""
    args = {"env_id": task, "exp_name": "sdac_continuous_action", "seed": seed}
    facts = {"args": args, "random_policy": {"mean": -400.0}}
    (folder / f"{task}__x__{seed}.json").write_text(json.dumps(facts))
    with open(folder / f"{task}__x__{seed}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["global_step", "updates", "episodic_return", "seconds"])
        evaluations = enumerate(zip(steps, returns, strict=True))
        writer.writerows([step, 200 * i, value, 60 * seed * (i + 1)] for i, (step, value) in evaluations)


def test_table_and_scores_by_hand(plot, tmp_path):
    """Final and best of two seeds, cut to the steps that both have; scores relative to random actions."""
    write_run(tmp_path, "Ant-v4", 1, [1000, 2000, 3000], [10, 40, 20])
    write_run(tmp_path, "Ant-v4", 2, [1000, 2000, 3000, 4000], [0, 30, 50, 99])
    tasks = plot.read(tmp_path)
    line = plot.table(tasks).splitlines()[2]
    # final 20 and 50, best 40 and 50, after 3 and 6 minutes
    start = "| Ant-v4 | sdac | 2 | 3,000 of 4,000 | 400 | 35.0 ± 21.2 | 45.0 ± 7.1 | 4.5 | "
    assert line.startswith(start)
    np.testing.assert_allclose(plot.normalised(tasks["Ant-v4"]["sdac"]), [420 / 6000, 450 / 6000])
    # of eight values the two smallest and the two largest are left out
    assert plot.interquartile_mean(np.array([9.0, 1, 2, 100]), np.array([3.0, -50, 4, 5])) == pytest.approx(14 / 4)
    plot.draw(tasks, tmp_path)


@pytest.mark.parametrize("folder", ["cpu", "variants", "full", "temperature"])
def test_readme_has_the_tables_of_the_files(plot, folder):
    text = plot.table(plot.read(ROOT / "benchmark" / "results" / folder))
    assert text == (ROOT / "benchmark" / "results" / folder / "table.md").read_text()
    assert text in (ROOT / "benchmark" / "README.md").read_text()


def test_front_page_has_the_numbers_of_the_files():
    """Its table of results: final evaluations at a million steps; and a comparison at the small budget."""
    finals = {"full": {}, "cpu": {}}
    for folder, cells in finals.items():
        for line in (ROOT / f"benchmark/results/{folder}/table.md").read_text().splitlines()[2:]:
            task, name, seeds, steps, updates, final = line.strip("| ").split(" | ")[:6]
            expected = "970,000" if name == "sac-per-step" else "194,000"
            assert folder == "cpu" or (steps, updates) == ("1,000,000", expected)
            cells[task, name] = final if folder == "cpu" else f"{final} ({seeds})"
    text = (ROOT / "README.md").read_text()
    lines = text.splitlines()
    header = "| task | SDAC | `truncate` | `clip` | mirror descent | SAC | SAC, per step | others' SDAC, SAC |"
    table = list(itertools.takewhile(lambda line: line.startswith("|"), lines[lines.index(header) + 2 :]))
    assert len(table) == len({task for task, _ in finals["full"]})
    for line in table:
        task, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        names = ["sharper-mixture", "truncate", "clip", "mirror-descent", "sac", "sac-per-step"]
        assert cells[:6] == [finals["full"].get((task, name), "") for name in names]
    sdac, sac = (finals["cpu"]["HalfCheetah-v4", name] for name in ("sdac", "sac"))
    assert f"had {sdac} on HalfCheetah-v4, SAC {sac}." in text


@pytest.fixture
def tool(tmp_path, monkeypatch, capsys):
    """Runs a copy of a tool, whose results are elsewhere, in this process. Returns what it prints when it refuses."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmark"))

    def tool(name, *flags):
        path = shutil.copy(ROOT / "benchmark" / name, tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            assert end.code == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    (tmp_path / "results" / "mine").mkdir(parents=True)
    return tool


def test_plot_says_what_it_cannot_draw(plot, tool, tmp_path):
    mine = tmp_path / "results" / "mine"
    assert f"there are no runs in {tmp_path / 'results'}; " in tool("plot.py")
    assert "there are no runs in" in tool("plot.py", "nowhere")
    write_run(mine, "Hopper-v4", 1, [1000, 2000], [1, 2])
    write_run(mine, "Hopper-v4", 2, [1500, 2500], [1, 2])
    assert "the seeds of sdac on Hopper-v4 have no evaluation at a common step" in tool("plot.py", "mine")
    csv_file = mine / "Hopper-v4__x__2.csv"
    csv_file.unlink()
    error = tool("plot.py", "mine")
    assert "cannot be drawn" in error and str(csv_file) in error
    for wrong in ("", "{}", "[]"):
        write_run(mine, "Hopper-v4", 2, [1000, 2000], [1, 2])
        csv_file.with_suffix(".json").write_text(wrong)
        assert "cannot be drawn" in tool("plot.py", "mine")
    assert not (mine / "table.md").exists()


def test_plot_draws_tasks_of_any_name(plot, tool, tmp_path):
    write_run(tmp_path / "results" / "mine", "reach", 1, [1000], [1])
    assert tool("plot.py") == ""
    assert "| reach | sdac | 1 | 1,000 | 0 | 1.0 |" in (tmp_path / "results/mine/table.md").read_text()


def test_record_keeps_what_it_can(tool, tmp_path):
    """A folder without a finished run is refused in a sentence; the script's hash is kept if the script is there."""
    run = tmp_path / "runs" / "InvertedPendulum-v4__sac__1__1"
    assert "cannot be kept (FileNotFoundError: " in tool("record.py", run)
    run.mkdir(parents=True)
    saved = {"args": {"env_id": "InvertedPendulum-v4"}, "evaluations": []}
    torch.save(saved, run / "checkpoint.pt")
    (run / "metrics.csv").write_text("global_step,updates,episodic_return\n100,1,5\n")
    assert "cannot be kept (FileNotFoundError: " in tool("record.py", run)
    (run / "model.pt").touch()
    assert "cannot be kept (ValueError: " in tool("record.py", run)
    torch.save(saved | {"evaluations": [[100, 1, 5.0, 0.0, 10.0, 9.0]]}, run / "checkpoint.pt")
    facts = tmp_path / "results" / f"{run.name}.json"
    assert tool("record.py", run) == "" and json.loads(facts.read_text())["script_sha256"] is None
    (tmp_path / "sac_continuous_action.py").write_text("1 + 1\n")
    expected = hashlib.sha256(b"1 + 1\n").hexdigest()
    assert tool("record.py", run) == "" and json.loads(facts.read_text())["script_sha256"] == expected


def test_record_keeps_evaluations_with_their_seconds(tool, tmp_path):
    """Seconds are in the checkpoint, the arguments tell the algorithm; --until also keeps a run that has not ended."""
    run = tmp_path / "runs" / "InvertedPendulum-v4__sdac__1__1"
    run.mkdir(parents=True)
    args = {"env_id": "InvertedPendulum-v4", "denoising_steps": 3, "resume": "runs/x"}
    evaluations = [[100, 1, 5.5, 0.5, 10.0, 9.25], [200, 2, 6.5, 0.0, 11.0, 17.5]]
    (run / "metrics.csv").write_text("global_step,updates,episodic_return\n100,1,5.5\n200,2,6.5\n")
    torch.save({"args": args, "evaluations": evaluations, "rows": torch.zeros(5, 3)}, run / "checkpoint.pt")
    assert "no evaluation at step 150" in tool("record.py", run, "--until", 150)
    assert tool("record.py", run, "--until", 100) == ""
    expected = "global_step,updates,episodic_return,seconds\n100,1,5.5,9.25\n"
    assert (tmp_path / "results" / f"{run.name}.csv").read_text() == expected
    (run / "model.pt").touch()
    assert tool("record.py", run) == ""
    expected = "global_step,updates,episodic_return,seconds\n100,1,5.5,9.25\n200,2,6.5,17.5\n"
    assert (tmp_path / "results" / f"{run.name}.csv").read_text() == expected
    facts = json.loads((tmp_path / "results" / f"{run.name}.json").read_text())
    assert facts["algorithm"] == "sdac" and facts["seconds"] == 17.5 and facts["args"] == args | {"resume": None}


def test_arguments_of_earlier_versions_are_compared(monkeypatch, tmp_path):
    """In a result and in a checkpoint: a flag that is no more, or came later, is no difference; another value or
    algorithm is."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmark"))
    module = importlib.import_module("run")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    sdac, sac = (module.Run("grid", "Hopper-v4", "x", 1, name, ["--env-id", "Hopper-v4"]) for name in ("sdac", "sac"))
    args = {"exp_name": "sdac_continuous_action", "env_id": "Hopper-v4", "gamma": 0.99, "denoising_steps": 6}
    removed = {"torch_deterministic": True, "save_model": False, "cudagraphs": True, "wandb_project_name": "another"}
    result = tmp_path / f"benchmark/results/grid/{sdac.key}__1.json"
    checkpoint = sdac.folder() / "runs" / sdac.key / "checkpoint.pt"
    for path, write in (
        (result, lambda facts: result.write_text(json.dumps(facts))),
        (checkpoint, lambda facts: torch.save(facts, checkpoint)),
    ):
        path.parent.mkdir(parents=True)
        write({"args": args | removed, "algorithm": "sdac"})
        assert sdac.differences() is None
        assert "algorithm sdac (grid: sac)" in sac.differences()
        write({"args": args | {"gamma": 0.5}})
        assert sdac.differences() == "gamma 0.5 (grid: 0.99)"
        path.unlink()


class Drawn(gym.Env):
    """A picture is a number: 10 times the steps taken, plus 5 times the last action's value in the box [0, 2], plus
    100 if it is drawn by camera 2."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 20}
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(0, 2, (1,))

    def __init__(self, render_mode=None, width=8, height=6):
        self.render_mode, self.shape, self.value = render_mode, (height, width, 3), 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps, self.value = self.steps + 1, round(5 * float(action[0]))
        return np.zeros(2, np.float32), 0.0, self.steps == 7, False, {}

    def render(self):
        camera = getattr(self, "mujoco_renderer", SimpleNamespace(camera_id=-1)).camera_id
        return np.full(self.shape, 10 * self.steps + self.value + 100 * (camera == 2), np.uint8)


@pytest.mark.parametrize("cameras", [None, {"side": 1}, {"side": 1, "track": 2}], ids=["none", "fixed", "following"])
def test_film_is_of_the_policies(monkeypatch, tool, tmp_path, cameras):
    """Two policies side by side in the task's own time, drawn by its following camera, if there is one; after its end
    an episode stays on its last picture."""
    image = pytest.importorskip("PIL.Image")
    if cameras:
        model = SimpleNamespace(camera=lambda name: SimpleNamespace(id=cameras[name]))
        monkeypatch.setattr(Drawn, "model", model, raising=False)
        monkeypatch.setattr(Drawn, "mujoco_renderer", SimpleNamespace(camera_id=-1), raising=False)
    monkeypatch.setitem(gym.registry, "Drawn-v0", gym.envs.registration.EnvSpec("Drawn-v0", Drawn))
    for path, value in ((tmp_path / "early", -1.0), (tmp_path / "late", 1.0)):
        path.mkdir()
        module = importlib.import_module("sac_continuous_action")
        agent = module.Agent(args := module.Args(env_id="Drawn-v0", compile=False), 2, 1, torch.device("cpu"))
        with torch.no_grad():  # the action is `value`, whatever the state
            agent.policy.layers[-1].weight.zero_()
            agent.policy.layers[-1].bias.copy_(torch.tensor([20 * value, 0]))
        contents = {"args": vars(args), "agent": agent.state_dict(), "updates": 1, "step": 3}
        torch.save(contents, path / ("model.pt" if value < 0 else "checkpoint.pt"))
    runs, out = (tmp_path / "early/model.pt", tmp_path / "late"), tmp_path / "film.gif"
    flags = ["--out", out, "--seconds", 1, "--frames-per-second", 10, "--size", 90, 40]
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert tool("film.py", *runs, *flags) == ""
    with image.open(out) as film:
        assert film.size == (180, 40) and film.info["loop"] == 0
        numbers = []
        for frame in range(film.n_frames):
            film.seek(frame)
            pixels, times = np.asarray(film.convert("L")), film.info["duration"] // 100
            assert (pixels[20:, :90] == pixels[30, 10]).all() and (pixels[20:, 90:] == pixels[30, 100]).all()
            numbers += [(int(pixels[30, 10]), int(pixels[30, 100]))] * times
    expected = [(0, 0), (20, 30), (40, 50), *[(60, 70)] * 7]  # before steps 0, 2, 4, 6; the episode ends with step 7
    expected = np.array(expected) + 100 * bool(cameras and "track" in cameras)
    np.testing.assert_allclose(numbers, expected, atol=2)  # GIF has few colours
    assert "is no run of this version" in tool("film.py", tmp_path / "nowhere")
    assert "give one for each" in tool("film.py", *runs, "--labels", "one")


def test_speed_compares_equal_networks(module, monkeypatch):
    """The eager networks that speed.py measures beside the scripts' own compute the same (bfloat16: nearly)."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmark"))
    monkeypatch.setattr(module.MLP, "forward", module.MLP.forward)
    torch.manual_seed(0)
    obs, actions, critics = torch.randn(3, 5), torch.randn(3, 4, 2), module.MLP(5, 2, 1, ensemble=(2,))
    if hasattr(module, "Actor"):
        monkeypatch.setattr(module.Actor, "forward", module.Actor.forward)
        functions = [(module.Actor(5, 2), (obs,), 1e-6)]
    else:
        denoiser, t = module.Denoiser(5, 2), torch.tensor(1)
        functions = [(denoiser, (obs, actions, t), 1e-6), (denoiser, (obs, actions, t, torch.bfloat16), 1e-3)]
    functions.append((critics, (obs, actions), 1e-6))
    with torch.no_grad():
        before = [function(*inputs) for function, inputs, _ in functions]
        importlib.import_module("speed").plain_networks(module)
        for (function, inputs, tolerance), expected in zip(functions, before, strict=True):
            torch.testing.assert_close(function(*inputs), expected, rtol=0, atol=tolerance, check_dtype=False)


@pytest.fixture
def policy(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmark"))
    return importlib.import_module("policy")


def test_metropolis_samples_a_known_density(policy):
    """exp(Q/λ) with Q = -|a - c|²/2 in the box is a product of truncated Gaussians."""
    stats = pytest.importorskip("scipy.stats")
    center, temperature, generator = torch.tensor([0.2, 0.9]), 0.09, torch.Generator().manual_seed(1)
    start = torch.rand(1, 20_000, 2, generator=generator) * 2 - 1
    q = lambda a: -(a - center).square().sum(-1) / 2  # noqa: E731
    samples = policy.metropolis(q, start, temperature, generator)[0]
    for x, c in zip(samples.T.numpy(), center.tolist(), strict=True):
        exact = stats.truncnorm((-1 - c) / 0.3, (1 - c) / 0.3, c, 0.3)
        assert stats.kstest(x, exact.cdf).statistic < 0.016  # p < 1e-4 for 20,000 independent samples


@pytest.mark.parametrize("file", ["policy.json", "policy-humanoid.json"])
def test_readme_has_the_figures_of_the_policies(file):
    lines = (ROOT / "benchmark/README.md").read_text().splitlines()
    for name, facts in json.loads((ROOT / "benchmark/results" / file).read_text())["runs"].items():
        levels, beyond, others = facts["Q"], "components beyond 0.9", ", exp(Q/λ)"
        row = [f"{x:.2f}" for x in (facts["lambda"], levels["exp(Q/λ)"], levels["best of 1"], levels["maximum"])]
        row += [f"{facts[beyond + others]:.0%}, {facts[beyond]:.0%}"]
        row += [", ".join(f"{facts[f'evaluation, K = {k}']['episodic_return']:.0f}" for k in (1, 4, 32))]
        assert f"| `{name.split('__')[1]}` | {' | '.join(row)} |" in lines


@pytest.mark.parametrize("file", ["refit.json", "refit-humanoid.json"])
def test_readme_has_the_figures_of_the_refits(file):
    text = (ROOT / "benchmark/README.md").read_text()
    (refits,) = json.loads((ROOT / "benchmark/results" / file).read_text())["runs"].values()
    rows = []
    for facts in refits:
        name, m = (f"`{facts['proposal']}`", facts["M"]) if facts["M"] else ("as it is", "")
        levels = [facts["Q"][x] for x in ("best of 1", "best of 4", "best of 32", "exp(Q/λ)")]
        rows.append(" ".join(f"| {name} | {m} | {' | '.join(f'{x:.2f}' for x in levels)} |".split()))
    assert "\n".join(rows) in text


def test_maximum_of_a_known_function(policy):
    center = torch.tensor([[0.2, 0.7], [-0.5, 3.0]])  # the second one's maximum is on a face
    q = lambda a: -(a - center[:, None]).square().sum(-1)  # noqa: E731
    np.testing.assert_allclose(policy.maximum(q, torch.zeros(2, 2), 1000), [0, -4], atol=2e-2)


def test_figures_of_a_policy_by_hand(policy):
    """Q = a_1 + 3 a_2 has σ = √(10/3) over the box; a denoiser that predicts ε of the point (½, ½) acts there."""
    point, schedule = torch.tensor([0.5, 0.5]), policy.sdac.NoiseSchedule(6, "log-snr")

    class Exact(torch.nn.Module):
        action_dim = 2

        def forward(self, obs, a_t, t, dtype=None):
            return (a_t - schedule.signal[t] * point) / schedule.noise[t]

    q = lambda obs, actions: (actions @ torch.tensor([1.0, 3.0]))[None, ..., None].expand(2, -1, -1, 1)  # noqa: E731
    agent = SimpleNamespace(critics=q, schedule=schedule, action_dim=2, ema_policy=Exact())
    facts = policy.inspect(agent, torch.zeros(64, 1), torch.tensor(0.1), torch.Generator().manual_seed(1))
    levels = facts["Q"]
    assert levels["best of 1"] == pytest.approx(2 / math.sqrt(10 / 3), rel=0.02)
    assert levels["best of 32"] == pytest.approx(levels["best of 1"], rel=1e-3)
    assert levels["maximum"] == pytest.approx(4 / math.sqrt(10 / 3), rel=0.03)
    # exp(a g / λ) on [-1, 1] has the mean coth(g/λ) - λ/g
    expected = sum(g * (1 / math.tanh(g / 0.1) - 0.1 / g) for g in (1, 3))
    assert levels["exp(Q/λ)"] == pytest.approx(expected / math.sqrt(10 / 3), rel=0.02)
    assert facts["std of actions"] < 1e-3 and facts["components beyond 0.9"] == 0


def test_values_are_those_of_the_first_episodes(monkeypatch, scripted):
    """Q belongs to the state before the step, rewards are scaled, and what follows an ended episode is left out."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmark"))
    values = importlib.import_module("values")
    monkeypatch.setattr(values, "HORIZON", 2)
    monkeypatch.setattr(
        values.sdac, "min_q", lambda critics, obs, actions: 1000 * obs[:, :1] + obs[:, 1:2] + obs[:, 2:]
    )
    scripted.plan = [[(3, "terminated"), (9, "terminated")], [(6, "truncated")], [(1, "truncated")]]
    args = values.sdac.Args(env_id="Scripted-v0", num_particles=2, compile=False)
    episodes = values.play(values.sdac.Agent(args, 3, 2, torch.device("cpu")), 3)
    assert [(q.tolist(), ended) for q, _, ended in episodes] == [
        ([0, 1, 2], True),
        ([1000, 1001, 1002, 1003, 1004, 1005], False),
        ([2000], False),
    ]
    # a sum for each pair; the last Q stands for the last pair of a truncated episode and what follows it
    expected = []
    for (q, rewards, ended), kept in zip(episodes, (3, 4, 0), strict=True):
        i, last = len(expected), len(q) if ended else len(q) - 1
        np.testing.assert_allclose(rewards, args.reward_scale * (10 * i + 1 + np.arange(len(q))))
        sums = [sum(0.9 ** (k - j) * rewards[k] for k in range(j, last)) for j in range(kept)]
        expected.append([x + (0 if ended else 0.9 ** (last - j) * q[-1]) for j, x in enumerate(sums)])
    for episode, sums in zip(episodes, expected, strict=True):
        q, earned = values.earned(*episode, 0.9)
        np.testing.assert_allclose(earned, sums)
        np.testing.assert_array_equal(q, episode[0][: len(sums)])


def test_readme_has_the_figures_of_the_values():
    text = (ROOT / "benchmark/README.md").read_text()
    for name, facts in json.loads((ROOT / "benchmark/results/values.json").read_text())["runs"].items():
        task, setting, seed = name.split("__")
        row = [task, f"`{setting}`", seed, *(f"{facts[x]:.1f}" for x in ("Q", "earned"))]
        row += [f"{facts['relative error']:.0%}", f"{facts['correlation']:.2f}"]
        assert f"| {' | '.join(row)} |" in text
