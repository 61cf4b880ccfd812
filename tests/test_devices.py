"""torch.compile and CUDA compute what eager PyTorch computes on the CPU, from the same noise; bfloat16; compilers."""

import importlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, small_flags, start_process

SMALL = {
    "sdac_continuous_action": {"denoising_steps": 5, "num_particles": 4, "num_reverse_samples": 8, "bfloat16": False},
    "sac_continuous_action": {},
}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


def random_batches(n, device="cpu"):
    """n batches of 64 transitions with 7 observations and 3 actions."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(n):
        obs, actions, rewards, next_obs = (
            torch.randn(shape, generator=generator).to(device) for shape in ((64, 7), (64, 3), (64,), (64, 7))
        )
        yield obs, actions.clamp(-1, 1), rewards, next_obs, (rewards > 1).float()


def run(agent, generator, n=12):
    """Metrics of n updates, each from another batch."""
    device = next(agent.parameters()).device
    return [
        {name: value.item() for name, value in agent.update(batch, generator).items()}
        for batch in random_batches(n, device)
    ]


def make_agent(script, device="cpu", **settings):
    """A script and its agent, with networks that are the same on every device."""
    torch.manual_seed(0)
    module = importlib.import_module(script)
    args = module.Args(**{"compile": False} | settings, **SMALL[script])
    return module, module.Agent(args, 7, 3, torch.device(device))


@pytest.fixture
def noise_from_the_cpu(monkeypatch):
    """Draws all noise on the CPU, so that every device gets the same."""
    for name in ("rand", "randn", "randint"):
        draw = getattr(torch, name)

        def on_cpu(*args, draw=draw, generator, device="cpu", **kwargs):
            return draw(*args, generator=generator, **kwargs).to(device)

        monkeypatch.setattr(torch, name, on_cpu)


@pytest.mark.parametrize("script", SMALL)
@pytest.mark.parametrize("device", [
    pytest.param("cpu", marks=needs_compiler),
    pytest.param("cuda", marks=needs_cuda),
])  # fmt: skip
def test_updates_agree_with_eager_on_the_cpu(script, device, noise_from_the_cpu, monkeypatch):
    """Every metric of four updates in a row, so that gradients and moving averages count too: compiled on the CPU, and
    on the GPU without CUDA graphs, which could not record noise from the CPU."""
    monkeypatch.setattr(f"{script}.CudaGraph", lambda function: function)
    agents = make_agent(script)[1], make_agent(script, device, compile=True)[1]
    expected, found = (run(agent, torch.Generator().manual_seed(0), 4) for agent in agents)
    assert sum("rsm_loss" in update or "actor_loss" in update for update in expected) >= 2
    for update, reference in zip(found, expected, strict=True):
        assert update == pytest.approx(reference, rel=2e-3, abs=1e-4)


@needs_cuda
@pytest.mark.parametrize("script, settings", [
    ("sac_continuous_action", {}),
    ("sdac_continuous_action", {}),
    ("sdac_continuous_action", {"reverse_proposal": "truncate"}),
    ("sdac_continuous_action", {"weighting": "mirror-descent"}),
])  # fmt: skip
def test_cuda_graphs_change_nothing(script, settings, monkeypatch):
    """30 updates, with steps of α, and the actions after each are the same bit for bit as kernel by kernel."""
    results = []
    for recorded in (True, False):
        with monkeypatch.context() as patch:
            if not recorded:
                patch.setattr(f"{script}.CudaGraph", lambda function: function)
            module, agent = make_agent(script, "cuda", **settings)
            agent.args = replace(agent.args, **{"alpha_frequency": 4} if hasattr(agent.args, "alpha_frequency") else {})
            generator, act, found = torch.Generator("cuda").manual_seed(0), module.CudaGraph(agent.act), []
            for batch in random_batches(30, "cuda"):
                metrics, actions = agent.update(batch, generator), act(batch[0][:5], generator=generator)
                found += [value.clone() for value in (*metrics.values(), actions)]
            assert hasattr(act, "graph") == recorded
            results.append([*found, *agent.state_dict().values(), generator.get_state()])
    assert len(results[0]) > 200
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_bfloat16_is_for_the_reverse_diffusion_only(monkeypatch):
    """With bfloat16, denoiser products differ from float32 by its rounding; the critics see and give float32."""
    _, agent = make_agent("sdac_continuous_action")
    obs, *_ = next(random_batches(1))
    called = []
    critics = agent.critics.forward
    monkeypatch.setattr(agent.critics, "forward", lambda o, a: called.append((a, critics(o, a))) or called[-1][1])
    for agent.dtype in (None, torch.bfloat16):
        agent.act(obs, torch.Generator().manual_seed(0), explore=False, policy=agent.policy)
    (exact, _), (rounded, rounded_q) = called
    assert {x.dtype for pair in called for x in pair} == {torch.float32}
    assert torch.equal(rounded_q, critics(obs, rounded))
    difference = (rounded - exact).abs()
    assert 2**-16 < difference.mean() < 2**-8  # 8 bits of precision, and clipped coordinates without any difference


def test_what_learns_is_float32(monkeypatch):
    """In an update with bfloat16, the denoiser whose gradient is taken is computed in float32, the others are not."""
    _, agent = make_agent("sdac_continuous_action")
    forward, calls, rounds = agent.policy.forward, [], lambda x: x.bfloat16().float()

    def watched(obs, a_t, t, *dtype):
        calls.append((torch.is_grad_enabled(), forward(obs, a_t, t, *dtype), forward(obs, a_t, t)))
        return calls[-1][1]

    monkeypatch.setattr(agent.policy, "forward", watched)
    agent.dtype = torch.bfloat16
    run(agent, torch.Generator().manual_seed(0), 2)
    learns, *rest = sorted(calls, key=lambda call: not call[0])
    assert learns[0] and torch.equal(learns[1], learns[2]) and not torch.equal(learns[1], rounds(learns[1]))
    assert len(rest) == 15  # 5 steps for a' of two critics' updates, and for the a_0 of one update of the policy
    assert not any(grad or torch.equal(found, exact) for grad, found, exact in rest)
    state = [*agent.state_dict().values(), *(v for o in agent.optimizers for s in o.state.values() for v in s.values())]
    assert {value.dtype for value in state} == {torch.float32}


def test_bfloat16_is_an_option(monkeypatch):
    """--bfloat16 and --no-bfloat16 choose the type of the denoiser's products on a CPU that can, by default bfloat16.
    Another, where a run of such a CPU goes on, would need several times as long, so there --bfloat16 has no effect."""
    module = importlib.import_module("sdac_continuous_action")
    for able, wanted, dtype in ((True, True, torch.bfloat16), (True, False, None), (False, True, None)):
        monkeypatch.setattr(module.Args, "bfloat16", able)
        args = module.Args(compile=False, bfloat16=wanted)
        assert module.Agent(args, 7, 3, torch.device("cpu")).dtype is dtype


def test_subnormal_numbers_are_zero(script, tmp_path):
    """In both threads, or else networks with large activations, as on Humanoid-v4, slow down several times."""
    flags = ["--env-id", "InvertedPendulum-v4", "--learning-starts", 50, "--total-timesteps", 60, *small_flags(script)]
    count = "print((torch.full(({},), 1e-38) / 10).count_nonzero().item())"
    code = f"import {script} as script, sys, torch; {count.format(10)}"
    code += f"; script.main(*script.parse(sys.argv[1:])); {count.format(10**6)}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", code, *map(str, flags)]
    out = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    assert (out.splitlines()[0], out.splitlines()[-1]) == ("10", "0")


def test_trains_without_a_compiler(script, tmp_path):
    """Where there is no C++ compiler, or one that dies, --compile is without effect, and without a word."""
    flags = [flag for flag in small_flags(script) if flag != "--no-compile"] + ["--compile", "--learning-starts", 50]
    flags += ["--env-id", "InvertedPendulum-v4", "--total-timesteps", 60, "--eval-frequency", 60]
    processes = {}
    for name in ("none", "dies"):
        folder = tmp_path / name
        folder.mkdir()
        compiler = folder / "g++"
        if name == "dies":
            compiler.write_text(
                "#!/bin/sh\necho 'g++ (GCC) 12.2.0'\ncase $1 in --version) ;; *) kill -INT $$ ;; esac\n"
            )
            compiler.chmod(0o755)
        env = {"PATH": "", "CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
        processes[folder] = start_process(script, *flags, cwd=folder, env=env)
    for folder, process in processes.items():
        out, err = process.communicate()
        assert process.returncode == 0 and err == "", err
        device, evaluation = out.splitlines()
        assert device.startswith("device: cpu") and evaluation.startswith("evaluation at step 60: ")
        assert list(folder.glob("runs/*/model.pt"))


@needs_cuda
@pytest.mark.parametrize("script", SMALL)
def test_trains_on_cuda(script, tmp_path, monkeypatch, capsys):
    """main() with --cuda, from the warm-up to the model file, and from its checkpoint on; the first line names it."""
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    settings = {"env_id": "Hopper-v4", "total_timesteps": 400, "learning_starts": 200, "batch_size": 32}
    module.main(module.Args(**settings, buffer_size=10_000, eval_episodes=2, **SMALL[script]))
    assert capsys.readouterr().out.startswith("device: cuda\n")
    (path,) = tmp_path.glob("runs/*/model.pt")
    module.main(*module.parse(["--resume", str(path), "--total-timesteps", "500"]))
    assert torch.load(path, weights_only=True)["step"] == 500
