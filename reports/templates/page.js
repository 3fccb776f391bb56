"use strict";
// Progressive enhancement: the page works without this script. Names are inserted as text, never as markup.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };

  // Theme: the system's, unless the reader chooses one.
  const root = document.documentElement;
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const theme = make("button", { type: "button", className: "theme" });
  const named = () => { theme.textContent = dark() ? "Light colours" : "Dark colours"; };
  theme.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("probing-theme", root.dataset.theme); } catch (error) { /* storage is disabled */ }
    named();
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { named(); redraw(); });
  named();
  document.querySelector("header").prepend(theme);

  // Charts: drawn when they come into view, again when the theme changes.
  const themes = JSON.parse(document.body.dataset.themes);
  const hidden = new Set();
  const reference = document.getElementById("reference");
  const charts = all(".chart").map((figure) => ({ figure, spec: JSON.parse(figure.dataset.spec), view: null }));
  const values = () => ({ hidden: [...hidden], reference: reference ? reference.selectedOptions[0].textContent : "" });
  const update = async (chart) => {
    await chart.drawing; // else a chart that is being drawn would miss the change
    const { view, spec, tabulate } = chart;
    if (!view) return;
    spec.params.filter(({ name }) => name in values()).forEach(({ name }) => view.signal(name, values()[name]));
    await view.runAsync();
    tabulate();
  };
  const draw = (chart) => (chart.drawing = embed(chart));
  const embed = async (chart) => {
    const mode = dark() ? "dark" : "light";
    const spec = structuredClone(chart.spec);
    spec.params.forEach((one) => { if (one.name in values()) one.value = values()[one.name]; });
    if (chart.view) chart.view.finalize();
    chart.view = (await vegaEmbed(chart.figure.firstElementChild, spec, {
      config: themes[mode], renderer: "svg", tooltip: { theme: mode }, downloadFileName: spec.title,
      actions: { export: true, source: false, compiled: false, editor: false },
    })).view;
    chart.figure.querySelector(".vega-embed summary").ariaLabel = `Save: ${spec.title}`;
  };
  const watch = new IntersectionObserver((entries) => entries.filter((one) => one.isIntersecting).forEach(({ target }) => {
    watch.unobserve(target);
    draw(charts.find(({ figure }) => figure === target));
  }), { rootMargin: "600px" });
  charts.forEach(({ figure }) => watch.observe(figure));
  Object.assign(window, { charts, drawChart: draw }); // for the console and for tests
  const redraw = () => charts.filter(({ drawing }) => drawing).forEach((chart) => chart.drawing.then(() => draw(chart)));

  // Legends: clicking a name hides or shows its lines in all charts.
  all(".legend li[data-name]").forEach((item) => {
    const button = make("button", { type: "button" }, ...item.childNodes);
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => {
      const { name } = item.dataset;
      if (!hidden.delete(name)) hidden.add(name);
      all(".legend li[data-name]").forEach((one) => one.firstChild.setAttribute("aria-pressed", String(!hidden.has(one.dataset.name))));
      charts.forEach(update);
    });
    item.append(button);
  });

  // The reference of the differences.
  if (reference) reference.addEventListener("change", () => {
    all("[data-reference]").forEach((part) => { part.hidden = part.dataset.reference !== reference.value; });
    document.querySelector("[data-chosen]").textContent = reference.selectedOptions[0].textContent;
    charts.forEach(update);
  });

  // Images: one layer at a time; the other sliders follow if they have that layer.
  const sliders = all("input[type=range]").map((slider) => ({ slider, layers: JSON.parse(slider.dataset.layers), viewer: slider.closest(".viewer") }));
  const turn = ({ slider, layers, viewer }, place) => {
    slider.value = place;
    slider.setAttribute("aria-valuetext", `layer ${layers[place]}`);
    viewer.querySelector("output").textContent = layers[place];
    all(".strip", viewer).forEach((strip) => strip.classList.toggle("on", strip.dataset.layer === layers[place]));
  };
  sliders.forEach((one) => {
    turn(one, 0);
    one.slider.addEventListener("input", () => {
      const place = Number(one.slider.value);
      turn(one, place);
      sliders.forEach((other) => { const same = other.layers.indexOf(one.layers[place]); if (other !== one && same >= 0) turn(other, same); });
    });
  });

  // Tables: sorting by any column; copying as CSV or LaTeX in the displayed order.
  const text = (cell) => (cell.querySelector("button") || cell).textContent.trim().replaceAll("\u00a0", " ");
  const number = (string) => { const found = string.replaceAll("−", "-").match(/^[+-]?\d+(\.\d+)?/); return found ? Number(found[0]) : NaN; };
  const lines = (table) => all("tr", table).map((row) => all("th, td", row).map(text));
  const quoted = (cell) => /[",\n]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell;
  const csv = (table) => lines(table).map((row) => row.map(quoted).join(",") + "\n").join("");
  const signs = { "\\": "\\textbackslash{}", "{": "\\{", "}": "\\}", "&": "\\&", "%": "\\%", "$": "\\$", "#": "\\#", "_": "\\_", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "<": "$<$", ">": "$>$", "↑": "$\\uparrow$", "↓": "$\\downarrow$", "−": "$-$", "×": "$\\times$", "·": "$\\cdot$", "…": "\\dots{}" };
  const tex = (string) => string.replace(/[\\{}&%$#_~^<>↑↓−×·…]/g, (sign) => signs[sign]).replace(/(^|[\s[])-(?=\d)/g, "$1$-$$");
  const latex = (table) => {
    const [head, ...rows] = lines(table);
    const columns = all("thead th", table).map((cell) => cell.classList.contains("name") || cell === cell.parentElement.firstElementChild ? "l" : "r").join("");
    const row = (cells) => `${cells.map(tex).join(" & ")} \\\\`;
    return [`\\begin{tabular}{${columns}}`, "\\toprule", row(head), "\\midrule", ...rows.map(row), "\\bottomrule", "\\end{tabular}", ""].join("\n");
  };
  function equip(table) {
    const heads = all("thead th", table);
    const body = table.tBodies[0];
    const first = [...body.rows];
    heads.forEach((head, column) => {
      const button = make("button", { type: "button" }, ...head.childNodes);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const order = { none: "ascending", ascending: "descending", descending: "none" }[head.getAttribute("aria-sort")];
        heads.forEach((other) => other.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", order);
        const turned = order === "descending" ? -1 : 1;
        const key = (row) => text(row.cells[column]);
        const numeric = first.filter((row) => !Number.isNaN(number(key(row)))).length * 2 > first.filter((row) => key(row)).length;
        const compare = (one, two) => {
          const [a, b] = [key(one), key(two)];
          if (!numeric) return turned * a.localeCompare(b, "en", { numeric: true });
          const [m, n] = [number(a), number(b)];
          if (Number.isNaN(m) || Number.isNaN(n)) return Number(Number.isNaN(m)) - Number(Number.isNaN(n)); // text and empty cells last
          return turned * (m - n);
        };
        body.append(...(order === "none" ? first : [...first].sort(compare)));
      });
    });
    const said = make("span", { className: "soft", role: "status" });
    const caption = table.caption.textContent;
    const tools = make("div", { className: "tools" });
    for (const [name, form] of [["CSV", csv], ["LaTeX", latex]]) {
      const button = make("button", { type: "button", ariaLabel: `Copy as ${name}: ${caption}` }, `Copy as ${name}`);
      button.addEventListener("click", async () => {
        try { await navigator.clipboard.writeText(form(table)); said.textContent = `copied as ${name}`; }
        catch (error) { said.textContent = "the browser does not allow copying"; }
      });
      tools.append(button);
    }
    tools.append(said);
    const scroll = table.closest(".scroll");
    Object.assign(scroll, { tabIndex: 0, role: "region", ariaLabel: caption });
    scroll.before(tools);
  }
  all("table.sortable").forEach(equip);

  // The displayed values of a chart as a table: a row per layer, a column per line. Filled when it is opened.
  const tabular = (rows) => {
    if (!("layer" in rows[0])) return [["checkpoint", "quality", "accuracy"], ...rows.map((row) => [row.checkpoint, String(row.x), interval(row)])];
    const line = ({ checkpoint, control }) => control === "checkpoint" ? checkpoint : `${checkpoint}, ${control}`;
    const [names, layers] = [line, ({ layer }) => layer].map((key) => [...new Set(rows.map(key))]);
    const cells = new Map(rows.map((row) => [`${row.layer}\n${line(row)}`, interval(row)]));
    return [["layer", ...names], ...layers.map((layer) => [layer, ...names.map((name) => cells.get(`${layer}\n${name}`) || "")])];
  };
  const interval = ({ value, ci_low: low, ci_high: high }) => {
    if (value === null) return "no finite score";
    const digits = Math.abs(value) < 10 ? 3 : Math.abs(value) < 1000 ? 1 : 0;
    const [one, ...ends] = [value, low, high].map((x) => x === null ? "" : x.toFixed(digits).replace("-", "−"));
    return ends[0] ? `${one} [${ends.join(", ")}]` : one;
  };
  charts.forEach((chart) => {
    const { title } = chart.spec;
    const details = make("details", { className: "numbers" }, make("summary", { ariaLabel: `Values: ${title}` }, "Values"));
    chart.tabulate = async () => {
      if (details.open) await (chart.drawing || draw(chart));
      all(".sheet", details).forEach((old) => old.remove());
      const rows = details.open ? chart.view.data("data_0") : [];
      if (!rows.length) return;
      const [head, ...body] = tabular(rows);
      const cell = (kind, name, k) => Object.assign(make(k ? kind : "th", { scope: kind === "th" ? "col" : "row" }, name), k ? {} : { className: "name" });
      const table = make("table", { className: "sortable" }, make("caption", {}, title),
        make("thead", {}, make("tr", {}, ...head.map((name, k) => cell("th", name, k)))),
        make("tbody", {}, ...body.map((row) => make("tr", {}, ...row.map((one, k) => {
          const made = cell("td", one, k);
          made.dataset.head = head[k];
          return made;
        })))));
      details.append(make("div", { className: "sheet" }, make("div", { className: "scroll" }, table)));
      equip(table);
    };
    details.addEventListener("toggle", chart.tabulate);
    chart.figure.append(details);
  });
})();
