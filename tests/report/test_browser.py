"""The page in headless Chromium, as wide as a laptop and as a phone."""

import json
import shutil
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs Chromium and chromedriver (Debian: chromium, chromium-driver)"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def show(browser, page: Path, width: int) -> list[str]:
    """Open the page at a width; the addresses that it asked for."""
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.as_uri())
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    # Chromium's own first tab may still be loading.
    return [request["request"]["url"] for request in sent if request["documentURL"] == page.as_uri()]


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_right(browser, labelled, width):
    urls = show(browser, labelled, width)
    assert [url for url in urls if not url.startswith("data:")] == [labelled.as_uri()]
    assert browser.get_log("browser") == []
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    images = browser.execute_script(
        "return [...document.images].map(i => [i.complete && i.naturalWidth, i.getBoundingClientRect().width])"
    )
    assert len(images) > 15
    assert all(drawn >= 600 for drawn, _ in images)
    assert all(250 <= shown <= width for _, shown in images)
    assert browser.title.startswith("headrift: ")  # the script in a prompt has not run
    assert 'onerror="alert(1)"' in browser.execute_script("return document.body.innerText")
    assert browser.execute_script("return document.scripts.length") == 0


def test_a_request_would_be_seen(browser, labelled, tmp_path):
    """The check above can fail: a page with a script and an image from elsewhere is caught."""
    page = tmp_path / "bad.html"
    page.write_text("<script>console.error('x'); document.title='y'</script><img src='http://127.0.0.1:9/a.png'>")
    assert "http://127.0.0.1:9/a.png" in show(browser, page, 390)
    assert browser.title == "y"
    assert browser.get_log("browser") != []
