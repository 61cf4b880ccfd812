"""Runs that are interrupted, killed and resumed, that diverge or lose their surroundings, and hostile checkpoints."""

import copy
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, command_line, small_flags, start_process, wait_for

# Checkpoints at 0, 60 (before learning starts), 120 (the buffer has wrapped), 180 and 240
RUN = "--no-cuda --env-id Hopper-v4 --learning-starts 70 --buffer-size 110 --total-timesteps 240 --eval-frequency 80"
RUN = f"{RUN} --eval-episodes 1 --checkpoint-frequency 60".split()


class Killed(BaseException):
    """Ends a run as SIGKILL does: nothing catches it."""


def killed():
    raise Killed


@pytest.fixture
def main(module, script, monkeypatch, tmp_path):
    """Runs main() in an empty folder, with the flags of a small run before the given ones unless it is resumed."""
    monkeypatch.chdir(tmp_path)

    def main(*flags):
        small = [] if {"--resume", "--evaluate"} & set(flags) else [*small_flags(script), *RUN]
        module.main(*module.parse([*small, *map(str, flags)]))

    return main


@pytest.fixture
def stops(main, capsys):
    """Asserts that main() ends with the given status and one sentence, which it returns."""

    def stops(status, *flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(*flags)
        error = capsys.readouterr().err
        assert caught.value.code == status and re.fullmatch("error: [^\n]+\n", error), (caught.value.code, error)
        return error

    return stops


@pytest.fixture
def at_step(module, monkeypatch):
    """Does something in one step of a training, before the buffer has its transitions; what follows is as ever."""

    def at_step(step, act):
        add, added = module.ReplayBuffer.add, []

        def watched(self, obs, *columns):
            added.append(len(obs))
            if sum(added) == step:
                act()
            add(self, obs, *columns)

        monkeypatch.setattr(module.ReplayBuffer, "add", watched)

    return at_step


@pytest.fixture(scope="session")
def references():
    """The uninterrupted runs that were made so far."""
    return {}


@pytest.fixture
def reference(references, script, tmp_path_factory):
    """An uninterrupted run of the script, as a user starts it: its run folder and metrics.csv."""
    if script not in references:
        folder = tmp_path_factory.mktemp(script)
        process = command_line(script, *small_flags(script), *RUN, cwd=folder)
        assert process.returncode == 0 and process.stderr == "", process.stderr
        (run_dir,) = folder.glob("runs/*")
        references[script] = SimpleNamespace(run_dir=run_dir, metrics=(run_dir / "metrics.csv").read_bytes())
    return references[script]


def the_run():
    """The only run folder, with a checkpoint and nothing half-written, and the checkpoint."""
    (run_dir,) = Path("runs").iterdir()
    assert not list(run_dir.glob("*.tmp"))
    return run_dir, torch.load(run_dir / "checkpoint.pt", weights_only=True)


def finite(tree):
    """Whether all tensors in nested dictionaries are finite."""
    if isinstance(tree, dict):
        return all(finite(value) for value in tree.values())
    return not isinstance(tree, torch.Tensor) or bool(tree.isfinite().all())


# Resuming


@pytest.mark.parametrize("step", [40, 100, 170])
def test_killed_and_resumed(main, reference, at_step, step):
    """Killed before learning starts, and while and after the buffer wraps: the same metrics.csv and model."""
    at_step(step, killed)
    with pytest.raises(Killed):
        main()
    run_dir, checkpoint = the_run()
    assert checkpoint["step"] == (step - 1) // 60 * 60
    main("--resume", run_dir if step < 150 else run_dir / "checkpoint.pt")
    assert (run_dir / "metrics.csv").read_bytes() == reference.metrics
    final, expected = (torch.load(folder / "model.pt", weights_only=True) for folder in (run_dir, reference.run_dir))
    assert all(torch.equal(final["policy"][name], value) for name, value in expected["policy"].items())


def test_killed_twice(main, reference, at_step):
    """A resumed run can be killed and resumed again; timing.csv has each row once and its clock does not go back."""
    for step in (170, 30):  # of the run, then of the resumed run, which begins at 120
        at_step(step, killed)
        with pytest.raises(Killed):
            main(*(["--resume", the_run()[0]] if step == 30 else []))
    run_dir, _ = the_run()
    main("--resume", run_dir)
    assert (run_dir / "metrics.csv").read_bytes() == reference.metrics
    rows = [line.split(",") for line in (run_dir / "timing.csv").read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == ["80", "160", "240"]
    assert sorted(float(row[2]) for row in rows) == [float(row[2]) for row in rows]


def test_logs_changed_after_the_checkpoint(main, reference, at_step):
    """Rows that were lost or doubled in metrics.csv after the checkpoint do not matter."""
    at_step(170, killed)
    with pytest.raises(Killed):
        main()
    run_dir, _ = the_run()
    (run_dir / "metrics.csv").unlink()
    (run_dir / "timing.csv").write_text("half a row")
    main("--resume", run_dir)
    assert (run_dir / "metrics.csv").read_bytes() == reference.metrics


def test_checkpoint_holds_only_filled_rows(main, at_step):
    """The file has the filled rows of the buffer, not the space behind them, and no part of another file is left."""
    at_step(100, killed)
    with pytest.raises(Killed):
        main()
    _, checkpoint = the_run()
    assert checkpoint["rows"].shape == (60, 11 + 3 + 1 + 11 + 1)
    assert checkpoint["rows"].untyped_storage().nbytes() == 60 * 27 * 4


def test_a_finished_run(main, reference, capsys, tmp_path):
    """Resumed, it prints its results and writes its model again; with more steps it goes on from its last state."""
    run_dir = shutil.copytree(reference.run_dir, tmp_path / "copy")
    (run_dir / "model.pt").unlink()
    main("--resume", run_dir)
    assert (run_dir / "metrics.csv").read_bytes() == reference.metrics and (run_dir / "model.pt").is_file()
    assert "final evaluation at step 240" in capsys.readouterr().out
    main("--resume", run_dir, "--total-timesteps", 300, "--eval-episodes", 2)
    metrics = (run_dir / "metrics.csv").read_bytes()
    assert metrics.startswith(reference.metrics) and metrics.splitlines()[-1].startswith(b"300,115,")
    main("--resume", run_dir, "--total-timesteps", 100)
    assert (run_dir / "metrics.csv").read_bytes() == metrics


MAY_CHANGE = {"total_timesteps": 99, "eval_frequency": 9, "eval_episodes": 9, "checkpoint_frequency": 9}
MAY_CHANGE |= {
    "capture_video": True,
    "save_model": False,
    "track": True,
    "wandb_project_name": "x",
    "wandb_entity": "x",
}


def test_which_flags_may_change(module, reference, stops):
    """Steps, evaluation and logging may change; all other flags are refused by name, unless they change nothing."""
    resume = ["--resume", str(reference.run_dir)]
    saved, _ = module.parse(resume)
    for field in fields(saved):
        value, flag = getattr(saved, field.name), f"--{field.name.replace('_', '-')}"
        if field.name == "resume":
            continue
        if type(value) is bool:
            same, other = ([f"--{'' if x else 'no-'}{flag[2:]}"] for x in (value, not value))
        else:
            choices = [x for x in get_args(field.type) if type(x) is str and x != value]
            changed = value * 2 + 1 if type(value) in (int, float) else 9 if int in get_args(field.type) else "x"
            same, other = (
                [flag, str(value)],
                [flag, str(choices[0] if choices else MAY_CHANGE.get(field.name, changed))],
            )
        assert value is None or module.parse([*resume, *same])[0] == saved
        if field.name in MAY_CHANGE:
            assert getattr(module.parse([*resume, *other])[0], field.name) == MAY_CHANGE[field.name]
        else:
            assert f"{flag} is {value} and cannot change" in stops(2, *resume, *other)


# Signals


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 40), (signal.SIGTERM, 132), (signal.SIGTERM, 180)])
def test_interrupted(main, at_step, capsys, number, step):
    """The step is finished, its state is written, the status is that of the signal, and the run can go on."""
    at_step(step, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 128 + number
    run_dir, checkpoint = the_run()
    assert checkpoint["step"] == step and checkpoint["updates"] == max(0, step - 70) // 2
    assert len(checkpoint["rows"]) == min(step, 110)
    out = capsys.readouterr()
    assert out.err == "" and f"--resume {run_dir}" in out.out.splitlines()[-1]
    main("--resume", run_dir)
    rows = [line.split(b",")[:2] for line in (run_dir / "metrics.csv").read_bytes().splitlines()[1:]]
    assert rows == [[b"80", b"5"], [b"160", b"45"], [b"240", b"85"]]


DRIVER = """
import os, pathlib, sys, time
sys.path.insert(0, sys.argv.pop(1))
module, calls, fsync = __import__(sys.argv.pop(1)), [], os.fsync
def stuck(file):
    calls.append(file)
    if len(calls) == 2:
        pathlib.Path("stuck").touch()
        while True:
            time.sleep(0.01)
    fsync(file)
os.fsync = stuck
module.main(*module.parse(sys.argv[1:]))
"""


@pytest.mark.parametrize("numbers", [[signal.SIGKILL], [signal.SIGTERM, signal.SIGINT]])
def test_ended_while_it_writes(main, script, reference, tmp_path, numbers):
    """A process that SIGKILL or a second signal ends while it writes a checkpoint leaves the one before."""
    flags = [*small_flags(script), *RUN]
    command = [sys.executable, "-c", DRIVER, str(ROOT), script, *flags]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "stuck").exists() or process.poll() is not None)
    process.send_signal(numbers[0])
    for _ in range(100):
        time.sleep(0.1)
        if process.poll() is not None:
            break
        process.send_signal(numbers[-1])
    else:
        process.kill()
    assert process.wait() == -numbers[-1] and process.communicate()[1] == ""
    (run_dir,) = tmp_path.glob("runs/*")
    assert (run_dir / "checkpoint.tmp").stat().st_size > 10**6
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["step"] == 0
    main("--resume", run_dir)
    assert (run_dir / "metrics.csv").read_bytes() == reference.metrics
    the_run()


def test_interrupted_process(main, script, tmp_path):
    """From a shell, SIGTERM gives exit status 143, no traceback, and a sentence that says how to go on."""
    process = start_process(script, *small_flags(script), *RUN, "--total-timesteps", 10**6, cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")))
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    run_dir, checkpoint = the_run()
    assert process.returncode == 143 and err == "" and f"--resume {run_dir}" in out.splitlines()[-1]
    main("--resume", run_dir, "--total-timesteps", checkpoint["step"] + 100)
    assert the_run()[1]["step"] == checkpoint["step"] + 100


# Divergence and failing surroundings


class Faulty(gym.Env):
    """Random observations in episodes of 5 steps. The second environment has a fault in its step 25, step 50 of all."""

    fault, born = None, 0
    observation_space, action_space = gym.spaces.Box(-9, 9, (3,)), gym.spaces.Box(-1, 1, (2,))

    def __init__(self, render_mode=None):
        self.who, self.steps = None, 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        if self.who is None:
            self.who, Faulty.born = Faulty.born, Faulty.born + 1
        if self.due() and self.fault == "reset raises":
            raise ValueError("no way\nback")
        obs = np.float32(self.np_random.normal(size=3))
        return obs * np.float32(np.nan if self.due() and self.fault == "reset nan" else 1), {}

    def due(self):
        return self.who == 1 and self.steps == 25

    def step(self, action):
        self.steps += 1
        obs, reward, fault = np.float32(self.np_random.normal(size=3)), 1.0, self.fault if self.due() else None
        if fault == "raises":
            raise RuntimeError("motor\nburnt")
        obs = {"nan": obs * np.float32(np.nan), "shape": obs[:2], "last shape": obs[:1], "scalar": obs[0]}.get(
            fault, obs
        )
        reward = {"reward nan": np.nan, "reward inf": np.inf, "reward huge": 1e300}.get(fault, reward)
        return obs, reward, False, self.steps % 5 == 0 and fault != "shape", {}


FAULTS = {
    "nan": ("an observation was not finite at step 50", 40),
    "reset nan": ("an observation was not finite at step 52", 40),
    "reward nan": ("a reward was not finite at step 50", 40),
    "reward inf": ("a reward was not finite at step 50", 40),
    "reward huge": ("a reward was not finite at step 50", 40),  # in float32
    "raises": ("Faulty-v0 failed (RuntimeError: motor burnt) at step 50", 48),
    "reset raises": ("Faulty-v0 failed (ValueError: no way back) at step 50", 48),
    "shape": ("Faulty-v0 failed (ValueError", 48),
    "last shape": ("Faulty-v0 failed (ValueError", 48),
    "scalar": ("Faulty-v0 failed (ValueError", 48),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_environment(main, stops, monkeypatch, fault):
    """One sentence says what went wrong, when, and which file has the last good state, which is as it should be."""
    monkeypatch.setitem(gym.registry, "Faulty-v0", gym.envs.registration.EnvSpec("Faulty-v0", Faulty))
    monkeypatch.setattr(Faulty, "fault", fault)
    monkeypatch.setattr(Faulty, "born", 0)
    flags = "--env-id Faulty-v0 --learning-starts 20 --checkpoint-frequency 20 --eval-frequency 80".split()
    error = stops(1, *flags, "--total-timesteps", 80)
    sentence, step = FAULTS[fault]
    run_dir, checkpoint = the_run()
    assert sentence in error and f"{run_dir}/checkpoint.pt (--resume {run_dir})" in error
    assert checkpoint["step"] == len(checkpoint["rows"]) == step and finite(checkpoint)
    monkeypatch.setattr(Faulty, "fault", None)
    main("--resume", run_dir)
    rows = the_run()[1]["rows"]
    assert len(rows) == 80 and rows.isfinite().all() and torch.equal(rows[:step], checkpoint["rows"])


@pytest.mark.parametrize("what", ["qf1_loss", "qf2_values", "parameter"])
def test_diverged_learning(module, stops, monkeypatch, what):
    """A loss, Q-value or policy that is no longer finite is named and does not reach the checkpoint."""
    update = module.Agent.update

    def diverging(self, batch, generator):
        metrics = update(self, batch, generator)
        if self.updates == 31 and what == "parameter":
            with torch.no_grad():
                self.critics.weights[1][0, 0, 0] = torch.inf
        return metrics | ({what: torch.tensor(torch.nan)} if self.updates > 30 and what != "parameter" else {})

    monkeypatch.setattr(module.Agent, "update", diverging)
    error = stops(1)
    run_dir, checkpoint = the_run()
    assert re.match("error: " + (what if what != "parameter" else "an action") + " was not finite at step", error)
    assert str(run_dir / "checkpoint.pt") in error and checkpoint["step"] == 120 and finite(checkpoint)


def test_losses_are_watched_between_checkpoints(module, stops, monkeypatch):
    """Every hundred updates the losses are looked at, however far the next checkpoint is."""
    update = module.Agent.update
    nan = {"qf_loss": torch.tensor(torch.nan)}
    monkeypatch.setattr(module.Agent, "update", lambda *inputs: update(*inputs) | nan)
    far = ["--total-timesteps", 2000, "--checkpoint-frequency", 2000, "--eval-frequency", 2000]
    assert "qf_loss was not finite at step 270" in stops(1, *far)
    assert the_run()[1]["step"] == 0


def test_full_disk_while_a_checkpoint_is_written(main, stops, at_step, reference):
    """The checkpoint before is kept, and with room again the run goes on to the same metrics.csv."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    at_step(100, lambda: (next(Path("runs").iterdir()) / "checkpoint.tmp").symlink_to("/dev/full"))
    error = stops(1)
    run_dir, checkpoint = the_run()
    assert "No space left" in error and str(run_dir / "checkpoint.pt") in error and checkpoint["step"] == 60
    main("--resume", run_dir)
    assert (run_dir / "metrics.csv").read_bytes() == reference.metrics


@pytest.mark.parametrize("name", ["append_row", "evaluate"])
def test_failing_evaluation(module, main, stops, monkeypatch, reference, name):
    """An evaluation that fails, or whose row cannot be written, is made again by the resumed run."""
    function, calls = getattr(module, name), []

    def failing(*inputs):
        calls.append(inputs)
        if len(calls) == 3:
            raise OSError(30, "Read-only file system")
        return function(*inputs)

    monkeypatch.setattr(module, name, failing)
    error = stops(1)
    run_dir, _ = the_run()
    assert f"Read-only file system) at step {160 if name == 'append_row' else 240}" in error
    main("--resume", run_dir)
    assert (run_dir / "metrics.csv").read_bytes() == reference.metrics


def test_failing_model_file(module, stops, monkeypatch):
    """If model.pt cannot be written at the end, the sentence names the checkpoint, from which it can."""
    save = module.save

    def failing(path, *inputs):
        if path.name == "model.pt":
            raise OSError(28, "No space left on device")
        save(path, *inputs)

    monkeypatch.setattr(module, "save", failing)
    assert "model.pt failed (OSError: [Errno 28] No space left on device)" in stops(1)
    assert the_run()[1]["step"] == 240


def test_runs_cannot_be_written(main, stops):
    """Where the run folder cannot be made, one sentence says so."""
    Path("runs").touch()
    assert "runs/Hopper-v4" in stops(1)


def test_failing_tracker(module, main, monkeypatch, reference):
    """TensorBoard that fails in the middle is a warning; the training is the same."""

    def failing(self, *inputs):
        raise OSError(28, "No space left on device")

    for name in ("add_scalar", "flush", "close"):
        monkeypatch.setattr(module.SummaryWriter, name, failing)
    with pytest.warns(UserWarning, match="No space left on device.*goes on"):
        main()
    assert (the_run()[0] / "metrics.csv").read_bytes() == reference.metrics


# Hostile files


class Trap:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("trap"),)


def passes(main, flags):
    """Whether main() accepts these flags; if not, it must end with status 2."""
    try:
        main(*flags)
    except SystemExit as end:
        assert end.code == 2
        return False
    return True


@pytest.fixture(params=["--resume", "--evaluate"])
def hostile(request, module, reference, main, stops, tmp_path, monkeypatch):
    """Offers a file to --resume or --evaluate: content is bytes, an object, or changes of the file's dictionary."""
    name = {"--resume": "checkpoint.pt", "--evaluate": "model.pt"}[request.param]
    path = tmp_path / "folder" / name
    path.parent.mkdir()
    evaluate = ["--env-id", "Hopper-v4", "--no-cuda", "--no-compile", "--eval-episodes", "1"]
    flags = [request.param, path, *(evaluate if request.param == "--evaluate" else [])]
    whole = (reference.run_dir / name).read_bytes()

    def offer(content, may_pass=False):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        if may_pass and passes(main, flags):
            for other in set(path.parent.iterdir()) - {path}:
                other.unlink()
            return ""
        error = stops(2, *flags)
        assert os.listdir(tmp_path) == ["folder"] and os.listdir(path.parent) == [name]
        return error

    contents = torch.load(reference.run_dir / name, weights_only=True)
    return SimpleNamespace(offer=offer, whole=whole, contents=contents, path=path, flag=request.param)


def test_damaged_files(hostile):
    """Truncated files, flipped bits and other files are refused, and the message names the file."""
    whole, rng = hostile.whole, np.random.default_rng(1)
    for size in (0, 1, 100, 4096, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        assert str(hostile.path) in hostile.offer(whole[:size])
    for position in rng.integers(5000, len(whole) - 10_000, 5):  # in the data, between the headers
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.integers(8)
        assert "damaged" in hostile.offer(bytes(damaged))
    for content in (rng.bytes(10_000), b"not a checkpoint\n", [1, 2], {}, "x"):
        assert str(hostile.path) in hostile.offer(content)


def test_pickle_bombs(hostile):
    """A file that would run code, in any place, is refused and runs nothing."""
    for bomb in (Trap(), hostile.contents | {"args": Trap()}, hostile.contents | {"algorithm": Trap()}, [Trap()]):
        assert "damaged" in hostile.offer(bomb)
    torch.save(hostile.contents | {"rows": Trap()}, hostile.path, _use_new_zipfile_serialization=False)
    assert "damaged" in hostile.offer(hostile.path.read_bytes())


def test_files_of_something_else(hostile, script):
    """Another algorithm, version or task, and arguments of a wrong type, are refused with the reason."""
    args = hostile.contents["args"]
    algorithm = script.split("_")[0]
    assert f"is of other, not of {algorithm};" in hostile.offer(hostile.contents | {"algorithm": "other"})
    wrong = [{"gamma": "high"}, {"seed": 1.5}, {"num_envs": None}, {"cuda": 1}, {"env_id": ["Hopper-v4"]}, {"new": 1}]
    if algorithm == "sdac":
        wrong.append({"weighting": "other"})
    for change in wrong:
        assert "version" in hostile.offer(hostile.contents | {"args": args | change}), change
    for change in ({"num_envs": 0}, {"gamma": np.nan}, {"batch_size": 10**6}):
        hostile.offer(hostile.contents | {"args": args | change})
    assert "HalfCheetah-v4" in hostile.offer(hostile.contents | {"args": args | {"env_id": "HalfCheetah-v4"}})
    hostile.offer(hostile.contents | {"args": args | {"env_id": "this:Hopper-v4"}})
    assert "this" not in sys.modules  # it would have been imported


def test_missing_and_wrong_contents(hostile):
    """Every key of the file is needed, and none may have another type or shape."""
    used = set(hostile.contents) - {"algorithm", "args"}
    for key in used:
        assert str(hostile.path) in hostile.offer({k: v for k, v in hostile.contents.items() if k != key}), key
        for value in (None, "x", [1], {"x": 1}, torch.zeros(3, 3)):
            assert str(hostile.path) in hostile.offer(hostile.contents | {key: value}), (key, value)
    for key in ("algorithm", "args"):
        for value in (None, 1, [], torch.zeros(2, 2)):
            assert str(hostile.path) in hostile.offer(hostile.contents | {key: value})
    if "rows" in used:
        rows = hostile.contents["rows"]
        for wrong in (rows[:-1], rows[:, :1], rows[:, :-1], rows[:0]):
            assert str(hostile.path) in hostile.offer(hostile.contents | {"rows": wrong.clone()})
        assert str(hostile.path) in hostile.offer(hostile.contents | {"step": -2})


def mutated(whole, contents, rng):
    """Bytes with random damage, or a file with one random leaf that is missing or something else."""
    if rng.random() < 0.7:
        damaged = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            # headers and the directory at the end are a small part of the file: half of the damage is there
            position = rng.integers(len(whole)) if rng.random() < 0.5 else -1 - rng.integers(8000)
            damaged[position] = rng.integers(256)
        return bytes(damaged[: rng.integers(len(whole)) if rng.random() < 0.1 else None])
    tree = contents = copy.deepcopy(contents)
    while True:
        keys = list(tree.keys() if isinstance(tree, dict) else range(len(tree)))
        key = keys[rng.integers(len(keys))]
        if not (isinstance(tree[key], dict | list) and tree[key]) or rng.random() < 0.1:
            break
        tree = tree[key]
    junk = [None, "x", -1, 10**30, torch.nan, [], {}, torch.zeros(3), torch.zeros(2, 2).to_sparse(), True]
    if rng.random() < 0.2:
        del tree[key]
    else:
        tree[key] = junk[rng.integers(len(junk))]
    return contents


def test_random_damage(hostile):
    """Each of 15 randomly damaged files is refused, or the damage does not matter."""
    rng = np.random.default_rng(1)
    refused = [bool(hostile.offer(mutated(hostile.whole, hostile.contents, rng), may_pass=True)) for _ in range(15)]
    assert sum(refused) >= 10


@pytest.mark.slow
def test_much_random_damage(hostile):
    """The same for 125 files."""
    rng = np.random.default_rng(2)
    refused = [bool(hostile.offer(mutated(hostile.whole, hostile.contents, rng), may_pass=True)) for _ in range(125)]
    assert sum(refused) >= 90


# Many moments, real processes

LONG = "--no-cuda --env-id Hopper-v4 --learning-starts 200 --buffer-size 900 --total-timesteps 2000"
LONG = f"{LONG} --eval-frequency 150 --eval-episodes 1 --checkpoint-frequency 100".split()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_random_moments(script, tmp_path, number):
    """Ten processes that are ended at random moments and resumed: no row is missing or doubled, and after SIGKILL the
    table is that of a run that was never interrupted."""
    flags, rng = [*small_flags(script), *LONG], np.random.default_rng(1)
    start = time.monotonic()
    assert command_line(script, *flags, cwd=tmp_path).returncode == 0
    duration = time.monotonic() - start
    (run_dir,) = tmp_path.glob("runs/*")
    expected = (run_dir / "metrics.csv").read_bytes()
    steps = [line.split(b",")[:2] for line in expected.splitlines()[1:]]
    for i in range(10):
        folder = tmp_path / str(i)
        folder.mkdir()
        process = start_process(script, *flags, cwd=folder)
        wait_for(lambda: list(folder.glob("runs/*/checkpoint.pt")))  # noqa: B023
        time.sleep(rng.uniform(0, 0.7 * duration))
        process.send_signal(number)
        _, err = process.communicate()
        (run_dir,) = folder.glob("runs/*")
        finished = (run_dir / "model.pt").exists()  # then Python may be about to end, without handlers of its own
        statuses = [0, -number] if finished or number == signal.SIGKILL else [128 + number]
        assert process.returncode in statuses and err == "", (process.returncode, err)
        resumed = command_line(script, "--resume", run_dir, cwd=folder)
        assert resumed.returncode == 0 and resumed.stderr == "" and not list(run_dir.glob("*.tmp"))
        metrics = (run_dir / "metrics.csv").read_bytes()
        assert [line.split(b",")[:2] for line in metrics.splitlines()[1:]] == steps
        assert metrics == expected or number == signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "Hopper-v4"])
def test_exact_on_published_tasks(main, at_step, tmp_path, env_id, compile):
    """Killed in three places, with torch.compile too: the same metrics.csv as never killed."""
    if compile and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler")
    flags = ["--env-id", env_id, *(["--compile"] if compile else []), "--buffer-size", 150]
    torch.compiler.reset()  # each run as in a new process
    main(*flags)
    (run_dir,) = tmp_path.glob("runs/*")
    expected = (run_dir / "metrics.csv").read_bytes()
    for i, step in enumerate((50, 130, 220)):
        with pytest.MonkeyPatch.context() as patch:
            (tmp_path / str(i)).mkdir()
            patch.chdir(tmp_path / str(i))
            at_step(step, killed)
            torch.compiler.reset()
            with pytest.raises(Killed):
                main(*flags)
            torch.compiler.reset()
            main("--resume", the_run()[0])
            assert (the_run()[0] / "metrics.csv").read_bytes() == expected, step


@pytest.mark.slow
def test_small_disk(script, tmp_path):
    """On a disk that is too small, the run stops with one sentence, and its last checkpoint can be loaded."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "none", disk], capture_output=True).returncode:
        pytest.skip("mount is not permitted")
    try:
        process = command_line(script, *small_flags(script), *LONG, cwd=disk)
        assert process.returncode == 1 and re.search("^error: [^\n]*No space left[^\n]*\n$", process.stderr)
        (path,) = disk.glob("runs/*/checkpoint.pt")
        assert torch.load(path, weights_only=True)["step"] % 100 == 0
    finally:
        subprocess.run(["umount", disk], check=True)
