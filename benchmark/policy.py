"""How far is the policy of an SDAC run from exp(Q/λ)?

    python benchmark/policy.py runs/<run> [runs/<run> ...]    # writes benchmark/results/policy.json

In states from the end of the replay buffer: Q = min_j Q_j of samples of the averaged policy, of the
best of 4 and of 32, and of samples of exp(Q/λ), which Metropolis' algorithm draws. The unit of Q
and λ is the spread of Q over uniform actions, and the origin of Q its mean over them.
"""

import json
from pathlib import Path

import torch
from common import RESULTS, command_line, load, machine, script

sdac = script("sdac")


@torch.no_grad()
def metropolis(q, actions, temperature, steps=400, step_std=0.15):
    """Turn actions (B, N, d) into samples of exp(q/temperature) in the box, with q(actions) (B, N).
    Proposals are reflected at the faces of the box, which keeps them symmetric."""
    values = q(actions)
    for _ in range(steps):
        proposal = actions + step_std * torch.randn(actions.shape)
        proposal = 1 - ((proposal + 1) % 4 - 2).abs()
        proposed = q(proposal)
        accepted = torch.rand(values.shape).log() < (proposed - values) / temperature
        actions = torch.where(accepted[..., None], proposal, actions)
        values = torch.where(accepted, proposed, values)
    return actions


def inspect(agent, obs, temperature, num_samples=64):
    """Figures of the policy in states obs (B, obs_dim)."""

    def q(actions):
        return agent.critics.minimum(obs, actions)

    with torch.no_grad():
        uniform = q(2 * torch.rand(len(obs), 1000, agent.action_dim) - 1)
    repeated = obs.repeat_interleave(num_samples, 0)
    shape = (len(repeated), 1, agent.action_dim)  # One particle: no choice by Q.
    model = agent.average_policy
    actions = sdac.sample_actions(model, agent.critics, agent.schedule, repeated, shape)
    actions = actions.unflatten(0, (len(obs), num_samples))
    boltzmann = metropolis(q, actions, temperature)

    values = q(actions).detach()
    levels = {f"best of {k}": values.unflatten(1, (-1, k)).amax(2).mean(1) for k in (1, 4, 32)}
    levels["exp(Q/λ)"] = q(boltzmann).detach().mean(1)
    unit = uniform.std(1).mean()
    origin = uniform.mean(1)
    facts = {
        "lambda": (temperature / unit).item(),
        "Q": {name: ((level - origin).mean() / unit).item() for name, level in levels.items()},
    }
    for name, samples in (("policy", actions), ("exp(Q/λ)", boltzmann)):
        facts[f"std of {name}"] = samples.std(1).mean().item()
        facts[f"components of {name} beyond 0.9"] = (samples.abs() > 0.9).float().mean().item()
    return facts


def look_into(run, num_states=128):
    """The same figures of a run folder."""
    torch.manual_seed(1)
    agent, state = load(run, "checkpoint.pt")
    age = torch.randint(min(50_000, len(state["rows"])), (num_states,))
    latest = state["rows"][(state["step"] - 1 - age) % len(state["rows"])]
    obs = latest[:, : agent.critics.q1.dims[0]]
    agent.progress.fill_(state["step"] / agent.args.total_timesteps)  # nearly, for random steps
    # λ is that of an update of the policy, which leaves alone the averaged policy and the critics.
    temperature = agent.update_policy(obs, agent.act(obs, policy=agent.policy))["temperature"]
    return {"step": state["step"], **inspect(agent, obs, temperature)}


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run folder of SDAC")
    results = {}
    for run in parser.parse_args().runs:
        results[run.resolve().name] = look_into(run)
        print(run, json.dumps(results[run.resolve().name], indent=1, ensure_ascii=False))
    RESULTS.mkdir(exist_ok=True)
    facts = {"machine": machine(), "runs": results}
    (RESULTS / "policy.json").write_text(json.dumps(facts, indent=1) + "\n")
