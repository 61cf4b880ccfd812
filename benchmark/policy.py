"""What has a policy learned of its critic? Looks into trained runs of SDAC and writes benchmark/results/policy.json.

    python benchmark/policy.py benchmark/runs/full/Ant-v4__*/runs/*        # run folders with a checkpoint.pt

For states from the end of the replay buffer: the mean of Q = min_j Q_j over samples of the averaged policy, over the
best of 4 and of 32 samples, over samples of exp(Q/λ) itself (Metropolis' algorithm in the box, begun with those), and
at the maximum (Adam, from the best sample). Unit: the standard deviation of Q over uniform actions, also for λ;
origin: its mean. Then evaluations, without exploration noise, with K = 1, 4 and 32 particles."""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from speed import cpu_name, versions  # noqa: E402

import sdac_continuous_action as sdac  # noqa: E402

PARTICLES = 1, 4, 32


def metropolis(q, actions, temperature, generator, steps=400, step_std=0.15):
    """Samples of exp(q/temperature) in [-1, 1]^d from any actions (B, N, d), with q(actions) (B, N). Proposals are
    reflected at the faces, which keeps them symmetric."""
    values = q(actions)
    for _ in range(steps):
        proposal = actions + step_std * torch.randn(actions.shape, generator=generator)
        proposal = 1 - ((proposal + 1) % 4 - 2).abs()
        proposed = q(proposal)
        accepted = torch.rand(values.shape, generator=generator).log() < (proposed - values) / temperature
        actions, values = torch.where(accepted[..., None], proposal, actions), torch.where(accepted, proposed, values)
    return actions


def maximum(q, actions, steps=150):
    """max q (B,) by gradient ascent in the box from actions (B, d)."""
    free = actions.clamp(-0.95, 0.95).atanh()[:, None].requires_grad_()
    optimizer = torch.optim.Adam([free], lr=0.05)
    for _ in range(steps):
        sdac.gradient_step(optimizer, -q(free.tanh()).sum())
    return q(free.tanh())[:, 0].detach()


def inspect(agent, obs, temperature, generator, num_samples=64):
    """Figures of the policy in states obs (B, obs_dim); those of Q relative to uniform actions."""
    q, n = lambda actions: sdac.min_q(agent.critics, obs, actions), num_samples
    repeated = obs.repeat_interleave(n, 0)
    with torch.no_grad():
        uniform = q(2 * torch.rand(len(obs), 1000, agent.action_dim, generator=generator) - 1)
        actions = sdac.sample_actions(agent.ema_policy, agent.critics, agent.schedule, repeated, 1, generator)
        actions = actions.unflatten(0, (len(obs), n))
        values = q(actions)
        boltzmann = metropolis(q, actions, temperature, generator)
        levels = {f"best of {k}": values.unflatten(1, (-1, k)).amax(2).mean(1) for k in PARTICLES}
        levels["exp(Q/λ)"] = q(boltzmann).mean(1)
    levels["maximum"] = maximum(q, actions[torch.arange(len(obs)), values.argmax(1)])
    unit, origin = uniform.std(1).mean(), uniform.mean(1)
    return {
        "Q": {name: ((level - origin).mean() / unit).item() for name, level in levels.items()},
        "lambda": (temperature / unit).item(),
        "std of actions": actions.std(1).mean().item(),
        "std of actions, exp(Q/λ)": boltzmann.std(1).mean().item(),
        "components beyond 0.9": (actions.abs() > 0.9).float().mean().item(),
        "components beyond 0.9, exp(Q/λ)": (boltzmann.abs() > 0.9).float().mean().item(),
    }


def load(run, num_states, *flags):
    """The agent of a run folder, its saved state, late observations (num_states, obs_dim), λ and a generator."""
    args, state = sdac.parse(["--evaluate", str(run), "--no-cuda", *flags])
    obs_dim, action_dim = sdac.validate(args)
    agent, generator = sdac.Agent(args, obs_dim, action_dim, torch.device("cpu")), torch.Generator().manual_seed(1)
    agent.load_state_dict(state["agent"], strict=False)  # mirror descent's statistics once had other names
    latest = state["rows"][-50_000:, :obs_dim]
    obs = latest[torch.randint(len(latest), (num_states,), generator=generator)]
    temperature = args.temperature_scale * agent.log_alpha.detach().exp()
    if args.temperature == "relative":
        temperature = temperature * agent.q_spread
    return agent, state, obs, temperature, generator


def look_into(run, episodes, num_states=128):
    agent, state, obs, temperature, generator = load(run, num_states, "--no-compile", "--eval-episodes", str(episodes))
    args = agent.args
    facts = {"step": state["step"], "args": state["args"] | {"resume": None}}
    facts |= inspect(agent, obs, temperature, generator)
    for args.num_particles in PARTICLES:
        facts[f"evaluation, K = {args.num_particles}"] = sdac.evaluate(agent, args, torch.device("cpu"))
    return facts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path)
    parser.add_argument("--episodes", type=int, default=20, help="of an evaluation")
    parser.add_argument("--out", default="policy", metavar="NAME", help="of the file under benchmark/results")
    options = parser.parse_args()
    results = {"machine": {"cpu": cpu_name()}, "versions": versions(), "runs": {}}
    for run in options.runs:
        facts = look_into(run, options.episodes)
        results["runs"][run.resolve().name.rpartition("__")[0]] = facts
        print(run.resolve().name, json.dumps(facts | {"args": None}, indent=1, default=float), sep="\n")
        path = ROOT / "benchmark" / "results" / f"{options.out}.json"
        path.write_text(json.dumps(results, indent=1, default=float) + "\n")
