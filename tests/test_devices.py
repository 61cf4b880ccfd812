"""What compilers and GPUs compute is what eager PyTorch computes on the CPU."""

import shutil

import pytest
import torch
from conftest import evaluated_steps, finish, load, needs_cuda, start_process

import sac_continuous_action as sac
import sdac_continuous_action as sdac

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")


SEEDED = torch.Generator().manual_seed(0)
OBS = 100 * torch.randn(64, 7, generator=SEEDED)
ACTIONS = torch.rand(64, 2, 3, generator=SEEDED)
NETWORKS = {
    "critics": (sdac.Critics, OBS, ACTIONS),
    "denoiser, one level": (sdac.Denoiser, OBS, ACTIONS, torch.tensor(5)),
    "denoiser, levels": (sdac.Denoiser, OBS, ACTIONS, torch.arange(64) % 6),
    "actor": (sac.Actor, OBS),
}


@needs_compiler
@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_networks_agree_with_eager_ones(name):
    """Values and gradients, also where mish's single exponential would overflow."""
    make, *inputs = NETWORKS[name]
    torch.manual_seed(0)
    network, found = make(7, 3), []
    for _ in ("eager", "compiled"):
        network.zero_grad()
        outputs = network(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(output.square().mean() for output in outputs).backward()
        values = [output.detach() for output in outputs]
        found.append([*values, *(p.grad.clone() for p in network.parameters())])
        network.compile(dynamic=True)
    assert network._compiled_call_impl and found[0][0].abs().max() > 1
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)


def test_networks_are_compiled_if_a_compiler_works(train, capsys, monkeypatch):
    """All of them on a CPU, and none with --no-compile."""
    given = []
    monkeypatch.setattr(sdac, "train", lambda agent, *_: given.append(agent))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    train("--compile")
    train("--no-compile")
    compiled, eager = ([n._compiled_call_impl for n in agent.children()] for agent in given)
    assert all(compiled) and not any(eager) and len(compiled) == 4
    assert "compiler" not in capsys.readouterr().out


def test_without_a_compiler_the_run_goes_on(tmp_path):
    """No compiler, or one that fails: one sentence says so."""
    processes = []
    for name in ("none", "fails"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "fails":
            (folder / "g++").write_text("#!/bin/sh\n[ $1 = --version ] && echo 12.2.0 || exit 1\n")
            (folder / "g++").chmod(0o755)
        env = {"PATH": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
        processes.append((folder, start_process("--compile", cwd=folder, env=env)))
    for folder, process in processes:
        status, out, err = finish(process)
        assert status == 0 and err == "", err
        assert "No C++ compiler works here: the networks run uncompiled." in out.splitlines()
        (run_dir,) = folder.glob("runs/*")
        assert evaluated_steps(run_dir) == [20, 40]


def test_subnormal_numbers_are_flushed(train):
    """Or else networks with large activations, as on Humanoid-v4, slow down several times."""
    torch.set_flush_denormal(False)
    train()
    assert (torch.full((1000,), 1e-38) / 10).count_nonzero() == 0


# With a GPU
VARIANTS = {
    "sac": (sac, {}),
    "sdac": (sdac, {}),
    "published": (sdac, {"published": True}),
    "mirror descent": (sdac, {"mirror_descent": True}),
}


@needs_cuda
@pytest.mark.parametrize("name", VARIANTS)
def test_cuda_graphs_change_nothing(monkeypatch, name):
    """30 updates, and the actions after each, are the same bit for bit as kernel by kernel."""
    torch.set_default_device("cuda")
    script, settings = VARIANTS[name]
    results = []
    for graphs in (True, False):
        monkeypatch.setattr(script, "CudaGraph", script.CudaGraph if graphs else lambda f: f)
        torch.manual_seed(0)
        agent, found = script.Agent(script.Args(**settings), 7, 3), []
        act = script.CudaGraph(agent.act)
        for _ in range(30):
            obs, actions, next_obs = torch.randn(64, 7), torch.rand(64, 3), torch.randn(64, 7)
            ends = (torch.rand(64) < 0.1).float()
            agent.update((obs, 2 * actions - 1, torch.randn(64), next_obs, ends), 0.1)
            found += [value.clone() for value in (*agent.metrics.values(), act(obs[:5]))]
        assert hasattr(act, "graph") == graphs
        results.append([*found, *agent.state_dict().values()])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@needs_cuda
@pytest.mark.parametrize("script", [sac, sdac])
def test_a_run_goes_on_on_another_device(train, script, capsys):
    """From the GPU to the CPU and back."""
    run_dir = train("--cuda", script=script)
    assert capsys.readouterr().out.startswith("device: cuda\n")
    for total, device in ((60, "--no-cuda"), (80, "--cuda")):
        train("--resume", run_dir, "--total-timesteps", total, device, script=script)
    assert evaluated_steps(run_dir) == [20, 40, 60, 80]
    assert all(value.isfinite().all() for value in load(run_dir)["agent"].values())
