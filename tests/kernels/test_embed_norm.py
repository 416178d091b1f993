"""fusenc.kernels.embed_norm against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contract import assert_contract
from fusenc.kernels import embed_norm, last_backend, sinusoidal_positions
from fusenc.kernels.common import dropout
from fusenc.kernels.embed_norm.arguments import Options, Tables
from fusenc.kernels.embed_norm.op import EMBED_NORM
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import SAME_ALGORITHM

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
kernel = pytest.mark.kernel


def tables(width, device, rows=40, positions=50, types=2):
    generator = torch.Generator().manual_seed(1)
    shapes = ((rows, width), (positions, width), (types, width), (width,), (width,))
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def tokens(shape, device, rows=40, types=2, seed=2):
    generator = torch.Generator().manual_seed(seed)
    ids, type_ids = (torch.randint(0, n, shape, generator=generator) for n in (rows, types))
    return ids.to(device), type_ids.to(device)


def plain(ids, word, position=None, type_=None, weight=None, bias=None, positions=None, type_ids=None, rms=False,
          eps=1e-12, padding_idx=None):  # fmt: skip
    z = F.embedding(ids, word, padding_idx)
    if type_ is not None:
        z = z + F.embedding(torch.zeros_like(ids) if type_ids is None else type_ids, type_)
    if position is not None:
        z = z + F.embedding(
            torch.arange(ids.shape[-1], device=ids.device) if positions is None else positions, position
        )
    if rms:
        z = F.rms_norm(z, z.shape[-1:], weight, eps)
        return z if bias is None else z + bias
    return F.layer_norm(z, z.shape[-1:], weight, bias, eps)


def hold(device, shape, width, dtype, norm="layer", with_positions=True, types=2, position_ids=False, type_ids=True):
    rows = torch.Size(shape).numel()
    ids, kinds = tokens(shape, device, types=max(types, 1))
    kinds = kinds if types and type_ids else None
    word, position, type_, weight, bias = tables(width, device, types=max(types, 1))
    where = None
    if position_ids:
        where = torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(5)).to(device)
    inputs, names = [word], ["word"]
    for name, tensor, on in (("position", position, with_positions), ("type", type_, types)):
        if on:
            inputs.append(tensor)
            names.append(name)
    inputs += [weight, bias]

    def split(args):
        given_ = dict(zip(names, args, strict=False))
        return given_["word"], given_.get("position"), given_.get("type"), *args[-2:]

    options = {"eps": 1e-6}

    def ours(*args):
        return embed_norm(ids, *split(args), position_ids=where, token_type_ids=kinds, norm=norm, **options)

    def reference(*args):
        return plain(ids, *split(args), where, kinds, norm == "rms", **options)

    assert_contract(ours, reference, inputs, dtype, summed=dict.fromkeys(range(len(inputs)), rows))


@kernel
@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 33, 96, 768])
@pytest.mark.essential
def test_all_embeddings(device, backend, dtype, width):
    hold(device, (3, 9), width, dtype)
    assert last_backend() == backend


@kernel
@pytest.mark.interpreter
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(
    "options",
    [
        {"with_positions": False, "types": 0}, {"types": 0}, {"types": 1}, {"type_ids": False}, {"types": 5},
        {"types": 5, "type_ids": False}, {"position_ids": True}, {"with_positions": False},
    ],
    ids=str,
)  # fmt: skip
def test_options(device, norm, options):
    hold(device, (5, 14), 48, torch.float32, norm, **options)


@kernel
@pytest.mark.parametrize("shape", [(1,), (200,), (2, 3, 17), (70, 2), (1, 50)], ids=str)
def test_shapes_of_ids(device, shape):
    hold(device, shape, 40, torch.float32, position_ids=shape[-1] > 50)


@kernel
@pytest.mark.parametrize("width", [640, 4608, 16384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_rows(device, width, dtype):
    hold(device, (2, 3), width, dtype)


@kernel
@pytest.mark.interpreter
def test_long_segments_and_padding(device):
    """Ids whose tokens fill several stretches, begin and end inside one, or end where one ends."""
    ids = torch.tensor([0] * 100 + [3] * 28 + [4] * 32 + [5] + [6] * 700 + [7] * 2)
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))].to(device)
    word, *_ = tables(24, device)
    for padding in (None, 6, -40):

        def ours(word, padding=padding):
            return embed_norm(ids, word, padding_idx=padding, eps=1e-6)

        def reference(word, padding=padding):
            return plain(ids, word, padding_idx=padding, eps=1e-6)

        assert_contract(ours, reference, [word], torch.float32, summed={0: 700})
    word = word.requires_grad_()
    (grad,) = torch.autograd.grad(embed_norm(ids, word, padding_idx=6).sin().sum(), word)
    assert (grad[6] == 0).all() and (grad[8:] == 0).all() and (grad[7] != 0).any()


@kernel
@pytest.mark.interpreter
@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
@pytest.mark.essential
def test_dropout_after_the_norm_uses_the_documented_mask(device, dropout_p):
    ids, kinds = tokens((4, 9), device)  # the width is three chunks
    torch.manual_seed(3)
    dropped = dropout.drop_mask(dropout.new_seed(ids), torch.Size((4, 9, 96)), dropout_p)
    factor = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0

    def ours(*args):
        torch.manual_seed(3)
        return embed_norm(ids, *args, token_type_ids=kinds, dropout_p=dropout_p)

    def reference(*args):
        return (plain(ids, *args, type_ids=kinds) * factor).masked_fill(dropped, 0.0)

    assert_contract(ours, reference, tables(96, device), torch.float32, summed=dict.fromkeys(range(5), 36))
    inputs = tables(96, device)
    assert torch.equal(embed_norm(ids, *inputs, dropout_p=0.9, training=False), embed_norm(ids, *inputs))


@kernel
def test_gradients_of_a_constant_table_are_not_computed(device):
    word, *_ = tables(16, device)
    word = word.requires_grad_()
    positions = sinusoidal_positions(50, 16, device=device)
    (grad,) = torch.autograd.grad(embed_norm(tokens((2, 5), device)[0], word, positions).sum(), word)
    assert grad.shape == word.shape and positions.grad is None


@kernel
@pytest.mark.parametrize("positions", ["counted", "given", "broadcast"])
def test_a_plan_serves_other_batches_and_lengths(device, positions):
    leaves = [t.requires_grad_() for t in tables(20, device)]
    for shape in ((1, 1), (0, 4), (3, 1), (2, 50), (40, 3), (1, 5)):
        ids, kinds = tokens(shape, device)
        where = {"counted": None, "given": ids, "broadcast": ids[:1]}[positions] if shape[0] else None
        outs = [
            embed_norm(ids, *leaves, position_ids=where, token_type_ids=kinds, eps=1e-6),
            plain(ids, *leaves, where, kinds, eps=1e-6),
        ]
        grads = [torch.autograd.grad(out.sin().sum(), leaves) for out in outs]
        for got, want in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
            torch.testing.assert_close(got, want, rtol=10 * SAME_ALGORITHM, atol=10 * SAME_ALGORITHM)


@kernel
def test_int32_ids_and_broadcast_position_ids(device):
    ids, kinds = tokens((3, 9), device)
    inputs = tables(20, device)
    where = torch.arange(9, device=device)
    expected = embed_norm(ids, *inputs, token_type_ids=kinds)
    for positions in (where, where[None].int()):
        got = embed_norm(ids.int(), *inputs, position_ids=positions, token_type_ids=kinds.int())
        torch.testing.assert_close(got, expected, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)


@kernel
@pytest.mark.parametrize("layout", ["column step", "one number", "transposed"])
def test_ids_of_any_layout(device, layout):
    """Such as a view whose flat form is a view too, with steps between its elements."""
    ids, kinds = tokens((3, 8), device)
    where = torch.randint(0, 50, (3, 8), generator=torch.Generator().manual_seed(5)).to(device)
    if layout == "column step":
        ids, where, kinds = ids[:, ::2], where[:, 1::2], kinds[:, ::2]
    elif layout == "one number":
        ids, where, kinds = ids[:1, :1].expand(3, 8), where[0, 0], kinds[0, :1]
    else:
        ids, where, kinds = ids.t(), where.t(), kinds.t()

    def ours(*args):
        return embed_norm(ids, *args, position_ids=where, token_type_ids=kinds)

    def reference(*args):
        return plain(ids, *args, where, kinds)

    assert_contract(ours, reference, tables(20, device), torch.float32, summed=dict.fromkeys(range(5), 24))


@kernel
@pytest.mark.interpreter
@pytest.mark.parametrize("which", ["input_ids", "position_ids", "token_type_ids"])
@pytest.mark.parametrize("value", [-1, 50, 2**33])
def test_ids_out_of_range(device, request, which, value):
    ids, kinds = tokens((2, 4), device)
    where = torch.arange(4, device=device).repeat(2, 1)
    named = {"input_ids": ids, "position_ids": where, "token_type_ids": kinds}
    named[which][1, 2] = value
    leaves = [t.requires_grad_() for t in tables(16, device)]

    def call(**options):
        return embed_norm(named["input_ids"], *leaves, position_ids=where, token_type_ids=kinds, **options)

    with pytest.raises(IndexError, match=rf"^{which}: expected ids from 0 to \d+, got {value}"):
        call(check_ids=True)
    if request.config.getoption("--device") == "cpu":
        with pytest.raises(IndexError, match=f"^{which}"):
            call()
        return
    out = call()
    bad = torch.zeros(2, 4, dtype=torch.bool, device=device)
    bad[1, 2] = True
    assert out[bad].isnan().all() and not out[~bad].isnan().any()
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(device)
    grads = torch.autograd.grad(out, leaves, weights)
    named[which][1, 2] = 0
    expected = torch.autograd.grad(call()[~bad], leaves, weights[~bad])
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)


@kernel
@pytest.mark.interpreter
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_row_without_variance_is_finite(device, norm):
    word = torch.zeros(2, 16, device=device) if norm == "rms" else torch.full((2, 16), 0.5, device=device)
    word.requires_grad_()
    out = embed_norm(torch.zeros(3, dtype=torch.long, device=device), word, norm=norm, eps=0.0)
    assert (out == 0).all()
    assert torch.autograd.grad(out.sum(), word)[0].isfinite().all()


@kernel
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_what_is_not_finite_spreads_over_its_token_as_in_torch(device, norm):
    word = torch.randn(3, 16, device=device)
    word[0, 3], word[1, 5] = float("nan"), float("inf")
    ids = torch.arange(3, device=device)
    for eps in (1e-6, 0.0):
        expected = plain(ids, word, rms=norm == "rms", eps=eps)
        assert torch.equal(embed_norm(ids, word, norm=norm, eps=eps).isnan(), expected.isnan())


@kernel
def test_two_runs_give_the_same_bits(device):
    ids, kinds = tokens((20, 30), device)

    def run():
        torch.manual_seed(1)
        inputs = [t.half().requires_grad_() for t in tables(50, device)]
        out = embed_norm(ids, *inputs, token_type_ids=kinds, dropout_p=0.1)
        return out, *torch.autograd.grad(out.sin().sum(), inputs)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@kernel
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,)])
def test_empty(device, shape):
    ids = torch.zeros(shape, dtype=torch.long, device=device)
    leaves = [t.requires_grad_() for t in tables(8, device)]
    out = embed_norm(ids, *leaves)
    assert out.shape == (*shape, 8)
    assert all((grad == 0).all() for grad in torch.autograd.grad(out.sum(), leaves))


@kernel
@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 6), length=st.integers(1, 50), width=st.integers(1, 300), dtype=st.sampled_from(DTYPES),
    norm=st.sampled_from(["layer", "rms"]), with_positions=st.booleans(), types=st.integers(0, 4),
    position_ids=st.booleans(), type_ids=st.booleans(),
)  # fmt: skip
def test_random_combinations(
    request, batch, length, width, dtype, norm, with_positions, types, position_ids, type_ids
):  # fmt: skip
    device = "cuda" if request.config.getoption("--device") in ("ttsem", "cuda") else "cpu"
    position_ids = position_ids and with_positions
    hold(device, (batch, length), width, dtype, norm, with_positions, types, position_ids, type_ids)


IDS, WORD = torch.tensor([[1, 2, 0]]), torch.randn(5, 8)
SQUARE = IDS.repeat(3, 1)  # as many sequences and tokens as columns: tables of three dimensions would broadcast


@pytest.mark.parametrize(
    ("arguments", "options", "error", "named"),
    [
        ((IDS.float(), WORD), {}, TypeError, "input_ids"),
        (([1, 2], WORD), {}, TypeError, "input_ids"),
        ((IDS[0, 0], WORD), {}, ValueError, "input_ids"),
        ((IDS.to("meta"), WORD), {}, ValueError, "input_ids"),
        ((IDS, WORD.long()), {}, TypeError, "word_weight"),
        ((IDS, WORD[0]), {}, ValueError, "word_weight"),
        ((IDS, WORD[:0]), {}, ValueError, "word_weight"),
        ((IDS, WORD, WORD[:, :4]), {}, ValueError, "position_weight"),
        ((IDS, WORD, WORD.half()), {}, TypeError, "position_weight"),
        ((IDS, WORD, WORD[:2]), {}, ValueError, "position_weight"),
        ((IDS, WORD, None, WORD[:, :4]), {}, ValueError, "type_weight"),
        ((IDS, WORD, None, WORD[:0]), {}, ValueError, "type_weight"),
        ((IDS, WORD, None, None, WORD[0, :4]), {}, ValueError, "norm_weight"),
        ((IDS, WORD, None, None, None, WORD), {}, ValueError, "norm_bias"),
        ((IDS, WORD), {"position_ids": IDS}, ValueError, "position_ids"),
        ((IDS, WORD, WORD), {"position_ids": IDS[:, :2]}, ValueError, "position_ids"),
        ((IDS, WORD, WORD), {"position_ids": IDS.float()}, TypeError, "position_ids"),
        ((IDS, WORD), {"token_type_ids": IDS}, ValueError, "token_type_ids"),
        ((IDS, WORD, None, WORD), {"token_type_ids": IDS.repeat(2, 1)}, ValueError, "token_type_ids"),
        ((IDS, WORD, None, WORD), {"token_type_ids": IDS.to("meta")}, ValueError, "token_type_ids"),
        ((IDS, WORD, WORD), {"position_ids": IDS.to("meta")}, ValueError, "position_ids"),
        ((IDS, WORD, WORD.to("meta")), {}, ValueError, "position_weight"),
        ((IDS, WORD, None, WORD.to("meta")), {}, ValueError, "type_weight"),
        ((SQUARE, WORD[:, :3], torch.randn(3, 3, 3)), {}, ValueError, "position_weight"),
        ((SQUARE, WORD[:, :3], None, torch.randn(2, 3, 3)), {}, ValueError, "type_weight"),
        ((IDS[:0], WORD[:0]), {}, ValueError, "word_weight"),
        ((IDS, WORD[:, :0]), {}, ValueError, "word_weight"),
        ((IDS[:0], WORD, None, WORD[:0]), {"token_type_ids": IDS[:0]}, ValueError, "type_weight"),
        ((IDS[:0], WORD, WORD[:0]), {"position_ids": IDS[:0]}, ValueError, "position_weight"),
        ((IDS, WORD), {"norm": "batch"}, ValueError, "norm"),
        ((IDS, WORD), {"eps": -1.0}, ValueError, "eps"),
        ((IDS, WORD), {"eps": torch.tensor(0.1), "norm": "rms"}, ValueError, "eps"),
        ((IDS, WORD), {"dropout_p": 1.5}, ValueError, "dropout_p"),
        ((IDS, WORD), {"dropout_p": torch.tensor(0.5)}, TypeError, "dropout_p"),
        ((IDS, WORD), {"padding_idx": 5}, ValueError, "padding_idx"),
        ((IDS, WORD), {"padding_idx": 1.0}, ValueError, "padding_idx"),
        ((IDS, WORD), {"padding_idx": torch.tensor(1)}, ValueError, "padding_idx"),
    ],
)
def test_bad_input(arguments, options, error, named):
    with pytest.raises(error, match=f"^{named}: expected .*, got "):
        embed_norm(*arguments, **options)


def test_sinusoidal_positions():
    table = sinusoidal_positions(7, 5, dtype=torch.float64)
    assert table.shape == (7, 5)
    angle = 3 / 10000 ** (2 / 5)
    torch.testing.assert_close(table[3, 2:4], torch.tensor([angle], dtype=torch.float64).repeat(2).mul(1).sin()
                               .where(torch.tensor([True, False]), torch.tensor(angle).double().cos()))  # fmt: skip
    for name, value in (("length", -1), ("d_model", 0), ("base", float("nan")), ("base", "10")):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            sinusoidal_positions(**({"length": 3, "d_model": 4} | {name: value}))
    for dtype in (torch.int64, None):
        with pytest.raises(TypeError, match=r"^dtype: expected float32"):
            sinusoidal_positions(3, 4, dtype=dtype)


def operands(seed=None, rms=False, position_ids=None, type_ids=None):
    word, position, type_, weight, bias = (t.requires_grad_() for t in tables(6, "cpu"))
    ids = torch.tensor([[3, 4, 4], [0, 1, 3]])
    filled = Tables(word, position, type_, weight, bias, ids, position_ids, type_ids, seed)
    return *filled, *Options(0.3 if seed is not None else 0.0, 1e-6, rms, 0, False, False), [True] * 5


CASES = {
    "plain": {}, "dropout": {"seed": torch.tensor([5])}, "rms": {"rms": True},
    "ids": {"position_ids": torch.tensor([[1, 0, 2]]), "type_ids": torch.tensor([[0, 1, 1], [0, 0, 1]])},
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_opcheck(case):
    torch.library.opcheck(EMBED_NORM.operator, operands(**CASES[case]))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("broadcast", [False, True], ids=["", "broadcast ids"])
def test_compiles_whole_with_the_same_result(dynamic, broadcast):
    torch._dynamo.reset()

    def call(ids, kinds, *args):
        return embed_norm(ids, *args, token_type_ids=kinds[:1] if broadcast else kinds, padding_idx=3)

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    leaves = [t.requires_grad_() for t in tables(12, "cpu")]
    for shape in ((2, 5), (3, 7)):
        both = [function(*tokens(shape, "cpu"), *leaves) for function in (compiled, call)]
        grads = [torch.autograd.grad(out.sin().sum(), leaves) for out in both]
        for got, want in zip((both[0], *grads[0]), (both[1], *grads[1]), strict=True):
            torch.testing.assert_close(got, want, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)


def test_gradcheck():
    leaves = [t.double().requires_grad_() for t in tables(4, "cpu", 6, 3)]
    ids = torch.tensor([[1, 5, 1]])

    def call(*args):
        torch.manual_seed(0)
        return embed_norm(ids, *args, dropout_p=0.2)

    assert torch.autograd.gradcheck(call, leaves)


def test_autocast_meta_and_checkpoint():
    ids, _ = tokens((2, 5), "cpu")
    half = [t.bfloat16().requires_grad_() for t in tables(8, "cpu")]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = embed_norm(ids, *half)
    assert out.dtype == torch.float32 and torch.autograd.grad(out.sum(), half[0])[0].dtype == torch.bfloat16
    assert embed_norm(ids.to("meta"), *(t.to("meta") for t in half)).is_meta

    leaves = [t.requires_grad_() for t in tables(8, "cpu")]

    def call(*args):
        return embed_norm(ids, *args, dropout_p=0.4).sin().sum()

    torch.manual_seed(1)
    expected = torch.autograd.grad(call(*leaves), leaves)
    torch.manual_seed(1)
    again = torch.autograd.grad(torch.utils.checkpoint.checkpoint(call, *leaves, use_reentrant=False), leaves)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
