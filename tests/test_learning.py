"""Both scripts learn: a pole stays up for longer than chance or an untrained network can keep it."""

import csv

import gymnasium as gym
import torch

SETTINGS = {
    "sdac_continuous_action": {
        "denoising_steps": 5,
        "num_particles": 8,
        "num_reverse_samples": 16,
        "alpha_frequency": 20,
        "total_timesteps": 3000,
    },
    "sac_continuous_action": {"total_timesteps": 4000},
}


def best_of_chance(module, args):
    """The longest of 200 episodes of random actions and of the evaluations of 20 untrained agents."""
    env = gym.make(args.env_id)
    env.action_space.seed(0)
    lengths = []
    for seed in range(200):
        env.reset(seed=seed)
        lengths.append(1)
        while not any(env.step(env.action_space.sample())[2:4]):
            lengths[-1] += 1
    for seed in range(20):
        torch.manual_seed(seed)
        agent = module.Agent(args, 4, 1, torch.device("cpu"))
        lengths.append(module.evaluate(agent, args, torch.device("cpu"))["episodic_return"])
    return max(lengths)


def test_learns_to_balance(module, script, tmp_path, monkeypatch):
    """Every one of the last three evaluations beats the best of chance by a half."""
    monkeypatch.chdir(tmp_path)
    fixed = {
        "env_id": "InvertedPendulum-v4",
        "cuda": False,
        "compile": False,
        "num_envs": 1,
        "learning_starts": 500,
        "reward_scale": 1.0,
    }
    args = module.Args(**fixed, batch_size=64, eval_frequency=250, eval_episodes=5, **SETTINGS[script])
    chance = best_of_chance(module, args)
    module.main(args)
    (path,) = tmp_path.glob("runs/*/metrics.csv")
    returns = [float(row["episodic_return"]) for row in csv.DictReader(path.open())]
    assert min(returns[-3:]) > 1.5 * chance, (chance, returns)
