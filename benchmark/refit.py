"""How near does a policy come to exp(Q/λ), by --reverse-proposal and M? Trains the policies of runs of SDAC further.

    python benchmark/refit.py benchmark/runs/full/Ant-v4__truncate__1/runs/*    # 10 minutes; with a checkpoint.pt

Critics, λ and replay buffer stay as they are, so that the policy has one thing to learn, exp(Q/λ) of these critics.
Each variant begins with the policy of the run and makes UPDATES updates with fresh optimisers. Written to
benchmark/results/refit.json: benchmark/policy.py's figures, Q of the averaged policy beside that of exp(Q/λ)."""

import argparse
import json
import time
from pathlib import Path

import torch
from policy import ROOT, inspect, load
from speed import cpu_name, versions

UPDATES, BATCH = 1500, 64
VARIANTS = [("as it is", 0)] + [(proposal, m) for m in (16, 64) for proposal in ("truncate", "mixture")]


def refit(run, proposal, m, num_states=48):
    """Figures of the policy of a run folder after more updates of it with this proposal and M."""
    agent, state, obs, temperature, generator = load(run, num_states, "--anchor", "next")
    args, rows, spread = agent.args, state["rows"], agent.q_spread.clone()
    args.reverse_proposal, args.num_reverse_samples, start = proposal, m, time.time()
    for _ in range(UPDATES if m else 0):
        batch = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        next_obs = batch[:, -1 - obs.shape[1] : -1]
        next_actions = agent.act(next_obs, generator, policy=agent.policy)
        agent.update_policy(next_obs, next_obs, next_actions, generator=generator)
        agent.q_spread.copy_(spread)
        with torch.no_grad():
            torch._foreach_lerp_(list(agent.ema_policy.parameters()), list(agent.policy.parameters()), args.tau)
    facts = {"proposal": proposal, "M": m, "seconds": round(time.time() - start)}
    return facts | inspect(agent, obs, temperature, torch.Generator().manual_seed(2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path)
    parser.add_argument("--out", default="refit", metavar="NAME", help="of the file under benchmark/results")
    options = parser.parse_args()
    results = {"machine": {"cpu": cpu_name()}, "versions": versions(), "updates": UPDATES, "batch": BATCH, "runs": {}}
    for run in options.runs:
        found = results["runs"][run.resolve().name.rpartition("__")[0]] = []
        for variant in VARIANTS:
            found.append(refit(run, *variant))
            print(run.name, json.dumps(found[-1]))
            path = ROOT / "benchmark" / "results" / f"{options.out}.json"
            path.write_text(json.dumps(results, indent=1) + "\n")
