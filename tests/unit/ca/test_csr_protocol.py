"""Istio's messages against protobuf's own library."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kit.citadel import REQUEST, RESPONSE
from ztunnel.ca.authority import Authority
from ztunnel.ca.csr_protocol import CertificateRequest, decode_answer, decode_request, encode_answer, encode_request
from ztunnel.ca.request import IssueError, Signed, new_request
from ztunnel.ca.root import new_root
from ztunnel.mesh.identity import SpiffeId
from ztunnel.rpc.protobuf import WireError, bytes_field

ALICE = SpiffeId("cluster.local", "shop", "alice")
NOW = 1_800_000_000.0


@given(st.text(), st.integers(0, 1 << 62))
def test_our_request_is_what_protobuf_reads(csr: str, seconds: int) -> None:
    read = REQUEST.FromString(encode_request(csr.encode(), seconds, ALICE))
    assert (read.csr, read.validity_duration) == (csr, seconds)
    assert dict(read.metadata) == {"ImpersonatedIdentity": ALICE.uri}
    assert not REQUEST.FromString(encode_request(b"", seconds, None)).HasField("metadata")


@given(
    st.text(),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.dictionaries(st.text(max_size=5), st.one_of(st.text(), st.none(), st.booleans(), st.floats(allow_nan=False))),
    st.text(),
)
def test_what_protobuf_writes_is_read(csr: str, seconds: int, metadata: dict[str, object], name: str) -> None:
    message = REQUEST(csr=csr, validity_duration=seconds)
    message.metadata.update({**metadata, "ImpersonatedIdentity": name})
    assert decode_request(message.SerializeToString()) == CertificateRequest(csr.encode(), seconds, name)


def test_a_request_without_metadata_is_for_the_caller_itself() -> None:
    assert decode_request(REQUEST(csr="x").SerializeToString()).impersonated == ""


def test_a_name_that_is_no_text_is_not_taken_for_none() -> None:
    message = REQUEST(csr="x")
    message.metadata.update({"ImpersonatedIdentity": 5})
    with pytest.raises(WireError, match="ImpersonatedIdentity is not text"):
        decode_request(message.SerializeToString())


def test_our_answer_is_leaf_intermediates_and_all_roots_in_one() -> None:
    root = new_root("cluster.local", NOW)
    signed = Authority(root).sign(new_request(ALICE).csr_pem, ALICE, NOW)
    two = Signed(signed.chain_pem + root.pem, root.pem + new_root("cluster.local", NOW).pem)
    chain = list(RESPONSE.FromString(encode_answer(two)).cert_chain)
    assert [element.count("BEGIN CERTIFICATE") for element in chain] == [1, 1, 2]
    assert decode_answer(encode_answer(two)) == two


@pytest.mark.parametrize("chain", [[], ["leaf"], ["x"] * 17])
def test_answers_of_the_wrong_length_are_refused(chain: list[str]) -> None:
    with pytest.raises(IssueError, match=f"a chain of {len(chain)} elements"):
        decode_answer(RESPONSE(cert_chain=chain).SerializeToString())


def test_elements_without_a_last_newline_are_kept_apart() -> None:
    assert decode_answer(RESPONSE(cert_chain=["a", "b\n", "c"]).SerializeToString()) == Signed(b"a\nb\n", b"c")


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for decode in (decode_request, decode_answer):
        for message in (data, bytes_field(4, bytes_field(1, data))):
            try:
                decode(message)
            except (WireError, IssueError):
                pass
