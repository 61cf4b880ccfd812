"""The commands of benchmark/: run.py, record.py, plot.py, film.py, policy.py, speed.py."""

import copy
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
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))
torch.set_num_threads(1)

common, film, plot, policy, record, run, speed = map(
    importlib.import_module, ("common", "film", "plot", "policy", "record", "run", "speed")
)
sdac, sac = common.script("sdac"), common.script("sac")
pytestmark = pytest.mark.filterwarnings("ignore:.*out of date|.*compiler attribute")

SMALL = "--num-envs 4 --batch-size 16 --learning-starts 20 --eval-episodes 1 --no-compile --no-cuda"
SMALL_SDAC = "--denoising-steps 2 --num-particles 1 --num-eval-particles 1"
SMALL_SDAC += " --num-reverse-samples 2"


def call(path, monkeypatch, *argv):
    """Run a command in this process."""
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, argv)])
    runpy.run_path(str(path), run_name="__main__")


# ---- run.py
def write_grid(folder, flags="", settings=f'sdac = "sdac {SMALL_SDAC}"\nsac = "sac"', seeds=(1,)):
    path = folder / "grid.toml"
    path.write_text(
        f'flags = "{SMALL} --total-timesteps 1000 --eval-frequency 200 {flags}"\n'
        f"[settings]\n{settings}\n"
        f'[[runs]]\ntasks = ["InvertedPendulum-v4"]\nseeds = {list(seeds)}\n'
        f"settings = {[line.split()[0] for line in settings.splitlines()]}\n"
    )
    return path


@pytest.fixture
def repository(tmp_path):
    """A copy of the scripts and of the commands, without results."""
    (tmp_path / "benchmark").mkdir()
    for path in (*ROOT.glob("*_continuous_action.py"), *(ROOT / "benchmark").glob("*.py")):
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    return tmp_path


@pytest.fixture
def start(repository):
    """Start run.py there; what still runs at the end of a test is killed with its runs."""
    started = []

    def start(*flags):
        command = [sys.executable, "benchmark/run.py", "grid.toml", *flags]
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, cwd=repository, env=env, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.02)


def steps(path):
    """The steps of the evaluations in a CSV file."""
    return [int(row["global_step"]) for row in csv.DictReader(path.read_text().splitlines())]


@pytest.mark.parametrize("chosen", [None, "3"])
def test_runs_share_the_cores_unless_a_number_of_threads_is_chosen(tmp_path, monkeypatch, chosen):
    environments = []
    monkeypatch.setattr(run.subprocess, "Popen", lambda *_, env, **__: environments.append(env))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    (job, _) = run.read_grid(write_grid(tmp_path))
    job.folder = tmp_path / "run"
    job.log = job.folder / "log.txt"
    job.start(threads=2)
    assert environments[0]["OMP_NUM_THREADS"] == (chosen or "2")


def test_an_interrupted_grid_goes_on_with_the_scripts_of_its_beginning(repository, start):
    """Killed at first, then ended by SIGTERM, then started to the end, and once more."""
    write_grid(repository)
    scripts = {name: repository / f"{name}_continuous_action.py" for name in ("sdac", "sac")}
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in scripts.items()}
    runs = repository / "benchmark/runs/grid"

    def evaluations():
        return [len(steps(path)) for path in runs.glob("*/runs/*/metrics.csv")]

    process = start("--jobs", "2")
    wait_for(lambda: len(evaluations()) == 2 and min(evaluations()) >= 1)
    process.kill()
    wait_for(lambda: all("Go on with" in path.read_text() for path in runs.glob("*/log.txt")))
    before = evaluations()

    for script in scripts.values():  # A new version, which ends at once unless run.py asks it.
        new = 'assert "run.py" in sys.argv[0]\n\n\ndef train('
        script.write_text(script.read_text().replace("def train(", new))
    process = start("--jobs", "2")
    wait_for(lambda: sum(evaluations()) > sum(before))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.endswith("interrupted; the same command goes on\n"), output

    command = [sys.executable, "benchmark/record.py", *runs.glob("*/runs/*"), "--into", "grid"]
    subprocess.run(command, cwd=repository, check=True)  # so far
    process = start("--jobs", "2")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and output.startswith("0 of 2 runs have results\n"), output
    results = repository / "benchmark/results/grid"
    kept = {path: path.read_text() for path in results.iterdir()}
    assert {path.stem for path in kept} == {f"InvertedPendulum-v4__{x}__1" for x in hashes}
    for name, script_hash in hashes.items():
        path = results / f"InvertedPendulum-v4__{name}__1.json"
        assert json.loads(path.read_text())["script_sha256"] == script_hash
        found = steps(path.with_suffix(".csv"))
        assert found[0] == 200 and found[-1] == 1000 and found == sorted(set(found))
        assert len(list(runs.glob(f"*__{name}__1/runs/*"))) == 1  # It was never begun anew.

    process = start("--jobs", "2")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and output == "2 of 2 runs have results\n"
    assert {path: path.read_text() for path in results.iterdir()} == kept


def test_a_failing_run_is_named_and_the_others_end(repository, start):
    path = write_grid(repository, settings='sac = "sac"')
    text = path.read_text().replace("[[runs]]\n", '[[runs]]\nflags = "--total-timesteps 200"\n')
    path.write_text(text.replace('["Inv', '["Nowhere-v0", "Inv'))
    process = start("--jobs", "2")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Nowhere-v0__sac__1 failed: Nowhere-v0 cannot be used: " in output
    log = "benchmark/runs/grid/Nowhere-v0__sac__1/log.txt"
    assert output.endswith(f"failed: Nowhere-v0__sac__1; see {log}\n")
    assert "Nowhere-v0 cannot be used" in (repository / log).read_text()
    results = (repository / "benchmark/results/grid").glob("*.csv")
    assert [(path.stem, steps(path)) for path in results] == [
        ("InvertedPendulum-v4__sac__1", [200])
    ]


@pytest.fixture
def main(tmp_path, monkeypatch):
    """run.main with another root. It returns the runs that would start, in order."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    started = []
    monkeypatch.setattr(run, "run_all", lambda runs, jobs: started.extend(runs))

    def main(*argv):
        started.clear()
        monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / "grid.toml"), *argv])
        run.main()
        return started

    return main


def write_made(place, made, algorithm="sdac", **changes):
    """What a run leaves: its results, or only the arguments with which it has begun."""
    path = {"results": made.result, "begun": made.folder / "args.json"}[place]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"algorithm": algorithm, "args": {**made.args, **changes}}))


@pytest.mark.parametrize("place", ["results", "begun"])
def test_a_run_with_other_arguments_than_the_grids_is_refused(place, main, tmp_path, capsys):
    write_grid(tmp_path, flags="--gamma 0.97")
    made, _ = main()
    write_made(place, made, "sac", gamma=0.99, cuda=True)  # The device makes no difference.
    with pytest.raises(SystemExit):
        main()
    words = "has gamma 0.99 (grid: 0.97) and algorithm sac (grid: sdac); "
    error = capsys.readouterr().err
    assert f"1 of 2 runs differ from the grid: InvertedPendulum-v4__sdac__1 {words}" in error
    assert len(main("--only", "*__sac__*")) == 1  # Others may run.


def test_a_begun_run_is_compared_also_where_it_has_results(main, tmp_path):
    write_grid(tmp_path, settings='sac = "sac"')
    (made,) = main()
    write_made("results", made, "sac")
    write_made("begun", made, "sac", gamma=0.5)
    assert made.differences() == "gamma 0.5 (grid: 0.99)"


@pytest.mark.parametrize("end, files", [("1000,9,1,1", 2), ("800,9,1,1", 2), ("", 2), ("1000", 1)])
def test_a_result_is_whole_at_the_last_step(main, tmp_path, end, files):
    write_grid(tmp_path, settings='sac = "sac"')
    (made,) = main()
    table = made.result.with_suffix(".csv")
    table.parent.mkdir(parents=True)
    table.write_text(end and f"global_step,updates\n{end}\n")
    if files == 2:
        write_made("results", made, "sac")
    assert made.has_result() == (end == "1000,9,1,1")


def test_flags_that_came_later_had_their_defaults(main, tmp_path):
    write_grid(tmp_path, settings='sac = "sac"')
    (made,) = main()
    write_made("results", made, "sac", flag_of_earlier_days=7)
    facts = json.loads(made.result.read_text())
    del facts["args"]["gamma"]
    made.result.write_text(json.dumps(facts))
    assert not made.differences()
    made.args["gamma"] = 0.5
    assert made.differences() == "gamma 0.99 (grid: 0.5)"


def test_rerun_deletes_what_the_selected_runs_have(main, tmp_path):
    write_grid(tmp_path, seeds=(1, 2))
    for made in main():
        write_made("results", made, gamma=0.5)
        write_made("begun", made, gamma=0.5)
    selected = main("--rerun", "--only", "*__sac__1")
    for made in main("--rerun", "--only", "*__sdac__*") + selected:
        assert not made.result.exists() and not made.folder.exists()
    assert [path.stem for path in (tmp_path / "results/grid").iterdir()] == [
        "InvertedPendulum-v4__sac__2"
    ]


def test_selected_runs_start_in_the_order_of_their_patterns(main, tmp_path):
    write_grid(tmp_path, seeds=(1, 2, 3))
    names = [
        made.name.split("__", 1)[1] for made in main("--only", "*__sac__2", "*__2", "*c__[13]")
    ]
    assert names == ["sac__2", "sdac__2", "sdac__1", "sac__1", "sdac__3", "sac__3"]


@pytest.mark.parametrize(
    "settings, words",
    [
        ('zac = "zac"', "is not a grid (ModuleNotFoundError: "),
        ('x = "sac"', "no run has the name *sac*"),
    ],
)
def test_an_unknown_script_and_a_selection_without_runs_are_refused(
    settings, words, main, tmp_path, capsys
):
    write_grid(tmp_path, settings=settings)
    with pytest.raises(SystemExit):
        main("--only", "*__1", "*sac*")
    assert words in capsys.readouterr().err


GRIDS = sorted((ROOT / "benchmark").glob("*.toml"))


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_a_grid_gives_all_settings_of_a_task_equal_steps_and_no_run_twice(path):
    runs = run.read_grid(path)
    budgets = {}
    for made in runs:
        budgets.setdefault(made.args["env_id"], set()).add(made.args["total_timesteps"])
    assert len({made.name for made in runs}) == len(runs)
    assert all(len(budget) == 1 for budget in budgets.values())


def test_every_result_was_made_with_the_arguments_of_its_grid():
    runs = {made.result: made for path in GRIDS for made in run.read_grid(path)}
    for path in common.RESULTS.glob("*/*__*.json"):
        assert path in runs, path
        assert not runs[path].differences(), path


# ---- record.py
def write_events(path, *events):
    """A file of TensorBoard's: wall time, and tag and step or None, of each event."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    with open(path, "wb") as file:
        writer = RecordWriter(file)
        for wall_time, tag, step in events:
            value = Summary(value=[Summary.Value(tag=tag or "x", simple_value=1.0)])
            event = Event(wall_time=wall_time, step=step or 0, summary=value)
            writer.write(event.SerializeToString())


def test_time_between_interruption_and_resumption_does_not_count(tmp_path):
    evaluation = "eval/episodic_return"
    write_events(
        tmp_path / "events.out.tfevents.1000.a",
        *((1000, None, None), (1010, "charts/SPS", 90), (1020, evaluation, 100)),
        (1025, "charts/SPS", 120),
    )
    write_events(
        tmp_path / "events.out.tfevents.9000.b",
        *((9000, None, None), (9003, evaluation, 200), (9013, evaluation, 300)),
    )
    (tmp_path / "events.out.tfevents.9500.c").touch()  # of a start that was killed at once
    assert record.seconds_of_evaluations(tmp_path) == {100: 20, 200: 28, 300: 38}


def test_the_commands_read_what_a_training_wrote(tmp_path, monkeypatch):
    """record.py keeps its evaluations, and policy.py looks into its policy."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    flags = ["--env-id", "Pendulum-v1", "--total-timesteps", "100", "--eval-frequency", "40"]
    with torch.random.fork_rng():
        sdac.main([*flags, "--seed", "7", *SMALL.split(), *SMALL_SDAC.split()])
    (trained,) = (tmp_path / "runs").iterdir()

    call(record.__file__, monkeypatch, trained, "--into", "mine")
    rows = list(csv.DictReader(open("results/mine/Pendulum-v1__sdac_continuous_action__7.csv")))
    seconds = [float(row.pop("seconds")) for row in rows]
    assert rows == list(csv.DictReader(open(trained / "metrics.csv")))
    assert [row["global_step"] for row in rows] == ["40", "80", "100"]
    assert 0 < seconds[0] <= seconds[1] <= seconds[2] < 60
    facts = json.loads(Path("results/mine/Pendulum-v1__sdac_continuous_action__7.json").read_text())
    assert facts["algorithm"] == "sdac" and facts["args"]["seed"] == 7
    assert facts["script_sha256"] is None  # The script does not lie beside runs/.

    facts = policy.look_into(trained, num_states=4)
    assert facts["step"] == 100
    assert facts["lambda"] == pytest.approx(0.01, rel=0.9)  # in units of another spread of Q


# ---- plot.py
def test_intervals_are_those_of_all_resamples():
    """Three seeds have 27 equally likely resamples."""
    sample = np.array([1.0, 5.0, 6.0])
    means = [np.mean(values) for values in itertools.product(sample, repeat=3)]
    expected = np.quantile(means, [0.025, 0.975], method="inverted_cdf")
    assert tuple(plot.interval(sample)) == pytest.approx(tuple(expected))
    assert tuple(plot.interval(np.array([4.0]))) == (4, 4)


def write_result(folder, setting, seed, returns, task="Ant-v4"):
    """Evaluations at every 1000 steps, each after `seed` minutes more."""
    folder.mkdir(parents=True, exist_ok=True)
    args = {"env_id": task, "exp_name": setting, "seed": seed}
    (folder / f"{task}__{setting}__{seed}.json").write_text(json.dumps({"args": args}))
    lines = ["global_step,updates,episodic_return,episodic_return_std,seconds"]
    for i, value in enumerate(returns, 1):
        lines.append(f"{1000 * i},{200 * i},{value},0,{60 * seed * i}")
    (folder / f"{task}__{setting}__{seed}.csv").write_text("\n".join(lines) + "\n")


def test_the_table_is_that_of_a_hand(tmp_path):
    """Last and best of two seeds, cut to the steps that both have."""
    write_result(tmp_path, "sac-per-step", 1, [7])
    write_result(tmp_path, "sdac", 1, [10, 40, 20])
    write_result(tmp_path, "sdac", 2, [0, 30, 50, 99])
    assert plot.table(plot.read(tmp_path)).splitlines()[2:] == [
        # last 20 and 50, best 40 and 50; the trainings took 3 and 8 minutes
        "| Ant-v4 | SDAC | 2 | 3,000 | 600 | 35.0 ± 21.2 | 45.0 ± 7.1 | 5.5 | 1405 |",
        "| Ant-v4 | SAC per step | 1 | 1,000 | 200 | 7.0 | 7.0 | 1.0 |  |",
    ]


def test_the_picture_has_the_means_and_the_published_returns(tmp_path, monkeypatch):
    figures = []
    original = plot.Figure
    monkeypatch.setattr(
        plot, "Figure", lambda *a, **k: figures.append(original(*a, **k)) or figures[0]
    )
    write_result(tmp_path, "sac", 1, [7, 8])
    write_result(tmp_path, "sdac", 1, [10, 40])
    write_result(tmp_path, "sdac", 2, [0, 30])
    write_result(tmp_path, "sac", 1, [9, 9], task="Reacher-v4")  # without SDAC: not drawn
    plot.draw(plot.read(tmp_path), tmp_path / "curves.png")
    (axis,) = figures[0].axes
    lines = [(tuple(line.get_xdata()), tuple(line.get_ydata())) for line in axis.lines]
    sdac_published, sac_published = (plot.PUBLISHED["Ant-v4"][x] for x in ("sdac", "sac"))
    assert lines == [
        ((1000, 2000), (5, 35)),
        ((0, 1), (sdac_published, sdac_published)),
        ((1000, 2000), (7, 8)),
        ((0, 1), (sac_published, sac_published)),
    ]
    texts = [text.get_text() for text in figures[0].legends[0].texts]
    assert texts == ["SDAC", "SDAC, by others", "SAC", "SAC, by others"]
    low, high = axis.collections[0].get_paths()[0].get_extents().intervaly
    assert (low, high) == (0, 40)  # With two seeds the interval reaches from one to the other.


def test_plot_says_that_there_are_no_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    with pytest.raises(SystemExit) as end:
        call(plot.__file__, monkeypatch)
    assert end.value.code == 0
    sentence = "There are no results yet: make some with benchmark/run.py.\n"
    assert "".join(capsys.readouterr()) == sentence


def test_plot_draws_every_folder_of_results(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    write_result(tmp_path / "one", "mine", 1, [3], task="reach")
    write_result(tmp_path / "two", "sac", 1, [4, 5])
    (tmp_path / "toy").mkdir()
    call(plot.__file__, monkeypatch)
    assert (
        "| reach | mine | 1 | 1,000 | 200 | 3.0 | 3.0 | 1.0 |  |"
        in (tmp_path / "one/table.md").read_text()
    )
    assert {path.parent.name for path in tmp_path.glob("*/curves.png")} == {"one", "two"}


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in common.RESULTS.glob("*/*__*.json")})
)
def test_committed_tables_are_those_of_the_committed_results(folder):
    assert (folder / "table.md").read_text() == plot.table(plot.read(folder))


# ---- film.py
class Drawn(gym.Env):
    """A picture is a number: 10 times the steps taken, plus 5 times the last action in [0, 2], plus
    100 if camera 2 draws it."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 20}
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(0, 2, (1,))

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


@pytest.mark.parametrize("cameras", [None, {"side": 1}, {"side": 1, "track": 2}])
def test_the_film_shows_the_policies_side_by_side(monkeypatch, tmp_path, cameras):
    """In the task's own time, by its following camera if there is one; an episode that is over
    stays on its last picture."""
    if cameras:
        model = SimpleNamespace(camera=lambda name: SimpleNamespace(id=cameras[name]))
        renderer = SimpleNamespace(camera_id=-1)
        monkeypatch.setattr(Drawn, "model", model, raising=False)
        monkeypatch.setattr(Drawn, "mujoco_renderer", renderer, raising=False)
    spec = gym.envs.registration.EnvSpec("Drawn-v0", Drawn)
    monkeypatch.setitem(gym.registry, "Drawn-v0", spec)
    for name, value in (("early", -20.0), ("late", 20.0)):
        agent = sac.Agent(sac.Args(env_id="Drawn-v0"), 2, 1)
        torch.nn.init.zeros_(agent.policy.output_layer.weight)
        agent.policy.output_layer.bias.data[0] = value  # The action is tanh(value).
        (tmp_path / name).mkdir()
        contents = {"args": vars(agent.args), "agent": agent.state_dict(), "step": 3}
        torch.save(contents, tmp_path / name / "model.pt")
    out = tmp_path / "film.gif"
    flags = ["--out", out, "--seconds", 1, "--frames-per-second", 10, "--size", 90, 60]
    call(film.__file__, monkeypatch, tmp_path / "early", tmp_path / "late", *flags)

    from PIL import Image

    numbers = []
    with Image.open(out) as picture:
        for frame in range(picture.n_frames):
            picture.seek(frame)
            pixels = np.asarray(picture.convert("L"))[30:]  # below the labels
            assert (pixels[:, :90] == pixels[0, 0]).all() and (
                pixels[:, 90:] == pixels[0, -1]
            ).all()
            times = picture.info["duration"] // 100
            numbers += [(int(pixels[0, 0]), int(pixels[0, -1]))] * times
    # before steps 0, 2, 4 and 6; the episode ends with step 7
    expected = np.array([(0, 0), (20, 30), (40, 50), *[(60, 70)] * 7])
    expected += 100 * bool(cameras and "track" in cameras)
    np.testing.assert_allclose(numbers, expected, atol=2)  # GIF has few colours.


# ---- policy.py
def test_metropolis_samples_a_product_of_truncated_normals():
    """exp(Q/λ) with Q = -‖a - c‖²/2 in the box."""
    from scipy import stats

    torch.manual_seed(1)
    center = torch.tensor([0.2, 0.9])
    start = torch.rand(1, 20_000, 2) * 2 - 1
    samples = policy.metropolis(lambda a: -(a - center).square().sum(-1) / 2, start, 0.09)[0]
    for x, c in zip(samples.T.numpy(), center.tolist(), strict=True):
        exact = stats.truncnorm((-1 - c) / 0.3, (1 - c) / 0.3, c, 0.3)
        assert stats.kstest(x, exact.cdf).statistic < 0.016  # p < 1e-4 for independent samples


def test_figures_of_a_policy_are_those_of_a_hand():
    """Q = a_1 + 3 a_2 has the spread √(10/3) over the box; the policy always acts (½, ½)."""
    torch.manual_seed(1)
    schedule = sdac.NoiseSchedule(6, published=False)

    def denoiser(obs, a_t, t):
        return (a_t - schedule.signal[t] * 0.5) / schedule.noise[t]

    critics = SimpleNamespace(minimum=lambda obs, actions: actions @ torch.tensor([1.0, 3.0]))
    agent = SimpleNamespace(
        critics=critics, schedule=schedule, action_dim=2, average_policy=denoiser
    )
    facts = policy.inspect(agent, torch.zeros(64, 1), torch.tensor(0.1))
    unit = math.sqrt(10 / 3)
    assert facts["lambda"] == pytest.approx(0.1 / unit, rel=0.02)
    assert facts["Q"]["best of 1"] == pytest.approx(2 / unit, rel=0.02)
    assert facts["Q"]["best of 32"] == pytest.approx(facts["Q"]["best of 1"], rel=1e-3)
    # exp(g a / λ) on [-1, 1] has the mean coth(g/λ) - λ/g
    expected = sum(g * (1 / math.tanh(g / 0.1) - 0.1 / g) for g in (1, 3))
    assert facts["Q"]["exp(Q/λ)"] == pytest.approx(expected / unit, rel=0.02)
    assert facts["std of policy"] < 1e-3 and facts["components of policy beyond 0.9"] == 0


# ---- speed.py
@pytest.fixture
def agent_and_batch():
    torch.manual_seed(1)
    before = torch.get_default_dtype()
    args = sdac.Args(denoising_steps=4, num_reverse_samples=5, num_particles=3, temperature=1.0)
    agent = sdac.Agent(args, 3, 2)
    yield agent, torch.randn(8, 3), torch.rand(8, 2) * 2 - 1
    torch.set_default_dtype(before)


def gradient(update, agent, *batch):
    """The gradient of the policy's parameters in an update of a copy of the agent."""
    agent = copy.deepcopy(agent)
    torch.manual_seed(2)
    update(agent, *batch)
    return torch.cat([p.grad.flatten() for p in agent.policy.parameters()])


@pytest.mark.parametrize("published", [False, True])
def test_an_evaluation_per_guess_gives_the_gradient_of_one_evaluation(published, agent_and_batch):
    agent, *batch = agent_and_batch
    agent.args.published = published
    ours = gradient(speed.WAYS["one evaluation"], agent, *batch)
    theirs = gradient(speed.WAYS["M evaluations"], agent, *batch)
    assert ours.norm() > 1e-3
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-5 * ours.norm().item())


def test_the_gradient_through_sampling_is_that_of_finite_differences(agent_and_batch):
    """Of the mean of Q over sampled actions, along a random direction of the parameters."""
    torch.set_default_dtype(torch.float64)
    agent, obs, actions = agent_and_batch
    agent.double()
    obs = obs.double()
    for name, table in vars(agent.schedule).items():
        if name != "initial_std":
            setattr(agent.schedule, name, table.double())
    agent.policy.frequencies = agent.policy.frequencies.double()
    found = gradient(speed.WAYS["through sampling"], agent, obs, actions)
    torch.manual_seed(3)
    direction = torch.randn_like(found)

    @torch.no_grad()
    def value(step):
        moved = copy.deepcopy(agent.policy)
        flat = torch.nn.utils.parameters_to_vector(moved.parameters())
        torch.nn.utils.vector_to_parameters(flat + step * direction, moved.parameters())
        torch.manual_seed(2)
        a_0 = sdac.sample_actions(moved, agent.critics, agent.schedule, obs, (8, 1, 2))
        return agent.critics.minimum(obs, a_0[:, None]).mean()

    difference = (value(1e-6) - value(-1e-6)) / 2e-6
    assert abs(difference) > 1e-3
    torch.testing.assert_close(-found @ direction, difference, rtol=1e-4, atol=0)
