"""Environments and the training loop around them: episode ends, action bounds, seeds and evaluation."""

import csv
from pathlib import Path
from statistics import pstdev

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.fixture
def run(module, small_args, monkeypatch, tmp_path):
    """Runs main() in an empty folder; returns what the replay buffer and the acting policy were given."""

    def run(folder="run", **chosen):
        added, acted = [], []

        class Recorder(module.ReplayBuffer):
            def add(self, *columns):
                added.append([column.clone() for column in columns])
                super().add(*columns)

        class Actor(module.Agent):
            def act(self, obs, generator, explore=True, **policy):
                if explore and not policy:  # the update asks for actions of the online policy
                    acted.append(obs.clone())
                return super().act(obs, generator, explore, **policy)

        (tmp_path / folder).mkdir()
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path / folder)
            patch.setattr(module, "ReplayBuffer", Recorder)
            patch.setattr(module, "Agent", Actor)
            module.main(small_args(**{"checkpoint_frequency": 10**9, **chosen}))  # episodes begin anew with each
        return added, acted

    return run


def rows(added):
    """The transitions (obs, reward, next_obs, terminated) as lists of numbers, without the actions."""
    transitions = []
    for obs, _, rewards, next_obs, terminations in added:
        for row in zip(obs.tolist(), rewards.tolist(), next_obs.tolist(), terminations.tolist(), strict=True):
            transitions.append(row)
    return transitions


def scalars(folder, tag):
    """What TensorBoard shows under a tag: a list of (step, value)."""
    (run_dir,) = Path(folder).glob("runs/*")
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_transitions_of_one_environment(scripted, run, tmp_path):
    """The buffer holds the true last observation of every episode, and only endings by the task count as terminated."""
    scripted.plan = [
        [(3, "truncated"), (2, "terminated"), (2, "both"), (1, "truncated"), (1, "both"), (9, "terminated")]
    ]
    added, acted = run(env_id="Scripted-v0", num_envs=1, learning_starts=7, batch_size=4, total_timesteps=12)
    assert rows(added) == [
        ([0, 0, 0], 1, [0, 0, 1], 0),
        ([0, 0, 1], 2, [0, 0, 2], 0),
        ([0, 0, 2], 3, [0, 0, 3], 0),  # truncated
        ([0, 1, 0], 101, [0, 1, 1], 0),
        ([0, 1, 1], 102, [0, 1, 2], 1),  # terminated
        ([0, 2, 0], 201, [0, 2, 1], 0),
        ([0, 2, 1], 202, [0, 2, 2], 1),  # both
        ([0, 3, 0], 301, [0, 3, 1], 0),  # truncated after one step; learning has started
        ([0, 4, 0], 401, [0, 4, 1], 1),  # both after one step
        ([0, 5, 0], 501, [0, 5, 1], 0),
        ([0, 5, 1], 502, [0, 5, 2], 0),
        ([0, 5, 2], 503, [0, 5, 3], 0),
    ]
    assert [obs.tolist() for obs in acted] == [[[0, 3, 0]], [[0, 4, 0]], [[0, 5, 0]], [[0, 5, 1]], [[0, 5, 2]]]
    assert scalars(tmp_path / "run", "charts/episodic_return") == [(3, 6), (5, 203), (7, 403), (8, 301), (9, 401)]
    assert scalars(tmp_path / "run", "charts/episodic_length") == [(3, 3), (5, 2), (7, 2), (8, 1), (9, 1)]


def test_transitions_of_several_environments(scripted, run, tmp_path):
    """Sub-environments that end in the same step, or while others run on, keep their transitions apart."""
    scripted.plan = [
        [(2, "truncated"), (3, "terminated")],
        [(1, "terminated"), (1, "truncated"), (2, "both")],
        [(2, "both"), (9, "truncated")],
    ]
    added, acted = run(env_id="Scripted-v0", num_envs=3, learning_starts=9, batch_size=4, total_timesteps=12)
    assert rows(added) == [
        ([0, 0, 0], 1, [0, 0, 1], 0),
        ([1, 0, 0], 11, [1, 0, 1], 1),  # terminated after one step
        ([2, 0, 0], 21, [2, 0, 1], 0),
        ([0, 0, 1], 2, [0, 0, 2], 0),  # truncated
        ([1, 1, 0], 111, [1, 1, 1], 0),  # truncated after one step
        ([2, 0, 1], 22, [2, 0, 2], 1),  # both
        ([0, 1, 0], 101, [0, 1, 1], 0),
        ([1, 2, 0], 211, [1, 2, 1], 0),
        ([2, 1, 0], 121, [2, 1, 1], 0),
        ([0, 1, 1], 102, [0, 1, 2], 0),
        ([1, 2, 1], 212, [1, 2, 2], 1),  # both
        ([2, 1, 1], 122, [2, 1, 2], 0),
    ]
    assert [obs.tolist() for obs in acted] == [[[0, 1, 1], [1, 2, 1], [2, 1, 1]]]
    assert sorted(scalars(tmp_path / "run", "charts/episodic_return")) == [
        (3, 11),
        (6, 3),
        (6, 43),
        (6, 111),
        (12, 423),
    ]
    assert sorted(scalars(tmp_path / "run", "charts/episodic_length")) == [(3, 1), (6, 1), (6, 2), (6, 2), (12, 2)]


def test_buffer_holds_the_actions_that_were_taken(scripted, run):
    """Each stored action lies in [-1, 1] and is the one that the environment received, in its own bounds."""
    scripted.plan = [[(3, "truncated")], [(2, "terminated")]]
    added, _ = run(env_id="Scripted-v0", learning_starts=16, total_timesteps=40)
    received = {(who, episode, step): action for who, episode, step, action in scripted.received}
    stored = [row for obs, actions, *_ in added for row in zip(obs.tolist(), actions.numpy(), strict=True)]
    assert len(stored) == 40
    for obs, action in stored:
        assert np.abs(action).max() <= 1
        expected = [-3 + (action[0] + 1) / 2 * 4, 1 + (action[1] + 1) / 2 * 1]  # bounds [-3, 1] and [1, 2]
        np.testing.assert_allclose(received[tuple(obs)], expected, atol=1e-6)


BOUNDS = {
    "Humanoid-v4": ([-0.4] * 17, [0.4] * 17),
    "InvertedPendulum-v4": ([-3], [3]),
    "Spaces-v0": ([-5, 0, 0.25], [1, 1, 100]),
}


@pytest.mark.parametrize("env_id", BOUNDS)
def test_actions_are_rescaled(module, register_spaces, monkeypatch, env_id):
    """An action a in [-1, 1] reaches the task as low + (a + 1)/2 (high - low), never outside its bounds."""
    low, high = (np.float32(bound) for bound in BOUNDS[env_id])
    register_spaces(gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(low, high))
    envs = module.make_envs(env_id, 2)
    assert (envs.single_action_space.low == -1).all() and (envs.single_action_space.high == 1).all()
    inner, received = envs.envs[1].unwrapped, []
    step = inner.step
    monkeypatch.setattr(inner, "step", lambda action: received.append(np.array(action)) or step(action))
    envs.reset(seed=1)
    uniform = np.random.default_rng(1).uniform(-1, 1, (50, len(low)))
    actions = [np.full(len(low), a) for a in (-1, 0, 1)] + list(uniform)
    for action in np.float32(actions):
        envs.step(np.stack([-action, action]))
    envs.close()
    assert len(received) == 53
    rounding = np.spacing(np.maximum(abs(low), abs(high)))  # of one operation in float32
    for action, got in zip(np.float64(np.float32(actions)), np.float64(received), strict=True):
        expected = low + (action + 1) / 2 * (np.float64(high) - low)
        assert (abs(got - expected) <= 2 * rounding).all()
        assert (low - rounding <= got).all() and (got <= high + rounding).all()


def test_seeds(run):
    """A seed fixes the resets and the actions, another seed changes them, and sub-environments start differently."""
    settings = {"env_id": "InvertedPendulum-v4", "num_envs": 3, "total_timesteps": 60, "learning_starts": 48}
    first, again, other = (run(name, seed=seed, **settings)[0] for name, seed in [("a", 3), ("b", 3), ("c", 33)])
    assert len(first) == 20
    for columns, same in zip(first, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(columns, same, strict=True))
    for i in range(3):  # every sub-environment has its own start, and so has every seed
        starts = [obs[i] for obs in (first[0][0], first[0][0].roll(1, 0), other[0][0])]
        assert not torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    actions, other_actions = (torch.cat([columns[1] for columns in added[:16]]) for added in (first, other))
    assert len(set(actions[:, 0].tolist())) == 48 and not set(actions[:, 0].tolist()) & set(
        other_actions[:, 0].tolist()
    )


def test_every_episode_has_a_fresh_seed(scripted, run, monkeypatch):
    """Every checkpoint gives new seeds, and so does another run; all evaluations of a run have the same, others."""
    seeds, reset = [], scripted.reset

    def watched(self, seed=None, options=None):
        result = reset(self, seed, options)
        seeds.append((self.who, seed))
        return result

    monkeypatch.setattr(scripted, "reset", watched)
    chosen, evaluated = [], []
    for seed in (1, 11):
        scripted.born, scripted.plan = 0, [[(10**6, "truncated")]] * 2
        seeds.clear()
        settings = {"learning_starts": 60, "total_timesteps": 60, "eval_frequency": 30, "checkpoint_frequency": 20}
        run(str(seed), env_id="Scripted-v0", seed=seed, **settings)
        given = [(who, number) for who, number in seeds if number is not None]  # those without begin by themselves
        chosen += [number for who, number in given if who < 2]
        first, *again = ([dict(given)[who] for who in pair] for pair in ((2, 3), (4, 5)))
        assert again == [first]
        evaluated += first
    assert len(chosen) == 2 * 4 * 2  # at steps 0, 20, 40 and 60, for two environments in two runs
    assert len(set(chosen + evaluated)) == len(chosen) + 4


def test_warm_up_actions_are_uniform(scripted, run):
    """Of 4000 warm-up actions, a quarter lies in each quarter of [-1, 1], in both dimensions (within 5 sigma)."""
    scripted.plan = [[(10, "truncated")]] * 5
    added, acted = run(env_id="Scripted-v0", num_envs=5, total_timesteps=4000, learning_starts=4000)
    actions = torch.cat([columns[1] for columns in added]).numpy()
    assert actions.shape == (4000, 2) and not acted
    for values in actions.T:
        counts, _ = np.histogram(values, bins=[-1, -0.5, 0, 0.5, 1])
        assert counts.sum() == 4000 and np.abs(counts - 1000).max() < 5 * (4000 * 0.25 * 0.75) ** 0.5
    assert abs(np.corrcoef(actions.T)[0, 1]) < 5 / 4000**0.5


def test_evaluation_leaves_training_alone(run, tmp_path):
    """Training sees the same transitions however often it is interrupted by evaluations."""
    settings = {"env_id": "InvertedPendulum-v4", "total_timesteps": 120, "learning_starts": 40}
    often, _ = run("often", eval_frequency=10, **settings)
    once, _ = run("once", eval_frequency=120, **settings)
    assert len(often) == len(once) == 60
    for columns, same in zip(often, once, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(columns, same, strict=True))
    tables = []
    for folder in ("often", "once"):
        (path,) = (tmp_path / folder).glob("runs/*/metrics.csv")
        tables.append(list(csv.reader(path.open())))
    assert [row[0] for row in tables[0][1:]] == [str(step) for step in range(10, 121, 10)]
    assert len(tables[1]) == 2 and tables[1][-1] == tables[0][-1]
    assert len({tuple(row[2:]) for row in tables[0][1:]}) > 1  # the policy did change in between


def test_evaluation_repeats_itself(module, small_args):
    """Two evaluations of an unchanged agent agree, whatever the global random stream does; another seed's differs."""
    args = small_args(env_id="Hopper-v4", eval_episodes=3)
    torch.manual_seed(1)
    agent = module.Agent(args, 11, 3, torch.device("cpu"))
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    first = module.evaluate(agent, args, torch.device("cpu"))
    torch.manual_seed(2)
    np.random.seed(2)
    assert module.evaluate(agent, args, torch.device("cpu")) == first
    other = module.evaluate(agent, small_args(env_id="Hopper-v4", eval_episodes=3, seed=77), torch.device("cpu"))
    assert other["episodic_return"] != first["episodic_return"]
    assert all(torch.equal(value, before[name]) for name, value in agent.state_dict().items())


class Idle:
    """An agent that always takes the middle action and checks how it is asked."""

    def act(self, obs, generator, explore):
        assert obs.dtype == torch.float32 and isinstance(generator, torch.Generator) and explore is False
        return torch.zeros(len(obs), 2)


def test_evaluate_counts_one_episode_each(module, scripted, small_args):
    """Returns and lengths stop at each environment's first ending, while the others run on."""
    scripted.plan = [
        [(1, "terminated"), (2, "terminated")],
        [(3, "truncated"), (1, "both")],
        [(2, "both"), (1, "truncated")],
        [(5, "truncated"), (1, "terminated")],
    ]
    result = module.evaluate(Idle(), small_args(env_id="Scripted-v0", eval_episodes=4), torch.device("cpu"))
    returns = [1, 11 + 12 + 13, 21 + 22, 31 + 32 + 33 + 34 + 35]
    assert result["episodic_return"] == pytest.approx(sum(returns) / 4)
    assert result["episodic_return_std"] == pytest.approx(pstdev(returns))
    assert result["episodic_length"] == pytest.approx((1 + 3 + 2 + 5) / 4)


def test_metrics_file_holds_the_evaluations(scripted, run, tmp_path):
    """metrics.csv and TensorBoard hold, for every evaluation, the hand-computed statistics of its two episodes."""
    scripted.plan = [
        [(9, "truncated")],
        [(9, "truncated")],
        [(2, "both")],
        [(1, "both")],
        [(3, "truncated")],
        [(4, "both")],
    ]
    run(env_id="Scripted-v0", learning_starts=30, total_timesteps=60, eval_frequency=30)
    (path,) = tmp_path.glob("run/runs/*/metrics.csv")
    header, *table = csv.reader(path.open())
    assert header == ["global_step", "updates", "episodic_return", "episodic_return_std", "episodic_length"]
    # environments 2 and 3: returns 21 + 22 and 31; then 4 and 5: 41 + 42 + 43 and 51 + 52 + 53 + 54
    assert [[float(x) for x in row] for row in table] == [[30, 0, 37, 6, 1.5], [60, 15, 168, 42, 3.5]]
    assert scalars(tmp_path / "run", "eval/episodic_return") == [(30, 37), (60, 168)]
    assert scalars(tmp_path / "run", "eval/episodic_length") == [(30, 1.5), (60, 3.5)]
