"""Compiles the fused kernels for Hopper (sm_90) on a machine without a GPU, and reads the machine code."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_sfr.kernels import fused

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Code:
    """The machine code of one specialization."""

    registers: int
    """Registers per thread."""
    spilled: int
    """Bytes of stack and local memory per thread."""
    instructions: Counter[str]
    """Count of each opcode with its modifiers; LDG.E.128 is a load of 16 bytes."""

    def count(self, *prefixes: str) -> int:
        return sum(n for opcode, n in self.instructions.items() if opcode.startswith(prefixes))


def compile_for_hopper(kernel: Any, dtype: str, aligned: tuple[str, ...], constants: dict[str, Any]) -> bytes:
    """The cubin of a launch with pointers aligned to 16 bytes and integers in `aligned` that are multiples of 16."""
    constants = constants | {"L": fused.LANES, "C": 16 // BYTES[dtype]}
    types = {"z_ptr": f"*{dtype}", "y_ptr": "*i64", "stride": "i32", "V": "i32", "k": "fp32", "c": "fp32"}
    types |= {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr") and name not in types}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    multiples = [name for name in signature if name.endswith("_ptr") or name in aligned]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in multiples}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": fused.NUM_WARPS})
    return compiled.asm["cubin"]


def read(cubin: Path) -> Code:
    """Registers and local memory from the cubin's metadata, opcodes from its disassembly."""
    usage = _output("cuobjdump", "-res-usage", cubin)
    [costs] = [dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", line)) for line in usage.splitlines() if "REG:" in line]
    # A line is  /*0120*/  @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", _output("nvdisasm", "-c", cubin))
    return Code(int(costs["REG"]), int(costs["STACK"]) + int(costs["LOCAL"]), Counter(opcodes))


def _output(tool: str, *arguments: str | Path) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
