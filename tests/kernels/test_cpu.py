"""The CPU library beyond single ops: when it runs, its packed weights, threads and refusals."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from erq_kernels import _cpu, dispatch, explain, formats, ops, reference

pytestmark = pytest.mark.skipif(
    not _cpu.supported_variants() and "cpu" not in os.environ.get("ERQ_TEST_REQUIRE", ""),
    reason="the CPU library is not built",
)

# An op's arguments by name.
Call = dict[str, Any]


def linear(m: int, n: int, k: int, first: int = 0, seed: int = 0) -> Call:
    """A GEMM of full-range operands with codes out."""
    rng = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=rng),
        "weight": torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=rng),
        "scale": torch.rand(n, generator=rng) / 500,
        "scale2": torch.rand(n, generator=rng) / 500 if first else None,
        "split": first or k,
        "bias": torch.randn(n, generator=rng),
        "residual": torch.randn(m, n, generator=rng),
        "out_inv_scale": torch.rand(n, generator=rng) / 4,
        "out_zero_point": torch.randint(0, 16, (n,), dtype=torch.int32, generator=rng),
        "out_bits": 4,
    }


def attention(t: int, d: int, bits: int, zero_points: tuple[int, int, int] | None = None) -> Call:
    """Two heads of queries, keys and values."""
    q, k, v = (torch.randint(0, 2**bits, (1, 2, t, d)) - formats.code_offset(bits) for _ in "qkv")
    zeros = zero_points or (2 ** (bits - 1),) * 3
    spread = 12 / 4**bits / d**0.5
    return {
        "q": q.to(torch.int8),
        "k": k.to(torch.int8),
        "v": v.to(torch.int8),
        **{
            f"{n}_zero_point": torch.tensor(z, dtype=torch.int32)
            for n, z in zip("qkv", zeros, strict=True)
        },
        "score_scale": torch.tensor(2 * spread),
        "p_inv_scale": torch.tensor(1.25),
        "value_scale": torch.tensor(0.01),
        "qk_bits": bits,
        "av_bits": bits,
    }


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_auto_on_a_cpu_is_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("ERQ_BACKEND", raising=False)
    call = linear(2, 8, 16)
    assert dispatch.select("qlinear", "auto", *(call[n] for n in list(call)[:6])) == "cpu"
    call = attention(5, 8, 4)
    assert dispatch.select("qattention", "auto", *call.values()) == "cpu"


@pytest.mark.parametrize(
    ("m", "n", "k", "first"), [(197, 1152, 416, 96), (197, 384, 1536, 0), (100, 1000, 384, 0)]
)
def test_layers_of_a_vision_transformer(
    m: int, n: int, k: int, first: int, cpu_variant: str
) -> None:
    call = linear(m, n, k, first)
    assert torch.equal(ops.qlinear(**call), reference.qlinear(**call))


@pytest.mark.parametrize("first", [0, 40])
def test_columns_of_zeros_at_a_segments_end(first: int, cpu_variant: str) -> None:
    for zeros in (1, 3, 4, 30, 40):
        call = linear(7, 70, 80, first)
        call["weight"][:, 80 - zeros :] = 0
        if first:
            call["weight"][:, first - zeros : first] = 0
        assert torch.equal(ops.qlinear(**call), reference.qlinear(**call))
    call["weight"].zero_()
    assert torch.equal(ops.qlinear(**call), reference.qlinear(**call))


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_wide_values_equal_the_reference(bits: int, cpu_variant: str) -> None:
    call = attention(50, 24, bits) | {"score_scale": torch.tensor(40 * 12 / 4**bits / 24**0.5)}
    got, want = ops.qattention(**call), reference.qattention(**call)
    scores = reference.attention_scores(
        call["q"], call["k"], call["q_zero_point"], call["k_zero_point"], (bits, bits),
        call["score_scale"],
    )  # fmt: skip
    level = -2 * (scores.double().softmax(-1) * call["p_inv_scale"]).log2()
    # A level up to 255 has an error of 255 · 2⁻²³ in fp32.
    decided = ((level - level.floor() - 0.5).abs() > 1e-4).all(-1).transpose(1, 2)
    assert int(decided.sum()) > decided.numel() // 2
    torch.testing.assert_close(got[decided], want[decided], rtol=1e-6, atol=0)


def test_zero_points_whose_scores_exceed_32_bits(cpu_variant: str) -> None:
    call = attention(21, 40, 4, zero_points=(2**14, 2**14 + 3, 9))
    call["score_scale"] = torch.tensor(2.0**-21)
    got, want = ops.qattention(**call), reference.qattention(**call)
    assert torch.isfinite(got).all()
    assert float((got - want).abs().max()) < 1e-6


def test_thread_counts_and_own_threads_change_nothing(threads: None, cpu_variant: str) -> None:
    gemm, heads = linear(130, 200, 96, 32), attention(197, 64, 4)
    x, weight, bias = torch.randn(100, 70), torch.rand(70), torch.randn(70)
    norm = (x, weight, bias, 1e-6, torch.tensor(3.0), torch.tensor(8, dtype=torch.int32), 4)

    def run() -> list[Tensor]:
        return [ops.qlinear(**gemm), ops.qattention(**heads), ops.layer_norm_quantize(*norm)]

    torch.set_num_threads(1)
    want = run()
    set_parallel = _cpu._library().set_parallel
    for parallel in (_cpu._openmp_parallel(), 0):
        set_parallel(parallel)
        try:
            for count in (2, 3, 7):
                torch.set_num_threads(count)
                assert all(map(torch.equal, run(), want))
        finally:
            set_parallel(_cpu._openmp_parallel())


def test_calls_from_several_threads(cpu_variant: str) -> None:
    calls = [linear(20 + i, 70 + i, 64, 32, seed=i) for i in range(6)]
    want = [reference.qlinear(**call) for call in calls]

    def work(start: int) -> bool:
        torch.set_grad_enabled(False)
        with dispatch.use("cpu"):
            order = [(start + i) % len(calls) for i in range(60)]
            return all(torch.equal(ops.qlinear(**calls[i]), want[i]) for i in order)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


def test_memory_stays_flat() -> None:
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        pytest.skip("no /proc")

    def resident() -> int:
        gc.collect()
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    gemm, heads = linear(8, 64, 64), attention(9, 16, 4)
    shared = gemm["weight"]
    with torch.no_grad():
        for i in range(11_000):
            if i == 1000:
                before, entries = resident(), len(_cpu._packed_weights)
            # A new weight now and then, whose packed form goes with it.
            gemm["weight"] = shared.clone() if i % 10 == 0 else shared
            ops.qlinear(**gemm, backend="cpu")
            ops.qattention(**heads, backend="cpu")
    assert len(_cpu._packed_weights) <= entries
    assert resident() - before < 4 * 2**20


def test_a_changed_weight_is_packed_again() -> None:
    for inference in (False, True):
        with torch.inference_mode(inference):
            call = linear(5, 20, 48)
            for _ in range(3):
                assert torch.equal(ops.qlinear(**call, backend="cpu"), reference.qlinear(**call))
                call["weight"].add_(3)
            call["split"], call["scale2"] = 16, call["scale"] * 3  # the same weight, cut elsewhere
            assert torch.equal(ops.qlinear(**call, backend="cpu"), reference.qlinear(**call))


def test_packed_weights_go_with_their_source() -> None:
    before = len(_cpu._packed_weights)
    call = linear(5, 20, 48)
    for _ in range(3):
        ops.qlinear(**call, backend="cpu")
    assert len(_cpu._packed_weights) == before + 1
    del call
    gc.collect()
    assert len(_cpu._packed_weights) == before


def test_an_order_outside_the_channels_is_refused() -> None:
    x, w = torch.randn(3, 8), torch.ones(8)
    quantizer = (torch.tensor(2.0), torch.tensor(3, dtype=torch.int32), 4)
    for wrong in (-1, 8):
        order = torch.tensor([0, wrong])
        with pytest.raises(ValueError, match=r"order must name channels 0\.\.7"):
            ops.layer_norm_quantize(x, w, w, 1e-6, *quantizer, order, backend="cpu")


def test_another_default_device_does_not_matter() -> None:
    call = linear(3, 8, 16)
    want = reference.qlinear(**call)
    with torch.no_grad(), torch.device("meta"):
        assert torch.equal(ops.qlinear(**call, backend="cpu"), want)


def test_tracing_and_profiling_see_the_op() -> None:
    call = linear(3, 8, 16) | {"backend": "cpu"}
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = {n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in call.items()}
            assert ops.qlinear(**fake).shape == (3, 8)
        with torch.profiler.profile() as profile:
            ops.qlinear(**call)
        assert "erq::qlinear" in {e.key for e in profile.key_averages()}
        compiled = torch.compile(lambda: ops.qlinear(**call), backend="eager", fullgraph=True)
        assert torch.equal(compiled(), ops.qlinear(**call))


def test_variants_are_the_processors() -> None:
    names = _cpu.supported_variants()
    assert names[0] == "plain" and names == _cpu.VARIANTS[: len(names)]
    with _cpu.use_variant("plain"):
        assert _cpu.variant() == "plain"
    with pytest.raises(ValueError, match=r"unknown or unsupported CPU variant 'neon'.*plain"):
        _cpu.use_variant("neon").__enter__()


@pytest.mark.parametrize(("name", "printed"), [("plain", "plain\n"), ("sse", "")])
def test_the_environment_forces_a_variant(name: str, printed: str) -> None:
    code = "from erq_kernels import _cpu; print(_cpu.variant())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ERQ_CPU_VARIANT": name, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == printed
    assert bool(printed) or "unknown or unsupported CPU variant 'sse'" in done.stderr


@pytest.fixture
def reload(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Lets a test load another library, or none."""
    _cpu._load.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    _cpu._load.cache_clear()


def test_reasons_why_there_is_no_library(reload: pytest.MonkeyPatch, tmp_path: Path) -> None:
    x, zero_point = torch.zeros(2), torch.zeros((), dtype=torch.int32)

    def reason() -> str:
        _cpu._load.cache_clear()
        return explain("quantize", x, x[0], zero_point, 4)["cpu"]

    with reload.context() as patch:
        patch.setattr(_cpu, "_ABI", -1)
        assert "has interface" in reason() and reason().endswith("build it again")
    reload.setattr(_cpu, "PATH", tmp_path / "liberq_cpu.so")
    assert reason().startswith("liberq_cpu.so is not built: install erq where a C++ compiler is")
    with pytest.raises(dispatch.BackendError, match=r"cpu: liberq_cpu\.so is not built"):
        ops.quantize(x, x[0], zero_point, 4, backend="cpu")
    (tmp_path / "liberq_cpu.so").write_text("no library")
    assert "does not load" in reason()
    if not torch.cuda.is_available():
        assert dispatch.select("quantize", "auto", x, x[0], zero_point, 4) == "reference"


def test_tensors_elsewhere_are_refused() -> None:
    x = torch.zeros(2, device="meta")
    assert explain("quantize", x, x[0], x[0].int(), 4)["cpu"] == (
        "needs tensors on the CPU, got one on meta"
    )
