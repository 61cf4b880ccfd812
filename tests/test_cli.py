"""The scripts from the command line: help, flags, what a run prints and writes, W&B, videos."""

import ast
import contextlib
import difflib
import inspect
import io
import math
import os
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, Made, evaluated_steps, finish, load, metrics, scalars, start_process
from imageio_ffmpeg import count_frames_and_secs

import sac_continuous_action as sac
import sdac_continuous_action as sdac

RESULT = r"evaluation at step (\d+): return -?\d+\.\d \+/- \d+\.\d"


# The two scripts
def test_the_scripts_share_their_skeleton():
    """Functions and classes of the same name are the same text, but for the algorithm's. So the
    other tests of the command line, of resuming and of tasks need only one of the scripts."""
    texts = []
    for script in (sdac, sac):
        source = Path(script.__file__).read_text()
        top = [x for x in ast.parse(source).body if isinstance(x, ast.FunctionDef | ast.ClassDef)]
        texts.append({x.name: ast.get_source_segment(source, x) for x in top})
        for x in top:
            texts[-1][x.name] += " ".join(map(ast.unparse, x.decorator_list))
    common = texts[0].keys() & texts[1].keys()
    different = {name for name in common if texts[0][name] != texts[1][name]}
    assert different == {"Args", "Agent", "parse_args", "sample_actions"}
    assert {"evaluate", "save_checkpoint", "train", "main", "make_env"} <= common
    assert vars(sac.Args("run")).items() <= vars(sdac.Args("run")).items()


DIFFERENCES = {
    "parse_args": """
        -args = tyro.cli(Args, args=argv)
        +published = "--published" in (sys.argv if argv is None else argv)
        +defaults = Args(published=True, **PUBLISHED) if published else Args()
        +args = tyro.cli(Args, args=argv, default=defaults)
        -for name in ("env_id", "buffer_size"):
        +for name in ("env_id", "buffer_size", "published", "denoising_steps"):""",
    "check": """
        -limits = {"seed": (0, 2**31), "gamma": (0, 1), "tau": (0, 1)}
        +limits = {"seed": (0, 2**31), "gamma": (0, 1), "tau": (0, 1), "denoising_steps": (2, 1000)}
    """,
}


def test_the_scripts_read_and_check_flags_in_the_same_way():
    """But for flags that only SDAC has: the whole difference, SAC (-) and SDAC (+)."""
    for name, expected in DIFFERENCES.items():
        texts = []
        for script in (sac, sdac):
            function = script.parse_args if name == "parse_args" else script.Args.check
            texts.append([line.strip() for line in inspect.getsource(function).splitlines()])
        _, _, *lines = difflib.unified_diff(*texts, n=0)
        found = [line for line in lines if not line.startswith("@@")]
        assert found == [line.strip() for line in expected.strip().splitlines()]


def test_sac_trains_resumes_and_evaluates(train, capsys):
    run_dir = train(script=sac)
    train("--resume", run_dir, "--total-timesteps", 60, script=sac)
    assert evaluated_steps(run_dir) == [20, 40, 60] and load(run_dir)["updates"] == 20
    last = capsys.readouterr().out.splitlines()[-2]
    train("--evaluate", run_dir, script=sac)
    assert re.fullmatch(RESULT, last) and capsys.readouterr().out.splitlines()[-1] == last


# Help
def help_text(script, *flags):
    """What a script prints for --help on a console that knows ASCII only."""
    console = io.TextIOWrapper(io.BytesIO(), "ascii")
    with contextlib.redirect_stdout(console), pytest.raises(SystemExit):
        script.main(["--help", *flags])
    console.seek(0)
    return console.read()


@pytest.mark.parametrize("script", [sdac, sac])
def test_help_needs_no_character_but_ascii_and_explains_every_flag(script):
    """Only --eval-episodes says everything by its name."""
    found = re.split(r"\n\W*--", help_text(script))
    for field in fields(script.Args):
        (entry,) = (x for x in found if re.match(rf"(no-)?{field.name.replace('_', '-')}\b", x))
        words = re.sub(r"\(default:.*|[A-Z|{}-]{3,}.*?\s", "", entry, flags=re.DOTALL).split()
        assert len(words) > 1 or field.name == "eval_episodes", entry


def test_help_shows_the_published_defaults():
    found = {}
    for published in ([], ["--published"]):
        text = re.sub(r"\W+", " ", help_text(sdac, *published))
        for name in ("denoising steps", "num particles", "num reverse samples", "learning starts"):
            found.setdefault(name, []).append(int(re.search(rf"{name} .*?default (\d+)", text)[1]))
    assert list(found.values()) == [[6, 20], [4, 32], [16, 64], [10_000, 30_000]]


def test_flags_beside_published_win():
    args, _ = sdac.parse_args(["--num-particles", "7", "--published", "--tau", "0.5"])
    assert (args.published, args.num_particles, args.tau) == (True, 7, 0.5)
    assert (args.denoising_steps, args.num_reverse_samples, args.policy_lr) == (20, 64, 3e-4)
    assert sdac.parse_args([])[0] == sdac.Args()


# Numbers
COUNTS = "total_timesteps num_envs buffer_size learning_starts eval_frequency eval_episodes"
COUNTS = f"{COUNTS} batch_size policy_frequency num_reverse_samples".split()
COUNTS += ["num_particles", "num_eval_particles"]
BAD = {name: [0, -1] for name in COUNTS}
BAD |= {"seed": [-1, 2**32], "gamma": [-0.1, 1.1], "tau": [-0.1, 1.5], "denoising_steps": [1, -1]}
REALS = "policy_lr q_lr reward_scale temperature gamma tau"
REALS = f"{REALS} exploration_start exploration_end exploration_decay".split()
BAD |= {name: [*BAD.get(name, [0, -1]), math.inf, math.nan] for name in REALS}


def test_every_number_outside_its_range_is_refused(refused):
    """In one sentence with the flag, the number and the range."""
    numbers = [field.name for field in fields(sdac.Args) if field.type in (int, float)]
    assert set(numbers) == set(BAD)
    for name, values in BAD.items():
        flag = f"--{name.replace('_', '-')}"
        for value in values:
            sentence = refused(f"{flag}={value}")
            assert re.match(rf"{flag} is {value}(\.0)?; it must be from \S+ to \S+$", sentence)


def test_a_budget_that_cannot_work_is_refused(refused, train):
    """With the numbers: a run that ends in its warm-up, a buffer that does not fit into memory."""
    sentence = refused("--learning-starts", 100, "--total-timesteps", 100)
    assert sentence.startswith("--total-timesteps is 100; it must be from 101 ")
    run_dir = train()
    assert "--total-timesteps is 20" in refused("--resume", run_dir, "--total-timesteps", 20)
    refused("--buffer-size", 10**12)
    train("--buffer-size", 3, "--num-envs", 4)  # This works: batches repeat transitions.


# A run
@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_prints_its_results_and_what_to_do_next(train, capsys, monkeypatch, terminal):
    """A line for the device, each evaluation, and commands. Progress is for terminals only. What it
    writes is in one folder. The GPU has a driver too old for PyTorch: it is counted, but no use."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    run_dir = train("--cuda")
    output = capsys.readouterr()
    device, first, last, film = output.out.splitlines()
    assert device == "device: cpu" and re.fullmatch(RESULT, first)
    assert re.fullmatch(RESULT, last)[1] == "40"
    assert film == f"Film it: python script.py --evaluate {run_dir} --capture-video"
    assert ("40/40" in output.err) == terminal and (terminal or output.err == "")
    assert os.listdir() == ["runs"] and os.listdir("runs") == [run_dir.name]
    assert re.fullmatch(r"InvertedPendulum-v4__sdac_continuous_action__1__\d+", run_dir.name)
    files = sorted(path.name.split(".")[0] for path in run_dir.iterdir())
    assert files == ["checkpoint", "events", "metrics", "model"]


@pytest.mark.parametrize("script", [sdac, sac])
def test_curves_are_logged_every_hundred_updates(train, register, script):
    """And the evaluations, as in metrics.csv, and the returns, also in a run as short as this."""
    run_dir = train(*register(Made), "--total-timesteps", 230, script=script)
    more = ["entropy", "alpha"] if script == sac else ["temperature", "effective_sample_size"]
    losses = [f"losses/{name}" for name in ("q_values", "q_loss", "policy_loss", *more)]
    for name in (*losses, "charts/SPS"):
        ((step, value),) = scalars(run_dir, name)
        assert step == 220 and math.isfinite(value) and value != 0, name
    expected = [(row[0], pytest.approx(row[2])) for row in metrics(run_dir)]
    assert scalars(run_dir, "eval/episodic_return") == expected and len(expected) == 12
    assert len(scalars(run_dir, "charts/episodic_return")) == 46


def test_runs_started_in_the_same_second_do_not_share_a_folder(train, monkeypatch):
    ticks = iter(range(2_000_000_000_000_000_000, 2_000_000_000_999_999_999, 7_000_000))
    clock = SimpleNamespace(time=lambda: 2e9, time_ns=lambda: next(ticks))
    monkeypatch.setattr(sdac, "time", clock)
    first, second = train(), train()
    assert first != second and evaluated_steps(first) == evaluated_steps(second) == [20, 40]


def test_odd_names_give_plain_folders(train):
    """No character of --exp-name leaves the folder runs/ or offends W&B or a shell."""
    run_dir = train("--exp-name", "../a, b#c/ü:?%")
    assert run_dir.parent == Path("runs") and os.listdir() == ["runs"]
    assert re.fullmatch(r"InvertedPendulum-v4__..-a--b-c-\w-*__1__\d+", run_dir.name)
    train("--resume", run_dir, "--total-timesteps", 60)
    assert evaluated_steps(run_dir) == [20, 40, 60]


def test_the_program_in_the_readme_acts_as_the_evaluation(train):
    run_dir = train("--eval-episodes", 1)
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    load_policy, step = program.replace("runs/<run>", str(run_dir)).split("obs, _ = env.reset()\n")
    names = {}
    exec(load_policy, names)
    seed = names["args"].seed + 10**9
    torch.manual_seed(seed)
    names["obs"], _ = names["env"].reset(seed=seed)
    total, over = 0, False
    while not over:
        exec(step, names)
        total, over = total + names["reward"], names["terminated"] or names["truncated"]
    assert total == metrics(run_dir)[-1][2]


# Weights & Biases
def test_track(tmp_path):
    """--track writes configuration and curves for W&B, offline as well, of runs with odd names."""
    flags = ["--track", "--exp-name", "a,#b"]
    process = start_process(*flags, cwd=tmp_path, env={"WANDB_MODE": "offline"})
    (tmp_path / "home").mkdir()
    nobody = {"HOME": str(tmp_path / "home"), "NETRC": str(tmp_path / "home" / "netrc")}
    (tmp_path / "nobody").mkdir()
    without_login = start_process(*flags, cwd=tmp_path / "nobody", env=nobody)
    status, _, err = finish(process)
    assert status == 0 and "Traceback" not in err, err
    (record,) = (path.read_bytes() for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    (run_dir,) = tmp_path.glob("runs/*")
    for text in ("learning_starts", "eval/episodic_return", "charts/episodic_return", run_dir.name):
        assert text.encode() in record, text
    status, _, err = finish(without_login)
    assert status == 1 and re.fullmatch(r"--track: [^\n]*log ?in[^\n]*", err.splitlines()[-1]), err
    assert "Traceback" not in err and not (tmp_path / "nobody" / "runs").exists()


# Videos
class Drawn(Made):
    """A task that can be drawn: each frame has the step in its first pixel."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode

    def render(self):
        return np.full((32, 32, 3), 40 * self.steps, np.uint8)


def test_videos_show_the_first_episode_of_each_evaluation(train, register):
    """From its first to its last frame, in the run folder; --evaluate films, too."""
    run_dir = train(*register(Drawn), "--capture-video")
    videos = sorted(run_dir.glob("videos/step-*/*.mp4"))
    assert [path.parent.name for path in videos] == ["step-20", "step-40"]
    assert [count_frames_and_secs(path)[0] for path in videos] == [6, 6]
    videos[1].unlink()
    train("--evaluate", run_dir, "--capture-video")
    assert count_frames_and_secs(videos[1])[0] == 6 and len(list(Path().rglob("*.mp4"))) == 2


@pytest.mark.parametrize("error", [RuntimeError, ImportError, NotImplementedError, AttributeError])
def test_a_task_that_cannot_be_drawn_is_refused(refused, register, monkeypatch, error):
    """Before anything is written. PyOpenGL without a library ends with an AttributeError."""
    monkeypatch.setattr(Drawn, "render", Mock(side_effect=error("no display")))
    assert "no display" in refused(*register(Drawn), "--capture-video")


def test_a_task_without_a_render_mode_is_not_filmed(refused, register):
    """Before anything is written, in one sentence."""
    assert "render_mode" in refused(*register(Made), "--capture-video")
