"""The chat page in headless Chromium over a real server: a reader sees what the API answers, from the keyboard and on a phone."""

from __future__ import annotations

import base64
import dataclasses
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx2
import pytest
import uvicorn

from graft.core.store import AdapterStore
from graft.data import drawings
from graft.serve import images
from graft.serve.api import build
from graft.serve.runner import Runner

pytest.importorskip("selenium", reason="selenium is not installed")
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), "/usr/bin/chromedriver"
if not CHROMIUM or not Path(DRIVER).exists():
    pytest.skip("Chromium is not installed (on Debian: chromium and chromium-driver)", allow_module_level=True)
CONTROLS, TARGETS = "select, input, textarea, button, summary, .log", "select, label:has(:checked), input:not(:checked), textarea, button, summary"


def until(met):
    return WebDriverWait(None, 60, 0.05).until(lambda _: met())


class Server:
    """The app on a port of its own. Answers have all their tokens; the engine rests after `steps` while `free` is not set, and says what is `said`."""

    def __init__(self, spec):
        self.runner, self.free, self.steps, self.said = Runner(spec), threading.Event(), 0, None
        self.free.set()
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.http = httpx2.Client(base_url=f"http://127.0.0.1:{self.socket.getsockname()[1]}", timeout=60)
        self.server = uvicorn.Server(uvicorn.Config(build(self.runner), log_level="error", timeout_graceful_shutdown=5))
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.thread.start()
        until(lambda: self.http.get("/ready").status_code == 200)
        self.runner.submit = lambda request, folder=None: Runner.submit(self.runner, dataclasses.replace(request, ends=()), folder)
        self.real, self.runner.engine.step = self.runner.engine.step, self.step

    def step(self):
        if self.steps <= 0:
            self.free.wait(60)
        self.steps -= 1
        return [dataclasses.replace(c, text=self.said) if self.said and c.text else c for c in self.real()]

    def reply(self, *texts, model="one", system=None, **how):  # the API's (text, usage) to what a user and an assistant said in turn
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        body = self.http.post("/v1/chat/completions", json={"model": model, "messages": messages, "seed": 3, "max_tokens": 24, **how}).json()
        return body["choices"][0]["message"]["content"], body["usage"]


class Page:
    def __init__(self, driver, url):
        self.driver, self.js, self.cdp = driver, driver.execute_script, driver.execute_cdp_cmd
        self.all, self.one = partial(driver.find_elements, "css selector"), partial(driver.find_element, "css selector")
        self.focused = lambda: driver.switch_to.active_element
        self.place = partial(self.js, "const r = arguments[0].getBoundingClientRect(); return [r.left, r.right, r.height]")
        self.compare = lambda model: Select(self.one("#other")).select_by_value(model)
        self.say = lambda text: self.one("#input").send_keys(text, Keys.ENTER)
        driver.get(url)
        until(lambda: len(self.all("#model option")) >= 2)
        self.fill(seed=3, max_tokens=24)

    def fill(self, **fields):
        self.js("for (const [k, v] of Object.entries(arguments[0])) document.getElementById(k)[k === 'stream' ? 'checked' : 'value'] = v", fields)

    def give(self, way, *files):
        """Files of (name, type, bytes), as a user chooses, pastes or drops them."""
        self.js(
            """const [way, files] = arguments, data = new DataTransfer(), input = document.getElementById("file");
            for (const [name, type, text] of files) data.items.add(new File([Uint8Array.from(atob(text), c => c.charCodeAt(0))], name, { type }));
            if (way === "choose") { input.files = data.files; input.dispatchEvent(new Event("change")) }
            else if (way === "paste") document.activeElement.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true }));
            else for (const type of ["dragover", "drop"]) document.body.dispatchEvent(new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true }));""",
            way,
            [(name, kind, base64.b64encode(data).decode()) for name, kind, data in files],
        )

    def texts(self, kind, column=0):
        return [p.get_property("textContent") for p in self.all(f"section:nth-of-type({column + 1}) .{kind}")]

    def answers(self, column=0):
        until(lambda: self.one("#send").is_displayed())  # all are whole
        return self.texts("assistant", column)


@pytest.fixture(scope="module")
def server(spec, tmp_path_factory):
    store = shutil.copytree(spec.store, tmp_path_factory.mktemp("page") / "store")
    server = Server(dataclasses.replace(spec, store=str(store), max_concurrent=2))
    yield server
    server.server.should_exit = True
    server.thread.join(30)
    assert not server.thread.is_alive()


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,800"):
        options.add_argument(f"--{flag}")
    with webdriver.Chrome(options, webdriver.ChromeService(DRIVER)) as driver:
        yield driver


@pytest.fixture
def page(server, browser):
    yield Page(browser, str(server.http.base_url))
    server.said = None
    server.free.set()
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    until(lambda: not server.runner.under_way)


@pytest.mark.parametrize("how", [{"temperature": 0}, {"seed": 7, "temperature": 1.2}, {"system": "Draw shiba"}, {"stream": False}])
def test_enter_sends_and_the_answer_and_its_counts_are_the_apis(page, server, how):
    page.fill(**how)
    page.say("畫 sea" + Keys.SHIFT + Keys.ENTER + Keys.NULL + "today")
    expected, usage = server.reply("畫 sea\ntoday", **how)
    assert page.answers() == [expected] and page.texts("user") == ["畫 sea\ntoday"]
    assert page.focused() == page.one("#input") and page.focused().get_property("value") == ""
    assert (expected == server.reply("畫 sea\ntoday")[0]) == ("stream" in how), "what is set reaches the model"
    (told,) = page.texts("meta")
    assert f"prompt {usage['prompt_tokens']} · " in told and f"answer {usage['completion_tokens']} tokens · " in told and "tokens/s" in told
    assert ("first token" in told) == ("stream" not in how)


def test_base_and_adapter_side_by_side_each_keep_their_conversation(page, server):
    page.compare("base")
    for text in ("畫 sea", "weather"):
        page.say(text)
        page.answers()
    for column, model in enumerate(("one", "base")):
        first = server.reply("畫 sea", model=model)[0]
        assert page.answers(column) == [first, server.reply("畫 sea", first, "weather", model=model)[0]]
        assert page.texts("user", column) == ["畫 sea", "weather"]
    assert page.answers(0)[0] != page.answers(1)[0]
    assert page.place(page.all("section")[0])[1] <= page.place(page.all("section")[1])[0]
    page.compare("")
    assert len(page.answers()) == 2 and page.answers(1) == []


@pytest.mark.parametrize("way", ["escape", "button"])
def test_stop_keeps_what_was_streamed_and_the_next_message_follows_it(page, server, way):
    whole, _ = server.reply("畫 a long one", max_tokens=100)
    page.fill(max_tokens=100)
    server.steps = 20
    server.free.clear()
    page.say("畫 a long one")
    until(lambda: page.texts("assistant") not in ([], ["…"]))
    page.focused().send_keys(Keys.ESCAPE) if way == "escape" else page.one("#stop").click()
    (begun,) = page.answers()
    assert whole.startswith(begun) and begun != whole and "stopped" in page.texts("meta")[0] and page.focused() == page.one("#input")
    server.free.set()
    until(lambda: not server.runner.under_way)  # the server works on it no more
    page.fill(max_tokens=8)
    page.say("sea")
    assert page.answers() == [begun, server.reply("畫 a long one", begun, "sea", max_tokens=8)[0]]


def test_enter_that_ends_a_composition_does_not_send(page, server):
    page.js("window.seen = []; addEventListener('keydown', e => seen.push([e.key, e.isComposing]), true)")
    page.one("#input").click()
    page.cdp("Input.imeSetComposition", {"text": "畫海", "selectionStart": 2, "selectionEnd": 2})
    page.focused().send_keys(Keys.ENTER)
    assert page.js("return seen") == [["Enter", True]], "the key came while text was composed"
    assert page.texts("user") == [] and page.one("#send").is_displayed()
    page.cdp("Input.insertText", {"text": "畫海"})  # ends the composition
    page.focused().send_keys(Keys.ENTER)
    assert page.answers() == [server.reply("畫海")[0]] and page.texts("user") == ["畫海"]


def test_what_is_known_of_an_adapter_stands_beside_it_and_new_ones_appear(page, server, tiny):
    card, badges, facts = server.http.get("/v1/models/one").json(), page.all(".about summary"), page.all(".facts")
    for text in (card["version"], str(card["gate"]["effect_nats"]), str(card["gate"]["tolerance_nats"]), "none yet"):
        assert text in facts[0].text
    assert "verified" in badges[0].text and "override" not in badges[0].text and page.place(page.one(".log"))[1] <= page.place(facts[0])[0]
    store, lineage = AdapterStore(Path(server.runner.spec.store)), {"commit": "c0ffee", "created_unix_s": 1.7e9, "counts": {"steps": 432}}
    three = store.note(store.add("three", tiny[1]["two"], lineage).id, override="by <b>hand</b>", evaluation={"strict": {"f1": 0.98765}})
    until(lambda: server.http.get("/v1/models/three").json().get("override"))
    page.one("#other").send_keys(Keys.NULL)  # the focus alone
    until(lambda: page.all("#other option[value=three]"))
    page.compare("three")
    assert "override" in badges[1].text and "override" not in badges[0].text, "without opening anything"
    badges[1].click()
    for text in (three.id, "by <b>hand</b>", "c0ffee", "2023", "counts.steps\n432", "strict.f1\n0.9877"):
        assert text in facts[1].text


def test_an_error_is_told_and_the_page_goes_on(page, server):
    page.say("x" * 600)
    assert page.answers() == [] and "the model holds 256" in page.texts("error")[0]
    assert page.one("#input").get_property("value") == "x" * 600, "it can be mended"
    page.say("sea")  # it is selected, so typed over
    assert page.answers() == [server.reply("sea")[0]], "what was refused is no part of the conversation"
    server.free.clear()
    with ThreadPoolExecutor(2) as others:
        asked = [others.submit(server.reply, "sea"), others.submit(server.reply, "sea")]
        until(lambda: server.runner.under_way == 2)
        page.say("once more")
        until(lambda: len(page.texts("error")) == 2)
        server.free.set()
    assert all(a.result() for a in asked)
    assert "under way" in page.texts("error")[1] and "Try again in 1 s" in page.texts("error")[1]
    page.fill(temperature=3)
    page.one("#input").send_keys(Keys.ENTER)
    assert page.focused() == page.one("#temperature") and len(page.texts("user")) == 3, "a wrong setting is shown, not sent"


def test_markup_stays_text(page, server):
    server.said = evil = "<img src=x onerror=\"document.title='owned'\"><b>"
    page.compare("base")
    page.say(evil)
    for column in (0, 1):
        assert page.answers(column)[0].startswith(evil * 2) and page.texts("user", column) == [evil]
    assert page.all("main img, .log b") == [] and page.driver.title == "graft"


def test_everything_is_reached_by_tab_and_named(page):
    page.compare("base")
    page.one("#settings summary").send_keys(Keys.ENTER)
    wanted, found = [e for e in page.all(CONTROLS) if e.is_displayed()], []
    assert page.one("#system") in wanted and page.one("#send") in wanted and len(wanted) > 10
    page.one("#model").send_keys(Keys.NULL)  # the focus alone
    for _ in wanted:
        found.append(page.focused())
        style, width = page.js("const s = getComputedStyle(document.activeElement); return [s.outlineStyle, parseFloat(s.outlineWidth)]")
        assert style == "solid" and width >= 2 and found[-1].accessible_name, found[-1].get_attribute("outerHTML")
        found[-1].send_keys(Keys.TAB)
    assert found == wanted, "in the order in which they stand"


@pytest.mark.parametrize("other", ["", "base"])
def test_on_a_phone_nothing_overflows_and_a_finger_hits(page, server, other):
    page.cdp("Emulation.setDeviceMetricsOverride", {"width": 360, "height": 640, "deviceScaleFactor": 2, "mobile": True})
    server.said = "unbreakable" * 3
    page.compare(other)
    page.say("x" * 90)
    assert page.answers()
    for opened in (False, True):
        page.js("for (const d of document.querySelectorAll('details')) d.open = arguments[0]", opened)
        for box in page.all("html, header, #settings > div, .about, .log"):
            assert page.js("return arguments[0].scrollWidth <= arguments[0].clientWidth", box), box.get_attribute("outerHTML")[:99]
        for control in (c for c in page.all(TARGETS) if c.is_displayed()):
            (left, right, height), swiped = page.place(control), control == page.all(".about summary")[1]
            assert height >= 40 and (swiped or 0 <= left < right <= 360), control.get_attribute("outerHTML")
    first, second = map(page.place, page.all("section"))
    assert (300 < first[1] <= second[0] < 360) if other else first[:2] == [0, 360], "of two the second shows at the edge"


# ---- images -----------------------------------------------------------------------------------------------------------------
PICTURES = [(f"{n}.png", "image/png", row["images"][0]["bytes"]) for n, row in enumerate(drawings.rows(3, seed=4))]
NOTE = ("note.txt", "text/plain", b"words")


@pytest.fixture(scope="module")
def seeing_server(seeing):
    server = Server(dataclasses.replace(seeing, max_images=3))
    yield server
    server.server.should_exit = True
    server.thread.join(30)


@pytest.fixture
def seer(seeing_server, browser):
    yield Page(browser, str(seeing_server.http.base_url))
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    until(lambda: not seeing_server.runner.under_way)


def showing(text, *pictures):
    """A content of the API."""
    urls = [f"data:{kind};base64,{base64.b64encode(data).decode()}" for _, kind, data in pictures]
    return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), *([{"type": "text", "text": text}] if text else [])]


def thumbnails(page, wanted):
    """The buttons that remove an image, once there are as many as are wanted, each shown."""
    until(lambda: len(page.all("#images button")) == wanted)
    until(lambda: page.js("return [...document.querySelectorAll('#images img')].every(i => i.complete && i.naturalWidth)"))
    return page.all("#images button")


@pytest.mark.parametrize("way", ["choose", "paste", "drop"])
def test_images_are_sent_and_stay_in_the_conversation(seer, seeing_server, way):
    seer.give(way, *PICTURES[:2])
    thumbnails(seer, 2)
    assert seer.focused() == seer.one("#input")
    seer.say("what?")
    first, usage = seeing_server.reply(showing("what?", *PICTURES[:2]), model="words")
    assert seer.answers() == [first] and f"prompt {usage['prompt_tokens']} · " in seer.texts("meta")[0]
    assert seer.all("#images button") == [] and seer.texts("user") == ["what?"]
    assert seer.js("return [...document.querySelectorAll('.user img')].map(i => [i.alt, i.naturalWidth])") == [["0.png", 112], ["1.png", 112]]
    seer.say("and then?")
    assert seer.answers()[1] == seeing_server.reply(showing("what?", *PICTURES[:2]), first, "and then?", model="words")[0]


def test_an_image_alone_is_a_message_in_both_columns(seer, seeing_server):
    seer.compare("base")
    seer.give("paste", PICTURES[2])
    thumbnails(seer, 1)
    seer.one("#input").send_keys(Keys.ENTER)
    for column, model in enumerate(("words", "base")):
        assert seer.answers(column) == [seeing_server.reply(showing("", PICTURES[2]), model=model)[0]]
        assert len(seer.all(f"section:nth-of-type({column + 1}) .user img")) == 1
    assert seer.answers(0) != seer.answers(1)


def test_an_image_is_removed_by_the_keyboard_and_what_is_refused_is_said(seer, seeing_server):
    seer.give("drop", NOTE, *PICTURES)
    first, *_ = thumbnails(seer, 3)
    assert seer.one("#status").text == "note.txt: 不是圖片 not an image" and first.accessible_name == "移除 Remove 0.png"
    seer.give("paste", PICTURES[0])
    until(lambda: seer.one("#status").text == "0.png: 上限 at most 3 張 images")
    first.send_keys(Keys.ENTER)
    assert [b.accessible_name[-5:] for b in thumbnails(seer, 2)] == ["1.png", "2.png"] and seer.focused() == seer.one("#input")
    seer.give("choose", ("large.png", "image/png", bytes(images.MAX_BYTES + 1)))
    until(lambda: seer.one("#status").text == "large.png: 16.0 MiB，上限 at most 16 MiB")
    seer.give("choose", ("broken.png", "image/png", PICTURES[0][2][:-300]))
    until(lambda: len(seer.all("#images button")) == 3)
    seer.say("look")
    assert seer.answers() == [] and "messages.0.content.2: truncated" in seer.texts("error")[0]
    assert len(seer.all("#images button")) == 3 and seer.one("#input").get_property("value") == "look", "it can be mended"
    seer.all("#images button")[2].click()
    seer.say("look")
    assert seer.answers() == [seeing_server.reply(showing("look", *PICTURES[1:]), model="words")[0]]


def test_images_fit_a_phone_and_the_keyboard(seer):
    seer.cdp("Emulation.setDeviceMetricsOverride", {"width": 360, "height": 640, "deviceScaleFactor": 2, "mobile": True})
    seer.give("choose", *PICTURES)
    thumbnails(seer, 3)
    for box in seer.all("html, form, .log"):
        assert seer.js("return arguments[0].scrollWidth <= arguments[0].clientWidth", box), box.get_attribute("outerHTML")[:99]
    for control in (c for c in seer.all(f"form :is({TARGETS})") if c.is_displayed()):
        left, right, height = seer.place(control)
        assert height >= 40 and 0 <= left < right <= 360 and control.accessible_name
    assert seer.place(seer.one("#input"))[1] - seer.place(seer.one("#input"))[0] > 150
    wanted, found = [*seer.all("#images button"), seer.one("#add"), seer.one("#input")], []
    wanted[0].send_keys(Keys.NULL)
    for _ in wanted:
        found.append(seer.focused())
        found[-1].send_keys(Keys.TAB)
    assert found == wanted
    seer.js("document.getElementById('file').onclick = event => { event.preventDefault(); document.title = 'choose' }")
    seer.one("#add").send_keys(Keys.ENTER)
    assert seer.driver.title == "choose"
    seer.say("what?")
    assert seer.answers() and len(seer.all(".user img")) == 3
    assert seer.js("return document.querySelector('.log').scrollWidth <= document.querySelector('.log').clientWidth")


def test_a_model_of_text_alone_is_offered_no_images(page):
    assert not page.one("#add").is_displayed()
    for way in ("paste", "drop", "choose"):
        page.give(way, PICTURES[0])
    page.say("sea")
    assert page.answers() and page.all("#images img, .user img") == [], "nor does the page give way to the file"
