"""The scripts from the command line: what a run prints and writes, that it repeats, and how bad input is refused."""

import csv
import dataclasses
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from conftest import SCRIPTS, Spaces, command_line, small_flags
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HUMANOID = "--env-id Humanoid-v4 --learning-starts 100 --total-timesteps 400 --eval-frequency 150".split()
PENDULUM = "--env-id InvertedPendulum-v4 --learning-starts 50 --total-timesteps 60 --eval-frequency 30".split()
RESULT = r"return (-?[\d.]+) ± ([\d.]+), length (\d+)"


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory):
    """One run of each script on Humanoid-v4, as a user starts it: its process, folder and run folder."""

    folders = [tmp_path_factory.mktemp(script) for script in SCRIPTS]  # here, since mktemp is not made for threads

    def train(script, folder):
        process = command_line(script, *HUMANOID, *small_flags(script), "--cuda", cwd=folder)
        assert process.returncode == 0, (process.returncode, process.stderr)
        return SimpleNamespace(process=process, folder=folder, run_dir=next(folder.glob("runs/*")))

    with ThreadPoolExecutor() as pool:
        return dict(zip(SCRIPTS, pool.map(train, SCRIPTS, folders), strict=True))


@pytest.fixture
def trained(trained_runs, script):
    """The run of one script."""
    return trained_runs[script]


@pytest.fixture
def main(module, monkeypatch, tmp_path):
    """Runs main() with the given flags inside this process, in an empty folder, which it returns."""

    def main(*flags):
        folder = tmp_path / "working folder"
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        module.main(*module.parse(["--no-cuda", *map(str, flags)]))
        return folder

    return main


@pytest.fixture
def refused(script, main, capsys, recwarn, tmp_path):
    """Asserts that main() refuses a small run with the given flags in addition, and returns the error message."""

    def refused(*flags):
        with pytest.raises(SystemExit) as caught:
            main(*PENDULUM, *small_flags(script), *flags)
        assert caught.value.code == 2, flags
        error = capsys.readouterr().err
        assert re.fullmatch("error: [^\n]+\n", error), flags
        assert not recwarn.list and not os.listdir(tmp_path / "working folder"), flags
        return error

    return refused


def read_table(path):
    """Rows of a CSV file as dictionaries of numbers."""
    return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(path.open())]


def printed(row):
    """How a row of metrics.csv is printed."""
    return (
        f"{row['episodic_return']:.1f}",
        f"{row['episodic_return_std']:.1f}",
        f"{row['episodic_length']:.0f}",
    )


# A run


def test_run_writes_its_files(script, trained):
    """A run leaves one folder with its checkpoint, the events, both tables and the model, and nothing else."""
    assert os.listdir(trained.folder) == ["runs"] and len(os.listdir(trained.folder / "runs")) == 1
    assert re.fullmatch(rf"Humanoid-v4__{script}__1__\d+", trained.run_dir.name)
    checkpoint, events, *others = sorted(os.listdir(trained.run_dir))
    assert checkpoint == "checkpoint.pt" and events.startswith("events.out.tfevents")
    assert others == ["metrics.csv", "model.pt", "timing.csv"]
    rows = read_table(trained.run_dir / "metrics.csv")
    # one update per vector step of two environments after step 100
    assert [(row["global_step"], row["updates"]) for row in rows] == [(150, 25), (300, 100), (400, 150)]
    # a humanoid that cannot walk lives for about 15 to 80 steps, at about 5 a step
    assert all(10 <= row["episodic_length"] < 200 for row in rows)
    assert all(3 < row["episodic_return"] / row["episodic_length"] < 7 for row in rows)
    timing = read_table(trained.run_dir / "timing.csv")
    assert [(row["global_step"], row["updates"]) for row in timing] == [(150, 25), (300, 100), (400, 150)]
    seconds = [row["seconds"] for row in timing]
    assert 0 < seconds[0] < seconds[1] < seconds[2] < 300
    assert all(0 < row["evaluation_seconds"] < row["seconds"] for row in timing)


def test_run_prints_its_results(script, trained):
    """Output is the device, in words that CUDA is missing, then every evaluation, the final and the best, no noise."""
    assert trained.process.stderr == ""
    device, *lines = trained.process.stdout.splitlines()
    assert re.match("device: cpu.*--cuda.*no CUDA", device)
    rows = read_table(trained.run_dir / "metrics.csv")
    best = max(rows, key=lambda row: row["episodic_return"])
    expected = [("", row) for row in rows] + [("final ", rows[-1]), ("best  ", best)]
    for line, (start, row) in zip(lines, expected, strict=False):
        found = re.fullmatch(rf"{start}evaluation at step (\d+): {RESULT}", line)
        assert found, line
        assert found.groups() == (f"{row['global_step']:.0f}", *printed(row))
    (watch,) = lines[len(expected) :]
    assert f"{script}.py" in watch and f"--evaluate runs/{trained.run_dir.name}" in watch


LOSSES = {
    "sdac_continuous_action": ["losses/rsm_loss", "losses/effective_sample_size", "losses/exploration_std"],
    "sac_continuous_action": ["losses/actor_loss"],
}


def test_run_logs_to_tensorboard(script, trained):
    """TensorBoard has every curve, finite, at the steps where it is due, and consistent with the others."""
    events = EventAccumulator(str(trained.run_dir), size_guidance={"scalars": 0}).Reload()
    curves = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert all(math.isfinite(value) for curve in curves.values() for _, value in curve)
    losses = ["qf1_values", "qf2_values", "qf1_loss", "qf2_loss", "qf_loss", "alpha"]
    now = {}
    for tag in [f"losses/{name}" for name in losses] + LOSSES[script] + ["charts/SPS"]:
        ((step, now[tag]),) = curves[tag]
        assert step == 300, tag  # the hundredth update
    assert now["charts/SPS"] > 0 and now["losses/qf1_loss"] > 0 and now["losses/qf2_loss"] > 0
    assert now["losses/qf1_values"] != now["losses/qf2_values"]
    assert now["losses/qf_loss"] == pytest.approx((now["losses/qf1_loss"] + now["losses/qf2_loss"]) / 2, rel=1e-4)
    if script == "sdac_continuous_action":  # alpha has not moved after 100 of 250 updates
        assert now["losses/alpha"] == pytest.approx(5) and now["losses/exploration_std"] == pytest.approx(0.5)
        assert 1 <= now["losses/effective_sample_size"] <= 4 and now["losses/rsm_loss"] > 0
    else:  # alpha starts from 1 and moves by at most 3e-4 of itself an update
        assert 0.9 < now["losses/alpha"] < 1.1 and now["losses/alpha"] != 1
    rows = read_table(trained.run_dir / "metrics.csv")
    for name in ("episodic_return", "episodic_length"):
        assert curves[f"eval/{name}"] == [(row["global_step"], pytest.approx(row[name])) for row in rows]
    lengths = [length for _, length in curves["charts/episodic_length"]]
    assert len(lengths) > 3 and 200 < sum(lengths) <= 400  # two environments of 200 steps each, cut at the end
    for (_, total), length in zip(curves["charts/episodic_return"], lengths, strict=True):
        assert 3 < total / length < 7


def test_metrics_file_repeats(module, script, trained, main, monkeypatch):
    """The same seed and arguments give the same metrics.csv to the byte, whatever the clock; another seed does not."""
    reference = (trained.run_dir / "metrics.csv").read_bytes()
    columns = b"global_step,updates,episodic_return,episodic_return_std,episodic_length\n"
    assert reference.startswith(columns) and reference.count(b"\n") == 4
    clock = module.time.time
    monkeypatch.setattr(module.time, "time", lambda: 2e9 + 5 * clock())  # another date, and a clock that runs fast
    folder = main(*HUMANOID, *small_flags(script))
    (path,) = folder.glob("runs/*/metrics.csv")
    assert path.read_bytes() == reference
    main(*HUMANOID, *small_flags(script), "--seed", 2)
    (path,) = folder.glob(f"runs/Humanoid-v4__{script}__2__*/metrics.csv")
    other = path.read_bytes()
    assert other.startswith(columns) and other.count(b"\n") == 4
    assert not set(other.splitlines()[1:]) & set(reference.splitlines()[1:])


def test_model_is_optional(main, script):
    """With --no-save-model the run writes its tables and no model."""
    folder = main(*PENDULUM, *small_flags(script), "--no-save-model")
    (run_dir,) = folder.glob("runs/*")
    assert len(read_table(run_dir / "metrics.csv")) == 2 and not list(run_dir.glob("model*"))


@pytest.mark.parametrize("script", SCRIPTS[:1])
def test_files_hold_the_spread_of_q(main):
    """σ_Q of --temperature relative is in the checkpoint and in the model, and a resumed run goes on from it."""
    folder = main(*PENDULUM, *small_flags("sdac_continuous_action"), "--temperature", "relative")
    (run_dir,) = folder.glob("runs/*")

    def spreads():
        checkpoint, model = (torch.load(run_dir / f"{x}.pt", weights_only=True) for x in ("checkpoint", "model"))
        return checkpoint["agent"]["q_spread"].item(), model["q_spread"].item()

    before, same = spreads()
    assert before == same > 0
    main("--resume", run_dir, "--total-timesteps", 64)  # one more update of the policy moves it by at most 1%
    after, same = spreads()
    assert after == same != before and after == pytest.approx(before, rel=0.1)


def test_evaluate_repeats_the_last_evaluation(script, trained, main, capsys, tmp_path):
    """--evaluate prints the last evaluation of the run, from the run folder and from its file, and writes nothing."""
    before = {path: path.read_bytes() for path in trained.run_dir.iterdir()}
    expected = printed(read_table(trained.run_dir / "metrics.csv")[-1])
    flags = "--env-id Humanoid-v4 --no-compile --eval-episodes 2 --evaluate".split()
    process = command_line(script, *flags, trained.run_dir, cwd=tmp_path)
    assert process.returncode == 0 and process.stderr == ""
    device, line = process.stdout.splitlines()
    assert device.startswith("device: cpu") and re.fullmatch(f"evaluation: {RESULT}", line).groups() == expected
    assert os.listdir(tmp_path) == []
    folder = main(*flags, trained.run_dir / "model.pt")
    assert re.search(f"evaluation: {RESULT}", capsys.readouterr().out).groups() == expected
    main(*flags, trained.run_dir, "--seed", 5)
    assert re.search(f"evaluation: {RESULT}", capsys.readouterr().out).groups() != expected
    assert os.listdir(folder) == []
    assert {path: path.read_bytes() for path in trained.run_dir.iterdir()} == before


def test_track_with_wandb(script, tmp_path):
    """--track logs the configuration and the curves to W&B."""
    process = command_line(
        script, *PENDULUM, *small_flags(script), "--track", cwd=tmp_path, env={"WANDB_MODE": "offline"}
    )
    assert process.returncode == 0 and "Traceback" not in process.stderr
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    record = path.read_bytes()
    for text in ("learning_starts", "InvertedPendulum-v4", "eval/episodic_return", "charts/episodic_return"):
        assert text.encode() in record
    (run_dir,) = tmp_path.glob("runs/*")
    assert run_dir.name.encode() in record
    assert len(read_table(run_dir / "metrics.csv")) == 2 and (run_dir / "model.pt").is_file()


# Videos


@pytest.fixture(scope="session")
def opengl():
    """The MUJOCO_GL that draws without a display here; skips the test if there is none."""
    draw = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 16, 16).render()"
    for name in ("osmesa", "egl"):
        process = subprocess.run(
            [sys.executable, "-c", draw], env=os.environ | {"MUJOCO_GL": name}, capture_output=True
        )
        if process.returncode == 0:
            return name
    pytest.skip("neither OSMesa nor EGL")


def test_videos_of_evaluations(script, opengl, tmp_path):
    """--capture-video films the first episode of every evaluation, from its reset to its end, training or not."""
    flags = [*small_flags(script), "--eval-episodes", 1, "--capture-video"]
    process = command_line(script, *PENDULUM, *flags, cwd=tmp_path, env={"MUJOCO_GL": opengl})
    assert process.returncode == 0 and process.stderr == ""
    (run_dir,) = tmp_path.glob("runs/*")
    lengths = [row["episodic_length"] for row in read_table(run_dir / "metrics.csv")]
    videos = [next(tmp_path.glob(f"videos/{run_dir.name}/step-{step}-*.mp4")) for step in (30, 60)]
    assert len(list(tmp_path.rglob("*.mp4"))) == 2
    assert [imageio_ffmpeg.count_frames_and_secs(video)[0] for video in videos] == [length + 1 for length in lengths]
    flags = ["--env-id", "InvertedPendulum-v4", "--eval-episodes", 1, "--capture-video", "--evaluate", run_dir]
    process = command_line(script, *flags, cwd=tmp_path, env={"MUJOCO_GL": opengl})
    assert process.returncode == 0 and process.stderr == ""
    (video,) = set(tmp_path.rglob("*.mp4")) - set(videos)
    assert imageio_ffmpeg.count_frames_and_secs(video)[0] == lengths[-1] + 1


def test_videos_that_cannot_be_drawn(script, tmp_path):
    """Where nothing can be drawn, one sentence names both ways to draw without a display; MuJoCo adds no warning."""
    flags = [*PENDULUM, *small_flags(script), "--env-id", "HalfCheetah-v4", "--capture-video"]
    process = command_line(script, *flags, cwd=tmp_path, env={"MUJOCO_GL": "disabled"})
    assert process.returncode == 2 and process.stdout == "" and os.listdir(tmp_path) == []
    assert re.fullmatch("error: [^\n]*MUJOCO_GL=egl[^\n]*MUJOCO_GL=osmesa[^\n]*\n", process.stderr)


# Bad input


@pytest.mark.parametrize("flags", ["--env-id HalfCheeta-v4", "--no-such-flag 3", "--gamma high"])
def test_bad_command_line(script, flags, tmp_path):
    """From a shell, bad input gives exit status 2 and no traceback, prints no result and leaves nothing on disk."""
    process = command_line(script, *flags.split(), cwd=tmp_path)
    assert process.returncode == 2 and process.stdout == "" and os.listdir(tmp_path) == []
    assert "Traceback" not in process.stderr and flags.split()[0] in process.stderr
    if flags.startswith("--env-id"):
        assert re.fullmatch("error: [^\n]*HalfCheetah-v4[^\n]*\n", process.stderr)


COUNTS = {"total_timesteps", "num_envs", "buffer_size", "learning_starts", "eval_frequency", "eval_episodes"}
COUNTS |= {"batch_size", "policy_frequency", "target_network_frequency", "checkpoint_frequency"}
SDAC_COUNTS = {"alpha_frequency", "denoising_steps", "num_particles", "num_reverse_samples"}
NUMBERS = {"seed": [-1, 2**31], "gamma": [-0.1, 1.1, math.nan], "tau": [0, 1.5, math.nan]}
NUMBERS |= {name: [0, -1, math.inf, math.nan] for name in ("policy_lr", "q_lr", "alpha_lr", "reward_scale")}
SDAC_NUMBERS = {"noise_scale": [0, -1, math.inf, math.nan]}


def test_bad_numbers(script, module, refused):
    """No number outside its range is accepted, and the message names the flag and the number."""
    sdac = script == "sdac_continuous_action"
    bad = (
        NUMBERS | (SDAC_NUMBERS if sdac else {}) | {name: [0, -3] for name in COUNTS | (SDAC_COUNTS if sdac else set())}
    )
    numeric = {field.name for field in dataclasses.fields(module.Args) if field.type in (int, float, int | None)}
    assert numeric == set(bad)
    for name, values in bad.items():
        for value in values:
            flag = f"--{name.replace('_', '-')}"
            assert f"{flag} is {value}" in refused(f"{flag}={value}").replace(".0;", ";")


def test_numbers_that_do_not_fit_together(refused):
    """The warm-up has to fit into the run, and a batch into what the warm-up collects and the buffer keeps."""
    assert "--learning-starts" in refused("--learning-starts", 101, "--total-timesteps", 100)
    for flags in ("--learning-starts 49 --batch-size 50", "--learning-starts 50 --buffer-size 49 --batch-size 50"):
        assert "--batch-size" in refused(*flags.split())
    error = refused("--buffer-size", 10**12)
    assert "--buffer-size" in error and "44000.0 GB" in error  # 4 + 1 + 1 + 4 + 1 numbers of 4 bytes in a transition


def test_numbers_at_their_limits(module):
    """The ends of the allowed ranges are accepted."""
    limits = {"gamma": 0.0, "tau": 1.0, "seed": 0, "num_envs": 5, "eval_episodes": 1, "eval_frequency": 1}
    limits |= {"learning_starts": 50, "total_timesteps": 50, "batch_size": 50, "buffer_size": 50}
    assert module.validate(module.Args(env_id="HalfCheetah-v4", **limits)) == (17, 6)
    assert module.validate(module.Args(env_id="HalfCheetah-v4", gamma=1.0, seed=2**31 - 1)) == (17, 6)


def test_bad_tasks(refused, monkeypatch):
    """Tasks that do not exist are answered with similar names, tasks that cannot be made with the reason."""
    assert "HalfCheetah-v4" in refused("--env-id", "HalfCheeta-v4")
    assert "Pusher-v5" in refused("--env-id", "Pusher-v4")
    assert "CartPole-v1" in refused("--env-id", "CartPole-v1")
    for env_id in ("Qqqqqqqq-v0", "no_such_module:Ant-v4", "a b c", ""):
        assert "--env-id" in refused("--env-id", env_id)

    def broken(message):
        raise RuntimeError(*message)

    for message in ([], ["two\nlines"]):
        spec = gym.envs.registration.EnvSpec("Broken-v0", broken, kwargs={"message": message})
        monkeypatch.setitem(gym.registry, "Broken-v0", spec)
        assert "Broken-v0" in refused("--env-id", "Broken-v0")


VECTOR = gym.spaces.Box(-1, 1, (2,))


@pytest.mark.parametrize(
    ("observation_space", "action_space", "word"),
    [
        (gym.spaces.Discrete(4), VECTOR, "observations"),
        (gym.spaces.Dict({"position": VECTOR}), VECTOR, "observations"),
        (gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), VECTOR, "observations"),
        (VECTOR, gym.spaces.Discrete(4), "actions"),
        (VECTOR, gym.spaces.MultiDiscrete([2, 3]), "actions"),
        (VECTOR, gym.spaces.Box(-1, 1, (2, 2)), "actions"),
        (VECTOR, gym.spaces.Box(0, 10, (2,), np.int32), "actions"),
        (VECTOR, gym.spaces.Box(-np.inf, np.inf, (2,)), "unbounded actions"),
        (VECTOR, gym.spaces.Box(np.float32([-1, -1]), np.float32([1, np.inf])), "unbounded actions"),
    ],
)
def test_bad_spaces(refused, register_spaces, observation_space, action_space, word):
    """Tasks whose observations or actions are not vectors, or whose actions have no bounds, are refused."""
    register_spaces(observation_space, action_space)
    assert f"Spaces-v0 has {word}" in refused("--env-id", "Spaces-v0")


def test_actions_without_a_range(module, small_args, register_spaces, capsys):
    """An action that can only be one number, which Gymnasium itself just warns of, is refused."""
    register_spaces(VECTOR, gym.spaces.Box(np.float32([-1, 2]), np.float32([1, 2])))
    with pytest.warns(UserWarning, match="equal"), pytest.raises(SystemExit) as caught:
        module.validate(small_args(env_id="Spaces-v0"))
    assert caught.value.code == 2 and "actions without a range" in capsys.readouterr().err


class Trap:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("trap"),)


def test_bad_model_files(script, trained, trained_runs, refused, tmp_path):
    """Model files that are missing, damaged, hostile, or of something else are refused; the message says which."""
    path, model = tmp_path / "model.pt", torch.load(trained.run_dir / "model.pt", weights_only=True)
    whole = (trained.run_dir / "model.pt").read_bytes()
    evaluate = ["--env-id", "Humanoid-v4", "--evaluate"]
    assert f"no file {path}" in refused(*evaluate, path)
    assert f"no file {path}" in refused(*evaluate, tmp_path)
    for size in (0, 1, 100, 4096, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert str(path) in refused(*evaluate, path)
    for damaged in (np.random.default_rng(1).bytes(10_000), b"not a model\n"):
        path.write_bytes(damaged)
        assert str(path) in refused(*evaluate, path)
    for content in ([1, 2], model["policy"], model | {"args": None}, model | {"policy": Trap()}):
        torch.save(content, path)
        assert str(path) in refused(*evaluate, path)
    older = model["args"] | {"a_flag_of_another_version": 1}
    for changed in ({"policy": model["critics"]}, {"policy": 1}, {"critics": {}}, {"args": older}):
        torch.save(model | changed, path)
        assert str(path) in refused(*evaluate, path), changed.keys()
    assert "Humanoid-v4" in refused("--env-id", "HalfCheetah-v4", "--evaluate", trained.run_dir)
    (other,) = set(SCRIPTS) - {script}
    names = [name.split("_")[0] for name in (other, script)]
    error = refused(*evaluate, trained_runs[other].run_dir)
    assert re.search(f"is of {names[0]}, not of {names[1]}\\b", error)
    assert "--eval-episodes" in refused(*evaluate, trained.run_dir, "--eval-episodes", 0)


def test_evaluate_without_a_name(refused):
    """An empty --evaluate, as from an unset variable of the shell, is refused; it does not start a training."""
    assert "--evaluate" in refused("--evaluate", "")


def test_run_folders_are_not_shared(module, script, main, capsys, monkeypatch):
    """A second run of the same name in the same second is refused and leaves the first one's files as they are."""
    monkeypatch.setattr(module.time, "time", lambda: 2e9)
    flags = [*PENDULUM, *small_flags(script), "--total-timesteps", 50]
    folder = main(*flags)
    (path,) = folder.glob("runs/*/metrics.csv")
    before = path.read_bytes()
    with pytest.raises(SystemExit) as caught:
        main(*flags)
    assert caught.value.code == 2 and path.parent.name in capsys.readouterr().err and path.read_bytes() == before


def test_tasks_that_cannot_be_drawn_are_refused_early(refused, monkeypatch):
    """A task whose constructor knows no render_mode is refused before the run folder is made."""
    plain = type("Plain", (Spaces,), {"__init__": lambda self: Spaces.__init__(self, VECTOR, VECTOR)})
    spec = gym.envs.registration.EnvSpec("Plain-v0", plain)
    monkeypatch.setitem(gym.registry, "Plain-v0", spec)
    assert "Plain-v0" in refused("--env-id", "Plain-v0")
