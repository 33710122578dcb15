"""C++ functions of this package as machine code for this processor, built once on each machine."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from vfl import choices
from vfl.errors import first_line

log = logging.getLogger("vfl")

NATIVE = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
OPTIONS = ("-std=c++17", "-O3", NATIVE, "-fopenmp", "-fPIC", "-shared")

LARGE = 2**12
"""Numbers of a vector; for smaller ones a run saves less than the half second that building takes."""

# Called with whole numbers, of which pointers are some: a call costs a tenth of one by ctypes.
BINDING = """
#include <Python.h>
#include <cstdint>
extern "C" void {name}({types});
static PyObject* call(PyObject*, PyObject* const* given, Py_ssize_t count) {{
  long long a[{count}];
  if (count != {count}) return PyErr_Format(PyExc_TypeError, "{name} takes {count} numbers, not %zd", count);
  for (int i = 0; i < {count}; i++) a[i] = PyLong_AsLongLong(given[i]);
  if (PyErr_Occurred()) return nullptr;
  {name}({values});
  Py_RETURN_NONE;
}}
static PyMethodDef methods[] = {{{{"{name}", (PyCFunction)(void*)call, METH_FASTCALL, nullptr}}, {{}}}};
static PyModuleDef module = {{PyModuleDef_HEAD_INIT, "{name}", nullptr, -1, methods}};
PyMODINIT_FUNC PyInit_{name}() {{ return PyModule_Create(&module); }}
"""


def built(source: Path, name: str, types: Sequence[str]) -> Callable[..., None]:
    """The `extern "C"` function `void name(types)` of a C++ source, to be called with whole numbers and addresses.

    What it includes as "files" lies beside it, and becomes a part of it. $CXX, else c++, compiles it, with Python's
    headers; the machine code stays in the folder of `vfl.choices`. Raises OSError and RuntimeError where that fails.
    """
    values = (f"({t})a[{i}]" if "*" not in t else f"reinterpret_cast<{t}>(a[{i}])" for i, t in enumerate(types))
    binding = BINDING.format(name=name, types=", ".join(types), count=len(types), values=", ".join(values))
    text = _whole(source) + binding
    include = sysconfig.get_path("include")
    command = [*shlex.split(os.environ.get("CXX", "c++")), *OPTIONS, f"-I{include}"]
    kind = repr((text, command, choices.processor(), sys.implementation.cache_tag))
    library = choices.folder() / "native" / f"{name}-{hashlib.sha256(kind.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            made, code = Path(scratch) / library.name, Path(scratch) / f"{name}.cpp"
            code.write_text(text, encoding="utf-8")
            done = subprocess.run([*command, str(code), "-o", str(made)], capture_output=True, text=True, check=False)
            if done.returncode:
                said = done.stderr.splitlines() or ["no reason given"]
                reason = next((line for line in said if "error" in line), said[-1])
                raise RuntimeError(f"{command[0]} cannot compile {source.name}: {reason}")
            made.replace(library)  # whole or not at all, whoever else builds it
    spec = spec_from_file_location(name, library, loader=ExtensionFileLoader(name, str(library)))
    if spec is None:
        raise RuntimeError(f"{library} cannot be loaded")
    return getattr(module_from_spec(spec), name)


def found(source: Path, name: str, types: Sequence[str]) -> Callable[..., None] | None:
    """The same where something else serves, too; None: it cannot be built here, as one warning says for each reason."""
    try:
        return built(source, name, types)
    except Exception as error:  # of a compiler, or of what loads its code
        _warn(first_line(error))
        return None


@functools.cache
def _warn(reason: str) -> None:
    log.warning("building vfl's C++ failed, so some operations take longer (%s)", reason)


def _whole(source: Path) -> str:
    """A source with what it includes from its own folders."""
    text = source.read_text(encoding="utf-8")
    return re.sub(r'^#include "(.+)"$', lambda m: (source.parent / m[1]).read_text(encoding="utf-8"), text, flags=re.M)
