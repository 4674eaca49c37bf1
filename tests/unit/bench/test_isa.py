from __future__ import annotations

import pytest

from serve_app.bench.isa import parse_log, ratios, report

LOG = """\
onednn_verbose,v1,info,oneDNN v3.7.1 (commit 8d263e693366ef8db40acc569cc7d8edf644556d)
onednn_verbose,v1,primitive,exec,cpu,matmul,brg_matmul:avx10_1_512_amx,undef,src:bf16,,,64x576,0.1
xeray_phase prefill
onednn_verbose,v1,primitive,exec,cpu,matmul,brg_matmul:avx10_1_512_amx,undef,src:bf16,,,128x576,0.5
onednn_verbose,v1,primitive,exec,cpu,reorder,jit:uni,undef,src:bf16,,,128x576,0.1
onednn_verbose,v1,primitive,create:cache_hit,cpu,matmul,brg_matmul:avx10_1_512_amx,undef,,,,1,0.1
xeray_phase decode
onednn_verbose,v1,primitive,exec,cpu,matmul,brg_matmul:avx10_1_512_amx,undef,src:bf16,,,8x576,0.2
onednn_verbose,exec,cpu,inner_product,brgconv:avx512_core_bf16,undef,src:bf16,,,8x576,0.2
xeray_phase end
onednn_verbose,v1,primitive,exec,cpu,reorder,jit:uni,undef,src:bf16,,,1,0.1
xeray_result {"threads": 2, "prefill_tokens_per_s": 900.0, "decode_tokens_per_s": 50.0}
"""


def test_a_recorded_log_is_counted_by_phase_and_implementation() -> None:
    run = parse_log(LOG.splitlines(), "")
    assert dict(run.implementations["prefill"]) == {"brg_matmul:avx10_1_512_amx": 1}
    assert dict(run.implementations["decode"]) == {
        "brg_matmul:avx10_1_512_amx": 1,
        "brgconv:avx512_core_bf16": 1,
    }
    assert (run.num_amx("prefill"), run.num_amx("decode")) == (1, 1)
    assert (run.threads, run.prefill_tokens_per_s) == (2, 900.0)


def test_the_ratio_and_the_report() -> None:
    free = parse_log(LOG.splitlines(), "")
    held_log = LOG.replace("avx10_1_512_amx", "avx512_core_bf16").replace("900.0", "300.0")
    held = parse_log(held_log.splitlines(), "AVX512_CORE_BF16")
    assert held.num_amx("prefill") == held.num_amx("decode") == 0
    assert ratios(free, held) == pytest.approx((3.0, 1.0))
    text = "\n".join(report(free, held, has_amx=True))
    assert "brg_matmul:avx10_1_512_amx × 1" in text
    assert "as it is over AVX512_CORE_BF16: prefill 3.00, decode 1.00" in text
