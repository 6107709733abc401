"""The body of the fused CUDA kernel, run on the CPU on devices of several sizes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from ops import test_select_merge as of_every_backend
from ops.cases import Args, generator, laid_out, random_mask, select_merge_case
from ops.checks import assert_bitwise, assert_same, check_select_merge

import consensusdrop_kernels as cdrop

from .emulated import Device, last

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FUSIONS = ("rank", "rrf", "sum", "zscore", "product", "max")

#: Blocks that meet through memory, and clusters of several sizes, in and out of the threads' order.
DEVICES = {
    "grid": Device(80, 6),
    "cluster": Device(90, 7, max_cluster=4, order=2),
    "wide": Device(90, 31),
}
#: One block a sample, two of them at a time, and clusters of two.
MORE_DEVICES = {
    **DEVICES,
    "rounds": Device(86, 2, order=1),
    "alone": Device(90, 1, max_cluster=1),
    "pair": Device(90, 3, max_cluster=2),
}
on_all = pytest.mark.parametrize("device", MORE_DEVICES.values(), ids=MORE_DEVICES)
on_two = pytest.mark.parametrize(
    "device", [DEVICES["grid"], DEVICES["cluster"]], ids=["grid", "cluster"]
)


class Emulated:
    """A device under test, used like the backends of every other test."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def own(self, op):
        return self.device.op

    def place_all(self, args):
        return args


@pytest.fixture(params=DEVICES)
def backend(request):
    return Emulated(DEVICES[request.param])


# What is asked of every backend; a function of the package is not behind the emulator.
globals().update(
    (name, test)
    for name, test in vars(of_every_backend).items()
    if name.startswith("test_") and name != "test_the_function_is_the_op"
)


def check_as_reference(device: Device, args: Args) -> None:
    """Indices and sizes as the definition has them, where the oracle's bounds say little: NaN."""
    with cdrop.use_backend("reference"):
        tokens, *refs = torch.ops.cdrop.select_merge(**args)
    ours, *outs = device.op(**args)
    assert_same(outs, refs)
    eps = torch.finfo(tokens.dtype).eps
    torch.testing.assert_close(ours, tokens, rtol=2 * eps, atol=1e-6, equal_nan=True)


def everything(batch: int, tokens: int, keep: int, **more) -> Args:
    """A case that goes through every phase: masks, priorities, weights, an lse, a prefix."""
    args = select_merge_case(
        batch, tokens, keep, prefix=3, width=136, heads=4, groups=2, fusion="zscore",
        **{"contextual": 5, "blend": 0.5, **more},
    )  # fmt: skip
    args["valid"] = random_mask((batch, tokens), seed=3, share=0.9)
    args["txt_weight"] = torch.rand(batch, args["q_txt"].shape[2], generator=generator(1))
    args["priority"] = torch.rand(tokens, generator=generator(2))
    args["priority_keep"] = keep // 4
    return args


# --- how the work is laid out --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "batch", "path", "ranks", "samples"),
    [
        (Device(80, 6), 1, "grid", 6, 1),
        (Device(80, 6), 4, "grid", 1, 4),
        (Device(80, 2), 5, "grid", 1, 2),
        (Device(90, 1), 2, "cluster", 1, 2),
        (Device(90, 3, max_cluster=2), 1, "cluster", 2, 1),
        (Device(90, 8), 2, "cluster", 4, 2),
        (Device(90, 31), 1, "cluster", 16, 1),
        (Device(80, 40), 1, "grid", 17, 1),  # more ranks than prefix keys, rows or column blocks
    ],
    ids=str,
)
def test_paths(device, batch, path, ranks, samples):
    check_select_merge(device.op, everything(batch, 130, 24))
    ran = last()
    assert (ran.path, ran.ranks, ran.samples) == (path, ranks, samples)


@pytest.mark.parametrize("device", [Device(80, 16), Device(90, 5)], ids=str)
@pytest.mark.parametrize("text", [False, True])
def test_little_shared_memory(device, text):
    """Less and less, until a call does not fit: more ranks a sample, fewer samples at a time."""
    args = select_merge_case(3, 120, 20, text=text, rows_vis=16, rows_txt=20, width=300, prefix=2)
    device.op(**args)
    seen = {last().ranks}
    while True:
        device = dataclasses.replace(device, shared_bytes=last().shared_bytes - 1)
        try:
            check_select_merge(device.op, args)
        except RuntimeError as error:
            assert "shared memory" in str(error)  # noqa: PT017
            break
        seen.add(last().ranks)
        assert last().shared_bytes <= device.shared_bytes
    assert len(seen) >= 3, seen


@pytest.mark.parametrize("batch", [2, 3, 5])
@pytest.mark.parametrize("processors", [1, 2, 4])
def test_more_samples_than_blocks(batch, processors):
    """In rounds, of which the last may leave blocks idle."""
    args = select_merge_case(batch, 40, 9, contextual=3, prefix=1)
    for device in (Device(80, processors), Device(90, processors, max_cluster=2)):
        check_select_merge(device.op, args)


@on_all
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_threads_changes_no_bit(device, dtype):
    for contextual in (0, 5):
        args = everything(3, 90, 20, contextual=contextual, dtype=dtype)
        outs = [dataclasses.replace(device, order=order).op(**args) for order in range(4)]
        for other in outs[1:]:
            assert_same(other, outs[0])


def test_devices_choose_alike():
    """Where the work is split changes sums in their last bits alone."""
    args = everything(2, 200, 40)
    outs = [device.op(**args) for device in MORE_DEVICES.values()]
    for other in outs[1:]:
        assert_same(other[1:], outs[0][1:])
        torch.testing.assert_close(other[0], outs[0][0], rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused():
    args = select_merge_case(1, 33, 9)
    with pytest.raises(RuntimeError, match="older than compute capability"):
        Device(75).op(**args)
    with pytest.raises(RuntimeError, match="wider than 128"):
        Device().op(**select_merge_case(1, 33, 9, head_dim=136))
    with pytest.raises(RuntimeError, match="a diverse choice is asked for"):
        Device().op(**args, diversity=0.5)
    with pytest.raises(RuntimeError, match="keep must be in 1..N=33, got 34"):
        Device().op(**{**args, "keep": 34})


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "tokens", "keep"),
    [
        ("grid", 576, 64), ("wide", 729, 182), ("cluster", 1024, 1023), ("grid", 2880, 160),
        ("wide", 2880, 720), ("alone", 577, 144), ("pair", 1025, 1),
    ],
)  # fmt: skip
def test_many_tokens(device, tokens, keep):
    args = select_merge_case(1, tokens, keep, heads=2, head_dim=16, prefix=1, contextual=keep // 9)
    check_select_merge(MORE_DEVICES[device].op, args)


@on_two
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 40, 129, 257, 1032])
def test_widths(device, dtype, width):
    """Rows that can't be read 16 bytes at a time, and more than one block of columns."""
    case = select_merge_case(2, 60, 12, width=width, contextual=3, dtype=dtype)
    check_select_merge(device.op, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 3, 8, 20, 63, 72, 80, 88, 96, 127, 128])
def test_head_widths_in_every_dtype(dtype, head_dim):
    case = select_merge_case(1, 50, 12, head_dim=head_dim, dtype=dtype, prefix=1, rows_txt=17)
    check_select_merge(DEVICES["grid"].op, case)


@on_all
@pytest.mark.parametrize(
    ("heads", "groups", "rows"), [(4, 4, 1), (4, 1, 7), (7, 1, 64), (14, 2, 8), (3, 3, 16)]
)
def test_rows_and_groups(device, heads, groups, rows):
    case = select_merge_case(
        1, 41, 9, heads=heads, groups=groups, rows_txt=rows, rows_vis=2, dtype=torch.bfloat16,
        head_dim=32,
    )  # fmt: skip
    check_select_merge(device.op, case)


@on_two
@pytest.mark.parametrize("prefix", [0, 1, 5, 40])
def test_prefixes(device, prefix):
    check_select_merge(device.op, select_merge_case(2, 41, 9, prefix=prefix))


@on_two
@pytest.mark.parametrize("contextual", [1, 30, 31, 32, 80])
@pytest.mark.parametrize("masked", [False, True])
def test_contextual(device, contextual, masked):
    """Few, as many as are dropped, and more."""
    args = select_merge_case(2, 40, 9, contextual=contextual)
    if masked:
        args["valid"] = torch.arange(40).expand(2, 40) < torch.tensor([[12], [5]])
    check_select_merge(device.op, args)


@on_all
@pytest.mark.parametrize("blend", [0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_long_list(device, blend, dtype):
    """Most tokens join one slot, so that its sum is put together from many pieces."""
    for keep, contextual in ((3, 0), (5, 1), (1, 2)):
        args = select_merge_case(
            1, 700, keep, width=150, contextual=contextual, blend=blend, dtype=dtype, heads=2
        )
        metric = torch.randn(1, 700, 8, generator=generator(1))
        metric[:, 100:650] = metric[:, :1]
        _, _, assign, size = check_select_merge(device.op, {**args, "metric": metric})
        assert int(size.max()) >= 300
        assert int((assign >= 0).sum()) == int(size.sum()) == 700


@pytest.mark.parametrize("dtype", [*DTYPES, None])
@pytest.mark.parametrize("features", [1, 5, 64, 200, 513])
def test_metrics(dtype, features):
    args = select_merge_case(2, 60, 12, dtype=torch.bfloat16)
    metric = torch.randn(2, 60, features, generator=generator(1))
    if dtype is None:  # a last stride other than 1
        args["metric"] = metric.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        args["metric"] = metric.to(dtype)
    for device in DEVICES.values():
        check_select_merge(device.op, args)


# --- inputs --------------------------------------------------------------------------------------


@on_two
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_fusions_with_masks(device, fusion, alpha):
    args = select_merge_case(4, 70, 15, fusion=fusion, alpha=alpha, prefix=1, contextual=4)
    args["valid"] = random_mask((4, 70), seed=5, share=0.7)
    args["valid"][1, 7:] = False
    args["valid"][2] = False
    check_select_merge(device.op, args)


@on_two
@pytest.mark.parametrize("sides", [("vis",), ("txt",), ("vis", "txt")], ids="-".join)
@pytest.mark.parametrize("txt_reduce", ["mean", "max"])
def test_lse(device, sides, txt_reduce):
    """On one side or both; rows with an infinite one give nothing."""
    args = select_merge_case(2, 50, 9, prefix=2, rows_vis=3, txt_reduce=txt_reduce)
    for side in sides:
        args = of_every_backend.with_lse(args, side)
        lse = args[f"lse_{side}"]
        lse[0, 0, 1], lse[0, 1, 2], lse[1, 2, 0] = math.inf, -math.inf, math.inf
    check_select_merge(device.op, args)
    args[f"lse_{sides[0]}"] = torch.full_like(args[f"lse_{sides[0]}"], math.inf)
    check_select_merge(device.op, args)
    args["fusion"] = "sum"
    check_select_merge(device.op, args)


@on_two
@pytest.mark.parametrize("txt_reduce", ["mean", "max"])
@pytest.mark.parametrize("given", [False, True])
def test_dead_rows(device, txt_reduce, given):
    """Rows of weight 0 are never looked at, whatever they and their lse hold."""
    args = select_merge_case(3, 50, 9, txt_reduce=txt_reduce, rows_txt=6)
    if given:
        args = of_every_backend.with_lse(args, "txt")
        args["lse_txt"][:, :, 2] = math.nan
    args["txt_weight"] = torch.rand(3, 6, generator=generator(2))
    args["txt_weight"][:, 2] = 0
    args["txt_weight"][1] = 0
    args["q_txt"][:, :, 2] = math.nan
    args["q_txt"][1, :, 3] = math.inf
    check_select_merge(device.op, args)


@on_two
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("where", ["q_vis", "k_vis", "q_txt", "k_txt", "x", "metric", "prefix"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_numbers(device, lse, where, value):
    """In any input: what becomes of them is defined, token by token."""
    args = select_merge_case(2, 40, 9, prefix=2, rows_vis=2, contextual=0 if lse else 3)
    args["metric"] = torch.randn(2, 40, 12, generator=generator(1))
    if lse:
        args = of_every_backend.with_lse(of_every_backend.with_lse(args, "vis"), "txt")
    if where == "prefix":
        args["k_vis"][0, 1, 1, 5] = value
    elif where in ("x", "metric"):
        args[where][0, 3:30:4, 5] = value
    else:
        args[where][0, 1, -1, 5] = value
    for fusion in ("rank", "zscore", "max"):
        check_as_reference(device, {**args, "fusion": fusion})
    del args["metric"]
    check_as_reference(device, args)


@on_two
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-7, 1e4, 3e38])
def test_tiny_and_huge_numbers(device, dtype, size):
    """No square of the metric overflows or vanishes, and sums of x stay as exact as they can."""
    args = select_merge_case(1, 60, 12, contextual=0, dtype=dtype)
    most = torch.finfo(dtype).max
    args["metric"] = (torch.randn(1, 60, 20, generator=generator(3)) * size).clamp(-most, most)
    args["metric"] = args["metric"].to(dtype)
    if size > 1e-7 or dtype != torch.float16:  # of whose denormals a mean has no relative precision
        args["x"] = (args["x"].float().clamp(-1, 1) * min(size, most / 64)).to(dtype)
    args["x"][:, ::2] *= -0.0 if size == 0 else 1.0
    check_select_merge(device.op, args)


@on_two
@pytest.mark.parametrize("scale", [0.0, 1e-30, 3.0])
def test_flat_and_sharp_attention(device, scale):
    """From all logits equal, where the first tokens win, to nearly all the attention on one."""
    for txt_reduce in ("mean", "max"):
        args = select_merge_case(
            2, 60, 12, prefix=1, scale_vis=scale, scale_txt=scale / 2, txt_reduce=txt_reduce
        )
        _, index, *_ = check_select_merge(device.op, args)
        if scale == 0.0:
            assert index.tolist() == [list(range(12))] * 2


@on_all
@pytest.mark.parametrize("dtype", DTYPES)
def test_keep_all_is_the_identity_bitwise(device, dtype):
    x = torch.randn(2, 40, 51, generator=generator(1)).to(dtype)
    special = [math.nan, math.inf, -math.inf, -0.0, 1e-40, torch.finfo(dtype).max]
    x.view(-1)[: 7 * len(special) : 7] = torch.tensor(special).to(dtype)
    args = {**select_merge_case(2, 40, 40, dtype=dtype), "x": x, "contextual": 2}
    tokens, index, assign, size = device.op(**args)
    assert_bitwise(tokens[:, :40].contiguous(), x)
    assert not tokens[:, 40:].any()
    assert index.tolist() == [[*range(40), -1, -1]] * 2
    assert assign.tolist() == [list(range(40))] * 2
    assert size.tolist() == [[1.0] * 40 + [0.0] * 2] * 2


@on_two
def test_a_token_alone_keeps_its_bits(device):
    """With a blend of 0, or when nobody joins it."""
    args = select_merge_case(1, 40, 9, dtype=torch.float16, width=51)
    args["x"][0, ::3, ::5] = math.nan
    for more in ({"blend": 0.0}, {"threshold": 2.0}, {"blend": 0.0, "contextual": 3}):
        tokens, index, _, size = device.op(**{**args, **more})
        assert_bitwise(tokens[0], args["x"][0, index[0]])
        assert (float(size.max()) == 1) == ("threshold" in more)


@on_two
@pytest.mark.parametrize("layout", ["offset", "gapped", "transposed", "batch"])
@pytest.mark.parametrize("name", ["x", "q_vis", "k_vis", "q_txt", "k_txt", "metric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layout_of_one_input(device, layout, name, dtype):
    """Each by itself off its 16 bytes, strided, or the same for every sample."""
    args = select_merge_case(2, 40, 9, prefix=1, dtype=dtype)
    args["metric"] = torch.randn(2, 40, 24, generator=generator(1)).to(dtype)
    if layout == "batch":
        args[name] = args[name][:1].expand_as(args[name])
    else:
        args[name] = laid_out(args[name], layout)
    check_select_merge(device.op, args)


@on_two
def test_strided_masks_and_weights(device):
    args = everything(2, 40, 9)
    for name in ("valid", "txt_weight"):
        wide = args[name].repeat_interleave(2, 1)
        args[name] = wide[:, ::2]
    args = of_every_backend.with_lse(args, "txt")
    args["lse_txt"] = args["lse_txt"].transpose(0, 2).contiguous().transpose(0, 2)
    args["priority"] = args["priority"][:1].expand(2, 40)
    check_select_merge(device.op, args)


@pytest.mark.parametrize("x", DTYPES)
@pytest.mark.parametrize("vis", DTYPES)
@pytest.mark.parametrize("txt", DTYPES)
def test_mixed_dtypes(x, vis, txt):
    args = select_merge_case(1, 50, 9, prefix=1, contextual=2)
    for name in args:
        to = {"x": x, "q_vis": vis, "k_vis": vis, "q_txt": txt, "k_txt": txt}.get(name)
        args[name] = args[name] if to is None else args[name].to(to)
    check_select_merge(DEVICES["cluster"].op, args)
