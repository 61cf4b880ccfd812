"""Runs that are interrupted, killed, resumed and evaluated, or that diverge; and hostile files."""

import gc
import os
import re
import signal
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Killed, Made, evaluated_steps, finish, load, metrics, scalars, start_process

import sac_continuous_action as sac
import sdac_continuous_action as sdac


def raise_killed(*_):
    raise Killed


def end(train, *flags):
    """A run that ends by SystemExit: its status or sentence."""
    with pytest.raises(SystemExit) as caught:
        train(*flags)
    return caught.value.code


assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)


def the_run():
    """The only run folder."""
    (run_dir,) = Path("runs").iterdir()
    return run_dir


def files(run_dir):
    return {path.name: path.read_bytes() for path in Path(run_dir).iterdir()}


# Resuming
CHANGES = {
    "--num-envs 7": [20, 40, 61, 82, 103],  # the run has made 40 steps
    "--num-envs 1": [20, 40, 60, 80, 100],
    "--eval-frequency 30": [20, 40, 60, 90, 100],
    "--eval-frequency 9": [20, 40, 46, 54, 64, 72, 82, 90, 100],
    "--total-timesteps 41": [20, 40, 42],
    "--total-timesteps 30": [20, 40],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_resumed_run_may_change_its_plan(train, change):
    """It ends, and evaluates when due: with the first step at or after a multiple of the frequency,
    and with the last."""
    run_dir = train()
    train("--resume", run_dir, "--total-timesteps", 100, *change.split())
    assert evaluated_steps(run_dir) == CHANGES[change]
    assert load(run_dir)["step"] == evaluated_steps(run_dir)[-1]


@pytest.mark.parametrize("size", [100, 30])
def test_a_resumed_run_goes_on_from_the_same_state(train, monkeypatch, size):
    """Networks, averages, optimisers, counters and transitions are those of the checkpoint, also
    when a smaller buffer has been filled and is overwritten from its start."""
    run_dir = train("--buffer-size", size)
    saved, given = load(run_dir), []
    monkeypatch.setattr(sdac, "train", lambda *inputs: given.extend(inputs))
    train("--resume", run_dir)
    agent, buffer, folder, *_ = given
    assert folder == run_dir and (agent.updates, buffer.added) == (10, 40)
    assert agent.evaluations == saved["evaluations"] and len(saved["evaluations"]) == 2
    assert_same(saved["agent"], dict(agent.state_dict()))
    optimizers = [optimizer.state_dict()["state"] for optimizer in agent.optimizers]
    assert_same(saved["optimizers"], optimizers)
    assert len(saved["rows"]) == min(size, 40)
    assert_same(saved["rows"], buffer.rows[:40])


def test_learning_rates_fall_to_the_end_of_the_run(train, monkeypatch):
    """From the first update on, in a straight line to 0 at the last step. A resumed run with more
    steps goes on with the rate that it would have had from the beginning."""
    update, found = sdac.Agent.update, []

    def watched(agent, *inputs):
        update(agent, *inputs)
        found.append([float(x.param_groups[0]["lr"]) for x in agent.optimizers])

    monkeypatch.setattr(sdac.Agent, "update", watched)
    run_dir = train("--policy-lr", 0.1, "--q-lr", 0.2)  # steps 20, 22 .. 38 of 40
    train("--resume", run_dir, "--total-timesteps", 60)  # steps 40, 42 .. 58 of 60
    left = [(40 - step) / 20 for step in range(20, 40, 2)]
    left += [(60 - step) / 40 for step in range(40, 60, 2)]
    np.testing.assert_allclose(found, [[0.1 * x, 0.2 * x] for x in left], rtol=1e-5)


FIXED = {"env_id": "Hopper-v4", "buffer_size": 99, "denoising_steps": 4, "published": None}


@pytest.mark.parametrize("name", FIXED)
def test_what_a_run_is_made_of_cannot_change(train, refused, name):
    run_dir = train()
    flag = [f"--{name.replace('_', '-')}", *([FIXED[name]] if FIXED[name] else [])]
    for way in ("--resume", "--evaluate"):
        saved = load(run_dir)["args"][name]
        assert refused(way, run_dir, *flag) == f"{name} must stay {saved} in this run"


def test_killed_between_evaluation_and_checkpoint(train, at_step, monkeypatch):
    """metrics.csv and TensorBoard have each evaluation once, after the run was resumed."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(24, lambda: patch.setattr(sdac, "save_checkpoint", raise_killed))
        train()
    assert [step for step, _ in scalars(the_run(), "eval/episodic_return")] == [20, 40]
    time.sleep(1)  # The names of TensorBoard's files have the second.
    train("--resume", the_run(), "--total-timesteps", 60)
    assert evaluated_steps(the_run()) == [20, 40, 60]
    assert [step for step, _ in scalars(the_run(), "eval/episodic_return")] == [20, 40, 60]


@pytest.mark.parametrize("name", ["model.pt", "checkpoint.pt"])
def test_killed_while_a_file_is_written(train, at_step, monkeypatch, name):
    """The file of the checkpoint before is still there, and the run goes on from it."""
    save = torch.save

    def dies(contents, path):
        save(contents, path)
        if ("rows" in contents) == (name == "checkpoint.pt"):
            Path(path).write_bytes(Path(path).read_bytes()[:5000])
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(24, lambda: patch.setattr(torch, "save", dies))
        train()
    assert load(the_run(), name)["step"] == 20
    train("--resume", the_run())
    assert evaluated_steps(the_run()) == [20, 40] and load(the_run(), "model.pt")["step"] == 40


# Memory
def memory(kind):
    """Memory of this process in MB: VmHWM is the largest since the last reset."""
    gc.collect()
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(kind))
    return int(line.split()[1]) / 1000


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="no /proc")
MB = 250_000  # numbers


@needs_proc
def test_saving_copies_the_filled_part_once_and_writes_nothing_else(tmp_path):
    """With 120 MB of 480 filled, the peak is 120 MB more, and so is the file."""
    agent = sdac.Agent(sdac.Args(), 3, 1)
    buffer = sdac.ReplayBuffer(480 * MB // 10, 4, 0)
    filled = 120 * MB // 10
    buffer.added = filled
    buffer.rows[:filled] = 1
    gc.collect()  # else agents of earlier tests may be freed while it is measured
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory("VmRSS")
    sdac.save_checkpoint(tmp_path, agent, buffer)
    assert 110 < memory("VmHWM") - before < 150
    assert 120 < (tmp_path / "checkpoint.pt").stat().st_size / 1e6 < 135
    assert load(tmp_path)["rows"].shape == (filled, 10)


@needs_proc
def test_after_resuming_the_transitions_are_held_once(train, register, monkeypatch):
    """The buffer takes them, and what was read from the file does not stay in memory."""
    run_dir = train(*register(Made), "--buffer-size", 130 * MB // 8)
    saved = load(run_dir)
    saved |= {"rows": torch.ones(120 * MB // 8, 8), "step": 120 * MB // 8}
    torch.save(saved, run_dir / "checkpoint.pt")
    del saved
    before, found = memory("VmRSS"), []
    monkeypatch.setattr(sdac, "train", lambda *_: found.append(memory("VmRSS") - before))
    train("--resume", run_dir, "--total-timesteps", 10**9)
    assert 110 < found[0] < 180, found


# Signals
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STATUS)
def test_a_signal_ends_the_run_in_order(train, at_step, capsys, number):
    """It writes a checkpoint, names the signal in its status, and says how to go on. It can be
    evaluated and resumed."""
    signal.signal(number, lambda *_: pytest.fail("the run has no handler"))
    at_step(34, lambda: send(number))
    assert end(train) == STATUS[number]
    assert load(the_run())["step"] == load(the_run(), "model.pt")["step"] == 34
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(rf"Saved. Go on with: python \S+ --resume {the_run()}", last)
    train("--evaluate", the_run())
    assert "\nevaluation at step 34: return " in capsys.readouterr().out
    train("--resume", the_run())
    assert evaluated_steps(the_run()) == [20, 40]


def test_a_dead_terminal_costs_nothing(train, at_step, monkeypatch):
    """Printing fails, for example after Ctrl-C has also ended `tee`. The checkpoint is there."""

    def die():
        monkeypatch.setattr(sdac, "print", fail, raising=False)
        send(signal.SIGHUP)

    def fail(*args, **kwargs):
        raise BrokenPipeError

    at_step(34, die)
    with pytest.raises(BrokenPipeError):
        train()
    assert load(the_run())["step"] == 34


@pytest.mark.parametrize("number", [1, 2])
def test_a_signal_ends_an_evaluation(train, monkeypatch, number):
    """At once; the resumed run makes this evaluation."""
    act = sdac.Agent.act

    def watched(agent, obs, policy=None, explore=True):
        if not explore and len(agent.evaluations) == number - 1:
            send(signal.SIGTERM)
        return act(agent, obs, policy, explore)

    with monkeypatch.context() as patch:
        patch.setattr(sdac.Agent, "act", watched)
        assert end(train) == 143
    assert evaluated_steps(the_run()) == [20, 40][: number - 1]
    assert load(the_run())["step"] == 20 * number
    train("--resume", the_run())
    assert evaluated_steps(the_run()) == [20, 40]


def test_a_signal_lets_the_current_call_end(train, monkeypatch):
    """An exception in the wrong place would leave a lock behind, and the run would hang."""
    add, calls = sdac.SummaryWriter.add_scalar, []

    def watched(writer, name, *point):
        if name == "charts/episodic_return" and not calls:
            send(signal.SIGTERM)
            calls.append("ended")
        add(writer, name, *point)

    monkeypatch.setattr(sdac.SummaryWriter, "add_scalar", watched)
    assert end(train) == 143 and calls == ["ended"]


def test_hangups_stay_ignored_under_nohup(train, at_step):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(34, lambda: send(signal.SIGHUP))
    assert evaluated_steps(train()) == [20, 40]
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_signal_ends_a_run_whose_compiler_it_ended(train, monkeypatch):
    """Ctrl-C reaches the compiler, too, and the call that needs it fails."""
    calls = []

    def fails_at_last(agent, *_):
        calls.append(send(signal.SIGINT) if len(calls) == 2 else None)
        if len(calls) == 3:
            raise RuntimeError("no object file")

    monkeypatch.setattr(sdac.Agent, "update", fails_at_last)
    assert end(train) == 130
    assert load(the_run())["step"] == 24


def test_a_second_signal_ends_the_saving_at_once(train, at_step, monkeypatch):
    """The handlers from before are back then. The checkpoint before stays as it was."""
    save = torch.save

    def interrupted(contents, path):
        if contents["step"] == 34:
            Path(path).write_bytes(b"half")
            send(signal.SIGTERM)
        save(contents, path)

    signal.signal(signal.SIGTERM, raise_killed)
    monkeypatch.setattr(torch, "save", interrupted)
    at_step(34, lambda: send(signal.SIGINT))
    with pytest.raises(Killed):
        train()
    assert load(the_run())["step"] == load(the_run(), "model.pt")["step"] == 20


def test_signal_handlers_come_back(train, at_step):
    """After a run that ended by itself, and after one that a signal ended."""
    handlers = [lambda *_: None for _ in STATUS]
    for number, handler in zip(STATUS, handlers, strict=True):
        signal.signal(number, handler)
    train()
    assert [signal.getsignal(number) for number in STATUS] == handlers
    at_step(34, lambda: send(signal.SIGTERM))
    assert end(train) == 143
    assert [signal.getsignal(number) for number in STATUS] == handlers


def test_main_works_in_a_thread(train):
    found = []
    thread = threading.Thread(target=lambda: found.append(train()))
    thread.start()
    thread.join(60)
    assert evaluated_steps(found[0]) == [20, 40]


def test_ctrl_c_in_a_terminal(tmp_path):
    """It reaches all processes of the group: status 130, no traceback, a checkpoint. What was
    printed is in a log file before."""
    process = start_process("--total-timesteps", 10**6, cwd=tmp_path, start_new_session=True)
    lines = [process.stdout.readline() for _ in range(3)]
    assert lines[2].startswith("evaluation at step 40: ")
    os.killpg(process.pid, signal.SIGINT)
    status, _, err = finish(process)
    (run_dir,) = tmp_path.glob("runs/*")
    assert status == 130 and re.fullmatch(rf"Saved.* --resume runs/{run_dir.name}\n", err)
    assert load(run_dir)["step"] >= 40


# Numbers that are not finite
class PaysNaN(Made):
    """Its reward is not a number from its 31st step on. It takes any actions."""

    paid = 0

    def step(self, action):
        return super().step(np.zeros(2, np.float32))

    def reward(self):
        self.paid += 1
        return np.nan if self.paid > 30 else 1.0


NAN = ["--total-timesteps", 200, "--eval-frequency", 40, "--buffer-size", 40]


@pytest.mark.parametrize("ending", ["evaluation", "signal"])
def test_a_run_that_diverges_ends_with_a_sentence(train, register, at_step, ending):
    """It says what is not finite, and the last checkpoint is one with finite numbers."""
    if ending == "signal":
        at_step(78, lambda: send(signal.SIGTERM))
    assert re.fullmatch("q_values is not finite. .*", end(train, *register(PaysNaN), *NAN))
    assert load(the_run())["step"] == load(the_run(), "model.pt")["step"] == 40
    for name in ("checkpoint.pt", "model.pt"):
        assert all(value.isfinite().all() for value in load(the_run(), name)["agent"].values())
    assert evaluated_steps(the_run()) == [40]


def test_weights_that_are_not_finite_are_named(train, monkeypatch):
    """Also where the losses are still finite."""
    update = sdac.Agent.update

    def diverging(agent, *inputs):
        update(agent, *inputs)
        if agent.updates == 10:
            agent.average_policy.mlp.output_layer.bias.data[0] = torch.inf

    monkeypatch.setattr(sdac.Agent, "update", diverging)
    assert "average_policy.mlp.output_layer.bias is not finite" in end(train)
    assert load(the_run())["step"] == 20


def test_tensorboard_keeps_the_points_of_a_run_that_diverged(train, register, monkeypatch):
    """The writer is closed, or else the last points could be lost with the process."""
    closed, close = [], sdac.SummaryWriter.close
    monkeypatch.setattr(sdac.SummaryWriter, "close", lambda w: closed.append(close(w)))
    end(train, *register(PaysNaN), *NAN)
    assert closed
    assert [step for step, _ in scalars(the_run(), "eval/episodic_return")] == [40, 80]
    steps = [step for step, _ in scalars(the_run(), "charts/episodic_return")]
    assert steps == [step for step in range(10, 81, 10) for _ in range(2)]


def test_a_reward_that_is_not_finite_is_not_saved(train, register):
    """Even where no batch has had it yet, or else the run could never go on."""
    flags = ["--learning-starts", 79, "--total-timesteps", 80, "--eval-frequency", 40]
    assert "not finite" in end(train, *register(PaysNaN), *flags)
    assert load(the_run())["step"] == 40


# Files of others
class Trap:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("trap"),)


def test_files_that_are_no_run_of_this_script_are_refused(train, refused):
    """Missing, truncated, damaged, hostile and foreign ones, in one sentence with their name. The
    files of a run of the other script stay as they are."""
    run_dir = train()
    other = train(script=sac)
    before = files(other)
    for flag, name in (("--resume", "checkpoint.pt"), ("--evaluate", "model.pt")):
        path, whole, contents = run_dir / name, (run_dir / name).read_bytes(), load(run_dir, name)
        parts = [whole[:size] for size in (0, 1, 1000, len(whole) // 2, len(whole) - 1)]
        older = contents | {"args": contents["args"] | {"a_flag_of_another_version": 1}}
        traps = [Trap(), [Trap()], contents | {"args": Trap()}, contents | {"step": Trap()}]
        for wrong in (*parts, older, *traps, [1, 2], {}, contents["agent"], contents | {"args": 1}):
            path.write_bytes(wrong) if isinstance(wrong, bytes) else torch.save(wrong, path)
            sentence = f"{path} is missing, damaged or not of this script"
            assert refused(flag, run_dir) == sentence, wrong
        torch.save(traps[2], path, _use_new_zipfile_serialization=False)
        assert refused(flag, run_dir) == sentence
        path.unlink()
        assert refused(flag, run_dir) == sentence
        assert refused(flag, "") == f"{name} is missing, damaged or not of this script"
        assert "not of this script" in refused(flag, other)
    assert files(other) == before


# Evaluating
def test_with_resume_too_evaluate_counts(train, capsys):
    first, second = train(), train("--total-timesteps", 26)
    capsys.readouterr()
    train("--resume", first, "--evaluate", second)
    assert "evaluation at step 26" in capsys.readouterr().out


def test_evaluate_makes_no_room_for_transitions(train, monkeypatch):
    """A GPU that is full with a training can still film its policy."""
    run_dir, made = train(), []
    init = sdac.ReplayBuffer.__init__

    def watched(buffer, *inputs):
        made.append(buffer)
        init(buffer, *inputs)

    monkeypatch.setattr(sdac.ReplayBuffer, "__init__", watched)
    train("--evaluate", run_dir)
    train("--resume", run_dir)
    assert [len(buffer.rows) for buffer in made] == [1, 100]


def test_evaluate_repeats_the_last_evaluation(train, capsys):
    """It prints the numbers of the last evaluation and writes nothing; flags beside it win."""
    run_dir = train()
    last = capsys.readouterr().out.splitlines()[2]
    before = files(run_dir)
    train("--evaluate", run_dir)
    assert capsys.readouterr().out.splitlines()[1:] == [last]
    assert last == "evaluation at step 40: return {2:.1f} +/- {3:.1f}".format(*metrics(run_dir)[-1])
    train("--evaluate", run_dir, "--eval-episodes", 1)
    assert capsys.readouterr().out.endswith(" +/- 0.0\n")
    assert files(run_dir) == before and os.listdir("runs") == [run_dir.name]
