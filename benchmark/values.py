"""Do critics over- or underestimate? Compares Q with what the policy earns; writes benchmark/results/values.json.

    python benchmark/values.py benchmark/runs/full/*__sharper-mixture__*/runs/*     # run folders with a checkpoint.pt

The averaged policy plays one episode in each of --episodes environments, without exploration noise. Q is min_j Q_j of
the online critics at the visited (s, a), the value earned Σ_k γ^k r of the scaled rewards that follow. Where an episode
is truncated, its last Q stands for what would have followed, and the last HORIZON pairs, which that could move by more
than γ^HORIZON (1.8%) of it, are left out. Not for SAC, whose Q has an entropy bonus in it."""

import argparse
import json
import warnings
from pathlib import Path

import numpy as np
import torch
from policy import ROOT, load, sdac
from speed import cpu_name, versions

HORIZON = 400


def play(agent, num_episodes, seed=1):
    """One episode an environment: a list of Q (L,), scaled rewards (L,) and whether it has terminated."""
    envs, generator = sdac.make_envs(agent.args.env_id, num_episodes), torch.Generator().manual_seed(seed)
    (obs, _), episodes, ended = envs.reset(seed=seed), [([], []) for _ in range(num_episodes)], {}
    while len(ended) < num_episodes:
        obs = torch.as_tensor(obs, dtype=torch.float32)
        actions = agent.act(obs, generator, explore=False)
        with torch.no_grad():
            q = sdac.min_q(agent.critics, obs, actions[:, None])[:, 0]
        obs, rewards, terminations, truncations, _ = envs.step(actions.numpy())
        for i in set(range(num_episodes)) - set(ended):
            episodes[i][0].append(q[i].item())
            episodes[i][1].append(agent.args.reward_scale * rewards[i])
            if terminations[i] or truncations[i]:
                ended[i] = bool(terminations[i])
    envs.close()
    return [(np.array(q), np.array(rewards), ended[i]) for i, (q, rewards) in enumerate(episodes)]


def earned(q, rewards, terminated, gamma):
    """Q (L',) and the discounted rewards that followed (L',), L' = L of a terminated episode, L - HORIZON otherwise."""
    values, value = np.zeros(len(q)), 0.0 if terminated else q[-1]
    for i in reversed(range(len(q) if terminated else len(q) - 1)):
        values[i] = value = rewards[i] + gamma * value
    kept = len(q) if terminated else max(len(q) - HORIZON, 0)
    return q[:kept], values[:kept]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path)
    parser.add_argument("--episodes", type=int, default=20)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*out of date")
    results = {"machine": {"cpu": cpu_name()}, "versions": versions(), "episodes": options.episodes, "runs": {}}
    for run in options.runs:
        agent, *_ = load(run, 1, "--no-compile")
        args, episodes = agent.args, play(agent, options.episodes)
        q, values = (np.concatenate(x) for x in zip(*(earned(*e, args.gamma) for e in episodes), strict=True))
        facts = {"Q": q.mean(), "earned": values.mean(), "relative error": (q - values).mean() / abs(values.mean())}
        facts |= {"correlation": np.corrcoef(q, values)[0, 1], "pairs": len(q)}
        facts |= {"episodic_length": np.mean([len(e[0]) for e in episodes]), "args": vars(args) | {"evaluate": None}}
        results["runs"][run.resolve().name.rpartition("__")[0]] = facts
        print(run.resolve().name, json.dumps(facts | {"args": None}, default=float))
        path = ROOT / "benchmark" / "results" / "values.json"
        path.write_text(json.dumps(results, indent=1, default=float) + "\n")
