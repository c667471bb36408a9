"""The site of docs/: it builds without a warning, has every command, asks nothing of the network, and its search works."""

import importlib.util
import logging
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("mkdocs", reason="make docs needs lrface[docs]")
pytest.importorskip("mkdocstrings", reason="make docs needs lrface[docs]")


def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, list[str]]:
    """The site, its tutorial not run, and the warnings that were given: `make docs` takes them for errors."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    site = tmp_path_factory.mktemp("site")
    warnings = Warnings()
    logger = logging.getLogger("mkdocs")
    logger.addHandler(warnings)
    try:
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(site)))
    finally:
        logger.removeHandler(warnings)
    return site, warnings.told


def test_no_link_is_broken(built):
    assert built[1] == []


def test_every_command_has_a_page_with_its_options(built):
    for name, command in hooks().all_commands():
        text = (built[0] / "commands" / f"{name.replace(' ', '-')}.html").read_text()
        assert f"lrface {name}" in text
        options = [option for parameter in command.params for option in parameter.opts if option[0] == "-"]
        for option in options:
            assert re.search(rf"<code>[^<]*{option}\b", text), f"{name} {option}"
    assert "verify" in dict(hooks().all_commands()) and "data info" in dict(hooks().all_commands())


def test_the_readme_is_the_page_of_tasks(built):
    tasks = (built[0] / "tasks.html").read_text()
    headings = re.findall(r"^## (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(headings) > 5
    for heading in headings:
        assert f">{heading}<" in tasks
    assert (
        'href="training.html"' in tasks and 'href="data_prep.html"' in tasks and "docs/" not in links(tasks)
    )
    assert 'href="tutorial.html"' in tasks
    assert 'src="resolution.png"' in (built[0] / "index.html").read_text()


def test_docstrings_are_rendered(built):
    text = (built[0] / "reference" / "embed.html").read_text()
    assert 'id="lrface.embed.FaceEmbedder.embed"' in text and ":func:" not in text and ":class:" not in text
    # A list of parameters with their types, and errors by name.
    assert (
        re.search(r"<b><code>kind</code></b>\s*\(<code>.*str.*</code>", text)
        and "errors.html#lrface.errors.LrfaceError" in text
    )


class Loaded(HTMLParser):
    """What a browser loads for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if tag in ("script", "img", "iframe", "source", "video", "audio"):
            self.addresses.append(found.get("src") or "")
        if tag == "link" and found.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(found.get("href") or "")


def links(text: str) -> str:
    return " ".join(re.findall(r'(?:href|src)="([^"]*)"', text))


def test_no_page_loads_anything_from_elsewhere(built):
    pages = list(built[0].rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        parser = Loaded()
        parser.feed(page.read_text())
        outside = [address for address in parser.addresses if re.match(r"(?:https?:)?//", address)]
        assert outside == [], page
        assert any(address.endswith(".js") for address in parser.addresses)
    for style in built[0].rglob("*.css"):
        assert not re.search(r"""(?:url\(|@import)\s*["']?(?:https?:)?//""", style.read_text()), style


@pytest.fixture(scope="module")
def browser() -> Iterator:
    selenium = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield driver
    driver.quit()


def test_a_browser_finds_something_without_a_server(built, browser):
    """Opened as a file: the search, whose worker browsers refuse there, finds pages; nothing is asked of anybody."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get((built[0] / "index.html").as_uri())
    wait = WebDriverWait(browser, 120)
    box = wait.until(lambda page: page.find_element(By.CSS_SELECTOR, "input.md-search__input"))
    wait.until(lambda page: box.is_displayed())
    box.click()
    box.send_keys("similarity_matrix")
    found = wait.until(
        lambda page: [
            each for each in page.find_elements(By.CSS_SELECTOR, ".md-search-result__link") if each.text
        ]
    )
    assert any("reference/embed.html" in each.get_attribute("href") for each in found)
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []
    requests = [
        line["message"] for line in browser.get_log("performance") if "requestWillBeSent" in line["message"]
    ]
    assert requests and not [each for each in requests if re.search(r'"url":"(?:https?|wss?):', each)]


def test_the_tutorial_runs_and_is_shown_with_what_it_gave():
    import nbformat

    stored = nbformat.read(ROOT / "docs" / "tutorial.ipynb", as_version=4)
    code = [each for each in stored.cells if each.cell_type == "code"]
    assert len(code) > 3 and not any(each.outputs or each.execution_count for each in code)
    made = hooks()
    made.on_startup("build", False)
    pages = made.tutorial()
    page = pages.pop("tutorial.md")
    assert re.search(r"^qualnet_lm +112: \d\d\.\d %", page, re.MULTILINE)  # accuracies that were measured
    assert "qualnet_lm.onnx" in page and "Traceback" not in page and "Warning" not in page
    assert list(pages) == ["tutorial_1.png", "tutorial_2.png"]
    assert all(picture.startswith(b"\x89PNG") and f"]({name})" in page for name, picture in pages.items())
