"""torch.compile and CUDA compute what eager PyTorch computes on the CPU, from the same noise."""

import importlib
import shutil

import pytest
import torch

SMALL = {
    "sdac_continuous_action": {"denoising_steps": 5, "num_particles": 4, "num_reverse_samples": 8},
    "sac_continuous_action": {},
}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


def updates(module, device, monkeypatch, **settings):
    """Metrics of four updates; all noise is drawn on the CPU, so that every device gets the same."""
    for name in ("rand", "randn", "randint"):
        draw = getattr(torch, name)

        def on_cpu(*args, draw=draw, generator, device="cpu", **kwargs):
            return draw(*args, generator=generator, **kwargs).to(device)

        monkeypatch.setattr(torch, name, on_cpu)
    torch.manual_seed(0)
    agent = module.Agent(module.Args(**settings), 7, 3, torch.device(device))
    generator = torch.Generator().manual_seed(0)
    obs, actions, rewards, next_obs = (torch.randn(n, generator=generator) for n in ((64, 7), (64, 3), (64,), (64, 7)))
    batch = (obs, actions.clamp(-1, 1), rewards, next_obs, (rewards > 1).float())
    metrics = [agent.update([x.to(device) for x in batch], generator) for _ in range(4)]
    monkeypatch.undo()
    return [{name: value.item() for name, value in update.items()} for update in metrics]


@pytest.mark.parametrize("script", SMALL)
@pytest.mark.parametrize("device, compile", [
    pytest.param("cpu", True, marks=needs_compiler),
    pytest.param("cuda", False, marks=needs_cuda),
    pytest.param("cuda", True, marks=needs_cuda),
])  # fmt: skip
def test_updates_agree_with_eager_on_the_cpu(script, device, compile, monkeypatch):
    """Every metric of four updates in a row, so that gradients and moving averages count too."""
    module = importlib.import_module(script)
    expected = updates(module, "cpu", monkeypatch, **SMALL[script])
    found = updates(module, device, monkeypatch, compile=compile, **SMALL[script])
    assert sum("rsm_loss" in update or "actor_loss" in update for update in expected) >= 2
    for update, reference in zip(found, expected, strict=True):
        assert update == pytest.approx(reference, rel=2e-3, abs=1e-4)


@needs_cuda
@pytest.mark.parametrize("script", SMALL)
def test_trains_on_cuda(script, tmp_path, monkeypatch, capsys):
    """main() with --cuda from the warm-up to the model file; the first line names the GPU."""
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    settings = {"env_id": "Hopper-v4", "total_timesteps": 400, "learning_starts": 200, "batch_size": 32}
    module.main(module.Args(**settings, buffer_size=10_000, eval_episodes=2, **SMALL[script]))
    assert capsys.readouterr().out.startswith(f"device: {torch.cuda.get_device_name()}")
    assert list(tmp_path.glob("runs/*/model.pt"))
