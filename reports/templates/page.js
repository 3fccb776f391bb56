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
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", named);
  named();
  document.querySelector("header").prepend(theme);

  // Plots: values at a position, for pointer, touch and keyboard.
  const heard = make("div", { className: "heard" });
  heard.setAttribute("role", "status");
  document.body.append(heard);
  const hidden = new Set();
  const shown = (number) => number === null ? "" : (Math.abs(number) >= 100 ? number.toFixed(1) : number.toFixed(4)).replace("-", "−");
  const entries = (data, place) => [
    ...data.lines.filter((line) => line.value[place] !== null && !hidden.has(line.name))
      .map((line) => [line.name, line.tone, shown(line.value[place]), line.low[place] === null ? "" : `[${shown(line.low[place])}, ${shown(line.high[place])}]`]),
    ...data.levels.map((level) => [level.name, level.tone, shown(level.value), ""]),
  ];
  const called = (data, place) => /^\d/.test(data.labels[place]) && data.axis.startsWith("LLM layer") ? `layer ${data.labels[place]}` : `${data.labels[place]}${data.axis === "words" ? " words" : ""}`;
  let open = null;
  const close = () => {
    if (!open) return;
    open.tip.remove();
    open.guide.setAttribute("visibility", "hidden");
    open = null;
  };
  const show = (figure, data, place, aloud) => {
    close();
    const guide = figure.querySelector(".guide");
    guide.setAttribute("transform", `translate(${data.x[place]} 0)`);
    guide.setAttribute("visibility", "visible");
    const found = entries(data, place);
    const body = make("tbody", {}, ...found.map(([name, tone, value, range]) =>
      make("tr", {}, make("td", {}, make("i", { className: `dot ${tone}` })), make("td", { className: "name" }, name), make("td", {}, value), make("td", {}, range))));
    const tip = make("div", { className: "tip" }, make("b", {}, called(data, place)), make("table", {}, body));
    tip.setAttribute("aria-hidden", "true");
    figure.append(tip);
    const side = data.x[place] / 420 * figure.clientWidth;
    tip.style.left = `${Math.max(0, side + 12 + tip.offsetWidth <= figure.clientWidth ? side + 12 : Math.min(side - tip.offsetWidth - 12, figure.clientWidth - tip.offsetWidth))}px`;
    if (aloud) heard.textContent = `${called(data, place)}: ${found.map(([name, , value, range]) => `${name} ${value} ${range}`).join("; ")}`;
    open = { figure, tip, guide, place };
  };
  const fill = (details, data) => {
    if (details.querySelector("table")) return;
    const lines = data.lines;
    const head = make("tr", {}, ...[data.axis, ...lines.map((line) => line.name)].map((name, i) => { const cell = make("th", { scope: "col" }, name); if (!i) cell.className = "name"; return cell; }));
    const rows = data.labels.map((label, place) => make("tr", {}, make("th", { scope: "row" }, label), ...lines.map((line) => make("td", {}, line.value[place] === null ? "" : `${shown(line.value[place])} [${shown(line.low[place])}, ${shown(line.high[place])}]`))));
    const table = make("table", { className: "sortable" }, make("caption", {}, data.title), make("thead", {}, head), make("tbody", {}, ...rows));
    const sheet = make("div", { className: "sheet" }, make("div", { className: "scroll" }, table));
    details.append(sheet);
    equip(table);
  };
  all(".plot").forEach((figure) => {
    const data = JSON.parse(figure.dataset.plot);
    const picture = figure.querySelector("svg");
    if (!data.x.length) return;
    picture.tabIndex = 0;
    const nearest = (event) => {
      const box = picture.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * 420;
      return data.x.reduce((best, place, i) => Math.abs(place - x) < Math.abs(data.x[best] - x) ? i : best, 0);
    };
    const point = (event) => show(figure, data, nearest(event), false);
    picture.addEventListener("pointermove", point);
    picture.addEventListener("pointerdown", point);
    picture.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") close(); });
    picture.addEventListener("focus", () => { if (picture.matches(":focus-visible")) show(figure, data, 0, true); });
    picture.addEventListener("blur", close);
    picture.addEventListener("keydown", (event) => {
      const last = data.x.length - 1;
      const now = open && open.figure === figure ? open.place : -1;
      const next = { ArrowRight: Math.min(now + 1, last), ArrowLeft: Math.max(now - 1, 0), Home: 0, End: last }[event.key];
      if (event.key === "Escape") close();
      if (next === undefined) return;
      event.preventDefault();
      show(figure, data, next, true);
    });
    const section = figure.closest(".panels").parentElement;
    if (!all(":scope > .numbers", section).length) {
      const details = make("details", { className: "data" }, make("summary", {}, "Values"));
      details.addEventListener("toggle", () => { if (details.open) fill(details, data); });
      details.fill = () => fill(details, data);
      figure.append(details);
    }
  });

  // Legends: clicking a name hides or shows its lines in all plots.
  const redraw = () => {
    all(".plot g[data-name]").forEach((group) => group.classList.toggle("off", hidden.has(group.dataset.name)));
    all(".legend button").forEach((button) => button.setAttribute("aria-pressed", String(!hidden.has(button.dataset.name))));
  };
  all(".legend li[data-name]").forEach((item) => {
    const button = make("button", { type: "button" }, ...item.childNodes);
    button.dataset.name = item.dataset.name;
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => {
      const name = button.dataset.name;
      if (!hidden.delete(name)) hidden.add(name);
      redraw();
    });
    item.append(button);
  });

  // The reference of the differences.
  const reference = document.getElementById("reference");
  if (reference) reference.addEventListener("change", () => {
    all("[data-reference]").forEach((part) => { part.hidden = part.dataset.reference !== reference.value; });
    document.querySelector("[data-chosen]").textContent = reference.selectedOptions[0].textContent;
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
  const text = (cell) => cell.innerText === undefined ? cell.textContent.trim() : (cell.querySelector("button") || cell).textContent.trim();
  const number = (string) => { const found = string.replace("−", "-").match(/^[+-]?\d+(\.\d+)?/); return found ? Number(found[0]) : NaN; };
  const interval = /^([+−-]?[\d.]+) \[([+−-]?[\d.]+), ([+−-]?[\d.]+)\](.*)$/;
  const lines = (table) => all("tr", table).map((row) => all("th, td", row).map(text));
  const quoted = (cell) => /[",\n]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell;
  const csv = (table) => {
    const [head, ...rows] = lines(table);
    const wide = head.map((_, i) => rows.some((row) => interval.test(row[i])));
    const extra = head.map((_, i) => rows.some((row) => (row[i].match(interval) || [])[4]));
    const top = head.flatMap((name, i) => wide[i] ? [name, `${name} (low)`, `${name} (high)`, ...(extra[i] ? [`${name} (layer)`] : [])] : [name]);
    const body = rows.map((row) => row.flatMap((cell, i) => {
      if (!wide[i]) return [cell];
      const [, value = cell, low = "", high = "", rest = ""] = cell.match(interval) || [];
      return [value, low, high].map((one) => one.replace("−", "-").replace(/^\+/, "")).concat(extra[i] ? [rest.replace(/^\s*·?\s*/, "")] : []);
    }));
    return [top, ...body].map((row) => row.map(quoted).join(",")).join("\n") + "\n";
  };
  const signs = { "\\": "\\textbackslash{}", "{": "\\{", "}": "\\}", "&": "\\&", "%": "\\%", "$": "\\$", "#": "\\#", "_": "\\_", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "<": "$<$", ">": "$>$", "↑": "$\\uparrow$", "↓": "$\\downarrow$", "−": "$-$", "×": "$\\times$", "·": "$\\cdot$", "…": "\\dots{}" };
  const tex = (string) => string.replace(/[\\{}&%$#_~^<>↑↓−×·…]/g, (sign) => signs[sign]).replace(/(^|[\s[])-(?=\d)/g, "$1$-$$");
  const latex = (table) => {
    const [head, ...rows] = lines(table);
    const columns = all("thead th", table).map((cell) => cell.classList.contains("name") || cell === cell.parentElement.firstElementChild ? "l" : "r").join("");
    const row = (cells) => `${cells.map(tex).join(" & ")} \\\\`;
    return [`\\begin{tabular}{${columns}}`, "\\toprule", row(head), "\\midrule", ...rows.map(row), "\\bottomrule", "\\end{tabular}", ""].join("\n");
  };
  const copy = async (content) => {
    try { await navigator.clipboard.writeText(content); return true; } catch (error) { /* fall back to execCommand */ }
    const area = make("textarea", { value: content, className: "heard" });
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
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
    const said = make("span", { className: "soft" });
    said.setAttribute("role", "status");
    const tools = make("div", { className: "tools" });
    for (const [name, form] of [["CSV", csv], ["LaTeX", latex]]) {
      const button = make("button", { type: "button" }, `Copy as ${name}`);
      button.setAttribute("aria-label", `Copy as ${name}: ${table.caption ? table.caption.textContent : "table"}`);
      button.addEventListener("click", async () => { said.textContent = await copy(form(table)) ? `copied as ${name}` : "the browser does not allow copying"; });
      tools.append(button);
    }
    tools.append(said);
    const scroll = table.closest(".scroll");
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", table.caption ? table.caption.textContent : "table");
    scroll.before(tools);
    table.texts = { csv: () => csv(table), latex: () => latex(table) };
  }
  all("table.sortable").forEach(equip);

  // Open all details for printing.
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = all("details:not([open])");
    closed.forEach((details) => { if (details.fill) details.fill(); details.open = true; });
  });
  addEventListener("afterprint", () => closed.forEach((details) => { details.open = false; }));
})();
