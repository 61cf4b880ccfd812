"""Runs that are interrupted, killed and resumed, that diverge or lose their surroundings, and hostile checkpoints."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, STARTED, command_line, small_flags, start_process, wait_for

# Checkpoints at 0, 60 (before learning starts), 120 (the buffer has wrapped), 180 and 240
RUN = "--no-cuda --env-id Hopper-v4 --learning-starts 70 --buffer-size 110 --total-timesteps 240 --eval-frequency 80"
RUN = f"{RUN} --eval-episodes 1 --checkpoint-frequency 60".split()
SMALL = {name: small_flags(name) for name in SCRIPTS}
SMALL["sdac_continuous_action"] += ["--alpha-frequency", "5"]  # so that α moves before and after a checkpoint


class Killed(BaseException):
    """Ends a run as SIGKILL does: nothing catches it."""


def killed():
    raise Killed


@pytest.fixture
def main(module, script, monkeypatch, tmp_path):
    """Runs main() in an empty folder, with the flags of a small run before the given ones unless it is resumed."""
    monkeypatch.chdir(tmp_path)

    def main(*flags):
        small = [] if {"--resume", "--evaluate"} & set(flags) else [*SMALL[script], *RUN]
        module.main(*module.parse([*small, *map(str, flags)]))

    return main


@pytest.fixture
def stops(main, capsys):
    """Asserts that main() ends with the given status and one sentence, which it returns."""

    def stops(status, *flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(*flags)
        error, code = capsys.readouterr().err, caught.value.code
        error, code = (f"{error}{code}\n", 1) if isinstance(code, str) else (error, code)  # as Python does it
        assert code == status and re.fullmatch("error: [^\n]+\n", error), (code, error)
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
        process = command_line(script, *SMALL[script], *RUN, cwd=folder)
        assert process.returncode == 0 and process.stderr == "", process.stderr
        (run_dir,) = folder.glob("runs/*")
        references[script] = SimpleNamespace(run_dir=run_dir, metrics=(run_dir / "metrics.csv").read_bytes())
    return references[script]


def the_run():
    """The only run folder, with a checkpoint and nothing half-written, and the checkpoint."""
    (run_dir,) = Path("runs").iterdir()
    assert not list(run_dir.glob("*.tmp"))
    return run_dir, torch.load(run_dir / "checkpoint.pt", weights_only=True)


def equal(tree, other):
    """Whether all tensors in nested dictionaries and lists are equal and finite."""
    if isinstance(tree, dict):
        return tree.keys() == other.keys() and all(equal(value, other[key]) for key, value in tree.items())
    if isinstance(tree, list):
        return len(tree) == len(other) and all(map(equal, tree, other))
    return torch.equal(tree, other) and bool(tree.isfinite().all())


def finite(tree):
    """Whether all tensors in nested dictionaries and lists are finite."""
    return equal(tree, tree)


# Resuming


@pytest.mark.parametrize("step, name", [(40, ""), (100, "checkpoint.pt"), (170, "model.pt"), (200, "")])
def test_killed_and_resumed(main, reference, at_step, step, name):
    """Killed before learning starts, and while and after the buffer wraps, and resumed with the run folder or a file
    in it: the same metrics.csv, and in the end the same networks, optimisers, buffer and random stream."""
    at_step(step, killed)
    with pytest.raises(Killed):
        main()
    run_dir, checkpoint = the_run()
    assert checkpoint["step"] == (step - 1) // 60 * 60
    main("--resume", run_dir / name)
    assert (run_dir / "metrics.csv").read_bytes() == reference.metrics
    final, expected = (
        torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (run_dir, reference.run_dir)
    )
    for key in ("agent", "optimizers", "rows", "generator"):
        assert equal(final[key], expected[key]), key
    assert all(final["optimizers"]) and len(final["optimizers"]) == 3  # each has made a step
    assert equal(torch.load(run_dir / "model.pt", weights_only=True)["agent"], expected["agent"])


STATISTICS = [([], "q_spread"), (["--weighting", "mirror-descent"], "q_moments")]


@pytest.mark.parametrize("script", SCRIPTS[:1])
@pytest.mark.parametrize("flags, name", STATISTICS)
def test_running_statistics_are_resumed(main, at_step, tmp_path, monkeypatch, flags, name):
    """The same for the variants that follow the mean, the deviation or the spread of Q."""
    main(*flags)
    expected = the_run()
    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    at_step(170, killed)
    with pytest.raises(Killed):
        main(*flags)
    run_dir, checkpoint = the_run()
    assert not {0.0, 1.0} & set(checkpoint["agent"][name].flatten().tolist())  # where they begin
    main("--resume", run_dir)
    assert equal(the_run()[1]["agent"], expected[1]["agent"])
    assert (run_dir / "metrics.csv").read_bytes() == (tmp_path / expected[0] / "metrics.csv").read_bytes()


def test_killed_twice(main, reference, at_step):
    """A resumed run can be killed and resumed again; each evaluation is there once and the clock does not go back."""
    for step in (170, 30):  # of the run, then of the resumed run, which begins at 120
        at_step(step, killed)
        with pytest.raises(Killed):
            main(*(["--resume", the_run()[0]] if step == 30 else []))
    run_dir, checkpoint = the_run()
    torch.save(checkpoint | {"seconds": 1000.0}, run_dir / "checkpoint.pt")
    main("--resume", run_dir)
    run_dir, checkpoint = the_run()
    assert (run_dir / "metrics.csv").read_bytes() == reference.metrics
    assert [row[0] for row in checkpoint["evaluations"]] == [80, 160, 240]
    first, *others = (row[5] for row in checkpoint["evaluations"])
    assert 0 < first < 1000 < others[0] < others[1] < checkpoint["seconds"] < 2000


@pytest.mark.parametrize("content", [None, "half a row"])
def test_logs_changed_after_the_checkpoint(main, reference, at_step, content):
    """Rows that were lost or doubled in metrics.csv after the checkpoint do not matter."""
    at_step(170, killed)
    with pytest.raises(Killed):
        main()
    metrics = the_run()[0] / "metrics.csv"
    metrics.write_text(content) if content else metrics.unlink()
    main("--resume", metrics.parent)
    assert metrics.read_bytes() == reference.metrics


def test_checkpoint_holds_only_filled_rows(main, at_step):
    """The file has the filled rows of the buffer, not the space behind them, and no part of another file is left."""
    at_step(100, killed)
    with pytest.raises(Killed):
        main()
    _, checkpoint = the_run()
    assert checkpoint["rows"].shape == (60, 11 + 3 + 1 + 11 + 1)
    assert checkpoint["rows"].untyped_storage().nbytes() == 60 * 27 * 4


def test_a_finished_run(main, reference, capsys, tmp_path):
    """Resumed, it writes its model again and evaluates nothing; with more steps it goes on from its last state."""
    run_dir = shutil.copytree(reference.run_dir, tmp_path / "copy")
    (run_dir / "model.pt").unlink()
    main("--resume", run_dir)
    assert (run_dir / "metrics.csv").read_bytes() == reference.metrics and (run_dir / "model.pt").is_file()
    assert capsys.readouterr().out == "device: cpu\n"
    main("--resume", run_dir, "--total-timesteps", 300, "--eval-episodes", 2)
    metrics = (run_dir / "metrics.csv").read_bytes()
    assert metrics.startswith(reference.metrics) and metrics.splitlines()[-1].startswith(b"300,115,")
    main("--resume", run_dir, "--total-timesteps", 100)
    assert (run_dir / "metrics.csv").read_bytes() == metrics


def test_flags_beside_resume_win(module, reference):
    """The arguments of the run are the defaults, and any flag given beside --resume wins."""
    resume = ["--resume", str(reference.run_dir)]
    saved, _ = module.parse(resume)
    expected = module.parse([*SMALL[saved.exp_name], *RUN])[0]
    assert saved == replace(expected, resume=str(reference.run_dir))
    for field in fields(saved):
        value, flag = getattr(saved, field.name), f"--{field.name.replace('_', '-')}"
        if field.name in ("resume", "evaluate"):
            continue
        choices = [x for x in get_args(field.type) if type(x) is str and x != value]
        if type(value) is bool:
            other, flags = not value, [f"--{'no-' if value else ''}{flag[2:]}"]
        else:
            other = choices[0] if choices else 2 * value + 1 if type(value) in (int, float) else "x"
            other = 9 if int in get_args(field.type) else other
            flags = [flag, str(other)]
        assert module.parse([*resume, *flags])[0] == replace(saved, **{field.name: other}), field.name


@pytest.fixture
def resumed(module, main, reference, tmp_path, monkeypatch):
    """Resumes the reference run with changes of its checkpoint and flags; returns what train() is given."""

    def resumed(changes, *flags):
        path = tmp_path / "checkpoint.pt"
        torch.save(torch.load(reference.run_dir / "checkpoint.pt", weights_only=True) | changes, path)
        given = []
        with monkeypatch.context() as patch:
            patch.setattr(module, "train", lambda args, agent, buffer, generator, state: given.extend((agent, buffer)))
            main("--resume", path, *flags)
        return given

    return resumed


@pytest.mark.parametrize("updates, factor", [(100, 1), (2 * 25_000, 1), (2 * 60_000, 0.37), (2 * 10**6, 0.1)])
def test_learning_rates_after_resume(script, resumed, updates, factor):
    """SDAC's policy learning rate is that of the resumed number of updates: held for 25,000 updates of the policy, then
    it falls in 50,000 by nine tenths; all others are constant, and flags beside --resume are in effect."""
    for flags, rates in [([], None), (["--q-lr", 0.01, "--policy-lr", 0.02, "--alpha-lr", 0.03], [0.01, 0.02, 0.03])]:
        agent, buffer = resumed({"updates": updates}, *flags)
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            agent.update(buffer.sample(16, generator), generator)
        q_lr, policy_lr, alpha_lr = rates or [3e-4, 3e-4, 7e-3 if script == "sdac_continuous_action" else 3e-4]
        expected = [q_lr, policy_lr * (factor if script == "sdac_continuous_action" else 1), alpha_lr]
        found = [group["lr"] for optimizer in agent.optimizers for group in optimizer.param_groups]
        assert found == pytest.approx(expected, rel=1e-6) and agent.updates == updates + 2


def test_buffer_size_beside_resume(main, resumed, reference, stops):
    """Another --buffer-size is refused where the rows do not tell their order or do not fit; else it is in effect."""
    checkpoint = torch.load(reference.run_dir / "checkpoint.pt", weights_only=True)
    for size in (100, 111, 1000):  # 110 rows are all that is left of 240
        stops(2, "--resume", reference.run_dir, "--buffer-size", size)
    _, buffer = resumed({"step": 60, "rows": checkpoint["rows"][:60].clone()}, "--buffer-size", 1000)
    assert len(buffer.rows) == 1000 and torch.equal(buffer.rows[:60], checkpoint["rows"][:60])
    drawn = torch.cat(buffer.sample(2000, torch.Generator().manual_seed(0))[0:1])
    assert len(drawn.unique(dim=0)) == len(checkpoint["rows"][:60, :11].unique(dim=0))


# Signals


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 40), (signal.SIGTERM, 132), (signal.SIGTERM, 180)])
def test_interrupted(main, at_step, capfd, number, step):
    """The step is finished, its state is written, the status is that of the signal, one line says how to go on, and the
    run can be evaluated, without a model.pt, and go on."""
    at_step(step, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 128 + number
    run_dir, checkpoint = the_run()
    assert checkpoint["step"] == step and checkpoint["updates"] == max(0, step - 70) // 2
    assert len(checkpoint["rows"]) == min(step, 110) and not (run_dir / "model.pt").exists()
    assert re.fullmatch(f"\ninterrupted: [^\n]*--resume {run_dir} [^\n]*\n", capfd.readouterr().err)
    main("--evaluate", run_dir)
    assert f"\nevaluation at step {step}: return " in capfd.readouterr().out and the_run()[1]["step"] == step
    main("--resume", run_dir)
    rows = [line.split(b",")[:2] for line in (run_dir / "metrics.csv").read_bytes().splitlines()[1:]]
    assert rows == [[b"80", b"5"], [b"160", b"45"], [b"240", b"85"]]


def test_interrupted_evaluation(module, main, monkeypatch, reference):
    """An evaluation is finished before the run ends, and is not made again."""
    evaluate = module.evaluate
    monkeypatch.setattr(module, "evaluate", lambda *inputs: os.kill(os.getpid(), signal.SIGTERM) or evaluate(*inputs))
    with pytest.raises(SystemExit) as caught:
        main()
    run_dir, checkpoint = the_run()
    assert caught.value.code == 143 and checkpoint["step"] == 80
    first = b"".join(reference.metrics.splitlines(keepends=True)[:2])
    assert (run_dir / "metrics.csv").read_bytes() == first
    monkeypatch.setattr(module, "evaluate", evaluate)
    main("--resume", run_dir)
    metrics = (run_dir / "metrics.csv").read_bytes()
    assert metrics.startswith(first) and [line.split(b",")[0] for line in metrics.splitlines()[2:]] == [b"160", b"240"]


DRIVER = """
import io, pathlib, sys, time
sys.path.insert(0, sys.argv.pop(1))
module, calls = __import__(sys.argv.pop(1)), []
torch_save = module.torch.save
def stuck(contents, path):
    calls.append(path)
    if len(calls) == 2:
        torch_save(contents, whole := io.BytesIO())
        pathlib.Path(path).write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
        pathlib.Path("stuck").touch()
        while True:
            time.sleep(0.01)
    torch_save(contents, path)
module.torch.save = stuck
module.main(*module.parse(sys.argv[1:]))
"""


@pytest.mark.parametrize("number, times", [(signal.SIGKILL, 1), (signal.SIGTERM, 2), (signal.SIGINT, 2)])
def test_ended_while_it_writes(main, script, reference, tmp_path, number, times):
    """A process that SIGKILL or a second signal ends while it writes a checkpoint leaves the one before."""
    command = [sys.executable, "-c", DRIVER, str(ROOT), script, *SMALL[script], *RUN]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    STARTED.append(process)
    wait_for(lambda: (tmp_path / "stuck").exists() or process.poll() is not None)
    lines = []
    for left in reversed(range(times)):
        process.send_signal(number)
        if left:  # the first is answered at once, and does not end what is being written
            lines = [process.stderr.readline() for _ in range(2)]
            time.sleep(0.3)
            assert process.poll() is None
    assert process.wait(10) == -number and process.stderr.read() == ""
    (run_dir,) = tmp_path.glob("runs/*")
    assert times == 1 or (lines[0] == "\n" and f"--resume runs/{run_dir.name} " in lines[1])
    assert (run_dir / "unfinished.tmp").stat().st_size > 10**6
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["step"] == 0
    main("--resume", run_dir)
    assert (run_dir / "metrics.csv").read_bytes() == reference.metrics
    the_run()


@pytest.mark.parametrize("moment", ["warm-up", "learning", pytest.param("compilation", marks=pytest.mark.slow)])
def test_interrupted_process_group(main, script, tmp_path, moment):
    """Ctrl-C in a terminal, or SIGTERM, reaches every process of the group, compilers too: exit status 130 or 143, no
    traceback, one sentence that says how to go on, and a checkpoint from which the run does."""
    number = {"warm-up": signal.SIGTERM, "compilation": signal.SIGINT, "learning": signal.SIGINT}[moment]
    cache = tmp_path / "cache"
    flags = [
        *SMALL[script],
        *RUN,
        "--total-timesteps",
        10**6,
        "--learning-starts",
        10**6 if moment == "warm-up" else 20,
    ]
    flags += ["--eval-frequency", 10**6, *(["--compile"] if moment == "compilation" else [])]
    env = {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    process = start_process(script, *flags, cwd=tmp_path, env=env, start_new_session=True)
    events = {"warm-up": "runs/*/checkpoint.pt", "compilation": "cache/**/*.cpp", "learning": "runs/*/checkpoint.pt"}
    wait_for(lambda: list(tmp_path.glob(events[moment])) or process.poll() is not None)
    if moment == "learning":
        (path,) = tmp_path.glob(events[moment])
        wait_for(lambda: torch.load(path, weights_only=True)["updates"] or process.poll() is not None)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=300)
    run_dir, checkpoint = the_run()
    assert process.returncode == 128 + number, err
    assert re.fullmatch(f"\n?interrupted: [^\n]*--resume {run_dir} [^\n]*\n", err), err
    assert out == "device: cpu\n" and checkpoint["updates"] == max(0, checkpoint["step"] - 20) // 2 * (
        moment != "warm-up"
    )
    assert checkpoint["updates"] <= 1 or moment != "compilation"
    step = checkpoint["step"] + 60
    main("--resume", run_dir, "--no-compile", "--total-timesteps", step, "--learning-starts", 20)
    assert the_run()[1]["step"] == step


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
        obs = {"nan": obs * np.float32(np.nan), "shape": obs[:2]}.get(fault, obs)
        reward = {"reward nan": np.nan, "reward inf": np.inf, "reward huge": 1e300}.get(fault, reward)
        return obs, reward, False, self.steps % 5 == 0 and fault != "shape", {}


@pytest.fixture
def faulty(monkeypatch):
    """Registers Faulty as Faulty-v0 with the given fault."""

    def faulty(fault):
        monkeypatch.setitem(gym.registry, "Faulty-v0", gym.envs.registration.EnvSpec("Faulty-v0", Faulty))
        monkeypatch.setattr(Faulty, "fault", fault)
        monkeypatch.setattr(Faulty, "born", 0)
        return "--env-id Faulty-v0 --learning-starts 32 --batch-size 32 --total-timesteps 400".split()

    return faulty


FAULTS = [(fault, 40) for fault in ("nan", "reset nan", "reward nan", "reward inf", "reward huge")]


@pytest.mark.parametrize("fault, frequency", [*FAULTS, ("nan", 12)])
def test_not_finite(main, stops, faulty, fault, frequency):
    """What is not finite, in float32, ends the run at the next checkpoint with one sentence. It names the folder with
    the last good state, from which the run goes on."""
    flags = [*faulty(fault), "--checkpoint-frequency", frequency, "--eval-frequency", 10**6]
    error = stops(1, *flags)
    run_dir, checkpoint = the_run()
    due = -(-50 // frequency) * frequency  # the first checkpoint after the fault, be it learned from by then or not
    assert "not finite" in error and str(run_dir) in error and f" at step {due}" in error
    assert checkpoint["step"] == len(checkpoint["rows"]) == due - frequency
    for key in ("agent", "optimizers", "rows"):
        assert finite(checkpoint[key])
    faulty(None)
    main("--resume", run_dir, "--total-timesteps", 80)
    rows = the_run()[1]["rows"]
    assert len(rows) == 80 and rows.isfinite().all() and torch.equal(rows[: checkpoint["step"]], checkpoint["rows"])


@pytest.mark.parametrize("fault", ["raises", "reset raises", "shape"])
def test_failing_environment(main, faulty, fault):
    """An environment that fails is Python's own traceback, and the last checkpoint is as it should be."""
    flags = [*faulty(fault), "--checkpoint-frequency", 20, "--eval-frequency", 10**6]
    with pytest.raises((RuntimeError, ValueError), match={"raises": "motor", "reset raises": "no way"}.get(fault)):
        main(*flags)
    run_dir, checkpoint = the_run()
    assert checkpoint["step"] == len(checkpoint["rows"]) == 40 and finite(checkpoint["agent"])
    faulty(None)
    main("--resume", run_dir, "--total-timesteps", 80)
    assert the_run()[1]["step"] == 80 and torch.equal(the_run()[1]["rows"][:40], checkpoint["rows"])


@pytest.mark.parametrize("name", ["critics.weights.1", "log_alpha"])
def test_diverged_learning(module, stops, monkeypatch, name):
    """A network or α that is no longer finite is named and does not reach the checkpoint, nor does an optimiser."""
    update = module.Agent.update

    def diverging(self, batch, generator):
        metrics = update(self, batch, generator)
        if self.updates == 55:
            with torch.no_grad():
                self.get_parameter(name).view(-1)[0] = torch.inf
        return metrics

    monkeypatch.setattr(module.Agent, "update", diverging)
    error = stops(1)
    run_dir, checkpoint = the_run()
    assert re.match(f"error: [^\n]*step 180[^\n]*{run_dir} [^\n]*: {name} is not finite\n", error), error
    assert checkpoint["step"] == 120 and finite(checkpoint["agent"]) and finite(checkpoint["optimizers"])


@pytest.mark.parametrize("name", ["unfinished.tmp", "metrics.csv"])
def test_full_disk(main, stops, at_step, reference, name):
    """The checkpoint before is kept, and with room again the run goes on to the same metrics.csv."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")

    def fill():
        path = next(Path("runs").iterdir()) / name
        path.unlink(missing_ok=True)
        path.symlink_to("/dev/full")

    at_step(100, fill)
    error = stops(1)
    (run_dir,) = Path("runs").iterdir()
    (run_dir / name).unlink()
    step, last = (120, 60) if name == "unfinished.tmp" else (160, 120)
    assert f"error: training ends at step {step}" in error and the_run()[1]["step"] == last
    assert str(run_dir) in error or name == "metrics.csv"
    main("--resume", run_dir)
    assert (run_dir / "metrics.csv").read_bytes() == reference.metrics


def test_failing_evaluation(module, main, monkeypatch, reference):
    """An evaluation that fails is Python's own traceback; it is made again by the resumed run."""
    evaluate, calls = module.evaluate, []

    def failing(*inputs):
        calls.append(inputs)
        if len(calls) == 3:
            raise OSError(30, "Read-only file system")
        return evaluate(*inputs)

    monkeypatch.setattr(module, "evaluate", failing)
    with pytest.raises(OSError, match="Read-only"):
        main()
    assert the_run()[1]["step"] == 180
    main("--resume", the_run()[0])
    assert (the_run()[0] / "metrics.csv").read_bytes() == reference.metrics


def test_failing_model_file(module, stops, monkeypatch):
    """If model.pt cannot be written at the end, one sentence says so, and the checkpoint is there."""
    replace = os.replace

    def failing(source, target):
        if Path(target).name == "model.pt":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(module.os, "replace", failing)
    assert "step 240" in (error := stops(1)) and "No space left on device" in error
    (path,) = Path("runs").glob("*/checkpoint.pt")
    assert torch.load(path, weights_only=True)["step"] == 240


def test_runs_cannot_be_written(main, stops):
    """Where the run folder cannot be made, one sentence says so."""
    Path("runs").touch()
    assert "runs/Hopper-v4" in stops(2)


# Hostile files


class Trap:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("trap"),)


@pytest.fixture(params=["--resume", "--evaluate"])
def hostile(request, reference, main, stops, tmp_path):
    """Offers a file to --resume or --evaluate: content is bytes, an object, or changes of the file's dictionary."""
    name = {"--resume": "checkpoint.pt", "--evaluate": "model.pt"}[request.param]
    path = tmp_path / "folder" / name
    path.parent.mkdir()
    flags = [request.param, path]
    whole = (reference.run_dir / name).read_bytes()

    def offer(content):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        error = stops(2, *flags)
        assert os.listdir(tmp_path) == ["folder"] and os.listdir(path.parent) == [name]
        return error

    contents = torch.load(reference.run_dir / name, weights_only=True)
    return SimpleNamespace(offer=offer, whole=whole, contents=contents, path=path, flag=request.param)


def test_damaged_files(hostile):
    """Truncated and other files are refused, and the message names the file."""
    whole, rng = hostile.whole, np.random.default_rng(1)
    for size in (0, 1, 100, 4096, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        assert str(hostile.path) in hostile.offer(whole[:size])
    for content in (rng.bytes(10_000), b"not a checkpoint\n", [1, 2], {}, "x"):
        assert str(hostile.path) in hostile.offer(content)


def test_pickle_bombs(hostile):
    """A file that would run code, in any place, is refused and runs nothing."""
    for bomb in (Trap(), hostile.contents | {"args": Trap()}, hostile.contents | {"updates": Trap()}, [Trap()]):
        assert "weights_only" in hostile.offer(bomb).lower()
    torch.save(hostile.contents | {"rows": Trap()}, hostile.path, _use_new_zipfile_serialization=False)
    assert "weights_only" in hostile.offer(hostile.path.read_bytes()).lower()


def test_files_of_something_else(hostile, script):
    """Another algorithm, version or task, and arguments with which nothing can work, are refused with the reason."""
    args = hostile.contents["args"]
    assert "version" in (error := hostile.offer(hostile.contents | {"args": args | {"old": 1}})) and "'old'" in error
    for change in ({"num_envs": 0}, {"num_envs": None}, {"gamma": np.nan}, {"batch_size": 10**6}, {"env_id": ["x"]}):
        hostile.offer(hostile.contents | {"args": args | change})
    assert "size mismatch" in hostile.offer(hostile.contents | {"args": args | {"env_id": "HalfCheetah-v4"}})
    agent = {name.replace("policy", "actor"): value for name, value in hostile.contents["agent"].items()}
    assert "cannot start" in hostile.offer(hostile.contents | {"agent": agent})


def test_runs_of_the_other_algorithm(references, reference, script, stops, main, request, tmp_path):
    """SAC does not go on with a run of SDAC, nor SDAC with one of SAC."""
    (other,) = set(SCRIPTS) - {script}
    if other not in references:
        pytest.skip("has not been made")
    before = {path: path.read_bytes() for path in references[other].run_dir.iterdir()}
    for flag in ("--resume", "--evaluate"):
        stops(2, flag, references[other].run_dir)
    assert {path: path.read_bytes() for path in references[other].run_dir.iterdir()} == before


def test_missing_and_wrong_contents(hostile):
    """What networks, optimisers, buffer and random stream go on from is needed, whole and of its type."""
    used = ["args", "agent", "updates"]
    used += ["step", "optimizers", "rows", "generator"] if hostile.flag == "--resume" else []
    for key in used:
        hostile.offer({k: v for k, v in hostile.contents.items() if k != key})
    for key in set(used) - {"updates", "step"}:
        for value in (None, "x", [1], {"x": 1}, torch.zeros(3, 3)):
            hostile.offer(hostile.contents | {key: value})
    if hostile.flag == "--resume":
        rows = hostile.contents["rows"]
        for wrong in (rows[:-1], rows[:, :-1], rows[:0]):
            hostile.offer(hostile.contents | {"rows": wrong.clone()})
        optimizers = hostile.contents["optimizers"]
        for i in range(3):  # without that of Q, of the policy, of α
            hostile.offer(hostile.contents | {"optimizers": optimizers[:i] + optimizers[i + 1 :]})


# Many moments, real processes

LONG = "--no-cuda --env-id Hopper-v4 --learning-starts 200 --buffer-size 900 --total-timesteps 2000"
LONG = f"{LONG} --eval-frequency 150 --eval-episodes 1 --checkpoint-frequency 100".split()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_random_moments(script, tmp_path, number):
    """Ten processes that are ended at random moments and resumed: no row is missing or doubled, and after SIGKILL the
    table is that of a run that was never interrupted."""
    flags, rng = [*SMALL[script], *LONG], np.random.default_rng(1)
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
        assert process.returncode in statuses, (process.returncode, err)
        assert re.fullmatch(r"(\ninterrupted: [^\n]*\n)?", err) and (number == signal.SIGTERM or not err), err
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
        process = command_line(script, *SMALL[script], *LONG, cwd=disk)
        assert process.returncode == 1 and re.fullmatch("error: training ends at step[^\n]*\n", process.stderr)
        (path,) = disk.glob("runs/*/checkpoint.pt")
        assert torch.load(path, weights_only=True)["step"] % 100 == 0
    finally:
        subprocess.run(["umount", disk], check=True)
