"""The viewer: its volumes, and the page in a browser."""

from __future__ import annotations

import base64
import gzip
import io
import os
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine, voxel_sizes
from PIL import Image

from bids_varaug.models.ensemble import Label, load_ensemble
from bids_varaug.registration.group_maps import GroupMaps
from bids_varaug.registration.space import GRIDS, SPACE, OutputSpace
from bids_varaug.registration.template import load_template
from bids_varaug.reports.group import RunInfo, load_page
from bids_varaug.reports.mosaics import MAP_STYLES
from bids_varaug.reports.registration import group_maps_page
from bids_varaug.reports.viewer import ViewerGrid, find_places, view_scan
from tests.reports import chromium
from tests.reports.chromium import Chromium

STRUCTURES = [Label(2, "Left-White", "#f5f5f5"), Label(3, "Left-Cortex", "#cd3e4e"),
              Label(41, "Right-White", "#00ff00"), Label(1042, "Right-Cortex", "#0ac81e")]  # fmt: skip
AVERAGED = load_ensemble("aseg31").labels
AXE = next(filter(Path.is_file, (
    Path(folder) / "axe-core" / "axe.min.js" for folder in os.environ.get("NODE_PATH", "").split(os.pathsep)
)), None)  # fmt: skip


def decoded(text: str) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(text)))


@pytest.fixture(scope="module")
def labels(head):
    return np.where(head.labels == 42, 1042, head.labels)


def view_of(head, labels):
    """The synthetic head with a baseline that is one voxel off."""
    grid = ViewerGrid.around(labels, head.affine, 1.0)
    return view_scan(
        grid, STRUCTURES, grid.values(head.t1w), grid.labels(labels), grid.labels(np.roll(labels, 1, axis=0)),
        grid.labels(head.spread > 0.9), {"uncertainty": (grid.values(head.spread), MAP_STYLES["entropy"])},
    )  # fmt: skip


@pytest.fixture(scope="module")
def view(head, labels):
    return view_of(head, labels)


def test_volumes_of_1_mm_are_those_of_the_derivatives(head, labels, view):
    volume = decoded(view.volumes["labels"])
    ranks = {0: 0} | {label.index: rank for rank, label in enumerate(STRUCTURES, start=1)}
    data = np.asarray(volume.dataobj)
    assert data.dtype == np.uint8
    for voxel in np.argwhere(data > 0)[::97]:
        at = np.rint(apply_affine(np.linalg.inv(head.affine), apply_affine(volume.affine, voxel))).astype(int)
        assert data[tuple(voxel)] == ranks[labels[tuple(at)]]
    values = decoded(view.volumes["uncertainty"]).get_fdata()
    assert values.max() == pytest.approx(head.spread.max(), abs=0.006)


def test_all_volumes_of_a_scan_share_a_grid(view):
    images = [decoded(text) for text in view.volumes.values()]
    assert len(images) == 5 and len({image.shape for image in images}) == 1
    assert all(np.array_equal(image.affine, images[0].affine) for image in images)


def test_finer_voxels_become_1_mm_in_place():
    labels = np.zeros((64, 64, 64), np.int16)
    labels[20:44, 20:44, 20:44] = 1
    affine = np.diag([0.5, 0.5, 2.0, 1.0])
    grid = ViewerGrid.around(labels, affine, 1.0)
    assert voxel_sizes(grid.affine) == pytest.approx([1.0, 1.0, 2.0])
    inside = np.argwhere(grid.labels(labels) > 0)
    centre = apply_affine(grid.affine, inside.mean(axis=0))
    assert centre == pytest.approx(apply_affine(affine, [31.5, 31.5, 31.5]), abs=0.5)
    x = np.broadcast_to(0.5 * np.arange(64)[:, None, None], labels.shape)  # mm
    values = grid.values(x)[1:-1, 0, 0]
    assert values == pytest.approx([apply_affine(grid.affine, (i, 0, 0))[0] for i in range(1, len(values) + 1)])


def test_head_of_512_voxels_is_coarsened_and_cropped():
    labels = np.zeros((512, 512, 512), np.uint8)
    labels[100:400, 100:400, 150:400] = 1
    grid = ViewerGrid.around(labels, np.diag([0.5, 0.5, 0.5, 1.0]), 1.0)
    assert grid.labels(labels).shape == (180, 180, 155)


def test_image_without_labels_is_shown_whole(head):
    view = view_of(head, np.zeros_like(head.labels))
    assert decoded(view.volumes["t1w"]).shape == head.t1w.shape and view.places == {}


def test_place_of_a_structure_lies_inside_it(head, labels, view):
    for index, place in view.places.items():
        voxel = np.rint(apply_affine(np.linalg.inv(head.affine), place)).astype(int)
        assert labels[tuple(voxel)] == index
    ring = np.hypot(*np.mgrid[-9:10, -9:10])[..., None].round().astype(int) // 8 % 2  # its centre is empty
    x, y, _ = find_places(ring, np.eye(4))[1]
    assert ring[int(x), int(y), 0] == 1


def test_same_scan_gives_the_same_text(head, labels, view):
    assert view_of(head, labels) == view


def test_map_of_large_values_has_larger_steps(head, labels):
    grid = ViewerGrid.around(labels, head.affine, 1.0)
    values = 24 * grid.values(head.spread)
    shown = view_scan(
        grid, STRUCTURES, grid.values(head.t1w), grid.labels(labels), maps={"bits": (values, MAP_STYLES["sigbits"])}
    )
    assert decoded(shown.volumes["bits"]).get_fdata() == pytest.approx(values, abs=0.0501)
    assert shown.settings["maps"][0]["digits"] == 1


@pytest.fixture(scope="module")
def group_maps() -> GroupMaps:
    """Two participants with the labels of the template; in the second, members differ about the left hippocampus."""
    labels = np.array([label.index for label in AVERAGED])[load_template([x.index for x in AVERAGED]).labels]
    maps, hippocampus = GroupMaps(labels.shape, [label.index for label in AVERAGED]), labels == 17
    for entropy in (0.0, 1.0):
        bits = np.where(hippocampus, 3.0, 20.0) * (labels > 0)
        maps.add(labels, {"entropy": entropy * hippocampus, "sigbits": bits, "unreliable": entropy * hippocampus})
    return maps


@pytest.fixture(scope="module")
def group_page(group_maps, tmp_path_factory) -> Path:
    folder, names = tmp_path_factory.mktemp("group"), [label.name for label in AVERAGED]
    template = nib.Nifti1Image(group_maps.most_probable().astype(np.float32), GRIDS[2].affine)
    nib.save(template, folder / "template.nii.gz")
    regions, space = group_maps.region_table(names), OutputSpace(SPACE, 2)
    page = group_maps_page(RunInfo("Maps."), group_maps, regions, AVERAGED, space, folder / "template.nii.gz", {})
    assert page.write(folder, "group_maps.html").read_text() == load_page(folder / "logs" / "group_maps.json").html()
    return folder / "group_maps.html"


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if chromium.PROGRAM is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    with Chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def page_of(make_content, view, tmp_path):
    """Write the page of a number of scans."""

    def write(n_scans: int = 1) -> Path:
        content = make_content()
        regions = content.scans[0].regions.assign(index=[2, 1042], name=["Left-White", "Right-Cortex"])
        place = {"Structure": "Right-Cortex", "Index": 1042, "World": view.places[1042], "Reason": "very open"}
        scan = replace(content.scans[0], regions=regions, view=view, look_first=[place])
        scans = [replace(scan, prefix=f"sub-01_run-{n}") for n in range(1, n_scans + 1)]
        path = tmp_path / "sub-01.html"
        path.write_text(replace(content, scans=tuple(scans)).html(), encoding="utf-8")
        return path

    return write


def open_viewer(browser: Chromium, page: Path, **how) -> None:
    browser.open(page, **how)
    browser.evaluate("document.querySelector('.slot').scrollIntoView()")
    browser.wait("document.querySelector('#viewer').dataset.scan === '1'")


def crosshair(browser: Chromium) -> list[float]:
    return browser.evaluate(
        "Array.from(viewer.state.nv.frac2mm(viewer.state.nv.scene.crosshairPos, 0, true)).slice(0, 3)"
    )


def test_viewer_starts_without_errors_or_requests(browser, page_of):
    page = page_of()
    open_viewer(browser, page)
    assert browser.errors == []
    assert [url for url in browser.requests if not url.startswith(("data:", "blob:", "file:"))] == []
    assert [url for url in browser.requests if url.startswith("file:")] == [page.as_uri()[:100]]


def test_click_on_a_row_moves_the_cross_to_the_structure_and_marks_it(browser, page_of, view):
    open_viewer(browser, page_of())
    browser.evaluate("document.querySelectorAll('#scan-1 table.sortable tbody tr')[1].cells[3].click()")
    browser.wait("!document.querySelector('#viewer-back').hidden")
    assert crosshair(browser) == pytest.approx(view.places[1042], abs=0.06)
    assert "Right-Cortex" in browser.evaluate("document.querySelector('#viewer-place').textContent")
    assert browser.evaluate("viewer.state.nv.opts.atlasActiveIndex") == 4
    assert browser.evaluate("document.activeElement.id") == "viewer-canvas"


@pytest.mark.parametrize("width", [390, 1280])
def test_row_of_a_group_leads_to_the_structure_in_the_maps(browser, group_page, group_maps, width):
    open_viewer(browser, group_page, width=width)
    browser.evaluate("document.querySelector('#regions tbody tr').cells[3].click()")
    browser.wait("!document.querySelector('#viewer-back').hidden")
    at = np.rint(apply_affine(np.linalg.inv(GRIDS[2].affine), crosshair(browser))).astype(int)
    assert AVERAGED[group_maps.most_probable()[tuple(at)]].index == 17
    shown = browser.evaluate("document.querySelector('#viewer-place').textContent")
    assert shown.endswith("Left-Hippocampus · mean vote entropy 0.50 bit · share with an unreliable voxel 0.50 · "
                          "mean significant bits 3.0 bit")  # fmt: skip
    assert browser.errors == [] and browser.evaluate("document.documentElement.scrollWidth") <= width


def test_one_map_of_a_group_is_shown_at_a_time(browser, group_page):
    open_viewer(browser, group_page)
    opacities = "['entropy', 'unreliable', 'sigbits'].map((name) => viewer.state.volumes['mean_' + name].opacity > 0)"
    assert browser.evaluate(opacities) == [True, False, False]
    choose = "(map) => { map.value = 2; map.dispatchEvent(new Event('input')); }"
    browser.evaluate(f"({choose})(document.querySelector('#map'))")
    assert browser.evaluate(opacities) == [False, False, True]
    assert browser.evaluate("document.querySelector('#viewer-bar').textContent") == "0 bit8 bit or more"


def test_place_to_look_at_first_leads_into_the_viewer(browser, page_of, view):
    open_viewer(browser, page_of())
    browser.evaluate("document.querySelector('.answer ol a').click()")
    browser.wait("!document.querySelector('#viewer-back').hidden")
    assert crosshair(browser) == pytest.approx(view.places[1042], abs=0.06)


def test_clicked_voxel_has_the_values_of_the_derivatives(browser, page_of, head, labels):
    open_viewer(browser, page_of())
    names = {label.index: label.name for label in STRUCTURES} | {0: "no structure"}
    left, top = browser.evaluate("(({x, y}) => [x, y])(document.querySelector('canvas').getBoundingClientRect())")
    seen = set()
    for x, y in ((150, 180), (180, 220), (120, 150), (215, 200)):
        browser.click(left + x, top + y)
        place = crosshair(browser)
        if tuple(place) in seen:
            continue
        seen.add(tuple(place))
        voxel = tuple(np.rint(apply_affine(np.linalg.inv(head.affine), place)).astype(int))
        shown = browser.evaluate("document.querySelector('#viewer-place').textContent")
        assert names[labels[voxel]] in shown
        assert float(shown.partition("entropy ")[2].split()[0]) == pytest.approx(head.spread[voxel], abs=0.0101)
    assert len(seen) > 2


def test_keys_move_the_cross_and_switch_layers(browser, page_of):
    open_viewer(browser, page_of())
    browser.evaluate("document.querySelector('#viewer-canvas').focus()")
    before = np.array(crosshair(browser))
    for key in ("ArrowRight", "ArrowUp", "PageUp"):
        browser.press(key)
    step = np.array(crosshair(browser)) - before
    assert step == pytest.approx([2.0, 1.0, 1.5], abs=0.02)  # a voxel along each axis
    browser.press("2")
    assert browser.evaluate("viewer.state.volumes.uncertainty.opacity") == pytest.approx(0.8)
    browser.press("2")
    assert browser.evaluate("viewer.state.volumes.uncertainty.opacity") == 0


def test_touch_moves_the_cross(browser, page_of):
    open_viewer(browser, page_of(), width=390)
    left, top = browser.evaluate("(({x, y}) => [x, y])(document.querySelector('canvas').getBoundingClientRect())")
    before = crosshair(browser)
    browser.send("Emulation.setTouchEmulationEnabled", enabled=True)
    try:
        browser.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": left + 60, "y": top + 60}])
        browser.wait(f"viewer.state.nv.frac2mm(viewer.state.nv.scene.crosshairPos, 0, true)[2] !== {before[2]}")
        browser.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    finally:
        browser.send("Emulation.setTouchEmulationEnabled", enabled=False)
    assert crosshair(browser) != pytest.approx(before, abs=0.5)


def test_baseline_flickers_with_the_consensus(browser, page_of):
    open_viewer(browser, page_of())
    shown = "viewer.state.volumes.labels.img === viewer.state.images.baseline"
    assert browser.evaluate(shown) is False
    browser.evaluate("document.querySelector('#flicker').click()")
    browser.wait(shown)
    browser.wait(f"!({shown})")
    browser.evaluate("document.querySelector('#flicker').click()")


def test_one_scan_is_loaded_at_a_time(browser, page_of):
    open_viewer(browser, page_of(12))
    browser.evaluate("document.querySelectorAll('.slot')[6].querySelector('button').click()")
    browser.wait("document.querySelector('#viewer').dataset.scan === '7'")
    assert browser.evaluate("viewer.state.nv.volumes.length") == 4
    assert browser.evaluate("document.querySelectorAll('canvas').length") == 1
    assert browser.evaluate("document.querySelector('#scan-7 canvas') !== null")
    assert browser.errors == []


@pytest.mark.parametrize("width", [390, 1280])
def test_page_does_not_scroll_sideways(browser, page_of, width):
    open_viewer(browser, page_of(), width=width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("dark", [False, True])
def test_page_is_accessible(browser, page_of, dark):
    if AXE is None:
        pytest.skip("axe-core is not installed (npm install axe-core, NODE_PATH)")
    open_viewer(browser, page_of(), dark=dark)
    browser.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    browser.evaluate(AXE.read_text(encoding="utf-8") + "; true")
    found = browser.evaluate(
        "axe.run().then((all) => all.violations.filter((one) => ['serious', 'critical'].includes(one.impact))"
        ".map((one) => [one.id, one.nodes.map((node) => node.target.join(' ') + ' ' + node.failureSummary)]))"
    )
    assert found == []


def test_table_is_filtered_and_downloaded(browser, page_of, tmp_path):
    browser.open(page_of())
    browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.evaluate("document.querySelector('.tools button').click()")
    name = "sub-01_Table_of_structures.csv"
    for _ in range(200):
        if (tmp_path / name).exists():
            break
        browser.evaluate("new Promise((done) => setTimeout(done, 50))")
    head, first, _ = (tmp_path / name).read_text(encoding="utf-8").splitlines()
    assert head.startswith("Id,Structure,Verdict") and first.startswith("2,Left-White,✓ use,,4020,9.0,0.22,")


def test_enlarged_figure_is_reached_by_keyboard(browser, page_of):
    browser.open(page_of())
    browser.evaluate("document.querySelector('figure.mosaic figcaption button').click()")
    assert browser.evaluate("document.activeElement.className") == "frame"


def test_browser_without_webgl_shows_figures_and_says_so(page_of, tmp_path):
    if chromium.PROGRAM is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    with Chromium(tmp_path / "profile", chromium.WITHOUT_WEBGL) as browser:
        browser.open(page_of())
        assert "lacks WebGL" in browser.evaluate("document.querySelector('.slot').textContent")
        assert browser.evaluate("document.querySelector('#viewer').hidden")
        assert browser.evaluate("document.querySelectorAll('a[data-at]').length") == 0
        assert browser.evaluate("document.querySelectorAll('figure.mosaic img').length") == 2
        assert browser.errors == []


def test_page_without_scripts_has_answer_and_figures(page_of, browser):
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page_of())
        text = browser.evaluate("document.body.innerText")
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)
    assert "needs JavaScript" in text and "do not use" in text


def test_written_pictures_are_webp(make_content):
    content = make_content().html()
    picture = content.partition("data:image/webp;base64,")[2].partition('"')[0]
    assert Image.open(io.BytesIO(base64.b64decode(picture))).format == "WEBP"
