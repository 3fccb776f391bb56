"""The page in a real browser: what can be operated works, and nothing is cut or hangs over."""

import json

import pytest

from reports.page import write_report
from reports.theme import DARK, LIGHT, MEAN, REFERENCES
from tests.helpers.browser import Browser, executable
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
    return write_report(paths, root / "report", make_differences(names, 3), ["one <b>sentence</b>"]).read_text()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


def test_tables_are_sorted_and_copied(page, browser, tmp_path):
    script = """
    const details = document.querySelector("#curves .numbers"); details.open = true; await wait();
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
    document.getElementById("decoded").open = true; all("#decoded .tools button")[1].click(); await wait();
    return found;"""
    result = browser.visit(page, tmp_path, script)
    found, (csv, latex, decoded) = result["found"], result["copied"]
    assert found["before"] == found["again"] == ["0", "1", "2", "3", "final"]
    assert found["rising"] == found["falling"][::-1] == ["final", "3", "2", "1", "0"]  # curves fall with depth
    assert found["sort"] == ["none", "ascending", "descending"] and found["said"].startswith("copied as")
    assert csv.splitlines()[0].startswith("layer,llava,ola,") and ',"llava, random weights",' in csv.splitlines()[0]
    assert csv.splitlines()[1].startswith('0,"0.500 [0.490, 0.510]",') and len(csv.splitlines()) == 6
    assert latex.startswith("\\begin{tabular}{lrr") and "\\toprule" in latex and "0 & 0.500 [0.490, 0.510] &" in latex
    assert "$\\uparrow$" in decoded and 'onerror="window.hit=1"$>$' in decoded and "\\$\\{window.hit=1\\}" in decoded


def test_the_slider_the_reference_the_legend_and_the_theme(page, browser, tmp_path):
    script = """
    const strips = () => all("#pictures .grids .strip").filter(seen).map((strip) => strip.dataset.layer);
    const found = { first: strips() };
    const slider = document.querySelector("#pictures input[type=range]");
    slider.value = 2; slider.dispatchEvent(new Event("input")); found.second = strips();
    found.valuetext = slider.getAttribute("aria-valuetext");
    await loaded("#pictures img");
    found.pictures = all("#pictures img").filter(seen).every((image) => image.complete && image.naturalWidth > 0);
    const shown = async (selector) => {
      const chart = charts.find(({ figure }) => figure === document.querySelector(selector));
      await drawChart(chart);
      return chart.view;
    };
    const columns = ["checkpoint", "layer", "value", "ci_low", "ci_high"];
    const rows = (view) => view.data("data_0").map((row) => columns.map((name) => row[name]));
    const view = await shown("#differences .chart");
    found.from = [rows(view)];
    const reference = document.getElementById("reference");
    reference.value = "1"; reference.dispatchEvent(new Event("change")); await wait();
    found.from.push(rows(view)); found.title = document.getElementById("differences-title").textContent;
    found.options = all("option", reference).map((option) => option.textContent);
    const curve = await shown("#curves .chart");
    const controls = () => [...new Set(curve.data("data_0").map((row) => `${row.checkpoint} ${row.control}`))].length;
    found.lines = [controls()];
    const key = document.querySelector("#curves .legend button"); key.click(); await wait();
    found.lines.push(controls()); found.pressed = key.getAttribute("aria-pressed");
    key.click(); await wait(); found.lines.push(controls());
    const drawing = drawChart(charts[0]); key.click(); await drawing; await wait();  // while a chart is drawn
    found.late = charts[0].view.signal("hidden"); key.click(); await wait();
    const ground = () => getComputedStyle(document.body).backgroundColor;
    const strokes = () => all("#curves .chart .mark-line path").map((one) => one.getAttribute("stroke"));
    const colour = () => [...new Set(strokes())].sort().join();
    found.light = [ground(), colour()]; document.querySelector(".theme").click();
    for (let k = 0; k < 200 && colour() === found.light[1]; k += 1) await wait();
    found.dark = [ground(), colour()];
    found.theme = document.documentElement.dataset.theme; found.hit = window.hit || 0;
    const resources = performance.getEntriesByType("resource").map((one) => one.name);
    found.fetched = resources.filter((name) => !name.startsWith("data:"));
    return found;"""
    found = browser.visit(page, tmp_path, script)["found"]
    assert set(found["first"]) == {"0"} and set(found["second"]) == {"2"} and len(found["first"]) == 9
    assert found["valuetext"] == "layer 2" and found["pictures"]
    first, second = found["from"]
    assert {row[0] for row in first} == {"ola", HOSTILE} and {row[0] for row in second} == {"llava", HOSTILE}
    seen = {row[0] + row[1]: row[2:] for row in first + second}
    for layer in ("0", "1", "2", "3", "final"):
        (value, low, high), (mine, own_low, own_high) = seen[f"ola{layer}"], seen[f"llava{layer}"]
        assert (mine, own_low, own_high) == (-value, -high, -low)
    assert found["title"] == "Paired differences from ola" and found["options"] == ["llava", "ola", HOSTILE]
    assert found["lines"] == [10, 7, 10] and found["pressed"] == "false"  # three of each checkpoint, and the mean
    assert found["late"] == ["llava"]
    shown = [[*LIGHT[:3], REFERENCES[MEAN][0]], [*DARK[:3], REFERENCES[MEAN][1]]]
    strokes = [",".join(sorted(colours)) for colours in shown]
    assert found["light"] == ["rgb(255, 255, 255)", strokes[0]] and found["theme"] == "dark"
    assert found["dark"] == ["rgb(23, 24, 26)", strokes[1]] and found["hit"] == 0 and found["fetched"] == []


def test_values_show_at_the_pointer(page, browser, tmp_path):
    script = """
    const chart = charts.find(({ figure }) => figure.closest("#curves")); const { figure } = chart;
    await drawChart(chart);
    const dot = all(".mark-symbol path", figure).find((one) => one.__data__.datum.layer === "1"
      && one.__data__.datum.checkpoint === "llava" && one.__data__.datum.control === "checkpoint");
    const box = dot.getBoundingClientRect();
    const at = { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2, bubbles: true };
    const kinds = ["pointerover", "pointermove", "mouseover", "mousemove"];
    kinds.forEach((kind) => dot.dispatchEvent(new MouseEvent(kind, at)));
    await wait();
    const tip = document.getElementById("vg-tooltip-element");
    const menu = figure.querySelector(".vega-actions");
    return { tip: tip && tip.innerText, saved: all("a", menu).map((link) => link.textContent) };"""
    found = browser.visit(page, tmp_path, script)["found"]
    expected = ["checkpoint", "llava", "control", "checkpoint", "layer", "1", "value", "0.49"]
    assert found["tip"].split() == [*expected, "95", "%", "from", "0.48", "95", "%", "to", "0.5", "images", "50"]
    assert found["saved"] == ["Save as SVG", "Save as PNG"]


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_hangs_over_is_cut_or_is_empty(page, browser, tmp_path, width):
    script = """
    all("main details:not(.chart details)").forEach((details) => { details.open = true; }); await wait();
    for (const chart of charts) await drawChart(chart);
    await loaded("img");
    const found = { over: document.documentElement.scrollWidth - document.documentElement.clientWidth };
    found.cut = all(".chart svg.marks").filter(seen).flatMap((picture) => {
      const frame = picture.getBoundingClientRect();
      const inside = ({ left, right, top, bottom }) => left > frame.left - 1 && right < frame.right + 1
        && top > frame.top - 1 && bottom < frame.bottom + 1;
      return all("text", picture).filter((text) => !inside(text.getBoundingClientRect())).map((one) => one.textContent);
    });
    const flat = (one) => one.getBoundingClientRect().height < 20;
    found.flat = all(".chart svg.marks, .viewer img").filter(seen).filter(flat).length;
    found.lap = all(".chart svg.marks").filter(seen).flatMap((picture) => {
      const boxes = all("text", picture).map((text) => text.getBoundingClientRect());
      const across = (a, b) => a.left < b.right - 1 && b.left < a.right - 1;
      const lap = (a, b) => across(a, b) && a.top < b.bottom - 2 && b.top < a.bottom - 2;
      return boxes.flatMap((a, i) => boxes.slice(i + 1).filter((b) => lap(a, b)));
    }).length;
    const wide = (one) => !one.closest(".scroll") && one.getBoundingClientRect().right > innerWidth + 1;
    found.wide = all("main *").filter(seen).filter(wide).map((one) => one.outerHTML.slice(0, 100));
    found.drawn = all(".chart svg.marks").length === charts.length && charts.length > 20;
    return found;"""
    result = browser.visit(page, tmp_path, script, width)
    assert result["found"] == {"over": 0, "cut": [], "flat": 0, "lap": 0, "wide": [], "drawn": True}
    assert result["width"] == width


def test_keys_move_the_slider_open_values_and_sort_tables(page, browser, tmp_path):
    browser.open(page, tmp_path)
    browser.run("document.querySelector('#pictures input[type=range]').focus();")
    shown = "return [...new Set(all('#pictures .grids .strip').filter(seen).map((strip) => strip.dataset.layer))];"
    layers = [browser.run(shown)]
    for key in ("ArrowRight", "End", "ArrowLeft"):
        browser.press(key)
        layers.append(browser.run(shown))
    assert layers == [["0"], ["1"], ["3"], ["2"]]
    browser.run("document.querySelector('#curves .numbers summary').focus();")
    browser.press("Enter")
    browser.run("while (!document.querySelector('#curves .numbers tbody')) await wait();")
    for _ in range(4):  # two buttons that copy, the region that scrolls, the first column
        browser.press("Tab")
    browser.press("Enter")
    browser.press("Enter")
    script = "const table = document.querySelector('#curves .numbers table'); const [head] = all('th', table);"
    script += (
        "return [head.ariaSort, table.tBodies[0].rows[0].cells[0].textContent, document.activeElement.textContent];"
    )
    assert browser.run(script) == ["descending", "3", "layer"]


def test_values_below_a_chart_are_those_drawn(page, browser, tmp_path):
    script = """
    const chart = charts.find(({ figure }) => figure.closest("#differences")); const { figure } = chart;
    const details = figure.querySelector(".numbers"); details.open = true;
    const cells = (row) => all("th, td", row).map((cell) => cell.textContent);
    const rows = async () => { await wait(); await wait(); return all("tr", details).map(cells); };
    while (!details.querySelector("tbody")) await wait();
    const found = [await rows()];
    const reference = document.getElementById("reference");
    reference.value = "1"; reference.dispatchEvent(new Event("change")); found.push(await rows());
    return { found, drawn: chart.view.data("data_0").length };"""
    found = browser.visit(page, tmp_path, script)["found"]
    first, second = found["found"]
    assert first[0] == ["layer", "ola", HOSTILE] and second[0] == ["layer", "llava", HOSTILE] and found["drawn"] == 10
    assert [row[0] for row in first[1:]] == ["0", "1", "2", "3", "final"]
    assert first[1][1] == "0.010 [0.005, 0.017]" and second[1][1] == "−0.010 [−0.017, −0.005]"


@pytest.mark.parametrize("width", [390, 1280])
def test_answer_needs_no_sideways_scrolling(page, browser, tmp_path, width):
    script = "return all('.scroll').filter(seen).map((one) => [one.ariaLabel, one.scrollWidth - one.clientWidth]);"
    found = browser.visit(page, tmp_path, script, width)["found"]
    assert found and all(over <= 1 for _, over in found), found


def test_what_a_screen_reader_needs(page, browser, tmp_path):
    script = """
    const labels = (one) => one.labels ? [...one.labels].map((label) => label.textContent).join("") : "";
    await drawChart(charts[0]);
    const named = (one) => (one.getAttribute("aria-label") || one.textContent || labels(one) || one.title).trim();
    const operated = all("button, select, input, a, summary, [role=region], [role=group]");
    const drawn = (one) => (one.closest("[role=graphics-document]") || one).getAttribute("aria-label");
    const headed = (table) => table.caption && all("thead th", table).every((cell) => cell.scope === "col");
    const ids = all("[id]").map((one) => one.id);
    const levels = all("h1, h2, h3, h4").filter(seen).map((one) => Number(one.tagName[1]));
    return {
      images: all("img").filter((image) => !image.alt).length,
      drawings: all(".chart svg.marks").filter((one) => !drawn(one)).length,
      unnamed: operated.filter((one) => !named(one)).map((one) => one.outerHTML.slice(0, 80)),
      twice: ids.filter((id, i) => ids.indexOf(id) !== i),
      marks: ["header", "nav", "main", "footer", "h1"].map((tag) => all(tag).length),
      skipped: levels.filter((level, i) => i && level > levels[i - 1] + 1).length,
      tables: all("table.sortable").filter((table) => !headed(table)).length,
      dead: all("nav a, .skip").filter((link) => !document.querySelector(link.getAttribute("href"))).length,
      lang: document.documentElement.lang,
    };"""
    assert browser.visit(page, tmp_path, script)["found"] == {
        **{"images": 0, "drawings": 0, "unnamed": [], "twice": [], "marks": [1, 1, 1, 1, 1], "skipped": 0},
        **{"tables": 0, "dead": 0, "lang": "en"},
    }


def test_the_hostile_page_says_its_name(page):
    """The tests above did meet hostile names."""
    assert page.count("window.hit=1") > 20 and json.dumps(HOSTILE) not in page
