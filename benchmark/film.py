"""Film trained policies side by side, as a small looping picture (GIF or WebP).

    python benchmark/film.py runs/<early> runs/<late> --labels before after --out film.webp

Every policy plays the first --seconds of an episode from the same start, without exploration noise;
an episode that ends early stays on its last frame. Without a display set MUJOCO_GL=egl (with a GPU)
or MUJOCO_GL=osmesa.
"""

import warnings
from contextlib import suppress
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import torch
from common import command_line, load
from PIL import Image, ImageDraw


def film(agent, seed, seconds, frames_per_second, size):
    """Frames (height, width, 3) of an episode's first seconds, evenly spaced in the task's time."""
    env = gym.make(agent.args.env_id, render_mode="rgb_array", width=size[0], height=size[1])
    env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    with suppress(AttributeError, KeyError):  # Only some tasks have a camera that follows.
        env.unwrapped.mujoco_renderer.camera_id = env.unwrapped.model.camera("track").id
    torch.manual_seed(seed)
    obs, _ = env.reset(seed=seed)
    over = False
    frames = []
    steps_per_frame = max(round(env.metadata["render_fps"] / frames_per_second), 1)
    for step in range(int(seconds * env.metadata["render_fps"])):
        if step % steps_per_frame == 0:
            frames.append(frames[-1] if over else env.render())
        if not over:
            obs = torch.as_tensor(obs, dtype=torch.float32).flatten()
            action = agent.act(obs[None], explore=False)[0]
            obs, _, terminated, truncated, _ = env.step(action.numpy())
            over = terminated or truncated
    env.close()
    return frames


def label(frame, text):
    """The frame with a line of text in its upper left corner, where the sky is."""
    image = Image.fromarray(frame)
    ImageDraw.Draw(image).text((8, 6), text, fill="black", font_size=16)
    return np.asarray(image)


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder of either script")
    parser.add_argument("--labels", nargs="+", help="one per run (default: its steps)")
    parser.add_argument("--out", type=Path, default=Path("film.webp"))
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--frames-per-second", type=int, default=12)
    parser.add_argument("--size", type=int, nargs=2, default=(400, 225))
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    labels = options.labels or [None] * len(options.runs)
    mujoco.set_mju_user_warning(warnings.warn)
    warnings.filterwarnings("ignore", message=".*out of date|compiler attribute")  # of v4 tasks

    films = []
    for run, text in zip(options.runs, labels, strict=True):
        agent, state = load(run)
        args = (options.seed, options.seconds, options.frames_per_second, options.size)
        text = text or f"{state['step']:,} steps"
        films.append([label(frame, text) for frame in film(agent, *args)])
    pictures = [Image.fromarray(np.hstack(frames)) for frames in zip(*films, strict=False)]
    duration = 1000 / options.frames_per_second
    pictures[0].save(
        options.out,
        save_all=True,
        append_images=pictures[1:],
        duration=duration,
        loop=0,
        quality=60,
    )
    print(f"{options.out}: {len(pictures)} frames, {options.out.stat().st_size / 1e6:.2f} MB")
