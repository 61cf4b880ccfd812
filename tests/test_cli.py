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
from conftest import SCRIPTS, Spaces, command_line, small_flags, start_process
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HUMANOID = "--env-id Humanoid-v4 --learning-starts 100 --total-timesteps 400 --eval-frequency 150".split()
PENDULUM = "--env-id InvertedPendulum-v4 --learning-starts 50 --total-timesteps 60 --eval-frequency 30".split()
RESULT = r"return (-?[\d.]+) \+/- ([\d.]+), length (\d+)"


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory):
    """One run of each script on Humanoid-v4, as a user of an ASCII terminal starts it: process, folder, run folder."""

    folders = [tmp_path_factory.mktemp(script) for script in SCRIPTS]  # here, since mktemp is not made for threads

    def train(script, folder):
        ascii_only = {"PYTHONIOENCODING": "ascii"}
        process = command_line(script, *HUMANOID, *small_flags(script), "--cuda", cwd=folder, env=ascii_only)
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
    """A run leaves one folder with its checkpoint, the events, the table and the model, and nothing else."""
    assert os.listdir(trained.folder) == ["runs"] and len(os.listdir(trained.folder / "runs")) == 1
    assert re.fullmatch(rf"Humanoid-v4__{script}__1__\d+", trained.run_dir.name)
    checkpoint, events, *others = sorted(os.listdir(trained.run_dir))
    assert checkpoint == "checkpoint.pt" and events.startswith("events.out.tfevents")
    assert others == ["metrics.csv", "model.pt"]
    rows = read_table(trained.run_dir / "metrics.csv")
    # one update per vector step of two environments after step 100
    assert [(row["global_step"], row["updates"]) for row in rows] == [(150, 25), (300, 100), (400, 150)]
    # a humanoid that cannot walk lives for about 15 to 80 steps, at about 5 a step
    assert all(10 <= row["episodic_length"] < 200 for row in rows)
    assert all(3 < row["episodic_return"] / row["episodic_length"] < 7 for row in rows)
    checkpoint, model = (torch.load(trained.run_dir / f"{x}.pt", weights_only=True) for x in ("checkpoint", "model"))
    assert set(model) == {"args", "agent", "updates", "step"} and (model["updates"], model["step"]) == (150, 400)
    for evaluation, row in zip(checkpoint["evaluations"], rows, strict=True):
        assert evaluation[:5] == pytest.approx(list(row.values()), rel=1e-9)
    seconds = [0, *(row[5] for row in checkpoint["evaluations"]), checkpoint["seconds"], 300]
    assert seconds == sorted(set(seconds))


def test_run_prints_its_results(script, trained):
    """Output is the device, in words that CUDA is missing, then every evaluation, and no noise."""
    assert trained.process.stderr == ""
    device, *lines = trained.process.stdout.splitlines()
    assert re.fullmatch("device: cpu .*no CUDA.*", device)
    for line, row in zip(lines, read_table(trained.run_dir / "metrics.csv"), strict=True):
        found = re.fullmatch(rf"evaluation at step (\d+): {RESULT}", line)
        assert found, line
        assert found.groups() == (f"{row['global_step']:.0f}", *printed(row))


LOSSES = {
    "sdac_continuous_action": ["rsm_loss", "effective_sample_size", "temperature", "exploration_std"],
    "sac_continuous_action": ["actor_loss", "entropy"],
}


def test_run_logs_to_tensorboard(script, trained):
    """TensorBoard has every curve, finite, at the steps where it is due, and consistent with the others."""
    events = EventAccumulator(str(trained.run_dir), size_guidance={"scalars": 0}).Reload()
    curves = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert all(math.isfinite(value) for curve in curves.values() for _, value in curve)
    losses = ["qf1_values", "qf2_values", "qf1_loss", "qf2_loss", "qf_loss", "alpha", *LOSSES[script]]
    once, now = {*(f"losses/{name}" for name in losses), "charts/SPS"}, {}
    assert set(curves) - once == {
        *(f"eval/{name}" for name in ("episodic_return", "episodic_return_std", "episodic_length")),
        *(f"charts/{name}" for name in ("episodic_return", "episodic_length")),
    }
    for tag in once:
        ((step, now[tag]),) = curves[tag]
        assert step == 300, tag  # the hundredth update
    assert now["charts/SPS"] > 0 and now["losses/qf1_loss"] > 0 and now["losses/qf2_loss"] > 0
    assert now["losses/qf1_values"] != now["losses/qf2_values"]
    assert now["losses/qf_loss"] == pytest.approx((now["losses/qf1_loss"] + now["losses/qf2_loss"]) / 2, rel=1e-4)
    if script == "sdac_continuous_action":  # alpha has not moved after 100 of 250 updates
        assert now["losses/alpha"] == pytest.approx(5) and now["losses/exploration_std"] == pytest.approx(0.5)
        assert 1 <= now["losses/effective_sample_size"] <= 4 and now["losses/rsm_loss"] > 0
        # λ is α/80 = 1/16 times σ_Q, which moves slowly
        agent = torch.load(trained.run_dir / "model.pt", weights_only=True)["agent"]
        assert 16 * now["losses/temperature"] == pytest.approx(agent["q_spread"].item(), rel=0.5) != 1
    else:  # alpha starts from 1 and moves by at most 3e-4 of itself an update
        assert 0.9 < now["losses/alpha"] < 1.1 and now["losses/alpha"] != 1
    rows = read_table(trained.run_dir / "metrics.csv")
    for name in ("episodic_return", "episodic_return_std", "episodic_length"):
        assert curves[f"eval/{name}"] == [(row["global_step"], pytest.approx(row[name])) for row in rows]
    lengths = [length for _, length in curves["charts/episodic_length"]]
    assert len(lengths) > 3 and 200 < sum(lengths) <= 400  # two environments of 200 steps each, cut at the end
    for (_, total), length in zip(curves["charts/episodic_return"], lengths, strict=True):
        assert 3 < total / length < 7
    (text,) = events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val
    chosen = ["env_id: Humanoid-v4", "learning_starts: 100", "num_envs: 2", "gamma: 0.99", f"exp_name: {script}"]
    assert set(chosen) <= {line.strip() for line in text.decode().splitlines()}


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


STATISTICS = [([], "q_spread"), (["--weighting", "mirror-descent"], "q_moments")]


@pytest.mark.parametrize("script", SCRIPTS[:1])
@pytest.mark.parametrize("flags, name", STATISTICS)
def test_files_hold_the_statistics_of_q(main, flags, name):
    """The running statistics are in the checkpoint and in the model, and a resumed run goes on from them."""
    folder = main(*PENDULUM, *small_flags("sdac_continuous_action"), *flags)
    (run_dir,) = folder.glob("runs/*")

    def statistics():
        states = [torch.load(run_dir / f"{x}.pt", weights_only=True)["agent"] for x in ("checkpoint", "model")]
        return (state[name].flatten().tolist() for state in states)

    before, same = statistics()
    assert before == same and not {0.0, 1.0} & set(before)  # where they begin
    main("--resume", run_dir, "--total-timesteps", 64)  # one more update of the policy moves them by at most 1%
    after, same = statistics()
    assert after == same and after == pytest.approx(before, rel=0.1, abs=0.01) and not set(after) & set(before)


def test_evaluate_repeats_the_last_evaluation(script, trained, main, capsys, tmp_path):
    """--evaluate prints the last evaluation of the run, from the run folder and from both files, and writes nothing.
    The run's arguments are the defaults; a flag beside it wins."""
    before = {path: path.read_bytes() for path in trained.run_dir.iterdir()}
    expected = printed(read_table(trained.run_dir / "metrics.csv")[-1])
    process = command_line(script, "--evaluate", trained.run_dir, cwd=tmp_path)
    assert process.returncode == 0 and process.stderr == "" and os.listdir(tmp_path) == []
    device, line = process.stdout.splitlines()
    assert device.startswith("device: cpu")
    assert re.fullmatch(f"evaluation at step 400: {RESULT}", line).groups() == expected

    def evaluated(name, *flags):
        capsys.readouterr()
        folder = main("--evaluate", trained.run_dir / name, *flags)
        assert os.listdir(folder) == []
        return re.search(f"\nevaluation at step 400: {RESULT}\n$", capsys.readouterr().out).groups()

    assert evaluated("model.pt") == evaluated("checkpoint.pt", "--eval-episodes", 2) == expected
    changes = [["--seed", 5], ["--eval-episodes", 1]]
    if script == "sdac_continuous_action":
        changes += [["--num-particles", 7], ["--denoising-steps", 4], ["--schedule", "linear"]]
    others = [evaluated("model.pt", *flags) for flags in changes]
    assert expected not in others and len(set(others)) == len(others) and others[1][1] == "0.0"
    assert {path: path.read_bytes() for path in trained.run_dir.iterdir()} == before


def test_track_with_wandb(script, tmp_path):
    """--track logs the configuration and the curves to W&B, of a task named with its module too."""
    flags = [*PENDULUM, *small_flags(script), "--track", "--env-id", "gymnasium.envs:InvertedPendulum-v4"]
    process = command_line(script, *flags, cwd=tmp_path, env={"WANDB_MODE": "offline"})
    assert process.returncode == 0 and "Traceback" not in process.stderr, process.stderr
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    record = path.read_bytes()
    for text in ("learning_starts", "InvertedPendulum-v4", "eval/episodic_return", "charts/episodic_return"):
        assert text.encode() in record
    (run_dir,) = tmp_path.glob("runs/*")
    assert run_dir.name.startswith("gymnasium.envs-InvertedPendulum-v4__") and run_dir.name.encode() in record
    assert len(read_table(run_dir / "metrics.csv")) == 2 and (run_dir / "model.pt").is_file()


def test_track_without_a_login(script, tmp_path):
    """One sentence says that W&B knows no account here. MuJoCo adds no warning of its own, and no log file."""
    (tmp_path / "home").mkdir()
    nobody = {"HOME": str(tmp_path / "home"), "NETRC": str(tmp_path / "home" / "netrc")}
    flags = [*PENDULUM, *small_flags(script), "--track", "--env-id", "HalfCheetah-v4"]
    process = command_line(script, *flags, cwd=tmp_path, env=nobody, stdin=subprocess.DEVNULL)
    assert process.returncode == 2 and re.fullmatch("error: [^\n]*wandb login[^\n]*\n", process.stderr), process.stderr
    assert not list(tmp_path.glob("*.TXT")) and not list(tmp_path.rglob("*.pt"))


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
    """Where nothing can be drawn, by a wrong MUJOCO_GL or without the OSMesa library, one sentence says so."""
    (tmp_path / "OpenGL").mkdir()  # which fails like PyOpenGL that finds no library
    (tmp_path / "OpenGL" / "__init__.py").write_text("raise AttributeError('no glGetError')")
    flags = [*PENDULUM, *small_flags(script), "--env-id", "HalfCheetah-v4", "--capture-video"]
    environments = {"MUJOCO_GL": {"MUJOCO_GL": "disabled"}}
    environments["no glGetError"] = {"MUJOCO_GL": "osmesa", "PYTHONPATH": str(tmp_path)}
    started = [(cause, start_process(script, *flags, cwd=tmp_path, env=env)) for cause, env in environments.items()]
    for cause, process in started:
        out, err = process.communicate()
        assert process.returncode == 2 and out == "" and os.listdir(tmp_path) == ["OpenGL"]
        assert re.fullmatch(f"error: [^\n]*{cause}[^\n]*\n", err), err


# Bad input


@pytest.mark.parametrize("flags", ["--env-id HalfCheeta-v4", "--no-such-flag 3", "--gamma high"])
def test_bad_command_line(script, flags, tmp_path):
    """From a shell, bad input gives exit status 2 and no traceback, prints no result and leaves nothing on disk."""
    process = command_line(script, *flags.split(), cwd=tmp_path)
    assert process.returncode == 2 and process.stdout == "" and os.listdir(tmp_path) == []
    assert "Traceback" not in process.stderr and flags.split()[-2].removeprefix("--env-id") in process.stderr
    if flags.startswith("--env-id"):
        assert re.fullmatch("error: [^\n]*Did you mean: `HalfCheetah`[^\n]*\n", process.stderr)


COUNTS = {"total_timesteps", "num_envs", "buffer_size", "learning_starts", "eval_frequency", "eval_episodes"}
COUNTS |= {"batch_size", "policy_frequency", "target_network_frequency", "checkpoint_frequency"}
SDAC_COUNTS = {"alpha_frequency", "denoising_steps", "num_particles", "num_reverse_samples"}
NUMBERS = {"seed": [-1, 2**31], "gamma": [-0.1, 1.1, math.nan], "tau": [0, 1.5, math.nan]}
NUMBERS |= {name: [0, -1, math.inf, math.nan] for name in ("policy_lr", "q_lr", "alpha_lr", "reward_scale")}
SDAC_NUMBERS = {name: [0, -1, math.inf, math.nan] for name in ("noise_scale", "temperature_scale")}


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
    for flags in ("--learning-starts 49 --batch-size 50", "--learning-starts 50 --num-envs 51"):
        assert "--learning-starts is " in refused(*flags.split())
    for flags in ("--buffer-size 49 --batch-size 50", "--buffer-size 49 --num-envs 50"):
        assert "--buffer-size is 49; give a value from 50 to" in refused(*flags.split())
    error = refused("--buffer-size", 10**12)
    # 4 + 1 + 1 + 4 + 1 numbers of 4 bytes in a transition
    assert "--buffer-size 1000000000000 is too large" in error and " 44000000000000 bytes" in error


@pytest.mark.parametrize("script", SCRIPTS[:1])
def test_a_mixture_has_two_halves(refused, module):
    error = refused("--reverse-proposal", "mixture", "--num-reverse-samples", 5)
    assert "--num-reverse-samples is 5; give an even number" in error
    assert module.validate(module.Args(reverse_proposal="mixture", num_reverse_samples=6)) == (17, 6)


def test_warm_up_follows_the_budget(module):
    """A tenth of the steps, but not more than the published 30,000 nor less than a batch; it stays in a resumed run."""
    for total, expected in [(10**6, 30_000), (300_000, 30_000), (45_000, 4_500), (2_000, 256)]:
        args, _ = module.parse(["--total-timesteps", str(total)])
        assert args.learning_starts == expected
        assert dataclasses.replace(args, total_timesteps=10**6).learning_starts == expected
    args, _ = module.parse(["--total-timesteps", "45000", "--learning-starts", "31000"])
    assert args.learning_starts == 31_000


def test_numbers_at_their_limits(module):
    """The ends of the allowed ranges are accepted."""
    limits = {"gamma": 0.0, "tau": 1.0, "seed": 0, "num_envs": 5, "eval_episodes": 1, "eval_frequency": 1}
    limits |= {"learning_starts": 50, "total_timesteps": 50, "batch_size": 50, "buffer_size": 50}
    assert module.validate(module.Args(env_id="HalfCheetah-v4", **limits)) == (17, 6)
    assert module.validate(module.Args(env_id="HalfCheetah-v4", gamma=1.0, seed=2**31 - 1)) == (17, 6)


def test_bad_tasks(refused, monkeypatch):
    """Tasks that do not exist are answered with similar names, tasks that cannot be made with the reason."""
    assert "HalfCheetah" in refused("--env-id", "HalfCheeta-v4")
    for env_id in ("Pusher-v4", "CartPole-v1", "Qqqqqqqq", "no_such_module:Ant-v4", "a b c"):
        assert env_id.split(":")[0] in refused("--env-id", env_id)
    assert "(env-name)-v(version)" in refused("--env-id", "")

    def broken(message, render_mode):
        raise RuntimeError(*message)

    for message in ([], ["two\nlines"]):
        spec = gym.envs.registration.EnvSpec("Broken-v0", broken, kwargs={"message": message})
        monkeypatch.setitem(gym.registry, "Broken-v0", spec)
        assert (" ".join(message).replace("\n", " ") or "RuntimeError") in refused("--env-id", "Broken-v0")


VECTOR = gym.spaces.Box(-1, 1, (2,))


IMAGE = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("observation_space", "action_space", "word"),
    [
        (gym.spaces.Discrete(4), VECTOR, "has Discrete"),
        (gym.spaces.Dict({"position": VECTOR}), VECTOR, "has Dict"),
        (IMAGE, VECTOR, "has Box.*uint8.*real vectors"),
        (VECTOR, gym.spaces.Discrete(4), "has Discrete"),
        (VECTOR, gym.spaces.MultiDiscrete([2, 3]), "has MultiDiscrete"),
        (VECTOR, gym.spaces.Box(-1, 1, (2, 2)), "has Box.*real vectors"),
        (VECTOR, gym.spaces.Box(0, 10, (2,), np.int32), "has Box.*int32.*real vectors"),
        (VECTOR, gym.spaces.Box(-np.inf, np.inf, (2,)), "has actions in Box.*inf.*finite bounds"),
        (VECTOR, gym.spaces.Box(np.float32([-1, -1]), np.float32([1, np.inf])), "has actions in Box.*finite bounds"),
    ],
)
def test_bad_spaces(refused, register_spaces, observation_space, action_space, word):
    """Tasks whose observations or actions are not vectors, or whose actions have no bounds, are refused."""
    register_spaces(observation_space, action_space)
    assert re.search(f"Spaces-v0 {word}", refused("--env-id", "Spaces-v0"))


def test_actions_without_a_range(module, small_args, register_spaces):
    """An action that can only be one number, which Gymnasium itself just warns of, is refused."""
    register_spaces(VECTOR, gym.spaces.Box(np.float32([-1, 2]), np.float32([1, 2])))
    with pytest.warns(UserWarning, match="equal"), pytest.raises(ValueError, match="finite bounds, low < high"):
        module.validate(small_args(env_id="Spaces-v0"))


class Trap:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("trap"),)


def test_bad_model_files(script, trained, trained_runs, refused, tmp_path):
    """Model files that are missing, damaged, hostile, or of something else are refused; the message says which."""
    path, model = tmp_path / "model.pt", torch.load(trained.run_dir / "model.pt", weights_only=True)
    whole = (trained.run_dir / "model.pt").read_bytes()

    def unusable(path):
        error = refused("--evaluate", path)
        assert f"'{path}' is no run folder or file that this version of {script}.py can use" in error
        return error

    unusable(path)
    unusable(tmp_path)  # a folder without a run
    unusable("")  # as from an unset variable of the shell: no training starts
    for size in (0, 1, 100, 4096, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        unusable(path)
    for damaged in (np.random.default_rng(1).bytes(10_000), b"not a model\n"):
        path.write_bytes(damaged)
        unusable(path)
    older = {"args": model["args"] | {"a_flag_of_another_version": 1}}
    for content in ([1, 2], model["agent"], model | {"args": None}, model | {"agent": Trap()}, model | older):
        torch.save(content, path)
        error = unusable(path)
    assert "a_flag_of_another_version" in error
    for changed in (torch.zeros(3), {}, {k: v for k, v in model["agent"].items() if k != "critics.weights.1"}):
        torch.save(model | {"agent": changed}, path)
        assert "cannot start" in refused("--evaluate", path)
    assert "size mismatch" in refused("--evaluate", trained.run_dir, "--env-id", "HalfCheetah-v4")
    (other,) = set(SCRIPTS) - {script}
    refused("--evaluate", trained_runs[other].run_dir)
    assert "--eval-episodes" in refused("--evaluate", trained.run_dir, "--eval-episodes", 0)


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
    """A task whose constructor knows no render_mode, and one that cannot be drawn, leave no run folder."""
    plain = type("Plain", (Spaces,), {"__init__": lambda self: Spaces.__init__(self, VECTOR, VECTOR)})
    spec = gym.envs.registration.EnvSpec("Plain-v0", plain)
    monkeypatch.setitem(gym.registry, "Plain-v0", spec)
    assert "Plain-v0" in refused("--env-id", "Plain-v0")
    drawn = {"render": lambda self: 1 // 0, "metadata": {"render_modes": ["rgb_array"], "render_fps": 9}}
    spaces = {"observation_space": VECTOR, "action_space": VECTOR}
    spec = gym.envs.registration.EnvSpec("Drawn-v0", type("Drawn", (Spaces,), drawn), kwargs=spaces)
    monkeypatch.setitem(gym.registry, "Drawn-v0", spec)
    assert "division" in refused("--env-id", "Drawn-v0", "--capture-video")
