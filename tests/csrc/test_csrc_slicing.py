"""take_rows, take_columns and native.take copy exactly what NumPy and PyTorch indexing select."""

import numpy as np
import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st

from bonsai_fast import _C
from bonsai_fast.models.layout import Layout
from bonsai_fast.ops import native

DTYPES = ["bool", "int8", "uint16", "float16", "int32", "float32", "int64", "float64"]
ISAS = _C.instruction_sets()
TENSOR_DTYPES = [
    torch.bool,
    torch.float8_e4m3fn,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]


def kept(index: list[int]) -> np.ndarray:
    return np.array(index, dtype=np.int64)


def random_matrix(rng: np.random.Generator, rows: int, columns: int, dtype: str) -> np.ndarray:
    return rng.integers(0, 100, size=(rows, columns)).astype(dtype)


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    """Dense, row-strided, column-strided, transposed and read-only views, empty ones too."""
    rows, columns = draw(st.integers(0, 40)), draw(st.integers(0, 90))
    row_step, column_step = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    base = random_matrix(rng, rows * row_step, columns * column_step, draw(st.sampled_from(DTYPES)))
    view = base[::row_step, ::column_step]
    view = view.T if draw(st.booleans()) else view
    view.flags.writeable = False
    return view


@st.composite
def indices(draw: st.DrawFn, size: int) -> np.ndarray:
    """Strictly increasing; runs of every length, none and all included."""
    density = draw(st.sampled_from([0.0, 0.2, 0.8, 0.97, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return np.flatnonzero(rng.random(size) < density).astype(np.int64)


@settings(deadline=None)
@given(st.data())
def test_take_rows_agrees_with_numpy(data):
    source = data.draw(matrices())
    index = data.draw(indices(len(source)))
    actual = _C.take_rows(source, index, num_threads=data.draw(st.integers(1, 4)))
    assert actual.dtype == source.dtype and actual.flags.c_contiguous
    np.testing.assert_array_equal(actual, source[index])


@settings(deadline=None)
@given(st.data())
def test_take_columns_agrees_with_numpy(data):
    source = data.draw(matrices())
    index = data.draw(indices(source.shape[1]))
    for isa in ISAS:
        actual = _C.take_columns(source, index, num_threads=data.draw(st.integers(1, 4)), isa=isa)
        assert actual.dtype == source.dtype and actual.flags.c_contiguous
        np.testing.assert_array_equal(actual, source[:, index])


@settings(deadline=None)
@given(st.data())
def test_columns_of_packed_rows_at_any_address(data):
    """Kernels move whole vectors: nothing beside `out` may change, nothing beyond a row be read."""
    dtype = np.dtype(data.draw(st.sampled_from(DTYPES)))
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 300))
    offset, gap = data.draw(st.integers(0, 70)), data.draw(st.integers(0, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    raw = rng.integers(0, 2, size=offset + rows * (columns + gap) * dtype.itemsize, dtype=np.uint8)
    source = raw[offset:].view(dtype).reshape(rows, columns + gap)[:, :columns]
    index = data.draw(indices(columns))
    expected = source[:, index]
    guard = 64
    for isa in ISAS:
        buffer = np.full(expected.nbytes + 2 * guard, 0xAB, dtype=np.uint8)
        out = buffer[guard : guard + expected.nbytes].view(dtype).reshape(expected.shape)
        _C.take_columns(source, index, out=out, isa=isa)
        assert out.tobytes() == expected.tobytes()
        assert (buffer[:guard] == 0xAB).all() and (buffer[guard + expected.nbytes :] == 0xAB).all()


@settings(deadline=None)
@given(st.data())
def test_take_rows_of_a_vector(data):
    source = data.draw(matrices())[:, :1].reshape(-1)[:: data.draw(st.integers(1, 3))]
    index = data.draw(indices(len(source)))
    np.testing.assert_array_equal(_C.take_rows(source, index), source[index])


@pytest.mark.parametrize(
    "take, axis", [(_C.take_rows, 0), (_C.take_columns, 1)], ids=["rows", "columns"]
)
@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_threads_cover_every_row_once(take, axis, num_threads):
    """A wrong split leaves rows out or shifts them; several MiB make every thread start."""
    rng = np.random.default_rng(0)
    source = random_matrix(rng, 1009, 2003, "int32")
    index = np.flatnonzero(rng.random(source.shape[axis]) < 0.7)
    out = np.zeros_like(source.take(index, axis))
    assert take(source, index, out=out, num_threads=num_threads) is out
    np.testing.assert_array_equal(out, source.take(index, axis))


def test_negative_zero_and_nan_keep_their_bits():
    source = np.array([[0x8000_0000, 0x7FC0_1234, 0xFFFF_FFFF]], dtype=np.uint32).view(np.float32)
    actual = _C.take_columns(source, kept([0, 1, 2]))
    np.testing.assert_array_equal(actual.view(np.uint32), source.view(np.uint32))


def test_index_may_be_strided():
    source = np.arange(10.0)
    np.testing.assert_array_equal(_C.take_rows(source, np.arange(10)[::3]), source[::3])


def test_unaligned_source():
    """An array inside a file's bytes starts anywhere."""
    source = np.frombuffer(b"x" + np.arange(12.0).tobytes(), np.float64, offset=1).reshape(3, 4)
    assert not source.flags.aligned
    np.testing.assert_array_equal(_C.take_columns(source, kept([0, 3])), source[:, [0, 3]])


MATRIX = np.zeros((4, 3), dtype=np.float32)
OUT = np.zeros((2, 3), dtype=np.float32)


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "source, index, options, error, message",
    [
        (MATRIX, kept([0, 4]), {}, IndexError, r"index\[1\] is 4, but source has 4 rows"),
        (MATRIX, kept([-1, 2]), {}, IndexError, r"index\[0\] is -1, but source has 4 rows"),
        (MATRIX, kept([0, 2, 1]), {}, ValueError, r"index\[1\] is 2 and index\[2\] is 1"),
        (MATRIX, kept([1, 1]), {}, ValueError, r"index\[0\] is 1 and index\[1\] is 1"),
        (MATRIX, kept([[0]]), {}, ValueError, r"index must be 1-D, got shape \(1, 1\)"),
        (MATRIX, np.array([0], np.int32), {}, TypeError, "index must be int64, got int32"),
        (MATRIX, np.array([0.0]), {}, TypeError, "index must be int64, got float64"),
        (
            MATRIX,
            kept([0]),
            {"num_threads": 0},
            ValueError,
            "num_threads must be at least 1, got 0",
        ),
        (MATRIX.astype("complex64"), kept([0]), {}, TypeError, "got complex64"),
        (MATRIX.astype("longdouble"), kept([0]), {}, TypeError, "got (longdouble|float128)"),
        (MATRIX.astype(object), kept([0]), {}, TypeError, "got object"),
        (MATRIX[None], kept([0]), {}, ValueError, r"1-D or 2-D, got shape \(1, 4, 3\)"),
        (np.zeros(()), kept([0]), {}, ValueError, r"got shape \(\)"),
        ([[1.0]], kept([0]), {}, TypeError, "incompatible function arguments"),
        (MATRIX, kept([0, 1]), {"out": OUT.astype("float64")}, TypeError, "float32, got float64"),
        (MATRIX, kept([0]), {"out": OUT}, ValueError, r"shape \(1, 3\), got \(2, 3\)|\[1, 3\]"),
        (MATRIX, kept([0, 1]), {"out": OUT.T.copy().T}, ValueError, "out must be C-contiguous"),
        (MATRIX, kept([0, 1]), {"out": read_only(OUT.copy())}, ValueError, "out must be writeable"),
        (
            MATRIX,
            kept([0, 1]),
            {"out": MATRIX[2:]},
            ValueError,
            "must not share memory with source",
        ),
    ],
)
def test_take_rows_rejects(source, index, options, error, message):
    with pytest.raises(error, match=message):
        _C.take_rows(source, index, **options)


def test_take_columns_rejects_vectors_and_columns_out_of_range():
    with pytest.raises(ValueError, match=r"source must be 2-D, got shape \(4,\)"):
        _C.take_columns(np.zeros(4), kept([0]))
    with pytest.raises(IndexError, match=r"index\[1\] is 3, but source has 3 columns"):
        _C.take_columns(MATRIX, kept([0, 3]))


def test_out_must_not_share_memory_with_index():
    index = kept([0, 1])
    with pytest.raises(ValueError, match="out must not share memory with index"):
        _C.take_rows(np.arange(5), index, out=index)


def test_out_beside_source_in_one_buffer_is_fine():
    buffer = np.arange(12.0)
    _C.take_rows(buffer[:9].reshape(3, 3), kept([1]), out=buffer[9:].reshape(1, 3))
    np.testing.assert_array_equal(buffer[9:], [3.0, 4.0, 5.0])


@pytest.mark.parametrize("dtype", TENSOR_DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_native_take_agrees_with_pytorch(dtype, dim):
    parameter = torch.nn.Parameter(
        torch.randn(6, 9).to(dtype), requires_grad=dtype.is_floating_point
    )
    for tensor in (parameter, parameter.T, parameter[::2, 1::3]):
        index = torch.arange(0, tensor.shape[dim], 2)
        actual = native.take(tensor, index, dim)
        expected = tensor.detach().index_select(dim, index)
        assert actual.dtype == dtype and actual.is_contiguous() and not actual.requires_grad
        assert torch.equal(actual.view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize("family", ["phi3", "bloom", "gpt_neox", "qwen2"])
def test_fused_and_interleaved_layouts(family):
    """qkv, gate_up and interleaved qkv, with their biases, in one call each and nothing between."""
    model = FAMILIES[family]().bfloat16()
    layout = Layout.of(model)
    keep = torch.rand(len(layout), generator=torch.Generator().manual_seed(0)) < 0.6
    parameters = dict(model.named_parameters())
    seen = set()
    for block, keep_parts in layout.keep_by_block(keep):
        kept_parts = block.kept_parts(keep_parts)
        for cut in block.cuts:
            index = kept_parts[cut.owner].nonzero().flatten()
            tensor = parameters[cut.parameter]
            expected = tensor.detach().index_select(cut.dim, index)
            assert torch.equal(native.take(tensor, index, cut.dim), expected)
            seen.add((tensor.dim(), cut.dim))
    assert {(2, 0), (2, 1)} <= seen and ((1, 0) in seen) == (family != "phi3")


def test_native_take_of_a_bias_and_of_an_expanded_tensor():
    bias = torch.arange(5.0)
    assert torch.equal(native.take(bias, torch.tensor([1, 4]), 0), torch.tensor([1.0, 4.0]))
    expanded = torch.tensor([3.0]).expand(4, 5)
    assert torch.equal(native.take(expanded, torch.tensor([0, 2]), 1), torch.full((4, 2), 3.0))


def test_native_take_copies():
    tensor = torch.zeros(3, 3)
    native.take(tensor, torch.arange(3), 0).fill_(1)
    assert not tensor.any()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "index, error",
    [
        ([0.0], TypeError),
        ([[0]], ValueError),
        ([1, 1], ValueError),
        ([2, 0], ValueError),
        ([0, 3], IndexError),
        ([-1], IndexError),
    ],
)
def test_native_take_has_one_contract_on_every_device(index, error, device):
    index = torch.tensor(index)
    with pytest.raises(error):
        if device == "cpu":
            native.take(torch.zeros(3, 3), index, 0)
        else:
            # The check alone runs anywhere; it is all that CUDA adds to index_select.
            native._check_index(index, 3)


@pytest.mark.parametrize(
    "shape, dim", [((2, 2), 2), ((2, 2), -1), ((2,), 1), ((2, 2, 2), 3), ((1, 1, 1, 1), 0), ((), 0)]
)
def test_native_take_rejects_shapes_and_dims(shape, dim):
    with pytest.raises(ValueError, match="expected a tensor of 1, 2 or 3 dims and one of them"):
        native.take(torch.zeros(shape), torch.tensor([0]), dim)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_native_take_of_experts(dim):
    """Three dimensions, also where they are not in the order of memory."""
    index = torch.tensor([0, 2, 3])
    for tensor in (torch.randn(4, 5, 6), torch.randn(6, 5, 4).transpose(0, 2)):
        taken = native.take(tensor, index, dim)
        assert torch.equal(taken, tensor.index_select(dim, index)) and taken.is_contiguous()


def test_native_take_rejects_sixteen_byte_elements():
    with pytest.raises(TypeError, match=r"got torch\.complex128"):
        native.take(torch.zeros(2, 2, dtype=torch.complex128), torch.tensor([0]), 0)


@pytest.mark.gpu
def test_native_take_on_cuda():
    tensor = torch.randn(7, 11, dtype=torch.bfloat16, device="cuda")
    index = torch.tensor([0, 1, 5])
    assert torch.equal(native.take(tensor, index, 0), tensor[index])
    assert torch.equal(native.take(tensor, index.cuda(), 1), tensor[:, index])
