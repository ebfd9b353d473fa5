"""The C++ beside Inductor: products of matrices on a CPU, and many calls of a graph without Python between them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

__all__ = ["Native", "Repeated", "native"]

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_suffix(".cpp")
_SHIMS = {
    "product": (
        "product(Tensor left, Tensor right, Tensor? bias) -> Tensor",
        "AOTITorchError aoti_torch_cpu_product(AtenTensorHandle left, AtenTensorHandle right, AtenTensorHandle* bias,"
        " AtenTensorHandle* given)",
        lambda left, right, bias: left.new_empty(*left.shape[:-1], right.shape[-1]),
    ),
    "powers": (
        "powers(float base, Tensor exponents) -> Tensor",
        "AOTITorchError aoti_torch_cpu_powers(double base, AtenTensorHandle exponents, AtenTensorHandle* given)",
        lambda base, exponents: torch.empty_like(exponents),
    ),
}
_ENTRY = "_Z19inductor_entry_implPP16AtenTensorOpaqueS1_"  # inductor_entry_impl(AtenTensorHandle*, AtenTensorHandle*)


@functools.cache
def native() -> Native | None:
    """The library, compiled once a machine into Inductor's cache; ``None``, after a line in the log, where it cannot be
    had, and graphs then run without it."""
    try:
        return Native()
    except Exception as error:  # whatever a compiler, a linker or another version of torch may say
        logger.info("steps are compiled without pyrovae's own C++: %s", error)
        return None


class Native:
    """The compiled library and the options with which Inductor calls it.

    Attributes:
        options: for ``compile_fx``.
        product: the operator of a matrix product; ``None`` where torch or the processor lacks the kernels.
        powers: the operator of the powers of a number.
    """

    def __init__(self) -> None:
        from torch._inductor.codecache import CppCodeCache

        class Library(CppCodeCache):
            """Inductor's compiler and cache, with torch's headers and libraries at hand."""

            cache: dict[str, Any] = {}  # noqa: RUF012 - the base class's
            cpp_compile_command_flags = {"include_pytorch": True, "shared": True}  # noqa: RUF012

        path = Library.load(_SOURCE.read_text())._name
        self._library = ctypes.PyDLL(path, mode=ctypes.RTLD_GLOBAL)  # graphs look its functions up by name
        self._library.repeat.restype = ctypes.c_int64
        self._operators = torch.library.Library("pyrovae", "DEF")
        for schema, _, fake in _SHIMS.values():
            self._operators.define(schema)
            self._operators.impl(schema.split("(")[0], fake, "Meta")
        operators = torch.ops.pyrovae
        self.powers: Any = operators.powers.default
        shims = _Shims({getattr(operators, name).default: [shim] for name, (_, shim, _) in _SHIMS.items()})
        self.options = {"cpp_wrapper": True, "aot_inductor.custom_ops_to_c_shims": shims}
        self.product: Any = operators.product.default if self._library.products() else None

    @contextlib.contextmanager
    def recording(self) -> Iterator[Repeated]:
        """Within the block, a graph that Inductor compiles can afterwards be repeated."""
        from torch._inductor.codecache import CppWrapperCodeCache

        repeated = Repeated(self._library)
        load = CppWrapperCodeCache.load_pybinding

        def recorded(*args: Any, **kwargs: Any) -> Any:
            return repeated.around(load(*args, **kwargs), kwargs["num_outputs"])

        with mock.patch.object(CppWrapperCodeCache, "load_pybinding", recorded):
            yield repeated


class _Shims(dict[Any, list[str]]):
    """Declarations by operator, which go into the keys of Inductor's cache as text: operators cannot be pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (sorted(text for texts in self.values() for text in texts),)


class Repeated:
    """A graph of Inductor's C++ wrapper, to be called many times on the tensors of its first call from Python.

    Args:
        library: the compiled library.
    """

    def __init__(self, library: ctypes.PyDLL) -> None:
        self._library = library
        self._graph: Any = None
        self._results = 0
        self._tensors: Any = None  # handles, our own

    def around(self, entry: Any, results: int) -> Any:
        """Takes note of what a graph is called with from Python."""
        self._graph = getattr(ctypes.CDLL(entry.__self__.__file__), _ENTRY)
        self._results = results

        def call(handles: list[Any]) -> Any:
            if self._tensors is None:
                capsules = (ctypes.c_void_p * len(handles))(*(_pointer(each, None) for each in handles))
                self._tensors = (ctypes.c_void_p * len(handles))()
                self._library.keep(capsules, self._tensors, ctypes.c_int64(len(handles)))
            return entry(handles)

        return call

    def __call__(self, times: int) -> None:
        """Runs the graph a number of times.

        Raises:
            RuntimeError: an operator of the graph failed.
        """
        said = ctypes.create_string_buffer(1000)
        counts = [ctypes.c_int64(value) for value in (len(self._tensors), self._results, times)]
        made = self._library.repeat(self._graph, self._tensors, *counts, said, ctypes.c_int64(len(said)))
        if made < times:
            raise RuntimeError(said.value.decode(errors="replace"))

    def __del__(self) -> None:
        if self._tensors is not None:
            self._library.drop(self._tensors, ctypes.c_int64(len(self._tensors)))


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype = ctypes.c_void_p
_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
