"""`main.py token`, `main.py policy` and `main.py promote`, against running nodes."""

from __future__ import annotations

import argparse
import hashlib
import secrets
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from secure_store.client import SecureClient
from secure_store.commands.remote import add_connection, ask, urls_of
from secure_store.commands.terminal import TOKEN_VARIABLE, say
from secure_store.config import ConfigError
from secure_store.core.policy import (
    VERBS,
    Effect,
    PolicyError,
    Rule,
    check_key,
    check_role_name,
    check_rules,
    deciding,
)
from secure_store.files import write_durably, write_private
from secure_store.storage.static_access import StaticToken

_UNITS_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def add(commands: Any) -> None:
    """Add `token`, `policy` and `promote` to main.py's commands."""
    _add_token(commands)
    _add_policy(commands)
    promote = commands.add_parser(
        "promote",
        help="make a replica the primary",
        description="Ask the replica at --url to become the primary. It refuses if the old primary "
        "may have\nacknowledged writes that it lacks; --force is your word that the old primary is "
        "stopped:\nwhat only that one has is set aside when it returns. Exit code 1 if refused.",
        examples=[
            "main.py promote --url https://127.0.0.1:8001",
            "main.py promote --url https://10.0.0.2:8000 --cert b.crt --force",
        ],
    )
    add_connection(promote, one_node=True)
    promote.add_argument("--force", action="store_true",
                         help="the old primary is stopped: go ahead without it")  # fmt: skip
    promote.set_defaults(run=_promote)


def _add_token(commands: Any) -> None:
    token = commands.add_parser(
        "token", help="make, list and revoke tokens",
        examples=[f"export {TOKEN_VARIABLE}=…   # an admin's", "main.py token list",
                  "main.py token create --role billing --ttl 12h --name ci",
                  "main.py token revoke 1f3a9c0d5e7b2468",
                  "main.py token bootstrap tokens.json --role admin"],
    )  # fmt: skip
    actions = token.add_subparsers(dest="action", required=True)
    create = actions.add_parser(
        "create", help="make a token; it is shown once",
        description="Make a token and show it, once, on standard output (or write it to --out).",
        examples=["main.py token create --role user",
                  "main.py token create --role billing --ttl 90m --uses 10 --out ci.token"],
    )  # fmt: skip
    create.add_argument("--role", action="append", required=True, help="many times")
    create.add_argument("--ttl", type=_duration, help="how long it lives: 90s, 15m, 12h, 30d "
                        "(default: as long as the token that makes it)")  # fmt: skip
    create.add_argument("--uses", type=int, help="how often it may be used (default: without end)")
    create.add_argument("--name", default="", help="for the list")
    create.add_argument("--out", help="new file for the token (mode 0600)")
    add_connection(create)
    create.set_defaults(run=_create_token)
    listing = actions.add_parser("list", help="every token by its accessor, never the secrets",
                                 examples=["main.py token list",
                                           "main.py token list --json"])  # fmt: skip
    listing.add_argument("--json", action="store_true", help="one JSON object a line")
    add_connection(listing)
    listing.set_defaults(run=_list_tokens)
    revoke = actions.add_parser(
        "revoke", help="revoke a token and all that was made with it",
        description="Revoke a token, by its accessor, and every token made with it. A static "
        "token's name\n(file:ops, demo:admin) revokes what was made with that one. Both nodes know "
        "when this\nreturns with code 0; code 3: the replica is away, and learns it later.",
        examples=["main.py token revoke 1f3a9c0d5e7b2468", "main.py token revoke file:ops"],
    )  # fmt: skip
    revoke.add_argument("accessor")
    add_connection(revoke)
    revoke.set_defaults(run=_revoke_token)
    bootstrap = actions.add_parser(
        "bootstrap", help="the first token, for a tokens file; no node is asked",
        description="Make a random token, add its SHA-256 to a tokens file (for --tokens_file; "
        "made if absent)\nand show the token, once.",
        examples=["main.py token bootstrap tokens.json --role admin --name ops > ops.token"],
    )  # fmt: skip
    bootstrap.add_argument("file", help="the tokens file")
    bootstrap.add_argument("--role", action="append", help="many times (default admin)")
    bootstrap.add_argument("--name", default="admin", help="its name in the audit log")
    bootstrap.set_defaults(run=_bootstrap)


def _add_policy(commands: Any) -> None:
    policy = commands.add_parser(
        "policy", help="show, change and try policies",
        examples=["main.py policy list", "main.py policy get user",
                  "main.py policy put billing billing.json",
                  "main.py policy check billing read billing/keys/1"],
    )  # fmt: skip
    actions = policy.add_subparsers(dest="action", required=True)
    get = actions.add_parser("get", help="one role's rules",
                             examples=["main.py policy get user"])  # fmt: skip
    get.add_argument("role")
    add_connection(get)
    get.set_defaults(run=_get_policy)
    listing = actions.add_parser("list", help="every role and its rules",
                                 examples=["main.py policy list"])  # fmt: skip
    add_connection(listing)
    listing.set_defaults(run=_list_policies)
    put = actions.add_parser(
        "put", help="replace a role's rules",
        description='Replace a role\'s rules by those in a JSON file: [{"pattern","verbs",'
        '"effect"?}] or {"rules":[…]}.',
        examples=["main.py policy put billing billing.json",
                  'echo \'[{"pattern":"a/*","verbs":["read"]}]\' | main.py policy put reader -'],
    )  # fmt: skip
    put.add_argument("role")
    put.add_argument("file", help="JSON, - for standard input")
    add_connection(put)
    put.set_defaults(run=_put_policy)
    check = actions.add_parser(
        "check", help="would this role be allowed this, and by which rule",
        description="Would ROLE be allowed VERB on KEY, and which rule decides. Exit code 0 yes, "
        "1 no.\nWith --file nothing is asked: the rules come from a policies file "
        "(--policies_file) or\na list of rules.",
        examples=["main.py policy check billing read billing/keys/1",
                  "main.py policy check billing read billing/keys/1 --file policies.json"],
    )  # fmt: skip
    check.add_argument("role")
    check.add_argument("verb", choices=VERBS)
    check.add_argument("key")
    check.add_argument("--file", help="rules to try, instead of a node's")
    add_connection(check)
    check.set_defaults(run=_check_policy)


# --- tokens


def _duration(text: str) -> int:
    number = text.rstrip("msdh")
    unit = text[len(number) :]
    if not (number.isascii() and number.isdigit() and int(number) and unit in _UNITS_MS):
        raise argparse.ArgumentTypeError(
            f"expected a time such as 90s, 15m, 12h or 30d, got {text!r}"
        )
    return int(number) * _UNITS_MS[unit]


def _create_token(args: argparse.Namespace) -> int:
    if args.out is not None and Path(args.out).exists():
        raise ConfigError(f"--out: {args.out} exists already; it is not overwritten")

    def work(client: SecureClient) -> Any:
        return client.create_token(args.role, ttl_ms=args.ttl, uses=args.uses, name=args.name)

    made = ask(args, work)
    if made is None:
        return 1
    if args.out is not None:
        write_private(Path(args.out), made.token.encode() + b"\n")
        say(f"wrote {args.out}; accessor {made.accessor}; expires {_time(made.expires_ms)}")
    else:
        say(msgspec.json.encode(made).decode())
    return 0


def _list_tokens(args: argparse.Namespace) -> int:
    rows = ask(args, lambda client: client.tokens())
    if rows is None:
        return 1
    if args.json:
        for row in rows:
            say(msgspec.json.encode(row).decode())
        return 0
    table = [("ACCESSOR", "ROLES", "EXPIRES", "USES LEFT", "MADE WITH", "NAME")]
    for row in rows:
        uses = "" if row["uses_left"] is None else str(row["uses_left"])
        table.append((row["accessor"], ",".join(row["roles"]), _time(row["expires_ms"]), uses,
                      row["parent"] or "", row["name"]))  # fmt: skip
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return 0


def _time(at_ms: int | None) -> str:
    if at_ms is None:
        return "never"
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _revoke_token(args: argparse.Namespace) -> int:
    done = ask(args, lambda client: client.revoke_token(args.accessor))
    if done is None:
        return 1
    if done.degraded:
        say(f"revoked {args.accessor} on the primary; the replica is away and does not know yet")
        return 3
    say(f"revoked {args.accessor}")
    return 0


def _bootstrap(args: argparse.Namespace) -> int:
    path, roles = Path(args.file), tuple(args.role or ["admin"])
    try:
        for role in roles:
            check_role_name(role)
        entries = msgspec.json.decode(path.read_bytes(), type=list[StaticToken])
    except FileNotFoundError:
        entries = []
    except (PolicyError, msgspec.MsgspecError, OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: {e}") from None
    if not args.name.isprintable() or any(each.name == args.name for each in entries):
        raise ConfigError(f"--name: {path} has a token of the name {args.name!r}")
    token = "sst_" + secrets.token_urlsafe(32)
    hashed = hashlib.sha256(token.encode()).hexdigest()
    entries.append(StaticToken(args.name, roles, hashed))
    rows = [
        {
            "name": e.name,
            "roles": e.roles,
            **({"token": e.token} if e.token else {"sha256": e.sha256}),
        }
        for e in entries
    ]
    text = msgspec.json.format(msgspec.json.encode(rows)) + b"\n"
    try:
        if path.exists():
            mode = path.stat().st_mode
            write_durably(path, text)
            path.chmod(mode & 0o777)
        else:
            write_private(path, text)
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror or e}") from None
    say(token)
    return 0


# --- policies


def _read_rules(source: str, role: str) -> tuple[Rule, ...]:
    """A list of rules, `{"rules": […]}`, or a policies file with this role; raises ConfigError."""
    try:
        raw = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        found: Any = msgspec.json.decode(raw)
        if isinstance(found, dict):
            found = found["rules"] if isinstance(found.get("rules"), list) else found.get(role, [])
        rules = msgspec.convert(found, tuple[Rule, ...])
        check_rules(rules)
    except OSError as e:
        raise ConfigError(f"{source}: {e.strerror}") from None
    except (msgspec.MsgspecError, PolicyError, UnicodeDecodeError, RecursionError) as e:
        raise ConfigError(f"{source}: {e}") from None
    return rules


def _role_name(role: str) -> None:
    try:
        check_role_name(role)
    except PolicyError as e:
        raise ConfigError(str(e)) from None


def _show_rules(rules: list[dict[str, Any]]) -> None:
    say(msgspec.json.format(msgspec.json.encode(rules)).decode())


def _get_policy(args: argparse.Namespace) -> int:
    _role_name(args.role)
    rules = ask(args, lambda client: client.policy(args.role))
    if rules is None:
        return 1
    _show_rules(rules)
    return 0


def _list_policies(args: argparse.Namespace) -> int:
    roles = ask(args, lambda client: client.policies())
    if roles is None:
        return 1
    for role, rules in sorted(roles.items()):
        for rule in rules:
            effect, verbs = rule.get("effect", "allow"), ",".join(rule["verbs"])
            say(f"{role}  {effect}  {rule['pattern']}  {verbs}")
        if not rules:
            say(f"{role}  (nothing)")
    return 0


def _put_policy(args: argparse.Namespace) -> int:
    _role_name(args.role)
    rules = [msgspec.to_builtins(rule) for rule in _read_rules(args.file, args.role)]
    done = ask(args, lambda client: client.put_policy(args.role, rules))
    if done is None:
        return 1
    away = " (the replica is away)" if done.degraded else ""
    say(f"put {args.role}: {len(rules)} rules{away}")
    return 0


def _check_policy(args: argparse.Namespace) -> int:
    _role_name(args.role)
    try:
        check_key(args.key)
    except PolicyError as e:
        raise ConfigError(str(e)) from None
    if args.file is not None:
        rule = deciding(_read_rules(args.file, args.role), args.verb, args.key)
        allowed = rule is not None and rule.effect is Effect.ALLOW
        decided: dict[str, Any] | None = msgspec.to_builtins(rule)
    else:
        found = ask(args, lambda client: client.check_policy(args.role, args.verb, args.key))
        if found is None:
            return 1
        allowed, decided = found["allowed"], found["rule"]
    by = f"by {msgspec.json.encode(decided).decode()}" if decided else "no rule matches"
    say(f"{'allowed' if allowed else 'denied'}: {by}")
    return 0 if allowed else 1


def _promote(args: argparse.Namespace) -> int:
    url = urls_of(args)[-1]

    def work(client: SecureClient) -> Any:
        return client.ask(url, "POST", "/admin/promote", {"force": args.force})

    done = ask(args, work)
    if done is None:
        return 1
    forced = ", forced" if done["forced"] else ""
    say(f"{url} is the primary: epoch {done['epoch']}, from record {done['seq']}{forced}")
    return 0
