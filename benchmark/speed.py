"""Measure the speed of both scripts: one update, one action, the loop, and what each optimisation contributes.

    python benchmark/speed.py [--cuda]        # 11 minutes on an older 2-core CPU; leave the machine alone meanwhile

Prints tables and writes benchmark/results/speed-<device>.json. Every configuration runs in a process of its own, one
after the other, with the default algorithm settings and random data of the task's sizes; "plain" is the script in
eager PyTorch with none of the optimisations, "cleanrl" an eager SAC as CleanRL writes it, with the same networks and
the same number of gradient steps, "linear 20" SDAC with the authors' noise levels, "malloc" the default with freed
memory kept by the C library. Times are medians in milliseconds, with the quartiles in the JSON. Achieved shares are
relative to a matrix product of the shape of a hidden layer, (B·K, 256) x (256, 256), in the same process."""

import argparse
import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from run import KEEP_MEMORY

START = time.perf_counter()
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["torch", "gymnasium", "mujoco", "numpy"]
SIZES = {"HalfCheetah-v4": (17, 6), "Humanoid-v4": (376, 17)}
CPU_OPTIMISATIONS = ["fused_adam", "compile"]
CUDA_OPTIMISATIONS = ["fused_adam", "graphs"]
# Milliseconds of the authors' JAX code and, beside it on the same machine in the same run, of an earlier version of
# this script with the same settings (linear 20): 2 cores of an AMD EPYC with AVX-512 and bfloat16, two rounds. Not
# measured by this file.
SIDE_BY_SIDE = {
    "HalfCheetah-v4": {"authors update": [1003, 1082], "this script, linear 20": [202, 222], "authors act": [15, 15]},
    "Humanoid-v4": {"authors update": [1205, 1292], "this script, linear 20": [239, 241], "authors act": [17, 21]},
}
VARIANTS = {  # configurations that are more than optimisations
    "linear 20": {  # as the authors have it
        "schedule": "linear",
        "denoising_steps": 20,
        "temperature": "fixed",
        "temperature_scale": 0.2,
        "reverse_proposal": "clip",
    },
    "T = 10": {"denoising_steps": 10},
    "anchor next": {"anchor": "next"},
    "K = 8, M = 32, batch 128": {"num_particles": 8, "num_reverse_samples": 32, "batch_size": 128},
}


def plan(cuda, bfloat16):
    """(script, task, name, optimisations) of every process; on a CPU variants and each optimisation alone, too."""
    every = CUDA_OPTIMISATIONS if cuda else CPU_OPTIMISATIONS + ["bfloat16"] * bfloat16
    exact = [name for name in every if name != "bfloat16"]
    jobs = []
    for task in SIZES:
        jobs += [("sdac", task, "float32", exact), ("sdac", task, "plain", [])]
        jobs += [("sac", task, "float32", exact), ("sac", task, "plain", [])]
        if not cuda:
            jobs += [("sdac", task, "bfloat16", every)] * bfloat16 + [("sac", task, "cleanrl", [])]
            jobs += [("sdac", task, "malloc", [*every, "malloc"])]
            jobs += [("sdac", task, name, every) for name in VARIANTS]
            if task == "HalfCheetah-v4":
                jobs += [("sdac", task, f"only {name}", [name]) for name in every]
    return jobs


class Timer:
    """timer(function) calls it until a time is up, and returns quartiles of its duration in milliseconds."""

    def __init__(self, device, torch):
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def __call__(self, function, seconds, at_least=3):
        function()
        self.wait()
        times, end = [], time.perf_counter() + seconds
        while len(times) < at_least or time.perf_counter() < end:
            start = time.perf_counter()
            function()
            self.wait()
            times.append(1e3 * (time.perf_counter() - start))
        low, median, high = statistics.quantiles(times, n=4)
        return {"median": median, "quartiles": [low, high], "repetitions": len(times)}


def cleanrl_update(obs_dim, action_dim, device):
    """SAC's update as CleanRL writes it: two critics, one network after the other, Python loops, a scalar read back."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Network(nn.Module):
        def __init__(self, *sizes):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

        def forward(self, x):
            for layer in self.layers[:-1]:
                x = F.mish(layer(x))
            return self.layers[-1](x)

    def sample(obs):
        mean, log_std = actor(obs).chunk(2, dim=1)
        normal = torch.distributions.Normal(mean, (-5 + 3.5 * (torch.tanh(log_std) + 1)).exp())
        u = normal.rsample()
        action = torch.tanh(u)
        return action, (normal.log_prob(u) - torch.log(1 - action.pow(2) + 1e-6)).sum(1, keepdim=True)

    def value(critic, obs, action):
        return critic(torch.cat([obs, action], 1))

    actor = Network(obs_dim, 256, 256, 256, 2 * action_dim).to(device)
    qf1, qf2, qf1_target, qf2_target = (Network(obs_dim + action_dim, 256, 256, 256, 1).to(device) for _ in range(4))
    q_optimizer = torch.optim.Adam([*qf1.parameters(), *qf2.parameters()], lr=3e-4)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=3e-4)
    log_alpha = torch.zeros(1, requires_grad=True, device=device)
    alpha_optimizer = torch.optim.Adam([log_alpha], lr=3e-4)

    def update(batch, _):
        obs, actions, rewards, next_obs, terminations = batch
        alpha = log_alpha.exp().item()
        with torch.no_grad():
            next_action, next_log_prob = sample(next_obs)
            next_q = torch.min(value(qf1_target, next_obs, next_action), value(qf2_target, next_obs, next_action))
            target = 0.2 * rewards + (1 - terminations) * 0.99 * (next_q - alpha * next_log_prob).view(-1)
        loss = sum(F.mse_loss(value(critic, obs, actions).view(-1), target) for critic in (qf1, qf2))
        q_optimizer.zero_grad()
        loss.backward()
        q_optimizer.step()
        action, log_prob = sample(obs)
        loss = (alpha * log_prob - torch.min(value(qf1, obs, action), value(qf2, obs, action))).mean()
        actor_optimizer.zero_grad()
        loss.backward()
        actor_optimizer.step()
        loss = (-log_alpha.exp() * (log_prob.detach() - action_dim)).mean()
        alpha_optimizer.zero_grad()
        loss.backward()
        alpha_optimizer.step()
        for critic, target_critic in [(qf1, qf1_target), (qf2, qf2_target)]:
            for p, target_p in zip(critic.parameters(), target_critic.parameters(), strict=True):
                target_p.data.copy_(0.005 * p.data + 0.995 * target_p.data)

    return update


def plain_networks(module):
    """The networks of a script in the words of eager PyTorch; the scripts' own are written for torch.compile."""
    torch = module.torch

    def mlp(self, context, actions, dtype=None):
        layer = torch.addmm if self.weights[0].ndim == 2 else torch.baddbmm  # one network, or two at once
        weights, biases = ([p.to(dtype) for p in parameters] for parameters in (self.weights, self.biases))
        action_weight = weights[0][..., self.inputs[0] :, :]
        h = (actions.flatten(0, 1).to(dtype) @ action_weight).unflatten(-2, actions.shape[:2])
        context = context @ self.weights[0][..., : self.inputs[0], :] + self.biases[0]
        h = module.mish(context[..., None, :] + h).flatten(-3, -2)
        for weight, bias in zip(weights[1:-1], biases[1:-1], strict=True):
            h = module.mish(layer(bias, h.to(dtype), weight))
        return layer(biases[-1], h.to(dtype), weights[-1]).unflatten(-2, actions.shape[:2])

    def actor(self, obs):
        for layer in self.layers[:-1]:
            obs = module.mish(layer(obs))
        mean, log_std = self.layers[-1](obs).chunk(2, dim=1)
        return mean, module.LOG_STD_MIN + 0.5 * (module.LOG_STD_MAX - module.LOG_STD_MIN) * (log_std.tanh() + 1)

    module.MLP.forward = mlp
    if hasattr(module, "Actor"):
        module.Actor.forward = actor


def measure(script, task, name, optimisations, cuda):
    """Times of one configuration, in this process."""
    import mujoco

    sys.path.insert(0, str(ROOT))
    module = importlib.import_module(f"{script}_continuous_action")
    warnings.simplefilter("ignore")  # of Gymnasium and MuJoCo, on tasks of version 4
    mujoco.set_mju_user_warning(lambda _: None)
    torch, on = module.torch, set(optimisations)
    args = module.Args(env_id=task, cuda=cuda, compile="compile" in on)
    if script == "sdac":
        args = replace(args, bfloat16="bfloat16" in on, **VARIANTS.get(name, {}))
    if "graphs" not in on:
        module.CudaGraph = lambda function: function
    if not on & {"compile", "graphs"}:
        plain_networks(module)
    adam = torch.optim.Adam
    if "fused_adam" not in on:
        torch.optim.Adam = lambda parameters, lr, fused, capturable: adam(parameters, lr, capturable=capturable)
    device = torch.device("cuda" if cuda else "cpu")
    obs_dim, action_dim = SIZES[task]
    generator = torch.Generator(device).manual_seed(0)
    agent, timer = module.Agent(args, obs_dim, action_dim, device), Timer(device, torch)
    torch.optim.Adam = adam
    update = cleanrl_update(obs_dim, action_dim, device) if name == "cleanrl" else agent.update
    rows = torch.randn(args.batch_size, 2 * obs_dim + action_dim + 2, generator=generator, device=device)
    obs, actions, rewards, next_obs, terminations = rows.split([obs_dim, action_dim, 1, obs_dim, 1], dim=1)
    batch = obs, actions.tanh(), rewards[:, 0], next_obs, (terminations[:, 0] > 3).float()

    for _ in range(2):  # the second one updates the policy
        update(batch, generator)
    timer.wait()
    result = {"script": script, "task": task, "configuration": name, "optimisations": optimisations}
    result["seconds_to_second_update"] = time.perf_counter() - START
    cycle = args.policy_frequency
    found = timer(lambda: [update(batch, generator) for _ in range(cycle)], 2)
    result["update_ms"] = {"median": found["median"] / cycle, "quartiles": [x / cycle for x in found["quartiles"]]}
    if name == "cleanrl":
        return result
    act = module.CudaGraph(agent.act)
    result["act_ms"] = timer(lambda: act(obs[: args.num_envs], generator=generator), 0.5)

    # Where the time goes, and which share of the speed of a plain matrix product the sampling chain reaches
    if name in ("float32", "bfloat16"):
        if script == "sdac":
            k, hidden = args.num_particles, agent.policy.mlp.weights[1].shape[0]
            t = torch.randint(args.denoising_steps, (len(obs), 1), generator=generator, device=device)
            particles = torch.rand(len(obs), k, action_dim, generator=generator, device=device)
            choose = torch.no_grad()(lambda: module.min_q(agent.critics, obs, particles).argmax(1))
            shape, one = (len(obs), args.num_reverse_samples, action_dim), torch.tensor(1.0, device=device)

            def target():
                uniform = torch.rand(shape, generator=generator, device=device)
                proposal = args.reverse_proposal, batch[1]
                eps, a_hat, log_ratio = module.reverse_samples(agent.schedule, batch[1], t, uniform, *proposal)
                with torch.no_grad():
                    module.rsm_target(eps, module.min_q(agent.critics, obs, a_hat), one, log_ratio)

            loss = lambda: agent.policy(obs, batch[1][:, None], t[:, 0]).square().mean()  # noqa: E731
            chain = module.CudaGraph(partial(agent.act, policy=agent.policy))
            parts = {
                "policy update": lambda: agent.update_policy(obs, next_obs, batch[1], generator=generator),
                "sampling chain and choice of particle": lambda: chain(obs, generator=generator),
                "of which choice of particle": choose,
                "reverse samples and their weights": target,
                "RSM loss and policy step": lambda: module.gradient_step(agent.policy_optimizer, loss()),
            }
        else:
            parts = {"policy update": lambda: agent.update_policy(obs, generator=generator)}
        result["parts_ms"] = {part: timer(function, 0.3)["median"] for part, function in parts.items()}
        if script == "sdac":
            dtype, n = torch.bfloat16 if args.bfloat16 else torch.float32, len(obs) * k
            x, w = (torch.randn(m, hidden, device=device).to(dtype) for m in (n, hidden))
            milliseconds = timer(lambda: torch.nn.functional.linear(x, w), 0.5)["median"]
            flop = 2 * n * args.denoising_steps * (2 * hidden**2 + 2 * hidden * action_dim)
            parts = result["parts_ms"]
            chain = parts["sampling chain and choice of particle"] - parts["of which choice of particle"]
            result["matrix_product_gflops"] = 2 * n * hidden**2 / milliseconds / 1e6
            result["sampling_chain_gflops"] = flop / chain / 1e6

        # The training loop: act, update, step the environments, store; with the replay buffer of the default size
        envs = module.make_envs(task, args.num_envs)
        buffer = module.ReplayBuffer(args.buffer_size, obs_dim, action_dim, device)
        buffer.rows.zero_()  # so that it counts as resident memory
        to_tensor = partial(torch.as_tensor, dtype=torch.float32, device=device)
        state = SimpleNamespace(obs=envs.reset(seed=0)[0])

        def loop():
            for _ in range(cycle):
                acts = act(to_tensor(state.obs), generator=generator)
                for_envs = acts.cpu().numpy()
                if buffer.added:
                    agent.update(buffer.sample(args.batch_size, generator), generator)
                next_obs, reward, terminated, truncated, infos = envs.step(for_envs)
                last_obs = next_obs.copy()
                for i in (terminated | truncated).nonzero()[0]:
                    last_obs[i] = infos["final_obs"][i]
                buffer.add(to_tensor(state.obs), acts, *map(to_tensor, (reward, last_obs, terminated)))
                state.obs = next_obs

        found = timer(loop, 1.5)
        result["environment_steps_per_second"] = 1e3 * cycle * args.num_envs / found["median"]
        actions = envs.action_space.sample()
        result["parts_ms"][f"{args.num_envs} environments"] = timer(lambda: envs.step(actions), 0.3)["median"]
        envs.close()
    result["seconds"] = time.perf_counter() - START
    result["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    if device.type == "cuda":
        result["peak_device_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return result


def versions():
    return {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES}


def cpu_name():
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor()


def report(results):
    """The tables of the README."""
    plain = {(r["script"], r["task"]): r["update_ms"]["median"] for r in results if r["configuration"] == "plain"}
    print("\n| script | task | configuration | ms per update (quartiles) | ratio to plain | act, ms | env steps/s |")
    print("|---|---|---|---|---|---|---|")
    for r in results:
        median, (low, high) = r["update_ms"]["median"], r["update_ms"]["quartiles"]
        ratio = plain[r["script"], r["task"]] / median
        act = f"{r['act_ms']['median']:.1f}" if "act_ms" in r else ""
        speed = f"{r['environment_steps_per_second']:.1f}" if "environment_steps_per_second" in r else ""
        print(
            f"| {r['script']} | {r['task']} | {r['configuration']} | {median:.1f} ({low:.1f}–{high:.1f}) | {ratio:.2f} "
            f"| {act} | {speed} |"
        )
    for r in results:
        if "parts_ms" in r:
            parts = ", ".join(f"{name} {ms:.1f}" for name, ms in r["parts_ms"].items())
            print(f"\n{r['script']} {r['task']} {r['configuration']}: {parts} ms")
            print(f"  second update after {r['seconds_to_second_update']:.1f} s; peak {r['peak_memory_gb']:.2f} GB")
        if "sampling_chain_gflops" in r:
            share = r["sampling_chain_gflops"] / r["matrix_product_gflops"]
            print(f"  sampling chain {r['sampling_chain_gflops']:.0f} GFLOP/s, {share:.0%} of a plain matrix product")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", action="store_true", help="measure the GPU instead of the CPU")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one configuration, in the process that main() starts
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*json.loads(options.measure), options.cuda)))
        return
    import torch

    if options.cuda and not torch.cuda.is_available():
        parser.error("--cuda: PyTorch finds no CUDA device; leave --cuda out to measure the CPU")
    device = torch.cuda.get_device_name() if options.cuda else "cpu"
    results, begin = [], time.time()
    with tempfile.TemporaryDirectory() as cache:  # compiled code is not taken from earlier runs
        has_bfloat16 = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
        for number, job in enumerate(jobs := plan(options.cuda, has_bfloat16), 1):
            print(f"[{number}/{len(jobs)}] {' '.join(job[:3])}", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, "--measure", json.dumps(job), *["--cuda"] * options.cuda]
            env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache} | (KEEP_MEMORY if "malloc" in job[3] else {})
            process = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
            if process.returncode:
                sys.exit(process.returncode)
            results.append(json.loads(process.stdout.splitlines()[-1]))
            print(f"  {results[-1]['update_ms']['median']:.1f} ms per update", file=sys.stderr, flush=True)
    facts = {
        "machine": {"device": device, "cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": versions(),
        "seconds": time.time() - begin,
        "side_by_side_ms": SIDE_BY_SIDE,
        "results": results,
    }
    path = ROOT / "benchmark" / "results" / f"speed-{device.lower().replace(' ', '-')}.json"
    path.write_text(json.dumps(facts, indent=1) + "\n")
    report(results)
    print(f"\n{path.relative_to(ROOT)} written after {time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
