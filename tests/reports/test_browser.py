"""The page in a real browser: what can be operated works, and nothing is cut or hangs over."""

import json

import pytest

from reports.page import load, render
from tests.helpers.browser import executable, visit
from tests.helpers.report_runs import decode, make_differences, make_run, wide_pictures

HOSTILE = (
    'x\'"><img src=x onerror="window.hit=1"><script>window.hit=1</script></script>${window.hit=1}`\\u003c</style>*/;}'
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Three checkpoints, one with a name that is code in any language of the page."""
    executable()  # skips before the work
    root = tmp_path_factory.mktemp("page")
    names = ["llava", "ola", HOSTILE]
    paths = [make_run(root / f"run{k}", name, layers=3, random=0.3 + 0.1 * k) for k, name in enumerate(names)]
    decode(paths[2])
    for number, path in enumerate(paths):
        wide_pictures(path, layers=3, side=48, shift=number)
    runs, aligned = load(paths)
    return render(runs, aligned, make_differences(names, 3), ["one <b>sentence</b>"])


def test_tables_are_sorted_and_copied(page, tmp_path):
    script = """
    const details = document.querySelector("#curves .numbers"); details.open = true;
    const table = details.querySelector("table");
    const column = (k) => [...table.tBodies[0].rows].map((row) => row.cells[k].textContent);
    const [head] = all("thead th", table).slice(1);
    const found = { before: column(0), sort: [head.ariaSort] };
    head.querySelector("button").click(); found.rising = column(0); found.sort.push(head.getAttribute("aria-sort"));
    head.querySelector("button").click(); found.falling = column(0); found.sort.push(head.getAttribute("aria-sort"));
    const [csv, latex] = all(".tools button", table.closest(".sheet"));
    csv.click(); latex.click(); await wait();
    found.said = details.querySelector(".tools [role=status]").textContent;
    head.querySelector("button").click(); found.again = column(0);
    all("#decoded .tools button")[1].click(); await wait();
    return found;"""
    result = visit(page, tmp_path, script)
    found, (csv, latex, decoded) = result["found"], result["copied"]
    assert found["before"] == found["again"] == ["0", "1", "2", "3", "final"]
    assert found["rising"] == found["falling"][::-1] == ["final", "3", "2", "1", "0"]  # curves fall with depth
    assert found["sort"] == ["none", "ascending", "descending"] and found["said"].startswith("copied as")
    assert csv.splitlines()[0].startswith("layer,resampler,resampler (low),resampler (high),")
    assert csv.splitlines()[1].startswith("0,0.500,0.490,0.510,") and len(csv.splitlines()) == 6
    assert latex.startswith("\\begin{tabular}{lrr") and "\\toprule" in latex and "0 & 0.500 [0.490, 0.510] &" in latex
    assert "$\\uparrow$" in decoded and 'onerror="window.hit=1"$>$' in decoded and "\\$\\{window.hit=1\\}" in decoded


def test_the_slider_the_reference_the_legend_and_the_theme(page, tmp_path):
    script = """
    const strips = () => all("#pictures .grids .strip").filter(seen).map((strip) => strip.dataset.layer);
    const found = { first: strips() };
    const slider = document.querySelector("#pictures input[type=range]");
    slider.value = 2; slider.dispatchEvent(new Event("input")); found.second = strips();
    found.valuetext = slider.getAttribute("aria-valuetext");
    found.pictures = all("#pictures img").filter(seen).every((image) => image.complete && image.naturalWidth > 0);
    const numbers = () => all("#differences .panels").filter(seen).flatMap((panels) => all(".plot", panels))
      .filter(seen).slice(0, 1).map((plot) => JSON.parse(plot.dataset.plot));
    found.from = [numbers()];
    const reference = document.getElementById("reference");
    reference.value = "1"; reference.dispatchEvent(new Event("change"));
    found.from.push(numbers()); found.title = document.getElementById("differences-title").textContent;
    found.options = all("option", reference).map((option) => option.textContent);
    const drawn = () => all("#curves .plot g:not(.off)").length;
    found.lines = [drawn()];
    const key = document.querySelector("#curves .legend button"); key.click();
    found.lines.push(drawn()); found.pressed = key.getAttribute("aria-pressed"); key.click(); found.lines.push(drawn());
    const ground = () => getComputedStyle(document.body).backgroundColor;
    const colour = () => getComputedStyle(document.querySelector("#curves .line.k0")).stroke;
    found.light = [ground(), colour()]; document.querySelector(".theme").click(); found.dark = [ground(), colour()];
    found.theme = document.documentElement.dataset.theme; found.hit = window.hit || 0;
    return found;"""
    found = visit(page, tmp_path, script)["found"]
    assert set(found["first"]) == {"0"} and set(found["second"]) == {"2"} and len(found["first"]) == 9
    assert found["valuetext"] == "layer 2" and found["pictures"]
    (first,), (second,) = found["from"]
    assert [line["name"] for line in first["lines"]] == ["ola", HOSTILE]
    assert [line["name"] for line in second["lines"]] == ["llava", HOSTILE]
    ola, llava = first["lines"][0], second["lines"][0]
    assert llava["value"] == [-value for value in ola["value"]] and llava["low"] == [-value for value in ola["high"]]
    assert found["title"] == "Paired differences from ola" and found["options"] == ["llava", "ola", HOSTILE]
    assert found["lines"][0] == found["lines"][2] == found["lines"][1] + 6 and found["pressed"] == "false"
    assert found["light"] == ["rgb(255, 255, 255)", "rgb(10, 95, 180)"] and found["theme"] == "dark"
    assert found["dark"] == ["rgb(23, 24, 26)", "rgb(58, 134, 208)"] and found["hit"] == 0


def test_values_show_at_pointer_and_keyboard(page, tmp_path):
    script = """
    const plot = document.querySelector("#curves .plot"); const picture = plot.querySelector("svg");
    const found = { data: JSON.parse(plot.dataset.plot) };
    const tip = () => { const one = plot.querySelector(".tip"); return one && one.innerText; };
    const box = picture.getBoundingClientRect();
    const at = (x) => ({ clientX: box.left + x / 420 * box.width, clientY: box.top + 50, pointerType: "mouse" });
    const point = (x) => picture.dispatchEvent(new PointerEvent("pointermove", at(x)));
    point(found.data.x[1]); found.pointed = tip();
    const place = plot.querySelector(".tip").getBoundingClientRect();
    found.inside = place.left >= 0 && place.right <= innerWidth;
    picture.dispatchEvent(new PointerEvent("pointerleave", { pointerType: "mouse" })); found.left = tip();
    picture.focus(); found.focused = document.activeElement === picture;
    const press = (key) => picture.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
    press("End"); found.end = tip(); found.heard = document.querySelector(".heard[role=status]").textContent;
    press("ArrowLeft"); found.before = tip(); press("Escape"); found.escaped = tip();
    const details = document.querySelector("#differences .plot details"); details.open = true; await wait();
    found.table = all("tr", details).length;
    return found;"""
    found = visit(page, tmp_path, script)["found"]
    data = found["data"]
    assert data["labels"] == ["0", "1", "2", "3", "final"]
    assert "layer 1" in found["pointed"] and "0.4900" in found["pointed"] and "[0.4800, 0.5000]" in found["pointed"]
    assert found["inside"] and found["left"] is None and found["focused"] and found["escaped"] is None
    assert "final" in found["end"] and "llava 0.4600 [0.4500, 0.4700]" in found["heard"]
    assert "layer 3" in found["before"] and found["table"] == 6


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_hangs_over_is_cut_or_is_empty(page, tmp_path, width):
    script = """
    all("details").forEach((details) => { details.open = true; }); await wait();
    const found = { over: document.documentElement.scrollWidth - document.documentElement.clientWidth };
    found.cut = all(".plot svg").filter(seen).flatMap((picture) => {
      const frame = picture.getBoundingClientRect();
      const inside = ({ left, right, top, bottom }) => left > frame.left - 1 && right < frame.right + 1
        && top > frame.top - 1 && bottom < frame.bottom + 1;
      return all("text", picture).filter((text) => !inside(text.getBoundingClientRect())).map((one) => one.textContent);
    });
    const flat = (one) => one.getBoundingClientRect().height < 20;
    found.flat = all(".plot svg, .viewer img, .findings > div").filter(seen).filter(flat).length;
    found.lap = all(".plot svg").filter(seen).flatMap((picture) => {
      const boxes = all("text", picture).map((text) => text.getBoundingClientRect());
      const across = (a, b) => a.left < b.right - 1 && b.left < a.right - 1;
      const lap = (a, b) => across(a, b) && a.top < b.bottom - 2 && b.top < a.bottom - 2;
      return boxes.flatMap((a, i) => boxes.slice(i + 1).filter((b) => lap(a, b)));
    }).length;
    const wide = (one) => !one.closest(".scroll") && one.getBoundingClientRect().right > innerWidth + 1;
    found.wide = all("main *").filter(seen).filter(wide).map((one) => one.outerHTML.slice(0, 100));
    return found;"""
    result = visit(page, tmp_path, script, width)
    assert result["found"] == {"over": 0, "cut": [], "flat": 0, "lap": 0, "wide": []}
    assert result["width"] == width


def test_what_a_screen_reader_needs(page, tmp_path):
    script = """
    const labels = (one) => one.labels ? [...one.labels].map((label) => label.textContent).join("") : "";
    const named = (one) => (one.getAttribute("aria-label") || one.textContent || labels(one)).trim();
    const operated = all("button, select, input, a, summary, [role=region], [role=group]");
    const drawn = (one) => one.getAttribute("role") === "img" && one.getAttribute("aria-label");
    const headed = (table) => table.caption && all("thead th", table).every((cell) => cell.scope === "col");
    const ids = all("[id]").map((one) => one.id);
    const levels = all("h1, h2, h3, h4").filter(seen).map((one) => Number(one.tagName[1]));
    return {
      images: all("img").filter((image) => !image.alt).length,
      drawings: all(".plot svg").filter((one) => !drawn(one)).length,
      unnamed: operated.filter((one) => !named(one)).map((one) => one.outerHTML.slice(0, 80)),
      twice: ids.filter((id, i) => ids.indexOf(id) !== i),
      marks: ["header", "nav", "main", "footer", "h1"].map((tag) => all(tag).length),
      skipped: levels.filter((level, i) => i && level > levels[i - 1] + 1).length,
      tables: all("table.sortable").filter((table) => !headed(table)).length,
      dead: all("nav a, .skip").filter((link) => !document.querySelector(link.getAttribute("href"))).length,
      lang: document.documentElement.lang,
    };"""
    assert visit(page, tmp_path, script)["found"] == {
        **{"images": 0, "drawings": 0, "unnamed": [], "twice": [], "marks": [1, 1, 1, 1, 1], "skipped": 0},
        **{"tables": 0, "dead": 0, "lang": "en"},
    }


def test_the_hostile_page_says_its_name(page):
    """That the tests above had something to survive."""
    assert page.count("window.hit=1") > 20 and json.dumps(HOSTILE) not in page
