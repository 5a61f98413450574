# SPDX-License-Identifier: Apache-2.0
"""How machine code is read, on samples of what cuobjdump prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import cuda_compile, cuda_compiled
from bench.occupancy import resident

GOOD = "_ZN7glimpse4cuda43_GLOBAL__N__f3ef6341_10_compact_cu_ed01dbff14compact_kernelI13__nv_bfloat16Li4EEEvPKT_PS4_l"
BAD = "_ZN7glimpse4cuda43_GLOBAL__N__a6f07341_6_dpp_cu_ed01dbff_96033dppEPf"
RESOURCES = f"""
Fatbin elf code:
================
arch = sm_80
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function {GOOD}:
  REG:64 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:376 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function {BAD}:
  REG:255 STACK:96 SHARED:51200 LOCAL:0 CONSTANT[0]:548 CONSTANT[3]:24 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function {GOOD}:
  REG:64 STACK:0 SHARED:1280 LOCAL:0 CONSTANT[0]:568 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin ptx code:
================
arch = sm_90
"""
ELF = f"""
Fatbin elf code:
================
arch = sm_80

.section .note.nv.tkinfo
	Tool Name: ptxas
	Tool Version: Cuda compilation tools, release 13.0, V13.0.88
.nv.info.{GOOD}
	<0x1>
	Attribute:	EIATTR_CBANK_PARAM_SIZE
	Format:	EIFMT_HVAL
	Value:	0x18
	<0x2>
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x100 0x1 0x1

Fatbin elf code:
================
arch = sm_90a

   16   3d00      0  0  1                       NOBITS        3    0        0 .nv.shared.reserved.0
.nv.info.{BAD}
	Attribute:	EIATTR_NUM_BARRIERS
	Format:	EIFMT_HVAL
	Value:	0x1
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x200 0x1 0x1
.nv.info.{GOOD}
	Attribute:	EIATTR_CBANK_PARAM_SIZE
	Format:	EIFMT_HVAL
	Value:	0x18
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x100 0x1 0x1
"""
SASS = f"""
Fatbin elf code:
================
arch = sm_90a

	code for sm_90a
		Function : {BAD}
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                /* 0x00000a00ff017b82 */
                                                                        /* 0x000fe20000000800 */
        /*0010*/                   STL [R1+0x4], R7 ;                    /* 0x0000040701007387 */
        /*0020*/              @!P0 LDL.64 R2, [R1] ;                     /* 0x0000000001027983 */
		..........
		Function : {GOOD}
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;  /* 0x0000000402047981 */
        /*0010*/              @P0  LDG.E.128 R8, desc[UR4][R2.64+0x10] ;  /* 0x0000100402087981 */
        /*0020*/             @!UP0 LDG.E.U16 R9, desc[UR4][R2.64] ;       /* 0x0000100402087981 */
        /*0030*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;
        /*0040*/                   LDS.128 R8, [R3] ;
        /*0050*/                   STG.E.128 desc[UR4][R6.64], R8 ;
        /*0060*/                   STG.E desc[UR4][R6.64], R8 ;
        /*0070*/                   ACQBULK ;
"""


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> cuda_compiled.Report:
    said = {"--dump-resource-usage": RESOURCES, "-elf": ELF, "-sass": SASS}
    monkeypatch.setattr(cuda_compiled, "dump", lambda file, option: said[option])
    return cuda_compiled.read(Path("_C.so"))


def test_what_is_read(report: cuda_compiled.Report) -> None:
    assert report.nvcc == "13.0.88" and report.architectures == ["80", "90a"]
    old, new, bad = report.kernels
    assert old.name == new.name == "compact_kernel<bf16, 4>" and bad.name == "dpp"
    assert [k.home for k in report.kernels] == ["compact", "compact", "dpp"]
    assert [k.arch for k in report.kernels] == ["80", "90a", "90a"] and old.capability == 80
    assert (old.registers, old.threads, old.parameters, old.constants) == (64, 256, 24, 0)
    assert (bad.registers, bad.threads, bad.stack, bad.constants, bad.barriers) == (255, 512, 96, 24, 1)


def test_what_the_system_takes_is_not_the_kernels(report: cuda_compiled.Report) -> None:
    old, new, bad = report.kernels
    assert (old.shared, new.shared, bad.shared) == (0, 1280 - 1024, 51200 - 1024)


def test_instructions_are_counted(report: cuda_compiled.Report) -> None:
    _, new, bad = report.kernels
    assert new.widths("load") == {16: 3, 2: 1} and new.widths("store") == {16: 1, 4: 1}
    assert new.features == ("cp.async", "dependent") and new.local == (0, 0)
    assert bad.local == (1, 1) and not bad.widths("load")


def test_faults_are_named(report: cuda_compiled.Report) -> None:
    old, new, bad = report.kernels
    assert not old.faults() and not new.faults()
    assert [fault.partition(": ")[2] for fault in bad.faults()] == [
        "96 bytes of stack, expected none",
        "1 loads and 1 stores of local memory, expected none",
        "49.0 KiB of static shared memory, expected at most 48",
        "255 registers x 512 threads do not fit",
    ]


def test_the_page(report: cuda_compiled.Report) -> None:
    text = cuda_compile.markdown(report)
    assert "nvcc 13.0.88 for sm_80, sm_90a;" in text and "## compact\n" in text
    assert (
        "| `compact_kernel<bf16, 4>` | 90a | 256 | 64 | 0 | 0.2 | 24 | 0 | 4 | 3x16 1x2 | 1x16 1x4 |" in text
    )
    assert "| `dpp` | 90a | 512 | 255 | 96, 1 loads, 1 stores |" in text


@pytest.mark.parametrize(
    ("opcode", "size"),
    [("LDG.E", 4), ("LDG.E.U8.CONSTANT", 1), ("LDG.E.64", 8), ("LDG.E.ENL2.256", 32), ("STG.E.EF.128", 16)],
)
def test_widths(opcode: str, size: int) -> None:
    assert cuda_compiled.width(opcode) == size


def test_names_of_enumerators_and_parameters() -> None:
    symbol = "_ZN7glimpse12_GLOBAL__N_114compact_kernelILNS0_4KindE1EhEEvNS0_6ParamsE"
    assert cuda_compiled.readable(symbol) == "compact_kernel<Kind 1, uint8>"
    assert cuda_compiled.home(symbol) == "compact_kernel"
    assert cuda_compiled.readable("plain_kernel") == "plain_kernel"


def test_blocks_on_a_multiprocessor() -> None:
    """By registers, by shared memory, by warps, by blocks."""
    assert [resident(90, 64, 0, 8), resident(90, 32, 100 << 10, 4), resident(90, 16, 0, 32)] == [4, 2, 2]
    assert resident(90, 16, 0, 1) == 32 and resident(90, 255, 0, 16) == 0
