"""Measure the speed of both scripts, with random data of a task's sizes.

    python benchmark/speed.py [--cuda]    # writes benchmark/results/speed-<device>.json

Trainings: milliseconds of an update and of an action in each environment, and environment steps per
second of both and the simulation; eager, and compiled or, on a GPU, as recorded CUDA graphs; there
also graphs in full float32 precision (without TF32), and graphs of compiled networks.
Policy updates of SDAC: with one denoiser evaluation per state, as here; with one per guess, as in
the authors' code, which has the same gradient; and with the gradient of Q taken back through all
sampling steps, as other methods have it. Their memory is the peak of an eager one. On a CPU every
line is a process of its own. Times are medians: leave the machine alone meanwhile.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial

import torch
from common import RESULTS, command_line, machine, script

sdac = script("sdac")
TASKS = ("HalfCheetah-v4", "Humanoid-v4")
KINDS = ("eager", "fast")
CUDA_KINDS = ("eager", "fast", "float32", "compiled")
GRAPHS = {algorithm: script(algorithm).CudaGraph for algorithm in ("sdac", "sac")}


# ---- The policy update of SDAC, besides the script's
def update_with_m_evaluations(agent, obs, actions):
    """Σ w_i ‖ε_θ - ε_i‖² as it stands: ε_θ is evaluated once for each of the M guesses."""
    schedule, m = agent.schedule, agent.args.num_reverse_samples
    t = torch.randint(agent.args.denoising_steps, (len(obs),))
    a_t = schedule.signal[t, None] * actions + schedule.noise[t, None] * torch.randn(actions.shape)
    with torch.no_grad():
        a_hat, eps = sdac.reverse_samples(schedule, a_t, t, m, agent.args.published)
        q = agent.critics.minimum(obs, a_hat)
        spread = agent.args.temperature * q.std(1, correction=0).mean().clamp(min=1e-8)
        temperature = 2 * agent.exploration_std if agent.args.published else spread
        weights = torch.softmax(q / temperature, dim=1)
    obs, a_t, t = (x.repeat_interleave(m, 0) for x in (obs, a_t, t))
    prediction = agent.policy(obs, a_t[:, None], t).view(eps.shape)
    loss = (weights * (prediction - eps).square().sum(2)).sum(1).mean()
    sdac.gradient_step(agent.policy_optimizer, loss)


def update_through_sampling(agent, obs, actions):
    """Raise Q of one sampled action per state: the gradient passes through all T steps."""
    sample_actions = sdac.sample_actions.__wrapped__  # without torch.no_grad()
    agent.critics.requires_grad_(False)
    shape = (len(obs), 1, agent.action_dim)
    a_0 = sample_actions(agent.policy, agent.critics, agent.schedule, obs, shape)
    sdac.gradient_step(agent.policy_optimizer, -agent.critics.minimum(obs, a_0[:, None]).mean())
    agent.critics.requires_grad_(True)


WAYS = {
    "one evaluation": sdac.Agent.update_policy,
    "M evaluations": update_with_m_evaluations,
    "through sampling": update_through_sampling,
}


# ---- Measurements
def milliseconds(function, seconds):
    """Median time of a call, after three, since the third records the kernels on a GPU."""
    wait = torch.cuda.synchronize if torch.get_default_device().type == "cuda" else lambda: None
    for _ in range(3):
        function()
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times), 3)


def peak_memory():
    """In megabytes, of the process so far or of the GPU since the last reset."""
    if torch.get_default_device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measure(algorithm, settings, task, kind, cuda, seconds):
    """Measure a training, of a kind in KINDS, or a policy update, of a kind in WAYS."""
    module = script(algorithm)
    torch.set_default_device("cuda" if cuda else "cpu")
    torch.set_float32_matmul_precision("highest" if kind == "float32" else "high")
    torch.set_flush_denormal(True)
    module.CudaGraph = (lambda function: function) if kind == "eager" else GRAPHS[algorithm]
    args = module.Args(env_id=task)
    if settings == "published":
        args = module.Args(env_id=task, published=True, **module.PUBLISHED)
    envs = module.make_envs(task, args.num_envs)
    dims = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    agent = module.Agent(args, *dims)
    buffer = module.ReplayBuffer(10_000, *dims)
    buffer.rows.normal_()
    buffer.added = len(buffer.rows)
    batch = buffer.sample(args.batch_size)
    obs = batch[0][: args.num_envs]
    result = {"algorithm": algorithm, "settings": settings, "task": task, "kind": kind}

    if kind in WAYS:
        update = partial(WAYS[kind], agent, *batch[:2])
        torch.cuda.reset_peak_memory_stats() if cuda else None
        before = peak_memory()
        update()
        update()
        result["memory_mb"] = round(peak_memory() - before, 1)
    if kind == "compiled" or (kind != "eager" and not cuda):
        torch.compiler.reset()  # A function is compiled anew only a few times.
        for network in agent.children():
            network.compile(dynamic=True)
    if kind in WAYS:
        recorded = module.CudaGraph(partial(WAYS[kind], agent))
        return result | {"update_ms": milliseconds(lambda: recorded(*batch[:2]), seconds)}

    act = module.CudaGraph(agent.act)
    to_tensor = partial(torch.as_tensor, dtype=torch.float32)
    envs.reset(seed=0)

    def update():
        agent.update(buffer.sample(args.batch_size), 0.5)

    def step():
        actions = act(obs)
        actions_for_envs = actions.cpu().numpy()
        update()
        next_obs, rewards, terminations, _, _ = envs.step(actions_for_envs)
        buffer.add(obs, actions, *map(to_tensor, (rewards, next_obs, terminations)))

    def several(function):
        [function() for _ in range(cycle)]

    cycle = getattr(args, "policy_frequency", 1)
    result["update_ms"] = milliseconds(partial(several, update), seconds) / cycle
    result["act_ms"] = milliseconds(partial(act, obs), seconds)
    step_ms = milliseconds(partial(several, step), seconds) / cycle
    return result | {"steps_per_second": round(1e3 * args.num_envs / step_ms, 1)}


def main():
    parser = command_line(__doc__)
    parser.add_argument("--cuda", action="store_true", help="measure the GPU")
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one line, in a process of its own
    options = parser.parse_args()
    if options.measure:
        job = json.loads(options.measure)
        print(json.dumps(measure(*job, options.cuda, options.seconds)))
        return
    if options.cuda and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU")
    pairs = (("sdac", "default"), ("sdac", "published"), ("sac", "default"))
    kinds = CUDA_KINDS if options.cuda else KINDS
    jobs = [(*pair, task, kind) for task in TASKS for pair in pairs for kind in kinds]
    jobs += [(*pair, task, way) for task in TASKS for pair in pairs[:2] for way in WAYS]
    jobs.sort(key=lambda job: job[3] == "compiled")  # Compiling takes long.
    device = torch.cuda.get_device_name() if options.cuda else "cpu"
    path = RESULTS / f"speed-{device.lower().replace(' ', '-')}.json"
    facts = {"machine": machine(), "threads": torch.get_num_threads(), "results": []}
    RESULTS.mkdir(exist_ok=True)
    for job in jobs:
        if options.cuda:
            result = measure(*job, True, options.seconds)
        else:
            command = [sys.executable, *sys.argv, "--measure", json.dumps(job)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            result = json.loads(output.splitlines()[-1])
        print(result, flush=True)
        facts["results"].append(result)
        path.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
