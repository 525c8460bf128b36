"""The page in headless Chromium, as a file: what a reader sees, on a desk and on a phone, light and dark, and on paper."""

from __future__ import annotations

import base64
import shutil
from pathlib import Path

import pytest

from graft.report.page import write

from .made import SHIBA, TASKS, make, metrics, plan_in, predictions
from .made_images import drawing, put, run_in

pytest.importorskip("selenium", reason="selenium is not installed")
from selenium import webdriver

CHROMIUM, DRIVER = shutil.which("chromium"), "/usr/bin/chromedriver"
if not CHROMIUM or not Path(DRIVER).exists():
    pytest.skip("Chromium is not installed (on Debian: chromium and chromium-driver)", allow_module_level=True)
SECTIONS = ["head", "lineage", "data", "training", "cost", "evaluation"]
LONG = "https://example.com/" + "unbreakable" * 60


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,800"):
        options.add_argument(f"--{flag}")
    with webdriver.Chrome(options, webdriver.ChromeService(DRIVER)) as driver:
        yield driver


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    rows = [{**p, "answer": LONG} if p["id"] == "9" else p for p in predictions()]
    lines = list(metrics(2_000, resumed_at=700, left_out=300))
    return write(make(plan_in(tmp_path_factory.mktemp("page"), TASKS), predictions=rows, metrics=lines)).as_uri()


def shown(browser, url, width, scheme, media="screen"):
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [{"name": "prefers-color-scheme", "value": scheme}]})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500})
    browser.get(url)
    return browser.execute_script


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_sections_show_and_nothing_overflows(browser, url, tmp_path, width, scheme):
    js = shown(browser, url, width, scheme)
    for name in SECTIONS:
        assert js("const r = document.getElementById(arguments[0]).getBoundingClientRect(); return r.width > 300 && r.height > 40", name), name
    js("for (const d of document.querySelectorAll('details')) d.open = true")
    assert js("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    outside = js(
        "const w = document.documentElement.clientWidth; return [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') "
        "&& e.getBoundingClientRect().right > w + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert outside == []
    assert js("return [...document.querySelectorAll('.prediction .sides > div')].every(d => d.getBoundingClientRect().width > 150)")
    paper, ink = js("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color].map(c => +c.match(/\\d+/)[0])")
    assert (paper > 200 and ink < 60) if scheme == "light" else (paper < 60 and ink > 200)
    assert SHIBA in js("return document.body.innerText") and js("return document.querySelectorAll('figure svg path.line').length") > 20
    assert js("return [...document.querySelectorAll('figure svg')].every(s => s.getBoundingClientRect().height > 60)")
    assert browser.get_log("browser") == []
    picture = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    (tmp_path / f"report-{width}-{scheme}.png").write_bytes(base64.b64decode(picture["data"]))
    assert (tmp_path / f"report-{width}-{scheme}.png").stat().st_size > 20_000


def test_the_policy_lets_nothing_run(browser, url):
    js = shown(browser, url, 1280, "light")
    ran = "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s); return window.ran"
    assert js(ran) is None
    assert any("Content Security Policy" in line["message"] for line in browser.get_log("browser"))


def test_paper_is_white_and_holds_the_width(browser, url):
    js = shown(browser, url, 700, "dark", "print")
    assert js("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert js("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert pdf.startswith(b"%PDF") and len(pdf) > 20_000


def test_images_stand_beside_their_prompt_and_on_a_phone_below_it(browser, tmp_path):
    url = write(run_in(tmp_path, 4, lambda artifact, n: [put(artifact, drawing(n + k)[0]) for k in range(1 + n % 2)])).as_uri()
    for width, scheme in ((1280, "light"), (390, "dark")):
        js = shown(browser, url, width, scheme)
        js("for (const d of document.querySelectorAll('details')) d.open = true")
        drawn, all_of_them = js("const i = [...document.images]; return [i.filter(e => e.complete && e.naturalWidth === 112).length, i.length]")
        assert drawn == all_of_them > 12 and js("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        apart = js(
            "return [...document.querySelectorAll('.asked')].map(a => [...a.children].map(c => c.getBoundingClientRect())).map(([p, i]) => [i.left - p.right, i.top - p.bottom])"
        )
        assert len(apart) == 8 and all(across > 0 if width > 500 else down > 0 for across, down in apart)
        assert browser.get_log("browser") == []
