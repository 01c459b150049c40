"""The page of sessions, used in a real browser before a real server: what it shows is what the API says, what it does
happens, and nothing that a session holds runs or leaves."""

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import httpx
import numpy as np
import pytest

from deltamem_vllm.demo.script import TOLD
from deltamem_vllm.demo.server import VllmServer
from deltamem_vllm.store import codec
from deltamem_vllm.store.protocol import Record
from tests.server.browser import Browser, browser
from tests.server.sessions_page import PATH, SessionsPage, say, served
from tests.server.talk import Talk, memory_headers, ok, refused

SCRIPT = '<img src=x onerror="window.ran=1"><script>window.ran=1</script>\'"&amp;'
DIGITS = 5e-4
"""Relative: norms are shown to 4 digits."""
CONTRAST = """(() => {
    const style = getComputedStyle(document.documentElement);
    const light = name => {
        const hex = style.getPropertyValue(name).trim();
        const [r, g, b] = [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16) / 255)
            .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
    };
    const pairs = [["--text", "--card"], ["--text", "--back"], ["--soft", "--card"], ["--soft", "--back"],
                   ["--accent", "--card"], ["--bad", "--card"], ["--bad", "--bad-back"]];
    return pairs.map(([a, b]) => [a + " on " + b, Math.max(light(a), light(b)) / Math.min(light(a), light(b))]);
})()"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    with served(tmp_path_factory.mktemp("page")) as server:
        yield server


@pytest.fixture(scope="module")
def b(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as made:
        yield made


@pytest.fixture(scope="module")
def api(here: VllmServer) -> Iterator[Talk]:
    with Talk(here.base_url) as made:
        say(made, "clara", *TOLD[:3])
        say(made, "other", TOLD[1])
        yield made


@pytest.fixture
def page(b: Browser, here: VllmServer, api: Talk) -> Iterator[SessionsPage]:
    """The page, entered with the key; afterwards nothing may have been thrown, refused or asked for elsewhere."""
    made = SessionsPage(b, here.base_url)
    b.requested.clear()
    b.scheme("light")
    made.enter()
    yield made
    assert (b.thrown, b.get("violations"), b.get("window.ran ?? null")) == ([], [], None)
    elsewhere = [url for url in b.requested if not url.startswith((f"{here.base_url}/v1/sessions", "data:,"))]
    assert not elsewhere


def exported(api: Talk, session: str, version: int) -> Record:
    return codec.decode(api.get(f"/v1/sessions/{session}/export", params={"version": version}).content)


def norm(record: Record) -> float:
    return float(np.linalg.norm(record.end))


# --- the page itself --------------------------------------------------------------------------------------------------


def test_anybody_gets_the_page_and_nobody_without_the_key_anything_else(here: VllmServer, api: Talk) -> None:
    with httpx.Client(base_url=here.base_url) as stranger:
        got = stranger.get(PATH)
        assert (got.status_code, got.headers["content-type"]) == (200, "text/html; charset=utf-8")
        for path in ("/v1/sessions", f"{PATH}/versions", "/v1/sessions/clara", f"{PATH}/"):
            assert stranger.get(path).status_code == 401, path
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            assert stranger.request(method, PATH).status_code == 401, method
    assert api.get(PATH).text == got.text
    assert "clara" not in got.text
    assert PATH not in ok(api.get("/openapi.json"))["paths"]


def test_no_session_can_be_called_as_the_page_is(api: Talk) -> None:
    why = "no session can be called 'ui'"
    refused(api.post("/v1/sessions", json={"id": "ui"}), 400, why)
    refused(api.post("/v1/sessions/clara/fork", json={"id": "ui"}), 400, why)
    refused(api.delete(PATH), 400, why)
    chat = {"model": "m", "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 2}
    refused(api.post("/v1/chat/completions", json=chat, headers=memory_headers("ui", None)), 400, why)
    refused(api.post("/v1/completions", json={"model": "m", "prompt": [5], "session_id": "ui"}), 400, why)
    assert [row["id"] for row in ok(api.get("/v1/sessions"))["data"]] == ["clara", "other"]


def test_an_error_is_shown_as_it_is(page: SessionsPage, b: Browser, api: Talk) -> None:
    page.enter("a-wrong-key")
    assert page.error() == "401: Unauthorized"
    assert b.text("#list") == ""
    page.enter()
    assert b.text("#error") == ""
    b.type("a b", into="#prefix")
    b.press("Enter")
    said = refused(api.get("/v1/sessions", params={"prefix": "a b"}), 400)
    assert page.error() == f"400 {said['type']}: {said['message']}"


def test_the_list_is_paged_and_searched(page: SessionsPage, b: Browser, api: Talk) -> None:
    many = [f"many:{number:02}" for number in range(23)]
    for name in many:
        assert api.post("/v1/sessions", json={"id": name}).status_code == 201
    b.type("many:", into="#prefix")
    b.press("Enter")
    b.wait("document.querySelectorAll('#rows b').length === 20")
    assert b.texts("#rows b") == many[:20]
    b.click("#more")
    b.wait("document.querySelectorAll('#rows b').length === 23")
    assert b.texts("#rows b") == many
    assert b.text("#more") == ""
    b.type("none", into="#prefix")
    b.press("Enter")
    b.wait("document.querySelector('#none').checkVisibility()")
    for name in many:
        ok(api.delete(f"/v1/sessions/{name}"))


# --- a session --------------------------------------------------------------------------------------------------------

PIXELS = """[...document.querySelectorAll("#maps canvas")].map(canvas => {
    const side = canvas.width / 8, pen = canvas.getContext("2d");
    return [...Array(64).keys()].map(n => [...pen.getImageData(
        (n % 8 + 0.5) * side, (Math.floor(n / 8) + 0.5) * side, 1, 1).data].slice(0, 3));
})"""


def colours(b: Browser, end: Any, largest: Any) -> Any:
    """What a state [layers, 8, 8] is to look like: [layers, 64, 3]."""
    low, zero, high = (np.array(b.get(f"colour('--{name}')")) for name in ("negative", "zero", "positive"))
    share = (end / largest).reshape(len(end), 64, 1)
    return zero + np.abs(share) * (np.where(share < 0, low, high) - zero)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_heat_maps_are_the_memory(page: SessionsPage, b: Browser, api: Talk, scheme: str) -> None:
    page.choose("clara")
    b.scheme(scheme)
    end = exported(api, "clara", 3).end[:, 0]
    assert len(end) == 4
    assert np.abs(end).max() > 0.01, "the memory must hold something, or its picture shows nothing"
    whole = np.abs(end).max()
    b.wait("document.querySelectorAll('#maps canvas').length === 4")
    assert np.abs(np.array(b.get(PIXELS)) - colours(b, end, whole)).max() <= 1
    b.get("(e => { e.value = 'own'; e.dispatchEvent(new Event('change')); })(document.querySelector('#scale'))")
    own = np.abs(end).max(axis=(1, 2), keepdims=True)
    assert np.abs(np.array(b.get(PIXELS)) - colours(b, end, own)).max() <= 1
    for layer, caption in enumerate(b.texts("#maps figcaption")):
        name, norm = caption.splitlines()[0].split(" · norm ")
        assert (name, float(norm)) == (f"layer {layer}", pytest.approx(np.linalg.norm(end[layer]), rel=DIGITS))
    for layer, value, key in ((0, 0, 0), (2, 3, 5), (3, 7, 7)):
        b.point(f'#maps canvas[data-layer="{layer}"]', (key + 0.5) / 8, (value + 0.5) / 8)
        place, said = b.text("#readout").split(": ")
        assert place == f"layer {layer}, head 0, value {value}, key {key}"
        assert float(said) == pytest.approx(end[layer, value, key], rel=1e-5)


def test_the_versions_and_their_norms(page: SessionsPage, b: Browser, api: Talk) -> None:
    page.choose("clara")
    rows = [row.split("\t") for row in b.texts("#versions tr")]
    assert [row[0] for row in rows] == ["3", "2", "1"]
    norms = [norm(exported(api, "clara", version)) for version in (3, 2, 1)]
    assert [float(row[5]) for row in rows] == pytest.approx(norms, rel=DIGITS)
    assert min(abs(a - b) for a, b in combinations(norms, 2)) > 4 * DIGITS * max(norms), "else they show nothing"
    points = b.get("document.querySelector('#chart polyline').getAttribute('points')").split()
    assert len(points) == 3
    heights = [float(point.split(",")[1]) for point in points]
    assert np.argsort(heights).tolist() == np.argsort([-each for each in reversed(norms)]).tolist()
    b.click("#versions tr:nth-child(3) button")
    page.settled("clara", 1)
    title, shown = b.text("#memory-title").split(": norm ")
    assert (title, float(shown)) == ("Memory of version 1 (an older one)", pytest.approx(norms[2], rel=DIGITS))


def test_fork_roll_back_reset_and_delete(page: SessionsPage, b: Browser, api: Talk) -> None:
    first = exported(api, "clara", 1).end
    page.choose("clara")
    page.confirm("#fork", "copy")
    page.settled("copy", 1)
    assert b.text("#said") == "copy is a copy of clara@3."
    assert np.array_equal(exported(api, "copy", 1).end, exported(api, "clara", 3).end)
    page.choose("clara")
    page.confirm("#fork", "copy")
    assert page.error() == "409 ConflictError: session 'copy' exists: choose another id, or delete it"
    page.choose("copy")
    say(api, "copy", TOLD[3])
    page.confirm("#reset")
    assert page.error().startswith("412 PreconditionFailedError: ")
    assert "version 2" in page.error(), "somebody else has changed it: what is on the screen must not be acted on"
    b.click("#refresh")
    page.settled("copy", 2)
    page.confirm("#reset")
    page.settled("copy", 3)
    assert not exported(api, "copy", 3).end.any()
    page.confirm("#versions tr:nth-child(3) button.grave")
    page.settled("copy", 4)
    assert np.array_equal(exported(api, "copy", 4).end, exported(api, "clara", 3).end)
    b.click("#delete")
    b.wait("document.querySelector('#ask').open")
    b.click("#no")
    assert api.version("copy") == 4
    page.confirm("#delete")
    b.wait("document.querySelector('#detail').hidden")
    assert b.text("#said").startswith("copy is erased: 4 versions in the store")
    assert api.version("copy") == 0
    b.wait("document.querySelectorAll('#rows b').length === 2")
    assert np.array_equal(exported(api, "clara", 1).end, first)
    assert api.version("clara") == 3


def test_nothing_but_the_keyboard(page: SessionsPage, b: Browser) -> None:
    b.press("Tab")  # from the key's field: its button; then the field to search, its button, the first session
    b.press("Tab", 3)
    assert b.get("document.activeElement.dataset.id") == "clara"
    b.press("Enter")
    page.settled("clara")
    b.get("document.querySelector('#delete').focus()")
    b.press("Enter")
    b.wait("document.querySelector('#ask').open")
    assert b.get("document.activeElement.id") == "no", "Enter must not delete what it only asked about"
    b.press("Escape")
    b.wait("!document.querySelector('#ask').open")
    b.press("Tab", 2)
    assert b.get("document.activeElement.dataset.layer") == "0"
    b.press("ArrowRight")
    b.press("ArrowRight", 2)
    b.press("ArrowDown")
    assert b.text("#readout").startswith("layer 0, head 0, value 1, key 2: ")


def test_names_and_contrast(page: SessionsPage, b: Browser) -> None:
    page.choose("clara")
    nodes = b.ask("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "textbox", "combobox", "image", "dialog", "navigation", "region", "table")
    found = [
        (node["role"]["value"], node["name"]["value"])
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in roles[:-1]
    ]
    assert {"button", "textbox", "combobox", "image", "navigation", "region"} <= {role for role, _ in found}
    assert all(name for _, name in found), found
    for scheme in ("light", "dark"):
        b.scheme(scheme)
        low = [(what, ratio) for what, ratio in b.get(CONTRAST) if ratio < 4.5]
        assert not low, scheme
    b.ask("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=False)
    assert b.get("document.documentElement.scrollWidth") <= 360, "a phone must not scroll sideways"
    b.ask("Emulation.clearDeviceMetricsOverride")


# --- nothing runs, nothing leaves -------------------------------------------------------------------------------------


def test_what_a_session_holds_is_text(page: SessionsPage, b: Browser, api: Talk) -> None:
    ok(api.post("/v1/sessions/other/facts", json={"text": SCRIPT, "source": SCRIPT}))
    ok(api.patch("/v1/sessions/other", json={"metadata": {SCRIPT[:60]: SCRIPT}}))
    page.choose("other")
    cells = b.texts("#texts th, #texts td")
    assert cells == [f"pinned fact, {SCRIPT}", SCRIPT, f"metadata {SCRIPT[:60]}", SCRIPT]
    b.type(f"/../{SCRIPT}", into="#prefix")
    b.press("Enter")
    page.error()
    assert b.get("document.querySelectorAll('img, script[src], iframe').length") == 0


def test_the_key_is_nowhere_but_in_the_page(page: SessionsPage, b: Browser, here: VllmServer) -> None:
    kept = b.get("[localStorage.length, sessionStorage.length, document.cookie, location.href]")
    assert kept == [0, 0, "", f"{here.base_url}{PATH}"]
    b.open(page.url)
    assert b.get("[key, document.querySelector('#key').value]") == ["", ""]


PLANTED = {
    "a script": (
        "require-trusted-types-for",
        "const made = document.createElement('script'); made.append('window.ran = 1'); document.head.append(made)",
    ),
    "a handler": ("require-trusted-types-for", "document.body.setAttribute('onclick', 'window.ran = 1')"),
    "markup": ("require-trusted-types-for", "document.body.innerHTML = '<img src=x onerror=\"window.ran = 1\">'"),
    "a style": ("style-src-attr", "document.body.setAttribute('style', 'color: red')"),
    "a picture": ("img-src", "document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))"),
    "a question": ("connect-src", "fetch('http://127.0.0.1:9/').catch(() => 0)"),
    "a form": (
        "form-action",
        "const made = document.createElement('form'); made.action = 'http://127.0.0.1:9/'; document.body.append(made); "
        "made.submit()",
    ),
    "a frame": (
        "frame-src",
        "document.body.append(Object.assign(document.createElement('iframe'), {src: '/version'}))",
    ),
}


@pytest.mark.parametrize("what", PLANTED)
def test_what_is_planted_in_the_page_is_stopped_and_seen(b: Browser, here: VllmServer, what: str) -> None:
    """The last words of the fixture mean something only if it would see such things."""
    rule, script = PLANTED[what]
    b.open(f"{here.base_url}{PATH}")
    b.get(f"void (() => {{ try {{ {script} }} catch {{}} document.body.click(); }})()")
    b.wait("violations.length > 0")
    assert b.get("violations[0]").startswith(rule)
    assert b.get("window.ran ?? null") is None
