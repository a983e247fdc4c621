"""A direct launch is Triton's own launch, or none."""

import gc
import weakref
from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs

from headrift_kernels.triton.launch import launch, record_compilations

VARYING = ("out_ptr", "table_ptr", "none_ptr", "stride", "layer")
GRID = (3, 2, 1)


def make_kernel():
    """A kernel of its own for each test, of which nothing is compiled yet."""

    @triton.jit(do_not_specialize=["layer"], do_not_specialize_on_alignment=["table_ptr"])
    def kernel(out_ptr, table_ptr, none_ptr, stride, layer, in_ptr, scale, pages, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        page = tl.load(table_ptr + tl.program_id(0) * pages)
        tl.store(out_ptr + page * stride + at, scale * tl.load(in_ptr + layer * BLOCK + at))

    return kernel


@pytest.fixture
def kernel(fake_gpu):
    return make_kernel()


def make_arguments(**changed):
    tensors = {"in_ptr": torch.zeros(64), "out_ptr": torch.zeros(64), "table_ptr": torch.zeros(8, dtype=torch.int32)}
    return tensors | {"none_ptr": None, "scale": 0.5, "stride": 48, "layer": 2, "pages": 4, "BLOCK": 32} | changed


def values_of(arguments):
    values = (arguments[name] for name in VARYING)
    return [value.data_ptr() if isinstance(value, torch.Tensor) else value or 0 for value in values]


def test_a_direct_launch_passes_on_what_tritons_own_passes(kernel, fake_gpu):
    aligned, misaligned = torch.zeros(64), torch.zeros(65)[1:]
    tables = [torch.zeros(8, dtype=torch.int32), torch.zeros(9, dtype=torch.int32)[1:]]
    first = make_arguments()
    direct = launch(kernel, GRID, first, VARYING, num_warps=4)
    launches = []
    for out, table, stride, layer in product((aligned, misaligned), tables, (48, 64, 1, 17), (0, 1, 16, -1, 1 << 31)):
        arguments = first | {"out_ptr": out, "table_ptr": table, "stride": stride, "layer": layer}
        grid = (len(launches) + 1, 2, 1)
        fake_gpu.stream = len(launches)
        fake_gpu.launched.clear()
        if is_direct := direct(grid, *values_of(arguments)):
            launch(kernel, grid, arguments, VARYING, num_warps=4)
            direct_launch, tritons_launch = fake_gpu.launched
            assert direct_launch == tritons_launch
        assert is_direct == bool(fake_gpu.launched)
        launches.append(is_direct)
        assert is_direct == (out is aligned and stride == 48 and 0 <= layer < 1 << 31)
    assert launches.count(True) == 6


def test_a_kernel_made_for_other_values_is_launched_directly_with_them(kernel, fake_gpu):
    odd = {"out_ptr": torch.zeros(65)[1:], "stride": 1, "layer": 1 << 40}
    arguments = make_arguments(**odd)
    direct = launch(kernel, GRID, arguments, VARYING, num_warps=4)
    assert direct(GRID, *values_of(arguments))
    assert fake_gpu.launched[0] == fake_gpu.launched[1]
    assert not direct(GRID, *values_of(make_arguments(layer=1 << 40)))
    assert not direct(GRID, *values_of(make_arguments(**odd | {"layer": 1})))


def test_values_that_are_missing_are_no_launch(kernel):
    direct = launch(kernel, GRID, make_arguments(), VARYING, num_warps=4)
    assert not direct(GRID, *values_of(make_arguments())[:-1])
    assert not direct(GRID, *values_of(make_arguments(none_ptr=torch.zeros(1))))


def test_what_varies_comes_first(kernel):
    with pytest.raises(ValueError, match="in_ptr"):
        launch(kernel, GRID, make_arguments(), ["out_ptr", "in_ptr"], num_warps=4)


def test_no_tensor_is_kept_alive(kernel):
    arguments = make_arguments()
    kept = [weakref.ref(value) for value in arguments.values() if isinstance(value, torch.Tensor)]
    direct = launch(kernel, GRID, arguments, VARYING, num_warps=4)
    del arguments
    gc.collect()
    assert direct
    assert [ref() for ref in kept] == [None] * 3


def test_hooks_on_launches_see_tritons_own(kernel):
    arguments = make_arguments()
    direct = launch(kernel, GRID, arguments, VARYING, num_warps=4)
    names = []
    hook = lambda metadata: names.append(metadata.get()["name"])  # noqa: E731
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(hook)
        assert not direct(GRID, *values_of(arguments))
        launch(kernel, GRID, arguments, VARYING, num_warps=4)
        chain.remove(hook)
        assert names.pop() == "kernel"
        assert direct(GRID, *values_of(arguments))
    kernel.add_pre_run_hook(lambda *arguments, **options: None)
    assert not direct(GRID, *values_of(arguments))


def test_each_compilation_is_recorded_once(fake_gpu):
    kernel, other = make_kernel(), make_kernel()
    arguments = make_arguments()
    with record_compilations() as names:
        direct = launch(kernel, GRID, arguments, VARYING, num_warps=4)
        assert names == ["kernel"]
        with record_compilations() as inner:
            assert direct(GRID, *values_of(arguments))
            launch(kernel, GRID, make_arguments(layer=7), VARYING, num_warps=4)
            assert inner == []
            launch(kernel, GRID, make_arguments(stride=1), VARYING, num_warps=4)
        assert inner == ["kernel"]
        launch(other, GRID, arguments, VARYING, num_warps=4)  # compiled already, and loaded from the cache on disk
    launch(other, GRID, make_arguments(stride=1), VARYING, num_warps=4)
    assert names == ["kernel"] * 3


@pytest.mark.parametrize("fake_gpu", [("hip", "gfx942", 64)], indirect=True)
def test_for_amd_a_varying_tensor_may_come_to_be_of_more_than_2_gib(kernel, fake_gpu):
    arguments = make_arguments()
    direct = launch(kernel, GRID, arguments, VARYING, num_warps=4)
    assert fake_gpu.attributes["in_ptr"]["tt.pointer_range"] == 32
    assert fake_gpu.attributes["out_ptr"] == {"tt.divisibility": 16}
    assert "tt.pointer_range" not in fake_gpu.attributes.get("table_ptr", {})
    assert direct(GRID, *values_of(arguments))
    assert fake_gpu.launched[0] == fake_gpu.launched[1]
