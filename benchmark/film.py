"""Film trained policies side by side, as one small looping picture (GIF or WebP).

    python benchmark/film.py runs/<early> runs/<late> --labels "10,000 steps" "1,000,000 steps" --out film.webp

A run is a run folder, model.pt or checkpoint.pt of either script. Each policy plays the first --seconds of an episode
from the same start, without exploration noise; a film that ends early stays on its last frame. Without a display set
MUJOCO_GL=egl or MUJOCO_GL=osmesa, as for --capture-video."""

import argparse
import importlib
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent


def load(path):
    """The arguments and the trained agent of a run."""
    contents = Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
    sdac = "denoising_steps" in torch.load(contents, map_location="cpu", weights_only=True)["args"]
    sys.path.insert(0, str(ROOT))
    script = importlib.import_module("sdac_continuous_action" if sdac else "sac_continuous_action")
    args, state = script.parse(["--evaluate", str(path), "--no-compile", "--no-cuda"])
    agent = script.Agent(args, *script.validate(args), torch.device("cpu"))
    agent.load_state_dict(state["agent"])
    return args, agent


def film(args, agent, seed, seconds, frames_per_second, size):
    """Frames (height, width, 3) of an episode's first seconds, evenly spaced in the task's own time."""
    env = gym.make(args.env_id, render_mode="rgb_array", width=size[0], height=size[1])
    env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    with suppress(AttributeError, KeyError):  # a task of MuJoCo's with a camera that follows
        env.unwrapped.mujoco_renderer.camera_id = env.unwrapped.model.camera("track").id
    steps_per_frame = max(round(env.metadata["render_fps"] / frames_per_second), 1)
    obs, over, frames, generator = env.reset(seed=seed)[0], False, [], torch.Generator().manual_seed(seed)
    for step in range(int(seconds * env.metadata["render_fps"])):
        if step % steps_per_frame == 0:
            frames.append(frames[-1] if over else env.render())
        if not over:
            action = agent.act(torch.as_tensor(obs, dtype=torch.float32)[None], generator, explore=False)[0]
            obs, _, terminated, truncated, _ = env.step(action.numpy())
            over = terminated or truncated
    env.close()
    return frames


def label(frame, text):
    """The frame with a line of text in its upper left corner."""
    image = Image.fromarray(frame)
    ImageDraw.Draw(image).text((6, 4), text, fill="white", stroke_width=1, stroke_fill="black")
    return np.asarray(image)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--labels", nargs="+", help="a line for each run (default: its number of steps)")
    parser.add_argument("--out", type=Path, default=Path("film.webp"))
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--frames-per-second", type=int, default=12)
    parser.add_argument("--size", type=int, nargs=2, default=(240, 180), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.labels and len(options.labels) != len(options.runs):
        parser.error(f"--labels has {len(options.labels)} lines for {len(options.runs)} runs; give one for each")
    warnings.filterwarnings("ignore", message=".*out of date")
    films = []
    for run, text in zip(options.runs, options.labels or [None] * len(options.runs), strict=True):
        try:
            args, agent = load(run)
        except Exception as error:  # damaged files raise many kinds of errors
            parser.error(f"{run} is no run of this version ({type(error).__name__}: {error})")
        frames = film(args, agent, options.seed, options.seconds, options.frames_per_second, options.size)
        films.append([label(frame, text or f"{args.total_timesteps:,} steps") for frame in frames])
    pictures = [Image.fromarray(np.hstack(frames)) for frames in zip(*films, strict=False)]
    duration = 1000 / options.frames_per_second
    pictures[0].save(options.out, save_all=True, append_images=pictures[1:], duration=duration, loop=0, quality=60)
    print(f"{options.out}: {len(pictures)} frames, {options.out.stat().st_size / 1e6:.2f} MB")
