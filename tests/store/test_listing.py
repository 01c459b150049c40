"""A page of a listing costs what is on it, however many sessions the tenant has; and the suite catches what would make
it wrong."""

from pathlib import Path
from typing import Any

import apsw
import psycopg
import pytest
from msgspec import structs

from deltamem_vllm.store import ledger, memory, sqlite_schema
from deltamem_vllm.store import postgres_schema as sql
from deltamem_vllm.store.memory import MemoryStore
from deltamem_vllm.store.postgres import PostgresStore
from deltamem_vllm.store.protocol import MAX_KEY_BYTES, Record, id_range
from deltamem_vllm.store.sqlite import SQLiteStore
from tests.store import conformance, conformance_kept

COUNT = 20_000
PAGES = [("s", None), ("s9", None), ("s19999", None), ("s1", "s19998"), (None, "s19998"), ("none", None)]


def test_ranges() -> None:
    assert id_range(None, "ab") == ("ab", "ac")
    assert id_range("abx", "ab") == ("abx\x01", "ac")
    assert id_range("aa", "ab") == ("ab", "ac")
    assert id_range(None, "a\ud7ff") == ("a\ud7ff", "a\ue000"), "a surrogate is no character"
    assert id_range(None, "a\U0010ffff") == ("a\U0010ffff", "b")
    everything = id_range(None, None)
    assert everything == id_range(None, "") == ("", "\U0010ffff" * 65)
    assert everything[0] < "\U0010ffff" * (MAX_KEY_BYTES // 4) < everything[1]


@pytest.mark.parametrize(("prefix", "after"), PAGES)
def test_sqlite_seeks_both_ends(tmp_path: Path, prefix: str | None, after: str | None) -> None:
    SQLiteStore(tmp_path / "s.db").close()
    reader = apsw.Connection(str(tmp_path / "s.db"))
    bindings = ("t", *id_range(after, prefix), 10)
    plan = [row[3] for row in reader.execute(f"EXPLAIN QUERY PLAN {sqlite_schema.LIST}", bindings)]
    reader.close()
    assert len(plan) == 2, "nothing is sorted"
    assert plan[0].startswith("SEARCH h USING")
    assert "(tenant=? AND session>? AND session<?)" in plan[0]
    assert plan[1].startswith("SEARCH v USING")
    assert "(tenant=? AND session=? AND version=?)" in plan[1]


def rows_read(node: dict[str, Any]) -> float:
    """Rows that a plan's scans looked at, those they threw away included."""
    own = (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
    below = node.get("Plans", [])
    return float(own) if not below else sum(map(rows_read, below))


def test_postgres_reads_what_is_on_the_page(postgres_url: str) -> None:
    check_postgres(postgres_url, sql.LIST)


def test_postgres_check_catches_a_range_that_no_index_can_seek(postgres_url: str) -> None:
    """PLANTED BUG: the ids are compared by an expression."""
    with pytest.raises(AssertionError, match="<= 30"):
        check_postgres(postgres_url, sql.LIST.replace("h.session >=", "h.session || '' >="))


def check_postgres(postgres_url: str, listing: str) -> None:
    """No page reads more rows than it shows, whatever the planner knows of the tables and of the values."""
    PostgresStore(postgres_url).close()
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        series = f"FROM generate_series(0, {COUNT - 1}) n"
        admin.execute(f"INSERT INTO deltamem_sessions SELECT 't', 's' || n, 1, 'aa', 'r', 0 {series}")  # type: ignore[arg-type]
        admin.execute(
            f"INSERT INTO deltamem_versions SELECT 't', 's' || n, 1, 'aa', 'r', 0, 0, 0, 0, 3, 'abc' {series}"  # type: ignore[arg-type]
        )
        statement = listing % ("$1", "$2", "$3", "$4")
        admin.execute(f"PREPARE page (text, text, text, bigint) AS {statement}")  # type: ignore[arg-type]
        cursor = psycopg.ClientCursor(admin)
        for setting in (
            "SET plan_cache_mode = force_custom_plan",
            "ANALYZE deltamem_sessions, deltamem_versions",
            "SET plan_cache_mode = force_generic_plan",
        ):
            admin.execute(setting)  # type: ignore[arg-type]
            for prefix, after in PAGES:
                bindings = ("t", *id_range(after, prefix), 10)
                cursor.execute("EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE page (%s, %s, %s, %s)", bindings)
                found: Any = cursor.fetchone()
                assert rows_read(found[0][0]["Plan"]) <= 30, (setting, prefix, after, found)


# --- planted bugs -------------------------------------------------------------------------------------------


def test_suite_catches_attributes_that_are_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """PLANTED BUG: what was erased from the attributes comes back with an older memory."""
    real = ledger.restored

    def everything(old: Record, newest: Record, request_id: str) -> Record:
        return structs.replace(real(old, newest, request_id), attributes=old.attributes)

    monkeypatch.setattr(ledger, "restored", everything)
    with pytest.raises(AssertionError):
        conformance_kept.rolls_back_the_memory_and_not_the_attributes(Again())


@pytest.mark.parametrize("bug", ["unbounded", "off by one", "skips"])
def test_suite_catches_a_wrong_range(monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    """PLANTED BUGS: the prefix only starts the page; its last character's successor belongs to it; the page skips the
    prefix itself."""

    def wrong(after: str | None, prefix: str | None) -> tuple[str, str]:
        start, stop = id_range(after, prefix)
        return {
            "unbounded": (start, id_range(None, None)[1]),
            "off by one": (start, stop + "\x01"),
            "skips": (start + "\x01" * bool(prefix), stop),
        }[bug]

    monkeypatch.setattr(memory, "id_range", wrong)
    with pytest.raises(AssertionError):
        conformance.lists_by_prefix(Again())


class Again:
    """One memory store, however often it is opened."""

    def __init__(self) -> None:
        self.store = MemoryStore()

    def __call__(self, **options: Any) -> MemoryStore:
        return self.store
