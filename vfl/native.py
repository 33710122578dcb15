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
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from vfl import choices
from vfl.errors import first_line

log = logging.getLogger("vfl")

NATIVE = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
OPTIONS = ("-std=c++17", "-O3", NATIVE, "-fopenmp", "-fPIC", "-shared")

LARGE = 2**12
"""Numbers of a vector; for smaller ones a run saves less than the second that building takes."""

# Called with whole numbers, of which pointers are some: a call costs a tenth of one by ctypes.
BINDING = """
#include <Python.h>
#include <cstdint>
static bool whole(const char* name, PyObject* const* given, Py_ssize_t count, int wanted, long long* a) {{
  if (count != wanted) {{
    PyErr_Format(PyExc_TypeError, "%s takes %d numbers, not %zd", name, wanted, count);
    return false;
  }}
  for (int i = 0; i < wanted; i++) a[i] = PyLong_AsLongLong(given[i]);
  return !PyErr_Occurred();
}}
{functions}
static PyMethodDef methods[] = {{{methods} {{}}}};
static PyModuleDef module = {{PyModuleDef_HEAD_INIT, "{module}", nullptr, -1, methods}};
PyMODINIT_FUNC PyInit_{module}() {{ return PyModule_Create(&module); }}
"""
FUNCTION = """
extern "C" void {name}({types});
static PyObject* call_{name}(PyObject*, PyObject* const* given, Py_ssize_t count) {{
  long long a[{count}];
  if (!whole("{name}", given, count, {count}, a)) return nullptr;
  {name}({values});
  Py_RETURN_NONE;
}}
"""
METHOD = '{{"{name}", (PyCFunction)(void*)call_{name}, METH_FASTCALL, nullptr}},'


class Source:
    """A C++ file and its `extern "C"` functions: by name, their arguments' types.

    Each is `void name(types)`, to be called with whole numbers and addresses. What the file includes as "files" lies
    beside it, and becomes a part of it. $CXX, else c++, compiles it, with Python's headers; the machine code stays in
    the folder of `vfl.choices`.
    """

    def __init__(self, path: Path, functions: Mapping[str, Sequence[str]]) -> None:
        self.path, self.functions = path, functions
        self._built: dict[str, Callable[..., None]] | None = None  # {}: it cannot be

    def built(self) -> dict[str, Callable[..., None]]:
        """The functions as machine code. Raises OSError and RuntimeError where it cannot be built."""
        module = f"vfl_{self.path.stem}"  # Python knows it by this name, which must be nobody else's
        text = _whole(self.path) + self._binding(module)
        include = sysconfig.get_path("include")
        command = [*shlex.split(os.environ.get("CXX", "c++")), *OPTIONS, f"-I{include}"]
        kind = repr((text, command, choices.processor(), sys.implementation.cache_tag))
        library = choices.folder() / "native" / f"{module}-{hashlib.sha256(kind.encode()).hexdigest()[:16]}.so"
        if not library.exists():
            self._compile(text, command, library)
        spec = spec_from_file_location(module, library, loader=ExtensionFileLoader(module, str(library)))
        if spec is None:
            raise RuntimeError(f"{library} cannot be loaded")
        loaded = module_from_spec(spec)
        return {name: getattr(loaded, name) for name in self.functions}

    def found(self, name: str) -> Callable[..., None] | None:
        """A function where something else serves, too; None: it cannot be built here, as one warning says."""
        if self._built is None:
            try:
                self._built = self.built()
            except Exception as error:  # of a compiler, or of what loads its code
                _warn(first_line(error))
                self._built = {}
        return self._built.get(name)

    def _binding(self, module: str) -> str:
        functions = []
        for name, types in self.functions.items():
            values = (f"({t})a[{i}]" if "*" not in t else f"reinterpret_cast<{t}>(a[{i}])" for i, t in enumerate(types))
            of = {"name": name, "types": ", ".join(types), "count": len(types), "values": ", ".join(values)}
            functions.append(FUNCTION.format(**of))
        methods = " ".join(METHOD.format(name=name) for name in self.functions)
        return BINDING.format(module=module, functions="".join(functions), methods=methods)

    def _compile(self, text: str, command: list[str], library: Path) -> None:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            made, code = Path(scratch) / library.name, Path(scratch) / self.path.name
            code.write_text(text, encoding="utf-8")
            done = subprocess.run([*command, str(code), "-o", str(made)], capture_output=True, text=True, check=False)
            if done.returncode:
                said = done.stderr.splitlines() or ["no reason given"]
                reason = next((line for line in said if "error" in line), said[-1])
                raise RuntimeError(f"{command[0]} cannot compile {self.path.name}: {reason}")
            made.replace(library)  # whole or not at all, whoever else builds it


@functools.cache
def _warn(reason: str) -> None:
    log.warning("building vfl's C++ failed, so some operations take longer (%s)", reason)


def _whole(source: Path) -> str:
    """A source with what it includes from its own folders."""
    text = source.read_text(encoding="utf-8")
    return re.sub(r'^#include "(.+)"$', lambda m: (source.parent / m[1]).read_text(encoding="utf-8"), text, flags=re.M)
