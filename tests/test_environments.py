"""Tasks and the training loop around them: what is stored, how tasks may look, seeds."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import BOX, Made, Scripted, load, metrics, needs_cuda, scalars

import sdac_continuous_action as sdac


@pytest.fixture
def scripted(register):
    """Registers Scripted with a plan; returns the flags that choose it, and what it records."""

    def scripted(plan, task=Scripted):
        record = {"received": {}, "seeds": [], "born": []}
        return register(task, plan=plan, **record), record

    return scripted


# What is stored
PLAN = [
    [(2, "truncated"), (3, "terminated")],
    [(1, "terminated"), (1, "truncated"), (2, "both")],
    [(2, "both"), (9, "truncated")],
]


class ReusesItsArray(Scripted):
    """Gives the same array again and again, with other numbers in it."""

    def observation(self):
        self.array = getattr(self, "array", np.zeros(3, np.float32))
        self.array[:] = super().observation()
        return self.array


@pytest.mark.parametrize("task", [Scripted, ReusesItsArray])
def test_stored_transitions_are_those_of_the_script(train, scripted, task):
    """next_obs is the last observation of an episode, and only endings by the task count as ends:
    from a truncated episode the critics bootstrap. The next action is for the next episode."""
    flags, _ = scripted(PLAN, task)
    small = ["--num-envs", 3, "--learning-starts", 9, "--total-timesteps", 12]
    run_dir = train(*flags, *small)
    rows = load(run_dir)["rows"]
    assert [(x[:3], x[5], x[6:9], x[9]) for x in rows.tolist()] == [
        ([0, 0, 0], 1, [0, 0, 1], 0),
        ([1, 0, 0], 11, [1, 0, 1], 1),  # terminated after one step
        ([2, 0, 0], 21, [2, 0, 1], 0),
        ([0, 0, 1], 2, [0, 0, 2], 0),  # truncated
        ([1, 1, 0], 111, [1, 1, 1], 0),  # truncated after one step
        ([2, 0, 1], 22, [2, 0, 2], 1),  # both
        ([0, 1, 0], 101, [0, 1, 1], 0),
        ([1, 2, 0], 211, [1, 2, 1], 0),
        ([2, 1, 0], 121, [2, 1, 1], 0),
        ([0, 1, 1], 102, [0, 1, 2], 0),  # learning has started
        ([1, 2, 1], 212, [1, 2, 2], 1),  # both
        ([2, 1, 1], 122, [2, 1, 2], 0),
    ]
    returns = sorted(scalars(run_dir, "charts/episodic_return"))
    assert returns == [(3, 11), (6, 3), (6, 43), (6, 111), (12, 423)]


def test_stored_actions_are_those_taken_in_units_of_the_bounds(train, scripted):
    flags, record = scripted([[(3, "truncated")], [(2, "terminated")]])
    run_dir = train(*flags)
    rows = load(run_dir)["rows"]
    assert len(rows) == 40 and rows[:, 3:5].abs().max() <= 1
    assert (rows[:20, 3:5].amax(0) > 0.5).all() and (rows[:20, 3:5].amin(0) < -0.5).all()
    for row in rows:
        first, second = ((row[3:5] + 1) / 2).tolist()
        expected = [-3 + first * 4, 1 + second * 1]  # bounds [-3, 1] and [1, 2]
        np.testing.assert_allclose(record["received"][tuple(row[:3].tolist())], expected, atol=1e-6)


def test_an_evaluation_counts_the_first_episode_of_each_environment(train, scripted):
    """Environments 2 and 3 are the first evaluation, 4 and 5 the second. Returns and updates, which
    start in time, by hand."""
    two, last = [[(9, "truncated")]] * 2, [(4, "both"), (9, "truncated")]
    flags, _ = scripted([*two, [(2, "both")], [(1, "terminated")], [(3, "truncated")], last])
    run_dir = train(*flags)
    assert metrics(run_dir) == [[20, 0, 37, 6], [40, 10, 168, 42]]
    assert scalars(run_dir, "eval/episodic_return") == [(20, 37), (40, 168)]


# Seeds
def test_a_seed_fixes_the_metrics(train):
    """The same seed gives the same metrics.csv to the byte, another seed another."""
    first, same, other = (
        (train("--seed", seed, "--exp-name", name) / "metrics.csv").read_bytes()
        for name, seed in [("first", 3), ("same", 3), ("other", 4)]
    )
    assert first == same != other


class DrawsFromNumPy(Made):
    def observe(self):
        return np.random.uniform(-1, 1, 2).astype(np.float32)


def test_a_task_that_draws_from_numpy_repeats(train, register):
    """Its numbers come from np.random, NumPy's global stream."""
    flags = register(DrawsFromNumPy)
    first, same = (load(train(*flags, "--exp-name", name))["rows"] for name in ("a", "b"))
    assert torch.equal(first, same)
    assert not torch.equal(first, load(train(*flags, "--seed", 2))["rows"])


@pytest.mark.parametrize("device", ["--no-cuda", pytest.param("--cuda", marks=needs_cuda)])
def test_evaluations_leave_the_training_unchanged(train, device):
    """The same transitions and weights, however often the training is interrupted by them."""
    often, once = (
        train("--eval-frequency", n, "--exp-name", f"every-{n}", device) for n in (4, 40)
    )
    assert len(metrics(often)) == 10 and metrics(often)[-1] == metrics(once)[0]
    often, once = load(often), load(once)
    assert torch.equal(often["rows"], once["rows"])
    for name, value in often["agent"].items():
        assert torch.equal(value, once["agent"][name]), name


def test_training_and_evaluation_have_different_seeds(train, scripted):
    """All evaluations begin in the same states, no training does, and a resumed one in new ones."""
    flags, record = scripted([[(10**6, "truncated")]] * 2)
    run_dir = train(*flags)
    train("--resume", run_dir, "--total-timesteps", 60)
    seeds = [seed for _, seed in record["seeds"]]
    training, first, second, resumed, third = (set(seeds[i : i + 2]) for i in range(0, 10, 2))
    assert first == second == third and len(training | first | resumed) == 6


# How tasks may look
VECTOR = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
GOAL = gym.spaces.Dict({"observation": VECTOR, "achieved": BOX, "desired": BOX})
IMAGE = gym.spaces.Box(0, 255, (4, 4, 3), np.uint8)
SQUARE = gym.spaces.Box(
    np.array([[-2.0, 0], [1, -9]]), np.array([[2.0, 3], [4, 0]]), dtype=np.float64
)


class Remembers(Made):
    """Keeps every observation that it gave, flat."""

    def __init__(self, given, **spaces):
        super().__init__(**spaces)
        self.given = given

    def observe(self):
        observation = self.observation_space.sample()
        self.given.add(
            gym.spaces.flatten(self.observation_space, observation).astype("f").tobytes()
        )
        return observation


SPACES = {
    "goal": (GOAL, BOX),
    "tuple": (gym.spaces.Tuple([BOX, gym.spaces.Discrete(3)]), BOX),
    "two dimensions": (gym.spaces.Box(-1, 1, (2, 3)), SQUARE),
    "image": (IMAGE, BOX),
    "float64": (VECTOR, gym.spaces.Box(-1, 1, (2,), np.float64)),
    "discrete": (gym.spaces.Discrete(4), SQUARE),
}


@pytest.mark.parametrize("name", SPACES)
def test_any_observations_and_boxes_of_actions_work(train, register, name):
    """Made checks its actions. What is stored are its observations, flat."""
    given, (observations, actions) = set(), SPACES[name]
    spaces = {"observation_space": observations, "action_space": actions}
    run_dir = train(*register(Remembers, given=given, **spaces))
    rows, width = load(run_dir)["rows"].numpy(), gym.spaces.flatdim(observations)
    assert rows.shape == (40, 2 * width + int(np.prod(actions.shape)) + 2)
    stored = [*rows[:, :width], *rows[:, -1 - width : -1]]
    assert all(observation.tobytes() in given for observation in stored)


def test_a_task_may_have_an_info_called_episode(train, register):
    run_dir = train(*register(Made))
    assert scalars(run_dir, "charts/episodic_return") == [
        (10 * i, 5) for i in (1, 1, 2, 2, 3, 3, 4, 4)
    ]


BOUNDS = {
    "symmetric": ([-0.4] * 3, [0.4] * 3, np.float32),
    "odd": ([-5, 0.1, 0.25], [1, 0.7, 100], np.float32),
    "far": ([1e6, -1e-6, 0], [1e6 + 1, 1e-6, 1e6], np.float32),
    "float64": ([-0.1, 0.1, -7.7], [0.3, 0.7, 1e9], np.float64),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_actions_are_rescaled_and_never_leave_the_bounds(register, name):
    """a in [-1, 1] reaches the task as low + (a + 1)/2 (high - low); Made checks the bounds, which
    the rounding of this must not cross."""
    low, high, dtype = BOUNDS[name]
    low, high = np.array(low, dtype), np.array(high, dtype)
    _, env_id = register(Made, action_space=gym.spaces.Box(low, high, dtype=dtype))
    env = sdac.make_env(env_id)
    env.reset()
    task, received = env.unwrapped, []
    task.step = lambda action: received.append(action) or Made.step(task, action)
    actions = np.random.default_rng(1).uniform(-1, 1, (200, 3)).astype(np.float32)
    actions[:3] = [[-1] * 3, [0] * 3, [1] * 3]
    for action in actions:
        env.step(action)
    expected = low + (np.float64(actions) + 1) / 2 * (np.float64(high) - low)
    error = 4 * np.spacing(np.maximum(abs(low), abs(high)))
    assert (abs(np.float64(received) - expected) <= error).all()


def test_a_task_of_a_module_works(train, monkeypatch):
    """--env-id module:Name-v0 imports the module, and the run folder's name has no colon."""
    code = "import gymnasium\nimport conftest\n"
    code += "gymnasium.register('MadeElsewhere-v0', conftest.Made)"
    Path("made_elsewhere.py").write_text(code)
    monkeypatch.syspath_prepend(Path.cwd())
    run_dir = train("--env-id", "made_elsewhere:MadeElsewhere-v0")
    assert (
        run_dir.name.startswith("made_elsewhere-MadeElsewhere-v0__") and len(metrics(run_dir)) == 2
    )
    gym.registry.pop("MadeElsewhere-v0")


INFINITE = np.float32([np.inf, 1])
REFUSED = {
    "Discrete": {"action_space": gym.spaces.Discrete(4)},
    "MultiDiscrete": {"action_space": gym.spaces.MultiDiscrete([2, 3])},
    "Dict": {"action_space": gym.spaces.Dict({"x": BOX})},
    "int32": {"action_space": gym.spaces.Box(0, 10, (2,), np.int32)},
    "-inf, inf": {"action_space": gym.spaces.Box(-np.inf, np.inf, (2,))},
    "bounds": {"action_space": gym.spaces.Box(-1, INFINITE)},
    "Sequence": {"observation_space": gym.spaces.Sequence(BOX)},
}


@pytest.mark.parametrize("word", REFUSED)
def test_other_spaces_are_refused(refused, register, word):
    sentence = refused(*register(Made, **REFUSED[word]))
    assert sentence.startswith("Made-v0 cannot be used: ") and word in sentence
