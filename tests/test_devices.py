"""torch.compile, CUDA and CUDA graphs compute what eager PyTorch computes on the CPU, from the same noise."""

import contextlib
import importlib
import shutil

import pytest
import torch
from conftest import command_line, small_flags

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
@pytest.mark.parametrize("device, compile", [
    pytest.param("cpu", True, marks=needs_compiler),
    pytest.param("cuda", False, marks=needs_cuda),
    pytest.param("cuda", True, marks=needs_cuda),
])  # fmt: skip
def test_updates_agree_with_eager_on_the_cpu(script, device, compile, noise_from_the_cpu):
    """Every metric of four updates in a row, so that gradients and moving averages count too."""
    agents = make_agent(script)[1], make_agent(script, device, compile=compile)[1]
    expected, found = (run(agent, torch.Generator().manual_seed(0), 4) for agent in agents)
    assert sum("rsm_loss" in update or "actor_loss" in update for update in expected) >= 2
    for update, reference in zip(found, expected, strict=True):
        assert update == pytest.approx(reference, rel=2e-3, abs=1e-4)


@needs_cuda
@pytest.mark.parametrize("script", SMALL)
@pytest.mark.parametrize("compile", [False, True])
def test_cuda_graphs_agree_with_no_graphs(script, compile):
    """Twelve updates: the first three as they are, then recorded, then replayed; noise from one seed on the device."""
    metrics = []
    for cudagraphs in (False, True):
        with torch.cuda.stream(torch.cuda.Stream()):
            _, agent = make_agent(script, "cuda", compile=compile, cudagraphs=cudagraphs)
            metrics.append(run(agent, torch.Generator("cuda").manual_seed(0)))
    for update, reference in zip(*metrics, strict=True):
        assert update == pytest.approx(reference, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("script", SMALL)
def test_cuda_graph_bookkeeping(script, monkeypatch):
    """CudaGraph with a stand-in for CUDA's recording, which runs nothing, and for its replay, which runs the function
    on the recorded inputs and overwrites the recorded outputs: twelve updates are those of an agent without graphs."""

    class Graph:
        def register_generator_state(self, generator):
            self.generator = generator

        def replay(self):
            self.replays += 1
            found = self.owner.function(self.owner.inputs, self.generator)
            copy(found, self.owner.outputs)

    def copy(source, target):
        for s, t in zip(tensors(source), tensors(target), strict=True):
            t.copy_(s)

    def tensors(tree):
        return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]

    @contextlib.contextmanager
    def record(graph, stream):
        states = [o.state_dict() for o in vars(agent).values() if isinstance(o, torch.optim.Optimizer)]
        mutable = [t.detach() for t in (*agent.parameters(), *agent.buffers(), *tensors(states))]
        before, noise = [t.clone() for t in mutable], graph.generator.get_state()
        yield
        copy(before, mutable)
        graph.generator.set_state(noise)
        graph.replays = 0

    for name, stand_in in {"CUDAGraph": Graph, "graph": record, "current_stream": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    _, agent = make_agent(script)
    expected = run(agent, torch.Generator().manual_seed(0))
    module, agent = make_agent(script)
    for name in ("update_critics", "update_policy"):
        setattr(agent, name, module.CudaGraph(getattr(agent, name)))
        getattr(agent, name).graph.owner = getattr(agent, name)
    assert run(agent, torch.Generator().manual_seed(0)) == expected
    assert agent.update_critics.graph.replays == 9
    assert agent.update_policy.graph.replays == 12 // agent.args.policy_frequency - 3


def test_bfloat16_is_for_the_reverse_diffusion_only(monkeypatch):
    """With bfloat16, denoiser products differ from float32 by its rounding; the critics see and give float32."""
    _, agent = make_agent("sdac_continuous_action")
    obs, *_ = next(random_batches(1))
    called = []
    critics = agent.critics.forward
    monkeypatch.setattr(agent.critics, "forward", lambda o, a: called.append((a, critics(o, a))) or called[-1][1])
    for agent.args.bfloat16 in (False, True):
        agent.sample(agent.policy, obs, torch.Generator().manual_seed(0), None)
    (exact, _), (rounded, rounded_q) = called
    assert {x.dtype for pair in called for x in pair} == {torch.float32}
    assert torch.equal(rounded_q, critics(obs, rounded)) and not torch.is_autocast_enabled("cpu")
    difference = (rounded - exact).abs()
    assert 2**-16 < difference.mean() < 2**-8  # 8 bits of precision, and clipped coordinates without any difference


def test_matrix_products_keep_float32(module, small_args):
    """set_up_torch chooses a library for matrix products, but none that rounds to bfloat16 (or TF32)."""
    args = small_args()
    device = module.set_up_torch(args)
    x, w, batched = torch.randn(512, 256), torch.randn(256, 256), torch.randn(2, 512, 256)
    for found, exact in [
        (x @ w, x.double() @ w.double()),
        (x.T @ x, x.T.double() @ x.double()),
        (torch.nn.functional.linear(x, w), x.double() @ w.double().T),
        (batched @ w, batched.double() @ w.double()),
        (batched.mT @ batched, batched.mT.double() @ batched.double()),
    ]:
        assert device.type == "cpu" and (found - exact).abs().max() < 1e-5 * exact.abs().max()


def test_trains_without_a_compiler(script, tmp_path):
    """Where there is no C++ compiler, --compile says that it is off, and the run goes on."""
    flags = [flag for flag in small_flags(script) if flag != "--no-compile"] + ["--compile", "--learning-starts", 50]
    env = {"PATH": "", "CXX": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    flags += ["--env-id", "InvertedPendulum-v4", "--total-timesteps", 60]
    process = command_line(script, *flags, cwd=tmp_path, env=env)
    assert process.returncode == 0 and process.stderr == ""
    assert process.stdout.splitlines()[1].startswith("compile: off") and list(tmp_path.glob("runs/*/model.pt"))


@needs_cuda
@pytest.mark.parametrize("script", SMALL)
@pytest.mark.parametrize("cudagraphs", [False, True])
def test_trains_on_cuda(script, cudagraphs, tmp_path, monkeypatch, capsys):
    """main() with --cuda from the warm-up to the model file; the first line names the GPU."""
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    settings = {
        "env_id": "Hopper-v4",
        "total_timesteps": 400,
        "learning_starts": 200,
        "batch_size": 32,
        "cudagraphs": cudagraphs,
    }
    module.main(module.Args(**settings, buffer_size=10_000, eval_episodes=2, **SMALL[script]))
    assert capsys.readouterr().out.startswith(f"device: {torch.cuda.get_device_name()}")
    assert list(tmp_path.glob("runs/*/model.pt"))
