"""Each kernel compiled ahead of time, without a GPU: registers, spills and shared memory, beside the committed table.

    python -m tests.kernels.compiled [--write] [name ...]

A kernel's launches to compile are listed in `tests/kernels/specs_<module>.py`, for `kernels/<module>.py`:

    SPECS = [
        Spec(norm.scale_rows, "bf16 4096", {"x": "*bf16", "rows": "i32", "eps": "fp32"}, {"BLOCK": 4096}, num_warps=8)
    ]

The signature holds the type of every argument that is not `tl.constexpr`, in Triton's words (*bf16, *fp16, *fp32, *u8,
*i64, i32, i64, fp32); the constants hold the others. As in a launch, pointers and integers count as multiples of 16,
but for those named in `ragged`. The names on the command line are beginnings of "<module>.<kernel> <case>"; with
--write, the other rows of the table stay as they are.

It runs in a process of its own: with TRITON_INTERPRET set, kernels are no kernels. ptxas puts what it spills on the
stack, so a stack of 0 bytes says that nothing was spilled. The registers depend on the compiler: they are compared
where the table was made by the same Triton, the two limits always.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
TABLE = FOLDER / "compiled.json"
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may have, by architecture


@dataclass(frozen=True)
class Spec:
    """One way in which a kernel is launched."""

    kernel: Any
    case: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    ragged: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return "<module>.<kernel> <case>"."""
        return f"{self.kernel.fn.__module__.rsplit('.', 1)[-1]}.{self.kernel.__name__} {self.case}"


def specs() -> list[Spec]:
    """Return all of them, in the order of the files' names."""
    files = sorted(FOLDER.glob("specs_*.py"))
    return [spec for path in files for spec in importlib.import_module(f"tests.kernels.{path.stem}").SPECS]


def _usage(cubin: bytes) -> tuple[int, int]:
    """Return registers and bytes of stack of one thread, as the CUDA tool beside Triton reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    words = dict(word.split(":") for word in text.split() if word.startswith(("REG:", "STACK:", "LOCAL:")))
    return int(words["REG"]), int(words["STACK"]) + int(words["LOCAL"])


def build(spec: Spec, architecture: int):
    """Compile one spec; `.asm` of the result holds each stage, "ptx" and "cubin" among them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = spec.kernel.arg_names
    missing = set(names) ^ (spec.signature.keys() | spec.constants.keys())
    assert not missing, f"{spec.name}: the spec and the kernel differ in {sorted(missing)}"
    types = {name: spec.signature.get(name, "constexpr") for name in names}
    hinted = [name for name, kind in spec.signature.items() if kind[0] in "*i" and name not in spec.ragged]
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in hinted}
    source = ASTSource(spec.kernel, types, dict(spec.constants), hints)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def measure(spec: Spec) -> dict[str, dict[str, int]]:
    """Return registers and spilled bytes of a thread and shared bytes of a program, for each architecture."""
    found = {}
    for architecture in SHARED_LIMITS:
        kernel = build(spec, architecture)
        registers, spilled = _usage(kernel.asm["cubin"])
        found[f"sm_{architecture}"] = {"registers": registers, "spilled": spilled, "shared": kernel.metadata.shared}
    return found


def problems(found: Mapping[str, dict], table: Mapping[str, Any], version: str, whole: bool = True) -> Iterable[str]:
    """Yield a line for each limit that is passed and, for the table's own Triton, each difference from the table."""
    for name, usage in found.items():
        for architecture, limit in SHARED_LIMITS.items():
            use = usage[f"sm_{architecture}"]
            if use["spilled"]:
                yield f"{name}: sm_{architecture} spills {use['spilled']} bytes a thread"
            if use["shared"] > limit:
                yield f"{name}: sm_{architecture} has {limit} bytes of shared memory, the kernel takes {use['shared']}"
        if name not in table["kernels"]:
            yield f"{name}: not in {TABLE.name}; run python -m tests.kernels.compiled --write"
        elif version == table["triton"] and usage != table["kernels"][name]:
            yield f"{name}: {usage}, but {TABLE.name} has {table['kernels'][name]}"
    if whole:
        yield from (f"{name}: in {TABLE.name}, but no such spec" for name in table["kernels"].keys() - found.keys())


def read_table() -> dict[str, Any]:
    """Return the committed table."""
    return json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {"triton": "", "kernels": {}}


def _write(table: Mapping[str, Any]) -> None:
    rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(use)}" for name, use in sorted(table["kernels"].items()))
    text = f'{{\n  "triton": "{table["triton"]}",\n  "kernels": {{\n{rows}\n  }}\n}}\n'
    TABLE.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Compile, print one line a spec, compare with the table or write it; return 1 for a problem."""
    parser = argparse.ArgumentParser(
        description="compile the kernels ahead of time and compare with the committed table"
    )
    parser.add_argument("--write", action="store_true", help="write what was found into the table")
    parser.add_argument("names", nargs="*", help="beginnings of spec names; all when none is given")
    options = parser.parse_args(arguments)
    if os.environ.pop("TRITON_INTERPRET", None):
        print("TRITON_INTERPRET was set; it is off here", file=sys.stderr)
    import triton

    chosen = [spec for spec in specs() if not options.names or spec.name.startswith(tuple(options.names))]
    found = {}
    for spec in chosen:
        found[spec.name] = measure(spec)
        uses = (f"{name} {'/'.join(map(str, use.values()))}" for name, use in found[spec.name].items())
        print(f"{spec.name:64} registers/spilled/shared  {'  '.join(uses)}", flush=True)
    table = read_table()
    if options.write:
        others = {
            name: use for name, use in table["kernels"].items() if not name.startswith(tuple(options.names or [""]))
        }
        table = {"triton": triton.__version__, "kernels": others | found}
        _write(table)
    lines = list(problems(found, table, triton.__version__, whole=not options.names))
    print("\n".join(lines), end="\n" if lines else "", file=sys.stderr)
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
