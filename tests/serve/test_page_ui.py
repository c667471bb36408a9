"""The page of `lrface ui` in a real browser, and the question it asks."""

import base64
import hashlib
import importlib.util
import json
import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from serving import encoded, served

pytest.importorskip("fastapi")

from lrface import load_embedder
from lrface.degrade.resolution import resample
from lrface.serve.app import build_app
from lrface.serve.limits import Limits
from lrface.serve.page import page_sizes

TOKEN = "correct-horse-battery-staple"
SCREENSHOTS = os.environ.get("LRFACE_SCREENSHOTS")
"""A folder for what the browser shows, to look at."""


@pytest.fixture(scope="module")
def embedder(pooled_model):
    return load_embedder(pooled_model)


@pytest.fixture(scope="module")
def server(embedder):
    with served(build_app(embedder, Limits(), page=True, no_reconstruction="it is no run")) as client:
        yield client


def pixels(address: str) -> np.ndarray:
    """A data: address as uint8 [h, w, 3] RGB."""
    data = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]


def test_the_answer_is_what_the_embedder_gives_at_each_size(server, embedder, faces, face_files):
    answer = server.post("/page/compare", ("first", face_files[0]), ("second", face_files[2]))
    assert answer.status == 200, answer.body
    found = answer.json
    sizes = found["sizes"]
    assert sizes == page_sizes(112) and sizes[0] == 112 and sizes[-1] == 10
    sides = []
    for name, face in (("first", faces[0]), ("second", faces[2])):
        whole = torch.from_numpy(face.transpose(2, 0, 1).astype(np.float32) / 255)[None]
        crops = torch.cat([resample(whole, size) for size in sizes])
        for address, crop in zip(found[name]["crops"], crops, strict=True):
            expected = (crop * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(pixels(address), expected)
        assert found[name]["reconstructions"] is None
        sides.append(embedder.embed(crops, kind="crop", flip=True))
    cosine = embedder.similarity(*sides)
    np.testing.assert_allclose(found["pair"]["similarity"], cosine, atol=1e-6)
    detail = [found[name]["effective_resolution"] for name in ("first", "second")]
    for i, j in ((0, 0), (3, 7), (len(sizes) - 1, 0)):
        expected = embedder.decide(float(cosine[i, j]), (min(sizes[i], detail[0]), min(sizes[j], detail[1])))
        assert found["pair"]["same_person"][i][j] is expected.verdict
        assert found["pair"]["threshold"][i][j] == pytest.approx(expected.threshold)
    assert found["pair"]["probability"] is None and found["no_reconstruction"] == "it is no run"


def test_a_calibrated_model_tells_probabilities(tmp_path, pooled_model, face_files):
    """Of both resolutions, in the page's answer and in /compare; the files are those that `lrface calibrate` writes."""
    model = tmp_path / "calibrated.onnx"
    shutil.copyfile(pooled_model, model)
    kept = {
        "model_sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        "thresholds": {"112": 0.9, "14": 0.95},
        "probability": {"sizes": [14.0, 112.0], "slope": [[4, 6], [6, 9]], "intercept": [[-3, -4], [-4, -5]]},
    }
    Path(f"{model}.thresholds.json").write_text(json.dumps(kept))
    calibrated = load_embedder(model)
    with served(build_app(calibrated, Limits(), page=True)) as client:
        parts = ("first", face_files[0]), ("second", face_files[2])
        pair = client.post("/page/compare", *parts).json["pair"]
        plain = client.post("/compare?kind=crop", *parts).json
    sizes = page_sizes(112)
    for i, j in ((0, 0), (0, len(sizes) - 1), (5, 9)):
        expected = calibrated.decide(pair["similarity"][i][j], (float(sizes[i]), float(sizes[j])))
        assert expected.probability is not None
        assert pair["probability"][i][j] == pytest.approx(expected.probability, abs=1e-6)
        assert pair["threshold"][i][j] == expected.threshold
    assert pair["threshold"][0][0] == 0.9 and pair["threshold"][-1][-1] == 0.95
    assert pair["threshold_from"] == plain["threshold_from"] == "card"
    assert plain["probability"] == pytest.approx(pair["probability"][0][0], abs=1e-6)


def test_one_photograph_alone_has_no_pair(server, face_files):
    found = server.post("/page/compare", ("first", face_files[0])).json
    assert (
        found["second"] is None
        and found["pair"] is None
        and len(found["first"]["crops"]) == len(found["sizes"])
    )
    assert server.post("/page/compare", ("second", face_files[0])).status == 422


def test_a_photograph_is_aligned_as_it_is_embedded(server, embedder):
    from importlib.resources import files

    from lrface.align.pipeline import read_photo
    from lrface.align.warp import warp_face

    photo = files("matplotlib").joinpath("mpl-data/sample_data/grace_hopper.jpg").read_bytes()
    found = server.post("/page/compare", ("first", photo)).json["first"]
    landmarks = np.array(found["landmarks"], np.float32)
    np.testing.assert_array_equal(pixels(found["crops"][0]), warp_face(read_photo(photo), landmarks, 112))
    assert found["score"] > 0.9


def test_a_run_with_a_decoder_shows_what_it_draws(tmp_path, faces, face_files):
    from lrface.embed import FaceEmbedder
    from lrface.serve.page import reconstructed

    embedder = load_embedder(small_run(tmp_path, faces), quality="reconstruction")
    assert isinstance(embedder, FaceEmbedder)
    size = embedder.input_size
    crop = torch.from_numpy(cv2.resize(faces[0], (size, size)).transpose(2, 0, 1).astype(np.float32) / 255)[
        None
    ]
    drawn = reconstructed(embedder, crop)
    error = (drawn.clamp(0, 1) - crop).abs().mean()
    assert float(error) == pytest.approx(float(embedder.reconstruction_errors(crop)[0]), abs=1e-6)
    with served(build_app(embedder, Limits(), page=True)) as client:
        found = client.post("/page/compare", ("first", face_files[0]), ("second", face_files[1])).json
    assert found["no_reconstruction"] is None
    for side in ("first", "second"):
        assert len(found[side]["reconstructions"]) == len(found["sizes"]) == len(page_sizes(size))
        assert pixels(found[side]["reconstructions"][0]).shape == (size, size, 3)
    assert found["first"]["reconstructions"][0] != found["first"]["reconstructions"][-1]


def test_the_page_is_open_and_its_questions_want_the_token(embedder, face_files):
    with served(build_app(embedder, Limits(), token=TOKEN, page=True)) as client:
        assert all(client.get(path).status == 200 for path in ("/", "/page.js", "/page.css"))
        assert client.post("/page/compare", ("first", face_files[0])).status == 401


def test_without_page_there_is_none(embedder):
    with served(build_app(embedder, Limits())) as client:
        assert client.get("/").status == client.get("/page.js").status == 404


# ------------------------------------------------------------------------------------------------- browser


@pytest.fixture
def browser():
    """Opens an address in headless Chromium; in the end nothing may have been asked of another host, nor logged."""
    if importlib.util.find_spec("selenium") is None:
        pytest.skip("selenium is not installed")
    if shutil.which("chromedriver") is None:
        pytest.skip("Chromium's chromedriver is not installed")

    @contextmanager
    def opened(url, width=1280, dark=False, errors=()):
        from selenium import webdriver
        from selenium.webdriver.chrome.options import Options
        from selenium.webdriver.chrome.service import Service

        options = Options()
        for argument in (
            "headless=new",
            "no-sandbox",
            "disable-gpu",
            "disable-dev-shm-usage",
            "no-first-run",
            "disable-background-networking",
            "disable-component-update",
            "disable-sync",
        ):
            options.add_argument(f"--{argument}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
            driver.get(url)
            yield driver
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width
            log = [entry["message"] for entry in driver.get_log("browser")]
            assert len(log) == len(errors) and all(
                part in line for part, line in zip(errors, log, strict=True)
            ), log
            asked = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
            addresses = [
                each["params"]["request"]["url"]
                for each in asked
                if each["method"] == "Network.requestWillBeSent"
            ]
            assert any(address.startswith(url) for address in addresses)
            # chrome:// is the browser's own empty page, data: is within the page.
            outside = [each for each in addresses if not each.startswith((url, "data:", "blob:", "chrome:"))]
            assert not outside, outside
        finally:
            driver.quit()

    return opened


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.05)
    return found


def text(driver, selector):
    return driver.execute_script("return document.querySelector(arguments[0]).textContent", selector)


def screenshot(driver, name):
    if SCREENSHOTS:
        height = driver.execute_script("return document.documentElement.scrollHeight")
        width = driver.execute_script("return window.innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        options = {"captureBeyondViewport": True, "clip": clip}
        shot = driver.execute_cdp_cmd("Page.captureScreenshot", options)
        Path(SCREENSHOTS, f"{name}.png").write_bytes(base64.b64decode(shot["data"]))


def drop(driver, selector, content):
    """Drops a file on a place, as a hand would: with drag events and a DataTransfer."""
    driver.execute_script(
        """
        const bytes = Uint8Array.from(atob(arguments[1]), c => c.charCodeAt(0));
        const files = new DataTransfer();
        files.items.add(new File([bytes], "dropped.png", {type: "image/png"}));
        const place = document.querySelector(arguments[0]);
        for (const kind of ["dragenter", "dragover", "drop"])
          place.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: files}));
        """,
        selector,
        base64.b64encode(content).decode(),
    )


def test_the_page_from_two_photographs_to_a_verdict(server, browser, embedder, faces, face_files, tmp_path):
    from selenium.webdriver.common.keys import Keys

    paths = []
    for number in (0, 2):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(face_files[number])
    with browser(server.url) as driver:
        until(lambda: "pooled" in text(driver, "#model"))
        assert "needed" in text(driver, "#verdict")
        screenshot(driver, "empty")
        driver.find_element("id", "first-file").send_keys(str(paths[0]))
        until(lambda: "second photograph" in text(driver, "#verdict"))
        assert "not calibrated" not in text(driver, "#probability")
        drop(driver, "#second", face_files[2])
        until(lambda: text(driver, "#verdict") in ("Same person", "Different people"))
        expected = embedder.compare(faces[0], faces[2], kind="crop")
        assert text(driver, "#verdict") == ("Same person" if expected.verdict else "Different people")
        assert float(text(driver, "#similarity")) == pytest.approx(expected.similarity, abs=6e-4)
        assert float(text(driver, "#threshold")) == pytest.approx(expected.threshold, abs=6e-4)
        assert text(driver, "#probability") == "not calibrated"
        assert "it is no run" in text(driver, "#no-reconstruction")
        screenshot(driver, "two-faces")

        # With the keyboard: the slider of the second face, to its fewest pixels.
        slider = driver.find_element("id", "second-size")
        before = driver.execute_script("return document.querySelector('#second .crop').src")
        slider.send_keys(Keys.HOME)
        assert text(driver, "#second output") == "10 px" and text(driver, "#first output") == "112 px"
        assert slider.get_attribute("aria-valuetext") == "10 pixels"
        shown = driver.execute_script("return document.querySelector('#second .crop').src")
        small = torch.from_numpy(faces[2].transpose(2, 0, 1).astype(np.float32) / 255)[None]
        expected_pixels = (resample(small, 10)[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        assert shown != before
        # Sums in another order, by another number of threads, may round to the next level.
        np.testing.assert_allclose(pixels(shown).astype(int), expected_pixels.astype(int), rtol=0, atol=1)
        slider.send_keys(Keys.ARROW_RIGHT)
        assert text(driver, "#second output") == "12 px"
        curve = driver.execute_script(
            "return [...document.querySelectorAll('#curve polyline')].map(p => [p.className.baseVal, p.points.length])"
        )
        assert sorted(kind for kind, _ in curve) == ["line both", "line first", "line limit", "line second"]
        assert {count for _, count in curve} == {len(page_sizes(112))}
        rows = driver.execute_script(
            "return [...document.querySelectorAll('#figures tr')].map(r => [...r.cells].map(c => c.textContent))"
        )
        assert (
            rows[0][2] == "first at 112"
            and rows[0][3] == "second at 12"
            and len(rows) == len(page_sizes(112)) + 1
        )
        assert all(
            driver.execute_script(
                "return [...document.querySelectorAll('.face:not([hidden]) .crop')].map(i => i.naturalWidth)"
            )
        )
        screenshot(driver, "low-resolution")

        # A file that is no photograph is said, and what was there stays.
        drop(driver, "#first", b"no photograph")
        until(lambda: "JPEG, PNG or WebP" in text(driver, "#message"))
        assert text(driver, "#verdict") in ("Same person", "Different people")
        driver.execute_script("document.querySelector('#first .remove').click()")
        until(lambda: "second photograph" in text(driver, "#verdict"))
        assert driver.execute_script("return document.querySelector('#curve-panel').hidden")
        # The one refused upload is the only thing that the browser complains of.
        log = [entry["message"] for entry in driver.get_log("browser")]
        assert len(log) == 1 and "415" in log[0]


@pytest.mark.parametrize(("width", "dark"), [(390, True)])
def test_the_page_on_a_telephone_in_the_dark_with_a_token(embedder, browser, face_files, width, dark):
    with (
        served(build_app(embedder, Limits(), token=TOKEN, page=True)) as client,
        browser(client.url, width, dark) as driver,
    ):
        until(lambda: not driver.execute_script("return document.querySelector('#token-form').hidden"))
        assert "401" in driver.get_log("browser")[0]["message"]
        assert driver.execute_script("return document.activeElement.id") == "token"
        driver.switch_to.active_element.send_keys(TOKEN + "\n")
        until(lambda: "pooled" in text(driver, "#model"))
        drop(driver, "#first", face_files[0])
        drop(driver, "#second", face_files[1])
        until(lambda: text(driver, "#verdict") in ("Same person", "Different people"))
        ground = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert max(int(each) for each in ground.removeprefix("rgb(").rstrip(")").split(",")) < 60
        screenshot(driver, "telephone-dark")


def small_run(root: Path, faces: list[np.ndarray]) -> Path:
    """A run of QualNet-LM of three steps, with its decoder."""
    from small_runs import TRAINER, run

    from lrface import config

    for number, face in enumerate(faces):
        folder = root / "faces" / f"person {number // 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(encoded(face))
    stage = {"name": "one", "method": {"name": "qualnet", "clip": False}, "steps": 3}
    recipe = {
        "name": "page",
        "data": {"path": "faces", "batch_size": 4},
        "backbone": {"name": "ir18", "width": 8, "embedding_size": 16},
        "decoder": {"name": "subpixel", "width": 16, "blocks": 0},
        "trainer": TRAINER,
        "stages": [stage],
    }
    run(config.parse_recipe(recipe, []), root, root / "run")
    return root / "run"
