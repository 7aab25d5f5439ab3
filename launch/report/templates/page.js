"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const color = (number) => getComputedStyle(root).getPropertyValue(`--c${number}`).trim();
  const tone = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();

  // Colors: as the system has them, light or dark.
  const themes = ["auto", "light", "dark"];
  const button = document.getElementById("theme");
  const remember = (value) => { try { localStorage.setItem("theme", value); } catch (error) { /* a page from a file */ } };
  const remembered = () => { try { return localStorage.getItem("theme"); } catch (error) { return null; } };
  const redraw = [];
  function setTheme(theme) {
    if (theme === "auto") root.removeAttribute("data-theme"); else root.setAttribute("data-theme", theme);
    button.textContent = `Colors: ${theme}`;
    button.dataset.theme = theme;
    button.setAttribute("aria-label", `Colors: ${theme === "auto" ? "as the system has them" : theme}`);
    redraw.forEach((each) => each());
  }
  button.addEventListener("click", () => {
    const next = themes[(themes.indexOf(button.dataset.theme) + 1) % themes.length];
    remember(next);
    setTheme(next);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw.forEach((each) => each()));

  // Tables: a click on a heading sorts by its column, another one the other way round.
  const valueOf = (row, column) => {
    const cell = row.cells[column];
    const order = cell.dataset.order;
    return order === "" || order === undefined ? cell.textContent.trim() : order === "-inf" ? -Infinity : Number(order);
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") !== "ascending";
      headings.forEach((each) => each.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((one, other) => {
        const [first, second] = [valueOf(one, column), valueOf(other, column)];
        const order = typeof first === "number" && typeof second === "number"
          ? first - second : String(first).localeCompare(String(second), undefined, { numeric: true });
        return up ? order : -order;
      });
      table.tBodies[0].append(...rows);
    }));
  }

  // Figures: pointer and arrow keys read values.
  const shown = (value, percent) => {
    if (percent) return `${Number((100 * value).toPrecision(4))} %`;
    return Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? value.toExponential(2)
      : String(Number(value.toPrecision(4)));
  };
  function nearest(values, x) {
    let best = -1;
    values.forEach((value, place) => { if (best < 0 || Math.abs(value - x) < Math.abs(values[best] - x)) best = place; });
    return best;
  }
  function readout(figure, x) {
    const spans = figure.lines.flatMap((line) => line.x);
    const near = (Math.max(...spans) - Math.min(...spans)) / 20 || 1;
    const parts = [];
    for (const line of figure.lines) {
      if (line.faint || !line.x.length) continue;
      const place = nearest(line.x, x);
      if (Math.abs(line.x[place] - x) > near) continue;
      let text = `${line.name} ${shown(line.y[place], figure.percent)}`;
      if (line.low) text += ` (${shown(line.low[place], figure.percent)} to ${shown(line.high[place], figure.percent)})`;
      parts.push(text);
    }
    const where = figure.categories.length ? figure.categories[Math.round(x)] || "" : `${figure.x} ${shown(x, false)}`;
    return `${where}: ${parts.join(" · ") || "nothing"}`;
  }
  function cursor(svg, x) {
    let line = svg.querySelector(".cursor");
    if (!line) {
      line = document.createElementNS("http://www.w3.org/2000/svg", "line");
      line.setAttribute("class", "cursor");
      svg.append(line);
    }
    if (svg.dataset.radar) {
      const [count, middle, height, reach] = ["radar", "middle", "height", "reach"].map((name) => Number(svg.dataset[name]));
      const angle = 2 * Math.PI * x / count;
      const ends = [["x1", middle], ["y1", height], ["x2", middle + reach * Math.sin(angle)], ["y2", height - reach * Math.cos(angle)]];
      for (const [name, value] of ends) line.setAttribute(name, value);
      return;
    }
    const [low, high, left, right] = ["low", "high", "left", "right"].map((name) => Number(svg.dataset[name]));
    const at = left + (x - low) / (high - low) * (right - left);
    const box = svg.viewBox.baseVal;
    for (const [name, value] of [["x1", at], ["x2", at], ["y1", 14], ["y2", box.height - 44]]) line.setAttribute(name, value);
  }
  for (const figure of data.figures) {
    const element = document.querySelector(`[data-figure="${CSS.escape(figure.key)}"]`);
    const svg = element.querySelector("svg.plot");
    const text = element.querySelector(".readout");
    const places = [...new Set(figure.lines.filter((line) => !line.faint).flatMap((line) => line.x))].sort((a, b) => a - b);
    let at = -1;
    const show = (x) => { text.textContent = readout(figure, x); cursor(svg, x); };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const [low, high, left, right] = ["low", "high", "left", "right"].map((name) => Number(svg.dataset[name]));
      const across = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      if (svg.dataset.radar) {
        const up = (event.clientY - box.top) / box.height * svg.viewBox.baseVal.height;
        const [count, middle, height] = ["radar", "middle", "height"].map((name) => Number(svg.dataset[name]));
        const turn = Math.atan2(across - middle, height - up) / (2 * Math.PI);
        at = Math.round((turn + 1) * count) % count;
        show(at);
        return;
      }
      const wanted = low + (across - left) / (right - left) * (high - low);
      at = nearest(places, wanted);
      if (at >= 0) show(places[at]);
    });
    element.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -places.length, End: places.length };
      if (!(event.key in steps) || event.target !== element) return;
      event.preventDefault();
      at = Math.min(places.length - 1, Math.max(0, at + steps[event.key]));
      show(places[at]);
    });
  }

  // Plotly, where the page has it: figures that can be zoomed. The SVG stays for paper.
  const safe = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  function traces(figure) {
    if (figure.radar) {
      return figure.lines.map((line) => ({
        type: "scatterpolar", mode: "lines+markers", fill: "toself", name: safe(line.name),
        r: [...line.y, line.y[0]], theta: [...figure.categories, figure.categories[0]].map(safe),
        line: { color: color(line.color), width: 2.2 }, fillcolor: color(line.color) + "22", marker: { color: color(line.color), size: 5 },
      }));
    }
    return figure.lines.flatMap((line) => {
      const own = color(line.color);
      const base = { x: line.x, y: line.y, name: safe(line.name), showlegend: false };
      if (line.kind === "bars") return [{ ...base, type: "bar", marker: { color: own } }];
      const dots = line.kind === "points";
      const trace = {
        ...base, type: "scatter", mode: dots || line.x.length === 1 ? "markers" : "lines",
        opacity: line.faint ? 0.32 : 1, hoverinfo: line.faint ? "skip" : undefined,
        line: { color: own, width: line.faint ? 1 : 2.2, dash: line.dashed ? "dash" : "solid" },
        marker: { color: own, size: line.x.length < 60 ? 7 : 4 },
      };
      if (!line.low) return [trace];
      if (dots) {
        const up = line.high.map((value, place) => value - line.y[place]);
        const down = line.low.map((value, place) => line.y[place] - value);
        return [{ ...trace, error_y: { type: "data", symmetric: false, array: up, arrayminus: down, color: own, width: 0 } }];
      }
      const edge = { ...base, type: "scatter", mode: "lines", line: { width: 0, color: own }, hoverinfo: "skip" };
      return [{ ...edge, y: line.low }, { ...edge, y: line.high, fill: "tonexty", fillcolor: own, opacity: 0.2 }, trace]
        .map((each, place) => place === 1 ? { ...each, fillcolor: own + "33" } : each);
    });
  }
  function layout(figure) {
    const ink = tone("ink"), soft = tone("soft"), rule = tone("rule");
    const axis = { gridcolor: rule, zerolinecolor: rule, linecolor: soft, tickfont: { color: soft }, automargin: true };
    const across = { ...axis, title: { text: safe(figure.x), font: { color: ink, size: 13 } }, showgrid: false, zeroline: false };
    if (figure.categories.length) {
      Object.assign(across, { range: [-0.5, figure.categories.length - 0.5], tickvals: figure.categories.map((_, place) => place), ticktext: figure.categories.map(safe) });
    }
    if (figure.radar) {
      const round = { gridcolor: rule, linecolor: rule, tickfont: { color: soft } };
      return {
        height: 300, margin: { l: 60, r: 60, t: 30, b: 30 }, paper_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: 12 }, showlegend: false,
        hoverlabel: { bgcolor: tone("card"), font: { color: ink } },
        polar: { bgcolor: "rgba(0,0,0,0)", radialaxis: { ...round, range: [0, figure.radar], angle: 90, tickangle: 90 }, angularaxis: { ...round, tickfont: { color: ink }, rotation: 90, direction: "clockwise" } },
      };
    }
    const upright = { type: "line", yref: "paper", y0: 0, y1: 1, line: { color: soft, dash: "dash", width: 1 } };
    const level = { type: "line", xref: "paper", x0: 0, x1: 1, line: { color: soft, dash: "dot", width: 1 } };
    return {
      height: 280, margin: { l: 56, r: 12, t: 12, b: 46 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: ink, size: 12 }, hovermode: "closest", showlegend: false, bargap: 0.1,
      xaxis: across, yaxis: { ...axis, tickformat: figure.percent ? ".0%" : undefined },
      hoverlabel: { bgcolor: tone("card"), font: { color: ink } },
      shapes: [
        ...figure.marks.map(([x]) => ({ ...upright, x0: x, x1: x })),
        ...figure.levels.map((y) => ({ ...level, y0: y, y1: y })),
      ],
      annotations: figure.marks.map(([x, text]) => ({ x, y: 1, yref: "paper", text: safe(text), showarrow: false, font: { color: ink } })),
    };
  }
  if (window.Plotly) {
    const options = { responsive: true, displayModeBar: false, doubleClick: "reset" };
    const drawing = new IntersectionObserver((entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => {
      drawing.unobserve(entry.target);
      const element = entry.target.closest("figure");
      const figure = data.figures.find((each) => each.key === element.dataset.figure);
      const place = document.createElement("div");
      place.className = "live-plot";
      entry.target.append(place);
      entry.target.classList.add("js-plotly");
      const draw = () => window.Plotly.react(place, traces(figure), layout(figure), options);
      redraw.push(draw);
      draw();
    }), { rootMargin: "600px" });
    document.querySelectorAll(".drawn").forEach((element) => drawing.observe(element));
  }
  setTheme(themes.includes(remembered()) ? remembered() : "auto");

  // A served page asks now and then whether there is something new, and keeps what was open.
  const opened = () => [...document.querySelectorAll("details")].map((each) => each.open);
  if (data.reload) {
    try {
      const before = JSON.parse(sessionStorage.getItem("opened") || "[]");
      const all = [...document.querySelectorAll("details")];
      if (before.length === all.length) all.forEach((each, place) => { each.open = before[place]; });
    } catch (error) { /* nothing was kept */ }
    setInterval(async () => {
      try {
        const answer = await fetch("state", { cache: "no-store" });
        if (answer.ok && (await answer.text()) !== data.state) {
          sessionStorage.setItem("opened", JSON.stringify(opened()));
          location.reload();
        }
      } catch (error) { /* the server has ended: what is shown stays */ }
    }, 1000 * data.reload);
  }
})();
