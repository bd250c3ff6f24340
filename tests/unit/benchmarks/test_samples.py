"""What a profiler saw, in shares. The lines are perf's own, of a worker and a supervisor under `short-16`."""

from __future__ import annotations

import pytest

from scripts.benchmarks.samples import Kind, Symbol, UnreadableError, kind_of, parse, shares, top

WORKER, SUPERVISOR = 8497, 8431
RECORDED = """
 8497  ffffffff8162fafc kmem_cache_free ([kernel.kallsyms])
 8497  ffffffffc0a2e1b0 nft_do_chain ([nf_tables])
 8431            54a07e _PyEval_EvalFrameDefault (/usr/bin/python3.11)
 8497            54b2c1 _PyEval_EvalFrameDefault (/usr/bin/python3.11)
 8497            5e2d10 [unknown] (/usr/bin/python3.11)
 8497      7f3b2a1c0d43 ossl_aes_gcm_encrypt_avx512 (/w/.venv/lib/python3.11/site-packages/cryptography/hazmat/bindings/_rust.abi3.so)
 8497      7f3b2c3d4e5f __memmove_avx512_unaligned_erms (/usr/lib/x86_64-linux-gnu/libc.so.6 (deleted))
 8497      7ffd5a7f2b40 __vdso_clock_gettime ([vdso])
 8497      7f3b29f01234 CPyDef_records___seal (/src/ztunnel/hbone/records.cpython-311-x86_64-linux-gnu.so)
 8431  ffffffff8162fafc kmem_cache_free ([kernel.kallsyms])
12000            54a07e _PyEval_EvalFrameDefault (/usr/bin/python3.11)
"""


def test_time_is_shared_out_by_whose_code_it_was() -> None:
    found = shares(parse(RECORDED), [WORKER])
    assert found.samples == 8
    assert found.of == {Kind.KERNEL: 2 / 8, Kind.CRYPTO: 1 / 8, Kind.INTERPRETER: 2 / 8, Kind.COMPILED: 1 / 8, Kind.REST: 2 / 8}


def test_a_process_that_never_ran_has_no_shares() -> None:
    assert shares(parse(RECORDED), [1]).of == {}
    assert shares([], []).samples == 0


def test_symbols_are_listed_by_the_time_of_all_roles_and_others_do_not_count() -> None:
    first, second, *others = top(parse(RECORDED), {"worker": [WORKER], "supervisor": [SUPERVISOR], "idle": []})
    assert first == Symbol("kmem_cache_free", Kind.KERNEL, 2 / 10, {"worker": 1 / 8, "supervisor": 1 / 2, "idle": 0.0})
    assert (second.name, second.share) == ("_PyEval_EvalFrameDefault", 2 / 10)
    assert len(others) == 6
    assert "? in python3.11" in [each.name for each in others]
    assert len(top(parse(RECORDED), {"worker": [WORKER]}, most=3)) == 3


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        ("/usr/lib/x86_64-linux-gnu/libcrypto.so.3", Kind.CRYPTO),
        ("/opt/python/lib/libpython3.12.so.1.0", Kind.INTERPRETER),
        ("/opt/python/bin/python3", Kind.INTERPRETER),
        ("/src/ztunnel/.venv/lib/python3.11/site-packages/msgspec/_core.cpython-311-x86_64-linux-gnu.so", Kind.REST),
        ("/src/.venv/lib/python3.11/site-packages/_cffi_backend.cpython-311-x86_64-linux-gnu.so", Kind.REST),
        ("/src/ztunnel/6ec57f84c680d3a3778b__mypyc.cpython-311-x86_64-linux-gnu.so", Kind.COMPILED),
        ("/src/build/compiled/6ec57f84c680d3a3778b__mypyc.cpython-311-x86_64-linux-gnu.so", Kind.COMPILED),
        ("[unknown]", Kind.REST),
        ("//anon", Kind.REST),
    ],
)
def test_images_have_kinds(image: str, kind: Kind) -> None:
    assert kind_of(0x54A07E, image) is kind


def test_names_of_functions_may_have_parentheses() -> None:
    (sample,) = parse(" 7  54a07e std::function<void (int)>::operator()(int) const (/usr/lib/libx.so)\n")
    assert (sample.symbol, sample.kind) == ("std::function<void (int)>::operator()(int) const", Kind.REST)


@pytest.mark.parametrize("line", ["nonsense", " 8497  xyz f (/usr/bin/python3)", " 8497  54a07e f"])
def test_what_is_no_sample_is_refused(line: str) -> None:
    with pytest.raises(UnreadableError):
        parse(line)
