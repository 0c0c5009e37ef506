"""Every backend's GEMM against the reference: bit by bit, or as close after an activation.

Codes are compared for equality; erf and exp differ from torch's in the last bits, which none of the
values drawn here turns into another code.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from erq_kernels import configs, dispatch, explain, ops, reference
from erq_kernels.configs import GemmConfig

# An op's arguments by name.
Call = dict[str, Any]

# numpy, under the interpreter, warns of what the kernel counts on: exp(−2u) = inf gives GELU −0.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def build(m: int, n: int, k: int, first: int, device: torch.device) -> Call:
    """Random operands with 4-bit codes, all scales different."""
    return {
        "x": torch.randint(0, 16, (m, k), dtype=torch.int8, device=device),
        "weight": torch.randint(-15, 16, (n, k), dtype=torch.int8, device=device),
        "scale": torch.rand(n, device=device) / 64 + 1 / 256,
        "scale2": torch.rand(n, device=device) / 16 + 1 / 64 if first else None,
        "split": first or k,
        "bias": torch.randn(n, device=device),
    }


def with_epilogue(call: Call, residual: torch.dtype = torch.float32) -> Call:
    """The call with a LayerScale and a residual."""
    m, n = call["x"].shape[0], call["weight"].shape[0]
    device = call["x"].device
    return call | {
        "layer_scale": torch.randn(n, device=device),
        "residual": torch.randn(m, n, device=device).to(residual),
    }


def with_codes(call: Call, bits: int, per_column: bool) -> Call:
    """The call with an output quantizer whose range covers some of the values."""
    shape = (call["weight"].shape[0],) if per_column else ()
    device = call["x"].device
    return call | {
        "out_inv_scale": torch.rand(shape, device=device) * 2**bits / 4 + 0.2,
        "out_zero_point": torch.randint(-3, 2**bits + 3, shape, dtype=torch.int32, device=device),
        "out_bits": bits,
    }


def run(call: Call) -> Tensor:
    return ops.qlinear(**call)


def expected(call: Call) -> Tensor:
    return reference.qlinear(**call)


def is_interpreted(device: torch.device) -> bool:
    return device.type == "cpu" and dispatch.chosen() == "triton"


def cannot_run(config: GemmConfig, device: torch.device) -> str | None:
    """Why this device would run another configuration in place of this one."""
    if config.kernel == "pointers":
        return None
    if is_interpreted(device):
        return "Gluon has no interpreter" if config.kernel == "gluon" else None
    capability = torch.cuda.get_device_capability()
    if config.kernel == "gluon" and capability != (9, 0):
        return "the Gluon kernel needs compute capability 9.0"
    return None if capability >= (9, 0) else "descriptors need compute capability 9.0 or newer"


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize("first", [0, 32])
def test_codes_equal_the_reference(
    bits: int, per_column: bool, first: int, device: torch.device, poison: None
) -> None:
    call = with_codes(with_epilogue(build(5, 70, 96, first, device)), bits, per_column)
    got = run(call)
    assert got.dtype == torch.int8
    assert torch.equal(got, expected(call))
    assert got.unique().numel() > 2 ** min(bits - 1, 6)
    assert torch.equal(run(call), got)


@pytest.mark.parametrize(
    ("m", "n", "k", "first"),
    [
        (1, 1, 1, 0),
        (1, 33, 32, 0),
        (17, 8, 200, 0),  # K over the edge of a step
        (33, 65, 31, 0),  # K of no alignment
        (70, 130, 160, 32),
        (3, 40, 200, 96),  # a long first segment
        (3, 40, 197, 5),  # segments of no alignment
        (3, 40, 130, 129),
        (197, 48, 64, 32),
    ],
)
def test_odd_sizes(m: int, n: int, k: int, first: int, device: torch.device, poison: None) -> None:
    call = build(m, n, k, first, device)
    assert torch.equal(run(call), expected(call))
    call = with_codes(with_epilogue(call), 4, True)
    assert torch.equal(run(call), expected(call))


CONFIGS = {
    "one dot": GemmConfig(64, 64, 64),
    "two dots": GemmConfig(32, 64, 128, dots=2),
    "four pieces": GemmConfig(16, 128, 32),
    "one piece": GemmConfig(32, 32, 64, dots=2),
    "narrow groups": GemmConfig(16, 32, 64, group_m=3),
    "descriptors": GemmConfig(64, 64, 128, kernel="tma"),
    "wide descriptors": GemmConfig(16, 128, 64, kernel="tma"),
    "gluon": GemmConfig(64, 128, 128, kernel="gluon"),
    "gluon, two warp groups": GemmConfig(128, 64, 64, num_warps=8, num_stages=4, kernel="gluon"),
}


@pytest.mark.parametrize("first", [0, 32, 96])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_way_to_cut_it_up(
    config: GemmConfig,
    first: int,
    triton_device: torch.device,
    poison: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if reason := cannot_run(config, triton_device):
        pytest.skip(reason)
    monkeypatch.setattr(configs, "choose", lambda *_: config)
    call = with_codes(with_epilogue(build(70, 130, 224, first, triton_device)), 8, True)
    assert torch.equal(run(call), expected(call))


def test_descriptors_are_for_aligned_operands(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "choose", lambda *_: CONFIGS["descriptors"])
    for call in (
        build(5, 33, 40, 0, triton_device),  # a row stride of 40 bytes
        build(5, 33, 96, 40, triton_device),  # a second segment that begins at byte 40
        build(5, 33, 97, 0, triton_device) | {"split": 96},
    ):
        call["x"], call["weight"] = call["x"][:, :96], call["weight"][:, :96]
        assert torch.equal(run(call), expected(call))


def test_identity_gives_the_weight(device: torch.device) -> None:
    k = 96
    call = build(k, 40, k, 32, device) | {
        "x": torch.eye(k, dtype=torch.int8, device=device),
        "weight": torch.randint(-128, 128, (40, k), dtype=torch.int8, device=device),
    }
    scale, scale2, weight = call["scale"], call["scale2"], call["weight"].float()
    columns = torch.cat([weight[:, :32] * scale[:, None], weight[:, 32:] * scale2[:, None]], dim=1)
    assert torch.equal(run(call), columns.t() + call["bias"])


@pytest.mark.parametrize("first", [0, 32])
@pytest.mark.parametrize(("x", "w"), [(-128, -128), (127, -128), (127, 127), (0, 5)])
def test_extreme_codes(x: int, w: int, first: int, device: torch.device) -> None:
    k = 1056
    call = build(3, 34, k, first, device)
    call["x"].fill_(x)
    call["weight"].fill_(w)
    call["bias"].zero_()
    got = run(call)
    assert torch.equal(got, expected(call))
    if not first:
        assert torch.equal(got, (call["scale"] * float(x * w * k)).expand(3, 34))


def test_a_result_far_outside_the_quantizer(device: torch.device) -> None:
    call = with_codes(build(6, 40, 32, 0, device), 4, False)
    call["bias"] = torch.tensor([3e38, -3e38, torch.inf, -torch.inf, 0.0], device=device).repeat(8)
    for zero_point in (-(2**21), -5, 0, 15, 300, 2**21):
        call["out_zero_point"] = torch.tensor(zero_point, dtype=torch.int32, device=device)
        assert torch.equal(run(call), expected(call))


def test_halves_round_to_even(device: torch.device) -> None:
    call = with_codes(build(2, 64, 32, 0, device), 8, False) | {
        "bias": torch.arange(-32, 32, device=device) / 2,
        "out_inv_scale": torch.ones((), device=device),
        "out_zero_point": torch.tensor(100, dtype=torch.int32, device=device),
    }
    call["weight"].zero_()
    code = call["bias"].round() + 100 - 128
    assert torch.equal(run(call), code.to(torch.int8).expand(2, 64))


@pytest.mark.parametrize("residual", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("first", [0, 32])
def test_float_results_equal_the_reference(
    residual: torch.dtype, first: int, device: torch.device, poison: None
) -> None:
    call = with_epilogue(build(19, 70, 96, first, device), residual)
    exact = expected(call)
    assert torch.equal(run(call), exact)
    assert torch.equal(run(call | {"out_dtype": torch.float16}), exact.half())
    got = run(call | {"out_dtype": torch.bfloat16})
    assert got.dtype == torch.bfloat16
    if is_interpreted(device):  # which cuts the low half off instead of rounding
        cut = (exact.view(torch.int32) & -65536).view(torch.float32)
        assert ((got.float() == cut) | (got == exact.bfloat16())).all()
    else:
        assert torch.equal(got, exact.bfloat16())


def exact_gelu(y: Tensor, act: str) -> Tensor:
    return torch.nn.functional.gelu(
        y.double(), approximate="tanh" if act == "gelu_tanh" else "none"
    )


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_activation_is_as_close_as_torch(
    act: str, dtype: torch.dtype, device: torch.device
) -> None:
    n = 1024
    call = build(4, n, 32, 0, device)
    call["bias"] = torch.linspace(-12, 12, n, device=device)
    call["scale"] = torch.full((n,), 1e-4, device=device)
    # The activation's input is the same fp32 number here, in torch and in fp64.
    exact = exact_gelu(expected(call), act)
    call |= {"act": act, "out_dtype": dtype}
    error = (run(call).double() - exact).abs().max()
    assert error <= 2 * (expected(call).double() - exact).abs().max()
    assert error > 0


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh"])
def test_activation_at_the_ends(act: str, device: torch.device) -> None:
    bias = torch.tensor([0.0, 1e-30, -1e-30, 30.0, -30.0, 3e4, -3e4, 1e30, -1e30], device=device)
    call = build(1, len(bias), 32, 0, device) | {"bias": bias, "act": act}
    call["weight"].zero_()
    got = run(call)[0]
    assert torch.allclose(got, expected(call)[0], rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("first", [0, 32])
def test_codes_after_an_activation(
    act: str, first: int, device: torch.device, poison: None
) -> None:
    call = with_codes(with_epilogue(build(9, 70, 96, first, device)), 4, True) | {"act": act}
    assert torch.equal(run(call), expected(call))


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 32), (5, 0, 32), (0, 0, 0), (4, 5, 0)])
def test_empty(m: int, n: int, k: int, device: torch.device, poison: None) -> None:
    call = build(m, n, k, 0, device)
    got = run(call)
    assert got.shape == (m, n)
    assert torch.equal(got, call["bias"].expand(m, n))
    assert run(with_codes(call, 4, False)).shape == (m, n)


def test_views_are_read_in_place(device: torch.device, poison: None) -> None:
    call = with_epilogue(build(20, 34, 96, 32, device))
    wide = torch.full((40, 128), 99, dtype=torch.int8, device=device)
    for rows, columns in ((slice(0, 20), slice(16, 112)), (slice(0, 40, 2), slice(3, 99))):
        view = wide.clone()[rows, columns]
        view.copy_(call["x"])
        assert torch.equal(run(call | {"x": view}), expected(call))
    for name in ("x", "weight", "residual"):
        turned = call[name].t().contiguous().t()
        assert not turned.is_contiguous()
        assert torch.equal(run(call | {name: turned}), expected(call))
    spread = call["scale"].repeat_interleave(2)[::2]
    assert torch.equal(run(call | {"scale": spread}), expected(call))
    one_row = call["residual"][:1].expand(20, 34)
    assert torch.equal(run(call | {"residual": one_row}), expected(call | {"residual": one_row}))


def test_what_it_refuses(device: torch.device) -> None:
    call = with_epilogue(build(2, 3, 32, 0, device))
    backend = dispatch.chosen()
    assert explain("qlinear", **call)[backend] == "usable"
    for change, reason in (
        ({"scale": call["scale"].double()}, "scale must be float32, got torch.float64"),
        ({"bias": call["bias"].half()}, "bias must be float32, got torch.float16"),
        (
            {"residual": call["residual"].double()},
            "residual must be float16, bfloat16 or float32, got torch.float64",
        ),
        (
            {"out_dtype": torch.float64},
            "out_dtype must be float16, bfloat16 or float32, got torch.float64",
        ),
    ):
        assert explain("qlinear", **(call | change))[backend] == reason
    # The dtype of a float result does not matter to codes.
    codes = with_codes(call, 4, False) | {"out_dtype": torch.float64}
    assert explain("qlinear", **codes)[backend] == "usable"


def test_opcheck(device: torch.device) -> None:
    for call in (
        with_epilogue(build(3, 34, 64, 0, device)) | {"out_dtype": torch.float16, "act": "gelu"},
        with_codes(build(3, 34, 64, 32, device), 4, True),
    ):
        torch.library.opcheck(torch.ops.erq.qlinear.default, (), call)


REAL = [(50432, 1152, 416, 32), (50432, 384, 1536, 0), (1576, 192, 224, 32), (197, 4096, 1024, 0)]


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k", "first"), REAL)
@pytest.mark.parametrize("config", [None, *(c for c in CONFIGS.values() if c.kernel != "pointers")])
def test_real_shapes(
    config: GemmConfig | None,
    m: int,
    n: int,
    k: int,
    first: int,
    triton_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if is_interpreted(triton_device):
        pytest.skip("hours in the interpreter")
    if config is not None:
        if reason := cannot_run(config, triton_device):
            pytest.skip(reason)
        monkeypatch.setattr(configs, "choose", lambda *_: config)
    call = with_codes(with_epilogue(build(m, n, k, first, triton_device)), 4, True)
    want = expected(call)
    for _ in range(3):  # a race shows in some runs only
        assert torch.equal(run(call), want)


def test_the_gluon_kernel_falls_back_where_it_cannot_run(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cannot_run(CONFIGS["gluon"], triton_device) is None:
        pytest.skip("it can run here")
    monkeypatch.setattr(configs, "choose", lambda *_: CONFIGS["gluon"])
    call = build(5, 33, 96, 32, triton_device)
    assert torch.equal(run(call), expected(call))
