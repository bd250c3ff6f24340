"""nf_tables: one atomic transaction per change, and the kernel's tables read back as `redirect` values.

Tables are owned by the socket that made them and persist without it (flags OWNER and PERSIST, Linux 6.9): an application
with CAP_NET_ADMIN that flushes the rule set does not touch them, and when the agent dies they stay, so that traffic fails
closed until the next agent takes them over. All changes must go through the owning socket: `PodTables` keeps it.
On older kernels the tables are ordinary ones, and the drift check alone heals them.
Source: linux/net/netfilter/nf_tables_api.c, nfnetlink.c; linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from enum import Enum
from functools import lru_cache

from pyroute2.netlink.nfnetlink import nfgen_msg
from pyroute2.netlink.nfnetlink.nftsocket import Cmp, Meta, Regs, nft_chain_msg, nft_gen_msg, nft_rule_msg, nft_table_msg
from pyroute2.nftables.expressions import genex

from ztunnel.node import netns
from ztunnel.node.netlink import (
    ACK,
    APPEND,
    CREATE,
    DUMP,
    NETLINK_NETFILTER,
    Attributes,
    KernelRefused,
    Message,
    Netlink,
    Request,
    TooManyAnswersError,
    attribute,
    request,
)
from ztunnel.node.redirect import TABLES, Chain, Expr, Rule, Ruleset, Stage, ruleset

INET = 1
_SUBSYSTEM = 10
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_NEWTABLE, _GETTABLE, _DELTABLE = 0, 1, 2
_NEWCHAIN, _GETCHAIN = 3, 4
_NEWRULE, _GETRULE = 6, 7
_GETGEN = 16
_DESTROYTABLE = 26  # like DELTABLE, but an absent table is no error; Linux 6.3
_F_OWNER, _F_PERSIST = 0x2, 0x4
_NF_ACCEPT = 1

# pyroute2 decodes enumerations to their names; these are the ones that our rules use. An unknown one becomes None there,
# and then differs from everything that we want, which is right.
_NUMBERS: dict[str, int] = {
    **{each.name: each.value for enum in (Regs, Meta, Cmp) for each in enum},
    "NFT_CT_MARK": 3,
    "NFT_CT_ZONE": 17,
    "NFT_PAYLOAD_NETWORK_HEADER": 1,
    "NFT_PAYLOAD_TRANSPORT_HEADER": 2,
    "NF_ACCEPT": _NF_ACCEPT,
}
_RANGE_FLAGS = ("NF_NAT_RANGE_MAP_IPS", "NF_NAT_RANGE_PROTO_SPECIFIED")
# What the kernel adds to a listed expression: values that change by themselves, and defaults.
_VOLATILE = {"counter": ("bytes", "packets"), "bitwise": ("op",), "redir": ("reg_proto_max",)}

_GENERATION = request(nfgen_msg(), _SUBSYSTEM << 8 | _GETGEN, 0, "read rule generation")


# Reading rules takes tens of milliseconds, and an agent that starts reads those of every pod.
_LIKELIEST_FIRST = (Stage.FULL, Stage.REMOVED, Stage.DRAIN, Stage.GUARDED)


FOREIGN = Expr("foreign", ())
"""What stands for an expression that is none of ours and cannot be read."""


class Ownership(Enum):
    """What the kernel can do for tables that an application must not remove."""

    OWNED = "owned"
    SHARED = "shared"


_FLAGS = {Ownership.OWNED: _F_OWNER | _F_PERSIST, Ownership.SHARED: 0}


def probe_ownership() -> Ownership:
    """What this kernel can do, tried out in an empty namespace of its own.

    Raises: NetnsError or NetlinkError when not even an ordinary table can be made: no privilege, or no nf_tables.
    """
    fd = netns.new()
    try:
        return netns.run_inside(fd, _probe)
    finally:
        os.close(fd)


def _probe() -> Ownership:
    for ownership in (Ownership.OWNED, Ownership.SHARED):
        tables = PodTables(ownership)
        try:
            tables.apply(ruleset(Stage.FULL))
        except KernelRefused as error:
            if ownership is Ownership.SHARED or error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
        else:
            return ownership
        finally:
            tables.close()
    raise AssertionError("unreachable: the last ownership returns or raises")


class PodTables:
    """Our tables in one namespace, through the socket that owns them. Construct it inside that namespace.

    A closed one leaves the tables in place. Not for concurrent use.
    """

    def __init__(self, ownership: Ownership) -> None:
        self._netlink = Netlink(NETLINK_NETFILTER)
        self._ownership = ownership
        self._verified: tuple[Ruleset, int] | None = None

    def close(self) -> None:
        """Give the tables up; they stay in force."""
        self._netlink.close()

    def apply(self, wanted: Ruleset) -> None:
        """Replace whatever our tables hold by `wanted`, all or nothing; takes over tables whose owner is dead.

        Raises: KernelRefused naming the operation; nothing has changed then. EPERM on a table: another live process owns it.
        """
        before = self.generation()
        self._netlink.change(_transaction(wanted, self._ownership))
        # One transaction is one generation: if only that one went by, nobody else has changed anything since.
        self._verified = (wanted, before + 1)

    def generation(self) -> int:
        """The namespace's rule set generation: it changes with every change of any table, ours or not."""
        return int(attribute(self._netlink.query(_GENERATION, nft_gen_msg)[0], "NFTA_GEN_ID"))

    def check(self, wanted: Ruleset) -> str | None:
        """Like `difference`, but reads the tables only when something has changed since they were last known to be `wanted`."""
        generation = self.generation()
        if self._verified == (wanted, generation):
            return None
        found = self.difference(wanted)
        self._verified = None if found else (wanted, generation)
        return found

    def difference(self, wanted: Ruleset) -> str | None:
        """The first thing in which the kernel's tables are not `wanted` and ours, in words; None when all is well."""
        for table in wanted.tables:
            found = self._read_table(table)
            if found is not None and (attribute(found, "NFTA_TABLE_FLAGS") or 0) != _FLAGS[self._ownership]:
                return f"table {table} has another owner"
        return self._rules_difference(wanted)

    def stage(self) -> Stage | None:
        """The stage whose rules the kernel holds, whoever owns them; None when our tables hold something that is no stage's."""
        return next((stage for stage in _LIKELIEST_FIRST if self._rules_difference(ruleset(stage)) is None), None)

    def _rules_difference(self, wanted: Ruleset) -> str | None:
        for table in TABLES:
            chains = [each for each in wanted.chains if each.table == table]
            rules = [each for each in wanted.rules if each.table == table]
            if found := self._table_difference(table, table in wanted.tables, chains, rules):
                return found
        return None

    def _table_difference(self, table: str, exists: bool, chains: list[Chain], rules: list[Rule]) -> str | None:
        found = self._read_table(table)
        if found is None:
            return f"table {table} is missing" if exists else None
        if not exists:
            return f"table {table} is left over"
        if attribute(found, "NFTA_TABLE_USE") != len(chains):
            return f"table {table} holds other chains"
        for chain in chains:
            if self._listed_chain(chain) != chain:
                return f"chain {table}/{chain.name} differs"
        try:
            listed = self._listed_rules(table)
        except TooManyAnswersError:
            return f"table {table} holds far too many rules"
        # Rules of one chain are listed in order; chains in any order.
        for chain in chains:
            if [each for each in listed if each.chain == chain.name] != [each for each in rules if each.chain == chain.name]:
                return f"rules of {table}/{chain.name} differ"
        return None

    def _read_table(self, table: str) -> Message | None:
        return self._get(table_question(table), nft_table_msg)

    def _get(self, question: Request, reply: type[Message]) -> Message | None:
        try:
            return self._netlink.query(question, reply)[0]
        except KernelRefused as error:
            if error.errno == errno.ENOENT:
                return None
            raise

    def _listed_chain(self, chain: Chain) -> Chain | None:
        message = _message(nft_chain_msg, [("NFTA_CHAIN_TABLE", chain.table), ("NFTA_CHAIN_NAME", chain.name)])
        found = self._get(request(message, _SUBSYSTEM << 8 | _GETCHAIN, 0, f"read chain {chain.table}/{chain.name}"), nft_chain_msg)
        hook = None if found is None else attribute(found, "NFTA_CHAIN_HOOK")
        if hook is None or attribute(found, "NFTA_CHAIN_POLICY") != _NF_ACCEPT:
            return None
        kind, priority = attribute(found, "NFTA_CHAIN_TYPE"), attribute(hook, "NFTA_HOOK_PRIORITY")
        if attribute(hook, "NFTA_HOOK_HOOKNUM") != chain.hook.value:
            return None
        return Chain(chain.table, chain.name, str(kind), chain.hook, int(priority))

    def _listed_rules(self, table: str) -> list[Rule]:
        message = _message(nft_rule_msg, [("NFTA_RULE_TABLE", table)])
        question = request(message, _SUBSYSTEM << 8 | _GETRULE, DUMP, f"read rules of {table}")
        return [listed_rule(each) for each in self._netlink.query(question, nft_rule_msg)]


def listed_rule(message: Message) -> Rule:
    """A rule as the kernel lists it, in the terms of `redirect`: without handles, counts and defaults.

    One with an expression that pyroute2 cannot read (it gives text or bytes then) has `FOREIGN` in the place of all its expressions: an
    application may put whatever it likes into a table of our name, and must not stop the agent of its node by that.
    """
    try:
        exprs = tuple(map(_listed_expr, attribute(message, "NFTA_RULE_EXPRESSIONS") or []))
    except (AttributeError, KeyError, TypeError, ValueError):
        exprs = (FOREIGN,)
    return Rule(attribute(message, "NFTA_RULE_TABLE"), attribute(message, "NFTA_RULE_CHAIN"), exprs)


def _listed_expr(message: Message) -> Expr:
    name = attribute(message, "NFTA_EXPR_NAME")
    data = attribute(message, "NFTA_EXPR_DATA")
    prefix, fields = f"NFTA_{name.upper()}_", []
    for key, value in () if data is None else data["attrs"]:
        field = key.removeprefix(prefix).lower()
        if field not in _VOLATILE.get(name, ()):
            fields.append(_listed_field(field, value))
    return Expr(name, _in_our_order(name, fields))


def _listed_field(field: str, value: Message) -> tuple[str, int | bytes]:
    match value:
        case int() | bytes():
            return field, value
        case str():
            return field, _NUMBERS.get(value, -1)
        case frozenset():
            return field, sum(1 << i for i, flag in enumerate(_RANGE_FLAGS) if flag in value) if value <= set(_RANGE_FLAGS) else -1
        case None:
            return field, -1
    if (verdict := attribute(value, "NFTA_DATA_VERDICT")) is not None:
        return "verdict", _NUMBERS.get(attribute(verdict, "NFTA_VERDICT_CODE"), -1)
    return field, bytes(attribute(value, "NFTA_DATA_VALUE"))


# The kernel lists the attributes of an expression in an order of its own.
_ORDER = {
    (each.name, frozenset(name for name, _ in each.fields)): tuple(name for name, _ in each.fields)
    for stage in Stage
    for rule in ruleset(stage).rules
    for each in rule.exprs
}


def _in_our_order(name: str, fields: list[tuple[str, int | bytes]]) -> tuple[tuple[str, int | bytes], ...]:
    order = _ORDER.get((name, frozenset(field for field, _ in fields)))
    return tuple(fields) if order is None else tuple(sorted(fields, key=lambda field: order.index(field[0])))


# Encoding takes pyroute2 tens of milliseconds; there are four stages and two ownerships.
@lru_cache(maxsize=8)
def _transaction(wanted: Ruleset, ownership: Ownership) -> tuple[Request, ...]:
    changes = [change for table in TABLES for change in _removal(table, ownership)]
    changes += [_table(table, _FLAGS[ownership]) for table in wanted.tables]
    changes += [_chain(chain) for chain in wanted.chains]
    changes += [_rule(rule) for rule in wanted.rules]
    return (_batch(_BATCH_BEGIN, 0, "begin rules"), *changes, _batch(_BATCH_END, ACK, "commit rules"))


def _batch(kind: int, flags: int, what: str) -> Request:
    message = nfgen_msg()
    message["res_id"] = _SUBSYSTEM
    return request(message, kind, flags, what)


def _message(cls: type[Message], attributes: Attributes) -> Message:
    message = cls()
    message["attrs"] = attributes
    message["nfgen_family"] = INET
    return message


def _table_request(kind: int, table: str, more: Attributes, flags: int, what: str) -> Request:
    return request(_message(nft_table_msg, [("NFTA_TABLE_NAME", table), *more]), _SUBSYSTEM << 8 | kind, flags, what)


def table_question(table: str) -> Request:
    """Asks for a table of family inet; the answer is a `nft_table_msg`."""
    return _table_request(_GETTABLE, table, [], 0, f"read table {table}")


def _table(table: str, table_flags: int) -> Request:
    return _table_request(_NEWTABLE, table, [("NFTA_TABLE_FLAGS", table_flags)] if table_flags else [], CREATE, f"add table {table}")


def _removal(table: str, ownership: Ownership) -> list[Request]:
    what = f"remove table {table}"
    if ownership is Ownership.OWNED:
        return [_table_request(_DESTROYTABLE, table, [], ACK, what)]
    # Kernels without DESTROYTABLE: add, so that there is one to delete.
    return [_table(table, 0), _table_request(_DELTABLE, table, [], ACK, what)]


def _chain(chain: Chain) -> Request:
    hook = {"attrs": [("NFTA_HOOK_HOOKNUM", chain.hook.value), ("NFTA_HOOK_PRIORITY", chain.priority)]}
    attributes: Attributes = [("NFTA_CHAIN_TABLE", chain.table), ("NFTA_CHAIN_NAME", chain.name), ("NFTA_CHAIN_HOOK", hook)]
    attributes += [("NFTA_CHAIN_TYPE", chain.kind), ("NFTA_CHAIN_POLICY", _NF_ACCEPT)]
    return request(_message(nft_chain_msg, attributes), _SUBSYSTEM << 8 | _NEWCHAIN, CREATE, f"add chain {chain.table}/{chain.name}")


def _rule(rule: Rule) -> Request:
    exprs = [_expression(each) for each in rule.exprs]
    attributes: Attributes = [("NFTA_RULE_TABLE", rule.table), ("NFTA_RULE_CHAIN", rule.chain), ("NFTA_RULE_EXPRESSIONS", exprs)]
    return request(
        _message(nft_rule_msg, attributes), _SUBSYSTEM << 8 | _NEWRULE, CREATE | APPEND | ACK, f"add rule to {rule.table}/{rule.chain}"
    )


def _expression(expr: Expr) -> Message:
    if expr.name == "counter":
        return genex("counter", {"bytes": 0, "packets": 0})
    return genex(expr.name, dict(_encoded_fields(expr)))


def _encoded_fields(expr: Expr) -> Iterable[tuple[str, Message]]:
    for field, value in expr.fields:
        if field == "verdict":
            yield "data", {"attrs": [("NFTA_DATA_VERDICT", {"attrs": [("NFTA_VERDICT_CODE", value)]})]}
        elif isinstance(value, bytes):
            yield field, {"attrs": [("NFTA_DATA_VALUE", value)]}
        elif expr.name == "redir" and field == "flags":
            yield field, {flag for i, flag in enumerate(_RANGE_FLAGS) if value & 1 << i}
        else:
            yield field, value
